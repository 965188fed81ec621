//! `shardmill demo`: the complete path of a record, from nothing, in one process.
//!
//! Creates the stream `test` with 5 shards, publishes 100 cars in bincode, and reads them through the plugins
//! for decoding, transforming and routing into a data mart and log files. It then prints how many records and
//! rows there are, and deletes the stream. It runs the pipeline of `pipeline.toml`, which is compiled into the
//! binary.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::assets::{CAR_DECODE, CAR_TRANSFORM, PIPELINE, ROUTE_JSON};
use super::{Console, print_line, run, signals, stream as stream_command};
use crate::registry::SINK_TYPES;
use shardmill_config::PipelineConfig;
use shardmill_core::boxed;
use shardmill_core::record::StreamRef;
use shardmill_embedded::EmbeddedStream;
use shardmill_engine::lane::StatusRegistry;
use shardmill_engine::supervisor::RunOptions;
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;
use shardmill_kinesis::source::KinesisSource;
use shardmill_kinesis::{client, stream};
use shardmill_state::DeadLetters;

/// Makes of the cars, in turn.
const MAKES: [&str; 5] = ["Toyota", "BMW", "Honda", "Volvo", "Ford"];

#[derive(clap::Args)]
pub struct Options {
    /// Folder for the data mart, the log files and the state. It is emptied at the start.
    #[arg(long, value_name = "FOLDER", default_value = "demo-data")]
    data: PathBuf,
    /// Number of cars to publish.
    #[arg(long, default_value_t = 100)]
    cars: u64,
}

/// A car as the web application encodes it.
#[derive(Serialize)]
struct Car {
    id: u64,
    make: String,
}

#[derive(Serialize)]
struct Report {
    shards: Vec<ShardReport>,
    sinks: Vec<SinkReport>,
    dead_letters: u64,
}

#[derive(Serialize)]
struct ShardReport {
    shard: String,
    records: u64,
}

#[derive(Serialize)]
struct SinkReport {
    sink: String,
    rows: u64,
    place: String,
}

#[boxed]
pub async fn demo(options: Options, console: &Console) -> anyhow::Result<()> {
    if console.json {
        super::output::leave_to_report();
    }
    start_afresh(&options.data)?;
    let data = std::path::absolute(&options.data)?;
    let config = pipeline(&data)?;
    let embedded = EmbeddedStream::start(0).await?;
    let client = client::connect(&client::Server::at(embedded.url())).await?;
    let kinesis = config.source.kinesis().context("the demo's pipeline reads no stream")?;
    stream_command::ensure(&client, kinesis).await?;
    publish(&client, &kinesis.stream.value, options.cars, console).await?;

    let source = Arc::new(KinesisSource::new(
        client.clone(),
        kinesis,
        config.source.batch,
        config.buffer_bytes_max,
    ));
    let run_options = RunOptions { embedded_plugin: bundled_plugin, ..RunOptions::new(true) };
    let supervisor = run::prepare(config.clone(), source, run_options).await?;
    let (statuses, dead_letters) = (supervisor.statuses(), supervisor.dead_letters());
    let stop = signals::stop_on_signals(config.timing.drain_max)?;
    // A stdout sink writes the rows: a reader such as `head` may close the pipe early.
    run::ask_when_closed(&stop);
    supervisor.run_until(stop).await?;

    stream::delete(&client, &kinesis.stream.value, std::time::Duration::from_secs(30)).await?;
    let report = report(&data, &statuses, &dead_letters).await?;
    say(&report, console);
    console.report(&report)
}

/// Empties the demo's folder, but only if a demo made it.
fn start_afresh(data: &Path) -> anyhow::Result<()> {
    let mark = data.join(".shardmill-demo");
    if data.exists() {
        let is_empty = data.read_dir()?.next().is_none();
        anyhow::ensure!(
            mark.exists() || is_empty,
            "{} is not a demo folder and not empty; choose another folder with --data",
            data.display()
        );
        std::fs::remove_dir_all(data)
            .with_context(|| format!("failed to empty {}", data.display()))?;
    }
    // `create_dir` fails if the folder exists. That is wanted: in /tmp, another user may have created it
    // meanwhile, with links in it.
    let above = data.parent().filter(|above| !above.as_os_str().is_empty());
    above
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::create_dir(data))
        .with_context(|| format!("failed to make {}", data.display()))?;
    std::fs::write(&mark, "made by `shardmill demo`, which empties this folder when it starts\n")
        .with_context(|| format!("failed to write {}", mark.display()))
}

