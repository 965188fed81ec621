//! Slowdown of an honest lane beside hostile ones: 16 lanes per core, all but one hostile, against the same
//! number of honest lanes that use as much CPU.
//!
//! The honest lane gets a batch every few milliseconds, as from a stream. The value is the 99th percentile of
//! the time from the arrival of a batch to its outcome. Both sides are measured in turn, and the median of the
//! rounds is reported. If an honest record becomes a dead letter, the bench fails without a figure.

mod report;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use report::{Report, median_round};
use shardmill_config::{RejectedMax, SinkTypes, parse};
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill_engine::stage::{Chain, Revision, Samples};
use shardmill_plugin::{Backends, CompileCache, PluginEngine, PluginHost};
use tokio_util::sync::CancellationToken;

/// Sink types of this bench.
const SINK_TYPES: SinkTypes = SinkTypes::new(&[shardmill_sinks_common::discard::TYPE]);

const UNIT: &str = "ms (p99 of a batch), lower is better";
const COMPONENT: &str = "../plugins/prebuilt/hostile.wasm";
/// Lanes per core.
const CROWD: usize = 16;
const ROUNDS: usize = 3;
/// Batches of the honest lane in a round, records of each, and pause between them.
const BATCHES: usize = 200;
const BATCH_RECORDS: usize = 500;
const PAUSE: Duration = Duration::from_millis(5);
/// Records in the batches of all other lanes.
const OTHER_RECORDS: usize = 1_000;

fn main() -> Result<()> {
    let report = Report::start("fair", UNIT);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let lanes = CROWD * cores;
    let honest = stage("")?;
    for fault in ["loop", "copy", "grow", "trap"] {
        let case = format!("lanes={lanes},hostile={fault}");
        if !report.wants(&case) && !report.wants(fault) {
            continue;
        }
        let hostile = stage(&format!("{fault}_on = \"bad\""))?;
        let (mut beside_hostile, mut beside_honest) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            beside_honest.push(p99_ms(&honest, &honest, "fine", lanes - 1)?);
            beside_hostile.push(p99_ms(&honest, &hostile, "bad", lanes - 1)?);
        }
        let (value, baseline) = median_round(&beside_hostile, &beside_honest);
        report.line(&case, value, baseline);
    }
    Ok(())
}

/// Runs the honest lane beside other lanes that run all the time.
fn p99_ms(honest: &Arc<Revision>, others: &Arc<Revision>, kind: &str, crowd: usize) -> Result<f64> {
    let (begun, stop) = (AtomicU64::new(0), CancellationToken::new());
    let other_batch = batch(kind, OTHER_RECORDS)?;
    let own_batch = batch("fine", BATCH_RECORDS)?;
    let mut chains = Vec::new();
    for _ in 0..crowd {
        chains.push(chain(others, &stop)?);
    }
    let mut own = chain(honest, &CancellationToken::new())?;
    std::thread::scope(|scope| {
        for mut other in chains {
            let (batch, stop, begun) = (other_batch.clone(), &stop, &begun);
            scope.spawn(move || {
                begun.fetch_add(1, Ordering::Relaxed);
                while !stop.is_cancelled() {
                    // The outcome does not matter: only the used time does.
                    let _ = other.run(&batch, &Default::default());
                }
            });
        }
        while begun.load(Ordering::Relaxed) < crowd as u64 {
            std::thread::sleep(PAUSE);
        }
        let measured = measure(&mut own, &own_batch);
        stop.cancel();
        measured
    })
}

fn measure(own: &mut Chain, batch: &Arc<Batch>) -> Result<f64> {
    let mut took_ms = Vec::new();
    for _ in 0..BATCHES {
        let arrives = Instant::now() + PAUSE;
        std::thread::sleep(PAUSE);
        let outcome = own.run(batch, &Default::default()).map_err(|why| anyhow!("{why:?}"))?;
        took_ms.push(arrives.elapsed().as_secs_f64() * 1e3);
        ensure!(outcome.dead_letters.is_empty(), "an honest record is dead-lettered");
        ensure!(outcome.routed.len() == BATCH_RECORDS, "records are missing");
    }
    took_ms.sort_by(f64::total_cmp);
    Ok(took_ms[BATCHES * 99 / 100])
}

fn chain(revision: &Arc<Revision>, stop: &CancellationToken) -> Result<Chain> {
    let samples = Samples::new(Default::default());
    Chain::start(revision, &shard(), RejectedMax::NONE, samples, stop)
        .map_err(|error| anyhow!("{error}"))
}

/// Loads a stage of the hostile plugin, with limits that it reaches again and again.
fn stage(config: &str) -> Result<Arc<Revision>> {
    let component = Path::new(env!("CARGO_MANIFEST_DIR")).join(COMPONENT);
    let text = format!(
        "[pipeline]\nname = \"fair\"\n[source]\ntype = \"kinesis\"\nstream = \"test\"\n\
         [[stage]]\nname = \"stage\"\nplugin = {component:?}\nroutes = {{ out = [\"nowhere\"] }}\n\
         [stage.config]\n{config}\n\
         [stage.limits]\nbatch_time = \"100 ms\"\nrecord_time = \"50 ms\"\nmemory = \"16 MiB\"\n\
         [[sink]]\nname = \"nowhere\"\ntype = \"discard\"\n"
    );
    let config = parse(Path::new("fair.toml"), &text, &SINK_TYPES, &|_| None)
        .map_err(|error| anyhow!("{}", error.render(false)))?;
    let engine = PluginEngine::new()?;
    let host = PluginHost { engine, cache: CompileCache::none(), backends: Backends::default() };
    let (revision, _) = Revision::from_config(&config, &host, &|_| None)
        .map_err(|error| anyhow!("{}", error.render(false)))?;
    Ok(Arc::new(revision))
}

/// Makes a batch in which every hundredth record is of the given kind and all others are fine.
fn batch(kind: &str, records: usize) -> Result<Arc<Batch>> {
    let records: Vec<Record> = (0..records)
        .map(|number| {
            let word = if number % 100 == 50 { kind } else { "fine" };
            let sequence = SequenceNumber::parse(&number.to_string())?;
            Ok(Record {
                position: Position { sequence, sub_sequence: 0 },
                partition_key: format!("key-{number}").into(),
                payload: format!("{word} {number} {}", "x".repeat(200)).into(),
                arrived_ms: 1,
            })
        })
        .collect::<Result<_>>()?;
    let last = records.last().context("a batch has a record")?.position.clone();
    let range = PositionRange { from_exclusive: None, to_inclusive: last };
    Ok(Arc::new(Batch { shard: shard(), records, range, entry: Entry::Source }))
}

fn shard() -> ShardKey {
    let stream = StreamIdentity { name: "test".into(), arn: "arn".into(), created_ms: 0 };
    ShardKey { pipeline: "fair".into(), stream: stream.into(), shard: "shardId-0".into() }
}
