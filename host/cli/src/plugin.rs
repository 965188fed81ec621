//! `shardmill plugin`: builds, verifies, measures and inspects components.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use bytes::Bytes;
use serde::Serialize;

use super::{Console, swap};
use shardmill_config::{Capability, WIT_VERSION};
use shardmill_core::boxed;
use shardmill_core::escape::{escaped, path};
use shardmill_core::off_thread::off_thread;
use shardmill_plugin::{Column, Context, Instance, Services};
use shardmill_workbench::bench;
use shardmill_workbench::case::CaseFile;
use shardmill_workbench::conformance;
use shardmill_workbench::conformance::Checked;
use shardmill_workbench::junit;
use shardmill_workbench::junit::JunitCase;
use shardmill_workbench::{TrialRecord, Workbench};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Compile a plugin with the tools of its language and package it as a component.
    #[command(
        after_help = "Example:\n  shardmill plugin build plugins/car-decode -o car-decode.wasm"
    )]
    Build {
        /// Folder of the plugin, with its plugin.toml.
        folder: PathBuf,
        /// Output file of the component [default: NAME.wasm in the folder].
        #[arg(short, long)]
        out: Option<PathBuf>,
    },
    /// Check that a component meets the contract that every plugin must meet, whatever it does.
    #[command(
        after_help = "Example:\n  shardmill plugin conformance geo.wasm --input events.ndjson"
    )]
    Conformance {
        /// The component. Without --input, the records are those of the test cases beside it.
        file: PathBuf,
        /// Configuration as JSON [default: that of the first test case, or {}].
        #[arg(long)]
        config: Option<String>,
        /// Files of records, one record per line.
        #[arg(long, value_name = "FILE")]
        input: Vec<PathBuf>,
        /// Also write the results as JUnit XML.
        #[arg(long, value_name = "FILE")]
        junit: Option<PathBuf>,
    },
    /// Measure a component: time per record, memory, start time, compile time.
    #[command(after_help = "Example:\n  shardmill plugin bench geo.wasm --input events.ndjson")]
    Bench {
        /// The component. Without --input, the records are those of the test cases beside it.
        file: PathBuf,
        /// Configuration as JSON [default: that of the first test case, or {}].
        #[arg(long)]
        config: Option<String>,
        /// Files of records, one record per line.
        #[arg(long, value_name = "FILE")]
        input: Vec<PathBuf>,
        /// Records per call.
        #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        batch: u32,
        /// Duration of the measurement in seconds.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
        seconds: u64,
    },
    /// Replace the plugin of a stage while the pipeline runs. The new plugin is first tried on recent records;
    /// each lane then changes at a batch boundary; if the new plugin does worse, it is rolled back
    /// automatically.
    #[command(
        after_help = "Examples:\n  shardmill plugin swap decode new.wasm\n  shardmill plugin swap decode \
                      new.wasm --shadow '1 min' --max-changed 0\n  shardmill plugin swap decode new.wasm \
                      --canary 10\n  shardmill plugin swap decode 3f2a9c41"
    )]
    Swap(swap::SwapOptions),
    /// Undo the last swap of a stage that is in force.
    #[command(
        after_help = "Examples:\n  shardmill plugin rollback decode\n  shardmill plugin rollback decode --replay-from-swap"
    )]
    Rollback(swap::RollbackOptions),
    /// Show all changes of the pipeline, including refused ones.
    #[command(after_help = "Example:\n  shardmill plugin history decode --shards")]
    History(swap::HistoryOptions),
    /// Show which plugin versions processed a record.
    #[command(after_help = "Example:\n  shardmill plugin which shardId-000000000000:4960")]
    Which(swap::WhichOptions),
    /// Show the digest, size, routes, formats and columns of a component.
    #[command(after_help = "Example:\n  shardmill plugin inspect car-decode.wasm --config '{}'")]
    Inspect {
        /// The component.
        file: PathBuf,
        /// Configuration to load it with, as JSON.
        #[arg(long, default_value = "{}")]
        config: String,
    },
}

#[derive(Serialize)]
struct Inspection {
    file: String,
    digest: String,
    bytes: usize,
    interface: String,
    imports: Vec<Capability>,
    name: Option<String>,
    version: Option<String>,
    accepts: Vec<String>,
    needs: Vec<String>,
    routes: Vec<RouteInspection>,
    configure: Option<String>,
}

#[derive(Serialize)]
struct RouteInspection {
    name: String,
    format: String,
    columns: Vec<String>,
}

