//! Decides how much of each dead letter is kept, and bounds the store of all dead letters.
//!
//! | part of a dead letter | kept as |
//! |---|---|
//! | the record as it was put on the stream | whole, once for all its dead letters (`letter_record`) |
//! | key and payload that entered the failing place, if they are the record's | not once more (`AS_ORIGINAL`) |
//! | the same, different from the record, up to 1 MiB per record and place | whole (`KEPT`) |
//! | the same, beyond that 1 MiB | SHA-256 digest and length (`AS_DIGEST`); whole if it cannot be computed again |
//! | reason, backtrace, plugin name | up to 8 KiB each |
//!
//! The engine also cuts each reason to 128 bytes once the reasons of one run exceed 8 MiB.
//!
//! A payload that is kept as a digest is computed again when a redrive needs it: the stages before the failing
//! place run once more, in the revision that ran then ([`StagesRun`]). The digest verifies the result.
//!
//! The store as a whole has a bound ([`StoreBound`]). A write that would exceed it changes nothing and fails. The
//! lane that has dead letters to write then waits and reports why, because a record without an outcome must not be
//! passed. Three facts keep this from blocking for ever:
//!
//! - A write that does not enlarge the store always passes. A replay writes the same dead letters again, and the
//!   bound may have been lowered since.
//! - A redrive may use twice the bound: its dead letters replace those that it started from when it finishes.
//! - The size is counted by triggers in the same transaction, so it is exact after a crash.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use bytesize::ByteSize;
use rusqlite::{OptionalExtension as _, Transaction};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::damaged::invalid;
use super::redrive_key::{is_redrive_key, redrive_of};
use super::store::columns;
use shardmill_core::metric;
use shardmill_core::record::excerpt;
use shardmill_core::record::{Batch, DeadLetterPlace, Entry, Position, RouteName};

/// Limit on the payloads and keys that are kept whole, in bytes, per record and place of failure. One record of
/// 10 MiB may become thousands of items that all fail.
const ENTERED_BYTES_MAX: usize = 1 << 20;
/// Bytes counted for each dead letter in addition to its texts and payloads.
pub(super) const DEAD_LETTER_BYTES: usize = 512;
/// Default bound of the store, in bytes. On a small disk, half of the free space applies instead.
const STORE_BYTES_MAX: u64 = 10 << 30;

/// The key and payload that entered the place of failure are kept whole (column `entered_kind`).
pub(super) const KEPT: u8 = 0;
/// They are not kept, because they equal the record as it was put.
pub(super) const AS_ORIGINAL: u8 = 1;
/// They are kept as a digest only, because they are too large.
pub(super) const AS_DIGEST: u8 = 2;

/// Identifies a dead letter within its shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeadLetterKey {
    /// The record's position.
    pub position: Position,
    /// The stage or sink where it failed.
    pub place: DeadLetterPlace,
    /// Index of the failed item among the record's items at that place, from 0.
    pub output: u32,
}

/// A dead letter.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// Identifies it within its shard.
    pub key: DeadLetterKey,
    /// The partition key that the record was put with.
    pub partition_key: Bytes,
    /// The record's data as it was put.
    pub original: Bytes,
    /// The partition key that entered the failing place.
    pub entered_key: Bytes,
    /// The payload that entered the failing place. A redrive starts with it.
    pub entered: Bytes,
    /// The route by which it reached that place.
    pub route: RouteName,
    /// When the stream accepted the record, milliseconds since 1970.
    pub arrived_ms: u64,
    /// The plugin's name and version; empty for a sink. Shared, because one record may have thousands of dead
    /// letters.
    pub plugin: Arc<str>,
    /// The plugin's digest; empty for a sink.
    pub digest: Arc<str>,
    /// Reason of the failure.
    pub reason: String,
    /// The plugin's backtrace, if it trapped.
    pub backtrace: String,
    /// The run that brought the record to that place.
    pub made: MadeBy,
}

/// The run that brought a record to the place where it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MadeBy {
    /// Id of the revision that ran.
    pub revision: Arc<str>,
    /// Place and route at which a redriven record entered; `None`: it came from the source.
    enters: Option<(DeadLetterPlace, RouteName)>,
    /// The payload that entered the place of failure is kept whole, whatever its size: it cannot be computed again.
    keeps_whole: bool,
}

