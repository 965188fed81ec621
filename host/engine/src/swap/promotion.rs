//! Promotion: a validated change becomes durable, then every lane changes at its next batch boundary.
//!
//! Invariant: `Changes::record_running` is the one step that decides. Before it, a failure changes nothing that runs.
//! After it, a restart of the process runs the new revision. So the order is:
//!
//! 1. The tables are checked, and the sinks learn which rows they will get.
//! 2. Instances are started for every shard and dropped, so that no lane ends up with a revision that does not
//!    start. A rollback without a restart of the lanes skips this: the version has run there.
//! 3. The components and the revision are stored.
//! 4. If lanes must restart, a place in the supervisor's queue is reserved: after step 5 nothing may refuse the
//!    change.
//! 5. `Changes::record_running` stores the change.
//! 6. The lanes are notified: by `current` (each changes at a batch boundary), or by a [`LaneRestart`] (all of them
//!    end, and restart with other sinks or settings).
//!
//! After a failure in step 1 or 2 the sinks are prepared again for what they get now, because they must not expect rows
//! that never come.
//!
//! The requester waits for the lanes, but not forever:
//!
//! | the lanes | the answer | afterwards |
//! |---|---|---|
//! | all have changed in time | promoted | |
//! | some have not | promoted; they are named with their causes | they change at their next batch boundary |
//! | one cannot start the revision | refused | every lane goes back (`take_back`) |
//! | they must restart, and have not ended in time | promoted; it may be undone | `until_restarted` waits on |
//! | they must restart, and the supervisor refuses | refused | every lane goes back |
//! | the pipeline stops before step 5 | refused | nothing was changed |
//! | they must restart, and the pipeline stops first | refused | the state goes back (`take_back`), if time is left |
//! | the pipeline stops otherwise | promoted | the next start runs the new revision, or says why not |
//!
//! `take_back` does nothing when another change has come since: its revision is in force then. A way back (a
//! rollback) must not be stopped by a slow start or an unreachable sink, because a bad version would stay at work:
//! these are warnings.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{MutexGuard, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Inner, Setup, Step, StepFailed, candidate};
use crate::lane::{LaneChange, Shared, WaitingLane};
use crate::stage::Revision;
use shardmill_config::{PipelineConfig, environment};
use shardmill_core::metric;
use shardmill_core::record::ShardId;
use shardmill_core::sink::Sink;
use shardmill_plugin::PluginHost;
use shardmill_state::Components;
use shardmill_state::RevisionSpec;
use shardmill_state::{NewChange, Running, StateError, Variables};

/// Time for which a change waits for lanes that do not reach a batch boundary. They change when they reach it.
const LANES_CHANGE_MAX: Duration = Duration::from_secs(8);
/// Part of [`AnswerTime::MAX`] in which a sink that is removed may commit what it has in hand.
const SINKS_CATCH_UP_MAX: Duration = Duration::from_secs(3);
/// Part that is left for the lanes in any case, even if the checks before took long.
const LANES_CHANGE_MIN: Duration = Duration::from_secs(1);

/// Cause of a refusal at the end of the pipeline.
const STOPPED: &str = "the pipeline has stopped";

/// Deadlines of the steps of a change, from the end of its trial on. Sinks, their tables and lanes may each take
/// long, so all of them share one time; otherwise their times would add up while somebody waits for the answer. The
/// starts in every shard have `timing.trial`, which does not count here.
#[derive(Clone, Copy, Debug)]
pub(super) struct AnswerTime {
    begun: Instant,
    /// Time that the starts in every shard took: the deadline of the lanes is later by this.
    starts: Duration,
}

impl AnswerTime {
    /// A change is answered within 10 s; the rest is for the writes to the state.
    const MAX: Duration = Duration::from_secs(9);

    /// Starts the clock.
    pub(super) fn begin() -> Self {
        Self { begun: Instant::now(), starts: Duration::ZERO }
    }

    /// Returns the time by which sinks that are removed must have what the others have.
    pub(super) fn sinks_catch_up_by(&self) -> Instant {
        self.begun + SINKS_CATCH_UP_MAX
    }

