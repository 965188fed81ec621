//! Calls that are never answered, and shards that cannot be started.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{admin, refuse_to_begin, wait_blocked, wait_ready};
use crate::support::pipeline::PipelineToml;
use crate::support::proxy::{Fault, Proxy};
use crate::support::world::{Pipeline, STREAM, World};
use crate::support::{self, wait_for};

/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3_600);
/// Deadlines that are short enough for a test.
const SHORT: &str = "kinesis_silence = \"1 s\"\ncall_blocked = \"300 ms\"";

/// The first `left` calls of an operation meet the fault.
fn first(
    operation: &'static str,
    left: &Arc<Mutex<u32>>,
    fault: Fault,
) -> impl FnMut(&str, &mut fastrand::Rng) -> Fault + Send + 'static {
    let left = left.clone();
    move |called, _| {
        let mut left = left.lock().expect("a lock");
        match called == operation && *left > 0 {
            true => {
                *left -= 1;
                fault.clone()
            }
            false => Fault::None,
        }
    }
}

/// A GetRecords, GetShardIterator or SubscribeToShard call without an answer, or with an answer that stops halfway,
/// is shown and retried.
#[test]
fn fault_03_a_call_that_is_never_answered_is_shown_and_retried() {
    for (operation, reader, fault) in [
        ("GetRecords", "polling", Fault::Slow(NEVER)),
        ("GetRecords", "polling", Fault::Silent(Duration::ZERO)),
        ("GetShardIterator", "polling", Fault::Slow(NEVER)),
        ("SubscribeToShard", "fan-out", Fault::Slow(NEVER)),
    ] {
        let world = World::new(1);
        world.put(0..100, 7);
        let left = Arc::new(Mutex::new(1_000));
        let proxy = Proxy::start(&world.address, 3, first(operation, &left, fault.clone()));
        let (port, admin) = admin();
        let pipeline = Pipeline {
            endpoint: proxy.url.clone(),
            source: format!("reader = \"{reader}\""),
            sink: admin,
            timing: SHORT.into(),
            ..Pipeline::default()
        };
        let run = world.start(&pipeline);
        wait_blocked(port, &["source", operation]);
        *left.lock().expect("a lock") = 0;
        world.wait_rows(100);
        wait_ready(port);
        assert_eq!(run.terminate(), Some(0), "{operation} {fault:?}");
        world.assert_each_once_in_order(100);
    }
}

/// Calls that list the shards have the same deadlines, and lanes go on meanwhile.
#[test]
fn fault_03_a_look_for_shards_that_is_never_answered_is_shown_and_stops_no_lane() {
    for operation in ["ListShards", "DescribeStreamSummary"] {
        let world = World::new(1);
        world.put(0..50, 7);
        let left = Arc::new(Mutex::new(0));
        let proxy = Proxy::start(&world.address, 3, first(operation, &left, Fault::Slow(NEVER)));
        let (port, admin) = admin();
        let pipeline = Pipeline {
            endpoint: proxy.url.clone(),
            sink: admin,
            timing: SHORT.into(),
            ..Pipeline::default()
        };
        let run = world.start(&pipeline);
        world.wait_rows(50);
        *left.lock().expect("a lock") = 1_000;
        wait_blocked(port, &["pipeline: shards", operation]);
        world.put(50..100, 7);
        world.wait_rows(100);
        world.split(&world.open_shards()[0]);
        world.put(100..200, 7);
        *left.lock().expect("a lock") = 0;
        world.wait_rows(200);
        wait_ready(port);
        assert_eq!(run.terminate(), Some(0), "{operation}");
        world.assert_each_once_in_order(200);
    }
}

