//! The contract of sinks: where rows go.
//!
//! A sink that can be exact stores its own position, and that position is the truth. `acquire` fences every earlier
//! owner of a shard (it can no longer commit) and returns the position of the sink. `commit` makes the rows of a
//! position range and the new position durable in one step. Buffers, commit policy, retries and the byte budget are not
//! the work of a sink: the engine has them for all sinks.
//!
//! Outcomes of a commit of `(from, to]`, which moves the position from `from` to `to`:
//!
//! | the sink finds | result |
//! |---|---|
//! | its position is `from` | rows and position are durable together |
//! | its position is already `to`: an earlier try landed | reported as done, nothing is written twice |
//! | another owner, or any other position | [`SinkError::Fenced`]: nothing was committed, the lane restarts |
//! | the destination cannot take the rows now | [`SinkError::Unavailable`]: nothing was committed, the engine retries |
//! | the last step gets no answer | [`SinkError::Unavailable`]: the next try finds out by the position |
//! | the table refuses some rows | they are made durable in the [`RefusalLog`] first, then the others are committed |

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::owner::{OwnerName, Ownership, StateMark};
use crate::record::{
    BoundRoute, PipelineName, Position, PositionRange, Row, ShardId, ShardKey, SinkName,
};

/// Rows of one shard, and the position range that they finish. The range may cover more records than there are rows
/// (filtered, dead-lettered or routed elsewhere), and there may be no row at all.
#[derive(Debug)]
pub struct Commit {
    /// Range that the commit finishes: the sink's position moves from `from_exclusive` to `to_inclusive`.
    pub range: PositionRange,
    /// Rows, by ascending (position, ordinal); shared with the threads that encode them. If the rows were encoded on
    /// arrival, only the refused ones are here.
    pub rows: Arc<Vec<Row>>,
    /// Rows that were encoded on arrival, if the writer asked for that.
    pub encoded: Option<Arc<EncodedRows>>,
    /// Id of the revision (stages, digests, configuration) that made the rows.
    pub revision: Arc<str>,
}

impl Commit {
    /// Returns the number of rows, including those that were encoded and dropped.
    pub fn rows_gathered(&self) -> usize {
        self.encoded.as_ref().map_or(self.rows.len(), |encoded| encoded.rows)
    }

    /// Returns the number of a row of [`Commit::rows`] among all rows of the commit.
    pub fn number_of(&self, row: usize) -> usize {
        let kept = self.encoded.as_ref().and_then(|encoded| encoded.kept.get(row));
        kept.copied().unwrap_or(row)
    }
}

/// Result of encoding rows on arrival.
#[derive(Debug)]
pub struct EncodedRows {
    /// Number of rows.
    pub rows: usize,
    /// Number of each row that was kept because it is refused.
    pub kept: Vec<usize>,
    /// The encoded rows; or the reason why there are none, as the end of a sentence.
    pub form: Result<Box<dyn Any + Send + Sync>, String>,
    /// Memory of this and of the kept rows, in bytes.
    pub occupied_bytes: usize,
}

/// Row that the sink's table refused. It alone becomes a dead letter.
#[derive(Debug)]
pub struct Refusal {
    /// Index into [`Commit::rows`].
    pub row: usize,
    /// Reason, from the sink or the host, with the SQLSTATE if there is one.
    pub reason: String,
}

/// Result of a commit.
#[derive(Debug, Default)]
pub struct Committed {
    /// Rows written.
    pub rows_written: u64,
    /// Rows refused, and stored as pending dead letters.
    pub rows_refused: u64,
    /// Bytes sent to the destination.
    pub bytes_written: u64,
}

