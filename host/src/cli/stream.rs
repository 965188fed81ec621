//! `shardmill stream`: the stream of a pipeline, or any other.

mod consumers;
mod reshard;
mod tail;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use aws_sdk_kinesis::Client;
use serde::Serialize;
use url::Url;

use self::reshard::{Reshard, reshard};
use self::tail::{TailOptions, tail};
use super::progress::Progress;
use super::{Console, DEFAULT_PIPELINE, load, run};
use crate::config::{
    AssumeRole, CreateStream, Endpoint, KinesisConfig, PipelineConfig, SourceKind,
};
use crate::record::StreamRef;
use crate::source::embedded::{self, EmbeddedStream};
use crate::source::input::{Format, Input, KeyRule};
use crate::source::kinesis::KinesisSource;
use crate::source::producer::{Producer, PutReport};
use crate::source::{ShardSource, SourceError, client, stream};

/// How long a deletion is waited for.
const DELETE_WAIT_MAX: Duration = Duration::from_secs(120);
/// Records between two looks at the progress bar.
const PROGRESS_RECORDS: u64 = 1_000;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Serve the embedded stream, in memory, until SIGTERM or Ctrl-C.
    #[command(after_help = "Example:\n  shardmill stream serve --port 4567")]
    Serve {
        /// The port on 127.0.0.1; 0 takes a free one.
        #[arg(long, default_value_t = 0)]
        port: u16,
        #[command(flatten)]
        place: Place,
    },
    /// Create a stream and wait until it is ACTIVE.
    #[command(after_help = "Example:\n  shardmill stream create --shards 5")]
    Create {
        /// The number of shards.
        #[arg(long, default_value_t = 1)]
        shards: u32,
        /// How long to wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: Place,
    },
    /// Show a stream: status, shards, parents.
    Describe {
        #[command(flatten)]
        place: Place,
    },
    /// Put the records of files, or of standard input, at least once.
    #[command(after_help = "Examples:\n  shardmill stream put flights.csv --skip 1\n  \
                            echo '{\"id\":1}' | shardmill stream put --format ndjson --key-field id")]
    Put {
        #[command(flatten)]
        options: PutOptions,
        #[command(flatten)]
        place: Place,
    },
    /// Print records: shard, sequence, key, payload; as they are, or as a plugin decodes them.
    #[command(after_help = "Examples:\n  shardmill stream tail --limit 10\n  \
                            shardmill stream tail --from latest --decode car-decode.wasm")]
    Tail {
        #[command(flatten)]
        options: TailOptions,
        #[command(flatten)]
        place: Place,
    },
    /// Split a shard in two and wait until the stream is ACTIVE.
    #[command(after_help = "Example:\n  shardmill stream split shardId-000000000000")]
    Split {
        /// The shard's id.
        shard: String,
        /// The hash key at which the second half begins; default: the middle.
        #[arg(long, value_name = "HASHKEY")]
        at: Option<u128>,
        /// How long to wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: Place,
    },
    /// Merge two adjacent shards and wait until the stream is ACTIVE.
    #[command(
        after_help = "Example:\n  shardmill stream merge shardId-000000000000 shardId-000000000001"
    )]
    Merge {
        /// The shard's id.
        shard: String,
        /// The shard whose hash range lies next to it.
        adjacent: String,
        /// How long to wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: Place,
    },
    /// Give a stream so many shards of equal ranges and wait until it is ACTIVE.
    #[command(after_help = "Example:\n  shardmill stream scale 4")]
    Scale {
        /// The number of open shards that are due.
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        shards: u32,
        /// How long to wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: Place,
    },
    /// Who reads a stream by enhanced fan-out: list, register, deregister.
    #[command(subcommand)]
    Consumers(consumers::Command),
    /// Delete a stream and its records.
    Delete {
        #[command(flatten)]
        place: Place,
    },
}

/// What is put, and how.
#[derive(clap::Args)]
pub struct PutOptions {
    /// The files; none, or `-`: standard input.
    files: Vec<PathBuf>,
    /// How records lie in the files.
    #[arg(long, value_enum, default_value_t = Format::Lines)]
    format: Format,
    /// The partition key of all records; default: the record's number, which spreads them.
    #[arg(long, conflicts_with = "key_field")]
    key: Option<String>,
    /// The top-level member of each JSON record that is its partition key.
    #[arg(long, value_name = "NAME")]
    key_field: Option<String>,
    /// Lines to leave out at the beginning of each file.
    #[arg(long, default_value_t = 0)]
    skip: u64,
    /// Put at most one record of a partition key in a request, so that a refused record is never
    /// overtaken by a later one of its key.
    #[arg(long)]
    strict_order: bool,
}

