//! A lane: one shard on its way from the source through the stages to the sinks.
//!
//! `pipeline.rs` shows the order of the steps; this module has the steps. `Lane::acquire` acquires the shard
//! (`acquire.rs`), `change.rs` changes to another revision, `finish` and `abandon` end the lane.
//!
//! Invariants:
//!
//! - `at` (the lane's position) moves only in `deliver`, after every delivery has the batch. Before that every
//!   record of the batch has an outcome: rows, filtered, or a dead letter that is already durable.
//! - A record that some sink has (up to `highest`) is run by the revision that ran it first.
//! - One batch is in work at a time, so dead letters, rows and changes of revision keep the order of the shard.
//!
//! The positions of a lane, and who moves each:
//!
//! | position | meaning | moved by |
//! |---|---|---|
//! | `at` | the last record handed to all deliveries | `deliver` |
//! | `highest` | some sink has records up to here, or has promised them; fixed when the lane begins | `acquire` |
//! | `DeliveryProgress::position` of a delivery | that sink has committed or given up rows to here | the committer |
//! | the checkpoint | the minimum over the sinks | `checkpointer.rs`, and `finish` at the end |
//!
//! Races that this module handles:
//!
//! - A stop while a batch is in the plugins: the call goes on in its thread until the time of the shutdown is over;
//!   its outcome is dropped and the batch is read again.
//! - A stop while a batch is handed to the deliveries: some sinks may have it and others not. `at` did not move, so
//!   the sinks that lack it get it again, and the others skip it.
//! - A write to the ledger or the checkpoint that is still under way when the lane ends could land after a write of
//!   the shard's next lane. So `finish` and `abandon` wait for the write to the ledger, and end the checkpointer first:
//!   a checkpoint that is under way then has the state database already, or is never written.

mod acquire;
pub mod agreement;
mod change;
mod checkpointer;
mod lag;
mod memory;
pub mod remake;
pub mod roster;
mod starts;
mod status;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

pub use acquire::RevisionStore;
pub(crate) use memory::show_waits;
pub(crate) use starts::Starts;
pub use status::{LaneChange, ShardStatus, StatusRegistry, WaitingLane};

use self::change::{PendingChange, SwapPause};
use self::starts::{FailedStart, Tries};
use crate::delivery::{Delivery, DeliveryHandle};
use crate::stage::{Blocked, Chain, ChainOutcome, Revision, Routed, Samples, Searching};
use shardmill_config::PipelineConfig;
use shardmill_core::budget::{Account, Budget};
use shardmill_core::metric;
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::{
    Arenas, Batch, CopyPlan, Position, Row, ShardKey, ShardStart, SinkName,
};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::sink::{Sink, SinkError};
use shardmill_core::source::{
    LostRecords, ResumePoint, ShardSource, SourceError, WaitWatch, Waiting,
};
use shardmill_core::stop::Stop;
use shardmill_state::{
    Checkpoints, DeadLetter, DeadLetteredItems, DeadLetters, Hole, Holes, Ledger, Roster,
    StateError,
};

/// Retries of a batch that failed as a whole.
const STAGE_RETRY: RetryPolicy = RetryPolicy::every(Duration::from_secs(5));
/// Interval in milliseconds at which an idle lane notes that it has everything. It is far below 24 hours, the
/// shortest retention of a stream.
const CAUGHT_UP_NOTE_MS: i64 = 600_000;
/// Part of a lane, in the status: a search for records that exceed their time limit.
const SEARCH: &str = "search";
/// Part of a lane, in the status: a batch that has been in the plugins for long.
const CALL: &str = "plugin call";
/// Part of a lane, in the status: retries that a plugin asked for.
const RETRIES: &str = "retries";
/// Part of a lane, in the status: its stages block it.
const STAGES: &str = "stages";
/// Part of a lane, in the status: a busy machine blocks it. Probation ignores this part, because it says nothing
/// about a version of a plugin.
const STARVED: &str = "cores";
/// Part of a lane, in the status: it waits for the store of dead letters.
const DEAD_LETTERS: &str = "dead letters";
/// Metric of the bytes that the sinks' buffers hold.
const SINK_BUFFERS: &str = metric::BUFFER_BYTES;
/// Time for which a stage may ask for retries before that is shown as blocked.
const RETRIES_SHOWN_AFTER: Duration = Duration::from_secs(5);
/// Bytes of rows up to which they are copied on the lane's own thread: about 100 µs of work.
const COPIED_IN_PLACE_BYTES: usize = 1 << 20;
/// Retries of a write of dead letters that failed. The pause grows, because a write of many dead letters keeps the
/// state database locked for long before it finds the store too full, and other lanes need the database meanwhile.
const DEAD_LETTER_RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_secs(1), Duration::from_secs(8));
/// Retries of a read of dead letters that failed.
const DEAD_LETTER_READ_RETRY: RetryPolicy = RetryPolicy::every(Duration::from_secs(1));

