//! Cost of the sandbox: the bundled car decoder in its sandbox, against native code.
//!
//! The value is the time of a batch in one stage of a lane, as in `shardmill run`: the records are packed, the
//! prebuilt component is called with its deadline active, and its answer is validated against the contract.
//! There are two baselines. Both start from the same records and end, like the answer, with one buffer of rows
//! and a list of spans:
//!
//! - cases named `payload=200,batch=1000`: the decoder as ordinary Rust without shardmill; bincode decodes a
//!   car and serde_json writes its row;
//! - cases that end in `,native=sdk`: the plugin's own crate compiled for this machine. Its SDK writes strings
//!   faster than serde_json, so this ratio shows the cost of the sandbox alone.
//!
//! All run in turn, in short rounds. The median of the rounds is reported, which other load on the machine
//! hardly changes.
//!
//! Arguments that are not options name cases; without any, all cases run.

mod report;

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use car_decode::Car;
use report::Report;
use shardmill_config::{RejectedMax, StageLimits};
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill_engine::stage::{Flow, Item, LoadedStage, RouteTarget, StageRunner};
use shardmill_plugin::{CompileCache, Context, Instance, Plugin, PluginEngine, Route, Services};
use shardmill_sdk::Writer;
use shardmill_sdk::words::{Output, Span};

const COMPONENT: &str = "../plugins/prebuilt/car-decode.wasm";
const PAYLOAD_BYTES: [usize; 3] = [30, 200, 1_000];
const BATCH_RECORDS: [usize; 3] = [1, 100, 1_000];
const UNIT: &str = "ns/record, lower is better";

/// Rounds per case and side.
const ROUNDS: usize = 201;
/// Records per round: about a millisecond, far above the clock's resolution.
const ROUND_RECORDS: usize = 8_000;

fn main() -> Result<()> {
    let report = Report::start("wall", UNIT);
    let stage = load_stage()?;
    for payload_bytes in PAYLOAD_BYTES {
        for batch_records in BATCH_RECORDS {
            let case = format!("payload={payload_bytes},batch={batch_records}");
            if !report.wants(&case) {
                continue;
            }
            let measured = measure(&stage, payload_bytes, batch_records)
                .with_context(|| format!("case {case}"))?;
            report.line(&case, measured.wall, measured.ordinary);
            report.line(&format!("{case},native=sdk"), measured.wall, measured.sdk);
        }
    }
    Ok(())
}

/// Medians, in nanoseconds per record.
struct Measured {
    wall: f64,
    ordinary: f64,
    sdk: f64,
}

fn measure(stage: &LoadedStage, payload_bytes: usize, batch_records: usize) -> Result<Measured> {
    let batch = batch(payload_bytes, batch_records)?;
    let items = items(&batch);
    let mut runner =
        StageRunner::start(stage.clone(), context(), RejectedMax::default(), Default::default())
            .map_err(|error| anyhow!("{error}"))?;
    let mut wall = || runner.run(&batch, &items).map_err(|error| anyhow!("{error:?}"));
    let mut ordinary = || decode_ordinarily(&items);
    let mut sdk = || decode_by_sdk(&items);

    // Both must do the same work, otherwise the comparison is void.
    let expected: Vec<_> = wall()?.outputs().map(|output| output.payload).collect();
    for native in [ordinary()?, sdk()?] {
        ensure!(native.outputs.len() == batch_records && expected.len() == batch_records);
        for (expected, output) in expected.iter().zip(&native.outputs) {
            let span = output.payload.context("expected a payload")?;
            let row = &native.arena[span.start as usize..][..span.length as usize];
            ensure!(
                expected.as_deref() == Some(row),
                "the sandbox and native code have different results"
            );
        }
    }

    let turns = ROUND_RECORDS / batch_records;
    let mut rounds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let [walls, ordinaries, sdks] = &mut rounds;
        ordinaries.push(time(turns, &mut ordinary)?);
        sdks.push(time(turns, &mut sdk)?);
        walls.push(time(turns, &mut wall)?);
    }
    let [wall, ordinary, sdk] = rounds.map(|rounds| median(rounds) / batch_records as f64);
    Ok(Measured { wall, ordinary, sdk })
}

/// Rows that native code makes from a batch.
struct Rows {
    arena: Vec<u8>,
    outputs: Vec<Output>,
}

/// Writes a row for each item into one buffer.
fn decode(
    items: &[Item],
    mut write_row: impl FnMut(&[u8], &mut Vec<u8>) -> Result<()>,
) -> Result<Rows> {
    let mut arena = Vec::with_capacity(items.iter().map(|item| item.payload.len() + 32).sum());
    let mut outputs = Vec::with_capacity(items.len());
    for (item, input) in items.iter().zip(0..) {
        let start = arena.len();
        write_row(&item.payload, &mut arena)?;
        let span = Span { start: start.try_into()?, length: (arena.len() - start).try_into()? };
        outputs.push(Output { input, route: 0, key: None, payload: Some(span) });
    }
    Ok(Rows { arena, outputs })
}

/// Decodes as an ordinary program would.
fn decode_ordinarily(items: &[Item]) -> Result<Rows> {
    decode(items, |payload, row| {
        let config = bincode::config::standard();
        let (car, _): (Car<'_>, _) = bincode::serde::borrow_decode_from_slice(payload, config)?;
        Ok(serde_json::to_writer(row, &car)?)
    })
}

/// Decodes as the plugin does.
fn decode_by_sdk(items: &[Item]) -> Result<Rows> {
    decode(items, |payload, row| {
        car_decode::write_row(payload, &mut Writer::new(row)).map_err(|error| anyhow!(error))
    })
}

/// Measures the nanoseconds per turn, including the drop of its result.
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

/// Loads the prebuilt component, compiled as for a pipeline.
fn load_stage() -> Result<LoadedStage> {
    let engine = PluginEngine::new()?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(COMPONENT);
    let (plugin, _) = Plugin::load_file(&engine, &CompileCache::none(), &file)?;
    let limits = StageLimits::default();
    let services = Arc::new(Services::alone("bench".into()));
    let (_, descriptor) = Instance::start(&plugin, &limits, &context(), &services)
        .map_err(|error| anyhow!("{error}"))?;
    let names = descriptor.routes.iter().map(|route| route.name.as_str().into());
    Ok(LoadedStage {
        name: "decode".into(),
        plugin,
        route_names: names.collect(),
        targets: descriptor
            .routes
            .iter()
            .map(|_| RouteTarget::Sinks(vec!["mart".into()]))
            .collect(),
        descriptor: descriptor.into(),
        limits,
        services,
        config_json: "{}".into(),
        upstream: context().upstream.into(),
        health: Arc::default(),
        endless: Arc::default(),
        canary: None,
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

/// Makes a batch of cars as on a stream: each record has its own buffers, and sequence numbers are as long as
/// those of Kinesis.
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
        range: PositionRange { from_exclusive: None, to_inclusive: last },
        entry: Entry::Source,
    })
}

/// Encodes a car with exactly this number of bytes.
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
