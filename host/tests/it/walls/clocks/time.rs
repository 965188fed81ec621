//! Time limits count what a plugin does, not what other load does to the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use shardmill_config::RejectedMax;
use shardmill_engine::stage::Blocked;

use super::work;
use crate::hostile::lane::Lane;
use crate::hostile::wat::Guest;
use crate::languages::{asking, car_server, dead_letters_and_reason, run_asking};

/// Number of lanes that never yield their core: this many on two cores, more on a larger machine.
const HOSTILE_LANES: usize = 16;
/// Minimum number of these lanes per core.
const HOSTILE_LANES_PER_CORE: usize = 2;

/// Ends the hostile lanes, even if a test panics.
struct End<'e>(&'e AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `what` while lanes with endless records use all cores. Only one test at a time: the lanes of several tests
/// would leave nobody the share of a core that the limits assume.
fn beside_hostile_lanes<T>(what: impl FnOnce() -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let limits = "batch_time = \"50 ms\"\nrecord_time = \"50 ms\"";
    let first = Lane::within(limits, "loop_on = \"bad\"", RejectedMax::NONE);
    let ended = AtomicBool::new(false);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let lanes = HOSTILE_LANES.max(HOSTILE_LANES_PER_CORE * cores);
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            let (mut lane, ended) = (first.another(), &ended);
            scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    match lane.run(&["bad".to_owned()]) {
                        Ok(outcome) => assert_eq!(outcome.dead_letters.len(), 1),
                        Err(Blocked::Starved(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                }
            });
        }
        let _end = End(&ended);
        what()
    })
}

/// Beside this many lanes on two cores, 40 ms of CPU time take 0.3 s of wall time: more than the limit.
#[test]
fn wall_10_hostile_lanes_do_not_take_an_honest_records_time() {
    let process = work(40_000_000);
    let plugin = Guest { process: &process, ..Guest::default() }.build("plugin");
    let limits = "batch_time = \"2 s\"\nrecord_time = \"250 ms\"";
    let path = plugin.path().display().to_string();
    let mut lane = Lane::of(&path, limits, "", RejectedMax::default()).expect("it loads");
    let payloads = |records: usize| vec!["busy".to_owned(); records];
    // The record runs alone and in a batch.
    let outcomes = beside_hostile_lanes(|| [1, 1, 2].map(|records| lane.run(&payloads(records))));
    for (records, outcome) in [1, 1, 2].into_iter().zip(outcomes) {
        let outcome = outcome.unwrap_or_else(|why| panic!("{why:?}"));
        let reasons: Vec<_> =
            outcome.dead_letters.iter().map(|dead_letter| &dead_letter.reason).collect();
        assert_eq!((outcome.routed.len(), reasons.len()), (records, 0), "{reasons:?}");
    }
}

/// However busy the machine is, the limit still ends a record that uses up its own time, and blames only that record.
#[test]
fn wall_10_an_endless_record_is_blamed_beside_hostile_lanes_too() {
    let limits = "batch_time = \"60 ms\"\nrecord_time = \"30 ms\"";
    let mut lane = Lane::within(limits, "loop_on = \"bad\"", RejectedMax::default());
    let payloads = ["fine 1", "bad", "fine 2"].map(str::to_owned);
    let outcome = beside_hostile_lanes(|| {
        loop {
            match lane.run(&payloads) {
                Err(Blocked::Starved(_)) => {}
                ended => break ended,
            }
        }
    });
    let outcome = outcome.expect("one culprit");
    let reasons: Vec<_> =
        outcome.dead_letters.iter().map(|dead_letter| dead_letter.reason.as_str()).collect();
    let is_timeout = |reason: &str| reason.contains("its limit of 30 ms of CPU time");
    assert!(matches!(reasons[..], [reason] if is_timeout(reason)), "{reasons:?}");
    assert_eq!(outcome.routed.len(), 2);
}

