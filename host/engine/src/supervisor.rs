//! Runs a pipeline: validates everything and acquires the state before the first record, then runs one lane per
//! shard.
//!
//! [`Supervisor::prepare`] loads the plugins, checks them against each other and the sinks, and reads no record.
//! [`Supervisor::run`] is one loop over events: a lane ended, lanes must restart for a change, it is time to look
//! for shards, a look has finished, the state is gone, a stop.
//!
//! Invariants:
//!
//! - A shard's lane starts only after the start of the shard is durable (`find`), and after its parents have ended.
//! - The state is compared with the sinks before the first record (`Comparison`), and again after each restart of
//!   the lanes, because the sinks may be others then.
//! - A restart for a change begins only when every lane has ended: whether the lanes can begin depends on what their
//!   sinks have committed by then.
//!
//! | a lane ends with | what follows |
//! |---|---|
//! | the end of the shard | a look for its children, at once |
//! | the end of the source | the run ends when nothing else is read |
//! | stopped | nothing |
//! | an error that may pass | the lane restarts, with backoff (`run_patiently`) |
//! | an error that a person must resolve | the run stops; the other lanes are drained first |
//!
//! Races that this module handles:
//!
//! - A shard ends while a look for shards is under way: the look is dropped and repeated, because it may not know of
//!   the end, and the children must not wait for the next interval.
//! - Two processes with separate states acquire each other's shards in turn: the one that started later gives up
//!   after it has lost one shard to the other three times within a minute.
//! - A stop while lanes restart for a change: the restart is dropped.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::bound::MemoryBound;
use crate::lane::BuildSinks;
use crate::lane::agreement::{FoundShards, before_first_record};
use crate::lane::{
    LaneEnd, LaneError, RevisionStore, Shared, Starts, StatusRegistry, roster, show_waits,
    sinks_budget,
};
use crate::lock::PipelineLock;
use crate::pipeline::run_lane;
use crate::shard_lineage::ReadPlan;
use crate::shard_lineage::plan_shards;
use crate::stage::{Revision, Samples};
use crate::swap::{LaneRestart, Swapper, SwapperParts};
use shardmill_config::{OnLostRecords, PipelineConfig, environment};
use shardmill_core::boxed;
use shardmill_core::metric;
use shardmill_core::off_thread::off_thread;
use shardmill_core::owner::OwnerName;
use shardmill_core::record::{ShardId, ShardKey, SinkName, StreamIdentity};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::sink::{Sink, SinkError};
use shardmill_core::source::StartPosition;
use shardmill_core::source::count_loss;
use shardmill_core::source::{Shard, ShardSource, SourceError, Waiting};
use shardmill_core::stop::Stop;
use shardmill_core::system::Needs;
use shardmill_plugin::{CompileCache, PluginHost};
use shardmill_state::agreement::Losses;
use shardmill_state::{
    Changes, Checkpoints, DeadLetters, Hole, Holes, KnownShards, Ledger, Look, Roster, Running,
    StateError, StateStore, Variables, needed_components,
};
use shardmill_state::{RevisionSpec, StageSpec};

/// Part of a run, in the status: the look for shards to read.
const SHARDS: &str = "shards";

/// Retries of a look for shards, and of a lane, up to the longest pause that is configured.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(200), Duration::MAX).with_jitter();
/// Time in milliseconds for which an ended shard stays known after the stream has dropped it. If a sink is restored
/// from a backup of that time, the shard can be named with the records that the sink has lost.
const GONE_KEPT_MS: i64 = 7 * 24 * 3_600 * 1_000;
/// Age below which a compiled component is kept: it may belong to a pipeline that is about to start.
const COMPILED_AGE_MIN: Duration = Duration::from_secs(3_600);
/// Changes that may wait while the lanes of the one before end.
const RESTARTS_MAX: usize = 16;

/// Options of a run, besides its configuration.
#[derive(Clone)]
pub struct RunOptions {
    /// Stop when every shard is read to its newest record and every sink has committed it.
    pub until_caught_up: bool,
    /// Sinks that were removed from the configuration and whose missing records may be given up.
    pub dropped_sinks: HashSet<SinkName>,
    /// Run what the files describe, regardless of earlier swaps, even if those cannot be read.
    pub files_count: bool,
    /// Go on from the sinks' positions although the state is older than they are.
    pub trust_sinks: bool,
    /// Returns plugins that the binary carries, by path.
    pub embedded_plugin: fn(&Path) -> Option<&'static [u8]>,
    /// Makes sinks, when a reload needs others.
    pub build_sinks: BuildSinks,
    /// Whether the pipeline itself runs, or a command beside it.
    pub role: RunRole,
}

