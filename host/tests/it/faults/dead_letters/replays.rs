//! Replays that replace rows: only rows of their own sink, and each record once, whatever was redriven before or is
//! redriven later.

use std::time::Duration;

use super::Folder;
use crate::sql_sinks::proxy::{Cut, Proxy};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, postgres, postgres_url, serve_stream, sqlite, wait_for};
use crate::swap::fixture::stamp;

const COLUMNS: &str = "shardmill_pipeline text, shardmill_shard text, shardmill_sequence numeric, \
                       shardmill_arrived_at timestamptz";

/// Stream whose records a pipeline has run, and the times between which they arrived.
struct Ran {
    cars: Folder,
    table: String,
    from: String,
    to: String,
    _stream: Process,
}

impl Ran {
    /// Adds columns to the table, and sinks that also get the rows.
    fn new(test: &str, columns: &str, sinks: &[(&str, String)], records: u64) -> Self {
        Self::by(test, columns, sinks, records, &postgres_url())
    }

    fn by(test: &str, columns: &str, sinks: &[(&str, String)], records: u64, url: &str) -> Self {
        let cars = Folder::new(test);
        let table = cars.table("cars");
        postgres(&format!(
            "CREATE TABLE {table} (id bigint NOT NULL, key text, n bigint, version text, {COLUMNS}{columns})"
        ));
        std::fs::write(cars.path().join("stage.wasm"), stamp("v1 reject 10")).expect("written");
        let stream = serve_stream(&cars.path().join("state"));
        let mut names = vec!["mart"];
        names.extend(sinks.iter().map(|(name, _)| *name));
        let stage = format!("routes = {{ all = {names:?} }}");
        let source = "format = \"application/json\"\npoll_interval = \"20 ms\"";
        let mart =
            format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\"\nlineage = true");
        let mut file = PipelineToml::new(cars.path(), &cars.name)
            .stream("cars", "embedded", source)
            .stage("stamp", &cars.path().join("stage.wasm").display().to_string(), &stage)
            .sink("mart", &mart);
        for (name, lines) in sinks {
            file = file.sink(name, &lines.replace("TABLE", &table));
        }
        file.write();
        cars.ok(&["stream", "create", "--shards", "1", "--pipeline", "pipeline.toml"]);
        let from = next_second();
        let lines: String =
            (0..records).map(|id| format!("{{\"id\":{id},\"key\":\"k\",\"n\":{id}}}\n")).collect();
        std::fs::write(cars.path().join("rows.ndjson"), lines).expect("written");
        cars.ok(&[
            "stream",
            "put",
            "--pipeline",
            "pipeline.toml",
            "--format",
            "ndjson",
            "rows.ndjson",
        ]);
        let to = next_second();
        cars.ok(&["run", "--until-caught-up"]);
        Self { cars, table, from, to, _stream: stream }
    }

    fn replay<'r>(&'r self, more: &[&'r str]) -> Vec<&'r str> {
        let window = ["--sink", "mart", "--from", &self.from, "--to", &self.to, "--swap"];
        [&["replay"], &window[..], more].concat()
    }

    /// Returns the number of rows and of distinct ids in the table.
    fn rows(&self) -> String {
        let counts = format!("SELECT count(*) || ' ' || count(DISTINCT id) FROM {}", self.table);
        postgres(&counts).remove(0)
    }

    /// Replaces the stage's version.
    fn runs(&self, mark: &str) {
        std::fs::write(self.cars.path().join("stage.wasm"), stamp(mark)).expect("written");
    }
}

impl Drop for Ran {
    fn drop(&mut self) {
        postgres(&format!("DROP TABLE IF EXISTS {}, {0}_replay", self.table));
    }
}

fn beside() -> (&'static str, String) {
    let lines = format!(
        "type = \"postgres\"\nurl = \"{}\"\ntable = \"TABLE\"\nlineage = true",
        postgres_url()
    );
    ("other", lines)
}

fn copy() -> (&'static str, String) {
    ("copy", "type = \"sqlite\"\npath = \"copy.db\"\ntable = \"cars\"\ncreate = true".into())
}