#[boxed]
pub async fn plugin(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Swap(options) => swap::swap(options, console).await,
        Command::Rollback(options) => swap::roll_back(options, console).await,
        Command::History(options) => swap::history(options, console).await,
        Command::Which(options) => swap::which(options, console).await,
        Command::Build { folder, out } => build(&folder, out, console),
        Command::Conformance { file, config, input, junit } => {
            let console = console.clone();
            let validate = move || {
                let subject = Subject::load(&file, config, &input)?;
                conformance(&subject, junit.as_deref(), &console)
            };
            off_thread(validate).await
        }
        Command::Bench { file, config, input, batch, seconds } => {
            let console = console.clone();
            let measure = move || {
                let subject = Subject::load(&file, config, &input)?;
                bench(&subject, batch as usize, Duration::from_secs(seconds), &console)
            };
            off_thread(measure).await
        }
        Command::Inspect { file, config } => {
            let console = console.clone();
            off_thread(move || inspect(&file, config, &console)).await
        }
    }
}

fn build(folder: &std::path::Path, out: Option<PathBuf>, console: &Console) -> anyhow::Result<()> {
    let built = shardmill_workbench::build::build_plugin(folder, out.as_deref())?;
    console.say(format!("built {} ({} bytes)", built.component.display(), built.component_bytes));
    console.report(&serde_json::json!({
        "component": built.component,
        "component_bytes": built.component_bytes,
    }))
}

/// A component, its configuration, and the records to try it on.
struct Subject {
    workbench: Workbench,
    compile: Duration,
    config_json: String,
    records: Vec<TrialRecord>,
}

impl Subject {
    /// Loads a component. Records come from the input files, otherwise from the test cases beside the
    /// component, otherwise from a few built-in samples.
    fn load(file: &Path, config: Option<String>, inputs: &[PathBuf]) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let workbench = Workbench::new(super::load_plugin(file)?);
        let compile = begun.elapsed();
        let mut payloads: Vec<Bytes> = Vec::new();
        for input in inputs {
            let text =
                std::fs::read(input).with_context(|| format!("failed to read {}", path(input)))?;
            let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            payloads.extend(lines.map(Bytes::copy_from_slice));
        }
        let mut case_config = None;
        if inputs.is_empty() {
            for path in CaseFile::in_folder(file.parent().unwrap_or(Path::new("")))? {
                for case in CaseFile::read(&path)?.cases {
                    let config_json = case.config_json();
                    // Cases with another configuration than the first are left out: one instance has one
                    // configuration.
                    if *case_config.get_or_insert(config_json.clone()) == config_json {
                        let records = case.records(&path).map_err(anyhow::Error::msg)?;
                        payloads.extend(records.into_iter().map(|record| record.payload));
                    }
                }
            }
        }
        if payloads.is_empty() {
            payloads =
                ["", "plain text", "{\"id\":7,\"name\":\"x\"}", "[1,2.5,null]", "ünïcödé 漢字"]
                    .map(|text| Bytes::from_static(text.as_bytes()))
                    .into();
            payloads.push(Bytes::from_static(&[0, 159, 146, 150, 255]));
        }
        let records = payloads.into_iter().enumerate();
        Ok(Self {
            workbench,
            compile,
            config_json: config.or(case_config).unwrap_or_else(|| "{}".into()),
            records: records.map(|(index, payload)| TrialRecord::new(index, payload)).collect(),
        })
    }
}

