//! One lane's instances of a revision: turns a batch into rows for the sinks and dead letters.
//!
//! Invariants:
//!
//! - A batch has one outcome, after all its stages. If a stage cannot finish ([`Blocked`]), nothing of the batch was
//!   delivered, or counted as rejected by the lane, and the same batch may be run again, by this revision or another.
//! - A stage gets items in the order of their records, also where a canary has run some of them. Rows keep that order
//!   per version only; the lane sorts them for each sink.
//! - An item that has a dead letter of a stage already (`dead_lettered`) is not run there again: its outcome is known,
//!   and a second run could differ from the first.
//! - A row is identified by its record's position and its number among the record's rows, over all stages. So a
//!   replay by the same revision gives the same identities.
//!
//! After [`Blocked::Later`] the batch stays in hand, and the next run goes on at the stage that asked for a retry.
//! All other failures begin again at the first stage.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::answer::{Rejected, StageOutcome};
use super::flow::{self, Flow, Item};
use super::revision::{LoadedStage, Revision, RouteTarget, SOURCE_ROUTE};
use super::runner::{RunError, StageRunner};
use super::samples::Samples;
use shardmill_config::RejectedMax;
use shardmill_core::metric;
use shardmill_core::record::{
    Arenas, Batch, DeadLetterPlace, Entry, Record, RouteName, Row, RowRoute, ShardKey, SinkName,
};
use shardmill_plugin::{CallError, CallErrorKind};
use shardmill_state::CanarySpec;
use shardmill_state::RejectionWindow;
use shardmill_state::{DeadLetter, DeadLetterKey, DeadLetteredItems, MadeBy};

/// A row and the stage and route that decide its sinks.
#[derive(Debug)]
pub struct Routed {
    /// The row.
    pub row: Row,
    /// Index of the stage in the revision, and of the route in its descriptor: the sinks are `targets[route]` of
    /// that stage.
    pub stage: usize,
    /// See `stage`.
    pub route: usize,
}

/// Outcome of a batch.
#[derive(Debug, Default)]
pub struct ChainOutcome {
    /// Rows for sinks, by ascending (position, ordinal) for each stage, and for each version if it has a canary.
    pub routed: Vec<Routed>,
    /// Dead letters of records that a stage rejected.
    pub dead_letters: Vec<DeadLetter>,
    /// Arenas that rows share with others.
    pub arenas: Arenas,
}

/// A key and a payload that enter a place of the path.
#[derive(Debug)]
pub struct Entered {
    /// The partition key.
    pub key: Bytes,
    /// The payload.
    pub payload: Bytes,
}

/// Why a batch could not be run. No record of it has an outcome.
#[derive(Debug)]
pub enum Blocked {
    /// A stop was asked for. These are the dead letters of the culprits found so far.
    Stopped(Vec<DeadLetter>),
    /// The plugin asks for a retry after a pause. The same batch goes on at the same stage.
    Later(String, Duration),
    /// The failure may pass by itself: run the same batch again.
    Retry(String),
    /// The machine was too busy for a call to finish: run the same batch again. This says nothing about the plugin.
    Starved(String),
    /// A person must act: on the plugin or the limits.
    Broken(String),
    /// The outputs would hold more memory than a lane may have in hand. This many of the first records fit, at least
    /// one and not all: they must be run separately, and the others after them.
    TooMuch(usize),
}

/// The stages of one lane.
pub struct Chain {
    revision: Arc<Revision>,
    runners: Vec<Runners>,
    window: RejectionWindow,
    samples: Samples,
    /// The batch whose stage asked for a retry.
    in_hand: Option<InHand>,
    searching: Arc<watch::Sender<Option<String>>>,
}

/// Progress of a search for culprits, as text; `None`: there is none, or it is short.
pub type Searching = watch::Receiver<Option<String>>;

/// A batch on its way through the stages.
struct InHand {
    batch: Arc<Batch>,
    outcome: ChainOutcome,
    rejected_records: Vec<bool>,
    /// Rows are numbered per record over all stages: with the position, this is a row's identity.
    rows_of_record: Vec<u32>,
    /// Index of the stage that it is at.
    stage: usize,
    /// Items that are about to enter that stage; `None`: they have, in parts.
    entering: Option<Flow>,
    /// Parts that were not run there yet.
    parts: VecDeque<Part>,
    /// Items that go on to the next stage.
    on: Flow,
}

