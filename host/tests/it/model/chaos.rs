//! Faults by seed: every step of a run asks here what happens to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use fastrand::Rng;
use shardmill::record::{Position, ShardKey, SinkName};
use shardmill::sink::{
    Acquired, BoundRoute, Commit, Committed, Refusal, RefusalLog, Sink, SinkError, SinkWriter,
};
use tokio::sync::Notify;

/// What goes wrong; shared by all parts of a run.
pub struct Chaos {
    rng: Mutex<Rng>,
    /// Steps until the process is killed.
    steps_left: Mutex<Option<u64>>,
    killed: Notify,
    /// Which process lives: earlier ones are dead, or are zombies on other machines.
    life: AtomicU64,
    /// The longest pause that a step makes, in milliseconds.
    pause_ms_max: u64,
}

/// What happens at a step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    GoOn,
    Fail,
}

impl Chaos {
    pub fn new(seed: u64, pause_ms_max: u64) -> Arc<Self> {
        let rng = Mutex::new(Rng::with_seed(seed));
        let (steps_left, killed, life) = (Mutex::default(), Notify::new(), AtomicU64::new(0));
        Arc::new(Self { rng, steps_left, killed, life, pause_ms_max })
    }

    pub fn rng(&self) -> MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process begins.
    pub fn begin(&self) {
        self.life.fetch_add(1, Ordering::Relaxed);
    }

    fn life(&self) -> u64 {
        self.life.load(Ordering::Relaxed)
    }

    /// From here on the process lives for so many steps; `None`: nothing happens any more.
    pub fn live_for(&self, steps: Option<u64>) {
        *self.steps_left.lock().unwrap_or_else(PoisonError::into_inner) = steps;
    }

    /// Completes when the process is to die.
    pub async fn killed(&self) {
        self.killed.notified().await;
        // Some of what follows the last step still happens: a checkpoint, or a commit.
        let more = self.rng().u64(0..=self.pause_ms_max / 2);
        tokio::time::sleep(Duration::from_millis(more)).await;
    }

    /// A step: it may pause, and fail.
    pub async fn step(&self) -> Fate {
        let is_last = match &mut *self.steps_left.lock().unwrap_or_else(PoisonError::into_inner) {
            None => return Fate::GoOn,
            Some(0) => false,
            Some(steps) => {
                *steps -= 1;
                *steps == 0
            }
        };
        if is_last {
            self.killed.notify_one();
        }
        let (pauses, pause_ms, fails) = {
            let mut rng = self.rng();
            (rng.u8(0..100) < 20, rng.u64(0..=self.pause_ms_max), rng.u8(0..100) < 12)
        };
        if pauses {
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        }
        if fails { Fate::Fail } else { Fate::GoOn }
    }
}

/// A sink whose every call may pause, fail before it does anything, or lose its reply.
pub struct Unreliable {
    pub inner: Arc<dyn Sink>,
    pub chaos: Arc<Chaos>,
}

impl Unreliable {
    fn failed(&self, what: &str) -> SinkError {
        failed(self.inner.name(), what)
    }
}

fn failed(sink: &SinkName, what: &str) -> SinkError {
    SinkError::Unavailable { sink: sink.clone(), cause: format!("chaos: {what}") }
}

#[async_trait]
impl Sink for Unreliable {
    fn name(&self) -> &SinkName {
        self.inner.name()
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        self.inner.prepare(routes).await
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        if self.chaos.step().await == Fate::Fail {
            return Err(self.failed("not acquired"));
        }
        let mut acquired = self.inner.acquire(shard).await?;
        if self.chaos.step().await == Fate::Fail {
            return Err(self.failed("acquired, and the reply was lost"));
        }
        acquired.writer = Box::new(UnreliableWriter {
            inner: acquired.writer,
            name: self.name().clone(),
            chaos: self.chaos.clone(),
            life: self.chaos.life(),
        });
        Ok(acquired)
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        self.inner.position(shard).await
    }
}

struct UnreliableWriter {
    inner: Box<dyn SinkWriter>,
    name: SinkName,
    chaos: Arc<Chaos>,
    life: u64,
}

/// The dead letters of a zombie: the state folder is another's by now.
struct Gone;

#[async_trait]
impl RefusalLog for Gone {
    async fn hold(&self, _: &Commit, _: &[Refusal]) -> Result<(), SinkError> {
        Err(failed(&"any".into(), "the state folder is gone"))
    }
}

#[async_trait]
impl SinkWriter for UnreliableWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        if self.chaos.step().await == Fate::Fail {
            return Err(failed(&self.name, "not committed"));
        }
        let is_zombie = self.chaos.life() != self.life;
        let refusals = if is_zombie { &Gone } else { refusals };
        let committed = self.inner.commit(commit, refusals).await?;
        if self.chaos.step().await == Fate::Fail {
            return Err(failed(&self.name, "committed, and the reply was lost"));
        }
        Ok(committed)
    }
}