/// Which stream, and where.
#[derive(clap::Args)]
pub struct Place {
    /// The stream's name or ARN; default: that of the pipeline.
    #[arg(long, value_name = "NAME", value_parser = StreamRef::parse)]
    stream: Option<StreamRef>,
    /// The pipeline whose stream it is; default: pipeline.toml, where there is one.
    #[arg(long, value_name = "FILE")]
    pipeline: Option<PathBuf>,
    /// `embedded`, `aws`, or a URL; default: that of the pipeline.
    #[arg(long)]
    endpoint: Option<String>,
    /// The AWS region; default: that of the pipeline, or the standard chain.
    #[arg(long)]
    region: Option<String>,
    /// The state folder, by which the embedded stream is found.
    #[arg(long, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
}

/// A stream, resolved.
struct Target {
    stream: Option<StreamRef>,
    endpoint: Endpoint,
    region: Option<String>,
    assume_role: Option<AssumeRole>,
    state_dir: PathBuf,
}

pub async fn stream(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Serve { port, place } => serve(port, &place.resolve()?, console).await,
        Command::Create { shards, wait, place } => {
            let (target, client) = place.connect().await?;
            let create = CreateStream { shards, wait_max: wait };
            let made = create_and_wait(&client, target.name()?, create).await?;
            report(&client, target.name()?, made, console).await
        }
        Command::Describe { place } => {
            let (target, client) = place.connect().await?;
            let found = stream::describe(&client, target.name()?).await?;
            report(&client, target.name()?, found, console).await
        }
        Command::Put { options, place } => {
            options.check()?;
            let (target, client) = place.connect().await?;
            put(client, target.name()?, options, console).await
        }
        Command::Tail { options, place } => {
            let (target, client) = place.connect().await?;
            tail(client, target.name()?, options, console).await
        }
        Command::Split { shard, at, wait, place } => {
            let (target, client) = place.connect().await?;
            let wanted = Reshard::Split { shard: shard.into(), at };
            reshard(&client, target.name()?, wanted, wait, console).await
        }
        Command::Merge { shard, adjacent, wait, place } => {
            let (target, client) = place.connect().await?;
            let wanted = Reshard::Merge { shard: shard.into(), adjacent: adjacent.into() };
            reshard(&client, target.name()?, wanted, wait, console).await
        }
        Command::Scale { shards, wait, place } => {
            let (target, client) = place.connect().await?;
            let wanted = Reshard::Scale { shards };
            reshard(&client, target.name()?, wanted, wait, console).await
        }
        Command::Consumers(command) => consumers::consumers(command, console).await,
        Command::Delete { place } => {
            let (target, client) = place.connect().await?;
            let name = target.name()?;
            stream::delete(&client, name, DELETE_WAIT_MAX).await?;
            console.say(format!("deleted stream {name}"));
            console.report(&serde_json::json!({ "deleted": name.to_string() }))
        }
    }
}

/// The source of a pipeline, connected; its stream is created if asked for. The embedded stream
/// that was started for it, if any, lives as long as the second value.
pub(crate) async fn source(
    config: &PipelineConfig,
) -> anyhow::Result<(Arc<dyn ShardSource>, Option<EmbeddedStream>)> {
    let kinesis = match &config.source.kind {
        SourceKind::Kinesis(kinesis) => kinesis,
        SourceKind::File(file) => {
            return Ok((crate::source::file::source(file, config.source.batch)?, None));
        }
    };
    let (url, started) = match &kinesis.endpoint {
        Endpoint::Aws => (None, None),
        Endpoint::Url(url) => (Some(url.clone()), None),
        Endpoint::Embedded => match embedded::find(&config.state_dir) {
            Some(url) => (Some(url), None),
            None => {
                let started = EmbeddedStream::start(0).await?;
                (Some(started.url().clone()), Some(started))
            }
        },
    };
    let client = client::connect(server(kinesis, url.as_ref())).await?;
    ensure(&client, kinesis).await?;
    let source = KinesisSource::new(client, kinesis, config.source.batch, config.buffer_bytes_max);
    Ok((Arc::new(source), started))
}

/// A connection to put events on a pipeline's stream, beside its source: `started` is the embedded
/// stream that was started for that, if it was.
pub(crate) async fn intake_client(
    config: &PipelineConfig,
    kinesis: &KinesisConfig,
    started: Option<&EmbeddedStream>,
) -> anyhow::Result<Client> {
    let url = match (&kinesis.endpoint, started) {
        (Endpoint::Aws, _) => None,
        (Endpoint::Url(url), _) => Some(url.clone()),
        (Endpoint::Embedded, Some(started)) => Some(started.url().clone()),
        (Endpoint::Embedded, None) => Some(embedded_url(&config.state_dir)?),
    };
    Ok(client::connect(server(kinesis, url.as_ref())).await?)
}

