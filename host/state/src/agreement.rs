//! Whether the state and the sinks agree, before the first record: pure decisions.
//!
//! A sink holds the truth about itself, and the state remembers how far each sink was. A sink that
//! stands before that, or knows nothing of a shard that the state knows of, was restored from a backup.
//! A state with a lower number than a sink has seen was restored from an older copy.
//!
//! | the sink has | the state remembers | the sink needs records |
//! |---|---|---|
//! | no position | nothing | from the checkpoint on: it is new |
//! | no position | a position | it was restored: as configured |
//! | a position below what is remembered, or below the checkpoint | | it was restored: as configured |
//! | a position | | behind its position |

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use shardmill_config::OnPositionMismatch;
use shardmill_core::owner::{OwnerName, StateMark};
use shardmill_core::record::{Position, ShardId, ShardStart, SinkName};

/// Shards that an error or a warning names one by one.
const NAMED_MAX: usize = 5;

/// What is known of a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardState {
    /// Every sink has everything up to here; `None`: nothing yet.
    pub checkpoint: Option<Position>,
    /// The shard was closed and everything in it is settled.
    pub ended: bool,
    /// Where it was begun.
    pub start: ShardStart,
    /// Everything that had arrived by then was read and settled, in milliseconds since 1970.
    pub caught_up_ms: Option<i64>,
    /// The checkpoint was here before a restored sink moved it back: up to here, revisions that ran
    /// first may be pruned, and only restored sinks need records.
    pub reread_to: Option<Position>,
}

/// A sink that stands before what is remembered of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Where the sink stands; `None`: it has no position.
    pub stands: Option<Position>,
    /// How far it was.
    pub remembered: Position,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.stands {
            Some(stands) => write!(f, "it stands at {stands} and was at {}", self.remembered),
            None => write!(f, "it has no position and was at {}", self.remembered),
        }
    }
}

/// How far one sink is with one shard, by both accounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stands {
    /// The sink's own position, or how far its rows were given up.
    pub stands: Option<Position>,
    /// How far it was, as the state remembers.
    pub remembered: Option<Position>,
}

/// Decides after which record a sink needs records. `None`: from the start of the shard on.
///
/// # Errors
/// [`Mismatch`] where the sink was restored and nobody has said whom to believe.
pub fn agree(
    own: &Stands,
    checkpoint: Option<&Position>,
    policy: OnPositionMismatch,
) -> Result<Option<Position>, Mismatch> {
    let stands = own.stands.as_ref();
    // A sink without any position, of which nothing is remembered, is new.
    let of_checkpoint = stands.and(checkpoint);
    let remembered = own.remembered.as_ref().max(of_checkpoint);
    match remembered {
        Some(remembered) if stands < Some(remembered) => match policy {
            OnPositionMismatch::Stop => {
                Err(Mismatch { stands: stands.cloned(), remembered: remembered.clone() })
            }
            OnPositionMismatch::Sink => Ok(stands.cloned()),
            OnPositionMismatch::Checkpoint => Ok(stands.max(checkpoint).cloned()),
        },
        _ => Ok(stands.or(checkpoint).cloned()),
    }
}

/// A shard, as the stream lists it and as the state knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardFacts {
    /// Its parents; `None`: the stream does not list the shard any more.
    pub listed_parents: Option<Vec<ShardId>>,
    /// `None`: the state does not know it.
    pub state: Option<ShardState>,
    /// The exact sinks.
    pub sinks: BTreeMap<SinkName, Stands>,
}

/// A shard that is to be read once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reopened {
    /// The shard.
    pub shard: ShardId,
    /// Its checkpoint from now on.
    pub checkpoint: Option<Position>,
    /// Sinks that were restored, and where they stand: this is what is remembered from now on.
    pub sinks: Vec<(SinkName, Option<Position>)>,
}

/// Rows that a sink has lost for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The sink.
    pub sink: SinkName,
    /// The shard.
    pub shard: ShardId,
    /// Where it stands, and where it stood.
    pub mismatch: Mismatch,
    /// It stays without records up to here; `None`: it is given all of them after all.
    pub without_to: Option<Position>,
    /// The stream does not list the shard any more; otherwise the configuration says to go on.
    pub is_unlisted: bool,
}

