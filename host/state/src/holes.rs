//! Holes: recorded ranges of records that a sink was never given.
//!
//! **Invariant.** Every record has an outcome in every sink that it is routed to (delivered, filtered or dead
//! letter), except in a hole. A hole has one of three reasons: the sink was not configured at that time, the
//! records were gone from the stream, or a person chose to go on without them.
//!
//! A hole is written in the same transaction as the decision that makes it. Written later, a crash in between would
//! leave missing rows without a trace. `check`, the start of `run`, `objects verify` and `replay` name each hole
//! until it is filled.
//!
//! A filled hole keeps its row: the sink's own position still lies before it, and the lane has to skip the same
//! range at each start ([`Holes::end_around`]).

use std::fmt;

use rusqlite::{OptionalExtension as _, Row, Transaction};
use serde::Serialize;

use super::store::{StateError, StateStore, columns, now_ms, position};
use shardmill_core::record::{Position, ShardId, ShardKey, SinkName};

/// Position range of a shard that a sink was not given: `(from, to]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The sink; `None`: every sink.
    pub sink: Option<SinkName>,
    /// The shard, with its stream and pipeline.
    pub shard: ShardKey,
    /// Exclusive; `None`: from the shard's beginning.
    pub from_exclusive: Option<Position>,
    /// Inclusive; `None`: unknown, or up to the shard's end.
    pub to_inclusive: Option<Position>,
    /// Reason, worded as a clause that follows a colon.
    pub why: String,
}

/// A hole as it is stored.
#[derive(Clone, Debug, Serialize)]
pub struct RecordedHole {
    /// Its number: later ones have greater numbers.
    pub number: i64,
    /// The sink; `None`: every sink.
    pub sink: Option<SinkName>,
    /// The stream, by its key.
    pub stream: String,
    /// The shard.
    pub shard: ShardId,
    /// Exclusive; `None`: from the shard's beginning.
    #[serde(serialize_with = "super::as_text")]
    pub from_exclusive: Option<Position>,
    /// Inclusive; `None`: unknown, or up to the shard's end.
    #[serde(serialize_with = "super::as_text")]
    pub to_inclusive: Option<Position>,
    /// Reason.
    pub why: String,
    /// When it was recorded, in milliseconds since 1970.
    pub recorded_ms: i64,
}

impl RecordedHole {
    /// Whether this sink lacks the records of the hole.
    pub fn concerns(&self, sink: &SinkName) -> bool {
        self.sink.as_ref().is_none_or(|own| own == sink)
    }
}

impl fmt::Display for RecordedHole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, sink, shard, from_exclusive, to_inclusive, why, .. } = self;
        write!(f, "hole {number}: ")?;
        match sink {
            Some(sink) => write!(f, "sink {sink} lacks the records of shard {shard} ")?,
            None => write!(f, "every sink lacks the records of shard {shard} ")?,
        }
        match from_exclusive {
            Some(from) => write!(f, "after {from} ")?,
            None => f.write_str("from its beginning ")?,
        }
        match to_inclusive {
            Some(to) => write!(f, "up to {to}")?,
            None => f.write_str("on")?,
        }
        write!(f, ": {why}")
    }
}

/// The holes of a pipeline.
#[derive(Clone)]
pub struct Holes {
    store: StateStore,
}

impl Holes {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// Records a hole and returns its number. The same range of the same sink is recorded once: the first entry
    /// stays.
    ///
    /// # Errors
    /// [`StateError`]; the records must not be skipped then.
    pub async fn record(&self, hole: Hole) -> Result<i64, StateError> {
        self.store.transact("record a hole", move |state| insert(state, &hole)).await
    }

    /// Lists the holes that are not filled, oldest first: with `sink`, its own and those of every sink; else all.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn list(&self, sink: Option<SinkName>) -> Result<Vec<RecordedHole>, StateError> {
        self.store
            .transact("read the holes", move |state| {
                let mut query = state.prepare(
                    "SELECT number, sink, stream, shard, from_sequence, from_sub, to_sequence,
                         to_sub, why, recorded_ms
                     FROM hole WHERE filled_ms IS NULL AND (?1 IS NULL OR sink IN ('', ?1))
                     ORDER BY number",
                )?;
                let sink = sink.as_ref().map(SinkName::as_str);
                query.query_map([sink], recorded)?.collect()
            })
            .await
    }

    /// Marks a hole as filled: it is not reported any more. Returns false if no open hole has this number.
    ///
    /// # Errors
    /// [`StateError`]; it is still reported then.
    pub async fn fill(&self, number: i64) -> Result<bool, StateError> {
        self.store
            .transact("mark a hole as filled", move |state| {
                let fill = "UPDATE hole SET filled_ms = ?2 WHERE number = ?1 AND filled_ms IS NULL";
                Ok(state.execute(fill, (number, now_ms()))? > 0)
            })
            .await
    }

    /// Returns where a sink at position `at` continues: the end of its hole that begins at or before `at` and ends
    /// after it. `None`: the sink stands in no hole of its own.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn end_around(
        &self,
        shard: &ShardKey,
        sink: &SinkName,
        at: Option<&Position>,
    ) -> Result<Option<Position>, StateError> {
        let (stream, shard) = (shard.stream.key(), shard.shard.to_string());
        let (sink, (sequence, sub)) = (sink.to_string(), at.map(columns).unwrap_or_default());
        self.store
            .transact("read the holes", move |state| {
                // Filled holes count too: filling one (`replay`) does not move the sink's own position.
                let mut query = state.prepare_cached(
                    "SELECT to_sequence, to_sub FROM hole
                     WHERE stream = ?1 AND shard = ?2 AND sink = ?3
                         AND (from_sequence, from_sub) <= (?4, ?5)
                         AND (to_sequence, to_sub) > (?4, ?5)
                     ORDER BY to_sequence DESC, to_sub DESC LIMIT 1",
                )?;
                let end = query.query_row((stream, shard, sink, sequence, sub), |row| {
                    position(row.get(0)?, row.get(1)?)
                });
                end.optional()
            })
            .await
    }
}

