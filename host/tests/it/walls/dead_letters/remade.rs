//! Payloads that entered a stage and are too large to store: a redrive makes them again.

use std::fs;

use serde_json::Value;

use super::{BUFFER, Folder, texts};
use crate::walls::memory::{LIMITS, bound};

const ROWS_OF_RECORD: usize = 5;
/// Memory bound of a run: each of its three stages has one instance.
const BOUND_OF_RUN: u64 = bound(8, 8, 3, 3);
/// Memory bound of a redrive: further instances make payloads again.
const BOUND_OF_REDRIVE: u64 = bound(8, 8, 3, 6);

/// Writes a pipeline whose first stage makes five rows of one mebibyte of each record that contains a marker. Its
/// second stage rejects what `rejects` says. A batch has one record: five rows fit into a plugin's memory, and
/// fifteen do not.
fn burst(folder: &Folder, marker: &str, rejects: &str) {
    let many = format!(
        "config = {{ share_payload_on = \"{marker}\", many = {ROWS_OF_RECORD} }}\n\
         limits = {{ memory = \"16 MiB\", output = \"64 MiB\" }}"
    );
    let check = format!("config = {{ {rejects} }}");
    let last = "routes = { out = [\"files\"] }";
    folder
        .pipeline()
        .lines("batch = { records = 1 }")
        .pipeline(BUFFER)
        .stage("burst", "hostile", &many)
        .stage("check", "hostile", &check)
        .lines(LIMITS)
        .stage("last", "hostile", last)
        .lines(LIMITS)
        .sink(
            "files",
            "type = \"objects\"\nurl = \"files\"\nformat = \"raw\"\ncompression = \"none\"",
        )
        .write();
}

fn lines() -> Vec<String> {
    (0..3).map(|n| format!("record {n}")).collect()
}

/// Returns the number of bytes in all objects.
fn written(folder: &Folder) -> usize {
    let is_data = |path: &&std::path::PathBuf| !path.display().to_string().contains("_shardmill");
    let files = folder.files("files");
    files
        .iter()
        .filter(is_data)
        .map(|path| fs::metadata(path).expect("a file").len() as usize)
        .sum()
}

fn kept_beside_components(folder: &Folder) -> i64 {
    let pages = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()";
    folder.number(pages) - folder.number("SELECT sum(length(bytes)) FROM component")
}

#[test]
fn wall_04_large_payloads_are_kept_as_digests_and_remade_by_the_revision_that_ran() {
    let folder = Folder::of_lines(&lines());
    burst(&folder, "record", "reject_on = \"\"");
    folder.ok_below(&["run", "--until-caught-up"], BOUND_OF_RUN);
    let dead_letters = 3 * ROWS_OF_RECORD;
    assert_eq!(folder.dead_letters() as usize, dead_letters);
    let kept = kept_beside_components(&folder);
    assert!(kept < 1 << 20, "{kept} bytes are stored for 30 bytes of records");
    let id = folder.number("SELECT min(id) FROM dead_letter");
    let (shown, _) = folder.ok(&["dlq", "show", "--json", &id.to_string()]);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["original"]["text"], "record 0");
    assert_eq!(shown["entered"]["bytes"], 1 << 20);
    let (shown, _) = folder.ok(&["dlq", "show", &id.to_string()]);
    assert!(shown.contains("too large to be stored"), "{shown}");

    // The files have changed: the previous stage would not make such rows now.
    burst(&folder, "nothing", "reject_on = \"nothing\"");
    folder.ok_below(&["dlq", "redrive", "--all"], BOUND_OF_REDRIVE);
    assert_eq!(folder.dead_letters(), 0);
    assert_eq!(written(&folder), dead_letters << 20);
}