/// Makes the sinks that a configuration names, in its order, without contacting any of them.
pub type BuildSinks =
    Arc<dyn Fn(&PipelineConfig) -> anyhow::Result<Vec<Arc<dyn Sink>>> + Send + Sync>;

/// State and services that all lanes of a pipeline share.
pub(crate) struct Shared {
    /// The pipeline, as configured.
    pub config: PipelineConfig,
    /// Source of the records.
    pub source: Arc<dyn ShardSource>,
    /// Revision that is wanted now. Each lane changes to it at a batch boundary.
    pub current: watch::Sender<Arc<Revision>>,
    /// Revisions that ran before.
    pub revisions: RevisionStore,
    /// The sinks, in the configuration's order.
    pub sinks: Vec<Arc<dyn Sink>>,
    /// Sinks that were removed from the configuration and whose missing records may be given up.
    pub dropped_sinks: HashSet<SinkName>,
    /// Checkpoints.
    pub checkpoints: Checkpoints,
    /// Sinks that the pipeline has or had.
    pub roster: Roster,
    /// Records that sinks were not given.
    pub holes: Holes,
    /// Which revision ran from which position.
    pub ledger: Ledger,
    /// Dead letters.
    pub dead_letters: DeadLetters,
    /// Memory that the sinks' buffers may hold.
    pub budget: Budget,
    /// Status of the lanes.
    pub statuses: StatusRegistry,
    /// Whether stages have started in any lane.
    pub starts: Starts,
    /// Recent inputs of the stages, for trials.
    pub samples: Samples,
    /// The run ends once everything is read and committed: sinks commit as soon as no more records arrive.
    pub until_caught_up: bool,
}

impl Shared {
    /// Returns the revision that is wanted now.
    pub fn revision(&self) -> Arc<Revision> {
        self.current.borrow().clone()
    }

    /// Copies this for lanes that restart with another revision.
    pub(crate) fn with_revision(&self, revision: Arc<Revision>) -> Self {
        self.reshaped(self.config.clone(), revision, self.sinks.clone(), self.revisions.clone())
    }

    /// Copies this for lanes that restart with another configuration.
    pub(crate) fn reshaped(
        &self,
        config: PipelineConfig,
        revision: Arc<Revision>,
        sinks: Vec<Arc<dyn Sink>>,
        revisions: RevisionStore,
    ) -> Self {
        Self {
            budget: match config.buffer_bytes_max == self.budget.bytes_max() {
                true => self.budget.clone(),
                false => sinks_budget(&config),
            },
            source: self.source.clone(),
            current: watch::Sender::new(revision),
            revisions,
            sinks,
            dropped_sinks: self.dropped_sinks.clone(),
            checkpoints: self.checkpoints.clone(),
            roster: self.roster.clone(),
            holes: self.holes.clone(),
            ledger: self.ledger.clone(),
            until_caught_up: self.until_caught_up,
            dead_letters: {
                self.dead_letters.set_bound(config.dead_letters_bytes_max);
                self.dead_letters.clone()
            },
            statuses: self.statuses.clone(),
            starts: self.starts.clone(),
            samples: match config.reload.samples == self.config.reload.samples {
                true => self.samples.clone(),
                false => Samples::new(config.reload.samples),
            },
            config,
        }
    }
}

/// Makes the memory budget of the sinks' buffers.
pub(crate) fn sinks_budget(config: &PipelineConfig) -> Budget {
    Budget::with_turn(config.buffer_bytes_max, SINK_BUFFERS, config.timing.memory_turn_max)
}

/// How a lane ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaneEnd {
    /// It was asked to stop.
    Stopped,
    /// The shard was closed, and all its records are committed.
    ShardEnd,
    /// The source has no more records for now, and all that it had are committed.
    SourceEnd,
}

/// Why a lane ended early.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The source failed, and a retry within the lane does not help.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A sink lost the shard, or cannot acquire it.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The state database failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// Going on would lose or duplicate records: a person must decide.
    #[error("{0}")]
    Fatal(String),
    /// A stop was asked for while the lane waited. This error does not leave the lane.
    #[error("the lane was stopped")]
    Stopped,
}

impl LaneError {
    /// Whether a person must act, because a retry does not help.
    pub fn needs_a_person(&self) -> bool {
        match self {
            Self::Fatal(_) => true,
            Self::Source(error) => error.needs_a_person(),
            // A final error means that what is written to this state is lost: a retry would lose more.
            Self::State(error) => error.is_final(),
            Self::Sink(_) | Self::Stopped => false,
        }
    }
}

