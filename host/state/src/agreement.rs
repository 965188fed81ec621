//! Decides, before the first record, whether the state and the sinks agree. Pure functions.
//!
//! A sink's own position is the truth about its rows. The state only remembers how far each sink was, as of the
//! last checkpoint, so a remembered position may lag but never lead. Each contradiction therefore has one
//! explanation:
//!
//! | the sink has | the state remembers | so | the sink needs records |
//! |---|---|---|---|
//! | no position | nothing | it is new | after the checkpoint |
//! | no position | a position | it was restored from a backup, or is another one | as `on_position_mismatch` says |
//! | a position before the remembered one, or before the checkpoint | | the same | as `on_position_mismatch` says |
//! | any other position | | they agree | after its position |
//!
//! | `on_position_mismatch` | a restored sink continues |
//! |---|---|
//! | not set | not at all: the start stops with an error |
//! | `"sink"` | after its own position: the rows are read again |
//! | `"checkpoint"` | after the checkpoint (or its own position, if later): the rows stay lost, and a hole is recorded |
//!
//! The reverse case, a state that is older than the sinks, is found by marks ([`age`]): each state has an id and
//! counts its writes, and sinks keep the newest mark that they have seen. A state that finds a higher number of its
//! own was restored from an older copy. Going on with it would run other revisions than before and repeat redrives.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use shardmill_config::OnPositionMismatch;
use shardmill_core::owner::{OwnerName, StateMark};
use shardmill_core::record::{Position, ShardId, ShardStart, SinkName};

/// Number of shards that an error or a warning names.
const NAMED_MAX: usize = 5;

/// State of a shard in the state database.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardState {
    /// Every sink has everything up to here; `None`: nothing yet.
    pub checkpoint: Option<Position>,
    /// The shard was closed, and every record in it has its outcome in every sink.
    pub ended: bool,
    /// Where reading began.
    pub start: ShardStart,
    /// Everything that had arrived by this time was read and has its outcome, in milliseconds since 1970.
    pub caught_up_ms: Option<i64>,
    /// Set while a restored sink reads records again: the checkpoint before it was moved back. Up to here, the
    /// revisions that ran first may be gone, and only restored sinks need records.
    pub reread_to: Option<Position>,
}

/// A sink that stands before the position that is remembered of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Where the sink stands; `None`: it has no position.
    pub stands: Option<Position>,
    /// The remembered position.
    pub remembered: Position,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.stands {
            Some(stands) => {
                write!(f, "expected position {} or later, found {stands}", self.remembered)
            }
            None => write!(f, "expected position {} or later, found none", self.remembered),
        }
    }
}

/// Position of one sink in one shard, by both accounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stands {
    /// The sink's own position, or the end of its rows that were given up.
    pub stands: Option<Position>,
    /// The position that the state remembers.
    pub remembered: Option<Position>,
}

/// Decides after which record a sink needs records. `None`: from the start of the shard.
///
/// # Errors
/// [`Mismatch`] if the sink was restored and the configuration does not say whom to believe.
pub fn agree(
    own: &Stands,
    checkpoint: Option<&Position>,
    policy: OnPositionMismatch,
) -> Result<Option<Position>, Mismatch> {
    let stands = own.stands.as_ref();
    // A sink that has no position and of which none is remembered is new: the checkpoint says nothing about it.
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

/// A shard, as the stream, the state and the sinks know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardFacts {
    /// Its parents; `None`: the stream does not list the shard any more.
    pub listed_parents: Option<Vec<ShardId>>,
    /// Its state; `None`: the state does not know it.
    pub state: Option<ShardState>,
    /// The exact sinks.
    pub sinks: BTreeMap<SinkName, Stands>,
}

/// A shard that is read once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reopened {
    /// The shard.
    pub shard: ShardId,
    /// Its new checkpoint.
    pub checkpoint: Option<Position>,
    /// The restored sinks and where they stand: the new remembered positions.
    pub sinks: Vec<(SinkName, Option<Position>)>,
}

/// Rows that a sink has lost for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The sink.
    pub sink: SinkName,
    /// The shard.
    pub shard: ShardId,
    /// Its own position and the remembered one.
    pub mismatch: Mismatch,
    /// End of the records that it stays without; `None`: it gets all of them after all.
    pub without_to: Option<Position>,
    /// True: the stream does not list the shard any more. False: the configuration says to go on.
    pub is_unlisted: bool,
}

/// The result of comparing all shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgreementPlan {
    /// Restored sinks for which the configuration does not say whom to believe.
    pub mismatches: Vec<(SinkName, ShardId, Mismatch)>,
    /// Shards to read once more, and their descendants.
    pub reopened: Vec<Reopened>,
    /// Sinks that are lagging and stay so: in shards that the stream does not list any more, and where the
    /// configuration says to go on from the checkpoint.
    pub lost: Vec<Lost>,
    /// Shards that the state does not know and in which a sink has a position: the state was lost.
    pub adopted: Vec<ShardId>,
}

