//! `shardmill run`: runs a pipeline until it is asked to stop.

use std::sync::Arc;

use anyhow::ensure;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Console, PipelineFile, dropped, holes, load, output, signals, sinks, stream};
use crate::terminal::note;
use shardmill_config::PipelineConfig;
use shardmill_config::error_text;
use shardmill_core::boxed;
use shardmill_core::record::SinkName;
use shardmill_core::source::ShardSource;
use shardmill_core::stop::Stop;
use shardmill_embedded::EmbeddedStream;
use shardmill_engine::lock::PipelineLock;
use shardmill_engine::run::{Run, RunSummary};
use shardmill_engine::supervisor::{RunOptions, Supervisor};
use shardmill_engine::swap::watch_files;
use shardmill_kinesis::put_call::StreamWriter;
use shardmill_serve::admin::AdminPort;
use shardmill_serve::admin::access::Access;
use shardmill_serve::admin::control::{Control, ControlAddress, ControlPort, ReadConfig};
use shardmill_serve::intake::IntakePort;

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Stop when every shard has been read to its end and every sink has committed it (for backfills and
    /// tests).
    #[arg(long)]
    until_caught_up: bool,
    /// Give up a sink that was removed from the file although it lags behind the others. The removal is
    /// recorded, so the option is needed for one start only.
    #[arg(long, value_name = "NAME")]
    drop_sink: Vec<String>,
    /// Run what the files say and discard swapped-in plugins. Use it if the record of what was swapped in
    /// cannot be read.
    #[arg(long)]
    files_count: bool,
    /// Continue from the positions of the sinks although the state folder is older than they are, or another
    /// state has written to them.
    #[arg(long)]
    trust_sinks: bool,
}

#[boxed]
pub async fn run(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    output::leave_to_rows(&config);
    let stop = signals::stop_on_signals(config.timing.drain_max)?;
    stop_when_closed(&stop);
    let until_caught_up = options.until_caught_up;
    // On a stop request, do not wait for servers that do not answer: nothing has been read yet.
    match stop.unless_asked(start(options, config, &stop, console)).await {
        Some(running) => running?.run(stop.clone(), console).await?,
        None => {
            console.say("stopped before the start was complete");
        }
    }
    // With `--until-caught-up`, a stop before the end is a failure: an evicted job is not done. But if the
    // reader of the rows has closed the pipe, it has all that it wanted.
    ensure!(
        !until_caught_up || !stop.is_asked() || output::closed().is_cancelled(),
        "stopped before it had caught up: run the command again to continue"
    );
    Ok(())
}

/// A pipeline and its ports, ready to run.
struct Ready {
    /// SIGHUP, registered before anything was started.
    hangup: Signal,
    run: Run,
    control: Control,
    control_stop: CancellationToken,
    intake: Option<(IntakePort, StreamWriter)>,
    /// The embedded stream, if this process serves it.
    _embedded: Option<EmbeddedStream>,
}

/// Locks the state, opens the ports and validates everything.
async fn start(
    options: Options,
    config: PipelineConfig,
    stop: &Stop,
    console: &Console,
) -> anyhow::Result<Ready> {
    // Before anything slow: until SIGHUP is registered, it ends the process.
    let hangup = signal(SignalKind::hangup())?;
    // Before the ports: of two runs of one pipeline, the second must report who has the pipeline, not a port in
    // use.
    let lock = PipelineLock::take(&config.state_dir, &config.name)?;
    let dropped_sinks: Vec<SinkName> =
        options.drop_sink.iter().map(|name| SinkName::new(name.as_str())).collect();
    dropped::validate(&dropped_sinks, &config, console).await?;
    // Left by a run that was killed. Commands find this run after its port is open.
    ControlAddress::forget(lock.folder())?;
    let admin = match &config.admin {
        Some(admin) => Some((AdminPort::open(admin, config.timing.http).await?, admin.clone())),
        None => None,
    };
    let intake_port = match &config.intake {
        Some(intake) => Some(IntakePort::open(intake, config.timing.http).await?),
        None => None,
    };
    let run_options = RunOptions {
        dropped_sinks: dropped_sinks.into_iter().collect(),
        files_count: options.files_count,
        trust_sinks: options.trust_sinks,
        build_sinks: Arc::new(sinks::build),
        ..RunOptions::new(options.until_caught_up)
    };
    let file = options.pipeline.file.clone();
    let (source, embedded) = stream::source(&config).await?;
    let intake = match (intake_port, config.source.kinesis()) {
        (Some(port), Some(kinesis)) => {
            let client = stream::intake_client(&config, kinesis, embedded.as_ref()).await?;
            Some((port, StreamWriter::new(client, kinesis.stream.value.clone())))
        }
        _ => None,
    };
    let watched = config.clone();
    let run = Run::prepare(lock, config, source, super::plugin_host, run_options).await?;
    let pipeline = run.pipeline();
    holes::say(&watched, &holes::of(&watched, None).await?, console);
    let read_config: ReadConfig = Arc::new(move || load(&file));
    let control = Control {
        swapper: pipeline.swapper(),
        read_config: read_config.clone(),
        statuses: pipeline.statuses(),
    };
    let port = ControlPort::open(pipeline.folder(), watched.timing.http).await?;
    let control_stop = stop.token().child_token();
    if let Some((admin, admin_config)) = admin {
        console.say(format!("admin http://{}", admin.address()));
        if admin_config.token.is_none() {
            let path = port.write_token()?;
            console.say(format!("admin token, for changes: in {}", path.display()));
        }
        let access = Access::of(&admin_config, Some(port.token()));
        admin.serve(run.registries(), Some(control.clone()), access, stop.token().clone());
    }
    port.serve(control.clone(), control_stop.clone());
    if watched.reload.watch {
        let read = move || read_config();
        tokio::spawn(watch_files(pipeline.swapper(), watched, read, control_stop.clone()));
    }
    let _embedded = embedded;
    Ok(Ready { hangup, run, control, control_stop, intake, _embedded })
}

