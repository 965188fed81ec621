//! Limits on what one dead letter keeps, and on all dead letters together.

use std::fs;

use serde_json::Value;

use super::{BUFFER, Folder};
use crate::support::{self, free_port, http_get, wait_for};
use crate::walls::memory::{LIMITS, assert_peak_below, bound, follow};

/// Returns a stage that rejects records that contain a marker.
fn reject_on(marker: &str) -> String {
    format!("config = {{ reject_on = \"{marker}\", format = \"application/json\" }}\n{LIMITS}")
}

#[test]
fn wall_04_a_record_is_kept_once_for_all_its_dead_letters() {
    let payload = format!("{{\"a\":\"{}\"}}", "x".repeat(300_000));
    let folder = Folder::of_lines(std::slice::from_ref(&payload));
    let many = "config = { many_on = \"\", many = 20, format = \"application/json\" }";
    folder
        .pipeline()
        .pipeline(BUFFER)
        .stage("burst", "hostile", many)
        .lines(LIMITS)
        .stage("check", "hostile", &reject_on(""))
        .route_all_to(&["mart"])
        .lines(LIMITS)
        .sqlite("mart", "rows")
        .write();
    crate::support::sqlite(&folder.path().join("mart.db"))
        .execute_batch("CREATE TABLE rows (a text)")
        .expect("a table");
    folder.ok_below(&["run", "--until-caught-up"], bound(8, 8, 3, 3));
    assert_eq!(folder.dead_letters(), 20);
    // A payload that entered the stage unchanged is not stored a second time.
    let components = "SELECT sum(length(bytes)) FROM component";
    let kept = fs::metadata(folder.path().join("state/cars/state.db")).expect("a file").len()
        as i64
        - folder.number(components);
    assert!(kept < 2_000_000, "{kept} bytes are stored for 300,000");
    let id = folder.number("SELECT max(id) FROM dead_letter");
    let (shown, _) = folder.ok(&["dlq", "show", "--json", &id.to_string()]);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["original"]["text"], payload.as_str());
    assert_eq!(shown["entered"]["text"], payload.as_str());
    // The record is deleted together with its last dead letter.
    folder.ok(&["dlq", "purge", &id.to_string()]);
    assert_eq!(folder.number("SELECT count(*) FROM letter_record"), 1);
    folder.ok(&["dlq", "purge", "--all"]);
    // Marks stay as long as a sink may read the record again.
    assert_eq!(folder.number("SELECT count(*) FROM letter_record"), 0);
    let left = folder.number("SELECT bytes FROM letter_store");
    let marks = folder.number("SELECT count(*) FROM letters");
    assert_eq!(left, marks * 512, "{marks} marks");
}

/// Waits until a lane of `stages` blocks because the store is full, makes room in the store, and expects the lane to
/// go on.
fn blocks_and_goes_on(folder: &Folder, port: u16, rows: i64, is_blocked_by: &str, stages: u64) {
    let mut run = folder.start(&["run"]);
    let peak = follow(run.0.id());
    let status = || http_get(port, "/status");
    wait_for("a full store", || status().contains("the store of dead letters is full"));
    assert!(status().contains(is_blocked_by), "{}", status());
    assert!(folder.log().contains("redrive or purge dead letters"), "{}", folder.log());
    let metrics = http_get(port, "/metrics");
    assert!(metrics.contains("shardmill_dead_letters_nearly_full 1"), "{metrics}");
    assert!(metrics.contains("shardmill_dead_letters_bytes_max 1048576"), "{metrics}");
    let first = folder.number("SELECT count(*) FROM dead_letter");
    assert!(0 < first && first < rows, "{first}");
    assert!(folder.number("SELECT bytes FROM letter_store") <= 1 << 20);
    folder.ok(&["dlq", "purge", "--all"]);
    wait_for("the rest", || folder.dead_letters() > 0 && first + folder.dead_letters() >= rows);
    // The run ends by itself at the end of the file.
    assert!(run.wait().success(), "{}", folder.log());
    assert_eq!(first + folder.dead_letters(), rows);
    assert_peak_below(peak.join().expect("a peak"), bound(8, 8, stages, stages), "the run");
}

fn admin(port: u16) -> String {
    format!("[dead_letters]\nbytes = \"1 MiB\"\n{}", support::admin(port))
}

#[test]
fn wall_04_a_full_store_blocks_the_lane_of_a_stage_which_says_so_and_goes_on() {
    let row = |n| format!("{{\"id\":{n},\"a\":\"{}\"}}", "x".repeat(100_000));
    let folder = Folder::of_lines(&(0..15).map(row).collect::<Vec<_>>());
    let port = free_port();
    folder
        .pipeline()
        .pipeline(BUFFER)
        .stage("check", "hostile", &reject_on(""))
        .route_all_to(&["mart"])
        .lines(LIMITS)
        .sqlite("mart", "rows")
        .table(&admin(port))
        .write();
    crate::support::sqlite(&folder.path().join("mart.db"))
        .execute_batch("CREATE TABLE rows (id integer)")
        .expect("a table");
    blocks_and_goes_on(&folder, port, 15, "dead letters", 2);
}

#[test]
fn wall_04_a_full_store_blocks_a_sink_that_refuses_rows_which_says_so_and_goes_on() {
    let row = |n| format!("{{\"id\":\"no number {n}\",\"a\":\"{}\"}}", "x".repeat(100_000));
    let folder = Folder::of_lines(&(0..15).map(row).collect::<Vec<_>>());
    let port = free_port();
    let sink = "type = \"sqlite\"\npath = \"mart.db\"\ntable = \"rows\"";
    let commit = "[sink.commit]\nrows = 2\nlinger = \"50 ms\"";
    folder
        .pipeline()
        .pipeline(BUFFER)
        .route_all_to(&["mart"])
        .lines(LIMITS)
        .table(&format!("[[sink]]\nname = \"mart\"\n{sink}\n{commit}"))
        .table(&admin(port))
        .write();
    crate::support::sqlite(&folder.path().join("mart.db"))
        .execute_batch("CREATE TABLE rows (id integer NOT NULL, a text)")
        .expect("a table");
    blocks_and_goes_on(&folder, port, 15, "mart", 1);
}
