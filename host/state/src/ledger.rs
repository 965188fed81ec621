//! The ledger: which revision runs from which position on, per shard.
//!
//! **Invariant.** A record that is read again runs in the revision that ran it first. Sinks stand at different
//! positions. If a replay used other code, it could route a record to a sink whose position is already past it:
//! that row would be lost.
//!
//! So each start with other plugins, configurations or bindings counts as a change at a recorded position, like a
//! swap. A row `(shard, position, revision)` says that the revision runs the records after that position. Steps and
//! their order:
//!
//! 1. [`Ledger::store_revision`] stores the revision and the bytes of its components. A row that names a revision
//!    without its bytes could not be run after a restart.
//! 2. [`Ledger::record`] writes the row, durable before the revision's first record runs. A crash between the two
//!    leaves a revision that nothing names, which costs only space.
//! 3. The engine runs the revision, and delivers.
//! 4. [`Ledger::prune`] deletes components once no replay, no undo and no redrive can need them.
//!
//! | position of a record | runs in |
//! |---|---|
//! | at or before the last outcome (a sink's position, or a stage's dead letter) | the stored revision, from the stored bytes |
//! | after it | the new revision |
//! | any, in a shard without a row | the new revision: the first row of a shard begins at its beginning |
//!
//! Many lanes change at the same time, so their rows are written in one transaction ([`GroupCommit`]).

use rusqlite::OptionalExtension as _;
use serde::Serialize;

use bytes::Bytes;

use super::group_commit::{BatchedEntry, GroupCommit};
use super::redrive_key::REDRIVES;
use super::store::{StateError, StateStore, columns, now_ms, position};
use crate::RevisionSpec;
use shardmill_core::record::{Position, ShardId, ShardKey};

/// Bytes of components, each with its digest.
pub type Components = Vec<(String, Bytes)>;

/// Number of the latest changes whose previous revisions stay complete, so that a rollback can run them.
const CHANGES_UNDOABLE: u32 = 16;

/// A revision, and the position after which it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Exclusive; `None`: from the shard's beginning.
    pub from_exclusive: Option<Position>,
    /// Id of the revision.
    pub revision: String,
}

/// The revision that runs a record, or ran it.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Id of the revision.
    pub revision: String,
    /// Its specification.
    pub spec: RevisionSpec,
    /// At least one sink's position has passed the record, as of the last checkpoint: so it was run. Otherwise a
    /// change may still put another revision in its place.
    pub is_committed: bool,
}

/// A segment with its shard and time, for reports.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerEntry {
    /// The shard.
    pub shard: ShardId,
    /// Exclusive; `None`: from the shard's beginning.
    #[serde(serialize_with = "super::as_text")]
    pub from_exclusive: Option<Position>,
    /// Id of the revision.
    #[serde(rename = "generation")]
    pub revision: String,
    /// When it was recorded, in milliseconds since 1970.
    pub recorded_ms: i64,
    /// The stream, by its key.
    #[serde(skip)]
    pub stream: String,
}

/// The ledger of a pipeline.
#[derive(Clone)]
pub struct Ledger {
    store: StateStore,
    /// Rows that lanes write at the same time share a transaction.
    rows: GroupCommit<Row>,
}

/// A row of the ledger.
#[derive(Clone)]
struct Row {
    stream: String,
    shard: String,
    sequence: String,
    sub: u64,
    revision: String,
}

impl BatchedEntry for Row {
    const ACTION: &'static str = "write the ledger of revisions";

    fn write(&self, state: &rusqlite::Transaction<'_>) -> rusqlite::Result<()> {
        let Self { stream, shard, sequence, sub, revision } = self;
        state
            .prepare_cached(
                "DELETE FROM ledger WHERE stream = ?1 AND shard = ?2
                 AND (sequence, sub_sequence) > (?3, ?4)",
            )?
            .execute((stream, shard, sequence, sub))?;
        state
            .prepare_cached(
                "INSERT INTO ledger VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT DO UPDATE SET generation = excluded.generation,
                     recorded_ms = excluded.recorded_ms",
            )?
            .execute((stream, shard, sequence, sub, revision, now_ms()))?;
        Ok(())
    }
}

