//! Rollback with replay: the output of a bad version is made again by the version before it.

use super::fixture::Fixture;
use crate::support::{postgres, sqlite};

#[test]
fn what_a_bad_version_wrote_is_rerun() {
    let mut fixture = Fixture::new(3);
    fixture.mode = "mode = \"upsert\"\nkey = [\"id\"]\nnewest_by = \"id\"".into();
    // A second sink that appends: its rows go to another table.
    let folder = fixture.world.folder.path().display().to_string();
    fixture.more = format!(
        "[[sink]]\nname = \"copy\"\ntype = \"sqlite\"\npath = \"{folder}/copy.db\"\n\
         table = \"rows\"\ncreate = true\n[sink.commit]\nlinger = \"50 ms\""
    );
    fixture.routes = "[\"mart\", \"copy\"]".into();
    fixture.start();
    fixture.world.put(0..1_000, 30);
    fixture.wait_rows(1_000);
    fixture.swap(&fixture.version("v2 other 1"), &[]);
    fixture.world.put(1_000..2_000, 30);
    fixture.wait_rows(2_000);
    let wrong = format!("SELECT count(*) FROM {} WHERE n <> id", fixture.table);
    assert_eq!(postgres(&wrong), ["1000"]);

    let undone = fixture.command(&["plugin", "rollback", "stamp", "--replay-from-swap"]);
    let printed = String::from_utf8_lossy(&undone.stdout).into_owned();
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    assert!(
        printed.contains("\"records\":1000") && printed.contains("in place, in table"),
        "{printed}"
    );
    fixture.world.put(2_000..2_500, 30);
    fixture.wait_rows(2_500);
    fixture.stop();

    assert_eq!(postgres(&wrong), ["0"]);
    let rows = fixture.rows();
    let mut ids: Vec<u64> = rows.iter().map(|row| row.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..2_500).collect::<Vec<_>>());
    assert!(rows.iter().all(|row| row.version == "v1"));
    let copy = sqlite(&fixture.world.folder.path().join("copy.db"));
    let count = |sql: &str| copy.query_row(sql, (), |row| row.get::<_, u64>(0)).expect("a count");
    assert_eq!(count("SELECT count(*) FROM rows"), 2_500);
    assert_eq!(count("SELECT count(DISTINCT id) FROM rows_again_1 WHERE n = id"), 1_000);
}

#[test]
fn what_is_refused_in_a_rerun_is_shown() {
    let mut fixture = Fixture::new(1);
    std::fs::write(fixture.stage_file(), super::fixture::stamp("v1 reject 10")).expect("written");
    fixture.mode = "mode = \"upsert\"\nkey = [\"id\"]\nnewest_by = \"id\"".into();
    fixture.start();
    fixture.swap(&fixture.version("v2 none"), &[]);
    fixture.world.put(1..101, 30);
    fixture.wait_rows(100);
    let undone = fixture.command(&["plugin", "rollback", "stamp", "--replay-from-swap"]);
    let printed = String::from_utf8_lossy(&undone.stdout).into_owned();
    assert!(
        printed.contains("\"records\":100") && printed.contains("\"dead_letters\":10"),
        "{printed}"
    );
    let lines = |arguments: &[&str]| {
        let output = fixture.command(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text").lines().count()
    };
    assert_eq!(lines(&["dlq", "list", "--again", "1"]), 10);
    assert_eq!(lines(&["dlq", "list"]), 0);
    fixture.stop();
}
