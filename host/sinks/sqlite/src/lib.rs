//! SQLite sink: a table in a file, exactly once.
//!
//! Rows and position are written in one transaction. The shards of a sink share one connection: their calls run on
//! blocking threads, one at a time. Other processes may read the file meanwhile (WAL mode). [`connection`] opens the
//! file, [`table`] reads and checks the live table, [`mod@write`] commits. `rows` (in `sinks/common`) reads JSON by
//! column type. The engine buffers rows (deliveries) and retries commits (committers).
//!
//! [`TYPE`] is the entry in the program's registry of sinks: `settings` reads `type = "sqlite"`, lists its keys and
//! makes the sink.

mod connection;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod position;
mod settings;
mod table;
mod trigger;
mod value;
mod write;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;

use self::connection::{LockedConnection, SharedConnection};
pub use self::settings::{SqliteTarget, TYPE};
use self::write::{Failure, Written};
use shardmill_config::WriteMode;
use shardmill_core::owner::Ownership;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardKey, SinkName};
use shardmill_core::sink::{
    Acquired, Commit, Committed, KeptPosition, Refusal, RefusalLog, Sink, SinkError, SinkWriter,
};
use shardmill_sinks_common::rows;

/// Sink of a table in a SQLite file.
pub struct SqliteSink {
    shared: Arc<Shared>,
    create: bool,
}

/// Parts that the writers of all shards share.
struct Shared {
    sink: SinkName,
    table: String,
    mode: WriteMode,
    connection: SharedConnection,
    /// Process that writes; unset in a sink that is only read from.
    ownership: OnceLock<Ownership>,
    known_columns: rows::KnownColumns,
}

impl Shared {
    fn unavailable(&self, cause: impl Into<String>) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.into() }
    }

    fn failure(&self, shard: &ShardKey, failure: Failure) -> SinkError {
        match failure {
            Failure::Fenced(detail, by) => SinkError::Fenced {
                sink: self.sink.clone(),
                shard: shard.shard.to_string(),
                detail,
                by,
            },
            Failure::Unavailable(cause) => self.unavailable(cause),
        }
    }
}

impl SqliteSink {
    /// Makes a sink for a table in the database file at `path`, which is created if it is missing. `mode` says how rows
    /// are written. With `create`, [`Sink::prepare`] creates the table with the columns that the routes declare, and
    /// the mode's key as its primary key.
    ///
    /// Opens nothing yet.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when `table` is not a valid name.
    pub fn new(
        name: SinkName,
        path: impl Into<PathBuf>,
        table: &str,
        create: bool,
        mode: WriteMode,
    ) -> Result<Self, SinkError> {
        if table.is_empty() || table.contains('\0') || table.starts_with("sqlite_") {
            let cause = format!("not a valid table name in SQLite: {table:?}");
            return Err(SinkError::Unavailable { sink: name, cause });
        }
        let connection = SharedConnection::new(path.into());
        let shared = Shared {
            sink: name,
            table: table.into(),
            mode,
            connection,
            ownership: OnceLock::new(),
            known_columns: rows::KnownColumns::default(),
        };
        Ok(Self { shared: Arc::new(shared), create })
    }

    /// Runs a call on the connection, on a blocking thread.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut LockedConnection) -> Result<T, String> + Send + 'static,
    ) -> Result<T, SinkError> {
        let unavailable = |cause: String| self.shared.unavailable(cause);
        let mut locked = self.shared.connection.lock().await.map_err(unavailable)?;
        connection::blocking(move || call(&mut locked))
            .await
            .and_then(|done| done)
            .map_err(unavailable)
    }
}

#[async_trait]
impl Sink for SqliteSink {
    fn name(&self) -> &SinkName {
        &self.shared.sink
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        rows::check_formats(&self.shared.sink, routes)?;
        let declared = rows::declared::declared_columns(routes)
            .map_err(|cause| self.shared.unavailable(cause))?;
        self.shared.known_columns.remember(declared.iter().map(|column| column.name));
        let (routes, shared, create) = (routes.to_vec(), Arc::clone(&self.shared), self.create);
        self.call(move |locked| {
            let declared = rows::declared::declared_columns(&routes)?;
            table::prepare(&mut locked.connection, &shared.table, &declared, create, &shared.mode)
        })
        .await
    }

