//! Record of the sinks that a pipeline has had: where their rows went, how far they were, and which were removed.
//!
//! Positions, dead letters and claims are kept under a sink's name. So it is a decision if a name disappears, comes
//! back, or appears on the destination of another sink. Each decision is stored in one transaction with its
//! consequences (holes, deleted positions), so that a crash never leaves one without the other. `lane/roster.rs` of
//! the engine decides; this module stores.

use std::collections::{BTreeMap, BTreeSet};

use super::holes::{Hole, insert};
use super::redrive_key::is_redrive_key;
use super::revisions;
use super::store::{StateError, StateStore, columns, now_ms, position};
pub use shardmill_config::one_spelling;
use shardmill_core::record::{DeadLetterPlace, Position, ShardId, SinkName, StreamIdentity};

/// Tables with a column `sink` whose rows follow when a sink is renamed.
const TABLES_BY_SINK: [&str; 8] = [
    "sink_position",
    "sink_owner",
    "given_up",
    "sink_removed",
    "hole",
    "sink_known",
    "letter_delivered",
    "redrive_sink",
];

/// Removal of a sink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Time of the removal, in milliseconds since 1970.
    pub removed_ms: i64,
    /// Its position in each shard that had been begun; `None`: it had nothing of the shard.
    pub at: BTreeMap<ShardId, Option<Position>>,
}

/// Everything that the state knows of the sinks of one stream.
#[derive(Clone, Debug, Default)]
pub struct KnownSinks {
    /// Destination of each sink when it ran last.
    pub destinations: BTreeMap<SinkName, String>,
    /// Position of each sink, as of the last checkpoint.
    pub positions: BTreeMap<SinkName, BTreeMap<ShardId, Position>>,
    /// Sinks that were removed and have not come back.
    pub removed: BTreeMap<SinkName, Removed>,
    /// Checkpoint of each shard that was begun.
    pub checkpoints: BTreeMap<ShardId, Option<Position>>,
}

impl KnownSinks {
    /// Returns every name that is known.
    pub fn names(&self) -> BTreeSet<&SinkName> {
        let Self { destinations, positions, removed, checkpoints: _ } = self;
        destinations.keys().chain(positions.keys()).chain(removed.keys()).collect()
    }

    /// Returns a sink's position in a shard; for a removed sink, the one at its removal.
    pub fn stands(&self, sink: &SinkName, shard: &ShardId) -> Option<&Position> {
        let position = self.positions.get(sink).and_then(|shards| shards.get(shard));
        let removed = || self.removed.get(sink)?.at.get(shard)?.as_ref();
        position.or_else(removed)
    }
}

/// Decisions about sinks at a start or a reload.
#[derive(Clone, Debug, Default)]
pub struct RosterChange {
    /// Removed sinks, each with its position in each shard that was begun.
    pub removed: Vec<(SinkName, BTreeMap<ShardId, Option<Position>>)>,
    /// Sinks that have come back.
    pub returned: Vec<SinkName>,
    /// Ranges that the returned sinks were not given.
    pub holes: Vec<Hole>,
    /// Destinations of the sinks that run. Empty for a redrive, which runs with the pipeline's sinks.
    pub destinations: Vec<(SinkName, String)>,
}

/// The stored record of a pipeline's sinks.
#[derive(Clone)]
pub struct Roster {
    store: StateStore,
}

