//! The PostgreSQL sink: a table, exactly once.
//!
//! Rows and position move in one transaction. [`session`] is a connection, and the pool of them, [`table`] the live
//! table, [`encode`] turns rows into binary COPY, [`copy`] sends them and finds the ones that the
//! table refuses, [`merge`] is how rows with a key find their like,
//! [`lineage`] is what says where a row came from, [`position`] keeps the place,
//! [`writer`] is the commit on one screen. Reading JSON by column type is `rows`' work; buffering and
//! retries are the delivery's.
//!
//! The position table lies in the schema of the data table if that is named, else in the first of
//! the `search_path`, as the data table does.

mod array;
mod copy;
mod encode;
mod kind;
mod lineage;
mod merge;
mod name;
mod numeric;
mod position;
mod session;
mod table;
mod window;
mod writer;
mod writers;

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;

pub(super) use self::name::{TableName, quoted};
use self::position::PositionTable;
use self::session::{PooledSession, SessionPool};
pub use self::window::{SwapFailed, TableWindow, WindowDiff};
use self::writer::PostgresWriter;
pub use self::writers::OtherSink;
use super::{Acquired, BoundRoute, KeptPosition, Sink, SinkError, WriteMode, rows};
use crate::config::PostgresTarget;
use crate::position::{OwnerName, Ownership};
use crate::postgres::{PostgresServer, describe};
use crate::record::{PipelineName, Position, ShardKey, SinkName};

/// The connections of a sink unless it is told otherwise: more than a server of some cores works on at
/// once, and far from the 100 that PostgreSQL takes by default.
pub const CONNECTIONS_MAX: usize = 16;

/// A table in PostgreSQL.
pub struct PostgresSink {
    shared: Arc<Shared>,
    create: bool,
}

/// What the writers of all shards have in common.
struct Shared {
    sink: SinkName,
    sessions: SessionPool,
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
}

impl Shared {
    fn unavailable(&self, cause: impl Into<String>) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.into() }
    }

    /// An error of the server or of the connection, as the sink's failure.
    fn failed(&self, doing: &str, error: &tokio_postgres::Error) -> SinkError {
        self.unavailable(format!("{doing}: {}", describe(error)))
    }

    fn fenced(&self, shard: &ShardKey, detail: String, by: Option<OwnerName>) -> SinkError {
        SinkError::Fenced { sink: self.sink.clone(), shard: shard.shard.to_string(), detail, by }
    }

    /// A connection, once one is free.
    async fn session(&self) -> Result<PooledSession, SinkError> {
        self.sessions.take().await.map_err(|cause| self.unavailable(cause))
    }
}

impl PostgresSink {
    /// A table, `table` or `schema.table`, in the database that the target's URL leads to, and how rows
    /// go into it. With `create`, [`Sink::prepare`] makes it from the columns that the routes declare if
    /// it is missing, with the mode's key as its primary key.
    ///
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the URL or the table's name cannot be read.
    pub fn new(name: SinkName, target: &PostgresTarget) -> Result<Self, SinkError> {
        let unavailable = |cause| SinkError::Unavailable { sink: name.clone(), cause };
        let server = PostgresServer::parse(&target.url).map_err(unavailable)?;
        let sessions = SessionPool::new(server, target.connections_max).map_err(unavailable)?;
        let table = TableName::parse(&target.table).map_err(unavailable)?;
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
        };
        let create = target.create;
        Ok(Self { shared: Arc::new(shared), create })
    }
}

#[async_trait]
impl Sink for PostgresSink {
    fn name(&self) -> &SinkName {
        &self.shared.sink
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let shared = &*self.shared;
        rows::check_formats(&shared.sink, routes)?;
        let columns =
            rows::declared::declared_columns(routes).map_err(|cause| shared.unavailable(cause))?;
        let session = shared.session().await?;
        let (mode, lineage) = (&shared.mode, shared.lineage);
        table::prepare(&session.client, &shared.table, &columns, self.create, mode, lineage)
            .await
            .map_err(|cause| shared.unavailable(cause))?;
        shared.known_columns.remember(columns.iter().map(|column| column.name));
        Ok(())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let session = self.shared.session().await?;
        let place = &self.shared.position;
        let doing = || format!("cannot take {} over in {place}", shard.shard);
        place
            .create_if_missing(&session.client)
            .await
            .map_err(|error| self.shared.failed(&place.cannot_create(), &error))?;
        place
            .widen_if_narrow(&session.client)
            .await
            .map_err(|error| self.shared.failed(&place.cannot_widen(), &error))?;
        let taken = place
            .take_over(&session.client, &self.shared.sink, shard, self.shared.ownership.get())
            .await
            .map_err(|error| self.shared.failed(&doing(), &error))?;
        let position = taken.position().map_err(|cause| self.shared.unavailable(cause))?;
        let writer = PostgresWriter::new(Arc::clone(&self.shared), shard.clone(), taken.epoch);
        Ok(Acquired { writer: Box::new(writer), position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let session = self.shared.session().await?;
        let found =
            self.shared.position.read(&session.client, &self.shared.sink, shard).await.map_err(
                |error| {
                    let doing = format!("cannot read a position from {}", self.shared.position);
                    self.shared.failed(&doing, &error)
                },
            )?;
        match found {
            None => Ok(None),
            Some(found) => found.position().map_err(|cause| self.shared.unavailable(cause)),
        }
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        let (place, new) = (&self.shared.position, &self.shared.sink);
        let failed = |error| {
            let doing = format!("cannot move the position of sink {old} to sink {new} in {place}");
            self.shared.failed(&doing, &error)
        };
        let session = self.shared.session().await?;
        if place.read(&session.client, old, shard).await.map_err(failed)?.is_none() {
            return Ok(());
        }
        place.adopt(&session.client, (old, new), shard).await.map_err(failed)
    }

    fn own(&self, ownership: Ownership) {
        // The first stays: a sink has one owner as long as it lives.
        let _ = self.shared.ownership.set(ownership);
    }

    async fn kept(
        &self,
        pipeline: &PipelineName,
        _shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let (shared, place) = (&self.shared, &self.shared.position);
        let session = shared.session().await?;
        let kept =
            place.read_all(&session.client, &shared.sink, pipeline).await.map_err(|error| {
                shared.failed(&format!("cannot read the positions from {place}"), &error)
            })?;
        kept.map(Some).map_err(|cause| shared.unavailable(cause))
    }
}
