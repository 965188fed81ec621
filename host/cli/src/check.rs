//! `shardmill check`: validates everything that `run` validates before its first record, and reads no record.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;

use super::control::RunningPipeline;
use super::{Console, PipelineFile, holes, load, reload, sinks};
use shardmill_config::{PipelineConfig, SourceKind};
use shardmill_core::boxed;
use shardmill_core::record::{SinkName, StreamIdentity};
use shardmill_core::sink::Sink;
use shardmill_core::source::ShardSource as _;
use shardmill_engine::bound::{MemoryBound, memory_bytes_available};
use shardmill_engine::lane::{BuildSinks, agreement, roster};
use shardmill_engine::lock::PipelineLock;
use shardmill_engine::stage::{Revision, RouteTarget};
use shardmill_file::FileSource;
use shardmill_serve::admin::control::ReloadQuery;
use shardmill_state::{Changes, Checkpoints, DeadLetters, StateStore, StoredDeadLetter};

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Check only the file and the plugins; connect to no sink.
    #[arg(long)]
    offline: bool,
    /// Also check what only a write can show: probe object stores, create missing tables.
    #[arg(long, conflicts_with = "offline")]
    write: bool,
    /// Show what the running pipeline would change if it reloaded its files now.
    #[arg(long, conflicts_with = "offline")]
    diff: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    pipeline: &'a str,
    #[serde(rename = "generation")]
    revision: &'a str,
    stages: Vec<StageReport<'a>>,
    sinks: Vec<String>,
    warnings: Vec<String>,
    /// Holes in what sinks were given, each with the command that fills it.
    holes: Vec<String>,
}

#[derive(Serialize)]
struct StageReport<'a> {
    stage: &'a str,
    plugin: &'a str,
    version: &'a str,
    digest: &'a str,
    routes: Vec<String>,
}

#[boxed]
pub async fn check(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    let host = super::plugin_host(&config)?;
    let (revision, _) = Revision::load(&config, &host, |_| None).await?;
    let mut sinks: Vec<Arc<dyn Sink>> = sinks::build(&config)?;
    let mut routes: Vec<_> = sinks.iter().map(|sink| revision.routes_to(sink.name())).collect();
    let copies =
        config.for_dead_letters(config.state_dir.to_path_buf(), StoredDeadLetter::columns());
    if let Some(copies) = &copies {
        let (copied, _) = Revision::load(copies, &host, |_| None).await?;
        let dead_letter_sinks = sinks::build(copies)?;
        routes.extend(dead_letter_sinks.iter().map(|sink| copied.routes_to(sink.name())));
        sinks.extend(dead_letter_sinks);
    }
    let mut sink_warnings = Vec::new();
    let mut file_source = None;
    if !options.offline {
        PipelineLock::check(&config.state_dir, &config.name)?;
        if let SourceKind::File(file) = &config.source.kind {
            let source = FileSource::new(file, config.source.batch)?;
            source.check()?;
            file_source = Some(source);
        }
        host.backends.prepare().await?;
        for (sink, routes) in sinks.iter().zip(&routes) {
            let found = sink.check(routes).await?;
            sink_warnings
                .extend(found.into_iter().map(|text| format!("sink {}: {text}", sink.name())));
            if options.write {
                sink.prepare(routes).await?;
            }
        }
    }
    let mut report = report(&config, &revision, &sinks);
    let recorded = holes::of(&config, None).await?;
    report.holes = recorded.iter().map(|hole| holes::line(&config, hole)).collect();
    report.warnings.extend(sink_warnings);
    if let Some(state) = StateStore::open_if_current(&holes::folder(&config))? {
        report.warnings.extend(roster::start_warnings(&config, &state).await?);
        // A record of what runs that cannot be read would stop the next start, so it fails here too.
        Changes::new(state.clone()).running().await?;
        if !options.offline {
            let stream = match &file_source {
                Some(source) => Some(source.identity().await?),
                None => None,
            };
            if let (Some(source), Some(stream)) = (&file_source, &stream) {
                check_going_on(source, stream, &state).await?;
            }
            let own = &sinks[..config.sinks.len()];
            let (build, stream): (BuildSinks, _) = (Arc::new(sinks::build), stream.as_ref());
            let duplicates =
                roster::duplicate_warnings(&config, &state, own, (stream, &build)).await?;
            report.warnings.extend(duplicates);
            let warnings = agreement::start_warnings(&config, &state, own, stream).await?;
            report.warnings.extend(warnings);
        }
        if let Some(copies) = copies.as_ref().filter(|_| !options.offline)
            && let Some(copied) = StateStore::open_if_current(&holes::folder_of_copies(&config))?
        {
            let dead_letter_sinks = &sinks[config.sinks.len()..];
            // The copies read the log of dead letters in the pipeline's own state.
            let log = DeadLetters::new(state).log_stream(&config.name).await?;
            let warnings =
                agreement::start_warnings(copies, &copied, dead_letter_sinks, Some(&log)).await?;
            report.warnings.extend(warnings);
        }
    }
    for stage in &report.stages {
        console.say(format!(
            "stage {}: {} {} ({}) -> {}",
            stage.stage,
            stage.plugin,
            stage.version,
            &stage.digest[..12],
            stage.routes.join(", ")
        ));
    }
    let state = if options.offline { "not checked" } else { "ready" };
    for sink in &report.sinks {
        console.say(format!("sink {sink}: {state}"));
    }
    for warning in &report.warnings {
        console.say(format!("warning: {warning}"));
    }
    for hole in &report.holes {
        console.say(hole);
    }
    console.say(format!("pipeline {} is valid (revision {})", report.pipeline, report.revision));
    console.report(&report)?;
    if options.diff {
        let running = RunningPipeline::find(&config).await?;
        let query = ReloadQuery { dry_run: true };
        reload::print_answer(running.post("/reload", &query, Vec::new()).await?, true, console)?;
    }
    Ok(())
}