/// `configure` uses 40 ms of CPU time.
#[test]
fn wall_08_configure_has_cpu_time_of_its_own() {
    let configure = work(40_000_000);
    let plugin = Guest { configure: &configure, ..Guest::default() }.build("plugin");
    let path = plugin.path().display().to_string();
    let load = |limit: &str| {
        let limits = format!("configure_time = \"{limit}\"");
        Lane::of(&path, &limits, "", RejectedMax::default()).map(|_| ())
    };
    beside_hostile_lanes(|| load("250 ms")).unwrap_or_else(|why| panic!("{why}"));
    let why = load("10 ms").expect_err("it works longer");
    assert!(why.contains("configure took longer than its limit of 10 ms of CPU time"), "{why}");
}

/// The thread gets a core only when nobody else wants one. Its call gets hardly any CPU time until the deadline ends
/// it, so no record can be blamed. With a core of its own, the same batch succeeds.
#[test]
fn wall_10_a_call_that_the_machine_did_not_let_end_is_rerun() {
    let process = work(80_000_000);
    let plugin = Guest { process: &process, ..Guest::default() }.build("plugin");
    // The deadline is 10 × (250 ms + 1 ms) of wall time.
    let limits = "batch_time = \"250 ms\"\nrecord_time = \"250 ms\"\nhost_time = \"1 ms\"";
    let path = plugin.path().display().to_string();
    let mut lane = Lane::of(&path, limits, "", RejectedMax::default()).expect("it loads");
    let payloads = ["busy".to_owned()];
    let starved = beside_hostile_lanes(|| {
        std::thread::scope(|scope| {
            let idle = scope.spawn(|| {
                yield_to_all_others();
                lane.run(&payloads)
            });
            idle.join().expect("no panic")
        })
    });
    match starved {
        Err(Blocked::Starved(why)) => assert!(why.contains("the machine is too busy"), "{why}"),
        other => panic!("expected a call that is repeated, found {other:?}"),
    }
    let outcome = lane.run(&payloads).expect("it is repeated");
    assert_eq!((outcome.routed.len(), outcome.dead_letters.len()), (1, 0));
}

/// Sets this thread's scheduling policy to the kernel's policy for work that waits for an idle core.
fn yield_to_all_others() {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads a structure that lives here.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// A call of the host has a time budget of its own, independent of the plugin's time. The record that made the call
/// is found alone.
#[test]
fn wall_10_a_call_of_the_host_over_its_budget_blames_its_record() {
    let (place, _) = asking("far", "rust");
    rusqlite::Connection::open(place.path().join("cars.db"))
        .and_then(|cars| {
            cars.execute_batch("CREATE TABLE cars (make TEXT PRIMARY KEY, country TEXT)")
        })
        .expect("an empty table");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let port = runtime.block_on(car_server());
    let stage = format!(
        r#"
config = {{ url = "http://127.0.0.1:{port}/cars/" }}
grant = {{ lookup = ["cars"], http = [{{ host = "127.0.0.1:{port}", private = true }}] }}
limits = {{ batch_time = "60 s", record_time = "60 s", host_time = "500 ms", retry = "0 s" }}
[[lookup]]
name = "cars"
url = "sqlite:cars.db"
query = "SELECT make, country FROM cars WHERE make IN (SELECT value FROM json_each(?1))"
"#
    );
    let input = format!("Volvo\nhttp://127.0.0.1:{port}/never\nSaab\n");
    let begun = Instant::now();
    let (printed, _) = run_asking(place.path(), &stage, &input);
    let rows = String::from_utf8_lossy(&printed);
    assert!(rows.contains("Volvo") && rows.contains("Saab"), "{rows}");
    let (dead_letters, reason) = dead_letters_and_reason(place.path());
    assert!(
        dead_letters == 1 && reason.contains("within the time of the call"),
        "{dead_letters}: {reason}"
    );
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}
