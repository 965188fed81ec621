//! The trial: the candidate runs on recent inputs of its stage, in sandboxes of its own, and its answers are
//! compared with the incumbent's, record by record.
//!
//! Incumbent and candidate are given the same samples, one after the other. What they do here does not count for the
//! health of the running version. The trial must end whatever either of them does, so each has a time:
//!
//! | who exceeds its time, or fails as a whole | what follows |
//! |---|---|
//! | the candidate | the trial is aborted and the change refused |
//! | the incumbent | the candidate runs alone: this sample after a failure, all later ones after the time is over |
//!
//! Failures of the candidate on records that only it was given count against it, unless a call of the incumbent has
//! failed: a bad incumbent is often what is to be replaced.
//!
//! A machine that is too busy for a call says nothing about a version: the candidate's call is tried up to three
//! times, the incumbent's as often as its time allows, because its failure would excuse the candidate's.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::stage::{
    Difference, Fate, HealthCounts, Item, LoadedStage, RunError, Sample, Samples, StageRunner,
    before, fates,
};
use shardmill_config::{Gates, RejectedMax, StageLimits, Timing};
use shardmill_core::escape::escaped;

/// Differences that a report shows.
const DIFFERENCES_MAX: usize = 5;
/// Characters of a record that a report shows.
const RECORD_CHARS_MAX: usize = 200;
/// Records that may be rejected in one search for culprits. With more of them, the version fails as a whole.
const REJECTED_MAX: RejectedMax = RejectedMax { in_a_row: 3, of_last_1000: 10 };
/// Interval at which a shadow looks for new samples.
pub(super) const SHADOW_PAUSE: Duration = Duration::from_millis(50);
/// Cause when the pipeline's end aborts a trial.
const STOPS: &str = "the pipeline was stopped";

/// Comparison of the candidate's answers with the incumbent's.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TrialReport {
    /// Records that both were given.
    pub records: u64,
    /// Records with the same answer of both.
    pub identical: u64,
    /// Records that both accepted, with different outputs.
    pub changed: u64,
    /// Records that the incumbent accepted and the candidate rejected.
    pub newly_rejected: u64,
    /// Records that the incumbent rejected and the candidate accepted.
    pub newly_accepted: u64,
    /// Records on which the candidate trapped or exceeded a limit, and the incumbent did not.
    pub trapped: u64,
    /// Calls of the candidate that failed, more than of the incumbent: records that pass alone may be too much
    /// together.
    pub calls_died: u64,
    /// Records that only the candidate was given, because the incumbent failed on them or had no time left.
    pub candidate_only: u64,
    /// Why the incumbent has not answered for every record, if it has not. This says nothing against the candidate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incumbent_failed: Option<String>,
    /// The incumbent's time per record, in nanoseconds.
    pub incumbent_ns_per_record: f64,
    /// The candidate's time per record, in nanoseconds.
    pub candidate_ns_per_record: f64,
    /// The first records with different answers, readable for people.
    pub differences: Vec<ShownDifference>,
    /// Why the trial was aborted, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken_off: Option<String>,
    /// The number of differing records when the last difference was noted.
    #[serde(skip)]
    shown_of: u64,
    #[serde(skip)]
    incumbent_time: Duration,
    #[serde(skip)]
    candidate_time: Duration,
}

/// One record with different answers.
#[derive(Clone, Debug, Serialize)]
pub struct ShownDifference {
    /// Position of the record: shard and sequence number.
    pub record: String,
    /// The record's payload.
    pub payload: String,
    /// Lines: `-` is the incumbent's answer, `+` the candidate's.
    pub diff: String,
}

/// A candidate and the incumbent, ready for the same records.
pub(super) struct Trial {
    stage: LoadedStage,
    incumbent: Incumbent,
    candidate: Side,
    report: TrialReport,
    /// Time that the candidate may take for all samples: one that loops must not delay the swap.
    candidate_max: Duration,
    /// The rest of that time, with the length of the shadow included.
    candidate_left: Duration,
    /// Failures of the candidate on samples that only it was given.
    failed_only: Failures,
    /// Failed calls on samples that both were given: the incumbent's, the candidate's.
    died: (u64, u64),
    /// Number of the last sample that was run.
    last_number: u64,
    /// Cancelled at the end of the pipeline; the trial ends with it.
    stop: CancellationToken,
}

