//! `shardmill stream tail`: prints the records of a stream, raw or decoded by a plugin.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use aws_sdk_kinesis::Client;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::super::{Console, output, print_json, print_line, signals};
use crate::load_plugin;
use crate::terminal::note;
use shardmill_config::{BatchLimits, OnLostRecords, RejectedMax, Timing};
use shardmill_core::escape::escaped;
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::{
    Batch, Record, ShardId, ShardKey, ShardStart, StreamIdentity, StreamRef,
};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{BatchReader as _, NextBatch, Shard, SourceError};
use shardmill_engine::shard_lineage::Beginning;
use shardmill_engine::shard_lineage::plan_shards;
use shardmill_engine::stage::{Item, LoadedStage, RunError, StageRunner, first_flow};
use shardmill_kinesis::connection::StreamConnection;
use shardmill_kinesis::inbox::{Inbox, ReadFrom};
use shardmill_kinesis::polling::{Polling, PollingReader};
use shardmill_kinesis::stream;
use shardmill_state::{KnownShards, ShardState};

/// Bytes that all readers may hold together.
const READ_AHEAD_BYTES_MAX: usize = 64 << 20;
/// Batches that were read and are not printed yet.
const BATCHES_MAX: usize = 64;
const BATCH: BatchLimits = BatchLimits { records_max: 1_000, bytes_max: 1 << 20 };
const POLLING: Polling = Polling {
    records_per_call_max: 1_000,
    poll_interval: Duration::from_millis(300),
    is_paced: true,
};
/// Interval between looks for new shards. A listing right after the end of the parents may not show their
/// children.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(10);

/// Options of `stream tail`.
#[derive(clap::Args)]
pub(crate) struct TailOptions {
    /// Stop after this number of records.
    #[arg(long)]
    limit: Option<u64>,
    /// Stop at the end of the stream instead of waiting for more records.
    #[arg(long)]
    no_follow: bool,
    /// Start position: `trim-horizon`, `latest`, `at-timestamp:2026-01-31T00:00:00Z`, or
    /// `at-sequence:SHARD:SEQUENCE`.
    #[arg(long, value_name = "WHERE", default_value = "trim-horizon",
          value_parser = shardmill_config::parse_start)]
    from: StartPosition,
    /// Print only this shard, to its end.
    #[arg(long, value_name = "ID")]
    shard: Option<String>,
    /// Print the outputs of this plugin, with the route of each output. Rejected records go to standard error,
    /// with the reason.
    #[arg(long, value_name = "PLUGIN.wasm")]
    decode: Option<PathBuf>,
    /// Configuration of the plugin, as JSON.
    #[arg(long, value_name = "JSON", requires = "decode", default_value = "{}")]
    config: String,
}

/// Prints records until the limit, the end of the stream (with `--no-follow`), or a signal. The records of a
/// shard come in order, and after all records of its parents.
pub(super) async fn tail(
    client: Client,
    name: &StreamRef,
    options: TailOptions,
    console: &Console,
) -> anyhow::Result<()> {
    let stop = signals::stop_on_signals(Timing::default().drain_max)?.token().clone();
    let closed = output::closed();
    let decoder = match &options.decode {
        Some(file) => {
            let (file, config_json) = (file.clone(), options.config.clone());
            let (name, stop) = (name.clone(), stop.clone());
            Some(off_thread(move || Decoder::load(&file, &config_json, &name, &stop)).await?)
        }
        None => None,
    };
    let left = options.limit.unwrap_or(u64::MAX);
    let mut printer = Printer { console, decoder, left };
    let print = async {
        let (mut readers, mut batches) = Readers::new(client, name, options).await?;
        readers.discover().await?;
        let mut discovery = tokio::time::interval(DISCOVERY_INTERVAL);
        while printer.left > 0 && !(readers.tasks.is_empty() && batches.is_empty()) {
            tokio::select! {
                Some(batch) = batches.recv() => tokio::task::block_in_place(|| printer.print(&batch))?,
                Some(done) = readers.tasks.join_next() => readers.ended(done??).await?,
                _ = discovery.tick(), if !readers.no_follow => readers.discover().await?,
            }
        }
        Ok(())
    };
    // The select surrounds everything, because the server may fail to answer at any step.
    tokio::select! {
        printed = print => printed,
        () = stop.cancelled() => Ok(()),
        () = closed.cancelled() => Ok(()),
    }
}

/// Readers of a stream's shards, each in a task of its own, parents before children.
struct Readers {
    connection: Arc<StreamConnection>,
    identity: Arc<StreamIdentity>,
    only: Option<ShardId>,
    from: StartPosition,
    /// Time that LATEST stands for, in milliseconds since 1970 by the server's clock: the time at which the
    /// command was started.
    latest_ms: Option<i64>,
    no_follow: bool,
    /// Shards whose reading has started.
    known: KnownShards,
    tasks: JoinSet<Result<Read, SourceError>>,
    batches: mpsc::Sender<Batch>,
}