/// Something that happens to a lane besides records.
pub(crate) enum LaneEvent {
    /// A sink has ended by itself: it lost the shard.
    SinkEnded(LaneError),
    /// A change of revision can take its next step.
    NextRevision,
}

/// A revision and the position after which it runs.
struct ActiveSegment {
    from_exclusive: Option<Position>,
    revision: Arc<Revision>,
}

/// Result of running a batch through the stages.
#[derive(Debug)]
pub(crate) enum StagesRan {
    /// The outcome of all its records.
    All(ChainOutcome),
    /// No outcome yet: the outputs of the whole batch would hold too much memory. This many of its first records
    /// fit.
    First(usize),
}

/// One acquired shard.
pub(crate) struct Lane<'a> {
    shared: &'a Shared,
    shard: ShardKey,
    /// Every wait of the lane ends with it.
    stop: Stop,
    /// Ends the deliveries and the checkpointer without another commit.
    abandon: CancellationToken,
    deliveries: Vec<DeliveryHandle>,
    /// The lane's share of the sinks' memory budget.
    account: Arc<Account>,
    /// Per delivery: up to this position its rows must not wait for the budget (see `acquire.rs`).
    unbudgeted_to: Vec<Option<Position>>,
    checkpointer: JoinHandle<()>,
    /// The lane's position: the last record handed to all sinks.
    at: Option<Position>,
    /// Some sink has records up to here, or has promised them.
    highest: Option<Position>,
    replayed: u64,
    /// The revision at work, then those that follow it.
    segments: Vec<ActiveSegment>,
    change: PendingChange,
    chain: Option<Chain>,
    swap_pause: SwapPause,
    /// Up to here some items have a dead letter of a stage already.
    dead_lettered_to: Option<Position>,
    start: ShardStart,
    /// Everything that had arrived by this time is committed, as last noted; milliseconds since 1970 by the server's
    /// clock.
    caught_up_ms: Option<i64>,
    /// Everything that had arrived by this time was handed to the sinks, by the same clock.
    read_up_to_ms: Option<i64>,
    /// Waits of the reader for the source.
    waiting: Waiting,
    waits: WaitWatch,
}

