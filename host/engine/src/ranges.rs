//! Position ranges of a source's shards, each read on its own: the records that run again after a rollback.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;

use shardmill_core::budget::LongWait;
use shardmill_core::record::{Position, ShardId, ShardKey, StreamIdentity};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError,
};

/// A position range of a shard, `(from, to]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRange {
    /// Exclusive; `None`: from the shard's beginning.
    pub from_exclusive: Option<Position>,
    /// Inclusive; `None`: to the shard's end.
    pub to_inclusive: Option<Position>,
}

/// The records of a source that lie in position ranges.
pub struct RangesSource {
    source: Arc<dyn ShardSource>,
    ranges: BTreeMap<ShardId, ShardRange>,
}

impl RangesSource {
    /// Makes a source of these ranges, one per shard.
    pub fn new(source: Arc<dyn ShardSource>, ranges: BTreeMap<ShardId, ShardRange>) -> Self {
        Self { source, ranges }
    }
}

#[async_trait]
impl ShardSource for RangesSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        self.source.identity().await
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        // Parents are left out: each shard is read independently.
        Ok(self.ranges.keys().cloned().map(Shard::only).collect())
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    fn long_waits(&self, after: std::time::Duration) -> Vec<LongWait> {
        self.source.long_waits(after)
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let Some(range) = self.ranges.get(&shard.shard) else { return Ok(Box::new(Nothing)) };
        let after = from.after.max(range.from_exclusive.as_ref());
        if after.is_some() && after >= range.to_inclusive.as_ref() && range.to_inclusive.is_some() {
            return Ok(Box::new(Nothing));
        }
        let reader = self.source.open(shard, ResumePoint { after, ..from }).await?;
        Ok(Box::new(RangeReader {
            reader,
            to_inclusive: range.to_inclusive.clone(),
            has_ended: false,
        }))
    }
}

struct Nothing;

#[async_trait]
impl BatchReader for Nothing {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        Ok(NextBatch::SourceEnd)
    }
}

struct RangeReader {
    reader: Box<dyn BatchReader>,
    to_inclusive: Option<Position>,
    has_ended: bool,
}

#[async_trait]
impl BatchReader for RangeReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        if self.has_ended {
            return Ok(NextBatch::SourceEnd);
        }
        let batch = match self.reader.next_batch().await? {
            NextBatch::Batch(batch) => batch,
            NextBatch::ShardEnd { .. } => return Ok(NextBatch::SourceEnd),
            other => return Ok(other),
        };
        let Some(to) = &self.to_inclusive else { return Ok(NextBatch::Batch(batch)) };
        self.has_ended = batch.range.to_inclusive >= *to;
        let first = batch.records.first().map(|record| &record.position);
        if first.is_some_and(|first| first > to) {
            return Ok(NextBatch::SourceEnd);
        }
        Ok(NextBatch::Batch(batch.cut_after(to).0))
    }

    fn give_back(&mut self) {
        self.reader.give_back();
    }
}