/// Progress of reading a shard.
enum Read {
    /// To its end: its children are next.
    ToEnd(ShardId),
    /// To its newest record, or as far as was wanted.
    SoFar,
}

impl Readers {
    /// Makes readers that have not started, and the receiver of their batches.
    async fn new(
        client: Client,
        name: &StreamRef,
        options: TailOptions,
    ) -> anyhow::Result<(Self, mpsc::Receiver<Batch>)> {
        let identity = Arc::new(stream::describe(&client, name).await?.identity);
        let only = options.shard.as_deref().map(ShardId::from);
        let listed = stream::shards(&client, name).await?;
        let begun = match &options.from {
            StartPosition::AtSequence(places) => places.keys().collect(),
            _ => Vec::new(),
        };
        for id in begun.into_iter().chain(&only) {
            if !listed.iter().any(|shard| shard.id == *id) {
                bail!(
                    "unknown shard {id} of stream {name}: `shardmill stream describe` lists the shards"
                );
            }
        }
        let latest_ms = match options.from {
            StartPosition::Latest => Some(stream::now_ms(&client, name).await?),
            _ => None,
        };
        let on_lost_records = OnLostRecords::Continue;
        let connection =
            StreamConnection::new(client, name.clone(), on_lost_records, READ_AHEAD_BYTES_MAX);
        let (batches, printed) = mpsc::channel(BATCHES_MAX);
        let readers = Self {
            connection,
            identity,
            only,
            from: options.from,
            latest_ms,
            no_follow: options.no_follow,
            known: KnownShards::default(),
            tasks: JoinSet::new(),
            batches,
        };
        Ok((readers, printed))
    }

    /// Starts to read the shards that may be read now.
    async fn discover(&mut self) -> Result<(), SourceError> {
        let (client, name) = (&self.connection.client, &self.connection.stream);
        let mut shards = stream::shards(client, name).await?;
        if let Some(only) = &self.only {
            shards.retain(|shard| shard.id == *only);
        }
        let plan = plan_shards(&shards, &self.known, &self.from, self.latest_ms);
        if self.known.is_first_start() {
            self.known.latest_ms = self.latest_ms;
            let ended = ShardState { ended: true, ..ShardState::default() };
            self.known.begun.extend(plan.skipped.into_iter().map(|id| (id, ended.clone())));
        }
        self.known.seen.extend(shards.iter().map(|shard| shard.id.clone()));
        for Beginning { shard: id, start, .. } in plan.ready {
            let shard = shards.iter().find(|shard| shard.id == id);
            if let Some(shard) = shard.filter(|_| !self.known.begun.contains_key(&id)) {
                self.known.begun.insert(id, ShardState::default());
                self.begin(shard, start);
            }
        }
        Ok(())
    }

    fn begin(&mut self, shard: &Shard, start: ShardStart) {
        let id = shard.id.clone();
        let key =
            ShardKey { pipeline: "tail".into(), stream: self.identity.clone(), shard: id.clone() };
        let from =
            ReadFrom { after: None, start, hash_range: shard.hash_range, caught_up_ms: None };
        let inbox = Inbox::new(key, BATCH, from);
        let mut reader = PollingReader::new(self.connection.clone(), POLLING, inbox);
        let batches = self.batches.clone();
        // A closed shard has an end, so there is no need to stop at its newest record.
        let until_idle = self.no_follow && !shard.is_closed;
        self.tasks.spawn(async move {
            loop {
                match reader.next_batch().await? {
                    NextBatch::Batch(batch) => {
                        if batches.send(batch).await.is_err() {
                            return Ok(Read::SoFar);
                        }
                    }
                    NextBatch::Idle { lag_ms: 0, .. } if until_idle => return Ok(Read::SoFar),
                    NextBatch::Idle { .. } | NextBatch::Lost(_) => {}
                    NextBatch::ShardEnd { .. } => return Ok(Read::ToEnd(id)),
                    NextBatch::SourceEnd => return Ok(Read::SoFar),
                }
            }
        });
    }

    async fn ended(&mut self, read: Read) -> Result<(), SourceError> {
        let Read::ToEnd(id) = read else { return Ok(()) };
        self.known.begun.entry(id).or_default().ended = true;
        self.discover().await
    }
}

#[derive(Serialize)]
struct Line<'a> {
    shard: &'a str,
    sequence: &'a str,
    /// Route of the output, if a plugin decoded the record.
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<&'a str>,
    key: String,
    payload: String,
}

/// Printer of batches.
struct Printer<'a> {
    console: &'a Console,
    decoder: Option<Decoder>,
    /// Number of records that may still be printed.
    left: u64,
}