/// A server that accepts connections and never answers: a start ends and says what is wrong, and SIGTERM ends a run.
#[test]
fn fault_03_a_server_that_says_nothing_ends_a_start_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", silent.local_addr().expect("an address"));
    let folder = tempfile::tempdir().expect("a folder");
    let file = PipelineToml::new(folder.path(), "silent")
        .timing("kinesis_silence = \"200 ms\"")
        .stream(STREAM, &url, "")
        .table("[[sink]]\nname = \"nothing\"\ntype = \"discard\"")
        .write();
    for command in [["run", &file].as_slice(), &["stream", "describe", "--pipeline", &file]] {
        let begun = Instant::now();
        let output = support::run(command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("DescribeStreamSummary") && said.contains("sent nothing"), "{said}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
}

/// A silent server for credentials ends a start in the same way.
#[test]
fn fault_03_a_silent_sts_ends_a_start_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let sts = format!("http://{}", silent.local_addr().expect("an address"));
    let world = World::new(1);
    let role =
        "assume_role = { arn = \"arn:aws:iam::123456789012:role/reader\" }\nregion = \"eu-west-1\"";
    let pipeline = Pipeline {
        endpoint: format!("http://{}", world.address),
        source: role.into(),
        timing: "kinesis_silence = \"200 ms\"".into(),
        ..Pipeline::default()
    };
    let path = world.pipeline(&pipeline);
    let begun = Instant::now();
    let mut command = support::shardmill(&["run", &path]);
    command
        .env("AWS_ENDPOINT_URL_STS", &sts)
        .env("AWS_ACCESS_KEY_ID", "AKIAOFTHECALLER00000")
        .env("AWS_SECRET_ACCESS_KEY", "secret");
    let output = support::output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("role/reader"), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

/// The same for PutRecords of the Kinesis sink.
#[test]
fn fault_03_a_put_that_is_never_answered_is_shown_and_put_again() {
    let world = World::new(1);
    let out = World::new(1);
    world.put(0..100, 7);
    let left = Arc::new(Mutex::new(1_000));
    let proxy = Proxy::start(&out.address, 3, first("PutRecords", &left, Fault::Slow(NEVER)));
    let (port, admin) = admin();
    let file = PipelineToml::new(world.folder.path(), "reading")
        .timing(&format!("checkpoint = \"50 ms\"\nretry_pause = \"50 ms\"\n{SHORT}"))
        .stream(STREAM, "embedded", "")
        .route_all_to(&["out"])
        .sink(
            "out",
            &format!("type = \"kinesis\"\nstream = \"{STREAM}\"\nendpoint = \"{}\"", proxy.url),
        )
        .table(&admin)
        .write();
    let mut command = support::shardmill(&["run", &file]);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let run = support::Process(command.spawn().expect("the binary starts"));
    wait_blocked(port, &["sink out", "PutRecords"]);
    *left.lock().expect("a lock") = 0;
    wait_ready(port);
    wait_for("a checkpoint", || {
        let sql = "SELECT count(*) FROM shard WHERE sequence IS NOT NULL";
        world.state().query_row(sql, (), |row| row.get::<_, u64>(0)).unwrap_or(0) == 1
    });
    assert_eq!(run.terminate(), Some(0));
}

/// The one write that starts a child shard fails: the error is shown, and the write is retried.
#[test]
fn fault_05_a_child_whose_begin_cannot_be_written_is_begun_later() {
    let world = World::new(1);
    world.put(0..100, 7);
    let (port, admin) = admin();
    let run = world.start(&Pipeline { sink: admin, ..Pipeline::default() });
    world.wait_rows(100);
    refuse_to_begin(&world, "'shardId-000000000001', 'shardId-000000000002'");
    world.split(&world.open_shards()[0]);
    world.put(100..200, 7);
    wait_blocked(port, &["pipeline: shards", "the disk is full"]);
    super::let_begin(&world);
    world.wait_rows(200);
    wait_ready(port);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(200);
}

/// The same while another process locks the state for longer than a write waits.
#[test]
fn fault_05_a_state_that_is_locked_during_a_reshard_delays_the_children_only() {
    let world = World::new(1);
    world.put(0..100, 7);
    let (port, admin) = admin();
    let run = world.start(&Pipeline { sink: admin, ..Pipeline::default() });
    world.wait_rows(100);
    wait_for("the parent's checkpoint", || {
        let sql = "SELECT count(*) FROM shard WHERE sequence IS NOT NULL";
        world.state().query_row(sql, (), |row| row.get::<_, u64>(0)).unwrap_or(0) == 1
    });
    let state = world.state();
    state.busy_timeout(Duration::from_secs(20)).expect("set");
    state.execute_batch("BEGIN IMMEDIATE").expect("locked");
    world.split(&world.open_shards()[0]);
    world.put(100..200, 7);
    // A write waits for 10 s.
    wait_blocked(port, &["database is locked"]);
    state.execute_batch("ROLLBACK").expect("unlocked");
    world.wait_rows(200);
    wait_ready(port);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(200);
}