impl Lane<'_> {
    /// Opens a reader of the shard, after the lane's position.
    ///
    /// # Errors
    /// [`LaneError::Source`].
    pub async fn reader(&self) -> Result<Box<dyn shardmill_core::source::BatchReader>, LaneError> {
        let from = ResumePoint {
            after: self.at.as_ref(),
            start: &self.start,
            caught_up_ms: self.caught_up_ms,
            waiting: &self.waiting,
        };
        let mut waits = self.waiting.watch(self.shared.config.timing.call_blocked_after);
        let opened = self.shared.source.open(&self.shard, from);
        tokio::pin!(opened);
        loop {
            tokio::select! {
                () = self.stop.asked() => return Err(LaneError::Stopped),
                reader = &mut opened => {
                    self.show_wait(None);
                    return Ok(reader?);
                }
                cause = waits.changed() => self.show_wait(cause),
            }
        }
    }

    /// Waits for something, unless the lane is to stop.
    async fn unless_stopped<T>(&self, wait: impl Future<Output = T>) -> Result<T, LaneError> {
        self.stop.unless_asked(wait).await.ok_or(LaneError::Stopped)
    }

    /// Shows that the source does not answer the reader, or that it answers again.
    fn show_wait(&self, cause: Option<String>) {
        match cause {
            Some(cause) => self.block("source", &cause),
            None => self.shared.statuses.unblock(&self.shard.shard, "source"),
        }
    }

    /// Handles a read that brought nothing. From time to time it notes that everything is committed: when the stream
    /// later drops those records, the notice proves that none of them was lost.
    ///
    /// # Errors
    /// [`LaneError::Stopped`].
    pub async fn idle(&mut self, lag_ms: u64, caught_up_ms: Option<i64>) -> Result<(), LaneError> {
        let is_committed = self.is_committed();
        self.shared.statuses.update(&self.shard.shard, |status| {
            status.idle_reads += 1;
            status.lag_ms = lag_ms;
            status.is_committed = is_committed;
        });
        if self.shared.until_caught_up && lag_ms == 0 && !is_committed {
            self.deliveries.iter().for_each(DeliveryHandle::flush_soon);
        }
        if lag_ms == 0 {
            let now_ms = chrono::Utc::now().timestamp_millis();
            self.shared.statuses.lag(&self.shard.shard, |lag| lag.shard.quiet(now_ms));
        }
        let Some(now_ms) = caught_up_ms.filter(|_| lag_ms == 0) else { return Ok(()) };
        self.read_up_to_ms = Some(now_ms);
        if self.is_note_old(now_ms) && self.is_committed() {
            let stop = self.stop.clone();
            stop.unless_asked(self.note_caught_up(now_ms)).await.ok_or(LaneError::Stopped)?;
        }
        Ok(())
    }

    /// Records that every sink lacks the records that the stream dropped.
    ///
    /// # Errors
    /// [`LaneError::State`] and [`LaneError::Stopped`]: nothing after the hole may be delivered then, or the hole
    /// would be lost.
    pub(crate) async fn record_hole(&self, lost: LostRecords) -> Result<(), LaneError> {
        let LostRecords { from_exclusive, to_inclusive, why } = lost;
        let (sink, shard) = (None, self.shard.clone());
        let hole = Hole { sink, shard, from_exclusive, to_inclusive, why };
        self.unless_stopped(self.shared.holes.record(hole)).await??;
        Ok(())
    }

    /// Notes that the shard was read to its end; `caught_up_ms` is a time at which it was still open.
    pub(crate) fn reached_end(&mut self, caught_up_ms: Option<i64>) {
        self.read_up_to_ms = self.read_up_to_ms.max(caught_up_ms);
    }

    /// Whether the last notice that everything is committed is old.
    fn is_note_old(&self, now_ms: i64) -> bool {
        self.caught_up_ms.is_none_or(|noted| now_ms - noted >= CAUGHT_UP_NOTE_MS)
    }

    /// Whether every sink has committed everything that was handed over.
    fn is_committed(&self) -> bool {
        self.deliveries.iter().all(|own| own.progress.borrow().position >= self.at)
    }

    /// Notes that everything that had arrived by then is committed.
    async fn note_caught_up(&mut self, at_ms: i64) {
        match self.shared.checkpoints.note_caught_up(&self.shard, at_ms).await {
            Ok(()) => self.caught_up_ms = Some(at_ms),
            Err(error) => {
                tracing::warn!(
                    shard = %self.shard.shard, %error,
                    "failed to store that everything is committed; it is tried again later"
                )
            }
        }
    }

    /// Completes when a lane that waits for records has something else to do. Dropping the future loses nothing.
    pub async fn event(&mut self) -> LaneEvent {
        loop {
            let ended = self.deliveries.iter_mut().map(|delivery| Box::pin(delivery.ended()));
            let cause = tokio::select! {
                (error, _, _) = futures::future::select_all(ended) => {
                    return LaneEvent::SinkEnded(error.into());
                }
                () = self.change.until_ready() => return LaneEvent::NextRevision,
                cause = self.waits.changed() => cause,
            };
            self.show_wait(cause);
        }
    }

    /// Cuts a batch where another revision begins, and returns the first part and the rest. Only one cut is made at
    /// a time: further revisions may arrive while the first part runs.
    ///
    /// # Errors
    /// [`LaneError::Stopped`].
    pub(crate) async fn cut_at_swap(
        &mut self,
        batch: Batch,
    ) -> Result<(Arc<Batch>, Option<Batch>), LaneError> {
        self.swap_pause.resume();
        if let (Some(first), Some(last)) = (batch.records.first(), batch.records.last()) {
            self.shared.statuses.lag(&self.shard.shard, |lag| {
                lag.shard.read(&batch.range.to_inclusive, first.arrived_ms, last.arrived_ms);
            });
        }
        self.finish_announcing().await?;
        let straddles = |swap: &&Position| {
            let records = (batch.records.first(), batch.records.last());
            let (Some(first), Some(last)) = records else { return false };
            first.position <= **swap && **swap < last.position
        };
        let mut swaps =
            self.segments.iter().skip(1).filter_map(|next| next.from_exclusive.as_ref());
        Ok(match swaps.find(straddles) {
            Some(swap) => {
                let (first, rest) = batch.cut_after(swap);
                (Arc::new(first), rest)
            }
            None => (Arc::new(batch), None),
        })
    }

    /// Runs a batch through the stages, or says how many of its first records must be run separately.
    ///
    /// # Errors
    /// [`LaneError::Fatal`] when the stages start in no lane; [`LaneError::State`] when the store of dead letters is
    /// lost; [`LaneError::Stopped`]: the batch has no outcome.
    pub(crate) async fn run_stages(&mut self, batch: &Arc<Batch>) -> Result<StagesRan, LaneError> {
        let dead_lettered = Arc::new(self.dead_lettered_in(batch).await?);
        // Time of the first retry that the plugin asked for, for this batch.
        let mut retried_since = None;
        let mut failed_starts = Tries::default();
        let pause_max = self.shared.config.timing.retry_pause_max;
        let mut stage_retries = STAGE_RETRY.at_most(pause_max).start();
        loop {
            if let Err(failed) = self.enter_revision(batch).await? {
                self.after_failed_start(&mut failed_starts, &failed).await?;
                continue;
            }
            failed_starts = Tries::default();
            let Some(mut chain) = self.chain.take() else { return Err(LaneError::Stopped) };
            let (own, dead_lettered, mut searching) =
                (batch.clone(), dead_lettered.clone(), chain.searching());
            let run = tokio::task::spawn_blocking(move || {
                let outcome = chain.run(&own, &dead_lettered);
                (chain, outcome, Instant::now())
            });
            self.announce_after(&batch.range.to_inclusive).await;
            let ran = self.stop.until_over(self.show_search(&mut searching, run)).await;
            // A call that outlasts the shutdown goes on in its thread; its outcome is dropped and the batch is read
            // again.
            let (part, cause, pause) = match ran.ok_or(LaneError::Stopped)? {
                Ok((chain, outcome, ran_at)) => {
                    self.swap_pause.begin(ran_at);
                    self.chain = Some(chain);
                    match outcome {
                        Ok(outcome) => {
                            self.shared.statuses.unblock(&self.shard.shard, STAGES);
                            self.shared.statuses.unblock(&self.shard.shard, RETRIES);
                            self.shared.statuses.unblock(&self.shard.shard, STARVED);
                            return Ok(StagesRan::All(outcome));
                        }
                        Err(Blocked::Stopped(dead_letters)) => {
                            self.keep_found(batch, dead_letters).await;
                            return Err(LaneError::Stopped);
                        }
                        Err(Blocked::Later(cause, pause)) => {
                            let since = *retried_since.get_or_insert_with(Instant::now);
                            if since.elapsed() >= RETRIES_SHOWN_AFTER {
                                self.block(RETRIES, &cause);
                            }
                            self.pause_for_retry(pause).await?;
                            continue;
                        }
                        Err(Blocked::Retry(cause)) => {
                            (STAGES, cause, Some(stage_retries.next_pause()))
                        }
                        Err(Blocked::Starved(cause)) => {
                            (STARVED, cause, Some(stage_retries.next_pause()))
                        }
                        Err(Blocked::Broken(cause)) => (STAGES, cause, None),
                        Err(Blocked::TooMuch(records)) => return Ok(StagesRan::First(records)),
                    }
                }
                // The host itself failed, in this lane. Its instances are lost: the next round starts new ones.
                Err(panic) => {
                    let pause = stage_retries.next_pause();
                    (STAGES, format!("a stage failed: {panic}"), Some(pause))
                }
            };
            retried_since = None;
            self.block(part, &cause);
            if self.change_before_blocked().await? {
                continue;
            }
            let pause = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            let stop = self.stop.clone();
            tokio::select! {
                () = pause => {}
                () = stop.asked() => return Err(LaneError::Stopped),
                // Another version of the plugin may succeed with the batch.
                () = self.change.until_ready() => { self.change_before_blocked().await?; }
            }
        }
    }

    /// Reads which items of a batch have a dead letter of a stage already. Once the lane is past the dead letters that
    /// existed when it started, nothing is read.
    async fn dead_lettered_in(&self, batch: &Batch) -> Result<DeadLetteredItems, LaneError> {
        let (Some(first), Some(last)) = (batch.records.first(), batch.records.last()) else {
            return Ok(DeadLetteredItems::default());
        };
        if self.dead_lettered_to.as_ref().is_none_or(|to| first.position > *to) {
            return Ok(DeadLetteredItems::default());
        }
        let range = (&first.position, &last.position);
        let pause_max = self.shared.config.timing.retry_pause_max;
        let mut retries = DEAD_LETTER_READ_RETRY.at_most(pause_max).start();
        loop {
            let read = self.shared.dead_letters.dead_lettered_within(&self.shard, range);
            match self.unless_stopped(read).await? {
                Ok(dead_lettered) => {
                    self.shared.statuses.unblock(&self.shard.shard, DEAD_LETTERS);
                    return Ok(dead_lettered);
                }
                Err(error) if error.is_final() => return Err(error.into()),
                Err(error) => self.block(DEAD_LETTERS, &error.to_string()),
            }
            self.unless_stopped(tokio::time::sleep(retries.next_pause())).await?;
        }
    }

    /// Stores the dead letters that a search has found before it was stopped, so that the next start does not search
    /// for the same records.
    async fn keep_found(&self, batch: &Batch, dead_letters: Vec<DeadLetter>) {
        if dead_letters.is_empty() {
            return;
        }
        let found = dead_letters.len() as u64;
        let kept = self.shared.dead_letters.put(&batch.shard, dead_letters, false);
        match self.stop.until_over(kept).await {
            Some(Ok(_)) => {
                self.shared
                    .statuses
                    .update(&self.shard.shard, |status| status.dead_letters += found);
                metrics::counter!(metric::DEAD_LETTERS_TOTAL, "place" => "stages").increment(found);
            }
            Some(Err(error)) => {
                tracing::warn!(shard = %self.shard.shard, %error, found,
                    "failed to store the dead letters that a search has found; the next start searches for \
                     these records again");
            }
            None => {}
        }
    }

    /// Waits for a run of the stages. Meanwhile it shows a search for culprits that takes long, and a plugin call
    /// that takes long: the limit of the call may be far longer than a person would wait without a sign.
    async fn show_search<T>(
        &self,
        searching: &mut Searching,
        run: JoinHandle<T>,
    ) -> Result<T, JoinError> {
        tokio::pin!(run);
        let shown_after = self.shared.config.timing.call_blocked_after;
        let shown = tokio::time::sleep(shown_after);
        tokio::pin!(shown);
        let ran = loop {
            tokio::select! {
                ran = &mut run => break ran,
                () = &mut shown, if !shown.is_elapsed() => {
                    let seconds = shown_after.as_secs_f64();
                    self.block(CALL, &format!("a batch has been in the plugins for {seconds} s"));
                }
                Ok(()) = searching.changed() => {
                    if let Some(text) = searching.borrow_and_update().clone() {
                        self.block(SEARCH, &text);
                    }
                }
            }
        };
        self.shared.statuses.unblock(&self.shard.shard, SEARCH);
        self.shared.statuses.unblock(&self.shard.shard, CALL);
        ran
    }

    /// Waits until it is time to retry a call, as its plugin asked. Meanwhile the instances of a wanted revision are
    /// started; that revision runs the batch if it may.
    async fn pause_for_retry(&mut self, pause: Duration) -> Result<(), LaneError> {
        let stop = self.stop.clone();
        let end = tokio::time::Instant::now() + pause;
        tokio::select! {
            biased;
            () = stop.asked() => return Err(LaneError::Stopped),
            () = self.change.until_ready() => {}
            () = tokio::time::sleep_until(end) => return Ok(()),
        }
        if !self.change_before_blocked().await? {
            self.unless_stopped(tokio::time::sleep_until(end)).await?;
        }
        Ok(())
    }

    /// Makes the revision of the batch's records the one at work. `Ok(Err(_))`: its stages do not start, for this
    /// reason.
    async fn enter_revision(
        &mut self,
        batch: &Batch,
    ) -> Result<Result<(), FailedStart>, LaneError> {
        let last = batch.records.last().map_or(&batch.range.to_inclusive, |last| &last.position);
        while let Some(next) = self.segments.get(1)
            && next.from_exclusive.as_ref().is_none_or(|from| last > from)
        {
            self.segments.remove(0);
            self.chain = None;
        }
        self.adopt_announced();
        if self.chain.is_none() {
            let revision = self.segments[0].revision.clone();
            let (limits, samples) = (self.shared.config.rejected_max, self.shared.samples.clone());
            let (wanted, shard, stop) = (revision.clone(), self.shard.clone(), self.stop.clone());
            // `configure` is the plugin's code and may take long, so it does not run on an async thread.
            let start = move || Chain::start(&wanted, &shard, limits, samples, stop.token());
            let started = self.unless_stopped(tokio::task::spawn_blocking(start)).await?;
            let chain = match started {
                Ok(Ok(chain)) => chain,
                Ok(Err(error)) => return Ok(Err(error.into())),
                Err(panic) => {
                    let cause = format!("the stages do not start: {panic}");
                    return Ok(Err(FailedStart::of_host(cause)));
                }
            };
            self.shared.statuses.runs(&self.shard.shard, &revision.id, None);
            self.chain = Some(chain);
        }
        self.shared.starts.note();
        Ok(Ok(()))
    }

    /// Makes dead letters durable, before any sink commits the position range that they belong to.
    ///
    /// # Errors
    /// [`LaneError::Stopped`]: dead letters that are not written belong to a batch that is read again.
    pub(crate) async fn write_dead_letters(
        &self,
        batch: &Batch,
        dead_letters: Vec<DeadLetter>,
    ) -> Result<(), LaneError> {
        let written = dead_letters.len() as u64;
        let dead_letters = Arc::new(dead_letters);
        let pause_max = self.shared.config.timing.retry_pause_max;
        let mut retries = DEAD_LETTER_RETRY.at_most(pause_max).start();
        while let Err(error) = self
            .unless_stopped(self.shared.dead_letters.put(&batch.shard, dead_letters.clone(), false))
            .await?
        {
            if error.is_final() {
                return Err(error.into());
            }
            self.block(DEAD_LETTERS, &error.to_string());
            self.unless_stopped(tokio::time::sleep(retries.next_pause())).await?;
        }
        if written > 0 {
            self.shared.statuses.unblock(&self.shard.shard, DEAD_LETTERS);
            self.shared.statuses.update(&self.shard.shard, |status| status.dead_letters += written);
            metrics::counter!(metric::DEAD_LETTERS_TOTAL, "place" => "stages").increment(written);
        }
        Ok(())
    }

    /// Hands the rows of a batch to their sinks, and its position range to all sinks.
    ///
    /// # Errors
    /// [`LaneError::Sink`] when a sink has lost the shard; [`LaneError::Stopped`] when some sinks may have the batch
    /// and others not: those without it get it again.
    pub async fn deliver(
        &mut self,
        batch: &Arc<Batch>,
        routed: Vec<Routed>,
        arenas: Arenas,
    ) -> Result<(), LaneError> {
        let Some(chain) = &self.chain else { return Ok(()) };
        let mut rows: Vec<Vec<Row>> = self.deliveries.iter().map(|_| Vec::new()).collect();
        // Consecutive rows mostly have the same route, so its sinks are looked up once.
        let mut route = None;
        let mut bound = Vec::new();
        for one in routed {
            if route.replace((one.stage, one.route)) != Some((one.stage, one.route)) {
                let sinks = chain.sinks_of(&one);
                let is_bound = |index: &usize| {
                    let sink = &self.deliveries[*index].sink;
                    sinks.contains(sink) && !batch.is_delivered_to(sink)
                };
                bound = (0..rows.len()).filter(is_bound).collect();
            }
            // The last sink takes the row itself, which saves reference counting.
            let Some((last, others)) = bound.split_last() else { continue };
            for index in others {
                rows[*index].push(one.row.clone());
            }
            rows[*last].push(one.row);
        }
        let revision = chain.revision().id.clone();
        let to_inclusive = batch.range.to_inclusive.clone();
        // This comes before any wait for memory: rows that are not copied keep their whole batch and arenas alive.
        let copied = self.unless_stopped(keep_own(rows, batch.occupied_bytes(), arenas)).await?;
        for (index, (rows, bytes)) in copied.into_iter().enumerate() {
            let waits = self.unbudgeted_to[index].as_ref().is_none_or(|to| to_inclusive > *to);
            let (account, delivery) = (self.account.clone(), self.deliveries[index].sender());
            let (to_inclusive, revision) = (to_inclusive.clone(), revision.clone());
            let sent = self.while_changing(async move {
                let permit = match rows.is_empty() {
                    false if waits => Some(account.take(bytes).await),
                    // The promised rows are in memory already; other lanes wait longer instead.
                    false => Some(account.force(bytes)),
                    true => None,
                };
                delivery.send(Delivery { to_inclusive, rows, revision, permit }).await
            });
            if sent.await?.is_err() {
                return Err(self.deliveries[index].ended().await.into());
            }
        }
        self.advance(batch);
        self.activate_revision();
        self.swap_pause.stop();
        Ok(())
    }

    /// Waits for something that a change of revision does not interrupt. Meanwhile the instances of the next
    /// revision are started, so that it can take its turn when the wait ends.
    async fn while_changing<T>(&mut self, wait: impl Future<Output = T>) -> Result<T, LaneError> {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            () = stop.asked() => Err(LaneError::Stopped),
            done = wait => Ok(done),
            () = self.change.keep_starting() => Err(LaneError::Stopped),
        }
    }

    /// Moves the lane's position over a batch that was handed over.
    fn advance(&mut self, batch: &Batch) {
        let records = batch.records.len() as u64;
        let replayed = self.highest.as_ref().map_or(0, |highest| {
            batch.records.partition_point(|record| record.position <= *highest) as u64
        });
        self.replayed += replayed;
        if replayed > 0 {
            metrics::counter!(metric::REPLAYED_RECORDS_TOTAL).increment(replayed);
            if self.highest.as_ref().is_some_and(|highest| batch.range.to_inclusive >= *highest) {
                tracing::info!(shard = %self.shard.shard, records = self.replayed,
                    "replayed records that only some sinks had");
            }
        }
        self.at = Some(batch.range.to_inclusive.clone());
        self.shared.statuses.update(&self.shard.shard, |status| {
            status.records_read += records;
            status.records_replayed += replayed;
            status.idle_reads = 0;
        });
        metrics::counter!(metric::SOURCE_RECORDS_TOTAL).increment(records);
        metrics::counter!(metric::SOURCE_BYTES_TOTAL).increment(batch.bytes() as u64);
    }

    /// Lets the sinks commit what they hold, writes the last checkpoint, and ends the lane. Once the lane is to
    /// stop, all of this has the time of the shutdown.
    ///
    /// # Errors
    /// [`LaneError`] when the sinks or the state database fail.
    pub async fn finish(mut self, end: LaneEnd) -> Result<LaneEnd, LaneError> {
        // At the end of a shard there is no deadline: its children, or a person at a prompt, need all of it.
        let flushed = self.stop.until_over(flush(&self.deliveries)).await.unwrap_or(false);
        self.end_checkpointer().await;
        let ended = end == LaneEnd::ShardEnd && flushed;
        if flushed && end != LaneEnd::Stopped {
            self.shared.statuses.lag(&self.shard.shard, |lag| lag.shard.end());
        }
        let stop = self.stop.clone();
        let written = stop.until_over(async {
            // A sink may have committed only now what was read long ago. And for an ended shard the notice must be
            // as late as possible: its children were created after it, and none of their records may be missing.
            if let Some(at_ms) = self.read_up_to_ms
                && flushed
                && (self.is_note_old(at_ms) || ended && Some(at_ms) > self.caught_up_ms)
            {
                self.note_caught_up(at_ms).await;
            }
            self.change.until_written().await;
            checkpointer::write(self.shared, &self.shard, &self.deliveries, ended).await
        });
        let written = written.await;
        let joined = self.join_deliveries().await;
        match written {
            Some(written) => written?,
            None => tracing::warn!(shard = %self.shard.shard,
                "the last checkpoint was not written in time; the records since the one before are read again"),
        }
        joined?;
        Ok(if flushed { end } else { LaneEnd::Stopped })
    }

    /// Ends the lane without another commit.
    pub(crate) async fn abandon(mut self) {
        self.end_checkpointer().await;
        // A write to the ledger that is under way must not land after a write of the shard's next lane.
        let _ = self.stop.until_over(self.change.until_written()).await;
        // The caller already has the error that ended the lane.
        let _ = self.join_deliveries().await;
    }

    /// Waits until the checkpointer starts no other write. A write that is under way holds the state database by
    /// then, so whoever reads the state next sees it. Otherwise a checkpoint could move after the next lane has
    /// compared it with the sinks.
    async fn end_checkpointer(&mut self) {
        self.checkpointer.abort();
        // The task ends at its next await, with a cancellation error that means nothing.
        let _ = (&mut self.checkpointer).await;
    }

    /// Waits until no delivery is at work. A delivery that went on would write the dead letters of refused rows
    /// beside the shard's next lane, which writes the same dead letters.
    async fn join_deliveries(&mut self) -> Result<(), SinkError> {
        self.abandon.cancel();
        let deliveries = std::mem::take(&mut self.deliveries);
        let joins = deliveries.into_iter().map(|delivery| delivery.join(&self.stop));
        futures::future::join_all(joins).await.into_iter().collect()
    }

    fn block(&self, part: &str, cause: &str) {
        self.shared.statuses.block(&self.shard.shard, part, cause);
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.abandon.cancel();
        self.checkpointer.abort();
    }
}

