//! `shardmill check`: everything that `run` proves before its first record, and nothing else.

use std::sync::Arc;

use serde::Serialize;

use super::{Console, PipelineFile, load, sinks};
use crate::record::SinkName;
use crate::sink::Sink;
use crate::stage::{Generation, Target};

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Check the file and the plugins only; talk to no sink.
    #[arg(long)]
    offline: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    pipeline: &'a str,
    generation: &'a str,
    stages: Vec<StageReport<'a>>,
    sinks: Vec<String>,
}

#[derive(Serialize)]
struct StageReport<'a> {
    stage: &'a str,
    plugin: &'a str,
    version: &'a str,
    digest: &'a str,
    routes: Vec<String>,
}

pub async fn check(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    let host = super::plugin_host(&config)?;
    let (generation, _) = Generation::from_config(&config, &host, &|_| None)?;
    let sinks: Vec<Arc<dyn Sink>> = sinks::build(&config)?;
    if !options.offline {
        for sink in &sinks {
            sink.prepare(&generation.routes_to(sink.name())).await?;
        }
    }
    let report = report(&config.name, &generation, &sinks);
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
    let state = if options.offline { "not asked" } else { "ready" };
    for sink in &report.sinks {
        console.say(format!("sink {sink}: {state}"));
    }
    console
        .say(format!("pipeline {} is sound (generation {})", report.pipeline, report.generation));
    console.report(&report)
}

fn report<'a>(
    name: &'a crate::record::PipelineName,
    generation: &'a Generation,
    sinks: &[Arc<dyn Sink>],
) -> Report<'a> {
    let stages = generation.stages.iter().map(|stage| StageReport {
        stage: stage.name.as_str(),
        plugin: &stage.descriptor.name,
        version: &stage.descriptor.version,
        digest: stage.plugin.digest.as_str(),
        routes: stage
            .route_names
            .iter()
            .zip(stage.targets.iter())
            .map(|(route, target)| match target {
                Target::Next(_) => format!("{route} → next stage"),
                Target::Sinks(sinks) if sinks.is_empty() => format!("{route} → dropped"),
                Target::Sinks(sinks) => {
                    let names: Vec<&str> = sinks.iter().map(SinkName::as_str).collect();
                    format!("{route} → {}", names.join(" + "))
                }
            })
            .collect(),
    });
    Report {
        pipeline: name.as_str(),
        generation: &generation.id,
        stages: stages.collect(),
        sinks: sinks.iter().map(|sink| sink.name().to_string()).collect(),
    }
}
