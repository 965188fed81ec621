//! `shardmill dev`: development of a plugin. Each save builds the plugin, swaps it into a running pipeline, and
//! shows which outputs for sample records changed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{Console, load_file, load_plugin, run, signals, with_trust};
use crate::registry::SINK_TYPES;
use shardmill_config::Gates;
use shardmill_config::{PipelineConfig, StageConfig, StageText, parse};
use shardmill_core::boxed;
use shardmill_core::off_thread::off_thread;
use shardmill_embedded::EmbeddedStream;
use shardmill_engine::stage::LoadedStage;
use shardmill_engine::supervisor::RunOptions;
use shardmill_engine::swap::{Component, SwapRequest, Swapper};
use shardmill_kinesis::client;
use shardmill_kinesis::client::Server;
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;
use shardmill_kinesis::source::KinesisSource;
use shardmill_kinesis::stream;
use shardmill_workbench::TrialRecord;
use shardmill_workbench::build::build_plugin_in_haste;
use shardmill_workbench::case::CaseFile;
use shardmill_workbench::manifest::PluginManifest;

/// Interval between looks at the sources.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between puts of the samples: records keep flowing, and a trial has recent ones.
const PUT_INTERVAL: Duration = Duration::from_secs(5);
/// Samples of one round, at most.
const SAMPLES_MAX: usize = 1_000;
/// Folders with build outputs, which are not sources.
const BUILT: [&str; 5] = ["target", "node_modules", "state", "__pycache__", "bind"];
/// Name of the stream and of the pipeline.
const NAME: &str = "dev";

#[derive(clap::Args)]
pub struct Options {
    /// The plugin's folder.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// File of sample records, one per line [default: the records of the plugin's test cases and input.ndjson].
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// End after this number of saves; for tests.
    #[arg(long, hide = true)]
    saves: Option<u32>,
}

#[boxed]
pub async fn dev(options: Options, console: &Console) -> anyhow::Result<()> {
    let folder = options.folder.canonicalize().context("failed to find the plugin's folder")?;
    let manifest = PluginManifest::read(&folder)?;
    let scratch =
        tempfile::tempdir().context("failed to make a folder for the pipeline's state")?;
    let component = scratch.path().join(format!("{}.wasm", manifest.name));
    let (samples, config_json) = samples(&folder, options.input.as_deref())?;
    let mut sources = Sources::of(&folder);
    console.say(format!("building {}", manifest.name));
    build(&folder, &component).await?;
    let config = {
        let (folder, name, component) = (folder.clone(), manifest.name.clone(), component.clone());
        let state = scratch.path().to_owned();
        off_thread(move || pipeline(&folder, &name, &component, config_json, &state)).await?
    };

    let embedded = EmbeddedStream::start(0).await?;
    let client = client::connect(&Server::at(embedded.url())).await?;
    let kinesis = config.source.kinesis().context("the pipeline reads no stream")?;
    let name = &kinesis.stream.value;
    stream::create(&client, name, 1).await?;
    stream::wait_active(&client, name, Duration::from_secs(10), &mut |_, _| {}).await?;
    let batch = config.source.batch;
    let source =
        Arc::new(KinesisSource::new(client.clone(), kinesis, batch, config.buffer_bytes_max));
    let producer = Producer::new(client, name.clone());
    let drain_max = config.timing.drain_max;
    let supervisor = run::prepare(config, source, RunOptions::new(false)).await?;
    let swapper = supervisor.swapper();
    let stop = signals::stop_on_signals(drain_max)?;
    let ends = stop.child();
    tokio::spawn(put_repeatedly(producer, samples, ends.token().clone()));
    let running = tokio::spawn(supervisor.run_until(ends.clone()));
    console.say(format!(
        "running on sample records; save a file in {} to see what changes (Ctrl-C stops)",
        folder.display()
    ));
    let mut saves = options.saves.unwrap_or(u32::MAX);
    while saves > 0 {
        let Some(saved) = sources.changed(stop.token()).await else { break };
        saves -= 1;
        let swapped = stop.unless_asked(async {
            match build(&folder, &component).await {
                Ok(()) => show(&swapper, &manifest.name, &component, saved, console).await,
                // The compiler has printed its errors to standard error.
                Err(error) => {
                    console
                        .say(format!("build failed, the previous version keeps running: {error}"));
                    Ok(())
                }
            }
        });
        swapped.await.transpose()?;
    }
    ends.ask();
    running.await?
}

