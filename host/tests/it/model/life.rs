//! Processes of a run: the pipeline, and redrives of its dead letters. Each has a runtime of its own, so that all its
//! tasks end when it is killed.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use shardmill_cli::registry::SINK_TYPES;
use shardmill_config::{PipelineConfig, RejectedMax, parse};
use shardmill_core::record::{DeadLetterPlace, ShardKey, SinkName};
use shardmill_core::sink::Sink;
use shardmill_core::source::ShardSource as _;
use shardmill_engine::lane::BuildSinks;
use shardmill_engine::lock::PipelineLock;
use shardmill_engine::redrive_source::RedriveSource;
use shardmill_engine::supervisor::{RunOptions, RunRole, Supervisor};
use shardmill_engine::swap::Swapper;
use shardmill_state::{
    DeadLetterFilter, DeadLetters, Holes, RecordedHole, Redrives, StateStore, StoredDeadLetter,
};
use tokio_util::sync::CancellationToken;

use super::chaos::{Chaos, Unreliable};
use super::script::{Between, End, File, Life, Redriving, Script};
use super::source::{Memory, name};
use super::{ALL, Fixture, PLUGIN, SINKS, Size};
use crate::support::pipeline::PipelineToml;

/// Name of the sink of all rows after its rename.
const RENAMED: &str = "every";
/// Longer than a late transaction takes to land.
const QUIET: Duration = Duration::from_millis(400);
/// Time limit for a process that was asked to stop, even on a busy machine.
const STOP_MAX: Duration = Duration::from_secs(60);
/// Time limit for any process: many times what the longest one takes.
const PROCESS_MAX: Duration = Duration::from_secs(180);
/// Part of the error of a start that finds a sink last written with another state folder.
const ANOTHER_STATE: &str = "was written last by another state folder";
/// Number of redrives, all without faults, after which no dead letter may be left.
const REDRIVES_MAX: usize = 3;

/// Places that rows go to; they outlive the processes.
pub trait Destinations: Send + Sync {
    /// Makes the sink of a process.
    fn sink(&self, place: usize, name: &str) -> Arc<dyn Sink>;
    /// Copies each destination.
    fn back_up(&self) {}
    /// Restores a destination from a copy.
    fn restore(&self, _place: usize, _backup: usize) {}
    /// Accepts every row from now on.
    fn accept_all(&self) {}
}

/// Run of one seed.
#[derive(Clone)]
pub struct World {
    pub fixture: Arc<Fixture>,
    pub size: Size,
    /// Folder that contains the state folder.
    pub home: PathBuf,
    pub chaos: Arc<Chaos>,
    pub destinations: Arc<dyn Destinations>,
}

/// Contents of states that were lost or replaced.
#[derive(Default)]
pub struct Forgotten {
    /// Ids in dead letters, by place.
    pub dead_letters: BTreeMap<String, HashSet<u64>>,
    pub holes: Vec<RecordedHole>,
    /// Whether a sink came back that the current state has never written, and the start was run with `--trust-sinks`.
    pub has_new_sink: bool,
}

/// Runs a script to its end.
///
/// Backup `n` of the destinations and copy `n` of the state are made before life `n`, after the event that comes
/// before that life. So an event of a later life can restore either of them, and a redrive before life `n` is newer
/// than both.
pub async fn run(world: &World, script: &Script) -> anyhow::Result<Forgotten> {
    let mut forgotten = Forgotten::default();
    // Number of the first backup that has all rows of the finished redrives.
    let mut whole_since = 0;
    for (number, life) in script.lives.iter().enumerate() {
        before(world, life.before, whole_since, &mut forgotten)
            .await
            .with_context(|| format!("before life {number}"))?;
        world.destinations.back_up();
        if script.needs_copy(number) {
            copy(&world.folder(), &world.copied(number))?;
        }
        if script.accepts_from == Some(number) {
            world.destinations.accept_all();
        }
        if let Redriving::Before { steps } = life.redriving {
            world.chaos.live_for(Some(steps));
            let redriven = redrive_once(world, life.file).await;
            let redriven = redriven.with_context(|| format!("the redrive before life {number}"))?;
            if redriven == Redrive::Finished {
                whole_since = number + 1;
            }
        }
        let lived = live_patiently(world, script, life, &mut forgotten).await;
        if lived.with_context(|| format!("life {number}"))? {
            whole_since = number + 1;
        }
    }
    if script.accepts_from.is_some() {
        let file = script.lives[script.lives.len() - 1].file;
        world.chaos.live_for(None);
        for _ in 0..REDRIVES_MAX {
            let redriven = redrive_once(world, file).await.context("the last redrive")?;
            ensure!(redriven != Redrive::Unfinished, "the last redrive does not finish");
        }
    }
    Ok(forgotten)
}

