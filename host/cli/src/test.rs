//! `shardmill test`: runs a plugin's test cases, accepts its outputs, or captures cases from real records.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use super::{Console, load, stream};
use shardmill_config::PipelineConfig;
use shardmill_core::boxed;
use shardmill_core::off_thread::off_thread;
use shardmill_workbench::build::build_plugin;
use shardmill_workbench::capture;
use shardmill_workbench::capture::SequenceRange;
use shardmill_workbench::case::CaseFile;
use shardmill_workbench::compare;
use shardmill_workbench::compare::CaseVerdict;
use shardmill_workbench::junit;
use shardmill_workbench::junit::JunitCase;
use shardmill_workbench::manifest::PluginManifest;
use shardmill_workbench::redact::Redaction;
use shardmill_workbench::{TrialRecord, Workbench, update};

/// File of captured cases in the plugin's folder.
const CAPTURED: &str = "tests/captured.ndjson";

#[derive(clap::Args)]
pub struct Options {
    /// Folder of the plugin, which is built first; or a component, with the test cases in its folder.
    #[arg(default_value = ".")]
    plugin: PathBuf,
    /// Files of test cases to run instead of those in tests/.
    #[arg(long, value_name = "FILE")]
    cases: Vec<PathBuf>,
    /// Run only cases whose name contains this text.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Do not build; use the existing component.
    #[arg(long)]
    no_build: bool,
    /// Accept the current outputs: write them into the case files as expected.
    #[arg(long, conflicts_with_all = ["from_stream", "from_dlq"])]
    update: bool,
    /// Also write the results as JUnit XML.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Make cases from the records of a stream instead: SHARD:SEQUENCE..SEQUENCE, both inclusive.
    #[arg(long, value_name = "RANGE", requires = "pipeline")]
    from_stream: Option<SequenceRange>,
    /// Make cases from a pipeline's dead letters instead, from the payloads that entered the stage.
    #[arg(long, requires = "pipeline", conflicts_with = "from_stream")]
    from_dlq: bool,
    /// The pipeline to capture records from.
    #[arg(long, value_name = "FILE")]
    pipeline: Option<PathBuf>,
    /// Stage whose configuration and dead letters are used [default: the first stage].
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    /// Maximum number of dead letters to capture.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
    /// Redact this member of JSON payloads in captured cases, such as /user/email; `*` matches any member.
    /// Applies in addition to `redact` under `[test]` in plugin.toml.
    #[arg(long, value_name = "POINTER")]
    redact: Vec<String>,
}

#[derive(Serialize)]
struct CaseReport<'a> {
    case: &'a str,
    file: String,
    passed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<String>,
}

#[derive(Serialize)]
struct Summary {
    passed: usize,
    failed: usize,
    updated: usize,
}

#[boxed]
pub async fn test(options: Options, console: &Console) -> anyhow::Result<()> {
    let of_records = options.from_stream.is_some() || options.from_dlq;
    let console = console.clone();
    let (options, folder, workbench, console) = off_thread(move || {
        let (folder, component) = component(&options, &console)?;
        let workbench = Workbench::new(super::load_plugin(&component)?);
        if !of_records {
            run_cases(&options, &folder, &workbench, &console)?;
        }
        anyhow::Ok((options, folder, workbench, console))
    })
    .await?;
    match of_records {
        true => capture(&options, &folder, workbench, &console).await,
        false => Ok(()),
    }
}

