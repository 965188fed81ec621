//! `shardmill dlq` through the real binary: records that could not be processed are listed, shown, exported and
//! deleted, and no other records are.

use std::path::Path;
use std::process::Output;

use crate::support::pipeline::PipelineToml;
use crate::support::{kill_until_it_ends, output, shardmill};
use serde_json::Value;

/// Pipeline that has run: two records are fine, one is not JSON, one is not text, one traps, and one is refused by
/// the table.
struct Ran {
    folder: tempfile::TempDir,
}

impl Ran {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let lines = b"{\"id\":1}\n{\"id\":\n\xff\xfe\n{\"id\":2,\"name\":\"trap\"}\n{\"id\":\"many\"}\n{\"id\":3}\n";
        std::fs::write(folder.path().join("cars.ndjson"), lines).expect("written");
        PipelineToml::new(folder.path(), "cars")
            .timing("")
            .file(Path::new("cars.ndjson"), "")
            .stage(
                "check",
                "hostile",
                "config = { trap_on = \"trap\", format = \"application/json\" }",
            )
            .route_all_to(&["mart"])
            .plain_sink("mart", "type = \"sqlite\"\npath = \"mart.db\"\ntable = \"cars\"")
            .write();
        let mart = crate::support::sqlite(&folder.path().join("mart.db"));
        mart.execute_batch("CREATE TABLE cars (id integer NOT NULL)").expect("a table");
        let ran = Self { folder };
        let run = ran.shardmill(&["run", "--until-caught-up"]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        ran
    }

    fn shardmill(&self, arguments: &[&str]) -> Output {
        output(shardmill(arguments).current_dir(self.folder.path()))
    }

    fn mart(&self) -> rusqlite::Connection {
        crate::support::sqlite(&self.folder.path().join("mart.db"))
    }

    /// Returns the ids in the table, ascending.
    fn ids(&self) -> Vec<i64> {
        let mart = self.mart();
        let mut query = mart.prepare("SELECT id FROM cars ORDER BY id").expect("a table");
        let ids = query.query_map([], |row| row.get(0)).expect("rows");
        ids.collect::<Result<_, _>>().expect("numbers")
    }

