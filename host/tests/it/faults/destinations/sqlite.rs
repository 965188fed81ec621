//! The SQLite sink: texts that SQLite would alter, files that move, and tables that refuse rows.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use super::Lines;
use crate::support::world::{Pipeline, World};
use crate::support::{output, run, sqlite, wait_for};

fn lines(rows: &[&str], create: &str) -> Lines {
    let rows: Vec<String> = rows.iter().map(|row| (*row).to_owned()).collect();
    let lines = Lines::new(&rows, |folder| {
        let path = folder.join("mart.db");
        format!("type = \"sqlite\"\npath = \"{}\"\ntable = \"t\"", path.display())
    });
    sqlite(&lines.at("mart.db")).execute_batch(create).expect(create);
    lines
}

#[test]
fn fault_29_texts_that_sqlite_would_make_numbers_of_are_dead_letters() {
    let rows = [
        r#"{"id":1,"zip":"01234","kind":"a","price":"9.50"}"#,
        r#"{"id":2,"zip":"15E2621","kind":"a","price":"9"}"#,
        r#"{"id":3,"zip":"W1A 1AA","kind":"007","price":"free"}"#,
        r#"{"id":4,"zip":"W1A 1AA","kind":"a","price":"free"}"#,
        r#"{"id":5,"zip":null,"kind":"b","price":"EUR 9"}"#,
        r#"{"id":6,"zip":"x","kind":"b","price":9}"#,
    ];
    let lines = lines(
        &rows,
        "CREATE TABLE t (id INTEGER, zip STRING, kind ENUM(2), price MONEY, \"any\" ANY)",
    );
    let (sound, said) = lines.check(&[]);
    assert!(sound, "{said}");
    for column in ["zip", "kind", "price", "any"] {
        let warning = format!("column \"{column}\" of table t");
        assert!(said.contains("warning") && said.contains(&warning), "{column}: {said}");
    }
    lines.run();
    let mart = sqlite(&lines.at("mart.db"));
    let mut query =
        mart.prepare("SELECT id || zip || kind || price FROM t ORDER BY id").expect("sql");
    let found = query.query_map((), |row| row.get::<_, Option<String>>(0)).expect("rows");
    let found: Vec<_> = found.map(|row| row.expect("a row")).collect();
    let kept = [Some("4W1A 1AAafree".to_owned()), None, Some("6xb9".to_owned())];
    assert_eq!(found, kept);
    let reasons = lines.reasons();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons.iter().all(|reason| reason.contains("TEXT keeps it")), "{reasons:?}");
}

/// Opens the data mart, reads it and closes it, as any other program does.
fn rows_that_python_reads(world: &World) -> u64 {
    let script = "import sqlite3, sys
mart = sqlite3.connect(sys.argv[1])
print(mart.execute('SELECT count(*) FROM rows').fetchone()[0])
mart.close()";
    let mut python = Command::new("python3");
    let read = output(python.arg("-c").arg(script).arg(world.folder.path().join("mart.db")));
    let printed = String::from_utf8_lossy(&read.stdout).into_owned();
    printed.trim().parse().unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&read.stderr)))
}

/// Commands that look at the database from within the process that writes to it. POSIX file locks end when the
/// process closes any descriptor of the file, even one that SQLite did not open. The next program that opens the
/// database would then believe that it is the last user, and would delete the write-ahead log with rows that exist
/// only there.
#[test]
fn fault_29_a_look_at_an_open_database_leaves_its_locks() {
    let world = World::new(1);
    let pipeline = Pipeline::default();
    let file = world.pipeline(&pipeline);
    let mut process = world.start(&pipeline);
    world.put(0..10, 3);
    world.wait_rows(10);
    let plugin = crate::support::plugin("route-json");
    let mut rows = 10;
    for look in [
        &["check", "--diff", &file][..],
        &["reload", &file, "--dry-run"],
        &["plugin", "swap", "route", &plugin, "--pipeline", &file, "--dry-run"],
        &["reload", &file],
    ] {
        let looked = run(look);
        assert!(!String::from_utf8_lossy(&looked.stderr).contains("cannot"), "{look:?}");
        assert_eq!(rows_that_python_reads(&world), rows, "{look:?}");
        world.put(rows..rows + 10, 3);
        rows += 10;
        wait_for(&format!("{rows} rows after {look:?}"), || rows_that_python_reads(&world) == rows);
    }
    process.0.kill().expect("killed");
    process.0.wait().expect("ended");
    world.assert_each_once_in_order(rows);
}

