//! Position table: the position of each shard, and the epoch of its owner.
//!
//! Invariant: a position moves only by [`move_on`], from exactly the expected position, and only with the current
//! epoch. Acquiring a shard ([`acquire_shard`]) raises the epoch, so an earlier owner's update changes no row.
//!
//! SQLite's numbers are doubles beyond 64 bits, so a sequence number is text, padded with zeros to 129 digits: the
//! order of the texts is then that of the numbers.

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use shardmill_core::masking::sanitized;
use shardmill_core::owner::{OwnerName, Ownership, StateMark};
use shardmill_core::record::{
    PipelineName, Position, PositionRange, SequenceNumber, ShardId, ShardKey, SinkName,
};
use shardmill_core::sink::KeptPosition;

const CREATE: &str = "CREATE TABLE IF NOT EXISTS shardmill_position (
    pipeline TEXT NOT NULL,
    sink TEXT NOT NULL,
    stream TEXT NOT NULL,
    shard TEXT NOT NULL,
    sequence TEXT,
    sub_sequence INTEGER,
    epoch INTEGER NOT NULL,
    state_id TEXT,
    state_number INTEGER,
    owner TEXT,
    PRIMARY KEY (pipeline, sink, stream, shard)
) STRICT, WITHOUT ROWID";

/// Columns that tables of earlier versions do not have: the writer of a position, and its state.
const LATER_COLUMNS: [&str; 3] = ["state_id TEXT", "state_number INTEGER", "owner TEXT"];

const LATER_COLUMNS_THERE: &str = "SELECT count(*) FROM pragma_table_info('shardmill_position')
    WHERE name IN ('state_id', 'state_number', 'owner')";

const ACQUIRE_SHARD: &str = "INSERT INTO shardmill_position
        (pipeline, sink, stream, shard, epoch, state_id, state_number, owner)
    VALUES (?1, ?2, ?3, ?4, 1, ?5, ?6, ?7)
    ON CONFLICT (pipeline, sink, stream, shard) DO UPDATE SET epoch = epoch + 1,
        state_id = excluded.state_id, state_number = excluded.state_number, owner = excluded.owner
    RETURNING epoch, sequence, sub_sequence, owner";

const READ: &str = "SELECT epoch, sequence, sub_sequence, owner FROM shardmill_position
    WHERE pipeline = ?1 AND sink = ?2 AND stream = ?3 AND shard = ?4";

/// The same query for a table of an earlier version.
const READ_NARROW: &str = "SELECT epoch, sequence, sub_sequence, NULL FROM shardmill_position
    WHERE pipeline = ?1 AND sink = ?2 AND stream = ?3 AND shard = ?4";

const READ_ALL: &str =
    "SELECT epoch, sequence, sub_sequence, owner, stream, shard, state_id, state_number
    FROM shardmill_position WHERE pipeline = ?1 AND sink = ?2";

const READ_ALL_NARROW: &str =
    "SELECT epoch, sequence, sub_sequence, NULL, stream, shard, NULL, NULL
    FROM shardmill_position WHERE pipeline = ?1 AND sink = ?2";

const MOVE_ON: &str = "UPDATE shardmill_position SET sequence = ?6, sub_sequence = ?7,
        state_number = coalesce(?10, state_number)
    WHERE pipeline = ?1 AND sink = ?2 AND stream = ?3 AND shard = ?4 AND epoch = ?5
        AND sequence IS ?8 AND sub_sequence IS ?9";

const EXISTS: &str =
    "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'shardmill_position'";

/// Row of a shard.
pub(super) struct Stored {
    pub(super) epoch: i64,
    pub(super) position: Option<Position>,
    /// Owner that wrote it, if known.
    pub(super) owner: Option<OwnerName>,
}

/// Makes the caller the shard's owner: raises the epoch, so that earlier owners cannot move the position any more.
pub(super) fn acquire_shard(
    connection: &mut Connection,
    sink: &SinkName,
    shard: &ShardKey,
    ownership: Option<&Ownership>,
) -> Result<Stored, String> {
    let failed = |error: rusqlite::Error| {
        format!("cannot acquire {} in shardmill_position: {}", shard.shard, sanitized(error))
    };
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
    connection.execute_batch(CREATE).map_err(failed)?;
    widen_if_narrow(connection).map_err(failed)?;
    let (pipeline, stream) = (shard.pipeline.as_str(), shard.stream.key());
    let mark = ownership.map(Ownership::mark);
    let key = params![
        pipeline,
        sink.as_str(),
        stream,
        shard.shard.as_str(),
        mark.as_ref().map(|mark| &*mark.state),
        mark.as_ref().map(|mark| mark.number),
        ownership.map(|own| own.owner.to_text()),
    ];
    let stored = connection.query_row(ACQUIRE_SHARD, key, Stored::of).map_err(failed)?;
    connection.execute_batch("COMMIT").map_err(failed)?;
    Ok(stored)
}

/// Checks that positions can be kept. The caller rolls back the transaction.
pub(super) fn check(connection: &Connection) -> Result<(), String> {
    connection
        .execute_batch(CREATE)
        .and_then(|()| widen_if_narrow(connection))
        .and_then(|()| connection.prepare(ACQUIRE_SHARD).map(drop))
        .and_then(|()| connection.prepare(MOVE_ON).map(drop))
        .map_err(|error| {
            let said = sanitized(error);
            format!("cannot keep positions in table shardmill_position: {said}: rename the table or view of that name")
        })
}

