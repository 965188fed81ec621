//! Redrives: dead letters that are run through the pipeline once more.
//!
//! A redrive is a shard of its own. Its records are dead letters, numbered from 1 (ordinals) in the order of their
//! records. So everything that a shard has works for it: sinks keep positions of it, it has a checkpoint, and a
//! redrive that was interrupted continues where it was. An item that fails again is first a dead letter of the
//! redrive's shard.
//!
//! **Invariant.** Until [`Redrives::finish`], the original dead letters stay as they are, so that an interrupted
//! redrive loses nothing. `finish` changes all of them in one transaction, and only after the checkpoint of the
//! redrive has reached its last ordinal and no dead letter of it is pending: then each has an outcome.
//!
//! | a dead letter in the redrive | after `finish` |
//! |---|---|
//! | went through | deleted; at a stage, a mark stays while a lane may replay its record (`forget` in `dead_letters.rs`) |
//! | failed again at the same place | keeps its number, with the newest reason and plugin |
//! | failed elsewhere, or became several items that failed | new dead letters of its own record, with `output` from 2^31 on |
//! | enters at a place that is gone (`without`) | stays in the redrive, as its rest |
//!
//! **Doubled rows.** Sinks may have got a dead letter's rows from an interrupted redrive or a replay. The table
//! `letter_delivered` notes that per dead letter and sink, and a redrive leaves these sinks out.
//!
//! **Races.** The redrive runs beside the pipeline, which may write new dead letters: `begin` selects its own once.
//! A purge leaves out those that an interrupted redrive has. A sink or stage may be gone when an interrupted redrive
//! continues: `release` takes the dead letters that enter there out of it. `leave_out` takes one out whose payload
//! cannot be computed again. Both note which sinks have their rows.

use std::collections::HashSet;
use std::num::ParseIntError;

use rusqlite::{OptionalExtension as _, Transaction};

use super::DeadLetterFilter;
use super::damaged;
use super::dead_letter_store::{AS_DIGEST, AS_ORIGINAL, KEPT, StagesRun, unknown_kind};
use super::dead_letters::{MATCHES, forget, wanted};
use super::redrive_key::{ARN_PREFIX, is_redrive_key};
use super::store::{StateError, StateStore, now_ms, position};
use shardmill_core::record::{
    DeadLetterPlace, PipelineName, Position, REDRIVE_SHARD, RouteName, SequenceNumber, ShardId,
    ShardKey, SinkName, StreamIdentity,
};

/// Name of the stream of a redrive.
pub const REDRIVE_STREAM: &str = "letters";
/// First `output` number of dead letters that a redrive made. A replay of the record counts its items from 0, and
/// must not take one of them for these.
const OUTPUT_OF_REDRIVE: u32 = 1 << 31;

/// Id of a redrive: its start in milliseconds since 1970. Its positions are keyed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedriveId(i64);

impl RedriveId {
    /// Returns the stream whose records are its dead letters.
    pub fn stream(self, pipeline: &PipelineName) -> StreamIdentity {
        let arn = format!("{ARN_PREFIX}{pipeline}").into();
        StreamIdentity { name: REDRIVE_STREAM.into(), arn, created_ms: self.0 }
    }

    /// Returns its shard.
    pub fn shard(self) -> ShardId {
        ShardId::from(REDRIVE_SHARD)
    }

    fn key(self, pipeline: &PipelineName) -> ShardKey {
        ShardKey {
            pipeline: pipeline.clone(),
            stream: self.stream(pipeline).into(),
            shard: self.shard(),
        }
    }
}

/// Whether a stream consists of the dead letters of a redrive.
pub fn is_redrive(stream: &StreamIdentity) -> bool {
    is_redrive_key(&stream.arn)
}

/// A redrive that still has dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnfinishedRedrive {
    /// Its id.
    pub id: RedriveId,
    /// It was finished without some places that are gone. The dead letters that enter there are left, and block
    /// nothing.
    pub is_rest: bool,
}

/// A dead letter in a redrive.
#[derive(Clone, Debug)]
pub struct RedriveRecord {
    /// Its ordinal in the redrive, from 1.
    pub ordinal: u64,
    /// The place where it failed, and enters again.
    pub place: DeadLetterPlace,
    /// The route by which it reached that place; empty: unknown.
    pub route: RouteName,
    /// Position of its record in its own shard.
    pub origin: Position,
    /// The partition key that entered the place.
    pub key: Vec<u8>,
    /// The payload that entered the place.
    pub payload: Vec<u8>,
    /// Set if key and payload are kept as a digest only: they must be computed again.
    pub lost: Option<Box<LostPayload>>,
    /// Rows that it becomes cannot be computed again, so their dead letters keep them whole.
    pub keeps_whole: bool,
    /// When the stream took the record, in milliseconds since 1970.
    pub arrived_ms: u64,
    /// Sinks that already have its rows.
    pub delivered_to: Vec<SinkName>,
}

