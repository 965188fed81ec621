//! The ledger: how far each shard's loads have landed, and who may add to it.
//!
//! One row per (pipeline, sink, stream, shard); `epoch` grows with each owner. Redshift enforces no
//! key and has no `numeric` of 129 digits: the table is locked while its rows change, which also keeps
//! loads out of each other's way (error 1023, "Serializable isolation violation", else ends one of
//! two), and sequence numbers are text. A lock comes before a transaction's first look at data, so that
//! it sees what others have committed while it waited.

use std::fmt;

use tokio_postgres::{Client, Error, SimpleQueryRow};

use super::session::{self, literal};
use crate::record::{Position, SEQUENCE_NUMBER_DIGITS_MAX, SequenceNumber, ShardKey, SinkName};
use crate::sink::postgres::TableName;

/// The table's name; it stands in the schema of the data table.
const TABLE: &str = "shardmill_position";

/// Where positions are kept.
pub(super) struct Ledger {
    name: TableName,
}

/// A shard's row.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) epoch: i64,
    /// `None` before the first commit.
    pub(super) position: Option<Position>,
}

/// What could be read and what its texts mean are two questions.
type Readable<T> = Result<T, String>;

impl Ledger {
    /// The ledger for rows in `table`.
    pub(super) fn beside(table: &TableName) -> Self {
        Self { name: table.sibling(TABLE) }
    }

