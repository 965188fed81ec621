//! `shardmill objects`: checks that everything an objects sink has claimed exists exactly once, and repairs
//! claim logs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use serde_json::json;

use super::{Console, DEFAULT_PIPELINE, holes, load, sinks, stream};
use shardmill_config::{PipelineConfig, SinkConfig};
use shardmill_core::boxed;
use shardmill_core::escape::escaped;
use shardmill_core::record::{Position, ShardId, ShardKey, SinkName};
use shardmill_core::sink::Sink as _;
use shardmill_engine::lane::roster;
use shardmill_engine::lock::PipelineLock;
use shardmill_sink_objects::{Audit, ObjectsSink, ObjectsTarget, Recovered};
use shardmill_state::{
    Checkpoints, DeadLetters, Hole, Holes, Roster, StateStore, StoredDeadLetter,
};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Check the claim logs of objects sinks for gaps, overlaps and objects without a claim.
    #[command(
        after_help = "Examples:\n  shardmill objects verify\n  shardmill objects verify pipeline.toml \
                      --sink logs --content"
    )]
    Verify {
        /// The pipeline file.
        #[arg(default_value = DEFAULT_PIPELINE)]
        pipeline: PathBuf,
        /// Only this sink [default: all objects sinks].
        #[arg(long, value_name = "NAME")]
        sink: Option<String>,
        /// Also read every object and compare it with its claim.
        #[arg(long)]
        content: bool,
    },
    /// Give up the last claim of a shard that can never be completed; its rows are processed and claimed again.
    ///
    /// A claim promises objects. If one of them can never be written (its name is too long for the store, or
    /// the revision that promised it is gone), the shard is blocked. This command records in the log that the
    /// claim is given up, and removes those of its objects that exist. The pipeline must be stopped.
    #[command(
        after_help = "Example:\n  shardmill objects give-up --sink logs --shard shardId-000000000000"
    )]
    GiveUp {
        #[command(flatten)]
        log: Log,
    },
    /// Continue at the checkpoint after a shard's log has lost a link or its last object.
    ///
    /// A lifecycle rule that removes objects by age also removes the last objects of a quiet shard. The log
    /// then no longer shows its position. This command records in the log that it continues at the checkpoint.
    /// The range in between is recorded as a hole, which `objects verify` reports. Rows after the checkpoint
    /// that were already written may be duplicated. The pipeline must be stopped.
    #[command(
        after_help = "Example:\n  shardmill objects skip --sink logs --shard shardId-000000000000 \
                      --why \"the bucket keeps 90 days\""
    )]
    Skip {
        #[command(flatten)]
        log: Log,
        /// Reason; it is stored in the log.
        #[arg(long, default_value = "a link or the last object was gone")]
        why: String,
    },
}

/// Claim log of a shard.
#[derive(clap::Args)]
pub struct Log {
    /// The pipeline file.
    #[arg(default_value = DEFAULT_PIPELINE)]
    pipeline: PathBuf,
    /// The objects sink.
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// The shard, such as `shardId-000000000000`.
    #[arg(long, value_name = "ID")]
    shard: String,
}

#[boxed(?Send)]
pub async fn objects(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Verify { pipeline, sink, content } => {
            verify(&pipeline, sink.as_deref(), content, console).await
        }
        Command::GiveUp { log } => {
            let Opened { sink, shard, state, _lock } = log.open().await?;
            let checkpoint = Checkpoints::new(state).checkpoint(&shard).await?;
            let done = sink.give_up(&shard, checkpoint.as_ref()).await?;
            let objects = done.objects_removed.len();
            report(&log, &done, console)?;
            console.say(format_args!(
                "sink {}: link {} of {} gives up the claim; {objects} of its objects existed and were \
                 removed; the next run claims its rows again",
                log.sink, done.link, log.shard
            ));
            Ok(())
        }
        Command::Skip { log, why } => {
            let Opened { sink, shard, state, _lock } = log.open().await?;
            let checkpoint = Checkpoints::new(state.clone()).checkpoint(&shard).await?;
            let Some(checkpoint) = checkpoint else {
                bail!(
                    "the state has no checkpoint of {}: there is no position to continue from",
                    log.shard
                );
            };
            let done = sink.skip(&shard, &checkpoint, &why).await?;
            if done.from.as_ref() < Some(&checkpoint) {
                let hole = Hole {
                    sink: Some(sink.name().clone()),
                    shard,
                    from_exclusive: done.from.clone(),
                    to_inclusive: Some(checkpoint.clone()),
                    why,
                };
                Holes::new(state).record(hole).await?;
            }
            report(&log, &done, console)?;
            let from = done.from.as_ref().map_or("the beginning".to_owned(), Position::to_string);
            console.say(format_args!(
                "sink {}: link {} of {} skips the positions after {from} up to {checkpoint}; the \
                 next run continues there",
                log.sink, done.link, log.shard
            ));
            Ok(())
        }
    }
}

/// Refuses to write into a log whose sink has a name or a place that no start has confirmed. The sink may have
/// another log, and two logs with claims would stop the next start.
async fn refuse_unstarted(
    config: &PipelineConfig,
    name: &SinkName,
    state: &StateStore,
) -> anyhow::Result<()> {
    roster::refuse_unresolved(config, state).await?;
    let place = config.sinks.iter().find(|sink| sink.name.value == *name);
    let place = place.and_then(SinkConfig::destination).unwrap_or_default();
    let roster = Roster::new(state.clone());
    for stream in roster.streams().await? {
        let known = roster.known_in(stream).await?;
        let was = known.destinations.get(name).filter(|was| !was.is_empty() && **was != place);
        if let Some(was) = was {
            bail!(
                "expected sink {name} at {was}, where it has written, found {place}: restore its `url`, or start the \
                 pipeline once (`shardmill run`), which says what must be decided, and then run this command \
                 again"
            );
        }
    }
    Ok(())
}

