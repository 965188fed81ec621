//! Shard lineage: which shards may be read now, and where each begins.
//!
//! A pure decision over what the stream lists and what the state knows. Two invariants keep the order of records per
//! key, and lose none: a shard is read after all its parents have ended, and a child of a shard that was begun
//! starts at its first record, whatever the configuration says, unless it says a time.
//!
//! | configured start | shard that was not begun yet | begins at |
//! |---|---|---|
//! | LATEST | descends from a begun shard | its first record |
//! | LATEST | closed at the first look | nowhere: it is skipped, its records are older |
//! | LATEST | any other | the time of the first start |
//! | a time | any, descendants included | its first record of that time or later |
//! | sequence numbers | descends from a begun shard | its first record |
//! | sequence numbers | named | its sequence number |
//! | sequence numbers | an ancestor of a named one | nowhere: it is skipped |
//! | sequence numbers | any other | its first record |
//! | TRIM_HORIZON | any | its first record |
//!
//! A begun shard that is no longer listed is read on from its position: only the server knows whether it is really
//! gone. A shard that was listed, or must have existed, but was never begun and is not listed any more, is lost.

use std::collections::{BTreeSet, HashMap, HashSet};

use shardmill_core::record::{ShardId, ShardStart};
use shardmill_core::source::Shard;
use shardmill_core::source::StartPosition;
use shardmill_state::KnownShards;

/// The decision.
#[derive(Debug, PartialEq, Eq)]
pub struct ReadPlan {
    /// Shards to read now, in the order of the listing; those that are no longer listed come last.
    pub ready: Vec<Beginning>,
    /// Closed shards that a first start at LATEST skips: all their records are older.
    pub skipped: Vec<ShardId>,
    /// Shards that were never begun and are no longer listed: none of their records was read.
    pub lost: Vec<ShardId>,
    /// Some listed shards wait for parents that have not ended, so not all records are being read.
    pub some_wait: bool,
    /// Every shard was read to its end.
    pub all_ended: bool,
}

/// A shard that may be read, and where it begins if it was not begun before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beginning {
    /// The shard.
    pub shard: ShardId,
    /// Where it begins.
    pub start: ShardStart,
    /// A time since which none of its records is missing, in milliseconds since 1970, where one is known: LATEST
    /// itself, or a time at which a parent was still read to its newest record.
    pub caught_up_ms: Option<i64>,
}

