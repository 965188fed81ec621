//! `shardmill stream`: manages the stream of a pipeline, or any other stream.

mod consumers;
mod describe;
mod place;
mod put;
mod reshard;
mod tail;

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_kinesis::Client;

use self::describe::report;
pub use self::place::StreamPlace;
use self::place::{ResolvedStream, embedded_address};
use self::put::{StreamPutOptions, put};
use self::reshard::{Reshard, reshard};
use self::tail::{TailOptions, tail};
use super::progress::ConsoleProgress;
use super::{Console, signals};
use shardmill_config::{CreateStream, Endpoint, KinesisConfig, PipelineConfig, SourceKind, Timing};
use shardmill_core::boxed;
use shardmill_core::record::StreamRef;
use shardmill_core::source::{ShardSource, SourceError};
use shardmill_embedded::{EmbeddedStream, Users};
use shardmill_file::FileSource;
use shardmill_kinesis::client::Address;
use shardmill_kinesis::served;
use shardmill_kinesis::source::KinesisSource;
use shardmill_kinesis::{client, stream};

/// Longest wait for a deletion.
const DELETE_WAIT_MAX: Duration = Duration::from_secs(120);

#[derive(clap::Subcommand)]
pub enum Command {
    /// Serve the embedded stream, in memory, until SIGTERM or Ctrl-C.
    #[command(after_help = "Example:\n  shardmill stream serve --port 4567")]
    Serve {
        /// Port on 127.0.0.1; 0 chooses a free one.
        #[arg(long, default_value_t = 0)]
        port: u16,
        /// Accept connections from processes of other users of this machine. There are no credentials, so they
        /// can read and write all records. They must use `--endpoint http://127.0.0.1:PORT`, because the state
        /// folder is private to this user.
        #[arg(long)]
        any_user: bool,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Create a stream and wait until it is ACTIVE.
    #[command(after_help = "Example:\n  shardmill stream create --shards 5")]
    Create {
        /// Number of shards.
        #[arg(long, default_value_t = 1)]
        shards: u32,
        /// Maximum wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Show the status, shards and shard lineage of a stream.
    Describe {
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Put the records of files or of standard input on a stream, at least once.
    #[command(after_help = "Examples:\n  shardmill stream put flights.csv --skip 1\n  \
                            echo '{\"id\":1}' | shardmill stream put --format ndjson --key-field id")]
    Put {
        #[command(flatten)]
        options: StreamPutOptions,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Print records (shard, sequence number, key, payload), raw or decoded by a plugin.
    #[command(after_help = "Examples:\n  shardmill stream tail --limit 10\n  \
                            shardmill stream tail --from latest --decode car-decode.wasm")]
    Tail {
        #[command(flatten)]
        options: TailOptions,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Split a shard in two and wait until the stream is ACTIVE.
    #[command(after_help = "Example:\n  shardmill stream split shardId-000000000000")]
    Split {
        /// ID of the shard.
        shard: String,
        /// Hash key at which the second half begins [default: the middle].
        #[arg(long, value_name = "HASHKEY")]
        at: Option<u128>,
        /// Maximum wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Merge two adjacent shards and wait until the stream is ACTIVE.
    #[command(
        after_help = "Example:\n  shardmill stream merge shardId-000000000000 shardId-000000000001"
    )]
    Merge {
        /// ID of the shard.
        shard: String,
        /// ID of the shard with the adjacent hash range.
        adjacent: String,
        /// Maximum wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Change the number of open shards, with equal hash ranges, and wait until the stream is ACTIVE.
    #[command(after_help = "Example:\n  shardmill stream scale 4")]
    Scale {
        /// Number of open shards.
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        shards: u32,
        /// Maximum wait, for example `120s`.
        #[arg(long, default_value = "120s", value_parser = humantime::parse_duration)]
        wait: Duration,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// List, register and deregister enhanced fan-out consumers.
    #[command(subcommand)]
    Consumers(consumers::Command),
    /// Delete a stream and its records. Name it with --stream, or confirm with --yes that the pipeline's stream
    /// is meant.
    #[command(after_help = "Examples:\n  shardmill stream delete --stream test\n  \
                            shardmill stream delete --pipeline pipeline.toml --yes")]
    Delete {
        /// Delete the pipeline's stream without naming it.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        place: StreamPlace,
    },
}

#[boxed]
pub async fn stream(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Serve { port, any_user, place } => {
            let users = if any_user { Users::Any } else { Users::Own };
            serve(port, users, &place.resolve()?, console).await
        }
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
        Command::Delete { yes, place } => {
            let (target, client) = place.connect().await?;
            let name = target.name()?;
            anyhow::ensure!(
                yes || place.names_stream(),
                "stream {name} is the stream of the pipeline file, and deleting it loses its records: name \
                 it (`--stream {name}`), or confirm with `--yes`"
            );
            stream::delete(&client, name, DELETE_WAIT_MAX).await?;
            console.say(format!("deleted stream {name}"));
            console.report(&serde_json::json!({ "deleted": name.to_string() }))
        }
    }
}

/// Connects the source of a pipeline, and creates its stream if the configuration asks for it. If an embedded
/// stream was started for it, that stream lives as long as the second value.
pub(crate) async fn source(
    config: &PipelineConfig,
) -> anyhow::Result<(Arc<dyn ShardSource>, Option<EmbeddedStream>)> {
    let kinesis = match &config.source.kind {
        SourceKind::Kinesis(kinesis) => kinesis,
        SourceKind::File(file) => {
            return Ok((Arc::new(FileSource::new(file, config.source.batch)?), None));
        }
    };
    let (address, started) = match &kinesis.server.endpoint {
        Endpoint::Aws => (None, None),
        Endpoint::Url(url) => (Some(Address::Url(url.clone())), None),
        Endpoint::Embedded => match served::find(&config.state_dir) {
            Some(served) => (Some(Address::Served(served)), None),
            None => {
                let started = EmbeddedStream::start(0).await?;
                (Some(Address::Url(started.url().clone())), Some(started))
            }
        },
    };
    let stream = Some(&kinesis.stream.value);
    let server = client::Server::of(&kinesis.server, stream, address.as_ref());
    let client = client::connect(&server.with_timing(&config.timing)).await?;
    ensure(&client, kinesis).await?;
    let source = KinesisSource::new(client, kinesis, config.source.batch, config.buffer_bytes_max);
    Ok((Arc::new(source), started))
}

/// Connects a client that puts events on a pipeline's stream, beside the source. `started` is the embedded
/// stream that this process serves, if any.
pub(crate) async fn intake_client(
    config: &PipelineConfig,
    kinesis: &KinesisConfig,
    started: Option<&EmbeddedStream>,
) -> anyhow::Result<Client> {
    let address = match (&kinesis.server.endpoint, started) {
        (Endpoint::Aws, _) => None,
        (Endpoint::Url(url), _) => Some(Address::Url(url.clone())),
        (Endpoint::Embedded, Some(started)) => Some(Address::Url(started.url().clone())),
        (Endpoint::Embedded, None) => Some(embedded_address(&config.state_dir).await?),
    };
    let stream = Some(&kinesis.stream.value);
    let server = client::Server::of(&kinesis.server, stream, address.as_ref());
    Ok(client::connect(&server.with_timing(&config.timing)).await?)
}

/// Creates the pipeline's stream if it is missing and `create` is set, and waits until it is ACTIVE.
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

/// Creates a stream and waits until it is ACTIVE, with a progress bar.
pub(crate) async fn create_and_wait(
    client: &Client,
    name: &StreamRef,
    create: CreateStream,
) -> anyhow::Result<stream::Description> {
    stream::create(client, name, create.shards).await?;
    let mut progress =
        ConsoleProgress::start(&format!("waiting for stream {name} to be ACTIVE"), None);
    let mut glance = |waited: Duration, status: &str| progress.at(waited.as_secs(), status);
    let description = stream::wait_active(client, name, create.wait_max, &mut glance).await?;
    progress.done();
    Ok(description)
}

async fn serve(
    port: u16,
    users: Users,
    target: &ResolvedStream,
    console: &Console,
) -> anyhow::Result<()> {
    let stop = signals::stop_on_signals(Timing::default().drain_max)?;
    target.state_dir.make(served::FOLDER)?;
    let served = EmbeddedStream::serve_for(&target.state_dir, port, users).await?;
    console.say(format!("serving the embedded stream at {}", served.url()));
    console.report(&serde_json::json!({ "url": served.url().as_str() }))?;
    served.until(stop.token()).await;
    Ok(())
}