#[test]
fn fault_17_rows_of_another_sink_are_not_replaced() {
    let ran = Ran::new("fault-17", "", &[beside()], 10);
    ran.runs("v2 none");
    assert_eq!(ran.rows(), "18 9");
    let said = ran.cars.refused(&ran.replay(&["--with-dead-letters"]));
    assert!(
        said.contains("sink other also writes table") && said.contains("shardmill_sink"),
        "{said}"
    );
    assert_eq!(ran.rows(), "18 9");

    // The way out that the message names: a new column names the sink. Existing rows get it by hand, new rows by
    // themselves.
    let (table, sink) = (&ran.table, "shardmill_sink");
    postgres(&format!(
        "ALTER TABLE {table} ADD COLUMN {sink} text;
         UPDATE {table} SET {sink} = 'mart' WHERE ctid IN (SELECT min(ctid) FROM {table} GROUP BY id)"
    ));
    let said = ran.cars.refused(&ran.replay(&[]));
    assert!(said.contains("sink other also writes table"), "rows that say nothing: {said}");
    postgres(&format!("UPDATE {table} SET {sink} = 'other' WHERE {sink} IS NULL"));
    let report = ran.cars.report(&ran.replay(&[]));
    assert_eq!(report["swapped"], serde_json::json!([9, 10]), "{report}");
    let by = |which: &str| {
        postgres(&format!(
            "SELECT count(*) || version FROM {table} WHERE {sink} = '{which}' GROUP BY version"
        ))
    };
    assert_eq!((by("mart"), by("other")), (vec!["10v2".into()], vec!["9v1".into()]));
}

#[test]
fn fault_17_sinks_of_a_table_with_the_column_are_distinguished() {
    let ran = Ran::new("fault-17-column", ", shardmill_sink text", &[beside()], 10);
    ran.runs("v2 none");
    let report = ran.cars.report(&ran.replay(&[]));
    assert_eq!(report["swapped"], serde_json::json!([9, 10]), "{report}");
    assert_eq!(ran.rows(), "19 10");
}

#[test]
fn fault_17_a_sink_that_was_there_once_may_have_written_the_table() {
    let ran = Ran::new("fault-17-former", "", &[beside()], 10);
    ran.cars.replace("name = \"other\"", "name = \"renamed\"");
    ran.cars.replace("\"mart\", \"other\"", "\"mart\", \"renamed\"");
    ran.cars.replace(
        &format!(
            "table = \"{}\"\nlineage = true\n[sink.commit]\nlinger = \"50 ms\"\n[[sink]]",
            ran.table
        ),
        &format!(
            "table = \"{}\"\nlineage = true\n[sink.commit]\nlinger = \"60 ms\"\n[[sink]]",
            ran.table
        ),
    );
    let text = std::fs::read_to_string(ran.cars.file()).expect("read");
    let (before, _) = text.split_once("[[sink]]\nname = \"renamed\"").expect("the sink");
    let text = before.replace("\"mart\", \"renamed\"", "\"mart\"");
    std::fs::write(ran.cars.file(), text).expect("written");
    let said = ran.cars.refused(&ran.replay(&["--with-dead-letters"]));
    assert!(said.contains("sink other of pipeline"), "{said}");
    assert_eq!(ran.rows(), "18 9");
}

/// Renames the sink. No start has seen the new name.
fn renamed(ran: &Ran) -> Vec<&str> {
    ran.cars.replace("name = \"mart\"", "name = \"shop\"\nrenamed_from = \"mart\"");
    ran.cars.replace("[\"mart\"]", "[\"shop\"]");
    vec!["replay", "--sink", "shop", "--from", &ran.from, "--to", &ran.to]
}

#[test]
fn fault_25_a_replay_takes_no_position_away_from_a_sink_that_is_to_be_renamed() {
    let ran = Ran::new("fault-25-replay", "", &[], 10);
    let replay = renamed(&ran);
    let said = ran.cars.refused(&replay);
    assert!(said.contains("start it once"), "{said}");
    ran.cars.ok(&["run", "--until-caught-up"]);
    assert_eq!(ran.rows(), "9 9", "the run continues at its position");
    ran.cars.ok(&replay);
    ran.cars.ok(&["run", "--until-caught-up"]);
    assert_eq!(ran.rows(), "9 9");
}

#[test]
fn fault_17_rows_that_say_a_former_name_of_the_sink_are_not_made_twice() {
    let ran = Ran::new("fault-17-name", ", shardmill_sink text", &[], 10);
    let replay = [renamed(&ran), vec!["--swap", "--with-dead-letters"]].concat();
    ran.cars.ok(&["run", "--until-caught-up"]);
    let said = ran.cars.refused(&replay);
    assert!(said.contains("SET shardmill_sink = 'shop' WHERE shardmill_sink = 'mart'"), "{said}");
    assert_eq!(ran.rows(), "9 9");
    postgres(&format!(
        "UPDATE {} SET shardmill_sink = 'shop' WHERE shardmill_sink = 'mart'",
        ran.table
    ));
    let report = ran.cars.report(&replay);
    assert_eq!(report["swapped"], serde_json::json!([9, 9]), "{report}");
    assert_eq!(ran.rows(), "9 9");
}

