//! The ledger: the position table of the sink. It stores how far the loads of each shard have landed, and the epoch of
//! its owner.
//!
//! One row per (pipeline, sink, stream, shard); `epoch` grows with each owner. Redshift enforces no keys, and has no
//! `numeric` of 129 digits. So:
//!
//! - The table is locked while its rows change, which replaces the missing key. It also keeps two loads apart, one of
//!   which would otherwise fail (error 1023, "Serializable isolation violation").
//! - The lock is the first statement of a transaction, before it reads any data. Only then it sees what others have
//!   committed while it waited for the lock.
//! - Sequence numbers are text.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::SimpleQueryRow;

use super::session::{self, literal};
use shardmill_core::owner::{OwnerName, Ownership, StateMark};
use shardmill_core::record::{
    PipelineName, Position, SEQUENCE_NUMBER_DIGITS_MAX, SequenceNumber, ShardId, ShardKey, SinkName,
};
use shardmill_core::sink::KeptPosition;
use shardmill_pg::name::TableName;
use shardmill_pg::{Link, ServerError as Error};

/// Name of the table; it is in the schema of the data table.
const TABLE: &str = "shardmill_position";

/// Columns that tables of earlier versions do not have: who wrote a position, and with which state.
const LATER_COLUMNS: [(&str, &str); 3] =
    [("state_id", "varchar(64)"), ("state_number", "bigint"), ("owner", "varchar(512)")];

/// Position table.
pub(super) struct PositionLedger {
    name: TableName,
    /// Whether it is known to have all columns.
    is_wide: AtomicBool,
}

/// Row of a shard.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LedgerRow {
    pub(super) epoch: i64,
    /// `None` before the first commit.
    pub(super) position: Option<Position>,
    /// Who wrote it, if known.
    pub(super) owner: Option<OwnerName>,
}

/// Result of parsing stored texts, as distinct from the result of reading them.
type Readable<T> = Result<T, String>;