impl MadeBy {
    /// Describes a run that starts at the source.
    #[cfg(test)]
    pub(super) fn at_source(revision: &str) -> Self {
        Self { revision: revision.into(), enters: None, keeps_whole: false }
    }

    /// Describes the run of a batch by a revision.
    pub fn of(batch: &Batch, revision: &Arc<str>) -> Self {
        let revision = revision.clone();
        match &batch.entry {
            Entry::Source => Self { revision, enters: None, keeps_whole: false },
            Entry::Redrive(redrive) => Self {
                revision,
                enters: Some((redrive.place.clone(), redrive.route.clone())),
                keeps_whole: redrive.keeps_whole,
            },
        }
    }
}

/// One run of stages on the way to a dead letter's place. The first step starts with the record, each later one (a
/// redrive) with the output of the step before. Stored as JSON in the column `made`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagesRun {
    /// The revision that ran.
    pub revision: String,
    /// The stage at which a redrive entered; `None`: the run started at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// The route by which it entered that stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Digest of the run's output, as [`entered_digest`] computes it.
    pub sha256: String,
}

impl StagesRun {
    fn of(made: &MadeBy, sha256: String) -> Self {
        let (place, route) = match &made.enters {
            Some((place, route)) => (Some(place.to_string()), Some(route.to_string())),
            None => (None, None),
        };
        Self { revision: made.revision.to_string(), place, route, sha256 }
    }
}

/// Computes the digest of a key and a payload: SHA-256 over the key's length, the key and the payload, in hex. The
/// length keeps `("ab", "c")` and `("a", "bc")` apart.
pub fn entered_digest(key: &[u8], payload: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update((key.len() as u64).to_le_bytes());
    hash.update(key);
    hash.update(payload);
    hex::encode(hash.finalize())
}

/// Prepares the dead letters of one shard for their rows: stores each record once, and decides how the payloads are
/// kept.
pub(super) struct Keeper<'t> {
    state: &'t Transaction<'t>,
    shard: (&'t str, &'t str),
    /// The redrive that these dead letters belong to, if the shard is one.
    redrive: Option<i64>,
    /// The previous dead letter. Those of one record are mostly neighbours, and those of one place within it: this
    /// saves a query for each, and it counts what is kept per record and place.
    last: Option<Last>,
}

/// A dead letter that was kept, as far as the next one needs it.
struct Last {
    sequence: String,
    sub_sequence: u64,
    record: Option<i64>,
    place: DeadLetterPlace,
    /// Bytes kept so far of the payloads that entered this place, over the neighbouring dead letters of the record.
    entered_bytes: usize,
}

/// The parts of a dead letter that go into its row.
pub(super) struct Kept<'l> {
    pub(super) record: Option<i64>,
    pub(super) kind: u8,
    pub(super) key: &'l [u8],
    pub(super) entered: &'l [u8],
    pub(super) bytes: usize,
    pub(super) digest: String,
    pub(super) made: String,
    pub(super) plugin: String,
    pub(super) reason: String,
    pub(super) backtrace: String,
    pub(super) kept_bytes: usize,
}

impl<'t> Keeper<'t> {
    pub(super) fn new(state: &'t Transaction<'t>, shard: (&'t str, &'t str)) -> Self {
        let redrive = is_redrive_key(shard.0).then(|| redrive_of(shard.0)).flatten();
        Self { state, shard, redrive, last: None }
    }

