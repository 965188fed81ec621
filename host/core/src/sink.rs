//! Where rows go: the contract that every sink keeps.
//!
//! A sink holds the truth about how far it is. `acquire` takes a shard over (an earlier owner can
//! no longer commit) and says where the sink stands; `commit` makes a span's rows and the new
//! position durable together. Buffering, rhythm, retries and the byte budget are not a sink's
//! work: the engine does them for all.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::owner::{OwnerName, Ownership, StateMark};
use crate::record::{
    BoundRoute, PipelineName, Position, PositionRange, Row, ShardId, ShardKey, SinkName,
};

/// Rows of one shard and the span that they settle. The span may hold more records than rows
/// (filtered, dead-lettered, routed elsewhere) and may hold no row at all.
#[derive(Debug)]
pub struct Commit {
    /// What is settled: the sink's position moves from `from_exclusive` to `to_inclusive`.
    pub range: PositionRange,
    /// The rows, by ascending (position, ordinal); shared with the threads that encode them. Where they
    /// were encoded as they arrived: those that were refused.
    pub rows: Arc<Vec<Row>>,
    /// What became of the rows as they arrived, if the writer wanted that.
    pub encoded: Option<Arc<EncodedRows>>,
    /// The id of the revision (stages, digests, configuration) that made the rows.
    pub revision: Arc<str>,
}

impl Commit {
    /// How many rows it has, with those that were encoded and let go.
    pub fn rows_gathered(&self) -> usize {
        self.encoded.as_ref().map_or(self.rows.len(), |encoded| encoded.rows)
    }

    /// The number of a row of [`Commit::rows`] among all that were gathered.
    pub fn number_of(&self, row: usize) -> usize {
        let kept = self.encoded.as_ref().and_then(|encoded| encoded.kept.get(row));
        kept.copied().unwrap_or(row)
    }
}

/// What became of rows that were encoded as they arrived.
#[derive(Debug)]
pub struct EncodedRows {
    /// How many they were.
    pub rows: usize,
    /// The number of each that was kept, because it is refused.
    pub kept: Vec<usize>,
    /// What they are now; or why nothing, as a sentence's end.
    pub form: Result<Box<dyn Any + Send + Sync>, String>,
    /// The memory that this and the rows that were kept hold, in bytes.
    pub occupied_bytes: usize,
}

/// A row that the sink's table refused: it goes to the dead letters alone.
#[derive(Debug)]
pub struct Refusal {
    /// Index into [`Commit::rows`].
    pub row: usize,
    /// Why, as the sink or the host says it; with the SQLSTATE where there is one.
    pub reason: String,
}

/// What a commit did.
#[derive(Debug, Default)]
pub struct Committed {
    /// Rows written.
    pub rows_written: u64,
    /// Rows refused and held for the dead letters.
    pub rows_refused: u64,
    /// Bytes handed to the destination.
    pub bytes_written: u64,
}

/// Why a sink could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// Another owner has taken the shard over: nothing was committed. The lane starts anew.
    #[error("sink {sink}: another owner has taken over {shard}: {detail}")]
    Fenced {
        /// The sink.
        sink: SinkName,
        /// The shard that was lost.
        shard: String,
        /// What was found.
        detail: String,
        /// The other owner, where the sink keeps its name.
        by: Option<OwnerName>,
    },
    /// The destination cannot take the rows now (gone, full, altered): nothing was committed.
    /// The delivery backs off and tries again, visibly.
    #[error("sink {sink}: {cause}")]
    Unavailable {
        /// The sink.
        sink: SinkName,
        /// The cause and the way out, as one sentence.
        cause: String,
    },
    /// The destination is gone for good, and nothing within the process brings it back: the reader of
    /// standard output has closed it. Nothing was committed; trying again is pointless.
    #[error("sink {sink}: {cause}")]
    Closed {
        /// The sink.
        sink: SinkName,
        /// The cause.
        cause: String,
    },
    /// Too many rows were refused: the fault is not the rows'. Nothing was committed.
    #[error("sink {sink}: {cause}")]
    TooManyRefused {
        /// The sink.
        sink: SinkName,
        /// The limit, and the last reason.
        cause: String,
    },
}

/// Where a sink keeps refused rows *before* it commits the span that they belong to.
#[async_trait]
pub trait RefusalLog: Send + Sync {
    /// Makes the refusals (by ascending row) durable but hidden; they show once the sink's position covers them.
    ///
    /// # Errors
    /// [`SinkError::TooManyRefused`] past the limit; [`SinkError::Unavailable`] when the dead-letter
    /// store cannot be written. The sink must then roll back and return the error.
    async fn record(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError>;

    /// Whether these rows of the commit (ascending) may be refused, whatever becomes of the others. A
    /// search for rows that a table refuses ends here, rather than after all of them.
    ///
    /// # Errors
    /// [`SinkError::TooManyRefused`] past the limit.
    fn check(&self, _commit: &Commit, _refused: &[usize]) -> Result<(), SinkError> {
        Ok(())
    }
}

/// A destination.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Its name in the pipeline.
    fn name(&self) -> &SinkName;

    /// Checks that the destination is there and takes what the routes carry (format, and columns
    /// against the live table), creating it where the configuration asks for that. Writes no row.
    ///
    /// # Errors
    /// What does not fit, with both sides; or that the destination is out of reach.
    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError>;

    /// Finds out whether rows could be written, and leaves the destination as it is: this is what
    /// `shardmill check` asks. Gives warnings, each a sentence. Sinks whose [`Sink::prepare`] writes
    /// (creates a table, a probe) must have a check of their own.
    ///
    /// # Errors
    /// As [`Sink::prepare`], and when the sink could never take a row.
    async fn check(&self, routes: &[BoundRoute]) -> Result<Vec<String>, SinkError> {
        self.prepare(routes).await.map(|()| Vec::new())
    }