/// Failures of the candidate where the incumbent has given no answer.
#[derive(Default)]
struct Failures {
    trapped: u64,
    calls_died: u64,
    reason: Option<String>,
}

struct Side {
    stage: LoadedStage,
    runner: Option<StageRunner>,
    /// Runs of a sample when the machine is too busy for its calls to finish.
    tries_max: u32,
    stop: CancellationToken,
}

/// The candidate's maximum of such runs.
const CANDIDATE_TRIES_MAX: u32 = 3;

/// Outcomes of a sample's items, and the time that they took.
type Answer = Result<(Vec<Fate>, Duration), NoAnswer>;

/// Why a sample has no outcome.
enum NoAnswer {
    /// The version failed, or was stopped.
    Failed(String),
    /// The outputs would hold too much memory together: those of the records before this one fit.
    TooMuch(u32),
}

/// Puts a plugin's reason in one line, because it is shown inside the host's own text.
fn one_line(reason: String) -> String {
    escaped(&reason, &[])
}

impl Side {
    fn new(stage: &LoadedStage, tries_max: u32, stop: CancellationToken) -> Self {
        // A failure that may pass is not waited for: it counts as a rejection.
        let limits = StageLimits { retry_ms_max: 0, ..stage.limits };
        // The trial must not count for the health of the running version.
        let health = Arc::default();
        let stage = LoadedStage { limits, health, ..stage.clone() };
        Self { stage, runner: None, tries_max, stop }
    }

    /// Returns the number of failed calls so far.
    fn calls_died(&self) -> u64 {
        self.stage.health.seen().traps
    }

    fn run(&mut self, sample: &Sample) -> Answer {
        let runner = match &mut self.runner {
            Some(runner) => runner,
            none => {
                // A version's first call loads code and memory that later calls find ready. That would count against
                // the side that goes first, so another instance makes this call and is dropped.
                let unseen = LoadedStage { health: Arc::default(), ..self.stage.clone() };
                let _ = start(unseen, sample, &self.stop)
                    .map_err(NoAnswer::Failed)?
                    .run(&sample.batch, &sample.flow);
                none.insert(
                    start(self.stage.clone(), sample, &self.stop).map_err(NoAnswer::Failed)?,
                )
            }
        };
        let mut tries = 1;
        let (outcome, took) = loop {
            let begun = Instant::now();
            let outcome = runner.run(&sample.batch, &sample.flow);
            // A busy machine says nothing about the version.
            let is_starved = matches!(outcome, Err(RunError::Starved(_)));
            if !is_starved || tries >= self.tries_max || self.stop.is_cancelled() {
                break (outcome, begun.elapsed());
            }
            tries += 1;
        };
        match outcome {
            Ok(outcome) => Ok((fates(&self.stage, sample.flow.len(), outcome), took)),
            Err(
                RunError::AllFailed(reason)
                | RunError::TooManyFailed(reason)
                | RunError::Starved(reason)
                | RunError::Later(reason, _),
            ) => Err(NoAnswer::Failed(one_line(self.stage.services.values.hide(reason)))),
            Err(RunError::NoInstance(error)) => Err(NoAnswer::Failed(error.to_string())),
            Err(RunError::Stopped(_)) => Err(NoAnswer::Failed("it was stopped".into())),
            Err(RunError::TooMuch(record)) => Err(NoAnswer::TooMuch(record)),
        }
    }
}

/// Starts an instance for the sample's shard.
fn start(
    stage: LoadedStage,
    sample: &Sample,
    stop: &CancellationToken,
) -> Result<StageRunner, String> {
    let shard = &sample.batch.shard;
    let context = stage.context(&shard.stream.name, shard.shard.as_str());
    StageRunner::start(stage, context, REJECTED_MAX, stop.clone())
        .map_err(|error| error.to_string())
}

