//! A change of revision in one lane, at a batch's boundary.
//!
//! The next revision's instances are started while the lane goes on with the one before, and the
//! ledger learns of the change while the last batch of the old one runs and the next one is read: the
//! lane waits only where it has that batch in hand and the ledger is not written yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared as SharedFuture};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::DropGuard;

use super::starts::start_patiently;
use super::{ActiveSegment, Lane, LaneError, Shared, StatusRegistry};
use crate::stage::{Chain, Revision, Samples};
use shardmill_config::RejectedMax;
use shardmill_core::escape::quoted;
use shardmill_core::metric;
use shardmill_core::record::{Position, ShardKey};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::stop::Stop;
use shardmill_state::{Segment, StateError};

/// Instances of the next revision that are being started.
struct Starting {
    revision: Arc<Revision>,
    task: JoinHandle<Result<Chain, String>>,
    /// Ends the task where the revision is not wanted any more: a start on a busy machine is tried again
    /// without end.
    _ends: DropGuard,
}

/// Writes of a change to the ledger that failed.
const LEDGER_RETRY: RetryPolicy = RetryPolicy::every(Duration::from_millis(200));

/// What a lane is to run next, on its way.
pub(super) struct PendingChange {
    wanted: watch::Receiver<Arc<Revision>>,
    shard: ShardKey,
    rejected_max: RejectedMax,
    samples: Samples,
    stop: Stop,
    /// The longest pause between two tries of a start.
    pause_max: Duration,
    statuses: StatusRegistry,
    /// The revision that the ledger names last.
    last: Arc<str>,
    starting: Option<Starting>,
    /// Instances that wait for a batch's boundary.
    ready: Option<Chain>,
    /// Instances that the ledger is being told of.
    announcing: Option<Announcing>,
    /// Instances that the ledger knows of: they run behind the last segment's position.
    announced: Option<Chain>,
}

/// A change on its way to the ledger.
struct Announcing {
    chain: Chain,
    from_exclusive: Option<Position>,
    written: SharedFuture<BoxFuture<'static, Result<(), String>>>,
}

impl PendingChange {
    /// For a lane that begins with what is wanted now, which is given as well.
    pub(super) fn begin(shared: &Shared, shard: &ShardKey, stop: &Stop) -> (Self, Arc<Revision>) {
        let mut wanted = shared.current.subscribe();
        let revision = wanted.borrow_and_update().clone();
        let change = Self {
            wanted,
            shard: shard.clone(),
            rejected_max: shared.config.rejected_max,
            samples: shared.samples.clone(),
            stop: stop.clone(),
            pause_max: shared.config.timing.retry_pause_max,
            statuses: shared.statuses.clone(),
            last: revision.id.clone(),
            starting: None,
            ready: None,
            announcing: None,
            announced: None,
        };
        (change, revision)
    }

    /// Completes when another revision is ready, or the ledger knows of it. Dropping the future loses
    /// nothing.
    pub(super) async fn until_ready(&mut self) {
        if self.announcing.is_some() {
            return self.until_written().await;
        }
        while self.ready.is_none() {
            if self.starting.is_none() {
                if self.wanted.changed().await.is_err() {
                    // Nobody asks for anything any more.
                    return std::future::pending().await;
                }
                self.start_wanted();
            }
            let Some(starting) = &mut self.starting else { continue };
            tokio::select! {
                started = &mut starting.task => self.started(started),
                Ok(()) = self.wanted.changed() => self.start_wanted(),
            }
        }
    }

    /// Starts the instances of each revision that becomes wanted, and never completes. Dropping the
    /// future loses nothing.
    pub(super) async fn keep_starting(&mut self) {
        loop {
            let Some(starting) = &mut self.starting else {
                if self.wanted.changed().await.is_err() {
                    return std::future::pending().await;
                }
                self.start_wanted();
                continue;
            };
            tokio::select! {
                started = &mut starting.task => self.started(started),
                Ok(()) = self.wanted.changed() => self.start_wanted(),
            }
        }
    }

    /// Completes when the ledger is told of nothing any more. Dropping the future loses nothing.
    pub(super) async fn until_written(&self) {
        if let Some(announcing) = &self.announcing {
            // What came of it is asked for where it counts.
            let _: Result<(), String> = announcing.written.clone().await;
        }
    }

