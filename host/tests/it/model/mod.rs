//! Exactly once, as a property: a run is a script of lives (processes from start to end), drawn from a seed.
//!
//! Processes are killed or stopped at any step between reading, stages, commits, positions and checkpoints. They
//! pause, lose replies, and make calls that are never answered. They reload their configuration, and add, remove and
//! rename their sinks. Between two lives, destinations and the state folder are restored from older copies, or the
//! state is lost. Dead letters are redriven, and redrives are interrupted.
//!
//! The invariant: whatever happened, each sink has each of its records exactly once, as a row or as a dead letter.
//! Some events allow less:
//!
//! | what happened | what the test allows |
//! |---|---|
//! | a sink was removed and put back | records that it was not given, if a hole records them |
//! | the state was lost, or put back | lost dead letters since then; a dead letter of the copy whose row exists |
//! | the same, while a sink was removed | a sink that is new, and begins at the checkpoint (`--trust-sinks`) |
//! | the same, with sides that changed | a record in both of `left` and `right`, or in neither |
//!
//! The pipeline is the real one (lanes, deliveries, ledger, dead letters, state database); the stream is in memory.
//! In the pure model the sinks are in memory too. To run a failing seed alone, set `SHARDMILL_SEED`; to run more
//! seeds than a test does by default, set a range: `SHARDMILL_SEED=0..1000`.

mod cases;
mod chaos;
mod life;
mod real;
mod script;
mod sink;
mod source;

use std::collections::{BTreeMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use chaos::Chaos;
use futures::{FutureExt as _, StreamExt as _};
use life::{Destinations, Forgotten, World};
use real::{Bucket, Tables};
use script::Script;
use shardmill_core::sink::Sink;
use shardmill_plugin::{Backends, CompileCache, Plugin, PluginEngine, PluginHost};
use shardmill_state::RecordedHole;
use sink::{Table, TableSink};

/// Amount of work in a run.
#[derive(Clone, Copy)]
struct Size {
    shards: u64,
    records_per_shard: u64,
    /// Maximum number of kills.
    kills_max: usize,
    /// Sinks that may be given up. Sinks of objects may not, because their claims promise what they will write.
    given_up: &'static [&'static str],
    /// Whether the destinations are in memory. Only those can be restored, and made to accept what they refused.
    is_pure: bool,
}

const PURE: Size =
    Size { shards: 3, records_per_shard: 120, kills_max: 8, given_up: &SINKS, is_pure: true };
/// Smaller, because requests to real servers take time.
const REAL: Size = Size {
    shards: 2,
    records_per_shard: 80,
    kills_max: 4,
    given_up: &["left", "right"],
    is_pure: false,
};
/// Names of the sinks: two for the rows of one side each, and one for all rows.
const SINKS: [&str; 3] = ["left", "right", "all"];
/// Index of the sink of all rows, which may be removed and renamed.
const ALL: usize = 2;
/// Plugin of the only stage.
const PLUGIN: &str = "route-json";
/// Place of records that the stage rejects.
const STAGE: &str = "stage:route";

/// Parts that all runs of a test share.
struct Fixture {
    engine: PluginEngine,
    cache: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Arc<Self> {
        let cache = tempfile::tempdir().expect("a folder");
        let engine = PluginEngine::new().expect("an engine");
        // Compiles the plugin once. Otherwise each of the runs that start together would compile it.
        let plugin = crate::support::plugin(PLUGIN);
        let compiled = CompileCache::shared(cache.path());
        Plugin::load_file(&engine, &compiled, Path::new(&plugin)).expect("a plugin");
        Arc::new(Self { engine, cache })
    }

    fn host(&self) -> PluginHost {
        let cache = CompileCache::shared(self.cache.path());
        PluginHost { engine: self.engine.clone(), cache, backends: Backends::default() }
    }
}

