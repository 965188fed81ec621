//! `shardmill stream tail` through the real binary: it follows reshards, starts at different positions, and shows the
//! output of a plugin.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::support::world::{STREAM, World};
use crate::support::{Process, plugin, shardmill};
use serde::Serialize;
use serde_json::Value;

const FIRST: &str = "shardId-000000000000";

#[derive(Serialize)]
struct Car<'a> {
    id: u64,
    make: &'a str,
}

fn car(id: u64, make: &str) -> Vec<u8> {
    bincode::serde::encode_to_vec(Car { id, make }, bincode::config::standard()).expect("encoded")
}

fn tail(world: &World, options: &[&str]) -> std::process::Command {
    let state_dir = world.folder.path().join("state").display().to_string();
    let place = ["--stream", STREAM, "--endpoint", "embedded", "--state-dir", &state_dir];
    let command = ["stream", "tail", "--json"];
    shardmill(&[&command[..], &place, options].concat())
}

/// Tails to the end; returns the lines, and standard error.
fn tail_to_end(world: &World, options: &[&str]) -> (Vec<Value>, String) {
    let output = crate::support::output(tail(world, options).arg("--no-follow"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{options:?}: {said}");
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    (lines.lines().map(line).collect(), said)
}

fn line(text: &str) -> Value {
    serde_json::from_str(text).expect(text)
}

fn ids(lines: &[Value]) -> Vec<u64> {
    let id = |line: &Value| {
        let payload: Value = serde_json::from_str(line["payload"].as_str().expect("text"))?;
        Ok::<_, serde_json::Error>(payload["id"].as_u64().expect("an id"))
    };
    let mut ids: Vec<u64> = lines.iter().map(|line| id(line).expect("JSON")).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn a_split_is_followed_and_children_come_after_their_parent() {
    let world = World::new(1);
    world.put(0..10, 7);
    let mut child = tail(&world, &["--limit", "40"]).stdout(Stdio::piped()).spawn();
    let output = child.as_mut().expect("the binary starts").stdout.take().expect("piped");
    let _tail = child.map(Process);
    let mut read = BufReader::new(output).lines();
    let mut next = || line(&read.next().expect("a line").expect("text"));
    let mut lines: Vec<Value> = (0..10).map(|_| next()).collect();
    world.put(10..20, 7);
    world.split(&world.open_shards()[0]);
    world.put(20..40, 7);
    lines.extend((0..30).map(|_| next()));
    assert_eq!(ids(&lines), (0..40).collect::<Vec<_>>());
    let shards: Vec<&str> = lines.iter().map(|line| line["shard"].as_str().expect("id")).collect();
    assert!(shards[..20].iter().all(|shard| *shard == FIRST), "{shards:?}");
    assert!(shards[20..].iter().all(|shard| *shard != FIRST), "{shards:?}");
    assert!(read.next().is_none(), "the limit ends the tail");
}

#[test]
fn a_tail_begins_where_asked_and_keeps_to_its_shard() {
    let world = World::new(1);
    world.put(0..10, 7);
    world.split(&world.open_shards()[0]);
    world.put(10..30, 7);
    let (all, _) = tail_to_end(&world, &[]);
    assert_eq!(ids(&all), (0..30).collect::<Vec<_>>());
    let (parent, _) = tail_to_end(&world, &["--shard", FIRST]);
    assert_eq!(ids(&parent), (0..10).collect::<Vec<_>>());
    let sequence = parent[6]["sequence"].as_str().expect("text");
    let (rest, _) = tail_to_end(&world, &["--from", &format!("at-sequence:{FIRST}:{sequence}")]);
    assert_eq!(ids(&rest), (6..30).collect::<Vec<_>>());
    // The served stream stores arrival times in whole seconds.
    let begun = chrono::Utc::now().timestamp();
    crate::support::wait_for("the next second", || chrono::Utc::now().timestamp() > begun);
    let between = chrono::Utc::now().format("at-timestamp:%Y-%m-%dT%H:%M:%SZ").to_string();
    world.put(30..40, 7);
    let (late, _) = tail_to_end(&world, &["--from", &between]);
    assert_eq!(ids(&late), (30..40).collect::<Vec<_>>());
    // The parent's records are old, and the parent is closed.
    let (latest, _) = tail_to_end(&world, &["--from", "latest"]);
    assert!(latest.iter().all(|line| line["shard"] != FIRST), "{latest:?}");
}

#[test]
fn a_shard_or_a_start_that_is_not_there_is_named() {
    let world = World::new(1);
    let fails = |options: &[&str]| {
        let output = crate::support::output(tail(&world, options).arg("--no-follow"));
        assert!(!output.status.success(), "{options:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = fails(&["--shard", "shardId-000000000009"]);
    assert!(said.contains("unknown shard shardId-000000000009"), "{said}");
    let said = fails(&["--from", "at-sequence:shardId-000000000008:1"]);
    assert!(said.contains("unknown shard shardId-000000000008"), "{said}");
    let said = fails(&["--from", "lates"]);
    assert!(said.contains("lates") && said.contains("did you mean `latest`"), "{said}");
    let said = fails(&["--config", "{}"]);
    assert!(said.contains("--decode"), "{said}");
}

#[test]
fn records_pass_the_plugin_and_what_it_rejects_is_printed_with_the_reason() {
    let world = World::new(2);
    let records = [("one", car(1, "Volvo 1")), ("bad", vec![0xff; 3]), ("two", car(2, "BMW 2"))];
    world.put_raw(records.into_iter().map(|(key, payload)| (key.to_owned(), payload)));
    let (mut lines, said) = tail_to_end(&world, &["--decode", &plugin("car-decode")]);
    lines.sort_by_key(|line| line["payload"].to_string());
    assert_eq!(ids(&lines), [1, 2]);
    for (line, (key, make)) in lines.iter().zip([("one", "Volvo 1"), ("two", "BMW 2")]) {
        assert_eq!((&line["route"], &line["key"]), (&"cars".into(), &key.into()), "{line}");
        let payload: Value = serde_json::from_str(line["payload"].as_str().expect("text"))
            .unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(payload["make"], make);
    }
    let rejected: Vec<&str> = said.lines().filter(|line| line.contains("rejected: ")).collect();
    let [rejected] = rejected[..] else { panic!("one record is rejected: {said}") };
    assert!(rejected.contains("shardId-") && rejected.contains("car"), "{rejected}");
}

#[test]
fn a_plugin_that_does_not_load_or_start_is_named() {
    let world = World::new(1);
    let missing = world.folder.path().join("missing.wasm").display().to_string();
    for (file, config) in [(missing, "{}"), (plugin("route-json"), "{\"no\":1}")] {
        let options = ["--decode", &file, "--config", config, "--no-follow"];
        let output = crate::support::output(&mut tail(&world, &options));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&file), "{said}");
    }
}
