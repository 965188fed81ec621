//! `shardmill replay` through the real binary: a window of a stream is run again by changed plugins, into a table
//! beside the live one and in place of its rows.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use crate::support::pipeline::PipelineToml;
use crate::support::{
    Process, kill_until_it_ends, output, postgres, postgres_url, run_ok, serve_stream, shardmill,
};
use serde_json::Value;

/// Stream of two shards, and a pipeline that writes cars to a table with lineage columns.
struct World {
    folder: tempfile::TempDir,
    table: String,
    _stream: Process,
}

impl World {
    fn new(test: &str, columns: &str, mode: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let table = format!("replay_{test}_{}", std::process::id());
        postgres(&format!(
            "CREATE TABLE {table} ({columns}, shardmill_pipeline text, \
            shardmill_shard text, shardmill_sequence numeric, shardmill_arrived_at timestamptz)"
        ));
        let route = "config = { default = \"all\", \
             rules = [{ route = \"dropped\", field = \"make\", in = [\"None\"] }] }\n\
             routes = { all = [\"mart\", \"other\"], dropped = [] }";
        let mart = format!(
            "type = \"postgres\"\nurl = \"{}\"\ntable = \"{table}\"\nlineage = true\n{mode}\n\
             [sink.commit]\nrows = 10\nlinger = \"50 ms\"",
            postgres_url()
        );
        PipelineToml::new(folder.path(), &table)
            .timing("")
            .stream("cars", "embedded", "format = \"application/json\"\npoll_interval = \"20 ms\"")
            .stage("route", "route-json", route)
            .plain_sink("mart", &mart)
            .plain_sink("other", "type = \"discard\"")
            .write();
        let stream = serve_stream(&folder.path().join("state"));
        let world = Self { folder, table, _stream: stream };
        run_ok(&["stream", "create", "--shards", "2", "--pipeline", &world.config()]);
        world
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("pipeline.toml")
    }

    fn config(&self) -> String {
        self.path().display().to_string()
    }

    /// Puts cars with these makes; returns a time before they arrived.
    fn put(&self, ids: Range<u64>, make: impl Fn(u64) -> &'static str) -> String {
        let before = next_second();
        let mut lines = String::new();
        for id in ids {
            writeln!(lines, "{{\"id\":{id},\"make\":\"{}\"}}", make(id)).expect("text");
        }
        let rows = self.folder.path().join("rows.ndjson");
        std::fs::write(&rows, lines).expect("written");
        let rows = rows.display().to_string();
        run_ok(&["stream", "put", "--pipeline", &self.config(), "--format", "ndjson", &rows]);
        before
    }

    fn run(&self) {
        run_ok(&["run", "--until-caught-up", &self.config()]);
    }

    /// Changes the plugin's code from now on.
    fn drop_make(&self, make: &str) {
        let text = std::fs::read_to_string(self.path()).expect("read");
        let text = text.replace("[\"None\"]", &format!("[\"{make}\"]"));
        std::fs::write(self.path(), text).expect("written");
    }

    fn replay(&self, from: &str, to: &str, more: &[&str]) -> Output {
        let config = self.config();
        let window = ["replay", "--json", &config, "--sink", "mart", "--from", from, "--to", to];
        output(&mut shardmill(&[&window[..], more].concat()))
    }

    /// Runs a replay, which must succeed; returns its report.
    fn replayed(&self, from: &str, to: &str, more: &[&str]) -> Value {
        let done = self.replay(from, to, more);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).expect("a report")
    }

    /// Runs a replay, which must fail; returns the error.
    fn refused(&self, from: &str, to: &str, more: &[&str]) -> String {
        let done = self.replay(from, to, more);
        assert_eq!(done.status.code(), Some(1), "{}", String::from_utf8_lossy(&done.stdout));
        String::from_utf8_lossy(&done.stderr).into_owned()
    }

    /// Returns the ids in a table, ascending.
    fn ids(&self, table: &str) -> Vec<u64> {
        let ids = postgres(&format!("SELECT id FROM {table} ORDER BY id"));
        ids.iter().map(|id| id.parse().expect("an id")).collect()
    }

    fn shadow(&self) -> String {
        format!("{}_replay", self.table)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        postgres(&format!("DROP TABLE IF EXISTS {}, {}", self.table, self.shadow()));
    }
}

