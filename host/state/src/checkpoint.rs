//! Checkpoints: per shard, the position up to which every sink has everything.
//!
//! The checkpoint is the minimum over the sinks and lags behind them. Beside it lies the last known position of
//! each sink. For a sink that keeps no position of its own (HTTP, Kinesis, stdout), that is its position.
//!
//! | what moves the checkpoint | direction |
//! |---|---|
//! | [`Checkpoints::advance`], by a lane | forward only; an older value is ignored |
//! | [`Checkpoints::reopen`], for a restored sink at a start | back to where the sink stands |
//!
//! **Invariants.**
//!
//! - The start of a shard is durable before its first record ([`Checkpoints::record_look`]). All shards of one look
//!   at the stream are stored together: after a crash, either each of them has its start, or none has. LATEST is
//!   resolved once.
//! - Positions are written after the sinks have committed, so they may lag but never lead.
//! - A shard stays known after its end, as long as the stream may still list it and for a while after: until then
//!   it says what a restored sink has lost ([`Checkpoints::forget_gone`]).

use std::collections::{HashMap, HashSet};

use rusqlite::{OptionalExtension as _, Transaction};

use super::agreement::{Lost, Reopened, ShardState};
use super::damaged::Flag;
use super::group_commit::{BatchedEntry, GroupCommit};
use super::holes::{Hole, insert as insert_hole};
use super::store::{StateError, StateStore, columns, position};
use shardmill_core::owner::StateMark;
use shardmill_core::record::{
    Position, PositionRange, ShardId, ShardKey, ShardStart, SinkName, StreamIdentity,
};

/// The last known position of each sink in each shard.
pub type Remembered = HashMap<(ShardId, SinkName), Position>;

/// The position ranges that were given up, by shard and sink. Each begins where the sink stood at that time.
pub type AllGivenUp = HashMap<(ShardId, SinkName), PositionRange>;

/// Everything that the state knows of a stream's shards.
#[derive(Clone, Debug, Default)]
pub struct KnownShards {
    /// Shards that were begun, and those that a first start at LATEST skipped: these count as ended.
    pub begun: HashMap<ShardId, ShardState>,
    /// Shards that were ever listed. Empty: this is the first look at the stream, at least by a version that stores
    /// them.
    pub seen: HashSet<ShardId>,
    /// LATEST as resolved at the first start, in milliseconds since 1970.
    pub latest_ms: Option<i64>,
}

impl KnownShards {
    /// Whether no shard was begun yet.
    pub fn is_first_start(&self) -> bool {
        self.begun.is_empty()
    }

    /// Returns LATEST as it was resolved. Earlier versions stored it per shard only: then the earliest of these
    /// counts.
    pub fn resolved_latest_ms(&self) -> Option<i64> {
        let of_shard = |state: &ShardState| match state.start {
            ShardStart::AtMs(at_ms) => Some(at_ms),
            ShardStart::Horizon | ShardStart::AtSequence(_) => None,
        };
        self.latest_ms.or_else(|| self.begun.values().filter_map(of_shard).min())
    }
}

/// Result of one look at a stream. It is stored in one step, before any new shard is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// New shards: where reading begins, and the time from which on no record may be missing.
    pub begun: Vec<(ShardId, ShardStart, Option<i64>)>,
    /// Shards that are not read: they count as ended.
    pub passed_over: Vec<ShardId>,
    /// Shards that are listed for the first time.
    pub seen: Vec<ShardId>,
    /// LATEST, if this look resolved it, in milliseconds since 1970.
    pub latest_ms: Option<i64>,
}

impl Look {
    /// Whether there is nothing to store.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Position of a sink in a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkMark {
    /// The sink.
    pub sink: SinkName,
    /// The sink has everything up to here.
    pub position: Position,
    /// Arrival of that record at the stream, in milliseconds since 1970, if known.
    pub arrived_ms: Option<i64>,
}