impl Printer<'_> {
    /// Prints a batch up to the limit.
    fn print(&mut self, batch: &Batch) -> anyhow::Result<()> {
        let mut items = first_flow(batch);
        items.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= items.len() as u64;
        let Some(decoder) = &mut self.decoder else {
            for item in &items {
                let record = &batch.records[item.record as usize];
                print(self.console, batch, record, None, (&item.key, &item.payload))?;
            }
            return Ok(());
        };
        let runner = decoder.runner(&batch.shard)?;
        let mut rest = &items[..];
        while !rest.is_empty() {
            match decode(runner, batch, rest, self.console)? {
                Some(done) => rest = &rest[done..],
                None => return Ok(()),
            }
        }
        Ok(())
    }
}

/// Prints the plugin's outputs for the first items, and notes the rejected ones. Returns how many items were
/// processed; `None`: it was stopped.
fn decode(
    runner: &mut StageRunner,
    batch: &Batch,
    items: &[Item],
    console: &Console,
) -> anyhow::Result<Option<usize>> {
    let (items, outcome) = match runner.run_first(batch, items) {
        Ok(ran) => ran,
        Err(RunError::Stopped(_)) => return Ok(None),
        Err(
            RunError::AllFailed(reason)
            | RunError::TooManyFailed(reason)
            | RunError::Starved(reason)
            | RunError::Later(reason, _),
        ) => {
            bail!(
                "plugin {:?} accepted no record of shard {}: {}",
                runner.stage().plugin,
                batch.shard.shard,
                escaped(&reason, &[])
            )
        }
        Err(RunError::NoInstance(error)) => {
            bail!("plugin {:?} does not start: {error}", runner.stage().plugin)
        }
        Err(RunError::TooMuch(_)) => {
            bail!("plugin {:?} returned more output than its limit", runner.stage().plugin)
        }
    };
    let record_of = |item: usize| &batch.records[items[item].record as usize];
    for output in outcome.outputs() {
        let item = &items[output.item];
        let route = runner.stage().route_names[output.route].as_str();
        let key = output.key.as_ref().unwrap_or(&item.key);
        let payload = output.payload.as_ref().unwrap_or(&item.payload);
        print(console, batch, record_of(output.item), Some(route), (key, payload))?;
    }
    for rejected in &outcome.rejected {
        let position = &record_of(rejected.item).position;
        let reason = escaped(&rejected.reason, &[]);
        note(format_args!("rejected: {} {position}: {reason}", batch.shard.shard));
    }
    Ok(Some(items.len()))
}

fn print(
    console: &Console,
    batch: &Batch,
    record: &Record,
    route: Option<&str>,
    (key, payload): (&[u8], &[u8]),
) -> anyhow::Result<()> {
    let line = Line {
        shard: batch.shard.shard.as_str(),
        sequence: record.position.sequence.as_str(),
        route,
        key: String::from_utf8_lossy(key).into_owned(),
        payload: String::from_utf8_lossy(payload).into_owned(),
    };
    if console.json {
        // Records are data, not a report: values of variables in them are not masked.
        print_json(&serde_json::to_string(&line)?);
        return Ok(());
    }
    let Line { shard, sequence, payload, .. } = &line;
    let key = escaped(&line.key, &[]);
    let route = route.map(|route| format!("{route} ")).unwrap_or_default();
    print_line(format!("{shard} {sequence} {route}{key} {}", payload.escape_debug()));
    Ok(())
}

/// A plugin that decodes records, with one instance per shard as in a pipeline.
struct Decoder {
    stage: LoadedStage,
    runners: HashMap<ShardId, StageRunner>,
    stop: CancellationToken,
}

impl Decoder {
    fn load(
        file: &Path,
        config_json: &str,
        stream: &StreamRef,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let plugin = load_plugin(file)?;
        let stage = LoadedStage::alone(plugin, config_json, &stream.name).map_err(|error| {
            anyhow!("plugin {} does not start with --config {config_json}: {error}", file.display())
        })?;
        Ok(Self { stage, runners: HashMap::new(), stop: stop.clone() })
    }

    /// Returns the instance of a shard. The limit of rejected records is off, because records are only shown.
    fn runner(&mut self, shard: &ShardKey) -> anyhow::Result<&mut StageRunner> {
        if !self.runners.contains_key(&shard.shard) {
            let context = self.stage.context(&shard.stream.name, shard.shard.as_str());
            let rejected_max = RejectedMax { of_last_1000: u32::MAX, in_a_row: u32::MAX };
            let runner =
                StageRunner::start(self.stage.clone(), context, rejected_max, self.stop.clone())
                    .map_err(|error| {
                        anyhow!("plugin {:?} does not start: {error}", self.stage.plugin)
                    })?;
            self.runners.insert(shard.shard.clone(), runner);
        }
        self.runners.get_mut(&shard.shard).context("the shard's instance was started above")
    }
}
