//! `shardmill stream` through the real binary, against the embedded stream.

use crate::support::player::{Player, Seen};
use crate::support::{Process, run, run_ok, serve_stream};
use hyper::StatusCode;
use serde_json::Value;

/// Served stream `test`, deleted with its folder.
struct Served {
    folder: tempfile::TempDir,
    _server: Process,
}

impl Served {
    fn new(shards: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let server = serve_stream(folder.path());
        let served = Self { folder, _server: server };
        served.ok(&["create", "--shards", &shards.to_string()]);
        served
    }

    fn arguments(&self, command: &[&str]) -> Vec<String> {
        let state_dir = self.folder.path().display().to_string();
        let place = ["--stream", "test", "--endpoint", "embedded", "--state-dir", &state_dir];
        let all = ["stream"].iter().chain(command).chain(&place).chain(&["--json"]);
        all.map(|argument| (*argument).to_owned()).collect()
    }

    /// Runs a command, which must succeed; returns its report.
    fn ok(&self, command: &[&str]) -> Value {
        let arguments = self.arguments(command);
        let report = run_ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        serde_json::from_str(&report).expect("a JSON report")
    }

    /// Runs a command that must fail with exit code 1; returns what it prints.
    fn fails(&self, command: &[&str]) -> String {
        let arguments = self.arguments(command);
        let output = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    }
}

/// Returns the ids and hash ranges of new shards.
fn new_shards(report: &Value) -> Vec<(String, u128, u128)> {
    let key = |shard: &Value, name: &str| {
        shard[name].as_str().expect("a hash key").parse::<u128>().expect("a number")
    };
    let shards = report["new_shards"].as_array().expect("a list");
    shards
        .iter()
        .map(|shard| {
            let id = shard["shard"].as_str().expect("an id").to_owned();
            (id, key(shard, "starting_hash_key"), key(shard, "ending_hash_key"))
        })
        .collect()
}

const FIRST: &str = "shardId-000000000000";

#[test]
fn a_shard_is_split_in_the_middle_and_its_halves_merged_again() {
    let served = Served::new(1);
    let report = served.ok(&["split", FIRST]);
    assert_eq!((&report["status"], &report["open_shards"]), (&"ACTIVE".into(), &2.into()));
    let halves = new_shards(&report);
    let [(low, 0, low_end), (high, high_start, u128::MAX)] = &halves[..] else {
        unreachable!("expected two halves: {report}")
    };
    assert_eq!((*low_end, *high_start), ((1 << 127) - 1, 1 << 127));
    assert_eq!(report["new_shards"][0]["parents"], serde_json::json!([FIRST]));
    let report = served.ok(&["merge", low, high]);
    assert_eq!(report["open_shards"], 1);
    let merged = new_shards(&report);
    assert_eq!(merged.len(), 1);
    assert_eq!((merged[0].1, merged[0].2), (0, u128::MAX));
    assert_eq!(report["new_shards"][0]["parents"], serde_json::json!([low, high]));
}

#[test]
fn a_shard_is_split_where_asked_and_not_outside_its_range() {
    let served = Served::new(1);
    let said = served.fails(&["split", FIRST, "--at", "0"]);
    assert!(said.contains("--at 0") && said.contains(FIRST), "{said}");
    let halves = new_shards(&served.ok(&["split", FIRST, "--at", "1000"]));
    assert_eq!((halves[0].2, halves[1].1), (999, 1000));
    let said = served.fails(&["split", FIRST]);
    assert!(said.contains("is closed"), "{said}");
}

#[test]
fn shards_that_are_not_adjacent_or_not_there_are_named() {
    let served = Served::new(3);
    let third = "shardId-000000000002";
    let said = served.fails(&["merge", FIRST, third]);
    assert!(said.contains(FIRST) && said.contains(third), "{said}");
    assert!(said.contains("not adjacent"), "{said}");
    let said = served.fails(&["merge", FIRST, "shardId-000000000009"]);
    assert!(said.contains("unknown shard shardId-000000000009"), "{said}");
}