/// Builds on a thread of its own.
async fn build(folder: &Path, component: &Path) -> anyhow::Result<()> {
    let (folder, component) = (folder.to_owned(), component.to_owned());
    off_thread(move || build_plugin_in_haste(&folder, &component)).await?;
    Ok(())
}

/// Swaps in the new build, and shows which outputs changed.
async fn show(
    swapper: &Swapper,
    name: &str,
    component: &Path,
    saved: SystemTime,
    console: &Console,
) -> anyhow::Result<()> {
    let bytes = std::fs::read(component).context("failed to read what was built")?;
    let request = SwapRequest {
        stage: name.into(),
        component: Component::Bytes { name: name.into(), bytes: Bytes::from(bytes) },
        canary_percent: None,
        shadow: Duration::ZERO,
        gates: Gates::default(),
        dry_run: false,
    };
    let (trial, why_not) = match swapper.swap(request).await {
        Ok(report) => (report.trial, None),
        Err(refused) => {
            let why = refused.to_string();
            (refused.trial.map(|trial| *trial), Some(why))
        }
    };
    let took_s = saved.elapsed().unwrap_or_default().as_secs_f64();
    for line in trial.iter().flat_map(|trial| trial.lines()) {
        console.say_styled(&coloured(&line));
    }
    match &why_not {
        None => console.say(format!("swapped in, {took_s:.1} s after the save")),
        Some(why) => console.say(why),
    }
    console.report(&serde_json::json!({ "seconds": took_s, "refused": why_not, "trial": trial }))
}

/// Colours a line of a difference, if standard output is a terminal.
fn coloured(line: &str) -> String {
    let line = shardmill_core::escape::printable(line);
    let colour = match line.trim_start().as_bytes().first() {
        Some(b'-') if line.starts_with("  ") => "\x1b[31m",
        Some(b'+') if line.starts_with("  ") => "\x1b[32m",
        _ => return line.into_owned(),
    };
    match crate::terminal::is_styled(&std::io::stdout()) {
        true => format!("{colour}{line}\x1b[0m"),
        false => line.into_owned(),
    }
}

/// Returns the sample records, and the configuration that they are meant for.
fn samples(
    folder: &Path,
    input: Option<&Path>,
) -> anyhow::Result<(Vec<TrialRecord>, Option<String>)> {
    let mut samples = Vec::new();
    let mut config_json = None;
    let lines = |path: &Path| -> anyhow::Result<Vec<TrialRecord>> {
        let text =
            std::fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Ok(lines.enumerate().map(|(index, line)| TrialRecord::new(index, line.to_vec())).collect())
    };
    for path in CaseFile::in_folder(folder)? {
        let file = CaseFile::read(&path)?;
        for case in file.cases.iter().filter(|case| case.expected.fails.is_none()) {
            config_json.get_or_insert_with(|| case.config_json());
            samples.extend(case.records(&path).map_err(anyhow::Error::msg)?);
        }
    }
    let beside = folder.join("input.ndjson");
    match input {
        Some(input) => samples = lines(input)?,
        None if beside.exists() => samples.extend(lines(&beside)?),
        None => {}
    }
    samples.truncate(SAMPLES_MAX);
    ensure!(
        !samples.is_empty(),
        "no sample records in {}: add test cases to tests/, or name a file with --input",
        folder.display()
    );
    Ok((samples, config_json))
}