    /// Asks whether the destination can be reached for a shard, as cheaply as possible. It is asked of
    /// every sink before one is acquired: acquiring may cost writes, which would be repeated at each
    /// try for as long as another sink is out of reach.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the destination is out of reach.
    async fn reach(&self, shard: &ShardKey) -> Result<(), SinkError> {
        self.position(shard).await.map(drop)
    }

    /// Whether acquiring a shard leaves something behind that only grows, such as a link of a claim
    /// log: such sinks are acquired after all others, so that a failure of those costs nothing.
    fn acquires_last(&self) -> bool {
        false
    }

    /// Takes the shard over: after this no earlier writer of it can commit.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the destination is out of reach.
    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError>;

    /// Where the sink stands for a shard, without taking it over. `None`: no position yet, or the
    /// sink keeps none (then [`Acquired::keeps_position`] is false as well).
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the destination is out of reach.
    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError>;

    /// Moves what the destination keeps of a shard under the sink's old name to this one, so that it goes
    /// on where it was. Does nothing where nothing is kept, or was moved before.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the destination is out of reach, or has positions of both names.
    async fn adopt(&self, _old: &SinkName, _shard: &ShardKey) -> Result<(), SinkError> {
        Ok(())
    }

    /// Says who writes from here on: sinks that keep positions write it beside them. Called once,
    /// before the first shard is acquired.
    fn set_ownership(&self, _ownership: Ownership) {}

    /// The positions that the sink keeps of these shards and of all redrives of the pipeline, without taking anything
    /// over; more may be given. `None`: it keeps no positions.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the destination is out of reach.
    async fn kept_positions(
        &self,
        _pipeline: &PipelineName,
        _shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        Ok(None)
    }
}

/// A shard's position as a sink keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptPosition {
    /// The stream, by its key.
    pub stream: String,
    /// The shard.
    pub shard: ShardId,
    /// The last position that the sink has; `None`: it was acquired, and nothing was committed.
    pub position: Option<Position>,
    /// The state by which it was written; `None`: an earlier version wrote it.
    pub mark: Option<StateMark>,
    /// Who wrote it.
    pub owner: Option<OwnerName>,
}

/// A shard taken over.
pub struct Acquired {
    /// Commits the shard's rows from here on.
    pub writer: Box<dyn SinkWriter>,
    /// The last position that the sink has; `None`: none yet.
    pub position: Option<Position>,
    /// False for at-least-once sinks: the host keeps their position in its checkpoint store.
    pub keeps_position: bool,
    /// Where the next commit must end exactly, because an earlier owner has promised an object
    /// with that end and did not write it. Only claim logs set it.
    pub must_cut_at: Option<Position>,
}

/// Encodes rows as they arrive, so that what they hold is let go at once: their batch, the plugin's
/// answer, and what each costs by itself.
pub trait EncodeRows: Send + Sync {
    /// Begins with the rows of one commit.
    fn begin(&self) -> Box<dyn RowEncoder>;
}

/// The rows of one commit, as they are encoded. Uses the processor: call it off the async threads.
pub trait RowEncoder: Send {
    /// Takes rows, by ascending (position, ordinal). `Some`: the commit has as many parts as one may have, or
    /// would hold more than `occupied_bytes_max`, and is to be made without the rest. A record's rows stay
    /// together, and the first record is always taken.
    fn push(&mut self, rows: Vec<Row>, occupied_bytes_max: usize) -> Option<CutRows>;

    /// The memory that it holds, in bytes.
    fn occupied_bytes(&self) -> usize;

    /// Ends: the rows that are refused, and what became of the others.
    fn finish(self: Box<Self>) -> (Vec<Row>, EncodedRows);
}

/// Where a commit is cut.
#[derive(Debug)]
pub struct CutRows {
    /// The position of the last row that was taken now; `None`: none was.
    pub to_inclusive: Option<Position>,
    /// The rows after it.
    pub rest: Vec<Row>,
}

/// Is shown the rows of the next commit.
pub trait LookAhead: Send + Sync {
    /// These rows wait for their commit.
    fn see(&self, rows: &Arc<Vec<Row>>);
}

/// Writes one shard's rows. Owned by one delivery task; calls do not overlap.
#[async_trait]
pub trait SinkWriter: Send {
    /// What this writer's rows become as they arrive; `None`: they stay as they are.
    fn encodes_rows(&self) -> Option<Arc<dyn EncodeRows>> {
        None
    }

    /// Who is shown the rows of the next commit while the writer is busy with the one before; `None`:
    /// nobody.
    fn looks_ahead(&self) -> Option<Arc<dyn LookAhead>> {
        None
    }

    /// Whether a commit of rows that were not encoded as they arrived makes a copy of all of them, in the
    /// destination's form: it is counted while the commit is under way.
    fn copies_rows(&self) -> bool {
        false
    }

    /// The calls that a commit makes, for when they are without an answer.
    fn calls(&self) -> &'static str {
        "the commit"
    }

    /// How long the destination asked to be left alone after the last commit failed; `None`: it did not
    /// say.
    fn asked_to_wait(&self) -> Option<Duration> {
        None
    }

    /// Writes the rows and moves the position, as one durable step. After an error nothing of the
    /// commit is visible, and the same commit may be tried again: a commit whose reply was lost and
    /// that did land is recognised by its position and answered as done.
    ///
    /// # Errors
    /// [`SinkError`]; a single bad row is no error, it goes through `refusals`.
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError>;
}
