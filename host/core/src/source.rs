//! The contract of sources: shards, and what a lane asks of them.
//!
//! A [`ShardSource`] lists shards and opens a [`BatchReader`] for one of them, at the position that a lane names. Calls
//! that get no answer are shown ([`waiting`]).

pub mod waiting;

use std::collections::BTreeMap;

use async_trait::async_trait;

pub use waiting::{WaitWatch, Waiting};

use crate::budget::LongWait;
use crate::metric;
use crate::record::{
    Batch, HashRange, Position, SequenceNumber, ShardId, ShardKey, ShardStart, StreamIdentity,
};

/// Start of a shard that has no position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartPosition {
    /// At the oldest record that the stream still holds.
    TrimHorizon,
    /// At records put after the first start of the pipeline; resolved to a time once, durably.
    Latest,
    /// At the first record that arrived at or after this time, in milliseconds since 1970.
    AtTimestampMs(i64),
    /// The named shards at these sequence numbers, inclusive. Their ancestors are not read; all other shards start at
    /// the oldest record.
    AtSequence(BTreeMap<ShardId, SequenceNumber>),
}

/// Shard, as the stream lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its id.
    pub id: ShardId,
    /// Parents: none, one after a split, two after a merge.
    pub parents: Vec<ShardId>,
    /// Whether no more records will come.
    pub is_closed: bool,
    /// Hash keys; `None` if the server did not give a valid range.
    pub hash_range: Option<HashRange>,
}

impl Shard {
    /// Makes the only shard of a source that is not a stream.
    pub fn only(id: ShardId) -> Self {
        Self { id, parents: Vec::new(), is_closed: false, hash_range: None }
    }
}

/// Result of a read.
#[derive(Debug)]
pub enum NextBatch {
    /// Records.
    Batch(Batch),
    /// Nothing new.
    Idle {
        /// Lag behind the end of the shard, in milliseconds, as the server reports it.
        lag_ms: u64,
        /// Time up to which everything that had arrived was read, in milliseconds since 1970 by the server's clock, if
        /// known.
        caught_up_ms: Option<i64>,
    },
    /// Records are lost, and the configuration says to go on. The next records lie after them.
    Lost(LostRecords),
    /// The shard is closed and was read to its end.
    ShardEnd {
        /// Time up to which everything that had arrived was read while the shard was open, in milliseconds since 1970
        /// by the server's clock, if known.
        caught_up_ms: Option<i64>,
    },
    /// Nothing more comes: a file was read to its end.
    SourceEnd,
}

/// Records of a shard that the stream dropped before they were read: the lost-records gap `(from, to]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostRecords {
    /// Excluded; `None`: from the beginning of the shard.
    pub from_exclusive: Option<Position>,
    /// Included; `None`: to the end of the shard.
    pub to_inclusive: Option<Position>,
    /// How much was lost, and why, as far as known.
    pub why: String,
}

/// Reason why a source failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The stream does not exist.
    #[error(
        "stream {stream} does not exist; create it with `shardmill stream create --stream {stream}`, or \
         set `create` under [source]"
    )]
    NoSuchStream {
        /// The stream's name.
        stream: String,
    },
    /// There are no credentials.
    #[error(
        "no AWS credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run \
         where a role is attached; `endpoint = \"embedded\"` needs none ({cause})"
    )]
    NoCredentials {
        /// Error of the credential chain.
        cause: String,
    },
    /// The role cannot be assumed.
    #[error(
        "failed to assume role {role}: {cause}. Its trust policy must name who asks, with the \
         `external_id` under [source] if it asks for one; docs/iam.md has an example"
    )]
    NoRole {
        /// ARN of the role.
        role: String,
        /// Error of STS or of the network.
        cause: String,
    },
    /// No region is set.
    #[error("no AWS region: set `region` under [source], AWS_REGION, or a region in the profile")]
    NoRegion,
    /// The stream did not get the expected status in time.
    #[error(
        "expected stream {stream} to be {expected} within {waited_s} s, found {status}; look at it in the console, or wait \
         longer with `wait`"
    )]
    NotReady {
        /// Name of the stream.
        stream: String,
        /// Status that was found.
        status: String,
        /// Status that was expected.
        expected: &'static str,
        /// How long was waited, in seconds.
        waited_s: u64,
    },
    /// The embedded stream cannot be served.
    #[error("failed to serve the embedded stream at {address}: {cause}")]
    Embedded {
        /// Address or file.
        address: String,
        /// Cause and way out.
        cause: String,
    },
    /// The stream is not the one of the stored positions.
    #[error(
        "stream {stream} was deleted and created again: it was created at {was}, and now at {is}; its \
         old records no longer exist, and positions in the old stream are invalid in the new one. Start again to \
         read the new stream from its configured start"
    )]
    Replaced {
        /// Name of the stream.
        stream: String,
        /// Creation time of the stream of the positions.
        was: String,
        /// Creation time of the stream that has the name now.
        is: String,
    },
    /// The server does not send the time.
    #[error(
        "missing or invalid `Date` header in the answers of the server of stream {stream}; the clock of this host \
         may differ from the server's, so it is not used: start at a given time, with \
         `start = \"at-timestamp:TIME\"` under [source]"
    )]
    NoDate {
        /// Name of the stream.
        stream: String,
    },
    /// The start names a shard that the stream does not list.
    #[error(
        "unknown shard {shard} in `start` under [source]: stream {stream} does not list it, because it never \
         existed, or because the retention of its records has ended. `shardmill stream describe` lists the shards"
    )]
    NoSuchShard {
        /// Name of the stream.
        stream: String,
        /// Shard.
        shard: String,
    },
    /// The stream no longer holds records that were not read yet.
    #[error(
        "records of {place} are lost: {extent}. Raise the retention for the next time; to go on from \
         the oldest record, set `on_lost_records = \"continue\"` under [source]"
    )]
    LostRecords {
        /// Stream and shard.
        place: String,
        /// Where the lane stands, what is left, and how much is lost, as far as known.
        extent: String,
    },
    /// A file cannot be read.
    #[error("{path}: {what}: {cause}")]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// Operation that failed, and where in the file.
        what: String,
        /// The cause.
        cause: String,
    },
    /// Dead letters cannot be read.
    #[error("failed to read dead letters: {cause}")]
    DeadLetters {
        /// Error of the state database.
        cause: String,
        /// Whether a retry is useless.
        is_final: bool,
    },
    /// A call failed.
    #[error("{call} failed for {place}: {cause}")]
    Call {
        /// Operation of the Kinesis API.
        call: &'static str,
        /// Stream or shard, with the sequence number if there is one.
        place: String,
        /// Code and message of the server, or the error of the network.
        cause: String,
    },
}

