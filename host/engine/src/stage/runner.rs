//! Runs one stage over a flow, and finds the culprit when a call fails.
//!
//! Invariant: a record is rejected only for what it does alone, in a fresh instance, within the full time limit of
//! one record. Everything else (a failed call with several records, a short deadline, a busy machine) is only a
//! suspicion.
//!
//! A failed call is searched piece by piece: the records before the first culprit keep their outcome, the culprit is
//! rejected alone, and the rest goes on. `cuts.rs` decides how many records the next call gets; three culprits in
//! 1,000 records need at most 34 calls. Each call of a search gets a fresh instance, because what one record did to
//! the plugin's memory must not become the fault of another.
//!
//! | a call | what follows |
//! |---|---|
//! | succeeds | its outcome is kept |
//! | the plugin answers "retryable" | the caller waits and calls again, up to `limits.retry`; then a search |
//! | traps, exceeds a limit, or breaks the contract | the instance is dropped; a search |
//! | a failure that names a record | the records before it run next, then that record alone |
//! | a busy machine did not let it finish | nothing is known about the records: the caller runs the flow again |
//!
//! | a search ends with | outcome |
//! |---|---|
//! | all records have an outcome | the flow's outcome |
//! | all records fail, and the plugin says "retryable" | none (`AllFailed`): a dependency may be down |
//! | more records fail than a lane may reject | none (`TooManyFailed`): a broken plugin must not empty the stream |
//! | the outcomes would hold too much memory | none (`TooMuch`): the first records are run separately |
//! | a stop | none (`Stopped`), with the culprits found so far |
//!
//! A search of records that loop would take a full deadline per call. So after the first timeout the pieces have a
//! shorter limit ([`PieceTime`]), and records that ran out of time are remembered ([`super::endless`]): the next run of
//! their batch calls them alone from the start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::answer::{self, Rejected, StageOutcome};
use super::cuts;
use super::flow::{self, Item};
use super::revision::LoadedStage;
use shardmill_config::{RejectedMax, StageLimits};
use shardmill_core::metric;
use shardmill_core::record::Batch;
use shardmill_core::record::excerpt;
use shardmill_core::retry::{Retries, RetryPolicy};
use shardmill_plugin::{CallError, CallErrorKind, Context, Failure, Instance, WireBatch};

/// Retries of a call that its plugin asked for.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(100), Duration::from_secs(10)).with_jitter();
/// Bytes that each buffer of a runner may keep for the next call: more than a usual batch has.
const WIRE_BYTES_KEPT: usize = 1 << 20;
/// Time after which a search is shown.
const SEARCH_SHOWN_AFTER: Duration = Duration::from_secs(1);
/// Limit of a search's piece, as a multiple of the usual time of its records.
const USUAL_TIMES: f64 = 10.0;
/// Usual time from which a call is measured by the thread's clock: reading that clock twice takes up to 2 µs.
const MEASURED_FROM: Duration = Duration::from_micros(200);
/// Weight of the latest call in the moving average of the usual time.
const USUAL_SHARE: f64 = 0.2;

/// One stage of one lane: the plugin's instance and the buffers that its calls reuse.
pub struct StageRunner {
    stage: LoadedStage,
    context: Context,
    instance: Option<Instance>,
    /// Linear memory of the instance after its first call, in bytes.
    baseline_bytes: usize,
    wire: WireBatch,
    rejected_max: RejectedMax,
    stop: CancellationToken,
    /// Retries of the flow in hand that the plugin has asked for.
    retries: Option<Retries>,
    /// Usual time of a record in nanoseconds; 0: unknown.
    usual_ns: f64,
    /// CPU time of the calls of the run under way. It does not depend on how busy the machine is.
    busy: Duration,
    /// Consecutive calls for which the machine was too busy. Counted over whole runs, because a search begins again
    /// after each.
    starved: u32,
    /// Shows the progress of a search.
    searching: Option<Arc<watch::Sender<Option<String>>>>,
}