/// Returns the id in a JSON row.
fn row_id(row: &str) -> u64 {
    let json: serde_json::Value = serde_json::from_str(row).expect("JSON");
    json["id"].as_u64().expect("an id")
}

/// Returns the id in a dead letter.
fn dead_letter_id(original: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(original);
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    // A JSON payload ends with its side, one digit.
    let digits = if text.starts_with('{') { &digits[..digits.len() - 1] } else { &digits };
    digits.parse().expect("an id")
}

/// Returns the place of a dead letter, with the sink of all rows under its first name.
fn place_of(place: &str) -> String {
    place.replace("sink:every", "sink:all")
}

/// Contents of sinks and state at the end.
struct Outcome {
    /// Ids by sink.
    rows: BTreeMap<&'static str, Vec<u64>>,
    /// Ids by place.
    dead_letters: BTreeMap<String, Vec<u64>>,
    holes: Vec<RecordedHole>,
    forgotten: Forgotten,
}

impl Outcome {
    async fn new(
        world: &World,
        rows: BTreeMap<&'static str, Vec<u64>>,
        mut forgotten: Forgotten,
    ) -> anyhow::Result<Self> {
        let (found, holes) = life::left(world).await?;
        let mut dead_letters: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for dead_letter in &found {
            dead_letters
                .entry(place_of(&dead_letter.place))
                .or_default()
                .push(dead_letter_id(&dead_letter.original));
        }
        let by_place = std::mem::take(&mut forgotten.dead_letters);
        for (place, ids) in by_place {
            forgotten.dead_letters.entry(place_of(&place)).or_default().extend(ids);
        }
        Ok(Self { rows, dead_letters, holes, forgotten })
    }

    /// Checks the rows of the sinks together with the dead letters and the holes.
    fn check(&self, script: &Script, size: Size) -> anyhow::Result<()> {
        let none = Vec::new();
        let dead_letters_of =
            |sink: &str| self.dead_letters.get(&format!("sink:{sink}")).unwrap_or(&none);
        let at_stage = self.dead_letters.get(STAGE).unwrap_or(&none);
        for (sink, ids) in &self.rows {
            ensure!(twice(ids.clone()).is_empty(), "{sink}: twice: {:?}", twice(ids.clone()));
        }
        // The side of each sink changes in a run, so a record is in one of `left` and `right`, and also in `all`.
        for sinks in [vec!["all"], vec!["left", "right"]] {
            let rows: Vec<u64> = sinks.iter().flat_map(|sink| &self.rows[sink]).copied().collect();
            let mut found = rows.clone();
            found.extend(at_stage);
            sinks.iter().for_each(|sink| found.extend(dead_letters_of(sink)));
            if script.forgets() {
                if sinks.len() > 1 && !script.is_one_sided {
                    // The state has lost the revision that ran first. The current revision may route a record to the
                    // other sink.
                    continue;
                }
                ensure!(twice(rows.clone()).is_empty(), "{sinks:?}: twice: {:?}", twice(rows));
            } else {
                let twice = twice(found.clone());
                ensure!(twice.is_empty(), "{sinks:?}: twice, with dead letters: {twice:?}");
            }
            found.extend(self.forgotten.dead_letters.get(STAGE).into_iter().flatten());
            for sink in &sinks {
                let place = format!("sink:{sink}");
                found.extend(self.forgotten.dead_letters.get(&place).into_iter().flatten());
            }
            let found: HashSet<u64> = found.into_iter().collect();
            let is_lost = |id: &u64| !found.contains(id) && !self.is_in_hole(*id, &sinks, size);
            let lost: Vec<u64> = (0..size.records()).filter(is_lost).collect();
            if sinks == ["all"] && (script.has_new_sink() || self.forgotten.has_new_sink) {
                continue;
            }
            ensure!(lost.is_empty(), "{sinks:?}: lost: {lost:?}; holes: {:?}", self.holes);
            ensure!(found.iter().all(|id| *id < size.records()), "{sinks:?}: unknown ids");
        }
        if !script.forgets() {
            ensure!(!at_stage.is_empty(), "no record was rejected");
        }
        if script.accepts_from.is_some() {
            let left: Vec<&String> =
                self.dead_letters.keys().filter(|place| *place != STAGE).collect();
            ensure!(left.is_empty(), "dead letters are left after the last redrive: {left:?}");
        } else if !script.forgets() {
            ensure!(
                !dead_letters_of("left").is_empty() || !dead_letters_of("right").is_empty(),
                "no row was refused"
            );
        }
        Ok(())
    }

