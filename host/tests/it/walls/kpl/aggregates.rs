//! The cost of an aggregate depends on its bytes, whatever it contains.

use std::time::{Duration, Instant};

use super::{get, metric, one_key, put_on, start};
use crate::support::aggregate::aggregate;
use crate::support::pipeline::PipelineToml;
use crate::support::proxy::{Fault, Proxy};
use crate::support::world::{Pipeline, STREAM, World, row};
use crate::support::{admin, free_port, wait_for};

/// Time limit for an answer of the admin port, on a busy machine. Before the fault was fixed, an answer took minutes.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const ALL_MAX: Duration = Duration::from_secs(60);

/// On each of four shards, a record of 1 MB has one key of 500 kB that 83,000 user records refer to.
#[test]
fn wall_01_a_key_that_all_records_of_an_aggregate_name_is_hashed_once() {
    let world = World::new(4);
    let shards = world.open_shards();
    for shard in &shards {
        let large = one_key(&"k".repeat(500_000), std::iter::repeat_n(Vec::new(), 83_000));
        // The longest allowed key, so this is a valid aggregate, of as many records.
        let allowed = one_key(&"k".repeat(256), std::iter::repeat_n(Vec::new(), 83_000));
        put_on(&world, shard, [large, allowed, b"{}".to_vec()].into_iter());
    }
    let port = free_port();
    let file = PipelineToml::new(world.folder.path(), "reading").stream(
        STREAM,
        "embedded",
        "format = \"application/octet-stream\"",
    );
    let file = file.table("[[sink]]\nname = \"out\"\ntype = \"discard\"");
    let path = file.table(&admin(port)).write();
    let _run = start(&world, &path);
    wait_for("the admin port", || get(port, "/health/live", ANSWER_MAX).is_some());
    let begun = Instant::now();
    // The key of the allowed aggregates belongs to one shard's range. The other shards leave these records out after
    // they were validated.
    let expected = 83_000 + shards.len() * 2;
    loop {
        let answer = get(port, "/health/live", ANSWER_MAX);
        assert!(answer.is_some(), "no answer within {ANSWER_MAX:?}");
        let read = metric(port, "shardmill_source_records_total");
        if read as usize == expected {
            break;
        }
        assert!(begun.elapsed() < ALL_MAX, "{read} of {expected} records in {ALL_MAX:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// 10 MiB of small events are allowed, and arrive complete and in order.
#[test]
fn wall_01_ten_mebibytes_of_small_events_are_not_cut_by_a_count() {
    let mut events = 0;
    let mut bytes = 0;
    let rows = std::iter::from_fn(|| {
        let row = row(events, 7);
        bytes += row.len() + 10;
        (bytes < 10 << 20).then(|| {
            events += 1;
            row
        })
    });
    let large = one_key("key", rows);
    assert!((9 << 20..10 << 20).contains(&large.len()), "{} bytes", large.len());
    let world = World::new(1);
    world.put(0..1, 1);
    // No server of the tests accepts more than 1 MiB, so the proxy enlarges the answer.
    let proxy = Proxy::start(&world.address, 1, move |operation, _| match operation {
        "GetRecords" => Fault::Swell(large.clone().into()),
        _ => Fault::None,
    });
    world.catch_up(&Pipeline { endpoint: proxy.url.clone(), ..Pipeline::default() });
    assert!(events > 100_000, "{events}");
    world.assert_each_once_in_order(events);
}

/// A position within an aggregate means the same, whatever the settings of batches are.
#[test]
fn wall_01_sub_sequences_do_not_depend_on_settings() {
    const EVENTS: u64 = 6_000;
    let world = World::new(1);
    let events = |ids: std::ops::Range<u64>| -> Vec<(String, Vec<u8>)> {
        ids.map(|id| (format!("key-{}", id % 7), row(id, 7))).collect()
    };
    world.put_raw(
        [0..EVENTS - 10, EVENTS - 10..EVENTS]
            .map(events)
            .iter()
            .map(|events| ("any".to_owned(), aggregate(events))),
    );
    for records in [3, 1_000, 7] {
        let source = format!("batch = {{ records = {records} }}");
        // The process is killed in the middle of the aggregate.
        let before = world.rows();
        let run = world.start(&Pipeline { source, ..Pipeline::default() });
        wait_for("rows", || world.rows() > before || world.rows() == EVENTS);
        drop(run);
    }
    world.catch_up(&Pipeline { source: "batch = { records = 64 }".into(), ..Pipeline::default() });
    world.assert_each_once_in_order(EVENTS);
    let sql = "SELECT count(*) FROM dead_letter";
    let dead_letters: u64 = world.state().query_row(sql, (), |row| row.get(0)).expect("a count");
    assert_eq!(dead_letters, 0);
}