/// Why a run has no outcome.
#[derive(Debug)]
pub enum RunError {
    /// A stop was asked for during a search; the culprits found so far.
    Stopped(Vec<Rejected>),
    /// The plugin asks for a retry of the same flow after a pause, for this reason.
    Later(String, Duration),
    /// Every record failed, for a reason that the plugin calls retryable.
    AllFailed(String),
    /// More records failed than a lane may reject; the last reason.
    TooManyFailed(String),
    /// No instance can be started.
    NoInstance(CallError),
    /// The machine was too busy for a call to finish: no record is at fault, and the flow must be run again.
    Starved(String),
    /// The outcomes of a search would hold too much memory together. Those of the records before this one (there is
    /// at least one) fit: these must be run first, and the others after them.
    TooMuch(u32),
}

/// A failed call.
enum CallFailure {
    /// The instance is dead, or its answer broke the contract.
    Dead(CallError),
    /// The plugin answered with a failure.
    Answered(Failure),
}

impl StageRunner {
    /// Makes a runner and starts its instance, so that an invalid configuration shows early.
    ///
    /// # Errors
    /// The plugin's error about its configuration.
    pub fn start(
        stage: LoadedStage,
        context: Context,
        rejected_max: RejectedMax,
        stop: CancellationToken,
    ) -> Result<Self, CallError> {
        let wire = WireBatch { arena: Vec::new(), inputs: Vec::new() };
        let mut runner = Self {
            stage,
            context,
            instance: None,
            baseline_bytes: 0,
            wire,
            rejected_max,
            stop,
            retries: None,
            usual_ns: 0.0,
            busy: Duration::ZERO,
            starved: 0,
            searching: None,
        };
        runner.instance()?;
        Ok(runner)
    }

    /// Returns the stage.
    pub fn stage(&self) -> &LoadedStage {
        &self.stage
    }

    /// Sets where searches that take long are shown.
    pub(super) fn show_searches(&mut self, searching: &Arc<watch::Sender<Option<String>>>) {
        self.searching = Some(searching.clone());
    }

    /// Returns the linear memory of the instance in bytes; 0 while there is none.
    pub fn memory_bytes(&self) -> usize {
        self.instance.as_ref().map_or(0, Instance::memory_bytes)
    }