/// The incumbent in its sandbox, on a thread of its own: if it loops, the trial waits no longer than the incumbent's
/// time. A bad incumbent is often what is to be replaced.
struct Incumbent {
    /// `None`: the incumbent is no longer asked.
    line: Option<(mpsc::Sender<Sample>, mpsc::Receiver<Answer>)>,
    health: Arc<HealthCounts>,
    stop: CancellationToken,
    left: Duration,
    allowed: Duration,
    failed: Option<String>,
    /// A call of it failed or was aborted, so nothing is known about the records of that call.
    is_unsound: bool,
}

impl Incumbent {
    fn start(stage: &LoadedStage, allowed: Duration, stop: &CancellationToken) -> Self {
        let stop = stop.child_token();
        // It is tried as often as its time allows: its failure would excuse failures of the candidate.
        let mut side = Side::new(stage, u32::MAX, stop.clone());
        let health = side.stage.health.clone();
        let (samples, inbox) = mpsc::channel::<Sample>();
        let (outbox, answers) = mpsc::channel();
        // Capabilities of plugins use the runtime.
        let runtime = tokio::runtime::Handle::try_current().ok();
        let work = move || {
            let _entered = runtime.as_ref().map(tokio::runtime::Handle::enter);
            for sample in inbox {
                if outbox.send(side.run(&sample)).is_err() {
                    return;
                }
            }
        };
        let spawned = std::thread::Builder::new().name("incumbent".into()).spawn(work);
        let failed =
            spawned.as_ref().err().map(|error| format!("failed to start its thread: {error}"));
        let line = spawned.ok().map(|_| (samples, answers));
        Self { line, health, stop, left: allowed, allowed, failed, is_unsound: false }
    }

    /// Returns the outcomes of a sample's items; `None`: the incumbent gives no answer.
    ///
    /// # Errors
    /// The record before which the outputs fit in memory together.
    fn run(&mut self, sample: &Sample) -> Result<Option<(Vec<Fate>, Duration)>, u32> {
        let Some((samples, answers)) = self.line.as_ref() else { return Ok(None) };
        let begun = Instant::now();
        let answer = match samples.send(sample.clone()) {
            Ok(()) => answers.recv_timeout(self.left),
            Err(_) => Err(mpsc::RecvTimeoutError::Disconnected),
        };
        self.left = self.left.saturating_sub(begun.elapsed());
        match answer {
            Ok(Ok(answer)) => Ok(Some(answer)),
            Ok(Err(NoAnswer::TooMuch(record))) => Err(record),
            Ok(Err(NoAnswer::Failed(cause))) => {
                self.is_unsound = true;
                self.failed.get_or_insert(cause);
                Ok(None)
            }
            Err(error) => {
                self.is_unsound |= self.calls_died() > 0;
                self.failed = Some(match error {
                    mpsc::RecvTimeoutError::Timeout => format!(
                        "it took longer than {} for the records (timing.trial_incumbent)",
                        humantime::format_duration(self.allowed)
                    ),
                    mpsc::RecvTimeoutError::Disconnected => "its sandbox failed".into(),
                });
                // The thread ends when its call does.
                self.stop.cancel();
                self.line = None;
                Ok(None)
            }
        }
    }

    /// Returns the number of failed calls so far.
    fn calls_died(&self) -> u64 {
        self.health.seen().traps
    }
}

impl Drop for Incumbent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Trial {
    /// Makes a trial of a candidate against an incumbent, with a shadow of this length; it ends with `stop`.
    pub(super) fn new(
        (incumbent, candidate): (&LoadedStage, &LoadedStage),
        shadow: Duration,
        timing: &Timing,
        stop: &CancellationToken,
    ) -> Self {
        Self {
            stage: incumbent.clone(),
            incumbent: Incumbent::start(incumbent, timing.trial_incumbent_max, stop),
            candidate: Side::new(candidate, CANDIDATE_TRIES_MAX, stop.clone()),
            report: TrialReport::default(),
            candidate_max: timing.trial_max,
            candidate_left: timing.trial_max.saturating_add(shadow),
            failed_only: Failures::default(),
            died: (0, 0),
            last_number: 0,
            stop: stop.clone(),
        }
    }

