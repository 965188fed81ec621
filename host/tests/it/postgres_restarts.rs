//! PostgreSQL is restarted ten times while rows flow into it: each row is there once, and nobody had to intervene.
//!
//! The server belongs to this test alone: other tests run at the same time.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::pipeline::PipelineToml;
use crate::support::{Process, postgres_at, run_ok, serve_stream, shardmill, wait_for};

const RESTARTS: u64 = 10;
/// Rows of many commits, so that a restart interrupts one.
const ROWS_PER_RESTART: u64 = 40_000;

/// Returns the URL of the server that is restarted.
fn url() -> String {
    std::env::var("SHARDMILL_TEST_RESTARTED_POSTGRES").expect(
        "SHARDMILL_TEST_RESTARTED_POSTGRES names a throw-away PostgreSQL of its own: run `cargo xtask test`",
    )
}

fn postgres(sql: &str) -> Vec<String> {
    postgres_at(&url(), sql)
}

/// Restarts the server. `fast` ends sessions and writes their data; `immediate` is a crash.
fn restart(mode: &str) {
    let programs = std::env::var("SHARDMILL_TEST_POSTGRES_PROGRAMS")
        .expect("SHARDMILL_TEST_POSTGRES_PROGRAMS names pg_ctl's folder: run `cargo xtask test`");
    let data = PathBuf::from(&postgres("SHOW data_directory")[0]);
    let owner = data.metadata().expect("the server's data");
    let pg_ctl = Path::new(&programs).join("pg_ctl");
    let own = Path::new("/proc/self").metadata().expect("this process");
    let mut command = Command::new(&pg_ctl);
    if own.uid() != owner.uid() {
        command = Command::new("setpriv");
        command.args([format!("--reuid={}", owner.uid()), format!("--regid={}", owner.gid())]);
        command.arg("--clear-groups").arg(&pg_ctl);
    }
    command.args(["restart", "-w", "-t", "60", "-m", mode, "-D"]).arg(&data);
    // Output goes to /dev/null: the server that `pg_ctl` leaves running would keep a pipe open.
    command.args(["-l", "/dev/null"]).current_dir("/");
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("pg_ctl").success(), "{command:?}");
}

/// Writes the pipeline's file; returns its path.
fn pipeline(folder: &Path, schema: &str) -> String {
    let url = url();
    let sink = |table: &str, lines: &str| {
        format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{schema}.{table}\"\n{lines}")
    };
    let appended = sink("appended", "[sink.commit]\nrows = 500");
    let merged = sink("merged", "mode = \"upsert\"\nkey = [\"id\"]\n[sink.commit]\nrows = 700");
    PipelineToml::new(folder, "restarts")
        .timing("")
        .stream("rows", "embedded", "format = \"application/json\"\nrecords_per_call = 1000")
        .route_all_to(&["appended", "merged"])
        .plain_sink("appended", &appended)
        .plain_sink("merged", &merged)
        .write()
}

fn count(table: &str) -> u64 {
    postgres(&format!("SELECT count(*) FROM {table}"))[0].parse().expect("a count")
}

#[test]
fn ten_restarts_of_postgres_lose_and_double_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let schema = format!("restarts_{}", std::process::id());
    // A primary key would hide a duplicated row: the first table has none, and the second must have the same rows.
    postgres(&format!(
        "CREATE SCHEMA {schema}; CREATE TABLE {schema}.appended (id bigint NOT NULL); \
         CREATE TABLE {schema}.merged (id bigint PRIMARY KEY)"
    ));
    let rows = folder.path().join("rows.ndjson");
    let config = pipeline(folder.path(), &schema);
    let _stream = serve_stream(&folder.path().join("state"));
    run_ok(&["stream", "create", "--shards", "2", "--pipeline", &config]);
    let run = shardmill(&["run", &config]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut run = Process(run.expect("the binary starts"));

    for number in 0..RESTARTS {
        let first = number * ROWS_PER_RESTART;
        let mut lines = String::new();
        for id in first..first + ROWS_PER_RESTART {
            writeln!(lines, "{{\"id\":{id}}}").expect("text");
        }
        std::fs::write(&rows, lines).expect("written");
        run_ok(&["stream", "put", "--pipeline", &config, &rows.display().to_string()]);
        wait_for("a row of this part", || count(&format!("{schema}.appended")) > first);
        restart(if number % 2 == 0 { "fast" } else { "immediate" });
        let have = count(&format!("{schema}.appended"));
        println!("restart {number}: {} of {ROWS_PER_RESTART} rows were in", have - first);
        wait_for("all rows of this part", || {
            ["appended", "merged"]
                .iter()
                .all(|table| count(&format!("{schema}.{table}")) >= first + ROWS_PER_RESTART)
        });
    }
    assert!(run.0.try_wait().expect("a state").is_none(), "the run has ended");
    assert_eq!(run.terminate(), Some(0));
    let all = RESTARTS * ROWS_PER_RESTART;
    for table in ["appended", "merged"] {
        let ids = postgres(&format!(
            "SELECT concat_ws(' ', count(*), count(DISTINCT id), min(id), max(id)) FROM {schema}.{table}"
        ));
        assert_eq!(ids[0], format!("{all} {all} 0 {}", all - 1), "{table}");
    }
    postgres(&format!("DROP SCHEMA {schema} CASCADE"));
}
