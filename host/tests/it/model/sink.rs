//! Sink of the pure model: implements the contract of sinks in memory.
//!
//! A transaction applies all its effects or none: position, mark and rows change together, under one lock. It may
//! land after its client has been killed, when the next process has already acquired the shard. The epoch is what
//! protects against that: acquiring the shard, or moving its position to another name, increases the epoch.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use shardmill_core::owner::{OwnerName, Ownership, StateMark};
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardId, ShardKey, SinkName};
use shardmill_core::sink::{
    Acquired, Commit, Committed, KeptPosition, Refusal, RefusalLog, Sink, SinkError, SinkWriter,
};
use shardmill_state::is_redrive;
use tokio::runtime::Handle;

use super::chaos::Chaos;

/// Table in memory that outlives processes.
pub struct Table {
    state: Mutex<State>,
    backups: Mutex<Vec<State>>,
    accepts_all: AtomicBool,
    chaos: Arc<Chaos>,
    /// Runtime in which transactions end, even if their clients have ended.
    server: Handle,
}

#[derive(Clone, Default)]
struct State {
    shards: HashMap<Key, Stored>,
    rows: Vec<Row>,
    /// Number of restores. Transactions from before a restore have no effect.
    restores: usize,
}

/// A row, and whether a redrive wrote it: such a row is out of order.
#[derive(Clone)]
pub struct Row {
    pub payload: String,
    pub is_redriven: bool,
}

/// Key of a position: sink, stream and shard.
type Key = (SinkName, String, ShardId);

#[derive(Clone, Default)]
struct Stored {
    epoch: u64,
    position: Option<Position>,
    mark: Option<StateMark>,
    owner: Option<OwnerName>,
}

impl Table {
    pub fn new(chaos: Arc<Chaos>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            backups: Mutex::default(),
            accepts_all: AtomicBool::new(false),
            chaos,
            server: Handle::current(),
        })
    }

    /// Returns the rows in the order in which they were written.
    pub fn rows(&self) -> Vec<Row> {
        self.state().rows.clone()
    }

    pub fn back_up(&self) {
        let backup = self.state().clone();
        self.backups.lock().unwrap_or_else(PoisonError::into_inner).push(backup);
    }

    /// Restores the table from a backup.
    pub fn restore(&self, backup: usize) {
        let backup = self.backups.lock().unwrap_or_else(PoisonError::into_inner)[backup].clone();
        let mut state = self.state();
        *state = State { restores: state.restores + 1, ..backup };
    }

    /// Accepts from now on what the table refused before.
    pub fn accept_all(&self) {
        self.accepts_all.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the table refuses a row.
    fn refuses(&self, payload: &str) -> bool {
        payload.contains("7,") && !self.accepts_all.load(Ordering::Relaxed)
    }
}

/// Sink of one process over a table.
pub struct TableSink {
    name: SinkName,
    table: Arc<Table>,
    ownership: OnceLock<Ownership>,
}

impl TableSink {
    pub fn new(name: &str, table: Arc<Table>) -> Self {
        Self { name: name.into(), table, ownership: OnceLock::new() }
    }

    fn key(&self, shard: &ShardKey) -> Key {
        (self.name.clone(), shard.stream.key(), shard.shard.clone())
    }
}

