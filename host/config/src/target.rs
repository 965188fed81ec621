//! What a sink is and when it commits, validated: where rows go.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::{Located, SinkSettings, one_spelling};
use shardmill_core::record::SinkName;

/// One sink.
#[derive(Clone, Debug)]
pub struct SinkConfig {
    /// Its name, unique in the pipeline.
    pub name: Located<SinkName>,
    /// The name that it had before: what is kept under it moves to this one.
    pub renamed_from: Option<Located<SinkName>>,
    /// When it commits.
    pub commit_policy: CommitPolicy,
    /// What it is, as its type has read it.
    pub settings: Arc<dyn SinkSettings>,
    /// Where the sink's table begins.
    pub span: Range<usize>,
    /// The sink's table as JSON with secrets left as `${VAR}` written: stored with the revision.
    pub fingerprint_json: String,
}

impl SinkConfig {
    /// Where the rows end up, in [`one_spelling`]; `None`: nowhere that lasts.
    pub fn destination(&self) -> Option<String> {
        self.settings.destination().map(|destination| one_spelling(&destination))
    }
}

/// A sink commits at the first of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitPolicy {
    /// Rows of one shard in hand.
    pub rows_max: usize,
    /// Bytes of one shard in hand.
    pub bytes_max: usize,
    /// Age of the oldest span in hand.
    pub linger_max: Duration,
    /// How long the sink may be out of reach before its rows go to the dead letters; `None`: the
    /// shard waits.
    pub give_up_after: Option<Duration>,
}

impl CommitPolicy {
    /// The default of sinks that have tables: one transaction per second and shard, or what fits in memory without a
    /// thought.
    pub const TABLE: Self = Self::patient(10_000, 4 << 20, Duration::from_secs(1));

    /// A rhythm of a sink that its shards wait for.
    pub const fn patient(rows_max: usize, bytes_max: usize, linger_max: Duration) -> Self {
        Self { rows_max, bytes_max, linger_max, give_up_after: None }
    }
}
