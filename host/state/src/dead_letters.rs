//! Dead letters: every record that a stage rejected or a sink refused, with everything that a redrive needs.
//!
//! **Invariant.** A dead letter is durable before any sink commits the position range that it belongs to. Otherwise
//! a crash between the two would leave a record without an outcome.
//!
//! A dead letter is identified by stream, shard, position, place and output. Writing it again replaces it in its
//! row: a replay produces the same dead letters once more, and their numbers must stay, because people and redrives
//! use them.
//!
//! Its state is the column `held`:
//!
//! | `held` | meaning | who changes it |
//! |---|---|---|
//! | 0 | visible | a redrive or a purge deletes it |
//! | 1 | pending: a sink refused the row, and its commit may not have happened | `pending.rs` |
//! | 2 | pending: the row was given up, and the sink may have it after all | `pending.rs` |
//! | 3 | mark: redriven or purged while a lane may still replay the record | `dead_lettered.rs` deletes it |
//!
//! How much is kept of each, and of all of them, is decided in `dead_letter_store.rs`.

use std::collections::HashSet;
use std::sync::Arc;

use rusqlite::{Row, Transaction};

use super::dead_letter_store::{
    AS_DIGEST, AS_ORIGINAL, DEAD_LETTER_BYTES, DeadLetter, KEPT, Keeper, StoreBound, StoreFull,
    kept_bytes, unknown_kind,
};
use super::replays::FailedInReplay;
use super::store::{StateError, StateStore, columns, now_ms, position as position_of};
use shardmill_core::record::{
    DeadLetterPlace, Position, SequenceNumber, ShardId, ShardKey, SinkName, StageName,
};

/// State of a dead letter (column `held`): visible.
pub(super) const VISIBLE: u8 = 0;
/// Pending until the sink's commit covers it.
const PENDING: u8 = 1;
/// Pending until it is known whether the sink got the row after all.
pub(super) const GIVEN_UP: u8 = 2;
/// Only a mark: the record has gone through a redrive or was purged, and a replay must not run it again.
pub(super) const REDRIVEN: u8 = 3;

/// A record as it entered the stage that rejected it.
#[derive(Clone, Debug)]
pub struct EnteredRecord {
    /// Its partition key.
    pub key: Vec<u8>,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its sequence number in its shard.
    pub sequence: SequenceNumber,
    /// When the stream took it, in milliseconds since 1970.
    pub arrived_ms: u64,
}

/// A dead letter as it is stored.
#[derive(Clone, Debug)]
pub struct StoredDeadLetter {
    /// Its number in the store. It stays the same as long as the dead letter exists.
    pub id: i64,
    /// The stream, by its key.
    pub stream: String,
    /// The shard.
    pub shard: String,
    /// The sequence number.
    pub sequence: String,
    /// The position within an aggregated record.
    pub sub_sequence: u64,
    /// `stage:NAME` or `sink:NAME`.
    pub place: String,
    /// The partition key that the record was put with.
    pub partition_key: Vec<u8>,
    /// The record's data as it was put. Empty in a copy that has its digest instead.
    pub original: Vec<u8>,
    /// In a copy: the digest of the record's data, because the copy of another dead letter has the data.
    pub original_digest: Option<PayloadDigest>,
    /// The partition key that entered the failing place; empty where a digest is kept.
    pub entered_key: Vec<u8>,
    /// The payload that entered the failing place; empty where a digest is kept.
    pub entered: Vec<u8>,
    /// The digest of what entered, if it was too large to be kept.
    pub entered_digest: Option<PayloadDigest>,
    /// When the stream took the record, in milliseconds since 1970.
    pub arrived_ms: u64,
    /// The plugin's name and version; empty for a sink.
    pub plugin: String,
    /// The plugin's digest; empty for a sink.
    pub digest: String,
    /// Reason of the failure.
    pub reason: String,
    /// The plugin's backtrace, if it trapped.
    pub backtrace: String,
    /// Time at which it was written, in milliseconds since 1970.
    pub written_ms: i64,
}

