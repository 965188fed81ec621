//! A part of a stream by the records' time of arrival: what a replay reads.
//!
//! The server can begin at a time; the end is decided here. Times of arrival are only approximately in order (API
//! reference, `Record`: "approximate"), so a shard is read some way beyond the end.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use shardmill_core::budget::LongWait;
use shardmill_core::record::{Batch, Position, ShardId, ShardKey, StreamIdentity};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError,
};

/// Distance beyond the end at which a record's time of arrival shows that no earlier record follows.
const PAST_END_MS: u64 = 60_000;

/// The last record of the window in each shard that has one.
pub type LastInWindow = Arc<Mutex<BTreeMap<ShardId, Position>>>;

/// The records of a source that arrived in a window, in milliseconds since 1970. The window lies in the past, and
/// the source starts at its beginning.
pub struct WindowSource {
    source: Arc<dyn ShardSource>,
    window_ms: Range<u64>,
    last: LastInWindow,
}

impl WindowSource {
    /// Makes the window of a source.
    pub fn new(source: Arc<dyn ShardSource>, window_ms: Range<u64>) -> Self {
        Self { source, window_ms, last: LastInWindow::default() }
    }

    /// Returns the window's last records, which are noted while it is read.
    pub fn last(&self) -> LastInWindow {
        self.last.clone()
    }
}

#[async_trait]
impl ShardSource for WindowSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        self.source.identity().await
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        self.source.shards().await
    }

    async fn retained_from_ms(&self) -> Result<Option<i64>, SourceError> {
        self.source.retained_from_ms().await
    }

    async fn now_ms(&self) -> Result<Option<i64>, SourceError> {
        self.source.now_ms().await
    }

    fn lists_all(&self) -> bool {
        self.source.lists_all()
    }

    fn start(&self) -> &StartPosition {
        self.source.start()
    }

    fn long_waits(&self, after: std::time::Duration) -> Vec<LongWait> {
        self.source.long_waits(after)
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        Ok(Box::new(WindowReader {
            reader: self.source.open(shard, from).await?,
            window_ms: self.window_ms.clone(),
            shard: shard.shard.clone(),
            last: self.last.clone(),
            was_idle: false,
        }))
    }
}

struct WindowReader {
    reader: Box<dyn BatchReader>,
    window_ms: Range<u64>,
    shard: ShardId,
    last: LastInWindow,
    /// The last read brought nothing, and nothing was left.
    was_idle: bool,
}

#[async_trait]
impl BatchReader for WindowReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        Ok(match self.reader.next_batch().await? {
            NextBatch::Batch(batch) => self.part(batch),
            // What arrives from now on is outside of the window. Two such reads are needed, as in a run that ends
            // when caught up.
            NextBatch::Idle { lag_ms: 0, .. } if self.was_idle => NextBatch::SourceEnd,
            idle @ NextBatch::Idle { lag_ms, .. } => {
                self.was_idle = lag_ms == 0;
                idle
            }
            other => other,
        })
    }

    fn give_back(&mut self) {
        self.reader.give_back();
    }
}

impl WindowReader {
    /// Keeps the records of a batch that lie in the window; the batch's position range stays whole.
    fn part(&mut self, mut batch: Batch) -> NextBatch {
        self.was_idle = false;
        let past_end_ms = self.window_ms.end + PAST_END_MS;
        if batch.records.iter().all(|record| record.arrived_ms >= past_end_ms)
            && !batch.records.is_empty()
        {
            return NextBatch::SourceEnd;
        }
        batch.records.retain(|record| self.window_ms.contains(&record.arrived_ms));
        if let Some(last) = batch.records.last() {
            let mut lasts = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            lasts.insert(self.shard.clone(), last.position.clone());
        }
        NextBatch::Batch(batch)
    }
}
