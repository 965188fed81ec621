//! `shardmill dlq redrive`: dead letters through the pipeline once more, beside it or while it does not run.
//!
//! Nothing that the pipeline owns is written: not what runs, not its changes. What is written is the
//! redrive's own, keyed by a stream of its own, and what became of the letters.

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
        "letters of what was run again cannot be redriven: their rows may have gone to tables beside; \
         `shardmill dlq export --again` writes them out"
    );
    let mut config = load(&wanted.pipeline.pipeline)?;
    // All of them failed once: that more than a few do again says nothing.
    config.rejected_max = RejectedMax::NONE;
    // An error here is better than a lock in a folder that was never used.
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
        "{doubtful} of these letters come from an older copy of the state, with which the pipeline went \
         on (--trust-sinks): they may have been redriven since that copy was made, and their rows would \
         be doubled. Delete those that were (`shardmill dlq purge`); --even-if-redriven sends the others"
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

/// A redrive that goes on: one that was broken off, or the rest of one whose sink is back.
async fn choose(
    redrives: &Redrives,
    pipeline: &Pipeline,
    console: &Console,
) -> anyhow::Result<Option<UnfinishedRedrive>> {
    let unfinished = redrives.unfinished().await?;
    if let Some(broken_off) = unfinished.iter().find(|one| !one.is_rest) {
        console.say("a redrive was broken off: it goes on, the letters named now are not begun");
        return Ok(Some(*broken_off));
    }
    for rest in unfinished {
        let places = redrives.places(rest.id).await?;
        let gone: Vec<&String> = places.iter().filter(|place| !pipeline.has(place)).collect();
        if gone.len() < places.len() {
            console.say(
                "what an earlier redrive has left goes on, the letters named now are not begun",
            );
            return Ok(Some(rest));
        }
    }
    Ok(None)
}

/// Begins a redrive; `None`: no letter is meant.
async fn begin(
    redrives: &Redrives,
    wanted: &Selection,
    (all, without): (bool, &[String]),
    console: &Console,
) -> anyhow::Result<Option<RedriveId>> {
    ensure!(
        without.is_empty() || all || !wanted.filter().is_empty(),
        "no redrive was broken off: name the letters, or say --all"
    );
    let begun = redrives.begin(wanted.chosen(all, "redrive")?).await?;
    if begun.is_none() {
        console.say("0 dead letters");
    }
    Ok(begun)
}

/// What the pipeline runs, as far as letters can enter it.
struct Pipeline {
    is_running: bool,
    stages: Vec<StageName>,
    /// Those of the file that run.
    sinks: Vec<SinkName>,
    /// Sinks that what runs is bound to and that the file does not have.
    missing: Vec<SinkName>,
}

impl Pipeline {
    /// While it runs: what it has noted. Sinks are made by the file, so those of the file that do not run
    /// are left out, and one that was changed there since is refused.
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
                "{}: sink {sink} is not as the running pipeline has it: `shardmill reload` first, or put \
                 the file back",
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

    /// Whether letters can enter at a place.
    fn has(&self, place: &str) -> bool {
        match DeadLetterPlace::parse(place) {
            Some(DeadLetterPlace::Stage(name)) => self.stages.contains(&name),
            Some(DeadLetterPlace::Sink(name)) => self.sinks.contains(&name),
            None => false,
        }
    }
}

/// Finds out whether the rows of replays that were broken off are there: by that a redrive knows which
/// letters a sink has.
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
            // Nothing is redriven to that sink either; it is found out when the sink is back.
            tracing::warn!(sink = %replay.sink, "a replay of a sink that is gone is not resolved");
            continue;
        };
        match TableWindow::has_landed(target, &config.name, (&replay.sink, replay.id), silence_max)
            .await
        {
            Ok(true) => {
                replays.confirm(replay.id).await?;
                console.say(format!("a replay of sink {} had replaced its rows", replay.sink));
            }
            Ok(false) => replays.cancel(replay.id).await?,
            Err(cause) => bail!(
                "whether a replay of sink {} has replaced rows is not known: {cause}; give the command \
                 again when the table is in reach",
                replay.sink
            ),
        }
    }
    Ok(())
}

/// A redrive about to run.
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
                "{named} is not in the pipeline any more, so nothing can enter there: put it back, or \
                 leave its letters out (--without {})",
                bare(missing[0])
            );
            bail!(
                "{named} is not in the pipeline any more, and some letters of the redrive that was broken \
                 off have been run: put it back and give the command again, or finish the rest with \
                 `shardmill dlq redrive --without {}`; its letters stay",
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
            bail!("the redrive was broken off: `shardmill dlq redrive` goes on with it");
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
            "{} dead letters were not redriven and stay: what entered where they failed could not be made \
             again",
            left_out.len()
        );
        Ok(())
    }

    /// Places of its letters, and sinks that have a part of it, that are gone.
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

    /// Forgets a redrive that nothing of has run; false: something may have.
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
            (true, _) => "it is in the pipeline; only what is gone can be left out".into(),
            (false, true) => "nothing of what the letters enter is gone".into(),
            (false, false) => {
                format!("expected what is gone from the pipeline: {}", gone.join(", "))
            }
        }
    }
}

/// The gone places that are named, by the name alone or as `stage:NAME` or `sink:NAME`.
///
/// # Errors
/// A name that is of none.
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

/// The name in a place.
fn bare(place: &str) -> &str {
    place.split_once(':').map_or(place, |(_, name)| name)
}

/// How far each sink is with a redrive.
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