    /// Creates the table if it is missing. Only then is the right to create one needed.
    pub(super) async fn create_if_missing(&self, client: &Client) -> Result<(), Error> {
        let name = self.name.quoted();
        match session::rows(client, &format!("SELECT 1 FROM {name} LIMIT 0")).await {
            Err(error) if session::is_no_table(&error) => {}
            other => return other.map(drop),
        }
        let create = format!(
            "CREATE TABLE IF NOT EXISTS {name} (
                 pipeline varchar(256) NOT NULL,
                 sink varchar(256) NOT NULL,
                 stream varchar(4096) NOT NULL,
                 shard varchar(4096) NOT NULL,
                 epoch bigint NOT NULL,
                 sequence varchar({SEQUENCE_NUMBER_DIGITS_MAX}),
                 sub_sequence bigint
             )"
        );
        match session::run(client, &create).await {
            // Of two that create it at once, one may fail on the catalogue.
            Err(_)
                if session::rows(client, &format!("SELECT 1 FROM {name} LIMIT 0"))
                    .await
                    .is_ok() =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Makes the caller the shard's owner: earlier epochs can no longer move the position.
    pub(super) async fn take_over(
        &self,
        client: &Client,
        sink: &SinkName,
        shard: &ShardKey,
    ) -> Result<Readable<Entry>, Error> {
        self.lock(client).await?;
        let entry = match self.read(client, sink, shard).await? {
            Ok(entry) => entry,
            Err(unreadable) => {
                session::run(client, "ROLLBACK").await?;
                return Ok(Err(unreadable));
            }
        };
        let name = self.name.quoted();
        let owned = match entry {
            Some(Entry { epoch, position }) => {
                let epoch = epoch + 1;
                let key = key(sink, shard);
                session::run(client, &format!("UPDATE {name} SET epoch = {epoch} WHERE {key}"))
                    .await?;
                Entry { epoch, position }
            }
            None => {
                let values = columns(sink, shard).map(|(_, text)| literal(&text)).join(", ");
                let insert = format!(
                    "INSERT INTO {name} (pipeline, sink, stream, shard, epoch) VALUES ({values}, 1)"
                );
                session::run(client, &insert).await?;
                Entry { epoch: 1, position: None }
            }
        };
        session::run(client, "COMMIT").await?;
        Ok(Ok(owned))
    }

    /// Moves a shard's row from the sink's old name to its new one; there may be none, or it was moved
    /// before.
    pub(super) async fn adopt(
        &self,
        client: &Client,
        (old, new): (&SinkName, &SinkName),
        shard: &ShardKey,
    ) -> Result<Readable<()>, Error> {
        if matches!(self.read(client, old, shard).await?, Ok(None)) {
            return Ok(Ok(()));
        }
        self.lock(client).await?;
        if let Ok(Some(Entry { position: Some(_), .. })) = self.read(client, new, shard).await? {
            session::run(client, "ROLLBACK").await?;
            return Ok(Err(format!(
                "{self} has rows of both sink {old} and sink {new} for shard {}: delete the one that does \
                 not count",
                shard.shard
            )));
        }
        let name = self.name.quoted();
        let delete = format!("DELETE FROM {name} WHERE {}", key(new, shard));
        session::run(client, &delete).await?;
        let rename = format!(
            "UPDATE {name} SET sink = {}, epoch = epoch + 1 WHERE {}",
            literal(new.as_str()),
            key(old, shard)
        );
        session::run(client, &rename).await?;
        session::run(client, "COMMIT").await?;
        Ok(Ok(()))
    }

    /// Begins a transaction that nobody else's changes to the ledger can cross.
    pub(super) async fn lock(&self, client: &Client) -> Result<(), Error> {
        session::run(client, "BEGIN").await?;
        session::run(client, &format!("LOCK TABLE {}", self.name.quoted())).await.map(drop)
    }

    /// The shard's row; `None` when it or the table is missing.
    pub(super) async fn read(
        &self,
        client: &Client,
        sink: &SinkName,
        shard: &ShardKey,
    ) -> Result<Readable<Option<Entry>>, Error> {
        let read = format!(
            "SELECT epoch, sequence, sub_sequence FROM {} WHERE {}",
            self.name.quoted(),
            key(sink, shard)
        );
        match session::rows(client, &read).await {
            Ok(rows) => Ok(rows.first().map(Entry::of).transpose()),
            Err(error) if session::is_no_table(&error) => Ok(Ok(None)),
            Err(error) => Err(error),
        }
    }

    /// Moves the position of a row that is locked and known.
    pub(super) async fn move_to(
        &self,
        client: &Client,
        sink: &SinkName,
        shard: &ShardKey,
        position: &Position,
    ) -> Result<u64, Error> {
        let update = format!(
            "UPDATE {} SET sequence = {}, sub_sequence = {} WHERE {}",
            self.name.quoted(),
            literal(position.sequence.as_str()),
            position.sub_sequence,
            key(sink, shard)
        );
        session::run(client, &update).await
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl Entry {
    fn of(row: &SimpleQueryRow) -> Readable<Self> {
        let unreadable = |what: &str| format!("the stored {what} cannot be read");
        let number = |place| row.get(place).and_then(|text| text.parse().ok());
        let epoch = number(0).ok_or_else(|| unreadable("epoch"))?;
        let Some(sequence) = row.get(1) else { return Ok(Self { epoch, position: None }) };
        let sequence = SequenceNumber::parse(sequence)
            .map_err(|error| format!("{}: {error}", unreadable("position")))?;
        let sub_sequence = number(2).and_then(|number| u64::try_from(number).ok());
        let sub_sequence = sub_sequence.ok_or_else(|| unreadable("sub-sequence"))?;
        Ok(Self { epoch, position: Some(Position { sequence, sub_sequence }) })
    }
}

/// The columns that find a shard's row, with their values.
fn columns(sink: &SinkName, shard: &ShardKey) -> [(&'static str, String); 4] {
    [
        ("pipeline", shard.pipeline.to_string()),
        ("sink", sink.to_string()),
        ("stream", shard.stream.key()),
        ("shard", shard.shard.to_string()),
    ]
}

/// The condition that finds a shard's row.
fn key(sink: &SinkName, shard: &ShardKey) -> String {
    columns(sink, shard).map(|(name, text)| format!("{name} = {}", literal(&text))).join(" AND ")
}