/// Consequences of a comparison of all shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgreementPlan {
    /// Sinks that were restored, where nobody has said whom to believe.
    pub mismatches: Vec<(SinkName, ShardId, Mismatch)>,
    /// Shards to read once more, children of such shards included.
    pub reopened: Vec<Reopened>,
    /// Sinks that are behind and stay so: in shards that are not listed any more, and where the
    /// configuration says to go on from the checkpoint.
    pub lost: Vec<Lost>,
    /// Shards that the state does not know and in which a sink has a position.
    pub adopted: Vec<ShardId>,
}

/// Compares what the state remembers with where the sinks stand, in every shard.
pub fn compare(facts: &BTreeMap<ShardId, ShardFacts>, policy: OnPositionMismatch) -> AgreementPlan {
    let mut plan = AgreementPlan::default();
    let mut restored: BTreeMap<&ShardId, Vec<(&SinkName, &Stands)>> = BTreeMap::new();
    for (shard, own) in facts {
        let is_listed = own.listed_parents.is_some();
        let Some(state) = &own.state else {
            if is_listed && own.sinks.values().any(|sink| sink.stands.is_some()) {
                plan.adopted.push(shard.clone());
            }
            continue;
        };
        for (sink, stands) in &own.sinks {
            let Some(remembered) = &stands.remembered else { continue };
            if stands.stands.as_ref() >= Some(remembered) {
                continue;
            }
            let mismatch =
                Mismatch { stands: stands.stands.clone(), remembered: remembered.clone() };
            match (is_listed, policy) {
                (false, _) | (true, OnPositionMismatch::Checkpoint) => {
                    let without_to = match is_listed {
                        true => {
                            let checkpoint = state.checkpoint.as_ref();
                            checkpoint.filter(|to| stands.stands.as_ref() < Some(*to))
                        }
                        false => Some(remembered),
                    };
                    plan.lost.push(Lost {
                        sink: sink.clone(),
                        shard: shard.clone(),
                        without_to: without_to.cloned(),
                        mismatch,
                        is_unlisted: !is_listed,
                    });
                }
                (true, OnPositionMismatch::Stop) => {
                    plan.mismatches.push((sink.clone(), shard.clone(), mismatch));
                }
                (true, OnPositionMismatch::Sink) => {
                    restored.entry(shard).or_default().push((sink, stands));
                }
            }
        }
    }
    let mut reopened: HashSet<&ShardId> = restored.keys().copied().collect();
    // Descendants too, so that rows of one key come in their order.
    loop {
        let before = reopened.len();
        for (shard, own) in facts {
            let parents = own.listed_parents.iter().flatten();
            if own.state.is_some() && parents.clone().any(|parent| reopened.contains(parent)) {
                reopened.insert(shard);
            }
        }
        if reopened.len() == before {
            break;
        }
    }
    for (shard, own) in facts {
        let Some(state) = own.state.as_ref().filter(|_| reopened.contains(shard)) else { continue };
        let sinks = restored.remove(shard).unwrap_or_default();
        let lowest = sinks.iter().map(|(_, stands)| stands.stands.as_ref()).min();
        let checkpoint = match lowest {
            Some(lowest) => lowest.min(state.checkpoint.as_ref()).cloned(),
            None => state.checkpoint.clone(),
        };
        plan.reopened.push(Reopened {
            shard: shard.clone(),
            checkpoint,
            sinks: sinks
                .into_iter()
                .map(|(sink, stands)| (sink.clone(), stands.stands.clone()))
                .collect(),
        });
    }
    plan
}

impl AgreementPlan {
    /// The error for sinks that were restored, if there are any.
    pub fn refusal(&self) -> Option<String> {
        let (sink, _, _) = self.mismatches.first()?;
        let sinks: HashSet<&SinkName> = self.mismatches.iter().map(|(sink, ..)| sink).collect();
        let named = self.mismatches.iter().take(NAMED_MAX);
        let named: Vec<String> = named
            .map(|(sink, shard, mismatch)| format!("sink {sink} in shard {shard}: {mismatch}"))
            .collect();
        let more = match self.mismatches.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        let who = match sinks.len() {
            1 => format!("sink {sink} is"),
            many => format!("{many} sinks are"),
        };
        Some(format!(
            "{who} behind what the pipeline's state remembers: {}{more}. Was the destination restored \
             from a backup, is it another one than before, or did another application move the checkpoint? Set `on_position_mismatch = \
             \"sink\"` under [pipeline] to read the missing records again (shards that have ended are \
             opened again; other sinks skip what they have), or \"checkpoint\" to go on without them",
            named.join("; ")
        ))
    }

