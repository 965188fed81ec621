//! The sink of the pure model: what the contract says, in memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use shardmill::record::{Position, ShardKey, SinkName};
use shardmill::sink::{
    Acquired, BoundRoute, Commit, Committed, Refusal, RefusalLog, Sink, SinkError, SinkWriter,
};

use super::chaos::Chaos;

/// A table in memory that outlives processes.
pub struct Table {
    name: SinkName,
    state: Mutex<State>,
    chaos: Arc<Chaos>,
}

#[derive(Default)]
struct State {
    shards: HashMap<String, ShardState>,
    rows: Vec<String>,
}

#[derive(Clone, Default)]
struct ShardState {
    epoch: u64,
    position: Option<Position>,
}

impl Table {
    pub fn new(name: &str, chaos: Arc<Chaos>) -> Arc<Self> {
        Arc::new(Self { name: name.into(), state: Mutex::default(), chaos })
    }

    /// The payloads in the order in which they came.
    pub fn rows(&self) -> Vec<String> {
        self.state().rows.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the table takes a row.
    fn refuses(payload: &str) -> bool {
        payload.contains("7,")
    }
}

/// The sink of one process over a table.
pub struct TableSink(pub Arc<Table>);

#[async_trait]
impl Sink for TableSink {
    fn name(&self) -> &SinkName {
        &self.0.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        Ok(())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let key = shard.shard.to_string();
        let mut state = self.0.state();
        let own = state.shards.entry(key.clone()).or_default();
        own.epoch += 1;
        let (epoch, position) = (own.epoch, own.position.clone());
        let writer = Box::new(Writer { table: self.0.clone(), shard: key, epoch });
        Ok(Acquired { writer, position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let state = self.0.state();
        Ok(state.shards.get(shard.shard.as_str()).and_then(|own| own.position.clone()))
    }
}

struct Writer {
    table: Arc<Table>,
    shard: String,
    epoch: u64,
}

/// A transaction that the server has and whose client may be gone.
struct Landing {
    table: Arc<Table>,
    shard: String,
    epoch: u64,
    from: Option<Position>,
    to: Position,
    rows: Vec<String>,
}

impl Landing {
    fn land(self) -> Result<(), SinkError> {
        let sink = self.table.name.clone();
        let fenced = |detail: &str| SinkError::Fenced {
            sink: sink.clone(),
            shard: self.shard.clone(),
            detail: detail.into(),
            by: None,
        };
        let mut state = self.table.state();
        let own = state.shards.entry(self.shard.clone()).or_default();
        if own.epoch != self.epoch {
            return Err(fenced("another epoch"));
        }
        if own.position.as_ref() == Some(&self.to) {
            return Ok(());
        }
        if own.position != self.from {
            return Err(fenced("another position"));
        }
        own.position = Some(self.to);
        state.rows.extend(self.rows);
        Ok(())
    }
}

#[async_trait]
impl SinkWriter for Writer {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let (mut rows, mut refused) = (Vec::new(), Vec::new());
        for (index, row) in commit.rows.iter().enumerate() {
            let payload = String::from_utf8_lossy(&row.payload).into_owned();
            match Table::refuses(&payload) {
                true => refused.push(Refusal { row: index, reason: "refused".into() }),
                false => rows.push(payload),
            }
        }
        if !refused.is_empty() {
            refusals.hold(commit, &refused).await?;
        }
        let committed = Committed {
            rows_written: rows.len() as u64,
            rows_refused: refused.len() as u64,
            bytes_written: 0,
        };
        let landing = Landing {
            table: self.table.clone(),
            shard: self.shard.clone(),
            epoch: self.epoch,
            from: commit.span.from_exclusive.clone(),
            to: commit.span.to_inclusive.clone(),
            rows,
        };
        // The server goes on when its client is gone, perhaps much later.
        let late_ms = self.table.chaos.rng().u64(0..100).saturating_sub(70) * 10;
        let landed = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(late_ms)).await;
            landing.land()
        });
        landed.await.expect("no panic")?;
        Ok(committed)
    }
}