    /// Calls once with the items, without a search for the culprit if that fails. An empty list is
    /// accepted; a lane never passes one.
    ///
    /// # Errors
    /// Why the call failed, in words.
    pub fn run_once(&mut self, batch: &Batch, items: &[Item]) -> Result<StageOutcome, String> {
        match self.call(batch, items, 0, self.stage.limits.call_ms_max(items.len())) {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(failure)) => Err(describe(failure).0),
            Err(RunError::NoInstance(error)) => Err(error.message),
            Err(RunError::Starved(reason)) => Err(reason),
            Err(error) => Err(format!("{error:?}")),
        }
    }

    /// Runs the first items whose outcomes fit in memory together, usually all of them. Returns these items too.
    ///
    /// # Errors
    /// [`RunError`]; no item of the flow has an outcome then.
    pub fn run_first<'i>(
        &mut self,
        batch: &Batch,
        items: &'i [Item],
    ) -> Result<(&'i [Item], StageOutcome), RunError> {
        let mut first = items;
        loop {
            match self.run(batch, first) {
                Err(RunError::TooMuch(record)) => first = flow::before(first, record),
                ran => return ran.map(|outcome| (first, outcome)),
            }
        }
    }

    /// Runs the items. Every one has an outcome afterwards: outputs, a rejection, or neither (filtered).
    ///
    /// # Errors
    /// [`RunError`]; no item of the flow has an outcome then.
    pub fn run(&mut self, batch: &Batch, items: &[Item]) -> Result<StageOutcome, RunError> {
        if items.is_empty() {
            return Ok(StageOutcome::default());
        }
        let begun = Instant::now();
        self.busy = Duration::ZERO;
        // A record that ran out of time before must not take the time of its whole batch again.
        let known = self.stage.endless.among(batch, items);
        let outcome = if known.is_empty() {
            match self.call_patiently(batch, items)? {
                Ok(outcome) => outcome,
                Err(failure) => self.search(batch, items, Some(failure), &known, begun)?,
            }
        } else {
            self.search(batch, items, None, &known, begun)?
        };
        self.starved = 0;
        self.stage.health.ran(items.len(), outcome.rejected.len(), self.busy);
        Ok(outcome)
    }

    /// Calls with all items. If the plugin answers with a retryable failure, the caller waits and calls again: a
    /// wait here would occupy a thread.
    fn call_patiently(
        &mut self,
        batch: &Batch,
        items: &[Item],
    ) -> Result<Result<StageOutcome, CallFailure>, RunError> {
        let answer = self.call(batch, items, 0, self.stage.limits.call_ms_max(items.len()))?;
        let retries = self.retries.take();
        match answer {
            Err(CallFailure::Answered(failure)) if failure.retryable => {
                let retry_for = Duration::from_millis(self.stage.limits.retry_ms_max);
                let mut retries = retries.unwrap_or_else(|| RETRY.within(retry_for).start());
                let Some(pause) = retries.next_pause_or_end() else {
                    return Ok(Err(CallFailure::Answered(failure)));
                };
                metrics::counter!(metric::STAGE_RETRIES_TOTAL,
                    "stage" => self.stage.name.to_string())
                .increment(1);
                self.retries = Some(retries);
                Err(RunError::Later(excerpt(failure.message.as_bytes()), pause))
            }
            answer => Ok(answer),
        }
    }

    /// Finds the culprits, rejects them alone and keeps the outcomes of all others. `known` are items that ran out
    /// of time before; without a `first` failure nothing else is known to fail.
    fn search(
        &mut self,
        batch: &Batch,
        items: &[Item],
        first: Option<CallFailure>,
        known: &[usize],
        begun: Instant,
    ) -> Result<StageOutcome, RunError> {
        let found = self.search_pieces(batch, items, first, known, begun);
        if let Some(searching) = &self.searching {
            searching.send_if_modified(|shown| shown.take().is_some());
        }
        found
    }

    fn search_pieces(
        &mut self,
        batch: &Batch,
        items: &[Item],
        first: Option<CallFailure>,
        known: &[usize],
        begun: Instant,
    ) -> Result<StageOutcome, RunError> {
        let retryable = matches!(&first, Some(CallFailure::Answered(failure)) if failure.retryable);
        let mut piece_time = PieceTime::new(&self.stage.limits);
        piece_time.is_used = !known.is_empty() || first.as_ref().is_some_and(ran_out_of_time);
        let mut culprits = 0;
        let mut failed_in_a_row = 0;
        let mut kept = StageOutcome::default();
        let occupied_bytes_max = answer::occupied_bytes_max(items, &self.stage.limits);
        // Items before `done` have their outcome; `suspect_end` bounds a range known to fail.
        let mut done = 0;
        let mut suspect_end = first.as_ref().map_or(0, |first| culprit_end(first, items.len()));
        let mut named = first.as_ref().and_then(|first| named_culprit(first, items.len()));
        while done < items.len() {
            if self.stop.is_cancelled() {
                return Err(RunError::Stopped(kept.rejected));
            }
            self.show_search(begun, done, items.len(), culprits);
            let mut end = match named.take() {
                // The plugin named the record: the records before it run first, without it.
                Some(culprit) if culprit > done => culprit,
                _ => {
                    let suspects = suspect_end.saturating_sub(done);
                    done + cuts::next_call(items.len() - done, suspects, culprits)
                }
            };
            match known.iter().find(|known| **known >= done) {
                // A known item is run alone, and the pieces before it end there.
                Some(known) if *known == done => end = done + 1,
                Some(known) => end = end.min(*known),
                None => {}
            }
            let is_alone = end == done + 1;
            let limit_ms = piece_time.limit_ms(end - done, self.usual_ns, &self.stage.limits);
            self.instance = None;
            let answer = self.call(batch, &items[done..end], done, limit_ms)?;
            // Each single call fits, but without this check a search would hold as many answers as it makes calls.
            let has_room = |outcome: &StageOutcome| {
                done == 0 || kept.occupied_bytes() + outcome.occupied_bytes() <= occupied_bytes_max
            };
            let answer = match answer {
                Ok(outcome) if !has_room(&outcome) => {
                    let record = items[done].record;
                    if record > items[0].record {
                        return Err(RunError::TooMuch(record));
                    }
                    // These items belong to one record, so they cannot be run in parts.
                    Err(CallFailure::Dead(CallError::output(format!(
                        "the outputs of one record at this stage hold more than {occupied_bytes_max} bytes ({})",
                        self.stage.limits.answer_bound()
                    ))))
                }
                answer => answer,
            };
            match answer {
                Ok(outcome) => {
                    if is_alone && suspect_end == end {
                        piece_time.lengthen();
                    }
                    kept.add(outcome);
                    done = end;
                    failed_in_a_row = 0;
                }
                Err(failure) if is_alone => {
                    if ran_out_of_time(&failure) {
                        piece_time.is_used = true;
                        self.stage.endless.note(batch, &items[done]);
                    }
                    let trapped = matches!(failure, CallFailure::Dead(_));
                    let (reason, backtrace) = describe(failure);
                    culprits += 1;
                    failed_in_a_row += 1;
                    kept.rejected.push(Rejected { item: done, reason, backtrace, trapped });
                    done += 1;
                    suspect_end = done;
                    // A search of records that all fail would take minutes to find what is clear already.
                    if failed_in_a_row > self.rejected_max.in_a_row
                        || kept.rejected.len() > self.rejected_max.of_last_1000 as usize
                    {
                        return Err(RunError::TooManyFailed(last_reason(&kept)));
                    }
                }
                Err(failure) => {
                    piece_time.is_used |= ran_out_of_time(&failure);
                    named = named_culprit(&failure, end - done).map(|item| item + done);
                    suspect_end = done + culprit_end(&failure, end - done);
                }
            }
        }
        if retryable && kept.rejected.len() == items.len() {
            return Err(RunError::AllFailed(last_reason(&kept)));
        }
        Ok(kept)
    }

    fn show_search(&self, begun: Instant, done: usize, items: usize, culprits: usize) {
        if let (Some(searching), true) = (&self.searching, begun.elapsed() >= SEARCH_SHOWN_AFTER) {
            searching.send_replace(Some(format!(
                "stage {}: searching for the records that fail: {done} of {items} records done, \
                 {culprits} found",
                self.stage.name
            )));
        }
    }

    /// Calls the plugin once, with the items from `first_item` on.
    fn call(
        &mut self,
        batch: &Batch,
        items: &[Item],
        first_item: usize,
        limit_ms: u64,
    ) -> Result<Result<StageOutcome, CallFailure>, RunError> {
        flow::pack(batch, items, &mut self.wire);
        self.instance().map_err(RunError::NoInstance)?;
        let Some(instance) = self.instance.as_mut() else { unreachable!("started above") };
        metrics::counter!(metric::STAGE_CALLS_TOTAL, "stage" => self.stage.name.to_string())
            .increment(1);
        instance.starved_before(self.starved);
        let usual = Duration::from_nanos((self.usual_ns * items.len() as f64) as u64);
        instance.measured(self.usual_ns == 0.0 || usual >= MEASURED_FROM);
        let begun = Instant::now();
        let answer = instance.process(&self.wire, limit_ms);
        let took = instance.busy(begun.elapsed());
        self.busy += took;
        forget_large(&mut self.wire);
        metrics::gauge!(metric::STAGE_MEMORY_BYTES,
            "stage" => self.stage.name.to_string(), "shard" => self.context.shard_id.clone())
        .set(instance.memory_bytes() as f64);
        let memory_bytes = instance.memory_bytes();
        let routes = self.stage.descriptor.routes.len();
        let limits = &self.stage.limits;
        Ok(match answer {
            Ok(Ok(outcome)) => match answer::validate(items, outcome, routes, limits, first_item) {
                Ok(outcome) => {
                    self.learn_usual(took, items.len());
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
            Err(error) if error.kind == CallErrorKind::Starved => {
                self.instance = None;
                self.starved = self.starved.saturating_add(1);
                self.count_starved();
                return Err(RunError::Starved(error.message));
            }
            Err(error) => {
                self.instance = None;
                self.stage.health.trapped();
                metrics::counter!(metric::STAGE_TRAPS_TOTAL,
                    "stage" => self.stage.name.to_string())
                .increment(1);
                Err(CallFailure::Dead(error))
            }
        })
    }

    /// Updates the usual time of a record.
    fn learn_usual(&mut self, took: Duration, items: usize) {
        let own_ns = took.as_nanos() as f64 / items.max(1) as f64;
        self.usual_ns = match self.usual_ns == 0.0 {
            true => own_ns,
            false => self.usual_ns + (own_ns - self.usual_ns) * USUAL_SHARE,
        };
    }

    /// Drops an instance that has leaked half of its memory limit: a fresh one costs less than the failed call and
    /// the search that would follow. What an instance remembers is a cache.
    fn renew_if_leaking(&mut self, memory_bytes: usize) {
        if self.baseline_bytes == 0 {
            self.baseline_bytes = memory_bytes;
        }
        let leaked_bytes = memory_bytes - self.baseline_bytes.min(memory_bytes);
        if leaked_bytes > self.stage.limits.memory_bytes_max / 2 {
            self.instance = None;
            metrics::counter!(metric::STAGE_RENEWALS_TOTAL,
                "stage" => self.stage.name.to_string())
            .increment(1);
        }
    }

    /// Starts an instance if there is none.
    fn instance(&mut self) -> Result<(), CallError> {
        if self.instance.is_none() {
            let started = self.stage.start(&self.context);
            if started.as_ref().is_err_and(|error| error.kind == CallErrorKind::Starved) {
                self.count_starved();
            }
            self.instance = Some(started?);
            self.baseline_bytes = 0;
        }
        Ok(())
    }

    /// Counts a call for which the machine was too busy.
    fn count_starved(&self) {
        metrics::counter!(metric::STAGE_STARVED_TOTAL, "stage" => self.stage.name.to_string())
            .increment(1);
    }
}

/// Frees buffers that one large batch has made large; otherwise they would stay so until the lane ends.
fn forget_large(wire: &mut WireBatch) {
    if wire.arena.capacity() > WIRE_BYTES_KEPT {
        wire.arena = Vec::new();
    }
    if wire.inputs.capacity() * size_of::<u32>() > WIRE_BYTES_KEPT {
        wire.inputs = Vec::new();
    }
}

/// Shorter limits for the pieces of a search once a call has run out of time. With the limit of its size, each piece
/// that holds an endless record would take the time of a whole batch. A piece that exceeds the shorter limit is only
/// suspected: a rejected record has had the full limit of a record, alone.
struct PieceTime {
    is_used: bool,
    piece_ms: u64,
}

impl PieceTime {
    fn new(limits: &StageLimits) -> Self {
        Self { is_used: false, piece_ms: (limits.record_ms_max / 4).max(1) }
    }

    /// Returns the limit of a call with this many records, each of which usually takes `usual_ns`.
    fn limit_ms(&self, records: usize, usual_ns: f64, limits: &StageLimits) -> u64 {
        let limit_ms = limits.call_ms_max(records);
        if !self.is_used || records == 1 {
            return limit_ms;
        }
        let usual_ms = usual_ns * records as f64 * USUAL_TIMES / 1e6;
        limit_ms.min(self.piece_ms.max(usual_ms as u64))
    }

    /// Notes that no record of a suspected piece ran out of time alone: the limit was too short.
    fn lengthen(&mut self) {
        self.piece_ms = self.piece_ms.saturating_mul(4);
    }
}

fn ran_out_of_time(failure: &CallFailure) -> bool {
    matches!(failure, CallFailure::Dead(error) if error.kind == CallErrorKind::Timeout)
}

/// Returns the end of the range that is known to hold a culprit.
fn culprit_end(failure: &CallFailure, items: usize) -> usize {
    named_culprit(failure, items).map_or(items, |culprit| culprit + 1)
}

/// Returns the item that the plugin named, if it belongs to the call.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_41_a_piece_of_a_search_has_less_time_than_its_size_would_give() {
        let limits = StageLimits::default();
        let mut piece_time = PieceTime::new(&limits);
        assert_eq!(piece_time.limit_ms(256, 0.0, &limits), 2_000, "nothing has run out of time");
        piece_time.is_used = true;
        for (records, usual_ns, expected_ms) in [
            (256, 0.0, 125),
            (256, 100_000.0, 256),
            (256, 1e9, 2_000),
            (2, 0.0, 125),
            (1, 0.0, 500),
        ] {
            let found_ms = piece_time.limit_ms(records, usual_ns, &limits);
            assert_eq!(found_ms, expected_ms, "{records} records of {usual_ns} ns");
        }
        piece_time.lengthen();
        assert_eq!(piece_time.limit_ms(256, 0.0, &limits), 500);
    }
}