    /// Whether a hole records that a sink was not given a record.
    fn is_in_hole(&self, id: u64, sinks: &[&str], size: Size) -> bool {
        let (shard, at) = (id / size.records_per_shard, source::record(id).position);
        let is_own = |hole: &RecordedHole| {
            let concerns = |sink: &&str| hole.concerns(&(*sink).into());
            sinks.iter().any(concerns) || sinks == ["all"] && concerns(&"every")
        };
        self.holes.iter().chain(&self.forgotten.holes).any(|hole| {
            is_own(hole)
                && hole.shard.as_str() == source::name(shard as usize)
                && hole.from_exclusive.as_ref() < Some(&at)
                && hole.to_inclusive.as_ref().is_none_or(|to| at <= *to)
        })
    }
}

impl Size {
    fn records(self) -> u64 {
        self.shards * self.records_per_shard
    }

    /// Checks that rows of each shard are in the shard's order.
    fn check_order(self, sink: &str, ids: &[u64]) -> anyhow::Result<()> {
        for shard in 0..self.shards {
            let of_shard = ids.iter().filter(|id| **id / self.records_per_shard == shard);
            ensure!(of_shard.is_sorted(), "{sink} is out of order");
        }
        Ok(())
    }
}

/// Returns the ids that occur more than once.
fn twice(mut ids: Vec<u64>) -> Vec<u64> {
    ids.sort_unstable();
    ids.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect()
}

/// Destinations in memory.
struct InMemory([Arc<Table>; 3]);

impl Destinations for InMemory {
    fn sink(&self, place: usize, name: &str) -> Arc<dyn Sink> {
        Arc::new(TableSink::new(name, self.0[place].clone()))
    }

    fn back_up(&self) {
        self.0.iter().for_each(|table| table.back_up());
    }

    fn restore(&self, place: usize, backup: usize) {
        self.0[place].restore(backup);
    }

    fn accept_all(&self) {
        self.0.iter().for_each(|table| table.accept_all());
    }
}

async fn pure(fixture: &Arc<Fixture>, seed: u64, script: &Script) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(memory_folder())?;
    let chaos = Chaos::new(seed, 60);
    let tables = [(); 3].map(|()| Table::new(chaos.clone()));
    let world = World {
        fixture: fixture.clone(),
        size: PURE,
        home: folder.path().to_owned(),
        chaos,
        destinations: Arc::new(InMemory(tables.clone())),
    };
    let forgotten = life::run(&world, script).await?;
    let mut rows = BTreeMap::new();
    for (sink, table) in SINKS.into_iter().zip(tables) {
        let all = table.rows();
        let read = all.iter().filter(|row| !row.is_redriven);
        let read: Vec<u64> = read.map(|row| row_id(&row.payload)).collect();
        PURE.check_order(sink, &read)?;
        rows.insert(sink, all.iter().map(|row| row_id(&row.payload)).collect());
    }
    Outcome::new(&world, rows, forgotten).await?.check(script, PURE)
}

/// Returns a folder in memory, where a state database costs no disk writes, if there is one.
fn memory_folder() -> std::path::PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() }
}