/// Role of a process that uses a pipeline's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunRole {
    /// The pipeline itself: what it runs is stored, and survives a restart.
    Pipeline,
    /// A command beside the pipeline, such as a redrive. It runs what the pipeline runs, or would run if it were
    /// started now, and does not store that as what the pipeline runs: the files may describe something else that
    /// nobody has loaded yet.
    Beside {
        /// The pipeline is running.
        is_running: bool,
    },
}

impl RunOptions {
    /// Makes options with all that the configuration names, and plugins from files.
    pub fn new(until_caught_up: bool) -> Self {
        let dropped_sinks = HashSet::new();
        let build_sinks: BuildSinks = Arc::new(|_| {
            Err(anyhow::anyhow!("this program cannot make other sinks while it runs"))
        });
        let role = RunRole::Pipeline;
        Self {
            until_caught_up,
            dropped_sinks,
            files_count: false,
            trust_sinks: false,
            embedded_plugin: |_| None,
            build_sinks,
            role,
        }
    }
}

/// A validated pipeline that owns its state.
pub struct Supervisor {
    shared: Arc<Shared>,
    stream: Arc<StreamIdentity>,
    state: StateStore,
    build_sinks: BuildSinks,
    until_caught_up: bool,
    trust_sinks: bool,
    lock: PipelineLock,
    swapper: Swapper,
    restarts: mpsc::Receiver<LaneRestart>,
    /// Ends the background work of the swapper, with the run.
    ends: CancellationToken,
}

impl Supervisor {
    /// Locks the state folder, loads the plugins, and checks them against each other and against the sinks. Reads no
    /// record.
    ///
    /// # Errors
    /// Mismatch, with its place in the configuration where it has one.
    pub async fn prepare(
        config: PipelineConfig,
        host: PluginHost,
        source: Arc<dyn ShardSource>,
        sinks: Vec<Arc<dyn Sink>>,
        options: RunOptions,
    ) -> anyhow::Result<Self> {
        let lock = PipelineLock::take(&config.state_dir, &config.name)?;
        Self::prepare_under(lock, config, host, source, sinks, options).await
    }

    /// Does the same as [`Supervisor::prepare`], with a lock that is held already.
    ///
    /// # Errors
    /// As [`Supervisor::prepare`].
    #[boxed]
    pub async fn prepare_under(
        lock: PipelineLock,
        config: PipelineConfig,
        host: PluginHost,
        source: Arc<dyn ShardSource>,
        sinks: Vec<Arc<dyn Sink>>,
        options: RunOptions,
    ) -> anyhow::Result<Self> {
        let state = StateStore::open(lock.folder())?;
        host.backends.prepare().await?;
        let revisions = RevisionStore::new(host.clone(), state.clone());
        let stream = source.identity().await?;
        roster::rename(&config, &sinks, &state, &*source, &stream).await?;
        let to_run = match options.role {
            RunRole::Beside { is_running: true } => noted(&state, &revisions, &config).await?,
            _ => None,
        };
        let is_pipeline = options.role == RunRole::Pipeline;
        if is_pipeline {
            let texts = config.stages.iter();
            let texts = texts.map(|own| (own.name.value.clone(), own.config_text.clone()));
            Variables::new(state.clone()).forget_values(texts.collect()).await?;
        }
        let (running, revision, components) = match to_run {
            Some((running, revision)) => (running, revision, Vec::new()),
            None => {
                let (declared, components) =
                    Revision::load(&config, &host, options.embedded_plugin).await?;
                let (running, revision) =
                    carry_over(&state, &revisions, &host, &config, declared, &options).await?;
                (running, revision, components)
            }
        };
        for sink in &sinks {
            sink.prepare(&revision.routes_to(sink.name())).await?;
        }
        let ledger = Ledger::new(state.clone());
        ledger.store_revision(&revision.spec, components).await?;
        let variables = Variables::new(state.clone());
        let changed_variables = match is_pipeline {
            true => variables.note(&revision.spec, &environment).await?,
            // The process that runs the pipeline notes its variables.
            false => variables.changed_variables(&revision.spec, &environment).await?,
        };
        changed_variables.warn(&revision.id);
        if is_pipeline {
            let changes = Changes::new(state.clone());
            changes.record_running(&running, None, None).await?;
            changes.note_sinks(config.sink_fingerprints()).await?;
            if let Err(error) = ledger.prune(&revision.spec).await {
                // Only space is lost. A replay that needs what cannot be read reports that itself.
                tracing::warn!(%error, "failed to remove components that are no longer needed");
            }
        }
        tokio::task::spawn_blocking({
            let cache = host.cache.clone();
            move || remove_unneeded(&cache)
        });
        let shared = Arc::new(Shared {
            budget: sinks_budget(&config),
            source,
            current: watch::Sender::new(Arc::new(revision)),
            revisions,
            sinks,
            dropped_sinks: options.dropped_sinks,
            checkpoints: Checkpoints::new(state.clone()),
            roster: Roster::new(state.clone()),
            holes: Holes::new(state.clone()),
            ledger,
            dead_letters: DeadLetters::new(state.clone())
                .bounded(config.dead_letters_bytes_max)
                .await?,
            statuses: StatusRegistry::default(),
            starts: Starts::default(),
            samples: Samples::new(config.reload.samples),
            until_caught_up: options.until_caught_up,
            config,
        });
        roster::resolve(&shared, &stream, None, &options.build_sinks).await?;
        let (sender, restarts) = mpsc::channel(RESTARTS_MAX);
        let ends = CancellationToken::new();
        let stream = Arc::new(stream);
        let swapper = Swapper::new(SwapperParts {
            state: state.clone(),
            shared: shared.clone(),
            stream: stream.clone(),
            host,
            running,
            embedded_plugin: options.embedded_plugin,
            build_sinks: options.build_sinks.clone(),
            restarts: sender,
            ends: ends.clone(),
        });
        let (until_caught_up, trust_sinks) = (options.until_caught_up, options.trust_sinks);
        let build_sinks = options.build_sinks;
        Ok(Self {
            shared,
            stream,
            state,
            build_sinks,
            until_caught_up,
            trust_sinks,
            lock,
            swapper,
            restarts,
            ends,
        })
    }

