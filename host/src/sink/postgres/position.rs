//! The position table: how far each shard is, and who may move it.
//!
//! One row per (pipeline, sink, stream, shard). `epoch` grows with each owner; the position moves
//! only under the owner's epoch and only from where the owner thinks it is. Sequence numbers have
//! up to 129 digits: `numeric`, written as SQL has numbers and read as text.

use std::fmt;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, Row};

use super::name::{TableName, literal};
use super::session;
use crate::record::{
    PipelineName, Position, PositionSpan, SEQUENCE_NUMBER_DIGITS_MAX, SequenceNumber, ShardKey,
    SinkName,
};

/// The table's name; it stands in the schema of the data table.
const TABLE: &str = "shardmill_position";

/// Where positions are kept.
pub(super) struct PositionTable {
    name: TableName,
}

/// A position's row.
pub(super) struct Stored {
    pub(super) epoch: i64,
    sequence: Option<String>,
    sub_sequence: Option<i64>,
}

impl PositionTable {
    /// The table for positions of rows in `table`.
    pub(super) fn beside(table: &TableName) -> Self {
        Self { name: table.sibling(TABLE) }
    }

    /// Creates the table if it is missing. Only then is the right to create one needed.
    pub(super) async fn create_if_missing(&self, client: &Client) -> Result<(), Error> {
        let name = self.name.quoted();
        let exists: bool = client
            .query_typed_one("SELECT to_regclass($1) IS NOT NULL", &[(&name, Type::TEXT)])
            .await?
            .try_get(0)?;
        if exists {
            return Ok(());
        }
        let create = format!(
            "CREATE TABLE IF NOT EXISTS {name} (
                 pipeline text NOT NULL,
                 sink text NOT NULL,
                 stream text NOT NULL,
                 shard text NOT NULL,
                 sequence numeric({SEQUENCE_NUMBER_DIGITS_MAX}, 0),
                 sub_sequence bigint,
                 epoch bigint NOT NULL,
                 PRIMARY KEY (pipeline, sink, stream, shard)
             )"
        );
        session::create_once(client, &create).await
    }

    /// What to say when the table cannot be created.
    pub(super) fn cannot_create(&self) -> String {
        format!("cannot create the position table {}; have its owner create it once", self.name)
    }

    /// Makes the caller the shard's owner: earlier epochs can no longer move the position.
    pub(super) async fn take_over(
        &self,
        client: &Client,
        sink: &SinkName,
        shard: &ShardKey,
    ) -> Result<Stored, Error> {
        let name = self.name.quoted();
        let take_over = format!(
            "INSERT INTO {name} AS held (pipeline, sink, stream, shard, epoch)
             VALUES ($1, $2, $3, $4, 1)
             ON CONFLICT (pipeline, sink, stream, shard) DO UPDATE SET epoch = held.epoch + 1
             RETURNING epoch, sequence::text, sub_sequence"
        );
        let row = client
            .query_typed_one(
                &take_over,
                &[
                    (&shard.pipeline.as_str(), Type::TEXT),
                    (&sink.as_str(), Type::TEXT),
                    (&shard.stream.key(), Type::TEXT),
                    (&shard.shard.as_str(), Type::TEXT),
                ],
            )
            .await?;
        Stored::of(&row)
    }

    /// The shard's row; `None` when it or the table is missing.
    pub(super) async fn read(
        &self,
        client: &Client,
        sink: &SinkName,
        shard: &ShardKey,
    ) -> Result<Option<Stored>, Error> {
        let read = format!(
            "SELECT epoch, sequence::text, sub_sequence FROM {}
             WHERE pipeline = $1 AND sink = $2 AND stream = $3 AND shard = $4",
            self.name.quoted()
        );
        let found = client
            .query_typed_opt(
                &read,
                &[
                    (&shard.pipeline.as_str(), Type::TEXT),
                    (&sink.as_str(), Type::TEXT),
                    (&shard.stream.key(), Type::TEXT),
                    (&shard.shard.as_str(), Type::TEXT),
                ],
            )
            .await;
        match found {
            Ok(row) => row.map(|row| Stored::of(&row)).transpose(),
            Err(error)
                if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Moves a shard's row from the sink's old name to its new one. A row of the new name without a
    /// position makes room; one with a position is in the way, and an error.
    pub(super) async fn adopt(
        &self,
        client: &Client,
        (old, new): (&SinkName, &SinkName),
        shard: &ShardKey,
    ) -> Result<(), Error> {
        let name = self.name.quoted();
        let key = |sink: &SinkName| {
            format!(
                "pipeline = {} AND sink = {} AND stream = {} AND shard = {}",
                literal(shard.pipeline.as_str()),
                literal(sink.as_str()),
                literal(&shard.stream.key()),
                literal(shard.shard.as_str())
            )
        };
        // One message is one transaction.
        let statements = format!(
            "DELETE FROM {name} WHERE {} AND sequence IS NULL;
             UPDATE {name} SET sink = {}, epoch = epoch + 1 WHERE {}",
            key(new),
            literal(new.as_str()),
            key(old)
        );
        client.batch_execute(&statements).await
    }

    /// Its name, as SQL has it.
    pub(super) fn quoted(&self) -> String {
        self.name.quoted()
    }

    /// Deletes a sink's positions of a pipeline.
    pub(super) async fn forget(
        &self,
        client: &Client,
        pipeline: &PipelineName,
        sink: &SinkName,
    ) -> Result<(), Error> {
        self.create_if_missing(client).await?;
        let forget =
            format!("DELETE FROM {} WHERE pipeline = $1 AND sink = $2", self.name.quoted());
        client.execute(&forget, &[&pipeline.as_str(), &sink.as_str()]).await.map(drop)
    }

    /// The statement that moves the position over a span; it concerns no row when the position is not
    /// where the span begins, or has another owner.
    ///
    /// Text, to go in one message with what begins the transaction: it must never run outside of it.
    pub(super) fn move_on(
        &self,
        sink: &SinkName,
        shard: &ShardKey,
        epoch: i64,
        span: &PositionSpan,
    ) -> String {
        let from = match &span.from_exclusive {
            None => "sequence IS NULL".to_owned(),
            Some(from) => {
                format!("sequence = {} AND sub_sequence = {}", from.sequence, sub_sequence(from))
            }
        };
        format!(
            "UPDATE {} SET sequence = {}, sub_sequence = {}
             WHERE pipeline = {} AND sink = {} AND stream = {} AND shard = {} AND epoch = {epoch}
                 AND {from}",
            self.name.quoted(),
            span.to_inclusive.sequence,
            sub_sequence(&span.to_inclusive),
            literal(shard.pipeline.as_str()),
            literal(sink.as_str()),
            literal(&shard.stream.key()),
            literal(shard.shard.as_str())
        )
    }
}

impl fmt::Display for PositionTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl Stored {
    fn of(row: &Row) -> Result<Self, Error> {
        Ok(Self {
            epoch: row.try_get(0)?,
            sequence: row.try_get(1)?,
            sub_sequence: row.try_get(2)?,
        })
    }

    /// The position; `None` before the first commit.
    pub(super) fn position(&self) -> Result<Option<Position>, String> {
        let Some(sequence) = &self.sequence else { return Ok(None) };
        let sequence = SequenceNumber::parse(sequence)
            .map_err(|error| format!("the stored position cannot be read: {error}"))?;
        let sub_sequence = u64::try_from(self.sub_sequence.unwrap_or(0))
            .map_err(|_| "the stored position has a sub-sequence below 0".to_owned())?;
        Ok(Some(Position { sequence, sub_sequence }))
    }
}

/// The column's form of a sub-sequence. An aggregate has at most some millions of records.
fn sub_sequence(position: &Position) -> i64 {
    i64::try_from(position.sub_sequence).unwrap_or(i64::MAX)
}
