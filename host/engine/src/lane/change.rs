//! A change of revision in one lane, at a batch boundary.
//!
//! Invariant: a record has one revision per shard, on record before it runs. The ledger says "this revision runs
//! after this position", durably, before the revision's first record. A replay reads the ledger and runs the same
//! revision, so sinks at different positions never get different rows for one record.
//!
//! A change takes these steps. The first five are fields of [`PendingChange`]:
//!
//! 1. `wanted`: another revision was promoted.
//! 2. `starting`: its instances are started, while the lane goes on with the revision at work.
//! 3. `ready`: the instances wait for a batch boundary.
//! 4. `announcing`: the ledger is being written. This begins while the last batch of the old revision runs, so the
//!    lane waits only if the next batch arrives before the write is done.
//! 5. `announced`: the ledger is written; the revision is the last of the lane's segments.
//! 6. The lane's position reaches the segment: its instances become the chain at work, and the swap pause is shown.
//!
//! The position after which the new revision runs:
//!
//! | situation | position |
//! |---|---|
//! | a batch runs | the end of that batch |
//! | no batch is in hand | the lane's position |
//! | a batch is blocked, no sink has a record of it | the lane's position: the new revision runs the blocked batch |
//! | a batch is blocked, some sink has records of it | the last record that a sink has |
//! | all except the third | never before a record that a sink has or has promised, nor before an earlier change |
//!
//! Races that this module handles:
//!
//! - Another revision is wanted while one is started: its start is cancelled, its instances are dropped.
//! - The future that drives a change is dropped at each event of the lane. All progress is in fields and in spawned
//!   tasks, so nothing is lost by that.
//! - A write to the ledger fails: the instances go back to `ready`, unless something else is wanted by now, and the
//!   next boundary tries again.
//! - A change that was announced for the end of a batch, and the batch then blocks: the change is announced again,
//!   for the position before the batch. Its later segment has run nothing, so it is replaced.
//! - The lane ends while the ledger is written: the write goes on in its task, and the lane waits for it, so that it
//!   cannot land after a write of the shard's next lane.

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
    /// Cancels the task when the revision is no longer wanted: on a busy machine a start is retried without end.
    _ends: DropGuard,
}

/// Pause before a failed write to the ledger is reported, so that its retry is not immediate.
const LEDGER_RETRY: RetryPolicy = RetryPolicy::every(Duration::from_millis(200));

/// The next revision of a lane, on its way to being the one at work.
pub(super) struct PendingChange {
    wanted: watch::Receiver<Arc<Revision>>,
    shard: ShardKey,
    rejected_max: RejectedMax,
    samples: Samples,
    stop: Stop,
    /// The longest pause between two tries of a start.
    pause_max: Duration,
    statuses: StatusRegistry,
    /// Revision that the ledger names last for the shard.
    last: Arc<str>,
    starting: Option<Starting>,
    /// Instances that wait for a batch boundary.
    ready: Option<Chain>,
    /// Instances whose change is being written to the ledger.
    announcing: Option<Announcing>,
    /// Instances whose change is in the ledger: they run after the last segment's position.
    announced: Option<Chain>,
}

/// A change that is being written to the ledger.
struct Announcing {
    chain: Chain,
    from_exclusive: Option<Position>,
    written: SharedFuture<BoxFuture<'static, Result<(), String>>>,
}

impl PendingChange {
    /// Makes the state of a lane that begins with the revision wanted now; returns that revision as well.
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