/// Compares, in every shard, what the state remembers with where the sinks stand.
pub fn compare(facts: &BTreeMap<ShardId, ShardFacts>, policy: OnPositionMismatch) -> AgreementPlan {
    let mut plan = AgreementPlan::default();
    let mut restored: BTreeMap<&ShardId, Vec<(&SinkName, &Stands)>> = BTreeMap::new();
    for (shard, own) in facts {
        let is_listed = own.listed_parents.is_some();
        // A shard that the state does not know: it was lost, or the shard is new and no sink has anything of it.
        let Some(state) = &own.state else {
            if is_listed && own.sinks.values().any(|sink| sink.stands.is_some()) {
                plan.adopted.push(shard.clone());
            }
            continue;
        };
        for (sink, stands) in &own.sinks {
            // Only a remembered position can be contradicted. A sink without one is new in this shard.
            let Some(remembered) = &stands.remembered else { continue };
            if stands.stands.as_ref() >= Some(remembered) {
                continue;
            }
            let mismatch =
                Mismatch { stands: stands.stands.clone(), remembered: remembered.clone() };
            match (is_listed, policy) {
                // If the stream does not list the shard any more, its records cannot be read again, whatever the
                // policy.
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
    // Descendants are read again too, so that the rows of one key reach the sink in their order.
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
    /// Returns the error for restored sinks, if there are any.
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
            1 => format!("sink {sink} has"),
            many => format!("{many} sinks have"),
        };
        Some(format!(
            "{who} an earlier position than the pipeline's state remembers: {}{more}. Was the destination \
             restored from a backup or replaced, or did another application move the checkpoint? Set \
             `on_position_mismatch = \"sink\"` under [pipeline] to read the missing records again (ended \
             shards are opened again; other sinks skip what they have), or \"checkpoint\" to go on without them",
            named.join("; ")
        ))
    }

    /// Returns the warning for rows that sinks stay without, if there are any.
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

/// A mark that a sink keeps beside the position of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkSeen {
    /// The sink.
    pub sink: SinkName,
    /// The mark.
    pub mark: StateMark,
    /// The process that wrote it.
    pub owner: Option<OwnerName>,
    /// The shard is one that this state has begun.
    pub is_of_known_shard: bool,
}

/// Result of comparing the state with the marks that sinks keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Age {
    /// No sink has seen a newer state. The marks of other states that it continues from here, to be stored.
    Newest(Vec<StateMark>),
    /// A sink has seen a newer version of this state: this one was restored from an older copy.
    Older(MarkSeen),
    /// Another state has written to a shard that this one has begun too: two states share a sink.
    Another(MarkSeen),
}

/// Judges the state by the marks that sinks keep. `noted`: marks of other states that it has already accepted.
///
/// | a mark in a sink | verdict |
/// |---|---|
/// | of this state, with a higher number than its own | older copy |
/// | of another state, not higher than noted | accepted before |
/// | of another state, in a shard that this state has begun | another state writes here |
/// | of another state, in other shards | accepted now: the state was lost, and this one goes on |
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

/// Returns the highest mark of each state, for a person who chooses to go on from there.
pub fn all_marks(seen: &[MarkSeen]) -> Vec<StateMark> {
    let mut highest: BTreeMap<String, i64> = BTreeMap::new();
    for one in seen {
        let number = highest.entry(one.mark.state.to_string()).or_insert(one.mark.number);
        *number = (*number).max(one.mark.number);
    }
    let mark = |(state, number): (String, i64)| StateMark { state: state.into(), number };
    highest.into_iter().map(mark).collect()
}

/// The times at which a shard was lost to other processes.
#[derive(Debug, Default)]
pub struct Losses {
    lost: Vec<(Instant, OwnerName)>,
}

/// Number of losses of a shard to the same process, within [`LOSSES_WITHIN`], at which the later of the two stops.
pub(crate) const LOSSES_MAX: usize = 3;
/// Older losses do not count any more.
pub(crate) const LOSSES_WITHIN: Duration = Duration::from_secs(60);

impl Losses {
    /// Notes that the shard was lost to `other` at `now`. Returns true if this process must stop: two processes
    /// take the shard from each other, and this one started later.
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

    /// In these arguments, 0 means "no position".
    fn stands(stands: u64, remembered: u64) -> Stands {
        Stands { stands: at(stands), remembered: at(remembered) }
    }

    #[test]
    fn fault_13_a_sink_lagging_or_absent_where_a_position_is_remembered_is_a_mismatch() {
        // Stands, remembered, checkpoint; then the record after which it needs records, for each policy.
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
        for part in [
            "sink mart has an earlier position",
            "shard 0: expected position 50 or later, found 20",
            "shard 2: expected position 50 or later, found none",
        ] {
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
                "sink mart in shard 0: expected position 50 or later, found 20",
                "shard 1: expected position 60 or later, found none",
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
        // A new state knows no shard: it continues from what it finds.
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