    /// Returns the time by which the sinks must have answered the checks of their tables.
    pub(super) fn sinks_answer_by(&self) -> Instant {
        self.begun + candidate::ANSWER_MAX
    }

    /// Returns the time by which the lanes should have changed; they have not had any time yet at `now`.
    fn lanes_change_by(&self, now: Instant) -> Instant {
        let end = self.begun + self.starts + Self::MAX;
        end.clamp(now + LANES_CHANGE_MIN, now + LANES_CHANGE_MAX)
    }
}

/// A request to end the lanes and restart them with what is described here.
pub struct LaneRestart {
    /// State and services of the lanes from then on.
    pub shared: Arc<Shared>,
    /// Answered when the lanes begin again, or with the reason why they go on as before.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// A validated change.
pub(super) struct Promotion {
    /// The revision that is to run.
    pub(super) next: Arc<Revision>,
    /// Bytes of those of its components that may not be stored yet.
    pub(super) components: Components,
    /// The specification that the files describe.
    pub(super) declared: RevisionSpec,
    /// Entry for the history.
    pub(super) change: NewChange,
    /// Number of the change that this one undoes, and why.
    pub(super) undoes: Option<(i64, String)>,
    /// State and services of the lanes from then on, if they must restart.
    pub(super) restart_with: Option<Arc<Shared>>,
    /// The configuration and the plugin host, if the files are others.
    pub(super) files: Option<(Arc<PipelineConfig>, PluginHost)>,
}

/// Result of a promotion.
pub(super) struct Promoted {
    /// Its number in the history.
    pub(super) number: Option<i64>,
    /// The revision that runs now.
    pub(super) revision: String,
    /// Lanes that have changed.
    pub(super) lanes: Vec<LaneChange>,
    /// Lanes that have not changed yet, and why.
    pub(super) waiting: Vec<WaitingLane>,
    /// The lanes have not ended yet: until they have, the change may be undone.
    pub(super) may_be_undone: bool,
}

/// How far the lanes have come in the time that the requester waits.
struct LanesChanged {
    lanes: Vec<LaneChange>,
    waiting: Vec<WaitingLane>,
    may_be_undone: bool,
}

/// A promotion that the lanes have not taken up yet, and what to go back to if they cannot.
struct UnderWay {
    /// Value of [`Setup::changes`] for this change; another value means that another change has come.
    change: u64,
    number: Option<i64>,
    was: Setup,
    before: Arc<Revision>,
}

/// Why instances were not started for every shard.
#[derive(Debug, PartialEq, Eq)]
enum NotStarted {
    /// The time for all shards was over.
    TooSlow(String),
    /// They do not start in a shard, or the pipeline has stopped.
    Refused(String),
}

impl From<NotStarted> for StepFailed {
    fn from(not_started: NotStarted) -> Self {
        let (NotStarted::TooSlow(cause) | NotStarted::Refused(cause)) = not_started;
        Step::Promote.failed(cause)
    }
}

/// Answered when the lanes begin again, or with the reason why they go on as before.
type RestartOutcome = oneshot::Receiver<Result<(), String>>;

impl Inner {
    /// Promotes a change of a stage that was validated beside `before`. Other stages may have changed since, but not
    /// this one.
    pub(super) async fn promote_in_turn(
        self: &Arc<Self>,
        before: &Revision,
        next: &Arc<Revision>,
        components: Components,
        mut change: NewChange,
    ) -> Result<Promoted, StepFailed> {
        let setup = self.setup.lock().await;
        let next = in_turn(&setup, before, next, &mut change).await?;
        let declared = setup.running.declared.clone();
        let (undoes, restart_with, files) = (None, None, None);
        let promotion =
            Promotion { next, components, declared, change, undoes, restart_with, files };
        self.promote(setup, promotion, AnswerTime::begin()).await
    }

    /// Takes the steps of [`Inner::promote_in_turn`] up to the one that changes something.
    pub(super) async fn rehearse_in_turn(
        &self,
        before: &Revision,
        next: &Arc<Revision>,
        mut change: NewChange,
    ) -> Result<(), StepFailed> {
        // For a moment the sinks expect what the candidate would bring, so no other change may run now.
        let setup = self.setup.lock().await;
        let next = in_turn(&setup, before, next, &mut change).await?;
        rehearse(&setup, &setup.shared.sinks, &next, &AnswerTime::begin(), &self.ends).await
    }

