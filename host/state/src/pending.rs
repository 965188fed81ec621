//! Letters that are hidden until it is known what became of their rows.
//!
//! A *refused* row's letter is hidden until the sink's commit covers it. If the commit never happened,
//! the letter is deleted when the shard is taken over: the row comes again.
//!
//! A sink that is out of reach may be *given up* for a span: its rows become letters, and the lane goes
//! on. If the sink keeps its own position, nobody knows yet whether the last try has landed after all.
//! So these letters are hidden too, until the sink has answered: all tries began at one position and
//! at most one of them landed, so where the sink stands then says which.

use rusqlite::Transaction;

use super::dead_letter_store::DeadLetter;
use super::dead_letters::{DeadLetters, GIVEN_UP, VISIBLE, are_there, insert};
use super::store::{StateError, columns, position as position_of};
use shardmill_core::record::{DeadLetterPlace, Position, PositionRange, ShardKey, SinkName};

/// Who may give up a sink's rows, and how far that went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcquiredShard {
    /// Grows with each owner of the shard's rows for the sink.
    pub epoch: i64,
    /// Rows up to here were given up: the sink needs none of them.
    pub given_up_to: Option<Position>,
}

impl DeadLetters {
    /// Gives rows up that a sink was not able to take: writes their letters and that the sink needs
    /// nothing of the span, durable on return. The span begins where the sink stands: one that stands before
    /// that later was restored from a backup, and needs more. `sink_keeps_position`: the letters show once
    /// the sink has answered, else at once. False: the shard has another owner, nothing was written.
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
        let (action, bound) = ("give rows up", self.bound.clone());
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
                // What the table itself refused is no matter of where the sink stands.
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

    /// Settles what is hidden of a sink's letters, where its position is known and earlier owners of
    /// the shard can no longer commit: refused rows above it will come again, rows that were given up
    /// and are there after all have no letter. Earlier owners can give up nothing from here on.
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
            .transact("settle held dead letters", move |state| {
                show_refused(state, (&stream, &shard), &place, (&sequence, sub))?;
                state
                    .prepare_cached(
                        "DELETE FROM letters WHERE stream = ?1 AND shard = ?2
                         AND place = ?3 AND held = 1",
                    )?
                    .execute((&stream, &shard, &place))?;
                // A sink that stands where a try would have ended has the rows of that try: those
                // behind the try before.
                // Where it stands before that, it was restored: what was given up says nothing any more.
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
                reached(state, (&stream, &shard, &sink), &place, &end)?;
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

    /// Shows the hidden letters after a commit up to `up_to`, which began where the sink stood: so
    /// nothing that was given up meanwhile has landed.
    ///
    /// # Errors
    /// [`StateError`]; the letters stay hidden and are settled when the shard is taken over.
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
            .transact("settle held dead letters", move |state| {
                show_refused(state, (&stream, &shard), &place, (&sequence, sub))?;
                reached(state, (&stream, &shard, &sink), &place, &(sequence, sub))
            })
            .await
    }
}

/// Shows the letters of rows that a sink refused, up to a position.
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

/// The sink has answered and stands at `end`: shows what was given up, and forgets how far that went
/// where the sink is past it.
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
        let own =
            dead_letters.acquire_shard(&shard, &sink, Some(&at(5))).await.expect("taken over");
        assert_eq!(own.given_up_to, None);
        let range = PositionRange { from_exclusive: Some(at(5)), to_inclusive: at(9) };
        let whose = (&shard, &sink);
        let given_up = dead_letters.give_up(whose, own.epoch, &range, Vec::new(), true).await;
        assert_eq!(given_up.map_err(|error| error.to_string()), Ok(true));
        // It stands where it stood; then a backup of before is put back.
        for (stands, expected) in [(at(5), Some(at(9))), (at(3), None), (at(5), None)] {
            let own =
                dead_letters.acquire_shard(&shard, &sink, Some(&stands)).await.expect("taken over");
            assert_eq!(own.given_up_to, expected, "{stands}");
        }
    }
}
