//! Two hundred thousand records while shards are split and merged at random, a producer writes, and the process is
//! killed: each record is there exactly once, and the records of each key are in order.
//!
//! The choices are drawn from `SHARDMILL_SEED` (printed), so a failure can be reproduced.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::world::{Pipeline, World, assert_once_in_order, hashes};

const KEYS: u64 = 1_000;
const KILLS: u32 = 5;

fn seed() -> u64 {
    let seed = std::env::var("SHARDMILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(3);
    println!("SHARDMILL_SEED={seed}");
    seed
}

/// Makes one random split or merge. Only neighbours can be merged, so shards are sorted by their hash ranges.
fn reshard(world: &World, random: &mut fastrand::Rng) -> &'static str {
    let mut shards = world.open_shards();
    shards.sort_by_key(hashes);
    if shards.len() > 2 && random.bool() {
        let first = random.usize(..shards.len() - 1);
        world.merge(&shards[first], &shards[first + 1]);
        "merge"
    } else {
        world.split(&shards[random.usize(..shards.len())]);
        "split"
    }
}

/// Makes a table in a schema of its own; its column `place` numbers the rows in the order in which they are written.
fn table(name: &str) -> String {
    let schema = format!("{name}_{}", std::process::id());
    crate::support::postgres(&format!(
        "CREATE SCHEMA {schema}; CREATE TABLE {schema}.rows
         (id bigint NOT NULL, key text NOT NULL, n bigint NOT NULL, place bigserial)"
    ));
    format!("{schema}.rows")
}

fn rows(table: &str) -> Vec<(u64, String, u64)> {
    let rows = crate::support::postgres(&format!(
        "SELECT id || ' ' || key || ' ' || n FROM {table} ORDER BY place"
    ));
    let row = |row: &String| {
        let [id, key, n] = row.split(' ').collect::<Vec<_>>()[..] else { panic!("{row}") };
        (id.parse().expect("an id"), key.to_owned(), n.parse().expect("a number"))
    };
    rows.iter().map(row).collect()
}

fn survives(name: &str, reader: &str, world: &World, records: u64, reshards: u32) {
    let mut random = fastrand::Rng::with_seed(seed());
    let table = table(name);
    let endpoint = format!("http://{}", world.address);
    let pipeline = Pipeline {
        endpoint,
        source: format!("reader = \"{reader}\""),
        postgres_table: Some(table.clone()),
        ..Pipeline::default()
    };
    let written = AtomicBool::new(false);
    let mut choices = random.fork();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            const CHUNK: u64 = 1_000;
            for from in (0..records).step_by(CHUNK as usize) {
                world.put(from..(from + CHUNK).min(records), KEYS);
                // The writing takes as long as the resharding.
                std::thread::sleep(Duration::from_millis(40));
            }
            written.store(true, Ordering::Relaxed);
        });
        scope.spawn(move || {
            for number in 0..reshards {
                let what = reshard(world, &mut choices);
                println!("{number}: {what}, {} open shards", world.open_shards().len());
                std::thread::sleep(Duration::from_millis(choices.u64(100..500)));
            }
        });
        for kill in 0..KILLS {
            let run = world.start(&pipeline);
            std::thread::sleep(Duration::from_millis(random.u64(300..2_000)));
            drop(run); // kill -9
            let count = crate::support::postgres(&format!("SELECT count(*) FROM {table}"));
            println!("kill {kill}: {} rows, written: {written:?}", count[0]);
        }
    });
    world.catch_up(&pipeline);
    assert_once_in_order(rows(&table), records);
    crate::support::postgres(&format!("DROP SCHEMA {} CASCADE", table.trim_end_matches(".rows")));
}

#[test]
fn resharding_under_load_by_polling() {
    survives("polling", "polling", &World::new(4), 200_000, 20);
}

#[test]
fn resharding_under_load_by_fan_out() {
    survives("fan_out", "fan-out", &World::new(4), 200_000, 20);
}

/// The same on another server, which reports child shards, applies shard filters and pages as AWS does.
#[test]
fn resharding_on_another_server() {
    for reader in ["polling", "fan-out"] {
        let (_alone, world) = World::on_other_server(2);
        survives("other", reader, &world, 10_000, 6);
        world.delete();
    }
}