#[test]
fn a_stream_is_scaled_to_equal_ranges() {
    let served = Served::new(2);
    let report = served.ok(&["scale", "4"]);
    assert_eq!(report["open_shards"], 4, "{report}");
    let widths: Vec<u128> =
        new_shards(&report).iter().map(|(_, start, end)| (end - start) >> 64).collect();
    assert_eq!(widths, [(1 << 62) - 1; 4], "{report}");
}

#[test]
fn consumers_are_registered_listed_and_deregistered() {
    let served = Served::new(1);
    assert_eq!(served.ok(&["consumers", "list"])["consumers"], serde_json::json!([]));
    let registered = served.ok(&["consumers", "register", "cars"]);
    assert_eq!(registered, served.ok(&["consumers", "register", "cars"]), "the same, again");
    served.ok(&["consumers", "register", "bikes"]);
    let listed = served.ok(&["consumers", "list"]);
    let mut names: Vec<&str> = Vec::new();
    for consumer in listed["consumers"].as_array().expect("a list") {
        assert_eq!(consumer["status"], "ACTIVE", "{listed}");
        names.push(consumer["consumer"].as_str().expect("a name"));
        if consumer["consumer"] == "cars" {
            assert_eq!(consumer["arn"], registered["arn"], "{listed}");
        }
    }
    names.sort_unstable();
    assert_eq!(names, ["bikes", "cars"]);
    served.ok(&["consumers", "deregister", "cars"]);
    let listed = served.ok(&["consumers", "list"]);
    assert_eq!(listed["consumers"].as_array().map(Vec::len), Some(1), "{listed}");
    let said = served.fails(&["consumers", "deregister", "cars"]);
    assert!(said.contains("consumer cars") && said.contains("not registered"), "{said}");
}

/// Answers with the stream, and with its consumers in two pages: the embedded stream has only one page.
fn paged(seen: &Seen) -> (StatusCode, &'static str) {
    let body = match (seen.target.rsplit('.').next(), seen.body.contains("NextToken")) {
        (Some("DescribeStreamSummary"), _) => {
            r#"{"StreamDescriptionSummary":{"StreamName":"test","StreamARN":
            "arn:aws:kinesis:us-east-1:123456789012:stream/test","StreamStatus":"ACTIVE",
            "RetentionPeriodHours":24,"StreamCreationTimestamp":1700000000,
            "EnhancedMonitoring":[],"OpenShardCount":0}}"#
        }
        (_, false) => {
            r#"{"Consumers":[{"ConsumerName":"cars","ConsumerARN":"arn:cars",
            "ConsumerStatus":"ACTIVE","ConsumerCreationTimestamp":1}],"NextToken":"page-2"}"#
        }
        (_, true) => {
            r#"{"Consumers":[{"ConsumerName":"bikes","ConsumerARN":"arn:bikes",
            "ConsumerStatus":"DELETING","ConsumerCreationTimestamp":2}]}"#
        }
    };
    (StatusCode::OK, body)
}

#[test]
fn all_pages_of_consumers_are_listed() {
    let server = Player::start(paged);
    let place = ["--stream", "test", "--endpoint", &server.url, "--json"];
    let listed = run_ok(&[&["stream", "consumers", "list"][..], &place].concat());
    let listed: Value = serde_json::from_str(&listed).expect("a JSON report");
    let expected = serde_json::json!([
        { "consumer": "cars", "arn": "arn:cars", "status": "ACTIVE", "created_ms": 1000 },
        { "consumer": "bikes", "arn": "arn:bikes", "status": "DELETING", "created_ms": 2000 },
    ]);
    assert_eq!(listed["consumers"], expected);
    let asked = server.seen();
    let last = asked.last().expect("requests");
    assert!(last.body.contains("page-2") && last.body.contains("StreamARN"), "{last:?}");
}