    /// Edits the pipeline's file.
    fn replace(&self, old: &str, new: &str) {
        let path = self.folder.path().join("pipeline.toml");
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.contains(old), "{old}");
        std::fs::write(&path, text.replace(old, new)).expect("written");
    }

    fn dlq(&self, arguments: &[&str]) -> String {
        let done = self.shardmill(&[&["dlq"], arguments].concat());
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {error}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// Returns the dead letters that these options select, as JSON.
    fn listed(&self, options: &[&str]) -> Vec<Value> {
        json_lines(&self.dlq(&[&["list", "--json"], options].concat()))
    }
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn dead_letters_are_listed_by_what_is_asked_for() {
    let ran = Ran::new();
    let places: Vec<Value> =
        ran.listed(&[]).iter().map(|dead_letter| dead_letter["place"].clone()).collect();
    let of = |place: &str| places.iter().filter(|it| *it == place).count();
    assert_eq!((of("stage:check"), of("stage:route"), of("sink:mart")), (1, 2, 1), "{places:?}");
    assert_eq!(ran.listed(&["--stage", "route"]).len(), 2);
    assert_eq!(ran.listed(&["--sink", "mart"]).len(), 1);
    assert_eq!(ran.listed(&["--reason", "trapped"]).len(), 1);
    assert_eq!(ran.listed(&["--shard", "elsewhere"]).len(), 0);
    assert_eq!(ran.listed(&["--limit", "3"]).len(), 3);
    let table = ran.dlq(&["list", "--limit", "3"]);
    assert!(table.contains("4 dead letters, 1 not shown"), "{table}");
}

#[test]
fn a_dead_letter_is_shown_with_all_that_is_known() {
    let ran = Ran::new();
    let [trapped] = &ran.listed(&["--stage", "check"])[..] else { panic!("one trapped") };
    let id = trapped["id"].to_string();
    let shown = ran.dlq(&["show", &id]);
    for expected in
        ["stage:check", "hostile@0.1.0", "trapped", r#"{"id":2,"name":"trap"}"#, "backtrace"]
    {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
    let missing = ran.shardmill(&["dlq", "show", "999"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("unknown dead letter 999"));
}

#[test]
fn an_export_has_each_dead_letter_byte_by_byte() {
    let ran = Ran::new();
    let said = ran.dlq(&["export", "-o", "letters.ndjson"]);
    assert!(said.contains("4 dead letters in letters.ndjson"), "{said}");
    let file = std::fs::read_to_string(ran.folder.path().join("letters.ndjson")).expect("a file");
    assert_eq!(file, ran.dlq(&["export"]));
    let originals: Vec<Value> =
        json_lines(&file).iter().map(|dead_letter| dead_letter["original"].clone()).collect();
    for expected in [
        serde_json::json!({ "text": "{\"id\":" }),
        serde_json::json!({ "base64": "//4=" }),
        serde_json::json!({ "text": "{\"id\":\"many\"}" }),
    ] {
        assert!(originals.contains(&expected), "{expected}: {originals:?}");
    }
}

#[test]
fn only_what_is_named_is_deleted() {
    let ran = Ran::new();
    let refused = ran.shardmill(&["dlq", "purge"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("use --all"));
    assert_eq!(ran.listed(&[]).len(), 4);
    assert!(ran.dlq(&["purge", "--stage", "route"]).contains("2 dead letters deleted"));
    let left = ran.listed(&[]);
    assert!(
        left.len() == 2 && left.iter().all(|dead_letter| dead_letter["place"] != "stage:route")
    );
    let id = left[0]["id"].to_string();
    assert!(ran.dlq(&["purge", &id]).contains("1 dead letters deleted"));
    assert!(ran.dlq(&["purge", "--all"]).contains("1 dead letters deleted"));
    assert!(ran.dlq(&["list"]).contains("0 dead letters"));
}

#[test]
fn a_pipeline_that_never_ran_is_named() {
    let ran = Ran::new();
    std::fs::remove_dir_all(ran.folder.path().join("state")).expect("removed");
    let refused = ran.shardmill(&["dlq", "list"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("pipeline cars has no dead letters"), "{said}");
}

#[test]
fn a_redrive_begins_where_a_record_failed() {
    let ran = Ran::new();
    let dead_letters = || {
        let dead_letter = |dead_letter: &Value| {
            let place = dead_letter["place"].as_str().expect("a place").to_owned();
            (dead_letter["id"].as_i64().expect("a number"), place)
        };
        let mut dead_letters: Vec<(i64, String)> =
            ran.listed(&[]).iter().map(dead_letter).collect();
        dead_letters.sort_unstable();
        dead_letters
    };
    let redriven = |arguments: &[&str]| {
        let printed = ran.dlq(&[&["redrive", "--json"], arguments].concat());
        let printed: Value = serde_json::from_str(&printed).expect("JSON");
        (printed["letters"].as_u64(), printed["failed_again"].as_u64())
    };
    let before = dead_letters();
    assert_eq!(before.len(), 4);

    // Nothing was fixed: each record fails again at the same place, and its dead letter keeps its number.
    assert_eq!(redriven(&["--all"]), (Some(4), Some(4)));
    assert_eq!(dead_letters(), before);

    // The plugin is fixed: one record passes the stage and is then refused by the table.
    ran.replace("trap_on = \"trap\"", "trap_on = \"nothing\"");
    assert_eq!(redriven(&["--stage", "check"]), (Some(1), Some(1)));
    let at_sink = ran.listed(&["--sink", "mart"]);
    assert_eq!((dead_letters().len(), at_sink.len()), (4, 2));
    let new = at_sink.iter().map(|dead_letter| dead_letter["id"].to_string());
    let shown: Vec<Value> = new
        .map(|id| serde_json::from_str(&ran.dlq(&["show", &id, "--json"])).expect("JSON"))
        .collect();
    let is_moved =
        |dead_letter: &&Value| dead_letter["original"]["text"] == "{\"id\":2,\"name\":\"trap\"}";
    let moved = shown.iter().find(is_moved).expect("it is at the sink now");
    let shard = moved["shard"].as_str().expect("a shard");
    assert!(shard.starts_with("file-"), "expected the shard of its record: {moved}");

    // The table is fixed as well: it accepts one row and will never accept the other.
    ran.mart().execute_batch("ALTER TABLE cars ADD COLUMN name text").expect("altered");
    assert_eq!(redriven(&["--sink", "mart"]), (Some(2), Some(1)));
    assert_eq!(ran.ids(), [1, 2, 3]);
    assert_eq!(dead_letters().len(), 3);

    // A redrive into a stage that was removed from the pipeline is refused before anything runs.
    ran.replace("name = \"route\"", "name = \"verify\"");
    let refused = ran.shardmill(&["dlq", "redrive", "--all"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("stage:route is no longer in"), "{said}");
    assert_eq!(redriven(&["--sink", "mart"]), (Some(1), Some(1)));
    let refused = ran.shardmill(&["dlq", "redrive"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--all"));
}

#[test]
fn a_redrive_that_is_killed_goes_on_where_it_was() {
    const RECORDS: u64 = 3_000;
    let ran = Ran::new();
    ran.dlq(&["purge", "--all"]);
    let lines: String = (0..RECORDS).map(|id| format!("{{\"id\":{id}}}\n")).collect();
    std::fs::write(ran.folder.path().join("more.ndjson"), lines).expect("written");
    ran.replace("path = \"cars.ndjson\"", "path = \"more.ndjson\"\nbatch = { records = 4 }");
    ran.replace("[timing]", "rejected_of_last_1000 = 1000\nrejected_in_a_row = 100000\n[timing]");
    ran.replace("table = \"cars\"", "table = \"cars\"\n[sink.commit]\nrows = 2");
    ran.mart()
        .execute_batch("DROP TABLE cars; CREATE TABLE cars (id integer NOT NULL CHECK (id < 0))")
        .expect("a table that takes nothing");
    let run = ran.shardmill(&["run", "--until-caught-up"]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let count = || ran.listed(&["--limit", "10000"]).len() as u64;
    assert_eq!(count(), RECORDS);
    ran.mart()
        .execute_batch("DROP TABLE cars; CREATE TABLE cars (id integer NOT NULL)")
        .expect("a table that takes all");

    kill_until_it_ends(6, || {
        let mut redrive = shardmill(&["dlq", "redrive", "--all"]);
        redrive.current_dir(ran.folder.path());
        redrive
    });
    assert_eq!(ran.ids(), (0..RECORDS as i64).collect::<Vec<_>>());
    assert_eq!(count(), 0);
}