    /// Makes a change durable and notifies the lanes. While they change, other changes may be made.
    pub(super) async fn promote(
        self: &Arc<Self>,
        mut setup: MutexGuard<'_, Setup>,
        promotion: Promotion,
        mut answer_time: AnswerTime,
    ) -> Result<Promoted, StepFailed> {
        let Promotion { next, components, declared, change, undoes, mut restart_with, files } =
            promotion;
        Step::Promote.begin(&change.stage);
        let failed = |error: StateError| Step::Promote.failed(error);
        let before = setup.shared.revision();
        let sinks = &restart_with.as_ref().unwrap_or(&setup.shared).sinks.clone();
        let is_way_back = undoes.is_some();
        let answer_by = answer_time.sinks_answer_by();
        let sides = (&*before, &*next);
        candidate::check_tables(&setup.shared, sinks, sides, is_way_back, answer_by).await?;
        let routes = |revision: &Revision| {
            let sinks = setup.shared.sinks.iter();
            sinks.map(|sink| revision.routes_to(sink.name())).collect::<Vec<_>>()
        };
        // Sinks keep what they know about the rows that come. If other rows come, the sinks are acquired again.
        if restart_with.is_none() && routes(&before) != routes(&next) {
            restart_with = Some(Arc::new(setup.shared.with_revision(next.clone())));
        }
        if restart_with.is_some() || !is_way_back {
            let begun = Instant::now();
            match start_everywhere(&setup, &next, &self.ends).await {
                // This version has run in these shards already. A slow start must not keep the bad version at work.
                Err(NotStarted::TooSlow(cause)) if is_way_back => {
                    tracing::warn!(cause, "the earlier version is restored nevertheless");
                }
                Err(not_started) => {
                    // Nothing is changed, so the sinks must not expect rows that never come.
                    candidate::prepare_as_before(&setup.shared, sinks, sides, answer_by).await;
                    return Err(not_started.into());
                }
                Ok(()) => {}
            }
            answer_time.starts = begun.elapsed();
        }
        setup.shared.ledger.store_revision(&next.spec, components).await.map_err(failed)?;
        let variables = Variables::new(self.state.clone());
        let changed_variables = variables.note(&next.spec, &environment).await.map_err(failed)?;
        changed_variables.warn(&next.id);
        tracing::debug!(generation = %next.id, "its components are kept");
        let running = Running { declared, running: next.spec.clone() };
        // The place is reserved first: once the change is stored, nothing may refuse it.
        let place = match &restart_with {
            Some(_) => Some(self.restarts.try_reserve().map_err(|error| {
                Step::Promote.failed(match error {
                    TrySendError::Full(()) => {
                        "too many changes wait for the lanes; try again when the lanes have restarted"
                    }
                    TrySendError::Closed(()) => STOPPED,
                })
            })?),
            None => None,
        };
        let number =
            self.changes.record_running(&running, Some(change), undoes).await.map_err(failed)?;
        tracing::debug!(generation = %next.id, number, "it is noted; the lanes change");
        let was = setup.clone();
        setup.running = running;
        setup.changes += 1;
        if let Some((config, host)) = files {
            (setup.config, setup.host) = (config, host);
        }
        let mut restarted = None;
        match (restart_with, place) {
            (Some(shared), Some(place)) => {
                let (done, restart) = oneshot::channel();
                place.send(LaneRestart { shared: shared.clone(), done });
                setup.shared = shared;
                restarted = Some(restart);
            }
            _ => {
                setup.shared.current.send_replace(next.clone());
            }
        }
        let shared = setup.shared.clone();
        let under_way = UnderWay { change: setup.changes, number, was, before };
        drop(setup);
        let end = answer_time.lanes_change_by(Instant::now());
        let changed = self.lanes_change(&shared, &next, under_way, restarted, end).await?;
        let LanesChanged { lanes, waiting, may_be_undone } = changed;
        tracing::debug!(generation = %next.id, lanes = lanes.len(), "the lanes have changed");
        metrics::counter!(metric::CHANGES_TOTAL, "outcome" => "promoted").increment(1);
        if let Err(error) = shared.ledger.prune(&next.spec).await {
            tracing::warn!(%error, "failed to remove components that are no longer needed");
        }
        Ok(Promoted { number, revision: next.id.to_string(), lanes, waiting, may_be_undone })
    }

