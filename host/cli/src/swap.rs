//! `shardmill plugin swap`, `rollback`, `history` and `which`: what runs in a stage, and what ran there.

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

/// The pipeline of the command.
#[derive(clap::Args)]
pub struct PipelineArgs {
    /// The pipeline file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PIPELINE)]
    pipeline: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct SwapOptions {
    /// The stage.
    stage: String,
    /// File of the component, or the first digits of the digest of a component that ran before.
    component: String,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Also compare it with the current plugin on live records for this long before it is activated, such as "1
    /// min"; at most one day.
    #[arg(long, value_name = "DURATION", value_parser = parse_shadow)]
    shadow: Option<Duration>,
    /// Refuse the new plugin if its outputs differ for more than this number of records.
    #[arg(long, value_name = "RECORDS")]
    max_changed: Option<u64>,
    /// Refuse the new plugin if it rejects more than this number of records that the current plugin accepts.
    #[arg(long, value_name = "RECORDS")]
    max_rejected: Option<u64>,
    /// Run the new plugin as a canary, for this percentage of partition keys only.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=99))]
    canary: Option<u8>,
    /// Try the new plugin and report, but change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Parses the duration for which a candidate is compared on live records.
fn parse_shadow(text: &str) -> Result<Duration, String> {
    let shadow = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match shadow <= SHADOW_MAX {
        true => Ok(shadow),
        false => {
            Err("expected at most one day; let the new version run as a canary instead".into())
        }
    }
}

/// Replaces the plugin of a stage.
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
    /// After the rollback, rerun the records that the undone version had processed, into the tables that
    /// support it.
    #[arg(long)]
    replay_from_swap: bool,
}

/// Undoes the last swap of a stage.
pub async fn roll_back(options: RollbackOptions, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.pipeline)?;
    let running = RunningPipeline::find(&config).await?;
    let changes = Changes::new(state(&config)?);
    let undone = changes.last_in_force(&options.stage).await?;
    // A swap that was undone before: automatically, or by this command, whose rerun was then interrupted.
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

/// Prints what was changed, or fails with the reason.
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
        None => console.say(format!("stage {stage}: {before} keeps running, nothing was changed")),
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
        console.say(format!("probation of {seconds} s: it is rolled back if it does worse"));
    }
    console.report(&report)
}

/// Prints which lanes have changed, and how long the longest swap pause was.
pub(super) fn say_lanes(report: &Value, console: &Console) {
    let lanes = report["lanes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let longest = lanes.iter().filter_map(|lane| lane["pause_us"].as_u64()).max();
    if let Some(longest) = longest {
        console.say(format!(
            "{} lanes have changed; the longest swap pause was {longest} µs",
            lanes.len()
        ));
    }
    if report["may_be_undone"].as_bool().unwrap_or_default() {
        console.say(
            "it starts when the lanes have released their shards; until then it is not in force and may be \
             undone (see `shardmill plugin history`)",
        );
    }
    for shard in report["waiting"].as_array().into_iter().flatten() {
        let text = |name: &str| shard[name].as_str().unwrap_or_default();
        console.say(format!("shard {} has not changed yet: {}", text("shard"), text("why")));
    }
}

/// Prints the result of a trial.
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
            "trial: the incumbent did not answer for every record: {}; {} records ran with the candidate only",
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
    /// Show only changes of this stage.
    stage: Option<String>,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Maximum number of changes to show.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Also show after which record each revision ran in each shard.
    #[arg(long)]
    shards: bool,
}

/// Prints changes with time and outcome, including refused ones.
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
        table.set_header(["shard", "after", "revision", "recorded"]);
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

/// Formats a time for people, in UTC. A number that is not a valid time stays a number.
fn time(ms: i64) -> String {
    let time = chrono::DateTime::from_timestamp_millis(ms);
    time.map_or_else(|| format!("{ms} ms"), |time| time.format("%FT%TZ").to_string())
}

/// Returns the component of a stage in a revision. For a reload, which has no stage, returns the ID of the
/// revision.
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
    /// The record as SHARD:SEQUENCE; a record of an aggregate as SHARD:SEQUENCE/NUMBER.
    record: String,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Partition key of the record; it decides whether a canary processed it.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

/// Prints which versions processed a record.
pub async fn which(options: WhichOptions, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.pipeline)?;
    let (shard, sequence) = options
        .record
        .rsplit_once(':')
        .context("invalid record: expected SHARD:SEQUENCE, such as shardId-000000000000:4960…")?;
    // A revision may begin within an aggregate: SEQUENCE/NUMBER names one of its records.
    let (sequence, number) = sequence.split_once('/').unwrap_or((sequence, "0"));
    let sub_sequence = number.parse().with_context(|| {
        format!("invalid number of a record in its aggregate: {number:?}; expected 0, 1, 2, …")
    })?;
    let ledger = Ledger::new(state(&config)?);
    let at = Position { sequence: SequenceNumber::parse(sequence)?, sub_sequence };
    let found = ledger.revision_of(&ShardId::new(shard), &at).await?;
    let Ran { revision, spec, is_committed } = found.with_context(|| {
        format!("pipeline {} has not processed any record of shard {shard}", config.name)
    })?;
    if !console.json {
        print_line(format!("revision {revision}"));
    }
    if !is_committed {
        console.say(
            "no sink has the record yet, as of the last checkpoint: a swap may still come before it",
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
                    "stage {}: canary {} processes {} % of the keys: give the record's partition key with --key",
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

/// Opens the state of a pipeline that has run. Another process may be running the pipeline.
fn state(config: &PipelineConfig) -> anyhow::Result<StateStore> {
    let folder = config.state_dir.join(config.name.as_str());
    ensure!(
        folder.join("state.db").exists(),
        "pipeline {} has no history: no state found in {}; it has never run with this state_dir",
        config.name,
        folder.display()
    );
    super::state_beside(config)
}
