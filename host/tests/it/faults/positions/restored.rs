//! Databases that were restored from a backup, state that was lost or restored from an older copy, and two processes
//! with separate state.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, SystemTime};

use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World};
use crate::support::{
    self, Process, free_port, http_get, plugin, postgres, run, shardmill, wait_for,
};
use crate::swap::fixture::stamp;

const NAME: &str = "reading";

/// World whose pipeline writes to several sinks, each with a place of its own.
struct Fixture {
    world: World,
}

impl Fixture {
    fn new(shards: u32) -> Self {
        let fixture = Self { world: World::new(shards) };
        fixture.create("logs");
        fixture
    }

    /// Returns the file of a SQLite sink.
    fn file(&self, sink: &str) -> std::path::PathBuf {
        self.world.folder.path().join(format!("{sink}.db"))
    }

    /// Creates a sink's file and table.
    fn create(&self, sink: &str) {
        let sql = "CREATE TABLE rows (id INTEGER NOT NULL, key TEXT NOT NULL, n INTEGER NOT NULL)";
        support::sqlite(&self.file(sink)).execute(sql, ()).expect("created");
    }

    /// Builds the pipeline's file, with SQLite sinks.
    fn pipeline(&self, pipeline: &str, source: &str, sinks: &[&str]) -> PipelineToml {
        self.pipeline_in(self.world.folder.path(), pipeline, source, sinks)
    }

    /// Like `pipeline`, with the state in another folder.
    fn pipeline_in(
        &self,
        folder: &Path,
        pipeline: &str,
        source: &str,
        sinks: &[&str],
    ) -> PipelineToml {
        let endpoint = format!("http://{}", self.world.address);
        let file = PipelineToml::new(folder, NAME)
            .pipeline(pipeline)
            .stream(STREAM, &endpoint, source)
            .route_all_to(sinks);
        sinks.iter().fold(file, |file, sink| {
            let path = self.file(sink).display().to_string();
            file.sink(sink, &format!("type = \"sqlite\"\npath = \"{path}\"\ntable = \"rows\""))
        })
    }

    /// Returns the folder of the pipeline's state.
    fn state(&self) -> std::path::PathBuf {
        self.world.folder.path().join("state").join(NAME)
    }

    fn catch_up(&self, file: &PipelineToml) -> String {
        catch_up(file, &[])
    }

    /// Asserts that a sink has each id of `ids` exactly once.
    fn assert_once(&self, sink: &str, ids: std::ops::Range<u64>) {
        let database = support::sqlite(&self.file(sink));
        let mut query = database.prepare("SELECT id FROM rows ORDER BY id").expect("sql");
        let found: Vec<u64> =
            query.query_map((), |row| row.get(0)).expect("rows").map(Result::unwrap).collect();
        assert_eq!(found, ids.collect::<Vec<_>>(), "rows of {sink}");
    }

    fn count(&self, sink: &str) -> u64 {
        let count = "SELECT count(*) FROM rows";
        support::sqlite(&self.file(sink)).query_row(count, (), |row| row.get(0)).expect("a count")
    }

    /// Splits the first open shard.
    fn split(&self) {
        let shards = self.world.open_shards();
        self.world.split(&shards[0]);
    }

    /// Copies a sink's file, as a backup does.
    fn back_up(&self, sink: &str) -> std::path::PathBuf {
        let backup = self.world.folder.path().join(format!("{sink}.backup"));
        let into = format!("VACUUM INTO '{}'", backup.display());
        support::sqlite(&self.file(sink)).execute(&into, ()).expect("copied");
        backup
    }

    /// Replaces a sink's file by a backup.
    fn restore(&self, sink: &str, backup: &Path) {
        self.remove(sink);
        std::fs::copy(backup, self.file(sink)).expect("restored");
    }