/// A part of a flow, and whether the canary runs it.
struct Part {
    is_canary: bool,
    flow: Flow,
}

/// The instances of one stage.
struct Runners {
    own: StageRunner,
    /// The version that gets some of the keys, and which keys.
    canary: Option<(CanarySpec, StageRunner)>,
}

impl Runners {
    /// Splits a flow by the instances that run its items.
    fn parts(&self, batch: &Batch, flow: Flow) -> VecDeque<Part> {
        let Some((spec, _)) = &self.canary else {
            return [Part { is_canary: false, flow }].into();
        };
        let takes = |item: &Item| spec.takes(&batch.records[item.record as usize].partition_key);
        let (with_canary, own) = flow.into_iter().partition(takes);
        [Part { is_canary: false, flow: own }, Part { is_canary: true, flow: with_canary }].into()
    }

    /// Returns the instance that runs a part.
    fn of(&mut self, part: &Part) -> &mut StageRunner {
        match &mut self.canary {
            Some((_, canary)) if part.is_canary => canary,
            _ => &mut self.own,
        }
    }
}

impl Chain {
    /// Starts an instance of each stage for a shard.
    ///
    /// # Errors
    /// The stage whose plugin does not start, and the cause.
    pub fn start(
        revision: &Arc<Revision>,
        shard: &ShardKey,
        rejected_max: RejectedMax,
        samples: Samples,
        stop: &CancellationToken,
    ) -> Result<Self, CallError> {
        let searching = Arc::new(watch::Sender::new(None));
        let start = |stage: &LoadedStage| {
            let context = stage.context(&shard.stream.name, shard.shard.as_str());
            let runner = StageRunner::start(stage.clone(), context, rejected_max, stop.clone());
            let mut runner = runner.map_err(|error| {
                let message = format!("{} does not start: {error}", named(stage));
                CallError { message, ..error }
            })?;
            runner.show_searches(&searching);
            Ok(runner)
        };
        let runners = revision.stages.iter().map(|stage| {
            let canary = stage
                .canary
                .as_ref()
                .map(|canary| start(&canary.stage).map(|runner| (canary.spec.clone(), runner)));
            Ok(Runners { own: start(stage)?, canary: canary.transpose()? })
        });
        Ok(Self {
            revision: revision.clone(),
            runners: runners.collect::<Result<_, CallError>>()?,
            window: RejectionWindow::new(rejected_max),
            samples,
            in_hand: None,
            searching,
        })
    }

    /// Returns the progress of searches for culprits while a batch runs.
    pub fn searching(&self) -> Searching {
        self.searching.subscribe()
    }

    /// Returns the revision that runs here.
    pub fn revision(&self) -> &Arc<Revision> {
        &self.revision
    }

    /// Returns the stage that a dead letter names.
    fn stage_at(&self, place: &DeadLetterPlace) -> Option<&LoadedStage> {
        let DeadLetterPlace::Stage(name) = place else { return None };
        self.revision.stages.iter().find(|stage| stage.name == *name)
    }

    /// Returns the sinks of a routed row.
    pub(crate) fn sinks_of<'s>(&'s self, routed: &'s Routed) -> &'s [SinkName] {
        if let Some(sink) = redriven_to(&routed.row.batch) {
            return std::slice::from_ref(sink);
        }
        match self.revision.stages.get(routed.stage).map(|stage| &stage.targets[routed.route]) {
            Some(RouteTarget::Sinks(sinks)) => sinks,
            Some(RouteTarget::Next(_)) => &[],
            None => &self.revision.spec.source_sinks,
        }
    }

    /// Returns the index of the stage that a batch enters, and its items there.
    fn enter(&self, batch: &Batch) -> Result<(usize, Flow), Blocked> {
        let Entry::Redrive(redrive) = &batch.entry else { return Ok((0, flow::first_flow(batch))) };
        let stages = &self.revision.stages;
        let is_there =
            |stage: &LoadedStage| DeadLetterPlace::Stage(stage.name.clone()) == redrive.place;
        let index = stages.iter().position(is_there).ok_or_else(|| {
            Blocked::Broken(format!("{} is missing from the pipeline", redrive.place))
        })?;
        let upstream = &stages[index].upstream;
        let by_name = upstream.iter().position(|route| route.name == redrive.route.as_str());
        // Dead letters of older versions do not store the route; usually there is only one.
        let only = || (redrive.route.as_str().is_empty() && upstream.len() == 1).then_some(0);
        let route = by_name.or_else(only).and_then(|route| u32::try_from(route).ok());
        let route = route.ok_or_else(|| {
            let expected: Vec<&str> = upstream.iter().map(|route| route.name.as_str()).collect();
            Blocked::Broken(format!(
                "unknown route into {}: expected one of {expected:?}, found {:?}",
                redrive.place,
                redrive.route.as_str()
            ))
        })?;
        Ok((index, flow::entering_flow(batch, route)))
    }

