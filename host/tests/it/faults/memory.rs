//! Memory and lag: memory in use is bounded, and waiting is visible.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::{PutRecordsRequestEntry, Shard};
use axum::http::{HeaderMap, StatusCode};

use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World, hashes};
use crate::support::{Process, free_port, http_get, output, plugin, shardmill, wait_for};

const MIB: u64 = 1 << 20;
/// Time limit for a thousand lanes to begin and to go on.
const BEGIN_MAX: Duration = Duration::from_secs(600);

/// Endpoint of an HTTP sink that refuses the rows of some shards.
struct Endpoint {
    port: u16,
    /// Ids that arrived, by shard.
    taken: Arc<Mutex<BTreeMap<String, HashSet<u64>>>>,
    blocks: Arc<AtomicBool>,
    _runtime: tokio::runtime::Runtime,
}

impl Endpoint {
    /// Blocks each shard whose number matches, until `blocks` is cleared.
    fn new(is_blocked: fn(u64) -> bool) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let taken: Arc<Mutex<BTreeMap<String, HashSet<u64>>>> = Arc::default();
        let blocks = Arc::new(AtomicBool::new(true));
        let (seen, on) = (taken.clone(), blocks.clone());
        let take = move |headers: HeaderMap, body: String| async move {
            let shard = headers["shardmill-shard"].to_str().expect("text").to_owned();
            if on.load(Ordering::Relaxed) && is_blocked(number_of(&shard)) {
                return StatusCode::SERVICE_UNAVAILABLE;
            }
            let ids = body.lines().map(|line| {
                let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
                row["id"].as_u64().expect("an id")
            });
            seen.lock().expect("a lock").entry(shard).or_default().extend(ids);
            StatusCode::OK
        };
        let routes = axum::Router::new().route("/", axum::routing::post(take));
        let routes = routes.layer(axum::extract::DefaultBodyLimit::disable());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { port, taken, blocks, _runtime: runtime }
    }

    /// Returns how many rows of a shard have arrived.
    fn rows_of(&self, shard: u64) -> usize {
        let taken = self.taken.lock().expect("a lock");
        taken.iter().filter(|(name, _)| number_of(name) == shard).map(|(_, ids)| ids.len()).sum()
    }

    /// Returns the lines of its sink.
    fn sink(&self) -> String {
        let port = self.port;
        format!(
            "[[sink]]\nname = \"hook\"\ntype = \"http\"\nurl = \"http://127.0.0.1:{port}/\"\n\
             private = true\nformat = \"ndjson\"\ncommit = {{ linger = \"20 ms\" }}"
        )
    }
}

/// Returns the number of a shard from `stream/shardId-000000000007`.
fn number_of(shard: &str) -> u64 {
    let digits = shard.rsplit('-').next().expect("a number");
    digits.parse().expect("a number")
}

/// Puts this many rows of this many bytes on a shard, with ids from 0 on.
fn fill(world: &World, shard: &Shard, rows: u64, bytes: usize) {
    let hash = hashes(shard).0.to_string();
    let filling = "x".repeat(bytes);
    let entry = |id: u64| {
        let row = format!("{{\"id\":{id},\"filling\":\"{filling}\"}}");
        let entry = PutRecordsRequestEntry::builder().data(Blob::new(row)).partition_key("key");
        entry.explicit_hash_key(&hash).build().expect("an entry")
    };
    let per_call = (4 * MIB / bytes as u64).clamp(1, 500);
    for from in (0..rows).step_by(per_call as usize) {
        let entries = (from..rows.min(from + per_call)).map(entry).collect();
        let put = world.client.put_records().stream_name(STREAM).set_records(Some(entries));
        let answer = world.block_on(put.send()).expect("put");
        assert_eq!(answer.failed_record_count(), Some(0));
    }
}

/// Writes a pipeline of the world's stream without a stage, with these sinks and short pauses; returns its path and
/// admin port.
fn pipeline(world: &World, lines: &str, timing: &str, sinks: &[String]) -> (String, u16) {
    let timing = format!("retry_pause = \"50 ms\"\nshard_sync = \"200 ms\"\n{timing}");
    paced_pipeline(world, lines, &timing, "", sinks)
}

/// Like `pipeline`, with these lines of `[timing]` and `[source]`.
fn paced_pipeline(
    world: &World,
    lines: &str,
    timing: &str,
    source: &str,
    sinks: &[String],
) -> (String, u16) {
    let port = free_port();
    let file = PipelineToml::new(world.folder.path(), "reading").pipeline(lines).timing(timing);
    let file = file.stream(STREAM, "embedded", &format!("format = \"application/json\"\n{source}"));
    let file = sinks.iter().fold(file, |file, sink| file.table(sink));
    let file = file.table(&crate::support::admin(port));
    (file.write(), port)
}

