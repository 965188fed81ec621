//! `shardmill run`: a pipeline, until it is told to stop.

use std::sync::Arc;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Console, PipelineFile, holes, load, sinks, stream};
use crate::admin::control::{Control, ControlPort, ReadConfig};
use crate::admin::{AdminPort, told};
use crate::config::PipelineConfig;
use crate::intake::IntakePort;
use crate::lane::Board;
use crate::position::{DeadLetters, StoredLetter};
use crate::record::SinkName;
use crate::source::ShardSource;
use crate::source::letter_log::LetterLogSource;
use crate::source::producer::StreamWriter;
use crate::supervisor::{RunOptions, Supervisor};
use crate::swap::watch_files;

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Stop when every shard is read to its end, as a backfill or a test does.
    #[arg(long)]
    until_caught_up: bool,
    /// A sink that was taken out of the file and may be given up although it is behind the others. Once is
    /// enough: the removal is recorded.
    #[arg(long, value_name = "NAME")]
    drop_sink: Vec<String>,
    /// Run what the files say, and give up what was swapped in: the way out where the record of it
    /// cannot be read.
    #[arg(long)]
    files_count: bool,
}

/// What a run did, for its last line.
#[derive(Serialize)]
pub(crate) struct Summary {
    /// Records handed to the sinks.
    pub records: u64,
    /// Of these, read again because only some sinks had them.
    pub replayed: u64,
    /// Dead letters in the store.
    pub dead_letters: u64,
}

pub async fn run(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    let admin = match &config.admin {
        Some(admin) => Some(AdminPort::open(admin).await?),
        None => None,
    };
    let intake_port = match &config.intake {
        Some(intake) => Some(IntakePort::open(intake).await?),
        None => None,
    };
    let stop = stop_on_signals()?;
    let run_options = RunOptions {
        dropped_sinks: options.drop_sink.iter().map(|name| SinkName::new(name.as_str())).collect(),
        files_count: options.files_count,
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
    let (letters_config, watched) = (config.clone(), config.clone());
    let dropped_sinks = run_options.dropped_sinks.clone();
    let supervisor = prepare(config, source, run_options).await?;
    // Once the pipeline has ended, no more letters are written.
    let last_letter = CancellationToken::new();
    let copied = RunOptions { dropped_sinks, ..RunOptions::new(false) };
    let copies = prepare_copies(letters_config, &supervisor, last_letter.clone(), copied).await?;
    holes::say(&watched, &holes::of(&watched, None).await?, console);
    let read_config: ReadConfig = Arc::new(move || load(&file));
    let control = Control {
        swapper: supervisor.swapper(),
        read_config: read_config.clone(),
        board: supervisor.board(),
    };
    let port = ControlPort::open(supervisor.folder()).await?;
    let control_stop = stop.child_token();
    port.serve(control.clone(), control_stop.clone());
    if let Some(admin) = admin {
        console.say(format!("admin http://{}", admin.address()));
        let boards = [&supervisor].into_iter().chain(&copies).map(Supervisor::board).collect();
        admin.serve(boards, Some(control.clone()), stop.clone());
    }
    reload_on_hangup(control, control_stop.clone())?;
    if watched.reload.watch {
        let read = move || read_config();
        tokio::spawn(watch_files(supervisor.swapper(), watched, read, control_stop.clone()));
    }
    let (board, letters) = (supervisor.board(), supervisor.letters());
    // Of its own, so that it ends as well when the pipeline ends by itself.
    let intake_stop = stop.child_token();
    let intake = intake.map(|(port, writer)| {
        console.say(format!("intake http://{}/events", port.address()));
        port.serve(writer, intake_stop.clone())
    });
    console.say("running; stop with Ctrl-C or SIGTERM");
    let ran = run_with_copies(supervisor, copies, last_letter, stop).await;
    intake_stop.cancel();
    control_stop.cancel();
    if let Some(intake) = intake {
        intake.finished(&intake_stop).await;
    }
    ran?;
    let summary = summarize(&board, &letters).await?;
    console.say(format!(
        "stopped: {} records, {} of them replayed, {} dead letters in the store",
        summary.records, summary.replayed, summary.dead_letters
    ));
    console.report(&summary)
}

/// The pipeline that copies dead letters to the sinks under `[dead_letters]`, if there are any.
async fn prepare_copies(
    config: PipelineConfig,
    pipeline: &Supervisor,
    last_letter: CancellationToken,
    options: RunOptions,
) -> anyhow::Result<Option<Supervisor>> {
    let folder = pipeline.folder().join("letters");
    let Some(config) = config.for_letters(folder, StoredLetter::columns()) else {
        return Ok(None);
    };
    let (letters, name, limits) = (pipeline.letters(), config.name.clone(), config.source.batch);
    let source = LetterLogSource::new(letters, name, limits, last_letter);
    prepare(config, Arc::new(source), options).await.map(Some)
}

/// Runs a pipeline and what copies its letters, until both have ended. When one fails, the other is
/// drained.
async fn run_with_copies(
    pipeline: Supervisor,
    copies: Option<Supervisor>,
    last_letter: CancellationToken,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // What fails stops both, and nobody else's token.
    let stop = stop.child_token();
    let run = async |supervisor: Supervisor| {
        let ran = supervisor.run(stop.clone()).await;
        if ran.is_err() {
            stop.cancel();
        }
        ran
    };
    let pipeline = async {
        let ran = run(pipeline).await;
        last_letter.cancel();
        ran
    };
    let copies = async {
        match copies {
            Some(copies) => run(copies).await,
            None => Ok(()),
        }
    };
    let (ran, copied) = tokio::join!(pipeline, copies);
    ran.and(copied)
}

/// Proves the pipeline with the sinks that its configuration names.
pub(crate) async fn prepare(
    config: PipelineConfig,
    source: Arc<dyn ShardSource>,
    options: RunOptions,
) -> anyhow::Result<Supervisor> {
    let sinks = sinks::build(&config)?;
    let host = super::plugin_host(&config)?;
    let options = RunOptions { build_sinks: Arc::new(sinks::build), ..options };
    Supervisor::prepare(config, host, source, sinks, options).await
}

/// Reads the files again at each SIGHUP.
fn reload_on_hangup(control: Control, stop: CancellationToken) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup())?;
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
                Err(error) => Err(told(&error)),
            };
            match reloaded {
                Ok(report) => {
                    let changed: Vec<&str> = report.diff.lines().collect();
                    eprintln!("reloaded, generation {}: {}", report.generation, changed.join("; "));
                }
                Err(cause) => eprintln!("not reloaded: {cause}"),
            }
        }
    });
    Ok(())
}

pub(crate) async fn summarize(board: &Board, letters: &DeadLetters) -> anyhow::Result<Summary> {
    let shards = board.snapshot();
    Ok(Summary {
        records: shards.values().map(|status| status.records_read).sum(),
        replayed: shards.values().map(|status| status.records_replayed).sum(),
        dead_letters: letters.count().await?,
    })
}

/// A token that the first SIGTERM or SIGINT cancels; a second one ends the process at once.
pub(crate) fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let cancel = stop.clone();
    tokio::spawn(async move {
        for seen in 0.. {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if seen > 0 {
                // Nothing is lost: what is not committed is read again.
                std::process::exit(130);
            }
            eprintln!("draining; once more to stop at once");
            cancel.cancel();
        }
    });
    Ok(stop)
}