    /// The warning for rows that sinks stay without, if there are any.
    pub fn loss(&self) -> Option<String> {
        let of = |is_unlisted: bool| {
            let lost: Vec<&Lost> = self
                .lost
                .iter()
                .filter(|lost| lost.is_unlisted == is_unlisted && lost.without_to.is_some())
                .collect();
            let named = lost.iter().take(NAMED_MAX).map(|lost| {
                format!("sink {} in shard {}: {}", lost.sink, lost.shard, lost.mismatch)
            });
            let mut named: Vec<String> = named.collect();
            match lost.len().saturating_sub(NAMED_MAX) {
                0 => {}
                more => named.push(format!("and {more} more")),
            }
            named.join("; ")
        };
        let (unlisted, skipped) = (of(true), of(false));
        let mut parts = Vec::new();
        if !unlisted.is_empty() {
            parts.push(format!(
                "rows are lost: a sink was restored, and the stream does not list these shards any \
                 more, so their records cannot be read again: {unlisted}"
            ));
        }
        if !skipped.is_empty() {
            parts.push(format!(
                "going on without rows that a restored sink has lost, as `on_position_mismatch = \
                 \"checkpoint\"` says: {skipped}"
            ));
        }
        (!parts.is_empty()).then(|| parts.join(". "))
    }
}

/// The mark of a state, as a row of a sink has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkSeen {
    /// The sink.
    pub sink: SinkName,
    /// The mark.
    pub mark: StateMark,
    /// Who wrote it.
    pub owner: Option<OwnerName>,
    /// It is of a shard that this state has begun.
    pub is_of_known_shard: bool,
}

/// Whether the state is as new as what the sinks have seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Age {
    /// It is. These marks of other states are to be noted: this one goes on from there.
    Newest(Vec<StateMark>),
    /// A sink has seen this state when it was newer: it was restored from an older copy.
    Older(MarkSeen),
    /// Another state has written to shards that this one knows.
    Another(MarkSeen),
}

/// Judges the state by the marks that sinks keep. `noted` are marks of other states that it has gone on
/// from before.
pub fn age(own: &StateMark, noted: &HashMap<String, i64>, seen: &[MarkSeen]) -> Age {
    let mut adopted: BTreeMap<String, i64> = BTreeMap::new();
    let mut another = None;
    let mut newest: Option<&MarkSeen> = None;
    for one in seen {
        let StateMark { state, number } = &one.mark;
        if *state == own.state {
            let is_newest = newest.is_none_or(|newest| newest.mark.number < *number);
            if *number > own.number && is_newest {
                newest = Some(one);
            }
        } else if noted.get(&**state).is_none_or(|noted| noted < number) {
            if one.is_of_known_shard {
                another = another.or(Some(one));
            }
            let highest = adopted.entry(state.to_string()).or_insert(*number);
            *highest = (*highest).max(*number);
        }
    }
    match (newest, another) {
        (Some(newest), _) => Age::Older(newest.clone()),
        (None, Some(another)) => Age::Another(another.clone()),
        (None, None) => {
            let mark = |(state, number): (String, i64)| StateMark { state: state.into(), number };
            Age::Newest(adopted.into_iter().map(mark).collect())
        }
    }
}

/// Every mark, with the highest number of each state: what a person has said to go on from.
pub fn all_marks(seen: &[MarkSeen]) -> Vec<StateMark> {
    let mut highest: BTreeMap<String, i64> = BTreeMap::new();
    for one in seen {
        let number = highest.entry(one.mark.state.to_string()).or_insert(one.mark.number);
        *number = (*number).max(one.mark.number);
    }
    let mark = |(state, number): (String, i64)| StateMark { state: state.into(), number };
    highest.into_iter().map(mark).collect()
}

/// The times at which a shard was lost to other processes, and what follows.
#[derive(Debug, Default)]
pub struct Losses {
    lost: Vec<(Instant, OwnerName)>,
}

/// How often a shard is lost to the same process until the later of the two stops,
pub(crate) const LOSSES_MAX: usize = 3;
/// and in which time.
pub(crate) const LOSSES_WITHIN: Duration = Duration::from_secs(60);