#[async_trait]
impl Sink for TableSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        Ok(())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let key = self.key(shard);
        let ownership = self.ownership.get().cloned();
        let mut state = self.table.state();
        let restores = state.restores;
        let own = state.shards.entry(key.clone()).or_default();
        own.epoch += 1;
        own.mark = ownership.as_ref().map(Ownership::mark);
        own.owner = ownership.as_ref().map(|own| own.owner.clone());
        let (epoch, position) = (own.epoch, own.position.clone());
        let is_redriven = is_redrive(&shard.stream);
        let table = self.table.clone();
        let writer = Box::new(Writer { table, key, epoch, restores, ownership, is_redriven });
        Ok(Acquired { writer, position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let state = self.table.state();
        Ok(state.shards.get(&self.key(shard)).and_then(|own| own.position.clone()))
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        let (_, stream, shard) = self.key(shard);
        let mut state = self.table.state();
        let Some(mut kept) = state.shards.remove(&(old.clone(), stream.clone(), shard.clone()))
        else {
            return Ok(());
        };
        kept.epoch += 1;
        let replaced = state.shards.insert((self.name.clone(), stream, shard), kept);
        match replaced.and_then(|own| own.position) {
            None => Ok(()),
            Some(_) => Err(SinkError::Unavailable {
                sink: self.name.clone(),
                cause: format!("both {old} and this sink have positions"),
            }),
        }
    }

    fn set_ownership(&self, ownership: Ownership) {
        // The first call counts: a sink has one owner for its whole life.
        let _ = self.ownership.set(ownership);
    }

    async fn kept_positions(
        &self,
        _pipeline: &PipelineName,
        _shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let state = self.table.state();
        let own = state.shards.iter().filter(|((sink, ..), _)| *sink == self.name);
        let kept = own.map(|((_, stream, shard), own)| KeptPosition {
            stream: stream.clone(),
            shard: shard.clone(),
            position: own.position.clone(),
            mark: own.mark.clone(),
            owner: own.owner.clone(),
        });
        Ok(Some(kept.collect()))
    }
}

struct Writer {
    table: Arc<Table>,
    key: Key,
    epoch: u64,
    restores: usize,
    ownership: Option<Ownership>,
    is_redriven: bool,
}

/// Transaction that the server has received; its client may have ended.
struct Landing {
    table: Arc<Table>,
    key: Key,
    epoch: u64,
    restores: usize,
    from: Option<Position>,
    to: Position,
    mark: Option<StateMark>,
    rows: Vec<Row>,
}

impl Landing {
    /// Applies the transaction of a commit of `(from, to]`. The first row that matches decides:
    ///
    /// | what the table has | outcome |
    /// |---|---|
    /// | it was restored since the shard was acquired | fenced |
    /// | no position under this sink's name, because another name has adopted it | fenced |
    /// | another epoch | fenced |
    /// | position `to` | success: an earlier attempt of the same commit has landed |
    /// | a position other than `from` | fenced |
    /// | position `from` | the rows are added and the position moves to `to` |
    fn land(self) -> Result<(), SinkError> {
        let (sink, _, shard) = self.key.clone();
        let fenced = |detail: &str| SinkError::Fenced {
            sink: sink.clone(),
            shard: shard.to_string(),
            detail: detail.into(),
            by: None,
        };
        let mut state = self.table.state();
        if state.restores != self.restores {
            return Err(fenced("the table was restored"));
        }
        let Some(own) = state.shards.get_mut(&self.key) else {
            return Err(fenced("another name"));
        };
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
        own.mark = self.mark;
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
            match self.table.refuses(&payload) {
                true => refused.push(Refusal { row: index, reason: "refused".into() }),
                false => rows.push(Row { payload, is_redriven: self.is_redriven }),
            }
        }
        // Refused rows must be durable before the position passes them.
        if !refused.is_empty() {
            refusals.record(commit, &refused).await?;
        }
        let committed = Committed {
            rows_written: rows.len() as u64,
            rows_refused: refused.len() as u64,
            bytes_written: 0,
        };
        let landing = Landing {
            table: self.table.clone(),
            key: self.key.clone(),
            epoch: self.epoch,
            restores: self.restores,
            from: commit.range.from_exclusive.clone(),
            to: commit.range.to_inclusive.clone(),
            mark: self.ownership.as_ref().map(Ownership::mark),
            rows,
        };
        // The server finishes the transaction even if its client has ended, sometimes much later.
        let late_ms = self.table.chaos.rng().u64(0..100).saturating_sub(70) * 10;
        let landed = self.table.server.spawn(async move {
            tokio::time::sleep(Duration::from_millis(late_ms)).await;
            landing.land()
        });
        landed.await.expect("no panic")?;
        Ok(committed)
    }
}