/// A digest that stands for a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadDigest {
    /// SHA-256 in hex: of a record's data, or of what entered a place with its key
    /// ([`entered_digest`](super::entered_digest)).
    pub sha256: String,
    /// The length of the payload.
    pub bytes: u64,
}

/// The columns that [`StoredDeadLetter::read`] reads. The record's data is read only if the condition holds.
macro_rules! dead_letter_columns {
    ($original_if:literal) => {
        concat!(
            "letters.id, stream, shard, ltrim(sequence, '0'), sub_sequence, place,
            (SELECT partition_key FROM letter_record WHERE letter_record.id = record),
            (SELECT original FROM letter_record WHERE letter_record.id = record",
            $original_if,
            "), entered_kind, entered_key, entered, entered_digest, entered_bytes, arrived_ms, plugin,
            digest, reason, backtrace, written_ms"
        )
    };
}

/// The columns that [`StoredDeadLetter::read`] reads.
pub(super) const DEAD_LETTER_COLUMNS: &str = dead_letter_columns!("");

/// The same for a copy, with the column `carrier`: the data of a record longer than `?3` is left out if the copy of
/// another dead letter has it.
pub(super) const COPIED_COLUMNS: &str = dead_letter_columns!(
    " AND (coalesce(carrier, letters.id) = letters.id OR length(original) <= ?3)"
);

/// The same without payloads and backtraces: many of them may not fit into memory.
const DEAD_LETTER_HEADS: &str =
    "letters.id, stream, shard, ltrim(sequence, '0'), sub_sequence, place,
    x'', x'', 0, x'', x'', entered_digest, entered_bytes, arrived_ms, plugin, digest, reason, '',
    written_ms";

impl StoredDeadLetter {
    /// Reads a dead letter from [`DEAD_LETTER_COLUMNS`], which begin at column `at`.
    pub(super) fn read(row: &Row<'_>, at: usize) -> rusqlite::Result<Self> {
        let bytes = |column: usize| -> rusqlite::Result<Vec<u8>> {
            row.get::<_, Option<Vec<u8>>>(at + column).map(Option::unwrap_or_default)
        };
        let (partition_key, original) = (bytes(6)?, bytes(7)?);
        let kind: u8 = row.get(at + 8)?;
        let (entered_key, entered) = match kind {
            AS_ORIGINAL => (partition_key.clone(), original.clone()),
            KEPT | AS_DIGEST => (bytes(9)?, bytes(10)?),
            other => return Err(unknown_kind(at + 8, other)),
        };
        let entered_digest = match kind {
            AS_DIGEST => {
                Some(PayloadDigest { sha256: row.get(at + 11)?, bytes: row.get(at + 12)? })
            }
            _ => None,
        };
        Ok(Self {
            id: row.get(at)?,
            stream: row.get(at + 1)?,
            shard: row.get(at + 2)?,
            sequence: row.get(at + 3)?,
            sub_sequence: row.get(at + 4)?,
            place: row.get(at + 5)?,
            partition_key,
            original,
            original_digest: None,
            entered_key,
            entered,
            entered_digest,
            arrived_ms: row.get(at + 13)?,
            plugin: row.get(at + 14)?,
            digest: row.get(at + 15)?,
            reason: row.get(at + 16)?,
            backtrace: row.get(at + 17)?,
            written_ms: row.get(at + 18)?,
        })
    }
}

/// Selects dead letters: those that match every given criterion. Empty: all.
#[derive(Clone, Debug, Default)]
pub struct DeadLetterFilter {
    /// Numbers of dead letters; empty: any.
    pub ids: Vec<i64>,
    /// The place where they failed.
    pub place: Option<DeadLetterPlace>,
    /// The shard.
    pub shard: Option<String>,
    /// A part of the reason.
    pub reason: Option<String>,
}

impl DeadLetterFilter {
    /// Whether it has no criterion.
    pub fn is_empty(&self) -> bool {
        let Self { ids, place, shard, reason } = self;
        ids.is_empty() && place.is_none() && shard.is_none() && reason.is_none()
    }
}

/// The condition of a [`DeadLetterFilter`] in SQL, with four parameters. Dead letters in the shard of an unfinished
/// redrive never match: the ones that they came from still exist, and `finish` decides which stay.
pub(super) const MATCHES: &str =
    "held = 0 AND stream NOT GLOB 'letters:*' AND (?1 IS NULL OR place = ?1) AND (?2 IS NULL OR shard = ?2)
    AND (?3 IS NULL OR instr(reason, ?3) > 0)
    AND (?4 = '[]' OR rowid IN (SELECT value FROM json_each(?4)))";

/// The parameters of [`MATCHES`].
pub(super) type Wanted = (Option<String>, Option<String>, Option<String>, String);

pub(super) fn wanted(filter: DeadLetterFilter) -> Wanted {
    let ids: Vec<String> = filter.ids.iter().map(i64::to_string).collect();
    let place = filter.place.map(|place| place.to_string());
    (place, filter.shard, filter.reason, format!("[{}]", ids.join(",")))
}

/// The dead letters of a pipeline.
#[derive(Clone)]
pub struct DeadLetters {
    pub(super) store: StateStore,
    pub(super) bound: StoreBound,
}

impl DeadLetters {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store, bound: StoreBound::default() }
    }

    /// Adds a bound on the size of all dead letters: `configured`, or by the free disk.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn bounded(self, configured: Option<usize>) -> Result<Self, StateError> {
        let kept = self.kept_bytes().await?;
        let bound = StoreBound::of(self.store.folder(), kept, configured);
        bound.show(kept);
        Ok(Self { store: self.store, bound })
    }

    /// Changes the configured bound, for all clones.
    pub fn set_bound(&self, configured: Option<usize>) {
        self.bound.set(configured);
    }

    /// Leaves the metrics of the store's size to another handle of this process.
    pub fn leave_metrics(&self) {
        self.bound.leave_metrics();
    }

    /// Returns the bytes that all of them take.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn kept_bytes(&self) -> Result<u64, StateError> {
        self.store.transact("measure the dead letters", kept_bytes).await
    }

    /// Publishes the size of the store: another process may have changed it.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn show_kept(&self) -> Result<(), StateError> {
        let kept = self.kept_bytes().await?;
        self.bound.show(kept);
        Ok(())
    }

    /// Publishes the size after a write, or returns its error.
    pub(super) fn written(
        &self,
        action: &'static str,
        written: Result<u64, StoreFull>,
    ) -> Result<(), StateError> {
        match written {
            Ok(kept) => {
                self.bound.show(kept);
                Ok(())
            }
            Err(full) => Err(self.store.refused(action, full.cause(), full.way_out())),
        }
    }

    /// Writes dead letters, durable on return. One that exists is replaced. `pending`: they stay pending until
    /// [`DeadLetters::confirm`] or [`DeadLetters::acquire_shard`] resolves them.
    ///
    /// # Errors
    /// [`StateError`]; the position range must not be committed then.
    pub async fn put(
        &self,
        shard: &ShardKey,
        dead_letters: impl Into<Arc<Vec<DeadLetter>>>,
        pending: bool,
    ) -> Result<(), StateError> {
        // Shared with a caller that may retry: a copy of thousands would be larger than their records.
        let dead_letters: Arc<Vec<DeadLetter>> = dead_letters.into();
        if dead_letters.is_empty() {
            return Ok(());
        }
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (action, bound) = ("write dead letters", self.bound.clone());
        let written = self.store.transact(action, move |state| {
            let kept = if pending { PENDING } else { VISIBLE };
            // Updated in its row, so that its number stays.
            let on_conflict = "DO UPDATE SET held = excluded.held, record = excluded.record,
                entered_kind = excluded.entered_kind, entered_key = excluded.entered_key,
                entered = excluded.entered, entered_bytes = excluded.entered_bytes,
                entered_digest = excluded.entered_digest, made = excluded.made,
                arrived_ms = excluded.arrived_ms, plugin = excluded.plugin,
                digest = excluded.digest, reason = excluded.reason,
                backtrace = excluded.backtrace, written_ms = excluded.written_ms,
                route = excluded.route, kept_bytes = excluded.kept_bytes";
            let are_there = || are_there(state, (&stream, &shard), &dead_letters);
            let write = || insert(state, (&stream, &shard), &dead_letters, kept, on_conflict);
            bound.within(state, &stream, are_there, write)
        });
        self.written(action, written.await?)
    }

    /// Returns the last record that has a dead letter of a stage. It was run, by the revision of that time.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn highest_of_stages(
        &self,
        shard: &ShardKey,
    ) -> Result<Option<Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sequence, sub_sequence FROM letters
                     WHERE stream = ?1 AND shard = ?2 AND place GLOB 'stage:*'
                     ORDER BY sequence DESC, sub_sequence DESC LIMIT 1",
                )?;
                let mut rows = query.query((stream, shard))?;
                match rows.next()? {
                    Some(row) => position_of(row.get(0)?, row.get(1)?).map(Some),
                    None => Ok(None),
                }
            })
            .await
    }

    /// Reads the rows after a position that are visible dead letters of a sink, by position and output. Such rows
    /// exist if the sink was restored from a backup: each has its outcome, and must not be given to the sink again.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn rows_above(
        &self,
        shard: &ShardKey,
        sink: &SinkName,
        above: Option<&Position>,
    ) -> Result<HashSet<(Position, u32)>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let place = DeadLetterPlace::Sink(sink.clone()).to_string();
        let (sequence, sub) = above.map(columns).unwrap_or_default();
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sequence, sub_sequence, output FROM letters
                     WHERE stream = ?1 AND shard = ?2 AND (sequence, sub_sequence) > (?3, ?4)
                         AND place = ?5 AND held = ?6",
                )?;
                let key = (stream, shard, sequence, sub, place, VISIBLE);
                let rows = query.query_map(key, |row| {
                    Ok((position_of(row.get(0)?, row.get(1)?)?, row.get(2)?))
                })?;
                rows.collect()
            })
            .await
    }

    /// Reads the visible dead letters that match a filter, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn select(
        &self,
        filter: DeadLetterFilter,
        limit: u32,
    ) -> Result<Vec<StoredDeadLetter>, StateError> {
        self.select_columns(DEAD_LETTER_COLUMNS, filter, limit).await
    }

    /// Reads the same without payloads and backtraces.
    ///
    /// # Errors
    /// As [`DeadLetters::select`].
    pub async fn select_heads(
        &self,
        filter: DeadLetterFilter,
        limit: u32,
    ) -> Result<Vec<StoredDeadLetter>, StateError> {
        self.select_columns(DEAD_LETTER_HEADS, filter, limit).await
    }

    async fn select_columns(
        &self,
        columns: &'static str,
        filter: DeadLetterFilter,
        limit: u32,
    ) -> Result<Vec<StoredDeadLetter>, StateError> {
        let (place, shard, reason, ids) = wanted(filter);
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare(&format!(
                    "SELECT {columns} FROM letters WHERE {MATCHES}
                     ORDER BY written_ms, rowid LIMIT ?5"
                ))?;
                let wanted = (place, shard, reason, ids, limit);
                let rows = query.query_map(wanted, |row| StoredDeadLetter::read(row, 0))?;
                rows.collect()
            })
            .await
    }

    /// Reads the numbers of the visible dead letters that match a filter, oldest first.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn ids(&self, filter: DeadLetterFilter) -> Result<Vec<i64>, StateError> {
        let wanted = wanted(filter);
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare(&format!(
                    "SELECT rowid FROM letters WHERE {MATCHES} ORDER BY written_ms, rowid"
                ))?;
                query.query_map(wanted, |row| row.get(0))?.collect()
            })
            .await
    }

    /// Counts the visible dead letters that match a filter.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn count_of(&self, filter: DeadLetterFilter) -> Result<u64, StateError> {
        let wanted = wanted(filter);
        self.store
            .transact("count the dead letters", move |state| {
                let count = format!("SELECT count(*) FROM letters WHERE {MATCHES}");
                state.query_row(&count, wanted, |row| row.get(0))
            })
            .await
    }

    /// Deletes the visible dead letters that match a filter. Returns how many were deleted, and how many were left
    /// because an interrupted redrive has them.
    ///
    /// # Errors
    /// [`StateError`]; nothing is deleted then.
    pub async fn purge(&self, filter: DeadLetterFilter) -> Result<(usize, usize), StateError> {
        let wanted = wanted(filter);
        self.store
            .transact("delete dead letters", move |state| {
                // The rest of a finished redrive (for a place that is gone) blocks nothing and may be purged.
                let mut found = state.prepare(&format!(
                    "SELECT rowid, rowid IN (
                         SELECT letter FROM redrive WHERE id NOT IN (SELECT id FROM redrive_rest))
                     FROM letters WHERE {MATCHES}"
                ))?;
                let found = found.query_map(wanted, |row| Ok((row.get(0)?, row.get(1)?)))?;
                let found = found.collect::<rusqlite::Result<Vec<(i64, bool)>>>()?;
                let (left, purged): (Vec<_>, Vec<_>) =
                    found.into_iter().partition(|(_, is_redriven)| *is_redriven);
                purged.iter().try_for_each(|(dead_letter, _)| forget(state, *dead_letter))?;
                Ok((purged.len(), left.len()))
            })
            .await
    }

    /// Reads the payloads that a stage rejected, oldest first, at most `limit`. Those kept as a digest are left
    /// out.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn entered(
        &self,
        stage: &StageName,
        limit: u32,
    ) -> Result<Vec<EnteredRecord>, StateError> {
        let place = DeadLetterPlace::Stage(stage.clone()).to_string();
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT d.entered_key, d.entered, d.sequence, d.arrived_ms
                     FROM letters l JOIN dead_letter d ON d.id = l.id
                     WHERE l.held = 0 AND l.stream NOT GLOB 'letters:*' AND l.place = ?1
                         AND l.entered_kind <> 2
                     ORDER BY l.written_ms, l.sequence LIMIT ?2",
                )?;
                let rows = query.query_map((place, limit), |row| {
                    Ok(EnteredRecord {
                        key: row.get(0)?,
                        payload: row.get(1)?,
                        sequence: position_of(row.get(2)?, 0)?.sequence,
                        arrived_ms: row.get(3)?,
                    })
                })?;
                rows.collect()
            })
            .await
    }

    /// Lists the failed item of every visible dead letter.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn failed(&self) -> Result<Vec<FailedInReplay>, StateError> {
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare(
                    "SELECT shard, sequence, sub_sequence, place, output FROM letters
                     WHERE held = 0",
                )?;
                let failed = query.query_map([], |row| {
                    Ok(FailedInReplay {
                        shard: ShardId::from(row.get::<_, String>(0)?),
                        sequence: row.get(1)?,
                        sub_sequence: row.get(2)?,
                        place: row.get(3)?,
                        output: row.get(4)?,
                    })
                })?;
                failed.collect()
            })
            .await
    }

    /// Counts the visible dead letters.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn count(&self) -> Result<u64, StateError> {
        self.count_of(DeadLetterFilter::default()).await
    }
}

