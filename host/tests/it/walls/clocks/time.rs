//! Time limits count what a plugin does, not what others do to the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shardmill::config::RejectedMax;

use super::work;
use crate::hostile::lane::Lane;
use crate::hostile::wat::Guest;
use crate::languages::{asking, car_server, letters, run_asking};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, admin, free_port, http_get, shardmill, sqlite, wait_for};

/// Lanes that never give their core up by themselves.
const HOSTILE_LANES: usize = 16;

/// Does something while lanes with endless records use all cores.
fn beside_hostile_lanes<T>(what: impl FnOnce() -> T) -> T {
    let limits = "batch_time = \"50 ms\"\nrecord_time = \"50 ms\"";
    let first = Lane::within(limits, "loop_on = \"bad\"", RejectedMax::NONE);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..HOSTILE_LANES {
            let (mut lane, ended) = (first.another(), &ended);
            scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let outcome = lane.run(&["bad".to_owned()]).expect("a culprit");
                    assert_eq!(outcome.letters.len(), 1);
                }
            });
        }
        let done = what();
        ended.store(true, Ordering::Relaxed);
        done
    })
}

/// 40 ms of CPU time take 0.3 s beside so many on two cores: more than the limit.
#[test]
fn wall_10_hostile_lanes_do_not_take_an_honest_records_time() {
    let process = work(40_000_000);
    let plugin = Guest { process: &process, ..Guest::default() }.build("plugin");
    let limits = "batch_time = \"2 s\"\nrecord_time = \"250 ms\"";
    let path = plugin.path().display().to_string();
    let mut lane = Lane::of(&path, limits, "", RejectedMax::default()).expect("it loads");
    let payloads = |records: usize| vec!["busy".to_owned(); records];
    // Alone and in a batch.
    let outcomes = beside_hostile_lanes(|| [1, 1, 2].map(|records| lane.run(&payloads(records))));
    for (records, outcome) in [1, 1, 2].into_iter().zip(outcomes) {
        let outcome = outcome.unwrap_or_else(|why| panic!("{why:?}"));
        let reasons: Vec<_> = outcome.letters.iter().map(|letter| &letter.reason).collect();
        assert_eq!((outcome.routed.len(), reasons.len()), (records, 0), "{reasons:?}");
    }
}

/// The limit still ends what uses up its own time, however busy the machine is, and blames that alone.
#[test]
fn wall_10_an_endless_record_is_blamed_beside_hostile_lanes_too() {
    let limits = "batch_time = \"60 ms\"\nrecord_time = \"30 ms\"";
    let mut lane = Lane::within(limits, "loop_on = \"bad\"", RejectedMax::default());
    let payloads = ["fine 1", "bad", "fine 2"].map(str::to_owned);
    let outcome = beside_hostile_lanes(|| lane.run(&payloads)).expect("one culprit");
    let reasons: Vec<_> = outcome.letters.iter().map(|letter| letter.reason.as_str()).collect();
    let is_timeout = |reason: &str| reason.contains("its limit of 30 ms of CPU time");
    assert!(matches!(reasons[..], [reason] if is_timeout(reason)), "{reasons:?}");
    assert_eq!(outcome.routed.len(), 2);
}

/// `configure` works for 40 ms.
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

/// The process is held up for longer than its call may last: the call has hardly got any CPU time, and no
/// record of it can be blamed. It is run again.
#[test]
fn wall_10_a_call_that_the_machine_did_not_let_end_is_run_again() {
    const RECORDS: usize = 100;
    let folder = tempfile::tempdir().expect("a folder");
    let process = work(80_000_000);
    let plugin = Guest { process: &process, ..Guest::default() }.build("plugin");
    let rows = folder.path().join("rows.txt");
    std::fs::write(&rows, "busy\n".repeat(RECORDS)).expect("written");
    let port = free_port();
    // 10 × (250 ms + 1 ms) of wall time.
    let lines = "routes = { out = [\"nowhere\"] }
[stage.limits]
batch_time = \"250 ms\"
record_time = \"250 ms\"
host_time = \"1 ms\"";
    let file = PipelineToml::new(folder.path(), "starved")
        .file(&rows, "[source.batch]\nrecords = 1")
        .stage("busy", &plugin.path().display().to_string(), lines)
        .sink("nowhere", "type = \"discard\"")
        .table(&admin(port))
        .write();
    let log = std::fs::File::create(folder.path().join("run.log")).expect("a log");
    let mut command = shardmill(&["run", &file, "--until-caught-up", "-v"]);
    let mut run = Process(command.stderr(log).spawn().expect("the binary starts"));
    let calls = |metric: &str| -> f64 {
        let text = http_get(port, "/metrics");
        let lines = text.lines().filter(|line| line.starts_with(metric));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    wait_for("calls", || calls("shardmill_stage_calls_total") >= 2.0);
    let signal = |name: &str| {
        let pid = run.0.id().to_string();
        let sent = std::process::Command::new("kill").args([name, &pid]).status();
        assert!(sent.expect("kill").success());
    };
    // Mostly the first time: it must hit a call whose clocks have been looked at once.
    for _ in 0..3 {
        signal("-STOP");
        let begun = Instant::now();
        wait_for("the call's time to pass", || begun.elapsed() > Duration::from_millis(2_600));
        signal("-CONT");
        let begun = Instant::now();
        let is_starved = || calls("shardmill_stage_starved_total") >= 1.0;
        wait_for("a look", || is_starved() || begun.elapsed() > Duration::from_millis(500));
        if is_starved() {
            break;
        }
    }
    let status = run.wait();
    let log = std::fs::read_to_string(folder.path().join("run.log")).expect("a log");
    assert!(status.success(), "{log}");
    assert!(log.contains("the machine is too busy"), "{log}");
    let state = sqlite(&folder.path().join("state/starved/state.db"));
    let letters = "SELECT count(*) FROM dead_letter";
    assert_eq!(state.query_row(letters, (), |row| row.get(0)), Ok(0_u64), "{log}");
}

/// A call of the host has a budget of its own, whatever the plugin's own time is, and the record that made
/// it is found alone.
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
    let (letters, reason) = letters(place.path());
    assert!(letters == 1 && reason.contains("within the time of the call"), "{letters}: {reason}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}
