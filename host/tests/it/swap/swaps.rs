//! Swaps that succeed.

use std::thread;

use super::fixture::Fixture;
use crate::support::{postgres, run, wait_for};

#[test]
fn lanes_change_at_a_recorded_place_and_back() {
    let mut fixture = Fixture::new(4);
    fixture.start();
    fixture.world.put(0..2_000, 50);
    fixture.wait_rows(2_000);
    let report = fixture.swap(&fixture.version("v2 none"), &[]);
    assert_eq!((&report["number"], report["lanes"].as_array().map(Vec::len)), (&1.into(), Some(4)));
    assert_eq!(report["trial"]["changed"], report["trial"]["records"], "each row has the version");
    let diff = report["trial"]["differences"][0]["diff"].as_str().expect("text");
    assert!(
        diff.lines().any(|it| it.starts_with('+') && it.contains("\"version\": \"v2\"")),
        "{diff}"
    );
    fixture.world.put(2_000..4_000, 50);
    fixture.wait_rows(4_000);
    let back = fixture.command(&["plugin", "rollback", "stamp"]);
    assert!(back.status.success(), "{}", String::from_utf8_lossy(&back.stderr));
    fixture.world.put(4_000..6_000, 50);
    fixture.wait_rows(6_000);
    let nothing = fixture.command(&["plugin", "rollback", "stamp"]);
    let error = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert!(error.contains("stage stamp has no swap in force"), "{error}");
    fixture.stop();

    fixture.assert_each_once_as_the_ledger_says(0..6_000);
    for (ids, expected) in [(0..2_000, "v1"), (2_000..4_000, "v2"), (4_000..6_000, "v1")] {
        assert!(
            fixture
                .rows()
                .iter()
                .filter(|row| ids.contains(&row.id))
                .all(|row| row.version == expected)
        );
    }
    let history = fixture.history();
    let printed: Vec<_> =
        history.iter().map(|change| (&change["kind"], &change["outcome"])).collect();
    assert_eq!(
        printed[1..],
        [(&"rollback".into(), &"promoted".into()), (&"swap".into(), &"rolled-back".into())]
    );
    // The command reports which version ran a record.
    let rows = fixture.rows();
    let row = rows.iter().find(|row| row.id == 2_500).expect("a row");
    let record = format!("{}:{}", row.shard, row.sequence);
    let which = fixture.command(&["plugin", "which", &record]);
    let which = String::from_utf8(which.stdout).expect("text");
    let digest = report["after"]["digest"].as_str().expect("a digest");
    assert!(which.contains(digest) && which.contains("\"is_settled\":true"), "{which}");
    let ahead = format!("{}:{}0", row.shard, row.sequence);
    let which = fixture.command(&["plugin", "which", &ahead]);
    let which = String::from_utf8(which.stdout).expect("text");
    assert!(!which.contains(digest) && which.contains("\"is_settled\":false"), "{which}");
}

#[test]
fn a_swap_lasts_until_the_file_changes() {
    let mut fixture = Fixture::new(2);
    fixture.start();
    fixture.world.put(0..200, 20);
    fixture.wait_rows(200);
    let v2 = fixture.version("v2 none");
    fixture.swap(&v2, &[]);
    fixture.stop();
    fixture.start();
    assert!(fixture.world.logged("runs what was swapped in"), "{}", fixture.log());
    fixture.world.put(200..400, 20);
    fixture.wait_rows(400);
    fixture.stop();
    // The old file still contains v1; the new file counts.
    fixture.version("v1 none");
    std::fs::copy(fixture.version("v3 none"), fixture.stage_file()).expect("written");
    fixture.start();
    fixture.world.put(400..600, 20);
    fixture.wait_rows(600);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..600);
    for (ids, expected) in [(0..200, "v1"), (200..400, "v2"), (400..600, "v3")] {
        assert!(
            fixture
                .rows()
                .iter()
                .filter(|row| ids.contains(&row.id))
                .all(|row| row.version == expected)
        );
    }
}

#[test]
fn two_swaps_at_once_leave_one_version() {
    let mut fixture = Fixture::new(4);
    fixture.start();
    fixture.world.put(0..1_000, 50);
    fixture.wait_rows(1_000);
    let files = [fixture.version("v2 none"), fixture.version("v3 none")];
    let pipeline = fixture.write_pipeline();
    let swaps = files.clone().map(|file| {
        let pipeline = pipeline.clone();
        thread::spawn(move || {
            run(&["plugin", "swap", "stamp", &file, "--pipeline", &pipeline, "--json"])
        })
    });
    let outputs = swaps.map(|swap| swap.join().expect("it ends"));
    for output in &outputs {
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || error.contains("came first"), "{error}");
    }
    assert!(outputs.iter().any(|output| output.status.success()));
    fixture.world.put(1_000..2_000, 50);
    fixture.wait_rows(2_000);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..2_000);
    let rows = fixture.rows();
    let mut late: Vec<_> =
        rows.iter().filter(|row| row.id >= 1_000).map(|row| &row.version).collect();
    late.dedup();
    late.sort();
    late.dedup();
    assert_eq!(late.len(), 1, "{late:?}");
}

#[test]
fn a_swap_while_shards_split() {
    let mut fixture = Fixture::new(2);
    fixture.start();
    fixture.world.put(0..1_000, 50);
    for shard in fixture.world.open_shards() {
        fixture.world.split(&shard);
    }
    let file = fixture.version("v2 none");
    thread::scope(|scope| {
        scope.spawn(|| fixture.world.put(1_000..3_000, 50));
        fixture.swap(&file, &[]);
    });
    fixture.wait_rows(3_000);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..3_000);
}

#[test]
fn a_swap_while_a_sink_is_down() {
    let mut fixture = Fixture::new(2);
    fixture.start();
    fixture.world.put(0..500, 50);
    fixture.wait_rows(500);
    postgres(&format!("ALTER TABLE {0} RENAME TO {0}_away", fixture.table));
    fixture.world.put(500..1_000, 50);
    wait_for("the sink to be missed", || fixture.world.logged("is gone"));
    fixture.swap(&fixture.version("v2 none"), &[]);
    fixture.world.put(1_000..1_500, 50);
    postgres(&format!("ALTER TABLE {0}_away RENAME TO {0}", fixture.table));
    fixture.wait_rows(1_500);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..1_500);
    assert!(fixture.rows().iter().any(|row| row.version == "v2"));
}
