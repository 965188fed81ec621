//! Log of dead letters in the order in which they became visible. Copies of dead letters (`[dead_letters]`) are
//! made from it.
//!
//! The number of a dead letter does not say when it became visible, because some are pending for a while. So
//! triggers of the database give each one a log number at that moment. A dead letter that is deleted disappears
//! from the log as well. Dead letters of a redrive get a number when the redrive finishes, if they stay; the log
//! does not wait for them.
//!
//! **Large records.** A record may have thousands of dead letters, and copying it with each of them would multiply
//! it. The copy of one of them, the record's *carrier*, contains the record; the other copies contain its digest,
//! unless the record is small. The carrier is the record's first dead letter in the log. The choice is stored, so
//! that a copy that is made again has the same bytes.
//!
//! | the carrier | next carrier |
//! |---|---|
//! | stays | none: later dead letters of the record have the digest |
//! | is deleted, and every sink has its copy | none |
//! | is deleted, and a sink may lack its copy | a dead letter that was logged later: a sink without the first copy lacks this one too |
//! | the same, and there is no later one | the record's next dead letter in the log |

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rusqlite::Transaction;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::dead_letter_store::AS_ORIGINAL;
use super::dead_letters::{COPIED_COLUMNS, DeadLetters, PayloadDigest, StoredDeadLetter, VISIBLE};
use super::entered_digest;
use super::store::StateError;
use shardmill_core::record::Column;
use shardmill_core::record::{PipelineName, SequenceNumber, StreamIdentity};

/// Name of the stream that consists of visible dead letters.
const STREAM: &str = "dead-letters";
/// A record up to this length is contained in the copy of each of its dead letters: that costs little, and saves
/// readers a join.
const REPEATED_BYTES_MAX: usize = 4 << 10;

/// A dead letter with its log number.
#[derive(Clone, Debug)]
pub struct LoggedDeadLetter {
    /// Log number, from 1.
    pub number: u64,
    /// The dead letter.
    pub dead_letter: StoredDeadLetter,
}

impl DeadLetters {
    /// Returns the log as a stream. Another state database makes another stream, because its numbers start again
    /// from 1.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn log_stream(&self, pipeline: &PipelineName) -> Result<StreamIdentity, StateError> {
        let arn = format!("{STREAM}:{pipeline}").into();
        let created_ms = self
            .store
            .transact("read the log of dead letters", |state| {
                state.query_row("SELECT created_ms FROM letter_log_stream", [], |row| row.get(0))
            })
            .await?;
        Ok(StreamIdentity { name: STREAM.into(), arn, created_ms })
    }

    /// Reads dead letters after the log number `after`, in order: at most `limit`, and none after the one with
    /// which their size reaches `bytes`. Large records that the copy of another one contains are replaced by their
    /// digest.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn logged(
        &self,
        after: u64,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<LoggedDeadLetter>, StateError> {
        self.store
            .transact("read the log of dead letters", move |state| {
                let mut query = state.prepare_cached(&format!(
                    "SELECT record, entered_kind, (
                         SELECT length(original) FROM letter_record WHERE letter_record.id = record
                         AND coalesce(carrier, letters.id) <> letters.id AND length(original) > ?3),
                         number, {COPIED_COLUMNS}
                     FROM letter_log JOIN letters ON letters.id = letter
                     LEFT JOIN letter_carrier ON of_record = record
                     WHERE number > ?1 AND held = {VISIBLE} ORDER BY number LIMIT ?2"
                ))?;
                let mut rows = query.query((after, limit, REPEATED_BYTES_MAX))?;
                let (mut logged, mut occupied_bytes) = (Vec::new(), 0);
                let mut digests = HashMap::new();
                while let Some(row) = rows.next()? {
                    let mut dead_letter = StoredDeadLetter::read(row, 4)?;
                    if let Some(bytes) = row.get(2)? {
                        let kind: u8 = row.get(1)?;
                        let digests = match digests.entry(row.get::<_, i64>(0)?) {
                            Entry::Occupied(known) => known.into_mut(),
                            Entry::Vacant(none) => {
                                let digests = Digests::of(state, *none.key())?;
                                none.insert(digests)
                            }
                        };
                        digests.stand_in(&mut dead_letter, bytes, kind == AS_ORIGINAL);
                    }
                    occupied_bytes += dead_letter.original.len() + dead_letter.partition_key.len();
                    // The key counts too: a plugin may make it as long as it likes.
                    occupied_bytes += dead_letter.entered.len() + dead_letter.entered_key.len();
                    occupied_bytes += dead_letter.reason.len() + dead_letter.backtrace.len();
                    logged.push(LoggedDeadLetter { number: row.get(3)?, dead_letter });
                    if occupied_bytes >= bytes {
                        break;
                    }
                }
                Ok(logged)
            })
            .await
    }

    /// Deletes the log up to a number that all sinks have reached. The dead letters stay.
    ///
    /// # Errors
    /// [`StateError`]; nothing was deleted.
    pub async fn forget_log(&self, up_to: &SequenceNumber) -> Result<(), StateError> {
        let action = "shorten the log of dead letters";
        let up_to: i64 = up_to.as_str().parse().map_err(|error| {
            let cause = format!("invalid number {up_to} of the log of dead letters: {error}");
            self.store.unreadable(
                action,
                cause,
                "nothing was changed; correct the sinks' positions",
            )
        })?;
        self.store
            .transact(action, move |state| {
                state.execute("DELETE FROM letter_log WHERE number <= ?1", [up_to])
            })
            .await
            .map(drop)
    }
}