/// Returns the seeds of a test: those of `SHARDMILL_SEED` if it is set (a number, or a range such as `20..40`),
/// otherwise `0..count`.
fn seeds(count: u64) -> Vec<u64> {
    let Ok(wanted) = std::env::var("SHARDMILL_SEED") else { return (0..count).collect() };
    let number = |text: &str| text.parse::<u64>().expect("a seed is a number");
    match wanted.split_once("..") {
        Some((from, to)) => (number(from)..number(to)).collect(),
        None => vec![number(&wanted)],
    }
}

/// Runs the scripts of all seeds, and reports why each failed one failed.
async fn all<F: Future<Output = anyhow::Result<()>>>(
    (seeds, size, at_once): (Vec<u64>, Size, usize),
    run: impl Fn(u64, Arc<Script>) -> F,
) {
    let begun = std::time::Instant::now();
    let count = seeds.len();
    let each = futures::stream::iter(seeds).map(|seed| {
        let script = Arc::new(Script::draw(seed, size));
        let done = AssertUnwindSafe(run(seed, script.clone())).catch_unwind();
        async move {
            let why = match done.await {
                Ok(Ok(())) => return None,
                Ok(Err(error)) => format!("{error:#}"),
                // The panic hook has printed the message.
                Err(_) => "it panicked".to_owned(),
            };
            let failed = format!("SHARDMILL_SEED={seed}: {why}\n{script:?}");
            println!("{failed}");
            Some(seed)
        }
    });
    let mut failed: Vec<u64> =
        each.buffer_unordered(at_once).filter_map(std::future::ready).collect().await;
    println!("{count} seeds in {:?}", begun.elapsed());
    failed.sort_unstable();
    assert!(failed.is_empty(), "seeds that failed: {failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_record_is_there_once_whatever_happens() {
    /// Number of concurrent runs: a run waits more than it works.
    const AT_ONCE: usize = 64;
    let fixture = Fixture::new();
    all((seeds(250), PURE, AT_ONCE), async |seed, script| pure(&fixture, seed, &script).await)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_record_is_in_postgres_and_in_a_bucket_once_whatever_happens() {
    const AT_ONCE: usize = 8;
    let (fixture, bucket) = (Fixture::new(), Arc::new(Bucket::start().await));
    all((seeds(50), REAL, AT_ONCE), async |seed, script| {
        real(&fixture, &bucket, seed, &script).await
    })
    .await;
}

/// Two tables in PostgreSQL, and objects on S3.
struct OnServers {
    tables: Arc<Tables>,
    bucket: Arc<Bucket>,
    seed: u64,
}

impl Destinations for OnServers {
    fn sink(&self, place: usize, name: &str) -> Arc<dyn Sink> {
        match place {
            ALL => self.bucket.sink(self.seed, name),
            _ => self.tables.sink(name),
        }
    }
}

async fn real(
    fixture: &Arc<Fixture>,
    bucket: &Arc<Bucket>,
    seed: u64,
    script: &Script,
) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(memory_folder())?;
    let tables = Arc::new(Tables::create(seed).await);
    let world = World {
        fixture: fixture.clone(),
        size: REAL,
        home: folder.path().to_owned(),
        chaos: Chaos::new(seed, 60),
        destinations: Arc::new(OnServers { tables: tables.clone(), bucket: bucket.clone(), seed }),
    };
    let forgotten = life::run(&world, script).await?;
    // Waits until transactions whose client has ended have ended too.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut rows = BTreeMap::new();
    for table in ["left", "right"] {
        let ids = tables.ids(table).await;
        REAL.check_order(table, &ids)?;
        rows.insert(table, ids);
    }
    // Each route has objects of its own, so the order of all rows is unknown.
    let in_bucket = bucket.rows(seed).await;
    rows.insert("all", in_bucket.iter().map(|row| row_id(row)).collect());
    let outcome = Outcome::new(&world, rows, forgotten).await.context("the outcome")?;
    outcome.check(script, REAL)?;
    tables.remove().await;
    Ok(())
}
