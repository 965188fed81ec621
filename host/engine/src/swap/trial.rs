//! The trial: a candidate runs on what entered its stage of late, in sandboxes of its own, and its
//! answers are compared with the incumbent's, record by record.

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
/// A candidate whose calls die so often in a row has shown what it is.
const REJECTED_MAX: RejectedMax = RejectedMax { in_a_row: 3, of_last_1000: 10 };
/// How often a shadow looks for what entered the stage since.
pub(super) const SHADOW_PAUSE: Duration = Duration::from_millis(50);
/// Why a trial is broken off at the end of the pipeline.
const STOPS: &str = "the pipeline was stopped";

/// How the candidate's answers compare with the incumbent's.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TrialReport {
    /// Records that both were given.
    pub records: u64,
    /// Both gave the same.
    pub identical: u64,
    /// Both took it and gave something else.
    pub changed: u64,
    /// The incumbent took it, the candidate rejected it.
    pub newly_rejected: u64,
    /// The incumbent rejected it, the candidate took it.
    pub newly_accepted: u64,
    /// The candidate trapped or went over a limit, the incumbent did not.
    pub trapped: u64,
    /// Calls of the candidate that gave no answer, more than of the incumbent: records that pass alone
    /// may be too much together.
    pub calls_died: u64,
    /// Records that only the candidate was given, because the incumbent failed on them or had no time left.
    pub candidate_only: u64,
    /// Why the incumbent has not answered for every record, if it has not. This says nothing against the
    /// candidate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incumbent_failed: Option<String>,
    /// What the incumbent took per record, in nanoseconds.
    pub incumbent_ns_per_record: f64,
    /// What the candidate took per record, in nanoseconds.
    pub candidate_ns_per_record: f64,
    /// The first records that became something else, as people read them.
    pub differences: Vec<ShownDifference>,
    /// Why it was broken off, if it was.
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

/// One record that became something else.
#[derive(Clone, Debug, Serialize)]
pub struct ShownDifference {
    /// Where the record is: shard and sequence.
    pub record: String,
    /// What it is.
    pub payload: String,
    /// Lines: `-` is the incumbent's, `+` the candidate's.
    pub diff: String,
}

/// A candidate and the incumbent, ready to be given the same records.
pub(super) struct Trial {
    stage: LoadedStage,
    incumbent: Incumbent,
    candidate: Side,
    report: TrialReport,
    /// Time that the candidate may take with all samples: one that loops must not hold up the swap.
    candidate_max: Duration,
    /// What is left of it, the shadow's length included.
    candidate_left: Duration,
    /// Trapped records of those that only the candidate was given, and what it died of there.
    failed_only: Failures,
    /// Calls that died, of the samples that both were given.
    died: (u64, u64),
    /// The last sample that was run.
    last_number: u64,
    /// The pipeline's end, with which a trial ends.
    stop: CancellationToken,
}

/// What went wrong with the candidate where the incumbent has given no answer.
#[derive(Default)]
struct Failures {
    trapped: u64,
    calls_died: u64,
    reason: Option<String>,
}

struct Side {
    stage: LoadedStage,
    runner: Option<StageRunner>,
    /// How often a sample is run where the machine does not let its calls end.
    tries_max: u32,
    stop: CancellationToken,
}

/// How often a sample is run by the candidate, at most, where the machine does not let its calls end.
const CANDIDATE_TRIES_MAX: u32 = 3;

/// What became of a sample's items, and how long it took.
type Answer = Result<(Vec<Fate>, Duration), NoAnswer>;

/// Why nothing became of a sample's items.
enum NoAnswer {
    /// The version failed, or was stopped.
    Failed(String),
    /// What they become holds too much together: those of the records before this one have room.
    TooMuch(u32),
}

/// A plugin's reason in one line: it is shown among the host's own words.
fn one_line(reason: String) -> String {
    escaped(&reason, &[])
}

impl Side {
    fn new(stage: &LoadedStage, tries_max: u32, stop: CancellationToken) -> Self {
        // A failure that may pass is not waited for: it is a rejection like another.
        let limits = StageLimits { retry_ms_max: 0, ..stage.limits };
        // What it does here says nothing of how it serves.
        let health = Arc::default();
        let stage = LoadedStage { limits, health, ..stage.clone() };
        Self { stage, runner: None, tries_max, stop }
    }

