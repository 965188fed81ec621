//! The PostgreSQL sink: a table, exactly once.
//!
//! Rows and position move in one transaction. [`session`] is what it begins with, [`table`] the live
//! table, [`prepare`] checks or creates it, [`rights`] what the role may do with it, [`encode`] turns rows into binary COPY, [`copy`]
//! sends them and finds the ones that the table refuses, [`blame`] judges errors, [`merge`] matches
//! rows by key,
//! [`lineage`] is what says where a row came from, [`position`] keeps the place,
//! [`writer`] is the commit on one screen. Reading JSON by column type is `rows`' work; buffering and
//! retries are the delivery's.
//!
//! The position table lies in the schema of the data table if that is named, else in the first of
//! the `search_path`, as the data table does.
//!
//! [`TYPE`] is what the program's registry lists: `settings` reads `type = "postgres"`, names its keys and makes the sink.

mod blame;
mod copy;
mod encode;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod kind;
mod lineage;
mod merge;
mod numeric;
mod position;
mod prepare;
mod rights;
mod session;
mod settings;
mod table;
mod window;
mod writer;
mod writers;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;

use self::position::PositionTable;
pub use self::settings::{CONNECTIONS_MAX, PostgresTarget, TYPE};
use self::table::LiveTable;
pub use self::window::{SwapFailed, TableWindow, WindowDiff};
use self::writer::PostgresWriter;
pub use self::writers::OtherSink;
use shardmill_config::{Timing, WriteMode};
use shardmill_core::owner::{OwnerName, Ownership};
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardKey, SinkName};
use shardmill_core::sink::{Acquired, KeptPosition, Sink, SinkError};
pub(crate) use shardmill_pg::name::TableName;
use shardmill_pg::{Lent, PoolShare, PostgresServer, ServerError};
use shardmill_sinks_common::rows;

/// A table in PostgreSQL.
pub struct PostgresSink {
    shared: Arc<Shared>,
    create: bool,
}

/// What the writers of all shards have in common.
struct Shared {
    sink: SinkName,
    sessions: PoolShare,
    table: TableName,
    mode: WriteMode,
    /// Whether each row says from which record it came.
    lineage: bool,
    /// What they say about the sink: its name in the pipeline, also while another runs in its place.
    lineage_name: SinkName,
    position: PositionTable,
    /// Who writes; unset in a sink that only answers questions.
    ownership: OnceLock<Ownership>,
    known_columns: rows::KnownColumns,
    /// The live table as last read, until something suggests that it is another.
    live: Mutex<Option<Arc<LiveTable>>>,
}

/// Why something did not happen: the server's error, which decides over its connection, or another.
enum Failure {
    Server { doing: String, error: ServerError },
    Sink(SinkError),
}

impl Failure {
    fn server(doing: impl Into<String>, error: ServerError) -> Self {
        Self::Server { doing: doing.into(), error }
    }
}

impl From<SinkError> for Failure {
    fn from(error: SinkError) -> Self {
        Self::Sink(error)
    }
}

impl Shared {
    fn unavailable(&self, cause: impl Into<String>) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.into() }
    }

    /// An error of the server or of the connection, as the sink's failure.
    fn failed(&self, doing: &str, error: &ServerError) -> SinkError {
        let place = match error {
            // The server did not say anything, its name included.
            ServerError::Silent(_) => format!(" from {}", self.sessions.server().place()),
            _ => String::new(),
        };
        self.unavailable(format!("{doing}: {error}{place}"))
    }

    fn fenced(&self, shard: &ShardKey, detail: String, by: Option<OwnerName>) -> SinkError {
        SinkError::Fenced { sink: self.sink.clone(), shard: shard.shard.to_string(), detail, by }
    }

    /// A connection, once one is free.
    async fn session(&self) -> Result<Lent<'_>, SinkError> {
        self.sessions.take().await.map_err(|cause| self.unavailable(cause))
    }

    fn live(&self) -> MutexGuard<'_, Option<Arc<LiveTable>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PostgresSink {
    /// A table, `table` or `schema.table`, in the database that the target's URL leads to, and how rows
    /// go into it. With `create`, [`Sink::prepare`] makes it from the columns that the routes declare if
    /// it is missing, with the mode's key as its primary key.
    ///
    /// Its connections are its own, with the deadlines of [`Timing::default`]. Connects to nothing yet.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the URL or the table's name cannot be read.
    pub fn new(name: SinkName, target: &PostgresTarget) -> Result<Self, SinkError> {
        let silence_max = Timing::default().postgres_silence_max;
        let server = PostgresServer::parse(&target.url)
            .map_err(|cause| SinkError::Unavailable { sink: name.clone(), cause })?;
        let share = PoolShare::alone(server, target.connections_max, silence_max);
        Self::with_share(name, target, share)
    }

    /// The same, with a part of the connections that all sinks of the server share.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the table's name cannot be read.
    pub fn with_share(
        name: SinkName,
        target: &PostgresTarget,
        sessions: PoolShare,
    ) -> Result<Self, SinkError> {
        let table = TableName::parse(&target.table)
            .map_err(|cause| SinkError::Unavailable { sink: name.clone(), cause })?;
        let shared = Shared {
            lineage_name: target.written_for.clone().unwrap_or_else(|| name.clone()),
            sink: name,
            sessions,
            position: PositionTable::beside(&table),
            table,
            mode: target.mode.clone(),
            lineage: target.lineage,
            ownership: OnceLock::new(),
            known_columns: rows::KnownColumns::default(),
            live: Mutex::default(),
        };
        let create = target.create;
        Ok(Self { shared: Arc::new(shared), create })
    }
}

