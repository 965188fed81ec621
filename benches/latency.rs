//! Time from the arrival of a record until its row is visible in PostgreSQL, at 1,000 records per second: the
//! whole pipeline, against a bare loop of SDK calls that INSERTs the records of each call.
//!
//! Both read one stream that a third process serves, and poll it equally often. A row contains the time at
//! which its record was put. The time at which it became visible is the server's `clock_timestamp()`, checked
//! every millisecond.

mod child;
mod report;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use aws_sdk_kinesis::Client as Kinesis;
use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::{PutRecordsRequestEntry, ShardIteratorType};
use child::Running;
use report::Report;
use shardmill_kinesis::client;
use tokio_postgres::NoTls;

const UNIT: &str = "ms, lower is better";
/// Seconds for which each side gets records.
const SECONDS: u64 = 20;
/// Records of one PutRecords call; one call every 10 ms.
const RECORDS_PER_CALL: u64 = 10;
const CALL_EVERY: Duration = Duration::from_millis(10);
/// AWS allows five reads per second and shard.
const POLL_EVERY: Duration = Duration::from_millis(200);

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("SHARDMILL_TEST_POSTGRES")
        .context("missing SHARDMILL_TEST_POSTGRES: run `cargo xtask bench latency`")?;
    if let Some(arguments) = child::baseline_arguments() {
        return bare_loop(&arguments[0], &url).await;
    }
    let report = Report::start("latency", UNIT);
    let folder = tempfile::tempdir()?;
    let state = folder.path().join("state");
    let (_served, stream) = child::serve_stream(&state)?;
    let mut ours = measure("ours", &stream, &url, || pipeline(folder.path(), &url)).await?;
    let mut bare = measure("bare", &stream, &url, || {
        let mut command = child::baseline(&[stream.as_str()])?;
        Ok(Running(command.spawn()?))
    })
    .await?;
    for (case, percentile) in [("p50", 50), ("p99", 99)] {
        report.line(case, at(&mut ours, percentile), at(&mut bare, percentile));
    }
    Ok(())
}

/// Measures the latencies of a reader, in milliseconds.
async fn measure(
    stream_name: &str,
    stream: &url::Url,
    postgres: &str,
    start: impl FnOnce() -> Result<Running>,
) -> Result<Vec<f64>> {
    let kinesis = client::connect(&client::Server::at(stream)).await?;
    kinesis.create_stream().stream_name(stream_name).shard_count(1).send().await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (sql, connection) = tokio_postgres::connect(postgres, NoTls).await?;
    tokio::spawn(connection);
    sql.batch_execute(
        "DROP TABLE IF EXISTS bench_latency, shardmill_position; \
         CREATE TABLE bench_latency (id bigint PRIMARY KEY, put_us bigint NOT NULL)",
    )
    .await?;
    let reader = start()?;
    let (expected, mut latencies) = (SECONDS * 1_000, Vec::new());
    let putting = tokio::spawn(put(kinesis, stream_name.to_owned(), expected));
    let begun = tokio::time::Instant::now();
    let mut seen = 0;
    while latencies.len() < expected as usize {
        ensure!(begun.elapsed() < Duration::from_secs(SECONDS + 60), "rows are missing");
        let query = "SELECT id, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - put_us \
                     FROM bench_latency WHERE id >= $1 ORDER BY id";
        for row in sql.query(query, &[&seen]).await? {
            let (id, micros): (i64, i64) = (row.get(0), row.get(1));
            // One shard, in order: rows up to here were not visible before.
            ensure!(id == seen, "row {id} is visible before row {seen}");
            latencies.push(micros as f64 / 1_000.0);
            seen = id + 1;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    putting.await??;
    drop(reader);
    Ok(latencies)
}

/// Puts records at an even rate, after the reader has had time to start.
async fn put(kinesis: Kinesis, stream: String, records: u64) -> Result<()> {
    // The reader starts during this pause.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut ticks = tokio::time::interval(CALL_EVERY);
    for first in (0..records).step_by(RECORDS_PER_CALL as usize) {
        ticks.tick().await;
        let mut call = kinesis.put_records().stream_name(&stream);
        for id in first..first + RECORDS_PER_CALL {
            let put_us = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
            let data = format!("{{\"id\":{id},\"put_us\":{put_us}}}");
            let entry = PutRecordsRequestEntry::builder().partition_key("one");
            call = call.records(entry.data(Blob::new(data)).build()?);
        }
        let answer = call.send().await?;
        ensure!(answer.failed_record_count().unwrap_or(0) == 0, "records were refused");
    }
    Ok(())
}

fn pipeline(folder: &Path, url: &str) -> Result<Running> {
    let plugin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/prebuilt/route-json.wasm");
    let plugin = plugin.canonicalize()?;
    let poll_ms = POLL_EVERY.as_millis();
    let text = format!(
        r#"
[pipeline]
name = "latency"
state_dir = "state"
[source]
type = "kinesis"
stream = "ours"
endpoint = "embedded"
format = "application/json"
poll_interval = "{poll_ms} ms"
[[stage]]
name = "route"
plugin = {plugin:?}
config = {{ default = "rows", rules = [] }}
routes = {{ rows = ["mart"] }}
[[sink]]
name = "mart"
type = "postgres"
url = "{url}"
table = "bench_latency"
[sink.commit]
linger = "1 ms"
"#
    );
    let path = folder.join("latency.toml");
    fs::write(&path, text)?;
    let mut command = child::shardmill()?;
    let run = command.arg("run").arg(path).stdout(std::process::Stdio::null());
    Ok(Running(run.spawn().context("failed to start a process")?))
}

/// Baseline, in a separate process: GetRecords, INSERT, repeat.
async fn bare_loop(stream: &str, postgres: &str) -> Result<()> {
    let url: url::Url = stream.parse()?;
    let kinesis = client::connect(&client::Server::at(&url)).await?;
    let (sql, connection) = tokio_postgres::connect(postgres, NoTls).await?;
    tokio::spawn(connection);
    let shards = kinesis.list_shards().stream_name("bare").send().await?;
    let shard = shards.shards().first().context("no shard")?.shard_id().to_owned();
    let iterator = kinesis.get_shard_iterator().stream_name("bare").shard_id(shard);
    let iterator = iterator.shard_iterator_type(ShardIteratorType::TrimHorizon).send().await?;
    let mut next = iterator.shard_iterator;
    let insert = "INSERT INTO bench_latency SELECT * FROM unnest($1::bigint[], $2::bigint[])";
    let insert = sql.prepare(insert).await?;
    while let Some(at) = next {
        let page = kinesis.get_records().shard_iterator(at).send().await?;
        let (mut ids, mut puts) = (Vec::new(), Vec::new());
        for record in page.records() {
            let row: serde_json::Value = serde_json::from_slice(record.data().as_ref())?;
            ids.push(row["id"].as_i64().context("no id")?);
            puts.push(row["put_us"].as_i64().context("no time")?);
        }
        match ids.is_empty() {
            true => tokio::time::sleep(POLL_EVERY).await,
            false => drop(sql.execute(&insert, &[&ids, &puts]).await?),
        }
        next = page.next_shard_iterator;
    }
    Ok(())
}

/// Returns a percentile.
fn at(latencies: &mut [f64], percentile: usize) -> f64 {
    latencies.sort_by(f64::total_cmp);
    latencies[(latencies.len() * percentile / 100).min(latencies.len() - 1)]
}
