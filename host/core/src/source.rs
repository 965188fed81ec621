//! Where records come from: shards, and what a lane asks of them.
//!
//! A [`ShardSource`] lists shards and opens a [`BatchReader`] for one of them, at the place that a lane names. Calls that
//! stay without an answer are shown ([`waiting`]).

pub mod waiting;

use std::collections::BTreeMap;

use async_trait::async_trait;

pub use waiting::{WaitWatch, Waiting};

use crate::budget::LongWait;
use crate::metric;
use crate::record::{
    Batch, HashRange, Position, SequenceNumber, ShardId, ShardKey, ShardStart, StreamIdentity,
};

/// Where a shard without a position starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartPosition {
    /// At the oldest record that the stream still holds.
    TrimHorizon,
    /// With records put after the pipeline's first start; resolved once, durably.
    Latest,
    /// At the first record that arrived at or after this time, milliseconds since 1970.
    AtTimestampMs(i64),
    /// The named shards at these sequence numbers, inclusive; their ancestors are not read, all
    /// other shards from the oldest record on.
    AtSequence(BTreeMap<ShardId, SequenceNumber>),
}

/// A shard, as the stream lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its id.
    pub id: ShardId,
    /// The shard or shards that it came from: one by a split, two by a merge.
    pub parents: Vec<ShardId>,
    /// No more records come.
    pub is_closed: bool,
    /// Its hash keys; `None` if what the server gave is no range.
    pub hash_range: Option<HashRange>,
}

impl Shard {
    /// The one shard of a source that is no stream.
    pub fn only(id: ShardId) -> Self {
        Self { id, parents: Vec::new(), is_closed: false, hash_range: None }
    }
}

/// What reading brought.
#[derive(Debug)]
pub enum NextBatch {
    /// Records.
    Batch(Batch),
    /// Nothing new.
    Idle {
        /// How far the shard's end is, in milliseconds, as the server says.
        lag_ms: u64,
        /// Everything that had arrived by then was read, in milliseconds since 1970 by the server's
        /// clock, where that can be said.
        caught_up_ms: Option<i64>,
    },
    /// Records are gone, and the configuration says to go on. What comes next lies after them.
    Lost(LostRecords),
    /// The shard is closed and was read to its end.
    ShardEnd {
        /// A time up to which all that had arrived was read while the shard was open, in milliseconds
        /// since 1970 by the server's clock, where one is known.
        caught_up_ms: Option<i64>,
    },
    /// Nothing more comes for now, and nobody waits for it: a file was read to its end.
    SourceEnd,
}

/// Records of a shard that the stream dropped before they were read: `(from, to]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostRecords {
    /// Exclusive; `None`: from the shard's beginning.
    pub from_exclusive: Option<Position>,
    /// Inclusive; `None`: to the shard's end.
    pub to_inclusive: Option<Position>,
    /// How much, and why, as far as that can be said.
    pub why: String,
}

/// Why a source did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The stream is not there.
    #[error(
        "stream {stream} does not exist; create it with `shardmill stream create --stream {stream}`, or \
         set `create` under [source]"
    )]
    NoSuchStream {
        /// The stream's name.
        stream: String,
    },
    /// Nobody is logged in.
    #[error(
        "no AWS credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run \
         where a role is attached; `endpoint = \"embedded\"` needs none ({cause})"
    )]
    NoCredentials {
        /// What the chain says.
        cause: String,
    },
    /// The role cannot be assumed.
    #[error(
        "failed to assume role {role}: {cause}. Its trust policy must name who asks, with the \
         `external_id` under [source] if it asks for one; docs/iam.md has an example"
    )]
    NoRole {
        /// The role's ARN.
        role: String,
        /// What STS or the network says.
        cause: String,
    },
    /// No region is known.
    #[error("no AWS region: set `region` under [source], AWS_REGION, or a region in the profile")]
    NoRegion,
    /// The stream did not become what was waited for.
    #[error(
        "stream {stream} is {status} after {waited_s} s, not {expected}; look at it in the console, or wait longer with `wait`"
    )]
    NotReady {
        /// The stream's name.
        stream: String,
        /// Its status.
        status: String,
        /// The status that was due.
        expected: &'static str,
        /// How long was waited, in seconds.
        waited_s: u64,
    },
    /// The embedded stream cannot be served.
    #[error("failed to serve the embedded stream at {address}: {cause}")]
    Embedded {
        /// The address or file.
        address: String,
        /// The cause and the way out.
        cause: String,
    },
    /// The stream is not the one that the positions are of.
    #[error(
        "stream {stream} was deleted and created again: it was created at {was}, and now at {is}; its \
         old records are gone and the positions in them mean nothing here. Start again to read the \
         new stream from its configured start"
    )]
    Replaced {
        /// The stream's name.
        stream: String,
        /// When the stream was created that the positions are of.
        was: String,
        /// When the stream was created that has the name now.
        is: String,
    },
    /// The server does not say what time it is.
    #[error(
        "the server of stream {stream} sends no valid `Date` header with its answers, and the clock of \
         this host is not trusted to say what is new there: begin at a given time, with \
         `start = \"at-timestamp:TIME\"` under [source]"
    )]
    NoDate {
        /// The stream's name.
        stream: String,
    },
    /// The start names a shard that the stream does not list.
    #[error(
        "`start` under [source] names shard {shard}, which stream {stream} does not list: it was never \
         there, or the retention of its records has ended. `shardmill stream describe` lists the shards"
    )]
    NoSuchShard {
        /// The stream's name.
        stream: String,
        /// The shard.
        shard: String,
    },
    /// The stream no longer holds what was not read yet.
    #[error(
        "records of {place} are lost: {extent}. Raise the retention for the next time; to go on from \
         the oldest record, set `on_lost_records = \"continue\"` under [source]"
    )]
    LostRecords {
        /// The stream and the shard.
        place: String,
        /// Where the lane stands, what is left, and how much is gone, as far as can be told.
        extent: String,
    },
    /// A file cannot be read.
    #[error("{path}: {what}: {cause}")]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What was tried, and where in the file.
        what: String,
        /// The cause.
        cause: String,
    },
    /// Dead letters cannot be read.
    #[error("dead letters cannot be read: {cause}")]
    DeadLetters {
        /// What the state database says.
        cause: String,
        /// Whether to try again mends nothing.
        is_final: bool,
    },
    /// A call failed.
    #[error("{call} failed for {place}: {cause}")]
    Call {
        /// The operation of the Kinesis API.
        call: &'static str,
        /// The stream or shard, with its sequence where there is one.
        place: String,
        /// The server's code and message, or what the network says.
        cause: String,
    },
}

