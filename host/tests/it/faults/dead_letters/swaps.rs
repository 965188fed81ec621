//! Swaps: which of them are refused, and which must not be.

use crate::support::{postgres, wait_for};
use crate::swap::fixture::{Fixture, stamp};

#[test]
fn fault_40_a_version_that_loops_is_replaced_by_a_corrected_one() {
    let mut fixture = Fixture::new(1);
    // One record per batch, so that the trial has many records on which the running version loops.
    fixture.stage = "[stage.limits]\nrecord_time = \"500 ms\"".into();
    fixture.more = "[source.batch]\nrecords = 1".into();
    fixture.timing = "trial = \"3 s\"\ntrial_incumbent = \"1 s\"".into();
    std::fs::write(fixture.stage_file(), stamp("v1 loop 10")).expect("written");
    fixture.start();
    // Each looping record is put when the stage is idle: while it is busy, not every batch is kept for trials.
    for tens in 1..=4 {
        fixture.world.put(10 * tens - 9..10 * tens, 50);
        fixture.wait_rows(9 * tens);
        fixture.world.put(10 * tens..10 * tens + 1, 50);
        wait_for("the dead letter", || dead_letters(&fixture) as u64 == tens);
    }
    fixture.world.put(41..45, 50);
    fixture.wait_rows(40);
    // Four records take half a second each. Each runs twice to find the culprit, and once to warm up.
    let report = fixture.swap(&fixture.version("v2 none"), &[]);
    let trial = &report["trial"];
    let failed = trial["incumbent_failed"].as_str().expect("a line of the report");
    assert!(failed.contains("longer than 1s"), "{report}");
    assert!(trial["candidate_only"].as_u64() > Some(0), "{report}");
    // A candidate that loops is still refused.
    let refused = fixture.refused(&fixture.version("v3 loop 1"), &[]);
    assert!(refused.contains("refused at step trial"), "{refused}");
    fixture.stop();
}

fn dead_letters(fixture: &Fixture) -> usize {
    let output = fixture.command(&["dlq", "list", "--limit", "1000"]);
    String::from_utf8(output.stdout).expect("text").lines().count()
}

#[test]
fn fault_44_a_dry_run_is_refused_where_the_swap_is() {
    let mut fixture = Fixture::new(1);
    fixture.start();
    fixture.world.put(0..20, 5);
    fixture.wait_rows(20);
    for more in [&["--dry-run"][..], &[]] {
        let refused = fixture.refused(&fixture.version("v2 columns"), more);
        assert!(refused.contains("refused at step check"), "{more:?}: {refused}");
        assert!(refused.contains("colour"), "{more:?}: {refused}");
    }
    // A dry run changes nothing. The columns that it tried are not expected of later rows.
    let report = fixture.swap(&fixture.version("v2 none"), &["--dry-run"]);
    assert!(report["number"].is_null(), "{report}");
    fixture.world.put(20..40, 5);
    fixture.wait_rows(40);
    assert!(fixture.rows().iter().all(|row| row.version == "v1"));
    fixture.stop();
}

#[test]
fn fault_44_tables_are_looked_at_though_the_rows_stay_the_same() {
    let mut fixture = Fixture::new(1);
    fixture.start();
    fixture.world.put(0..20, 5);
    fixture.wait_rows(20);
    fixture.swap(&fixture.version("v2 none"), &[]);
    postgres(&format!("ALTER TABLE {} RENAME COLUMN version TO was_version", fixture.table));
    for more in [&["--dry-run"][..], &[]] {
        let refused = fixture.refused(&fixture.version("v3 none"), more);
        assert!(refused.contains("refused at step check"), "{more:?}: {refused}");
        assert!(refused.contains("version"), "{more:?}: {refused}");
    }
    // A restart would be refused in the same way, but the rollback still works.
    let undone = fixture.command(&["plugin", "rollback", "stamp"]);
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    postgres(&format!("ALTER TABLE {} RENAME COLUMN was_version TO version", fixture.table));
    fixture.swap(&fixture.version("v3 none"), &[]);
    fixture.stop();
}