    /// Waits for the lanes until `end`, and names those that have not changed.
    async fn lanes_change(
        self: &Arc<Self>,
        shared: &Shared,
        next: &Revision,
        under_way: UnderWay,
        restarted: Option<RestartOutcome>,
        end: Instant,
    ) -> Result<LanesChanged, StepFailed> {
        let mut let_go = Vec::new();
        if let Some(mut restarted) = restarted {
            let_go = shared.statuses.running().into_iter().map(|lane| lane.shard).collect();
            let restart = tokio::time::timeout_at(end, &mut restarted).await;
            match restart.map(|restart| restart.unwrap_or_else(|_| Err(STOPPED.into()))) {
                Ok(Ok(())) => {}
                Ok(Err(cause)) => {
                    self.take_back(under_way, &cause, end).await;
                    return Err(Step::Promote.failed(cause));
                }
                Err(_) => {
                    tokio::spawn(self.clone().until_restarted(under_way, restarted));
                    // No lane has restarted, even if it runs the same revision already.
                    let (lanes, waiting) = (Vec::new(), shared.statuses.running());
                    return Ok(LanesChanged { lanes, waiting, may_be_undone: true });
                }
            }
        }
        match shared.statuses.changed_to(&next.id, &let_go, end).await {
            Ok((lanes, waiting)) => Ok(LanesChanged { lanes, waiting, may_be_undone: false }),
            Err(cause) => {
                self.take_back(under_way, &cause, end).await;
                Err(Step::Promote.failed(cause))
            }
        }
    }

    /// Waits on for lanes that must end, after the requester has its answer.
    async fn until_restarted(self: Arc<Self>, under_way: UnderWay, restarted: RestartOutcome) {
        match restarted.await {
            Ok(Err(cause)) => {
                tracing::error!(number = under_way.number, cause, "a change was undone");
                self.take_back(under_way, &cause, Instant::now() + LANES_CHANGE_MAX).await;
            }
            // The answer said that the change may be undone.
            Ok(Ok(())) => {
                tracing::info!(
                    number = under_way.number,
                    "the lanes have restarted: the change is in force"
                );
            }
            // The pipeline has stopped: the next start runs the change, or says why not.
            Err(_) => {}
        }
    }

