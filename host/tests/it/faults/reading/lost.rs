//! Shards that expired, in whole or in part, before they were read.

use super::{FIRST, let_begin, refuse_to_begin, run};
use crate::support::proxy::{Fault, Proxy};
use crate::support::wait_for;
use crate::support::world::{Pipeline, World};

const CONTINUE: &str = "on_lost_records = \"continue\"";
const GONE: &str = "shardId-000000000042";
const TWO_DAYS_MS: i64 = 2 * 86_400_000;

fn with_source(source: &str) -> Pipeline {
    Pipeline { source: source.into(), ..Pipeline::default() }
}

/// Adds a row to the state, copied from the first shard's, for a shard that the stream does not list.
fn begin_gone(world: &World) {
    let sql = "INSERT INTO shard (stream, shard, ended, caught_up_ms)
               SELECT stream, ?2, 0, caught_up_ms - ?3 FROM shard WHERE shard = ?1";
    assert_eq!(world.state().execute(sql, (FIRST, GONE, TWO_DAYS_MS)).expect("inserted"), 1);
}

/// Returns the shards that have a recorded gap of lost records.
fn holes(world: &World) -> Vec<String> {
    let state = world.state();
    let mut query = state.prepare("SELECT shard FROM hole WHERE sink = ''").expect("sql");
    let holes = query.query_map((), |row| row.get(0)).expect("rows");
    holes.map(|hole| hole.expect("a row")).collect()
}

#[test]
fn fault_16_a_begun_shard_that_is_not_listed_any_more_is_lost() {
    for reader in ["reader = \"polling\"", "reader = \"fan-out\""] {
        let world = World::new(1);
        world.put(0..100, 7);
        world.catch_up(&with_source(reader));
        begin_gone(&world);
        world.put(100..200, 7);
        let (code, said) = run(&world, &with_source(reader));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(GONE) && said.contains("are lost"), "{said}");
        assert!(said.contains("no longer listed") && said.contains("on_lost_records"), "{said}");
        let (code, said) = run(&world, &with_source(&format!("{reader}\n{CONTINUE}")));
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(GONE) && said.contains("going on, as configured"), "{said}");
        assert_eq!(holes(&world), [GONE]);
        world.assert_each_once_in_order(200);
        // The loss is reported once.
        let (code, said) = run(&world, &with_source(reader));
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains(GONE), "{said}");
    }
}

/// A shard may expire once all its records were read.
#[test]
fn fault_16_a_begun_shard_that_was_caught_up_within_the_retention_has_lost_nothing() {
    let world = World::new(1);
    world.put(0..100, 7);
    world.catch_up(&Pipeline::default());
    begin_gone(&world);
    let sql = "UPDATE shard SET caught_up_ms = caught_up_ms + ?1 WHERE shard = ?2";
    world.state().execute(sql, (TWO_DAYS_MS, GONE)).expect("updated");
    let (code, said) = run(&world, &Pipeline::default());
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("are lost"), "{said}");
}

#[test]
fn fault_16_a_shard_that_was_seen_and_never_begun_is_lost() {
    let world = World::new(1);
    world.put(0..100, 7);
    world.catch_up(&Pipeline::default());
    let sql = "INSERT INTO seen_shard SELECT stream, ?1 FROM shard";
    world.state().execute(sql, [GONE]).expect("inserted");
    let (code, said) = run(&world, &Pipeline::default());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(GONE) && said.contains("never begun"), "{said}");
    let (code, said) = run(&world, &with_source(CONTINUE));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(GONE), "{said}");
    assert_eq!(holes(&world), [GONE]);
    let (code, said) = run(&world, &Pipeline::default());
    assert_eq!(code, Some(0), "{said}");
}

/// A child shard whose parent was read long ago: the child's oldest records have expired meanwhile.
#[test]
fn fault_16_a_child_that_lost_its_beginning_to_retention_is_noticed() {
    let world = World::new(1);
    world.put(0..100, 7);
    let process = world.start(&Pipeline::default());
    world.wait_rows(100);
    refuse_to_begin(&world, "'shardId-000000000001', 'shardId-000000000002'");
    world.split(&world.open_shards()[0]);
    world.put(100..300, 97);
    wait_for("the parent's end", || {
        let sql = "SELECT count(*) FROM shard WHERE ended = 1";
        world.state().query_row(sql, (), |row| row.get::<_, u64>(0)).unwrap_or(0) == 1
    });
    assert_eq!(process.terminate(), Some(0));
    let_begin(&world);
    let sql = "UPDATE shard SET caught_up_ms = caught_up_ms - ?1 WHERE caught_up_ms > 0";
    assert_eq!(world.state().execute(sql, [TWO_DAYS_MS]).expect("updated"), 1);
    let (code, said) = run(&world, &Pipeline::default());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("are lost") && said.contains("the shard's beginning"), "{said}");
    let (code, said) = run(&world, &with_source(CONTINUE));
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(holes(&world).len(), 2, "both children");
    world.assert_each_once_in_order(300);
}

/// A parent shard of which only the end is left: no later record reveals the gap.
#[test]
fn fault_16_a_shard_of_which_nothing_is_left_but_its_end_is_noticed() {
    let world = World::new(1);
    world.put(0..100, 7);
    world.catch_up(&Pipeline::default());
    world.put(100..200, 7);
    world.split(&world.open_shards()[0]);
    let proxy = Proxy::start(&world.address, 16, |operation, _| match operation {
        "GetRecords" => Fault::Trim("9".repeat(60)),
        _ => Fault::None,
    });
    let sql = "UPDATE shard SET caught_up_ms = caught_up_ms - ?1";
    world.state().execute(sql, [TWO_DAYS_MS]).expect("updated");
    let pipeline = Pipeline { endpoint: proxy.url.clone(), ..Pipeline::default() };
    let (code, said) = run(&world, &pipeline);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("are lost") && said.contains("no record is left"), "{said}");
    let (code, said) = run(&world, &Pipeline { source: CONTINUE.into(), ..pipeline });
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(holes(&world)[0], FIRST);
}