/// Digests of a record.
struct Digests {
    /// Digest of its data.
    original: String,
    /// Digest of its key and data, as they entered a place.
    entered: String,
}

impl Digests {
    fn of(state: &Transaction<'_>, record: i64) -> rusqlite::Result<Self> {
        let mut query = state
            .prepare_cached("SELECT partition_key, original FROM letter_record WHERE id = ?1")?;
        query.query_row([record], |row| {
            let (key, original) = (row.get_ref(0)?.as_blob()?, row.get_ref(1)?.as_blob()?);
            let entered = entered_digest(key, original);
            Ok(Self { original: hex::encode(Sha256::digest(original)), entered })
        })
    }

    /// Replaces the record's data by its digest, for a record of `bytes` bytes; also what entered, if that is the
    /// record.
    fn stand_in(&self, dead_letter: &mut StoredDeadLetter, bytes: u64, entered_is_original: bool) {
        dead_letter.original_digest = Some(PayloadDigest { sha256: self.original.clone(), bytes });
        if entered_is_original {
            dead_letter.entered_digest =
                Some(PayloadDigest { sha256: self.entered.clone(), bytes });
        }
    }
}

impl StoredDeadLetter {
    /// Returns everything that is known of it as one JSON object: `dlq export` writes it, and the sinks of dead
    /// letters get it.
    pub fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "stream": self.stream,
            "shard": self.shard,
            "sequence": self.sequence,
            "sub_sequence": self.sub_sequence,
            "place": self.place,
            "key": payload(&self.partition_key),
            "original": payload_or_digest(&self.original, self.original_digest.as_ref()),
            "entered_key": payload(&self.entered_key),
            "entered": payload_or_digest(&self.entered, self.entered_digest.as_ref()),
            "arrived_ms": self.arrived_ms,
            "plugin": self.plugin,
            "digest": self.digest,
            "reason": self.reason,
            "backtrace": self.backtrace,
            "written_ms": self.written_ms,
        })
    }

    /// Returns the columns of [`StoredDeadLetter::to_json`], for tables.
    pub fn columns() -> Vec<Column> {
        let column = |(name, data_type): (&str, &str)| Column {
            name: name.into(),
            data_type: data_type.into(),
            nullable: false,
        };
        [
            ("id", "bigint"),
            ("stream", "text"),
            ("shard", "text"),
            ("sequence", "text"),
            ("sub_sequence", "bigint"),
            ("place", "text"),
            ("key", "jsonb"),
            ("original", "jsonb"),
            ("entered_key", "jsonb"),
            ("entered", "jsonb"),
            ("arrived_ms", "bigint"),
            ("plugin", "text"),
            ("digest", "text"),
            ("reason", "text"),
            ("backtrace", "text"),
            ("written_ms", "bigint"),
        ]
        .map(column)
        .into()
    }
}

