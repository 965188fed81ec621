//! The position table: the position of each shard, and the epoch of its owner.
//!
//! One row per (pipeline, sink, stream, shard). The invariant: the position moves only under the current epoch and only
//! from the value that the owner expects. `epoch` grows with each owner, so an earlier owner updates no row. Sequence
//! numbers have up to 129 digits: the column is `numeric`; values are written as SQL numbers and read as text.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::session;
use shardmill_core::owner::{OwnerName, Ownership, StateMark};
use shardmill_core::record::{
    PipelineName, Position, PositionRange, SEQUENCE_NUMBER_DIGITS_MAX, SequenceNumber, ShardId,
    ShardKey, SinkName,
};
use shardmill_core::sink::KeptPosition;
use shardmill_pg::name::{TableName, literal};
use shardmill_pg::{Link, ServerError as Error};

/// Name of the table; it is in the schema of the data table.
const TABLE: &str = "shardmill_position";

/// Columns that tables of earlier versions do not have: who wrote a position, and with which state.
const LATER_COLUMNS: [(&str, &str); 3] =
    [("state_id", "text"), ("state_number", "bigint"), ("owner", "text")];

/// Reads these columns of a row `held` of a table that may not have them.
const LATER_VALUES: &str = "to_jsonb(held)->>'state_id', (to_jsonb(held)->>'state_number')::bigint,
    to_jsonb(held)->>'owner'";

/// Position table.
pub(super) struct PositionTable {
    name: TableName,
    /// Whether it is known to have all columns.
    is_wide: AtomicBool,
}

/// Row of a position.
pub(super) struct Stored {
    pub(super) epoch: i64,
    sequence: Option<String>,
    sub_sequence: Option<i64>,
    /// Who wrote it, if known.
    pub(super) owner: Option<OwnerName>,
}

impl PositionTable {
    /// Names the table for positions of rows in `table`.
    pub(super) fn beside(table: &TableName) -> Self {
        Self { name: table.sibling(TABLE), is_wide: AtomicBool::new(false) }
    }

    /// Returns the name of the table.
    pub(super) fn name(&self) -> &TableName {
        &self.name
    }