    fn remove(&self, sink: &str) {
        for ending in ["", "-wal", "-shm"] {
            let mut path = self.file(sink).into_os_string();
            path.push(ending);
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Runs a pipeline until it has caught up, which must succeed. Returns standard error.
fn catch_up(file: &PipelineToml, options: &[&str]) -> String {
    let output = run_once(file, options);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}");
    log
}

/// Runs a pipeline that must refuse to start. Returns standard error.
fn refused(file: &PipelineToml, options: &[&str]) -> String {
    let output = run_once(file, options);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{log}");
    log
}

/// Returns what `check` prints about a pipeline whose start would be refused.
fn foreseen(file: &PipelineToml) -> String {
    let output = run(&["check", &file.write()]);
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn run_once(file: &PipelineToml, options: &[&str]) -> Output {
    let path = file.write();
    run(&[&["run", &path, "--until-caught-up", "-v"], options].concat())
}

/// Starts a pipeline and waits until it reads.
fn start(file: &PipelineToml, log: &Path) -> Process {
    let path = file.write();
    let out = std::fs::File::create(log).expect("a log");
    let mut command = shardmill(&["run", &path, "-v"]);
    let run = command.stdout(Stdio::null()).stderr(out).spawn();
    let run = Process(run.expect("the binary starts"));
    wait_for("the run to read", || text(log).contains("reading"));
    run
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        match entry.file_type().expect("a type").is_dir() {
            true => copy_folder(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).expect("copied")),
        }
    }
}

#[track_caller]
fn assert_says(log: &str, parts: &[&str]) {
    for part in parts {
        assert!(log.contains(part), "{part:?} is missing in {log}");
    }
}

#[test]
fn fault_13_a_restored_mart_gets_the_rows_of_ended_shards_again() {
    let fixture = Fixture::new(1);
    let file = |policy: &str| {
        let policy = format!("on_position_mismatch = \"{policy}\"");
        fixture.pipeline(&policy, "", &["mart", "logs"])
    };
    fixture.world.put(0..100, 10);
    fixture.catch_up(&file("stop"));
    let backup = fixture.back_up("mart");
    fixture.world.put(100..200, 10);
    fixture.split();
    fixture.world.put(200..300, 10);
    fixture.catch_up(&file("stop"));
    // After this second split, a shard has ended whose parent will be restored.
    fixture.split();
    fixture.world.put(300..400, 10);
    fixture.catch_up(&file("stop"));

    fixture.restore("mart", &backup);
    let said = refused(&file("stop"), &[]);
    let first = "shardId-000000000000";
    assert_says(
        &said,
        &["sink mart has an earlier position", first, "on_position_mismatch", "checkpoint"],
    );
    assert_eq!(fixture.count("mart"), 100, "nothing was written");
    assert_says(&foreseen(&file("stop")), &["warning: sink mart has an earlier position", first]);
    assert_says(&foreseen(&file("sink")), &["warning: a sink was restored", "again for it"]);
    let said = fixture.catch_up(&file("sink"));
    assert_says(&said, &["read again"]);
    fixture.assert_once("mart", 0..400);
    fixture.assert_once("logs", 0..400);
    // From then on the sink is like any other.
    fixture.world.put(400..450, 10);
    fixture.catch_up(&file("stop"));
    fixture.assert_once("mart", 0..450);
    fixture.assert_once("logs", 0..450);
}

#[test]
fn fault_13_children_wait_for_the_parents_that_are_read_again() {
    let fixture = Fixture::new(1);
    let file = |policy: &str| fixture.pipeline(policy, "", &["mart"]);
    fixture.world.put(0..300, 3);
    fixture.catch_up(&file(""));
    fixture.split();
    fixture.world.put(300..600, 3);
    fixture.catch_up(&file(""));
    fixture.remove("mart");
    fixture.create("mart");
    fixture.catch_up(&file("on_position_mismatch = \"sink\""));
    fixture.world.assert_each_once_in_order(600);
}

#[test]
fn fault_13_a_sink_without_a_position_where_one_is_remembered_is_no_new_sink() {
    let fixture = Fixture::new(2);
    let file = |policy: &str| fixture.pipeline(policy, "", &["mart", "logs"]);
    fixture.world.put(0..100, 10);
    fixture.catch_up(&file(""));
    fixture.remove("mart");
    fixture.create("mart");
    let said = refused(&file(""), &[]);
    assert_says(&said, &["sink mart has an earlier position", "or later, found none"]);
    assert_says(&foreseen(&file("")), &["or later, found none"]);
    fixture.catch_up(&file("on_position_mismatch = \"sink\""));
    fixture.assert_once("mart", 0..100);
    fixture.assert_once("logs", 0..100);
}

#[test]
fn fault_13_a_sink_that_is_new_starts_at_the_checkpoint_and_is_not_taken_for_restored() {
    let fixture = Fixture::new(1);
    fixture.world.put(0..100, 10);
    fixture.catch_up(&fixture.pipeline("", "", &["mart"]));
    let both = fixture.pipeline("", "", &["mart", "logs"]);
    fixture.catch_up(&both);
    fixture.catch_up(&both);
    fixture.world.put(100..150, 10);
    fixture.catch_up(&both);
    fixture.assert_once("mart", 0..150);
    fixture.assert_once("logs", 100..150);
}

#[test]
fn fault_13_with_checkpoint_it_goes_on_without_the_rows_and_says_so_once() {
    let fixture = Fixture::new(1);
    let file = |policy: &str| fixture.pipeline(policy, "", &["mart", "logs"]);
    fixture.world.put(0..100, 10);
    fixture.catch_up(&file(""));
    let backup = fixture.back_up("mart");
    fixture.world.put(100..200, 10);
    fixture.split();
    fixture.catch_up(&file(""));
    fixture.restore("mart", &backup);
    let said = fixture.catch_up(&file("on_position_mismatch = \"checkpoint\""));
    assert_says(&said, &["going on without rows", "sink mart in shard shardId-000000000000"]);
    // The key may be removed again.
    fixture.world.put(200..300, 10);
    let said = fixture.catch_up(&file(""));
    assert!(!said.contains("going on without rows"), "{said}");
    assert_eq!(fixture.count("mart"), 200);
    fixture.assert_once("logs", 0..300);
}

#[test]
fn fault_13_todays_revision_runs_for_the_restored_sink_where_the_first_is_pruned() {
    let fixture = Fixture::new(1);
    let with = |version: &str| {
        let path = fixture.world.folder.path().join("stage.wasm");
        std::fs::write(&path, stamp(version)).expect("written");
        let endpoint = format!("http://{}", fixture.world.address);
        let file = PipelineToml::new(fixture.world.folder.path(), NAME)
            .pipeline("on_position_mismatch = \"sink\"")
            .stream(STREAM, &endpoint, "format = \"application/json\"")
            .stage("stamp", &path.display().to_string(), "routes = { all = [\"mart\", \"logs\"] }");
        ["mart", "logs"].iter().fold(file, |file, sink| {
            let path = fixture.file(sink).display().to_string();
            let lines =
                format!("type = \"sqlite\"\npath = \"{path}\"\ntable = \"stamped\"\ncreate = true");
            file.sink(sink, &lines)
        })
    };
    let versions = |sink: &str| -> Vec<(u64, String)> {
        let database = support::sqlite(&fixture.file(sink));
        let sql = "SELECT id, version FROM stamped ORDER BY id";
        let mut query = database.prepare(sql).expect("sql");
        let rows = query.query_map((), |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
        rows.map(Result::unwrap).collect()
    };
    fixture.world.put(0..50, 10);
    fixture.catch_up(&with("v1 none"));
    fixture.world.put(50..100, 10);
    fixture.catch_up(&with("v2 none"));
    // By now every sink has the output of v1, so the next start forgets v1.
    fixture.catch_up(&with("v2 none"));
    fixture.remove("mart");
    let said = fixture.catch_up(&with("v2 none"));
    assert_says(&said, &["the current revision replays these records"]);
    let of = |version: &str, ids: std::ops::Range<u64>| {
        ids.map(move |id| (id, version.to_owned())).collect::<Vec<_>>()
    };
    assert_eq!(versions("mart"), of("v2", 0..100));
    assert_eq!(versions("logs"), [of("v1", 0..50), of("v2", 50..100)].concat());
}

#[test]
fn fault_13_rows_of_shards_that_are_not_listed_any_more_are_one_warning() {
    let fixture = Fixture::new(1);
    let file = fixture.pipeline("", "", &["mart", "logs"]);
    fixture.world.put(0..10, 10);
    fixture.catch_up(&file);
    // Shards that the stream does not list any more. The data mart has no position for them, as after a restore from
    // a backup that is older than they are.
    let state = rusqlite::Connection::open(fixture.state().join("state.db")).expect("the state");
    for shard in ["shardId-000000000777", "shardId-000000000778"] {
        state
            .execute_batch(&format!(
                "INSERT INTO shard (stream, shard, sequence, sub_sequence, ended)
                     SELECT stream, '{shard}', sequence, sub_sequence, 1 FROM shard
                     WHERE shard = 'shardId-000000000000';
                 INSERT INTO sink_position (sink, stream, shard, sequence, sub_sequence)
                     SELECT 'mart', stream, '{shard}', sequence, sub_sequence FROM shard
                     WHERE shard = 'shardId-000000000000';"
            ))
            .expect("written");
    }
    drop(state);
    let said = fixture.catch_up(&file);
    assert_eq!(said.matches("rows are lost").count(), 1, "{said}");
    assert_says(&said, &["shardId-000000000777", "shardId-000000000778", "sink mart"]);
    assert!(!fixture.catch_up(&file).contains("rows are lost"), "it is said once");
}

#[test]
fn fault_14_after_the_loss_of_the_state_a_resume_is_not_filtered_by_latest() {
    let fixture = Fixture::new(1);
    let log = fixture.world.log();
    let file = fixture.pipeline("", "start = \"latest\"", &["mart"]);
    let run = start(&file, &log);
    fixture.world.put(0..50, 10);
    wait_for("rows", || fixture.count("mart") == 50);
    assert_eq!(run.terminate(), Some(0));
    fixture.world.put(50..100, 10);
    // The next start must not be in the same second as these records.
    let put = SystemTime::now();
    wait_for("two seconds", || put.elapsed().is_ok_and(|since| since > Duration::from_secs(2)));
    std::fs::remove_dir_all(fixture.state()).expect("lost");
    let run = start(&file, &log);
    fixture.world.put(100..120, 10);
    wait_for("rows", || fixture.count("mart") == 120);
    assert_says(&text(&log), &["the pipeline's state is new"]);
    assert_eq!(run.terminate(), Some(0));
    fixture.assert_once("mart", 0..120);
}

#[test]
fn fault_14_after_the_loss_of_the_state_closed_shards_are_read_to_their_end() {
    let fixture = Fixture::new(1);
    let log = fixture.world.log();
    let file = fixture.pipeline("", "start = \"latest\"", &["mart"]);
    let run = start(&file, &log);
    fixture.world.put(0..50, 10);
    wait_for("rows", || fixture.count("mart") == 50);
    assert_eq!(run.terminate(), Some(0));
    fixture.world.put(50..100, 10);
    fixture.split();
    fixture.world.put(100..150, 10);
    let put = SystemTime::now();
    wait_for("two seconds", || put.elapsed().is_ok_and(|since| since > Duration::from_secs(2)));
    std::fs::remove_dir_all(fixture.state()).expect("lost");
    fixture.catch_up(&file);
    fixture.assert_once("mart", 0..150);
}

#[test]
fn fault_14_after_the_loss_of_the_state_each_sink_goes_on_by_itself() {
    let fixture = Fixture::new(1);
    let log = fixture.world.log();
    let file = |sinks: &[&str]| fixture.pipeline("", "start = \"latest\"", sinks);
    let run = start(&file(&["mart"]), &log);
    fixture.world.put(0..50, 10);
    wait_for("rows", || fixture.count("mart") == 50);
    assert_eq!(run.terminate(), Some(0));
    fixture.world.put(50..100, 10);
    let put = SystemTime::now();
    wait_for("two seconds", || put.elapsed().is_ok_and(|since| since > Duration::from_secs(2)));
    std::fs::remove_dir_all(fixture.state()).expect("lost");
    // The sink with a position goes on after it; the other one gets the records put after the start.
    let run = start(&file(&["mart", "logs"]), &log);
    fixture.world.put(100..150, 10);
    wait_for("rows", || fixture.count("mart") == 150 && fixture.count("logs") == 50);
    assert_eq!(run.terminate(), Some(0));
    fixture.catch_up(&file(&["mart", "logs"]));
    fixture.assert_once("mart", 0..150);
    fixture.assert_once("logs", 100..150);
}

/// A state that was restored from an older copy is detected with every kind of exact sink, at every start. The
/// pipeline starts with the newest copy, or with `--trust-sinks`.
fn older_copy(sink: &str) {
    let fixture = Fixture::new(1);
    let file = |default: &str| {
        let endpoint = format!("http://{}", fixture.world.address);
        let config = format!(
            "config = {{ default = \"{default}\", rules = [] }}\nroutes = {{ {default} = [\"out\"] }}"
        );
        let sink = sink.replace("FOLDER", &fixture.world.folder.path().display().to_string());
        PipelineToml::new(fixture.world.folder.path(), NAME)
            .stream(STREAM, &endpoint, "")
            .stage("route", "route-json", &config)
            .sink("out", &sink)
    };
    let (older, newest) =
        (fixture.world.folder.path().join("older"), fixture.world.folder.path().join("newest"));
    fixture.world.put(0..50, 10);
    fixture.catch_up(&file("all"));
    copy_folder(&fixture.state(), &older);
    fixture.world.put(50..100, 10);
    fixture.catch_up(&file("others"));
    copy_folder(&fixture.state(), &newest);
    let put_back = |copy: &Path| {
        std::fs::remove_dir_all(fixture.state()).expect("removed");
        copy_folder(copy, &fixture.state());
    };
    put_back(&older);
    for _ in 0..4 {
        let said = refused(&file("others"), &[]);
        assert_says(&said, &["state folder is older than sink out", "--trust-sinks", "process "]);
        assert_says(&foreseen(&file("others")), &["state folder is older than sink out"]);
    }
    put_back(&newest);
    fixture.world.put(100..120, 10);
    fixture.catch_up(&file("others"));
    put_back(&older);
    catch_up(&file("others"), &["--trust-sinks"]);
    fixture.world.put(120..150, 10);
    fixture.catch_up(&file("others"));
}

#[test]
fn fault_14_a_state_that_is_older_than_a_sqlite_sink_is_noticed() {
    let lines = "type = \"sqlite\"\npath = \"FOLDER/logs.db\"\ntable = \"rows\"";
    older_copy(lines);
}

#[test]
fn fault_14_a_state_that_is_older_than_an_objects_sink_is_noticed() {
    older_copy("type = \"objects\"\nurl = \"file://FOLDER/objects\"");
}

#[test]
fn fault_14_a_state_that_is_older_than_a_postgres_sink_is_noticed() {
    let schema = format!("older_{}", std::process::id());
    postgres(&format!(
        "CREATE SCHEMA {schema}; CREATE TABLE {schema}.rows (id bigint, key text, n bigint)"
    ));
    let url = support::postgres_url();
    let lines = format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{schema}.rows\"");
    older_copy(&lines);
    let rows = format!("SELECT count(*) || ' ' || count(DISTINCT id) FROM {schema}.rows");
    assert_eq!(postgres(&rows), ["150 150"]);
}

#[test]
fn fault_14_position_tables_of_earlier_versions_are_widened_in_place() {
    let fixture = Fixture::new(1);
    let schema = format!("narrow_{}", std::process::id());
    postgres(&format!(
        "CREATE SCHEMA {schema}; CREATE TABLE {schema}.rows (id bigint, key text, n bigint)"
    ));
    let url = support::postgres_url();
    let endpoint = format!("http://{}", fixture.world.address);
    let path = fixture.file("mart").display().to_string();
    let with = |url: &str| {
        PipelineToml::new(fixture.world.folder.path(), NAME)
            .stream(STREAM, &endpoint, "")
            .route_all_to(&["mart", "pg"])
            .sink("mart", &format!("type = \"sqlite\"\npath = \"{path}\"\ntable = \"rows\""))
            .sink("pg", &format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{schema}.rows\""))
    };
    fixture.world.put(0..50, 10);
    fixture.catch_up(&with(&url));
    for column in ["state_id", "state_number", "owner"] {
        let drop = format!("ALTER TABLE {schema}.shardmill_position DROP COLUMN {column}");
        postgres(&drop);
        let drop = format!("ALTER TABLE shardmill_position DROP COLUMN {column}");
        support::sqlite(&fixture.file("mart")).execute(&drop, ()).expect("dropped");
    }
    // A user who may not alter the table is shown the statement that its owner must run.
    let role = format!("narrow_{}", std::process::id());
    postgres(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'secret'; GRANT USAGE ON SCHEMA {schema} TO {role};
         GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {schema} TO {role}"
    ));
    let mut other = url::Url::parse(&url).expect("a URL");
    other.set_username(&role).expect("a name");
    other.set_password(Some("secret")).expect("a password");
    let log = fixture.world.log();
    let narrow = with(other.as_str()).write();
    let out = std::fs::File::create(&log).expect("a log");
    let run = shardmill(&["run", &narrow, "-v"]).stdout(Stdio::null()).stderr(out).spawn();
    let run = Process(run.expect("the binary starts"));
    wait_for("the error", || text(&log).contains("have its owner run once"));
    assert_says(&text(&log), &["ALTER TABLE", "ADD COLUMN IF NOT EXISTS owner text"]);
    drop(run);
    fixture.world.put(50..100, 10);
    fixture.catch_up(&with(&url));
    fixture.assert_once("mart", 0..100);
    let rows = format!("SELECT count(*) || ' ' || count(DISTINCT id) FROM {schema}.rows");
    assert_eq!(postgres(&rows), ["100 100"]);
}