impl SourceError {
    /// Makes the error for a stream that replaced another one of the same name.
    pub fn replaced(was: &StreamIdentity, is: &StreamIdentity) -> Self {
        let time = |ms| chrono::DateTime::from_timestamp_millis(ms).map(|at| at.to_rfc3339());
        Self::Replaced {
            stream: was.name.to_string(),
            was: time(was.created_ms).unwrap_or_default(),
            is: time(is.created_ms).unwrap_or_default(),
        }
    }

    /// Whether a person must decide, because a retry cannot help, or could lose or duplicate records.
    pub fn needs_a_person(&self) -> bool {
        matches!(
            self,
            Self::Replaced { .. }
                | Self::LostRecords { .. }
                | Self::File { .. }
                | Self::DeadLetters { is_final: true, .. }
        )
    }
}

/// Stream, as lanes and their supervisor see it.
#[async_trait]
pub trait ShardSource: Send + Sync {
    /// Returns the identity of the stream.
    ///
    /// # Errors
    /// [`SourceError`] if the stream does not exist or is unreachable.
    async fn identity(&self) -> Result<StreamIdentity, SourceError>;

    /// Lists all shards that the stream still knows, closed ones included.
    ///
    /// # Errors
    /// [`SourceError`] if the stream does not exist or is unreachable.
    async fn shards(&self) -> Result<Vec<Shard>, SourceError>;

    /// Returns the start of shards that have no position and whose ancestors have none.
    fn start(&self) -> &StartPosition;

    /// Returns the current time of the clock that sets the arrival times of records, in milliseconds since 1970,
    /// rounded down to the second; `None`: records have no arrival time.
    ///
    /// # Errors
    /// [`SourceError`] if the stream is unreachable or does not send the time.
    async fn now_ms(&self) -> Result<Option<i64>, SourceError> {
        Ok(None)
    }

    /// Whether a shard is listed until its last record is dropped. If so, all records of a shard that is not listed
    /// have been dropped. For other sources, shards that are not listed do not matter.
    fn lists_all(&self) -> bool {
        false
    }

    /// Returns the time, in milliseconds since 1970, from which on no record has been dropped; `None`: none ever is.
    ///
    /// # Errors
    /// [`SourceError`] if the stream does not exist or is unreachable.
    async fn retained_from_ms(&self) -> Result<Option<i64>, SourceError> {
        Ok(None)
    }

    /// Returns the shards whose readers have waited for memory for `after` or longer, and who holds it.
    fn long_waits(&self, after: std::time::Duration) -> Vec<LongWait> {
        let _ = after;
        Vec::new()
    }

    /// Opens a reader of a shard.
    ///
    /// # Errors
    /// [`SourceError`] if the shard does not exist or is unreachable.
    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError>;
}

/// Position at which a lane resumes its shard.
#[derive(Clone, Copy, Debug)]
pub struct ResumePoint<'a> {
    /// Last record that was read; the reader starts after it.
    pub after: Option<&'a Position>,
    /// Start of the shard, which is used only while there is no `after`.
    pub start: &'a ShardStart,
    /// Time up to which everything was read and has its outcome, in milliseconds since 1970.
    pub caught_up_ms: Option<i64>,
    /// Where the reader shows what it waits for.
    pub waiting: &'a Waiting,
}

/// Reader of one shard, in order. Dropping the future of a call loses nothing.
#[async_trait]
pub trait BatchReader: Send {
    /// Returns the next batch. The reader itself handles throttling, expired iterators and lost connections.
    ///
    /// # Errors
    /// Failures that a retry cannot solve: access is denied, or the stream does not exist.
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError>;

    /// Drops what was read ahead, because the lane is blocked. It will be read again later.
    fn give_back(&mut self) {}
}

/// Counts a loss of records in the metrics.
pub fn count_loss(shard: &ShardId, lost_ms: u64) {
    metrics::counter!(metric::SOURCE_LOSSES_TOTAL, "shard" => shard.to_string()).increment(1);
    metrics::counter!(metric::SOURCE_LOST_MS_TOTAL, "shard" => shard.to_string())
        .increment(lost_ms);
}