#[test]
fn fault_29_a_file_that_is_moved_away_is_noticed_and_its_rows_come_when_it_is_back() {
    let world = World::new(1);
    let pipeline = Pipeline::default();
    let run = world.start(&pipeline);
    world.put(0..10, 3);
    world.wait_rows(10);
    let mart = world.folder.path().join("mart.db");
    let away = world.folder.path().join("away.db");
    std::fs::rename(&mart, &away).expect("moved");
    world.put(10..20, 3);
    wait_for("the move to be noticed", || world.logged("was moved or deleted"));
    assert!(!mart.exists(), "no other file is created in its place");
    std::fs::rename(&away, &mart).expect("moved back");
    world.wait_rows(20);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(20);
}

#[test]
fn fault_29_a_file_that_is_replaced_is_noticed() {
    let world = World::new(1);
    let mut run = world.start(&Pipeline::default());
    world.put(0..10, 3);
    world.wait_rows(10);
    let folder = world.folder.path();
    // A backup: complete, without a write-ahead log.
    let sql = format!("VACUUM INTO '{}'", folder.join("backup.db").display());
    world.mart().execute_batch(&sql).expect("copied");
    world.put(10..20, 3);
    world.wait_rows(20);
    std::fs::create_dir(folder.join("old")).expect("a folder");
    for file in ["mart.db", "mart.db-wal", "mart.db-shm"] {
        let _ = std::fs::rename(folder.join(file), folder.join("old").join(file));
    }
    std::fs::rename(folder.join("backup.db"), folder.join("mart.db")).expect("restored");
    world.put(20..30, 3);
    wait_for("the file to be noticed", || world.logged("was replaced"));
    // The sink's position is before the checkpoint; a person must decide what to do.
    assert!(!run.wait().success());
    assert_eq!(world.rows(), 10);
}

#[test]
fn fault_08_a_row_of_a_deferred_foreign_key_is_a_dead_letter_alone() {
    let rows = [
        r#"{"id":1,"parent":2}"#,
        r#"{"id":2,"parent":null}"#,
        r#"{"id":3,"parent":99}"#,
        r#"{"id":4,"parent":1}"#,
    ];
    let lines = lines(
        &rows,
        "CREATE TABLE t (id INTEGER PRIMARY KEY,
             parent INTEGER REFERENCES t DEFERRABLE INITIALLY DEFERRED)",
    );
    lines.run();
    let mart = sqlite(&lines.at("mart.db"));
    let ids = "SELECT group_concat(id) FROM (SELECT id FROM t ORDER BY id)";
    let ids: String = mart.query_row(ids, (), |row| row.get(0)).expect("ids");
    assert_eq!(ids, "1,2,4");
    let reasons = lines.reasons();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].contains("deferred foreign key"), "{reasons:?}");
}

