//! Faults drawn by seed: every step of a run asks here what happens to it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use fastrand::Rng;
use shardmill_core::owner::Ownership;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardKey, SinkName};
use shardmill_core::sink::{
    Acquired, Commit, Committed, EncodeRows, KeptPosition, LookAhead, RefusalLog, Sink, SinkError,
    SinkWriter,
};
use tokio::sync::Notify;

/// Source of faults; shared by all parts of a run.
pub struct Chaos {
    rng: Mutex<Rng>,
    /// Number of steps until the process ends; `None`: no faults happen.
    steps_left: Mutex<Option<u64>>,
    is_over: AtomicBool,
    over: Notify,
    /// Longest pause of a step, in milliseconds.
    pause_ms_max: u64,
}

/// Outcome of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    GoOn,
    Fail,
    /// The call gets no answer for this many milliseconds, which is its deadline; `None`: until the process ends.
    NeverAnswered(Option<u64>),
}

impl Chaos {
    pub fn new(seed: u64, pause_ms_max: u64) -> Arc<Self> {
        Arc::new(Self {
            // Uses other draws than the script, which is drawn from the same seed.
            rng: Mutex::new(Rng::with_seed(!seed)),
            steps_left: Mutex::default(),
            is_over: AtomicBool::new(false),
            over: Notify::new(),
            pause_ms_max,
        })
    }

    pub fn rng(&self) -> MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the process live for this many steps from now on; `None`: no more faults.
    pub fn live_for(&self, steps: Option<u64>) {
        self.is_over.store(false, Ordering::Release);
        *self.steps_left.lock().unwrap_or_else(PoisonError::into_inner) = steps;
    }

    /// Ends the process, whatever its script says.
    pub fn kill(&self) {
        self.end();
    }

    fn end(&self) {
        self.is_over.store(true, Ordering::Release);
        self.over.notify_waiters();
    }

    /// Completes when the process must end.
    pub async fn over(&self) {
        loop {
            let notified = self.over.notified();
            if self.is_over.load(Ordering::Acquire) {
                break;
            }
            notified.await;
        }
        // A process does not end at once: some of the work after the last step still happens, such as a checkpoint or
        // a commit.
        let more = self.rng().u64(0..=self.pause_ms_max / 2);
        tokio::time::sleep(Duration::from_millis(more)).await;
    }

    /// Takes a step, which may pause or fail.
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
            self.end();
        }
        let (pause_ms, fate) = {
            let mut rng = self.rng();
            let pause_ms = (rng.u8(..100) < 20).then(|| rng.u64(0..=self.pause_ms_max));
            let fate = match rng.u8(..100) {
                0..12 => Fate::Fail,
                12 => Fate::NeverAnswered(None),
                13 => Fate::NeverAnswered(Some(rng.u64(50..400))),
                _ => Fate::GoOn,
            };
            (pause_ms, fate)
        };
        if let Some(pause_ms) = pause_ms {
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        }
        fate
    }

    /// Makes a call whose answer never arrives: its work may be done all the same.
    pub async fn unanswered<T>(&self, deadline_ms: Option<u64>, call: impl Future<Output = T>) {
        let silent = async {
            let _ = call.await;
            std::future::pending::<()>().await;
        };
        match deadline_ms {
            Some(ms) => {
                // The deadline passes, and the call is dropped.
                let _ = tokio::time::timeout(Duration::from_millis(ms), silent).await;
            }
            None => {
                // A hanging process would never reach its last step, so it ends here.
                self.end();
                silent.await;
            }
        }
    }
}

/// Sink whose every call may pause, fail before it does anything, lose its reply, or never be answered.
pub struct Unreliable {
    pub inner: Arc<dyn Sink>,
    pub chaos: Arc<Chaos>,
}

impl Unreliable {
    /// Makes the call, or fails before it.
    async fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, SinkError>>,
    ) -> Result<T, SinkError> {
        faulty(&self.chaos, self.inner.name(), what, call).await
    }
}

/// Makes a call with a possible fault before it, and another one after it.
async fn faulty<T>(
    chaos: &Chaos,
    sink: &SinkName,
    what: &str,
    call: impl Future<Output = Result<T, SinkError>>,
) -> Result<T, SinkError> {
    let failed = |how: &str| {
        let cause = format!("chaos: {what}: {how}");
        Err(SinkError::Unavailable { sink: sink.clone(), cause })
    };
    match chaos.step().await {
        Fate::GoOn => {}
        Fate::Fail => return failed("not done"),
        Fate::NeverAnswered(deadline_ms) => {
            chaos.unanswered(deadline_ms, call).await;
            return failed("no answer");
        }
    }
    let done = call.await?;
    match chaos.step().await {
        Fate::GoOn => Ok(done),
        Fate::Fail => failed("done, and the reply was lost"),
        Fate::NeverAnswered(deadline_ms) => {
            chaos.unanswered(deadline_ms, async {}).await;
            failed("done, and no answer")
        }
    }
}

#[async_trait]
impl Sink for Unreliable {
    fn name(&self) -> &SinkName {
        self.inner.name()
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        self.inner.prepare(routes).await
    }

    async fn reach(&self, shard: &ShardKey) -> Result<(), SinkError> {
        self.call("reach", self.inner.reach(shard)).await
    }

    fn acquires_last(&self) -> bool {
        self.inner.acquires_last()
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let mut acquired = self.call("acquire", self.inner.acquire(shard)).await?;
        acquired.writer = Box::new(UnreliableWriter {
            inner: acquired.writer,
            name: self.name().clone(),
            chaos: self.chaos.clone(),
        });
        Ok(acquired)
    }

    // Without faults: a start that cannot read a position is refused, with an error for whoever starts it.
    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        self.inner.position(shard).await
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        self.inner.adopt(old, shard).await
    }

    fn set_ownership(&self, ownership: Ownership) {
        self.inner.set_ownership(ownership);
    }

    async fn kept_positions(
        &self,
        pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        self.call("kept", self.inner.kept_positions(pipeline, shards)).await
    }
}

struct UnreliableWriter {
    inner: Box<dyn SinkWriter>,
    name: SinkName,
    chaos: Arc<Chaos>,
}

#[async_trait]
impl SinkWriter for UnreliableWriter {
    fn encodes_rows(&self) -> Option<Arc<dyn EncodeRows>> {
        self.inner.encodes_rows()
    }

    fn looks_ahead(&self) -> Option<Arc<dyn LookAhead>> {
        self.inner.looks_ahead()
    }

    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let call = self.inner.commit(commit, refusals);
        faulty(&self.chaos, &self.name, "commit", call).await
    }
}
