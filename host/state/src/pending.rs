//! Pending dead letters: hidden until it is known what became of their rows.
//!
//! Two kinds are pending (column `held` of `letters`):
//!
//! | kind | written when | becomes visible when | deleted when |
//! |---|---|---|---|
//! | refused (1) | the sink refuses the row | the sink's position has passed it, or its range is given up | the shard is acquired with the position before it |
//! | given up (2) | the sink is out of reach for too long | the sink answers and lacks the row | the sink answers and has the row |
//!
//! **Refused rows.** The dead letter is durable before the commit, so that a crash between the two loses nothing.
//! If it were visible at once, a redrive could deliver the row although the commit never happened and the row comes
//! again: so it is deleted when the shard is acquired with a position before the row.
//!
//! **Rows that were given up.** The lane writes their dead letters and goes on without the sink. Nobody knows yet
//! whether the last attempt has landed: its reply may have been lost. All attempts since the sink stopped answering
//! begin at the same position; a later one reaches further and leaves out the rows that were given up before. The
//! sink accepts a commit only at its own position, so at most one attempt landed. Where the sink stands when it
//! answers says which:
//!
//! | the sink stands | so | dead letters |
//! |---|---|---|
//! | where all attempts begin | none landed | all become visible |
//! | where an attempt ends | this one landed | those after the end of the attempt before are deleted, the others become visible |
//! | before the beginning | a backup was restored | all become visible; the sink is given the range again |
//!
//! A sink without a position of its own (HTTP, Kinesis, stdout) cannot answer
//! this: its dead letters are visible at once.
//!
//! **Race of two owners.** [`DeadLetters::acquire_shard`] raises an epoch per shard and sink. [`DeadLetters::give_up`]
//! checks it in the same transaction: an earlier owner of the shard cannot give up rows that the new owner
//! delivers.

use rusqlite::Transaction;

use super::dead_letter_store::DeadLetter;
use super::dead_letters::{DeadLetters, GIVEN_UP, VISIBLE, are_there, insert};
use super::store::{StateError, columns, position as position_of};
use shardmill_core::record::{DeadLetterPlace, Position, PositionRange, ShardKey, SinkName};

/// The right to give up a sink's rows in a shard, and how far that went before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcquiredShard {
    /// Epoch of this owner: grows with each acquisition of the shard for the sink.
    pub epoch: i64,
    /// Rows up to here were given up: the sink needs none of them.
    pub given_up_to: Option<Position>,
}