/// The inputs for computing a payload again that is kept as a digest.
#[derive(Clone, Debug)]
pub struct LostPayload {
    /// Number of the dead letter.
    pub dead_letter: i64,
    /// The shard of its record.
    pub shard: ShardId,
    /// The partition key that the record was put with.
    pub partition_key: Vec<u8>,
    /// The record's data as it was put.
    pub original: Vec<u8>,
    /// Expected digest of the key and payload that entered.
    pub sha256: String,
    /// The runs that produced it, in order.
    pub steps: Vec<StagesRun>,
}

/// Counts of a finished redrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Redriven {
    /// Dead letters that were redriven.
    #[serde(rename = "letters")]
    pub dead_letters: u64,
    /// Dead letters that exist instead of them: one may fail again, or become rows of which several fail.
    pub failed_again: u64,
    /// Dead letters that were left out and stay, because the place that they enter is gone.
    pub left: u64,
}

/// The redrives of a pipeline.
#[derive(Clone)]
pub struct Redrives {
    store: StateStore,
    pipeline: PipelineName,
}

impl Redrives {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore, pipeline: PipelineName) -> Self {
        Self { store, pipeline }
    }

    /// Lists the redrives that still have dead letters, oldest first. At most one was interrupted, the others are
    /// rests.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn unfinished(&self) -> Result<Vec<UnfinishedRedrive>, StateError> {
        self.store
            .transact("look for redrives", |state| {
                // A rest whose dead letters were all purged is finished.
                state.execute(
                    "DELETE FROM redrive_rest WHERE id NOT IN (SELECT id FROM redrive)",
                    [],
                )?;
                let mut query = state.prepare(
                    "SELECT DISTINCT id, EXISTS(SELECT 1 FROM redrive_rest own WHERE own.id = r.id)
                     FROM redrive r ORDER BY id",
                )?;
                let found = query.query_map([], |row| {
                    Ok(UnfinishedRedrive { id: RedriveId(row.get(0)?), is_rest: row.get(1)? })
                })?;
                found.collect()
            })
            .await
    }

    /// Whether a lane of the redrive has started: sinks may already have some of its rows.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn has_run(&self, id: RedriveId) -> Result<bool, StateError> {
        let (stream, _) = self.redrive_key(id);
        self.store
            .transact("check whether a redrive has run", move |state| {
                let begun = "SELECT EXISTS(SELECT 1 FROM shard WHERE stream = ?1)
                             OR EXISTS(SELECT 1 FROM sink_position WHERE stream = ?1)";
                state.query_row(begun, [stream], |row| row.get(0))
            })
            .await
    }

    /// Stores the sinks that a redrive is about to run with.
    ///
    /// # Errors
    /// [`StateError`]; it must not run then.
    pub async fn note_sinks(&self, id: RedriveId, sinks: Vec<SinkName>) -> Result<(), StateError> {
        self.store
            .transact("store the sinks of a redrive", move |state| {
                let mut insert =
                    state.prepare_cached("INSERT OR IGNORE INTO redrive_sink VALUES (?1, ?2)")?;
                sinks.iter().try_for_each(|sink| insert.execute((id.0, sink.as_str())).map(drop))
            })
            .await
    }

    /// Lists the sinks that the redrive has run with and that may lack some of its rows, as far as the state knows.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn lagging_sinks(&self, id: RedriveId) -> Result<Vec<SinkName>, StateError> {
        let (stream, _) = self.redrive_key(id);
        self.store
            .transact("read the sinks of a redrive", move |state| {
                let mut query = state.prepare(
                    "SELECT sink FROM redrive_sink WHERE id = ?1 AND NOT EXISTS (
                         SELECT 1 FROM sink_position p
                         WHERE p.stream = ?2 AND p.sink = redrive_sink.sink
                         AND CAST(ltrim(p.sequence, '0') AS INTEGER) >=
                             (SELECT max(ordinal) FROM redrive WHERE id = ?1))
                     ORDER BY sink",
                )?;
                let sinks = query.query_map((id.0, stream), |row| row.get::<_, String>(0))?;
                sinks.map(|sink| sink.map(SinkName::from)).collect()
            })
            .await
    }

    /// Takes dead letters out of a redrive that enter at `places`, which are gone, unless all sinks of `positions`
    /// have run them. `positions`: how far each sink is with the redrive. They become ordinary dead letters again;
    /// the sinks that have their rows are noted, so that a later redrive leaves these out.
    ///
    /// # Errors
    /// [`StateError`]; the redrive is unchanged.
    pub async fn release(
        &self,
        id: RedriveId,
        places: Vec<String>,
        positions: Vec<(SinkName, Option<Position>)>,
    ) -> Result<(), StateError> {
        let (stream, _) = self.redrive_key(id);
        let reached = self.reached(&positions, "leave dead letters out of a redrive")?;
        self.store
            .transact("leave dead letters out of a redrive", move |state| {
                // Dead letters that every sink has run are complete: `finish` resolves them.
                let all_have = reached.iter().map(|(_, reached)| *reached).min().unwrap_or(0);
                let places = serde_json::Value::from(places).to_string();
                let mut released = state.prepare(
                    "SELECT letter, ordinal FROM redrive JOIN letters d ON d.rowid = letter
                     WHERE redrive.id = ?1 AND ordinal > ?2 AND place IN (SELECT value FROM json_each(?3))",
                )?;
                let released = released
                    .query_map((id.0, all_have, places), |row| Ok((row.get(0)?, row.get(1)?)))?;
                let released: Vec<(i64, u64)> = released.collect::<rusqlite::Result<_>>()?;
                for (dead_letter, ordinal) in released {
                    for (sink, _) in reached.iter().filter(|(_, reached)| *reached >= ordinal) {
                        state.execute(
                            "INSERT OR IGNORE INTO letter_delivered VALUES (?1, ?2)",
                            (dead_letter, sink.as_str()),
                        )?;
                    }
                    // Its failures in this redrive go with it: they come again when it is redriven.
                    state.execute(
                        "DELETE FROM letters WHERE stream = ?1
                         AND CAST(ltrim(sequence, '0') AS INTEGER) = ?2",
                        (&stream, ordinal),
                    )?;
                    state.execute("DELETE FROM redrive WHERE letter = ?1", [dead_letter])?;
                }
                Ok(())
            })
            .await
    }

    /// Begins a redrive of the visible dead letters that match a filter; `None` if there are none. They stay where
    /// they are until it is finished.
    ///
    /// # Errors
    /// [`StateError`]; nothing was begun.
    pub async fn begin(&self, filter: DeadLetterFilter) -> Result<Option<RedriveId>, StateError> {
        let (place, shard, reason, ids) = wanted(filter);
        self.store
            .transact("begin a redrive", move |state| {
                // The id must be new, even if two redrives begin within one millisecond or the clock was set back.
                let last: Option<i64> =
                    state.query_row("SELECT max(id) FROM redrive", [], |row| row.get(0))?;
                let id = now_ms().max(last.map_or(0, |last| last + 1));
                let begun = state.execute(
                    &format!(
                        "INSERT INTO redrive SELECT ?5, row_number() OVER
                             (ORDER BY stream, shard, sequence, sub_sequence, place, output), rowid
                         FROM letters WHERE {MATCHES}
                         AND rowid NOT IN (SELECT letter FROM redrive)"
                    ),
                    (place, shard, reason, ids, id),
                )?;
                Ok((begun > 0).then_some(RedriveId(id)))
            })
            .await
    }

    /// Counts the dead letters matching a filter that came from an older copy of the state with which the pipeline
    /// went on: they may have been redriven since that copy was made.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn doubtful(&self, filter: DeadLetterFilter) -> Result<u64, StateError> {
        let wanted = wanted(filter);
        self.store
            .transact("read the dead letters", move |state| {
                let count = format!(
                    "SELECT count(*) FROM letters WHERE {MATCHES}
                     AND rowid <= coalesce((SELECT max(up_to) FROM doubtful_letters), 0)"
                );
                state.query_row(&count, wanted, |row| row.get(0))
            })
            .await
    }

    /// Lists the places at which a redrive's dead letters enter, as text, each once.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn places(&self, id: RedriveId) -> Result<Vec<String>, StateError> {
        self.store
            .transact("read a redrive", move |state| {
                let mut query = state.prepare(
                    "SELECT DISTINCT place FROM redrive JOIN letters d ON d.rowid = letter
                     WHERE redrive.id = ?1 ORDER BY place",
                )?;
                query.query_map([id.0], |row| row.get(0))?.collect()
            })
            .await
    }

    /// Whether the redrive has dead letters whose payload is kept as a digest only.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn has_digests(&self, id: RedriveId) -> Result<bool, StateError> {
        self.store
            .transact("read a redrive", move |state| {
                let query = "SELECT EXISTS(SELECT 1 FROM redrive JOIN letters d ON d.id = letter
                             WHERE redrive.id = ?1 AND d.entered_kind = 2)";
                state.query_row(query, [id.0], |row| row.get(0))
            })
            .await
    }

    /// Reads dead letters of a redrive after the ordinal `after`, in order: at most `limit`, and none after the one
    /// with which the sum of their sizes exceeds `bytes`. The size counts payloads, keys, and the records that
    /// payloads are computed from. Purged ones are skipped, and those that enter at the places of `without`.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn dead_letters(
        &self,
        id: RedriveId,
        after: u64,
        (limit, bytes): (usize, usize),
        without: &[String],
    ) -> Result<Vec<RedriveRecord>, StateError> {
        let without = serde_json::Value::from(without).to_string();
        self.store
            .transact("read the dead letters of a redrive", move |state| {
                let mut query = state.prepare_cached(
                    // The sizes are added up before anything is read: together, the payloads may exceed the memory.
                    // A record of 10 MiB is read once for each of its dead letters that is kept as a digest,
                    // however small its payload was.
                    "WITH next AS (
                         SELECT ordinal, letter, length(d.entered) + length(d.entered_key)
                             + coalesce(length(r.original) + length(r.partition_key), 0)
                             + CASE d.entered_kind WHEN 2 THEN d.entered_bytes ELSE 0 END AS bytes
                         FROM redrive JOIN letters d ON d.id = letter
                         LEFT JOIN letter_record r ON r.id = d.record AND d.entered_kind <> 0
                         WHERE redrive.id = ?1 AND ordinal > ?2
                             AND place NOT IN (SELECT value FROM json_each(?5))
                         ORDER BY ordinal LIMIT ?3),
                     sized AS (
                         SELECT ordinal, letter, sum(bytes) OVER (ORDER BY ordinal) - bytes AS before
                         FROM next)
                     SELECT ordinal, place, route, d.sequence, d.sub_sequence, entered_key, entered,
                         arrived_ms, (SELECT json_group_array(sink) FROM letter_delivered own
                             WHERE own.letter = d.id),
                         entered_kind, entered_digest, made, d.shard, r.partition_key, r.original, d.id
                     FROM sized JOIN letters d ON d.id = letter
                     LEFT JOIN letter_record r ON r.id = d.record AND d.entered_kind <> 0
                     WHERE before <= ?4 ORDER BY ordinal",
                )?;
                let dead_letters = query.query_map((id.0, after, limit, bytes, without), |row| {
                    let place: String = row.get(1)?;
                    let place = DeadLetterPlace::parse(&place).ok_or_else(|| {
                        let cause = format!("invalid place {place:?} of a dead letter: expected stage:NAME or sink:NAME");
                        rusqlite::Error::FromSqlConversionFailure(
                            1,
                            rusqlite::types::Type::Text,
                            cause.into(),
                        )
                    })?;
                    let delivered_to: String = row.get(8)?;
                    let mut delivered_to: Vec<SinkName> = serde_json::from_str(&delivered_to)
                        .map_err(|error| {
                            rusqlite::Error::FromSqlConversionFailure(
                                8,
                                rusqlite::types::Type::Text,
                                error.into(),
                            )
                        })?;
                    delivered_to.sort_unstable();
                    let kind: u8 = row.get(9)?;
                    let record = |column: usize| -> rusqlite::Result<Vec<u8>> {
                        row.get::<_, Option<Vec<u8>>>(column).map(Option::unwrap_or_default)
                    };
                    let (key, payload) = match kind {
                        AS_ORIGINAL => (record(13)?, record(14)?),
                        KEPT | AS_DIGEST => (row.get(5)?, row.get(6)?),
                        other => return Err(unknown_kind(9, other)),
                    };
                    let made: String = row.get(11)?;
                    let lost = match kind {
                        AS_DIGEST => Some(Box::new(LostPayload {
                            dead_letter: row.get(15)?,
                            shard: ShardId::from(row.get::<_, String>(12)?),
                            partition_key: record(13)?,
                            original: record(14)?,
                            sha256: row.get(10)?,
                            steps: steps(&made)?,
                        })),
                        _ => None,
                    };
                    Ok(RedriveRecord {
                        keeps_whole: kind == KEPT && made.is_empty(),
                        lost,
                        delivered_to,
                        ordinal: row.get(0)?,
                        place,
                        route: row.get::<_, String>(2)?.into(),
                        origin: position(row.get(3)?, row.get(4)?)?,
                        key,
                        payload,
                        arrived_ms: row.get(7)?,
                    })
                })?;
                dead_letters.collect()
            })
            .await
    }

    /// Takes one dead letter out of a redrive: it stays as it is, for the sinks that do not have its rows.
    /// `reached`: how far each sink was when this run of the redrive began, by its own account.
    ///
    /// # Errors
    /// [`StateError`]; the redrive is unchanged.
    pub async fn leave_out(
        &self,
        id: RedriveId,
        dead_letter: i64,
        reached: Vec<(SinkName, Option<Position>)>,
    ) -> Result<(), StateError> {
        let (stream, _) = self.redrive_key(id);
        let action = "leave a dead letter out of a redrive";
        let reached = self.reached(&reached, action)?;
        self.store
            .transact(action, move |state| {
                let own = "SELECT ordinal FROM redrive WHERE id = ?1 AND letter = ?2";
                let ordinal: Option<u64> =
                    state.query_row(own, (id.0, dead_letter), |row| row.get(0)).optional()?;
                let Some(ordinal) = ordinal else { return Ok(()) };
                for (sink, reached) in &reached {
                    if *reached >= ordinal {
                        state.execute(
                            "INSERT OR IGNORE INTO letter_delivered VALUES (?1, ?2)",
                            (dead_letter, sink.as_str()),
                        )?;
                    }
                }
                // Sinks may have got further in this run: their positions in the state say so.
                state.execute(
                    "INSERT OR IGNORE INTO letter_delivered
                     SELECT ?2, sink FROM sink_position WHERE stream = ?1
                         AND CAST(ltrim(sequence, '0') AS INTEGER) >= ?3",
                    (&stream, dead_letter, ordinal),
                )?;
                state.execute(
                    "DELETE FROM letters WHERE stream = ?1
                     AND CAST(ltrim(sequence, '0') AS INTEGER) = ?2",
                    (&stream, ordinal),
                )?;
                state
                    .execute(
                        "DELETE FROM redrive WHERE id = ?1 AND letter = ?2",
                        (id.0, dead_letter),
                    )
                    .map(drop)
            })
            .await
    }

    /// Cancels a redrive of which nothing has run: its dead letters are as if it had not begun.
    ///
    /// # Errors
    /// [`StateError`]; it still exists then.
    pub async fn cancel(&self, id: RedriveId) -> Result<(), StateError> {
        self.store
            .transact("cancel a redrive", move |state| {
                state.execute("DELETE FROM redrive_sink WHERE id = ?1", [id.0])?;
                state.execute("DELETE FROM redrive WHERE id = ?1", [id.0])
            })
            .await
            .map(drop)
    }

    /// Finishes a redrive. All of its dead letters must have an outcome in the sinks or as dead letters, except
    /// those that enter at the places of `without`, which stay as its rest. `None`: some have no outcome yet, so it
    /// must run again.
    ///
    /// # Errors
    /// [`StateError`]; the redrive is still unfinished, and nothing of it is lost or run twice.
    pub async fn finish(
        &self,
        id: RedriveId,
        without: &[String],
    ) -> Result<Option<Redriven>, StateError> {
        let key = self.redrive_key(id);
        let without = serde_json::Value::from(without).to_string();
        self.store
            .transact("finish a redrive", move |state| finish(state, id, &key, &without))
            .await
    }

    /// Returns the key of a redrive's positions.
    pub fn key(&self, id: RedriveId) -> ShardKey {
        id.key(&self.pipeline)
    }

    /// Converts each sink's position in a redrive to the ordinal that it reached.
    fn reached(
        &self,
        positions: &[(SinkName, Option<Position>)],
        action: &'static str,
    ) -> Result<Vec<(SinkName, u64)>, StateError> {
        let reached = positions.iter().map(|(sink, at)| {
            let ordinal = ordinal_of(at.as_ref()).map_err(|error| {
                let at = at.as_ref().map(Position::to_string).unwrap_or_default();
                let cause = format!(
                    "invalid position {at} of sink {sink}: expected the number of a dead letter: {error}"
                );
                self.store.unreadable(action, cause, damaged::WAY_OUT)
            })?;
            Ok((sink.clone(), ordinal))
        });
        reached.collect()
    }

    fn redrive_key(&self, id: RedriveId) -> (String, String) {
        let key = self.key(id);
        (key.stream.key(), key.shard.to_string())
    }
}

