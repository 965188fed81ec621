//! `examples/flights` exactly as in the repository: 336,776 real flights, with types, in three tables.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use crate::support::flights::{COLUMNS, TABLES, from_csv, in_objects, in_sqlite, same_multiset};
use crate::support::{Process, flights_csv, root, run_ok, serve_stream, shardmill};

/// Limit of the run's peak memory, without the stream, in KiB.
const PEAK_KIB_MAX: u64 = 300 * 1024;

/// Returns the number of rows and the sum of each numeric column of the CSV, by airport.
fn sums_of_csv() -> BTreeMap<String, (i64, Vec<i64>)> {
    let mut airports: BTreeMap<String, (i64, Vec<i64>)> = BTreeMap::new();
    for line in from_csv(&flights_csv()) {
        let fields: Vec<&str> = line.split(',').collect();
        let (rows, sums) =
            airports.entry(fields[12].to_owned()).or_insert((0, vec![0; COLUMNS.len()]));
        *rows += 1;
        for (sum, field) in sums.iter_mut().zip(fields) {
            *sum += field.parse::<i64>().unwrap_or(0);
        }
    }
    airports
}

/// Returns the same figures of a table.
fn sums_of_table(database: &rusqlite::Connection, table: &str) -> (i64, Vec<i64>) {
    let column = |sql: String| database.query_row(&sql, [], |row| row.get::<_, i64>(0));
    let rows = column(format!("SELECT count(*) FROM {table}")).expect(table);
    let sums = COLUMNS.map(|name| {
        let number = format!("CASE WHEN typeof({name}) = 'integer' THEN {name} ELSE 0 END");
        column(format!("SELECT coalesce(sum({number}), 0) FROM {table}")).expect(name)
    });
    (rows, sums.to_vec())
}

/// Returns the peak of a process's resident memory so far, in KiB.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn every_flight_is_in_its_airports_table_with_its_types() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("state");
    let _stream = serve_stream(&state);
    let pipeline = root().join("examples/flights/pipeline.toml").display().to_string();
    let with_places = |arguments: &[&str]| {
        let mut command = shardmill(arguments);
        command.env("SHARDMILL_STATE", &state).env("SHARDMILL_DATA", folder.path());
        command
    };
    let csv = flights_csv().display().to_string();
    for arguments in [
        &["stream", "create", "--shards", "5", "--pipeline", &pipeline][..],
        &["stream", "put", "--pipeline", &pipeline, &csv],
    ] {
        assert!(with_places(arguments).status().expect("it starts").success(), "{arguments:?}");
    }
    // The second run finds that everything is done.
    for _ in 0..2 {
        let mut run = with_places(&["run", &pipeline, "--until-caught-up"]);
        let mut run = Process(run.stdout(Stdio::null()).spawn().expect("it starts"));
        let mut peak = 0;
        let ended = loop {
            peak = peak_kib(run.0.id()).unwrap_or(0).max(peak);
            if let Some(ended) = run.0.try_wait().expect("a state") {
                break ended;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(ended.success());
        println!("peak memory: {} MiB", peak / 1024);
        assert!(peak < PEAK_KIB_MAX, "peak memory: {peak} KiB");
    }

    let mart = folder.path().join("flights.db");
    let database = rusqlite::Connection::open(&mart).expect("the data mart");
    let expected = sums_of_csv();
    for (table, airport) in TABLES.into_iter().zip(["EWR", "JFK", "LGA"]) {
        let found = sums_of_table(&database, table);
        assert_eq!(found, expected[airport], "{table}");
        println!("{table}: {} rows", found.0);
    }
    let expected = from_csv(&flights_csv());
    same_multiset("SQLite", &expected, &in_sqlite(&mart));
    same_multiset("objects", &expected, &in_objects(&folder.path().join("logs")));
    let dead_letters =
        rusqlite::Connection::open(state.join("flights/state.db")).expect("the state");
    let dead_letters: i64 = dead_letters
        .query_row("SELECT count(*) FROM dead_letter", [], |row| row.get(0))
        .expect("the dead letters");
    assert_eq!(dead_letters, 0);
    run_ok(&["check", "--offline", &root().join("pipeline.toml").display().to_string()]);
}