impl DeadLetters {
    /// Gives up rows that a sink could not take: writes their dead letters, and that the sink needs nothing of the
    /// range. Durable on return. Returns false if the shard has another owner by now: nothing was written.
    ///
    /// The range begins where the sink stands. If the sink is found before that later, it was restored from a
    /// backup and needs more. `sink_keeps_position`: the dead letters stay pending until the sink has answered;
    /// otherwise they are visible at once.
    ///
    /// # Errors
    /// [`StateError`]; nothing was given up then.
    pub async fn give_up(
        &self,
        (shard, sink): (&ShardKey, &SinkName),
        epoch: i64,
        range: &PositionRange,
        dead_letters: Vec<DeadLetter>,
        sink_keeps_position: bool,
    ) -> Result<bool, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let place = DeadLetterPlace::Sink(sink.clone()).to_string();
        let sink = sink.to_string();
        let (sequence, sub) = columns(&range.to_inclusive);
        let (from, from_sub) = range.from_exclusive.as_ref().map(columns).unwrap_or_default();
        let (action, bound) = ("give up rows", self.bound.clone());
        let given_up = self
            .store
            .transact(action, move |state| {
                let owner: i64 = state
                    .prepare_cached(
                        "SELECT epoch FROM sink_owner
                         WHERE stream = ?1 AND shard = ?2 AND sink = ?3",
                    )?
                    .query_row((&stream, &shard, &sink), |row| row.get(0))?;
                if owner != epoch {
                    return Ok(None);
                }
                let kept = if sink_keeps_position { GIVEN_UP } else { VISIBLE };
                let are_there = || are_there(state, (&stream, &shard), &dead_letters);
                let write = || insert(state, (&stream, &shard), &dead_letters, kept, "DO NOTHING");
                let written = bound.within(state, &stream, are_there, write)?;
                if written.is_err() {
                    return Ok(Some(written));
                }
                // Rows that the table itself refused do not depend on where the sink stands: they become visible
                // now.
                show_refused(state, (&stream, &shard), &place, (&sequence, sub))?;
                state
                    .prepare_cached(
                        "INSERT OR IGNORE INTO given_up (sink, stream, shard, sequence, sub_sequence,
                             from_sequence, from_sub) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                    )?
                    .execute((&sink, &stream, &shard, &sequence, sub, &from, from_sub))?;
                Ok(Some(written))
            })
            .await?;
        match given_up {
            Some(written) => self.written(action, written).map(|()| true),
            None => Ok(false),
        }
    }

    /// Resolves the pending dead letters of a sink when its shard is acquired. The caller knows the sink's
    /// position, and has fenced earlier owners: they can no longer commit. Refused rows after the position will
    /// come again, so their dead letters are deleted. Rows that were given up and are in the sink after all lose
    /// their dead letters; the others become visible. From here on, earlier owners cannot give up rows.
    ///
    /// # Errors
    /// [`StateError`]; nothing was changed.
    pub async fn acquire_shard(
        &self,
        shard: &ShardKey,
        sink: &SinkName,
        position: Option<&Position>,
    ) -> Result<AcquiredShard, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (sequence, sub) = position.map(columns).unwrap_or_default();
        let place = DeadLetterPlace::Sink(sink.clone()).to_string();
        let sink = sink.to_string();
        self.store
            .transact("resolve pending dead letters", move |state| {
                // The order matters. What the position covers is committed and becomes visible; what is still
                // pending after that was never committed, and comes again.
                show_refused(state, (&stream, &shard), &place, (&sequence, sub))?;
                state
                    .prepare_cached(
                        "DELETE FROM letters WHERE stream = ?1 AND shard = ?2
                         AND place = ?3 AND held = 1",
                    )?
                    .execute((&stream, &shard, &place))?;
                // Ranges that begin after the sink's position: it was restored, and they say nothing about it any
                // more. What remains is compared below. A sink that stands at the end of a range has the rows of
                // that attempt: those after the end of the range before.
                state
                    .prepare_cached(
                        "DELETE FROM given_up WHERE stream = ?1 AND shard = ?2 AND sink = ?3
                         AND (from_sequence, from_sub) > (?4, ?5)",
                    )?
                    .execute((&stream, &shard, &sink, &sequence, sub))?;
                let mut given_up = state.prepare_cached(
                    "SELECT sequence, sub_sequence FROM given_up
                     WHERE stream = ?1 AND shard = ?2 AND sink = ?3
                     ORDER BY sequence, sub_sequence",
                )?;
                let ends = given_up
                    .query_map((&stream, &shard, &sink), |row| Ok((row.get(0)?, row.get(1)?)))?;
                let ends = ends.collect::<rusqlite::Result<Vec<(String, u64)>>>()?;
                let end = (sequence.clone(), sub);
                if let Some(landed) = ends.iter().position(|own| *own == end) {
                    let before = landed.checked_sub(1).map(|before| ends[before].clone());
                    let (from, from_sub) = before.unwrap_or_default();
                    state
                        .prepare_cached(
                            "DELETE FROM letters WHERE stream = ?1 AND shard = ?2
                             AND place = ?3 AND held = 2 AND (sequence, sub_sequence) <= (?4, ?5)
                             AND (sequence, sub_sequence) > (?6, ?7)",
                        )?
                        .execute((&stream, &shard, &place, &sequence, sub, from, from_sub))?;
                }
                // Everything that is left was not in the sink.
                reached(state, (&stream, &shard, &sink), &place, &end)?;
                // In the same transaction as the decisions above: an earlier owner that gives up rows now fails.
                let epoch = state
                    .prepare_cached(
                        "INSERT INTO sink_owner VALUES (?1, ?2, ?3, 1)
                         ON CONFLICT DO UPDATE SET epoch = epoch + 1 RETURNING epoch",
                    )?
                    .query_row((&sink, &stream, &shard), |row| row.get(0))?;
                let given_up_to = match ends.last().filter(|last| **last > end) {
                    Some((sequence, sub)) => Some(position_of(sequence.clone(), *sub)?),
                    None => None,
                };
                Ok(AcquiredShard { epoch, given_up_to })
            })
            .await
    }

    /// Makes the pending dead letters visible after a commit up to `up_to`. The commit began where the sink stood,
    /// so no attempt that was given up meanwhile has landed.
    ///
    /// # Errors
    /// [`StateError`]; the dead letters stay pending and are resolved when the shard is acquired next.
    pub async fn confirm(
        &self,
        shard: &ShardKey,
        sink: &SinkName,
        up_to: &Position,
    ) -> Result<(), StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (sequence, sub) = columns(up_to);
        let place = DeadLetterPlace::Sink(sink.clone()).to_string();
        let sink = sink.to_string();
        self.store
            .transact("resolve pending dead letters", move |state| {
                show_refused(state, (&stream, &shard), &place, (&sequence, sub))?;
                reached(state, (&stream, &shard, &sink), &place, &(sequence, sub))
            })
            .await
    }
}