/// Returns the ordinal at a position of a redrive; 0 before the first.
fn ordinal_of(at: Option<&Position>) -> Result<u64, ParseIntError> {
    at.map_or(Ok(0), |at| at.sequence.as_str().parse())
}

/// Parses the stored runs that produced a payload.
fn steps(json: &str) -> rusqlite::Result<Vec<StagesRun>> {
    serde_json::from_str(json).map_err(|error| {
        let cause = format!("invalid column made of a dead letter: {error}");
        let text = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(11, text, cause.into())
    })
}

/// Returns, as JSON, the runs that led from the original record to a dead letter that a redrive made: those of
/// `origin`, then the redrive's own. Empty: they are unknown, and the payload is kept whole.
fn joined_steps(state: &Transaction<'_>, origin: i64, own: &str) -> rusqlite::Result<String> {
    let query = "SELECT entered_kind, made FROM letters WHERE id = ?1";
    let (kind, before): (u8, String) =
        state.query_row(query, [origin], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if own.is_empty() || kind == AS_ORIGINAL {
        return Ok(own.to_owned());
    }
    if before.is_empty() {
        return Ok(String::new());
    }
    let joined = [steps(&before)?, steps(own)?].concat();
    // Text only: serialising it cannot fail.
    Ok(serde_json::to_string(&joined).unwrap_or_default())
}

fn finish(
    state: &Transaction<'_>,
    id: RedriveId,
    (stream, shard): &(String, String),
    without: &str,
) -> rusqlite::Result<Option<Redriven>> {
    let whole = "SELECT count(*), max(ordinal) FROM redrive JOIN letters d ON d.rowid = letter
                 WHERE redrive.id = ?1 AND place NOT IN (SELECT value FROM json_each(?2))";
    let (dead_letters, last): (u64, Option<u64>) =
        state.query_row(whole, (id.0, without), |row| Ok((row.get(0)?, row.get(1)?)))?;
    // The checkpoint must have reached the last ordinal: every sink has everything. A pending dead letter may still
    // be deleted, if its row turns out to be in the sink.
    let reached = "SELECT sequence, sub_sequence FROM shard
                   WHERE stream = ?1 AND shard = ?2 AND sequence IS NOT NULL";
    let reached = state
        .query_row(reached, (stream, shard), |row| position(row.get(0)?, row.get(1)?))
        .optional()?;
    let pending = "SELECT count(*) FROM letters WHERE stream = ?1 AND shard = ?2 AND held <> 0
                  AND place NOT IN (SELECT value FROM json_each(?3))";
    let pending: u64 = state.query_row(pending, (stream, shard, without), |row| row.get(0))?;
    let end = last.map(|last| Position { sequence: SequenceNumber::from(last), sub_sequence: 0 });
    if reached < end || pending > 0 {
        return Ok(None);
    }
    // Every dead letter of the redrive's shard, with the original that it came from.
    let mut failed = state.prepare(
        "SELECT f.rowid, f.sequence, f.place, o.rowid, o.place, f.made
         FROM letters f
         JOIN redrive r ON r.id = ?3 AND r.ordinal = CAST(ltrim(f.sequence, '0') AS INTEGER)
         JOIN letters o ON o.rowid = r.letter
         WHERE f.stream = ?1 AND f.shard = ?2
             AND o.place NOT IN (SELECT value FROM json_each(?4)) ORDER BY f.sequence, f.output",
    )?;
    let failed = failed.query_map((stream, shard, id.0, without), |row| {
        Ok((row.get(0)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?))
    })?;
    let failed: Vec<(i64, String, i64, String, String)> =
        failed.collect::<rusqlite::Result<_>>()?;
    let mut kept = HashSet::new();
    let failed_again = failed.len() as u64;
    // First the new failures get their place, then everything else of the redrive is deleted: an original that
    // failed again at its own place must be known by then (`kept`).
    for (dead_letter, place, origin, origin_place, made) in failed {
        // A sink that has the rows of the original has those of the new dead letter too.
        state.execute(
            "INSERT OR IGNORE INTO letter_delivered
             SELECT ?1, sink FROM letter_delivered WHERE letter = ?2",
            (dead_letter, origin),
        )?;
        // The original dead letter knows the record as it was put; the redrive saw its ordinal instead.
        state.execute(
            "UPDATE letters SET made = ?3, (record, arrived_ms) =
                 (SELECT record, arrived_ms FROM letters WHERE rowid = ?2)
             WHERE rowid = ?1",
            (dead_letter, origin, joined_steps(state, origin, &made)?),
        )?;
        if place == origin_place && kept.insert(origin) {
            // It failed in the same way: the original keeps its number and gets the newest reason.
            state.execute(
                "UPDATE letters SET (plugin, digest, reason, backtrace, written_ms) =
                     (SELECT plugin, digest, reason, backtrace, written_ms FROM letters
                      WHERE rowid = ?1)
                 WHERE rowid = ?2",
                (dead_letter, origin),
            )?;
            state.execute("DELETE FROM letters WHERE rowid = ?1", [dead_letter])?;
            continue;
        }
        // It becomes a dead letter of the original record, numbered after those that a redrive made before. No item
        // of a first run has such a number: a replay counts its items from 0, and would otherwise replace this dead
        // letter.
        state.execute(
            "UPDATE letters AS f SET (stream, shard, sequence, sub_sequence, output) =
                 (SELECT o.stream, o.shard, o.sequence, o.sub_sequence, coalesce((
                     SELECT max(n.output) + 1 FROM letters n
                     WHERE (n.stream, n.shard, n.sequence, n.sub_sequence) =
                         (o.stream, o.shard, o.sequence, o.sub_sequence)
                         AND n.place = f.place AND n.output >= ?3), ?3)
                  FROM letters o WHERE o.rowid = ?2)
             WHERE f.rowid = ?1",
            (dead_letter, origin, OUTPUT_OF_REDRIVE),
        )?;
    }
    let mut gone = state.prepare(
        "SELECT letter FROM redrive JOIN letters d ON d.rowid = letter
         WHERE redrive.id = ?1 AND place NOT IN (SELECT value FROM json_each(?2))",
    )?;
    let gone: Vec<i64> =
        gone.query_map((id.0, without), |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    for dead_letter in gone {
        // Only taken out of the redrive: it failed again and stays.
        if kept.contains(&dead_letter) {
            state.execute("DELETE FROM redrive WHERE letter = ?1", [dead_letter])?;
        } else {
            // This deletes it from the redrive too.
            forget(state, dead_letter)?;
        }
    }
    let left: u64 =
        state.query_row("SELECT count(*) FROM redrive WHERE id = ?1", [id.0], |row| row.get(0))?;
    if left > 0 {
        // The sinks' positions stay, so that rows which they have are not written again when the rest runs. The
        // checkpoint does not: the rest may lie before it.
        state.execute("INSERT OR IGNORE INTO redrive_rest VALUES (?1)", [id.0])?;
        state.execute("DELETE FROM shard WHERE stream = ?1", [stream])?;
        state.execute("DELETE FROM ledger WHERE stream = ?1", [stream])?;
        state.execute("DELETE FROM sink_removed WHERE stream = ?1", [stream])?;
        return Ok(Some(Redriven { dead_letters, failed_again, left }));
    }
    state.execute("DELETE FROM redrive_rest WHERE id = ?1", [id.0])?;
    state.execute("DELETE FROM redrive_sink WHERE id = ?1", [id.0])?;
    // Nothing reads its positions again, and the revision that ran it need not be kept.
    for table in ["shard", "sink_position", "sink_owner", "given_up", "sink_removed", "ledger"] {
        state.execute(&format!("DELETE FROM {table} WHERE stream = ?1"), [stream])?;
    }
    Ok(Some(Redriven { dead_letters, failed_again, left: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checkpoints, DeadLetter, DeadLetterKey, DeadLetters, MadeBy};
    use shardmill_core::record::ShardStart;

    #[tokio::test]
    async fn a_record_that_went_through_is_not_rerun_by_a_replay() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let dead_letters = DeadLetters::new(store.clone());
        let pipeline = PipelineName::from("cars");
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let shard =
            ShardKey { pipeline: pipeline.clone(), stream: stream.into(), shard: "shard".into() };
        let at = |n: u64| Position { sequence: SequenceNumber::from(n), sub_sequence: 0 };
        let key = DeadLetterKey {
            position: at(7),
            place: DeadLetterPlace::Stage("decode".into()),
            output: 0,
        };
        let dead_letter = DeadLetter {
            key: key.clone(),
            partition_key: "k".into(),
            original: "o".into(),
            entered_key: "k".into(),
            entered: "e".into(),
            route: "records".into(),
            arrived_ms: 1,
            plugin: "".into(),
            digest: "".into(),
            reason: "no JSON".into(),
            backtrace: String::new(),
            made: MadeBy::at_source("revision"),
        };
        dead_letters.put(&shard, vec![dead_letter], false).await.expect("written");
        let redrives = Redrives::new(store.clone(), pipeline.clone());
        let id =
            redrives.begin(DeadLetterFilter::default()).await.expect("begun").expect("a letter");
        assert_eq!(dead_letters.purge(DeadLetterFilter::default()).await.expect("purged"), (0, 1));
        assert_eq!(redrives.finish(id, &[]).await.expect("asked"), None, "nothing has run");
        let own = id.key(&pipeline);
        let checkpoints = Checkpoints::new(store);
        checkpoints.begin(&own, &ShardStart::Horizon).await.expect("begun");
        checkpoints.advance(&own, Vec::new(), Some(at(1)), false).await.expect("advanced");
        let redriven = redrives.finish(id, &[]).await.expect("finished");
        assert_eq!(redriven, Some(Redriven { dead_letters: 1, failed_again: 0, left: 0 }));
        assert_eq!(dead_letters.count().await.expect("counted"), 0);
        // The mark counts while a sink stands before the record, and no longer.
        for (above, expected) in [(at(6), true), (at(7), false), (at(6), false)] {
            let to = dead_letters.dead_lettered_to(&shard, Some(&above)).await.expect("read");
            let dead_lettered =
                dead_letters.dead_lettered_within(&shard, (&at(1), &at(9))).await.expect("read");
            assert_eq!(
                (to, dead_lettered.contains(&key)),
                (expected.then(|| at(7)), expected),
                "above {above}"
            );
        }
    }

    /// Small payloads that are each computed from a record of 1 MiB, and keys of 1 MiB.
    #[tokio::test]
    async fn wall_04_a_redrive_reads_no_more_bytes_at_once_than_it_may() {
        const MIB: usize = 1 << 20;
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let dead_letters = DeadLetters::new(store.clone());
        let pipeline = PipelineName::from("cars");
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let shard =
            ShardKey { pipeline: pipeline.clone(), stream: stream.into(), shard: "shard".into() };
        let dead_letter = |number: u64, output: u32, entered_key: Vec<u8>, entered: Vec<u8>| {
            let position = Position { sequence: SequenceNumber::from(number), sub_sequence: 0 };
            DeadLetter {
                key: DeadLetterKey {
                    position,
                    place: DeadLetterPlace::Stage("decode".into()),
                    output,
                },
                partition_key: "k".into(),
                original: vec![b'o'; MIB].into(),
                entered_key: entered_key.into(),
                entered: entered.into(),
                route: "records".into(),
                arrived_ms: 1,
                plugin: "".into(),
                digest: "".into(),
                reason: "no JSON".into(),
                backtrace: String::new(),
                made: MadeBy::at_source("revision"),
            }
        };
        let mut all = vec![dead_letter(1, 0, b"k".to_vec(), vec![b'x'; MIB - 1])];
        all.extend((1..9).map(|output| dead_letter(1, output, b"k".to_vec(), vec![b'x'; 9])));
        all.extend((2..9).map(|number| dead_letter(number, 0, vec![b'k'; MIB - 9], b"x".to_vec())));
        let count = all.len() as u64;
        dead_letters.put(&shard, all, false).await.expect("written");
        let redrives = Redrives::new(store, pipeline);
        let id =
            redrives.begin(DeadLetterFilter::default()).await.expect("begun").expect("letters");
        let (mut after, mut as_digest) = (0, 0);
        while after < count {
            let read = redrives.dead_letters(id, after, (1_000, 2 * MIB), &[]).await.expect("read");
            let bytes = |one: &RedriveRecord| {
                one.payload.len()
                    + one.key.len()
                    + one.lost.as_ref().map_or(0, |lost| lost.original.len())
            };
            let sum: usize = read.iter().map(bytes).sum();
            assert!(sum <= 4 * MIB, "{sum} bytes in {} letters after {after}", read.len());
            as_digest += read.iter().filter(|one| one.lost.is_some()).count();
            after = read.last().expect("a letter").ordinal;
        }
        assert_eq!(as_digest, 8, "letters that are kept as a digest");
    }
}