/// The checkpoints of a pipeline.
#[derive(Clone)]
pub struct Checkpoints {
    store: StateStore,
    /// Lanes write at the same time: their entries share transactions.
    advances: GroupCommit<Advance>,
}

/// One write of a shard's positions.
#[derive(Clone)]
struct Advance {
    stream: String,
    shard: String,
    sinks: Vec<SinkMark>,
    checkpoint: Option<Position>,
    ended: bool,
}

impl BatchedEntry for Advance {
    const ACTION: &'static str = "write a checkpoint";

    fn write(&self, state: &rusqlite::Transaction<'_>) -> rusqlite::Result<()> {
        let Self { stream, shard, sinks, checkpoint, ended } = self;
        // Overwritten without a comparison: only the lane that owns the shard writes here, and a restored sink
        // starts again at a lower position.
        let mut upsert = state.prepare_cached(
            "INSERT INTO sink_position (sink, stream, shard, sequence, sub_sequence, arrived_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT DO UPDATE SET sequence = excluded.sequence,
                 sub_sequence = excluded.sub_sequence,
                 arrived_ms = coalesce(excluded.arrived_ms, arrived_ms)",
        )?;
        for SinkMark { sink, position, arrived_ms } in sinks {
            let (sequence, sub) = columns(position);
            upsert.execute((sink.as_str(), stream, shard, sequence, sub, arrived_ms))?;
        }
        // Forward only. [`Checkpoints::reopen`] moves it back, in a transaction of its own.
        if let Some((sequence, sub)) = checkpoint.as_ref().map(columns) {
            state
                .prepare_cached(
                    "UPDATE shard SET sequence = ?3, sub_sequence = ?4
                     WHERE stream = ?1 AND shard = ?2 AND (sequence IS NULL
                         OR (sequence, sub_sequence) < (?3, ?4))",
                )?
                .execute((stream, shard, sequence, sub))?;
        }
        if *ended {
            state
                .prepare_cached("UPDATE shard SET ended = 1 WHERE stream = ?1 AND shard = ?2")?
                .execute((stream, shard))?;
        }
        Ok(())
    }
}

