//! Runs one stage over a flow, and finds the guilty record when a call fails.
//!
//! A failed call is searched piece by piece: what precedes the first guilty record is kept, the guilty
//! record is rejected alone, and the rest goes on. Three culprits in 1,000 records cost at most 34
//! calls. A trap or a timeout kills the instance; the next call gets a fresh one. Every call of a
//! search does: what one record did to the plugin's memory must not be another's fault.

use std::thread;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::cuts;
use super::flow::{self, Item};
use super::generation::LoadedStage;
use crate::config::{RejectedMax, StageLimits};
use crate::plugin::{
    CallError, Context, Failure, Instance, Outcome, Output, Reject, Span, WireBatch, excerpt,
};
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

/// One output of a stage.
#[derive(Clone, Debug)]
pub struct StageOutput {
    /// Index of the item that it came from.
    pub item: usize,
    /// Index of the route in the plugin's descriptor.
    pub route: usize,
    /// The partition key; `None` is the item's own.
    pub key: Option<Bytes>,
    /// The payload; `None` is the item's own.
    pub payload: Option<Bytes>,
}

/// The outputs of one call as the plugin wrote them, proven to keep the contract.
#[derive(Debug)]
struct Answer {
    arena: Bytes,
    outputs: Vec<u32>,
    /// The index of the call's first item.
    first_item: usize,
}

impl Answer {
    /// The outputs, sharing the arena.
    fn outputs(&self) -> impl Iterator<Item = StageOutput> {
        let (outputs, _) = self.outputs.as_chunks();
        let share = |span: Span| {
            self.arena.slice(span.start as usize..span.start as usize + span.length as usize)
        };
        outputs.iter().map(Output::from_words).map(move |output| StageOutput {
            item: output.input as usize + self.first_item,
            route: output.route as usize,
            key: output.key.map(share),
            payload: output.payload.map(share),
        })
    }
}

/// One item that the stage did not take.
#[derive(Clone, Debug)]
pub struct Rejected {
    /// Index of the item.
    pub item: usize,
    /// Why.
    pub reason: String,
    /// The plugin's stack, when it trapped.
    pub backtrace: String,
    /// The call gave no answer: it trapped or went over a limit.
    pub trapped: bool,
}

/// What a stage made of a flow.
#[derive(Debug, Default)]
pub struct StageOutcome {
    /// One for each call that went well: one in all, unless a culprit was searched for.
    answers: Vec<Answer>,
    /// What was rejected, by ascending item.
    pub rejected: Vec<Rejected>,
}

impl StageOutcome {
    /// What goes on, by ascending item.
    pub fn outputs(&self) -> impl Iterator<Item = StageOutput> {
        self.answers.iter().flat_map(Answer::outputs)
    }
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
            Ok(Ok(outcome)) => match take(items, outcome, routes, limits, first_item) {
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

/// Proves an answer against the contract and the limits. `first_item` is added to its item indexes.
fn take(
    flow: &[Item],
    outcome: Outcome,
    routes: usize,
    limits: &StageLimits,
    first_item: usize,
) -> Result<StageOutcome, CallError> {
    let Outcome { arena, outputs, rejects } = outcome;
    let items = flow.len();
    let mut last = 0;
    // Spans may share bytes, so that what goes on can be far more than what was handed back.
    let mut output_bytes = 0;
    // What came in may always pass once.
    let entered_bytes: usize = flow.iter().map(|item| item.key.len() + item.payload.len()).sum();
    let output_bytes_max = limits.output_bytes_max.max(entered_bytes);
    let words = whole(&outputs, "outputs")?;
    if words.len() > items.saturating_mul(limits.outputs_per_record_max) {
        return Err(CallError::output(format!(
            "{} outputs of {items} records, over the limit of {} each",
            words.len(),
            limits.outputs_per_record_max
        )));
    }
    for (index, output) in words.iter().map(Output::from_words).enumerate() {
        let input = output.input as usize;
        if input >= items {
            return Err(CallError::contract(format!(
                "output {index} names input {input}, which is not there"
            )));
        }
        if input < last {
            return Err(CallError::contract(format!(
                "output {index} is not in the order of the inputs"
            )));
        }
        if output.route as usize >= routes {
            return Err(CallError::contract(format!(
                "output {index} names route {}, but {routes} are declared",
                output.route
            )));
        }
        last = input;
        let item = &flow[input];
        let key = output.key.map(|key| slice(&arena, key, "the key of output", index));
        let payload = output.payload.map(|payload| slice(&arena, payload, "output", index));
        let (key, payload) = (key.transpose()?, payload.transpose()?);
        output_bytes += key.unwrap_or(&item.key).len() + payload.unwrap_or(&item.payload).len();
        // Before a key is read: to read one key of many outputs again and again takes for ever.
        if output_bytes > output_bytes_max {
            return Err(CallError::output(format!(
                "outputs of more than {output_bytes_max} bytes in all, keys included (limits.output)"
            )));
        }
        if let Some(key) = key {
            // The next stage or sink may read it as text.
            std::str::from_utf8(key).map_err(|error| {
                CallError::contract(format!("the key of output {index} is no UTF-8: {error}"))
            })?;
        }
    }
    let mut rejected = Vec::new();
    let mut rejected_before = None;
    for (index, reject) in whole(&rejects, "rejects")?.iter().map(Reject::from_words).enumerate() {
        let input = reject.input as usize;
        if input >= items || rejected_before.is_some_and(|before| input <= before) {
            return Err(CallError::contract(format!(
                "reject {index} names input {input}, which is not there, out of order, or named twice"
            )));
        }
        if words
            .binary_search_by_key(&reject.input, |words| Output::from_words(words).input)
            .is_ok()
        {
            return Err(CallError::contract(format!(
                "input {input} has both an output and a reject"
            )));
        }
        rejected_before = Some(input);
        let reason = slice(&arena, reject.reason, "the reason of reject", index)?;
        rejected.push(Rejected {
            item: input + first_item,
            // Many rejects may share one long reason.
            reason: excerpt(reason),
            backtrace: String::new(),
            trapped: false,
        });
    }
    let answer = Answer { arena: arena.into(), outputs, first_item };
    Ok(StageOutcome { answers: vec![answer], rejected })
}

/// The words, cut into records of `N`.
fn whole<'w, const N: usize>(words: &'w [u32], what: &str) -> Result<&'w [[u32; N]], CallError> {
    match words.as_chunks() {
        (records, []) => Ok(records),
        (records, rest) => Err(CallError::contract(format!(
            "its {what} end within a record: {} of {N} words follow the first {}",
            rest.len(),
            records.len()
        ))),
    }
}

/// The bytes of a span.
#[inline]
fn slice<'a>(arena: &'a [u8], span: Span, what: &str, index: usize) -> Result<&'a [u8], CallError> {
    flow::within(span, arena.len()).map(|range| &arena[range]).ok_or_else(|| {
        CallError::contract(format!(
            "{what} {index} lies outside of the answer's arena of {} bytes ({}+{})",
            arena.len(),
            span.start,
            span.length
        ))
    })
}