impl Roster {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// Reads what is known of the sinks of a stream.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn known(&self, stream: &StreamIdentity) -> Result<KnownSinks, StateError> {
        self.known_in(stream.key()).await
    }

    /// Lists the streams that were read, by their keys; redrives are left out.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn streams(&self) -> Result<Vec<String>, StateError> {
        self.store
            .transact("read the known streams", |state| {
                let mut query = state.prepare("SELECT DISTINCT stream FROM shard")?;
                let streams = query.query_map([], |row| row.get::<_, String>(0))?;
                let streams = streams.collect::<rusqlite::Result<Vec<_>>>()?;
                Ok(streams.into_iter().filter(|stream| !is_redrive_key(stream)).collect())
            })
            .await
    }

    /// Reads what is known of the sinks of a stream, by its key.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn known_in(&self, stream: String) -> Result<KnownSinks, StateError> {
        self.store
            .transact("read the known sinks", move |state| {
                let mut known = KnownSinks::default();
                let mut query =
                    state.prepare("SELECT sink, destination, removed_ms FROM sink_known")?;
                let mut rows = query.query([])?;
                while let Some(row) = rows.next()? {
                    let sink = SinkName::from(row.get::<_, String>(0)?);
                    let destination = one_spelling(&row.get::<_, String>(1)?);
                    known.destinations.insert(sink.clone(), destination);
                    if let Some(removed_ms) = row.get(2)? {
                        let removed = Removed { removed_ms, ..Removed::default() };
                        known.removed.insert(sink, removed);
                    }
                }
                let mut query = state
                    .prepare("SELECT shard, sequence, sub_sequence FROM shard WHERE stream = ?1")?;
                let mut rows = query.query([&stream])?;
                while let Some(row) = rows.next()? {
                    let at = match row.get::<_, Option<String>>(1)? {
                        Some(sequence) => Some(position(sequence, row.get(2)?)?),
                        None => None,
                    };
                    known.checkpoints.insert(ShardId::from(row.get::<_, String>(0)?), at);
                }
                let mut query = state.prepare(
                    "SELECT sink, shard, sequence, sub_sequence FROM sink_position
                     WHERE stream = ?1",
                )?;
                let mut rows = query.query([&stream])?;
                while let Some(row) = rows.next()? {
                    let at = position(row.get(2)?, row.get(3)?)?;
                    let sink = SinkName::from(row.get::<_, String>(0)?);
                    let shard = ShardId::from(row.get::<_, String>(1)?);
                    known.positions.entry(sink).or_default().insert(shard, at);
                }
                let mut query = state.prepare(
                    "SELECT sink, shard, sequence, sub_sequence, removed_ms FROM sink_removed
                     WHERE stream = ?1",
                )?;
                let mut rows = query.query([&stream])?;
                while let Some(row) = rows.next()? {
                    let sequence: String = row.get(2)?;
                    let at = match sequence.is_empty() {
                        true => None,
                        false => Some(position(sequence, row.get(3)?)?),
                    };
                    let sink = SinkName::from(row.get::<_, String>(0)?);
                    let shard = ShardId::from(row.get::<_, String>(1)?);
                    let removed = known.removed.entry(sink).or_default();
                    removed.removed_ms = row.get(4)?;
                    removed.at.insert(shard, at);
                }
                Ok(known)
            })
            .await
    }

    /// Stores the decisions in one transaction.
    ///
    /// # Errors
    /// [`StateError`]; nothing was stored, and no record may be read then.
    pub async fn record(
        &self,
        stream: &StreamIdentity,
        change: RosterChange,
    ) -> Result<(), StateError> {
        let stream = stream.key();
        self.store
            .transact("record the sinks", move |state| {
                let RosterChange { removed, returned, holes, destinations } = &change;
                let is_pipeline = !destinations.is_empty();
                for (sink, shards) in removed {
                    if is_pipeline {
                        state.execute(
                            "INSERT INTO sink_known VALUES (?1, '', ?2, ?2)
                             ON CONFLICT DO UPDATE SET removed_ms = excluded.removed_ms",
                            (sink.as_str(), now_ms()),
                        )?;
                    }
                    for (shard, at) in shards {
                        let (sequence, sub) = at.as_ref().map(columns).unwrap_or_default();
                        state.execute(
                            "INSERT INTO sink_removed VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                             ON CONFLICT DO NOTHING",
                            (sink.as_str(), &stream, shard.as_str(), sequence, sub, now_ms()),
                        )?;
                    }
                    // The old position must not count any more: it would hold the checkpoint back, and a returning
                    // sink would start there.
                    state.execute(
                        "DELETE FROM sink_position WHERE stream = ?1 AND sink = ?2",
                        (&stream, sink.as_str()),
                    )?;
                }
                for sink in returned {
                    state.execute(
                        "DELETE FROM sink_removed WHERE stream = ?1 AND sink = ?2",
                        (&stream, sink.as_str()),
                    )?;
                }
                for hole in holes {
                    insert(state, hole)?;
                }
                for (sink, destination) in destinations {
                    state.execute(
                        "INSERT INTO sink_known VALUES (?1, ?2, ?3, NULL)
                         ON CONFLICT DO UPDATE SET destination = excluded.destination,
                             noted_ms = excluded.noted_ms, removed_ms = NULL
                         WHERE destination <> excluded.destination OR removed_ms IS NOT NULL",
                        (sink.as_str(), destination, now_ms()),
                    )?;
                }
                Ok(())
            })
            .await
    }

    /// Moves everything that is kept under a sink's name to another name, in one transaction: positions, holes,
    /// places of dead letters, and the bindings of every revision that may have to run again.
    ///
    /// # Errors
    /// [`StateError`]; nothing was moved.
    pub async fn rename(&self, old: &SinkName, new: &SinkName) -> Result<(), StateError> {
        let (old, new) = (old.clone(), new.clone());
        self.store
            .transact("rename a sink", move |state| {
                for table in TABLES_BY_SINK {
                    // Rows under the new name come from a start that was refused before its first record: they are
                    // replaced.
                    let rename = format!("UPDATE OR REPLACE {table} SET sink = ?2 WHERE sink = ?1");
                    state.execute(&rename, (old.as_str(), new.as_str()))?;
                }
                let place = |sink: &SinkName| DeadLetterPlace::Sink(sink.clone()).to_string();
                // The dead letter of an earlier sink with the new name stays where it is.
                state.execute(
                    "UPDATE OR IGNORE letters SET place = ?2 WHERE place = ?1",
                    (place(&old), place(&new)),
                )?;
                revisions::rewrite(state, |spec| spec.rename_sink(&old, &new)).map(drop)
            })
            .await
    }
}