/// Makes a pipeline of this one stage, with the settings of the folder's own pipeline if there is one. Its
/// outputs are discarded.
fn pipeline(
    folder: &Path,
    name: &str,
    component: &Path,
    config_json: Option<String>,
    state: &Path,
) -> anyhow::Result<PipelineConfig> {
    let own = folder.join("pipeline.toml");
    let own = if own.exists() { Some(load_file(&own)?) } else { None };
    let lookups = own.as_ref().map(|own| own.lookups.clone()).unwrap_or_default();
    let own: Option<StageConfig> = own.and_then(|own| own.stages.into_iter().next());
    let config_text = own.as_ref().map(|own| own.config_text.clone());
    let config_json = own.as_ref().map(|own| own.config_json.clone()).or(config_json);
    let config_json = config_json.unwrap_or_else(|| "{}".into());
    let config_text = config_text.unwrap_or_else(|| StageText::plain(config_json.clone()));
    let described = LoadedStage::alone(load_plugin(component)?, &config_json, NAME)
        .map_err(|error| anyhow::anyhow!("plugin {name} does not start: {error}"))?;
    let routes = described.route_names.iter();
    let routes: Vec<String> =
        routes.map(|route| format!("{:?} = [\"nowhere\"]", route.as_str())).collect();
    let (component, state) = (component.display().to_string(), state.display().to_string());
    let text = format!(
        r#"
[pipeline]
name = "{NAME}"
state_dir = {state:?}
[source]
type = "kinesis"
stream = "{NAME}"
endpoint = "embedded"
poll_interval = "200 ms"
[[stage]]
name = "{name}"
plugin = {component:?}
routes = {{ {} }}
[[sink]]
name = "nowhere"
type = "discard"
[reload.probation]
window = "0 s"
"#,
        routes.join(", ")
    );
    let mut config = parse("dev.toml", text, &SINK_TYPES, &|_| None)?;
    config.state_dir = with_trust(config.state_dir);
    config.lookups = lookups;
    for stage in &mut config.stages {
        (stage.config_json, stage.config_text) = (config_json.clone(), config_text.clone());
        if let Some(own) = &own {
            (stage.grants, stage.http_hosts) = (own.grants.clone(), own.http_hosts.clone());
            stage.limits = own.limits;
        }
    }
    Ok(config)
}

/// Puts the samples on the stream, again and again.
async fn put_repeatedly(
    mut producer: Producer,
    samples: Vec<TrialRecord>,
    stop: CancellationToken,
) {
    loop {
        for sample in &samples {
            let partition_key = String::from_utf8_lossy(&sample.key).into_owned();
            let record = NewRecord { partition_key, payload: sample.payload.clone() };
            if let Err(error) = producer.put(record).await {
                tracing::warn!(%error, "failed to put a sample record on the stream");
            }
        }
        if let Err(error) = producer.flush().await {
            tracing::warn!(%error, "failed to put sample records on the stream");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PUT_INTERVAL) => {}
        }
    }
}

/// Source files of a plugin, with the time of their last change.
struct Sources {
    folder: PathBuf,
    files: Vec<(PathBuf, SystemTime)>,
}

impl Sources {
    fn of(folder: &Path) -> Self {
        let mut files = Vec::new();
        collect(folder, &mut files);
        files.sort();
        Self { folder: folder.to_owned(), files }
    }

    /// Waits for a save and returns its time. `None`: `stop` came first.
    async fn changed(&mut self, stop: &CancellationToken) -> Option<SystemTime> {
        loop {
            tokio::select! {
                () = stop.cancelled() => return None,
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
            let mut now = Self::of(&self.folder);
            if now.files == self.files {
                continue;
            }
            // An editor may write several files, or one file in pieces. Wait until nothing changes any more.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(2) {
                tokio::time::sleep(POLL_INTERVAL).await;
                let again = Self::of(&self.folder);
                let is_still = again.files == now.files;
                now = again;
                if is_still {
                    break;
                }
            }
            self.files = now.files;
            return self.files.iter().map(|(_, saved)| *saved).max();
        }
    }
}

fn collect(folder: &Path, files: &mut Vec<(PathBuf, SystemTime)>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let is_built = name.starts_with('.') || BUILT.contains(&name.as_str());
        let is_component = path.extension().is_some_and(|extension| extension == "wasm");
        match entry.metadata() {
            _ if is_built || is_component || name == "Cargo.lock" => {}
            Ok(about) if about.is_dir() => collect(&path, files),
            Ok(about) => files.extend(about.modified().ok().map(|saved| (path, saved))),
            Err(_) => {}
        }
    }
}
