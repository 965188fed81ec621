//! The position table: how far each shard is, and who may move it.
//!
//! SQLite's numbers are doubles beyond 64 bits, so a sequence number is text, padded with zeros to
//! 129 digits: text order is then number order.

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::connection::Held;
use crate::record::{Position, PositionSpan, SequenceNumber, ShardKey, SinkName};

const CREATE: &str = "CREATE TABLE IF NOT EXISTS shardmill_position (
    pipeline TEXT NOT NULL,
    sink TEXT NOT NULL,
    stream TEXT NOT NULL,
    shard TEXT NOT NULL,
    sequence TEXT,
    sub_sequence INTEGER,
    epoch INTEGER NOT NULL,
    PRIMARY KEY (pipeline, sink, stream, shard)
) STRICT, WITHOUT ROWID";

const TAKE_OVER: &str = "INSERT INTO shardmill_position (pipeline, sink, stream, shard, epoch)
    VALUES (?1, ?2, ?3, ?4, 1)
    ON CONFLICT (pipeline, sink, stream, shard) DO UPDATE SET epoch = epoch + 1
    RETURNING epoch, sequence, sub_sequence";

const READ: &str = "SELECT epoch, sequence, sub_sequence FROM shardmill_position
    WHERE pipeline = ?1 AND sink = ?2 AND stream = ?3 AND shard = ?4";

const MOVE_ON: &str = "UPDATE shardmill_position SET sequence = ?6, sub_sequence = ?7
    WHERE pipeline = ?1 AND sink = ?2 AND stream = ?3 AND shard = ?4 AND epoch = ?5
        AND sequence IS ?8 AND sub_sequence IS ?9";

const EXISTS: &str =
    "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'shardmill_position'";

/// A position's row.
pub(super) struct Stored {
    pub(super) epoch: i64,
    pub(super) position: Option<Position>,
}

/// Makes the caller the shard's owner: earlier epochs can no longer move the position.
pub(super) fn take_over(
    held: &mut Held,
    sink: &SinkName,
    shard: &ShardKey,
) -> Result<Stored, String> {
    let failed = |error: rusqlite::Error| {
        format!("cannot take {} over in shardmill_position: {error}", shard.shard)
    };
    let connection = &held.connection;
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
    connection.execute_batch(CREATE).map_err(failed)?;
    let (pipeline, stream) = (shard.pipeline.as_str(), shard.stream.key());
    let key = params![pipeline, sink.as_str(), stream, shard.shard.as_str()];
    let stored = connection.query_row(TAKE_OVER, key, Stored::of).map_err(failed)?;
    connection.execute_batch("COMMIT").map_err(failed)?;
    Ok(stored)
}

/// Checks that positions can be kept: within a transaction that the caller rolls back.
pub(super) fn check(connection: &Connection) -> Result<(), String> {
    connection
        .execute_batch(CREATE)
        .and_then(|()| connection.prepare(TAKE_OVER).map(drop))
        .and_then(|()| connection.prepare(MOVE_ON).map(drop))
        .map_err(|error| {
            format!("positions cannot be kept in table shardmill_position: {error}: rename what has its name")
        })
}

/// The shard's row; `None` when it or the table is missing.
pub(super) fn read_if_any(
    held: &mut Held,
    sink: &SinkName,
    shard: &ShardKey,
) -> Result<Option<Stored>, String> {
    let connection = &held.connection;
    connection
        .query_row(EXISTS, [], |row| row.get::<_, i64>(0))
        .and_then(|tables| if tables == 0 { Ok(None) } else { read(connection, sink, shard) })
        .map_err(|error| format!("cannot read shardmill_position: {error}"))
}

/// The shard's row.
pub(super) fn read(
    connection: &Connection,
    sink: &SinkName,
    shard: &ShardKey,
) -> rusqlite::Result<Option<Stored>> {
    let (pipeline, stream) = (shard.pipeline.as_str(), shard.stream.key());
    let key = params![pipeline, sink.as_str(), stream, shard.shard.as_str()];
    connection.prepare_cached(READ)?.query_row(key, Stored::of).optional()
}

/// Moves a shard's row from the sink's old name to its new one; there may be none, or it was moved before.
pub(super) fn adopt(
    held: &mut Held,
    (old, new): (&SinkName, &SinkName),
    shard: &ShardKey,
) -> Result<(), String> {
    if read_if_any(held, old, shard)?.is_none() {
        return Ok(());
    }
    let failed = |error: rusqlite::Error| {
        format!("cannot move {} of sink {old} in shardmill_position: {error}", shard.shard)
    };
    let connection = &held.connection;
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
    if read(connection, new, shard).map_err(failed)?.is_some_and(|own| own.position.is_some()) {
        return Err(format!(
            "shardmill_position has rows of both sink {old} and sink {new} for shard {}: delete the one \
             that does not count",
            shard.shard
        ));
    }
    let (pipeline, stream) = (shard.pipeline.as_str(), shard.stream.key());
    let key = "WHERE pipeline = ?1 AND sink = ?2 AND stream = ?3 AND shard = ?4";
    let delete = format!("DELETE FROM shardmill_position {key}");
    let new_key = params![pipeline, new.as_str(), stream, shard.shard.as_str()];
    connection.execute(&delete, new_key).map_err(failed)?;
    let rename = format!("UPDATE shardmill_position SET sink = ?5, epoch = epoch + 1 {key}");
    let old_key = params![pipeline, old.as_str(), stream, shard.shard.as_str(), new.as_str()];
    connection.execute(&rename, old_key).map_err(failed)?;
    connection.execute_batch("COMMIT").map_err(failed)
}

/// Moves the position over a span; false when it is not where the span begins, or has another owner.
pub(super) fn move_on(
    connection: &Connection,
    sink: &SinkName,
    shard: &ShardKey,
    epoch: i64,
    span: &PositionSpan,
) -> rusqlite::Result<bool> {
    let from = span.from_exclusive.as_ref();
    let moved = connection.prepare_cached(MOVE_ON)?.execute(params![
        shard.pipeline.as_str(),
        sink.as_str(),
        shard.stream.key(),
        shard.shard.as_str(),
        epoch,
        span.to_inclusive.sequence.zero_padded(),
        sub_sequence(&span.to_inclusive),
        from.map(|from| from.sequence.zero_padded()),
        from.map(sub_sequence),
    ])?;
    Ok(moved == 1)
}

impl Stored {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        let sequence: Option<String> = row.get(1)?;
        let sub_sequence: Option<i64> = row.get(2)?;
        let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| {
            rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, error)
        };
        let position = match sequence {
            None => None,
            Some(text) => Some(Position {
                sequence: SequenceNumber::parse(&text).map_err(|error| unreadable(error.into()))?,
                sub_sequence: u64::try_from(sub_sequence.unwrap_or(0))
                    .map_err(|_| unreadable("the sub-sequence is below 0".into()))?,
            }),
        };
        Ok(Self { epoch: row.get(0)?, position })
    }
}

/// The column's form of a sub-sequence. An aggregate has at most some millions of records.
fn sub_sequence(position: &Position) -> i64 {
    i64::try_from(position.sub_sequence).unwrap_or(i64::MAX)
}