    /// Stores the record of a dead letter, unless it is stored already, and decides how its other parts are kept.
    pub(super) fn keep<'l>(&mut self, dead_letter: &'l DeadLetter) -> rusqlite::Result<Kept<'l>> {
        let (sequence, sub) = columns(&dead_letter.key.position);
        let last =
            self.last.take().filter(|last| (&last.sequence, last.sub_sequence) == (&sequence, sub));
        // The record is stored with its first dead letter. In a redrive it exists already, under the original.
        let record = match (&last, self.redrive) {
            (Some(last), _) => last.record,
            (None, Some(redrive)) => self.record_of_redriven(redrive, &sequence)?,
            (None, None) => Some(self.record(dead_letter, &sequence, sub)?),
        };
        // In a redrive `original` is the redriven payload, not the record as it was put.
        let is_original = self.redrive.is_none()
            && dead_letter.entered == dead_letter.original
            && dead_letter.entered_key == dead_letter.partition_key;
        let bytes = dead_letter.entered.len() + dead_letter.entered_key.len();
        let before = match &last {
            Some(last) if last.place == dead_letter.key.place => last.entered_bytes,
            _ => 0,
        };
        let kind = kind(is_original, dead_letter.made.keeps_whole, before, bytes);
        let kept = if kind == KEPT { bytes } else { 0 };
        let (place, entered_bytes) = (dead_letter.key.place.clone(), before + kept);
        self.last = Some(Last { sequence, sub_sequence: sub, record, place, entered_bytes });
        // Digest and step are stored for what a redrive may have to compute again.
        let (digest, made) = match (is_original, dead_letter.made.keeps_whole) {
            (true, _) | (_, true) => (String::new(), String::new()),
            _ => {
                let digest = entered_digest(&dead_letter.entered_key, &dead_letter.entered);
                let step = [StagesRun::of(&dead_letter.made, digest.clone())];
                // Text only: serialising it cannot fail.
                (digest, serde_json::to_string(&step).unwrap_or_default())
            }
        };
        let reason = excerpt(dead_letter.reason.as_bytes());
        let backtrace = excerpt(dead_letter.backtrace.as_bytes());
        let plugin = excerpt(dead_letter.plugin.as_bytes());
        let texts = reason.len() + backtrace.len() + made.len() + plugin.len();
        let (key, entered): (&[u8], &[u8]) = match kind {
            KEPT => (&dead_letter.entered_key, &dead_letter.entered),
            _ => (&[], &[]),
        };
        Ok(Kept {
            record,
            kind,
            key,
            entered,
            bytes: dead_letter.entered.len(),
            digest,
            made,
            plugin,
            reason,
            backtrace,
            kept_bytes: DEAD_LETTER_BYTES + texts + kept,
        })
    }

    /// Returns the row id of a dead letter's record, and inserts the record if this is its first dead letter.
    fn record(&self, dead_letter: &DeadLetter, sequence: &str, sub: u64) -> rusqlite::Result<i64> {
        let (stream, shard) = self.shard;
        let known = "SELECT id FROM letter_record
                     WHERE stream = ?1 AND shard = ?2 AND sequence = ?3 AND sub_sequence = ?4";
        let mut known = self.state.prepare_cached(known)?;
        let known = known.query_row((stream, shard, sequence, sub), |row| row.get(0)).optional()?;
        if let Some(known) = known {
            return Ok(known);
        }
        let insert = "INSERT INTO letter_record
                          (stream, shard, sequence, sub_sequence, partition_key, original)
                      VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        let (key, original) = (&dead_letter.partition_key[..], &dead_letter.original[..]);
        self.state.prepare_cached(insert)?.insert((stream, shard, sequence, sub, key, original))
    }

    /// Returns the row id of the record that a redriven dead letter came from. The redrive's own shard has no
    /// records: its sequence numbers are ordinals of the redrive.
    fn record_of_redriven(&self, redrive: i64, sequence: &str) -> rusqlite::Result<Option<i64>> {
        let origin = "SELECT o.record FROM redrive r JOIN letters o ON o.id = r.letter
                      WHERE r.id = ?1 AND r.ordinal = CAST(ltrim(?2, '0') AS INTEGER)";
        let mut origin = self.state.prepare_cached(origin)?;
        Ok(origin.query_row((redrive, sequence), |row| row.get(0)).optional()?.flatten())
    }
}

/// Returns the error for an unknown value in the column `entered_kind`.
pub(super) fn unknown_kind(column: usize, found: u8) -> rusqlite::Error {
    let cause = format!(
        "invalid entered_kind {found} of a dead letter: expected {KEPT}, {AS_ORIGINAL} or {AS_DIGEST}"
    );
    invalid(column, rusqlite::types::Type::Integer, cause)
}

