//! Sink that drops its rows: for measuring source and stages, and for trying out stages.
//!
//! The sink keeps no position of its own; the checkpoint moves past the dropped rows.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;
use serde::de::IgnoredAny;

use shardmill_config::reading::{Check, RawCommit, Spanned, Text};
use shardmill_config::{
    CommitPolicy, Key, ReadSink, SharedParts, SinkBuildError, SinkContext, SinkSettings, SinkTable,
    SinkType,
};
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{Position, ShardKey, SinkName};
use shardmill_core::sink::{Acquired, Commit, Committed, RefusalLog, Sink, SinkError, SinkWriter};

/// Sink type that drops its rows.
pub const TYPE: &dyn SinkType = &DiscardType;

struct DiscardType;

/// Settings of a sink that drops its rows: there are none.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscardSettings;

/// `[[sink]]` with `type = "discard"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawDiscard {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    commit: Option<RawCommit>,
}

impl SinkType for DiscardType {
    fn name(&self) -> &'static str {
        "discard"
    }

    fn about(&self) -> &'static str {
        "Drops its rows: for measuring the source and the stages, and for trying out stages."
    }

    fn keys(&self) -> &'static [Key] {
        &[]
    }

    fn commit_policy(&self) -> CommitPolicy {
        CommitPolicy::TABLE
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let raw: RawDiscard = table.shaped(check)?;
        Some(ReadSink::new(raw.name, raw.commit, Some(DiscardSettings)))
    }
}

impl SinkSettings for DiscardSettings {
    fn destination(&self) -> Option<String> {
        None
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        Ok(Arc::new(DiscardSink::new(context.name.clone())))
    }
}

/// Sink that drops its rows.
pub struct DiscardSink {
    name: SinkName,
}

impl DiscardSink {
    /// Makes a sink with this name.
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