    /// Takes the next revision's instances, if they are ready and still wanted.
    async fn take_ready(&mut self) -> Option<Chain> {
        if self.wanted.has_changed().unwrap_or(false) {
            self.start_wanted();
        }
        if let Some(starting) = self.starting.as_mut().filter(|one| one.task.is_finished()) {
            let started = (&mut starting.task).await;
            self.started(started);
        }
        self.ready.take()
    }

    /// Starts instances of what is wanted now; what was on its way before is not wanted any more.
    fn start_wanted(&mut self) {
        let revision = self.wanted.borrow_and_update().clone();
        (self.starting, self.ready) = (None, None);
        if self.last == revision.id {
            self.statuses.runs(&self.shard.shard, &revision.id, None);
            return;
        }
        let (wanted, shard, stop) = (revision.clone(), self.shard.clone(), self.stop.clone());
        let (limits, samples) = (self.rejected_max, self.samples.clone());
        let start = move || Chain::start(&wanted, &shard, limits, samples.clone(), stop.token());
        // The instances have the lane's own stop: they go on after this one is asked for.
        let patience = self.stop.child();
        let ends = patience.token().clone().drop_guard();
        let task = tokio::spawn(start_patiently(start, patience, self.pause_max));
        self.starting = Some(Starting { revision, task, _ends: ends });
    }

    fn started(&mut self, started: Result<Result<Chain, String>, tokio::task::JoinError>) {
        let Some(Starting { revision, .. }) = self.starting.take() else { return };
        let cause = match started {
            Ok(Ok(chain)) => {
                self.ready = Some(chain);
                return;
            }
            Ok(Err(cause)) => cause,
            Err(panic) => panic.to_string(),
        };
        let said = quoted(&cause);
        tracing::error!(shard = %self.shard.shard, generation = %revision.id, cause = %said,
            "the next generation does not start; the one before goes on");
        self.statuses.does_not_start(&self.shard.shard, &revision.id, &cause);
    }
}

/// The time between a batch that has run and the next one that runs, less what the lane waits for records
/// to come: what a change of revision costs at most.
#[derive(Default)]
pub(super) struct SwapPause {
    so_far: Duration,
    /// Since when it goes on; `None`: the lane waits for records.
    since: Option<Instant>,
}

impl SwapPause {
    /// A batch has run.
    pub(super) fn begin(&mut self, ran_at: Instant) {
        *self = Self { so_far: Duration::ZERO, since: Some(ran_at) };
    }

    /// The lane waits for records.
    pub(super) fn stop(&mut self) {
        (self.so_far, self.since) = (self.elapsed(), None);
    }

