//! Runs one stage over a flow, and finds the guilty record when a call fails.
//!
//! A failed call is searched piece by piece: what precedes the first guilty record is kept, the guilty
//! record is rejected alone, and the rest goes on. Three culprits in 1,000 records cost at most 34
//! calls. A trap or a timeout kills the instance; the next call gets a fresh one. Every call of a
//! search does: what one record did to the plugin's memory must not be another's fault.

use std::thread;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio_util::sync::CancellationToken;

use super::answer::{self, Rejected, StageOutcome};
use super::cuts;
use super::flow::{self, Item};
use super::generation::LoadedStage;
use crate::config::RejectedMax;
use crate::plugin::{CallError, Context, Failure, Instance, WireBatch, excerpt};
use crate::record::Batch;

/// One stage of one lane: the plugin's instance and the buffers that its calls reuse.
pub struct StageRunner {
    stage: LoadedStage,
    context: Context,
    instance: Option<Instance>,
    /// Linear memory of the instance after its first call, in bytes.
    settled_bytes: usize,
    wire: WireBatch,
    rejected_max: RejectedMax,
    stop: CancellationToken,
}

/// Why a run gave no outcome.
#[derive(Debug)]
pub enum RunError {
    /// The shutdown came while the stage was waiting to try again.
    Stopped,
    /// Every record failed, for a reason that the plugin calls retryable.
    AllFailed(String),
    /// More records failed than a lane may reject: the last reason.
    TooManyFailed(String),
    /// No instance can be had: the plugin fails to start.
    NoInstance(CallError),
}

/// A call that did not work.
enum CallFailure {
    /// The instance is dead, or its answer broke the contract.
    Dead(CallError),
    /// The plugin answered with a failure.
    Answered(Failure),
}

impl StageRunner {
    /// A runner whose instance is started at once, so that a bad configuration shows early.
    ///
    /// # Errors
    /// What the plugin says to its configuration.
    pub fn start(
        stage: LoadedStage,
        context: Context,
        rejected_max: RejectedMax,
        stop: CancellationToken,
    ) -> Result<Self, CallError> {
        let wire = WireBatch { arena: Vec::new(), inputs: Vec::new() };
        let mut runner =
            Self { stage, context, instance: None, settled_bytes: 0, wire, rejected_max, stop };
        runner.instance()?;
        Ok(runner)
    }

    /// The stage that runs here.
    pub fn stage(&self) -> &LoadedStage {
        &self.stage
    }

    /// Linear memory of the instance, in bytes; 0 while there is none.
    pub fn memory_bytes(&self) -> usize {
        self.instance.as_ref().map_or(0, Instance::memory_bytes)
    }

