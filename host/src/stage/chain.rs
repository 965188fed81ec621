//! One lane's instances of a generation: a batch in, rows for the sinks and dead letters out.

use std::collections::HashSet;
use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::answer::{Rejected, StageOutcome};
use super::flow::{self, Flow, Item};
use super::generation::{Generation, LoadedStage, SOURCE_ROUTE, Target};
use super::rejections::RejectionWindow;
use super::runner::{RunError, StageRunner};
use super::samples::Samples;
use super::spec::CanarySpec;
use crate::config::RejectedMax;
use crate::plugin::CallError;
use crate::position::{DeadLetter, LetterKey};
use crate::record::{
    Batch, Entry, LetterPlace, Record, RouteName, Row, RowRoute, ShardKey, SinkName,
};

/// A row and the sinks that it goes to.
#[derive(Debug)]
pub struct Routed {
    /// The row.
    pub row: Row,
    /// Index of the stage in the generation, and of the route in its descriptor: the sinks are
    /// `targets[route]` of that stage.
    pub stage: usize,
    /// See `stage`.
    pub route: usize,
}

/// What a batch became.
#[derive(Debug, Default)]
pub struct ChainOutcome {
    /// Rows for sinks, by ascending (position, ordinal) per stage.
    pub routed: Vec<Routed>,
    /// Records that a stage did not take.
    pub letters: Vec<DeadLetter>,
}

/// Why a batch could not be run. Nothing of it has an outcome.
#[derive(Debug)]
pub enum Blocked {
    /// The shutdown came first.
    Stopped,
    /// It may pass by itself: try the same batch again.
    Retry(String),
    /// A person must act: the plugin or the limits.
    Broken(String),
}

/// One lane's stages.
pub struct Chain {
    generation: Arc<Generation>,
    runners: Vec<Runners>,
    window: RejectionWindow,
    samples: Samples,
}

/// The instances of one stage.
struct Runners {
    own: StageRunner,
    /// The version that has some of the keys, and which.
    canary: Option<(CanarySpec, StageRunner)>,
}

impl Runners {
    /// Which instance runs which part of a flow.
    fn parts(&mut self, batch: &Batch, flow: Flow) -> Vec<(&mut StageRunner, Flow)> {
        let Some((spec, canary)) = &mut self.canary else { return vec![(&mut self.own, flow)] };
        let is_canary =
            |item: &Item| spec.takes(&batch.records[item.record as usize].partition_key);
        let (with_canary, own) = flow.into_iter().partition(is_canary);
        vec![(&mut self.own, own), (canary, with_canary)]
    }
}

impl Chain {
    /// Starts an instance of each stage for a shard.
    ///
    /// # Errors
    /// The stage whose plugin does not start, and why.
    pub fn start(
        generation: &Arc<Generation>,
        shard: &ShardKey,
        rejected_max: RejectedMax,
        samples: Samples,
        stop: &CancellationToken,
    ) -> Result<Self, CallError> {
        let start = |stage: &LoadedStage| {
            let context = stage.context(&shard.stream.name, shard.shard.as_str());
            StageRunner::start(stage.clone(), context, rejected_max, stop.clone())
        };
        let runners = generation.stages.iter().map(|stage| {
            let canary = stage
                .canary
                .as_ref()
                .map(|canary| start(&canary.stage).map(|runner| (canary.spec.clone(), runner)));
            Ok(Runners { own: start(stage)?, canary: canary.transpose()? })
        });
        Ok(Self {
            generation: generation.clone(),
            runners: runners.collect::<Result<_, CallError>>()?,
            window: RejectionWindow::new(rejected_max),
            samples,
        })
    }

    /// The generation that runs here.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }

    /// The stage that a letter names.
    fn stage_at(&self, place: &LetterPlace) -> Option<&LoadedStage> {
        let LetterPlace::Stage(name) = place else { return None };
        self.generation.stages.iter().find(|stage| stage.name == *name)
    }

    /// The sinks of a routed row.
    pub fn sinks_of<'s>(&'s self, routed: &'s Routed) -> &'s [SinkName] {
        if let Some(sink) = redriven_to(&routed.row.batch) {
            return std::slice::from_ref(sink);
        }
        match self.generation.stages.get(routed.stage).map(|stage| &stage.targets[routed.route]) {
            Some(Target::Sinks(sinks)) => sinks,
            Some(Target::Next(_)) => &[],
            None => &self.generation.spec.source_sinks,
        }
    }