impl Losses {
    /// Notes that the shard was lost to `other` at `now`. True: this process must stop.
    pub fn note(&mut self, own: &OwnerName, other: OwnerName, now: Instant) -> bool {
        if other == *own {
            return false;
        }
        self.lost.retain(|(at, _)| now.duration_since(*at) < LOSSES_WITHIN);
        self.lost.push((now, other.clone()));
        let times = self.lost.iter().filter(|(_, by)| *by == other).count();
        times >= LOSSES_MAX && own.is_later_than(&other)
    }
}

#[cfg(test)]
mod tests {
    use super::OnPositionMismatch::{Checkpoint, Sink, Stop};
    use super::*;
    use shardmill_core::record::SequenceNumber;

    fn at(number: u64) -> Option<Position> {
        (number > 0).then(|| Position { sequence: SequenceNumber::from(number), sub_sequence: 0 })
    }

    /// 0 stands for none.
    fn stands(stands: u64, remembered: u64) -> Stands {
        Stands { stands: at(stands), remembered: at(remembered) }
    }

    #[test]
    fn fault_13_a_sink_lagging_or_absent_where_a_position_is_remembered_is_a_mismatch() {
        // Stands, remembered, checkpoint; after which record it needs records by each policy.
        let error = None;
        for (own, checkpoint, on_stop, on_sink, on_checkpoint) in [
            (stands(0, 0), 0, Some(0), Some(0), Some(0)),
            (stands(0, 0), 5, Some(5), Some(5), Some(5)),
            (stands(7, 5), 5, Some(7), Some(7), Some(7)),
            (stands(7, 0), 5, Some(7), Some(7), Some(7)),
            (stands(4, 4), 5, error, Some(4), Some(5)),
            (stands(4, 0), 5, error, Some(4), Some(5)),
            (stands(4, 6), 3, error, Some(4), Some(4)),
            (stands(0, 6), 5, error, Some(0), Some(5)),
            (stands(0, 6), 0, error, Some(0), Some(0)),
        ] {
            for (policy, expected) in
                [(Stop, on_stop), (Sink, on_sink), (Checkpoint, on_checkpoint)]
            {
                let found = agree(&own, at(checkpoint).as_ref(), policy).ok();
                assert_eq!(found, expected.map(at), "{own:?} {checkpoint} {policy:?}");
            }
        }
    }