    /// Runs a batch through all stages. Items with a dead letter in `dead_lettered` are not run again.
    ///
    /// # Errors
    /// [`Blocked`]; the batch has no outcome then and may be run again.
    pub fn run(
        &mut self,
        batch: &Arc<Batch>,
        dead_lettered: &DeadLetteredItems,
    ) -> Result<ChainOutcome, Blocked> {
        if self.runners.is_empty() || redriven_to(batch).is_some() {
            return Ok(ChainOutcome { routed: unchanged(batch), ..ChainOutcome::default() });
        }
        let mut run = match self.in_hand.take() {
            Some(run) if Arc::ptr_eq(&run.batch, batch) => run,
            _ => self.begin(batch)?,
        };
        while run.stage < self.runners.len() {
            if let Err(why) = self.run_stage(&mut run, dead_lettered) {
                if matches!(why, Blocked::Later(..)) {
                    self.in_hand = Some(run);
                }
                return Err(why);
            }
        }
        self.count(run.outcome, run.rejected_records)
    }

    /// Runs a batch up to a place, and returns the items that enter there. Nothing is delivered or counted as
    /// rejected. After [`Blocked::Later`] the same batch goes on at the same stage.
    ///
    /// # Errors
    /// [`Blocked`].
    pub fn entering(
        &mut self,
        batch: &Arc<Batch>,
        place: &DeadLetterPlace,
    ) -> Result<Vec<Entered>, Blocked> {
        let end = match place {
            DeadLetterPlace::Sink(_) => self.runners.len(),
            DeadLetterPlace::Stage(name) => {
                let mut stages = self.revision.stages.iter();
                stages.position(|stage| stage.name == *name).ok_or_else(|| {
                    Blocked::Broken(format!("revision {} has no {place}", self.revision.id))
                })?
            }
        };
        let mut run = match self.in_hand.take() {
            Some(run) if Arc::ptr_eq(&run.batch, batch) => run,
            _ => self.begin(batch)?,
        };
        while run.stage < end {
            if let Err(why) = self.run_stage(&mut run, &DeadLetteredItems::default()) {
                if matches!(why, Blocked::Later(..)) {
                    self.in_hand = Some(run);
                }
                return Err(why);
            }
        }
        let DeadLetterPlace::Sink(sink) = place else {
            let flow = run.entering.unwrap_or_default();
            let entered = |item: Item| Entered { key: item.key, payload: item.payload };
            return Ok(flow.into_iter().map(entered).collect());
        };
        let rows = run.outcome.routed.into_iter();
        let rows = rows.filter(|routed| self.sinks_of(routed).contains(sink));
        Ok(rows.map(|Routed { row, .. }| Entered { key: row.key, payload: row.payload }).collect())
    }

    /// Makes a batch that has not entered its first stage.
    fn begin(&self, batch: &Arc<Batch>) -> Result<InHand, Blocked> {
        let (stage, flow) = self.enter(batch)?;
        Ok(InHand {
            batch: batch.clone(),
            outcome: ChainOutcome::default(),
            rejected_records: vec![false; batch.records.len()],
            rows_of_record: vec![0; batch.records.len()],
            stage,
            entering: Some(flow),
            parts: VecDeque::new(),
            on: Flow::new(),
        })
    }

