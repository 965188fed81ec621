//! Cost of a swap for the lanes: 200 swaps in a row under load, between two versions that stamp their name into
//! each row; against a restart of the same pipeline, which is the usual way to change a plugin.
//!
//! The stream has eight shards with more records than the pipeline can read during the bench. Each version
//! processes records in every lane before the next swap. The rows go to PostgreSQL with the shard and sequence
//! number of their records. At the end, every record must be there once, processed by the version that the
//! ledger names; otherwise the bench fails without a figure.

mod child;
mod report;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use child::Running;
use report::Report;
use serde_json::Value;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;
use shardmill_kinesis::{client, stream};
use shardmill_serve::admin::control::ControlAddress;
use tokio_postgres::{Client, NoTls};

const UNIT: &str = "ms, lower is better";
const STREAM: &str = "swap";
const SHARDS: u32 = 8;
const SWAPS: usize = 200;
/// Memory is compared as the mean over the second fifth of the swaps and over the last fifth. It varies with
/// what the readers and sinks hold, and by the second fifth everything has been used once.
const FIFTH: usize = SWAPS / 5;
/// Minimum rate; below it the bench fails.
const RATE_MIN: f64 = 50_000.0;
/// Records on the stream.
const RECORDS: u64 = 4_000_000;
/// Beginning of a stamp's mark, and its length in bytes.
const MARK: &[u8] = b"shardmill-stamp|";
const MARK_BYTES: usize = 80;

