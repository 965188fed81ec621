//! Redrives: dead letters that are on their way again.
//!
//! A redrive is a shard of its own, whose records are the letters, numbered in the order of their keys'
//! records; so the sinks keep positions of it, and one that was broken off goes on where it was. What
//! fails again is a letter of that shard first. At the end, in one transaction, it takes the place of
//! the letter that it came from, and the letters that went through are gone.

use std::collections::HashSet;

use rusqlite::{OptionalExtension as _, Transaction};

use super::letters::{MATCHES, REDRIVEN, wanted};
use super::store::{StateError, StateStore, now_ms, position};
use super::{LetterFilter, StoredLetter};
use crate::record::{
    LetterPlace, PipelineName, Position, RouteName, SequenceNumber, ShardId, ShardKey,
    StreamIdentity,
};

/// The one shard of a redrive.
const SHARD: &str = "redrive-000000000000";
/// The name of the stream that letters are.
const STREAM: &str = "letters";
/// The first number of letters that a redrive made among the items that their record has in a place.
const OUTPUT_OF_REDRIVE: u32 = 1 << 31;
/// What its ARN begins with.
const ARN_PREFIX: &str = "letters:";

/// A redrive: when it was begun, in milliseconds since 1970, and what its positions are keyed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedriveId(i64);

impl RedriveId {
    /// The stream that its letters are.
    pub fn stream(self, pipeline: &PipelineName) -> StreamIdentity {
        let arn = format!("{ARN_PREFIX}{pipeline}").into();
        StreamIdentity { name: STREAM.into(), arn, created_ms: self.0 }
    }

    /// Its shard.
    pub fn shard(self) -> ShardId {
        ShardId::from(SHARD)
    }

    fn key(self, pipeline: &PipelineName) -> ShardKey {
        ShardKey {
            pipeline: pipeline.clone(),
            stream: self.stream(pipeline).into(),
            shard: self.shard(),
        }
    }
}

/// Whether a stream is the letters of a redrive.
pub fn is_redrive(stream: &StreamIdentity) -> bool {
    is_redrive_key(&stream.arn)
}

/// The same of its key.
pub(super) fn is_redrive_key(key: &str) -> bool {
    key.starts_with(ARN_PREFIX)
}

impl StoredLetter {
    /// Whether a redrive wrote it that is not finished: then it may go, or become another's.
    pub(super) fn is_of_redrive(&self) -> bool {
        is_redrive_key(&self.stream)
    }
}

/// A letter on its way.
#[derive(Clone, Debug)]
pub struct RedrivenLetter {
    /// Its place in the redrive.
    pub ordinal: u64,
    /// Where it failed, and enters again.
    pub place: LetterPlace,
    /// The route by which it came there; empty: not known.
    pub route: RouteName,
    /// Where its record is in its own shard.
    pub origin: Position,
    /// The partition key that entered there.
    pub key: Vec<u8>,
    /// The payload that entered there.
    pub payload: Vec<u8>,
    /// When the stream took the record, in milliseconds since 1970.
    pub arrived_ms: u64,
}

/// What became of a redrive's letters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Redriven {
    /// Letters that were on their way.
    pub letters: u64,
    /// Letters that are there in their place: a letter may fail again, or have become rows that do.
    pub failed_again: u64,
}

/// The redrives of a pipeline.
#[derive(Clone)]
pub struct Redrives {
    store: StateStore,
    pipeline: PipelineName,
}

impl Redrives {
    /// Over the pipeline's state database.
    pub fn new(store: StateStore, pipeline: PipelineName) -> Self {
        Self { store, pipeline }
    }