    /// Returns the handle that changes the pipeline while it runs.
    pub fn swapper(&self) -> Swapper {
        self.swapper.clone()
    }

    /// Returns the status of the lanes.
    pub fn statuses(&self) -> StatusRegistry {
        self.shared.statuses.clone()
    }

    /// Returns the folder of its state.
    pub fn folder(&self) -> &Path {
        self.lock.folder()
    }

    /// Returns the records that sinks were not given.
    pub fn holes(&self) -> Holes {
        self.shared.holes.clone()
    }

    /// Returns the bound of its memory, with the shards that the stream has now.
    ///
    /// # Errors
    /// When the stream cannot be listed.
    pub async fn memory_bound(&self) -> anyhow::Result<MemoryBound> {
        let known = self.shared.checkpoints.shards(&self.stream).await?;
        let is_read = |shard: &&Shard| known.get(&shard.id).is_none_or(|known| !known.ended);
        let shards = self.shared.source.shards().await?;
        Ok(MemoryBound::of(&self.shared.config, shards.iter().filter(is_read).count()))
    }

    /// Returns the store of dead letters.
    pub fn dead_letters(&self) -> DeadLetters {
        self.shared.dead_letters.clone()
    }

    /// Runs until `stop`, or until caught up if the options say so, or until every shard has ended.
    ///
    /// # Errors
    /// An error that a person must resolve; the other lanes are drained first.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let drain_max = self.shared.config.timing.drain_max;
        self.run_until(Stop::at(stop.child_token(), drain_max)).await
    }

    /// Does the same as [`Supervisor::run`], with a stop that others share: a fatal error asks for it.
    ///
    /// # Errors
    /// As [`Supervisor::run`].
    #[boxed]
    pub async fn run_until(mut self, stop: Stop) -> anyhow::Result<()> {
        let lanes_stop = stop.child();
        let mut lanes = Lanes {
            shared: self.shared.clone(),
            state: self.state.clone(),
            build_sinks: self.build_sinks.clone(),
            stream: self.stream.clone(),
            stop: lanes_stop.child(),
            running: HashSet::new(),
            tasks: JoinSet::new(),
            source_ended: false,
            awaits_children: false,
        };
        let mut ended = false;
        let mut discovery = tokio::time::interval(self.shared.config.timing.shard_sync_interval);
        let mut glance = tokio::time::interval(Duration::from_millis(100));
        // A look for new shards. It is a separate future, because the stream may take long to answer and the lanes
        // go on.
        let mut look: Option<BoxFuture<'static, Result<ReadPlan, LaneError>>> = None;
        let mut has_looked = false;
        let retry_pause_max = self.shared.config.timing.retry_pause_max;
        let mut look_retries = RETRY.at_most(retry_pause_max).start();
        let waiting = Waiting::default();
        let mut waits = waiting.watch(self.shared.config.timing.call_blocked_after);
        let (show, shown) = watch::channel(self.shared.clone());
        let mut memory_waits = std::pin::pin!(show_waits(shown));
        // The state's files may be deleted or replaced while no lane writes.
        let interval = self.shared.config.timing.checkpoint_interval;
        let mut gone = watch_state(&self.state, self.shared.dead_letters.clone(), interval);
        let mut comparison = Arc::new(Comparison::new(self.state.clone(), self.trust_sinks));
        let mut fatal = None;
        // A change for which the lanes are ending.
        let mut restart: Option<LaneRestart> = None;
        while !(lanes.tasks.is_empty()
            && (lanes_stop.is_asked()
                || (restart.is_none() && (ended || lanes.has_source_ended()))))
        {
            tokio::select! {
                Some(done) = lanes.tasks.join_next() => {
                    // The look may not know yet of the shard that has just ended.
                    if look.take().is_some() {
                        discovery.reset_immediately();
                    }
                    match lanes.ended(done?) {
                        Ok(true) => discovery.reset_immediately(),
                        Ok(false) => {}
                        Err(error) => {
                            fatal.get_or_insert(error);
                            stop.ask();
                        }
                    }
                }
                () = lanes_stop.asked(), if !self.ends.is_cancelled() => self.ends.cancel(),
                // A second change waits: whether its lanes can begin depends on where these end.
                Some(request) = self.restarts.recv(), if restart.is_none() => {
                    lanes.stop.ask();
                    restart = Some(request);
                }
                // All lanes have ended: what they had is committed, as far as their sinks answered.
                () = std::future::ready(()), if restart.is_some() && lanes.tasks.is_empty() => {
                    if let Some(request) = restart.take() {
                        look = None;
                        // The sinks may be others, so they are compared again.
                        comparison = Arc::new(Comparison::new(self.state.clone(), self.trust_sinks));
                        let begun = lanes.restart(request, &lanes_stop);
                        if stop.unless_asked(begun).await.is_some() {
                            show.send_replace(lanes.shared.clone());
                            discovery.reset_immediately();
                        }
                    }
                }
                () = lanes_stop.asked(), if lanes.tasks.is_empty() => {}
                _ = discovery.tick(), if look.is_none() && !lanes.stop.is_asked() => {
                    let (shared, stream) = (lanes.shared.clone(), lanes.stream.clone());
                    let waiting = waiting.clone();
                    let comparison = comparison.clone();
                    let found =
                        async move { find(&shared, &stream, &waiting, &comparison).await };
                    look = Some(found.boxed());
                }
                Some(found) = some(&mut look) => {
                    look = None;
                    match found {
                        Ok(plan) => {
                            has_looked = true;
                            look_retries.reset();
                            waiting.answered();
                            self.shared.statuses.unblock_run(SHARDS);
                            match lanes.begin(plan) {
                                Ok(all_ended) => ended = all_ended,
                                Err(error) => {
                                    tracing::error!(%error, "the pipeline stops");
                                    fatal.get_or_insert(error);
                                    stop.ask();
                                }
                            }
                        }
                        Err(error) if error.needs_a_person() => {
                            tracing::error!(%error, "the pipeline stops");
                            fatal.get_or_insert(error);
                            stop.ask();
                        }
                        // Nothing runs yet: the person who starts the process gets the error at once.
                        Err(error) if !has_looked => {
                            fatal.get_or_insert(error);
                            stop.ask();
                        }
                        // Shards wait and nobody reads them: this is shown like a blocked lane.
                        Err(error) => {
                            waiting.answered();
                            self.shared.statuses.block_run(SHARDS, &error.to_string());
                            discovery.reset_after(look_retries.next_pause());
                        }
                    }
                }
                Some(error) = gone.recv() => {
                    lanes.block("state", &error.to_string());
                    tracing::error!(%error, "the pipeline stops");
                    fatal.get_or_insert(error.into());
                    stop.ask();
                }
                cause = waits.changed() => if let Some(cause) = cause {
                    self.shared.statuses.block_run(SHARDS, &cause);
                },
                // This future never completes.
                () = &mut memory_waits => {}
                // Until the children of an ended shard have begun, some shards have no reader. The run is not caught
                // up then, though a closed parent may give empty answers before its end.
                _ = glance.tick(), if self.until_caught_up && !lanes.awaits_children => {
                    let shards = self.shared.statuses.snapshot();
                    if !shards.is_empty() && shards.values().all(|status| status.caught_up()) {
                        lanes_stop.ask();
                    }
                }
            }
        }
        fatal.map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Removes compiled components that no pipeline with its state in this folder needs.
fn remove_unneeded(cache: &CompileCache) {
    if let Err(error) = cache.remove_unused() {
        tracing::debug!(%error, "failed to look through the compiled plugins of this user");
    }
    let Some(state_dir) = cache.own_folder().and_then(Path::parent) else { return };
    let removed = needed_components(state_dir)
        .map_err(anyhow::Error::from)
        .and_then(|needed| Ok(cache.remove_unneeded(&needed, COMPILED_AGE_MIN)?));
    match removed {
        Ok(0) => {}
        Ok(files) => tracing::info!(files, "removed compiled plugins that nothing needs"),
        Err(error) => tracing::debug!(%error, "failed to look through the compiled plugins"),
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.ends.cancel();
    }
}

/// Returns the outcome of a future, if there is one.
async fn some<T>(future: &mut Option<BoxFuture<'static, T>>) -> Option<T> {
    match future {
        Some(future) => Some(future.await),
        None => std::future::pending().await,
    }
}

/// Finds the shards that may be read now. When this returns, the start of each new shard is durable, all in one
/// step.
async fn find(
    shared: &Shared,
    stream: &Arc<StreamIdentity>,
    waiting: &Waiting,
    comparison: &Comparison,
) -> Result<ReadPlan, LaneError> {
    let (source, checkpoints) = (&shared.source, &shared.checkpoints);
    waiting.begins("DescribeStreamSummary");
    let identity = source.identity().await?;
    if identity != **stream {
        return Err(SourceError::replaced(stream, &identity).into());
    }
    waiting.begins("the state database");
    let mut known = checkpoints.known(stream).await?;
    waiting.begins("ListShards");
    let shards = source.shards().await?;
    if !source.lists_all() {
        known.begun.retain(|begun, _| shards.iter().any(|shard| shard.id == *begun));
        known.seen.clear();
    }
    let start = source.start();
    if let StartPosition::AtSequence(places) = start
        && known.is_first_start()
        && let Some(shard) = places.keys().find(|id| !shards.iter().any(|it| it.id == **id))
    {
        let (stream, shard) = (stream.name.to_string(), shard.to_string());
        return Err(SourceError::NoSuchShard { stream, shard }.into());
    }
    // By the clock that stamps the records' arrival, and after the shards were listed: shards that were closed by
    // then hold only older records.
    let resolves_latest = *start == StartPosition::Latest && known.is_first_start();
    let now_ms = match resolves_latest {
        true => {
            waiting.begins("DescribeStreamSummary");
            source.now_ms().await?
        }
        false => None,
    };
    let adopted = comparison.adopted(shared, stream, &shards, &mut known).await?;
    // A shard in which a sink has a position counts as begun, even if this state has not begun it.
    let mut with_adopted = known.clone();
    with_adopted.latest_ms = known.latest_ms.or(now_ms);
    for shard in &adopted {
        with_adopted.begun.entry(shard.clone()).or_default();
    }
    let mut plan = plan_shards(&shards, &with_adopted, start, now_ms);
    for beginning in plan.ready.iter_mut().filter(|own| adopted.contains(&own.shard)) {
        // Records since the sinks' positions are needed, and it is not known that all of them are still there.
        if !known.begun.contains_key(&beginning.shard) {
            beginning.caught_up_ms = None;
        }
    }
    if let Some(first) = plan.lost.first() {
        let error = lost(stream, first, plan.lost.len());
        let lost_records = shared.config.source.kinesis().map(|kinesis| kinesis.on_lost_records);
        if lost_records != Some(OnLostRecords::Continue) {
            return Err(error.into());
        }
        tracing::error!(%error, "records are lost; going on, as configured (on_lost_records)");
        for shard in &plan.lost {
            count_loss(shard, 0);
            let shard = ShardKey {
                pipeline: shared.config.name.clone(),
                stream: stream.clone(),
                shard: shard.clone(),
            };
            let why = "it was never begun before its retention ended".into();
            let hole = Hole { sink: None, shard, from_exclusive: None, to_inclusive: None, why };
            shared.holes.record(hole).await?;
        }
    }
    let is_new = |shard: &ShardId| !known.begun.contains_key(shard);
    let begun = plan.ready.iter().filter(|beginning| is_new(&beginning.shard)).cloned();
    let unseen = shards.iter().map(|shard| &shard.id).filter(|id| !known.seen.contains(*id));
    let passed_over = plan.skipped.iter().chain(&plan.lost).cloned();
    let look = Look {
        begun: begun.map(|it| (it.shard, it.start, it.caught_up_ms)).collect(),
        passed_over: passed_over.collect(),
        seen: unseen.filter(|_| source.lists_all()).cloned().collect(),
        latest_ms: now_ms,
    };
    if !look.is_empty() {
        waiting.begins("the state database");
        checkpoints.record_look(stream, look).await?;
    }
    if source.lists_all() {
        forget_gone(checkpoints, stream, &shards, &known).await;
    }
    Ok(plan)
}

/// The comparison of the state with the sinks, before the first record.
struct Comparison {
    state: StateStore,
    trust_sinks: bool,
    /// Shards unknown to the state in which a sink has a position; `None`: not compared yet.
    adopted: Mutex<Option<Vec<ShardId>>>,
}

impl Comparison {
    fn new(state: StateStore, trust_sinks: bool) -> Self {
        Self { state, trust_sinks, adopted: Mutex::default() }
    }

    /// Compares, on the first call only; that may change what is known.
    async fn adopted(
        &self,
        shared: &Shared,
        stream: &Arc<StreamIdentity>,
        listed: &[Shard],
        known: &mut KnownShards,
    ) -> Result<Vec<ShardId>, LaneError> {
        let mut compared = self.adopted.lock().await;
        if let Some(adopted) = &*compared {
            return Ok(adopted.clone());
        }
        let found = FoundShards { stream, listed, known: &known.begun };
        let adopted = before_first_record(shared, &self.state, found, self.trust_sinks).await?;
        let mut reread = shared.checkpoints.known(stream).await?.begun;
        reread.retain(|shard, _| known.begun.contains_key(shard));
        known.begun = reread;
        Ok(compared.insert(adopted).clone())
    }
}

/// Checks at intervals that the state's files are still the ones that are open: they may be deleted or replaced
/// while no lane writes. Also updates the metrics of the dead letters. Ends when nobody listens.
fn watch_state(
    state: &StateStore,
    dead_letters: DeadLetters,
    interval: Duration,
) -> mpsc::Receiver<StateError> {
    let (found, gone) = mpsc::channel(1);
    let state = state.clone();
    tokio::spawn(async move {
        let mut looks = tokio::time::interval(interval);
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                () = found.closed() => return,
            }
            match state.verify().await {
                Err(error) if error.is_final() => {
                    // The receiver may be gone already.
                    let _ = found.send(error).await;
                    return;
                }
                _ => {}
            }
            // Another process may have purged some. A failed read is repeated at the next interval.
            let _ = dead_letters.show_kept().await;
        }
    });
    gone
}