fn objects(folder: &Path, lines: &str) -> String {
    let folder = folder.display();
    format!(
        "[[sink]]\nname = \"logs\"\ntype = \"objects\"\nurl = \"{folder}\"\ncompression = \"none\"\n{lines}"
    )
}

/// Starts a pipeline; its standard output goes to a file.
fn start(world: &World, path: &str) -> Process {
    let log = std::fs::File::create(world.log()).expect("a log");
    let out = std::fs::File::create(world.folder.path().join("out")).expect("a file");
    let run = shardmill(&["run", path]).stdout(out).stderr(log).spawn();
    Process(run.expect("the binary starts"))
}

/// Returns the sum of a metric's series that have all these labels.
fn metric(port: u16, name: &str, labels: &[&str]) -> Option<f64> {
    let text = http_get(port, "/metrics");
    let lines = text.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    let values = lines.map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.reduce(|one, other| Some(one? + other?)).flatten()
}

/// Returns the peak of a process's resident memory so far, in bytes; `None` once it has ended.
fn peak_of(run: &Process) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", run.0.id())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// Returns the sizes of all data files below a folder whose path contains `part`.
fn data_below(folder: &Path, part: &str) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let found = paths.flat_map(|path: PathBuf| match path.is_dir() {
        true if path.ends_with("_shardmill") => Vec::new(),
        true => data_below(&path, part),
        false if path.to_string_lossy().contains(part) && path.extension().is_some() => {
            vec![path.metadata().map_or(0, |about| about.len())]
        }
        false => Vec::new(),
    });
    found.collect()
}

/// One of two shards is blocked and takes all the memory that it can get. The other goes on, and its objects are not
/// cut short.
#[test]
fn fault_02_a_blocked_shard_does_not_stop_another() {
    const ROWS: u64 = 20_000;
    let world = World::new(2);
    for shard in world.open_shards() {
        fill(&world, &shard, ROWS, 1_000);
    }
    let endpoint = Endpoint::new(|shard| shard == 0);
    let logs = world.folder.path().join("logs");
    let sinks = [objects(&logs, "commit = { linger = \"1 h\" }"), endpoint.sink()];
    let timing = "memory_blocked = \"200 ms\"\ngive_back = \"500 ms\"\n";
    let (path, port) = pipeline(&world, "buffer = \"8 MiB\"", timing, &sinks);
    let _run = start(&world, &path);

    wait_for("the rows of the other shard", || endpoint.rows_of(1) as u64 == ROWS);
    // The wait for memory is shown, together with who holds the memory.
    wait_for("the wait to be shown", || {
        let ready = http_get(port, "/health/ready");
        ready.contains("shardId-000000000000: memory: waits for")
            && ready.contains("by shardId-000000000000")
    });
    // The blocked lane gives back its read-ahead.
    wait_for("the read-ahead", || {
        metric(port, "shardmill_read_ahead_bytes", &[]).is_some_and(|bytes| bytes < 1_000.0)
    });
    let sizes = data_below(&logs, "shardId-000000000001");
    let mean = sizes.iter().sum::<u64>() / sizes.len().max(1) as u64;
    assert!(sizes.len() >= 5 && mean > MIB / 2, "{} objects of {mean} bytes", sizes.len());

    // The blocked shard goes on when it can, and no record that was given back is missing.
    endpoint.blocks.store(false, Ordering::Relaxed);
    wait_for("the rows of the blocked shard", || endpoint.rows_of(0) as u64 == ROWS);
    wait_for("nothing to be blocked", || http_get(port, "/health/ready").contains("ready"));
}

/// Regression: a shard that had ended stayed blocked after its last rows were committed, because no further batch
/// came.
#[test]
fn fault_35_a_shard_that_ended_is_not_blocked_any_more() {
    let world = World::new(1);
    let parent = &world.open_shards()[0];
    fill(&world, parent, 10, 100);
    let endpoint = Endpoint::new(|_| true);
    let (path, port) = pipeline(&world, "", "", &[endpoint.sink()]);
    let run = start(&world, &path);
    wait_for("the shard to be blocked", || {
        http_get(port, "/health/ready").contains("shardId-000000000000: ")
    });
    world.split(parent);
    // Meanwhile the lane reads the end of the parent, which nothing reports. Without this pause the test would show
    // less.
    std::thread::sleep(Duration::from_secs(2));
    endpoint.blocks.store(false, Ordering::Relaxed);
    wait_for("the rows", || endpoint.rows_of(0) == 10);
    wait_for("nothing to be blocked", || http_get(port, "/health/ready").contains("200 OK"));
    assert_eq!(run.terminate(), Some(0));
}