/// Reason why a sink failed.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// Another owner has acquired the shard: nothing was committed. The lane restarts.
    #[error("sink {sink}: another owner has acquired {shard}: {detail}")]
    Fenced {
        /// The sink.
        sink: SinkName,
        /// Shard that was lost.
        shard: String,
        /// Value that was found.
        detail: String,
        /// The other owner, if the sink stores its name.
        by: Option<OwnerName>,
    },
    /// The destination cannot take the rows now (unreachable, full, altered): nothing was committed. The delivery backs
    /// off, shows that, and tries again.
    #[error("sink {sink}: {cause}")]
    Unavailable {
        /// The sink.
        sink: SinkName,
        /// Cause and way out, as one sentence.
        cause: String,
    },
    /// The destination is gone, and nothing in this process can bring it back: the reader of standard output has closed
    /// it. Nothing was committed; a retry is useless.
    #[error("sink {sink}: {cause}")]
    Closed {
        /// The sink.
        sink: SinkName,
        /// Cause.
        cause: String,
    },
    /// Too many rows were refused, so the rows are probably not at fault. Nothing was committed.
    #[error("sink {sink}: {cause}")]
    TooManyRefused {
        /// The sink.
        sink: SinkName,
        /// The limit, and the last reason.
        cause: String,
    },
}

/// Store of refused rows, written *before* the sink commits the range that they belong to.
#[async_trait]
pub trait RefusalLog: Send + Sync {
    /// Makes the refusals (by ascending row) durable as pending dead letters. They become visible once the sink's
    /// position covers them.
    ///
    /// # Errors
    /// [`SinkError::TooManyRefused`] above the limit; [`SinkError::Unavailable`] if the dead-letter store cannot be
    /// written. The sink must then roll back and return the error.
    async fn record(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError>;

    /// Checks that these rows of the commit (ascending) may be refused, whatever happens to the others. A search for
    /// refused rows can then end early, not after all of them.
    ///
    /// # Errors
    /// [`SinkError::TooManyRefused`] above the limit.
    fn check(&self, _commit: &Commit, _refused: &[usize]) -> Result<(), SinkError> {
        Ok(())
    }
}

/// A destination.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Returns its name in the pipeline.
    fn name(&self) -> &SinkName;

    /// Checks that the destination exists and accepts what the routes carry (format, and columns against the live
    /// table). Creates it if the configuration says so. Writes no row.
    ///
    /// # Errors
    /// Mismatch, with both sides; or that the destination is unreachable.
    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError>;

    /// Checks whether rows could be written, without a change to the destination; `shardmill check` calls it. Returns
    /// warnings, each a sentence. A sink whose [`Sink::prepare`] writes something (creates a table, a probe) must have
    /// its own check.
    ///
    /// # Errors
    /// As for [`Sink::prepare`], and if the sink could never take a row.
    async fn check(&self, routes: &[BoundRoute]) -> Result<Vec<String>, SinkError> {
        self.prepare(routes).await.map(|()| Vec::new())
    }

    /// Checks as cheaply as possible whether the destination can be reached for a shard. All sinks are asked before the
    /// first is acquired: acquiring may cost writes, which would be repeated at each retry while another sink is
    /// unreachable.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the destination is unreachable.
    async fn reach(&self, shard: &ShardKey) -> Result<(), SinkError> {
        self.position(shard).await.map(drop)
    }

    /// Whether acquiring a shard leaves something behind that is never removed, such as a link of a claim log. Such
    /// sinks are acquired last, so that a failure of another sink costs nothing.
    fn acquires_last(&self) -> bool {
        false
    }

    /// Acquires the shard: afterwards no earlier writer of it can commit.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the destination is unreachable.
    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError>;

    /// Returns the sink's position of a shard, without acquiring it. `None`: there is no position yet, or the sink
    /// stores none (then [`Acquired::keeps_position`] is false as well).
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the destination is unreachable.
    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError>;

    /// Moves what the destination stores for a shard from the sink's old name to its new name, so that the sink resumes
    /// at its position. Does nothing if nothing is stored, or if it was already moved.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the destination is unreachable, or has positions under both names.
    async fn adopt(&self, _old: &SinkName, _shard: &ShardKey) -> Result<(), SinkError> {
        Ok(())
    }

    /// Sets who writes from now on. Sinks with positions store it beside them. Called before the first shard is
    /// acquired, and again after each restart of all lanes.
    fn set_ownership(&self, _ownership: Ownership) {}