/// Records a hole within a transaction, unless it is recorded already. Returns its number.
pub(super) fn insert(state: &Transaction<'_>, hole: &Hole) -> rusqlite::Result<i64> {
    let sink = hole.sink.as_ref().map_or("", SinkName::as_str);
    let (from, from_sub) = hole.from_exclusive.as_ref().map(columns).unwrap_or_default();
    let (to, to_sub) = hole.to_inclusive.as_ref().map(columns).unwrap_or_default();
    let (stream, shard) = (hole.shard.stream.key(), hole.shard.shard.as_str());
    let key = (sink, stream, shard, from, from_sub, to, to_sub);
    // Looked up first: an insert that fails on the key would use up a number (AUTOINCREMENT), and numbers would
    // have gaps.
    let known = state.query_row(
        "SELECT number FROM hole WHERE sink = ?1 AND stream = ?2 AND shard = ?3
         AND from_sequence = ?4 AND from_sub = ?5 AND to_sequence = ?6 AND to_sub = ?7",
        (&key.0, &key.1, &key.2, &key.3, key.4, &key.5, key.6),
        |row| row.get(0),
    );
    if let Some(number) = known.optional()? {
        return Ok(number);
    }
    state.execute(
        "INSERT INTO hole (sink, stream, shard, from_sequence, from_sub, to_sequence, to_sub, why,
             recorded_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        (&key.0, &key.1, &key.2, &key.3, key.4, &key.5, key.6, &hole.why, now_ms()),
    )?;
    Ok(state.last_insert_rowid())
}

fn recorded(row: &Row<'_>) -> rusqlite::Result<RecordedHole> {
    let sink: String = row.get(1)?;
    let end = |at: usize| -> rusqlite::Result<Option<Position>> {
        let sequence: String = row.get(at)?;
        match sequence.is_empty() {
            true => Ok(None),
            false => position(sequence, row.get(at + 1)?).map(Some),
        }
    };
    Ok(RecordedHole {
        number: row.get(0)?,
        sink: (!sink.is_empty()).then(|| SinkName::from(sink)),
        stream: row.get(2)?,
        shard: ShardId::from(row.get::<_, String>(3)?),
        from_exclusive: end(4)?,
        to_inclusive: end(6)?,
        why: row.get(8)?,
        recorded_ms: row.get(9)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_core::record::{SequenceNumber, StreamIdentity};

    fn at(sequence: u64, sub_sequence: u64) -> Option<Position> {
        Some(Position { sequence: SequenceNumber::from(sequence), sub_sequence })
    }

    #[tokio::test]
    async fn fault_04_a_hole_is_recorded_once_listed_and_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let holes = Holes::new(StateStore::open(folder.path()).expect("opened"));
        let stream = StreamIdentity { name: "cars".into(), arn: "cars".into(), created_ms: 0 };
        let shard =
            ShardKey { pipeline: "cars".into(), stream: stream.into(), shard: "shard".into() };
        let mart = SinkName::from("mart");
        let hole = |sink: Option<&str>, from: Option<Position>, to: Option<Position>| Hole {
            sink: sink.map(SinkName::from),
            shard: shard.clone(),
            from_exclusive: from,
            to_inclusive: to,
            why: "it was removed".into(),
        };
        let first = holes.record(hole(Some("mart"), at(9, 2), at(10, 1))).await.expect("recorded");
        let again = holes.record(hole(Some("mart"), at(9, 2), at(10, 1))).await.expect("recorded");
        assert_eq!(first, again);
        holes.record(hole(None, None, at(3, 0))).await.expect("recorded");
        holes.record(hole(Some("other"), None, None)).await.expect("recorded");
        let own = holes.list(Some(mart.clone())).await.expect("listed");
        let shown: Vec<String> = own.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "hole 1: sink mart lacks the records of shard shard after 9/2 up to 10/1: it was \
                 removed",
                "hole 2: every sink lacks the records of shard shard from its beginning up to 3: it \
                 was removed"
            ]
        );
        for (stands, expected) in [
            (None, None),
            (at(9, 1), None),
            (at(9, 2), at(10, 1)),
            (at(10, 0), at(10, 1)),
            (at(10, 1), None),
        ] {
            let end = holes.end_around(&shard, &mart, stands.as_ref()).await.expect("read");
            assert_eq!(end, expected, "{stands:?}");
        }
        assert!(holes.fill(first).await.expect("filled"));
        assert_eq!(holes.list(Some(mart.clone())).await.expect("listed").len(), 1);
        assert!(!holes.fill(first).await.expect("filled"));
        let end = holes.end_around(&shard, &mart, at(9, 2).as_ref()).await.expect("read");
        assert_eq!(end, at(10, 1), "the sink's own position did not move");
    }
}