/// Forgets shards that nothing needs any more: they were read to their end and are not listed, not even as a parent.
async fn forget_gone(
    checkpoints: &Checkpoints,
    stream: &StreamIdentity,
    shards: &[Shard],
    known: &KnownShards,
) {
    let parents = shards.iter().flat_map(|shard| &shard.parents);
    let listed: HashSet<&ShardId> = shards.iter().map(|shard| &shard.id).chain(parents).collect();
    if known.begun.iter().all(|(shard, state)| !state.ended || listed.contains(shard)) {
        return;
    }
    let listed: Vec<ShardId> = listed.into_iter().cloned().collect();
    let now_ms = chrono::Utc::now().timestamp_millis();
    if let Err(error) = checkpoints.forget_gone(stream, &listed, now_ms, GONE_KEPT_MS).await {
        tracing::warn!(%error, "failed to forget shards that no longer exist; it is tried again");
    }
}

/// Makes the error of shards none of whose records were read.
fn lost(stream: &StreamIdentity, first: &ShardId, count: usize) -> SourceError {
    let others = match count {
        1 => String::new(),
        _ => format!(", and neither were {} others", count - 1),
    };
    SourceError::LostRecords {
        place: format!("stream {}, shard {first}", stream.name),
        extent: format!(
            "it was never begun and is no longer listed: its retention ended before it was read{others}"
        ),
    }
}

