//! Cost of idle lanes: a thousand shards, each polled once a second, against a bare loop of SDK calls per shard
//! that does the same. CPU is measured in the steady state, after all lanes have started. Memory per lane is
//! the difference between a thousand lanes and one lane.

mod child;
mod report;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aws_sdk_kinesis::types::ShardIteratorType;
use child::Running;
use report::Report;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::{client, stream};

const CPU: &str = "CPU seconds per minute, lower is better";
const MEMORY: &str = "KiB per lane, lower is better";
const SHARDS: u32 = 1_000;
/// Longest time for all lanes to start, and time to become stable before the measurement.
const BEGIN_MAX: Duration = Duration::from_secs(120);
const WARM_UP: Duration = Duration::from_secs(5);
const MEASURE: Duration = Duration::from_secs(30);

fn main() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    if let Some(arguments) = child::baseline_arguments() {
        let url = arguments.first().context("expected a URL")?.parse()?;
        return runtime.block_on(poll_all(&url));
    }
    let report = Report::start("lanes", CPU);
    let folder = tempfile::tempdir()?;
    let [many, one] = [SHARDS, 1].map(|shards| measure(&runtime, folder.path(), shards));
    let ([our_many, bare_many], [our_one, bare_one]) = (many?, one?);
    let per_minute = 60.0 / MEASURE.as_secs_f64();
    report.line("shards=1000,poll=1s", our_many.cpu_s * per_minute, bare_many.cpu_s * per_minute);
    let per_lane = |many: &Idle, one: &Idle| (many.kib - one.kib) / f64::from(SHARDS - 1);
    let (ours, bare) = (per_lane(&our_many, &our_one), per_lane(&bare_many, &bare_one));
    report.line_in("shards=1000,memory", ours, bare, MEMORY);
    Ok(())
}

/// Cost of an idle process.
struct Idle {
    cpu_s: f64,
    kib: f64,
}

/// Measures shardmill and the bare loops, one after the other on the same stream.
fn measure(runtime: &tokio::runtime::Runtime, folder: &Path, shards: u32) -> Result<[Idle; 2]> {
    let state = folder.join(format!("state-{shards}"));
    let (_served, url) = child::serve_stream(&state)?;
    runtime.block_on(async {
        let client = client::connect(&client::Server::at(&url)).await?;
        let test = StreamRef::parse("test")?;
        stream::create(&client, &test, shards).await?;
        stream::wait_active(&client, &test, Duration::from_secs(60), &mut |_, _| {}).await?;
        anyhow::Ok(())
    })?;
    let pipeline = folder.join("pipeline.toml");
    let text = format!(
        "[pipeline]\nname = \"lanes\"\nstate_dir = {state:?}\n[source]\ntype = \"kinesis\"\n\
         stream = \"test\"\nendpoint = \"embedded\"\npoll_interval = \"1 s\"\n\
         [[sink]]\nname = \"nowhere\"\ntype = \"discard\"\n"
    );
    std::fs::write(&pipeline, text)?;
    let mut ours = child::shardmill()?;
    let log = folder.join("log");
    let ours = idle(ours.arg("run").arg(&pipeline).arg("-v"), &log, shards)?;
    let bare = idle(&mut child::baseline(&[url.as_str()])?, &log, shards)?;
    Ok([ours, bare])
}

/// Waits until the process has logged for every shard that it reads it, then measures.
fn idle(command: &mut std::process::Command, log: &Path, shards: u32) -> Result<Idle> {
    let output = std::fs::File::create(log)?;
    let running = Running(command.stdout(std::process::Stdio::null()).stderr(output).spawn()?);
    let begun = Instant::now();
    loop {
        let said = std::fs::read_to_string(log)?;
        let reading = said.lines().filter(|line| line.contains("reading")).count();
        if reading == shards as usize {
            break;
        }
        ensure!(begun.elapsed() < BEGIN_MAX, "only {reading} of {shards} shards are being read");
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(WARM_UP);
    let before_s = running.cpu_s()?;
    std::thread::sleep(MEASURE);
    let idle = Idle { cpu_s: running.cpu_s()? - before_s, kib: running.resident_kib()? };
    ensure!(idle.cpu_s > 0.0, "the process does nothing");
    Ok(idle)
}

/// Baseline: polls every shard once a second until it is killed.
async fn poll_all(url: &url::Url) -> Result<()> {
    let client = client::connect(&client::Server::at(url)).await?;
    let mut loops = tokio::task::JoinSet::new();
    for shard in stream::shards(&client, &StreamRef::parse("test")?).await? {
        let client = client.clone();
        loops.spawn(async move {
            let iterator = client.get_shard_iterator().stream_name("test");
            let iterator = iterator.shard_id(shard.id.as_str());
            let iterator = iterator.shard_iterator_type(ShardIteratorType::TrimHorizon);
            let mut iterator = iterator.send().await?.shard_iterator;
            eprintln!("reading {}", shard.id);
            let mut ticks = tokio::time::interval(Duration::from_secs(1));
            while let Some(at) = iterator {
                ticks.tick().await;
                let answer = client.get_records().shard_iterator(at).limit(10_000).send().await?;
                iterator = answer.next_shard_iterator;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = loops.join_next().await {
        done??;
    }
    Ok(())
}