fn conformance(subject: &Subject, junit: Option<&Path>, console: &Console) -> anyhow::Result<()> {
    let checks = conformance::run(&subject.workbench, &subject.config_json, &subject.records);
    for Checked { check, failure, note } in &checks {
        match (failure, note) {
            (None, None) => console.say(format!("ok      {check}")),
            (None, Some(note)) => console.say(format!("ok      {check}: {note}")),
            // Each further line of the plugin's text is indented, so that it cannot look like a line of this
            // report.
            (Some(failure), _) => {
                let failure = failure.replace('\n', "\n        ");
                console.say(format!("FAILED  {check}\n        {failure}"));
            }
        }
    }
    for check in &checks {
        console.report(check)?;
    }
    if let Some(path) = junit {
        let cases = checks.iter().map(|checked| JunitCase {
            name: checked.check.to_owned(),
            failure: checked.failure.clone(),
        });
        let document = junit::document("conformance", &cases.collect::<Vec<_>>())?;
        std::fs::write(path, document)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    let failed = checks.iter().filter(|checked| checked.failure.is_some()).count();
    ensure!(failed == 0, "{failed} of {} checks failed", checks.len());
    Ok(())
}

fn bench(
    subject: &Subject,
    batch: usize,
    duration: Duration,
    console: &Console,
) -> anyhow::Result<()> {
    let records = subject.records.iter().cycle().take(batch).enumerate();
    let records: Vec<_> =
        records.map(|(index, record)| TrialRecord::new(index, record.payload.clone())).collect();
    let measured = bench::run(&subject.workbench, &subject.config_json, &records, duration);
    let measured = measured.map_err(|error| anyhow!(escaped(&error.to_string(), &[])))?;
    let ns = measured.ns_per_record;
    let (p10, p90) = (measured.ns_per_record_p10, measured.ns_per_record_p90);
    console.say(format!("calls        {} of {batch} records", measured.calls));
    console.say(format!("per record   {ns:.0} ns ({p10:.0} to {p90:.0} in 8 of 10 calls)"));
    let (per_s, mib) = (measured.records_per_s, measured.mib_per_s);
    console.say(format!("throughput   {per_s:.0} records/s, {mib:.1} MiB/s on one core"));
    console.say(format!("memory       {} KiB", measured.memory_bytes / 1024));
    console.say(format!("start        {:.0} µs", measured.start_us));
    console.say(format!("compile      {:.0} ms", subject.compile.as_secs_f64() * 1e3));
    console.say(measured.histogram());
    console.report(&serde_json::json!({
        "compile_ms": subject.compile.as_secs_f64() * 1e3,
        "measured": measured,
    }))
}

fn inspect(file: &std::path::Path, config: String, console: &Console) -> anyhow::Result<()> {
    let plugin = super::load_plugin(file)?;
    let context = Context {
        stream_name: "inspect".into(),
        shard_id: String::new(),
        config,
        upstream: vec![shardmill_engine::stage::source_route(None)],
        extra: Vec::new(),
    };
    let services = Arc::new(Services::alone("inspect".into()));
    let configured = Instance::start(&plugin, &Default::default(), &context, &services);
    let mut inspection = Inspection {
        file: file.display().to_string(),
        digest: plugin.digest.to_string(),
        bytes: plugin.component_bytes,
        interface: format!("shardmill:plugin/stage@{WIT_VERSION}"),
        imports: plugin.capabilities.iter().copied().collect(),
        name: None,
        version: None,
        accepts: Vec::new(),
        needs: Vec::new(),
        routes: Vec::new(),
        configure: None,
    };
    match configured {
        Ok((_, descriptor)) => {
            let needed =
                shardmill_engine::stage::needed_columns(&descriptor).map_err(anyhow::Error::msg)?;
            inspection.needs = columns(needed);
            inspection.name = Some(descriptor.name);
            inspection.version = Some(descriptor.version);
            inspection.accepts = descriptor.accepts;
            inspection.routes = descriptor.routes.into_iter().map(route).collect();
        }
        Err(error) => inspection.configure = Some(error.message),
    }
    say(&inspection, console);
    console.report(&inspection)
}

fn route(route: shardmill_plugin::Route) -> RouteInspection {
    RouteInspection { columns: columns(route.columns), name: route.name, format: route.format }
}

fn columns(columns: Vec<Column>) -> Vec<String> {
    let columns = columns.into_iter().map(|column| {
        let null = if column.nullable { "" } else { " not null" };
        format!("{} {}{null}", column.name, column.data_type)
    });
    columns.collect()
}

fn say(inspection: &Inspection, console: &Console) {
    console.say(format!("file     {} ({} bytes)", inspection.file, inspection.bytes));
    console.say(format!("digest   {}", inspection.digest));
    console.say(format!("exports  {}", inspection.interface));
    let imports: Vec<_> = inspection.imports.iter().map(|capability| capability.name()).collect();
    let imports = imports.join(", ");
    console.say(format!("imports  {}", if imports.is_empty() { "nothing" } else { &imports }));
    if let (Some(name), Some(version)) = (&inspection.name, &inspection.version) {
        console.say(format!("plugin   {name} {version}"));
        let accepts = inspection.accepts.join(", ");
        console.say(format!("accepts  {}", if accepts.is_empty() { "anything" } else { &accepts }));
    }
    if !inspection.needs.is_empty() {
        console.say(format!("needs    {}", inspection.needs.join(", ")));
    }
    for route in &inspection.routes {
        console.say(format!("route    {} ({})", route.name, route.format));
        for column in &route.columns {
            console.say(format!("           {column}"));
        }
    }
    if let Some(why) = &inspection.configure {
        console.say(format!(
            "routes   unknown: the plugin refused this configuration: {why} (give another with --config JSON)"
        ));
    }
}