/// Returns the pipeline that is compiled into the binary, with its data and state in the demo's folder.
fn pipeline(data: &Path) -> anyhow::Result<PipelineConfig> {
    let lookup = |name: &str| match name {
        "SHARDMILL_DATA" => Some(data.display().to_string()),
        "SHARDMILL_STATE" => Some(data.join("state").display().to_string()),
        _ => None,
    };
    let mut config =
        shardmill_config::parse(Path::new("pipeline.toml"), PIPELINE, &SINK_TYPES, &lookup)?;
    config.admin = None;
    config.state_dir = super::with_trust(config.state_dir);
    Ok(config)
}

/// Returns the plugins that are compiled into the binary, by the file name in the pipeline.
fn bundled_plugin(path: &Path) -> Option<&'static [u8]> {
    match path.file_name()?.to_str()? {
        "car-decode.wasm" => Some(CAR_DECODE),
        "car-transform.wasm" => Some(CAR_TRANSFORM),
        "route-json.wasm" => Some(ROUTE_JSON),
        _ => None,
    }
}

async fn publish(
    client: &aws_sdk_kinesis::Client,
    stream: &StreamRef,
    cars: u64,
    console: &Console,
) -> anyhow::Result<()> {
    let mut producer = Producer::new(client.clone(), stream.clone());
    for id in 0..cars {
        let make = MAKES[id as usize % MAKES.len()];
        let car = Car { id, make: format!("{make} {id}") };
        let payload = bincode::serde::encode_to_vec(&car, bincode::config::standard())
            .context("failed to encode a car")?;
        let partition_key = format!("partitionKey-{id}");
        producer.put(NewRecord { partition_key, payload: Bytes::from(payload) }).await?;
        console.say(format!("publish: {} [# {id}]", car.make));
    }
    Ok(producer.flush().await?)
}

async fn report(
    data: &Path,
    statuses: &StatusRegistry,
    dead_letters: &DeadLetters,
) -> anyhow::Result<Report> {
    let mart = data.join("cars.db");
    let rows = rusqlite::Connection::open(&mart)
        .and_then(|mart| mart.query_row("SELECT count(*) FROM cars", [], |row| row.get(0)))
        .with_context(|| format!("failed to read {}", mart.display()))?;
    let logs = data.join("logs");
    let shards = statuses.snapshot();
    Ok(Report {
        shards: shards
            .iter()
            .map(|(shard, status)| ShardReport {
                shard: shard.to_string(),
                records: status.records_read,
            })
            .collect(),
        sinks: vec![
            SinkReport { sink: "mart".into(), rows, place: mart.display().to_string() },
            SinkReport {
                sink: "logs".into(),
                rows: count_lines(&logs)?,
                place: logs.display().to_string(),
            },
        ],
        dead_letters: dead_letters.count().await?,
    })
}

/// Counts the lines of all log files.
fn count_lines(folder: &Path) -> anyhow::Result<u64> {
    use std::io::Read as _;
    let mut lines = 0;
    for entry in
        folder.read_dir().with_context(|| format!("failed to read {}", folder.display()))?
    {
        let path = entry?.path();
        if path.is_dir() {
            lines += count_lines(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "gz") {
            let mut text = Vec::new();
            flate2::read::MultiGzDecoder::new(std::fs::File::open(&path)?)
                .read_to_end(&mut text)?;
            lines += text.iter().filter(|byte| **byte == b'\n').count() as u64;
        }
    }
    Ok(lines)
}

fn say(report: &Report, console: &Console) {
    if console.json {
        return;
    }
    let mut shards = Table::new();
    shards.load_style(presets::UTF8_FULL).set_header(["shard", "records read"]);
    for shard in &report.shards {
        shards.add_row([shard.shard.clone(), shard.records.to_string()]);
    }
    let mut sinks = Table::new();
    sinks.load_style(presets::UTF8_FULL).set_header(["written by", "rows", "where"]);
    for sink in &report.sinks {
        sinks.add_row([sink.sink.clone(), sink.rows.to_string(), sink.place.clone()]);
    }
    sinks.add_row(["dead letters".to_owned(), report.dead_letters.to_string(), String::new()]);
    print_line(shards);
    print_line(sinks);
}
