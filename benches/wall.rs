//! What the wall costs: the bundled car decoder behind it, against the same code natively.
//!
//! The value is the way of a batch through one stage of a lane, as `shardmill run` goes it: the
//! records are packed, the prebuilt component is called with its deadline on, its answer is proven
//! against the contract and lifted into outputs. The baseline is the same plugin crate, compiled
//! for this machine and called as a function over the same records: its `Plugin::record` once per
//! record, through the same batch, emitter and output buffer of the SDK.
//!
//! Both run in turns, in short rounds; the median of the rounds is reported, which a busy
//! neighbour on the machine hardly moves.

#![allow(clippy::print_stdout, reason = "this is what a bench is for")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use car_decode::{Car, CarDecode};
use shardmill::config::{RejectedMax, StageLimits};
use shardmill::plugin::{CompileCache, Context, Instance, Plugin, PluginEngine, Route};
use shardmill::record::{
    Batch, Position, PositionSpan, Record, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill::stage::{Flow, Item, LoadedStage, StageRunner, Target};
use shardmill_sdk::bindings::shardmill::plugin::types::Batch as NativeBatch;
use shardmill_sdk::glue::Instance as NativeInstance;
use shardmill_sdk::words::{Input, Output, Span};

const COMPONENT: &str = "../plugins/prebuilt/car-decode.wasm";
const PAYLOAD_BYTES: [usize; 3] = [30, 200, 1_000];
const BATCH_RECORDS: [usize; 3] = [1, 100, 1_000];
const UNIT: &str = "ns/record, lower is better";

/// Rounds per case and side.
const ROUNDS: usize = 201;
/// Records per round: about a millisecond, far above the clock's resolution.
const ROUND_RECORDS: usize = 8_000;

fn main() -> Result<()> {
    let json = std::env::args().any(|argument| argument == "--json");
    let stage = load_stage()?;
    if !json {
        println!("{:<24} {:>10} {:>10} {:>7}  ({UNIT})", "case", "wall", "native", "ratio");
    }
    for payload_bytes in PAYLOAD_BYTES {
        for batch_records in BATCH_RECORDS {
            let case = format!("payload={payload_bytes},batch={batch_records}");
            let measured = measure(&stage, payload_bytes, batch_records)
                .with_context(|| format!("case {case}"))?;
            let (value, baseline) = measured;
            let ratio = value / baseline;
            if json {
                let line = serde_json::json!({
                    "bench": "wall",
                    "case": case,
                    "value": rounded(value),
                    "baseline": rounded(baseline),
                    "ratio": rounded(ratio),
                    "unit": UNIT,
                });
                println!("{line}");
            } else {
                println!("{case:<24} {value:>10.1} {baseline:>10.1} {ratio:>7.2}");
            }
        }
    }
    Ok(())
}

/// To two decimals: more would pretend to a precision that nobody measured.
fn rounded(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

/// The medians of wall and native, in nanoseconds per record.
fn measure(stage: &LoadedStage, payload_bytes: usize, batch_records: usize) -> Result<(f64, f64)> {
    let batch = batch(payload_bytes, batch_records)?;
    let items = items(&batch);
    let mut runner =
        StageRunner::start(stage.clone(), context(), RejectedMax::default(), Default::default())
            .map_err(|error| anyhow!("{error}"))?;
    let mut wall = || runner.run(&batch, &items).map_err(|error| anyhow!("{error:?}"));

    let packed = native_batch(&batch)?;
    let mut native_plugin = native_plugin()?;
    let mut native = || native_plugin.process(&packed).map_err(|failure| anyhow!(failure.message));

    // The same work, or the comparison is void.
    let (through_wall, outcome) = (wall()?, native()?);
    let (outputs, _) = outcome.outputs.as_chunks();
    ensure!(outputs.len() == batch_records && through_wall.outputs.len() == batch_records);
    for (output, words) in through_wall.outputs.iter().zip(outputs) {
        let span = Output::from_words(words).payload.context("a payload is due")?;
        let row = &outcome.arena[span.start as usize..][..span.length as usize];
        ensure!(output.payload.as_deref() == Some(row), "the wall and native code disagree");
    }

    let turns = ROUND_RECORDS / batch_records;
    let mut wall_rounds = Vec::with_capacity(ROUNDS);
    let mut native_rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        native_rounds.push(time(turns, &mut native)? / batch_records as f64);
        wall_rounds.push(time(turns, &mut wall)? / batch_records as f64);
    }
    Ok((median(wall_rounds), median(native_rounds)))
}

/// Nanoseconds per turn. What a turn makes is dropped within it.
fn time<T>(turns: usize, mut turn: impl FnMut() -> Result<T>) -> Result<f64> {
    let begun = Instant::now();
    for _ in 0..turns {
        black_box(turn()?);
    }
    Ok(begun.elapsed().as_nanos() as f64 / turns as f64)
}

fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

/// The prebuilt component, compiled as for a pipeline.
fn load_stage() -> Result<LoadedStage> {
    let engine = PluginEngine::new()?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(COMPONENT);
    let (plugin, _) = Plugin::load_file(&engine, &CompileCache::none(), &file)?;
    let limits = StageLimits::default();
    let (_, descriptor) =
        Instance::start(&plugin, &limits, &context()).map_err(|error| anyhow!("{error}"))?;
    let names = descriptor.routes.iter().map(|route| route.name.as_str().into());
    Ok(LoadedStage {
        name: "decode".into(),
        plugin,
        route_names: names.collect(),
        targets: descriptor.routes.iter().map(|_| Target::Sinks(vec!["mart".into()])).collect(),
        descriptor: descriptor.into(),
        limits,
        config_json: "{}".into(),
        upstream: context().upstream.into(),
    })
}

fn context() -> Context {
    let format = "application/x-bincode".into();
    Context {
        stream_name: "test".into(),
        shard_id: "shardId-000000000000".into(),
        config: "{}".into(),
        upstream: vec![Route { name: "source".into(), format, columns: Vec::new() }],
        extra: Vec::new(),
    }
}

fn native_plugin() -> Result<NativeInstance<CarDecode>> {
    let context = context();
    let native_context = shardmill_sdk::Context {
        stream_name: context.stream_name,
        shard_id: context.shard_id,
        config: context.config,
        upstream: vec![shardmill_sdk::Route::new("source", "application/x-bincode")],
        extra: Vec::new(),
    };
    let (plugin, _) = NativeInstance::configure(&native_context).map_err(|error| anyhow!(error))?;
    Ok(plugin)
}

/// Cars as a stream holds them: each record with buffers of its own, and sequence numbers as long
/// as those of Kinesis.
fn batch(payload_bytes: usize, records: usize) -> Result<Batch> {
    let records: Vec<Record> = (0..records as u64)
        .map(|number| {
            let sequence = format!("49590338271490256608559692538361571095921575989136{number:06}");
            Ok(Record {
                position: Position { sequence: SequenceNumber::parse(&sequence)?, sub_sequence: 0 },
                partition_key: format!("partitionKey-{number}").into(),
                payload: car(number, payload_bytes)?.into(),
                arrived_ms: 1_400_000_000_000 + number,
            })
        })
        .collect::<Result<_>>()?;
    let last = records.last().context("a batch has a record")?.position.clone();
    let stream = StreamIdentity {
        name: "test".into(),
        arn: "arn:aws:kinesis:us-east-1:000000000000:stream/test".into(),
        created_ms: 0,
    };
    Ok(Batch {
        shard: ShardKey {
            pipeline: "cars".into(),
            stream: Arc::new(stream),
            shard: "shardId-000000000000".into(),
        },
        records,
        span: PositionSpan { from_exclusive: None, to_inclusive: last },
    })
}

/// A car whose encoding has exactly this many bytes.
fn car(id: u64, payload_bytes: usize) -> Result<Vec<u8>> {
    let mut make = format!("Honda {id} ");
    loop {
        let car =
            bincode::serde::encode_to_vec(Car { id, make: &make }, bincode::config::standard())?;
        if car.len() == payload_bytes {
            return Ok(car);
        }
        ensure!(car.len() < payload_bytes, "no car has {payload_bytes} bytes");
        make.push(char::from(b'a' + (make.len() % 26) as u8));
    }
}

fn items(batch: &Batch) -> Flow {
    let item = |(record, index): (&Record, u32)| Item {
        record: index,
        ordinal: 0,
        upstream_route: 0,
        key: record.partition_key.clone(),
        payload: record.payload.clone(),
    };
    batch.records.iter().zip(0..).map(item).collect()
}

/// The same records for the plugin as a function: packed once, outside of the measurement.
fn native_batch(batch: &Batch) -> Result<NativeBatch> {
    let mut arena = Vec::new();
    let mut inputs = Vec::new();
    let mut append = |bytes: &[u8]| -> Result<Span> {
        let span = Span { start: arena.len().try_into()?, length: bytes.len().try_into()? };
        arena.extend_from_slice(bytes);
        Ok(span)
    };
    for record in &batch.records {
        let input = Input {
            key: append(&record.partition_key)?,
            payload: append(&record.payload)?,
            sequence: append(record.position.sequence.as_str().as_bytes())?,
            sub_sequence: 0,
            route: 0,
            arrived_ms: record.arrived_ms,
        };
        inputs.extend_from_slice(&input.to_words());
    }
    Ok(NativeBatch { arena, inputs })
}