#[test]
fn fault_23_dead_letters_of_a_replayed_window_are_redriven_to_the_other_sinks_only() {
    let ran = Ran::new("fault-23", "", &[copy()], 40);
    let copied = || -> (u64, u64) {
        let copy = sqlite(&ran.cars.path().join("copy.db"));
        let counts = "SELECT count(*), count(DISTINCT id) FROM cars";
        copy.query_row(counts, [], |row| Ok((row.get(0)?, row.get(1)?))).expect("counts")
    };
    assert_eq!(
        (ran.rows(), copied(), ran.cars.dead_letters().len()),
        ("36 36".into(), (36, 36), 4)
    );
    // One record also fails in the replay: it has a dead letter for each of the two sinks.
    ran.runs("v2 reject 20");
    let refused = ran.cars.refused(&ran.replay(&[]));
    assert!(refused.contains("2 records of the window became dead letters"), "{refused}");
    ran.cars.report(&ran.replay(&["--with-dead-letters"]));
    assert_eq!(ran.rows(), "38 38");
    ran.runs("v3 none");
    assert_eq!(ran.cars.redriven(&["--all"]), (4, 0, 0));
    assert_eq!((ran.rows(), copied()), ("40 40".into(), (40, 40)));
    assert_eq!(ran.cars.dead_letters(), Vec::<String>::new());
    // Whatever was redriven, a replay writes each record once.
    ran.cars.report(&ran.replay(&[]));
    assert_eq!(ran.rows(), "40 40");
}

#[test]
fn fault_23_a_dead_letter_that_fails_again_elsewhere_is_not_for_the_replayed_sink() {
    let ran = Ran::new("fault-23-again", "", &[copy()], 20);
    ran.runs("v2 none");
    ran.cars.report(&ran.replay(&[]));
    assert_eq!(ran.rows(), "20 20");
    // The record fails in the stage again, then passes: the marks stay with the dead letters.
    ran.runs("v3 reject 10");
    assert_eq!(ran.cars.redriven(&["--all"]), (2, 2, 0));
    ran.runs("v4 none");
    assert_eq!(ran.cars.redriven(&["--all"]), (2, 0, 0));
    assert_eq!(ran.rows(), "20 20");
}

/// Cuts the connection at the COMMIT that swaps the rows.
fn unknown_commit(test: &str, cut: Cut) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let url = url::Url::parse(&postgres_url()).expect("a URL");
    let server = format!("127.0.0.1:{}", url.port().unwrap_or(5432));
    let proxy = runtime.block_on(Proxy::start(server));
    let mut by_proxy = url.clone();
    by_proxy.set_port(Some(proxy.port)).expect("a port");
    let ran = Ran::by(test, "", &[copy()], 20, by_proxy.as_str());
    ran.runs("v2 none");
    let refuses = matches!(cut, Cut::AfterAndRefuse(_));
    proxy.cut(cut);
    let replayed = crate::support::output(&mut ran.cars.command(&ran.replay(&[])));
    let said = String::from_utf8_lossy(&replayed.stderr).into_owned();
    proxy.accept();
    match cut {
        Cut::Before(_) => {
            assert!(said.contains("nothing was replaced"), "{said}");
            assert_eq!(ran.rows(), "18 18");
        }
        _ => {
            assert_eq!(replayed.status.success(), !refuses, "{said}");
            assert!(!refuses || said.contains("resolves it"), "{said}");
            assert_eq!(ran.rows(), "20 20");
        }
    }
    let pending = ran.cars.count_in_state("SELECT count(*) FROM replay");
    assert_eq!(pending, u64::from(refuses));
    assert_eq!(ran.cars.redriven(&["--all"]), (2, 0, 0));
    assert_eq!(ran.rows(), "20 20");
    assert_eq!(ran.cars.count_in_state("SELECT count(*) FROM replay"), 0);
}

#[test]
fn fault_23_a_commit_without_an_answer_is_resolved_by_the_replays_own_row() {
    unknown_commit("fault-23-after", Cut::After("INSERT INTO \"shardmill_position\" (pipeline"));
}

#[test]
fn fault_23_a_commit_that_never_came_is_cancelled() {
    unknown_commit("fault-23-before", Cut::Before("INSERT INTO \"shardmill_position\" (pipeline"));
}

#[test]
fn fault_23_a_replay_of_an_unknown_end_is_resolved_by_the_redrive() {
    unknown_commit(
        "fault-23-refuse",
        Cut::AfterAndRefuse("INSERT INTO \"shardmill_position\" (pipeline"),
    );
}

/// Waits until a second begins that is more than one second after everything before; returns its time. The embedded
/// stream stores arrival times in whole seconds.
fn next_second() -> String {
    let begun = chrono::Utc::now().timestamp();
    let now = || chrono::Utc::now().timestamp();
    wait_for("the next second", || {
        std::thread::sleep(Duration::from_millis(10));
        now() >= begun + 2
    });
    chrono::DateTime::from_timestamp(now(), 0).expect("a time").to_rfc3339()
}