fn counts(report: &Value) -> (u64, u64, u64) {
    let count = |name: &str| report[name].as_u64().expect("a count");
    (count("same"), count("only_live"), count("only_shadow"))
}

/// Every tenth car is a Fiat.
fn make(id: u64) -> &'static str {
    if id.is_multiple_of(10) { "Fiat" } else { "Honda" }
}

#[test]
fn a_window_is_compared_and_then_replaced() {
    // Columns may have any names.
    let columns = "id bigint NOT NULL, make text, n serial, t text, live text, row text";
    let world = World::new("append", columns, "");
    world.put(0..100, make);
    let from = world.put(100..200, make);
    let to = world.put(200..300, make);
    world.run();
    assert_eq!(world.ids(&world.table), (0..300).collect::<Vec<_>>());

    // Unchanged code makes the same rows.
    let same = world.replayed(&from, &to, &[]);
    assert_eq!(counts(&same), (100, 0, 0), "{same}");
    world.drop_make("Fiat");
    let report = world.replayed(&from, &to, &[]);
    assert_eq!((counts(&report), &report["dead_letters"]), ((90, 10, 0), &0.into()), "{report}");
    let sample = report["samples_live"][0].as_str().expect("a row");
    assert!(sample.contains("Fiat") && !sample.contains("\"n\""), "{sample}");
    let kept: Vec<u64> = (100..200).filter(|id| id % 10 != 0).collect();
    assert_eq!(world.ids(&world.shadow()), kept);
    assert_eq!(world.ids(&world.table).len(), 300, "the live table is unchanged");

    let report = world.replayed(&from, &to, &["--swap"]);
    assert_eq!(report["swapped"], serde_json::json!([100, 90]), "{report}");
    let gone = |id: &u64| (100..200).contains(id) && id.is_multiple_of(10);
    let expected: Vec<u64> = (0..300).filter(|id| !gone(id)).collect();
    assert_eq!(world.ids(&world.table), expected);
    let count =
        postgres(&format!("SELECT count(*) FROM pg_class WHERE relname = '{}'", world.shadow()));
    assert_eq!(count, ["0"], "the shadow table is dropped");
    // A second replay finds nothing to do.
    let again = world.replayed(&from, &to, &["--swap"]);
    assert_eq!((counts(&again), &again["swapped"]), ((90, 0, 0), &serde_json::json!([90, 90])));

    // The pipeline goes on as if there had been no replay.
    world.put(300..320, make);
    world.run();
    let expected: Vec<u64> =
        expected.into_iter().chain(300..320).filter(|id| *id < 300 || id % 10 != 0).collect();
    assert_eq!(world.ids(&world.table), expected);
}

#[test]
fn a_row_that_a_later_record_has_written_stays() {
    let columns = "id bigint PRIMARY KEY, make text";
    let world = World::new("upsert", columns, "mode = \"upsert\"\nkey = [\"id\"]");
    let from = world.put(0..20, |_| "Honda");
    let to = world.put(0..5, |_| "Volvo");
    world.run();
    let report = world.replayed(&from, &to, &["--swap"]);
    assert_eq!(counts(&report), (15, 0, 5), "{report}");
    assert_eq!(report["swapped"], serde_json::json!([15, 15]), "{report}");
    let volvos = postgres(&format!("SELECT count(*) FROM {} WHERE make = 'Volvo'", world.table));
    assert_eq!((volvos, world.ids(&world.table).len()), (vec!["5".to_owned()], 20));
}

#[test]
fn a_window_goes_on_in_the_children_of_its_shards() {
    let world = World::new("split", "id bigint NOT NULL, make text", "");
    let from = world.put(0..40, make);
    run_ok(&["stream", "split", "shardId-000000000000", "--pipeline", &world.config()]);
    world.put(40..80, make);
    run_ok(&["stream", "split", "shardId-000000000001", "--pipeline", &world.config()]);
    let to = world.put(80..120, make);
    world.run();
    assert_eq!(world.ids(&world.table).len(), 120);
    let report = world.replayed(&from, &to, &[]);
    assert_eq!(counts(&report), (80, 0, 0), "{report}");
}

