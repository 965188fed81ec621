//! Exactly once, as a property: runs that are killed, pause, lose replies and change their plugins'
//! configuration at any step between reading, stages, commits, positions and checkpoints. Whatever
//! happened, each sink has each record that is due there once.
//!
//! The pipeline is the real one (lanes, deliveries, ledger, dead letters, state database); the stream
//! is in memory. In the pure model the sinks are as well. A seed that fails is run again alone with
//! `SHARDMILL_SEED`.

mod chaos;
mod real;
mod sink;
mod source;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chaos::{Chaos, Unreliable};
use futures::StreamExt as _;
use real::{Bucket, Tables};
use shardmill::config::{PipelineConfig, parse};
use shardmill::plugin::{Backends, CompileCache, PluginEngine, PluginHost};
use shardmill::position::{DeadLetters, LetterFilter, StateStore};
use shardmill::sink::Sink;
use shardmill::supervisor::{RunOptions, Supervisor};
use shardmill::swap::{BuildSinks, Swapper};
use sink::{Table, TableSink};
use source::Memory;
use tokio_util::sync::CancellationToken;

/// How much a run has to do.
#[derive(Clone, Copy)]
struct Size {
    shards: u64,
    records_per_shard: u64,
    /// How often a process is killed, at most.
    kills_max: u64,
    /// Sinks that may be given up: those that make no promises.
    given_up: &'static [&'static str],
}

const PURE: Size = Size { shards: 3, records_per_shard: 120, kills_max: 8, given_up: &SINKS };
/// Requests to real servers take their time.
const REAL: Size =
    Size { shards: 2, records_per_shard: 80, kills_max: 4, given_up: &["left", "right"] };
/// Steps that a process lives, at most.
const STEPS_MAX: u64 = 90;
/// The sinks: rows of one side each, and all rows.
const SINKS: [&str; 3] = ["left", "right", "all"];

/// What all runs of a test share.
struct Rig {
    engine: PluginEngine,
    cache: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let cache = tempfile::tempdir().expect("a folder");
        Self { engine: PluginEngine::new().expect("an engine"), cache }
    }

    fn host(&self) -> PluginHost {
        let cache = CompileCache::in_folder(self.cache.path().to_owned());
        PluginHost { engine: self.engine.clone(), cache, backends: Backends::default() }
    }
}

/// A pipeline of one plugin whose configuration says which side goes where.
fn pipeline(state: &Path, size: Size, rng: &mut fastrand::Rng) -> PipelineConfig {
    let (rows, linger_ms) = (rng.u64(1..30), rng.u64(1..=60));
    let (plugin, state) = (crate::support::plugin("route-json"), state.display());
    let right = u8::from(rng.bool());
    let mut text = format!(
        r#"
[pipeline]
name = "model"
state_dir = "{state}"
[source]
type = "kinesis"
stream = "model"
[[stage]]
name = "route"
plugin = "{plugin}"
[stage.config]
default = "left"
rules = [{{ route = "right", field = "side", equals = {right} }}]
[stage.routes]
left = ["left", "all"]
right = ["right", "all"]
[reload.probation]
window = "0 s"
"#
    );
    for (place, sink) in (1..).zip(SINKS) {
        let (rows, linger_ms) = (rows * place, linger_ms * place);
        let on_failure = match rng.u8(..3) {
            0 if size.given_up.contains(&sink) => {
                "on_failure = \"dead-letter\"\ngive_up_after = \"1 ms\""
            }
            _ => "",
        };
        text.push_str(&format!(
            "[[sink]]\nname = \"{sink}\"\ntype = \"discard\"\n[sink.commit]\nrows = {rows}\n\
             linger = \"{linger_ms} ms\"\n{on_failure}\n"
        ));
    }
    parse(Path::new("model.toml"), &text, &|_| None).expect("a sound pipeline")
}

