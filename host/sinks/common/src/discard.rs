//! Rows to nowhere: for measuring what comes before a sink, and for trying stages out.
//!
//! The sink keeps no position of its own; the checkpoint passes what it was given.

use async_trait::async_trait;

use shardmill_core::record::BoundRoute;
use shardmill_core::record::{Position, ShardKey, SinkName};
use shardmill_core::sink::{Acquired, Commit, Committed, RefusalLog, Sink, SinkError, SinkWriter};

/// A sink that drops its rows.
pub struct DiscardSink {
    name: SinkName,
}

impl DiscardSink {
    /// A sink of this name.
    pub fn new(name: SinkName) -> Self {
        Self { name }
    }
}

#[async_trait]
impl Sink for DiscardSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        Ok(())
    }

    async fn acquire(&self, _shard: &ShardKey) -> Result<Acquired, SinkError> {
        Ok(Acquired {
            writer: Box::new(DiscardWriter),
            position: None,
            keeps_position: false,
            must_cut_at: None,
        })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }
}

struct DiscardWriter;

#[async_trait]
impl SinkWriter for DiscardWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        _refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        Ok(Committed { rows_written: commit.rows.len() as u64, ..Committed::default() })
    }
}