impl Ready {
    /// Runs until a stop is requested or the pipeline ends by itself.
    async fn run(self, stop: Stop, console: &Console) -> anyhow::Result<()> {
        let Self { hangup, run, control, control_stop, intake, _embedded } = self;
        reload_on_hangup(hangup, control, control_stop.clone());
        let pipeline = run.pipeline();
        let (statuses, dead_letters) = (pipeline.statuses(), pipeline.dead_letters());
        // A child of its own, so that the intake also ends when the pipeline ends by itself.
        let intake_stop = stop.child();
        let intake = intake.map(|(port, writer)| {
            console.say(format!("intake http://{}/events", port.address()));
            port.serve(writer, intake_stop.token().clone())
        });
        match stop.unless_asked(pipeline.memory_bound()).await {
            Some(Ok(bound)) => console.say(format!("memory: {bound}")),
            // The lanes meet the same error and report it themselves.
            Some(Err(error)) => tracing::warn!(%error, "failed to compute the memory bound"),
            None => {}
        }
        console.say("running; stop with Ctrl-C or SIGTERM");
        let ran = run.run(&stop).await;
        intake_stop.ask();
        control_stop.cancel();
        if let Some(intake) = intake {
            intake.finished(&intake_stop).await;
        }
        ran?;
        let Some(summary) = stop.until_over(RunSummary::of(&statuses, &dead_letters)).await else {
            return Ok(());
        };
        let summary = summary?;
        console.say(format!(
            "stopped: {} records, {} of them replayed, {} dead letters stored",
            summary.records, summary.replayed, summary.dead_letters
        ));
        console.report(&summary)
    }
}

/// Validates the pipeline with the sinks of its configuration, and prepares it to run.
pub(crate) async fn prepare(
    config: PipelineConfig,
    source: Arc<dyn ShardSource>,
    options: RunOptions,
) -> anyhow::Result<Supervisor> {
    let lock = PipelineLock::take(&config.state_dir, &config.name)?;
    let options = RunOptions { build_sinks: Arc::new(sinks::build), ..options };
    shardmill_engine::run::prepare(lock, config, source, super::plugin_host, options).await
}

/// Drains when the reader of a stdout sink's rows has gone: nobody takes further rows.
fn stop_when_closed(stop: &Stop) {
    if output::is_for_rows() {
        ask_when_closed(stop);
    }
}

/// Requests a stop when standard output is found closed.
pub(crate) fn ask_when_closed(stop: &Stop) {
    let (closed, stop) = (output::closed(), stop.clone());
    tokio::spawn(async move {
        closed.cancelled().await;
        note(format_args!("standard output was closed by its reader; draining"));
        stop.ask();
    });
}

/// Reloads the files at each SIGHUP.
fn reload_on_hangup(mut hangup: Signal, control: Control, stop: CancellationToken) {
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = hangup.recv() => {}
            }
            let reloaded = match (control.read_config)() {
                Ok(config) => {
                    control.swapper.reload(config, false).await.map_err(|error| error.to_string())
                }
                Err(error) => Err(error_text(&error)),
            };
            match reloaded {
                Ok(report) => {
                    let changed: Vec<&str> = report.diff.lines().collect();
                    let (id, changed) = (&report.revision, changed.join("; "));
                    match report.may_be_undone {
                        false => note(format_args!("reloaded, revision {id}: {changed}")),
                        true => note(format_args!(
                            "not in force yet, revision {id}: {changed}; until the lanes have released their \
                             shards, it may be undone"
                        )),
                    }
                }
                Err(cause) => note(format_args!("reload refused: {cause}")),
            }
        }
    });
}