fn payload_or_digest(bytes: &[u8], digest: Option<&PayloadDigest>) -> Value {
    match digest {
        Some(PayloadDigest { sha256, bytes }) => json!({ "sha256": sha256, "bytes": bytes }),
        None => payload(bytes),
    }
}

/// Encodes bytes in JSON without loss: as text, or in base64. PostgreSQL's jsonb cannot hold NUL.
fn payload(bytes: &[u8]) -> Value {
    use base64::Engine as _;
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => json!({ "text": text }),
        _ => json!({ "base64": base64::engine::general_purpose::STANDARD.encode(bytes) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeadLetter, DeadLetterFilter, DeadLetterKey, MadeBy, StateStore};
    use shardmill_core::record::{DeadLetterPlace, Position, ShardKey, SinkName};

    fn dead_letter(sequence: u64) -> DeadLetter {
        let position = Position { sequence: SequenceNumber::from(sequence), sub_sequence: 0 };
        let key =
            DeadLetterKey { position, place: DeadLetterPlace::Sink("mart".into()), output: 0 };
        DeadLetter {
            key,
            partition_key: "k".into(),
            original: "o\0".into(),
            entered_key: "k".into(),
            entered: "e".into(),
            route: "cars".into(),
            arrived_ms: 1,
            plugin: "".into(),
            digest: "".into(),
            reason: "no".into(),
            backtrace: String::new(),
            made: MadeBy::at_source("revision"),
        }
    }

    #[tokio::test]
    async fn fault_10_copies_pass_over_dead_letters_of_an_unfinished_redrive() {
        use crate::Redrives;
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let dead_letters = DeadLetters::new(store.clone());
        let pipeline = PipelineName::from("cars");
        let stream = dead_letters.log_stream(&pipeline).await.expect("a stream");
        let shard =
            ShardKey { pipeline: pipeline.clone(), stream: stream.into(), shard: "shard".into() };
        dead_letters.put(&shard, vec![dead_letter(1)], false).await.expect("written");
        let redrives = Redrives::new(store, pipeline.clone());
        let id =
            redrives.begin(DeadLetterFilter::default()).await.expect("begun").expect("a letter");
        let own = ShardKey { stream: id.stream(&pipeline).into(), shard: id.shard(), pipeline };
        // It failed again, elsewhere; then the redrive was interrupted.
        let mut again = dead_letter(1);
        again.key.place = DeadLetterPlace::Sink("other".into());
        dead_letters.put(&own, vec![again], false).await.expect("written");
        dead_letters.put(&shard, vec![dead_letter(2)], false).await.expect("written");
        let logged = async || -> Vec<(u64, String, String)> {
            let logged = dead_letters.logged(0, 10, 1_000).await.expect("a log");
            let shown = |one: super::LoggedDeadLetter| {
                (one.number, one.dead_letter.sequence, one.dead_letter.place)
            };
            logged.into_iter().map(shown).collect()
        };
        let of = |number, sequence: &str, place: &str| (number, sequence.into(), place.into());
        let before = [of(1, "1", "sink:mart"), of(2, "2", "sink:mart")];
        assert_eq!(logged().await, before, "nothing waits for the redrive");
        assert_eq!(dead_letters.count().await.expect("counted"), 2);
        // When the redrive finishes, the one that stays gets a number.
        let moved = "UPDATE letters SET stream = 'dead-letters', shard = 'shard'
                     WHERE stream GLOB 'letters:*'";
        dead_letters.store.transact("move", |state| state.execute(moved, [])).await.expect("moved");
        assert_eq!(logged().await, [before.to_vec(), vec![of(3, "1", "sink:other")]].concat());
    }

    #[tokio::test]
    async fn wall_04_copies_read_no_more_keys_at_once_than_they_may() {
        const MIB: usize = 1 << 20;
        let folder = tempfile::tempdir().expect("a folder");
        let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let pipeline = PipelineName::from("cars");
        let stream = dead_letters.log_stream(&pipeline).await.expect("a stream");
        let shard = ShardKey { pipeline, stream: stream.into(), shard: "shard".into() };
        let with_key = |sequence| DeadLetter {
            entered_key: vec![b'k'; MIB - 1].into(),
            ..dead_letter(sequence)
        };
        dead_letters
            .put(&shard, (1..9).map(with_key).collect::<Vec<_>>(), false)
            .await
            .expect("put");
        let logged = dead_letters.logged(0, 100, 2 * MIB).await.expect("a log");
        assert_eq!(logged.len(), 2, "of eight letters");
    }

    /// Makes the dead letters of a record of this length, one for each of its items.
    fn of_record(
        sequence: u64,
        bytes: usize,
        items: u32,
        place: &DeadLetterPlace,
    ) -> Vec<DeadLetter> {
        let item = |output| {
            let mut dead_letter = dead_letter(sequence);
            dead_letter.key.output = output;
            dead_letter.key.place = place.clone();
            dead_letter.original = vec![b'o'; bytes].into();
            dead_letter.entered = dead_letter.original.clone();
            dead_letter
        };
        (0..items).map(item).collect()
    }

    /// Returns the copies of all dead letters in the log.
    async fn copies(dead_letters: &DeadLetters) -> Vec<(u64, Value)> {
        let logged = dead_letters.logged(0, 100, 1_000_000).await.expect("a log");
        logged.into_iter().map(|one| (one.number, one.dead_letter.to_json())).collect()
    }

    /// Returns the numbers of the copies that contain the record.
    fn whole(copies: &[(u64, Value)]) -> Vec<u64> {
        let is_whole = |copy: &Value| copy["original"]["text"].is_string();
        copies.iter().filter(|(_, copy)| is_whole(copy)).map(|(number, _)| *number).collect()
    }

    #[tokio::test]
    async fn wall_04_a_record_is_copied_whole_with_one_of_its_dead_letters() {
        let folder = tempfile::tempdir().expect("a folder");
        let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let pipeline = PipelineName::from("cars");
        let stream = dead_letters.log_stream(&pipeline).await.expect("a stream");
        let shard = ShardKey { pipeline, stream: stream.into(), shard: "shard".into() };
        let mart = DeadLetterPlace::Sink("mart".into());
        let put = async || {
            for (sequence, bytes, items) in [(1, 5_000, 4), (2, 5_000, 1), (3, 4_096, 2)] {
                let of_record = of_record(sequence, bytes, items, &mart);
                dead_letters.put(&shard, of_record, false).await.expect("written");
            }
        };
        put().await;
        let before = copies(&dead_letters).await;
        assert_eq!(whole(&before), [1, 5, 6, 7], "one of each record, and all of a small one");
        let original = [b'o'; 5_000];
        let digest = hex::encode(Sha256::digest(original));
        assert_eq!(before[1].1["original"], json!({ "sha256": digest, "bytes": 5_000 }));
        let digest = entered_digest(b"k", &original);
        assert_eq!(before[1].1["entered"], json!({ "sha256": digest, "bytes": 5_000 }));
        // A sink that reads the rest gets the same copies, although the log begins later.
        dead_letters.forget_log(&SequenceNumber::from(2)).await.expect("forgotten");
        assert_eq!(copies(&dead_letters).await, before[2..]);
        // The copy of the carrier exists, the dead letter does not.
        let ids = vec![before[0].1["id"].as_i64().expect("a number")];
        let purged =
            dead_letters.purge(DeadLetterFilter { ids, ..DeadLetterFilter::default() }).await;
        assert_eq!(purged.expect("purged"), (1, 0));
        assert_eq!(copies(&dead_letters).await, before[2..]);
        // The same record once more, by a replay: a sink already has it.
        put().await;
        assert_eq!(whole(&copies(&dead_letters).await), [5, 6, 7]);
    }

    #[tokio::test]
    async fn wall_04_a_dead_letter_that_is_gone_before_it_was_copied_hands_its_record_on() {
        for place in [DeadLetterPlace::Sink("mart".into()), DeadLetterPlace::Stage("decode".into())]
        {
            let folder = tempfile::tempdir().expect("a folder");
            let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
            let pipeline = PipelineName::from("cars");
            let stream = dead_letters.log_stream(&pipeline).await.expect("a stream");
            let shard = ShardKey { pipeline, stream: stream.into(), shard: "shard".into() };
            dead_letters.put(&shard, of_record(1, 5_000, 3, &place), false).await.expect("written");
            for left in [vec![2_u64], vec![3], vec![]] {
                let ids = dead_letters.ids(DeadLetterFilter::default()).await.expect("ids");
                let first = DeadLetterFilter { ids: vec![ids[0]], ..DeadLetterFilter::default() };
                assert_eq!(dead_letters.purge(first).await.expect("purged").0, 1, "{place}");
                assert_eq!(whole(&copies(&dead_letters).await), left, "{place}");
            }
            dead_letters.put(&shard, of_record(2, 5_000, 2, &place), false).await.expect("written");
            assert_eq!(whole(&copies(&dead_letters).await).len(), 1, "{place}");
        }
    }

    #[tokio::test]
    async fn dead_letters_are_logged_when_they_become_visible() {
        let folder = tempfile::tempdir().expect("a folder");
        let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let pipeline = PipelineName::from("cars");
        let stream = dead_letters.log_stream(&pipeline).await.expect("a stream");
        let shard = ShardKey { pipeline, stream: stream.into(), shard: "shard".into() };
        let numbers = async |after| -> Vec<(u64, String)> {
            let logged = dead_letters.logged(after, 10, 1_000).await.expect("a log");
            logged.into_iter().map(|one| (one.number, one.dead_letter.sequence)).collect()
        };
        dead_letters.put(&shard, vec![dead_letter(1)], true).await.expect("written");
        dead_letters.put(&shard, vec![dead_letter(2)], false).await.expect("written");
        assert_eq!(numbers(0).await, [(1, "2".into())]);
        // Written again, as by a replay: it is the same dead letter.
        dead_letters.put(&shard, vec![dead_letter(2)], false).await.expect("written");
        let sink = SinkName::from("mart");
        dead_letters.confirm(&shard, &sink, &dead_letter(1).key.position).await.expect("confirmed");
        assert_eq!(numbers(0).await, [(1, "2".into()), (2, "1".into())]);
        assert_eq!(numbers(1).await, [(2, "1".into())]);
        // A redriven one is an empty mark.
        let mark = "UPDATE letters SET held = 3 WHERE rowid = 1";
        let marked = dead_letters.store.transact("mark", |state| state.execute(mark, [])).await;
        assert_eq!((marked.ok(), numbers(0).await.len()), (Some(1), 1));
        dead_letters.purge(DeadLetterFilter::default()).await.expect("purged");
        dead_letters.put(&shard, vec![dead_letter(2)], false).await.expect("written");
        assert_eq!(numbers(2).await.len(), 1, "numbers are not given twice");
        dead_letters.forget_log(&SequenceNumber::from(3)).await.expect("forgotten");
        assert_eq!((numbers(0).await.len(), dead_letters.count().await.expect("a count")), (0, 1));
    }
}
