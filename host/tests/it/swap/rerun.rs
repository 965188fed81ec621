//! What a bad version had done, done again by the one before it.

use super::rig::Rig;
use crate::support::{postgres, sqlite};

#[test]
fn what_a_bad_version_wrote_is_rerun() {
    let mut rig = Rig::new(3);
    rig.mode = "mode = \"upsert\"\nkey = [\"id\"]\nnewest_by = \"id\"".into();
    // A second sink that appends: it gets a table beside.
    let folder = rig.world.folder.path().display().to_string();
    rig.more = format!(
        "[[sink]]\nname = \"copy\"\ntype = \"sqlite\"\npath = \"{folder}/copy.db\"\n\
         table = \"rows\"\ncreate = true\n[sink.commit]\nlinger = \"50 ms\""
    );
    rig.routes = "[\"mart\", \"copy\"]".into();
    rig.start();
    rig.world.put(0..1_000, 30);
    rig.wait_rows(1_000);
    rig.swap(&rig.version("v2 other 1"), &[]);
    rig.world.put(1_000..2_000, 30);
    rig.wait_rows(2_000);
    let wrong = format!("SELECT count(*) FROM {} WHERE n <> id", rig.table);
    assert_eq!(postgres(&wrong), ["1000"]);

    let undone = rig.command(&["plugin", "rollback", "stamp", "--replay-from-swap"]);
    let told = String::from_utf8_lossy(&undone.stdout).into_owned();
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    assert!(told.contains("\"records\":1000") && told.contains("in place, in table"), "{told}");
    rig.world.put(2_000..2_500, 30);
    rig.wait_rows(2_500);
    rig.stop();

    assert_eq!(postgres(&wrong), ["0"]);
    let rows = rig.rows();
    let mut ids: Vec<u64> = rows.iter().map(|row| row.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..2_500).collect::<Vec<_>>());
    assert!(rows.iter().all(|row| row.version == "v1"));
    let copy = sqlite(&rig.world.folder.path().join("copy.db"));
    let count = |sql: &str| copy.query_row(sql, (), |row| row.get::<_, u64>(0)).expect("a count");
    assert_eq!(count("SELECT count(*) FROM rows"), 2_500);
    assert_eq!(count("SELECT count(DISTINCT id) FROM rows_again_1 WHERE n = id"), 1_000);
}

#[test]
fn what_is_refused_in_a_rerun_is_shown() {
    let mut rig = Rig::new(1);
    std::fs::write(rig.stage_file(), super::rig::stamp("v1 reject 10")).expect("written");
    rig.mode = "mode = \"upsert\"\nkey = [\"id\"]\nnewest_by = \"id\"".into();
    rig.start();
    rig.swap(&rig.version("v2 none"), &[]);
    rig.world.put(1..101, 30);
    rig.wait_rows(100);
    let undone = rig.command(&["plugin", "rollback", "stamp", "--replay-from-swap"]);
    let told = String::from_utf8_lossy(&undone.stdout).into_owned();
    assert!(told.contains("\"records\":100") && told.contains("\"dead_letters\":10"), "{told}");
    let lines = |arguments: &[&str]| {
        let output = rig.command(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text").lines().count()
    };
    assert_eq!(lines(&["dlq", "list", "--again", "1"]), 10);
    assert_eq!(lines(&["dlq", "list"]), 0);
    rig.stop();
}
