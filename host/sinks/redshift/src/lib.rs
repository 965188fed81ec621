//! The Redshift sink: a table in Amazon Redshift, exactly once.
//!
//! The rows of a commit become files on S3 with a manifest ([`files`]). COPY loads them into a staging table of the
//! session. One transaction then moves the position and merges the rows ([`merge`]). The position ([`ledger`]) shows
//! which loads have landed, so that a repeated load does nothing.
//!
//! Redshift checks types and lengths, but no keys and no CHECK constraints. So [`encode`] refuses rows that no column
//! accepts before they are sent. Rows that COPY still refuses are found by their line.
//!
//! SQL is limited to what Redshift has (PostgreSQL 8.0 without ON CONFLICT and savepoints). It uses the simple query
//! protocol, in which each value is text ([`session`]).
//!
//! [`TYPE`] is listed in the program's registry: `settings` reads `type = "redshift"`, names its keys and makes the
//! sink.

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

/// Schema of a table that is named without one.
const SCHEMA: &str = "public";

/// Sink that writes to a table in Redshift.
pub struct RedshiftSink {
    shared: Arc<Shared>,
    create: bool,
}

/// Parts that the writers of all shards share.
struct Shared {
    sink: SinkName,
    server: PostgresServer,
    /// Time without an answer after which a connection counts as lost.
    silence_max: Duration,
    table: TableName,
    mode: WriteMode,
    ledger: PositionLedger,
    bucket: StagingBucket,
    /// Process that writes; unset in a sink that is only read from.
    ownership: OnceLock<Ownership>,
    known_columns: rows::KnownColumns,
}

impl Shared {
    fn unavailable(&self, cause: impl Into<String>) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.into() }
    }

    fn failed(&self, doing: &str, error: &ServerError) -> SinkError {
        let place = match error {
            // This error alone does not name the cluster.
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
    /// Makes a sink, without connecting.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] if the connection string, the name of the table, or the bucket's URL or options are
    /// invalid.
    pub fn new(name: SinkName, target: &RedshiftTarget) -> Result<Self, SinkError> {
        let CopySource { url, options, .. } = &target.staging;
        let place = StorePlace::open(name.clone(), url, options)?;
        Self::at(name, target, place)
    }

    /// Makes a sink that writes its files to a store that is already open: the bucket of the configured URL.
    ///
    /// # Errors
    /// As for [`RedshiftSink::new`].
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

    /// Sets the time without an answer after which a connection counts as lost.
    #[must_use]
    pub fn with_silence_max(mut self, silence_max: Duration) -> Self {
        // Before the first shard is acquired, nobody else has it.
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
            shared.failed(&format!("cannot acquire {} in {ledger}", shard.shard), &error)
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
        // The first one stays: a sink has one owner for its lifetime.
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
