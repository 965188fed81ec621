//! The Redshift sink: a table in Amazon Redshift, exactly once.
//!
//! A commit's rows become files on S3 with a manifest ([`files`]), COPY loads them into a table of the
//! session, and one transaction moves the position and takes the rows over ([`merge`]). The position
//! ([`ledger`]) says which loads have landed: a repeated one does nothing.
//!
//! Redshift checks types and lengths, but no key and no CHECK. So [`encode`] refuses what no column
//! takes before it is sent; what COPY refuses nevertheless is found by its line.
//!
//! SQL stays within what Redshift has (PostgreSQL 8.0 without ON CONFLICT and savepoints), and goes by
//! the simple query protocol, in which each value is text ([`session`]).
//!
//! [`TYPE`] is what the program's registry lists: `settings` reads `type = "redshift"`, names its keys and makes the sink.

mod encode;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod kind;
mod ledger;
mod merge;
mod rights;
mod session;
mod settings;
mod table;
mod writer;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use object_store::ObjectStore;
use object_store::path::Path;

use self::files::StagingBucket;
use self::ledger::PositionLedger;
pub use self::settings::{CopySource, RedshiftTarget, TYPE};
use self::writer::RedshiftWriter;
use shardmill_config::{Timing, WriteMode};
use shardmill_core::owner::{OwnerName, Ownership};
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardKey, SinkName};
use shardmill_core::sink::{Acquired, KeptPosition, Sink, SinkError};
use shardmill_pg::name::TableName;
use shardmill_pg::{Link, PostgresServer, ServerError};
use shardmill_sink_objects::StorePlace;
use shardmill_sinks_common::rows;

/// The schema of a table that is named without one.
const SCHEMA: &str = "public";

/// A table in Redshift.
pub struct RedshiftSink {
    shared: Arc<Shared>,
    create: bool,
}

/// What the writers of all shards have in common.
struct Shared {
    sink: SinkName,
    server: PostgresServer,
    /// Time without an answer after which a connection is lost.
    silence_max: Duration,
    table: TableName,
    mode: WriteMode,
    ledger: PositionLedger,
    bucket: StagingBucket,
    /// Who writes; unset in a sink that only answers questions.
    ownership: OnceLock<Ownership>,
    known_columns: rows::KnownColumns,
}

impl Shared {
    fn unavailable(&self, cause: impl Into<String>) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.into() }
    }

    fn failed(&self, doing: &str, error: &ServerError) -> SinkError {
        let place = match error {
            // The cluster did not say anything, its name included.
            ServerError::Silent(_) => format!(" from {}", self.place()),
            _ => String::new(),
        };
        self.unavailable(format!("{doing}: {error}{place}"))
    }

    fn fenced(&self, shard: &ShardKey, detail: String, by: Option<OwnerName>) -> SinkError {
        SinkError::Fenced { sink: self.sink.clone(), shard: shard.shard.to_string(), detail, by }
    }

    async fn connect(&self) -> Result<Link, SinkError> {
        session::connect(&self.server, self.silence_max)
            .await
            .map_err(|error| self.failed(&format!("cannot connect to {}", self.place()), &error))
    }

    fn place(&self) -> String {
        self.server.place().replacen("PostgreSQL", "Redshift", 1)
    }
}

impl RedshiftSink {
    /// A sink as configured. Connects to nothing yet.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the connection, the table's name or the bucket's URL or options
    /// cannot be read.
    pub fn new(name: SinkName, target: &RedshiftTarget) -> Result<Self, SinkError> {
        let CopySource { url, options, .. } = &target.staging;
        let place = StorePlace::open(name.clone(), url, options)?;
        Self::at(name, target, place)
    }

    /// A sink that writes its files to a store that is open already: the bucket of the configured URL.
    ///
    /// # Errors
    /// As [`RedshiftSink::new`].
    pub fn with_store(
        name: SinkName,
        target: &RedshiftTarget,
        store: Arc<dyn ObjectStore>,
        prefix: Path,
    ) -> Result<Self, SinkError> {
        let url = target.staging.url.as_str().into();
        let place = StorePlace::over(name.clone(), store, prefix, url);
        Self::at(name, target, place)
    }

