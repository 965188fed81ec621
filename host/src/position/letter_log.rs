//! The log of letters that have become visible, in that order: what copies of them are made from.
//!
//! A letter's own number says nothing of when it was shown, since some are hidden for a while. Triggers
//! of the database number each when it is; one that is deleted is gone from the log as well. Letters of a
//! redrive are numbered when it is finished, if they stay: until then nobody waits for them.

use serde_json::{Value, json};

use super::letters::{DeadLetters, EnteredDigest, LETTER_COLUMNS, SHOWN, StoredLetter};
use super::store::StateError;
use crate::record::{PipelineName, SequenceNumber, StreamIdentity};
use crate::sink::Column;

/// The name of the stream that letters are, once they are shown.
const STREAM: &str = "dead-letters";

/// A letter with its place in the log.
#[derive(Clone, Debug)]
pub struct LoggedLetter {
    /// Its place, from 1.
    pub number: u64,
    /// The letter.
    pub letter: StoredLetter,
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
            .write("read the log of dead letters", |state| {
                state.query_row("SELECT created_ms FROM letter_log_stream", [], |row| row.get(0))
            })
            .await?;
        Ok(StreamIdentity { name: STREAM.into(), arn, created_ms })
    }

    /// Letters behind `after`, at most `limit`, in order, and none behind the one that passes `bytes`.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn logged(
        &self,
        after: u64,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<LoggedLetter>, StateError> {
        self.store
            .write("read the log of dead letters", move |state| {
                let mut query = state.prepare_cached(&format!(
                    "SELECT number, {LETTER_COLUMNS} FROM letter_log
                     JOIN letters ON letters.id = letter
                     WHERE number > ?1 AND held = {SHOWN} ORDER BY number LIMIT ?2"
                ))?;
                let mut rows = query.query((after, limit))?;
                let (mut logged, mut held_bytes) = (Vec::new(), 0);
                while let Some(row) = rows.next()? {
                    let letter = StoredLetter::read(row, 1)?;
                    held_bytes += letter.original.len() + letter.partition_key.len();
                    // A plugin's key is as long as it likes.
                    held_bytes += letter.entered.len() + letter.entered_key.len();
                    held_bytes += letter.reason.len() + letter.backtrace.len();
                    logged.push(LoggedLetter { number: row.get(0)?, letter });
                    if held_bytes >= bytes {
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
            .write(action, move |state| {
                state.execute("DELETE FROM letter_log WHERE number <= ?1", [up_to])
            })
            .await
            .map(drop)
    }
}

impl StoredLetter {
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
            "original": payload(&self.original),
            "entered_key": payload(&self.entered_key),
            "entered": match &self.entered_digest {
                Some(EnteredDigest { sha256, bytes }) => json!({ "sha256": sha256, "bytes": bytes }),
                None => payload(&self.entered),
            },
            "arrived_ms": self.arrived_ms,
            "plugin": self.plugin,
            "digest": self.digest,
            "reason": self.reason,
            "backtrace": self.backtrace,
            "written_ms": self.written_ms,
        })
    }

    /// The columns of [`StoredLetter::to_json`], for tables.
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
    use crate::position::{DeadLetter, LetterFilter, LetterKey, MadeBy, StateStore};
    use crate::record::{LetterPlace, Position, ShardKey, SinkName};

    fn letter(sequence: u64) -> DeadLetter {
        let position = Position { sequence: SequenceNumber::from(sequence), sub_sequence: 0 };
        let key = LetterKey { position, place: LetterPlace::Sink("mart".into()), output: 0 };
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
    async fn fault_10_copies_pass_over_letters_of_an_unfinished_redrive() {
        use crate::position::Redrives;
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let letters = DeadLetters::new(store.clone());
        let pipeline = PipelineName::from("cars");
        let stream = letters.log_stream(&pipeline).await.expect("a stream");
        let shard =
            ShardKey { pipeline: pipeline.clone(), stream: stream.into(), shard: "shard".into() };
        letters.put(&shard, vec![letter(1)], false).await.expect("written");
        let redrives = Redrives::new(store, pipeline.clone());
        let id = redrives.begin(LetterFilter::default()).await.expect("begun").expect("a letter");
        let own = ShardKey { stream: id.stream(&pipeline).into(), shard: id.shard(), pipeline };
        // It failed again, elsewhere; then the redrive was broken off.
        let mut again = letter(1);
        again.key.place = LetterPlace::Sink("other".into());
        letters.put(&own, vec![again], false).await.expect("written");
        letters.put(&shard, vec![letter(2)], false).await.expect("written");
        let logged = async || -> Vec<(u64, String, String)> {
            let logged = letters.logged(0, 10, 1_000).await.expect("a log");
            let shown =
                |one: super::LoggedLetter| (one.number, one.letter.sequence, one.letter.place);
            logged.into_iter().map(shown).collect()
        };
        let of = |number, sequence: &str, place: &str| (number, sequence.into(), place.into());
        let before = [of(1, "1", "sink:mart"), of(2, "2", "sink:mart")];
        assert_eq!(logged().await, before, "nothing waits for the redrive");
        assert_eq!(letters.count().await.expect("counted"), 2);
        // At its end the one that stays is numbered anew.
        let moved = "UPDATE letters SET stream = 'dead-letters', shard = 'shard'
                     WHERE stream GLOB 'letters:*'";
        letters.store.write("move", |state| state.execute(moved, [])).await.expect("moved");
        assert_eq!(logged().await, [before.to_vec(), vec![of(3, "1", "sink:other")]].concat());
    }

    #[tokio::test]
    async fn wall_04_copies_read_no_more_keys_at_once_than_they_may() {
        const MIB: usize = 1 << 20;
        let folder = tempfile::tempdir().expect("a folder");
        let letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let pipeline = PipelineName::from("cars");
        let stream = letters.log_stream(&pipeline).await.expect("a stream");
        let shard = ShardKey { pipeline, stream: stream.into(), shard: "shard".into() };
        let with_key =
            |sequence| DeadLetter { entered_key: vec![b'k'; MIB - 1].into(), ..letter(sequence) };
        letters.put(&shard, (1..9).map(with_key).collect::<Vec<_>>(), false).await.expect("put");
        let logged = letters.logged(0, 100, 2 * MIB).await.expect("a log");
        assert_eq!(logged.len(), 2, "of eight letters");
    }

    #[tokio::test]
    async fn letters_are_logged_when_they_are_shown() {
        let folder = tempfile::tempdir().expect("a folder");
        let letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let pipeline = PipelineName::from("cars");
        let stream = letters.log_stream(&pipeline).await.expect("a stream");
        let shard = ShardKey { pipeline, stream: stream.into(), shard: "shard".into() };
        let numbers = async |after| -> Vec<(u64, String)> {
            let logged = letters.logged(after, 10, 1_000).await.expect("a log");
            logged.into_iter().map(|one| (one.number, one.letter.sequence)).collect()
        };
        letters.put(&shard, vec![letter(1)], true).await.expect("written");
        letters.put(&shard, vec![letter(2)], false).await.expect("written");
        assert_eq!(numbers(0).await, [(1, "2".into())]);
        // Again, as by a replay: it is the same letter.
        letters.put(&shard, vec![letter(2)], false).await.expect("written");
        let sink = SinkName::from("mart");
        letters.settle(&shard, &sink, &letter(1).key.position).await.expect("settled");
        assert_eq!(numbers(0).await, [(1, "2".into()), (2, "1".into())]);
        assert_eq!(numbers(1).await, [(2, "1".into())]);
        // What a redrive has delivered is an empty mark.
        let mark = "UPDATE letters SET held = 3 WHERE rowid = 1";
        let marked = letters.store.write("mark", |state| state.execute(mark, [])).await;
        assert_eq!((marked.ok(), numbers(0).await.len()), (Some(1), 1));
        letters.purge(LetterFilter::default()).await.expect("purged");
        letters.put(&shard, vec![letter(2)], false).await.expect("written");
        assert_eq!(numbers(2).await.len(), 1, "numbers are not given twice");
        letters.forget_log(&SequenceNumber::from(3)).await.expect("forgotten");
        assert_eq!((numbers(0).await.len(), letters.count().await.expect("a count")), (0, 1));
    }
}
