//! Redrives that are interrupted, or that run beside a pipeline whose files have changed.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::{Folder, Locked};
use crate::support::pipeline::PipelineToml;
use crate::support::{postgres, sqlite, wait_for};
use crate::swap::fixture::{Fixture, stamp};

/// Lines of `[pipeline]` that allow any share of records to fail.
const ANY_SHARE: &str = "rejected_of_last_1000 = 1000\nrejected_in_a_row = 100000";

/// Returns a stage that traps on records that contain a word.
fn trap_on(word: &str) -> String {
    format!("config = {{ trap_on = \"{word}\", format = \"application/json\" }}")
}

#[test]
fn fault_10_copies_go_on_beside_a_redrive_that_was_broken_off() {
    let cars = Folder::new("fault-10");
    let table = cars.table("cars");
    postgres(&format!("CREATE TABLE {table} (id bigint NOT NULL, x text)"));
    let rows = cars.path().join("rows.ndjson");
    let lines = "{\"id\":1,\"x\":\"trap\"}\ntrap: no object\n";
    std::fs::write(&rows, lines).expect("written");
    PipelineToml::new(cars.path(), &cars.name)
        .pipeline(ANY_SHARE)
        .file(&rows, "")
        .stage("check", "hostile", &trap_on("trap"))
        .route_all_to(&["mart"])
        .postgres("mart", &table)
        .table("[dead_letters]\nsinks = [\"copies\"]")
        .sink(
            "copies",
            "type = \"sqlite\"\npath = \"copies.db\"\ntable = \"letters\"\ncreate = true",
        )
        .write();
    cars.ok(&["run"]);
    assert_eq!(cars.dead_letters(), ["stage:check", "stage:check"]);
    let copied = || -> Vec<String> {
        let copies = sqlite(&cars.path().join("copies.db"));
        let mut query =
            copies.prepare("SELECT place FROM letters ORDER BY rowid").expect("a table");
        let places = query.query_map([], |row| row.get(0)).expect("rows");
        places.collect::<Result<_, _>>().expect("texts")
    };
    assert_eq!(copied(), ["stage:check", "stage:check"]);

    // Now fixed: one dead letter becomes a row that the table accepts later, the other fails at the next stage.
    cars.replace("trap_on = \"trap\"", "trap_on = \"nothing\"");
    let lock = Locked::table(&table);
    let redrive = cars.start(&["dlq", "redrive", "--all"]);
    wait_for("the redrive to fail again", || {
        cars.count_in_state("SELECT count(*) FROM dead_letter WHERE stream GLOB 'letters:*'") == 1
    });
    // Kills the process, as a crash does.
    drop(redrive);
    drop(lock);
    assert_eq!(cars.dead_letters(), ["stage:check", "stage:check"]);

    std::fs::write(&rows, format!("{lines}one more that is no object\n")).expect("written");
    cars.ok(&["run"]);
    assert_eq!(copied(), ["stage:check", "stage:check", "stage:route"], "copies went on");
    assert_eq!(cars.redriven(&["--all"]), (2, 1, 0));
    assert_eq!(cars.dead_letters(), ["stage:route", "stage:route"]);
    cars.ok(&["run"]);
    let copied = copied();
    assert_eq!((copied.len(), copied[3].as_str()), (4, "stage:route"), "{copied:?}");
    assert_eq!(postgres(&format!("SELECT count(*) FROM {table}")), ["1"]);
    postgres(&format!("DROP TABLE {table}"));
}

/// Number of records of a redrive that is killed: enough for the first rows to appear before all are written.
const HALF_OF: u64 = 600;