/// Decides what may be read.
///
/// A shard waits for every parent that is listed or was begun, and has not ended. A parent that the stream has
/// forgotten keeps nobody waiting. LATEST is resolved once, to `now_ms` of the first start (milliseconds since
/// 1970), and keeps that value. It skips shards that are closed at the first start, because their records are all
/// older. A child of a shard that was begun starts at its first record, whatever the configuration says; with a
/// configured time, at its first record of that time or later.
pub fn plan_shards(
    shards: &[Shard],
    known: &KnownShards,
    start: &StartPosition,
    now_ms: Option<i64>,
) -> ReadPlan {
    let family = Family::new(shards);
    let descends = family.descends_from(|shard| known.begun.contains_key(shard));
    let first_start = known.is_first_start();
    // Versions that did not record the shards that they had seen skipped these at each look.
    let first_look = first_start || known.seen.is_empty();
    let latest_ms = if first_start { now_ms } else { known.resolved_latest_ms() };
    let before_places = match start {
        StartPosition::AtSequence(places) => family.ancestors_of(places.keys()),
        _ => HashSet::new(),
    };
    let is_skipped = |shard: &Shard| {
        !known.begun.contains_key(&shard.id)
            && match start {
                StartPosition::Latest => {
                    shard.is_closed && first_look && !descends.contains(&shard.id)
                }
                StartPosition::AtSequence(_) => before_places.contains(&shard.id),
                StartPosition::TrimHorizon | StartPosition::AtTimestampMs(_) => false,
            }
    };
    let has_ended = |id: &ShardId| known.begun.get(id).is_some_and(|state| state.ended);
    let blocks = |parent: &ShardId| match family.get(parent) {
        Some(listed) => !has_ended(parent) && !is_skipped(listed),
        None => known.begun.get(parent).is_some_and(|state| !state.ended),
    };
    let begins = |shard: &Shard| {
        // A child is created after each of its parents has closed, so after any time at which a parent was still
        // open and was read to its newest record.
        let parents = shard.parents.iter().filter_map(|parent| known.begun.get(parent));
        let after_parents_ms = parents.filter_map(|state| state.caught_up_ms).max();
        let (start, caught_up_ms) = match start {
            // A time holds for descendants too: a parent that ended before it has no records to give, and its
            // children may have older ones.
            StartPosition::AtTimestampMs(at_ms) => (ShardStart::AtMs(*at_ms), after_parents_ms),
            _ if descends.contains(&shard.id) => (ShardStart::Horizon, after_parents_ms),
            StartPosition::Latest => match latest_ms {
                // Also for a shard whose ancestors back to the first start are no longer listed.
                Some(at_ms) => (ShardStart::AtMs(at_ms), Some(at_ms)),
                None => (ShardStart::Horizon, None),
            },
            StartPosition::AtSequence(places) => match places.get(&shard.id) {
                Some(at) => (ShardStart::AtSequence(at.clone()), None),
                None => (ShardStart::Horizon, None),
            },
            StartPosition::TrimHorizon => (ShardStart::Horizon, None),
        };
        Beginning { shard: shard.id.clone(), start, caught_up_ms }
    };
    let waiting: Vec<&Shard> =
        shards.iter().filter(|shard| !has_ended(&shard.id) && !is_skipped(shard)).collect();
    let ready = waiting.iter().filter(|shard| !shard.parents.iter().any(blocks));
    let mut ready: Vec<Beginning> = ready.map(|shard| begins(shard)).collect();
    let some_wait = ready.len() < waiting.len();
    // The server decides whether they are really gone.
    let mut unlisted: Vec<_> = known
        .begun
        .iter()
        .filter(|(id, state)| !state.ended && family.get(id).is_none())
        .map(|(id, state)| Beginning {
            shard: id.clone(),
            start: state.start.clone(),
            caught_up_ms: state.caught_up_ms,
        })
        .collect();
    unlisted.sort_by(|one, other| one.shard.cmp(&other.shard));
    let all_ended = waiting.is_empty() && unlisted.is_empty();
    ready.append(&mut unlisted);
    let skipped = shards.iter().filter(|shard| is_skipped(shard)).map(|shard| shard.id.clone());
    let skipped = match start {
        StartPosition::Latest => skipped.collect(),
        // These depend on the configuration alone, which may change.
        _ => Vec::new(),
    };
    ReadPlan { ready, skipped, lost: lost(&family, known), some_wait, all_ended }
}

/// Finds shards that were never begun and are no longer listed.
///
/// There are two kinds. One was listed before. Of the other, only a child is seen: the child is listed for the first
/// time, so its parents were open at the last look, and a parent that is gone was never read.
fn lost(family: &Family<'_>, known: &KnownShards) -> Vec<ShardId> {
    if known.seen.is_empty() {
        return Vec::new();
    }
    let is_gone =
        |shard: &&ShardId| !known.begun.contains_key(*shard) && family.get(shard).is_none();
    let new = family.shards.iter().filter(|shard| !known.seen.contains(&shard.id));
    let parents = new.flat_map(|shard| &shard.parents);
    let lost: BTreeSet<&ShardId> = known.seen.iter().chain(parents).filter(is_gone).collect();
    lost.into_iter().cloned().collect()
}

/// Shards by their ids. Each walk visits a shard once: with shards that split and merge again, the number of paths
/// doubles with each cycle.
struct Family<'s> {
    shards: &'s [Shard],
    by_id: HashMap<&'s ShardId, &'s Shard>,
}