    /// Returns the positions that the sink stores for these shards and for all redrives of the pipeline, without
    /// acquiring anything. It may return more. `None`: the sink stores no positions.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the destination is unreachable.
    async fn kept_positions(
        &self,
        _pipeline: &PipelineName,
        _shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        Ok(None)
    }
}

/// Position of a shard, as a sink stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptPosition {
    /// Key of the stream.
    pub stream: String,
    /// Shard.
    pub shard: ShardId,
    /// Position of the sink; `None`: the shard was acquired, and nothing was committed.
    pub position: Option<Position>,
    /// State with which it was written; `None`: an earlier version wrote it.
    pub mark: Option<StateMark>,
    /// Process that wrote it.
    pub owner: Option<OwnerName>,
}

/// Acquired shard.
pub struct Acquired {
    /// Writer that commits the shard's rows from now on.
    pub writer: Box<dyn SinkWriter>,
    /// Position of the sink; `None`: none yet.
    pub position: Option<Position>,
    /// False for at-least-once sinks: the host stores their position in its checkpoint store.
    pub keeps_position: bool,
    /// Where the next commit must end exactly, because an earlier owner has promised an object with that end and has
    /// not written it. Only claim logs set it.
    pub must_cut_at: Option<Position>,
}

/// Encodes rows on arrival, so that their memory is released at once: their batch, the plugin's answer, and the
/// overhead of each row.
pub trait EncodeRows: Send + Sync {
    /// Starts an encoder for the rows of one commit.
    fn begin(&self) -> Box<dyn RowEncoder>;
}

/// Encoder of the rows of one commit. It uses the processor: call it outside the async threads.
pub trait RowEncoder: Send {
    /// Adds rows, by ascending (position, ordinal). Returns `Some` if the commit must end here, because it has the
    /// highest number of parts, or would hold more than `occupied_bytes_max`. The rows of one record stay together, and
    /// the first record is always added.
    fn push(&mut self, rows: Vec<Row>, occupied_bytes_max: usize) -> Option<CutRows>;

    /// Returns the memory that it occupies, in bytes.
    fn occupied_bytes(&self) -> usize;

    /// Finishes. Returns the refused rows, and the result for the others.
    fn finish(self: Box<Self>) -> (Vec<Row>, EncodedRows);
}

/// Where a commit is cut.
#[derive(Debug)]
pub struct CutRows {
    /// Position of the last row that was added by this call; `None`: none was.
    pub to_inclusive: Option<Position>,
    /// Rows after it.
    pub rest: Vec<Row>,
}

/// Observer of the rows of the next commit.
pub trait LookAhead: Send + Sync {
    /// Receives rows that wait for their commit.
    fn see(&self, rows: &Arc<Vec<Row>>);
}

/// Writer of one shard's rows. One delivery task owns it; calls do not overlap.
#[async_trait]
pub trait SinkWriter: Send {
    /// Returns an encoder for rows on arrival; `None`: rows stay as they are.
    fn encodes_rows(&self) -> Option<Arc<dyn EncodeRows>> {
        None
    }

    /// Returns who wants to see the rows of the next commit while the writer is busy with the current one; `None`:
    /// nobody.
    fn looks_ahead(&self) -> Option<Arc<dyn LookAhead>> {
        None
    }

    /// Whether a commit of rows that were not encoded on arrival makes a copy of all of them in the destination's
    /// format. The copy is counted while the commit runs.
    fn copies_rows(&self) -> bool {
        false
    }

    /// Names the calls that a commit makes, for the message when they get no answer.
    fn calls(&self) -> &'static str {
        "the commit"
    }

    /// Returns the pause that the destination asked for when the last commit failed; `None`: it asked for none.
    fn asked_to_wait(&self) -> Option<Duration> {
        None
    }

    /// Writes the rows and moves the position, as one durable step. After an error nothing of the commit is visible,
    /// and the same commit may be tried again: if an earlier try did land and only its answer was lost, the position
    /// shows that, and the commit is reported as done.
    ///
    /// # Errors
    /// [`SinkError`]. A single bad row is not an error: it goes to `refusals`.
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError>;
}
