//! Checkpoints: how far every sink is, at least, per shard.
//!
//! The checkpoint is the minimum over the sinks and lags behind them. Beside it stand the last
//! known position of each sink: the truth for sinks that keep none of their own.

use std::collections::HashMap;

use rusqlite::OptionalExtension as _;

use super::store::{StateError, StateStore, columns, position};
use crate::record::{Position, ShardId, ShardKey, ShardStart, SinkName, StreamIdentity};

/// What is known of a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardState {
    /// Every sink has everything up to here; `None`: nothing yet.
    pub checkpoint: Option<Position>,
    /// The shard was closed and everything in it is settled.
    pub ended: bool,
    /// Where it was begun.
    pub start: ShardStart,
}

/// The checkpoints of a pipeline.
#[derive(Clone)]
pub struct Checkpoints {
    store: StateStore,
}

impl Checkpoints {
    /// Over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// Every shard of the stream that was ever begun.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn shards(
        &self,
        stream: &StreamIdentity,
    ) -> Result<HashMap<ShardId, ShardState>, StateError> {
        let stream = stream.key();
        self.store
            .write("read the checkpoints", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT shard, sequence, sub_sequence, ended, start_at_ms,
                         start_at_sequence
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
                    let state = ShardState { checkpoint, ended: row.get(3)?, start };
                    Ok((ShardId::new(shard), state))
                })?;
                shards.collect()
            })
            .await
    }

    /// Notes that a shard is begun and where its start position was resolved to. A shard that is
    /// known keeps what was resolved first.
    ///
    /// # Errors
    /// [`StateError`]; the shard must not be read then.
    pub async fn begin(&self, shard: &ShardKey, start: &ShardStart) -> Result<(), StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (at_ms, at_sequence) = match start {
            ShardStart::Horizon => (None, None),
            ShardStart::AtMs(at_ms) => (Some(*at_ms), None),
            ShardStart::AtSequence(sequence) => (None, Some(sequence.to_string())),
        };
        self.store
            .write("note the start of a shard", move |state| {
                state.execute(
                    "INSERT INTO shard (stream, shard, start_at_ms, start_at_sequence)
                     VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                    (stream, shard, at_ms, at_sequence),
                )
            })
            .await
            .map(drop)
    }

    /// The last known position of each sink.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn sinks(&self, shard: &ShardKey) -> Result<HashMap<SinkName, Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .write("read the sinks' positions", move |state| {
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

    /// Writes the sinks' positions and the checkpoint, as one step. The checkpoint never goes back.
    ///
    /// # Errors
    /// [`StateError`]; nothing is lost, the checkpoint only lags longer.
    pub async fn advance(
        &self,
        shard: &ShardKey,
        sinks: Vec<(SinkName, Position)>,
        checkpoint: Option<Position>,
        ended: bool,
    ) -> Result<(), StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .write("write a checkpoint", move |state| {
                let mut upsert = state.prepare_cached(
                    "INSERT INTO sink_position VALUES (?1, ?2, ?3, ?4, ?5)
                     ON CONFLICT DO UPDATE SET sequence = excluded.sequence,
                         sub_sequence = excluded.sub_sequence",
                )?;
                for (sink, position) in &sinks {
                    let (sequence, sub) = columns(position);
                    upsert.execute((sink.as_str(), &stream, &shard, sequence, sub))?;
                }
                if let Some((sequence, sub)) = checkpoint.as_ref().map(columns) {
                    state
                        .prepare_cached(
                            "UPDATE shard SET sequence = ?3, sub_sequence = ?4
                             WHERE stream = ?1 AND shard = ?2 AND (sequence IS NULL
                                 OR (sequence, sub_sequence) < (?3, ?4))",
                        )?
                        .execute((&stream, &shard, sequence, sub))?;
                }
                if ended {
                    state
                        .prepare_cached(
                            "UPDATE shard SET ended = 1 WHERE stream = ?1 AND shard = ?2",
                        )?
                        .execute((&stream, &shard))?;
                }
                Ok(())
            })
            .await
    }

    /// The checkpoint of one shard, if it was begun.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn checkpoint(&self, shard: &ShardKey) -> Result<Option<Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .write("read a checkpoint", move |state| {
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