impl Ledger {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { rows: GroupCommit::new(store.clone()), store }
    }

    /// Stores a revision and the bytes of its components, as far as they are not stored yet, so that a replay can
    /// run it.
    ///
    /// # Errors
    /// [`StateError`]; no record may run through the revision then.
    pub async fn store_revision(
        &self,
        spec: &RevisionSpec,
        components: Components,
    ) -> Result<(), StateError> {
        let (id, json) = (spec.id(), spec.to_json());
        self.store
            .transact("store a revision", move |state| {
                for (digest, bytes) in &components {
                    state.execute(
                        "INSERT INTO component VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                        (digest, bytes.as_ref()),
                    )?;
                }
                state.execute(
                    "INSERT INTO generation VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                    (&*id, json),
                )
            })
            .await
            .map(drop)
    }

    /// Reads the stored specification of a revision.
    ///
    /// # Errors
    /// [`StateError`] when it is missing or cannot be read.
    pub async fn spec(&self, id: &str) -> Result<RevisionSpec, StateError> {
        let id = id.to_owned();
        self.store
            .transact("read a stored revision", move |state| {
                let query = "SELECT spec FROM generation WHERE id = ?1";
                let json: String = state.query_row(query, [&id], |row| row.get(0))?;
                read_spec(&id, &json)
            })
            .await
    }

    /// Reads the shard's segments by ascending position.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn segments(&self, shard: &ShardKey) -> Result<Vec<Segment>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("read the ledger of revisions", move |state| {
                let mut query = state.prepare_cached(
                    "SELECT sequence, sub_sequence, generation FROM ledger
                     WHERE stream = ?1 AND shard = ?2 ORDER BY sequence, sub_sequence",
                )?;
                let segments = query.query_map((stream, shard), |row| {
                    let sequence: String = row.get(0)?;
                    let from_exclusive = match sequence.is_empty() {
                        true => None,
                        false => Some(position(sequence, row.get(1)?)?),
                    };
                    Ok(Segment { from_exclusive, revision: row.get(2)? })
                })?;
                segments.collect()
            })
            .await
    }

    /// Reads all segments of all shards, by stream, shard and ascending position. Redrives are left out: their
    /// shards belong to no stream.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn history(&self) -> Result<Vec<LedgerEntry>, StateError> {
        self.store
            .transact("read the ledger of revisions", |state| {
                let mut query = state.prepare(&format!(
                    "SELECT shard, sequence, sub_sequence, generation, recorded_ms, stream FROM ledger
                     WHERE stream NOT GLOB '{REDRIVES}'
                     ORDER BY stream, shard, sequence, sub_sequence",
                ))?;
                let entries = query.query_map([], |row| {
                    let sequence: String = row.get(1)?;
                    let from_exclusive = match sequence.is_empty() {
                        true => None,
                        false => Some(position(sequence, row.get(2)?)?),
                    };
                    Ok(LedgerEntry {
                        shard: ShardId::new(row.get::<_, String>(0)?),
                        from_exclusive,
                        revision: row.get(3)?,
                        recorded_ms: row.get(4)?,
                        stream: row.get(5)?,
                    })
                })?;
                entries.collect()
            })
            .await
    }

    /// Returns the revision that ran a record, or that would run it now. If several streams had a shard of this
    /// name, the one whose key sorts last counts: of one ARN, the stream that was created last.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn revision_of(
        &self,
        shard: &ShardId,
        at: &Position,
    ) -> Result<Option<Ran>, StateError> {
        let shard = shard.to_string();
        let (sequence, sub) = columns(at);
        let found = self
            .store
            .transact("read the ledger of revisions", move |state| {
                let mut query = state.prepare(
                    "SELECT generation, EXISTS(SELECT 1 FROM sink_position s
                         WHERE s.stream = ledger.stream AND s.shard = ?1
                         AND (s.sequence, s.sub_sequence) >= (?2, ?3))
                     FROM ledger WHERE shard = ?1 AND (sequence, sub_sequence) < (?2, ?3)
                     ORDER BY stream DESC, sequence DESC, sub_sequence DESC LIMIT 1",
                )?;
                let found = query.query_row((shard, sequence, sub), |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, bool>(1)?))
                });
                found.optional()
            })
            .await?;
        match found {
            Some((revision, is_committed)) => {
                let spec = self.spec(&revision).await?;
                Ok(Some(Ran { revision, spec, is_committed }))
            }
            None => Ok(None),
        }
    }

    /// Records that a revision runs after a position. A segment at the same position or after it is replaced: it
    /// was recorded for records that no sink has anything of.
    ///
    /// Writing the same segment twice changes nothing, so rows of several lanes can share a transaction.
    ///
    /// # Errors
    /// [`StateError`]; the revision must not run then.
    pub async fn record(&self, shard: &ShardKey, segment: &Segment) -> Result<(), StateError> {
        let (sequence, sub) = segment.from_exclusive.as_ref().map(columns).unwrap_or_default();
        let row = Row {
            stream: shard.stream.key(),
            shard: shard.shard.to_string(),
            sequence,
            sub,
            revision: segment.revision.clone(),
        };
        self.rows.write(row).await
    }

    /// Deletes the components that nothing can need any more. A component stays while it belongs to
    ///
    /// - `current`, the revision that runs now,
    /// - a revision whose segment the checkpoint of a shard has not passed (ended shards excepted),
    /// - the revision before one of the last 16 promoted changes, so that the change can be undone,
    /// - a revision that has to compute a dead letter's payload again.
    ///
    /// The rows of the ledger stay as history, except those of finished redrives: nothing reads these again.
    ///
    /// # Errors
    /// [`StateError`]; nothing is lost, only space. A revision that cannot be read stops the pruning, because
    /// nobody knows which components it needs.
    pub async fn prune(&self, current: &RevisionSpec) -> Result<(), StateError> {
        let current_digests: Vec<String> = current.digests().map(str::to_owned).collect();
        self.store
            .transact("prune the ledger of revisions", move |state| {
                state.execute(
                    "DELETE FROM ledger WHERE stream GLOB 'letters:*' AND NOT EXISTS (
                         SELECT 1 FROM redrive WHERE ledger.stream GLOB '*@' || redrive.id)",
                    [],
                )?;
                // A segment is needed until the checkpoint has reached the next segment. Positions are compared
                // with their sub-sequence: records of one aggregate share their sequence number.
                let mut needed = state.prepare(
                    "SELECT DISTINCT g.id, g.spec FROM ledger l
                     JOIN generation g ON g.id = l.generation
                     LEFT JOIN shard s ON s.stream = l.stream AND s.shard = l.shard
                     WHERE coalesce(s.ended, 0) = 0 AND NOT EXISTS (
                         SELECT 1 FROM ledger n WHERE n.stream = l.stream AND n.shard = l.shard
                         AND (n.sequence, n.sub_sequence) > (l.sequence, l.sub_sequence)
                         AND (n.sequence, n.sub_sequence)
                             <= (coalesce(s.sequence, ''), coalesce(s.sub_sequence, 0)))
                     UNION SELECT g.id, g.spec FROM generation g WHERE g.id IN (
                         SELECT before FROM change WHERE outcome = 'promoted'
                         ORDER BY number DESC LIMIT ?1)
                     UNION SELECT g.id, g.spec FROM generation g WHERE g.id IN (
                         SELECT json_extract(step.value, '$.revision')
                         FROM letters, json_each(letters.made) step WHERE letters.entered_kind = 2)",
                )?;
                let mut digests = current_digests;
                let needed = needed.query_map([CHANGES_UNDOABLE], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
                })?;
                for revision in needed {
                    let (id, spec) = revision?;
                    // It is unknown which components an unreadable revision needs, so this is an error.
                    let spec = read_spec(&id, &spec)?;
                    digests.extend(spec.digests().map(str::to_owned));
                }
                let mut stored = state.prepare("SELECT digest FROM component")?;
                let stored: Vec<String> =
                    stored.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
                for digest in stored.iter().filter(|digest| !digests.contains(digest)) {
                    state.execute("DELETE FROM component WHERE digest = ?1", [digest])?;
                }
                Ok(())
            })
            .await
    }
}