/// The running lanes.
struct Lanes {
    shared: Arc<Shared>,
    state: StateStore,
    build_sinks: BuildSinks,
    stream: Arc<StreamIdentity>,
    /// Ends these lanes: with the run, or because others will run their shards.
    stop: Stop,
    running: HashSet<ShardId>,
    tasks: JoinSet<(ShardId, Result<LaneEnd, LaneError>)>,
    /// The source has no more records for now, and none are waited for.
    source_ended: bool,
    /// A shard has ended and its children were not looked for yet; or listed shards wait for their parents.
    awaits_children: bool,
}

impl Lanes {
    /// Starts a lane for each shard that may be read now. True when every shard has ended.
    ///
    /// # Errors
    /// [`LaneError::Fatal`] when the limits of the system are too low for more lanes.
    fn begin(&mut self, plan: ReadPlan) -> Result<bool, LaneError> {
        let is_fresh = |shard: &ShardId| !self.running.contains(shard);
        self.check_limits(plan.ready.iter().filter(|it| is_fresh(&it.shard)).count())?;
        for beginning in plan.ready {
            if !self.stop.is_asked() && self.running.insert(beginning.shard.clone()) {
                self.start(beginning.shard);
            }
        }
        self.awaits_children = plan.some_wait;
        Ok(plan.all_ended)
    }

