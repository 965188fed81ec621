//! Stages against a plugin that misbehaves on request: the fault is one record's.
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use shardmill::config::{RejectedMax, parse};
use shardmill::plugin::{Backends, CompileCache, PluginEngine, PluginHost};
use shardmill::position::LetterPlace;
use shardmill::record::{
    Batch, Position, PositionSpan, Record, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill::stage::{Blocked, Chain, ChainOutcome, Generation};
use tokio_util::sync::CancellationToken;

/// Records of a batch.
const RECORDS: usize = 1_000;

/// One lane of a pipeline whose only stage is the hostile plugin.
struct Hostile {
    chain: Chain,
}

impl Hostile {
    fn new(misdeed: &str, rejected_max: RejectedMax) -> Self {
        let text = format!(
            r#"
[pipeline]
name = "hostile"
[source]
type = "kinesis"
stream = "test"
[[stage]]
name = "misbehave"
plugin = "{}"
[stage.config]
{misdeed}
[stage.limits]
batch_time = "300 ms"
record_time = "100 ms"
memory = "16 MiB"
output = "4 MiB"
retry = "500 ms"
[stage.routes]
out = ["console"]
[[sink]]
name = "console"
type = "stdout"
"#,
            support::plugin("hostile")
        );
        let config = parse(Path::new("test.toml"), &text, &|_| None).expect("a sound pipeline");
        let engine = PluginEngine::new().expect("an engine");
        let host =
            PluginHost { engine, cache: CompileCache::none(), backends: Backends::default() };
        let (generation, _) =
            Generation::from_config(&config, &host, &|_| None).expect("a sound plugin");
        let stop = CancellationToken::new();
        let chain = Chain::start(&Arc::new(generation), &shard(), rejected_max, &stop);
        Self { chain: chain.expect("it starts") }
    }

    fn run(&mut self, payloads: &[String]) -> Result<ChainOutcome, Blocked> {
        self.chain.run(&Arc::new(batch(payloads)), &HashSet::new())
    }
}

fn shard() -> ShardKey {
    let stream = StreamIdentity { name: "test".into(), arn: "arn".into(), created_ms: 0 };
    ShardKey { pipeline: "hostile".into(), stream: stream.into(), shard: "shardId-0".into() }
}

fn position(sequence: usize) -> Position {
    let sequence = SequenceNumber::parse(&sequence.to_string()).expect("a number");
    Position { sequence, sub_sequence: 0 }
}

fn batch(payloads: &[String]) -> Batch {
    let records = payloads.iter().enumerate().map(|(index, payload)| Record {
        position: position(index),
        partition_key: Bytes::from("key"),
        payload: Bytes::from(payload.clone()),
        arrived_ms: 1,
    });
    let span = PositionSpan { from_exclusive: None, to_inclusive: position(payloads.len() - 1) };
    Batch { shard: shard(), records: records.collect(), span }
}

/// 1,000 payloads, of which three are bad.
fn payloads(bad: &[usize]) -> Vec<String> {
    (0..RECORDS).map(|i| format!("{} {i}", if bad.contains(&i) { "bad" } else { "fine" })).collect()
}

/// The misdeed's three culprits alone are dead-lettered; all others are delivered, in order.
fn assert_culprits_alone(misdeed: &str, reason: &str) {
    let bad = [0, 499, 999];
    let payloads = payloads(&bad);
    let mut hostile = Hostile::new(misdeed, RejectedMax::default());
    let outcome = hostile.run(&payloads).unwrap_or_else(|why| panic!("{misdeed}: {why:?}"));
    let letters: Vec<&Position> =
        outcome.letters.iter().map(|letter| &letter.key.position).collect();
    assert_eq!(letters, bad.map(position).iter().collect::<Vec<_>>(), "{misdeed}");
    for letter in &outcome.letters {
        assert!(letter.reason.contains(reason), "{misdeed}: {}", letter.reason);
        assert_eq!(letter.key.place, LetterPlace::Stage("misbehave".into()));
        assert!(letter.original.starts_with(b"bad"));
        assert!(letter.plugin.starts_with("hostile@"));
        assert_eq!(letter.digest.len(), 64);
    }
    let delivered: Vec<Bytes> =
        outcome.routed.iter().map(|routed| routed.row.payload.clone()).collect();
    let due = payloads.iter().filter(|payload| payload.starts_with("fine"));
    assert_eq!(delivered, due.map(|payload| Bytes::from(payload.clone())).collect::<Vec<_>>());
}

#[test]
fn a_trap_is_the_guilty_records_alone() {
    assert_culprits_alone(r#"trap_on = "bad""#, "trapped");
}

#[test]
fn an_endless_loop_is_ended_and_is_the_guilty_records_alone() {
    assert_culprits_alone(r#"loop_on = "bad""#, "took longer than its limit of 100 ms");
}

#[test]
fn endless_recursion_is_the_guilty_records_alone() {
    assert_culprits_alone(r#"recurse_on = "bad""#, "stack");
}

#[test]
fn memory_over_the_limit_is_the_guilty_records_alone() {
    assert_culprits_alone(r#"grow_on = "bad""#, "over its limit of 16777216");
}

#[test]
fn a_lasting_failure_is_the_guilty_records_alone() {
    assert_culprits_alone(r#"fail_on = "bad""#, "");
    assert_culprits_alone(r#"blame_on = "bad""#, "");
    assert_culprits_alone(r#"bad_blame_on = "bad""#, "");
}

#[test]
fn a_broken_contract_is_a_trap() {
    for misdeed in [
        "bad_span_on",
        "overflow_span_on",
        "bad_route_on",
        "bad_input_on",
        "both_on",
        "bad_key_on",
        "double_reject_on",
        "bad_reject_on",
    ] {
        assert_culprits_alone(&format!(r#"{misdeed} = "bad""#), "broke its contract");
    }
}

#[test]
fn too_much_output_is_the_guilty_records_alone() {
    assert_culprits_alone(
        "flood_on = \"bad\"\nflood_bytes = 8388608",
        "handed back more than it may",
    );
}

#[test]
fn a_failure_that_passes_is_tried_again() {
    let mut hostile = Hostile::new("retry_on = \"bad\"\nretry_calls = 1", RejectedMax::default());
    let outcome = hostile.run(&payloads(&[5])).expect("it passes");
    assert_eq!(outcome.routed.len(), RECORDS);
    assert!(outcome.letters.is_empty());
}

#[test]
fn a_failure_that_does_not_pass_is_searched_once() {
    assert_culprits_alone(r#"retry_on = "bad""#, "");
}

#[test]
fn when_all_fail_for_now_the_lane_blocks() {
    let mut hostile = Hostile::new(r#"retry_on = """#, RejectedMax::default());
    let blocked = hostile.run(&["one".to_owned(), "two".to_owned()]);
    assert!(matches!(blocked, Err(Blocked::Retry(_))), "{blocked:?}");
}

#[test]
fn a_broken_plugin_drains_no_stream_into_the_dead_letters() {
    let limits = RejectedMax { of_last_1000: 20, in_a_row: 10 };
    for misdeed in ["trap_on", "reject_on"] {
        let mut hostile = Hostile::new(&format!(r#"{misdeed} = """#), limits);
        let blocked = hostile.run(&payloads(&[]));
        assert!(matches!(blocked, Err(Blocked::Broken(_))), "{misdeed}: {blocked:?}");
    }
}

#[test]
fn a_settled_record_is_not_run_again() {
    let mut hostile = Hostile::new(r#"trap_on = "bad""#, RejectedMax::default());
    let payloads = payloads(&[7]);
    let first = hostile.run(&payloads).expect("one culprit");
    let settled: HashSet<_> = first.letters.iter().map(|letter| letter.key.clone()).collect();
    let again = hostile.chain.run(&Arc::new(batch(&payloads)), &settled).expect("none left");
    assert!(again.letters.is_empty());
    assert_eq!(again.routed.len(), RECORDS - 1);
}