    /// Calls that gave no answer so far.
    fn calls_died(&self) -> u64 {
        self.stage.health.seen().traps
    }

    fn run(&mut self, sample: &Sample) -> Answer {
        let runner = match &mut self.runner {
            Some(runner) => runner,
            none => {
                // A version's first call pays for code and memory that later ones find at hand, which would
                // count against whoever goes first: an instance that is let go pays.
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

/// An instance for the sample's shard.
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

/// The incumbent in its sandbox, on a thread of its own: where it loops, nobody waits for it longer than
/// for its part of the trial. It is mostly a bad incumbent that is to be replaced.
struct Incumbent {
    /// `None`: it is not asked any more.
    line: Option<(mpsc::Sender<Sample>, mpsc::Receiver<Answer>)>,
    health: Arc<HealthCounts>,
    stop: CancellationToken,
    left: Duration,
    allowed: Duration,
    failed: Option<String>,
    /// A call of it failed or was broken off, so that nothing is known of the records in it.
    is_unsound: bool,
}

impl Incumbent {
    fn start(stage: &LoadedStage, allowed: Duration, stop: &CancellationToken) -> Self {
        let stop = stop.child_token();
        // As often as its part of the trial allows: its failure would excuse those of the candidate.
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
        let failed = spawned.as_ref().err().map(|error| format!("it has no thread: {error}"));
        let line = spawned.ok().map(|_| (samples, answers));
        Self { line, health, stop, left: allowed, allowed, failed, is_unsound: false }
    }

    /// What becomes of a sample's items; `None`: it gives no answer for them.
    ///
    /// # Errors
    /// The record before which the items have room together.
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
                        "it took longer than {} with the records (timing.trial_incumbent)",
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

    /// Calls that gave no answer so far.
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
    /// Of a candidate for the stage of an incumbent, with a shadow of this length; ends with `stop`.
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

    /// Runs what has entered the stage since the last pass. Blocking.
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

    /// Whether it was broken off, or the pipeline ends.
    pub(super) fn is_over(&mut self) -> bool {
        if self.stop.is_cancelled() && self.report.broken_off.is_none() {
            self.report.broken_off = Some(STOPS.into());
        }
        self.report.broken_off.is_some()
    }

    /// Compares what becomes of a sample, as many of its items at a time as have room.
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
                    "it took longer than {} with the records (timing.trial)",
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
            // Of two rejections, one may be put into better words.
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

    /// How it went.
    pub(super) fn finish(mut self) -> TrialReport {
        let (incumbent_died, mut candidate_died) = self.died;
        // Where the incumbent itself fails, what the candidate does there may still be better.
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
    /// Why the candidate may not be promoted, if it may not.
    pub(super) fn refusal(&self, gates: &Gates) -> Option<String> {
        let over = |count: u64, max: Option<u64>| max.filter(|max| count > *max);
        if let Some(cause) = &self.broken_off {
            return Some(format!("on records that came of late, {cause}"));
        }
        if self.trapped > 0 {
            return Some(format!(
                "it traps or goes over a limit on {} of {} records that the incumbent takes or rejects",
                self.trapped,
                self.records + self.candidate_only
            ));
        }
        if self.calls_died > 0 {
            return Some(format!(
                "{} of its calls trap or go over a limit, more than the incumbent's, though each record \
                 passes alone: does it leak?",
                self.calls_died
            ));
        }
        if let Some(max) = over(self.newly_rejected, gates.newly_rejected_max) {
            return Some(format!(
                "it rejects {} of {} records that the incumbent takes; {max} may be (--max-rejected)",
                self.newly_rejected, self.records
            ));
        }
        let changed = self.changed + self.newly_rejected + self.newly_accepted;
        over(changed, gates.changed_max).map(|max| {
            format!(
                "it gives something else for {changed} of {} records; {max} may be (--max-changed)",
                self.records
            )
        })
    }

    /// Says that the incumbent has not answered for every record, if it has not.
    pub(crate) fn incumbent_line(&self) -> Option<String> {
        let cause = self.incumbent_failed.as_ref()?;
        Some(format!(
            "the version before failed: {}; {} records were given to the new one alone",
            escaped(cause, &[]),
            self.candidate_only
        ))
    }

    /// The report in a few lines.
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
