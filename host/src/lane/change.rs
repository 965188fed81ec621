//! A change of generation in one lane, at a batch's boundary.
//!
//! The next generation's instances are started while the lane goes on with the one before, and the
//! ledger learns of the change while the last batch of the old one runs: the lane waits for neither.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{ActiveSegment, Board, Lane, Shared};
use crate::config::RejectedMax;
use crate::plugin::CallError;
use crate::position::Segment;
use crate::record::{Position, ShardKey};
use crate::stage::{Chain, Generation, Samples};

type Starting = JoinHandle<Result<Chain, CallError>>;

/// The pause before the ledger is written again, should that fail.
const LEDGER_PAUSE: Duration = Duration::from_millis(200);

/// What a lane is to run next, on its way.
pub(super) struct Change {
    wanted: watch::Receiver<Arc<Generation>>,
    shard: ShardKey,
    rejected_max: RejectedMax,
    samples: Samples,
    stop: CancellationToken,
    board: Board,
    /// The generation that the ledger names last.
    last: Arc<str>,
    /// Instances that are being started.
    starting: Option<(Arc<Generation>, Starting)>,
    /// Instances that wait for a batch's boundary.
    ready: Option<Chain>,
    /// Instances that the ledger knows of: they run behind the last segment's position.
    announced: Option<Chain>,
}

impl Change {
    /// For a lane that begins with what is wanted now, which is given as well.
    pub(super) fn begin(
        shared: &Shared,
        shard: &ShardKey,
        stop: &CancellationToken,
    ) -> (Self, Arc<Generation>) {
        let mut wanted = shared.current.subscribe();
        let generation = wanted.borrow_and_update().clone();
        let change = Self {
            wanted,
            shard: shard.clone(),
            rejected_max: shared.config.rejected_max,
            samples: shared.samples.clone(),
            stop: stop.clone(),
            board: shared.board.clone(),
            last: generation.id.clone(),
            starting: None,
            ready: None,
            announced: None,
        };
        (change, generation)
    }

    /// Completes when another generation is ready to take over. Dropping the future loses nothing.
    pub(super) async fn until_ready(&mut self) {
        while self.ready.is_none() {
            if self.starting.is_none() {
                if self.wanted.changed().await.is_err() {
                    // Nobody asks for anything any more.
                    return std::future::pending().await;
                }
                self.start_wanted();
            }
            let Some((_, starting)) = &mut self.starting else { continue };
            tokio::select! {
                started = starting => self.started(started),
                Ok(()) = self.wanted.changed() => self.start_wanted(),
            }
        }
    }

    /// Takes the next generation's instances, if they are ready and still wanted.
    async fn take_ready(&mut self) -> Option<Chain> {
        if self.wanted.has_changed().unwrap_or(false) {
            self.start_wanted();
        }
        if self.starting.as_ref().is_some_and(|(_, starting)| starting.is_finished())
            && let Some((_, starting)) = &mut self.starting
        {
            let started = starting.await;
            self.started(started);
        }
        self.ready.take()
    }

    /// Starts instances of what is wanted now; what was on its way before is not wanted any more.
    fn start_wanted(&mut self) {
        let generation = self.wanted.borrow_and_update().clone();
        (self.starting, self.ready) = (None, None);
        if self.last == generation.id {
            self.board.runs(&self.shard.shard, &generation.id, None);
            return;
        }
        let (wanted, shard, stop) = (generation.clone(), self.shard.clone(), self.stop.clone());
        let (limits, samples) = (self.rejected_max, self.samples.clone());
        let start = move || Chain::start(&wanted, &shard, limits, samples, &stop);
        self.starting = Some((generation, tokio::task::spawn_blocking(start)));
    }

    fn started(&mut self, started: Result<Result<Chain, CallError>, tokio::task::JoinError>) {
        let Some((generation, _)) = self.starting.take() else { return };
        let cause = match started {
            Ok(Ok(chain)) => {
                self.ready = Some(chain);
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic.to_string(),
        };
        tracing::error!(shard = %self.shard.shard, generation = %generation.id, cause,
            "the next generation does not start; the one before goes on");
        self.board.does_not_start(&self.shard.shard, &generation.id, &cause);
    }
}

impl Lane<'_> {
    /// While the batch that ends at `end` runs: tells the ledger that the next generation follows it,
    /// if one is ready.
    pub(super) async fn announce_behind(&mut self, end: &Position) {
        if let Some(chain) = self.change.take_ready().await {
            self.announce(chain, self.earliest_change(Some(end.clone()))).await;
        }
    }