    /// The lane has something to do.
    pub(super) fn resume(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    fn elapsed(&self) -> Duration {
        self.so_far + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Lane<'_> {
    /// While the batch that ends at `end` runs: begins to tell the ledger that the next revision
    /// follows it, if one is ready.
    pub(super) async fn announce_after(&mut self, end: &Position) {
        if let Some(chain) = self.change.take_ready().await {
            self.announce(chain, self.earliest_change(Some(end.clone())));
        }
    }

    /// Goes on with a change while no batch is in hand.
    ///
    /// # Errors
    /// [`LaneError::Stopped`].
    pub(crate) async fn change_revision(&mut self) -> Result<(), LaneError> {
        self.swap_pause.resume();
        if self.change.announcing.is_some() {
            self.finish_announcing().await?;
        } else if let Some(chain) = self.change.take_ready().await {
            self.announce(chain, self.earliest_change(self.at.clone()));
        }
        self.swap_pause.stop();
        Ok(())
    }

    /// Changes to the revision that is ready before a batch that the one before does not get done; one
    /// that was to follow the batch comes before it as well. Records that some sink has are run by what ran
    /// them first, whatever comes of it. False: there is no other revision for the batch.
    pub(super) async fn change_before_blocked(&mut self) -> Result<bool, LaneError> {
        self.finish_announcing().await?;
        let is_free = self.highest <= self.at;
        let (chain, from_exclusive) = match self.change.take_ready().await {
            Some(chain) if is_free => (chain, self.at.clone()),
            Some(chain) => (chain, self.earliest_change(self.at.clone())),
            None if is_free => match self.change.announced.take() {
                Some(chain) => (chain, self.at.clone()),
                None => return Ok(false),
            },
            None => return Ok(false),
        };
        self.announce(chain, from_exclusive);
        self.finish_announcing().await?;
        Ok(is_free)
    }

    /// The earliest position behind which another revision may run: `end`, but nothing that a sink
    /// has, and nothing that an earlier change has taken.
    fn earliest_change(&self, end: Option<Position>) -> Option<Position> {
        let last = self.segments.last().and_then(|last| last.from_exclusive.clone());
        end.max(self.highest.clone()).max(last)
    }

    /// Begins to make a change durable. No other is on its way: that was waited for before the batch.
    fn announce(&mut self, chain: Chain, from_exclusive: Option<Position>) {
        let id = chain.revision().id.clone();
        let segment = Segment { from_exclusive: from_exclusive.clone(), revision: id.to_string() };
        let (ledger, shard) = (self.shared.ledger.clone(), self.shard.clone());
        tracing::debug!(shard = %shard.shard, generation = %id, "the ledger is told");
        let write = tokio::spawn(async move {
            let written = ledger.record(&shard, &segment).await;
            if written.is_err() {
                tokio::time::sleep(LEDGER_RETRY.pause(1, 0.0)).await;
            }
            written
        });
        let outcome = |written: Result<Result<(), StateError>, JoinError>| match written {
            Ok(written) => written.map_err(|error| error.to_string()),
            Err(panic) => Err(panic.to_string()),
        };
        self.change.last = id;
        self.change.announcing = Some(Announcing {
            chain,
            from_exclusive,
            written: write.map(outcome).boxed().shared(),
        });
    }

    /// Waits until the ledger knows of the change that is on its way, if one is, and lets the revision
    /// take over that is due here. A change that could not be written is tried again at the next boundary.
    ///
    /// # Errors
    /// [`LaneError::Stopped`]; the change stays on its way.
    pub(super) async fn finish_announcing(&mut self) -> Result<(), LaneError> {
        let Some(announcing) = &self.change.announcing else { return Ok(()) };
        let written = self.unless_stopped(announcing.written.clone()).await?;
        let Some(Announcing { chain, from_exclusive, .. }) = self.change.announcing.take() else {
            return Ok(());
        };
        if let Err(error) = written {
            tracing::warn!(shard = %self.shard.shard, error, "the change of generation waits");
            if let Some(named) = self.segments.last() {
                self.change.last = named.revision.id.clone();
            }
            // Unless something else is wanted by now.
            if self.change.starting.is_none() && self.change.ready.is_none() {
                self.change.ready = Some(chain);
            }
            return Ok(());
        }
        // What was to follow there has run nothing.
        self.segments.retain(|earlier| earlier.from_exclusive < from_exclusive);
        self.segments.push(ActiveSegment { from_exclusive, revision: chain.revision().clone() });
        self.change.announced = Some(chain);
        self.activate_revision();
        Ok(())
    }

    /// Lets the revision that runs behind the lane's position take over.
    pub(super) fn activate_revision(&mut self) {
        let mut has_moved = false;
        while self.segments.get(1).is_some_and(|next| next.from_exclusive <= self.at) {
            self.segments.remove(0);
            self.chain = None;
            has_moved = true;
        }
        self.adopt_announced();
        if has_moved && self.chain.is_none() {
            // Its instances are started with the next batch, which may be long in coming.
            self.shared.statuses.runs(&self.shard.shard, &self.segments[0].revision.id, None);
        }
    }

    /// Takes the instances that were started ahead, where the revision at work is theirs.
    pub(super) fn adopt_announced(&mut self) {
        let id = &self.segments[0].revision.id;
        let is_at_work = |chain: &mut Chain| chain.revision().id == *id;
        if let Some(chain) = self.change.announced.take_if(is_at_work) {
            let revision = chain.revision().id.clone();
            self.chain = Some(chain);
            let pause = self.swap_pause.elapsed();
            self.shared.statuses.runs(&self.shard.shard, &revision, Some(pause));
            metrics::histogram!(metric::CHANGE_PAUSE_SECONDS).record(pause);
            tracing::info!(shard = %self.shard.shard, generation = %revision,
                from = self.segments[0].from_exclusive.as_ref().map(tracing::field::display),
                pause_us = pause.as_micros() as u64, "another generation");
        }
    }
}