impl<'s> Family<'s> {
    fn new(shards: &'s [Shard]) -> Self {
        Self { shards, by_id: shards.iter().map(|shard| (&shard.id, shard)).collect() }
    }

    fn get(&self, shard: &ShardId) -> Option<&'s Shard> {
        self.by_id.get(shard).copied()
    }

    /// Returns the listed shards that have an ancestor, listed or not, for which `is_one` holds.
    fn descends_from(&self, is_one: impl Fn(&ShardId) -> bool) -> HashSet<&'s ShardId> {
        let mut children: HashMap<&ShardId, Vec<&'s ShardId>> = HashMap::new();
        for shard in self.shards {
            for parent in &shard.parents {
                children.entry(parent).or_default().push(&shard.id);
            }
        }
        let mut open: Vec<&ShardId> =
            children.keys().copied().filter(|parent| is_one(parent)).collect();
        let mut found = HashSet::new();
        while let Some(shard) = open.pop() {
            for child in children.get(shard).into_iter().flatten() {
                if found.insert(*child) {
                    open.push(child);
                }
            }
        }
        found
    }

    /// Returns all ancestors of the shards, as far as they are listed.
    fn ancestors_of<'a>(&self, shards: impl Iterator<Item = &'a ShardId>) -> HashSet<ShardId> {
        let mut open: Vec<&Shard> = shards.filter_map(|shard| self.get(shard)).collect();
        let mut found = HashSet::new();
        while let Some(shard) = open.pop() {
            for parent in &shard.parents {
                if found.insert(parent.clone()) {
                    open.extend(self.get(parent));
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_state::ShardState;

    const NOW_MS: i64 = 2_000;

    fn shard(id: &str, parents: &[&str], is_closed: bool) -> Shard {
        Shard {
            id: id.into(),
            parents: parents.iter().map(|parent| ShardId::from(*parent)).collect(),
            is_closed,
            hash_range: None,
        }
    }

    fn known(states: &[(&str, bool)]) -> KnownShards {
        let state = |ended| ShardState { ended, ..ShardState::default() };
        let begun = states.iter().map(|(id, ended)| ((*id).into(), state(*ended))).collect();
        KnownShards { begun, ..KnownShards::default() }
    }

    fn seen(mut known: KnownShards, ids: &[&str]) -> KnownShards {
        known.seen = ids.iter().map(|id| ShardId::from(*id)).collect();
        known
    }

    fn ready(plan: &ReadPlan) -> Vec<(&str, ShardStart)> {
        plan.ready.iter().map(|one| (one.shard.as_str(), one.start.clone())).collect()
    }

    #[test]
    fn a_split_is_read_parent_first() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false), shard("2", &["0"], false)];
        let plan = plan_shards(
            &shards,
            &known(&[("0", false)]),
            &StartPosition::TrimHorizon,
            Some(NOW_MS),
        );
        assert_eq!(ready(&plan), [("0", ShardStart::Horizon)]);
        let plan =
            plan_shards(&shards, &known(&[("0", true)]), &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon), ("2", ShardStart::Horizon)]);
    }

    #[test]
    fn a_merge_waits_for_both_parents() {
        let shards = [shard("0", &[], true), shard("1", &[], true), shard("2", &["0", "1"], false)];
        let half = known(&[("0", true), ("1", false)]);
        let plan = plan_shards(&shards, &half, &StartPosition::TrimHorizon, Some(NOW_MS));
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon)]);
        let both = known(&[("0", true), ("1", true)]);
        let plan = plan_shards(&shards, &both, &StartPosition::TrimHorizon, Some(NOW_MS));
        assert_eq!(ready(&plan), [("2", ShardStart::Horizon)]);
    }

    #[test]
    fn a_first_start_at_latest_skips_closed_shards() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false)];
        let plan = plan_shards(&shards, &known(&[]), &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("1", ShardStart::AtMs(NOW_MS))]);
        assert_eq!(plan.skipped, ["0".into()]);
    }

    #[test]
    fn a_time_applies_to_children_too() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false)];
        let plan = plan_shards(
            &shards,
            &known(&[("0", true)]),
            &StartPosition::AtTimestampMs(7),
            Some(NOW_MS),
        );
        assert_eq!(ready(&plan), [("1", ShardStart::AtMs(7))]);
    }

    #[test]
    fn a_forgotten_parent_blocks_nobody() {
        let shards = [shard("7", &["3"], false)];
        let plan = plan_shards(&shards, &known(&[]), &StartPosition::TrimHorizon, Some(NOW_MS));
        assert_eq!(ready(&plan), [("7", ShardStart::Horizon)]);
        assert_eq!(plan.lost, []);
    }

    #[test]
    fn grandchildren_start_at_their_horizon_too() {
        let shards = [shard("0", &[], true), shard("1", &["0"], true), shard("2", &["1"], false)];
        let plan =
            plan_shards(&shards, &known(&[("0", true)]), &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon)]);
        assert!(plan.some_wait);
    }

    /// The one between the two was listed at no look: what was read first says where LATEST was.
    #[test]
    fn fault_16_latest_is_resolved_once_whatever_is_listed_later() {
        let shards = [shard("7", &["5"], true), shard("8", &["7"], false)];
        let mut known = seen(known(&[("0", true)]), &["0"]);
        known.latest_ms = Some(1_000);
        let plan = plan_shards(&shards, &known, &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("7", ShardStart::AtMs(1_000))]);
        assert!(plan.some_wait, "shard 8 waits for shard 7");
        assert_eq!(plan.lost, ["5".into()]);
        known.latest_ms = None;
        let plan = plan_shards(&shards, &known, &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("7", ShardStart::Horizon)], "it did not start at LATEST");
    }

    #[test]
    fn fault_16_a_shard_that_is_not_listed_any_more_is_asked_for_and_blocks_its_children() {
        let shards = [shard("1", &["0"], false)];
        let plan =
            plan_shards(&shards, &known(&[("0", false)]), &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("0", ShardStart::Horizon)]);
        assert!(!plan.all_ended);
        let plan =
            plan_shards(&shards, &known(&[("0", true)]), &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon)]);
        assert!(!plan.some_wait);
    }

    #[test]
    fn fault_16_a_shard_that_was_listed_and_never_begun_is_lost_when_it_is_gone() {
        let shards = [shard("0", &[], true), shard("2", &["1", "0"], false)];
        let known = seen(known(&[("0", true)]), &["0", "1", "2"]);
        assert_eq!(
            plan_shards(&shards, &known, &StartPosition::TrimHorizon, Some(NOW_MS)).lost,
            ["1".into()]
        );
        // Its other parent was gone before anything was read.
        let known = seen(known.clone(), &["0", "2"]);
        assert_eq!(
            plan_shards(&shards, &known, &StartPosition::TrimHorizon, Some(NOW_MS)).lost,
            []
        );
    }

    #[test]
    fn fault_16_a_child_is_expected_from_when_its_last_parent_was_read_to_its_newest_record() {
        let shards = [shard("0", &[], true), shard("1", &[], true), shard("2", &["0", "1"], false)];
        let mut known = known(&[("0", true), ("1", true)]);
        for (id, caught_up_ms) in [("0", 500), ("1", 700)] {
            known.begun.entry(ShardId::from(id)).or_default().caught_up_ms = Some(caught_up_ms);
        }
        let plan = plan_shards(&shards, &known, &StartPosition::TrimHorizon, Some(NOW_MS));
        assert_eq!(plan.ready[0].caught_up_ms, Some(700));
    }

    /// Shards that split in two and merge again, `cycles` times, each listed and closed but the last.
    fn cycles(cycles: usize) -> Vec<Shard> {
        let mut shards = vec![shard("0", &[], true)];
        for cycle in 0..cycles {
            let whole = shards[cycle * 3].id.clone();
            let halves = [format!("{cycle}a"), format!("{cycle}b")];
            for half in &halves {
                shards.push(shard(half, &[whole.as_str()], true));
            }
            shards.push(shard(&format!("{}", cycle + 1), &[&halves[0], &halves[1]], true));
        }
        shards
    }

    #[test]
    fn fault_06_shard_lineages_are_walked_in_the_time_of_their_length() {
        let shards = cycles(2_000);
        let last = shards.last().expect("a shard").id.clone();
        let sequence = shardmill_core::record::SequenceNumber::parse("7").expect("a number");
        let places = std::iter::once((last.clone(), sequence)).collect();
        let begun = std::time::Instant::now();
        let plan =
            plan_shards(&shards, &known(&[]), &StartPosition::AtSequence(places), Some(NOW_MS));
        assert_eq!(plan.ready.len(), 1);
        assert_eq!(plan.ready[0].shard, last);
        let plan =
            plan_shards(&shards, &known(&[("0", true)]), &StartPosition::Latest, Some(NOW_MS));
        assert_eq!(ready(&plan).iter().map(|(id, _)| *id).collect::<Vec<_>>(), ["0a", "0b"]);
        assert!(begun.elapsed() < std::time::Duration::from_secs(2), "{:?}", begun.elapsed());
    }

    /// The walks, as they were defined first: by every way.
    mod by_every_way {
        use super::*;

        pub(crate) fn is_before(shard: &ShardId, other: &ShardId, shards: &[Shard]) -> bool {
            shards.iter().find(|listed| listed.id == *other).is_some_and(|listed| {
                listed.parents.iter().any(|up| up == shard || is_before(shard, up, shards))
            })
        }

        pub(crate) fn begins_after(
            shard: &Shard,
            shards: &[Shard],
            is_one: &dyn Fn(&ShardId) -> bool,
        ) -> bool {
            shard.parents.iter().any(|parent| {
                is_one(parent)
                    || shards
                        .iter()
                        .find(|other| other.id == *parent)
                        .is_some_and(|parent| begins_after(parent, shards, is_one))
            })
        }
    }

    #[test]
    fn fault_06_the_walks_find_what_walks_by_every_way_find() {
        let mut random = fastrand::Rng::with_seed(6);
        for _ in 0..3_000 {
            let count = random.usize(1..9);
            let mut shards: Vec<Shard> = (0..count)
                .map(|id| {
                    // Some parents are not listed.
                    let parents: Vec<String> = (0..random.usize(0..3))
                        .filter(|_| id > 0)
                        .map(|_| random.usize(0..id + 2).to_string())
                        .filter(|parent| *parent != id.to_string())
                        .filter(|parent| {
                            parent.parse::<usize>().is_ok_and(|it| it < id || it > count)
                        })
                        .collect();
                    let parents: Vec<&str> = parents.iter().map(String::as_str).collect();
                    shard(&id.to_string(), &parents, random.bool())
                })
                .collect();
            random.shuffle(&mut shards);
            let chosen: HashSet<ShardId> = (0..count + 2)
                .filter(|_| random.u32(..4) == 0)
                .map(|id| id.to_string().as_str().into())
                .collect();
            let family = Family::new(&shards);
            let descends = family.descends_from(|shard| chosen.contains(shard));
            let before = family.ancestors_of(chosen.iter());
            for shard in &shards {
                let is_one = |id: &ShardId| chosen.contains(id);
                assert_eq!(
                    descends.contains(&shard.id),
                    by_every_way::begins_after(shard, &shards, &is_one),
                    "{chosen:?} {shards:?}"
                );
                assert_eq!(
                    before.contains(&shard.id),
                    chosen.iter().any(|it| by_every_way::is_before(&shard.id, it, &shards)),
                    "{chosen:?} {shards:?}"
                );
            }
        }
    }
}
