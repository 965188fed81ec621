//! Which shards may be read now: parents before children, children from their beginning.
//!
//! A pure decision over what the stream lists and what was settled.

use std::collections::HashMap;

use super::Shard;
use crate::config::StartPosition;
use crate::position::ShardState;
use crate::record::{ShardId, ShardStart};

/// The decision.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Shards to read now, in the order of the listing, and where those start that were not begun.
    pub ready: Vec<(ShardId, ShardStart)>,
    /// Every shard is settled to its end.
    pub all_ended: bool,
}

/// Decides what may be read.
///
/// A shard waits for every parent that is listed and not settled; a parent that the stream has
/// forgotten holds nobody. With LATEST, a first start skips closed shards: their records are all
/// old. A child of a shard that was begun starts at its horizon, whatever the configuration says; with
/// a time, that is its first record of then or later. LATEST is `now_ms`, in milliseconds since 1970.
pub fn lineage(
    shards: &[Shard],
    known: &HashMap<ShardId, ShardState>,
    start: &StartPosition,
    now_ms: i64,
) -> Plan {
    let first_start = known.is_empty();
    let skipped = |shard: &Shard| {
        if known.contains_key(&shard.id) {
            return false;
        }
        match start {
            StartPosition::Latest => {
                shard.is_closed && (first_start || !begins_after_known(shard, shards, known))
            }
            StartPosition::AtSequence(places) => is_before(&shard.id, places.keys(), shards),
            StartPosition::TrimHorizon | StartPosition::AtTimestampMs(_) => false,
        }
    };
    let settled = |shard: &Shard| known.get(&shard.id).is_some_and(|state| state.ended);
    let open = |id: &ShardId| {
        shards
            .iter()
            .find(|other| other.id == *id)
            .is_some_and(|parent| !settled(parent) && !skipped(parent))
    };
    let waiting: Vec<&Shard> =
        shards.iter().filter(|shard| !settled(shard) && !skipped(shard)).collect();
    let ready = waiting.iter().filter(|shard| !shard.parents.iter().any(open));
    let ready = ready.map(|shard| {
        let begins = match start {
            // A time holds for descendants too: a parent that ended before it has no record to
            // give, and its children have older ones.
            StartPosition::AtTimestampMs(at_ms) => ShardStart::AtMs(*at_ms),
            _ if begins_after_known(shard, shards, known) => ShardStart::Horizon,
            StartPosition::TrimHorizon => ShardStart::Horizon,
            // Rounded down: some servers know arrival times by the second, and to read a second's
            // records from before the start is better than to lose those after it.
            StartPosition::Latest => ShardStart::AtMs(now_ms - now_ms.rem_euclid(1_000)),
            StartPosition::AtSequence(places) => match places.get(&shard.id) {
                Some(at) => ShardStart::AtSequence(at.clone()),
                None => ShardStart::Horizon,
            },
        };
        (shard.id.clone(), begins)
    });
    Plan { ready: ready.collect(), all_ended: waiting.is_empty() }
}

/// Whether the shard is an ancestor of one of the others.
fn is_before<'s>(
    shard: &ShardId,
    others: impl IntoIterator<Item = &'s ShardId>,
    shards: &[Shard],
) -> bool {
    others.into_iter().any(|other| {
        let listed = shards.iter().find(|listed| listed.id == *other);
        listed.is_some_and(|listed| {
            listed.parents.contains(shard) || is_before(shard, &listed.parents, shards)
        })
    })
}

/// Whether an ancestor of the shard was begun.
fn begins_after_known(
    shard: &Shard,
    shards: &[Shard],
    known: &HashMap<ShardId, ShardState>,
) -> bool {
    shard.parents.iter().any(|parent| {
        known.contains_key(parent)
            || shards
                .iter()
                .find(|other| other.id == *parent)
                .is_some_and(|parent| begins_after_known(parent, shards, known))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_999;

    fn shard(id: &str, parents: &[&str], is_closed: bool) -> Shard {
        Shard {
            id: id.into(),
            parents: parents.iter().map(|parent| ShardId::from(*parent)).collect(),
            is_closed,
            hash_range: None,
        }
    }

    fn known(states: &[(&str, bool)]) -> HashMap<ShardId, ShardState> {
        let state = |ended| ShardState { ended, ..ShardState::default() };
        states.iter().map(|(id, ended)| ((*id).into(), state(*ended))).collect()
    }

    fn ready(plan: &Plan) -> Vec<(&str, ShardStart)> {
        plan.ready.iter().map(|(id, start)| (id.as_str(), start.clone())).collect()
    }

    #[test]
    fn a_split_is_read_parent_first() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false), shard("2", &["0"], false)];
        let plan = lineage(&shards, &known(&[("0", false)]), &StartPosition::TrimHorizon, NOW_MS);
        assert_eq!(ready(&plan), [("0", ShardStart::Horizon)]);
        let plan = lineage(&shards, &known(&[("0", true)]), &StartPosition::Latest, NOW_MS);
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon), ("2", ShardStart::Horizon)]);
    }

    #[test]
    fn a_merge_waits_for_both_parents() {
        let shards = [shard("0", &[], true), shard("1", &[], true), shard("2", &["0", "1"], false)];
        let plan = lineage(
            &shards,
            &known(&[("0", true), ("1", false)]),
            &StartPosition::TrimHorizon,
            NOW_MS,
        );
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon)]);
        let plan = lineage(
            &shards,
            &known(&[("0", true), ("1", true)]),
            &StartPosition::TrimHorizon,
            NOW_MS,
        );
        assert_eq!(ready(&plan), [("2", ShardStart::Horizon)]);
    }

    #[test]
    fn a_first_start_at_latest_skips_closed_shards() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false)];
        let plan = lineage(&shards, &known(&[]), &StartPosition::Latest, NOW_MS);
        assert_eq!(ready(&plan), [("1", ShardStart::AtMs(1_000))]);
    }

    #[test]
    fn a_time_holds_for_children_too() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false)];
        let plan =
            lineage(&shards, &known(&[("0", true)]), &StartPosition::AtTimestampMs(7), NOW_MS);
        assert_eq!(ready(&plan), [("1", ShardStart::AtMs(7))]);
    }

    #[test]
    fn a_forgotten_parent_holds_nobody() {
        let shards = [shard("7", &["3"], false)];
        let plan = lineage(&shards, &known(&[]), &StartPosition::TrimHorizon, NOW_MS);
        assert_eq!(ready(&plan), [("7", ShardStart::Horizon)]);
    }

    #[test]
    fn grandchildren_start_at_their_horizon_too() {
        let shards = [shard("0", &[], true), shard("1", &["0"], true), shard("2", &["1"], false)];
        let plan = lineage(&shards, &known(&[("0", true)]), &StartPosition::Latest, NOW_MS);
        assert_eq!(ready(&plan), [("1", ShardStart::Horizon)]);
    }
}
