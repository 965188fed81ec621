//! A lane whose only stage misbehaves, with assertions about the outcome of its records.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use metrics_exporter_prometheus::PrometheusRecorder;
use shardmill_cli::registry::SINK_TYPES;
use shardmill_config::{RejectedMax, parse};
use shardmill_core::record::{
    Batch, DeadLetterPlace, Entry, Position, PositionRange, Record, SequenceNumber, ShardKey,
    StreamIdentity,
};
use shardmill_engine::stage::{Blocked, Chain, ChainOutcome, Revision, Samples};
use shardmill_plugin::{Backends, CompileCache, PluginEngine, PluginHost};
use shardmill_state::DeadLetteredItems;
use tokio_util::sync::CancellationToken;

use crate::support::pipeline::PipelineToml;

/// Number of records in a batch.
pub const RECORDS: usize = 1_000;

/// Limits of most tests: tight, so that each is reached soon.
pub const LIMITS: &str = r#"
batch_time = "300 ms"
record_time = "100 ms"
memory = "16 MiB"
output = "4 MiB"
outputs = 10
tables = 1000
retry = "500 ms"
"#;

/// Lane of a pipeline with one stage.
pub struct Lane {
    chain: Chain,
    stop: CancellationToken,
}

impl Lane {
    /// Makes a lane of the hostile plugin with this configuration and [`LIMITS`].
    pub fn hostile(config: &str) -> Self {
        Self::within(LIMITS, config, RejectedMax::default())
    }

    /// Like `hostile`, with longer time limits: on a busy machine, many rows take longer than the tight ones.
    pub fn patient(config: &str) -> Self {
        let limits = LIMITS.replace("\"300 ms\"", "\"30 s\"").replace("\"100 ms\"", "\"10 s\"");
        Self::within(&limits, config, RejectedMax::default())
    }

    /// Like `hostile`, with other limits.
    pub fn within(limits: &str, config: &str, rejected_max: RejectedMax) -> Self {
        let plugin = crate::support::plugin("hostile");
        Self::of(&plugin, limits, config, rejected_max).unwrap_or_else(|why| panic!("{why}"))
    }

    /// Makes a lane of any plugin, or returns why the pipeline does not load.
    pub fn of(
        plugin: &str,
        limits: &str,
        config: &str,
        rejected_max: RejectedMax,
    ) -> Result<Self, String> {
        let stage = format!(
            "[stage.config]\n{config}\n[stage.limits]\n{limits}\n\
             [stage.routes]\nout = [\"console\"]"
        );
        // Nothing is written, so the folder needs no name.
        let text = PipelineToml::new(Path::new(""), "hostile")
            .timing("")
            .table("[source]\ntype = \"kinesis\"\nstream = \"test\"")
            .stage("misbehave", plugin, &stage)
            .plain_sink("console", "type = \"stdout\"")
            .text();
        let config =
            parse(Path::new("test.toml"), &text, &SINK_TYPES, &|_| None).expect("a valid pipeline");
        let engine = PluginEngine::new().expect("an engine");
        let host =
            PluginHost { engine, cache: CompileCache::none(), backends: Backends::default() };
        let (revision, _) = Revision::from_config(&config, &host, &|_| None)
            .map_err(|error| error.render(false))?;
        let stop = CancellationToken::new();
        let samples = Samples::new(Default::default());
        let chain = Chain::start(&Arc::new(revision), &shard(), rejected_max, samples, &stop);
        Ok(Self { chain: chain.map_err(|error| error.to_string())?, stop })
    }

    /// Makes another lane of the same stage, with no limit on rejected records.
    pub fn another(&self) -> Self {
        let (stop, samples) = (CancellationToken::new(), Samples::new(Default::default()));
        let revision = self.chain.revision();
        let chain = Chain::start(revision, &shard(), RejectedMax::NONE, samples, &stop);
        Self { chain: chain.expect("it has started before"), stop }
    }