/// Leaves dead letters of two sinks for the same records, with a redrive killed halfway: both sinks accept rows now,
/// but `b` waits for a lock.
fn half_redriven(test: &str) -> (Folder, String) {
    let cars = Folder::new(test);
    let b = cars.table("b");
    postgres(&format!("CREATE TABLE {b} (id bigint NOT NULL CHECK (id < 0))"));
    let mart = sqlite(&cars.path().join("mart.db"));
    mart.execute_batch("CREATE TABLE a (id integer NOT NULL CHECK (id < 0))").expect("a table");
    let mut lines = String::new();
    for id in 0..HALF_OF {
        writeln!(lines, "{{\"id\":{id}}}").expect("text");
    }
    let rows = cars.path().join("rows.ndjson");
    std::fs::write(&rows, lines).expect("written");
    PipelineToml::new(cars.path(), &cars.name)
        .pipeline(ANY_SHARE)
        .file(&rows, "")
        .route_all_to(&["a", "b"])
        .sqlite("a", "a")
        .postgres("b", &b)
        .write();
    cars.ok(&["run"]);
    assert_eq!(cars.dead_letters().len() as u64, 2 * HALF_OF);
    mart.execute_batch("DROP TABLE a; CREATE TABLE a (id integer NOT NULL)").expect("a table");
    postgres(&format!("ALTER TABLE {b} DROP CONSTRAINT {b}_id_check"));
    let lock = Locked::table(&b);
    let redrive = cars.start(&["dlq", "redrive", "--all"]);
    let begun = Instant::now();
    while rows_of(&cars) < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no row is written");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Kills the process, as a crash does.
    drop(redrive);
    drop(lock);
    assert!(rows_of(&cars) < HALF_OF, "the redrive ended before the kill");
    (cars, b)
}

fn rows_of(cars: &Folder) -> u64 {
    let mart = sqlite(&cars.path().join("mart.db"));
    mart.query_row("SELECT count(*) FROM a", [], |row| row.get(0)).expect("a count")
}

fn assert_each_once(cars: &Folder) {
    let mart = sqlite(&cars.path().join("mart.db"));
    let distinct: u64 =
        mart.query_row("SELECT count(DISTINCT id) FROM a", [], |row| row.get(0)).expect("a count");
    assert_eq!((rows_of(cars), distinct), (HALF_OF, HALF_OF));
}

#[test]
fn fault_24_a_redrive_that_ran_half_is_finished_without_a_sink_that_is_gone() {
    let (cars, b) = half_redriven("fault-24");
    let text = std::fs::read_to_string(cars.file()).expect("read");
    let (before, _) = text.split_once("[[sink]]\nname = \"b\"").expect("the sink");
    std::fs::write(cars.file(), before.replace("[\"a\", \"b\"]", "[\"a\"]")).expect("written");

    for arguments in [&["--all"][..], &["--sink", "a"]] {
        let said = cars.refused(&[&["dlq", "redrive"], arguments].concat());
        assert!(said.contains("--without b"), "{said}");
    }
    let said = cars.refused(&["dlq", "redrive", "--without", "a"]);
    assert!(said.contains("it is in the pipeline"), "{said}");
    assert_eq!(cars.redriven(&["--without", "b"]), (HALF_OF, 0, HALF_OF));
    assert_each_once(&cars);
    assert!(cars.dead_letters().iter().all(|place| place == "sink:b"));
    // The dead letters that are left wait for no other sink.
    assert_eq!(cars.redriven(&["--all"]), (0, 0, 0));

    // The sink is back: it has each row once as well.
    std::fs::write(cars.file(), text).expect("written");
    assert_eq!(cars.redriven(&["--all"]), (HALF_OF, 0, 0));
    assert_each_once(&cars);
    let counts = format!("SELECT count(*) || ' ' || count(DISTINCT id) FROM {b}");
    assert_eq!(postgres(&counts), [format!("{HALF_OF} {HALF_OF}")]);
    assert_eq!(cars.dead_letters(), Vec::<String>::new());
    assert_eq!(cars.count_in_state("SELECT count(*) FROM ledger WHERE stream GLOB 'letters:*'"), 0);
    postgres(&format!("DROP TABLE {b}"));
}