    /// Takes a batch through the stage that it is at. After [`Blocked::Later`] it goes on there.
    fn run_stage(
        &mut self,
        run: &mut InHand,
        dead_lettered: &DeadLetteredItems,
    ) -> Result<(), Blocked> {
        let (index, batch) = (run.stage, run.batch.clone());
        let revision = &self.revision.id;
        let stage = &self.revision.stages[index];
        let place = DeadLetterPlace::Stage(stage.name.clone());
        let runners = &mut self.runners[index];
        if let Some(mut flow) = run.entering.take() {
            if !dead_lettered.is_empty() {
                flow.retain(|item| {
                    let known = dead_lettered.contains(&dead_letter_key(&batch, item, &place));
                    run.rejected_records[item.record as usize] |= known;
                    !known
                });
            }
            metrics::counter!(metric::STAGE_RECORDS_TOTAL, "stage" => stage.name.to_string())
                .increment(flow.len() as u64);
            let bytes: usize = flow.iter().map(|item| item.payload.len()).sum();
            metrics::counter!(metric::STAGE_BYTES_TOTAL, "stage" => stage.name.to_string())
                .increment(bytes as u64);
            self.samples.offer(&stage.name, &batch, &flow);
            run.parts = runners.parts(&batch, flow);
        }
        while let Some(part) = run.parts.front() {
            let runner = runners.of(part);
            let mut made = match runner.run(&batch, &part.flow) {
                Ok(made) => made,
                Err(RunError::Stopped(found)) => {
                    let mut dead_letters = mem::take(&mut run.outcome.dead_letters);
                    let author = Author::of(runner.stage());
                    let of = |rejected: Rejected| {
                        let item = &part.flow[rejected.item];
                        dead_letter(&batch, item, &author, &place, rejected, revision)
                    };
                    dead_letters.extend(found.into_iter().map(of));
                    return Err(Blocked::Stopped(dead_letters));
                }
                Err(error) => return Err(blocked(runner, error)),
            };
            if !made.rejected.is_empty() {
                let author = Author::of(runner.stage());
                run.outcome.dead_letters.reserve_exact(made.rejected.len());
                for rejected in mem::take(&mut made.rejected) {
                    let item = &part.flow[rejected.item];
                    run.rejected_records[item.record as usize] = true;
                    let dead_letter =
                        dead_letter(&batch, item, &author, &place, rejected, revision);
                    run.outcome.dead_letters.push(dead_letter);
                }
            }
            let Some(Part { flow, .. }) = run.parts.pop_front() else { break };
            made.arenas().for_each(|arena| run.outcome.arenas.add(arena.clone()));
            let out = Out { routed: &mut run.outcome.routed, on: &mut run.on };
            route(&batch, flow, &made, index, runner, out, &mut run.rows_of_record);
        }
        if runners.canary.is_some() {
            // Each part is in order; the next stage gets both as one flow.
            run.on.sort_by_key(|item| (item.record, item.ordinal));
        }
        // Answers that no output uses any more are freed before the next stage makes another.
        run.outcome.arenas.forget_unused();
        run.entering = Some(mem::take(&mut run.on));
        run.stage += 1;
        Ok(())
    }

    /// Counts the rejected records of a batch that has passed all stages.
    fn count(
        &mut self,
        outcome: ChainOutcome,
        rejected_records: Vec<bool>,
    ) -> Result<ChainOutcome, Blocked> {
        let mut window = self.window.clone();
        for rejected in rejected_records {
            window.count(rejected).map_err(|limit| {
                let last = outcome.dead_letters.last();
                let stage = last.and_then(|dead_letter| self.stage_at(&dead_letter.key.place));
                let stage = stage.map(named).unwrap_or_default();
                let reason = last.map_or("", |dead_letter| dead_letter.reason.as_str());
                Blocked::Broken(format!("{stage}: {limit}; the last reason: {reason}"))
            })?;
        }
        self.window = window;
        Ok(outcome)
    }
}

/// Returns the sink that the records enter directly, if a redrive says so.
fn redriven_to(batch: &Batch) -> Option<&SinkName> {
    match &batch.entry {
        Entry::Redrive(redrive) => match &redrive.place {
            DeadLetterPlace::Sink(sink) => Some(sink),
            DeadLetterPlace::Stage(_) => None,
        },
        Entry::Source => None,
    }
}

/// Returns the records of a batch that passes no stage, as rows.
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

/// Destinations of a stage's outputs.
struct Out<'o> {
    routed: &'o mut Vec<Routed>,
    on: &'o mut Flow,
}

