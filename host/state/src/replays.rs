//! What replays have put into tables: rows of records whose dead letters are still there.
//!
//! `replay --swap` makes the rows of a window again, those of records that were dead letters too. A redrive
//! must not bring them to that sink once more. So before a replay replaces rows, it notes here which letters
//! it has brought to the sink. The note is pending until the replay's transaction is known to have landed: a
//! row of its own in the database, written by that transaction, says so.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use rusqlite::Transaction;

use super::store::{StateError, StateStore, now_ms};
use shardmill_core::record::{DeadLetterPlace, ReplayId, ShardId, SinkName, StreamIdentity};

/// A replay of which it is not known whether its rows are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingReplay {
    /// Which.
    pub id: ReplayId,
    /// The sink whose table it was about.
    pub sink: SinkName,
}

/// An item of a record that failed in a replay too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FailedInReplay {
    /// The shard.
    pub shard: ShardId,
    /// The sequence number, zero-padded.
    pub sequence: String,
    /// The position within an aggregate.
    pub sub_sequence: u64,
    /// Where, by the names of the pipeline that was replayed.
    pub place: String,
    /// Its place among the record's items there.
    pub output: u32,
}

/// The record of an item: shard, zero-padded sequence number, position within an aggregate.
type RecordKey = (String, String, u64);

/// The replays of a pipeline.
#[derive(Clone)]
pub struct Replays {
    store: StateStore,
}

impl Replays {
    /// Over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// The replays that were neither confirmed nor cancelled.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn pending(&self) -> Result<Vec<PendingReplay>, StateError> {
        self.store
            .transact("look for replays", |state| {
                let mut query = state.prepare("SELECT id, sink FROM replay ORDER BY id")?;
                let pending = query.query_map([], |row| {
                    let sink = SinkName::from(row.get::<_, String>(1)?);
                    Ok(PendingReplay { id: ReplayId(row.get(0)?), sink })
                })?;
                pending.collect()
            })
            .await
    }

    /// The records of a window that have letters of which the replay has some as well: whether they have
    /// rows decides what [`Replays::begin`] notes of them.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn failed_both(
        &self,
        stream: &StreamIdentity,
        window_ms: Range<u64>,
        failed: &[FailedInReplay],
    ) -> Result<Vec<(String, String)>, StateError> {
        let failed: HashSet<RecordKey> = failed.iter().map(FailedInReplay::record).collect();
        let stream = stream.key();
        self.store
            .transact("read the dead letters", move |state| {
                let dead_letters = dead_letters_of(state, &stream, &window_ms)?;
                let both: HashSet<(String, String)> = dead_letters
                    .into_iter()
                    .filter(|dead_letter| failed.contains(&dead_letter.item.record()))
                    .map(|dead_letter| {
                        (dead_letter.item.shard.to_string(), dead_letter.item.sequence)
                    })
                    .collect();
                Ok(both.into_iter().collect())
            })
            .await
    }

    /// Notes, as pending, the letters of a window whose rows a replay brings to a sink. `failed` is what
    /// failed in it, `with_rows` says of records that failed there whether they have rows as well (shard and
    /// zero-padded sequence number).
    ///
    /// # Errors
    /// [`StateError`]; no row may be replaced then.
    pub async fn begin(
        &self,
        (stream, sink): (&StreamIdentity, &SinkName),
        window_ms: Range<u64>,
        failed: Vec<FailedInReplay>,
        with_rows: HashSet<(String, String)>,
    ) -> Result<ReplayId, StateError> {
        let (stream, sink) = (stream.key(), sink.clone());
        self.store
            .transact("note what a replay brings", move |state| {
                let last: Option<i64> =
                    state.query_row("SELECT max(id) FROM replay", [], |row| row.get(0))?;
                let id = now_ms().max(last.map_or(0, |last| last + 1));
                state.execute("INSERT INTO replay VALUES (?1, ?2)", (id, sink.as_str()))?;
                let place = DeadLetterPlace::Sink(sink.clone()).to_string();
                let mut insert =
                    state.prepare_cached("INSERT INTO replay_letter VALUES (?1, ?2, ?3)")?;
                let failed = Failed::of(&failed);
                for WindowDeadLetter { number, item } in
                    dead_letters_of(state, &stream, &window_ms)?
                {
                    // A row for another sink alone is none of this replay's.
                    if item.place.starts_with("sink:") && item.place != place {
                        continue;
                    }
                    insert.execute((id, number, failed.is_delivered(&item, &with_rows)))?;
                }
                Ok(ReplayId(id))
            })
            .await
    }

    /// The replay's rows are there: redrives bring its letters to the other sinks only.
    ///
    /// # Errors
    /// [`StateError`]; it is pending still.
    pub async fn confirm(&self, id: ReplayId) -> Result<(), StateError> {
        self.store
            .transact("note what a replay has brought", move |state| {
                state.execute(
                    "INSERT OR IGNORE INTO letter_delivered
                     SELECT letter, sink FROM replay_letter JOIN replay ON replay.id = replay
                     WHERE replay = ?1 AND delivered <> 0",
                    [id.0],
                )?;
                // What an earlier replay had brought is replaced.
                state.execute(
                    "DELETE FROM letter_delivered WHERE (letter, sink) IN (
                         SELECT letter, sink FROM replay_letter JOIN replay ON replay.id = replay
                         WHERE replay = ?1 AND delivered = 0)",
                    [id.0],
                )?;
                forget(state, id)
            })
            .await
    }

    /// The replay's rows are not there and will not be.
    ///
    /// # Errors
    /// [`StateError`]; it is pending still.
    pub async fn cancel(&self, id: ReplayId) -> Result<(), StateError> {
        self.store.transact("forget a replay", move |state| forget(state, id)).await
    }
}