    /// Changes to the generation that is ready, between two batches.
    pub async fn change_generation(&mut self) {
        let begun = Instant::now();
        if let Some(chain) = self.change.take_ready().await {
            self.announce(chain, self.earliest_change(self.at.clone())).await;
            self.take_over(begun.elapsed());
        }
    }

    /// Changes to the generation that is ready, before a batch that the one before does not get done.
    /// Records that some sink has are run by what ran them first, whatever comes of it.
    pub(super) async fn change_before_blocked(&mut self) {
        match self.highest <= self.at {
            true => {
                if let Some(chain) = self.change.take_ready().await {
                    self.announce(chain, self.at.clone()).await;
                    self.take_over(Duration::ZERO);
                }
            }
            false => self.change_generation().await,
        }
    }

    /// A change that was to follow a batch which the generation before does not get done comes before it.
    /// False: there is none, or records of the batch are to be run by what ran them first.
    pub(super) async fn advance_announced(&mut self) -> bool {
        if self.highest > self.at {
            return false;
        }
        let Some(chain) = self.change.announced.take() else { return false };
        self.announce(chain, self.at.clone()).await;
        self.take_over(Duration::ZERO);
        true
    }

    /// The earliest position behind which another generation may run: `end`, but nothing that a sink
    /// has, and nothing that an earlier change has taken.
    fn earliest_change(&self, end: Option<Position>) -> Option<Position> {
        let last = self.segments.last().and_then(|last| last.from_exclusive.clone());
        end.max(self.highest.clone()).max(last)
    }

    /// Makes a change durable. If that fails, it is tried again at the next boundary.
    async fn announce(&mut self, chain: Chain, from_exclusive: Option<Position>) {
        let generation = chain.generation().clone();
        let segment = Segment { from_exclusive, generation: generation.id.to_string() };
        if let Err(error) = self.shared.ledger.record(&self.shard, &segment).await {
            tracing::warn!(shard = %self.shard.shard, %error, "the change of generation waits");
            self.change.ready = Some(chain);
            tokio::time::sleep(LEDGER_PAUSE).await;
            return;
        }
        let Segment { from_exclusive, .. } = segment;
        // What was to follow there has run nothing.
        self.segments.retain(|earlier| earlier.from_exclusive < from_exclusive);
        self.change.last = generation.id.clone();
        self.segments.push(ActiveSegment { from_exclusive, generation });
        self.change.announced = Some(chain);
    }

    /// Lets the generation that runs behind the lane's position take over. `pause` is how long the lane
    /// waited for the change.
    pub(super) fn take_over(&mut self, pause: Duration) {
        let mut has_moved = false;
        while self.segments.get(1).is_some_and(|next| next.from_exclusive <= self.at) {
            self.segments.remove(0);
            self.chain = None;
            has_moved = true;
        }
        self.adopt_announced(pause);
        if has_moved && self.chain.is_none() {
            // Its instances are started with the next batch, which may be long in coming.
            self.shared.board.runs(&self.shard.shard, &self.segments[0].generation.id, None);
        }
    }

    /// Takes the instances that were started ahead, where the generation at work is theirs.
    pub(super) fn adopt_announced(&mut self, pause: Duration) {
        let id = &self.segments[0].generation.id;
        let is_at_work = |chain: &mut Chain| chain.generation().id == *id;
        if let Some(chain) = self.change.announced.take_if(is_at_work) {
            self.shared.board.runs(&self.shard.shard, &chain.generation().id, Some(pause));
            metrics::histogram!("shardmill_change_pause_seconds").record(pause);
            tracing::info!(shard = %self.shard.shard, generation = %chain.generation().id,
                from = self.segments[0].from_exclusive.as_ref().map(tracing::field::display),
                pause_us = pause.as_micros() as u64, "another generation");
            self.chain = Some(chain);
        }
    }
}