impl PositionLedger {
    /// Names the ledger for rows in `table`.
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
                 sub_sequence bigint,
                 state_id varchar(64),
                 state_number bigint,
                 owner varchar(512)
             )"
        );
        match session::run(client, &create).await {
            // If two processes create it at the same time, one may fail on the catalogue.
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

    /// Adds the columns that a table of an earlier version does not have. Only then the right to alter it is needed.
    pub(super) async fn widen_if_narrow(&self, client: &Link) -> Result<(), Error> {
        if self.is_wide.load(Ordering::Relaxed) {
            return Ok(());
        }
        let name = self.name.quoted();
        for (column, kind) in LATER_COLUMNS {
            let look = format!("SELECT {column} FROM {name} LIMIT 0");
            match session::rows(client, &look).await {
                Err(error) if session::is_no_column(&error) => {}
                other => {
                    other?;
                    continue;
                }
            }
            let add = format!("ALTER TABLE {name} ADD COLUMN {column} {kind}");
            match session::run(client, &add).await {
                // If two processes add it at the same time, one fails.
                Err(_) if session::rows(client, &look).await.is_ok() => {}
                other => other.map(drop)?,
            }
        }
        self.is_wide.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Returns the message for a failure to add them.
    pub(super) fn cannot_widen(&self) -> String {
        let name = self.name.quoted();
        let add = LATER_COLUMNS
            .map(|(column, kind)| format!("ALTER TABLE {name} ADD COLUMN {column} {kind};"));
        format!(
            "cannot add the columns of this version to the position table {}; have its owner run once: {}",
            self.name,
            add.join(" ")
        )
    }

    /// Makes the caller the owner of the shard: earlier epochs can no longer move the position.
    pub(super) async fn acquire_shard(
        &self,
        client: &Link,
        sink: &SinkName,
        shard: &ShardKey,
        ownership: Option<&Ownership>,
    ) -> Result<Readable<LedgerRow>, Error> {
        self.lock(client).await?;
        let entry = match self.read(client, sink, shard).await? {
            Ok(entry) => entry,
            Err(unreadable) => {
                session::run(client, "ROLLBACK").await?;
                return Ok(Err(unreadable));
            }
        };
        let name = self.name.quoted();
        let [state, number, owner] = owned_by(ownership);
        let owned = match entry {
            Some(LedgerRow { epoch, position, owner: before }) => {
                let epoch = epoch + 1;
                let key = key(sink, shard);
                let update = format!(
                    "UPDATE {name} SET epoch = {epoch}, state_id = {state}, state_number = {number}, \
                     owner = {owner} WHERE {key}"
                );
                session::run(client, &update).await?;
                LedgerRow { epoch, position, owner: before }
            }
            None => {
                let values = columns(sink, shard).map(|(_, text)| literal(&text)).join(", ");
                let insert = format!(
                    "INSERT INTO {name} (pipeline, sink, stream, shard, epoch, state_id, \
                     state_number, owner) VALUES ({values}, 1, {state}, {number}, {owner})"
                );
                session::run(client, &insert).await?;
                LedgerRow { epoch: 1, position: None, owner: None }
            }
        };
        session::run(client, "COMMIT").await?;
        Ok(Ok(owned))
    }

    /// Moves the row of a shard from the sink's old name to its new name. Does nothing if there is no row, or it was
    /// moved before.
    pub(super) async fn adopt(
        &self,
        client: &Link,
        (old, new): (&SinkName, &SinkName),
        shard: &ShardKey,
    ) -> Result<Readable<()>, Error> {
        if matches!(self.read(client, old, shard).await?, Ok(None)) {
            return Ok(Ok(()));
        }
        self.lock(client).await?;
        if let Ok(Some(LedgerRow { position: Some(_), .. })) = self.read(client, new, shard).await?
        {
            session::run(client, "ROLLBACK").await?;
            return Ok(Err(format!(
                "{self} has rows of both sink {old} and sink {new} for shard {}: delete the one that is \
                 obsolete",
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

    /// Begins a transaction and locks the ledger, so that nobody else changes it meanwhile.
    pub(super) async fn lock(&self, client: &Link) -> Result<(), Error> {
        session::run(client, "BEGIN").await?;
        session::run(client, &format!("LOCK TABLE {}", self.name.quoted())).await.map(drop)
    }

    /// Reads the row of a shard; `None` if the row or the table does not exist.
    pub(super) async fn read(
        &self,
        client: &Link,
        sink: &SinkName,
        shard: &ShardKey,
    ) -> Result<Readable<Option<LedgerRow>>, Error> {
        let of_shard = format!("FROM {} WHERE {}", self.name.quoted(), key(sink, shard));
        let read = format!("SELECT epoch, sequence, sub_sequence, owner {of_shard}");
        let found = match session::rows(client, &read).await {
            // A table of an earlier version.
            Err(error) if session::is_no_column(&error) => {
                let narrow = format!("SELECT epoch, sequence, sub_sequence, NULL {of_shard}");
                session::rows(client, &narrow).await
            }
            found => found,
        };
        match found {
            Ok(rows) => Ok(rows.first().map(LedgerRow::of).transpose()),
            Err(error) if session::is_no_table(&error) => Ok(Ok(None)),
            Err(error) => Err(error),
        }
    }

    /// Reads all rows of a sink of a pipeline; none if the table does not exist.
    pub(super) async fn read_all(
        &self,
        client: &Link,
        sink: &SinkName,
        pipeline: &PipelineName,
    ) -> Result<Readable<Vec<KeptPosition>>, Error> {
        let of_sink = format!(
            "FROM {} WHERE pipeline = {} AND sink = {}",
            self.name.quoted(),
            literal(pipeline.as_str()),
            literal(sink.as_str())
        );
        let own = "SELECT epoch, sequence, sub_sequence";
        let read = format!("{own}, owner, stream, shard, state_id, state_number {of_sink}");
        let found = match session::rows(client, &read).await {
            Err(error) if session::is_no_column(&error) => {
                let narrow = format!("{own}, NULL, stream, shard, NULL, NULL {of_sink}");
                session::rows(client, &narrow).await
            }
            found => found,
        };
        let rows = match found {
            Err(error) if session::is_no_table(&error) => return Ok(Ok(Vec::new())),
            found => found?,
        };
        let kept = |row: &SimpleQueryRow| {
            let entry = LedgerRow::of(row)?;
            let number = row.get(7).and_then(|text| text.parse().ok());
            let mark = row.get(6).zip(number);
            Ok(KeptPosition {
                stream: row.get(4).unwrap_or_default().to_owned(),
                shard: ShardId::new(row.get(5).unwrap_or_default()),
                position: entry.position,
                mark: mark.map(|(state, number)| StateMark { state: state.into(), number }),
                owner: entry.owner,
            })
        };
        Ok(rows.iter().map(kept).collect())
    }

    /// Moves the position of a row that is locked and was read.
    pub(super) async fn move_to(
        &self,
        client: &Link,
        sink: &SinkName,
        shard: &ShardKey,
        position: &Position,
        ownership: Option<&Ownership>,
    ) -> Result<u64, Error> {
        let number = match ownership {
            Some(ownership) => format!(", state_number = {}", ownership.mark().number),
            None => String::new(),
        };
        let update = format!(
            "UPDATE {} SET sequence = {}, sub_sequence = {}{number} WHERE {}",
            self.name.quoted(),
            literal(position.sequence.as_str()),
            position.sub_sequence,
            key(sink, shard)
        );
        session::run(client, &update).await
    }
}

impl fmt::Display for PositionLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl LedgerRow {
    fn of(row: &SimpleQueryRow) -> Readable<Self> {
        let unreadable = |what: &str| format!("invalid stored {what}");
        let number = |place| row.get(place).and_then(|text| text.parse().ok());
        let epoch = number(0).ok_or_else(|| unreadable("epoch"))?;
        let owner = row.get(3).and_then(OwnerName::parse);
        let Some(sequence) = row.get(1) else { return Ok(Self { epoch, position: None, owner }) };
        let sequence = SequenceNumber::parse(sequence)
            .map_err(|error| format!("{}: {error}", unreadable("position")))?;
        let sub_sequence = number(2).and_then(|number| u64::try_from(number).ok());
        let sub_sequence = sub_sequence.ok_or_else(|| unreadable("sub-sequence"))?;
        Ok(Self { epoch, position: Some(Position { sequence, sub_sequence }), owner })
    }
}

/// Returns the values of the later columns, as SQL.
fn owned_by(ownership: Option<&Ownership>) -> [String; 3] {
    let Some(ownership) = ownership else { return ["NULL", "NULL", "NULL"].map(str::to_owned) };
    let mark = ownership.mark();
    [literal(&mark.state), mark.number.to_string(), literal(&ownership.owner.to_text())]
}

/// Returns the columns that identify a shard's row, with their values.
fn columns(sink: &SinkName, shard: &ShardKey) -> [(&'static str, String); 4] {
    [
        ("pipeline", shard.pipeline.to_string()),
        ("sink", sink.to_string()),
        ("stream", shard.stream.key()),
        ("shard", shard.shard.to_string()),
    ]
}

/// Returns the condition for a shard's row.
fn key(sink: &SinkName, shard: &ShardKey) -> String {
    columns(sink, shard).map(|(name, text)| format!("{name} = {}", literal(&text))).join(" AND ")
}
