//! Replays that put rows into tables whose records still have dead letters.
//!
//! `replay --swap` makes all rows of a time window again, also those of records that had become dead letters. A
//! later redrive must not bring these rows to that sink a second time. So dead letters are linked to what the
//! replay delivered:
//!
//! 1. [`Replays::begin`] stores, as pending, which dead letters the replay brings to the sink.
//! 2. The replay replaces the rows in one transaction of the destination, which also writes a row with the replay's
//!    id.
//! 3. [`Replays::confirm`] or [`Replays::cancel`] resolves the pending entry: the row with the id is there, or it
//!    is not and never will be.
//!
//! A crash between any two steps leaves a pending entry. The next command looks for the row with its id and
//! resolves it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use rusqlite::Transaction;

use super::store::{StateError, StateStore, now_ms};
use shardmill_core::record::{DeadLetterPlace, ReplayId, ShardId, SinkName, StreamIdentity};

/// A replay of which it is unknown whether its rows are in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingReplay {
    /// Its id.
    pub id: ReplayId,
    /// The sink of the table.
    pub sink: SinkName,
}

/// An item of a record that failed in the replay too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FailedInReplay {
    /// The shard.
    pub shard: ShardId,
    /// The sequence number, zero-padded.
    pub sequence: String,
    /// The position within an aggregated record.
    pub sub_sequence: u64,
    /// The place where it failed, by the names of the replayed pipeline.
    pub place: String,
    /// Index of the failed item among the record's items at that place.
    pub output: u32,
}

/// Key of an item's record: shard, zero-padded sequence number, position within an aggregate.
type RecordKey = (String, String, u64);

/// The replays of a pipeline.
#[derive(Clone)]
pub struct Replays {
    store: StateStore,
}

impl Replays {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// Lists the replays that were neither confirmed nor cancelled.
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

    /// Returns the records of a window that have dead letters both in the pipeline and in the replay, by shard and
    /// zero-padded sequence number. Whether they have rows as well decides what [`Replays::begin`] stores for them.
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

    /// Stores, as pending, the dead letters of a window whose rows a replay brings to a sink. `failed`: the items
    /// that failed in the replay. `with_rows`: the records of these that have rows as well, by shard and
    /// zero-padded sequence number.
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
            .transact("store the dead letters of a replay", move |state| {
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
                    // The dead letter of another sink: this replay does not deliver it.
                    if item.place.starts_with("sink:") && item.place != place {
                        continue;
                    }
                    insert.execute((id, number, failed.is_delivered(&item, &with_rows)))?;
                }
                Ok(ReplayId(id))
            })
            .await
    }

    /// Confirms that the replay's rows are in the table: from now on, redrives bring its dead letters to the other
    /// sinks only.
    ///
    /// # Errors
    /// [`StateError`]; it is still pending.
    pub async fn confirm(&self, id: ReplayId) -> Result<(), StateError> {
        self.store
            .transact("confirm a replay", move |state| {
                state.execute(
                    "INSERT OR IGNORE INTO letter_delivered
                     SELECT letter, sink FROM replay_letter JOIN replay ON replay.id = replay
                     WHERE replay = ?1 AND delivered <> 0",
                    [id.0],
                )?;
                // This replay has replaced the rows of earlier ones: what it did not deliver is not there any more.
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

    /// Cancels a replay whose rows are not in the table and will not be.
    ///
    /// # Errors
    /// [`StateError`]; it is still pending.
    pub async fn cancel(&self, id: ReplayId) -> Result<(), StateError> {
        self.store.transact("cancel a replay", move |state| forget(state, id)).await
    }
}

fn forget(state: &Transaction<'_>, id: ReplayId) -> rusqlite::Result<()> {
    state.execute("DELETE FROM replay_letter WHERE replay = ?1", [id.0])?;
    state.execute("DELETE FROM replay WHERE id = ?1", [id.0])?;
    Ok(())
}

/// A dead letter whose record lies in the window.
struct WindowDeadLetter {
    number: i64,
    item: FailedInReplay,
}

/// Reads the dead letters of a window, including pending ones: a sink that is past the window is about to show
/// them.
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

/// The items that failed in a replay, by record.
struct Failed<'f>(HashMap<RecordKey, Vec<&'f FailedInReplay>>);

impl<'f> Failed<'f> {
    fn of(failed: &'f [FailedInReplay]) -> Self {
        let mut by_record: HashMap<RecordKey, Vec<&FailedInReplay>> = HashMap::new();
        for one in failed {
            by_record.entry(one.record()).or_default().push(one);
        }
        Self(by_record)
    }

    /// Whether the replay has brought to the sink what a dead letter's item becomes today.
    ///
    /// | the record in the replay | rows of the dead letter |
    /// |---|---|
    /// | did not fail | are there |
    /// | failed with this very item | are missing |
    /// | failed with another item, and has no row | are missing |
    /// | failed with another item, and has a row | are there, except what the replay was allowed to leave out |
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