    /// Shows every lane as blocked.
    fn block(&self, part: &str, cause: &str) {
        for shard in &self.running {
            self.shared.statuses.block(shard, part, cause);
        }
    }

    /// Checks that the limits of the system allow more lanes. Those that run have their resources already.
    fn check_limits(&self, lanes: usize) -> Result<(), LaneError> {
        if lanes == 0 {
            return Ok(());
        }
        let revision = self.shared.revision();
        let mut needs = Needs { lanes, stages: 0, memories: 0, sinks: self.shared.sinks.len() };
        for stage in &revision.stages {
            let canary = stage.canary.as_ref().map(|canary| &canary.stage);
            for version in [stage].into_iter().chain(canary) {
                needs.stages += 1;
                needs.memories += version.plugin.memories;
            }
        }
        needs.check().map_err(|error| LaneError::Fatal(error.to_string()))
    }

    /// Prepares a restart of the lanes with what the request describes, or as before where that would lose records.
    async fn restart(&mut self, request: LaneRestart, stop: &Stop) {
        let outcome = self.resolve_sinks(&request.shared).await;
        let outcome = outcome.map_err(|error| shardmill_config::error_text(&error));
        if outcome.is_ok() {
            self.shared = request.shared;
        }
        self.stop = stop.child();
        // The requester may be gone already.
        let _ = request.done.send(outcome);
    }