fn forget(state: &Transaction<'_>, id: ReplayId) -> rusqlite::Result<()> {
    state.execute("DELETE FROM replay_letter WHERE replay = ?1", [id.0])?;
    state.execute("DELETE FROM replay WHERE id = ?1", [id.0])?;
    Ok(())
}

/// A letter of a window.
struct WindowDeadLetter {
    number: i64,
    item: FailedInReplay,
}

/// The letters of a window, hidden ones too: a sink that is past the window is about to show them.
fn dead_letters_of(
    state: &Transaction<'_>,
    stream: &str,
    window_ms: &Range<u64>,
) -> rusqlite::Result<Vec<WindowDeadLetter>> {
    let mut query = state.prepare(
        "SELECT rowid, shard, sequence, sub_sequence, place, output FROM letters
         WHERE stream = ?1 AND arrived_ms >= ?2 AND arrived_ms < ?3 AND held <> 3",
    )?;
    let dead_letters = query.query_map((stream, window_ms.start, window_ms.end), |row| {
        let item = FailedInReplay {
            shard: ShardId::from(row.get::<_, String>(1)?),
            sequence: row.get(2)?,
            sub_sequence: row.get(3)?,
            place: row.get(4)?,
            output: row.get(5)?,
        };
        Ok(WindowDeadLetter { number: row.get(0)?, item })
    })?;
    dead_letters.collect()
}

impl FailedInReplay {
    fn record(&self) -> RecordKey {
        (self.shard.to_string(), self.sequence.clone(), self.sub_sequence)
    }
}

/// Failures of a replay, by record.
struct Failed<'f>(HashMap<RecordKey, Vec<&'f FailedInReplay>>);

impl<'f> Failed<'f> {
    fn of(failed: &'f [FailedInReplay]) -> Self {
        let mut by_record: HashMap<RecordKey, Vec<&FailedInReplay>> = HashMap::new();
        for one in failed {
            by_record.entry(one.record()).or_default().push(one);
        }
        Self(by_record)
    }

    /// Whether the sink has by a replay what a letter's item becomes today.
    ///
    /// | the record in the replay | the letter's rows |
    /// |---|---|
    /// | did not fail | are there |
    /// | failed with this very item | are missing |
    /// | failed otherwise, without a row | are missing |
    /// | failed otherwise, with a row | are there, but for what the replay was allowed to leave out |
    fn is_delivered(&self, item: &FailedInReplay, with_rows: &HashSet<(String, String)>) -> bool {
        let Some(failed) = self.0.get(&item.record()) else { return true };
        let is_same = failed.contains(&item);
        !is_same && with_rows.contains(&(item.shard.to_string(), item.sequence.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(sequence: &str, place: &str, output: u32) -> FailedInReplay {
        let (shard, sequence) = (ShardId::from("a"), sequence.to_owned());
        FailedInReplay { shard, sequence, sub_sequence: 0, place: place.into(), output }
    }

    #[test]
    fn fault_23_a_dead_letter_is_delivered_where_its_record_has_not_failed_again() {
        let failed = [item("2", "stage:decode", 0), item("3", "sink:mart", 1)];
        let with_rows = HashSet::from([("a".to_owned(), "3".to_owned())]);
        for (dead_letter, expected) in [
            (item("1", "stage:decode", 0), true),
            (item("2", "stage:decode", 0), false),
            (item("2", "stage:route", 0), false),
            (item("3", "sink:mart", 1), false),
            (item("3", "stage:decode", 0), true),
        ] {
            let found = Failed::of(&failed).is_delivered(&dead_letter, &with_rows);
            assert_eq!(found, expected, "{dead_letter:?}");
        }
    }
}