/// Commits everything in hand; false: a sink has ended by itself.
async fn flush(deliveries: &[DeliveryHandle]) -> bool {
    let flushes = deliveries.iter().map(DeliveryHandle::flush);
    futures::future::try_join_all(flushes).await.is_ok()
}

/// Detaches each sink's rows from the batch and the plugins' arenas where a copy is smaller than what they keep
/// alive. Returns them with the memory that they hold, in bytes.
async fn keep_own(
    mut rows: Vec<Vec<Row>>,
    batch_bytes: usize,
    arenas: Arenas,
) -> Vec<(Vec<Row>, usize)> {
    for rows in &mut rows {
        // Rows of several stages for one sink arrive stage by stage: restore the order of the records.
        rows.sort_by_key(|row| (row.record, row.ordinal));
    }
    let plan = |rows: &Vec<Row>| CopyPlan::of(rows, batch_bytes, &arenas);
    let plans: Vec<CopyPlan> = rows.iter().map(plan).collect();
    let copied_bytes: usize = plans.iter().map(CopyPlan::copied_bytes).sum();
    let apply = move || {
        let apply = |(mut rows, plan): (Vec<Row>, CopyPlan)| {
            plan.apply(&mut rows, &arenas);
            (rows, plan.occupied_bytes())
        };
        rows.into_iter().zip(plans).map(apply).collect()
    };
    match copied_bytes > COPIED_IN_PLACE_BYTES {
        true => off_thread(apply).await,
        false => apply(),
    }
}
