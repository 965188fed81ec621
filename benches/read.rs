//! Rate of reading a stream: a bare loop of SDK calls that only counts, which is the upper limit, against
//! shardmill's reader, lanes and checkpoints with no stage, until the last record is given to a sink that
//! discards it. Both use the same stream in the same run, in turn. The stream is served by a separate process.

mod child;
mod report;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::types::ShardIteratorType;
use bytes::Bytes;
use report::Report;
use shardmill_config::SinkTypes;
use shardmill_core::record::{SinkName, StreamRef};
use shardmill_core::sink::Sink;
use shardmill_engine::supervisor::{RunOptions, Supervisor};
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;
use shardmill_kinesis::source::KinesisSource;
use shardmill_kinesis::{client, stream};
use shardmill_plugin::{Backends, CompileCache, PluginEngine, PluginHost};
use shardmill_sinks_common::discard::DiscardSink;
use tokio_util::sync::CancellationToken;

const UNIT: &str = "records/s, higher is better";
const SHARDS: u32 = 4;
const RECORDS: u64 = 500_000;
const PAYLOAD_BYTES: usize = 100;
const ROUNDS: usize = 9;

fn main() -> Result<()> {
    let report = Report::start("read", UNIT);
    let folder = tempfile::tempdir()?;
    let (_served, url) = child::serve_stream(&folder.path().join("served"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let client = client::connect(&client::Server::at(&url)).await?;
        fill(&client).await?;
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            bare.push(RECORDS as f64 / count(&client).await?.as_secs_f64());
            let state = folder.path().join(format!("state-{round}"));
            ours.push(RECORDS as f64 / run(&client, &state).await?.as_secs_f64());
        }
        let (ours, bare) = report::median_round(&ours, &bare);
        report.line(&format!("payload={PAYLOAD_BYTES},shards={SHARDS}"), ours, bare);
        Ok(())
    })
}

async fn fill(client: &Client) -> Result<()> {
    let test = StreamRef::parse("test")?;
    stream::create(client, &test, SHARDS).await?;
    stream::wait_active(client, &test, Duration::from_secs(20), &mut |_, _| {}).await?;
    let mut producer = Producer::new(client.clone(), test);
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    for number in 0..RECORDS {
        let partition_key = number.to_string();
        producer.put(NewRecord { partition_key, payload: payload.clone() }).await?;
    }
    Ok(producer.flush().await?)
}

/// Counts the records with one loop per shard.
async fn count(client: &Client) -> Result<Duration> {
    let shards = client.list_shards().stream_name("test").send().await?;
    let begun = Instant::now();
    let mut loops = tokio::task::JoinSet::new();
    for shard in shards.shards() {
        let (client, shard) = (client.clone(), shard.shard_id().to_owned());
        loops.spawn(async move {
            let iterator = client.get_shard_iterator().stream_name("test").shard_id(shard);
            let iterator = iterator.shard_iterator_type(ShardIteratorType::TrimHorizon);
            let mut iterator = iterator.send().await?.shard_iterator;
            let mut records = 0;
            while let Some(at) = iterator {
                let answer = client.get_records().shard_iterator(at).limit(10_000).send().await?;
                if answer.records.is_empty() {
                    break;
                }
                records += answer.records.len() as u64;
                iterator = answer.next_shard_iterator;
            }
            anyhow::Ok(records)
        });
    }
    let mut records = 0;
    while let Some(done) = loops.join_next().await {
        records += done??;
    }
    ensure!(records == RECORDS, "{records} records counted, {RECORDS} were put");
    Ok(begun.elapsed())
}

/// Runs a pipeline from its start until every record has been given to the sink.
async fn run(client: &Client, state: &std::path::Path) -> Result<Duration> {
    let text = format!(
        "[pipeline]\nname = \"read\"\nstate_dir = {state:?}\n[source]\ntype = \"kinesis\"\n\
         stream = \"test\"\nendpoint = \"embedded\"\n[[sink]]\nname = \"nowhere\"\ntype = \"discard\"\n"
    );
    let types = SinkTypes::new(&[shardmill_sinks_common::discard::TYPE]);
    let config = shardmill_config::parse("pipeline.toml", text, &types, &|_| None)?;
    let kinesis = config.source.kinesis().context("expected a stream")?;
    let (batch, buffer) = (config.source.batch, config.buffer_bytes_max);
    let source = KinesisSource::new(client.clone(), kinesis, batch, buffer);
    let sink: Arc<dyn Sink> = Arc::new(DiscardSink::new(SinkName::from("nowhere")));
    let options = RunOptions::new(false);
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    let host = PluginHost { engine, cache: CompileCache::none(), backends: Backends::default() };
    let supervisor =
        Supervisor::prepare(config, host, Arc::new(source), vec![sink], options).await?;
    let (statuses, stop) = (supervisor.statuses(), CancellationToken::new());
    let begun = Instant::now();
    let running = tokio::spawn(supervisor.run(stop.clone()));
    loop {
        let read: u64 = statuses.snapshot().values().map(|status| status.records_read).sum();
        if read >= RECORDS {
            ensure!(read == RECORDS, "{read} records read, {RECORDS} were put");
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(120), "only {read} records were read");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let took = begun.elapsed();
    stop.cancel();
    running.await??;
    Ok(took)
}