/// Decides how the entered payload is kept. `before`: bytes that are kept already for the same record and place.
fn kind(is_original: bool, keeps_whole: bool, before: usize, bytes: usize) -> u8 {
    match (is_original, keeps_whole) {
        (true, _) => AS_ORIGINAL,
        (_, true) => KEPT,
        _ if before + bytes <= ENTERED_BYTES_MAX => KEPT,
        _ => AS_DIGEST,
    }
}

/// The bound on the store as a whole. Clones share one value, so that a reload changes it for all.
#[derive(Clone)]
pub(super) struct StoreBound {
    bytes_max: Arc<AtomicU64>,
    /// The bound if none is configured.
    default_max: u64,
    is_nearly_full: Arc<AtomicBool>,
    /// Another store of this process publishes the metrics, not this one.
    is_unmeasured: Arc<AtomicBool>,
}

impl Default for StoreBound {
    fn default() -> Self {
        let (is_nearly_full, is_unmeasured) = (Arc::default(), Arc::default());
        let (bytes_max, default_max) = (Arc::new(STORE_BYTES_MAX.into()), STORE_BYTES_MAX);
        Self { bytes_max, default_max, is_nearly_full, is_unmeasured }
    }
}

/// A write was refused, because the store would exceed its bound.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoreFull {
    kept: u64,
    more: u64,
    bytes_max: u64,
}

impl StoreFull {
    /// Returns what to do. Room made by a redrive or a purge does not help if one batch alone exceeds the bound:
    /// only a higher bound does.
    pub(super) fn way_out(&self) -> String {
        match self.more > self.bytes_max {
            true => format!(
                "nothing was written; the dead letters of one batch exceed the whole limit: raise `bytes` under \
                 [dead_letters] to {} or more",
                ByteSize(self.kept.saturating_add(self.more))
            ),
            false => "nothing was written; redrive or purge dead letters (`shardmill dlq redrive`, `shardmill dlq \
                      purge`), or raise `bytes` under [dead_letters]"
                .into(),
        }
    }

    pub(super) fn cause(&self) -> String {
        let Self { kept, more, bytes_max } = self;
        format!(
            "the store of dead letters is full: it has {} of at most {}, and {} more must be written",
            ByteSize(*kept),
            ByteSize(*bytes_max),
            ByteSize(*more)
        )
    }
}

impl StoreBound {
    /// Computes the bound of a store in `folder` that holds `kept` bytes: `configured`, or by the free disk.
    pub(super) fn of(folder: &Path, kept: u64, configured: Option<usize>) -> Self {
        let default_max = default_max(free_bytes(folder), kept);
        let bound = Self { default_max, ..Self::default() };
        bound.set(configured);
        bound
    }

    /// Changes the configured bound.
    pub(super) fn set(&self, configured: Option<usize>) {
        let bytes_max = configured.map_or(self.default_max, |bytes| bytes as u64);
        self.bytes_max.store(bytes_max, Ordering::Release);
    }

    /// Leaves the metrics to another store of the process.
    pub(super) fn leave_metrics(&self) {
        self.is_unmeasured.store(true, Ordering::Release);
    }

    fn bytes_max(&self) -> u64 {
        self.bytes_max.load(Ordering::Acquire)
    }

