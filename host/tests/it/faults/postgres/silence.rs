//! Servers that do not answer: every call ends, and a COMMIT without an answer is resolved.

use std::time::{Duration, Instant};

use shardmill_config::WriteMode;
use shardmill_core::sink::{Acquired, Sink};

use super::{proxy, sink_at, url_through};
use crate::sink_postgres::{Mart, address};
use crate::sql_sinks::proxy::{Cut, Proxy};
use crate::sql_sinks::{Log, commit, expect_unavailable, shard};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, postgres, run, run_ok, shardmill, wait_for};

const TIMING: &str = "retry_pause = \"50 ms\"\nshard_sync = \"200 ms\"\ncheckpoint = \"50 ms\"\n\
    postgres_silence = \"700 ms\"\ncall_blocked = \"200 ms\"\ndrain = \"2 s\"";

#[tokio::test]
async fn fault_03_a_commit_without_an_answer_is_resolved_with_its_counts() {
    let mart = Mart::new("fault_03_counts").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let proxy = Proxy::start(address()).await;
    let url = url_through(proxy.port);
    let sink = sink_at(&url, "sink_fault_03_counts.cars", WriteMode::Append, 500);
    let Acquired { mut writer, .. } =
        sink.acquire(&shard("shardId-000000000000")).await.expect("acquired");
    let (log, rows) = (Log::default(), [r#"{"id":1}"#, r#"{"id":"x"}"#, r#"{"id":"y"}"#]);
    proxy.cut(Cut::Mute("PGCOPY", "COMMIT\0"));
    let committed = writer.commit(&commit(0, &rows), &log).await.expect("it took effect");
    assert_eq!((committed.rows_written, committed.rows_refused), (1, 2));
    assert!(proxy.has_cut(), "COMMIT was not sent");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "1");

    // A stopped server answers neither the commit nor a new connection until it resumes.
    proxy.freeze();
    for _ in 0..2 {
        let begun = Instant::now();
        expect_unavailable(writer.commit(&commit(3, &[r#"{"id":2}"#]), &log).await, "no answer");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    proxy.thaw();
    writer.commit(&commit(3, &[r#"{"id":2}"#]), &log).await.expect("the server goes on");
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

/// Writes a pipeline of a file with these lines, into a table on this port.
fn pipeline(folder: &std::path::Path, table: &str, port: u16, lines: &str) -> String {
    let file = folder.join("rows.ndjson");
    std::fs::write(&file, lines).expect("written");
    let url = url_through(port);
    PipelineToml::new(folder, "silence")
        .timing(TIMING)
        .file(&file, "")
        .route_all_to(&["mart"])
        .sink("mart", &format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\""))
        .write()
}

#[test]
fn fault_03_three_refused_rows_of_a_commit_without_an_answer_are_visible_dead_letters() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = format!("fault_03_letters_{}", std::process::id());
    postgres(&format!("CREATE TABLE {table} (id bigint)"));
    let (proxy, _runtime) = proxy();
    let lines = "{\"id\":1}\n{\"id\":\"a\"}\n{\"id\":\"b\"}\n{\"id\":2}\n{\"id\":\"c\"}\n";
    let path = pipeline(folder.path(), &table, proxy.port, lines);
    proxy.cut(Cut::Mute("PGCOPY", "COMMIT\0"));
    let ran = run(&["run", &path, "--until-caught-up"]);
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(proxy.has_cut(), "COMMIT was not sent");
    assert_eq!(postgres(&format!("SELECT count(*) FROM {table}"))[0], "2");
    let dead_letters = run_ok(&["dlq", "list", "--json", "--pipeline", &path]);
    assert_eq!(
        dead_letters.matches("\"sequence\"").count().max(dead_letters.lines().count()),
        3,
        "{dead_letters}"
    );
    postgres(&format!("DROP TABLE {table}"));
}

#[test]
fn fault_03_a_process_whose_server_is_silent_says_so_and_ends_at_sigterm() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = format!("fault_03_stopped_{}", std::process::id());
    postgres(&format!("CREATE TABLE {table} (id bigint)"));
    let (proxy, _runtime) = proxy();
    let lines: Vec<String> = (0..100).map(|id| format!(r#"{{"id":{id}}}"#)).collect();
    let path = pipeline(folder.path(), &table, proxy.port, &lines.join("\n"));
    proxy.cut(Cut::Mute("PGCOPY", "COMMIT\0"));
    let log = folder.path().join("log");
    let file = std::fs::File::create(&log).expect("a log");
    let run =
        shardmill(&["run", &path, "-v"]).stdout(std::process::Stdio::null()).stderr(file).spawn();
    let run = Process(run.expect("the binary starts"));
    wait_for("the commit", || proxy.has_cut());
    proxy.freeze();
    let said = || std::fs::read_to_string(&log).expect("a log");
    wait_for("the silence to be reported", || said().contains("no answer"));
    let begun = Instant::now();
    run.terminate();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?} to end:\n{}", begun.elapsed(), said());
    postgres(&format!("DROP TABLE {table}"));
}

#[test]
fn fault_03_a_start_with_a_silent_server_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let (proxy, _runtime) = proxy();
    let path = pipeline(folder.path(), "cars", proxy.port, "{\"id\":1}\n");
    proxy.freeze();
    let begun = Instant::now();
    let checked = run(&["check", &path]);
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(!checked.status.success() && said.contains("no answer"), "{said}");
    // Most of the time goes into compiling a plugin.
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}
