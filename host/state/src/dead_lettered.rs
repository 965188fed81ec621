//! Items that already have a dead letter of a stage. A replay does not run them again.
//!
//! **Why.** A record that timed out once may succeed when it is replayed. A sink that is already past the record
//! would not get its rows, another sink would, and a redrive of the dead letter would bring them once more.
//!
//! **How much is read.** After a sink was blocked for a long time, millions of such dead letters may lie above the
//! checkpoint. So a starting lane reads only up to which position they reach ([`DeadLetters::dead_lettered_to`]), and
//! looks up those of each batch before it runs the batch ([`DeadLetters::dead_lettered_within`]).
//!
//! **Race.** A user may redrive or purge a dead letter while the lane is still below it. Then a mark stays in its
//! place until the checkpoint has passed it ([`forget`](super::dead_letters::forget)), and the item counts as
//! dead-lettered all the same.

use std::collections::HashMap;

use rusqlite::OptionalExtension as _;

use super::dead_letter_store::DeadLetterKey;
use super::dead_letters::{DeadLetters, REDRIVEN};
use super::store::{StateError, columns, position as position_of};
use shardmill_core::record::{DeadLetterPlace, Position, ShardKey, StageName};

/// The items of a batch that already have a dead letter of a stage. Takes four bytes for each, besides an entry for
/// each record.
#[derive(Clone, Debug, Default)]
pub struct DeadLetteredItems {
    of_record: HashMap<Position, Vec<OfPlace>>,
}

/// Dead-lettered items of a record at one stage.
#[derive(Clone, Debug)]
struct OfPlace {
    place: DeadLetterPlace,
    /// Ascending.
    outputs: Vec<u32>,
}

impl DeadLetteredItems {
    /// Whether no item is dead-lettered.
    pub fn is_empty(&self) -> bool {
        self.of_record.is_empty()
    }

    /// Whether this item already has its dead letter.
    pub fn contains(&self, key: &DeadLetterKey) -> bool {
        let mut places = self.of_record.get(&key.position).into_iter().flatten();
        places.any(|own| own.place == key.place && own.outputs.binary_search(&key.output).is_ok())
    }

    fn add(&mut self, key: DeadLetterKey) {
        let DeadLetterKey { position, place, output } = key;
        let places = self.of_record.entry(position).or_default();
        let known = places.iter().position(|own| own.place == place);
        let at = known.unwrap_or_else(|| {
            places.push(OfPlace { place, outputs: Vec::new() });
            places.len() - 1
        });
        let outputs = &mut places[at].outputs;
        // The database returns them in order, so each is appended at the end.
        if let Err(at) = outputs.binary_search(&output) {
            outputs.insert(at, output);
        }
    }
}

impl FromIterator<DeadLetterKey> for DeadLetteredItems {
    fn from_iter<T: IntoIterator<Item = DeadLetterKey>>(keys: T) -> Self {
        let mut dead_lettered = Self::default();
        keys.into_iter().for_each(|key| dead_lettered.add(key));
        dead_lettered
    }
}