/// Reads a stored specification.
fn read_spec(id: &str, json: &str) -> rusqlite::Result<RevisionSpec> {
    serde_json::from_str(json).map_err(|error| {
        let cause = format!("revision {id} cannot be read: {error}");
        let text = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(0, text, cause.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoints;
    use shardmill_core::record::{SequenceNumber, ShardStart, StreamIdentity};

    fn at(sequence: u64, sub_sequence: u64) -> Option<Position> {
        Some(Position { sequence: SequenceNumber::from(sequence), sub_sequence })
    }

    fn digest(component: &str) -> String {
        shardmill_core::record::Digest::of(component.as_bytes()).to_string()
    }

    fn spec(component: &str) -> RevisionSpec {
        let json = serde_json::json!({
            "source_format": null,
            "stages": [{
                "name": "decode", "digest": digest(component), "config_json": "{}",
                "limits": shardmill_config::StageLimits::default(), "routes": {}
            }]
        });
        serde_json::from_value(json).expect("a specification")
    }

    #[tokio::test]
    async fn fault_21_a_component_is_kept_until_the_checkpoint_has_passed_its_last_record() {
        // Where the next revision begins, where the checkpoint stands, and whether the first revision may have to
        // run a record again.
        for (next, checkpoint, needed) in [
            (at(10, 5), None, true),
            (at(10, 5), at(9, 0), true),
            // The checkpoint stands within the aggregate of which the first revision ran a part.
            (at(10, 5), at(10, 0), true),
            (at(10, 5), at(10, 4), true),
            (at(10, 5), at(10, 5), false),
            (at(10, 5), at(11, 0), false),
            // Both begin in one aggregate.
            (at(1, 3), at(1, 2), true),
            (at(1, 3), at(1, 3), false),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            let store = StateStore::open(folder.path()).expect("opened");
            let (ledger, checkpoints) =
                (Ledger::new(store.clone()), Checkpoints::new(store.clone()));
            let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
            let shard =
                ShardKey { pipeline: "cars".into(), stream: stream.into(), shard: "shard".into() };
            checkpoints.begin(&shard, &ShardStart::Horizon).await.expect("begun");
            let (first, second) = (spec("one"), spec("two"));
            for (name, spec, from) in [("one", &first, at(1, 1)), ("two", &second, next.clone())] {
                let components = vec![(digest(name), name.into())];
                ledger.store_revision(spec, components).await.expect("kept");
                let segment = Segment { from_exclusive: from, revision: spec.id().to_string() };
                ledger.record(&shard, &segment).await.expect("recorded");
            }
            checkpoints
                .advance(&shard, Vec::new(), checkpoint.clone(), false)
                .await
                .expect("moved");
            ledger.prune(&second).await.expect("pruned");
            let kept = store.component(digest("one")).await.expect("read").is_some();
            assert_eq!(kept, needed, "{next:?} {checkpoint:?}");
        }
    }

    #[tokio::test]
    async fn fault_18_components_of_an_unreadable_revision_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let ledger = Ledger::new(store.clone());
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let shard =
            ShardKey { pipeline: "cars".into(), stream: stream.into(), shard: "shard".into() };
        let first = spec("one");
        ledger.store_revision(&first, vec![(digest("one"), "one".into())]).await.expect("kept");
        let segment = Segment { from_exclusive: None, revision: first.id().to_string() };
        ledger.record(&shard, &segment).await.expect("recorded");
        let spoil = |state: &rusqlite::Transaction<'_>| {
            state.execute("UPDATE generation SET spec = '{\"stages\":7}'", [])
        };
        store.transact("spoil", spoil).await.expect("spoilt");
        let error = ledger.prune(&spec("two")).await.expect_err("unreadable").to_string();
        assert!(error.contains(&format!("revision {} cannot be read", first.id())), "{error}");
        assert!(store.component(digest("one")).await.expect("read").is_some());
    }
}