    /// Runs the samples that were taken since the last pass. Blocks.
    pub(super) fn pass(&mut self, samples: &Samples) {
        for number in samples.numbers_after(&self.stage.name, self.last_number) {
            self.last_number = number;
            let Some(sample) = samples.get(&self.stage.name, number) else { continue };
            if let Err(cause) = self.compare(&sample) {
                self.report.broken_off = Some(cause);
                return;
            }
        }
    }

    /// Whether the trial was aborted, or the pipeline ends.
    pub(super) fn is_over(&mut self) -> bool {
        if self.stop.is_cancelled() && self.report.broken_off.is_none() {
            self.report.broken_off = Some(STOPS.into());
        }
        self.report.broken_off.is_some()
    }

    /// Compares the outcomes of a sample, with as many of its items at a time as fit in memory.
    fn compare(&mut self, sample: &Sample) -> Result<(), String> {
        let mut waiting = vec![sample.clone()];
        while let Some(part) = waiting.pop() {
            match self.compare_at_once(&part) {
                Ok(()) => {}
                Err(NoAnswer::Failed(cause)) => return Err(cause),
                Err(NoAnswer::TooMuch(record)) => {
                    let first = before(&part.flow, record).to_vec();
                    let rest = part.flow[first.len()..].to_vec();
                    let of = |flow| Sample { flow: Arc::new(flow), ..part.clone() };
                    waiting.extend([of(rest), of(first)]);
                }
            }
        }
        Ok(())
    }

    fn compare_at_once(&mut self, sample: &Sample) -> Result<(), NoAnswer> {
        if self.stop.is_cancelled() {
            return Err(NoAnswer::Failed(STOPS.into()));
        }
        let died_before = (self.incumbent.calls_died(), self.candidate.calls_died());
        let incumbent = self.incumbent.run(sample).map_err(NoAnswer::TooMuch)?;
        let begun = Instant::now();
        let candidate = self.candidate.run(sample);
        let took = begun.elapsed();
        if self.stop.is_cancelled() {
            return Err(NoAnswer::Failed(STOPS.into()));
        }
        self.candidate_left = match self.candidate_left.checked_sub(took) {
            Some(left) => left,
            None => {
                return Err(NoAnswer::Failed(format!(
                    "it took longer than {} for the records (timing.trial)",
                    humantime::format_duration(self.candidate_max)
                )));
            }
        };
        let died = self.candidate.calls_died() - died_before.1;
        let Some((expected, incumbent_took)) = incumbent else {
            match candidate {
                Ok((found, _)) => {
                    let trapped = found.iter().filter(|fate| fate.trapped).count();
                    self.failed_only.trapped += trapped as u64;
                }
                Err(NoAnswer::Failed(cause)) => {
                    self.failed_only.reason.get_or_insert(cause);
                }
                Err(no_room @ NoAnswer::TooMuch(_)) => return Err(no_room),
            }
            self.report.candidate_only += sample.flow.len() as u64;
            self.failed_only.calls_died += died;
            return Ok(());
        };
        let (found, candidate_took) = candidate?;
        self.died.0 += self.incumbent.calls_died() - died_before.0;
        self.died.1 += died;
        self.report.incumbent_time += incumbent_took;
        self.report.candidate_time += candidate_took;
        for ((expected, found), item) in expected.iter().zip(&found).zip(sample.flow.iter()) {
            self.count(expected, found, sample, item);
        }
        Ok(())
    }

