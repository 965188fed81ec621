//! Where records come from: the stream, its shards, and what a lane asks of them.
//!
//! [`kinesis::KinesisSource`] is the source there is; `client` makes its connection, `embedded`
//! serves a stream of our own, `reader` reads one shard, `lineage` says which shards may be read,
//! `stream`, `input` and `producer` are for those who make streams and fill them.

pub mod client;
pub mod embedded;
pub mod input;
pub mod kinesis;
pub mod lineage;
pub mod producer;
pub mod reader;
pub mod stream;

use async_trait::async_trait;

pub use lineage::{LineageStart, Plan, lineage};
pub use stream::Shard;

use crate::config::StartPosition;
use crate::record::{Batch, Position, ShardKey, ShardStart, StreamIdentity};

/// What reading brought.
#[derive(Debug)]
pub enum NextBatch {
    /// Records.
    Batch(Batch),
    /// Nothing new.
    Idle {
        /// How far the shard's end is, in milliseconds, as the server says.
        behind_ms: u64,
    },
    /// The shard is closed and was read to its end.
    ShardEnd,
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
    /// No region is known.
    #[error("no AWS region: set `region` under [source], AWS_REGION, or a region in the profile")]
    NoRegion,
    /// The stream did not become what was waited for.
    #[error(
        "stream {stream} is {status} after {waited_s} s, not {due}; look at it in the console, or wait longer with `wait`"
    )]
    NotReady {
        /// The stream's name.
        stream: String,
        /// Its status.
        status: String,
        /// The status that was due.
        due: &'static str,
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

    /// A reader of a shard: after a position, or else from where the shard was begun.
    ///
    /// # Errors
    /// [`SourceError`] when the shard is not there or out of reach.
    async fn open(
        &self,
        shard: &ShardKey,
        after: Option<&Position>,
        start: &ShardStart,
    ) -> Result<Box<dyn BatchReader>, SourceError>;
}

/// Reads one shard in order. Dropping the future of a call loses nothing.
#[async_trait]
pub trait BatchReader: Send {
    /// The next batch. Throttling, expired iterators and lost connections are dealt with inside.
    ///
    /// # Errors
    /// What trying again does not mend: access denied, the stream is gone.
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError>;
}
