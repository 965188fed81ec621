//! Cases in which other readers lost records, each through the real binary against a real server: resharding, expiry,
//! throttling, a replaced stream, records dropped by the stream, aggregates.

use std::time::Duration;

use crate::assets;
use crate::support::aggregate::aggregate;
use crate::support::proxy::{Fault, Proxy};
use crate::support::wait_for;
use crate::support::world::{Pipeline, World};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ferrokinesis::store::StoreOptions;
use md5::{Digest as _, Md5};
use shardmill_core::record::HashRange;
use shardmill_embedded::EmbeddedStream;
use shardmill_kinesis::aggregate::{Opened, deaggregate, open};

fn fan_out() -> Pipeline {
    Pipeline { source: "reader = \"fan-out\"".into(), ..Pipeline::default() }
}

fn small_calls() -> Pipeline {
    Pipeline {
        source: "records_per_call = 50\nbatch = { records = 20 }".into(),
        ..Pipeline::default()
    }
}

/// Case 1: a split while the reader is in the middle of a batch.
#[test]
fn case_01_a_split_in_the_middle_of_a_batch() {
    for pipeline in [small_calls(), fan_out()] {
        let world = World::new(1);
        world.put(0..3_000, 97);
        let run = world.start(&pipeline);
        world.split(&world.open_shards()[0]);
        world.put(3_000..6_000, 97);
        world.wait_rows(6_000);
        assert_eq!(run.terminate(), Some(0));
        world.assert_each_once_in_order(6_000);
    }
}

/// Case 2: a merge of two parents, one of which is slow.
#[test]
fn case_02_a_merge_with_one_slow_parent() {
    let world = World::new(2);
    let shards = world.open_shards();
    // Each of the two keys belongs to another parent.
    let two_keys = |id: u64| {
        let key = format!("key-{}", id % 2);
        let row = format!(r#"{{"id":{id},"key":"{key}","n":{id}}}"#);
        (key, row.into_bytes())
    };
    world.put_raw((0..4_000).map(two_keys));
    // Every answer to one shard's reader is late, so the other parent ends long before.
    let mut calls = 0;
    let proxy = Proxy::start(&world.address, 1, move |operation, _| {
        calls += u32::from(operation == "GetRecords");
        match operation {
            "GetRecords" if calls % 2 == 0 => Fault::Slow(Duration::from_millis(300)),
            _ => Fault::None,
        }
    });
    let pipeline = Pipeline {
        endpoint: proxy.url.clone(),
        source: "records_per_call = 400".into(),
        ..Pipeline::default()
    };
    let run = world.start(&pipeline);
    world.merge(&shards[0], &shards[1]);
    world.put_raw((4_000..5_000).map(two_keys));
    world.wait_rows(5_000);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(5_000);
}

/// Case 3: a start at LATEST, then a reshard before the reader has seen a record.
#[test]
fn case_03_a_reshard_after_a_start_at_latest() {
    for reader in ["polling", "fan-out"] {
        let world = World::new(1);
        world.put(0..10, 7);
        // The embedded stream stores arrival times in whole seconds.
        std::thread::sleep(Duration::from_millis(2_100));
        let source = format!("start = \"latest\"\nreader = \"{reader}\"");
        let run = world.start(&Pipeline { source, ..Pipeline::default() });
        world.split(&world.open_shards()[0]);
        for shard in world.open_shards() {
            world.split(&shard);
        }
        world.put(10..1_010, 97);
        world.wait_rows(1_000);
        assert_eq!(run.terminate(), Some(0));
        let oldest = world.mart().query_row("SELECT min(id), count(*) FROM rows", (), |row| {
            Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?))
        });
        assert_eq!(oldest.expect("rows"), (10, 1_000), "{reader}");
    }
}

/// A start at a time: no older records come, neither from the second of the start nor from the children of shards
/// that had ended before.
#[test]
fn a_start_at_a_time_applies_across_a_split() {
    for reader in ["polling", "fan-out"] {
        let world = World::new(1);
        world.put(0..100, 7);
        world.split(&world.open_shards()[0]);
        world.put(100..200, 7);
        // The embedded stream stores arrival times in whole seconds.
        std::thread::sleep(Duration::from_millis(2_100));
        let at = chrono::Utc::now().to_rfc3339();
        world.put(200..300, 7);
        let source = format!("start = \"at-timestamp:{at}\"\nreader = \"{reader}\"");
        world.catch_up(&Pipeline { source, ..Pipeline::default() });
        let oldest = world.mart().query_row("SELECT min(id), count(*) FROM rows", (), |row| {
            Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?))
        });
        assert_eq!(oldest.expect("rows"), (200, 100), "{reader}");
    }
}