/// Runs one process. When this returns, all its tasks have ended. A process that hangs is an error.
async fn process<T: Send + 'static>(
    world: &World,
    work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
) -> anyhow::Result<T> {
    unlocked(&world.folder()).await?;
    let run = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        // Dropping the runtime drops all its tasks, and waits for disk writes in progress.
        runtime.block_on(async {
            tokio::time::timeout(PROCESS_MAX, work).await.context("the process does not end")?
        })
    });
    run.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// Waits until nobody has a lock of the pipeline. The previous process has ended, but other tests of this program
/// start child processes. Between fork and exec, such a child has all open files of this program, including locks.
async fn unlocked(folder: &Path) -> anyhow::Result<()> {
    for name in ["lock", "redrive.lock"] {
        let Ok(lock) = std::fs::File::open(folder.join(name)) else { continue };
        let begun = std::time::Instant::now();
        while lock.try_lock_shared().is_err() {
            ensure!(begun.elapsed() < PROCESS_MAX, "{name} stays locked");
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
    Ok(())
}

/// Applies what happens between two lives.
async fn before(
    world: &World,
    between: Between,
    whole_since: usize,
    forgotten: &mut Forgotten,
) -> anyhow::Result<()> {
    match between {
        // These changes are in the configuration file.
        Between::Nothing | Between::SinkRemoved | Between::SinkReturned | Between::SinkRenamed => {}
        // No restore from a backup that is older than a finished redrive: the rows redriven since then would be lost
        // for good, as the book says.
        Between::SinkRestored { backup, .. } if backup < whole_since => {}
        Between::SinkRestored { place, backup } => world.destinations.restore(place, backup),
        Between::StateRestored { copy: number } => {
            // Waits for late transactions: they belong to a state that is newer than the copy.
            tokio::time::sleep(QUIET).await;
            forget(world, forgotten).await?;
            copy(&world.copied(number), &world.folder())?;
        }
        Between::StateLost => forget(world, forgotten).await?,
    }
    Ok(())
}

/// Removes the state, and remembers its dead letters and holes.
async fn forget(world: &World, forgotten: &mut Forgotten) -> anyhow::Result<()> {
    let folder = world.folder();
    let state = StateStore::open(&folder)?;
    forgotten.holes.extend(Holes::new(state.clone()).list(None).await?);
    drop(state);
    // The query also finds pending dead letters.
    let state = rusqlite::Connection::open(folder.join("state.db"))?;
    let mut query = state.prepare("SELECT place, original FROM dead_letter")?;
    let dead_letters = query
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?)))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    for (place, original) in dead_letters {
        forgotten.dead_letters.entry(place).or_default().insert(super::dead_letter_id(&original));
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    if !from.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

impl World {
    /// Returns the pipeline's own folder in the state folder.
    pub fn folder(&self) -> PathBuf {
        self.home.join("state/model")
    }

    /// Returns the folder of a copy of the state.
    fn copied(&self, number: usize) -> PathBuf {
        self.home.join(format!("copy-{number}"))
    }

    /// Builds the pipeline of a file: one plugin whose configuration says which side goes to which sink.
    fn pipeline(&self, file: File) -> PipelineConfig {
        let mut rng = fastrand::Rng::with_seed(file.commit_seed);
        let (rows, linger_ms) = (rng.u64(1..30), rng.u64(1..=60));
        let File { right, is_away, is_renamed, is_hasty, .. } = file;
        let drain = if is_hasty { "300 ms" } else { "60 s" };
        let all = match (is_away, name_of(ALL, is_renamed)) {
            (true, _) => String::new(),
            (false, all) => format!(", \"{all}\""),
        };
        let route = format!(
            "[stage.config]\ndefault = \"left\"\n\
             rules = [{{ route = \"right\", field = \"side\", equals = {right} }}]\n\
             [stage.routes]\nleft = [\"left\"{all}]\nright = [\"right\"{all}]"
        );
        let mut toml = PipelineToml::new(&self.home, "model")
            .pipeline("on_position_mismatch = \"sink\"")
            .timing(&format!("drain = \"{drain}\"\nretry_pause = \"1 s\"\ncheckpoint = \"250 ms\""))
            .table("[source]\ntype = \"kinesis\"\nstream = \"model\"")
            .stage("route", PLUGIN, &route)
            .table("[reload.probation]\nwindow = \"0 s\"");
        for (place, sink) in SINKS.iter().enumerate() {
            let size = place as u64 + 1;
            let (rows, linger_ms) = (rows * size, linger_ms * size);
            let on_failure = match rng.u8(..3) {
                0 if file.gives_up && self.size.given_up.contains(sink) => {
                    "on_failure = \"dead-letter\"\ngive_up_after = \"1 ms\""
                }
                _ => "",
            };
            if place == ALL && is_away {
                continue;
            }
            let name = name_of(place, is_renamed);
            let renamed = match name == *sink {
                true => String::new(),
                false => format!("renamed_from = \"{sink}\"\n"),
            };
            let lines = format!(
                "type = \"discard\"\n{renamed}[sink.commit]\nrows = {rows}\n\
                 linger = \"{linger_ms} ms\"\n{on_failure}"
            );
            toml = toml.plain_sink(name, &lines);
        }
        let text = toml.text();
        parse(Path::new("model.toml"), &text, &SINK_TYPES, &|_| None)
            .unwrap_or_else(|error| panic!("{}\n{text}", error.render(false)))
    }

    /// Makes the sinks that a configuration names, for one process.
    fn build(&self) -> BuildSinks {
        let world = self.clone();
        Arc::new(move |config: &PipelineConfig| {
            let sinks = config.sinks.iter().map(|sink| {
                let name = sink.name.value.as_str();
                let place = SINKS.iter().position(|own| *own == name).unwrap_or(ALL);
                let inner = world.destinations.sink(place, name);
                Arc::new(Unreliable { inner, chaos: world.chaos.clone() }) as Arc<dyn Sink>
            });
            Ok(sinks.collect())
        })
    }

    fn source(&self) -> Arc<Memory> {
        let Size { shards, records_per_shard, .. } = self.size;
        Arc::new(Memory::new(shards, records_per_shard, self.chaos.clone()))
    }

    fn options(&self) -> RunOptions {
        let dropped_sinks = [SINKS[ALL].into(), RENAMED.into()].into();
        RunOptions { build_sinks: self.build(), dropped_sinks, ..RunOptions::new(true) }
    }

    /// Whether a sink of the file was written with a newer version of the state than the one in the folder.
    async fn is_state_older(&self, file: File) -> anyhow::Result<bool> {
        let own = StateStore::open(&self.folder())?.ownership().mark();
        let config = self.pipeline(file);
        let stream = Arc::new(self.source().identity().await?);
        let shards = (0..self.size.shards).map(|shard| ShardKey {
            pipeline: config.name.clone(),
            stream: stream.clone(),
            shard: name(shard as usize).as_str().into(),
        });
        let shards: Vec<ShardKey> = shards.collect();
        for sink in &config.sinks {
            let name = sink.name.value.as_str();
            let place = SINKS.iter().position(|own| *own == name).unwrap_or(ALL);
            let kept =
                self.destinations.sink(place, name).kept_positions(&config.name, &shards).await?;
            for mark in kept.into_iter().flatten().filter_map(|kept| kept.mark) {
                if mark.state == own.state && mark.number > own.number {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Returns a sink's name.
fn name_of(place: usize, is_renamed: bool) -> &'static str {
    if place == ALL && is_renamed { RENAMED } else { SINKS[place] }
}

/// Runs the pipeline through a life. If the state is an older copy, asserts that a start is refused, and then starts
/// with `--trust-sinks`, as a person would. Returns whether a redrive beside the pipeline was finished.
async fn live_patiently(
    world: &World,
    script: &Script,
    life: &Life,
    forgotten: &mut Forgotten,
) -> anyhow::Result<bool> {
    std::fs::create_dir_all(world.folder())?;
    let is_older = {
        let (own, file) = (world.clone(), life.file);
        process(world, async move { own.is_state_older(file).await }).await?
    };
    if is_older {
        ensure!(script.forgets(), "a sink has seen a newer state, but no state was restored");
        world.chaos.live_for(None);
        let (own, life) = (world.clone(), life.clone());
        let refused = process(world, async move {
            let (config, source, options) = (own.pipeline(life.file), own.source(), own.options());
            let sinks = own.build()(&config)?;
            Supervisor::prepare(config, own.fixture.host(), source, sinks, options)
                .await?
                .run(CancellationToken::new())
                .await
        });
        match refused.await {
            Err(why) if format!("{why:#}").contains("is older than sink") => {}
            other => bail!("an older state was not refused: {other:?}"),
        }
    }
    let lived = async |trust_sinks: bool| {
        let (own, life) = (world.clone(), life.clone());
        process(world, async move { live(&own, &life, trust_sinks).await }).await
    };
    match lived(is_older).await {
        // A sink that was away while the state was lost was written only with the lost state. The start cannot know
        // whether another process still writes to it, so a person must decide.
        Err(why) if script.may_have_new_sink() && format!("{why:#}").contains(ANOTHER_STATE) => {
            forgotten.has_new_sink = true;
            lived(true).await
        }
        lived => lived,
    }
}

/// Runs the pipeline through one life.
async fn live(world: &World, life: &Life, trust_sinks: bool) -> anyhow::Result<bool> {
    let chaos = &world.chaos;
    chaos.live_for(match life.end {
        End::CaughtUp => None,
        End::Killed { steps } | End::Stopped { steps } => Some(steps),
    });
    let config = world.pipeline(life.file);
    let options = RunOptions { trust_sinks, ..world.options() };
    let sinks = world.build()(&config)?;
    let prepared = tokio::select! {
        prepared = Supervisor::prepare(config, world.fixture.host(), world.source(), sinks, options) => {
            prepared
        }
        // The process is killed during its start, or while its start hangs.
        () = chaos.over() => return Ok(false),
    };
    let supervisor = match prepared {
        // A start reads the position of a returning sink once and does not retry. Whoever starts the pipeline starts
        // it again.
        Err(error) if life.end != End::CaughtUp && error.to_string().contains("chaos: kept") => {
            return Ok(false);
        }
        prepared => prepared?,
    };
    let swapper = supervisor.swapper();
    let stop = CancellationToken::new();
    let run = supervisor.run(stop.clone());
    let mut is_redriven = false;
    let redrive = async {
        if let Redriving::Beside { after_ms } = life.redriving {
            tokio::time::sleep(Duration::from_millis(after_ms)).await;
            match redrive(world, life.file, true).await {
                Ok(redriven) => is_redriven = redriven == Redrive::Finished,
                Err(error) => return error.context("the redrive beside"),
            }
        }
        std::future::pending().await
    };
    tokio::pin!(run);
    tokio::select! {
        () = reload(world, &swapper, &life.reloads) => unreachable!("it waits"),
        error = redrive => return Err(error),
        // The run may end before its last step; the next life then finds less to do.
        ended = &mut run => ended?,
        () = chaos.over() => {
            if let End::Stopped { .. } = life.end {
                stop.cancel();
                tokio::time::timeout(STOP_MAX, run).await.context("the process does not stop")??;
            }
        }
    }
    Ok(is_redriven)
}

/// Changes the pipeline while it runs. The process may end at any step of a change.
async fn reload(world: &World, swapper: &Swapper, reloads: &[(u64, File)]) {
    for (pause_ms, file) in reloads {
        tokio::time::sleep(Duration::from_millis(*pause_ms)).await;
        // A reload is refused when the pipeline has stopped, or when a sink would lose records. It then changes
        // nothing.
        let _ = swapper.reload(world.pipeline(*file), false).await;
    }
    std::future::pending().await
}

/// Redrives in a process of its own, until it ends or is killed.
pub async fn redrive_once(world: &World, file: File) -> anyhow::Result<Redrive> {
    let own = world.clone();
    process(world, async move {
        tokio::select! {
            redriven = redrive(&own, file, false) => redriven,
            () = own.chaos.over() => Ok(Redrive::Unfinished),
        }
    })
    .await
}

/// Progress of a redrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redrive {
    Finished,
    Unfinished,
    /// There are no dead letters, or the place of one is not in the pipeline.
    Nothing,
}

/// Redrives all dead letters, as `shardmill dlq redrive --all` does; continues a redrive that was interrupted.
async fn redrive(world: &World, file: File, is_running: bool) -> anyhow::Result<Redrive> {
    let mut config = world.pipeline(file);
    config.rejected_max = RejectedMax::NONE;
    let lock = PipelineLock::take_for_redrive(&config.state_dir, &config.name)?;
    let state = StateStore::open(lock.folder())?;
    let redrives = Redrives::new(state, config.name.clone());
    let id = match redrives.unfinished().await?.first() {
        Some(unfinished) => unfinished.id,
        None => match redrives.begin(DeadLetterFilter::default()).await? {
            Some(id) => id,
            None => return Ok(Redrive::Nothing),
        },
    };
    let names: Vec<SinkName> = config.sinks.iter().map(|sink| sink.name.value.clone()).collect();
    let is_gone = |place: &String| match DeadLetterPlace::parse(place) {
        Some(DeadLetterPlace::Sink(sink)) => !names.contains(&sink),
        _ => false,
    };
    let lagging = redrives.lagging_sinks(id).await?;
    if redrives.places(id).await?.iter().any(is_gone)
        || lagging.iter().any(|sink| !names.contains(sink))
    {
        if !redrives.has_run(id).await? {
            redrives.cancel(id).await?;
        }
        return Ok(Redrive::Nothing);
    }
    redrives.note_sinks(id, names).await?;
    let limits = config.source.batch;
    let source = RedriveSource::new(redrives.clone(), id, &config.name, limits, Vec::new());
    let role = RunRole::Beside { is_running };
    let options = RunOptions { role, build_sinks: world.build(), ..RunOptions::new(true) };
    let sinks = world.build()(&config)?;
    Supervisor::prepare_under(lock, config, world.fixture.host(), Arc::new(source), sinks, options)
        .await?
        .run(CancellationToken::new())
        .await?;
    let finished = redrives.finish(id, &[]).await?;
    Ok(if finished.is_some() { Redrive::Finished } else { Redrive::Unfinished })
}

/// Returns the dead letters and the holes at the end.
pub async fn left(world: &World) -> anyhow::Result<(Vec<StoredDeadLetter>, Vec<RecordedHole>)> {
    let state = StateStore::open(&world.folder())?;
    let holes = Holes::new(state.clone()).list(None).await?;
    let dead_letters =
        DeadLetters::new(state).select(DeadLetterFilter::default(), u32::MAX).await?;
    Ok((dead_letters, holes))
}