    fn count(&mut self, expected: &Fate, found: &Fate, sample: &Sample, item: &Item) {
        let report = &mut self.report;
        report.records += 1;
        let count = match (&expected.rejected, &found.rejected) {
            _ if found.trapped && !expected.trapped => &mut report.trapped,
            (None, Some(_)) => &mut report.newly_rejected,
            (Some(_), None) => &mut report.newly_accepted,
            (None, None) if expected.outputs != found.outputs => &mut report.changed,
            // Two rejections are the same outcome, even if their reasons differ.
            _ => &mut report.identical,
        };
        *count += 1;
        let differing = report.records - report.identical;
        if differing == report.shown_of || report.differences.len() >= DIFFERENCES_MAX {
            return;
        }
        report.shown_of = differing;
        let origin = sample.batch.origin(item.record);
        let payload = String::from_utf8_lossy(&item.payload);
        let payload: String = payload.chars().take(RECORD_CHARS_MAX).collect();
        let (payload, diff) =
            (escaped(&payload, &[]), Difference::between(expected, found).render(false));
        let is_known = |shown: &ShownDifference| shown.payload == payload && shown.diff == diff;
        if !report.differences.iter().any(is_known) {
            let record = format!("{}:{origin}", sample.batch.shard.shard);
            report.differences.push(ShownDifference { record, payload, diff });
        }
    }

    /// Ends the trial and returns its report.
    pub(super) fn finish(mut self) -> TrialReport {
        let (incumbent_died, mut candidate_died) = self.died;
        // Where the incumbent itself fails, what the candidate does may still be better.
        if !self.incumbent.is_unsound {
            self.report.trapped += self.failed_only.trapped;
            candidate_died += self.failed_only.calls_died;
            if self.report.broken_off.is_none() {
                self.report.broken_off = self.failed_only.reason.take();
            }
        }
        self.report.calls_died = candidate_died.saturating_sub(incumbent_died);
        self.report.incumbent_failed = self.incumbent.failed.take();
        let records = self.report.records.max(1) as f64;
        let per_record = |time: Duration| time.as_nanos() as f64 / records;
        self.report.incumbent_ns_per_record = per_record(self.report.incumbent_time);
        self.report.candidate_ns_per_record = per_record(self.report.candidate_time);
        self.report
    }
}

impl TrialReport {
    /// Returns why the candidate may not be promoted, if so.
    pub(super) fn refusal(&self, gates: &Gates) -> Option<String> {
        let over = |count: u64, max: Option<u64>| max.filter(|max| count > *max);
        if let Some(cause) = &self.broken_off {
            return Some(format!("on recent records, {cause}"));
        }
        if self.trapped > 0 {
            return Some(format!(
                "it traps or exceeds a limit on {} of {} records on which the incumbent does not",
                self.trapped,
                self.records + self.candidate_only
            ));
        }
        if self.calls_died > 0 {
            return Some(format!(
                "{} more of its calls than of the incumbent's trap or exceed a limit, although each record \
                 passes alone: it may leak memory",
                self.calls_died
            ));
        }
        if let Some(max) = over(self.newly_rejected, gates.newly_rejected_max) {
            return Some(format!(
                "it rejects {} of {} records that the incumbent accepts: expected at most {max} \
                 (--max-rejected)",
                self.newly_rejected, self.records
            ));
        }
        let changed = self.changed + self.newly_rejected + self.newly_accepted;
        over(changed, gates.changed_max).map(|max| {
            format!(
                "its output differs for {changed} of {} records: expected at most {max} (--max-changed)",
                self.records
            )
        })
    }

    /// Says that the incumbent has not answered for every record, if so.
    pub(crate) fn incumbent_line(&self) -> Option<String> {
        let cause = self.incumbent_failed.as_ref()?;
        Some(format!(
            "the incumbent did not answer for every record: {}; {} records ran with the candidate only",
            escaped(cause, &[]),
            self.candidate_only
        ))
    }

    /// Returns the report in a few lines.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "{} records: {} identical, {} changed, {} newly rejected, {} newly accepted, {} trapped",
            self.records,
            self.identical,
            self.changed,
            self.newly_rejected,
            self.newly_accepted,
            self.trapped
        )];
        if self.records > 0 {
            lines.push(format!(
                "{:.0} ns per record before, {:.0} ns after",
                self.incumbent_ns_per_record, self.candidate_ns_per_record
            ));
        }
        lines.extend(self.incumbent_line());
        for ShownDifference { record, payload, diff } in &self.differences {
            lines.push(format!("{record}: {payload}"));
            lines.extend(diff.lines().map(|line| format!("  {line}")));
        }
        lines
    }
}
