//! `shardmill reload`: makes a running pipeline apply its changed files.

use serde_json::Value;
use shardmill_core::boxed;

use super::control::{ControlAnswer, RunningPipeline};
use super::{Console, PipelineFile, load, swap};
use shardmill_serve::admin::control::ReloadQuery;

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Show what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

#[boxed]
pub async fn reload(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    let running = RunningPipeline::find(&config).await?;
    let query = ReloadQuery { dry_run: options.dry_run };
    print_answer(running.post("/reload", &query, Vec::new()).await?, options.dry_run, console)
}

/// Prints what a reload has changed or would change.
pub(super) fn print_answer(
    answer: ControlAnswer,
    dry_run: bool,
    console: &Console,
) -> anyhow::Result<()> {
    let report = match answer {
        ControlAnswer::Done(report) => report,
        ControlAnswer::Refused(report) => {
            swap::say_trial(&report["trial"], console);
            console.report(&report)?;
            anyhow::bail!(report["error"].as_str().unwrap_or_default().to_owned());
        }
    };
    let lines = ["stages", "sinks", "settings"].map(|part| report["diff"][part].as_array());
    let lines: Vec<&str> =
        lines.into_iter().flatten().flatten().filter_map(Value::as_str).collect();
    for line in &lines {
        console.say(line);
    }
    for trial in report["trials"].as_array().into_iter().flatten() {
        console.say(format!("stage {}:", trial[0].as_str().unwrap_or_default()));
        swap::say_trial(&trial[1], console);
    }
    for stage in report["no_trials"].as_array().into_iter().flatten() {
        let text = |part: usize| stage[part].as_str().unwrap_or_default();
        console.say(format!("stage {}: no trial: {}", text(0), text(1)));
    }
    let revision = report["generation"].as_str().unwrap_or_default();
    let how = match report["takes_over"].as_bool() {
        Some(true) => "every lane releases its shard, and all shards are acquired again",
        _ => "every lane changes at its next batch boundary",
    };
    let may_be_undone = report["may_be_undone"].as_bool().unwrap_or_default();
    console.say(match (lines.is_empty(), dry_run) {
        _ if may_be_undone => format!("stored, not in force yet: revision {revision}"),
        (true, _) => {
            format!("nothing to change: the files match the running revision ({revision})")
        }
        (false, true) => format!("a reload would activate revision {revision}: {how}"),
        (false, false) => format!("reloaded: revision {revision}"),
    });
    swap::say_lanes(&report, console);
    console.report(&report)
}
