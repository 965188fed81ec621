//! The path of a record, on one screen.
//!
//! One lane per shard. The lane reads a batch, runs it through the stages, stores its dead letters, and hands its
//! rows to the sinks. The order is the invariant: the dead letters of a position range are durable before any sink
//! can commit that range. Each sink commits by its own commit policy; the checkpoint follows the slowest sink.
//!
//! How the loop ends, and what happens to rows that were handed over but are not committed yet:
//!
//! | end | rows in the deliveries |
//! |---|---|
//! | the shard or the source ended | committed, then the last checkpoint is written |
//! | a stop was asked for | committed within the time of the shutdown, the rest is read again |
//! | the source failed | committed, then the error is reported and the lane restarts |
//! | a sink lost the shard, the state failed, or the stages start in no lane | dropped: read again by the next lane |

use std::sync::Arc;
use std::time::Duration;

use crate::lane::{Lane, LaneEnd, LaneError, LaneEvent, Shared, StagesRan};
use shardmill_core::record::{Batch, ShardKey};
use shardmill_core::source::{BatchReader, NextBatch};
use shardmill_core::stop::Stop;

/// Reads one shard from the positions of its sinks until it ends or `stop` is asked for.
///
/// # Errors
/// [`LaneError`]: what was not committed is read again when the lane is restarted.
pub(crate) async fn run_lane(
    shared: &Shared,
    shard: ShardKey,
    stop: &Stop,
) -> Result<LaneEnd, LaneError> {
    // No rows are in hand yet, so a stop does not wait for a sink that does not answer.
    let Some(lane) = stop.unless_asked(Lane::acquire(shared, shard, stop)).await else {
        return Ok(LaneEnd::Stopped);
    };
    let mut lane = lane?;
    match read_to_end(shared, &mut lane, stop).await {
        Ok(end) => lane.finish(end).await,
        Err(LaneError::Stopped) => lane.finish(LaneEnd::Stopped).await,
        // The batches read before the failure are complete: commit them, then report the failure.
        Err(error @ LaneError::Source(_)) => lane.finish(LaneEnd::Stopped).await.and(Err(error)),
        Err(error) => {
            lane.abandon().await;
            Err(error)
        }
    }
}

/// Reads batches and takes them along the path until there are no more. Each wait ends when `stop` is asked for,
/// with [`LaneError::Stopped`].
async fn read_to_end(
    shared: &Shared,
    lane: &mut Lane<'_>,
    stop: &Stop,
) -> Result<LaneEnd, LaneError> {
    let mut reader = lane.reader().await?;
    'batches: loop {
        // This future survives all events of the lane: a read that is cancelled at each event would never finish.
        let mut next = reader.next_batch();
        let batch = loop {
            tokio::select! {
                () = stop.asked() => return Err(LaneError::Stopped),
                event = lane.event() => match event {
                    LaneEvent::SinkEnded(why) => return Err(why),
                    LaneEvent::NextRevision => lane.change_revision().await?,
                },
                next = &mut next => match next? {
                    NextBatch::Batch(batch) => break batch,
                    NextBatch::Idle { lag_ms, caught_up_ms } => {
                        lane.idle(lag_ms, caught_up_ms).await?;
                        continue 'batches;
                    }
                    NextBatch::Lost(lost) => {
                        lane.record_hole(lost).await?;
                        continue 'batches;
                    }
                    NextBatch::ShardEnd { caught_up_ms } => {
                        lane.reached_end(caught_up_ms);
                        return Ok(LaneEnd::ShardEnd);
                    }
                    NextBatch::SourceEnd => return Ok(LaneEnd::SourceEnd),
                },
            }
        };
        drop(next);
        let steps = take_along(lane, batch);
        giving_back(reader.as_mut(), shared.config.timing.give_back_after, steps).await?;
    }
}

/// Takes a batch along the path: stages, dead letters, deliveries.
async fn take_along(lane: &mut Lane<'_>, batch: Batch) -> Result<(), LaneError> {
    // A batch is run in parts where it straddles a change of revision, and where its outputs would hold too much
    // memory. This is the stack of parts still to run: the next one is last.
    let mut waiting = vec![batch];
    let mut records_max = usize::MAX;
    while let Some(batch) = waiting.pop() {
        let (batch, rest) = batch.cut_at(records_max);
        waiting.extend(rest);
        let (part, rest) = lane.cut_at_swap(batch).await?;
        waiting.extend(rest);
        match lane.run_stages(&part).await? {
            // The position may move only over records with an outcome: a later part waits for this one.
            StagesRan::All(outcome) => {
                lane.write_dead_letters(&part, outcome.dead_letters).await?;
                lane.deliver(&part, outcome.routed, outcome.arenas).await?;
            }
            StagesRan::First(records) => {
                records_max = records;
                waiting.push(Arc::unwrap_or_clone(part));
            }
        }
    }
    Ok(())
}

/// Waits until a batch has gone along the path. After `patience` the lane counts as blocked, and its read-ahead is
/// returned to the common memory budget, so that other lanes can use it.
async fn giving_back<T>(
    reader: &mut dyn BatchReader,
    patience: Duration,
    steps: impl Future<Output = T>,
) -> T {
    tokio::pin!(steps);
    tokio::select! {
        done = &mut steps => return done,
        () = tokio::time::sleep(patience) => reader.give_back(),
    }
    steps.await
}