/// Runs a pipeline through kills to its end.
async fn run(
    rig: &Rig,
    (seed, size): (u64, Size),
    state: &Path,
    chaos: &Arc<Chaos>,
    sinks: &[Arc<dyn Sink>],
) {
    let kills = chaos.rng().u64(1..=size.kills_max);
    // The last process finds nothing to do, but for letters that a zombie has hidden again.
    for life in 0..=kills + 1 {
        let is_last = life >= kills;
        let (config, steps) = {
            let mut rng = chaos.rng();
            (pipeline(state, size, &mut rng), rng.u64(1..STEPS_MAX))
        };
        chaos.begin();
        chaos.live_for((!is_last).then_some(steps));
        let source = Memory::new(size.shards, size.records_per_shard, chaos.clone());
        let unreliable = sinks.iter().map(|inner| {
            let (inner, chaos) = (inner.clone(), chaos.clone());
            Arc::new(Unreliable { inner, chaos }) as Arc<dyn Sink>
        });
        let sinks: Vec<Arc<dyn Sink>> = unreliable.collect();
        let same = sinks.clone();
        let first = config.clone();
        let build_sinks: BuildSinks = Arc::new(move |_| Ok(same.clone()));
        let options = RunOptions { build_sinks, ..RunOptions::new(true) };
        let supervisor =
            Supervisor::prepare(config, rig.host(), Arc::new(source), sinks, options).await;
        let supervisor = supervisor.unwrap_or_else(|why| panic!("seed {seed}: {why:#}"));
        let swapper = supervisor.swapper();
        tokio::select! {
            () = change(&swapper, first, size, state, chaos), if !is_last => unreachable!("it waits"),
            ended = supervisor.run(CancellationToken::new()) => {
                ended.unwrap_or_else(|why| panic!("seed {seed}, life {life}: {why:#}"));
                if !is_last {
                    // It ended before its time: what follows finds nothing to do.
                    chaos.live_for(None);
                }
            }
            () = chaos.killed() => {}
        }
    }
}

/// Changes the pipeline while it runs, now and then: its plugin's configuration in place, or its sinks'
/// rhythm as well, for which the lanes are let go. Ends with the process, at any step of a change.
async fn change(
    swapper: &Swapper,
    mut config: PipelineConfig,
    size: Size,
    state: &Path,
    chaos: &Chaos,
) {
    let changes = chaos.rng().u8(0..3);
    for _ in 0..changes {
        let pause_ms = chaos.rng().u64(0..150);
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        let is_in_place = chaos.rng().bool();
        config = match is_in_place {
            true => other_side(&config),
            false => pipeline(state, size, &mut chaos.rng()),
        };
        // Refused when the pipeline has stopped, or a sink would lose records: then all is as before.
        let _ = swapper.reload(config.clone(), false).await;
    }
    std::future::pending().await
}

/// The same pipeline with the other side going right.
fn other_side(config: &PipelineConfig) -> PipelineConfig {
    let text = &config.file.text;
    let text = match text.contains("equals = 1") {
        true => text.replace("equals = 1", "equals = 0"),
        false => text.replace("equals = 0", "equals = 1"),
    };
    parse(Path::new("model.toml"), text, &|_| None).expect("a sound pipeline")
}

/// The ids in JSON rows.
fn ids(rows: &[String]) -> Vec<u64> {
    let id = |row: &String| {
        let json: serde_json::Value = serde_json::from_str(row).expect("JSON");
        json["id"].as_u64().expect("an id")
    };
    rows.iter().map(id).collect()
}