/// Checks that a start could continue in the file where the last run ended.
async fn check_going_on(
    source: &FileSource,
    stream: &StreamIdentity,
    state: &StateStore,
) -> anyhow::Result<()> {
    let shards = Checkpoints::new(state.clone()).shards(stream).await?;
    for after in shards.values().filter_map(|shard| shard.checkpoint.as_ref()) {
        source.check_after(after)?;
    }
    Ok(())
}

/// Returns warnings for stages whose outputs may differ at a replay and that feed more than one exactly-once
/// sink. If these sinks are at different positions, a replayed record may take another route and miss one of
/// them.
fn replay_warnings(config: &PipelineConfig, revision: &Revision) -> Vec<String> {
    let is_exact = |sink: &&SinkName| {
        let known = config.sinks.iter().find(|known| known.name.value == **sink);
        known.is_some_and(|known| known.settings.is_exact())
    };
    let mut warnings = Vec::new();
    for (index, stage) in revision.stages.iter().enumerate() {
        let fickle: Vec<&str> = stage
            .plugin
            .capabilities
            .iter()
            .filter(|capability| !capability.is_deterministic())
            .map(|capability| capability.name())
            .collect();
        let after = revision.spec.stages[index..].iter();
        let fed: BTreeSet<&SinkName> =
            after.flat_map(|stage| stage.routes.values().flatten()).filter(is_exact).collect();
        if !fickle.is_empty() && fed.len() > 1 {
            let fed: Vec<&str> = fed.into_iter().map(SinkName::as_str).collect();
            warnings.push(format!(
                "stage {} uses {}, so a replay may give other outputs, and feeds {}: after a crash, one of \
                 them may have a row that the others do not have; where that matters, give each sink a \
                 pipeline of its own",
                stage.name,
                fickle.join(", "),
                fed.join(" and ")
            ));
        }
    }
    warnings
}

fn report<'a>(
    config: &'a PipelineConfig,
    revision: &'a Revision,
    sinks: &[Arc<dyn Sink>],
) -> Report<'a> {
    let stages = revision.stages.iter().map(|stage| StageReport {
        stage: stage.name.as_str(),
        plugin: &stage.descriptor.name,
        version: &stage.descriptor.version,
        digest: stage.plugin.digest.as_str(),
        routes: stage
            .route_names
            .iter()
            .zip(stage.targets.iter())
            .map(|(route, target)| match target {
                RouteTarget::Next(_) => format!("{route} → next stage"),
                RouteTarget::Sinks(sinks) if sinks.is_empty() => format!("{route} → dropped"),
                RouteTarget::Sinks(sinks) => {
                    let names: Vec<&str> = sinks.iter().map(SinkName::as_str).collect();
                    format!("{route} → {}", names.join(" + "))
                }
            })
            .collect(),
    });
    let mut warnings = replay_warnings(config, revision);
    // Assumes the shards that the file names, or one, because the stream is not asked.
    let shards = config.source.kinesis().and_then(|it| it.create).map_or(1, |it| it.shards);
    let bound = MemoryBound::of(config, shards as usize);
    warnings.extend(bound.warning(memory_bytes_available().as_ref()));
    Report {
        pipeline: config.name.as_str(),
        warnings,
        revision: &revision.id,
        stages: stages.collect(),
        sinks: sinks.iter().map(|sink| sink.name().to_string()).collect(),
        holes: Vec::new(),
    }
}