    /// Creates the table if it does not exist. Only then the right to create one is needed.
    pub(super) async fn create_if_missing(&self, client: &Link) -> Result<(), Error> {
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
                 state_id text,
                 state_number bigint,
                 owner text,
                 PRIMARY KEY (pipeline, sink, stream, shard)
             )"
        );
        session::create_once(client, &create).await
    }

    /// Adds the columns that a table of an earlier version does not have. Only then the right to alter it is needed.
    pub(super) async fn widen_if_narrow(&self, client: &Link) -> Result<(), Error> {
        if self.is_wide.load(Ordering::Relaxed) {
            return Ok(());
        }
        let columns = "SELECT count(*) FROM pg_catalog.pg_attribute
             WHERE attrelid = to_regclass($1) AND NOT attisdropped
                 AND attname IN ('state_id', 'state_number', 'owner')";
        let found: i64 = client
            .query_typed_one(columns, &[(&self.name.quoted(), Type::TEXT)])
            .await?
            .try_get(0)?;
        if !Self::is_wide_with(found) {
            session::create_once(client, &self.widening()).await?;
        }
        self.is_wide.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether this number of the later columns is all of them.
    pub(super) fn is_wide_with(later_columns: i64) -> bool {
        later_columns >= LATER_COLUMNS.len() as i64
    }

    /// Returns the statement that adds them.
    fn widening(&self) -> String {
        let columns =
            LATER_COLUMNS.map(|(name, kind)| format!("ADD COLUMN IF NOT EXISTS {name} {kind}"));
        format!("ALTER TABLE {} {}", self.name.quoted(), columns.join(", "))
    }

    /// Returns statements that the server only plans: they fail if the table does not have the columns, types or key
    /// that acquiring a shard and moving a position need.
    pub(super) fn trial(&self) -> String {
        let name = self.name.quoted();
        format!(
            "EXPLAIN INSERT INTO {name} AS held (pipeline, sink, stream, shard, epoch)
                 SELECT '', '', '', '', 1::bigint WHERE false
                 ON CONFLICT (pipeline, sink, stream, shard) DO UPDATE SET epoch = held.epoch + 1
                 RETURNING epoch, sequence::text, sub_sequence;
             EXPLAIN UPDATE {name} SET sequence = 1::numeric, sub_sequence = 1::bigint
                 WHERE sequence IS NOT DISTINCT FROM 0::numeric AND sub_sequence = 0::bigint AND epoch = 0"
        )
    }

    /// Returns the message for a failure to add them.
    pub(super) fn cannot_widen(&self) -> String {
        format!(
            "cannot add the columns of this version to the position table {}; have its owner run once: {}",
            self.name,
            self.widening()
        )
    }

    /// Returns the message for a failure to create the table.
    pub(super) fn cannot_create(&self) -> String {
        format!("cannot create the position table {}; have its owner create it once", self.name)
    }

    /// Makes the caller the owner of the shard: earlier epochs can no longer move the position.
    pub(super) async fn acquire_shard(
        &self,
        client: &Link,
        sink: &SinkName,
        shard: &ShardKey,
        ownership: Option<&Ownership>,
    ) -> Result<Stored, Error> {
        let name = self.name.quoted();
        // One statement: two owners that acquire the shard at the same time get different epochs, because the second
        // waits for the row lock of the first.
        let acquire_shard = format!(
            "INSERT INTO {name} AS held
                 (pipeline, sink, stream, shard, epoch, state_id, state_number, owner)
             VALUES ($1, $2, $3, $4, 1, $5, $6, $7)
             ON CONFLICT (pipeline, sink, stream, shard) DO UPDATE SET epoch = held.epoch + 1,
                 state_id = $5, state_number = $6, owner = $7
             RETURNING epoch, sequence::text, sub_sequence, {LATER_VALUES}"
        );
        let mark = ownership.map(Ownership::mark);
        let (state, number) =
            (mark.as_ref().map(|own| &*own.state), mark.as_ref().map(|own| own.number));
        let owner = ownership.map(|own| own.owner.to_text());
        let row = client
            .query_typed_one(
                &acquire_shard,
                &[
                    (&shard.pipeline.as_str(), Type::TEXT),
                    (&sink.as_str(), Type::TEXT),
                    (&shard.stream.key(), Type::TEXT),
                    (&shard.shard.as_str(), Type::TEXT),
                    (&state, Type::TEXT),
                    (&number, Type::INT8),
                    (&owner, Type::TEXT),
                ],
            )
            .await?;
        Stored::of(&row)
    }

    /// Reads the row of a shard; `None` if the row or the table does not exist.
    pub(super) async fn read(
        &self,
        client: &Link,
        sink: &SinkName,
        shard: &ShardKey,
    ) -> Result<Option<Stored>, Error> {
        let read = format!(
            "SELECT epoch, sequence::text, sub_sequence, {LATER_VALUES} FROM {} AS held
             WHERE pipeline = $1 AND sink = $2 AND stream = $3 AND shard = $4",
            self.name.quoted()
        );
        // `LATER_VALUES` reads the columns through `to_jsonb`, which also works for a table that does not have them.
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

    /// Moves the row of a shard from the sink's old name to its new name. A row of the new name without a position is
    /// deleted first; one with a position causes an error.
    pub(super) async fn adopt(
        &self,
        client: &Link,
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

    /// Returns the quoted name for SQL.
    pub(super) fn quoted(&self) -> String {
        self.name.quoted()
    }

    /// Reads all rows of a sink of a pipeline; the inner error: a row is invalid. Returns none if the table does not
    /// exist.
    pub(super) async fn read_all(
        &self,
        client: &Link,
        sink: &SinkName,
        pipeline: &PipelineName,
    ) -> Result<Result<Vec<KeptPosition>, String>, Error> {
        let read = format!(
            "SELECT epoch, sequence::text, sub_sequence, {LATER_VALUES}, stream, shard FROM {} AS held
             WHERE pipeline = $1 AND sink = $2",
            self.name.quoted()
        );
        let key: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
            [(&pipeline.as_str(), Type::TEXT), (&sink.as_str(), Type::TEXT)];
        let rows = match client.query_typed(&read, &key).await {
            Ok(rows) => rows,
            Err(error)
                if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE) =>
            {
                return Ok(Ok(Vec::new()));
            }
            Err(error) => return Err(error),
        };
        let mut kept = Vec::with_capacity(rows.len());
        for row in &rows {
            let stored = Stored::of(row)?;
            let (state, number) = (row.try_get::<_, Option<String>>(3)?, row.try_get(4)?);
            let mark = state.zip(number);
            let position = match stored.position() {
                Ok(position) => position,
                Err(cause) => return Ok(Err(cause)),
            };
            kept.push(KeptPosition {
                stream: row.try_get(6)?,
                shard: ShardId::new(row.try_get::<_, String>(7)?),
                position,
                mark: mark.map(|(state, number)| StateMark { state: state.into(), number }),
                owner: stored.owner,
            });
        }
        Ok(Ok(kept))
    }

    /// Deletes the positions of a sink of a pipeline.
    pub(super) async fn forget(
        &self,
        client: &Link,
        pipeline: &PipelineName,
        sink: &SinkName,
    ) -> Result<(), Error> {
        self.create_if_missing(client).await?;
        let forget =
            format!("DELETE FROM {} WHERE pipeline = $1 AND sink = $2", self.name.quoted());
        client
            .execute_typed(
                &forget,
                &[(&pipeline.as_str(), Type::TEXT), (&sink.as_str(), Type::TEXT)],
            )
            .await
            .map(drop)
    }

    /// Returns the statement that moves the position over a range. It updates no row if the position is not at the
    /// start of the range, or if the shard has another owner.
    ///
    /// It is text, so that it is sent in one message with the start of the transaction: it must never run outside of
    /// one.
    pub(super) fn move_on(
        &self,
        sink: &SinkName,
        shard: &ShardKey,
        epoch: i64,
        range: &PositionRange,
        ownership: Option<&Ownership>,
    ) -> String {
        let number = match ownership {
            Some(ownership) => format!(", state_number = {}", ownership.mark().number),
            None => String::new(),
        };
        // A position that was never set is NULL, and `=` never matches NULL.
        let from = match &range.from_exclusive {
            None => "sequence IS NULL".to_owned(),
            Some(from) => {
                format!("sequence = {} AND sub_sequence = {}", from.sequence, sub_sequence(from))
            }
        };
        format!(
            "UPDATE {} SET sequence = {}, sub_sequence = {}{number}
             WHERE pipeline = {} AND sink = {} AND stream = {} AND shard = {} AND epoch = {epoch}
                 AND {from}",
            self.name.quoted(),
            range.to_inclusive.sequence,
            sub_sequence(&range.to_inclusive),
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
            owner: row.try_get::<_, Option<&str>>(5)?.and_then(OwnerName::parse),
        })
    }

    /// Returns the position; `None` before the first commit.
    pub(super) fn position(&self) -> Result<Option<Position>, String> {
        let Some(sequence) = &self.sequence else { return Ok(None) };
        let sequence = SequenceNumber::parse(sequence)
            .map_err(|error| format!("invalid stored position: {error}"))?;
        let sub_sequence = u64::try_from(self.sub_sequence.unwrap_or(0))
            .map_err(|_| "invalid stored position: its sub-sequence is below 0".to_owned())?;
        Ok(Some(Position { sequence, sub_sequence }))
    }
}

/// Converts a sub-sequence for the column. An aggregate has at most some millions of records.
fn sub_sequence(position: &Position) -> i64 {
    i64::try_from(position.sub_sequence).unwrap_or(i64::MAX)
}