    /// Writes dead letters of a stream, unless the store would exceed its bound: then nothing is changed. Returns
    /// the bytes that the store holds afterwards.
    ///
    /// A write that does not enlarge the store passes even when the store is over its bound: the bound may have
    /// been lowered since these dead letters were first written, and a replay that cannot write them again would
    /// never end.
    ///
    /// `are_there` says whether all of these dead letters exist already. It is called only if the store is full,
    /// before anything is written: a write that is rolled back costs as much as one that is kept, and a blocked
    /// lane retries often.
    pub(super) fn within(
        &self,
        state: &Transaction<'_>,
        stream: &str,
        are_there: impl FnOnce() -> rusqlite::Result<bool>,
        write: impl FnOnce() -> rusqlite::Result<()>,
    ) -> rusqlite::Result<Result<u64, StoreFull>> {
        // A redrive's dead letters replace the ones that it started from, but only when it finishes. Until then
        // both exist.
        let bytes_max = match is_redrive_key(stream) {
            true => self.bytes_max().saturating_mul(2),
            false => self.bytes_max(),
        };
        let kept = kept_bytes(state)?;
        if kept >= bytes_max && !are_there()? {
            return Ok(Err(StoreFull { kept, more: DEAD_LETTER_BYTES as u64, bytes_max }));
        }
        // The size after the write is known only once it was made: payloads may replace shorter or longer ones.
        state.execute_batch("SAVEPOINT letters_written")?;
        write()?;
        let now = kept_bytes(state)?;
        if now > kept && now > bytes_max {
            state.execute_batch("ROLLBACK TO letters_written; RELEASE letters_written")?;
            return Ok(Err(StoreFull { kept, more: now - kept, bytes_max }));
        }
        state.execute_batch("RELEASE letters_written")?;
        Ok(Ok(now))
    }

    /// Publishes the store's size as metrics, and warns once when it reaches 80 % of the bound.
    pub(super) fn show(&self, kept: u64) {
        let bytes_max = self.bytes_max();
        let is_nearly_full = is_nearly_full(kept, bytes_max);
        if !self.is_unmeasured.load(Ordering::Acquire) {
            metrics::gauge!(metric::DEAD_LETTERS_BYTES).set(kept as f64);
            metrics::gauge!(metric::DEAD_LETTERS_BYTES_MAX).set(bytes_max as f64);
            metrics::gauge!(metric::DEAD_LETTERS_NEARLY_FULL).set(f64::from(is_nearly_full));
        }
        if is_nearly_full && !self.is_nearly_full.swap(is_nearly_full, Ordering::AcqRel) {
            tracing::warn!(kept = %ByteSize(kept), most = %ByteSize(bytes_max),
                "the store of dead letters is nearly full; when it is full, lanes with dead letters wait: \
                 redrive or purge some, or raise `bytes` under [dead_letters]");
        }
        self.is_nearly_full.store(is_nearly_full, Ordering::Release);
    }
}

/// Whether at least 80 % of the bound is used.
fn is_nearly_full(kept: u64, bytes_max: u64) -> bool {
    kept >= bytes_max / 5 * 4
}

/// Computes the default bound: 10 GiB, or half of the space that dead letters could use if that is less. Their
/// present size counts as free space, so that the bound does not shrink at each start.
fn default_max(free: Option<u64>, kept: u64) -> u64 {
    free.map_or(STORE_BYTES_MAX, |free| (free.saturating_add(kept) / 2).min(STORE_BYTES_MAX))
}

/// Returns the free bytes of the disk of a folder, as far as unprivileged processes may use them.
fn free_bytes(folder: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    // SAFETY: statvfs is plain data, for which all zero bytes are a valid value.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL, and the call writes to `found` only.
    let done = unsafe { libc::statvfs(folder.as_ptr(), &raw mut found) };
    (done == 0).then(|| found.f_bavail.saturating_mul(found.f_frsize))
}

