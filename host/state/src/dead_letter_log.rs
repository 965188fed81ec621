//! The log of letters that have become visible, in that order: what copies of them are made from.
//!
//! A letter's own number says nothing of when it was shown, since some are hidden for a while. Triggers
//! of the database number each when it is; one that is deleted is gone from the log as well. Letters of a
//! redrive are numbered when it is finished, if they stay: until then nobody waits for them.
//!
//! A record may have thousands of letters. The copy of one of them, the record's carrier, has the record whole;
//! the copies of the others have its digest, unless the record is small. The carrier is the first letter of
//! the record that was numbered. It is kept in the database, so a copy that is made once more has the same
//! bytes.
//!
//! | what becomes of a carrier | the next one |
//! |---|---|
//! | it stays, copied or not | none: later letters of the record have the digest |
//! | it is deleted, and every sink has its copy | none |
//! | it is deleted, and a sink may not have its copy | a letter that was numbered after it: a sink that has no copy of the carrier has none of that one |
//! | the same, and there is no such letter | the next that is numbered |

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

/// The name of the stream that letters are, once they are shown.
const STREAM: &str = "dead-letters";
/// A record up to this length is in the copy of each of its letters: that costs little, and saves a look.
const REPEATED_BYTES_MAX: usize = 4 << 10;

/// A letter with its place in the log.
#[derive(Clone, Debug)]
pub struct LoggedDeadLetter {
    /// Its place, from 1.
    pub number: u64,
    /// The letter.
    pub dead_letter: StoredDeadLetter,
}

impl DeadLetters {
    /// The log as a stream. It is another one when the state database is: numbers begin anew then.
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

    /// Letters behind `after`, at most `limit`, in order, and none behind the one that passes `bytes`. With
    /// the digest of a large record that the copy of another letter has.
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
                    // A plugin's key is as long as it likes.
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

    /// Forgets the log up to a number, whose letters everybody has. The letters stay.
    ///
    /// # Errors
    /// [`StateError`]; nothing was forgotten.
    pub async fn forget_log(&self, up_to: &SequenceNumber) -> Result<(), StateError> {
        let action = "shorten the log of dead letters";
        let up_to: i64 = up_to.as_str().parse().map_err(|error| {
            let cause = format!("{up_to} is not a number of this log: {error}");
            self.store.unreadable(action, cause, "nothing was changed; mend the copies' positions")
        })?;
        self.store
            .transact(action, move |state| {
                state.execute("DELETE FROM letter_log WHERE number <= ?1", [up_to])
            })
            .await
            .map(drop)
    }
}

/// The digests of a record.
struct Digests {
    /// Of its data.
    original: String,
    /// Of its key and data, as they entered a place.
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

    /// Puts them in the place of a letter's record, of that many bytes, and of what entered, if that is the
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
    /// All that is known of it, one JSON object: what `dlq export` writes, and what sinks of letters get.
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

    /// The columns of [`StoredDeadLetter::to_json`], for tables.
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

/// Bytes in JSON, so that they can be had back as they were: as text, or in base64. PostgreSQL's
/// documents hold no NUL.
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
        // It failed again, elsewhere; then the redrive was broken off.
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
        // At its end the one that stays is numbered anew.
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

    /// Letters of a record that is as long as this, one for each of its items.
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

    /// The copies of all letters in the log.
    async fn copies(dead_letters: &DeadLetters) -> Vec<(u64, Value)> {
        let logged = dead_letters.logged(0, 100, 1_000_000).await.expect("a log");
        logged.into_iter().map(|one| (one.number, one.dead_letter.to_json())).collect()
    }

    /// The numbers of those that have the record whole.
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
        // Whoever reads the rest gets the same, although the log begins later.
        dead_letters.forget_log(&SequenceNumber::from(2)).await.expect("forgotten");
        assert_eq!(copies(&dead_letters).await, before[2..]);
        // The copy of the carrier is there, the letter is not.
        let ids = vec![before[0].1["id"].as_i64().expect("a number")];
        let purged =
            dead_letters.purge(DeadLetterFilter { ids, ..DeadLetterFilter::default() }).await;
        assert_eq!(purged.expect("purged"), (1, 0));
        assert_eq!(copies(&dead_letters).await, before[2..]);
        // Of the same record, by a replay: a sink has it.
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
        // Again, as by a replay: it is the same letter.
        dead_letters.put(&shard, vec![dead_letter(2)], false).await.expect("written");
        let sink = SinkName::from("mart");
        dead_letters.confirm(&shard, &sink, &dead_letter(1).key.position).await.expect("settled");
        assert_eq!(numbers(0).await, [(1, "2".into()), (2, "1".into())]);
        assert_eq!(numbers(1).await, [(2, "1".into())]);
        // What a redrive has delivered is an empty mark.
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