impl SourceError {
    /// The error for a stream that took another's place.
    pub fn replaced(was: &StreamIdentity, is: &StreamIdentity) -> Self {
        let time = |ms| chrono::DateTime::from_timestamp_millis(ms).map(|at| at.to_rfc3339());
        Self::Replaced {
            stream: was.name.to_string(),
            was: time(was.created_ms).unwrap_or_default(),
            is: time(is.created_ms).unwrap_or_default(),
        }
    }

    /// Whether a person must decide: to try again could lose or double records.
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

/// A stream, as lanes and their supervisor see it.
#[async_trait]
pub trait ShardSource: Send + Sync {
    /// Which stream it is.
    ///
    /// # Errors
    /// [`SourceError`] when it is not there or out of reach.
    async fn identity(&self) -> Result<StreamIdentity, SourceError>;

    /// All shards that the stream still knows, closed ones included.
    ///
    /// # Errors
    /// [`SourceError`] when the stream is not there or out of reach.
    async fn shards(&self) -> Result<Vec<Shard>, SourceError>;

    /// Where a shard starts that was never begun and whose ancestors were not, either.
    fn start(&self) -> &StartPosition;

    /// The time by the clock that records' times of arrival are of, in milliseconds since 1970, rounded
    /// down to the second; `None`: records have no time of arrival.
    ///
    /// # Errors
    /// [`SourceError`] when the stream is out of reach or does not say.
    async fn now_ms(&self) -> Result<Option<i64>, SourceError> {
        Ok(None)
    }

    /// Whether all shards are listed until their last record is dropped. Of another source, those that
    /// are not listed are of no interest.
    fn lists_all(&self) -> bool {
        false
    }

    /// From when on, in milliseconds since 1970, it holds all records that arrived; `None`: it drops none.
    ///
    /// # Errors
    /// [`SourceError`] when the stream is not there or out of reach.
    async fn retained_from_ms(&self) -> Result<Option<i64>, SourceError> {
        Ok(None)
    }

    /// The shards whose readers have waited for memory for `after` or longer, and who holds it.
    fn long_waits(&self, after: std::time::Duration) -> Vec<LongWait> {
        let _ = after;
        Vec::new()
    }

    /// A reader of a shard.
    ///
    /// # Errors
    /// [`SourceError`] when the shard is not there or out of reach.
    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError>;
}

/// Where a lane resumes its shard.
#[derive(Clone, Copy, Debug)]
pub struct ResumePoint<'a> {
    /// Behind this record.
    pub after: Option<&'a Position>,
    /// Where the shard was begun: it counts while there is no `after`.
    pub start: &'a ShardStart,
    /// A time up to which everything was read and settled, in milliseconds since 1970.
    pub caught_up_ms: Option<i64>,
    /// Where the reader shows what it waits for.
    pub waiting: &'a Waiting,
}

/// Reads one shard in order. Dropping the future of a call loses nothing.
#[async_trait]
pub trait BatchReader: Send {
    /// The next batch. Throttling, expired iterators and lost connections are dealt with inside.
    ///
    /// # Errors
    /// What trying again does not mend: access denied, the stream is gone.
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError>;

    /// Gives back what was read ahead, because its lane is blocked: it is read again when it is its turn.
    fn give_back(&mut self) {}
}

/// Counts a loss of records.
pub fn count_loss(shard: &ShardId, lost_ms: u64) {
    metrics::counter!(metric::SOURCE_LOSSES_TOTAL, "shard" => shard.to_string()).increment(1);
    metrics::counter!(metric::SOURCE_LOST_MS_TOTAL, "shard" => shard.to_string())
        .increment(lost_ms);
}