/// Returns the bytes that the store holds, as the triggers have counted them.
pub(super) fn kept_bytes(state: &Transaction<'_>) -> rusqlite::Result<u64> {
    let mut kept = state.prepare_cached("SELECT max(bytes, 0) FROM letter_store")?;
    kept.query_row([], |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeadLetterKey, DeadLetters, StateStore};
    use shardmill_core::record::{
        Position, PositionRange, SequenceNumber, ShardKey, SinkName, StreamIdentity,
    };

    #[test]
    fn wall_04_what_entered_is_kept_up_to_a_mebibyte_of_a_record_and_place() {
        const MIB: usize = 1 << 20;
        for (is_original, keeps_whole, before, bytes, expected) in [
            (true, false, 0, 10 * MIB, AS_ORIGINAL),
            (false, false, 0, MIB, KEPT),
            (false, false, 0, MIB + 1, AS_DIGEST),
            (false, false, MIB - 1, 1, KEPT),
            (false, false, MIB - 1, 2, AS_DIGEST),
            (false, true, MIB, 10 * MIB, KEPT),
        ] {
            let found = kind(is_original, keeps_whole, before, bytes);
            assert_eq!(found, expected, "{is_original} {keeps_whole} {before} {bytes}");
        }
    }

    #[tokio::test]
    async fn wall_04_a_full_store_takes_what_makes_it_no_larger() {
        let folder = tempfile::tempdir().expect("a folder");
        let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let (stream, pipeline) = (stream.into(), "cars".into());
        let shard = ShardKey { pipeline, stream, shard: "shard".into() };
        let dead_letter = |number: u64, reason: &str| DeadLetter {
            key: DeadLetterKey {
                position: Position { sequence: SequenceNumber::from(number), sub_sequence: 0 },
                place: DeadLetterPlace::Stage("decode".into()),
                output: 0,
            },
            partition_key: "k".into(),
            original: "o".into(),
            entered_key: "k".into(),
            entered: "o".into(),
            route: "records".into(),
            arrived_ms: 1,
            plugin: "".into(),
            digest: "".into(),
            reason: reason.into(),
            backtrace: String::new(),
            made: MadeBy::at_source("revision"),
        };
        let first = || vec![dead_letter(1, "no JSON"), dead_letter(2, "no JSON")];
        dead_letters.put(&shard, first(), false).await.expect("there is room");
        let kept = dead_letters.kept_bytes().await.expect("read");
        dead_letters.set_bound(Some(1));
        let longer = vec![dead_letter(1, "no JSON at all")];
        for (name, written, passes) in [
            ("a replay", first(), true),
            ("a shorter reason", vec![dead_letter(2, "no")], true),
            ("as it was", vec![dead_letter(2, "no JSON")], false),
            ("a longer reason", longer, false),
            ("one more", vec![dead_letter(1, "no JSON"), dead_letter(3, "no JSON")], false),
        ] {
            let done = dead_letters.put(&shard, written, false).await;
            let refused = done.map_err(|error| error.to_string()).err();
            assert_eq!(refused.is_none(), passes, "{name}: {refused:?}");
            assert!(refused.is_none_or(|why| why.contains("is full")), "{name}");
        }
        // Giving up an empty range writes no dead letter, so a full store does not refuse it.
        let (sink, at) = (SinkName::from("mart"), dead_letter(9, "").key.position);
        let own = dead_letters.acquire_shard(&shard, &sink, None).await.expect("acquired");
        let range = PositionRange { from_exclusive: None, to_inclusive: at };
        let given_up =
            dead_letters.give_up((&shard, &sink), own.epoch, &range, Vec::new(), true).await;
        assert_eq!(given_up.map_err(|error| error.to_string()), Ok(true));
        let (count, occupied) = (dead_letters.count().await, dead_letters.kept_bytes().await);
        assert_eq!((count.expect("counted"), occupied.expect("read")), (2, kept - 5));
    }

    #[test]
    fn wall_04_without_a_configured_bound_half_of_the_free_disk_is_left() {
        const GIB: u64 = 1 << 30;
        for (free, kept, expected) in [
            (None, 0, 10 * GIB),
            (Some(100 * GIB), 0, 10 * GIB),
            (Some(8 * GIB), 0, 4 * GIB),
            // Started again with 4 GiB of dead letters.
            (Some(4 * GIB), 4 * GIB, 4 * GIB),
        ] {
            assert_eq!(default_max(free, kept), expected, "{free:?} {kept}");
        }
        assert!(free_bytes(Path::new("/")).is_some());
    }

    #[test]
    fn wall_04_the_way_out_of_a_full_store_is_one_that_helps() {
        for (kept, more, helps) in [(90, 20, "redrive or purge"), (0, 101, "to 101 B or more")] {
            let way_out = StoreFull { kept, more, bytes_max: 100 }.way_out();
            assert!(way_out.contains(helps), "{way_out}");
        }
    }

    #[test]
    fn wall_04_a_warning_comes_at_four_fifths() {
        assert!(!is_nearly_full(79, 100));
        assert!(is_nearly_full(80, 100));
    }
}
