//! `shardmill plugin swap`, `rollback`, `history` and `which`: what runs in a stage, and what ran.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::control::{ControlAnswer, RunningPipeline};
use super::{Console, DEFAULT_PIPELINE, load, print_line, rerun};
use shardmill_config::PipelineConfig;
use shardmill_core::record::{Position, SequenceNumber, ShardId};
use shardmill_engine::swap::SHADOW_MAX;
use shardmill_serve::admin::control::SwapQuery;
use shardmill_state::{Change, ChangeOutcome, Changes, Ledger, Ran, StateStore};
use shardmill_state::{RevisionSpec, StageSpec};

/// The pipeline that is meant.
#[derive(clap::Args)]
pub struct PipelineArgs {
    /// The pipeline's file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PIPELINE)]
    pipeline: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct SwapOptions {
    /// The stage.
    stage: String,
    /// The component's file, or the first digits of the digest of one that ran before.
    component: String,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Go on comparing with live records for so long, such as "1 min", before it takes over; at most a day.
    #[arg(long, value_name = "DURATION", value_parser = parse_shadow)]
    shadow: Option<Duration>,
    /// Refuse it if it gives something else for more records than this.
    #[arg(long, value_name = "RECORDS")]
    max_changed: Option<u64>,
    /// Refuse it if it rejects more records than this which the one before takes.
    #[arg(long, value_name = "RECORDS")]
    max_rejected: Option<u64>,
    /// Give it only so many of 100 partition keys.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=99))]
    canary: Option<u8>,
    /// Try it and report; change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Reads how long a candidate is compared with live records.
fn parse_shadow(text: &str) -> Result<Duration, String> {
    let shadow = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match shadow <= SHADOW_MAX {
        true => Ok(shadow),
        false => {
            Err("expected at most one day; let the new version run as a canary instead".into())
        }
    }
}

/// Puts another plugin in a stage's place.
pub async fn swap(options: SwapOptions, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.pipeline)?;
    let running = RunningPipeline::find(&config).await?;
    let file = Path::new(&options.component);
    let (component, body) = match std::fs::read(file) {
        Ok(bytes) => {
            ensure!(!bytes.is_empty(), "{} is empty", file.display());
            (None, bytes)
        }
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound && is_digest(&options.component) =>
        {
            (Some(options.component.clone()), Vec::new())
        }
        Err(error) => {
            return Err(error)
                .with_context(|| format!("failed to read {}", shardmill_core::escape::path(file)));
        }
    };
    let query = SwapQuery {
        name: component.is_none().then(|| file.display().to_string()),
        component,
        canary: options.canary,
        shadow_ms: options.shadow.map_or(0, |shadow| shadow.as_millis() as u64),
        max_changed: options.max_changed,
        max_rejected: options.max_rejected,
        dry_run: options.dry_run,
    };
    let path = format!("/stages/{}/swap", options.stage);
    print_answer(running.post(&path, &query, body).await?, console)
}

fn is_digest(text: &str) -> bool {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    digits.chars().all(|digit| digit.is_ascii_hexdigit())
}

#[derive(clap::Args)]
pub(crate) struct RollbackOptions {
    /// The stage.
    stage: String,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Then run again what the undone version had run, into the tables that can take it.
    #[arg(long)]
    replay_from_swap: bool,
}

/// Undoes the last swap of a stage.
pub async fn roll_back(options: RollbackOptions, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.pipeline)?;
    let running = RunningPipeline::find(&config).await?;
    let changes = Changes::new(state(&config)?);
    let undone = changes.last_in_force(&options.stage).await?;
    // Undone before: by itself, or by this command, whose replay was broken off.
    let all = changes.list(Some(options.stage.clone()), u32::MAX).await?;
    let last = all.into_iter().find(|change| change.outcome == ChangeOutcome::RolledBack);
    let is_open = |change: &Change| undone.is_none() || rerun::is_broken_off(&config, change);
    if options.replay_from_swap
        && let Some(undone) = last.filter(is_open)
    {
        let report = rerun::rerun(&config, &options.stage, &undone, console).await?;
        return console.report(&report);
    }
    let path = format!("/stages/{}/rollback", options.stage);
    print_answer(running.post(&path, &json!({}), Vec::new()).await?, console)?;
    if let (true, Some(undone)) = (options.replay_from_swap, &undone) {
        rerun::begin(&config, undone)?;
    }
    if let (true, Some(undone)) = (options.replay_from_swap, undone) {
        let report = rerun::rerun(&config, &options.stage, &undone, console).await?;
        console.report(&report)?;
    }
    Ok(())
}