/// Adds the columns that a table of an earlier version does not have.
fn widen_if_narrow(connection: &Connection) -> rusqlite::Result<()> {
    if is_wide(connection)? {
        return Ok(());
    }
    for column in LATER_COLUMNS {
        let there = "SELECT count(*) FROM pragma_table_info('shardmill_position') WHERE name = ?1";
        let name = column.split(' ').next();
        if connection.query_row(there, [name], |row| row.get::<_, i64>(0))? == 0 {
            connection
                .execute_batch(&format!("ALTER TABLE shardmill_position ADD COLUMN {column}"))?;
        }
    }
    Ok(())
}

/// Returns whether the table has all columns.
fn is_wide(connection: &Connection) -> rusqlite::Result<bool> {
    let there: i64 = connection.query_row(LATER_COLUMNS_THERE, [], |row| row.get(0))?;
    Ok(there == LATER_COLUMNS.len() as i64)
}

/// Reads all rows of a sink of a pipeline; none if the table is missing.
pub(super) fn read_all(
    connection: &mut Connection,
    sink: &SinkName,
    pipeline: &PipelineName,
) -> Result<Vec<KeptPosition>, String> {
    let read = || -> rusqlite::Result<Vec<KeptPosition>> {
        if connection.query_row(EXISTS, [], |row| row.get::<_, i64>(0))? == 0 {
            return Ok(Vec::new());
        }
        let sql = if is_wide(connection)? { READ_ALL } else { READ_ALL_NARROW };
        let mut query = connection.prepare(sql)?;
        let kept = query.query_map([pipeline.as_str(), sink.as_str()], |row| {
            let stored = Stored::of(row)?;
            let (state, number) = (row.get::<_, Option<String>>(6)?, row.get(7)?);
            let mark = state.zip(number);
            Ok(KeptPosition {
                stream: row.get(4)?,
                shard: ShardId::new(row.get::<_, String>(5)?),
                position: stored.position,
                mark: mark.map(|(state, number)| StateMark { state: state.into(), number }),
                owner: stored.owner,
            })
        })?;
        kept.collect()
    };
    read().map_err(|error| format!("cannot read shardmill_position: {}", sanitized(error)))
}

/// Reads the shard's row; `None` if it or the table is missing.
pub(super) fn read_if_any(
    connection: &mut Connection,
    sink: &SinkName,
    shard: &ShardKey,
) -> Result<Option<Stored>, String> {
    connection
        .query_row(EXISTS, [], |row| row.get::<_, i64>(0))
        .and_then(|tables| if tables == 0 { Ok(None) } else { read(connection, sink, shard) })
        .map_err(|error| format!("cannot read shardmill_position: {}", sanitized(error)))
}

/// Reads the shard's row; `None` if it is missing.
pub(super) fn read(
    connection: &Connection,
    sink: &SinkName,
    shard: &ShardKey,
) -> rusqlite::Result<Option<Stored>> {
    let (pipeline, stream) = (shard.pipeline.as_str(), shard.stream.key());
    let key = params![pipeline, sink.as_str(), stream, shard.shard.as_str()];
    let sql = if is_wide(connection)? { READ } else { READ_NARROW };
    connection.prepare_cached(sql)?.query_row(key, Stored::of).optional()
}

/// Moves a shard's row from the sink's former name to its new one. Does nothing if there is no such row. Raises the
/// epoch, so that an owner under the former name cannot commit any more.
pub(super) fn adopt(
    connection: &mut Connection,
    (old, new): (&SinkName, &SinkName),
    shard: &ShardKey,
) -> Result<(), String> {
    if read_if_any(connection, old, shard)?.is_none() {
        return Ok(());
    }
    let failed = |error: rusqlite::Error| {
        format!(
            "cannot move {} of sink {old} in shardmill_position: {}",
            shard.shard,
            sanitized(error)
        )
    };
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
    if read(connection, new, shard).map_err(failed)?.is_some_and(|own| own.position.is_some()) {
        return Err(format!(
            "shardmill_position has rows of both sink {old} and sink {new} for shard {}: delete the wrong one",
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

/// Moves the position over a range. Returns false if the position is not the range's start, or the epoch is not ours.
pub(super) fn move_on(
    connection: &Connection,
    (sink, shard): (&SinkName, &ShardKey),
    epoch: i64,
    range: &PositionRange,
    ownership: Option<&Ownership>,
) -> rusqlite::Result<bool> {
    let from = range.from_exclusive.as_ref();
    let moved = connection.prepare_cached(MOVE_ON)?.execute(params![
        shard.pipeline.as_str(),
        sink.as_str(),
        shard.stream.key(),
        shard.shard.as_str(),
        epoch,
        range.to_inclusive.sequence.zero_padded(),
        sub_sequence(&range.to_inclusive),
        from.map(|from| from.sequence.zero_padded()),
        from.map(sub_sequence),
        ownership.map(|own| own.mark().number),
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
        let owner: Option<String> = row.get(3)?;
        let owner = owner.as_deref().and_then(OwnerName::parse);
        Ok(Self { epoch: row.get(0)?, position, owner })
    }
}

/// Returns a sub-sequence number as the column has it. An aggregate has at most some millions of records, so it fits.
fn sub_sequence(position: &Position) -> i64 {
    i64::try_from(position.sub_sequence).unwrap_or(i64::MAX)
}
