//! `shardmill objects`: is all that an objects sink claimed there, once?

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::json;

use super::{Console, DEFAULT_PIPELINE, holes, load};
use crate::config::{PipelineConfig, SinkConfig, SinkKind};
use crate::sink::objects::{Audit, ObjectsSink};
use crate::terminal::escaped;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Walk the claim logs of objects sinks: gaps, overlaps, and objects that nobody claims.
    #[command(
        after_help = "Examples:\n  shardmill objects verify\n  shardmill objects verify pipeline.toml \
                      --sink logs --content"
    )]
    Verify {
        /// The pipeline's file.
        #[arg(default_value = DEFAULT_PIPELINE)]
        pipeline: PathBuf,
        /// Only this sink; default: every objects sink.
        #[arg(long, value_name = "NAME")]
        sink: Option<String>,
        /// Read every object too, and compare it with its claim.
        #[arg(long)]
        content: bool,
    },
}

pub async fn objects(command: Command, console: &Console) -> anyhow::Result<()> {
    let Command::Verify { pipeline, sink, content } = command;
    let config = load(&pipeline)?;
    let mut problems = 0;
    for own in chosen(&config, sink.as_deref())? {
        let SinkKind::Objects { url, options, layout } = &own.kind else { continue };
        let name = &own.name.value;
        let sink = ObjectsSink::new(name.clone(), url, options, layout.clone())?;
        let audit = sink.verify(content).await.context("cannot verify")?;
        problems += audit.problems.len();
        // The logs say nothing of what was never given to the sink.
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

/// The objects sinks that are meant.
fn chosen<'c>(
    config: &'c PipelineConfig,
    name: Option<&str>,
) -> anyhow::Result<Vec<&'c SinkConfig>> {
    let objects = config
        .sinks
        .iter()
        .chain(&config.letter_sinks)
        .filter(|sink| matches!(sink.kind, SinkKind::Objects { .. }));
    let objects: Vec<&SinkConfig> =
        objects.filter(|sink| name.is_none_or(|name| sink.name.value.as_str() == name)).collect();
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
            "{} logs end with a claim whose objects are not all there yet: a run makes them again",
            audit.unfinished
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
