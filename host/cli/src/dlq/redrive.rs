//! `shardmill dlq redrive`: processes dead letters again, beside a running pipeline or while it is stopped.
//!
//! A redrive never writes what the pipeline owns: neither the running revision nor its changes. It writes only
//! under the key of a stream of its own, and the outcome of the dead letters.
//!
//! Order of the steps, and why:
//! 1. The redrive lock is acquired first. A replay that replaces rows needs it, too: both bring rows of the same
//!    dead letters.
//! 2. While the pipeline runs, what it runs is read from its state, not from the file. Sinks are made from the
//!    file, so a sink that differs between the two is refused.
//! 3. Interrupted replays are resolved, because a replay decides which dead letters a sink already has.
//! 4. An unfinished redrive goes first; the dead letters of the new command are not started. It keeps its
//!    number and order, so the sinks recognise rows that they already have.
//! 5. A redrive is cancelled only if nothing of it has run; otherwise it must be finished (`--without` leaves
//!    out what is gone).

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use anyhow::{bail, ensure};

use super::super::signals::stop_on_signals;
use super::super::{Console, dead_letters, load, plugin_host, sinks, state_beside};
use super::Selection;
use shardmill_config::{PipelineConfig, RejectedMax};
use shardmill_core::record::{DeadLetterPlace, Position, SinkName, StageName};
use shardmill_core::sink::Sink;
use shardmill_engine::bound::{MemoryBound, memory_bytes_available};
use shardmill_engine::lane::RevisionStore;
use shardmill_engine::lane::agreement::refuse_older_state;
use shardmill_engine::lane::remake::Remaker;
use shardmill_engine::lane::roster;
use shardmill_engine::lock::PipelineLock;
use shardmill_engine::redrive_source::RedriveSource;
use shardmill_engine::supervisor::{RunOptions, RunRole, Supervisor};
use shardmill_sink_postgres::TableWindow;
use shardmill_state::{
    Changes, Checkpoints, Ledger, RedriveId, Redriven, Redrives, Replays, StateStore,
    UnfinishedRedrive,
};

pub(super) async fn redrive(
    wanted: &Selection,
    all: bool,
    without: &[String],
    even_if_redriven: bool,
    console: &Console,
) -> anyhow::Result<()> {
    ensure!(
        wanted.pipeline.again.is_none(),
        "dead letters of a rerun cannot be redriven: their rows may have gone to separate tables; \
         `shardmill dlq export --again` exports them"
    );
    let mut config = load(&wanted.pipeline.pipeline)?;
    // All of these records have failed once, so a high share of new failures says nothing about the plugin.
    config.rejected_max = RejectedMax::NONE;
    // An error here is better than making a lock in a folder that was never used.
    dead_letters(&config)?;
    let lock = PipelineLock::take_for_redrive(&config.state_dir, &config.name)?;
    let state = state_beside(&config)?;
    let pipeline = Pipeline::of(&mut config, &state).await?;
    roster::refuse_unresolved(&config, &state).await?;
    refuse_older_state(&state, &sinks::build(&config)?, &config.name).await?;
    resolve_replays(&config, &state, console).await?;
    let redrives = Redrives::new(state.clone(), config.name.clone());
    let doubtful = redrives.doubtful(wanted.filter()).await?;
    ensure!(
        doubtful == 0 || even_if_redriven,
        "{doubtful} of these dead letters come from an older copy of the state, with which the pipeline \
         continued (--trust-sinks): they may have been redriven since that copy was made, and their rows would \
         be duplicated. Delete those that were (`shardmill dlq purge`); --even-if-redriven sends the others"
    );
    let Some(UnfinishedRedrive { id, is_rest }) = choose(&redrives, &pipeline, console).await?
    else {
        return match begin(&redrives, wanted, (all, without), console).await? {
            None => console.report(&Redriven::default()),
            Some(id) => {
                let run = Run { redrives, id, is_rest: false, config, pipeline, state, lock };
                run.run(without, console).await
            }
        };
    };
    let run = Run { redrives, id, is_rest, config, pipeline, state, lock };
    run.run(without, console).await
}