/// Parts that a command on a claim log needs.
struct Opened {
    sink: ObjectsSink,
    shard: ShardKey,
    /// State that has the sink's positions.
    state: StateStore,
    /// Keeps the pipeline from running meanwhile.
    _lock: PipelineLock,
}

impl Log {
    async fn open(&self) -> anyhow::Result<Opened> {
        let config = load(&self.pipeline)?;
        let found = chosen(&config, Some(&self.sink))?;
        let Some((_, target)) = found.first() else {
            bail!("the pipeline has no objects sink {:?}", self.sink);
        };
        let name = SinkName::from(self.sink.as_str());
        let sink = target.sink(name.clone())?;
        let lock = PipelineLock::take(&config.state_dir, &config.name)?;
        let own = StateStore::open(lock.folder())?;
        let copies = holes::folder_of_copies(&config);
        let is_copied = config.dead_letter_sinks.iter().any(|sink| sink.name.value == name);
        let copying = config.for_dead_letters(copies.clone(), StoredDeadLetter::columns());
        // Dead letters are copied from the log in the pipeline's own state, but the positions of the copies are
        // in another state.
        let (state, stream) = match copying.filter(|_| is_copied) {
            Some(copying) => {
                ensure!(
                    copies.join("state.db").exists(),
                    "expected positions of sink {name} in {}, found none: no dead letter has been copied yet; start \
                     the pipeline first",
                    copies.display()
                );
                let state = StateStore::open(&copies)?;
                refuse_unstarted(&copying, &name, &state).await?;
                (state, DeadLetters::new(own).log_stream(&config.name).await?)
            }
            None => {
                refuse_unstarted(&config, &name, &own).await?;
                let (source, _embedded) = stream::source(&config).await?;
                (own, source.identity().await?)
            }
        };
        let shard = ShardKey {
            pipeline: config.name.clone(),
            stream: Arc::new(stream),
            shard: ShardId::new(self.shard.clone()),
        };
        Ok(Opened { sink, shard, state, _lock: lock })
    }
}

fn report(log: &Log, done: &Recovered, console: &Console) -> anyhow::Result<()> {
    console.report(&json!({
        "sink": log.sink,
        "shard": log.shard,
        "link": done.link,
        "from": done.from.as_ref().map(Position::to_string),
        "to": done.to.as_ref().map(Position::to_string),
        "objects_removed": done.objects_removed,
    }))
}

async fn verify(
    pipeline: &Path,
    sink: Option<&str>,
    content: bool,
    console: &Console,
) -> anyhow::Result<()> {
    let config = load(pipeline)?;
    let mut problems = 0;
    for (name, target) in chosen(&config, sink)? {
        let sink = target.sink(name.clone())?;
        let audit = sink.verify(content).await.context("failed to verify")?;
        problems += audit.problems.len();
        // The logs contain nothing about what the sink was never given.
        let recorded = holes::of(&config, Some(name)).await?;
        console.report(&json!({ "sink": name.as_str(), "audit": audit, "holes": recorded }))?;
        say(name.as_str(), &audit, console);
        holes::say(&config, &recorded, console);
    }
    match problems {
        0 => Ok(()),
        1 => bail!("1 problem"),
        _ => bail!("{problems} problems"),
    }
}

/// Returns the selected objects sinks with their names.
fn chosen<'c>(
    config: &'c PipelineConfig,
    name: Option<&str>,
) -> anyhow::Result<Vec<(&'c SinkName, &'c ObjectsTarget)>> {
    let all = config.sinks.iter().chain(&config.dead_letter_sinks);
    let objects = all.filter_map(|sink| Some((&sink.name.value, sinks::objects(sink)?)));
    let objects: Vec<_> =
        objects.filter(|(own, _)| name.is_none_or(|name| own.as_str() == name)).collect();
    match (objects.is_empty(), name) {
        (false, _) => Ok(objects),
        (true, Some(name)) => bail!("the pipeline has no objects sink {name:?}"),
        (true, None) => bail!("the pipeline has no objects sink"),
    }
}

fn say(sink: &str, audit: &Audit, console: &Console) {
    console.say(format_args!(
        "sink {sink}: {} objects with {} rows and {} bytes, by {} links of {} logs",
        audit.objects, audit.rows, audit.bytes, audit.links, audit.logs
    ));
    if audit.unfinished > 0 {
        console.say(format_args!(
            "{} logs end with a claim whose objects do not all exist yet: the next run produces them again",
            audit.unfinished
        ));
    }
    if audit.temporary > 0 {
        console.say(format_args!(
            "{} temporary files: they are being written, or their writer was killed; the next run removes them",
            audit.temporary
        ));
    }
    for hole in &audit.holes {
        let shown = |position: &Option<String>| {
            position.clone().unwrap_or_else(|| "the beginning".to_owned())
        };
        console.say(format_args!(
            "hole: {}: after {} up to {}: {}",
            escaped(&hole.log, &[]),
            shown(&hole.from),
            shown(&hole.to),
            escaped(&hole.why, &[])
        ));
    }
    for problem in &audit.problems {
        console.say(format_args!(
            "{}: {}: {}",
            problem.kind,
            escaped(&problem.place, &[]),
            escaped(&problem.detail, &[])
        ));
    }
}