#[test]
fn what_would_lose_or_double_rows_is_refused() {
    let world = World::new("refused", "id bigint NOT NULL CHECK (id <> 7), make text", "");
    let from = world.put(0..20, make);
    world.run();
    let later = "2999-01-01T00:00:00Z";
    assert!(world.refused(&from, later, &[]).contains("--to must be in the past"));
    assert!(world.refused(later, &from, &[]).contains("--from must be before --to"));
    let own = world.table.clone();
    let long_ago = world.refused("2014-01-01T00:00:00Z", &from, &["--swap"]);
    assert!(long_ago.contains("the stream has records from"), "{long_ago}");
    let taken = world.refused(&from, &next_second(), &["--into", &own]);
    assert!(taken.contains("was not made by a replay"), "{taken}");
    assert_eq!(world.ids(&world.table).len(), 19);

    // A record that the table refuses.
    let dead_letters = world.refused(&from, &next_second(), &["--swap"]);
    assert!(dead_letters.contains("1 records of the window became dead letters"), "{dead_letters}");
    let report = world.replayed(&from, &next_second(), &["--swap", "--with-dead-letters"]);
    assert_eq!(report["swapped"], serde_json::json!([19, 19]), "{report}");

    // Records that the pipeline has not written yet.
    let next = world.put(100..110, make);
    let ahead = world.refused(&next, &next_second(), &["--swap"]);
    assert!(ahead.contains("has not reached the end of the window"), "{ahead}");
    assert_eq!(world.ids(&world.table).len(), 19);
    world.run();
    let report = world.replayed(&next, &next_second(), &["--swap"]);
    assert_eq!(report["swapped"], serde_json::json!([10, 10]), "{report}");

    let text = std::fs::read_to_string(world.path()).expect("read");
    std::fs::write(world.path(), text.replace("lineage = true\n", "")).expect("written");
    assert!(world.refused(&from, &next_second(), &[]).contains("set lineage = true"));
}

/// Seeds of the moments at which replays are killed; `SHARDMILL_SEED` sets another one.
const KILLED: std::ops::RangeInclusive<u64> = 1..=3;

#[test]
fn a_replay_that_is_killed_leaves_each_row_once() {
    let own = std::env::var("SHARDMILL_SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in own.map_or(KILLED, |seed| seed..=seed) {
        println!("SHARDMILL_SEED={seed}");
        kill_replays(seed);
    }
}

/// Kills `replay --swap` repeatedly until it succeeds, and redrives dead letters of before.
fn kill_replays(seed: u64) {
    let columns = "id bigint NOT NULL CONSTRAINT taken CHECK (id % 20 <> 7), make text";
    let world = World::new(&format!("killed_{seed}"), columns, "");
    let from = world.put(0..400, make);
    let to = next_second();
    world.run();
    let before: Vec<u64> = (0..400).filter(|id| id % 20 != 7).collect();
    // From now on the table accepts what it refused, and there are no Fiats.
    postgres(&format!("ALTER TABLE {} DROP CONSTRAINT taken", world.table));
    world.drop_make("Fiat");
    let after: Vec<u64> = (0..400).filter(|id| id % 10 != 0).collect();
    let config = world.config();
    let kills = kill_until_it_ends(seed, || {
        let found = world.ids(&world.table);
        assert!(found == before || found == after, "a part was replaced: {found:?}");
        let window = ["replay", &config, "--sink", "mart", "--from", &from, "--to", &to, "--swap"];
        shardmill(&window)
    });
    println!("{kills} kills");
    assert_eq!(world.ids(&world.table), after);
    // The replay has written the rows of the dead letters: a redrive writes none of them.
    run_ok(&["dlq", "redrive", "--all", "--pipeline", &config]);
    assert_eq!(world.ids(&world.table), after);
    let left = run_ok(&["dlq", "list", "--pipeline", &config]);
    assert!(!left.contains("sink:mart"), "{left}");
}

/// Waits until a second begins that is more than one second after everything before; returns its time. The embedded
/// stream stores arrival times in whole seconds.
fn next_second() -> String {
    std::thread::sleep(Duration::from_millis(1_100));
    let now_ms = chrono::Utc::now().timestamp_millis();
    let second = now_ms / 1_000 + 1;
    let left = u64::try_from(second * 1_000 - now_ms).expect("it comes");
    std::thread::sleep(Duration::from_millis(left + 5));
    chrono::DateTime::from_timestamp(second, 0).expect("a time").to_rfc3339()
}