/// What a look at the table is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Rows are to come: a table that is missing is made where the configuration asks for that.
    Write,
    /// It is only asked whether rows could come: nothing is made.
    Look,
}

impl PostgresSink {
    /// Checks the table, its rights and those of the position table against what routes bring. Gives the
    /// columns that these declare.
    async fn look_at_table<'r>(
        &self,
        routes: &'r [BoundRoute],
        purpose: Purpose,
    ) -> Result<Vec<rows::declared::DeclaredColumn<'r>>, SinkError> {
        let shared = &*self.shared;
        rows::check_formats(&shared.sink, routes)?;
        let columns =
            rows::declared::declared_columns(routes).map_err(|cause| shared.unavailable(cause))?;
        let session = shared.session().await?;
        let (mode, lineage) = (&shared.mode, shared.lineage);
        let looked = async {
            let is_missing = purpose == Purpose::Look
                && self.create
                && table::is_missing(&session, &shared.table).await?;
            match is_missing {
                true => rows::declared::may_create(&shared.table, &columns, true)?,
                false => {
                    prepare::prepare(&session, &shared.table, &columns, self.create, mode, lineage)
                        .await?;
                }
            }
            rights::check_position(&session, &shared.position).await
        };
        let looked = looked.await;
        match looked {
            Ok(()) => session.give_back(),
            Err(_) => session.roll_back().await,
        }
        looked.map_err(|cause| shared.unavailable(cause))?;
        Ok(columns)
    }
}

#[async_trait]
impl Sink for PostgresSink {
    fn name(&self) -> &SinkName {
        &self.shared.sink
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let columns = self.look_at_table(routes, Purpose::Write).await?;
        self.shared.known_columns.remember(columns.iter().map(|column| column.name));
        Ok(())
    }

    async fn check(&self, routes: &[BoundRoute]) -> Result<Vec<String>, SinkError> {
        self.look_at_table(routes, Purpose::Look).await.map(|_| Vec::new())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let shared = &self.shared;
        let place = &shared.position;
        let session = shared.session().await?;
        let created = place.create_if_missing(&session).await;
        if let Err(error) = &created {
            let cause = shared.failed(&place.cannot_create(), error);
            session.fail(error).await;
            return Err(cause);
        }
        if let Err(error) = &place.widen_if_narrow(&session).await {
            let cause = shared.failed(&place.cannot_widen(), error);
            session.fail(error).await;
            return Err(cause);
        }
        let taken = async {
            session::begin(&session).await?;
            let taken =
                place.acquire_shard(&session, &shared.sink, shard, shared.ownership.get()).await?;
            session.batch_execute("COMMIT").await?;
            Ok(taken)
        };
        let taken = taken.await;
        let taken = session.end(taken).await.map_err(|error| {
            shared.failed(&format!("cannot take {} over in {place}", shard.shard), &error)
        })?;
        let position = taken.position().map_err(|cause| shared.unavailable(cause))?;
        let writer = PostgresWriter::new(Arc::clone(shared), shard.clone(), taken.epoch);
        Ok(Acquired { writer: Box::new(writer), position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let shared = &self.shared;
        let session = shared.session().await?;
        let found = shared.position.read(&session, &shared.sink, shard).await;
        let found = session.end(found).await.map_err(|error| {
            shared.failed(&format!("cannot read a position from {}", shared.position), &error)
        })?;
        match found {
            None => Ok(None),
            Some(found) => found.position().map_err(|cause| shared.unavailable(cause)),
        }
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        let (place, new) = (&self.shared.position, &self.shared.sink);
        let failed = |error| {
            let doing = format!("cannot move the position of sink {old} to sink {new} in {place}");
            self.shared.failed(&doing, &error)
        };
        let session = self.shared.session().await?;
        let adopted = async {
            match place.read(&session, old, shard).await? {
                None => Ok(()),
                Some(_) => place.adopt(&session, (old, new), shard).await,
            }
        };
        let adopted = adopted.await;
        session.end(adopted).await.map_err(failed)
    }

    fn set_ownership(&self, ownership: Ownership) {
        // The first stays: a sink has one owner as long as it lives.
        let _ = self.shared.ownership.set(ownership);
    }

    async fn kept_positions(
        &self,
        pipeline: &PipelineName,
        _shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let (shared, place) = (&self.shared, &self.shared.position);
        let session = shared.session().await?;
        let kept = place.read_all(&session, &shared.sink, pipeline).await;
        let kept = session.end(kept).await.map_err(|error| {
            shared.failed(&format!("cannot read the positions from {place}"), &error)
        })?;
        kept.map(Some).map_err(|cause| shared.unavailable(cause))
    }
}
