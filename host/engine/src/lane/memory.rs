//! Shows the lanes that wait for memory, so that no wait is invisible.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::Shared;
use shardmill_core::record::ShardId;

/// The longest pause between two looks.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// Shows each lane that waits for memory longer than configured as blocked, with the holders of the memory, for as
/// long as the future is polled.
pub(crate) async fn show_waits(shared: watch::Receiver<Arc<Shared>>) {
    let mut shown: BTreeSet<(ShardId, &str)> = BTreeSet::new();
    loop {
        let now = shared.borrow().clone();
        let after = now.config.timing.memory_blocked_after;
        let mut waits = BTreeSet::new();
        let kinds = [
            ("memory", now.budget.long_waits(after)),
            ("memory to read", now.source.long_waits(after)),
        ];
        for (part, found) in kinds {
            for wait in found {
                let shard = ShardId::new(wait.account);
                if shown.insert((shard.clone(), part)) {
                    now.statuses.block(&shard, part, &wait.cause);
                }
                waits.insert((shard, part));
            }
        }
        shown.retain(|(shard, part)| {
            let goes_on = waits.contains(&(shard.clone(), *part));
            if !goes_on {
                now.statuses.unblock(shard, part);
            }
            goes_on
        });
        tokio::time::sleep((after / 4).min(LOOK_INTERVAL_MAX)).await;
    }
}
