//! Fan-out after a restart.

use std::time::{Duration, Instant};

use super::start;
use crate::support::proxy::{Fault, Proxy};
use crate::support::wait_for;
use crate::support::world::{Pipeline, World};

/// While the subscription of an earlier process is too young to be replaced, the reader polls.
#[test]
fn fault_46_a_process_whose_subscription_is_kept_out_reads_meanwhile() {
    let world = World::new(1);
    world.put(0..100, 7);
    let proxy = Proxy::start(&world.address, 46, |operation, _| match operation {
        "SubscribeToShard" => Fault::InUse,
        _ => Fault::None,
    });
    let source = "reader = \"fan-out\"".into();
    let endpoint = proxy.url.clone();
    let run = start(&world, &Pipeline { source, endpoint, ..Pipeline::default() });
    // Every subscription is refused, so these records were polled.
    world.wait_rows(100);
    world.put(100..200, 7);
    world.wait_rows(200);
    // Then the reader subscribes, from the position that polling has reached.
    proxy.choose(|_, _| Fault::None);
    wait_for("a subscription", || {
        proxy.count("SubscribeToShard", |fault| matches!(fault, Fault::None)) > 0
    });
    world.put(200..300, 7);
    world.wait_rows(300);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(300);
}

/// A backlog takes longer to poll than several attempts to subscribe. Each attempt is refused. A refused attempt must
/// not change which record the polling expects next.
#[test]
fn fault_46_a_backlog_is_polled_while_the_subscription_is_kept_out() {
    let world = World::new(1);
    world.put(0..100, 7);
    let proxy = Proxy::start(&world.address, 46, |operation, _| match operation {
        "SubscribeToShard" => Fault::InUse,
        // Ten calls, which take far longer than the pause between two attempts to subscribe.
        "GetRecords" => Fault::Slow(Duration::from_millis(400)),
        _ => Fault::None,
    });
    let source = "reader = \"fan-out\"\nrecords_per_call = 10".into();
    let endpoint = proxy.url.clone();
    let run = start(&world, &Pipeline { source, endpoint, ..Pipeline::default() });
    wait_for("the backlog", || {
        assert!(!world.logged("are lost"), "nothing is lost");
        world.rows() >= 100
    });
    assert!(proxy.count("SubscribeToShard", |fault| matches!(fault, Fault::InUse)) > 2);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(100);
}

/// On a server that enforces the rule of five seconds between subscriptions, a process that is killed five seconds
/// after each start makes progress every time.
#[test]
fn fault_46_a_process_that_is_killed_every_few_seconds_makes_progress() {
    let (_alone, world) = World::on_other_server(1);
    let endpoint = format!("http://{}", world.address);
    let source = "reader = \"fan-out\"".into();
    let pipeline = Pipeline { endpoint, source, ..Pipeline::default() };
    const ROUNDS: u64 = 4;
    for round in 0..ROUNDS {
        world.put(round * 100..(round + 1) * 100, 7);
        let run = start(&world, &pipeline);
        let begun = Instant::now();
        wait_for("this round's rows", || {
            // The first process registers the consumer.
            let is_late = round > 0 && begun.elapsed() > Duration::from_secs(5);
            world.rows() >= (round + 1) * 100 || is_late
        });
        drop(run); // kill -9
        assert_eq!(world.rows(), (round + 1) * 100, "round {round}");
    }
    world.assert_each_once_in_order(ROUNDS * 100);
    world.delete();
}