/// Chooses a redrive to continue: an interrupted one, or the rest of one whose sink is back.
async fn choose(
    redrives: &Redrives,
    pipeline: &Pipeline,
    console: &Console,
) -> anyhow::Result<Option<UnfinishedRedrive>> {
    let unfinished = redrives.unfinished().await?;
    if let Some(broken_off) = unfinished.iter().find(|one| !one.is_rest) {
        console.say("an interrupted redrive continues; the dead letters named now are not started");
        return Ok(Some(*broken_off));
    }
    for rest in unfinished {
        let places = redrives.places(rest.id).await?;
        let gone: Vec<&String> = places.iter().filter(|place| !pipeline.has(place)).collect();
        if gone.len() < places.len() {
            console.say(
                "the rest of an earlier redrive continues; the dead letters named now are not started",
            );
            return Ok(Some(rest));
        }
    }
    Ok(None)
}

/// Begins a redrive. `None`: no dead letter matches.
async fn begin(
    redrives: &Redrives,
    wanted: &Selection,
    (all, without): (bool, &[String]),
    console: &Console,
) -> anyhow::Result<Option<RedriveId>> {
    ensure!(
        without.is_empty() || all || !wanted.filter().is_empty(),
        "no interrupted redrive to continue: name the dead letters, or use --all"
    );
    let begun = redrives.begin(wanted.chosen(all, "redrive")?).await?;
    if begun.is_none() {
        console.say("0 dead letters");
    }
    Ok(begun)
}

/// Stages and sinks of the pipeline that dead letters can enter.
struct Pipeline {
    is_running: bool,
    stages: Vec<StageName>,
    /// Sinks of the file that run.
    sinks: Vec<SinkName>,
    /// Sinks that the running revision is bound to and that the file does not have.
    missing: Vec<SinkName>,
}

impl Pipeline {
    /// Reads what runs from the state while the pipeline runs, otherwise from the file. Sinks are made from the
    /// file: those that do not run are left out, and one that was changed in the file since is refused.
    async fn of(config: &mut PipelineConfig, state: &StateStore) -> anyhow::Result<Self> {
        let changes = Changes::new(state.clone());
        let is_running = PipelineLock::is_taken(&config.state_dir, &config.name)?;
        let noted = changes.running().await?.filter(|_| is_running);
        let names = |config: &PipelineConfig| -> Vec<SinkName> {
            config.sinks.iter().map(|sink| sink.name.value.clone()).collect()
        };
        let Some(noted) = noted else {
            let stages = config.stages.iter().map(|stage| stage.name.value.clone()).collect();
            return Ok(Self { is_running, stages, sinks: names(config), missing: Vec::new() });
        };
        let running = changes.running_sinks().await?;
        for (sink, fingerprint) in config.sink_fingerprints() {
            ensure!(
                running.get(&sink).is_none_or(|running| *running == fingerprint),
                "{}: sink {sink} differs from the sink of the running pipeline: run `shardmill reload` first, or \
                 restore the file",
                config.file.path.display()
            );
        }
        if !running.is_empty() {
            config.sinks.retain(|sink| running.contains_key(&sink.name.value));
        }
        let sinks = names(config);
        let missing: HashSet<&SinkName> =
            noted.running.sinks().filter(|sink| !sinks.contains(sink)).collect();
        let mut missing: Vec<SinkName> = missing.into_iter().cloned().collect();
        missing.sort_unstable();
        let stages = noted.running.stages.iter().map(|stage| stage.name.clone()).collect();
        Ok(Self { is_running, stages, sinks, missing })
    }

    /// Whether dead letters can enter at a place.
    fn has(&self, place: &str) -> bool {
        match DeadLetterPlace::parse(place) {
            Some(DeadLetterPlace::Stage(name)) => self.stages.contains(&name),
            Some(DeadLetterPlace::Sink(name)) => self.sinks.contains(&name),
            None => false,
        }
    }
}

/// Resolves interrupted replays: finds out whether their rows are in the table. A redrive needs this to know
/// which dead letters a sink already has.
pub(crate) async fn resolve_replays(
    config: &PipelineConfig,
    state: &StateStore,
    console: &Console,
) -> anyhow::Result<()> {
    let replays = Replays::new(state.clone());
    let silence_max = config.timing.postgres_silence_max;
    for replay in replays.pending().await? {
        let own = config.sinks.iter().find(|sink| sink.name.value == replay.sink);
        let Some(target) = own.and_then(sinks::postgres) else {
            // Nothing is redriven to that sink either. The replay is resolved when the sink is back.
            tracing::warn!(
                sink = %replay.sink,
                "an interrupted replay is not resolved, because its sink is not in the configuration"
            );
            continue;
        };
        match TableWindow::has_landed(target, &config.name, (&replay.sink, replay.id), silence_max)
            .await
        {
            Ok(true) => {
                replays.confirm(replay.id).await?;
                console.say(format!(
                    "an interrupted replay of sink {} had replaced its rows",
                    replay.sink
                ));
            }
            Ok(false) => replays.cancel(replay.id).await?,
            Err(cause) => bail!(
                "cannot find out whether a replay of sink {} has replaced rows: {cause}; run the command again \
                 when the table can be reached",
                replay.sink
            ),
        }
    }
    Ok(())
}