    /// Calls once with the items, without a search for the culprit should that fail. Of no items as
    /// well, which a lane never does.
    ///
    /// # Errors
    /// Why the call failed, in words.
    pub fn run_once(&mut self, batch: &Batch, items: &[Item]) -> Result<StageOutcome, String> {
        match self.call(batch, items, 0) {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(failure)) => Err(describe(failure).0),
            Err(RunError::NoInstance(error)) => Err(error.message),
            Err(error) => Err(format!("{error:?}")),
        }
    }

    /// Runs the items; every one of them has an outcome afterwards: outputs, a rejection, or, by
    /// neither, filtered.
    ///
    /// # Errors
    /// [`RunError`]; nothing of the flow has an outcome then.
    pub fn run(&mut self, batch: &Batch, items: &[Item]) -> Result<StageOutcome, RunError> {
        if items.is_empty() {
            return Ok(StageOutcome::default());
        }
        let begun = Instant::now();
        let outcome = match self.call_patiently(batch, items)? {
            Ok(outcome) => outcome,
            Err(failure) => self.search(batch, items, failure)?,
        };
        self.stage.health.ran(items.len(), outcome.rejected.len(), begun.elapsed());
        Ok(outcome)
    }

    /// Calls with all items; while the plugin answers that the failure may pass, tries again.
    fn call_patiently(
        &mut self,
        batch: &Batch,
        items: &[Item],
    ) -> Result<Result<StageOutcome, CallFailure>, RunError> {
        let retry_for = Duration::from_millis(self.stage.limits.retry_ms_max);
        let begun = Instant::now();
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(10))
            .without_max_times()
            .with_jitter()
            .build();
        loop {
            match self.call(batch, items, 0)? {
                Err(CallFailure::Answered(failure)) if failure.retryable => {
                    let pause = pauses.next().unwrap_or(Duration::from_secs(10));
                    if begun.elapsed() + pause > retry_for {
                        return Ok(Err(CallFailure::Answered(failure)));
                    }
                    metrics::counter!("shardmill_stage_retries_total",
                        "stage" => self.stage.name.to_string())
                    .increment(1);
                    self.sleep(pause)?;
                }
                answer => return Ok(answer),
            }
        }
    }

    /// Waits, unless the lane is asked to stop.
    fn sleep(&self, pause: Duration) -> Result<(), RunError> {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if self.stop.is_cancelled() {
                return Err(RunError::Stopped);
            }
            thread::sleep(Duration::from_millis(20).min(pause));
        }
        Ok(())
    }

    /// Finds the guilty items, rejects them alone and keeps the outcomes of all others.
    fn search(
        &mut self,
        batch: &Batch,
        items: &[Item],
        first: CallFailure,
    ) -> Result<StageOutcome, RunError> {
        let retryable = matches!(&first, CallFailure::Answered(failure) if failure.retryable);
        let mut culprits = 0;
        let mut failed_in_a_row = 0;
        let mut kept = StageOutcome::default();
        // Items before `settled` have their outcome; `suspect_end` bounds a range known to fail.
        let mut settled = 0;
        let mut suspect_end = culprit_end(&first, items.len());
        let mut accused = named_culprit(&first, items.len());
        while settled < items.len() {
            let end = match accused.take() {
                // The plugin named the record: what precedes it runs first, without it.
                Some(culprit) if culprit > settled => culprit,
                _ => {
                    let suspects = suspect_end.saturating_sub(settled);
                    settled + cuts::next_call(items.len() - settled, suspects, culprits)
                }
            };
            self.instance = None;
            match self.call(batch, &items[settled..end], settled)? {
                Ok(outcome) => {
                    kept.answers.extend(outcome.answers);
                    kept.rejected.extend(outcome.rejected);
                    settled = end;
                    failed_in_a_row = 0;
                }
                Err(failure) if end == settled + 1 => {
                    let trapped = matches!(failure, CallFailure::Dead(_));
                    let (reason, backtrace) = describe(failure);
                    culprits += 1;
                    failed_in_a_row += 1;
                    kept.rejected.push(Rejected { item: settled, reason, backtrace, trapped });
                    settled += 1;
                    suspect_end = settled;
                    // A search of records that all fail would take minutes to find what is known.
                    if failed_in_a_row > self.rejected_max.in_a_row
                        || kept.rejected.len() > self.rejected_max.of_last_1000 as usize
                    {
                        return Err(RunError::TooManyFailed(last_reason(&kept)));
                    }
                }
                Err(failure) => {
                    accused = named_culprit(&failure, end - settled).map(|item| item + settled);
                    suspect_end = settled + culprit_end(&failure, end - settled);
                }
            }
        }
        if retryable && kept.rejected.len() == items.len() {
            return Err(RunError::AllFailed(last_reason(&kept)));
        }
        Ok(kept)
    }

    /// One call with the items from `first_item` on.
    fn call(
        &mut self,
        batch: &Batch,
        items: &[Item],
        first_item: usize,
    ) -> Result<Result<StageOutcome, CallFailure>, RunError> {
        flow::pack(batch, items, &mut self.wire);
        let limit_ms = self.stage.limits.call_ms_max(items.len());
        self.instance().map_err(RunError::NoInstance)?;
        let Some(instance) = self.instance.as_mut() else { unreachable!("started above") };
        metrics::counter!("shardmill_stage_calls_total", "stage" => self.stage.name.to_string())
            .increment(1);
        let answer = instance.process(&self.wire, limit_ms);
        metrics::gauge!("shardmill_stage_memory_bytes",
            "stage" => self.stage.name.to_string(), "shard" => self.context.shard_id.clone())
        .set(instance.memory_bytes() as f64);
        let memory_bytes = instance.memory_bytes();
        let routes = self.stage.descriptor.routes.len();
        let limits = &self.stage.limits;
        Ok(match answer {
            Ok(Ok(outcome)) => match answer::prove(items, outcome, routes, limits, first_item) {
                Ok(outcome) => {
                    self.renew_if_leaking(memory_bytes);
                    Ok(outcome)
                }
                Err(violation) => {
                    self.instance = None;
                    self.stage.health.trapped();
                    Err(CallFailure::Dead(violation))
                }
            },
            Ok(Err(failure)) => Err(CallFailure::Answered(failure)),
            Err(error) => {
                self.instance = None;
                self.stage.health.trapped();
                metrics::counter!("shardmill_stage_traps_total",
                    "stage" => self.stage.name.to_string())
                .increment(1);
                Err(CallFailure::Dead(error))
            }
        })
    }

    /// Gives up an instance that has leaked half of its memory: a fresh one costs less than the failed
    /// call and the search that would come of it. What an instance remembers is a cache.
    fn renew_if_leaking(&mut self, memory_bytes: usize) {
        if self.settled_bytes == 0 {
            self.settled_bytes = memory_bytes;
        }
        let leaked_bytes = memory_bytes - self.settled_bytes.min(memory_bytes);
        if leaked_bytes > self.stage.limits.memory_bytes_max / 2 {
            self.instance = None;
            metrics::counter!("shardmill_stage_renewals_total",
                "stage" => self.stage.name.to_string())
            .increment(1);
        }
    }

    /// The live instance, or a fresh one.
    fn instance(&mut self) -> Result<(), CallError> {
        if self.instance.is_none() {
            let LoadedStage { plugin, limits, services, .. } = &self.stage;
            let (instance, descriptor) = Instance::start(plugin, limits, &self.context, services)?;
            if !self.stage.same_routes(&descriptor) {
                return Err(CallError::contract(
                    "configure declares other routes than it did when the pipeline was loaded",
                ));
            }
            self.instance = Some(instance);
            self.settled_bytes = 0;
        }
        Ok(())
    }
}

/// The end of the range that is known to hold a culprit.
fn culprit_end(failure: &CallFailure, items: usize) -> usize {
    named_culprit(failure, items).map_or(items, |culprit| culprit + 1)
}

/// The item that the plugin itself names, if it is one of the call's.
fn named_culprit(failure: &CallFailure, items: usize) -> Option<usize> {
    match failure {
        CallFailure::Answered(Failure { input: Some(input), .. }) => {
            Some(*input as usize).filter(|input| *input < items)
        }
        _ => None,
    }
}

fn last_reason(outcome: &StageOutcome) -> String {
    outcome.rejected.last().map(|rejected| rejected.reason.clone()).unwrap_or_default()
}

fn describe(failure: CallFailure) -> (String, String) {
    match failure {
        CallFailure::Dead(error) => (error.message, error.backtrace),
        CallFailure::Answered(failure) => (excerpt(failure.message.as_bytes()), String::new()),
    }
}