    /// The stage that a batch enters, by its index, and what it gets there.
    fn enter(&self, batch: &Batch) -> Result<(usize, Flow), Blocked> {
        let Entry::Redrive(redrive) = &batch.entry else { return Ok((0, flow::first_flow(batch))) };
        let stages = &self.generation.stages;
        let is_there =
            |stage: &LoadedStage| LetterPlace::Stage(stage.name.clone()) == redrive.place;
        let index = stages.iter().position(is_there).ok_or_else(|| {
            Blocked::Broken(format!("{} is gone from the pipeline", redrive.place))
        })?;
        let upstream = &stages[index].upstream;
        let by_name = upstream.iter().position(|route| route.name == redrive.route.as_str());
        // Letters of older versions do not say how the record came; mostly there is one way.
        let only = || (redrive.route.as_str().is_empty() && upstream.len() == 1).then_some(0);
        let route = by_name.or_else(only).and_then(|route| u32::try_from(route).ok());
        let route = route.ok_or_else(|| {
            let due: Vec<&str> = upstream.iter().map(|route| route.name.as_str()).collect();
            Blocked::Broken(format!(
                "records came to {} by route {:?}, which enters it no more: due is one of {due:?}",
                redrive.place,
                redrive.route.as_str()
            ))
        })?;
        Ok((index, flow::entering_flow(batch, route)))
    }

    /// Runs a batch through all stages. Items with a dead letter in `settled` are not run again.
    ///
    /// # Errors
    /// [`Blocked`]; the batch has no outcome then and may be run again.
    pub fn run(
        &mut self,
        batch: &Arc<Batch>,
        settled: &HashSet<LetterKey>,
    ) -> Result<ChainOutcome, Blocked> {
        if self.runners.is_empty() || redriven_to(batch).is_some() {
            return Ok(ChainOutcome { routed: unchanged(batch), letters: Vec::new() });
        }
        let (first_stage, mut flow) = self.enter(batch)?;
        let mut outcome = ChainOutcome::default();
        let mut rejected_records = vec![false; batch.records.len()];
        // Rows are numbered per record over all stages: with the position, a row's identity.
        let mut rows_of_record = vec![0; batch.records.len()];
        for (index, runners) in self.runners.iter_mut().enumerate().skip(first_stage) {
            let stage = &self.generation.stages[index];
            let place = LetterPlace::Stage(stage.name.clone());
            if !settled.is_empty() {
                flow.retain(|item| {
                    let known = settled.contains(&letter_key(batch, item, &place));
                    rejected_records[item.record as usize] |= known;
                    !known
                });
            }
            metrics::counter!("shardmill_stage_records_total", "stage" => stage.name.to_string())
                .increment(flow.len() as u64);
            let bytes: usize = flow.iter().map(|item| item.payload.len()).sum();
            metrics::counter!("shardmill_stage_bytes_total", "stage" => stage.name.to_string())
                .increment(bytes as u64);
            self.samples.offer(&stage.name, batch, &flow);
            let mut on = Flow::new();
            let mut parts = runners.parts(batch, flow);
            for (runner, part) in &mut parts {
                let part = mem::take(part);
                let made = runner.run(batch, &part).map_err(|error| blocked(runner, error))?;
                for rejected in &made.rejected {
                    let item = &part[rejected.item];
                    rejected_records[item.record as usize] = true;
                    outcome.letters.push(letter(batch, item, runner, &place, rejected));
                }
                let out = Out { routed: &mut outcome.routed, on: &mut on };
                route(batch, part, &made, index, runner, out, &mut rows_of_record);
            }
            if parts.len() > 1 {
                // Each part is in order; the next stage gets both as one flow.
                on.sort_by_key(|item| (item.record, item.ordinal));
            }
            flow = on;
        }
        let mut window = self.window.clone();
        for rejected in rejected_records {
            window.count(rejected).map_err(|limit| {
                let last = outcome.letters.last();
                let stage = last.and_then(|letter| self.stage_at(&letter.key.place));
                let stage = stage.map(named).unwrap_or_default();
                let reason = last.map_or("", |letter| letter.reason.as_str());
                Blocked::Broken(format!("{stage}: {limit}; the last reason: {reason}"))
            })?;
        }
        self.window = window;
        Ok(outcome)
    }
}

/// The sink that the records enter at once, if they do.
fn redriven_to(batch: &Batch) -> Option<&SinkName> {
    match &batch.entry {
        Entry::Redrive(redrive) => match &redrive.place {
            LetterPlace::Sink(sink) => Some(sink),
            LetterPlace::Stage(_) => None,
        },
        Entry::Source => None,
    }
}