/// A start at a record of a shard: that record is the first; other shards are read from their beginning.
#[test]
fn a_start_at_a_sequence_number_is_inclusive() {
    let world = World::new(1);
    world.put(0..100, 7);
    let at = sequences(&world)[40].clone();
    let source = format!("start = \"at-sequence:shardId-000000000000:{at}\"");
    world.catch_up(&Pipeline { source, ..Pipeline::default() });
    let oldest = world.mart().query_row("SELECT min(id), count(*) FROM rows", (), |row| {
        Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?))
    });
    assert_eq!(oldest.expect("rows"), (40, 60));
}

/// Case 5: restarts just after a parent's end was reached, with fan-out.
#[test]
fn case_05_a_restart_at_the_end_of_a_shard_under_fan_out() {
    let world = World::new(1);
    world.put(0..1_000, 97);
    world.split(&world.open_shards()[0]);
    let run = world.start(&fan_out());
    let ended = || {
        let sql = "SELECT count(*) FROM shard WHERE ended = 1";
        world.state().query_row(sql, (), |row| row.get::<_, u64>(0)).unwrap_or(0)
    };
    wait_for("the parent's end", || ended() == 1);
    drop(run); // kill -9
    world.put(1_000..2_000, 97);
    let log = world.catch_up(&fan_out());
    assert!(!log.contains("shard=shardId-000000000000"), "an ended shard is not read again: {log}");
    world.assert_each_once_in_order(2_000);
}

/// Case 12: a subscription goes silent, and the next attempt follows within five seconds.
#[test]
fn case_12_fan_out_goes_silent_and_the_stream_is_in_use() {
    let world = World::new(1);
    world.put(0..100, 7);
    let mut subscriptions = 0;
    let proxy = Proxy::start(&world.address, 12, move |operation, _| {
        subscriptions += u32::from(operation == "SubscribeToShard");
        match (operation, subscriptions) {
            ("SubscribeToShard", 1) => Fault::Silent(Duration::from_millis(1_500)),
            ("SubscribeToShard", 2) => Fault::InUse,
            _ => Fault::None,
        }
    });
    let run = world.start(&Pipeline { endpoint: proxy.url.clone(), ..fan_out() });
    world.wait_rows(100);
    std::thread::sleep(Duration::from_secs(2));
    // Records put during the silence arrive with the third subscription: the second attempt was refused.
    world.put(100..200, 7);
    world.wait_rows(200);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(200);
    assert_eq!(proxy.count("SubscribeToShard", |_| true), 3);
    assert_eq!(proxy.count("SubscribeToShard", |fault| matches!(fault, Fault::InUse)), 1);
    assert_eq!(proxy.count("GetRecords", |_| true), 0);
}

/// Starts a stream whose iterators expire after a second, and makes a pipeline that reads it in small steps.
fn short_lived_iterators(runtime: &tokio::runtime::Runtime) -> (EmbeddedStream, World, Pipeline) {
    let options = StoreOptions {
        iterator_ttl_seconds: 1,
        create_stream_ms: 1,
        update_stream_ms: 1,
        ..StoreOptions::default()
    };
    let served = runtime.block_on(EmbeddedStream::start_with(0, options)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let world = World::at(folder, served.url().as_str(), None, 1);
    let pipeline = Pipeline {
        endpoint: served.url().to_string(),
        source: "records_per_call = 100".into(),
        sink: "rows = 100".into(),
        ..Pipeline::default()
    };
    (served, world, pipeline)
}

/// Case 13: a plugin stalls until the iterator has expired.
#[test]
fn case_13_a_plugin_stalls_past_the_iterators_life() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_served, world, pipeline) = short_lived_iterators(&runtime);
    // The plugin asks for five retries: together 3 s, because the pauses double from 100 ms.
    let stage = format!(
        r#"plugin = "{}"
config = {{ retry_on = "\"id\":1000,", retry_calls = 5, routes = ["all"], format = "application/json" }}
limits = {{ retry = "1 min" }}"#,
        crate::support::plugin("hostile")
    );
    let run = world.start(&Pipeline { stage: Some(stage), ..pipeline });
    let begun = std::time::Instant::now();
    world.put(0..2_000, 97);
    world.wait_rows(2_000);
    assert!(begun.elapsed() > Duration::from_secs(2), "it did not stall");
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(2_000);
}