/// Says what was changed, or fails with the reason.
fn print_answer(answer: ControlAnswer, console: &Console) -> anyhow::Result<()> {
    let (report, refused) = match answer {
        ControlAnswer::Done(report) => (report, None),
        ControlAnswer::Refused(report) => {
            let error = report["error"].as_str().unwrap_or_default().to_owned();
            (report, Some(error))
        }
    };
    say_trial(&report["trial"], console);
    if let Some(why) = report["no_trial"].as_str() {
        console.say(format!("no trial: {why}"));
    }
    if let Some(error) = refused {
        console.report(&report)?;
        anyhow::bail!(error);
    }
    let version = |version: &Value| {
        let text = |name: &str| version[name].as_str().unwrap_or_default().to_owned();
        format!("{} {} ({})", text("plugin"), text("version"), &text("digest")[..12])
    };
    let stage = report["stage"].as_str().unwrap_or_default();
    let (before, after) = (version(&report["before"]), version(&report["after"]));
    match report["number"].as_i64() {
        None => console.say(format!("stage {stage}: {before} runs on, nothing was changed")),
        Some(number) => {
            let share = match report["percent"].as_u64() {
                Some(percent) if percent < 100 => format!(" for {percent} of 100 keys"),
                _ => String::new(),
            };
            console.say(format!("change {number}, stage {stage}: {before} → {after}{share}"));
        }
    }
    say_lanes(&report, console);
    if let Some(seconds) = report["probation_s"].as_u64().filter(|seconds| *seconds > 0) {
        console.say(format!("it is watched for {seconds} s and rolled back if it does worse"));
    }
    console.report(&report)
}

/// Says which lanes have changed, and how long each waited.
pub(super) fn say_lanes(report: &Value, console: &Console) {
    let lanes = report["lanes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let longest = lanes.iter().filter_map(|lane| lane["pause_us"].as_u64()).max();
    if let Some(longest) = longest {
        console
            .say(format!("{} lanes have changed; the longest pause was {longest} µs", lanes.len()));
    }
    if report["may_be_undone"].as_bool().unwrap_or_default() {
        console.say(
            "it begins once the lanes have let go of what they have; until then it is not in force and may be \
             undone (see `shardmill plugin history`)",
        );
    }
    for shard in report["waiting"].as_array().into_iter().flatten() {
        let text = |name: &str| shard[name].as_str().unwrap_or_default();
        console.say(format!("shard {} changes when it can: {}", text("shard"), text("why")));
    }
}

/// Says how a trial went.
pub(super) fn say_trial(trial: &Value, console: &Console) {
    if trial.is_null() {
        return;
    }
    let count = |name: &str| trial[name].as_u64().unwrap_or_default();
    console.say(format!(
        "trial: {} records: {} identical, {} changed, {} newly rejected, {} newly accepted, {} trapped",
        count("records"),
        count("identical"),
        count("changed"),
        count("newly_rejected"),
        count("newly_accepted"),
        count("trapped")
    ));
    if count("records") > 0 {
        let ns = |name: &str| trial[name].as_f64().unwrap_or_default();
        console.say(format!(
            "trial: {:.0} ns per record before, {:.0} ns after",
            ns("incumbent_ns_per_record"),
            ns("candidate_ns_per_record")
        ));
    }
    if let Some(cause) = trial["incumbent_failed"].as_str() {
        console.say(format!(
            "trial: the version before failed: {}; {} records were given to the new one alone",
            shardmill_core::escape::escaped(cause, &[]),
            count("candidate_only")
        ));
    }
    for difference in trial["differences"].as_array().into_iter().flatten() {
        let text = |name: &str| difference[name].as_str().unwrap_or_default();
        console.say(format!("{}: {}", text("record"), text("payload")));
        for line in text("diff").lines() {
            console.say(format!("  {}", shardmill_core::escape::escaped(line, &[])));
        }
    }
}

#[derive(clap::Args)]
pub(crate) struct HistoryOptions {
    /// Only changes of this stage.
    stage: Option<String>,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// The most changes that are shown.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// From which record on each revision ran in each shard, as well.
    #[arg(long)]
    shards: bool,
}

/// Shows what was changed, when, and what was refused.
pub async fn history(options: HistoryOptions, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.pipeline)?;
    let state = state(&config)?;
    let ledger = Ledger::new(state.clone());
    let changes = Changes::new(state).list(options.stage, options.limit).await?;
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["change", "time", "kind", "stage", "from", "to", "outcome", "reason"]);
    for change in &changes {
        let mut digests = Vec::new();
        for revision in [&change.before, &change.after] {
            digests.push(match ledger.spec(revision).await {
                Ok(spec) => digest_in(&spec, &change.stage),
                Err(_) => String::new(),
            });
        }
        let (kind, outcome) = (change.kind.as_str(), change.outcome.as_str());
        let (number, at) = (change.number.to_string(), time(change.at_ms));
        let [from, to] = [&digests[0], &digests[1]];
        let reason = shardmill_core::escape::escaped(&change.reason, &[]);
        table.add_row([&number, &at, kind, &change.stage, from, to, outcome, &reason]);
        console.report(change)?;
    }
    console.say(table);
    if options.shards {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["shard", "behind", "generation", "recorded"]);
        for entry in ledger.history().await? {
            let after =
                entry.from_exclusive.as_ref().map_or("the beginning".into(), Position::to_string);
            let at = time(entry.recorded_ms);
            table.add_row([entry.shard.as_str(), &after, &entry.revision, &at]);
            console.report(&entry)?;
        }
        console.say(table);
    }
    Ok(())
}