    async fn check(&self, routes: &[BoundRoute]) -> Result<Vec<String>, SinkError> {
        rows::check_formats(&self.shared.sink, routes)?;
        let (routes, shared, create) = (routes.to_vec(), Arc::clone(&self.shared), self.create);
        let checked = connection::blocking(move || {
            let declared = rows::declared::declared_columns(&routes)?;
            let mut connection = connection::open_to_check(shared.connection.path())?;
            table::try_out(&mut connection, &shared.table, &declared, create, &shared.mode)
        });
        checked.await.and_then(|found| found).map_err(|cause| self.shared.unavailable(cause))
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let (sink, key) = (self.shared.sink.clone(), shard.clone());
        let ownership = self.shared.ownership.get().cloned();
        let take = move |locked: &mut LockedConnection| {
            position::acquire_shard(&mut locked.connection, &sink, &key, ownership.as_ref())
        };
        let taken = self.call(take).await?;
        let writer = SqliteWriter {
            shared: Arc::clone(&self.shared),
            shard: shard.clone(),
            epoch: taken.epoch,
        };
        Ok(Acquired {
            writer: Box::new(writer),
            position: taken.position,
            keeps_position: true,
            must_cut_at: None,
        })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let (sink, key) = (self.shared.sink.clone(), shard.clone());
        let stored = self
            .call(move |locked| position::read_if_any(&mut locked.connection, &sink, &key))
            .await?;
        Ok(stored.and_then(|stored| stored.position))
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        let (old, new, key) = (old.clone(), self.shared.sink.clone(), shard.clone());
        self.call(move |locked| position::adopt(&mut locked.connection, (&old, &new), &key)).await
    }

    fn set_ownership(&self, ownership: Ownership) {
        // The first one stays: a sink has the same owner for its whole life.
        let _ = self.shared.ownership.set(ownership);
    }

    async fn kept_positions(
        &self,
        pipeline: &PipelineName,
        _shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let (sink, pipeline) = (self.shared.sink.clone(), pipeline.clone());
        self.call(move |locked| position::read_all(&mut locked.connection, &sink, &pipeline))
            .await
            .map(Some)
    }
}

/// Writer of one shard's rows.
struct SqliteWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    epoch: i64,
}

impl SqliteWriter {
    /// Writes rows and position, and commits them unless a row was refused. In that case the transaction stays open in
    /// the connection that is returned.
    async fn write(&self, commit: &Commit) -> Result<(LockedConnection, Written), SinkError> {
        let locked =
            self.shared.connection.lock().await.map_err(|cause| self.shared.unavailable(cause))?;
        let work = write::Work {
            shared: Arc::clone(&self.shared),
            shard: self.shard.clone(),
            epoch: self.epoch,
            range: commit.range.clone(),
            rows: commit.rows.clone(),
        };
        let (locked, outcome) = connection::blocking(move || work.run(locked))
            .await
            .map_err(|cause| self.shared.unavailable(cause))?;
        let written = outcome.map_err(|failure| self.shared.failure(&self.shard, failure))?;
        Ok((locked, written))
    }

    async fn finish(&self, locked: LockedConnection) -> Result<(), SinkError> {
        connection::blocking(move || write::finish(locked))
            .await
            .and_then(|done| done)
            .map_err(|cause| self.shared.unavailable(cause))
    }
}

#[async_trait]
impl SinkWriter for SqliteWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let (locked, written) = self.write(commit).await?;
        let refused = match written {
            Written::Committed => Vec::new(),
            Written::Open(refused) => {
                // On an error `locked` is dropped, which rolls the transaction back.
                refusals.record(commit, &refused).await?;
                self.finish(locked).await?;
                refused
            }
        };
        Ok(counts(commit, &refused))
    }
}

fn counts(commit: &Commit, refused: &[Refusal]) -> Committed {
    let all: usize = commit.rows.iter().map(|row| row.payload.len()).sum();
    let lost: usize = refused.iter().map(|refusal| commit.rows[refusal.row].payload.len()).sum();
    Committed {
        rows_written: (commit.rows.len() - refused.len()) as u64,
        rows_refused: refused.len() as u64,
        bytes_written: (all - lost) as u64,
    }
}
