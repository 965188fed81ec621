//! The path of a record, on one screen.
//!
//! One lane per shard: read a batch, run it through the stages, write its dead letters, hand its
//! rows to the sinks. Sinks commit in their own rhythm; the checkpoint follows the slowest.

use std::sync::Arc;
use std::time::Duration;

use crate::lane::{Lane, LaneEnd, LaneError, LaneEvent, Shared, StagesRan};
use shardmill_core::record::{Batch, ShardKey};
use shardmill_core::source::{BatchReader, NextBatch};
use shardmill_core::stop::Stop;

/// Reads one shard from where its sinks stand until it ends or `stop` is asked for.
///
/// # Errors
/// [`LaneError`]: what was not committed is read again when the lane is started anew.
pub(crate) async fn run_lane(
    shared: &Shared,
    shard: ShardKey,
    stop: &Stop,
) -> Result<LaneEnd, LaneError> {
    // Nothing is in hand yet: a sink that does not answer is not waited for.
    let Some(lane) = stop.unless_asked(Lane::acquire(shared, shard, stop)).await else {
        return Ok(LaneEnd::Stopped);
    };
    let mut lane = lane?;
    match read_to_end(shared, &mut lane, stop).await {
        Ok(end) => lane.finish(end).await,
        Err(LaneError::Stopped) => lane.finish(LaneEnd::Stopped).await,
        // What was read before is as good as ever.
        Err(error @ LaneError::Source(_)) => lane.finish(LaneEnd::Stopped).await.and(Err(error)),
        Err(error) => {
            lane.abandon().await;
            Err(error)
        }
    }
}

/// Takes records along the path until there are no more. Each wait ends when `stop` is asked for, with
/// [`LaneError::Stopped`].
async fn read_to_end(
    shared: &Shared,
    lane: &mut Lane<'_>,
    stop: &Stop,
) -> Result<LaneEnd, LaneError> {
    let mut reader = lane.reader().await?;
    'batches: loop {
        // It goes on whatever else the lane does: a read that is broken off again and again never ends.
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

/// Takes a batch along the path.
async fn take_along(lane: &mut Lane<'_>, batch: Batch) -> Result<(), LaneError> {
    // A batch is run in parts where it straddles a change of revision, and where what it becomes would hold
    // too much. Those that wait, the next one last.
    let mut waiting = vec![batch];
    let mut records_max = usize::MAX;
    while let Some(batch) = waiting.pop() {
        let (batch, rest) = batch.cut_at(records_max);
        waiting.extend(rest);
        let (part, rest) = lane.cut_at_swap(batch).await?;
        waiting.extend(rest);
        match lane.run_stages(&part).await? {
            // Nothing behind a part without an outcome may go on.
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

/// Waits until a batch has gone along the path. When that takes as long as `patience`, the lane is blocked,
/// and what was read ahead is given back, so that it is not missing where lanes go on.
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