    /// Completes when another revision is ready, or the ledger is written. Dropping the future loses nothing.
    pub(super) async fn until_ready(&mut self) {
        if self.announcing.is_some() {
            return self.until_written().await;
        }
        while self.ready.is_none() {
            if self.starting.is_none() {
                if self.wanted.changed().await.is_err() {
                    // The sender is gone: no other revision will be wanted.
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

    /// Starts the instances of each revision that becomes wanted, and never completes. Dropping the future loses
    /// nothing.
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

    /// Completes when no write to the ledger is under way. Dropping the future loses nothing.
    pub(super) async fn until_written(&self) {
        if let Some(announcing) = &self.announcing {
            // `finish_announcing` handles the result.
            let _: Result<(), String> = announcing.written.clone().await;
        }
    }

    /// Takes the instances of the next revision, if they are ready and still wanted.
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

    /// Starts instances of the revision that is wanted now, and drops those of the one that was wanted before.
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
        // The instances get the lane's own stop token, not this child: they outlive the start.
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
            "the next revision does not start; the current one goes on");
        self.statuses.does_not_start(&self.shard.shard, &revision.id, &cause);
    }
}

/// The swap pause: time from the end of one batch's run until the next one's can begin, without the time in
/// which the lane waits for records. It bounds the cost of a change of revision.
#[derive(Default)]
pub(super) struct SwapPause {
    so_far: Duration,
    /// Begin of the part that is not in `so_far` yet; `None`: the lane waits for records.
    since: Option<Instant>,
}

impl SwapPause {
    /// Starts the clock: a batch has run.
    pub(super) fn begin(&mut self, ran_at: Instant) {
        *self = Self { so_far: Duration::ZERO, since: Some(ran_at) };
    }

    /// Stops the clock: the lane waits for records.
    pub(super) fn stop(&mut self) {
        (self.so_far, self.since) = (self.elapsed(), None);
    }

    /// Goes on with the clock: the lane has something to do.
    pub(super) fn resume(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    fn elapsed(&self) -> Duration {
        self.so_far + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Lane<'_> {
    /// Begins to write the next revision to the ledger, after the batch that ends at `end` and runs now, if the
    /// revision is ready.
    pub(super) async fn announce_after(&mut self, end: &Position) {
        if let Some(chain) = self.change.take_ready().await {
            self.announce(chain, self.earliest_change(Some(end.clone())));
        }
    }

    /// Takes the next step of a change while no batch is in hand.
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

    /// Changes to the revision that is ready, before a batch that the revision at work cannot finish. A change that
    /// was announced for the end of the batch is moved before it. Records that some sink has keep the revision that
    /// ran them first, even if it is blocked. False: no other revision may run the batch.
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

    /// Returns the earliest position after which another revision may run: `end`, but not before a record that a
    /// sink has, and not before an earlier change.
    fn earliest_change(&self, end: Option<Position>) -> Option<Position> {
        let last = self.segments.last().and_then(|last| last.from_exclusive.clone());
        end.max(self.highest.clone()).max(last)
    }

    /// Begins to make a change durable. The lane waits for an earlier write before each batch (`cut_at_swap`), so
    /// usually no other one is under way.
    fn announce(&mut self, chain: Chain, from_exclusive: Option<Position>) {
        let id = chain.revision().id.clone();
        let segment = Segment { from_exclusive: from_exclusive.clone(), revision: id.to_string() };
        let (ledger, shard) = (self.shared.ledger.clone(), self.shard.clone());
        tracing::debug!(shard = %shard.shard, generation = %id, "writing the change to the ledger");
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

    /// Waits until the ledger has the change that is under way, if one is, and makes its revision the one at work if
    /// the lane is at its position. A change that could not be written is tried again at the next boundary.
    ///
    /// # Errors
    /// [`LaneError::Stopped`]; the write goes on.
    pub(super) async fn finish_announcing(&mut self) -> Result<(), LaneError> {
        let Some(announcing) = &self.change.announcing else { return Ok(()) };
        let written = self.unless_stopped(announcing.written.clone()).await?;
        let Some(Announcing { chain, from_exclusive, .. }) = self.change.announcing.take() else {
            return Ok(());
        };
        if let Err(error) = written {
            tracing::warn!(
                shard = %self.shard.shard, error,
                "failed to write the change of revision to the ledger; it is tried again at the next batch \
                 boundary"
            );
            if let Some(named) = self.segments.last() {
                self.change.last = named.revision.id.clone();
            }
            // Another revision may be wanted by now: then these instances are dropped.
            if self.change.starting.is_none() && self.change.ready.is_none() {
                self.change.ready = Some(chain);
            }
            return Ok(());
        }
        // Segments at or after this position have run nothing.
        self.segments.retain(|earlier| earlier.from_exclusive < from_exclusive);
        self.segments.push(ActiveSegment { from_exclusive, revision: chain.revision().clone() });
        self.change.announced = Some(chain);
        self.activate_revision();
        Ok(())
    }

    /// Makes the revision that runs after the lane's position the one at work.
    pub(super) fn activate_revision(&mut self) {
        let mut has_moved = false;
        while self.segments.get(1).is_some_and(|next| next.from_exclusive <= self.at) {
            self.segments.remove(0);
            self.chain = None;
            has_moved = true;
        }
        self.adopt_announced();
        if has_moved && self.chain.is_none() {
            // Its instances are started with the next batch, which may not come for a while: show the revision now.
            self.shared.statuses.runs(&self.shard.shard, &self.segments[0].revision.id, None);
        }
    }

    /// Makes the instances that were started ahead the chain at work, if the revision at work is theirs.
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
                pause_us = pause.as_micros() as u64, "another revision runs");
        }
    }
}
