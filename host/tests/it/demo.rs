//! `shardmill demo`, run twice as a newcomer does.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::support::{Process, run_ok, shardmill, wait_for};

#[test]
fn the_demo_runs_twice_and_writes_each_car_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("demo");
    let data_text = data.display().to_string();
    for _ in 0..2 {
        let printed = run_ok(&["demo", "--data", &data_text]);
        let published = printed.lines().filter(|line| line.starts_with("publish: "));
        assert_eq!(published.count(), 100);
        assert!(printed.contains("publish: Honda 7 [# 7]\n"), "{printed}");
        let read: Vec<&str> =
            printed.lines().filter(|line| line.starts_with("getRecords [")).collect();
        assert_eq!(read.len(), 100, "{printed}");
        assert!(read.iter().any(|line| line.ends_with("]: Honda 7 [# 7]")), "{printed}");
        let shards: BTreeSet<&str> =
            read.iter().filter_map(|line| line.split(['[', ']']).nth(1)).collect();
        assert_eq!(shards.len(), 5, "{shards:?}");

        let mart = rusqlite::Connection::open(data.join("cars.db")).expect("the data mart");
        let mut query = mart.prepare("SELECT id FROM cars ORDER BY id").expect("the table");
        let ids = query.query_map([], |row| row.get::<_, i64>(0)).expect("rows");
        let ids: Vec<i64> = ids.map(|id| id.expect("an id")).collect();
        assert_eq!(ids, (0..100).collect::<Vec<i64>>());
    }
}

#[test]
fn the_demo_empties_no_folder_that_it_did_not_make() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("mine.txt"), "mine").expect("written");
    let output = crate::support::run(&["demo", "--data", &folder.path().display().to_string()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(folder.path().join("mine.txt").exists());
}

/// Simulates `shardmill demo | head`.
#[test]
fn a_demo_that_nobody_reads_any_more_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("demo").display().to_string();
    let mut command = shardmill(&["demo", "--data", &data]);
    let demo = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut demo = Process(demo.expect("the binary starts"));
    let mut line = String::new();
    let output = demo.0.stdout.take().expect("piped");
    BufReader::new(output).read_line(&mut line).expect("a line");
    wait_for("the demo to end", || demo.0.try_wait().expect("a state").is_some());
}
