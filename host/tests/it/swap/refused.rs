//! Candidates that must not be promoted, or must be rolled back: the incumbent serves all along.

use super::fixture::{Fixture, stamp};
use crate::support::{plugin, wait_for};

#[test]
fn bad_candidates_are_refused_and_the_incumbent_serves() {
    let mut fixture = Fixture::new(2);
    fixture.stage = "[stage.limits]\nmemory = \"16 MiB\"\nrecord_time = \"100 ms\"".into();
    fixture.start();
    fixture.world.put(1..1_500, 50);
    fixture.wait_rows(1_499);
    // While a stage is busy, not every batch is kept for trials. The record that makes candidates misbehave is
    // therefore put alone.
    fixture.world.put(0..1, 1);
    fixture.wait_rows(1_500);
    let good = stamp("v2 none");
    let empty = wat::parse_str("(component)").expect("a component");
    let module = wat::parse_str("(module)").expect("a module");
    for (bytes, step, cause) in [
        (&b"no component"[..], "compile", "is not WebAssembly"),
        (&good[..good.len() / 2], "compile", "does not compile"),
        (&module, "compile", "a core WebAssembly module"),
        (&empty, "compile", "does not export shardmill:plugin/stage"),
        (&std::fs::read(plugin("probe")).expect("a component"), "check", "does not grant"),
        (&stamp("v2 columns"), "check", "colour"),
        (&stamp("v2 configure-trap"), "check", "configure"),
        (&stamp("v2 nonsense"), "check", "the mark has no nonsense"),
        (&stamp("v2 trap 1000"), "trial", "traps or exceeds a limit on"),
        (&stamp("v2 loop 1000"), "trial", "traps or exceeds a limit on"),
        (&stamp("v2 leak 1"), "trial", "calls"),
        (&stamp("v2 shard-trap"), "trial", "configure trapped"),
    ] {
        let error = fixture.refused(&fixture.file("candidate.wasm", bytes), &[]);
        assert!(error.contains(&format!("refused at step {step}")), "{cause}: {error}");
        assert!(error.contains(cause), "{cause}: {error}");
        assert!(error.contains("stamp v1") && error.contains("runs on"), "{cause}: {error}");
        assert!(fixture.is_running());
    }
    for (mark, gate) in [("v2 other 10", "--max-changed"), ("v2 reject 10", "--max-rejected")] {
        let error = fixture.refused(&fixture.file("candidate.wasm", &stamp(mark)), &[gate, "0"]);
        assert!(error.contains("refused at step trial") && error.contains(gate), "{error}");
    }
    assert!(fixture.refused("no-such-file.wasm", &[]).contains("no-such-file.wasm"));
    assert!(fixture.refused("abcdef12", &[]).contains("unknown component abcdef12"));
    fixture.world.put(1_500..2_000, 50);
    fixture.wait_rows(2_000);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..2_000);
    assert!(fixture.rows().iter().all(|row| row.version == "v1"));
    assert!(fixture.history().iter().filter(|change| change["outcome"] == "refused").count() >= 14);
}

/// Swaps to a bad candidate while there are no records for a trial. The candidate is promoted, and then rolled back
/// by itself.
fn rolled_back(mark: &str, why: &str) {
    let mut fixture = Fixture::new(2);
    fixture.more = "[reload.probation]\nwindow = \"60 s\"".into();
    fixture.start();
    fixture.swap(&fixture.version(mark), &[]);
    fixture.world.put(1..600, 50);
    wait_for("the rollback", || fixture.world.logged("is rolled back"));
    wait_for("the change back", || fixture.history()[0]["kind"] == "rollback");
    fixture.world.put(600..800, 50);
    // Waits for the rows of both shards: one may lag far behind the other.
    wait_for(&format!("the last rows: {}", fixture.log()), || {
        fixture.rows().iter().filter(|row| row.id >= 600).count() >= 200
    });
    fixture.stop();
    let history = fixture.history();
    let undone =
        history.iter().find(|change| change["outcome"] == "rolled-back").expect("a change");
    assert!(undone["reason"].as_str().expect("text").contains(why), "{undone}");
    // Records that the bad version rejected are dead letters; all others are there once.
    let output = fixture.command(&["dlq", "list", "--limit", "1000"]);
    let dead_letters = String::from_utf8(output.stdout).expect("text").lines().count();
    let rows = fixture.rows();
    let mut ids: Vec<u64> = rows.iter().map(|row| row.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((ids.len(), ids.len() + dead_letters), (rows.len(), 799));
    assert!(rows.iter().filter(|row| row.id >= 600).all(|row| row.version == "v1"));
    let ledger = fixture.ledger();
    for row in &rows {
        assert_eq!(row.version, ledger.version_of(row), "{row:?}");
    }
}

#[test]
fn a_version_that_traps_is_rolled_back() {
    rolled_back("v2 trap 100", "trapped");
}

#[test]
fn a_version_that_rejects_is_rolled_back() {
    rolled_back("v2 reject 20", "rejects");
}

#[test]
fn a_version_that_blocks_its_lanes_is_rolled_back() {
    rolled_back("v2 reject 1", "");
}

#[test]
fn a_slow_version_is_rolled_back() {
    let mut fixture = Fixture::new(2);
    // A low limit: on a busy machine the previous version seems slower than it is.
    fixture.more = "[reload.probation]\nslower = 2".into();
    fixture.start();
    // Enough records to measure the speed of the previous version.
    fixture.world.put(0..100_000, 50);
    fixture.wait_rows(100_000);
    // The trial reports how long the candidate takes, and passes.
    let report = fixture.swap(&fixture.version("v2 slow 1"), &[]);
    let ns = |name: &str| report["trial"][name].as_f64().expect("a number");
    assert!(ns("candidate_ns_per_record") > 5.0 * ns("incumbent_ns_per_record"), "{report}");
    fixture.world.put(100_000..105_000, 50);
    wait_for("the rollback", || fixture.world.logged("ns per record, the earlier version"));
    fixture.wait_rows(105_000);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..105_000);
}

#[test]
fn a_pinned_component_is_not_swapped() {
    use sha2::Digest as _;
    let mut fixture = Fixture::new(1);
    let digest = hex::encode(sha2::Sha256::digest(stamp("v1 none")));
    fixture.stage = format!("sha256 = \"{digest}\"");
    fixture.start();
    let error = fixture.refused(&fixture.version("v2 none"), &[]);
    assert!(error.contains("refused at step pin") && error.contains("pipeline.toml:"), "{error}");
    fixture.stop();
}