/// Deletes a dead letter. If it is of a stage and the checkpoint has not passed its record, an empty mark stays in
/// its place ([`REDRIVEN`]): a lane may replay the record for sinks that are lagging. They must not get rows that
/// the other sinks will never have (after a purge), or get rows twice (after a redrive).
pub(super) fn forget(state: &Transaction<'_>, dead_letter: i64) -> rusqlite::Result<()> {
    state
        .prepare_cached(
            "UPDATE letters AS d SET held = ?2, record = NULL, entered_kind = 0, entered_key = x'',
                 entered = x'', entered_bytes = 0, entered_digest = '', made = '', plugin = '',
                 reason = '', backtrace = '', kept_bytes = ?3
             WHERE rowid = ?1 AND place GLOB 'stage:*' AND NOT EXISTS (
                 SELECT 1 FROM shard s WHERE s.stream = d.stream AND s.shard = d.shard
                 AND (s.ended <> 0 OR (s.sequence, s.sub_sequence) >= (d.sequence, d.sub_sequence)))",
        )?
        .execute((dead_letter, REDRIVEN, DEAD_LETTER_BYTES))?;
    // A dead letter of a stage that became a mark above stays; all others go.
    state
        .prepare_cached("DELETE FROM letters WHERE rowid = ?1 AND held <> ?2")?
        .execute((dead_letter, REDRIVEN))?;
    // The row id may be used again.
    state.prepare_cached("DELETE FROM redrive WHERE letter = ?1")?.execute([dead_letter])?;
    Ok(())
}