#[test]
fn fault_25_a_redrive_that_ran_half_waits_for_a_renamed_sink_and_goes_on_as_it() {
    let (cars, b) = half_redriven("fault-25-half");
    cars.replace("[\"a\", \"b\"]", "[\"c\", \"b\"]");
    cars.replace("name = \"a\"", "name = \"c\"");
    let refused = cars.refused(&["dlq", "redrive", "--all"]);
    assert!(
        refused.contains("sink c is new at a destination to which sink a has written"),
        "{refused}"
    );
    cars.replace("name = \"c\"", "name = \"c\"\nrenamed_from = \"a\"");
    let refused = cars.refused(&["dlq", "redrive", "--all"]);
    assert!(refused.contains("start it once"), "{refused}");
    cars.ok(&["run"]);
    cars.redriven(&["--all"]);
    assert_each_once(&cars);
    let counts = format!("SELECT count(*) || ' ' || count(DISTINCT id) FROM {b}");
    assert_eq!(postgres(&counts), [format!("{HALF_OF} {HALF_OF}")]);
    postgres(&format!("DROP TABLE {b}"));
}

#[test]
fn fault_24_what_is_left_for_a_sink_can_be_purged() {
    let (cars, b) = half_redriven("fault-24-purge");
    let text = std::fs::read_to_string(cars.file()).expect("read");
    let (before, _) = text.split_once("[[sink]]\nname = \"b\"").expect("the sink");
    std::fs::write(cars.file(), before.replace("[\"a\", \"b\"]", "[\"a\"]")).expect("written");
    cars.redriven(&["--without", "b"]);
    assert!(cars.ok(&["dlq", "purge", "--all"]).contains(&format!("{HALF_OF} dead letters")));
    assert_eq!(cars.dead_letters(), Vec::<String>::new());
    assert_eq!(cars.count_in_state("SELECT count(*) FROM redrive"), 0);
    postgres(&format!("DROP TABLE {b}"));
}

#[test]
fn fault_24_a_redrive_that_nothing_of_has_run_is_cancelled() {
    let cars = Folder::new("fault-24-new");
    let mart = sqlite(&cars.path().join("mart.db"));
    mart.execute_batch(
        "CREATE TABLE a (id integer NOT NULL CHECK (id < 0));
         CREATE TABLE b (id integer NOT NULL CHECK (id < 0));
         CREATE TABLE c (id integer NOT NULL)",
    )
    .expect("tables");
    let rows = cars.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\n{\"id\":2}\n").expect("written");
    PipelineToml::new(cars.path(), &cars.name)
        .pipeline(ANY_SHARE)
        .file(&rows, "")
        .route_all_to(&["a", "b"])
        .sqlite("a", "a")
        .sqlite("b", "b")
        .write();
    cars.ok(&["run"]);
    cars.replace("name = \"b\"", "name = \"c\"");
    cars.replace("table = \"b\"", "table = \"c\"");
    cars.replace("[\"a\", \"b\"]", "[\"a\", \"c\"]");
    let said = cars.refused(&["dlq", "redrive", "--all"]);
    assert!(said.contains("sink:b is no longer in the pipeline"), "{said}");
    assert_eq!(cars.redriven(&["--sink", "a"]), (2, 2, 0));
    assert_eq!(cars.dead_letters().len(), 4);
}