    /// A shard, its listed parents, its checkpoint and whether it has ended, and where its sinks stand.
    type ShardCase<'c> =
        (&'c str, Option<&'c [&'c str]>, Option<(u64, bool)>, &'c [(&'c str, Stands)]);

    fn facts(shards: &[ShardCase<'_>]) -> BTreeMap<ShardId, ShardFacts> {
        let facts = shards.iter().map(|(shard, parents, state, sinks)| {
            let facts = ShardFacts {
                listed_parents: parents
                    .map(|parents| parents.iter().map(|parent| ShardId::from(*parent)).collect()),
                state: state.map(|(checkpoint, ended)| ShardState {
                    checkpoint: at(checkpoint),
                    ended,
                    ..ShardState::default()
                }),
                sinks: sinks
                    .iter()
                    .map(|(sink, stands)| (SinkName::from(*sink), stands.clone()))
                    .collect(),
            };
            (ShardId::from(*shard), facts)
        });
        facts.collect()
    }

    fn reopened(plan: &AgreementPlan) -> Vec<(&str, Option<Position>)> {
        plan.reopened.iter().map(|own| (own.shard.as_str(), own.checkpoint.clone())).collect()
    }

    #[test]
    fn fault_13_ended_shards_and_their_descendants_are_opened_again() {
        let ended = Some((50, true));
        let shards = facts(&[
            ("0", Some(&[]), ended, &[("mart", stands(20, 50)), ("logs", stands(50, 50))]),
            ("1", Some(&["0"]), ended, &[("mart", stands(50, 50)), ("logs", stands(50, 50))]),
            (
                "2",
                Some(&["1"]),
                Some((50, false)),
                &[("mart", stands(0, 50)), ("logs", stands(50, 50))],
            ),
            ("3", Some(&[]), ended, &[("mart", stands(50, 50)), ("logs", stands(50, 50))]),
        ]);
        let plan = compare(&shards, Sink);
        assert_eq!(reopened(&plan), [("0", at(20)), ("1", at(50)), ("2", None)]);
        assert_eq!(plan.reopened[0].sinks, [("mart".into(), at(20))]);
        assert_eq!((plan.refusal(), plan.loss()), (None, None));
        let plan = compare(&shards, Stop);
        assert!(plan.reopened.is_empty());
        let refusal = plan.refusal().expect("refused");
        for part in
            ["sink mart is behind", "shard 0: it stands at 20", "shard 2: it has no position"]
        {
            assert!(refusal.contains(part), "{refusal}");
        }
        let plan = compare(&shards, Checkpoint);
        assert_eq!((plan.refusal(), plan.reopened.len(), plan.lost.len()), (None, 0, 2));
        assert!(plan.loss().expect("a warning").starts_with("going on without"));
    }

    #[test]
    fn fault_13_what_the_stream_does_not_list_any_more_is_one_warning() {
        let shards = facts(&[
            ("0", None, Some((50, true)), &[("mart", stands(20, 50))]),
            ("1", None, Some((60, true)), &[("mart", stands(0, 60))]),
            ("2", Some(&["0"]), Some((60, false)), &[("mart", stands(60, 60))]),
        ]);
        for policy in [Stop, Sink, Checkpoint] {
            let plan = compare(&shards, policy);
            assert_eq!((plan.refusal(), plan.reopened.len()), (None, 0));
            let loss = plan.loss().expect("a warning");
            for part in [
                "rows are lost",
                "sink mart in shard 0: it stands at 20",
                "shard 1: it has no position",
            ] {
                assert!(loss.contains(part), "{loss}");
            }
        }
    }

    #[test]
    fn fault_14_shards_that_only_the_sinks_know_are_adopted() {
        let shards = facts(&[
            ("0", Some(&[]), None, &[("mart", stands(20, 0)), ("logs", stands(0, 0))]),
            ("1", Some(&[]), None, &[("mart", stands(0, 0))]),
            ("2", None, None, &[("mart", stands(20, 0))]),
        ]);
        assert_eq!(compare(&shards, Stop).adopted, [ShardId::from("0")]);
    }

    fn seen(state: &str, number: i64, is_of_known_shard: bool) -> MarkSeen {
        let mark = StateMark { state: state.into(), number };
        MarkSeen { sink: "mart".into(), mark, owner: None, is_of_known_shard }
    }

    #[test]
    fn fault_14_a_state_below_what_a_sink_has_seen_is_an_older_copy() {
        let own = StateMark { state: "own".into(), number: 10 };
        let noted = HashMap::from([("noted".to_owned(), 7)]);
        let judge = |all: &[MarkSeen]| age(&own, &noted, all);
        let mark = |state: &str, number| StateMark { state: state.into(), number };
        assert_eq!(judge(&[]), Age::Newest(Vec::new()));
        assert_eq!(judge(&[seen("own", 10, true), seen("own", 3, true)]), Age::Newest(Vec::new()));
        let newest = judge(&[seen("own", 11, false), seen("own", 12, true), seen("b", 1, true)]);
        assert_eq!(newest, Age::Older(seen("own", 12, true)));
        assert_eq!(judge(&[seen("noted", 7, true)]), Age::Newest(Vec::new()));
        assert_eq!(judge(&[seen("noted", 8, true)]), Age::Another(seen("noted", 8, true)));
        // A state that is new knows no shard: it goes on from what it finds.
        let found = judge(&[seen("b", 4, false), seen("b", 9, false), seen("a", 1, false)]);
        assert_eq!(found, Age::Newest(vec![mark("a", 1), mark("b", 9)]));
    }

    #[test]
    fn fault_36_the_later_of_two_stops_after_three_losses_within_a_minute() {
        let owner = |pid| OwnerName { started_ms: i64::from(pid), host: "h".into(), pid };
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        let note = |own: u32, losses: &[(u64, u32)]| -> Vec<bool> {
            let mut noted = Losses::default();
            let each =
                losses.iter().map(|(at, by)| noted.note(&owner(own), owner(*by), after(*at)));
            each.collect()
        };
        assert_eq!(note(2, &[(0, 1), (1, 1), (2, 1)]), [false, false, true]);
        assert_eq!(note(1, &[(0, 2), (1, 2), (2, 2), (3, 2)]), [false; 4], "the earlier goes on");
        assert_eq!(note(9, &[(0, 1), (1, 2), (2, 1)]), [false; 3], "two others");
        assert_eq!(note(2, &[(0, 1), (40, 1), (80, 1)]), [false; 3], "not within a minute");
        assert_eq!(note(2, &[(0, 2), (1, 2), (2, 2)]), [false; 3], "itself");
    }
}
