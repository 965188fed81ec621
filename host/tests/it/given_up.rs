//! A sink that is unreachable and is given up, through the real binary. The shard goes on, and each row is in the
//! table or among the dead letters, never in both, whatever the outcome of the last commit was.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;

use crate::sql_sinks::proxy::{Cut, Proxy};
use crate::support::pipeline::PipelineToml;
use crate::support::{
    Process, postgres, postgres_url, run_ok, serve_stream, shardmill, sqlite, wait_for,
};

/// Number of rows that are put at once.
const PIECE: u64 = 40;

/// Writes the pipeline's file; returns its path.
fn pipeline(folder: &Path, url: &str, table: &str) -> String {
    let mart = format!(
        "type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\"\n[sink.commit]\nrows = 10\n\
         linger = \"50 ms\"\non_failure = \"dead-letter\"\ngive_up_after = \"300 ms\""
    );
    let copy =
        format!("type = \"sqlite\"\npath = \"{}/copy.db\"\ntable = \"copy\"", folder.display());
    PipelineToml::new(folder, table)
        .timing("")
        .stream("rows", "embedded", "format = \"application/json\"")
        .route_all_to(&["mart", "copy"])
        .plain_sink("mart", &mart)
        .sink("copy", &copy)
        .write()
}

fn ids(table: &str) -> Vec<u64> {
    let ids = postgres(&format!("SELECT id FROM {table}"));
    ids.iter().map(|id| id.parse().expect("an id")).collect()
}

/// Cuts the connection at a word of the client, puts rows, restores the connection, and puts more rows.
async fn lose_and_find(test: &str, cut: Cut) {
    let folder = tempfile::tempdir().expect("a folder");
    let table = format!("given_up_{test}_{}", std::process::id());
    postgres_in_thread(&format!("CREATE TABLE {table} (id bigint NOT NULL)"));
    let server = url::Url::parse(&postgres_url()).expect("a URL");
    let proxy =
        Proxy::start(server.socket_addrs(|| Some(5432)).expect("an address")[0].to_string());
    let proxy = proxy.await;
    let mut through = server.clone();
    through.set_port(Some(proxy.port)).expect("a port");
    through.set_host(Some("127.0.0.1")).expect("a host");
    let config = pipeline(folder.path(), through.as_str(), &table);
    tokio::task::block_in_place(|| {
        let copy = sqlite(&folder.path().join("copy.db"));
        copy.execute_batch("CREATE TABLE copy (id integer NOT NULL)").expect("a table");
        let _stream = serve_stream(&folder.path().join("state"));
        run_ok(&["stream", "create", "--shards", "1", "--pipeline", &config]);
        let run = shardmill(&["run", &config]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let run = Process(run.expect("the binary starts"));
        let put = |ids: Range<u64>| {
            let mut lines = String::new();
            for id in ids {
                writeln!(lines, "{{\"id\":{id}}}").expect("text");
            }
            let rows = folder.path().join("rows.ndjson");
            std::fs::write(&rows, lines).expect("written");
            run_ok(&["stream", "put", "--pipeline", &config, &rows.display().to_string()]);
        };
        let in_copy = |expected: u64| {
            let count = copy.query_row("SELECT count(*) FROM copy", [], |row| row.get(0));
            count == Ok(expected)
        };
        put(0..PIECE);
        wait_for("the first rows", || ids_in_thread(&table).len() as u64 == PIECE);

        proxy.cut(cut);
        put(PIECE..2 * PIECE);
        wait_for("the other sink", || in_copy(2 * PIECE));
        let state = sqlite(&folder.path().join(format!("state/{table}/state.db")));
        let kept = |held: u8| -> u64 {
            let count = "SELECT count(*) FROM dead_letter WHERE held = ?1";
            state.query_row(count, [held], |row| row.get(0)).expect("a count")
        };
        wait_for("all to be given up", || kept(2) == PIECE);
        assert_eq!(kept(0), 0, "a dead letter is visible before the outcome is known");

        proxy.accept();
        put(2 * PIECE..3 * PIECE);
        let has_last = || ids_in_thread(&table).contains(&(3 * PIECE - 1));
        wait_for("the last rows", || has_last() && kept(2) == 0);
        assert_eq!(run.terminate(), Some(0));

        let dead_letters = run_ok(&["dlq", "export", "--sink", "mart", "--pipeline", &config]);
        let mut found = ids_in_thread(&table);
        let in_table = found.len() as u64;
        for dead_letter in dead_letters.lines() {
            assert!(dead_letter.contains("given up: sink mart"), "{dead_letter}");
            let dead_letter: serde_json::Value = serde_json::from_str(dead_letter).expect("JSON");
            let row = dead_letter["entered"]["text"].as_str().expect("text");
            let row: serde_json::Value = serde_json::from_str(row).expect("JSON");
            found.push(row["id"].as_u64().expect("an id"));
        }
        found.sort_unstable();
        assert_eq!(found, (0..3 * PIECE).collect::<Vec<_>>(), "{in_table} are in the table");
        // If the commit had taken effect, its rows are not dead letters.
        let landed = matches!(cut, Cut::AfterAndRefuse("COMMIT\0"));
        assert_eq!(in_table > 2 * PIECE, landed, "{in_table}");
        assert!(in_copy(3 * PIECE), "the other sink has all");
    });
    postgres_in_thread(&format!("DROP TABLE {table}"));
}

/// Runs statements in a thread that has no runtime.
fn postgres_in_thread(sql: &str) {
    std::thread::scope(|scope| scope.spawn(|| postgres(sql)).join().expect("no panic"));
}

fn ids_in_thread(table: &str) -> Vec<u64> {
    std::thread::scope(|scope| scope.spawn(|| ids(table)).join().expect("no panic"))
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_lost_sink_are_dead_letters() {
    lose_and_find("lost", Cut::AfterAndRefuse("SAVEPOINT")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_had_landed_after_all_are_not_dead_letters() {
    lose_and_find("landed", Cut::AfterAndRefuse("COMMIT\0")).await;
}