/// A thousand shards with a backlog, two hundred of them blocked.
#[test]
fn fault_02_of_a_thousand_lanes_two_hundred_are_blocked() {
    const SHARDS: u32 = 1_000;
    const ROWS: u64 = 20;
    let world = World::new(SHARDS);
    let is_blocked = |shard: u64| shard.is_multiple_of(5);
    for shard in world.open_shards() {
        // The blocked shards have more data than their share of the buffers.
        let blocked = is_blocked(number_of(shard.shard_id()));
        fill(&world, &shard, ROWS, if blocked { 20_000 } else { 1_000 });
    }
    let endpoint = Endpoint::new(is_blocked);
    // Long pauses: otherwise the repeated work of lanes (checkpoint writes, requests of blocked lanes, polls of lanes
    // that have read everything) would leave no time to begin the others.
    let timing = "checkpoint = \"10 s\"\nretry_pause = \"5 s\"\nshard_sync = \"5 s\"\n";
    let (buffer, polls) = ("buffer = \"8 MiB\"", "poll_interval = \"5 s\"");
    let (path, port) = paced_pipeline(&world, buffer, timing, polls, &[endpoint.sink()]);
    let run = start(&world, &path);

    let free: Vec<u64> = (0..u64::from(SHARDS)).filter(|shard| !is_blocked(*shard)).collect();
    let others = || {
        let taken = endpoint.taken.lock().expect("a lock");
        let rows: usize = taken.values().map(HashSet::len).sum();
        rows as u64 == free.len() as u64 * ROWS
    };
    // Most of the time goes into beginning a thousand lanes.
    let begun = Instant::now();
    while !others() {
        assert!(
            begun.elapsed() < BEGIN_MAX,
            "{} lanes go on",
            endpoint.taken.lock().expect("a lock").len()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(free.iter().all(|shard| endpoint.rows_of(*shard) as u64 == ROWS));
    assert!(metric(port, "shardmill_buffer_bytes", &[]).is_some_and(|bytes| bytes > 4e6));
    let printed = std::fs::read_to_string(world.folder.path().join("out")).expect("printed");
    let bound = printed.lines().find(|line| line.starts_with("memory: at most ")).expect("a bound");
    assert!(bound.contains("with 1000 lanes"), "{bound}");
    let mib: u64 = bound.split(' ').nth(3).and_then(|mib| mib.parse().ok()).expect("a number");
    let occupied = peak_of(&run).expect("it runs");
    assert!(occupied < mib * MIB, "{} MiB of {bound}", occupied / MIB);
}

/// The memory for the first answers of shards with a backlog is reserved before the answers arrive.
#[test]
fn fault_02_a_start_with_a_backlog_occupies_no_more_than_the_bound() {
    const SHARDS: u32 = 12;
    // The bound of `buffer`, plus one request for each lane.
    const BOUND: f64 = (16.0 + SHARDS as f64) * MIB as f64;
    let world = World::new(SHARDS);
    for shard in world.open_shards() {
        fill(&world, &shard, 12, 1_000_000);
    }
    // Every shard is blocked at its first row, so everything that was read stays in memory.
    let endpoint = Endpoint::new(|_| true);
    let timing = "memory_blocked = \"200 ms\"\nmemory_turn = \"500 ms\"\n";
    let (path, port) = pipeline(&world, "buffer = \"16 MiB\"", timing, &[endpoint.sink()]);
    let _run = start(&world, &path);
    let mut most: f64 = 0.0;
    wait_for("all to be blocked", || {
        let occupied = metric(port, "shardmill_read_ahead_bytes", &[]).unwrap_or_default();
        most = most.max(occupied);
        let ready = http_get(port, "/health/ready");
        let shards: HashSet<&str> = ready
            .lines()
            .filter(|line| line.starts_with("shardId-"))
            .filter_map(|line| line.split(": ").next())
            .collect();
        shards.len() == SHARDS as usize
    });
    assert!(most > 0.0 && most <= BOUND, "{most} bytes are read ahead of {BOUND}");
}

/// `check` prints the memory bound if it is larger than the available memory.
#[test]
fn fault_02_check_warns_of_a_bound_above_the_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let csv = folder.path().join("in");
    std::fs::write(&csv, "{}\n").expect("written");
    let check = |buffer: &str| {
        let lines = format!("buffer = \"{buffer}\"");
        let file = PipelineToml::new(folder.path(), "check").pipeline(&lines);
        let file = file.file(&csv, "format = \"application/json\"");
        let path = file.table("[[sink]]\nname = \"out\"\ntype = \"discard\"").write();
        crate::support::run_ok(&["check", &path])
    };
    let warned = check("64 GiB");
    assert!(warned.contains("warning: memory may grow to 65"), "{warned}");
    assert!(!check("64 MiB").contains("memory may grow"));
}

/// The age of records that wait for a blocked sink grows, and is known at once after a restart.
#[test]
fn fault_35_the_lag_is_the_age_of_what_is_not_committed() {
    const ROWS: u64 = 9_500;
    const LAG: &str = "shardmill_committed_lag_seconds";
    let world = World::new(1);
    let shard = world.open_shards().remove(0);
    let endpoint = Endpoint::new(|_| true);
    let logs = world.folder.path().join("logs");
    let quick = "commit = { linger = \"20 ms\" }";
    let sinks = [endpoint.sink(), objects(&logs, quick)];
    let (path, port) = pipeline(&world, "", "checkpoint = \"50 ms\"\n", &sinks);
    endpoint.blocks.store(false, Ordering::Relaxed);
    fill(&world, &shard, 10, 100);
    let run = start(&world, &path);
    let lag = |sink: &str| metric(port, LAG, &["shard=\"shardId-000000000000\"", sink]);
    let (hook, logs) = ("sink=\"hook\"", "sink=\"logs\"");
    wait_for("both to have caught up", || {
        endpoint.rows_of(0) == 10 && lag(hook) == Some(0.0) && lag(logs) == Some(0.0)
    });

    endpoint.blocks.store(true, Ordering::Relaxed);
    fill(&world, &shard, ROWS, 100);
    wait_for("the lag to grow", || lag(hook).is_some_and(|seconds| seconds > 1.0));
    let before = lag(hook).expect("a lag");
    wait_for("the clock", || lag(hook).is_some_and(|seconds| seconds > before + 1.0));
    let status = http_get(port, "/status");
    assert!(status.contains("\"committed_lag_seconds\":{\"hook\":"), "{status}");
    let before = lag(hook).expect("a lag");
    assert_eq!(run.terminate(), Some(0));

    // The stream is unreachable too, so nothing is read.
    let run = start(&world, &path);
    wait_for("the lag after a restart", || lag(hook).is_some());
    let first = lag(hook).expect("a lag");
    assert!(first >= before, "{first} after {before}");
    endpoint.blocks.store(false, Ordering::Relaxed);
    wait_for("both to have caught up again", || {
        endpoint.rows_of(0) as u64 == ROWS && lag(hook) == Some(0.0) && lag(logs) == Some(0.0)
    });
    assert_eq!(run.terminate(), Some(0));
}

/// The flights with default settings, from CSV lines into compressed JSON lines.
#[test]
fn fault_38_a_file_passes_without_being_gathered() {
    let folder = tempfile::tempdir().expect("a folder");
    let csv = crate::support::flights_csv();
    let example = crate::support::root().join("examples/flights/pipeline.toml");
    let example = std::fs::read_to_string(example).expect("the example");
    // The table of the file's first stage, up to the next table.
    let config = example.split("[stage.config]").nth(1).and_then(|rest| rest.split("[[").next());
    let config = config.expect("the decoder's configuration");
    let decode = format!("routes = {{ rows = [\"out\"] }}\n[stage.config]\n{config}");
    let out = folder.path().join("out");
    let sink = format!("[[sink]]\nname = \"out\"\ntype = \"objects\"\nurl = \"{}\"", out.display());
    let file = PipelineToml::new(folder.path(), "flights").file(&csv, "");
    let path = file.stage("decode", &plugin("csv-decode"), &decode).table(&sink).write();
    // `check` compiles the plugin in another process, which needs more memory.
    let checked = output(&mut shardmill(&["check", &path]));
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let peak = peak_mib(&["run", &path]);
    assert!(peak <= 96.0, "{peak} MiB at the peak");
}

/// Runs the binary, which must succeed; returns the peak of its resident memory, as sampled shortly before its end.
/// The figure that the system reports at the end also counts the memory of the parent process.
fn peak_mib(arguments: &[&str]) -> f64 {
    let child = shardmill(arguments).stdout(std::process::Stdio::null()).spawn();
    let mut run = Process(child.expect("the binary starts"));
    let mut peak = 0;
    loop {
        if let Some(status) = run.0.try_wait().expect("a state") {
            assert!(status.success(), "{status}");
            return peak as f64 / MIB as f64;
        }
        peak = peak.max(peak_of(&run).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(5));
    }
}