/// Checks what the sinks have, with the letters: `rows` by sink.
async fn check((seed, size): (u64, Size), state: &Path, rows: &BTreeMap<&str, Vec<u64>>) {
    let letters = DeadLetters::new(StateStore::open(&state.join("model")).expect("the state"));
    let letters = letters.select(LetterFilter::default(), u32::MAX).await.expect("letters");
    let mut by_place: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for letter in &letters {
        let text = String::from_utf8_lossy(&letter.original);
        let digits: String = text.chars().filter(char::is_ascii_digit).collect();
        // A JSON payload ends with its side, one digit.
        let digits = if text.starts_with('{') { &digits[..digits.len() - 1] } else { &digits };
        by_place.entry(letter.place.clone()).or_default().push(digits.parse().expect("an id"));
    }
    let due: Vec<u64> = (0..size.shards * size.records_per_shard).collect();
    let at_stage = by_place.remove("stage:route").unwrap_or_default();
    let letters_of =
        |sink: &str| by_place.get(&format!("sink:{sink}")).cloned().unwrap_or_default();
    for sinks in [vec!["all"], vec!["left", "right"]] {
        let mut found = at_stage.clone();
        for sink in &sinks {
            found.extend(&rows[sink]);
            found.extend(letters_of(sink));
        }
        found.sort_unstable();
        if found != due {
            let twice: Vec<_> = found.windows(2).filter(|pair| pair[0] == pair[1]).collect();
            let lost: Vec<_> = due.iter().filter(|id| found.binary_search(id).is_err()).collect();
            panic!("SHARDMILL_SEED={seed}: sinks {sinks:?}: twice {twice:?}, lost {lost:?}");
        }
    }
    assert!(!at_stage.is_empty(), "seed {seed}: no record was rejected");
    assert!(!letters_of("left").is_empty() || !letters_of("right").is_empty(), "seed {seed}");
    for (sink, ids) in rows {
        for shard in 0..size.shards {
            let of_shard = |id: &&u64| **id / size.records_per_shard == shard;
            let in_order: Vec<&u64> = ids.iter().filter(of_shard).collect();
            assert!(in_order.is_sorted(), "SHARDMILL_SEED={seed}: {sink} out of order");
        }
    }
}

async fn pure(rig: &Rig, seed: u64) {
    let folder = tempfile::tempdir_in(memory_folder()).expect("a folder");
    let chaos = Chaos::new(seed, 60);
    let tables = SINKS.map(|name| (name, Table::new(name, chaos.clone())));
    let sinks: Vec<Arc<dyn Sink>> = tables
        .iter()
        .map(|(_, table)| Arc::new(TableSink(table.clone())) as Arc<dyn Sink>)
        .collect();
    run(rig, (seed, PURE), folder.path(), &chaos, &sinks).await;
    // What is still on its way, or asleep, comes now.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let rows = tables.iter().map(|(name, table)| (*name, ids(&table.rows()))).collect();
    check((seed, PURE), folder.path(), &rows).await;
}

/// Where a state database costs no disk writes, if there is such a place.
fn memory_folder() -> std::path::PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() }
}

/// The seeds of a test: those of `SHARDMILL_SEED` alone, if it is set.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("SHARDMILL_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_record_is_there_once_whatever_happens() {
    /// A run waits more than it works.
    const AT_ONCE: usize = 64;
    let (rig, seeds) = (Rig::new(), seeds(1_000));
    let begun = std::time::Instant::now();
    futures::stream::iter(&seeds).for_each_concurrent(AT_ONCE, |seed| pure(&rig, *seed)).await;
    println!("{} seeds in {:?}", seeds.len(), begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_record_is_in_postgres_and_in_a_bucket_once_whatever_happens() {
    const AT_ONCE: usize = 8;
    let (rig, seeds) = (Rig::new(), seeds(50));
    let bucket = Bucket::start().await;
    let begun = std::time::Instant::now();
    futures::stream::iter(&seeds)
        .for_each_concurrent(AT_ONCE, |seed| real(&rig, &bucket, *seed))
        .await;
    println!("{} seeds in {:?}", seeds.len(), begun.elapsed());
}

/// Two tables in PostgreSQL, and objects on S3.
async fn real(rig: &Rig, bucket: &Bucket, seed: u64) {
    let folder = tempfile::tempdir_in(memory_folder()).expect("a folder");
    let chaos = Chaos::new(seed, 60);
    let tables = Tables::create(seed).await;
    let [left, right] = ["left", "right"].map(|table| tables.sink(table));
    let sinks: [Arc<dyn Sink>; 3] = [left, right, bucket.sink(seed)];
    run(rig, (seed, REAL), folder.path(), &chaos, &sinks).await;
    // Zombies wake up, and transactions whose client is gone end.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut rows = BTreeMap::new();
    for table in ["left", "right"] {
        rows.insert(table, tables.ids(table).await);
    }
    // Each route has objects of its own: the order of all rows cannot be told from them.
    let mut in_bucket = ids(&bucket.rows(seed).await);
    in_bucket.sort_unstable();
    rows.insert("all", in_bucket);
    check((seed, REAL), folder.path(), &rows).await;
    tables.drop().await;
}