    /// The redrive that was broken off, if one was.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn unfinished(&self) -> Result<Option<RedriveId>, StateError> {
        self.store
            .write("look for a redrive", |state| {
                let id = state.query_row("SELECT min(id) FROM redrive", [], |row| row.get(0))?;
                Ok(Option::map(id, RedriveId))
            })
            .await
    }

    /// Begins a redrive of the visible letters that a filter means; `None` where there are none. The
    /// letters stay where they are until it is finished.
    ///
    /// # Errors
    /// [`StateError`]; nothing was begun.
    pub async fn begin(&self, filter: LetterFilter) -> Result<Option<RedriveId>, StateError> {
        let (place, shard, reason, ids) = wanted(filter);
        self.store
            .write("begin a redrive", move |state| {
                let id = now_ms();
                let begun = state.execute(
                    &format!(
                        "INSERT INTO redrive SELECT ?5, row_number() OVER
                             (ORDER BY stream, shard, sequence, sub_sequence, place, output), rowid
                         FROM dead_letter WHERE {MATCHES}"
                    ),
                    (place, shard, reason, ids, id),
                )?;
                Ok((begun > 0).then_some(RedriveId(id)))
            })
            .await
    }

    /// The places that a redrive's letters enter, each once, as text.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn places(&self, id: RedriveId) -> Result<Vec<String>, StateError> {
        self.store
            .write("read a redrive", move |state| {
                let mut query = state.prepare(
                    "SELECT DISTINCT place FROM redrive JOIN dead_letter d ON d.rowid = letter
                     WHERE id = ?1 ORDER BY place",
                )?;
                query.query_map([id.0], |row| row.get(0))?.collect()
            })
            .await
    }

    /// Letters behind `after`, at most `limit`, in order, and none behind the one that passes `bytes` of
    /// payloads. Letters that were purged meanwhile are left out.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn letters(
        &self,
        id: RedriveId,
        after: u64,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<RedrivenLetter>, StateError> {
        self.store
            .write("read a redrive's letters", move |state| {
                let mut query = state.prepare_cached(
                    // By length first: together, payloads may not fit into memory.
                    "WITH next AS (
                         SELECT ordinal, letter, length(entered) AS bytes
                         FROM redrive JOIN dead_letter d ON d.rowid = letter
                         WHERE id = ?1 AND ordinal > ?2 ORDER BY ordinal LIMIT ?3),
                     sized AS (
                         SELECT ordinal, letter, sum(bytes) OVER (ORDER BY ordinal) - bytes AS before
                         FROM next)
                     SELECT ordinal, place, route, sequence, sub_sequence, entered_key, entered,
                         arrived_ms
                     FROM sized JOIN dead_letter d ON d.rowid = letter
                     WHERE before <= ?4 ORDER BY ordinal",
                )?;
                let letters = query.query_map((id.0, after, limit, bytes), |row| {
                    let place: String = row.get(1)?;
                    let place = LetterPlace::parse(&place).ok_or_else(|| {
                        let cause = format!("{place:?} is no place of a letter");
                        rusqlite::Error::FromSqlConversionFailure(
                            1,
                            rusqlite::types::Type::Text,
                            cause.into(),
                        )
                    })?;
                    Ok(RedrivenLetter {
                        ordinal: row.get(0)?,
                        place,
                        route: row.get::<_, String>(2)?.into(),
                        origin: position(row.get(3)?, row.get(4)?)?,
                        key: row.get(5)?,
                        payload: row.get(6)?,
                        arrived_ms: row.get(7)?,
                    })
                })?;
                letters.collect()
            })
            .await
    }

    /// Gives a redrive up that nothing of has run: its letters are as if it had not been begun.
    ///
    /// # Errors
    /// [`StateError`]; it is there still.
    pub async fn cancel(&self, id: RedriveId) -> Result<(), StateError> {
        self.store
            .write("cancel a redrive", move |state| {
                state.execute("DELETE FROM redrive WHERE id = ?1", [id.0])
            })
            .await
            .map(drop)
    }

    /// Ends a redrive whose every letter has its outcome in the sinks or among the letters; `None`: it
    /// has not come to its end yet, and must be run again.
    ///
    /// # Errors
    /// [`StateError`]; it is unfinished still, and nothing of it is lost or run twice.
    pub async fn finish(&self, id: RedriveId) -> Result<Option<Redriven>, StateError> {
        let key = self.redrive_key(id);
        self.store.write("finish a redrive", move |state| finish(state, id, &key)).await
    }

    fn redrive_key(&self, id: RedriveId) -> (String, String) {
        let key = id.key(&self.pipeline);
        (key.stream.key(), key.shard.to_string())
    }
}