    /// Sets the time without an answer after which a connection is lost.
    #[must_use]
    pub fn with_silence_max(mut self, silence_max: Duration) -> Self {
        // Nobody else has it before the first shard is acquired.
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.silence_max = silence_max;
        }
        self
    }

    fn at(sink: SinkName, target: &RedshiftTarget, place: StorePlace) -> Result<Self, SinkError> {
        let unavailable = |cause| SinkError::Unavailable { sink: sink.clone(), cause };
        let server = PostgresServer::parse(&target.url).map_err(unavailable)?;
        let mut table = TableName::parse(&target.table).map_err(unavailable)?;
        table.schema.get_or_insert_with(|| SCHEMA.into());
        let ledger = PositionLedger::beside(&table);
        let bucket = StagingBucket::new(place, &target.staging);
        let (mode, known_columns) = (target.mode.clone(), rows::KnownColumns::default());
        let silence_max = Timing::default().redshift_silence_max;
        let ownership = OnceLock::new();
        let shared = Shared {
            sink,
            server,
            silence_max,
            table,
            mode,
            ledger,
            bucket,
            ownership,
            known_columns,
        };
        Ok(Self { shared: Arc::new(shared), create: target.create })
    }
}

#[async_trait]
impl Sink for RedshiftSink {
    fn name(&self) -> &SinkName {
        &self.shared.sink
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let shared = &*self.shared;
        rows::check_formats(&shared.sink, routes)?;
        let columns =
            rows::declared::declared_columns(routes).map_err(|cause| shared.unavailable(cause))?;
        let client = shared.connect().await?;
        table::prepare(&client, &shared.table, &columns, self.create, &shared.mode)
            .await
            .map_err(|cause| shared.unavailable(cause))?;
        rights::check(&client, &shared.table, shared.ledger.name(), &shared.mode)
            .await
            .map_err(|cause| shared.unavailable(cause))?;
        shared.known_columns.remember(columns.iter().map(|column| column.name));
        Ok(())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let shared = &self.shared;
        let client = shared.connect().await?;
        let ledger = &shared.ledger;
        ledger.create_if_missing(&client).await.map_err(|error| {
            shared.failed(&format!("cannot create {ledger}; have its owner create it once"), &error)
        })?;
        ledger
            .widen_if_narrow(&client)
            .await
            .map_err(|error| shared.failed(&ledger.cannot_widen(), &error))?;
        let taken = ledger.acquire_shard(&client, &shared.sink, shard, shared.ownership.get());
        let taken = taken.await.map_err(|error| {
            shared.failed(&format!("cannot take {} over in {ledger}", shard.shard), &error)
        })?;
        let taken = taken.map_err(|cause| shared.unavailable(cause))?;
        let writer = RedshiftWriter::new(shared.clone(), shard.clone(), taken.epoch, client);
        let position = taken.position;
        Ok(Acquired { writer: Box::new(writer), position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let shared = &self.shared;
        let client = shared.connect().await?;
        let entry = shared.ledger.read(&client, &shared.sink, shard).await.map_err(|error| {
            shared.failed(&format!("cannot read a position from {}", shared.ledger), &error)
        })?;
        let entry = entry.map_err(|cause| shared.unavailable(cause))?;
        Ok(entry.and_then(|entry| entry.position))
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        let shared = &self.shared;
        let client = shared.connect().await?;
        let adopted = shared.ledger.adopt(&client, (old, &shared.sink), shard).await;
        let adopted = adopted.map_err(|error| {
            let ledger = &shared.ledger;
            shared.failed(&format!("cannot move the position of sink {old} in {ledger}"), &error)
        })?;
        adopted.map_err(|cause| shared.unavailable(cause))
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
        let (shared, ledger) = (&self.shared, &self.shared.ledger);
        let client = shared.connect().await?;
        let kept = ledger.read_all(&client, &shared.sink, pipeline).await;
        let kept = kept.map_err(|error| {
            shared.failed(&format!("cannot read the positions from {ledger}"), &error)
        })?;
        kept.map(Some).map_err(|cause| shared.unavailable(cause))
    }
}