/// Makes the dead letters of refused rows visible, up to a position.
fn show_refused(
    state: &Transaction<'_>,
    (stream, shard): (&str, &str),
    place: &str,
    (sequence, sub): (&str, u64),
) -> rusqlite::Result<()> {
    state
        .prepare_cached(
            "UPDATE letters SET held = 0 WHERE stream = ?1 AND shard = ?2
             AND place = ?3 AND held = 1 AND (sequence, sub_sequence) <= (?4, ?5)",
        )?
        .execute((stream, shard, place, sequence, sub))?;
    Ok(())
}

/// Makes all dead letters of given-up rows visible, because the sink has answered and stands at `end`. Forgets the
/// ranges that it is past.
fn reached(
    state: &Transaction<'_>,
    (stream, shard, sink): (&str, &str, &str),
    place: &str,
    end: &(String, u64),
) -> rusqlite::Result<()> {
    state
        .prepare_cached(
            "UPDATE letters SET held = 0
             WHERE stream = ?1 AND shard = ?2 AND place = ?3 AND held = 2",
        )?
        .execute((stream, shard, place))?;
    state
        .prepare_cached(
            "DELETE FROM given_up WHERE stream = ?1 AND shard = ?2 AND sink = ?3
             AND (sequence, sub_sequence) <= (?4, ?5)",
        )?
        .execute((stream, shard, sink, &end.0, end.1))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StateStore;
    use shardmill_core::record::{SequenceNumber, StreamIdentity};

    #[tokio::test]
    async fn fault_13_what_was_given_up_says_nothing_of_a_sink_that_was_restored_since() {
        let folder = tempfile::tempdir().expect("a folder");
        let dead_letters = DeadLetters::new(StateStore::open(folder.path()).expect("opened"));
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let (stream, shard) = (stream.into(), "shard".into());
        let shard = ShardKey { pipeline: "cars".into(), stream, shard };
        let sink = SinkName::from("mart");
        let at = |n: u64| Position { sequence: SequenceNumber::from(n), sub_sequence: 0 };
        let own = dead_letters.acquire_shard(&shard, &sink, Some(&at(5))).await.expect("acquired");
        assert_eq!(own.given_up_to, None);
        let range = PositionRange { from_exclusive: Some(at(5)), to_inclusive: at(9) };
        let whose = (&shard, &sink);
        let given_up = dead_letters.give_up(whose, own.epoch, &range, Vec::new(), true).await;
        assert_eq!(given_up.map_err(|error| error.to_string()), Ok(true));
        // The sink stands where it stood; then an earlier backup is restored.
        for (stands, expected) in [(at(5), Some(at(9))), (at(3), None), (at(5), None)] {
            let own =
                dead_letters.acquire_shard(&shard, &sink, Some(&stands)).await.expect("acquired");
            assert_eq!(own.given_up_to, expected, "{stands}");
        }
    }
}