impl Checkpoints {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { advances: GroupCommit::new(store.clone()), store }
    }

    /// Reads every shard of the stream that was ever begun.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn shards(
        &self,
        stream: &StreamIdentity,
    ) -> Result<HashMap<ShardId, ShardState>, StateError> {
        let stream = stream.key();
        self.store
            .transact("read the checkpoints", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT shard, sequence, sub_sequence, ended, start_at_ms,
                         start_at_sequence, caught_up_ms, reread_to, reread_to_sub
                     FROM shard WHERE stream = ?1",
                )?;
                let shards = query.query_map([stream], |row| {
                    let checkpoint = match row.get::<_, Option<String>>(1)? {
                        Some(sequence) => Some(position(sequence, row.get(2)?)?),
                        None => None,
                    };
                    let shard = row.get::<_, String>(0)?;
                    let start = match (row.get(4)?, row.get::<_, Option<String>>(5)?) {
                        (_, Some(at)) => ShardStart::AtSequence(position(at, 0)?.sequence),
                        (Some(at_ms), None) => ShardStart::AtMs(at_ms),
                        (None, None) => ShardStart::Horizon,
                    };
                    let (Flag(ended), caught_up_ms) = (row.get(3)?, row.get(6)?);
                    let reread_to = match row.get::<_, Option<String>>(7)? {
                        Some(sequence) => Some(position(sequence, row.get(8)?)?),
                        None => None,
                    };
                    let state = ShardState { checkpoint, ended, start, caught_up_ms, reread_to };
                    Ok((ShardId::new(shard), state))
                })?;
                shards.collect()
            })
            .await
    }

    /// Reads everything that is known of the stream's shards.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn known(&self, stream: &StreamIdentity) -> Result<KnownShards, StateError> {
        let begun = self.shards(stream).await?;
        let stream = stream.key();
        self.store
            .transact("read the shards", move |state| {
                let mut query =
                    state.prepare_cached("SELECT shard FROM seen_shard WHERE stream = ?1")?;
                let seen =
                    query.query_map([&stream], |row| Ok(ShardId::new(row.get::<_, String>(0)?)))?;
                let seen = seen.collect::<rusqlite::Result<_>>()?;
                let latest_ms = state
                    .prepare_cached("SELECT latest_ms FROM stream_start WHERE stream = ?1")?
                    .query_row([&stream], |row| row.get(0))
                    .optional()?;
                Ok(KnownShards { begun, seen, latest_ms })
            })
            .await
    }

    /// Begins one shard, as a look at the stream does.
    #[cfg(test)]
    pub(crate) async fn begin(
        &self,
        shard: &ShardKey,
        start: &ShardStart,
    ) -> Result<(), StateError> {
        let begun = vec![(shard.shard.clone(), start.clone(), None)];
        self.record_look(&shard.stream, Look { begun, ..Look::default() }).await
    }

    /// Stores what a look at the stream found, in one step: after a crash, either every shard of the look has its
    /// start, or none has. A shard that is known already keeps its first start.
    ///
    /// # Errors
    /// [`StateError`]; none of these shards may be read then.
    pub async fn record_look(&self, stream: &StreamIdentity, look: Look) -> Result<(), StateError> {
        let stream = stream.key();
        self.store
            .transact("store where shards start", move |state| {
                let mut begin = state.prepare_cached(
                    "INSERT INTO shard (stream, shard, start_at_ms, start_at_sequence, caught_up_ms)
                     VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
                )?;
                for (shard, start, caught_up_ms) in &look.begun {
                    let (at_ms, at_sequence) = match start {
                        ShardStart::Horizon => (None, None),
                        ShardStart::AtMs(at_ms) => (Some(*at_ms), None),
                        ShardStart::AtSequence(sequence) => (None, Some(sequence.to_string())),
                    };
                    begin.execute((&stream, shard.as_str(), at_ms, at_sequence, caught_up_ms))?;
                }
                let mut pass_over = state.prepare_cached(
                    "INSERT INTO shard (stream, shard, ended) VALUES (?1, ?2, 1)
                     ON CONFLICT DO NOTHING",
                )?;
                for shard in &look.passed_over {
                    pass_over.execute((&stream, shard.as_str()))?;
                }
                let mut see = state.prepare_cached(
                    "INSERT INTO seen_shard VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                )?;
                for shard in &look.seen {
                    see.execute((&stream, shard.as_str()))?;
                }
                if let Some(latest_ms) = look.latest_ms {
                    state
                        .prepare_cached(
                            "INSERT INTO stream_start VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                        )?
                        .execute((&stream, latest_ms))?;
                }
                Ok(())
            })
            .await
    }

    /// Stores that everything that had arrived in a shard by `at_ms` (milliseconds since 1970) has its outcome.
    ///
    /// # Errors
    /// [`StateError`]; nothing is lost, the earlier time stays.
    pub async fn note_caught_up(&self, shard: &ShardKey, at_ms: i64) -> Result<(), StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("store that a shard has caught up", move |state| {
                state
                    .prepare_cached(
                        "UPDATE shard SET caught_up_ms = ?3 WHERE stream = ?1 AND shard = ?2",
                    )?
                    .execute((stream, shard, at_ms))
            })
            .await
            .map(drop)
    }

    /// Reads the last known position of each sink in a shard.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn sink_positions(
        &self,
        shard: &ShardKey,
    ) -> Result<HashMap<SinkName, Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("read the sinks' positions", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sink, sequence, sub_sequence FROM sink_position
                     WHERE stream = ?1 AND shard = ?2",
                )?;
                let sinks = query.query_map((stream, shard), |row| {
                    Ok((
                        SinkName::new(row.get::<_, String>(0)?),
                        position(row.get(1)?, row.get(2)?)?,
                    ))
                })?;
                sinks.collect()
            })
            .await
    }

    /// Reads when the last record of each sink arrived at the stream, in milliseconds since 1970.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn arrivals(&self, shard: &ShardKey) -> Result<HashMap<SinkName, i64>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("read when the sinks' last records arrived", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sink, arrived_ms FROM sink_position
                     WHERE stream = ?1 AND shard = ?2 AND arrived_ms IS NOT NULL",
                )?;
                let sinks = query.query_map((stream, shard), |row| {
                    Ok((SinkName::new(row.get::<_, String>(0)?), row.get(1)?))
                })?;
                sinks.collect()
            })
            .await
    }

    /// Reads how far each sink was in each shard of a stream, and the range of each that was given up last.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn remembered(
        &self,
        stream: &StreamIdentity,
    ) -> Result<(Remembered, AllGivenUp), StateError> {
        let stream = stream.key();
        self.store
            .transact("read the sinks' positions", move |state| {
                let mut known = state.prepare_cached(
                    "SELECT shard, sink, sequence, sub_sequence FROM sink_position WHERE stream = ?1",
                )?;
                let known = known.query_map([&stream], |row| {
                    let key = (row.get::<_, String>(0)?.into(), row.get::<_, String>(1)?.into());
                    Ok((key, position(row.get(2)?, row.get(3)?)?))
                })?;
                let mut given_up = state.prepare_cached(
                    "SELECT shard, sink, sequence, sub_sequence, from_sequence, from_sub FROM given_up
                     WHERE stream = ?1 ORDER BY sequence, sub_sequence",
                )?;
                let given_up = given_up.query_map([&stream], |row| {
                    let key = (row.get::<_, String>(0)?.into(), row.get::<_, String>(1)?.into());
                    let from: String = row.get(4)?;
                    let from_exclusive = match from.is_empty() {
                        true => None,
                        false => Some(position(from, row.get(5)?)?),
                    };
                    let to_inclusive = position(row.get(2)?, row.get(3)?)?;
                    Ok((key, PositionRange { from_exclusive, to_inclusive }))
                })?;
                // They come in order, so of several ranges of one sink the last one stays.
                Ok((known.collect::<rusqlite::Result<_>>()?, given_up.collect::<rusqlite::Result<_>>()?))
            })
            .await
    }

    /// Opens shards once more for restored sinks: stores where these stand, moves the checkpoints back, and clears
    /// the end of the shards. One transaction.
    ///
    /// # Errors
    /// [`StateError`]; nothing is changed then.
    pub async fn reopen(
        &self,
        stream: &StreamIdentity,
        reopened: Vec<Reopened>,
    ) -> Result<(), StateError> {
        let stream = stream.key();
        self.store
            .transact("reopen shards", move |state| {
                for Reopened { shard, checkpoint, sinks } in &reopened {
                    let (sequence, sub) = checkpoint.as_ref().map(columns).unzip();
                    // While a lane reads what only restored sinks need, arrived records do not count as caught up.
                    // The highest earlier checkpoint is kept in `reread_to`, also when a shard is reopened twice.
                    state.execute(
                        "UPDATE shard SET ended = 0, caught_up_ms = NULL,
                             reread_to = CASE WHEN sequence IS NULL
                                 OR (reread_to, reread_to_sub) > (sequence, sub_sequence)
                                 THEN reread_to ELSE sequence END,
                             reread_to_sub = CASE WHEN sequence IS NULL
                                 OR (reread_to, reread_to_sub) > (sequence, sub_sequence)
                                 THEN reread_to_sub ELSE sub_sequence END,
                             sequence = ?3, sub_sequence = ?4
                         WHERE stream = ?1 AND shard = ?2",
                        (&stream, shard.as_str(), sequence, sub),
                    )?;
                    for (sink, stands) in sinks {
                        remember(state, (&stream, shard, sink), stands.as_ref())?;
                    }
                }
                Ok(())
            })
            .await
    }

    /// Accepts that sinks stay without rows that they once had: where they stand becomes the remembered position,
    /// and the holes are recorded. One transaction.
    ///
    /// # Errors
    /// [`StateError`]; the next start finds the same mismatch again then.
    pub async fn accept_losses(
        &self,
        stream: &StreamIdentity,
        lost: Vec<Lost>,
        holes: Vec<Hole>,
    ) -> Result<(), StateError> {
        let stream = stream.key();
        self.store
            .transact("store the sinks' positions", move |state| {
                for Lost { sink, shard, mismatch, .. } in &lost {
                    remember(state, (&stream, shard, sink), mismatch.stands.as_ref())?;
                }
                for hole in &holes {
                    insert_hole(state, hole)?;
                }
                Ok(())
            })
            .await
    }

    /// Reads the marks of other states that this one has accepted and continues from.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn noted_marks(&self) -> Result<HashMap<String, i64>, StateError> {
        self.store
            .transact("read the marks of other states", |state| {
                let mut query = state.prepare("SELECT id, number FROM seen_state")?;
                query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
            })
            .await
    }

    /// Stores marks of other states that this one continues from. The highest number of each stays.
    ///
    /// # Errors
    /// [`StateError`]; no shard may be begun then.
    pub async fn note_marks(&self, marks: Vec<StateMark>) -> Result<(), StateError> {
        self.store
            .transact("store the marks of other states", move |state| {
                for mark in &marks {
                    state.execute(
                        "INSERT INTO seen_state VALUES (?1, ?2)
                         ON CONFLICT DO UPDATE SET number = max(number, excluded.number)",
                        (&*mark.state, mark.number),
                    )?;
                }
                Ok(())
            })
            .await
    }

    /// Marks all present dead letters as doubtful: this is an older copy of the state, and a newer one may have
    /// redriven them.
    ///
    /// # Errors
    /// [`StateError`]; no shard may be begun then.
    pub async fn doubt_dead_letters(&self) -> Result<(), StateError> {
        self.store
            .transact("mark the dead letters of an older copy", |state| {
                state.execute("DELETE FROM doubtful_letters", [])?;
                state.execute(
                    "INSERT INTO doubtful_letters SELECT max(rowid) FROM letters
                     HAVING max(rowid) IS NOT NULL",
                    [],
                )
            })
            .await
            .map(drop)
    }

    /// Stores the sinks' positions and the checkpoint in one step. The checkpoint never moves back here.
    ///
    /// # Errors
    /// [`StateError`]; nothing is lost, the checkpoint only lags longer.
    pub async fn advance(
        &self,
        shard: &ShardKey,
        sinks: Vec<SinkMark>,
        checkpoint: Option<Position>,
        ended: bool,
    ) -> Result<(), StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.advances.write(Advance { stream, shard, sinks, checkpoint, ended }).await
    }

    /// Deletes shards that were read to their end and that the stream has not listed for `kept_ms`: positions,
    /// owners and ledger. Until then they tell what a restored sink has lost.
    ///
    /// # Errors
    /// [`StateError`]; nothing is lost, only space.
    pub async fn forget_gone(
        &self,
        stream: &StreamIdentity,
        listed: &[ShardId],
        now_ms: i64,
        kept_ms: i64,
    ) -> Result<(), StateError> {
        let listed = serde_json::Value::from_iter(listed.iter().map(ShardId::as_str)).to_string();
        let (stream, gone_before) = (stream.key(), now_ms - kept_ms);
        self.store
            .transact("delete shards that are gone", move |state| {
                let back =
                    "UPDATE shard SET gone_ms = NULL WHERE stream = ?1 AND gone_ms IS NOT NULL
                    AND shard IN (SELECT value FROM json_each(?2))";
                state.execute(back, (&stream, &listed))?;
                let gone = "UPDATE shard SET gone_ms = ?3 WHERE stream = ?1 AND ended = 1
                    AND gone_ms IS NULL AND shard NOT IN (SELECT value FROM json_each(?2))";
                state.execute(gone, (&stream, &listed, now_ms))?;
                let mut query = state.prepare(
                    "SELECT shard FROM shard WHERE stream = ?1 AND ended = 1 AND gone_ms <= ?2",
                )?;
                let shards = query.query_map((&stream, gone_before), |row| row.get(0))?;
                for shard in shards.collect::<rusqlite::Result<Vec<String>>>()? {
                    for table in
                        ["sink_position", "sink_owner", "given_up", "ledger", "seen_shard", "shard"]
                    {
                        let sql = format!("DELETE FROM {table} WHERE stream = ?1 AND shard = ?2");
                        state.execute(&sql, (&stream, &shard))?;
                    }
                }
                Ok(())
            })
            .await
    }

    /// Reads the checkpoint of a shard; `None` if it has none yet.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn checkpoint(&self, shard: &ShardKey) -> Result<Option<Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("read a checkpoint", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sequence, sub_sequence FROM shard
                     WHERE stream = ?1 AND shard = ?2 AND sequence IS NOT NULL",
                )?;
                query
                    .query_row((stream, shard), |row| position(row.get(0)?, row.get(1)?))
                    .optional()
            })
            .await
    }
}