    /// Takes every lane back to what ran before, because one of them could not change. Waits for them until `end`,
    /// or for a moment.
    async fn take_back(&self, under_way: UnderWay, cause: &str, end: Instant) {
        let UnderWay { change, number, was, before } = under_way;
        let mut setup = self.setup.lock().await;
        if setup.changes != change {
            tracing::warn!(
                number,
                cause,
                "a change was refused by a lane, but a later change is already in force"
            );
            return;
        }
        let undoes = number.map(|number| (number, cause.to_owned()));
        if let Err(error) = self.changes.record_running(&was.running, None, undoes).await {
            tracing::error!(
                %error,
                "failed to store that the change is undone: the next start runs the refused change"
            );
        }
        *setup = Setup { changes: change + 1, ..was };
        setup.shared.current.send_replace(before.clone());
        let statuses = setup.shared.statuses.clone();
        drop(setup);
        // Lanes that cannot start the old revision either show that themselves.
        let end = end.max(Instant::now() + LANES_CHANGE_MIN);
        let _ = statuses.changed_to(&before.id, &[], end).await;
    }
}

/// Puts a change that was validated beside `before` on top of what runs now: other stages may have changed since.
async fn in_turn(
    setup: &Setup,
    before: &Revision,
    next: &Arc<Revision>,
    change: &mut NewChange,
) -> Result<Arc<Revision>, StepFailed> {
    let current = setup.shared.revision();
    if current.id == before.id {
        return Ok(next.clone());
    }
    let stage = change.stage.as_str().into();
    let own = |revision: &Revision| revision.spec.stage(&stage).cloned();
    let (Some(validated), true) = (own(next), own(&current) == own(before)) else {
        let cause = format!("another change of stage {stage} came first; try again");
        return Err(Step::Promote.failed(cause));
    };
    let mut spec = current.spec.clone();
    let mut stages = spec.stages.iter_mut();
    if let Some(own) = stages.find(|own| own.name == stage) {
        *own = validated;
    }
    let next = Arc::new(candidate::load(setup, &current, spec, next.plugins()).await?);
    (change.before, change.after) = (current.id.to_string(), next.id.to_string());
    Ok(next)
}

/// Checks a change as its promotion does, and leaves everything as it was. The wait ends with `ends` too.
pub(super) async fn rehearse(
    setup: &Setup,
    sinks: &[Arc<dyn Sink>],
    next: &Arc<Revision>,
    answer_time: &AnswerTime,
    ends: &CancellationToken,
) -> Result<(), StepFailed> {
    let before = setup.shared.revision();
    let (shared, sides) = (&setup.shared, (&*before, &**next));
    let answer_by = answer_time.sinks_answer_by();
    candidate::check_tables(shared, sinks, sides, false, answer_by).await?;
    candidate::prepare_as_before(shared, sinks, sides, answer_by).await;
    start_everywhere(setup, next, ends).await?;
    Ok(())
}

/// Starts instances for each shard, as its lane does, and drops them. Without this check, a lane that restarts with
/// a revision that does not start would be blocked, and a run in which no lane has ever started would end. Shards
/// whose lane waits for its next try are included.
///
/// [`Setup`] is locked meanwhile, and each `configure` may take its full time limit, so all shards together have
/// `timing.trial`. The wait ends with `ends` too.
async fn start_everywhere(
    setup: &Setup,
    next: &Arc<Revision>,
    ends: &CancellationToken,
) -> Result<(), NotStarted> {
    let (shared, time_max) = (&setup.shared, setup.config.timing.trial_max);
    let shards = shared.statuses.snapshot().into_iter().filter(|(_, status)| !status.ended);
    let shards: Vec<ShardId> = shards.map(|(shard, _)| shard).collect();
    let (stream, next) = (shared.config.source.stream_name(), next.clone());
    let start = move |shard: &ShardId, is_over: &CancellationToken| -> Result<(), String> {
        for stage in &next.stages {
            let canary = stage.canary.as_ref().map(|canary| &canary.stage);
            for version in [stage].into_iter().chain(canary) {
                if is_over.is_cancelled() {
                    return Err(STOPPED.to_owned());
                }
                let context = version.context(&stream, shard.as_str());
                version
                    .start(&context)
                    .map_err(|error| format!("it does not start in shard {shard}: {error}"))?;
            }
        }
        Ok(())
    };
    start_each(shards, start, time_max, ends).await
}

/// Calls `start` for one shard after the other, off the async threads. At the deadline nobody waits for the call
/// under way, and no other follows it.
async fn start_each(
    shards: Vec<ShardId>,
    start: impl Fn(&ShardId, &CancellationToken) -> Result<(), String> + Send + 'static,
    time_max: Duration,
    ends: &CancellationToken,
) -> Result<(), NotStarted> {
    let is_over = ends.child_token();
    // However this wait ends, the work ends with it.
    let _ends_work = is_over.clone().drop_guard();
    let (count, started) = (shards.len(), Arc::new(AtomicUsize::new(0)));
    let counted = started.clone();
    let work = candidate::blocking(Step::Promote, move || {
        for shard in &shards {
            start(shard, &is_over)?;
            counted.fetch_add(1, Ordering::Relaxed);
        }
        Ok::<(), String>(())
    });
    tokio::select! {
        biased;
        () = ends.cancelled() => Err(NotStarted::Refused(STOPPED.into())),
        worked = work => worked.map_err(|failed| NotStarted::Refused(failed.cause)),
        () = tokio::time::sleep(time_max) => Err(NotStarted::TooSlow(format!(
            "expected the stages to start in all {count} shards within {} (timing.trial), found {} started; let \
             `configure` do less, or raise timing.trial and restart",
            humantime::format_duration(time_max),
            started.load(Ordering::Relaxed)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(count: usize) -> Vec<ShardId> {
        (0..count).map(|index| ShardId::new(format!("shard-{index}"))).collect()
    }

    /// Makes a start that takes some time, and counts it.
    fn slow(
        tried: &Arc<AtomicUsize>,
        time: Duration,
    ) -> impl Fn(&ShardId, &CancellationToken) -> Result<(), String> + Send + 'static {
        let tried = tried.clone();
        move |_: &ShardId, is_over: &CancellationToken| {
            if is_over.is_cancelled() {
                return Err(STOPPED.into());
            }
            tried.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(time);
            Ok(())
        }
    }

    #[test]
    fn fault_13_all_parts_of_a_change_have_one_time_together() {
        let seconds = Duration::from_secs;
        let time = AnswerTime::begin();
        assert_eq!(time.sinks_catch_up_by(), time.begun + SINKS_CATCH_UP_MAX);
        assert_eq!(time.sinks_answer_by(), time.begun + candidate::ANSWER_MAX);
        let left = |time: AnswerTime, after: Duration| {
            let now = time.begun + after;
            time.lanes_change_by(now) - now
        };
        assert_eq!(left(time, Duration::ZERO), LANES_CHANGE_MAX);
        assert_eq!(left(time, seconds(5)), seconds(4));
        // The lanes get a minimum of time in any case.
        assert_eq!(left(time, seconds(60)), LANES_CHANGE_MIN);
        // The starts in every shard have a time of their own.
        let slow = AnswerTime { starts: seconds(60), ..time };
        assert_eq!(left(slow, seconds(65)), seconds(4));
    }

    const NO_LIMIT: Duration = Duration::from_secs(600);

    #[tokio::test]
    async fn wall_08_starts_in_all_shards_have_one_deadline_together() {
        let (tried, time) = (Arc::default(), Duration::from_millis(200));
        let ends = CancellationToken::new();
        let start = slow(&tried, time);
        let begun = std::time::Instant::now();
        let started = start_each(shards(3_000), start, Duration::from_millis(700), &ends).await;
        let Err(NotStarted::TooSlow(cause)) = started else { panic!("{started:?}") };
        assert!(begun.elapsed() < Duration::from_secs(300), "it waited for all of them");
        assert!(cause.contains("in all 3000 shards within 700ms (timing.trial)"), "{cause}");
        assert!(cause.contains(" started; let `configure` do less"), "{cause}");
        // The start under way is the last one.
        tokio::time::sleep(time * 3).await;
        let last = tried.load(Ordering::Relaxed);
        tokio::time::sleep(time * 3).await;
        assert_eq!(tried.load(Ordering::Relaxed), last);
    }

    #[tokio::test]
    async fn wall_08_starts_in_all_shards_end_when_the_pipeline_does() {
        let (tried, ends) = (Arc::default(), CancellationToken::new());
        let start = slow(&tried, Duration::from_millis(200));
        let asked = ends.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            asked.cancel();
        });
        let started = start_each(shards(3_000), start, NO_LIMIT, &ends).await;
        assert_eq!(started, Err(NotStarted::Refused(STOPPED.into())));
    }

    #[tokio::test]
    async fn wall_08_a_shard_in_which_it_does_not_start_is_the_last_that_is_tried() {
        let ends = CancellationToken::new();
        let tried: Arc<AtomicUsize> = Arc::default();
        let start = slow(&tried, Duration::ZERO);
        assert_eq!(start_each(shards(5), start, NO_LIMIT, &ends).await, Ok(()));
        assert_eq!(tried.load(Ordering::Relaxed), 5);
        let fails = |shard: &ShardId, _: &CancellationToken| match shard.as_str() {
            "shard-2" => Err("it traps".to_owned()),
            "shard-3" => panic!("it was tried"),
            _ => Ok(()),
        };
        let started = start_each(shards(5), fails, NO_LIMIT, &ends).await;
        assert_eq!(started, Err(NotStarted::Refused("it traps".into())));
    }
}