    /// Decides which sinks the pipeline has from here on.
    async fn resolve_sinks(&self, next: &Shared) -> anyhow::Result<()> {
        let Shared { config, sinks, source, .. } = next;
        roster::rename(config, sinks, &self.state, &**source, &self.stream).await?;
        roster::resolve(next, &self.stream, Some(&self.shared), &self.build_sinks).await
    }

    fn key(&self, shard: &ShardId) -> ShardKey {
        ShardKey {
            pipeline: self.shared.config.name.clone(),
            stream: self.stream.clone(),
            shard: shard.clone(),
        }
    }

    /// Starts the lane of a shard whose start is durable.
    fn start(&mut self, shard: ShardId) {
        let key = self.key(&shard);
        self.shared.statuses.update(&shard, |status| status.running = true);
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let owner = self.state.ownership().owner;
        self.tasks.spawn(async move {
            let end = run_patiently(&shared, key, &owner, &stop).await;
            (shard, end)
        });
    }

    /// Whether the source has no more records. The children of a shard that has just ended may have some.
    fn has_source_ended(&self) -> bool {
        self.source_ended && !self.awaits_children
    }

    /// Notes that a lane has ended. True when its shard has ended, so that its children may begin.
    fn ended(
        &mut self,
        (shard, end): (ShardId, Result<LaneEnd, LaneError>),
    ) -> Result<bool, LaneError> {
        let end = end?;
        self.source_ended |= end == LaneEnd::SourceEnd;
        self.awaits_children |= end == LaneEnd::ShardEnd;
        if end != LaneEnd::SourceEnd {
            self.running.remove(&shard);
        }
        self.shared.statuses.update(&shard, |status| {
            status.running = false;
            status.ended = end != LaneEnd::Stopped;
            if status.ended {
                // All of it is committed. The checkpointer, which would have cleared what blocked, is gone.
                status.blocked.clear();
            }
        });
        Ok(end == LaneEnd::ShardEnd)
    }
}

/// Returns what the pipeline runs, as stored in the state; `None`: nothing is stored.
async fn noted(
    state: &StateStore,
    revisions: &RevisionStore,
    config: &PipelineConfig,
) -> anyhow::Result<Option<(Running, Revision)>> {
    let Some(running) = Changes::new(state.clone()).running().await? else { return Ok(None) };
    let revision = revisions
        .load(running.running.clone(), &config.source.stream_name())
        .await
        .context("failed to load what the pipeline runs")?;
    Ok(Some((running, revision)))
}

/// Way out when a swapped-in plugin cannot be started any more.
const WAY_PAST_A_SWAP: &str = "failed to load the plugin that was swapped in; start once with `run --files-count` \
    to run what the files describe, or change the stage's file: a newer file replaces an earlier swap";