#[tokio::main]
async fn main() -> Result<()> {
    let report = Report::start("swap", UNIT);
    let url = std::env::var("SHARDMILL_TEST_POSTGRES")
        .context("missing SHARDMILL_TEST_POSTGRES: run `cargo xtask bench swap`")?;
    let (sql, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    sql.batch_execute("DROP TABLE IF EXISTS bench_swap, shardmill_position").await?;
    let folder = tempfile::tempdir()?;
    let state = folder.path().join("state");
    let (_served, server) = child::serve_stream(&state)?;
    let versions = [stamp("v1 none")?, stamp("v2 none")?];
    std::fs::write(folder.path().join("stamp.wasm"), &versions[0])?;
    let pipeline = pipeline(folder.path(), &url)?;
    let kinesis = client::connect(&client::Server::at(&server)).await?;
    let name = StreamRef::parse(STREAM)?;
    stream::create(&kinesis, &name, SHARDS).await?;
    stream::wait_active(&kinesis, &name, Duration::from_secs(20), &mut |_, _| {}).await?;

    put(&kinesis, &name).await?;

    let run = start(&pipeline)?;
    let control = Control::find(&state.join("swap")).await?;
    while control.records().await? == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut pauses_ms = Vec::new();
    let mut resident_kib = Vec::new();
    let (begun, read_before) = (Instant::now(), control.records().await?);
    for swap in 0..SWAPS {
        pauses_ms.extend(control.swap(&versions[(swap + 1) % 2]).await?);
        resident_kib.push(run.resident_kib()?);
        control.every_lane_reads_on().await?;
    }
    let read = control.records().await?;
    let rate = (read - read_before) as f64 / begun.elapsed().as_secs_f64();
    ensure!(read < RECORDS, "all {RECORDS} records were read before the last swap");
    ensure!(rate >= RATE_MIN, "only {rate:.0} records/s under {SWAPS} swaps: the load is too low");
    ensure!(pauses_ms.len() == SWAPS * SHARDS as usize, "{} lanes have changed", pauses_ms.len());

    // The alternative: drain, start again, and wait until it reads.
    let restarted = Instant::now();
    terminate(&run).await?;
    drop(run);
    let run = start(&pipeline)?;
    let control = Control::find(&state.join("swap")).await?;
    while control.records().await? == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let restart_ms = restarted.elapsed().as_secs_f64() * 1e3;
    check(&sql, &versions, &state.join("swap/state.db")).await?;
    terminate(&run).await?;

    pauses_ms.sort_by(f64::total_cmp);
    let at = |share: f64| pauses_ms[((pauses_ms.len() - 1) as f64 * share).round() as usize];
    report.line("p50", at(0.50), restart_ms);
    report.line("p99", at(0.99), restart_ms);
    report.line("max", at(1.0), restart_ms);
    report.line_in("load", rate, RATE_MIN, "records/s against the expected load, higher is better");
    let mean = |kib: &[f64]| kib.iter().sum::<f64>() / kib.len() as f64;
    let (early, late) = (&resident_kib[FIFTH..2 * FIFTH], &resident_kib[SWAPS - FIFTH..]);
    let unit = "KiB at swaps 161 to 200 and 41 to 80, lower is better";
    report.line_in("memory", mean(late), mean(early), unit);
    Ok(())
}

/// Returns the component with this text in place of its mark.
fn stamp(mark: &str) -> Result<Bytes> {
    let prebuilt = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/prebuilt/stamp.wasm");
    let mut bytes = std::fs::read(prebuilt)?;
    let at = bytes.windows(MARK.len()).position(|window| window == MARK).context("no mark")?;
    let text = format!("{mark:<0$}", MARK_BYTES - MARK.len());
    bytes[at + MARK.len()..at + MARK_BYTES].copy_from_slice(text.as_bytes());
    Ok(bytes.into())
}

fn pipeline(folder: &Path, url: &str) -> Result<std::path::PathBuf> {
    let text = format!(
        r#"
[pipeline]
name = "swap"
state_dir = "state"
[source]
type = "kinesis"
stream = "{STREAM}"
endpoint = "embedded"
format = "application/json"
records_per_call = 1000
[[stage]]
name = "stamp"
plugin = "stamp.wasm"
routes = {{ all = ["mart"] }}
[[sink]]
name = "mart"
type = "postgres"
url = "{url}"
table = "bench_swap"
create = true
lineage = true
[sink.commit]
linger = "200 ms"
[reload.trial]
batches = 4
"#
    );
    let path = folder.join("pipeline.toml");
    std::fs::write(&path, text)?;
    Ok(path)
}

fn start(pipeline: &Path) -> Result<Running> {
    let mut command = child::shardmill()?;
    let started = command.arg("run").arg(pipeline).stdout(std::process::Stdio::null()).spawn();
    Ok(Running(started.context("failed to start the pipeline")?))
}

/// Sends SIGTERM and waits until the process has drained.
async fn terminate(run: &Running) -> Result<()> {
    let pid = libc::pid_t::try_from(run.0.id())?;
    // SAFETY: sends a signal to a child process that has not been waited for yet.
    ensure!(unsafe { libc::kill(pid, libc::SIGTERM) } == 0, "no signal");
    let status = format!("/proc/{pid}/status");
    let is_gone = || match std::fs::read_to_string(&status) {
        Ok(status) => status.lines().any(|line| line.starts_with("State:") && line.contains('Z')),
        Err(_) => true,
    };
    while !is_gone() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Puts the records.
async fn put(kinesis: &aws_sdk_kinesis::Client, name: &StreamRef) -> Result<()> {
    let mut producer = Producer::new(kinesis.clone(), name.clone());
    for id in 0..RECORDS {
        let partition_key = format!("key-{}", id % 10_000);
        let payload =
            format!("{{\"id\":{id},\"key\":\"{partition_key}\",\"n\":{}}}", id * 7 % 1_000);
        producer.put(NewRecord { partition_key, payload: payload.into() }).await?;
    }
    producer.flush().await?;
    Ok(())
}

/// Client of the running pipeline's control port.
struct Control {
    address: std::net::SocketAddr,
    token: String,
}

impl Control {
    async fn find(folder: &Path) -> Result<Self> {
        let begun = Instant::now();
        loop {
            if let Some(ControlAddress { address, token }) = ControlAddress::find(folder)? {
                let found = Self { address, token };
                if found.ask("GET", "/status", &[]).await.is_ok() {
                    return Ok(found);
                }
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "the pipeline is not running");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Returns the number of records given to the sinks since the process started.
    async fn records(&self) -> Result<u64> {
        Ok(self.records_per_shard().await?.into_values().sum())
    }

    async fn records_per_shard(&self) -> Result<BTreeMap<String, u64>> {
        let status = self.ask("GET", "/status", &[]).await?;
        let shards = status.as_object().context("no shards")?.iter();
        let read = |shard: &Value| shard["records_read"].as_u64().unwrap_or_default();
        Ok(shards.map(|(name, shard)| (name.clone(), read(shard))).collect())
    }

    /// Waits until each lane has processed another batch.
    async fn every_lane_reads_on(&self) -> Result<()> {
        let (before, begun) = (self.records_per_shard().await?, Instant::now());
        while self.records_per_shard().await?.iter().any(|(shard, read)| before[shard] >= *read) {
            ensure!(begun.elapsed() < Duration::from_secs(10), "a lane does not read on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Swaps, and returns the swap pause of each lane in milliseconds.
    async fn swap(&self, component: &[u8]) -> Result<Vec<f64>> {
        let report = self.ask("POST", "/stages/stamp/swap", component).await?;
        let waiting = report["waiting"].as_array().map_or(0, Vec::len);
        ensure!(report["number"].is_i64() && waiting == 0, "not swapped: {report}");
        let lanes = report["lanes"].as_array().context("no lanes")?;
        let pause = |lane: &Value| Some(lane["pause_us"].as_u64()? as f64 / 1e3);
        lanes.iter().map(|lane| pause(lane).context("no pause")).collect()
    }

    async fn ask(&self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut connection = tokio::net::TcpStream::connect(self.address).await?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\
             Content-Length: {}\r\n\r\n",
            self.token,
            body.len()
        );
        connection.write_all(head.as_bytes()).await?;
        connection.write_all(body).await?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).await?;
        let answer = String::from_utf8(answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        if !head.starts_with("HTTP/1.1 200") {
            bail!("{path}: {body}");
        }
        Ok(serde_json::from_str(body)?)
    }
}

/// Checks that every record is there once, processed by the version that the ledger names.
async fn check(sql: &Client, versions: &[Bytes; 2], state: &Path) -> Result<()> {
    let begun = Instant::now();
    let count = "SELECT count(*)::bigint, count(DISTINCT id)::bigint FROM bench_swap";
    loop {
        let found = sql.query_one(count, &[]).await?;
        let found: (i64, i64) = (found.get(0), found.get(1));
        ensure!(found.0 == found.1, "of {} rows, only {} have distinct ids", found.0, found.1);
        if found.0 == RECORDS as i64 {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(120), "{found:?} rows of {RECORDS}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let ledger = ledger(state, versions)?;
    let query = "SELECT shardmill_shard, shardmill_sequence::text, version FROM bench_swap";
    for row in sql.query(query, &[]).await? {
        let (shard, sequence, version): (String, String, String) =
            (row.get(0), row.get(1), row.get(2));
        let padded = format!("{sequence:0>129}");
        let segments = ledger.get(&shard).context("a shard without a ledger")?;
        let at = segments.partition_point(|(from, _)| *from < padded);
        let expected = at.checked_sub(1).map(|at| segments[at].1.as_str());
        ensure!(
            expected == Some(version.as_str()),
            "{shard}:{sequence}: expected {expected:?}, found {version}"
        );
    }
    Ok(())
}

/// Returns, per shard, the versions and the sequence number after which each of them ran.
fn ledger(state: &Path, versions: &[Bytes; 2]) -> Result<BTreeMap<String, Vec<(String, String)>>> {
    let digests =
        versions.each_ref().map(|bytes| shardmill_core::record::Digest::of(bytes).to_string());
    let state = rusqlite::Connection::open(state)?;
    let mut query = state.prepare(
        "SELECT l.shard, l.sequence, g.spec FROM ledger l JOIN generation g ON g.id = l.generation
         ORDER BY l.shard, l.sequence",
    )?;
    let rows = query.query_map((), |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?))
    })?;
    let mut ledger: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for row in rows {
        let (shard, sequence, spec) = row?;
        let at = digests.iter().position(|digest| spec.contains(digest.as_str()));
        let version = format!("v{}", at.context("an unknown version")? + 1);
        ledger.entry(shard).or_default().push((sequence, version));
    }
    Ok(ledger)
}