/// Case 13 with a sink that stalls; then with an idle shard.
#[test]
fn case_13_a_sink_stalls_past_the_iterators_life() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_served, world, pipeline) = short_lived_iterators(&runtime);
    let run = world.start(&pipeline);
    let locking = world.mart();
    locking.execute_batch("BEGIN EXCLUSIVE").unwrap();
    world.put(0..2_000, 97);
    std::thread::sleep(Duration::from_secs(4));
    locking.execute_batch("COMMIT").unwrap();
    world.wait_rows(2_000);
    std::thread::sleep(Duration::from_millis(2_500));
    world.put(2_000..3_000, 97);
    world.wait_rows(3_000);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(3_000);
}

/// Case 14: many throttles, errors and broken connections.
#[test]
fn case_14_a_storm_of_throttles() {
    for (reader, seed) in [("polling", 14), ("fan-out", 15)] {
        let world = World::new(2);
        world.put(0..3_000, 97);
        let proxy = Proxy::start(&world.address, seed, |operation, random| match operation {
            "GetRecords" | "GetShardIterator" | "SubscribeToShard" => match random.u32(..10) {
                0..4 => Fault::Throttled,
                4 => Fault::ServerError,
                5 => Fault::Reset,
                6 => Fault::ResetAfter,
                _ => Fault::None,
            },
            _ => Fault::None,
        });
        let source = format!("records_per_call = 500\nreader = \"{reader}\"");
        let pipeline = Pipeline { endpoint: proxy.url.clone(), source, ..Pipeline::default() };
        let run = world.start(&pipeline);
        world.wait_rows(3_000);
        assert_eq!(run.terminate(), Some(0));
        world.assert_each_once_in_order(3_000);
        assert!(proxy.seen.lock().unwrap().iter().any(|(_, it)| matches!(it, Fault::Throttled)));
    }
}

/// Case 16: the stream is deleted and created again while it is read.
#[test]
fn case_16_a_stream_deleted_and_created_again() {
    for pipeline in [Pipeline::default(), fan_out()] {
        let world = World::new(1);
        world.put(0..500, 97);
        let mut run = world.start(&pipeline);
        world.wait_rows(500);
        // The embedded stream stores creation times in whole seconds.
        std::thread::sleep(Duration::from_millis(1_100));
        world.delete();
        world.create(1);
        world.put(500..1_000, 97);
        let mut ended = None;
        wait_for("the run to end", || {
            ended = run.0.try_wait().expect("a state");
            ended.is_some()
        });
        assert_eq!(ended.and_then(|status| status.code()), Some(1));
        assert!(world.logged("was deleted and created again"), "{:?}", world.log());
        assert_eq!(world.rows(), 500, "nothing of the new stream was read by the old positions");
        world.catch_up(&pipeline);
        world.assert_each_once_in_order(1_000);
    }
}