fn finish(
    state: &Transaction<'_>,
    id: RedriveId,
    (stream, shard): &(String, String),
) -> rusqlite::Result<Option<Redriven>> {
    let whole = "SELECT count(*), max(ordinal) FROM redrive JOIN dead_letter d ON d.rowid = letter
                 WHERE id = ?1";
    let (letters, last): (u64, Option<u64>) =
        state.query_row(whole, [id.0], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let reached = "SELECT sequence, sub_sequence FROM shard
                   WHERE stream = ?1 AND shard = ?2 AND sequence IS NOT NULL";
    let reached = state
        .query_row(reached, (stream, shard), |row| position(row.get(0)?, row.get(1)?))
        .optional()?;
    let hidden = "SELECT count(*) FROM dead_letter WHERE stream = ?1 AND shard = ?2 AND held <> 0";
    let hidden: u64 = state.query_row(hidden, (stream, shard), |row| row.get(0))?;
    let due = last.map(|last| Position { sequence: SequenceNumber::from(last), sub_sequence: 0 });
    if reached < due || hidden > 0 {
        return Ok(None);
    }
    let mut failed = state.prepare(
        "SELECT f.rowid, f.sequence, f.place, o.rowid, o.place
         FROM dead_letter f
         JOIN redrive r ON r.id = ?3 AND r.ordinal = CAST(ltrim(f.sequence, '0') AS INTEGER)
         JOIN dead_letter o ON o.rowid = r.letter
         WHERE f.stream = ?1 AND f.shard = ?2 ORDER BY f.sequence, f.output",
    )?;
    let failed = failed.query_map((stream, shard, id.0), |row| {
        Ok((row.get(0)?, row.get::<_, String>(2)?, row.get(3)?, row.get::<_, String>(4)?))
    })?;
    let failed: Vec<(i64, String, i64, String)> = failed.collect::<rusqlite::Result<_>>()?;
    let mut kept = HashSet::new();
    let failed_again = failed.len() as u64;
    for (letter, place, origin, origin_place) in failed {
        // What the record was when it was put is the first letter's to say.
        state.execute(
            "UPDATE dead_letter SET (partition_key, original, arrived_ms) =
                 (SELECT partition_key, original, arrived_ms FROM dead_letter WHERE rowid = ?2)
             WHERE rowid = ?1",
            (letter, origin),
        )?;
        if place == origin_place && kept.insert(origin) {
            // The same again: it keeps its number, and has the newest reason.
            state.execute(
                "UPDATE dead_letter SET (plugin, digest, reason, backtrace, written_ms) =
                     (SELECT plugin, digest, reason, backtrace, written_ms FROM dead_letter
                      WHERE rowid = ?1)
                 WHERE rowid = ?2",
                (letter, origin),
            )?;
            state.execute("DELETE FROM dead_letter WHERE rowid = ?1", [letter])?;
            continue;
        }
        // After the letters that the same record has there, by a number that no item of a first run has: a
        // replay counts its items from 0, and would take one of them for this letter.
        state.execute(
            "UPDATE dead_letter AS f SET (stream, shard, sequence, sub_sequence, output) =
                 (SELECT o.stream, o.shard, o.sequence, o.sub_sequence, coalesce((
                     SELECT max(n.output) + 1 FROM dead_letter n
                     WHERE (n.stream, n.shard, n.sequence, n.sub_sequence) =
                         (o.stream, o.shard, o.sequence, o.sub_sequence)
                         AND n.place = f.place AND n.output >= ?3), ?3)
                  FROM dead_letter o WHERE o.rowid = ?2)
             WHERE f.rowid = ?1",
            (letter, origin, OUTPUT_OF_REDRIVE),
        )?;
    }
    let mut gone = state.prepare("SELECT letter FROM redrive WHERE id = ?1")?;
    let gone: Vec<i64> =
        gone.query_map([id.0], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    for letter in gone.iter().filter(|letter| !kept.contains(letter)) {
        // A sink may be behind the record still. If that makes a lane read it again, the stage must not
        // run it again: what became of it then is delivered.
        state.execute(
            "UPDATE dead_letter SET held = ?2, partition_key = x'', original = x'', entered_key = x'',
                 entered = x'', backtrace = ''
             WHERE rowid = ?1 AND place GLOB 'stage:*'",
            (letter, REDRIVEN),
        )?;
        state.execute(
            "DELETE FROM dead_letter WHERE rowid = ?1 AND place GLOB 'sink:*'",
            [letter],
        )?;
    }
    state.execute("DELETE FROM redrive WHERE id = ?1", [id.0])?;
    // Its positions are of no use to anybody; the ledger's row says when it was.
    for table in ["shard", "sink_position", "sink_owner", "given_up", "sink_removed"] {
        state.execute(&format!("DELETE FROM {table} WHERE stream = ?1"), [stream])?;
    }
    Ok(Some(Redriven { letters, failed_again }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Checkpoints, DeadLetter, DeadLetters, LetterKey};
    use crate::record::ShardStart;

    #[tokio::test]
    async fn a_record_that_went_through_is_not_run_again_by_a_replay() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let letters = DeadLetters::new(store.clone());
        let pipeline = PipelineName::from("cars");
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let shard =
            ShardKey { pipeline: pipeline.clone(), stream: stream.into(), shard: "shard".into() };
        let at = |n: u64| Position { sequence: SequenceNumber::from(n), sub_sequence: 0 };
        let key =
            LetterKey { position: at(7), place: LetterPlace::Stage("decode".into()), output: 0 };
        let letter = DeadLetter {
            key: key.clone(),
            partition_key: "k".into(),
            original: "o".into(),
            entered_key: "k".into(),
            entered: "e".into(),
            route: "records".into(),
            arrived_ms: 1,
            plugin: String::new(),
            digest: String::new(),
            reason: "no JSON".into(),
            backtrace: String::new(),
        };
        letters.put(&shard, vec![letter], false).await.expect("written");
        let redrives = Redrives::new(store.clone(), pipeline.clone());
        let id = redrives.begin(LetterFilter::default()).await.expect("begun").expect("a letter");
        assert_eq!(letters.purge(LetterFilter::default()).await.expect("purged"), 0);
        assert_eq!(redrives.finish(id).await.expect("asked"), None, "nothing has run");
        let own = id.key(&pipeline);
        let checkpoints = Checkpoints::new(store);
        checkpoints.begin(&own, &ShardStart::Horizon).await.expect("begun");
        checkpoints.advance(&own, Vec::new(), Some(at(1)), false).await.expect("advanced");
        let redriven = redrives.finish(id).await.expect("finished");
        assert_eq!(redriven, Some(Redriven { letters: 1, failed_again: 0 }));
        assert_eq!(letters.count().await.expect("counted"), 0);
        // While a sink stands before the record, and no longer.
        for (above, due) in [(at(6), true), (at(7), false), (at(6), false)] {
            let settled = letters.settled_above(&shard, Some(&above)).await.expect("read");
            assert_eq!(settled.contains(&key), due, "above {above}");
        }
    }
}