#[test]
fn wall_04_a_payload_with_another_digest_is_refused_and_its_dead_letter_stays() {
    let folder = Folder::of_lines(&lines());
    burst(&folder, "${MARKER}", "reject_on = \"\"");
    let with_marker = |arguments: &[&str], marker: &str| {
        let mut command = folder.command(arguments);
        let done = crate::support::output(command.env("MARKER", marker));
        (done.status.success(), texts(&done).1)
    };
    let (ran, log) = with_marker(&["run", "--until-caught-up"], "record");
    assert!(ran, "{log}");
    burst(&folder, "${MARKER}", "reject_on = \"nothing\"");
    let (redriven, log) = with_marker(&["dlq", "redrive", "--all"], "another word");
    assert!(!redriven, "{log}");
    assert!(log.contains("expected a payload with the digest"), "{log}");
    assert!(log.contains("15 dead letters were not redriven and stay"), "{log}");
    assert_eq!((folder.dead_letters() as usize, written(&folder)), (3 * ROWS_OF_RECORD, 0));
    // With the original value, the payloads can be made again.
    let (redriven, log) = with_marker(&["dlq", "redrive", "--all"], "record");
    assert!(redriven, "{log}");
    assert_eq!((folder.dead_letters() as usize, written(&folder)), (0, (3 * ROWS_OF_RECORD) << 20));
}

#[test]
fn wall_04_a_dead_letter_of_a_redrive_is_remade_by_all_the_runs_that_it_came_through() {
    let folder = Folder::of_lines(&lines());
    burst(&folder, "record", "reject_on = \"\"");
    folder.ok_below(&["run", "--until-caught-up"], BOUND_OF_RUN);
    let dead_letters = 3 * ROWS_OF_RECORD;
    // The records now fail at the next stage.
    let pipeline = fs::read_to_string(folder.path().join("pipeline.toml")).expect("read");
    let mended = pipeline.replace("reject_on = \"\"", "reject_on = \"nothing\"");
    let broken = mended.replace(
        "routes = { out = [\"files\"] }",
        "config = { reject_on = \"\" }\nroutes = { out = [\"files\"] }",
    );
    assert_ne!(mended, broken);
    fs::write(folder.path().join("pipeline.toml"), broken).expect("written");
    folder.ok_below(&["dlq", "redrive", "--all"], BOUND_OF_REDRIVE);
    let of_last = "SELECT count(*) FROM dead_letter WHERE place = 'stage:last' AND held = 0";
    assert_eq!((folder.number(of_last) as usize, written(&folder)), (dead_letters, 0));
    let kept = kept_beside_components(&folder);
    assert!(kept < 1 << 20, "{kept} bytes are stored");

    fs::write(folder.path().join("pipeline.toml"), mended).expect("written");
    folder.ok_below(&["dlq", "redrive", "--all"], BOUND_OF_REDRIVE);
    assert_eq!((folder.dead_letters() as usize, written(&folder)), (0, dead_letters << 20));
}

#[test]
fn wall_04_rows_that_a_sink_gave_up_are_remade_too() {
    let folder = Folder::of_lines(&lines());
    burst(&folder, "record", "reject_on = \"nothing\"");
    let pipeline = fs::read_to_string(folder.path().join("pipeline.toml")).expect("read");
    let table = "type = \"sqlite\"\npath = \"mart.db\"\ntable = \"rows\"";
    let refusing = pipeline
        .replace(
            "type = \"objects\"\nurl = \"files\"\nformat = \"raw\"\ncompression = \"none\"",
            table,
        )
        .replace("routes = { out", "config = { format = \"application/json\" }\nroutes = { out");
    fs::write(folder.path().join("pipeline.toml"), &refusing).expect("written");
    crate::support::sqlite(&folder.path().join("mart.db"))
        .execute_batch("CREATE TABLE rows (id integer)")
        .expect("a table");
    // The rows are not JSON objects, so the sink refuses them.
    folder.ok_below(&["run", "--until-caught-up"], BOUND_OF_RUN);
    let dead_letters = 3 * ROWS_OF_RECORD;
    let of_sink = "SELECT count(*) FROM dead_letter WHERE place = 'sink:files' AND held = 0";
    assert_eq!(folder.number(of_sink) as usize, dead_letters);
    assert!(kept_beside_components(&folder) < 1 << 20);
    // The sink refuses them again, and their dead letters stay the same.
    folder.ok_below(&["dlq", "redrive", "--all"], BOUND_OF_REDRIVE);
    assert_eq!(folder.number(of_sink) as usize, dead_letters);
    assert!(kept_beside_components(&folder) < 1 << 20);
}