/// The server of a pipeline's stream, which is at `url`.
fn server<'a>(kinesis: &'a KinesisConfig, url: Option<&'a Url>) -> client::Server<'a> {
    client::Server {
        url,
        region: kinesis.region.as_deref().or(kinesis.stream.value.region()),
        assume_role: role(&kinesis.endpoint, kinesis.assume_role.as_ref()),
    }
}

/// The role to assume at an endpoint: none for the embedded stream, which asks nobody who he is.
fn role<'a>(endpoint: &Endpoint, role: Option<&'a AssumeRole>) -> Option<&'a AssumeRole> {
    role.filter(|_| *endpoint != Endpoint::Embedded)
}

/// The embedded stream that another process serves.
fn embedded_url(state_dir: &Path) -> anyhow::Result<Url> {
    embedded::find(state_dir).with_context(|| {
        format!(
            "no embedded stream is served from {}; start one with `shardmill stream serve`",
            state_dir.display()
        )
    })
}

/// Creates the pipeline's stream when it is missing and `create` is set.
pub(crate) async fn ensure(client: &Client, config: &KinesisConfig) -> anyhow::Result<()> {
    let name = &config.stream.value;
    match (stream::describe(client, name).await, config.create) {
        (Err(SourceError::NoSuchStream { .. }), Some(create)) => {
            create_and_wait(client, name, create).await.map(drop)
        }
        (found, create) => {
            let wait_max = create.map_or(DELETE_WAIT_MAX, |create| create.wait_max);
            if found?.status != "ACTIVE" {
                stream::wait_active(client, name, wait_max, &mut |_, _| {}).await?;
            }
            Ok(())
        }
    }
}

/// Creates a stream and waits, visibly.
pub(crate) async fn create_and_wait(
    client: &Client,
    name: &StreamRef,
    create: CreateStream,
) -> anyhow::Result<stream::Description> {
    stream::create(client, name, create.shards).await?;
    let mut progress = Progress::start(&format!("waiting for stream {name} to be ACTIVE"), None);
    let mut glance = |waited: Duration, status: &str| progress.at(waited.as_secs(), status);
    let description = stream::wait_active(client, name, create.wait_max, &mut glance).await?;
    progress.done();
    Ok(description)
}

impl PutOptions {
    /// Options that say nothing together.
    fn check(&self) -> anyhow::Result<()> {
        if self.key_field.is_some() && self.format != Format::Ndjson {
            bail!("--key-field takes the key from JSON: add --format ndjson");
        }
        if self.skip > 0 && self.format == Format::Binary {
            bail!("--skip leaves out lines, and --format binary has none: take one of them away");
        }
        Ok(())
    }
}

impl Place {
    fn resolve(&self) -> anyhow::Result<Target> {
        let default = Path::new(DEFAULT_PIPELINE);
        let pipeline = match &self.pipeline {
            Some(file) => Some(load(file)?),
            None if default.exists() => Some(load(default)?),
            None => None,
        };
        let kinesis = pipeline.as_ref().and_then(|it| it.source.kinesis());
        let endpoint = match self.endpoint.as_deref() {
            Some("embedded") => Endpoint::Embedded,
            Some("aws") => Endpoint::Aws,
            Some(url) => Endpoint::Url(Url::parse(url).with_context(|| {
                format!("--endpoint {url} is neither `embedded` nor `aws` nor a URL")
            })?),
            None => kinesis.map_or(Endpoint::Aws, |it| it.endpoint.clone()),
        };
        let stream = self.stream.clone().or(kinesis.map(|it| it.stream.value.clone()));
        let region_of = |stream: &StreamRef| stream.region().map(str::to_owned);
        Ok(Target {
            region: self
                .region
                .clone()
                .or(kinesis.and_then(|it| it.region.clone()))
                .or(stream.as_ref().and_then(region_of)),
            assume_role: kinesis.and_then(|it| it.assume_role.clone()),
            stream,
            endpoint,
            state_dir: self
                .state_dir
                .clone()
                .or(pipeline.map(|it| it.state_dir))
                .unwrap_or_else(|| "state".into()),
        })
    }

    async fn connect(&self) -> anyhow::Result<(Target, Client)> {
        let target = self.resolve()?;
        let url = match &target.endpoint {
            Endpoint::Aws => None,
            Endpoint::Url(url) => Some(url.clone()),
            Endpoint::Embedded => Some(embedded_url(&target.state_dir)?),
        };
        let server = client::Server {
            url: url.as_ref(),
            region: target.region.as_deref(),
            assume_role: role(&target.endpoint, target.assume_role.as_ref()),
        };
        let client = client::connect(server).await?;
        Ok((target, client))
    }
}

impl Target {
    fn name(&self) -> anyhow::Result<&StreamRef> {
        self.stream
            .as_ref()
            .context("which stream? name it with --stream, or a pipeline with --pipeline")
    }
}