/// Returns what `check` prints about a table.
fn checked(create: &str) -> (bool, String) {
    lines(&[r#"{"id":1}"#], create).check(&[])
}

#[test]
fn fault_31_check_finds_tables_that_take_no_row() {
    let (sound, said) = checked("CREATE TABLE u (id INTEGER); CREATE VIEW t AS SELECT id FROM u");
    assert!(!sound && said.contains("INSTEAD OF"), "{said}");
    let (sound, said) = checked(
        "CREATE TABLE u (id INTEGER); CREATE VIEW t AS SELECT id FROM u;
         CREATE TRIGGER i INSTEAD OF INSERT ON t BEGIN INSERT INTO u VALUES (new.id); END",
    );
    assert!(sound, "{said}");
    let (sound, said) = checked(
        "CREATE TABLE t (id INTEGER);
         CREATE TRIGGER no BEFORE INSERT ON t BEGIN SELECT RAISE(ABORT, 'no'); END",
    );
    assert!(!sound && said.contains("\"no\"") && said.contains("every row"), "{said}");
    let (sound, said) = checked(
        "CREATE TABLE t (id INTEGER);
         CREATE TRIGGER odd BEFORE INSERT ON t WHEN new.id % 2 = 1 BEGIN
            SELECT RAISE(ROLLBACK, 'odd'); END",
    );
    assert!(sound && said.contains("warning") && said.contains("RAISE(ABORT)"), "{said}");
    let (sound, said) = checked("CREATE TABLE t (id INTEGER UNIQUE ON CONFLICT ROLLBACK)");
    assert!(sound && said.contains("warning") && said.contains("ON CONFLICT ABORT"), "{said}");
    let (sound, said) = checked(
        "CREATE TABLE t (id INTEGER); CREATE TABLE audit (n UNIQUE ON CONFLICT ROLLBACK);
         CREATE TRIGGER note AFTER INSERT ON t BEGIN INSERT INTO audit VALUES (new.id); END",
    );
    assert!(sound && said.contains("table audit rolls back whole transactions"), "{said}");
    let (sound, said) = checked("CREATE TABLE t (id INTEGER UNIQUE ON CONFLICT ABORT)");
    assert!(sound && !said.contains("rolls back"), "{said}");
    let (sound, said) = checked("CREATE VIRTUAL TABLE t USING dbstat");
    assert!(!sound, "{said}");
}

#[test]
fn fault_31_check_finds_a_file_and_a_folder_that_cannot_be_written() {
    let lines = lines(&[r#"{"id":1}"#], "CREATE TABLE t (id INTEGER)");
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set");
    };
    let (mart, folder) = (lines.at("mart.db"), lines.folder.path().to_owned());
    mode(&mart, 0o444);
    let (sound, said) = lines.check_as_nobody();
    assert!(!sound && said.contains("cannot write"), "{said}");
    // The write-ahead log lies beside the file.
    mode(&mart, 0o666);
    let (sound, said) = lines.check_as_nobody();
    assert!(!sound && said.contains("cannot write files in"), "{said}");
    std::fs::remove_file(&mart).expect("removed");
    let (sound, said) = lines.check_as_nobody();
    assert!(!sound && said.contains(&folder.display().to_string()), "{said}");
}

#[test]
fn fault_31_check_makes_no_file_and_no_table() {
    let lines = Lines::new(&[r#"{"id":1}"#.to_owned()], |folder| {
        let path = folder.join("new/mart.db");
        format!("type = \"sqlite\"\npath = \"{}\"\ntable = \"t\"\ncreate = true", path.display())
    });
    let (_, said) = lines.check(&[]);
    assert!(!lines.at("new").exists(), "{said}");
}

/// With `ON CONFLICT FAIL`, SQLite keeps what the statement did before the error. Regression: the row was in the
/// table, and there was a dead letter for it as well.
#[test]
fn fault_29_of_a_row_that_fails_halfway_nothing_is_left() {
    let triggers = [
        "CREATE TRIGGER one AFTER INSERT ON t WHEN NEW.id % 3 = 0
         BEGIN INSERT INTO audit VALUES (NEW.id); SELECT RAISE(FAIL, 'no'); END",
        "CREATE TRIGGER one AFTER INSERT ON t BEGIN INSERT INTO audit VALUES (NEW.id % 3); END",
    ];
    for (trigger, kept) in triggers.into_iter().zip([vec![1, 2, 4, 5, 7], vec![1, 2, 3]]) {
        let rows: Vec<String> = (1..=7).map(|id| format!("{{\"id\":{id}}}")).collect();
        let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        let lines = lines(
            &rows,
            &format!(
                "CREATE TABLE t (id INTEGER); CREATE TABLE audit (n UNIQUE ON CONFLICT FAIL); {trigger}"
            ),
        );
        lines.run();
        let mart = sqlite(&lines.at("mart.db"));
        let mut query = mart.prepare("SELECT id FROM t ORDER BY id").expect("sql");
        let found = query.query_map((), |row| row.get::<_, i64>(0)).expect("rows");
        let found: Vec<i64> = found.map(|row| row.expect("a row")).collect();
        assert_eq!(found, kept, "{trigger}");
        assert_eq!(lines.reasons().len(), 7 - kept.len(), "{trigger}");
        if kept.len() == 5 {
            let audit: i64 = mart
                .query_row("SELECT count(*) FROM audit", (), |row| row.get(0))
                .expect("a count");
            assert_eq!(audit, 0, "{trigger}");
        }
    }
}

#[test]
fn wall_02_a_text_of_a_sqlite_trigger_is_cut_and_one_line() {
    let text = format!("no\nerror: forged{}", "x".repeat(500 << 10));
    let rows: Vec<String> = (1..=7).map(|id| format!("{{\"id\":{id}}}")).collect();
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    let lines = lines(
        &rows,
        &format!(
            "CREATE TABLE t (id INTEGER);
             CREATE TRIGGER odd BEFORE INSERT ON t WHEN NEW.id = 3
             BEGIN SELECT RAISE(ABORT, '{text}'); END"
        ),
    );
    lines.run();
    let reasons = lines.reasons();
    let [reason] = &reasons[..] else { panic!("{} dead letters", reasons.len()) };
    assert!(reason.contains(r"no\nerror: forgedxxx"), "{reason:.200}");
    assert!(reason.ends_with("bytes in all)") && reason.len() < 9 << 10, "{} bytes", reason.len());
}