/// Case 17: the stream has dropped records that were not read yet.
#[test]
fn case_17_a_checkpoint_older_than_the_retention() {
    let world = World::new(1);
    world.put(0..100, 7);
    world.catch_up(&Pipeline::default());
    world.put(100..300, 7);
    // Drops the records before the 200th.
    let sequences = sequences(&world);
    let first = sequences[200].clone();
    let proxy = Proxy::start(&world.address, 17, move |operation, _| match operation {
        "GetRecords" => Fault::Trim(first.clone()),
        _ => Fault::None,
    });
    let pipeline = Pipeline { endpoint: proxy.url.clone(), ..Pipeline::default() };
    // Makes the state older: a shard that was caught up a moment ago cannot have lost anything, because later records
    // are still there.
    let caught_up_ms = "SELECT caught_up_ms FROM shard";
    let noted: i64 = world.state().query_row(caught_up_ms, (), |row| row.get(0)).unwrap();
    let two_days_ms = 2 * 86_400_000;
    let sql = "UPDATE shard SET caught_up_ms = ?1";
    world.state().execute(sql, [noted - two_days_ms]).unwrap();

    let path = world.pipeline(&pipeline);
    let output = crate::support::run(&["run", &path, "--until-caught-up"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("are lost: the lane's position is"), "{error}");
    assert!(error.contains("1day") && error.contains("on_lost_records"), "{error}");
    assert_eq!(world.rows(), 100);

    let source = "on_lost_records = \"continue\"".into();
    let log = world.catch_up(&Pipeline { source, ..pipeline });
    assert!(log.contains("going on, as configured"), "{log}");
    assert_eq!(world.rows(), 200, "the first hundred and what was left");
}

/// Records that were all read may expire: a lane that was idle for longer than the retention has lost nothing.
#[test]
fn an_idle_shard_older_than_the_retention_lost_nothing() {
    idle_for_longer_than_the_retention("linger = \"50 ms\"");
}

/// The same with a sink that commits at the end of the run, after the last empty answer.
#[test]
fn an_idle_shard_whose_sink_commits_late_lost_nothing() {
    idle_for_longer_than_the_retention("linger = \"1 h\"");
}

/// Runs the case; the first run has these lines in `[sink.commit]`.
fn idle_for_longer_than_the_retention(commit: &str) {
    let world = World::new(1);
    world.put(0..100, 7);
    let path = world.pipeline(&Pipeline::default());
    let text = std::fs::read_to_string(&path).expect("a pipeline");
    assert!(text.contains("linger = \"50 ms\""), "{text}");
    std::fs::write(&path, text.replace("linger = \"50 ms\"", commit)).expect("written");
    crate::support::run_ok(&["run", &path, "--until-caught-up"]);
    world.put(100..200, 7);
    let first = sequences(&world)[100].clone();
    let proxy = Proxy::start(&world.address, 17, move |operation, _| match operation {
        "GetRecords" => Fault::Trim(first.clone()),
        _ => Fault::None,
    });
    world.catch_up(&Pipeline { endpoint: proxy.url.clone(), ..Pipeline::default() });
    world.assert_each_once_in_order(200);
}

/// Returns the sequence numbers of all records, in the order of their shard.
fn sequences(world: &World) -> Vec<String> {
    let path = world.pipeline(&Pipeline::default());
    let printed =
        crate::support::run_ok(&["stream", "tail", "--pipeline", &path, "--no-follow", "--json"]);
    let line = |line: &str| -> String {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        line["sequence"].as_str().expect("a number").to_owned()
    };
    printed.lines().map(line).collect()
}

/// Case 18, first part: a kill in the middle of an aggregate; its other records are read, and none is written twice.
#[test]
fn case_18_a_kill_inside_an_aggregate() {
    for reader in ["polling", "fan-out"] {
        let world = World::new(1);
        let aggregates = (0..5).map(|index| {
            let rows = (index * 2_000..(index + 1) * 2_000)
                .map(|id| (format!("key-{}", id % 97), crate::support::world::row(id, 97)));
            ("any".to_owned(), aggregate(&rows.collect::<Vec<_>>()))
        });
        world.put_raw(aggregates);
        let source = format!("batch = {{ records = 50 }}\nreader = \"{reader}\"");
        let pipeline = Pipeline { source, sink: "rows = 50".into(), ..Pipeline::default() };
        let run = world.start(&pipeline);
        world.wait_rows(2_300);
        drop(run); // kill -9
        let before = world.rows();
        assert!(before < 10_000, "the kill came too late to show anything");
        world.catch_up(&pipeline);
        world.assert_each_once_in_order(10_000);
    }
}

/// Case 18, second part: a reshard splits the key range of an aggregate. Its producer learns from the answer that the
/// aggregate went to the wrong shard, and sends its records again.
#[test]
fn case_18_an_aggregate_cut_by_a_reshard() {
    let world = World::new(1);
    world.split(&world.open_shards()[0]);
    let rows: Vec<_> =
        (0..100).map(|id| (format!("key-{}", id % 7), crate::support::world::row(id, 7))).collect();
    world.put_raw(std::iter::once(("any".to_owned(), aggregate(&rows))));
    world.put_raw(rows.into_iter());
    world.catch_up(&Pipeline::default());
    world.assert_each_once_in_order(100);
}

/// Case 18, third part: a record that only looks like an aggregate is an ordinary record.
#[test]
fn case_18_an_aggregate_with_a_wrong_digest() {
    let world = World::new(1);
    let rows: Vec<_> =
        (0..10).map(|id| ("key".to_owned(), crate::support::world::row(id, 1))).collect();
    let mut wrong = aggregate(&rows);
    *wrong.last_mut().expect("a digest") ^= 1;
    world.put_raw([("key".to_owned(), wrong.clone())].into_iter().chain(rows));
    world.catch_up(&Pipeline::default());
    let rows: u64 = world.rows();
    assert_eq!(rows, 10);
    let sql = "SELECT original FROM dead_letter WHERE held = 0";
    let original: Vec<u8> = world.state().query_row(sql, (), |row| row.get(0)).expect("one");
    assert_eq!(original, wrong, "the record as it was put");
}

/// Aggregates made by aws-kinesis-agg of PyPI (`aggregates/make.py`) contain the records that it was given.
#[test]
fn aggregates_of_another_implementation_come_apart_identically() {
    #[derive(serde::Deserialize)]
    struct Case {
        aggregate: String,
        records: Vec<ExpectedRecord>,
    }
    #[derive(serde::Deserialize)]
    struct ExpectedRecord {
        key: String,
        hash_key: Option<String>,
        data: String,
    }
    let decode = |text: &str| BASE64_STANDARD.decode(text).expect("base64");
    let cases: Vec<Case> = serde_json::from_str(assets::AGGREGATES).expect("cases");
    assert_eq!(cases.len(), 5);
    for case in cases {
        let records = deaggregate(&decode(&case.aggregate).into()).expect("an aggregate");
        assert_eq!(records.len(), case.records.len());
        for (record, expected) in records.iter().zip(&case.records) {
            assert_eq!(record.partition_key, expected.key.as_bytes());
            assert_eq!(record.payload, decode(&expected.data));
        }
        // The whole aggregate belongs into the key range from its smallest to its largest hash, and into no smaller
        // range.
        let hashes = case.records.iter().map(|expected| match &expected.hash_key {
            Some(decimal) => decimal.parse().expect("a hash"),
            None => u128::from_be_bytes(Md5::digest(&expected.key).into()),
        });
        let hashes: Vec<u128> = hashes.collect();
        let (least, most) = (hashes.iter().min().expect("one"), hashes.iter().max().expect("one"));
        let opened = |from: u128, to: u128| {
            let range = HashRange::parse(&from.to_string(), &to.to_string()).expect("a range");
            open(&decode(&case.aggregate).into(), Some(&range))
        };
        assert!(matches!(opened(*least, *most), Opened::Aggregate(_)));
        if least < most {
            assert!(matches!(opened(least + 1, *most), Opened::Astray));
            assert!(matches!(opened(*least, most - 1), Opened::Astray));
        }
    }
}

/// Case 20: the largest records that Kinesis accepts. No server of the tests accepts more than 1 MiB, so the proxy
/// enlarges the answers.
#[test]
fn case_20_records_of_ten_mebibytes() {
    let world = World::new(1);
    world.put(0..6, 1);
    let filler = "x".repeat((10 << 20) - 40);
    let large = format!(r#"{{"id":7,"key":"{filler}","n":7}}"#);
    assert!(large.len() <= 10 << 20 && large.len() > (10 << 20) - 40);
    let mut calls = 0;
    let proxy = Proxy::start(&world.address, 20, move |operation, _| {
        calls += u32::from(operation == "GetRecords");
        match operation {
            "GetRecords" if calls % 2 == 0 => Fault::Swell(large.clone().into()),
            _ => Fault::None,
        }
    });
    world.catch_up(&Pipeline {
        endpoint: proxy.url.clone(),
        source: "records_per_call = 1".into(),
        ..Pipeline::default()
    });
    let sql = "SELECT count(*), sum(length(key) = ?1) FROM rows";
    let found = world.mart().query_row(sql, [filler.len()], |row| Ok((row.get(0)?, row.get(1)?)));
    assert_eq!(found.expect("rows"), (6u64, 3u64));
}