/// A redrive that is about to run.
struct Run {
    redrives: Redrives,
    id: RedriveId,
    is_rest: bool,
    config: PipelineConfig,
    pipeline: Pipeline,
    state: StateStore,
    lock: PipelineLock,
}

impl Run {
    async fn run(self, without: &[String], console: &Console) -> anyhow::Result<()> {
        let gone = self.gone().await?;
        let left_out = match left_out(&gone, without) {
            Ok(left_out) => left_out,
            Err(unknown) => {
                self.cancel_if_new().await?;
                bail!("--without {unknown}: {}", self.cannot_leave_out(&unknown, &gone));
            }
        };
        let missing: Vec<&str> = gone
            .iter()
            .filter(|place| !self.is_rest && !left_out.contains(place))
            .map(String::as_str)
            .collect();
        if !missing.is_empty() {
            let named = missing.join(", ");
            ensure!(
                !self.cancel_if_new().await?,
                "{named} is no longer in the pipeline, so no dead letter can enter there: put it back, or \
                 leave its dead letters out (--without {})",
                bare(missing[0])
            );
            bail!(
                "{named} is no longer in the pipeline, and some dead letters of the interrupted redrive have \
                 been processed: put it back and run the command again, or finish the rest with \
                 `shardmill dlq redrive --without {}`; its dead letters stay",
                bare(missing[0])
            );
        }
        let Self { redrives, id, config, pipeline, state, lock, .. } = self;
        let (at_sinks, at_stages): (Vec<String>, Vec<String>) =
            gone.into_iter().partition(|place| place.starts_with("sink:"));
        let built = sinks::build(&config)?;
        let has_digests = redrives.has_digests(id).await?;
        let reached = match at_stages.is_empty() && !has_digests {
            true => Vec::new(),
            false => positions(&redrives, id, &state, &built).await?,
        };
        if !at_stages.is_empty() {
            redrives.release(id, at_stages, reached.clone()).await?;
        }
        let sink = |place: &String| match DeadLetterPlace::parse(place) {
            Some(DeadLetterPlace::Sink(sink)) => Some(sink),
            _ => None,
        };
        let options = RunOptions {
            dropped_sinks: at_sinks.iter().filter_map(sink).collect(),
            role: RunRole::Beside { is_running: pipeline.is_running },
            ..RunOptions::new(true)
        };
        redrives.note_sinks(id, pipeline.sinks.clone()).await?;
        let bound = MemoryBound::of(&config, 1);
        let bound = match has_digests {
            true => bound.with_remade_payloads(&config),
            false => bound,
        };
        tracing::info!("memory: {bound}");
        if let Some(warning) = bound.warning(memory_bytes_available().as_ref()) {
            tracing::warn!("{warning}");
        }
        let (limits, without) = (config.source.batch, at_sinks.clone());
        let (host, drain_max) = (plugin_host(&config)?, config.timing.drain_max);
        let revisions = RevisionStore::new(host.clone(), state.clone());
        let (ledger, stream_name) = (Ledger::new(state.clone()), config.source.stream_name());
        let remaker = Remaker::new(revisions, ledger, config.name.clone(), stream_name);
        let source = RedriveSource::new(redrives.clone(), id, &config.name, limits, without)
            .remade_by(Box::new(remaker), reached);
        let left_out = source.left_out();
        let source = Arc::new(source);
        let supervisor =
            Supervisor::prepare_under(lock, config, host, source, built, options).await?;
        supervisor.run_until(stop_on_signals(drain_max)?).await?;
        let Some(redriven) = redrives.finish(id, &at_sinks).await? else {
            bail!("the redrive was interrupted: `shardmill dlq redrive` continues it");
        };
        let left_out =
            std::mem::take(&mut *left_out.lock().unwrap_or_else(PoisonError::into_inner));
        let Redriven { dead_letters, failed_again, left } = redriven;
        console.say(format!("{dead_letters} dead letters redriven, {failed_again} failed again"));
        if left > 0 {
            console.say(format!(
                "{left} dead letters wait for {}: put it back and redrive them, or purge them",
                at_sinks.join(", ")
            ));
        }
        console.report(&Redriven { left: left + left_out.len() as u64, ..redriven })?;
        for (dead_letter, why) in &left_out {
            console.say(format!("dead letter {dead_letter} stays: {why}"));
        }
        ensure!(
            left_out.is_empty(),
            "{} dead letters were not redriven and stay: the payload that entered where they failed could not be \
             produced again",
            left_out.len()
        );
        Ok(())
    }