/// Runs the test cases of a plugin, and fails if any of them fails.
fn run_cases(
    options: &Options,
    folder: &Path,
    workbench: &Workbench,
    console: &Console,
) -> anyhow::Result<()> {
    let files = match options.cases.is_empty() {
        true => CaseFile::in_folder(folder)?,
        false => options.cases.clone(),
    };
    ensure!(
        !files.is_empty(),
        "no test cases in {}: write tests/cases.toml, or capture cases with --from-stream",
        folder.join("tests").display()
    );
    let mut summary = Summary { passed: 0, failed: 0, updated: 0 };
    let mut results = Vec::new();
    for path in files {
        let file = CaseFile::read(&path)?;
        run_file(&file, workbench, options, console, &mut summary, &mut results)?;
    }
    if let Some(path) = &options.junit {
        let name = &workbench.plugin().path;
        let suite = Path::new(&**name).file_stem().and_then(|stem| stem.to_str()).unwrap_or(name);
        std::fs::write(path, junit::document(suite, &results)?)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    let Summary { passed, failed, updated } = summary;
    console.say(match updated {
        0 => format!("{passed} passed, {failed} failed"),
        _ => format!("{passed} passed, {updated} updated"),
    });
    console.report(&summary)?;
    ensure!(failed == 0, "{failed} of {} cases failed", passed + failed);
    Ok(())
}

/// Returns the plugin's folder and its component, which is built first if necessary.
fn component(options: &Options, console: &Console) -> anyhow::Result<(PathBuf, PathBuf)> {
    let plugin = &options.plugin;
    if plugin.is_file() {
        let folder = plugin.parent().unwrap_or(Path::new("")).to_owned();
        return Ok((folder, plugin.clone()));
    }
    let name = PluginManifest::read(plugin)?.name;
    let component = match options.no_build {
        true => plugin.join(format!("{name}.wasm")),
        false => build_plugin(plugin, None)?.component,
    };
    console.say(format!("plugin {}", component.display()));
    Ok((plugin.clone(), component))
}

fn run_file(
    file: &CaseFile,
    workbench: &Workbench,
    options: &Options,
    console: &Console,
    summary: &mut Summary,
    results: &mut Vec<JunitCase>,
) -> anyhow::Result<()> {
    let is_asked = |name: &str| options.filter.as_ref().is_none_or(|part| name.contains(part));
    let coloured = crate::terminal::is_styled(&std::io::stdout());
    let mut verdicts: Vec<Vec<CaseVerdict>> = Vec::new();
    for case in &file.cases {
        let of_case = match is_asked(&case.name) {
            true => compare::run(workbench, &file.path, case).map_err(anyhow::Error::msg)?,
            false => Vec::new(),
        };
        for verdict in &of_case {
            let difference = verdict.difference.as_ref();
            let passed = difference.is_none();
            match difference {
                None => {
                    summary.passed += 1;
                    console.say(format!("ok      {}", verdict.name));
                }
                Some(_) if options.update => {
                    summary.updated += 1;
                    console.say(format!("updated {}", verdict.name));
                }
                Some(difference) => {
                    summary.failed += 1;
                    console.say(format!("FAILED  {} ({})", verdict.name, file.path.display()));
                    console.say("        - expected, + found");
                    for line in difference.render(coloured).lines() {
                        console.say_styled(&format!("        {line}"));
                    }
                }
            }
            let failure = difference.map(|difference| difference.render(false));
            console.report(&CaseReport {
                case: &verdict.name,
                file: file.path.display().to_string(),
                passed,
                difference: failure.clone(),
            })?;
            results.push(JunitCase { name: verdict.name.clone(), failure });
        }
        verdicts.push(of_case);
    }
    if options.update && verdicts.iter().flatten().any(|verdict| verdict.difference.is_some()) {
        let text = std::fs::read_to_string(&file.path)?;
        let text = update::rewrite(&file.path, &text, &file.cases, &verdicts)?;
        std::fs::write(&file.path, text)
            .with_context(|| format!("failed to write {}", file.path.display()))?;
    }
    Ok(())
}

async fn capture(
    options: &Options,
    folder: &Path,
    workbench: Workbench,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(pipeline) = &options.pipeline else {
        bail!("missing --pipeline FILE: the pipeline to capture records from")
    };
    let config = load(pipeline)?;
    let stage = match &options.stage {
        Some(name) => config.stages.iter().find(|stage| stage.name.value.as_str() == name),
        None => config.stages.first(),
    };
    let Some(stage) = stage else {
        let names: Vec<_> = config.stages.iter().map(|stage| stage.name.value.as_str()).collect();
        bail!("unknown stage; expected one of {}: name it with --stage", names.join(", "));
    };
    let test = PluginManifest::read(folder).map(|manifest| manifest.test).unwrap_or_default();
    let pointers = [test.redact, options.redact.clone()].concat();
    let redaction = Redaction::new(&pointers, test.redact_keys).map_err(anyhow::Error::msg)?;
    let records = match &options.from_stream {
        Some(range) => from_stream(&config, range).await?,
        None => dead_letters(&config, &stage.name.value, options.limit).await?,
    };
    let config_text = stage.config_text.clone();
    let run = move || capture::to_cases(&workbench, &config_text, &records, &redaction);
    let captured = off_thread(run).await?;
    let file = folder.join(CAPTURED);
    capture::append(&file, &captured.lines)
        .with_context(|| format!("failed to write {}", file.display()))?;
    console.say(format!("{} cases in {}", captured.cases, file.display()));
    if captured.unredacted > 0 {
        console.say(format!(
            "{} records left out: they are not valid JSON, so the redaction rules cannot be applied",
            captured.unredacted
        ));
    }
    console.report(&serde_json::json!({
        "file": file, "cases": captured.cases, "unredacted": captured.unredacted,
    }))
}

async fn from_stream(
    config: &PipelineConfig,
    range: &SequenceRange,
) -> anyhow::Result<Vec<TrialRecord>> {
    let (source, _embedded) = stream::source(config).await?;
    let records = capture::from_stream(&*source, range).await?;
    ensure!(
        !records.is_empty(),
        "no records found in that range; they may be older than the stream's retention"
    );
    Ok(records)
}

async fn dead_letters(
    config: &PipelineConfig,
    stage: &shardmill_core::record::StageName,
    limit: u32,
) -> anyhow::Result<Vec<TrialRecord>> {
    let dead_letters = super::dead_letters(config)?.entered(stage, limit).await?;
    ensure!(!dead_letters.is_empty(), "stage {stage} has no dead letters");
    let records = dead_letters.into_iter().map(|dead_letter| TrialRecord {
        key: dead_letter.key.into(),
        payload: dead_letter.payload.into(),
        sequence: dead_letter.sequence,
        arrived_ms: dead_letter.arrived_ms,
    });
    Ok(records.collect())
}