/// The records of a batch that passes no stage, as rows.
fn unchanged(batch: &Arc<Batch>) -> Vec<Routed> {
    let route = match &batch.entry {
        Entry::Redrive(redrive) => RowRoute::from(redrive.route.as_str()),
        Entry::Source => RowRoute::from(SOURCE_ROUTE),
    };
    let row = |(record, index): (&Record, u32)| Row {
        batch: batch.clone(),
        record: index,
        ordinal: 0,
        route: route.clone(),
        key: record.partition_key.clone(),
        payload: record.payload.clone(),
    };
    let rows = batch.records.iter().zip(0..).map(row);
    rows.map(|row| Routed { row, stage: 0, route: 0 }).collect()
}

/// Where a stage's outputs go.
struct Out<'o> {
    routed: &'o mut Vec<Routed>,
    on: &'o mut Flow,
}

/// Parts a stage's outputs: rows for sinks, and what goes on to the next stage.
fn route(
    batch: &Arc<Batch>,
    mut flow: Flow,
    made: &StageOutcome,
    stage: usize,
    runner: &StageRunner,
    Out { routed, on }: Out<'_>,
    rows_of_record: &mut [u32],
) {
    let loaded = runner.stage();
    // Names of the batch's own: sinks let go of their rows on other threads, and would contend with
    // those who take the next ones for a count that all share.
    let digest: Arc<str> = loaded.plugin.digest.as_str().into();
    let own_name = |name: &RouteName| RowRoute::new(name.as_str().into(), digest.clone());
    let route_names: Vec<RowRoute> = loaded.route_names.iter().map(own_name).collect();
    // Mostly a record becomes one row.
    routed.reserve(flow.len());
    let mut outputs = made.outputs().peekable();
    while let Some(output) = outputs.next() {
        let item = &mut flow[output.item];
        let record = item.record;
        // The item's last output takes what it shares over, which saves counting references.
        let is_last = outputs.peek().is_none_or(|next| next.item != output.item);
        let own = |bytes: &mut Bytes| if is_last { mem::take(bytes) } else { bytes.clone() };
        let key = output.key.unwrap_or_else(|| own(&mut item.key));
        let payload = output.payload.unwrap_or_else(|| own(&mut item.payload));
        match &loaded.targets[output.route] {
            Target::Next(upstream_route) => on.push(Item {
                record,
                ordinal: match on.last() {
                    Some(before) if before.record == record => before.ordinal + 1,
                    _ => 0,
                },
                upstream_route: *upstream_route,
                key,
                payload,
            }),
            Target::Sinks(sinks) if sinks.is_empty() => {}
            Target::Sinks(_) => routed.push(Routed {
                row: Row {
                    batch: batch.clone(),
                    record,
                    ordinal: next_ordinal(&mut rows_of_record[record as usize]),
                    route: route_names[output.route].clone(),
                    key,
                    payload,
                },
                stage,
                route: output.route,
            }),
        }
    }
}

fn next_ordinal(rows: &mut u32) -> u32 {
    let ordinal = *rows;
    *rows += 1;
    ordinal
}

fn letter_key(batch: &Batch, item: &Item, place: &LetterPlace) -> LetterKey {
    LetterKey {
        position: batch.records[item.record as usize].position.clone(),
        place: place.clone(),
        output: item.ordinal,
    }
}

fn letter(
    batch: &Batch,
    item: &Item,
    runner: &StageRunner,
    place: &LetterPlace,
    rejected: &Rejected,
) -> DeadLetter {
    let stage = runner.stage();
    let record = &batch.records[item.record as usize];
    DeadLetter {
        key: letter_key(batch, item, place),
        partition_key: record.partition_key.clone(),
        original: record.payload.clone(),
        entered_key: item.key.clone(),
        entered: item.payload.clone(),
        route: stage.upstream[item.upstream_route as usize].name.as_str().into(),
        arrived_ms: record.arrived_ms,
        plugin: format!("{}@{}", stage.descriptor.name, stage.descriptor.version),
        digest: stage.plugin.digest.to_string(),
        reason: rejected.reason.clone(),
        backtrace: rejected.backtrace.clone(),
    }
}

/// A stage and its plugin, as a person who must act looks for them.
fn named(stage: &LoadedStage) -> String {
    format!(
        "stage {} (plugin {} {}, {})",
        stage.name,
        stage.descriptor.name,
        stage.descriptor.version,
        stage.plugin.digest.short()
    )
}

fn blocked(runner: &StageRunner, error: RunError) -> Blocked {
    let plugin = named(runner.stage());
    match error {
        RunError::Stopped => Blocked::Stopped,
        RunError::AllFailed(reason) => {
            Blocked::Retry(format!("{plugin}: every record fails: {reason}"))
        }
        RunError::TooManyFailed(reason) => {
            Blocked::Broken(format!("{plugin}: too many records fail; the last reason: {reason}"))
        }
        RunError::NoInstance(error) => Blocked::Broken(format!("{plugin} does not start: {error}")),
    }
}
