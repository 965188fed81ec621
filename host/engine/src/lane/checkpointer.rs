//! Writes a lane's checkpoint once a second while it moves.
//!
//! The checkpoint is the minimum over the positions that the sinks have published, so it only lags: every record up
//! to it has its outcome in every sink. A sink without a position makes the minimum "nothing". All lanes write at
//! the same moments, so that the state database can put their checkpoints into one transaction.
//!
//! The task is aborted when its lane ends, and `write` makes the last checkpoint then. The lane waits for the
//! aborted task first: an older checkpoint must not land after the last one.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Shared, StatusRegistry};
use crate::delivery::{DeliveryHandle, DeliveryProgress};
use shardmill_core::record::{Position, ShardId, ShardKey, SinkName};
use shardmill_state::{SinkMark, StateError};

type Watched = Vec<(SinkName, watch::Receiver<DeliveryProgress>)>;

/// Starts the task that writes; the lane aborts it when it ends.
pub fn start(shared: &Shared, shard: &ShardKey, deliveries: &[DeliveryHandle]) -> JoinHandle<()> {
    let mut watched = watch(deliveries);
    let (checkpoints, statuses, shard) =
        (shared.checkpoints.clone(), shared.statuses.clone(), shard.clone());
    // The interval bounds what a sink that keeps no position may repeat after a crash.
    let interval = shared.config.timing.checkpoint_interval;
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval_at(next_common(interval), interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let mut moved = false;
            for (sink, progress) in &mut watched {
                moved |= progress.has_changed().unwrap_or(false);
                let part = format!("sink {sink}");
                match progress.borrow_and_update().blocked.as_deref() {
                    Some(cause) => statuses.block(&shard.shard, &part, cause),
                    None => statuses.unblock(&shard.shard, &part),
                }
            }
            if moved {
                let (sinks, checkpoint) = positions(&watched, &statuses, &shard.shard);
                if let Err(error) = checkpoints.advance(&shard, sinks, checkpoint, false).await {
                    tracing::warn!(
                        shard = %shard.shard, %error,
                        "failed to write the checkpoint; it is tried again"
                    );
                }
            }
        }
    })
}

/// Writes the last checkpoint of a lane; `ended`: the shard was closed and all its records are committed.
pub async fn write(
    shared: &Shared,
    shard: &ShardKey,
    deliveries: &[DeliveryHandle],
    ended: bool,
) -> Result<(), StateError> {
    let (sinks, checkpoint) = positions(&watch(deliveries), &shared.statuses, &shard.shard);
    shared.checkpoints.advance(shard, sinks, checkpoint, ended).await
}

/// Returns the next moment at which every lane of the process writes.
fn next_common(interval: Duration) -> Instant {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    let begun = *BEGUN.get_or_init(Instant::now);
    let passed = begun.elapsed().as_nanos() / interval.as_nanos().max(1);
    begun + interval.saturating_mul(u32::try_from(passed + 1).unwrap_or(u32::MAX))
}

fn watch(deliveries: &[DeliveryHandle]) -> Watched {
    deliveries.iter().map(|own| (own.sink.clone(), own.progress.clone())).collect()
}

/// Returns the position of each sink that has one, and the minimum over all sinks.
fn positions(
    watched: &Watched,
    statuses: &StatusRegistry,
    shard: &ShardId,
) -> (Vec<SinkMark>, Option<Position>) {
    let each: Vec<_> = watched
        .iter()
        .map(|(sink, progress)| (sink.clone(), progress.borrow().position.clone()))
        .collect();
    let checkpoint = each.iter().map(|(_, position)| position.clone()).min().flatten();
    let known = each.into_iter().filter_map(|(sink, position)| {
        let position = position?;
        let arrived_ms = statuses.lag(shard, |lag| lag.shard.committed(&sink, Some(&position)));
        Some(SinkMark { sink, position, arrived_ms })
    });
    (known.collect(), checkpoint)
}
