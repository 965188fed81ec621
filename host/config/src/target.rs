//! Validated settings of a sink: where its rows go, and when it commits.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::{Located, SinkSettings, one_spelling};
use shardmill_core::record::SinkName;

/// Sink of a pipeline.
#[derive(Clone, Debug)]
pub struct SinkConfig {
    /// Name, unique in the pipeline.
    pub name: Located<SinkName>,
    /// Former name: the state that is stored under it moves to the new name.
    pub renamed_from: Option<Located<SinkName>>,
    /// Commit policy.
    pub commit_policy: CommitPolicy,
    /// Settings that its type has read.
    pub settings: Arc<dyn SinkSettings>,
    /// Where the sink's table begins.
    pub span: Range<usize>,
    /// The sink's table as JSON, with `${VAR}` as written. A reload compares it; of it, the state stores only a digest
    /// ([`PipelineConfig::sink_fingerprints`](super::PipelineConfig::sink_fingerprints)).
    pub fingerprint_json: String,
}

impl SinkConfig {
    /// Returns where the rows are stored, normalized by [`one_spelling`]; `None`: the rows are not stored.
    pub fn destination(&self) -> Option<String> {
        self.settings.destination().map(|destination| one_spelling(&destination))
    }
}

/// Commit policy: a sink commits at the first of these limits, and may give up after a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitPolicy {
    /// Buffered rows of one shard.
    pub rows_max: usize,
    /// Buffered bytes of one shard.
    pub bytes_max: usize,
    /// Age of the oldest buffered position range.
    pub linger_max: Duration,
    /// How long the sink may be unreachable before its rows become dead letters; `None`: the shard waits.
    pub give_up_after: Option<Duration>,
}

impl CommitPolicy {
    /// Default of sinks with tables: one transaction per second and shard, of a size that always fits in memory.
    pub const TABLE: Self = Self::patient(10_000, 4 << 20, Duration::from_secs(1));

    /// Makes the policy of a sink that never gives up: its shards wait while it is unreachable.
    pub const fn patient(rows_max: usize, bytes_max: usize, linger_max: Duration) -> Self {
        Self { rows_max, bytes_max, linger_max, give_up_after: None }
    }
}
