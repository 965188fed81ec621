//! Which shards may be read now: parents before children, children from their beginning.
//!
//! A pure decision over what the stream lists and what was settled.

use std::collections::HashMap;

use super::Shard;
use crate::config::StartPosition;
use crate::position::ShardState;
use crate::record::ShardId;

/// Where a shard that was never begun starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineageStart {
    /// At its oldest record: always so for a child of a shard that was read.
    Horizon,
    /// As the configuration says.
    AsConfigured,
}

/// The decision.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Shards to read now, in the order of the listing.
    pub ready: Vec<(ShardId, LineageStart)>,
    /// Every shard is settled to its end.
    pub all_ended: bool,
}

/// Decides what may be read.
///
/// A shard waits for every parent that is listed and not settled; a parent that the stream has
/// forgotten holds nobody. With LATEST, a first start skips closed shards: their records are all
/// old. A child of a shard that was begun starts at its horizon, whatever the configuration says; with
/// a time, that is its first record of then or later.
pub fn lineage(
    shards: &[Shard],
    known: &HashMap<ShardId, ShardState>,
    start: &StartPosition,
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
        // A time holds for descendants too: a parent that ended before it has no record to give,
        // and its children have older ones.
        let is_by_time = matches!(start, StartPosition::AtTimestampMs(_));
        let begins = match begins_after_known(shard, shards, known) && !is_by_time {
            true => LineageStart::Horizon,
            false => LineageStart::AsConfigured,
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

    fn ready(plan: &Plan) -> Vec<(&str, LineageStart)> {
        plan.ready.iter().map(|(id, start)| (id.as_str(), *start)).collect()
    }

    #[test]
    fn a_split_is_read_parent_first() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false), shard("2", &["0"], false)];
        let plan = lineage(&shards, &known(&[("0", false)]), &StartPosition::TrimHorizon);
        assert_eq!(ready(&plan), [("0", LineageStart::AsConfigured)]);
        let plan = lineage(&shards, &known(&[("0", true)]), &StartPosition::Latest);
        assert_eq!(ready(&plan), [("1", LineageStart::Horizon), ("2", LineageStart::Horizon)]);
    }

    #[test]
    fn a_merge_waits_for_both_parents() {
        let shards = [shard("0", &[], true), shard("1", &[], true), shard("2", &["0", "1"], false)];
        let plan =
            lineage(&shards, &known(&[("0", true), ("1", false)]), &StartPosition::TrimHorizon);
        assert_eq!(ready(&plan), [("1", LineageStart::AsConfigured)]);
        let plan =
            lineage(&shards, &known(&[("0", true), ("1", true)]), &StartPosition::TrimHorizon);
        assert_eq!(ready(&plan), [("2", LineageStart::Horizon)]);
    }

    #[test]
    fn a_first_start_at_latest_skips_closed_shards() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false)];
        let plan = lineage(&shards, &known(&[]), &StartPosition::Latest);
        assert_eq!(ready(&plan), [("1", LineageStart::AsConfigured)]);
    }

    #[test]
    fn a_time_holds_for_children_too() {
        let shards = [shard("0", &[], true), shard("1", &["0"], false)];
        let plan = lineage(&shards, &known(&[("0", true)]), &StartPosition::AtTimestampMs(7));
        assert_eq!(ready(&plan), [("1", LineageStart::AsConfigured)]);
    }

    #[test]
    fn a_forgotten_parent_holds_nobody() {
        let shards = [shard("7", &["3"], false)];
        let plan = lineage(&shards, &known(&[]), &StartPosition::TrimHorizon);
        assert_eq!(ready(&plan), [("7", LineageStart::AsConfigured)]);
    }

    #[test]
    fn grandchildren_start_at_their_horizon_too() {
        let shards = [shard("0", &[], true), shard("1", &["0"], true), shard("2", &["1"], false)];
        let plan = lineage(&shards, &known(&[("0", true)]), &StartPosition::Latest);
        assert_eq!(ready(&plan), [("1", LineageStart::Horizon)]);
    }
}