/// Splits a stage's outputs into rows for sinks and items for the next stage.
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
    // Each batch has its own copy of the names: sinks drop their rows on other threads, and would contend for one
    // reference count with the threads that clone the names of the next rows.
    let digest: Arc<str> = loaded.plugin.digest.as_str().into();
    let own_name = |name: &RouteName| RowRoute::new(name.as_str().into(), digest.clone());
    let route_names: Vec<RowRoute> = loaded.route_names.iter().map(own_name).collect();
    routed.reserve(made.output_count());
    let mut outputs = made.outputs().peekable();
    while let Some(output) = outputs.next() {
        let item = &mut flow[output.item];
        let record = item.record;
        // The item's last output takes the shared bytes over, which saves reference counting.
        let is_last = outputs.peek().is_none_or(|next| next.item != output.item);
        let own = |bytes: &mut Bytes| if is_last { mem::take(bytes) } else { bytes.clone() };
        let key = output.key.unwrap_or_else(|| own(&mut item.key));
        let payload = output.payload.unwrap_or_else(|| own(&mut item.payload));
        match &loaded.targets[output.route] {
            RouteTarget::Next(upstream_route) => on.push(Item {
                record,
                ordinal: match on.last() {
                    Some(before) if before.record == record => before.ordinal + 1,
                    _ => 0,
                },
                upstream_route: *upstream_route,
                key,
                payload,
            }),
            RouteTarget::Sinks(sinks) if sinks.is_empty() => {}
            RouteTarget::Sinks(_) => routed.push(Routed {
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

fn dead_letter_key(batch: &Batch, item: &Item, place: &DeadLetterPlace) -> DeadLetterKey {
    DeadLetterKey {
        position: batch.records[item.record as usize].position.clone(),
        place: place.clone(),
        output: item.ordinal,
    }
}

/// Parts that the dead letters of a stage have in common, because one record may have thousands.
struct Author<'s> {
    stage: &'s LoadedStage,
    plugin: Arc<str>,
    digest: Arc<str>,
    /// The routes by which items came, in the order of the stage's upstream.
    routes: Vec<RouteName>,
}

impl<'s> Author<'s> {
    fn of(stage: &'s LoadedStage) -> Self {
        let name = format!("{}@{}", stage.descriptor.name, stage.descriptor.version);
        let routes = stage.upstream.iter().map(|route| route.name.as_str().into());
        Self {
            stage,
            plugin: name.into(),
            digest: stage.plugin.digest.as_str().into(),
            routes: routes.collect(),
        }
    }
}

fn dead_letter(
    batch: &Batch,
    item: &Item,
    author: &Author<'_>,
    place: &DeadLetterPlace,
    rejected: Rejected,
    revision: &Arc<str>,
) -> DeadLetter {
    let record = &batch.records[item.record as usize];
    DeadLetter {
        key: dead_letter_key(batch, item, place),
        partition_key: record.partition_key.clone(),
        original: record.payload.clone(),
        entered_key: item.key.clone(),
        entered: item.payload.clone(),
        route: author.routes[item.upstream_route as usize].clone(),
        arrived_ms: record.arrived_ms,
        plugin: author.plugin.clone(),
        digest: author.digest.clone(),
        // The plugin may quote its input.
        reason: author.stage.services.values.hide(rejected.reason),
        backtrace: rejected.backtrace,
        made: MadeBy::of(batch, revision),
    }
}

/// Names a stage and its plugin as a person needs them to find it.
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
    // The plugin may quote its input.
    let hidden = |said: String| runner.stage().services.values.hide(said);
    match error {
        RunError::Stopped(_) => Blocked::Stopped(Vec::new()),
        RunError::Later(reason, pause) => {
            Blocked::Later(hidden(format!("{plugin}: asks for a retry: {reason}")), pause)
        }
        RunError::AllFailed(reason) => {
            Blocked::Retry(hidden(format!("{plugin}: every record fails: {reason}")))
        }
        RunError::TooManyFailed(reason) => {
            let said = format!("{plugin}: too many records fail; the last reason: {reason}");
            Blocked::Broken(hidden(said))
        }
        RunError::NoInstance(error) if error.kind == CallErrorKind::Starved => {
            Blocked::Starved(format!("{plugin} does not start: {error}"))
        }
        // The cause of a failed `configure` may pass, such as a time of day.
        RunError::NoInstance(error) => Blocked::Retry(format!("{plugin} does not start: {error}")),
        RunError::Starved(reason) => Blocked::Starved(format!("{plugin}: {reason}")),
        RunError::TooMuch(record) => Blocked::TooMuch(record as usize),
    }
}