async fn serve(port: u16, target: &Target, console: &Console) -> anyhow::Result<()> {
    let stop = run::stop_on_signals()?;
    let served = EmbeddedStream::serve(&target.state_dir, port).await?;
    console.say(format!("serving the embedded stream at {}", served.url()));
    console.report(&serde_json::json!({ "url": served.url().as_str() }))?;
    served.until(&stop).await;
    Ok(())
}

#[derive(Serialize)]
struct StreamReport {
    stream: String,
    arn: String,
    status: String,
    created_ms: i64,
    retention_hours: u32,
    shards: Vec<ShardReport>,
}

#[derive(Serialize)]
struct ShardReport {
    shard: String,
    closed: bool,
    parents: Vec<String>,
}

async fn report(
    client: &Client,
    name: &StreamRef,
    found: stream::Description,
    console: &Console,
) -> anyhow::Result<()> {
    let shards = stream::shards(client, name).await?;
    let report = StreamReport {
        stream: found.identity.name.to_string(),
        arn: found.identity.arn.to_string(),
        status: found.status,
        created_ms: found.identity.created_ms,
        retention_hours: found.retention_hours,
        shards: shards
            .into_iter()
            .map(|shard| ShardReport {
                shard: shard.id.to_string(),
                closed: shard.is_closed,
                parents: shard.parents.iter().map(ToString::to_string).collect(),
            })
            .collect(),
    };
    console.say(format!(
        "stream {}: {}, {} shards, records kept for {} h",
        report.stream,
        report.status,
        report.shards.len(),
        report.retention_hours
    ));
    console.say(format!("  {}", report.arn));
    for shard in &report.shards {
        let closed = if shard.closed { ", closed" } else { "" };
        let parents = match shard.parents.is_empty() {
            true => String::new(),
            false => format!(", child of {}", shard.parents.join(" and ")),
        };
        console.say(format!("  {}{closed}{parents}", shard.shard));
    }
    console.report(&report)
}

/// What a put did, for its last line.
#[derive(Serialize)]
struct PutSummary {
    records: u64,
    bytes: u64,
    retried: u64,
    seconds: f64,
    records_per_second: f64,
}

async fn put(
    client: Client,
    name: &StreamRef,
    options: PutOptions,
    console: &Console,
) -> anyhow::Result<()> {
    stream::describe(&client, name).await?;
    let begun = Instant::now();
    let mut producer = Producer::new(client, name.clone()).strict_order(options.strict_order);
    let mut progress = Progress::start(&format!("putting records on {name}"), None);
    let key = match (options.key, options.key_field) {
        (Some(key), _) => KeyRule::Fixed(key),
        (None, Some(member)) => KeyRule::Member(member),
        (None, None) => KeyRule::Number,
    };
    let mut number = 0u64;
    for file in input_files(options.files) {
        let (reader, place) = open_input(file.as_deref())?;
        let mut input = Input::new(reader, place, options.format, key.clone(), number);
        input.skip_lines(options.skip)?;
        while let Some(record) = input.next_record()? {
            producer.put(record).await?;
            number += 1;
            if number.is_multiple_of(PROGRESS_RECORDS) {
                progress.at(number, &rate(producer.report(), begun));
            }
        }
    }
    producer.flush().await?;
    progress.done();
    let (report, seconds) = (producer.report(), begun.elapsed().as_secs_f64());
    let summary = PutSummary {
        records: report.records,
        bytes: report.bytes,
        retried: report.retried,
        seconds,
        records_per_second: report.records as f64 / seconds.max(f64::EPSILON),
    };
    console.say(format!(
        "put {} records, {} bytes, {} retried, in {seconds:.1} s ({:.0} records/s)",
        summary.records, summary.bytes, summary.retried, summary.records_per_second
    ));
    console.report(&summary)
}

/// The files that were named; none, or `-`: standard input, as `None`.
fn input_files(files: Vec<PathBuf>) -> Vec<Option<PathBuf>> {
    match files.is_empty() {
        true => vec![None],
        false => files.into_iter().map(|file| (file != Path::new("-")).then_some(file)).collect(),
    }
}

fn open_input(file: Option<&Path>) -> anyhow::Result<(Box<dyn BufRead + Send>, String)> {
    let Some(path) = file else {
        return Ok((Box::new(BufReader::new(std::io::stdin())), "standard input".into()));
    };
    let opened = std::fs::File::open(path);
    let opened = opened.with_context(|| format!("failed to read {}", path.display()))?;
    Ok((Box::new(BufReader::new(opened)), path.display().to_string()))
}

/// How much the stream has, and how quickly it came.
fn rate(report: PutReport, begun: Instant) -> String {
    let per_second = report.records as f64 / begun.elapsed().as_secs_f64().max(f64::EPSILON);
    format!("{}, {per_second:.0} records/s", bytesize::ByteSize(report.bytes))
}
