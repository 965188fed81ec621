//! The revision ledger: which revision runs from which position on, per shard.
//!
//! A replay runs the revision that ran first. With sinks at different positions, a record that is
//! replayed by other code could be routed to a sink that is already past it, and be lost. So each
//! start with other plugins, configurations or bindings is a swap at a recorded position (the
//! highest that any sink has), durable before its first record; at or below it the stored
//! revision runs, from the stored bytes.

use rusqlite::OptionalExtension as _;
use serde::Serialize;

use bytes::Bytes;

use super::group_commit::{BatchedEntry, GroupCommit};
use super::redrive_key::REDRIVES;
use super::store::{StateError, StateStore, columns, now_ms, position};
use crate::RevisionSpec;
use shardmill_core::record::{Position, ShardId, ShardKey};

/// Components' bytes, by their digests.
pub type Components = Vec<(String, Bytes)>;

/// Changes whose components are kept, so that they can be undone.
const CHANGES_UNDOABLE: u32 = 16;

/// A revision and the position after which it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Exclusive; `None`: from the shard's beginning.
    pub from_exclusive: Option<Position>,
    /// The id of the revision.
    pub revision: String,
}

/// What runs a record, or ran it.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The id of the revision.
    pub revision: String,
    /// What it is.
    pub spec: RevisionSpec,
    /// Some sink has settled the record, as of the last checkpoint: it was run. Otherwise another
    /// revision may still come before it.
    pub is_committed: bool,
}

/// A segment with its shard, for people.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerEntry {
    /// The shard.
    pub shard: ShardId,
    /// Exclusive; `None`: from the shard's beginning.
    #[serde(serialize_with = "super::as_text")]
    pub from_exclusive: Option<Position>,
    /// The id of the revision.
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
    /// Lanes change together.
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
    const ACTION: &'static str = "write the generation ledger";

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
    /// Over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { rows: GroupCommit::new(store.clone()), store }
    }

    /// Stores a revision and its components' bytes, those that are not stored yet, so that a replay can
    /// run it.
    ///
    /// # Errors
    /// [`StateError`]; no record may run through it then.
    pub async fn store_revision(
        &self,
        spec: &RevisionSpec,
        components: Components,
    ) -> Result<(), StateError> {
        let (id, json) = (spec.id(), spec.to_json());
        self.store
            .transact("store a generation", move |state| {
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

    /// The stored specification of a revision.
    ///
    /// # Errors
    /// [`StateError`] when it is missing or cannot be read.
    pub async fn spec(&self, id: &str) -> Result<RevisionSpec, StateError> {
        let id = id.to_owned();
        self.store
            .transact("read a stored generation", move |state| {
                let query = "SELECT spec FROM generation WHERE id = ?1";
                let json: String = state.query_row(query, [&id], |row| row.get(0))?;
                read_spec(&id, &json)
            })
            .await
    }

    /// The shard's segments by ascending position.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn segments(&self, shard: &ShardKey) -> Result<Vec<Segment>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        self.store
            .transact("read the generation ledger", move |state| {
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

    /// Every segment of every shard that was read, by stream, shard and ascending position. Redrives are
    /// no part of it: their shards are of no stream.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn history(&self) -> Result<Vec<LedgerEntry>, StateError> {
        self.store
            .transact("read the generation ledger", |state| {
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

    /// The revision that a record was run by, or is due to be run by; of streams that had the shard, the
    /// one that was read last.
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
            .transact("read the generation ledger", move |state| {
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

    /// Records that a revision runs from here on. A segment at the same place or behind it is
    /// replaced: no sink has anything of it.
    ///
    /// Lanes change together: what several have to record goes to the disk at once.
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

    /// Forgets the components that nothing needs any more: those of revisions whose last segment the
    /// checkpoints of all shards have passed, which none of the last changes could be undone to, and which
    /// no dead letter needs to make again what entered where it failed. The
    /// ledger's rows of shards stay: they are history. Those of redrives that are finished go: nothing is
    /// read by them again.
    ///
    /// # Errors
    /// [`StateError`]; nothing is lost, only space.
    pub async fn prune(&self, current: &RevisionSpec) -> Result<(), StateError> {
        let current_digests: Vec<String> = current.digests().map(str::to_owned).collect();
        self.store
            .transact("prune the generation ledger", move |state| {
                state.execute(
                    "DELETE FROM ledger WHERE stream GLOB 'letters:*' AND NOT EXISTS (
                         SELECT 1 FROM redrive WHERE ledger.stream GLOB '*@' || redrive.id)",
                    [],
                )?;
                // A segment is needed until a checkpoint has reached the segment after it. Positions
                // are compared whole: records of one aggregate share their sequence number.
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
                    // Of one that cannot be read, nobody knows which components it needs.
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
        // Where the next revision begins, where the checkpoint stands, and whether the first
        // revision may have to run a record again.
        for (next, checkpoint, needed) in [
            (at(10, 5), None, true),
            (at(10, 5), at(9, 0), true),
            // The checkpoint stands within the aggregate that the first revision ran a part of.
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
