//! Dead letters as one shard without an end: the source of the copies under `[dead_letters]`.
//!
//! A record is a dead letter as JSON; its position is its number in the log of dead letters.

use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::redrive_source::unreadable;
use shardmill_config::BatchLimits;
use shardmill_core::record::{
    Batch, Entry, PipelineName, Position, PositionRange, Record, SequenceNumber, ShardKey,
    StreamIdentity,
};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError,
};
use shardmill_state::{DeadLetters, LoggedDeadLetter};

/// The only shard of the log.
const SHARD: &str = "letters-000000000000";
/// Interval at which new dead letters are looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// The log of dead letters as a source.
pub struct DeadLetterLogSource {
    dead_letters: DeadLetters,
    pipeline: PipelineName,
    limits: BatchLimits,
    last: CancellationToken,
}

impl DeadLetterLogSource {
    /// Makes a source of a pipeline's dead letters. Once `last` is cancelled no more are written: those that exist
    /// then are the last ones.
    pub fn new(
        dead_letters: DeadLetters,
        pipeline: PipelineName,
        limits: BatchLimits,
        last: CancellationToken,
    ) -> Self {
        Self { dead_letters, pipeline, limits, last }
    }
}

#[async_trait]
impl ShardSource for DeadLetterLogSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        self.dead_letters.log_stream(&self.pipeline).await.map_err(unreadable)
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        Ok(vec![Shard::only(SHARD.into())])
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let after = from.after.cloned();
        if let Some(after) = &after {
            // A lane begins at the position of its slowest sink, so earlier entries are not needed.
            self.dead_letters.forget_log(&after.sequence).await.map_err(unreadable)?;
        }
        Ok(Box::new(DeadLetterLogReader {
            dead_letters: self.dead_letters.clone(),
            shard: shard.clone(),
            limits: self.limits,
            last: self.last.clone(),
            after,
            is_idle: false,
        }))
    }
}

struct DeadLetterLogReader {
    dead_letters: DeadLetters,
    shard: ShardKey,
    limits: BatchLimits,
    last: CancellationToken,
    after: Option<Position>,
    /// The last look found nothing.
    is_idle: bool,
}

#[async_trait]
impl BatchReader for DeadLetterLogReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        if self.is_idle {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = self.last.cancelled() => {}
            }
        }
        // This comes before the look, so that the look finds everything that was written until then.
        let is_last = self.last.is_cancelled();
        let after = super::redrive_source::dead_letter_number(self.after.as_ref())?;
        let BatchLimits { records_max, bytes_max, .. } = self.limits;
        let logged = self.dead_letters.logged(after, records_max, bytes_max).await;
        let records: Vec<Record> = logged.map_err(unreadable)?.into_iter().map(record).collect();
        let Some(last) = records.last() else {
            self.is_idle = true;
            return Ok(match is_last {
                true => NextBatch::SourceEnd,
                false => NextBatch::Idle { lag_ms: 0, caught_up_ms: None },
            });
        };
        self.is_idle = false;
        let to_inclusive = last.position.clone();
        let from_exclusive = self.after.replace(to_inclusive.clone());
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            range: PositionRange { from_exclusive, to_inclusive },
            entry: Entry::Source,
        }))
    }
}

fn record(LoggedDeadLetter { number, dead_letter }: LoggedDeadLetter) -> Record {
    Record {
        position: Position { sequence: SequenceNumber::from(number), sub_sequence: 0 },
        payload: dead_letter.to_json().to_string().into(),
        partition_key: dead_letter.partition_key.into(),
        arrived_ms: u64::try_from(dead_letter.written_ms).unwrap_or(0),
    }
}