#[test]
fn fault_24_dead_letters_of_a_stage_that_is_gone_stay_dead_letters() {
    let cars = Folder::new("fault-24-stage");
    let table = cars.table("cars");
    postgres(&format!("CREATE TABLE {table} (id bigint NOT NULL)"));
    let rows = cars.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1,\"x\":\"trap\"}\n{\"id\":2,\"x\":\"trap\"}\n")
        .expect("written");
    postgres(&format!("ALTER TABLE {table} ADD COLUMN x text"));
    PipelineToml::new(cars.path(), &cars.name)
        .pipeline(ANY_SHARE)
        .file(&rows, "batch = { records = 1 }")
        .stage("check", "hostile", &trap_on("trap"))
        .route_all_to(&["mart"])
        .postgres("mart", &table)
        .write();
    cars.ok(&["run"]);
    cars.replace("trap_on = \"trap\"", "trap_on = \"nothing\"");
    let lock = Locked::table(&table);
    let redrive = cars.start(&["dlq", "redrive", "--all"]);
    wait_for("the redrive to run", || {
        cars.count_in_state("SELECT count(*) FROM shard WHERE stream GLOB 'letters:*'") > 0
    });
    // The message names a redrive, not the pipeline, and does not suggest another name or state folder: those would
    // have no such dead letters.
    let said = cars.refused(&["dlq", "redrive", "--all"]);
    let running =
        format!("another redrive or replay of pipeline {} is running, as process", cars.name);
    assert!(said.contains(&format!("{running} {}", redrive.0.id())), "{said}");
    assert!(said.contains("wait for it to end") && !said.contains("state_dir"), "{said}");
    drop(redrive);
    drop(lock);
    cars.replace("name = \"check\"", "name = \"verify\"");
    let said = cars.refused(&["dlq", "redrive", "--all"]);
    assert!(said.contains("--without check"), "{said}");
    let (dead_letters, failed_again, _) = cars.redriven(&["--without", "check"]);
    assert_eq!(failed_again, 0);
    // With the old name restored, the rest is delivered.
    cars.replace("name = \"verify\"", "name = \"check\"");
    assert_eq!(cars.redriven(&["--all"]), (2 - dead_letters, 0, 0));
    let counts = format!("SELECT count(*) || ' ' || count(DISTINCT id) FROM {table}");
    assert_eq!(postgres(&counts), ["2 2"]);
    postgres(&format!("DROP TABLE {table}"));
}

#[test]
fn fault_28_a_redrive_beside_a_pipeline_runs_what_runs_and_notes_nothing() {
    let mut fixture = Fixture::new(1);
    fixture.stage = "[stage.limits]\nrecord_time = \"400 ms\"".into();
    std::fs::write(fixture.stage_file(), stamp("v1 reject 10")).expect("written");
    fixture.start();
    fixture.world.put(1..51, 10);
    fixture.wait_rows(45);
    let change = fixture.swap(&fixture.version("v2 none"), &[]);
    assert_eq!(change["number"], 1);

    // The running pipeline has not loaded what the files say now.
    std::fs::write(fixture.stage_file(), stamp("v3 other 1")).expect("written");
    fixture.stage = "[stage.limits]\nrecord_time = \"300 ms\"".into();
    fixture.write_pipeline();
    let noted = |what: &str| {
        let path = fixture.world.folder.path().join("state").join(fixture.name()).join("state.db");
        let sql = match what {
            "components" => {
                "SELECT group_concat(digest) FROM (SELECT digest FROM component ORDER BY 1)"
            }
            "changes" => "SELECT group_concat(number || outcome) FROM change",
            "ledger" => "SELECT group_concat(stream || generation) FROM ledger",
            _ => "SELECT declared || running FROM running",
        };
        sqlite(&path).query_row(sql, [], |row| row.get::<_, Option<String>>(0)).expect(sql)
    };
    let all = || ["running", "changes", "ledger", "components"].map(noted);
    let before = all();
    let redriven = fixture.command(&["dlq", "redrive", "--all"]);
    let said = String::from_utf8_lossy(&redriven.stderr).into_owned();
    assert!(redriven.status.success(), "{said}");
    assert_eq!(all(), before);
    fixture.wait_rows(50);
    let rows = fixture.rows();
    let redriven: Vec<_> = rows.iter().filter(|row| row.id % 10 == 0).collect();
    assert!(redriven.len() == 5 && redriven.iter().all(|row| row.version == "v2"), "{redriven:?}");
    assert_eq!(fixture.history()[0]["outcome"], "promoted");
    let undone = fixture.command(&["plugin", "rollback", "stamp"]);
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    fixture.stop();
}

