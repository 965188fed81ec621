//! A process is killed at each step of a swap: the next one runs one version, as the ledger says.
//!
//! One write to the state makes a swap durable. It lies between the log lines "its components are kept" and "it is
//! noted". The next process runs the old version if the kill comes before that write, and the new version if it
//! comes after. A kill follows its log line a moment later, so shortly before the write both are possible.

use std::io::Read as _;
use std::time::{Duration, Instant};

use super::fixture::Fixture;
use crate::support::run;

const SEED: u64 = 2014;
const RANDOM_KILLS: u64 = 12;

/// Version that the next process is expected to run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expected {
    Old,
    New,
    Either,
}

/// Log text at the beginning of each step, in order, and the version that a kill there leaves.
const STEPS: [(&str, Expected); 11] = [
    ("a change step=fetch", Expected::Old),
    ("a change step=pin", Expected::Old),
    ("a change step=compile", Expected::Old),
    ("a change step=check", Expected::Old),
    ("a change step=trial", Expected::Old),
    ("a change step=promote", Expected::Either),
    ("its components are kept", Expected::Either),
    ("it is noted; the lanes change", Expected::New),
    ("writing the change to the ledger", Expected::New),
    ("another revision runs", Expected::New),
    ("the lanes have changed", Expected::New),
];

#[test]
fn a_kill_at_each_step_of_a_swap_leaves_one_version() {
    let mut kills = Kills::begin();
    for (step, expected) in STEPS {
        let (old, new) = kills.swap(|fixture| at_step(fixture, step));
        let found = kills.version_after();
        let is_expected = match expected {
            Expected::Old => found == old,
            Expected::New => found == new,
            Expected::Either => found == old || found == new,
        };
        assert!(
            is_expected,
            "killed at {step:?}: expected {expected:?} of {old} and {new}, found {found}"
        );
    }
    kills.end();
}

#[test]
fn a_kill_at_any_time_of_a_swap_leaves_one_version() {
    let seed = std::env::var("SHARDMILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = fastrand::Rng::with_seed(seed.unwrap_or(SEED));
    let mut kills = Kills::begin();
    for kill in 0..RANDOM_KILLS {
        let pause = Duration::from_millis(random.u64(0..250));
        let (old, new) = kills.swap(|_| std::thread::sleep(pause));
        let found = kills.version_after();
        assert!(
            found == old || found == new,
            "kill {kill} after {pause:?}, seed {seed:?}: {found}"
        );
    }
    kills.end();
}

/// Pipeline that is killed repeatedly.
struct Kills {
    fixture: Fixture,
    put: u64,
    number: u64,
    running: String,
}

impl Kills {
    fn begin() -> Self {
        let mut fixture = Fixture::new(3);
        fixture.start();
        Self { fixture, put: 0, number: 1, running: "v1".into() }
    }

    fn put(&mut self, records: u64) {
        self.fixture.world.put(self.put..self.put + records, 30);
        self.put += records;
    }

    /// Swaps to a version that never ran while records flow, and kills the pipeline when `until` returns. Returns the
    /// old version and the new one.
    fn swap(&mut self, until: impl FnOnce(&Fixture)) -> (String, String) {
        self.put(300);
        self.number += 1;
        let new = format!("v{}", self.number);
        let file = self.fixture.version(&format!("{new} none"));
        let pipeline = self.fixture.write_pipeline();
        let swap = std::thread::spawn(move || {
            let named = ["plugin", "swap", "stamp", &file, "--pipeline", &pipeline];
            run(&[&named[..], &["--shadow", "100 ms", "--json"]].concat())
        });
        until(&self.fixture);
        self.fixture.kill();
        let _ = swap.join().expect("it ends");
        (self.running.clone(), new)
    }

    /// Restarts the pipeline; returns the one version that it runs.
    fn version_after(&mut self) -> String {
        self.fixture.start();
        let first = self.put;
        self.put(100);
        self.fixture.wait_rows(self.put);
        let rows = self.fixture.rows();
        let ledger = self.fixture.ledger();
        for row in &rows {
            assert_eq!(row.version, ledger.version_of(row), "{row:?}");
        }
        let mut versions: Vec<_> =
            rows.into_iter().filter(|row| row.id >= first).map(|row| row.version).collect();
        versions.sort();
        versions.dedup();
        assert_eq!(versions.len(), 1, "{versions:?}");
        self.running = versions.remove(0);
        self.running.clone()
    }

    fn end(mut self) {
        self.fixture.stop();
        self.fixture.assert_each_once_as_the_ledger_says(0..self.put);
    }
}

/// Waits until the log contains this text. Polls often: a step may take less than a millisecond.
fn at_step(fixture: &Fixture, says: &str) {
    let mut log = std::fs::File::open(fixture.world.log()).expect("a log");
    let (mut seen, begun) = (Vec::new(), Instant::now());
    loop {
        let is_new = log.read_to_end(&mut seen).expect("a log") > 0;
        if is_new && String::from_utf8_lossy(&seen).contains(says) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "no {says:?} in: {}", fixture.log());
        std::thread::sleep(Duration::from_micros(200));
    }
}