#[test]
fn fault_36_of_two_processes_with_separate_state_the_later_one_stops() {
    let fixture = Fixture::new(1);
    let other = fixture.world.folder.path().join("other");
    std::fs::create_dir(&other).expect("a folder");
    let (log, other_log) = (fixture.world.log(), other.join("run.log"));
    let first = start(&fixture.pipeline("", "", &["mart"]), &log);
    fixture.world.put(0..10, 10);
    wait_for("rows", || fixture.count("mart") == 10);
    let again = fixture.pipeline_in(&other, "", "", &["mart"]);
    let mut later = start(&again, &other_log);
    let mut put = 10;
    let mut ended = None;
    wait_for("the second process to stop", || {
        fixture.world.put(put..put + 5, 10);
        put += 5;
        ended = later.0.try_wait().expect("a state");
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{}", text(&other_log));
    let owner = format!("process {} on ", first.0.id());
    assert_says(
        &text(&other_log),
        &["acquired three times within a minute", &owner, "refused while the first runs"],
    );
    fixture.world.put(put..put + 5, 10);
    put += 5;
    wait_for("rows", || fixture.count("mart") == put);
    // The next start reports it at once, while the other process runs and after that.
    let said = refused(&again, &[]);
    assert_says(&said, &["another state folder", &owner]);
    assert_eq!(first.terminate(), Some(0));
    fixture.assert_once("mart", 0..put);
}

/// Removes or replaces the state folder of a running process, and asserts that the process ends and names the cause.
fn state_is_gone(harm: impl FnOnce(&Path)) {
    let fixture = Fixture::new(1);
    let log = fixture.world.log();
    let port = free_port();
    let admin = crate::support::admin(port);
    let file = fixture.pipeline("", "", &["mart"]).table(&admin);
    let mut run = start(&file, &log);
    fixture.world.put(0..10, 10);
    wait_for("rows", || fixture.count("mart") == 10);
    harm(&fixture.state());
    // Records put from now on: the process becomes not ready, or ends and names the cause.
    wait_for("the damage to be noticed", || {
        http_get(port, "/health/ready").contains("503")
            || run.0.try_wait().expect("a state").is_some()
    });
    assert_eq!(run.wait().code(), Some(1), "{}", text(&log));
    assert_says(
        &text(&log),
        &["state.db", "while this process used it", "restore the state folder"],
    );
}

#[test]
fn fault_43_a_state_folder_that_is_deleted_under_a_process_is_noticed() {
    state_is_gone(|state| std::fs::remove_dir_all(state).expect("deleted"));
}

#[test]
fn fault_43_a_state_folder_that_is_replaced_under_a_process_is_noticed() {
    state_is_gone(|state| {
        let copy = state.with_extension("copy");
        copy_folder(state, &copy);
        std::fs::rename(state, state.with_extension("old")).expect("moved");
        std::fs::rename(&copy, state).expect("replaced");
    });
}

#[test]
fn fault_43_dead_letters_are_not_lost_in_silence_when_the_state_is_deleted() {
    let fixture = Fixture::new(1);
    let log = fixture.world.log();
    let file = fixture.pipeline("", "", &["mart"]);
    let mut run = start(&file, &log);
    fixture.world.put(0..10, 10);
    wait_for("rows", || fixture.count("mart") == 10);
    std::fs::remove_dir_all(fixture.state()).expect("deleted");
    fixture.world.put_raw((10..20).map(|id| (format!("key-{id}"), b"not JSON".to_vec())));
    fixture.world.put(20..30, 10);
    assert_eq!(run.wait().code(), Some(1), "{}", text(&log));
    // Records that were not committed are read again, and their dead letters exist.
    fixture.catch_up(&file);
    let dead_letters = run_ok_in(&file, &["dlq", "list", "--json", "--pipeline"]);
    assert_eq!(dead_letters.lines().count(), 10, "{dead_letters}");
    let mart = support::sqlite(&fixture.file("mart"));
    let counts = "SELECT count(*), count(DISTINCT id) FROM rows";
    let counts: (u64, u64) =
        mart.query_row(counts, (), |row| Ok((row.get(0)?, row.get(1)?))).expect("counts");
    assert_eq!(counts, (20, 20));
}

fn run_ok_in(file: &PipelineToml, arguments: &[&str]) -> String {
    let path = file.write();
    support::run_ok(&[arguments, &[path.as_str()]].concat())
}

#[test]
fn fault_43_a_redrive_by_an_older_copy_of_the_state_is_refused() {
    let fixture = Fixture::new(1);
    let strict = |is_strict: bool| {
        let endpoint = format!("http://{}", fixture.world.address);
        let trap = if is_strict { "key-3" } else { "nothing" };
        let check = format!("config = {{ trap_on = \"{trap}\", format = \"application/json\" }}");
        let path = fixture.file("mart").display().to_string();
        PipelineToml::new(fixture.world.folder.path(), NAME)
            .pipeline("rejected_in_a_row = 1000\nrejected_of_last_1000 = 1000")
            .stream(STREAM, &endpoint, "format = \"application/json\"")
            .stage("check", &plugin("hostile"), &check)
            .route_all_to(&["mart"])
            .sink("mart", &format!("type = \"sqlite\"\npath = \"{path}\"\ntable = \"rows\""))
    };
    fixture.world.put(0..100, 10);
    fixture.catch_up(&strict(true));
    assert_eq!(fixture.count("mart"), 90);
    fixture.catch_up(&strict(false));
    let copy = fixture.world.folder.path().join("copy");
    copy_folder(&fixture.state(), &copy);
    run_ok_in(&strict(false), &["dlq", "redrive", "--all", "--pipeline"]);
    fixture.assert_once("mart", 0..100);

    std::fs::remove_dir_all(fixture.state()).expect("removed");
    copy_folder(&copy, &fixture.state());
    let path = strict(false).write();
    let redrive = |more: &[&str]| {
        let again = run(&[&["dlq", "redrive", "--all", "--pipeline", &path], more].concat());
        (again.status.code(), String::from_utf8_lossy(&again.stderr).into_owned())
    };
    for _ in 0..3 {
        let (code, said) = redrive(&[]);
        assert_eq!(code, Some(1), "{said}");
        assert_says(&said, &["older than sink mart", "redriven"]);
    }
    fixture.assert_once("mart", 0..100);
    // The refusal stays after the pipeline goes on with the older copy.
    refused(&strict(false), &[]);
    catch_up(&strict(false), &["--trust-sinks"]);
    let (code, said) = redrive(&[]);
    assert_eq!(code, Some(1), "{said}");
    assert_says(&said, &["may have been redriven", "--even-if-redriven"]);
    fixture.assert_once("mart", 0..100);
}