#[test]
fn fault_28_a_redrive_is_refused_where_a_sink_was_changed_in_the_file_alone() {
    let mut fixture = Fixture::new(1);
    std::fs::write(fixture.stage_file(), stamp("v1 reject 10")).expect("written");
    fixture.start();
    fixture.world.put(1..11, 10);
    fixture.wait_rows(9);
    let table = fixture.table.clone();
    fixture.table = format!("{table}_other");
    // The name of the pipeline stays the same.
    let text = std::fs::read_to_string(fixture.pipeline_file()).expect("read");
    let text = text.replace(&format!("table = \"{table}\""), "table = \"elsewhere\"");
    std::fs::write(fixture.pipeline_file(), text).expect("written");
    fixture.table = table;
    let redriven = fixture.command(&["dlq", "redrive", "--all"]);
    let said = String::from_utf8_lossy(&redriven.stderr).into_owned();
    assert!(
        !redriven.status.success() && said.contains("sink mart differs from the sink of"),
        "{said}"
    );
    fixture.stop();
}

#[test]
fn fault_11_a_rollback_replays_records_of_the_stream_alone() {
    let mut fixture = Fixture::new(2);
    fixture.mode = "mode = \"upsert\"\nkey = [\"id\"]\nnewest_by = \"id\"".into();
    std::fs::write(fixture.stage_file(), stamp("v1 reject 10")).expect("written");
    fixture.start();
    fixture.world.put(1..51, 10);
    fixture.wait_rows(45);
    fixture.swap(&fixture.version("v2 other 1"), &[]);
    fixture.world.put(51..101, 10);
    fixture.wait_rows(95);
    // The bad version redrives beside the pipeline: the ledger has a shard for the redrive that no stream has.
    let redriven = fixture.command(&["dlq", "redrive", "--all"]);
    assert!(redriven.status.success(), "{}", String::from_utf8_lossy(&redriven.stderr));
    fixture.wait_rows(100);
    let undone = fixture.command(&["plugin", "rollback", "stamp", "--replay-from-swap"]);
    let said = String::from_utf8_lossy(&undone.stdout).into_owned();
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    assert!(said.contains("\"records\":50"), "{said}");
    fixture.stop();
    let wrong = postgres(&format!(
        "SELECT id FROM {} WHERE id > 50 AND id % 10 <> 0 AND n <> id",
        fixture.table
    ));
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn a_purged_dead_letter_of_a_stage_is_not_rerun_for_sinks_that_lag() {
    let cars = Folder::new("purged");
    let table = cars.table("cars");
    postgres(&format!("CREATE TABLE {table} (id bigint NOT NULL, x text)"));
    sqlite(&cars.path().join("mart.db"))
        .execute_batch("CREATE TABLE a (id integer NOT NULL, x text)")
        .expect("a table");
    let rows = cars.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\n{\"id\":2,\"x\":\"trap\"}\n{\"id\":3}\n").expect("written");
    PipelineToml::new(cars.path(), &cars.name)
        .pipeline(ANY_SHARE)
        .file(&rows, "batch = { records = 1 }")
        .stage("check", "hostile", &trap_on("trap"))
        .route_all_to(&["a", "b"])
        .sqlite("a", "a")
        .postgres("b", &table)
        .write();
    let lock = Locked::table(&table);
    let run = cars.start(&["run"]);
    wait_for("the rows of the first sink", || rows_of(&cars) == 2);
    drop(run);
    drop(lock);
    assert!(cars.ok(&["dlq", "purge", "--all"]).contains("1 dead letters deleted"));
    cars.replace("trap_on = \"trap\"", "trap_on = \"nothing\"");
    cars.ok(&["run"]);
    assert_eq!(rows_of(&cars), 2);
    assert_eq!(postgres(&format!("SELECT count(*) FROM {table}")), ["2"]);
    postgres(&format!("DROP TABLE {table}"));
}