    /// Runs a batch; waits and retries if the plugin asks for it.
    pub fn run(&mut self, payloads: &[String]) -> Result<ChainOutcome, Blocked> {
        let batch = Arc::new(batch(payloads));
        loop {
            match self.chain.run(&batch, &DeadLetteredItems::default()) {
                Err(Blocked::Later(_, pause)) => std::thread::sleep(pause),
                outcome => return outcome,
            }
        }
    }

    /// Returns the token that stops the lane.
    pub fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Returns the stages.
    pub fn chain(&mut self) -> &mut Chain {
        &mut self.chain
    }

    /// Runs a batch in which only the records `bad` are bad. Asserts that they alone are dead-lettered, for a reason
    /// that contains `reason`, and that all others are delivered in order.
    pub fn assert_culprits_alone(&mut self, bad: &[usize], reason: &str) {
        let payloads = payloads(bad);
        let outcome = self.run(&payloads).unwrap_or_else(|why| panic!("{reason}: {why:?}"));
        let dead_letters: Vec<&Position> =
            outcome.dead_letters.iter().map(|dead_letter| &dead_letter.key.position).collect();
        let expected: Vec<Position> = bad.iter().copied().map(position).collect();
        assert_eq!(dead_letters, expected.iter().collect::<Vec<_>>(), "{reason}");
        for dead_letter in &outcome.dead_letters {
            assert!(dead_letter.reason.contains(reason), "{reason}: {}", dead_letter.reason);
            assert_eq!(dead_letter.key.place, DeadLetterPlace::Stage("misbehave".into()));
            assert!(dead_letter.original.starts_with(b"bad"));
            assert!(dead_letter.plugin.starts_with("hostile@"));
            assert_eq!(dead_letter.digest.len(), 64);
        }
        assert_eq!(fine(&outcome), of_kind(&payloads, "fine"), "{reason}");
    }
}

/// Returns the delivered payloads of good records.
pub fn fine(outcome: &ChainOutcome) -> Vec<Bytes> {
    let payloads = outcome.routed.iter().map(|routed| routed.row.payload.clone());
    payloads.filter(|payload| payload.starts_with(b"fine")).collect()
}

/// Returns the payloads that begin with `kind`.
pub fn of_kind(payloads: &[String], kind: &str) -> Vec<Bytes> {
    let expected = payloads.iter().filter(|payload| payload.starts_with(kind));
    expected.map(|payload| Bytes::from(payload.clone())).collect()
}

/// Returns 1,000 payloads, of which those at `bad` are bad.
pub fn payloads(bad: &[usize]) -> Vec<String> {
    (0..RECORDS).map(|i| format!("{} {i}", if bad.contains(&i) { "bad" } else { "fine" })).collect()
}

/// Makes a batch of these payloads.
pub fn batch(payloads: &[String]) -> Batch {
    let records = payloads.iter().enumerate().map(|(index, payload)| Record {
        position: position(index),
        partition_key: Bytes::from("key"),
        payload: Bytes::from(payload.clone()),
        arrived_ms: 1,
    });
    let range = PositionRange { from_exclusive: None, to_inclusive: position(payloads.len() - 1) };
    Batch { shard: shard(), records: records.collect(), range, entry: Entry::Source }
}

/// Returns a metric's value, summed over its labels.
pub fn sum(recorder: &PrometheusRecorder, metric: &str) -> f64 {
    let text = recorder.handle().render();
    let lines = text.lines().filter(|line| line.starts_with(&format!("{metric}{{")));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Returns the position of the record with this index.
pub fn position(index: usize) -> Position {
    let sequence = SequenceNumber::parse(&index.to_string()).expect("a number");
    Position { sequence, sub_sequence: 0 }
}

fn shard() -> ShardKey {
    let stream = StreamIdentity { name: "test".into(), arn: "arn".into(), created_ms: 0 };
    ShardKey { pipeline: "hostile".into(), stream: stream.into(), shard: "shardId-0".into() }
}