impl DeadLetters {
    /// Returns the last record after `above` that has a dead letter of a stage, or the mark of one. Deletes the marks
    /// up to `above`: nothing at or before that position is replayed any more.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn dead_lettered_to(
        &self,
        shard: &ShardKey,
        above: Option<&Position>,
    ) -> Result<Option<Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (sequence, sub) = above.map(columns).unwrap_or_default();
        self.store
            .transact("read the dead letters", move |state| {
                state
                    .prepare_cached(
                        "DELETE FROM letters WHERE stream = ?1 AND shard = ?2 AND held = ?5
                         AND (sequence, sub_sequence) <= (?3, ?4)",
                    )?
                    .execute((&stream, &shard, &sequence, sub, REDRIVEN))?;
                let mut query = state.prepare_cached(
                    "SELECT sequence, sub_sequence FROM letters
                     WHERE stream = ?1 AND shard = ?2 AND (sequence, sub_sequence) > (?3, ?4)
                         AND place GLOB 'stage:*'
                     ORDER BY sequence DESC, sub_sequence DESC LIMIT 1",
                )?;
                let last = query.query_row((&stream, &shard, &sequence, sub), |row| {
                    position_of(row.get(0)?, row.get(1)?)
                });
                last.optional()
            })
            .await
    }

    /// Reads which items of the records from `first` to `last`, both inclusive, already have a dead letter of a
    /// stage.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn dead_lettered_within(
        &self,
        shard: &ShardKey,
        (first, last): (&Position, &Position),
    ) -> Result<DeadLetteredItems, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (first, last) = (columns(first), columns(last));
        self.store
            .transact("read the dead letters", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sequence, sub_sequence, substr(place, 7), output FROM letters
                     WHERE stream = ?1 AND shard = ?2 AND (sequence, sub_sequence) >= (?3, ?4)
                         AND (sequence, sub_sequence) <= (?5, ?6) AND place GLOB 'stage:*'
                     ORDER BY sequence, sub_sequence, place, output",
                )?;
                let range = (&stream, &shard, &first.0, first.1, &last.0, last.1);
                let keys = query.query_map(range, |row| {
                    Ok(DeadLetterKey {
                        position: position_of(row.get(0)?, row.get(1)?)?,
                        place: DeadLetterPlace::Stage(StageName::new(row.get::<_, String>(2)?)),
                        output: row.get(3)?,
                    })
                })?;
                keys.collect()
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeadLetter, MadeBy, StateStore};
    use shardmill_core::record::{SequenceNumber, StreamIdentity};

    fn key(number: u64, stage: &str, output: u32) -> DeadLetterKey {
        let position = Position { sequence: SequenceNumber::from(number), sub_sequence: 0 };
        DeadLetterKey { position, place: DeadLetterPlace::Stage(stage.into()), output }
    }

    fn dead_letter(key: DeadLetterKey) -> DeadLetter {
        DeadLetter {
            key,
            partition_key: "k".into(),
            original: "o".into(),
            entered_key: "k".into(),
            entered: "o".into(),
            route: "records".into(),
            arrived_ms: 1,
            plugin: "".into(),
            digest: "".into(),
            reason: "no JSON".into(),
            backtrace: String::new(),
            made: MadeBy::at_source("revision"),
        }
    }

    #[test]
    fn an_item_is_dead_lettered_at_its_own_stage_alone() {
        let keys =
            [key(7, "decode", 9), key(7, "decode", 2), key(7, "route", 2), key(8, "route", 0)];
        let dead_lettered: DeadLetteredItems = keys.clone().into_iter().collect();
        assert!(keys.iter().all(|key| dead_lettered.contains(key)));
        for other in
            [key(7, "decode", 3), key(7, "route", 9), key(8, "decode", 0), key(9, "route", 0)]
        {
            assert!(!dead_lettered.contains(&other), "{other:?}");
        }
        assert!(DeadLetteredItems::default().is_empty() && !dead_lettered.is_empty());
    }

    /// A lane holds those of one batch only, however many there are.
    #[tokio::test]
    async fn wall_04_dead_letters_above_the_start_are_read_a_batch_at_a_time() {
        const LAST: u64 = 2_500;
        const BATCH: u64 = 100;
        let folder = tempfile::tempdir().expect("a folder");
        let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let (stream, pipeline) = (stream.into(), "cars".into());
        let shard = ShardKey { pipeline, stream, shard: "shard".into() };
        let other = ShardKey { shard: "other".into(), ..shard.clone() };
        // Even sequence numbers only, with two items each.
        let numbers = || (2..=LAST).step_by(2);
        let keys = |number| [key(number, "decode", 0), key(number, "decode", 1)];
        let all: Vec<DeadLetter> = numbers().flat_map(keys).map(dead_letter).collect();
        dead_letters.put(&shard, all, false).await.expect("written");
        dead_letters
            .put(&other, vec![dead_letter(key(LAST + 9, "decode", 0))], false)
            .await
            .expect("written");
        let at = |number| key(number, "", 0).position;
        let to = async |above: u64| {
            dead_letters.dead_lettered_to(&shard, Some(&at(above))).await.expect("read")
        };
        assert_eq!(
            dead_letters.dead_lettered_to(&shard, None).await.expect("read"),
            Some(at(LAST))
        );
        assert_eq!((to(LAST - 1).await, to(LAST).await), (Some(at(LAST)), None));
        let mut found = Vec::new();
        for first in (1..=LAST).step_by(BATCH as usize) {
            let (first, last) = (first, first + BATCH - 1);
            let dead_lettered =
                dead_letters.dead_lettered_within(&shard, (&at(first), &at(last))).await;
            let dead_lettered = dead_lettered.expect("read");
            assert_eq!(
                dead_lettered.of_record.len() as u64,
                BATCH / 2,
                "held of {first} to {last}"
            );
            let is_whole =
                |number: &u64| keys(*number).iter().all(|key| dead_lettered.contains(key));
            found.extend((first..=last).filter(is_whole));
        }
        assert_eq!(found, numbers().collect::<Vec<_>>());
    }
}
