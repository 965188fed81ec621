//! The PostgreSQL sink: a table, exactly once.
//!
//! The invariant: rows and position change in one transaction, and the position changes only under the epoch of the
//! current owner. The modules:
//!
//! - [`writer`]: the steps of a commit; [`position`]: the position table and its epochs; [`session`]: the start of
//!   each transaction.
//! - [`table`]: the live table; [`prepare`] checks or creates it; [`rights`]: what the role may do with it.
//! - [`encode`]: rows to binary COPY; [`copy`]: sends them and finds those that the table refuses; [`blame`]: whether a
//!   row or the sink is at fault; [`merge`]: matches rows by key.
//! - [`lineage`]: columns that store where a row came from; [`window`] and [`writers`]: replacing a time window.
//!
//! JSON is read by column type in `rows`. The engine buffers rows (deliveries) and retries commits (committers).
//!
//! The position table is in the schema of the data table if that is named, or else in the first schema of the
//! `search_path`, like the data table.
//!
//! [`TYPE`] is listed in the program's registry: `settings` reads `type = "postgres"`, names its keys and makes the
//! sink.

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

/// Sink that writes to a table in PostgreSQL.
pub struct PostgresSink {
    shared: Arc<Shared>,
    create: bool,
}

/// Parts that the writers of all shards share.
struct Shared {
    sink: SinkName,
    sessions: PoolShare,
    table: TableName,
    mode: WriteMode,
    /// Whether each row stores from which record it came.
    lineage: bool,
    /// Sink name in the lineage: its name in the pipeline, also while a replay's sink writes in its place.
    lineage_name: SinkName,
    position: PositionTable,
    /// Process that writes; unset in a sink that is only read from.
    ownership: OnceLock<Ownership>,
    known_columns: rows::KnownColumns,
    /// Live table as last read; unset when it may have changed.
    live: Mutex<Option<Arc<LiveTable>>>,
}

/// Reason of a failure: an error of the server, which decides what happens to the connection, or another.
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

    /// Converts an error of the server or the connection.
    fn failed(&self, doing: &str, error: &ServerError) -> SinkError {
        let place = match error {
            // This error alone does not name the server.
            ServerError::Silent(_) => format!(" from {}", self.sessions.server().place()),
            _ => String::new(),
        };
        self.unavailable(format!("{doing}: {error}{place}"))
    }

    fn fenced(&self, shard: &ShardKey, detail: String, by: Option<OwnerName>) -> SinkError {
        SinkError::Fenced { sink: self.sink.clone(), shard: shard.shard.to_string(), detail, by }
    }

    /// Takes a connection, and waits until one is free.
    async fn session(&self) -> Result<Lent<'_>, SinkError> {
        self.sessions.take().await.map_err(|cause| self.unavailable(cause))
    }

    fn live(&self) -> MutexGuard<'_, Option<Arc<LiveTable>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PostgresSink {
    /// Makes a sink for a table, `table` or `schema.table`, in the database of the target's URL. With `create`,
    /// [`Sink::prepare`] creates a missing table from the columns that the routes declare, with the mode's key as its
    /// primary key.
    ///
    /// The sink has its own connections, with the deadlines of [`Timing::default`]. It does not connect yet.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the URL or the name of the table is invalid.
    pub fn new(name: SinkName, target: &PostgresTarget) -> Result<Self, SinkError> {
        let silence_max = Timing::default().postgres_silence_max;
        let server = PostgresServer::parse(&target.url)
            .map_err(|cause| SinkError::Unavailable { sink: name.clone(), cause })?;
        let share = PoolShare::alone(server, target.connections_max, silence_max);
        Self::with_share(name, target, share)
    }

    /// Does the same with a share of the connections that all sinks of the server use.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the name of the table is invalid.
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

/// Purpose of reading the table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Rows will be written: a missing table is created if the configuration says so.
    Write,
    /// Only a check whether rows could be written: nothing is created.
    Look,
}

impl PostgresSink {
    /// Checks the table, the rights on it and on the position table, against what the routes bring. Returns the columns
    /// that the routes declare.
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
        // In a transaction of its own, which takes the lock of creators.
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
            shared.failed(&format!("cannot acquire {} in {place}", shard.shard), &error)
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
        // The first one stays: a sink has one owner for its lifetime.
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