/// Whether all of these dead letters exist already.
pub(super) fn are_there(
    state: &Transaction<'_>,
    (stream, shard): (&str, &str),
    dead_letters: &[DeadLetter],
) -> rusqlite::Result<bool> {
    let mut known = state.prepare_cached(
        "SELECT 1 FROM letters WHERE stream = ?1 AND shard = ?2 AND sequence = ?3
         AND sub_sequence = ?4 AND place = ?5 AND output = ?6",
    )?;
    for dead_letter in dead_letters {
        let (sequence, sub) = columns(&dead_letter.key.position);
        let place = dead_letter.key.place.to_string();
        if !known.exists((stream, shard, sequence, sub, place, dead_letter.key.output))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Inserts dead letters; `kept` is their state (column `held`). `on_conflict`: the SQL action for one that exists.
pub(super) fn insert(
    state: &Transaction<'_>,
    (stream, shard): (&str, &str),
    dead_letters: &[DeadLetter],
    kept: u8,
    on_conflict: &str,
) -> rusqlite::Result<()> {
    let mut insert = state.prepare_cached(&format!(
        "INSERT INTO letters (stream, shard, sequence, sub_sequence, place, output, held, record,
             entered_kind, entered_key, entered, entered_bytes, entered_digest, made, arrived_ms, plugin,
             digest, reason, backtrace, written_ms, route, kept_bytes)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19,
             ?20, ?21, ?22)
         ON CONFLICT (stream, shard, sequence, sub_sequence, place, output) {on_conflict}"
    ))?;
    let mut keeper = Keeper::new(state, (stream, shard));
    for dead_letter in dead_letters {
        let own = keeper.keep(dead_letter)?;
        let (sequence, sub) = columns(&dead_letter.key.position);
        insert.execute(rusqlite::params![
            stream,
            shard,
            sequence,
            sub,
            dead_letter.key.place.to_string(),
            dead_letter.key.output,
            kept,
            own.record,
            own.kind,
            own.key,
            own.entered,
            own.bytes,
            own.digest,
            own.made,
            dead_letter.arrived_ms,
            own.plugin,
            &*dead_letter.digest,
            own.reason,
            own.backtrace,
            now_ms(),
            dead_letter.route.as_str(),
            own.kept_bytes,
        ])?;
    }
    Ok(())
}
