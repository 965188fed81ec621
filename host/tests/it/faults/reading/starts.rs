//! Start positions: by the server's clock, and resolved once for all shards.

use std::time::Duration;

use super::run;
use crate::support::proxy::{Fault, Proxy};
use crate::support::world::{Pipeline, World};
use crate::support::{self};

const LATEST: &str = "start = \"latest\"";

/// The host's clock is ahead of the server's: records put after the start are read.
#[test]
fn fault_15_latest_is_by_the_clock_of_the_server() {
    for (reader, ahead) in [("polling", 5), ("fan-out", 5), ("polling", 3_600)] {
        let world = World::new(2);
        // Events of a subscription pass through the proxy with their times unchanged.
        if reader == "polling" {
            world.put(1_000..1_010, 7);
            // The embedded stream stores arrival times in whole seconds.
            std::thread::sleep(Duration::from_millis(2_100));
        }
        let proxy = Proxy::start(&world.address, 15, move |_, _| {
            Fault::SlowClock(Duration::from_secs(ahead))
        });
        let source = format!("{LATEST}\nreader = \"{reader}\"");
        let endpoint = proxy.url.clone();
        let process = world.start(&Pipeline { source, endpoint, ..Pipeline::default() });
        world.put(0..400, 97);
        world.wait_rows(400);
        assert_eq!(process.terminate(), Some(0));
        world.assert_each_once_in_order(400);
    }
}

/// LATEST is resolved in one step for all shards. A crash between two steps would lose the records that arrive
/// meanwhile in some of them.
#[test]
fn fault_15_latest_is_resolved_for_all_shards_in_one_step() {
    let world = World::new(4);
    let pipeline = Pipeline { source: LATEST.into(), ..Pipeline::default() };
    let folder = world.folder.path().join("state/reading");
    drop(shardmill_state::StateStore::open(&folder).expect("a state"));
    super::refuse_to_begin(&world, "'shardId-000000000002'");
    let (code, said) = run(&world, &pipeline);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the disk is full"), "{said}");
    let starts = || {
        let state = world.state();
        let mut query = state.prepare("SELECT start_at_ms FROM shard").expect("sql");
        let starts = query.query_map((), |row| row.get::<_, Option<i64>>(0)).expect("rows");
        starts.map(|start| start.expect("a row")).collect::<Vec<_>>()
    };
    assert_eq!(starts(), []);
    super::let_begin(&world);
    world.catch_up(&pipeline);
    let starts = starts();
    assert_eq!(starts.len(), 4);
    assert!(starts[0].is_some_and(|start_ms| start_ms % 1_000 == 0), "{starts:?}");
    assert!(starts.iter().all(|start| *start == starts[0]), "{starts:?}");
}

/// If a server does not send its time, the host's clock is not used instead.
#[test]
fn fault_15_latest_needs_a_server_that_says_what_time_it_is() {
    let world = World::new(1);
    world.put(0..10, 7);
    let proxy = Proxy::start(&world.address, 15, |_, _| Fault::NoDate);
    let endpoint = proxy.url.clone();
    let latest = Pipeline { source: LATEST.into(), endpoint, ..Pipeline::default() };
    let (code, said) = run(&world, &latest);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("`Date`") && said.contains("at-timestamp"), "{said}");
    // Starts at other positions work without the server's time.
    world.catch_up(&Pipeline { source: String::new(), ..latest });
    world.assert_each_once_in_order(10);
}

/// `stream tail --from latest` uses the server's clock too.
#[test]
fn fault_15_tail_from_latest_is_by_the_clock_of_the_server() {
    let world = World::new(1);
    world.put(0..10, 7);
    let proxy =
        Proxy::start(&world.address, 15, |_, _| Fault::SlowClock(Duration::from_secs(3_600)));
    let mut command = support::shardmill(&[
        "stream",
        "tail",
        "--stream",
        "test",
        "--endpoint",
        &proxy.url,
        "--from",
        "latest",
        "--limit",
        "400",
        "--json",
    ]);
    command.env("AWS_REGION", "us-east-1");
    let child = command.stdout(std::process::Stdio::piped()).spawn().expect("the binary starts");
    support::wait_for("the tail to read", || proxy.count("GetRecords", |_| true) > 0);
    world.put(10..420, 7);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 400);
}

/// The time at which a shard was last read is compared with the retention by the server's clock: a host whose clock
/// is three days ahead has lost nothing.
#[test]
fn fault_15_what_is_lost_is_by_the_clock_of_the_server() {
    let world = World::new(1);
    world.put(0..100, 7);
    let slow = Duration::from_secs(3 * 86_400);
    let proxy = Proxy::start(&world.address, 15, move |_, _| Fault::SlowClock(slow));
    let pipeline = Pipeline { endpoint: proxy.url.clone(), ..Pipeline::default() };
    world.catch_up(&pipeline);
    let sql = "SELECT caught_up_ms FROM shard";
    let noted: i64 = world.state().query_row(sql, (), |row| row.get(0)).expect("noted");
    let by_server = chrono::Utc::now() - slow;
    assert!(noted <= by_server.timestamp_millis(), "{noted}");
    assert!(noted > by_server.timestamp_millis() - 60_000, "{noted}");
}

/// A shard that a start position names must be listed.
#[test]
fn fault_16_a_start_at_a_shard_that_is_not_listed_is_refused() {
    let world = World::new(1);
    world.put(0..10, 7);
    let source = "start = \"at-sequence:shardId-000000000042:1\"".into();
    let (code, said) = run(&world, &Pipeline { source, ..Pipeline::default() });
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("shardId-000000000042") && said.contains("does not list"), "{said}");
    assert_eq!(world.rows(), 0);
}