/// Returns what is to run: the files' description, or what was changed since the files were last read.
async fn carry_over(
    state: &StateStore,
    revisions: &RevisionStore,
    host: &PluginHost,
    config: &PipelineConfig,
    declared: Revision,
    options: &RunOptions,
) -> anyhow::Result<(Running, Revision)> {
    let as_described = |declared: Revision| {
        let (declared_spec, running) = (declared.spec.clone(), declared.spec.clone());
        (Running { declared: declared_spec, running }, declared)
    };
    let changes = Changes::new(state.clone());
    let is_pipeline = options.role == RunRole::Pipeline;
    if options.files_count {
        let stages = declared.spec.stages.iter().map(|stage| stage.name.to_string());
        changes.supersede(stages.collect()).await?;
        return Ok(as_described(declared));
    }
    let Some(before) = changes.running().await? else {
        return Ok(as_described(declared));
    };
    let running = before.carried_over(&declared.spec);
    if is_pipeline {
        let dropped = dropped_swaps(&before, &running);
        changes.supersede(dropped).await?;
    }
    if running == declared.spec {
        return Ok(as_described(declared));
    }
    let mut plugins = declared.plugins();
    for digest in running.digests().filter(|digest| !declared.has(digest)) {
        let plugin = revisions.plugin(digest).await.context(WAY_PAST_A_SWAP)?;
        plugins.insert(digest.to_owned(), plugin);
    }
    let (spec, host, stream) = (running.clone(), host.clone(), config.source.stream_name());
    let (revision, declared) = off_thread(move || {
        let rebuilt = Revision::rebuilt(spec, &plugins, &host, &stream, &declared);
        (rebuilt, declared)
    })
    .await;
    let revision = revision.map_err(anyhow::Error::msg).context(WAY_PAST_A_SWAP)?;
    for stage in &running.stages {
        if declared.spec.stage(&stage.name) != Some(stage) {
            tracing::warn!(stage = %stage.name, changed = running_instead(&declared, stage),
                "runs what was swapped in, not what the files describe; change the files, or roll back");
        }
    }
    Ok((Running { declared: declared.spec, running }, revision))
}

/// Describes how a stage that runs differs from the files.
fn running_instead(declared: &Revision, stage: &StageSpec) -> String {
    let described = declared.spec.stage(&stage.name);
    described.map(|described| described.changes_to(stage).join(", ")).unwrap_or_default()
}

/// Returns the stages whose swaps no longer count, because their files have changed.
fn dropped_swaps(before: &Running, now: &RevisionSpec) -> Vec<String> {
    let mut dropped = Vec::new();
    for stage in &before.running.stages {
        let was_swapped = before.declared.stage(&stage.name) != Some(stage);
        let goes_on = now.stage(&stage.name).is_none_or(|now| now == stage);
        if was_swapped && !goes_on {
            tracing::warn!(stage = %stage.name, digest = %&stage.digest[..12],
                "the files have changed since this was swapped in: the files count now");
        }
        if !goes_on {
            dropped.push(stage.name.to_string());
        }
    }
    dropped
}

/// Runs a lane, and restarts it when it fails for a reason that may pass.
async fn run_patiently(
    shared: &Shared,
    shard: ShardKey,
    owner: &OwnerName,
    stop: &Stop,
) -> Result<LaneEnd, LaneError> {
    let mut losses = Losses::default();
    let pause_max = shared.config.timing.retry_pause_max;
    let mut retries = RETRY.at_most(pause_max).start();
    loop {
        let began = std::time::Instant::now();
        let error = match run_lane(shared, shard.clone(), stop).await {
            Err(error) if error.needs_a_person() => {
                // The other lanes are drained first, which may take a while, so this is logged now.
                tracing::error!(shard = %shard.shard, %error, "the pipeline stops");
                shared.statuses.block(&shard.shard, "lane", &error.to_string());
                return Err(error);
            }
            Err(error) => error,
            end => return end,
        };
        if stop.is_asked() {
            tracing::warn!(
                shard = %shard.shard, %error,
                "stopped with uncommitted records; they are read again"
            );
            return Ok(LaneEnd::Stopped);
        }
        if let LaneError::Sink(SinkError::Fenced { sink, by: Some(other), .. }) = &error
            && losses.note(owner, other.clone(), std::time::Instant::now())
        {
            let error = LaneError::Fatal(lost_to(other, owner, &shard, sink));
            tracing::error!(shard = %shard.shard, %error, "the pipeline stops");
            return Err(error);
        }
        if began.elapsed() > pause_max {
            retries.reset();
        }
        metrics::counter!(metric::LANE_RESTARTS_TOTAL).increment(1);
        shared.statuses.block(&shard.shard, "lane", &error.to_string());
        tokio::select! {
            () = tokio::time::sleep(retries.next_pause()) => {}
            () = stop.asked() => return Ok(LaneEnd::Stopped),
        }
    }
}

/// Describes why the later of two processes stops.
fn lost_to(other: &OwnerName, own: &OwnerName, shard: &ShardKey, sink: &SinkName) -> String {
    format!(
        "shard {} was acquired three times within a minute by another process, which runs pipeline {} with its \
         own state and writes to sink {sink}: {other}. This process ({own}) started later and stops. Run only \
         one of them; or let both use one `state_dir`, where the second is refused while the first runs; or \
         give this one another `name` under [pipeline]",
        shard.shard, shard.pipeline
    )
}