    /// Returns the places that are gone from the pipeline: those of its dead letters, and sinks that have part
    /// of it.
    async fn gone(&self) -> anyhow::Result<Vec<String>> {
        let mut gone = self.redrives.places(self.id).await?;
        gone.retain(|place| !self.pipeline.has(place));
        let lagging = self.redrives.lagging_sinks(self.id).await?;
        let lagging = lagging.iter().filter(|sink| !self.pipeline.sinks.contains(sink));
        for sink in lagging.chain(&self.pipeline.missing) {
            let place = DeadLetterPlace::Sink(sink.clone()).to_string();
            if !gone.contains(&place) {
                gone.push(place);
            }
        }
        Ok(gone)
    }

    /// Forgets a redrive of which nothing has run. Returns false if something may have run.
    async fn cancel_if_new(&self) -> anyhow::Result<bool> {
        if self.is_rest || self.redrives.has_run(self.id).await? {
            return Ok(false);
        }
        self.redrives.cancel(self.id).await?;
        Ok(true)
    }

    fn cannot_leave_out(&self, name: &str, gone: &[String]) -> String {
        let is_there = self.pipeline.sinks.iter().any(|sink| sink.as_str() == name)
            || self.pipeline.stages.iter().any(|stage| stage.as_str() == name);
        match (is_there, gone.is_empty()) {
            (true, _) => {
                "it is in the pipeline; only a stage or sink that is gone can be left out".into()
            }
            (false, true) => "no stage or sink that the dead letters enter is gone".into(),
            (false, false) => {
                format!(
                    "expected a stage or sink that is gone from the pipeline: {}",
                    gone.join(", ")
                )
            }
        }
    }
}

/// Returns the places that are gone and are named in `--without`, either by name or as `stage:NAME` or
/// `sink:NAME`.
///
/// # Errors
/// The first name that matches no such place.
fn left_out(gone: &[String], without: &[String]) -> Result<Vec<String>, String> {
    let mut left_out = Vec::new();
    for name in without {
        let is_meant = |place: &&String| *place == name || bare(place) == name;
        let meant: Vec<&String> = gone.iter().filter(is_meant).collect();
        if meant.is_empty() {
            return Err(name.clone());
        }
        left_out.extend(meant.into_iter().cloned());
    }
    Ok(left_out)
}

/// Returns the name in a place.
fn bare(place: &str) -> &str {
    place.split_once(':').map_or(place, |(_, name)| name)
}

/// Returns the position of each sink in a redrive.
async fn positions(
    redrives: &Redrives,
    id: RedriveId,
    state: &StateStore,
    sinks: &[Arc<dyn Sink>],
) -> anyhow::Result<Vec<(SinkName, Option<Position>)>> {
    let key = redrives.key(id);
    let noted = Checkpoints::new(state.clone()).sink_positions(&key).await?;
    let mut positions = Vec::new();
    for sink in sinks {
        let own = sink.position(&key).await?;
        positions.push((sink.name().clone(), own.or_else(|| noted.get(sink.name()).cloned())));
    }
    Ok(positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_24_only_what_is_gone_can_be_left_out() {
        let gone = ["sink:mart".to_owned(), "stage:mart".to_owned(), "sink:lake".to_owned()];
        for (without, expected) in [
            (&["mart"][..], Ok(vec!["sink:mart", "stage:mart"])),
            (&["sink:mart", "lake"], Ok(vec!["sink:mart", "sink:lake"])),
            (&["lake", "other"], Err("other")),
            (&[], Ok(vec![])),
        ] {
            let without: Vec<String> = without.iter().map(ToString::to_string).collect();
            let found = left_out(&gone, &without);
            let found = match &found {
                Ok(places) => Ok(places.iter().map(String::as_str).collect()),
                Err(name) => Err(name.as_str()),
            };
            assert_eq!(found, expected, "{without:?}");
        }
    }
}