/// A time as people write it, in UTC; a number that is no time stays as it is.
fn time(ms: i64) -> String {
    let time = chrono::DateTime::from_timestamp_millis(ms);
    time.map_or_else(|| format!("{ms} ms"), |time| time.format("%FT%TZ").to_string())
}

/// The component of a stage in a revision; of a reload, how many stages there are.
fn digest_in(spec: &RevisionSpec, stage: &str) -> String {
    let short = |stage: &StageSpec| match &stage.canary {
        Some(canary) => {
            format!("{}, {} % {}", &stage.digest[..12], canary.percent, &canary.digest[..12])
        }
        None => stage.digest[..12].to_owned(),
    };
    match spec.stages.iter().find(|own| own.name.as_str() == stage) {
        Some(stage) => short(stage),
        None => spec.id().to_string(),
    }
}

#[derive(clap::Args)]
pub(crate) struct WhichOptions {
    /// The record: its shard and sequence number, as SHARD:SEQUENCE; in an aggregate, SHARD:SEQUENCE/NUMBER.
    record: String,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// The record's partition key: by it a canary's share is told.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

/// Says by which versions a record was run.
pub async fn which(options: WhichOptions, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.pipeline)?;
    let (shard, sequence) = options
        .record
        .rsplit_once(':')
        .context("name the record as SHARD:SEQUENCE, such as shardId-000000000000:4960…")?;
    // Another revision may begin within an aggregate: SEQUENCE/NUMBER is one of its records.
    let (sequence, number) = sequence.split_once('/').unwrap_or((sequence, "0"));
    let sub_sequence = number.parse().with_context(|| {
        format!("{number:?} is not the number of a record in its aggregate: expected 0, 1, 2, …")
    })?;
    let ledger = Ledger::new(state(&config)?);
    let at = Position { sequence: SequenceNumber::parse(sequence)?, sub_sequence };
    let found = ledger.revision_of(&ShardId::new(shard), &at).await?;
    let Ran { revision, spec, is_committed } = found
        .with_context(|| format!("nothing of shard {shard} was run by pipeline {}", config.name))?;
    if !console.json {
        print_line(format!("generation {revision}"));
    }
    if !is_committed {
        console.say(
            "no sink has the record yet, as of the last checkpoint: another swap may come first",
        );
    }
    let mut stages = Vec::new();
    for stage in &spec.stages {
        let mut digest = stage.digest.clone();
        if let Some(canary) = &stage.canary {
            match &options.key {
                Some(key) if canary.takes(key.as_bytes()) => digest = canary.digest.clone(),
                Some(_) => {}
                None => console.say(format!(
                    "stage {}: {} has {} of 100 keys: name the record's with --key",
                    stage.name,
                    &canary.digest[..12],
                    canary.percent
                )),
            }
        }
        console.say(format!("stage {}: {digest}", stage.name));
        stages.push(json!({ "stage": stage.name, "digest": digest }));
    }
    console.report(&json!({ "generation": revision, "is_settled": is_committed, "stages": stages }))
}

/// The state of a pipeline that ran. Another process may be running it.
fn state(config: &PipelineConfig) -> anyhow::Result<StateStore> {
    let folder = config.state_dir.join(config.name.as_str());
    ensure!(
        folder.join("state.db").exists(),
        "pipeline {} has no history: it never ran with its state in {}",
        config.name,
        folder.display()
    );
    super::state_beside(config)
}