/// Replaces the remembered position of a sink, which may move back.
fn remember(
    state: &Transaction<'_>,
    (stream, shard, sink): (&str, &ShardId, &SinkName),
    stands: Option<&Position>,
) -> rusqlite::Result<()> {
    state.execute(
        "DELETE FROM sink_position WHERE stream = ?1 AND shard = ?2 AND sink = ?3",
        (stream, shard.as_str(), sink.as_str()),
    )?;
    if let Some((sequence, sub)) = stands.map(columns) {
        state.execute(
            "INSERT INTO sink_position (sink, stream, shard, sequence, sub_sequence)
             VALUES (?1, ?2, ?3, ?4, ?5)",
            (sink.as_str(), stream, shard.as_str(), sequence, sub),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn fault_39_ended_shards_that_are_not_listed_any_more_are_forgotten_after_a_while() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let checkpoints = Checkpoints::new(store.clone());
        let stream = StreamIdentity { name: "s".into(), arn: "s".into(), created_ms: 0 };
        let at = Position { sequence: 7_u64.into(), sub_sequence: 0 };
        for (name, ended) in [("listed", true), ("gone", true), ("unread", false)] {
            let shard = ShardKey {
                pipeline: "p".into(),
                stream: Arc::new(stream.clone()),
                shard: name.into(),
            };
            checkpoints.begin(&shard, &ShardStart::Horizon).await.expect("begun");
            let sink = SinkName::from("mart");
            let sinks = vec![SinkMark { sink, position: at.clone(), arrived_ms: None }];
            let written = checkpoints.advance(&shard, sinks, Some(at.clone()), ended).await;
            written.expect("written");
        }
        let listed = [ShardId::from("listed")];
        // (now, the shards that are known then, with a retention of 10 ms)
        for (now_ms, listed, known) in [
            (0, &listed[..], ["gone", "listed", "unread"].as_slice()),
            (9, &listed, &["gone", "listed", "unread"]),
            (10, &["listed".into(), "gone".into()], &["gone", "listed", "unread"]),
            (15, &listed, &["gone", "listed", "unread"]),
            (25, &listed, &["listed", "unread"]),
        ] {
            checkpoints.forget_gone(&stream, listed, now_ms, 10).await.expect("forgotten");
            let shards = checkpoints.shards(&stream).await.expect("read");
            let mut found: Vec<String> = shards.keys().map(ToString::to_string).collect();
            found.sort();
            assert_eq!(found, known, "at {now_ms}");
        }
        let rows = "SELECT count(*) FROM sink_position";
        let rows =
            store.transact("count", move |state| state.query_row(rows, [], |row| row.get(0)));
        assert_eq!(rows.await.map_err(|error| error.to_string()), Ok(2_i64));
    }
}
