//! Faults that the model has found, each as a script of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use shardmill_core::owner::Ownership;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardKey, SinkName};
use shardmill_core::sink::{
    Acquired, Commit, Committed, KeptPosition, RefusalLog, Sink, SinkError, SinkWriter,
};

use super::chaos::Chaos;
use super::life::{self, Destinations, World};
use super::script::{Between, End, File, Life, Redriving, Script};
use super::sink::Table;
use super::{ALL, Fixture, InMemory, PURE, SINKS, row_id};

/// Index of the sink that fails some commits.
const RIGHT: usize = 1;

/// Tables, one of which accepts nothing while `is_stuck` is set.
struct Stuck {
    tables: InMemory,
    is_stuck: Arc<AtomicBool>,
    place: usize,
}

impl Destinations for Stuck {
    fn sink(&self, place: usize, name: &str) -> Arc<dyn Sink> {
        let inner = self.tables.sink(place, name);
        if place == self.place {
            return Arc::new(StuckSink { inner, is_stuck: self.is_stuck.clone() });
        }
        inner
    }

    fn back_up(&self) {
        self.tables.back_up();
    }

    fn restore(&self, place: usize, backup: usize) {
        self.tables.restore(place, backup);
    }

    fn accept_all(&self) {
        self.tables.accept_all();
    }
}

struct StuckSink {
    inner: Arc<dyn Sink>,
    is_stuck: Arc<AtomicBool>,
}

#[async_trait]
impl Sink for StuckSink {
    fn name(&self) -> &SinkName {
        self.inner.name()
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        self.inner.prepare(routes).await
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let mut acquired = self.inner.acquire(shard).await?;
        let (inner, is_stuck, sink) = (acquired.writer, self.is_stuck.clone(), self.name().clone());
        acquired.writer = Box::new(StuckWriter { inner, is_stuck, sink });
        Ok(acquired)
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        self.inner.position(shard).await
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        self.inner.adopt(old, shard).await
    }

    fn set_ownership(&self, ownership: Ownership) {
        self.inner.set_ownership(ownership);
    }

    async fn kept_positions(
        &self,
        pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        self.inner.kept_positions(pipeline, shards).await
    }
}

struct StuckWriter {
    inner: Box<dyn SinkWriter>,
    is_stuck: Arc<AtomicBool>,
    sink: SinkName,
}

#[async_trait]
impl SinkWriter for StuckWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        if self.is_stuck.load(Ordering::Relaxed) {
            let (sink, cause) = (self.sink.clone(), "stuck".into());
            return Err(SinkError::Unavailable { sink, cause });
        }
        self.inner.commit(commit, refusals).await
    }
}

/// Tables, and the world around them.
struct Case {
    tables: [Arc<Table>; 3],
    is_stuck: Arc<AtomicBool>,
    world: World,
    _folder: tempfile::TempDir,
}

impl Case {
    fn new(place: usize) -> Self {
        let folder = tempfile::tempdir_in(super::memory_folder()).expect("a folder");
        let chaos = Chaos::new(0, 1);
        let tables = [(); 3].map(|()| Table::new(chaos.clone()));
        let is_stuck = Arc::new(AtomicBool::new(false));
        let own = InMemory(tables.clone());
        let destinations = Arc::new(Stuck { tables: own, is_stuck: is_stuck.clone(), place });
        let (fixture, home) = (Fixture::new(), folder.path().to_owned());
        let world = World { fixture, size: PURE, home, chaos, destinations };
        Self { tables, is_stuck, world, _folder: folder }
    }

    /// Runs lives without faults.
    async fn run(&self, lives: Vec<Life>) {
        let script = Script { lives, is_one_sided: true, accepts_from: None };
        life::run(&self.world, &script).await.expect("it runs");
    }

    fn ids(&self, place: usize) -> Vec<u64> {
        self.tables[place].rows().iter().map(|row| row_id(&row.payload)).collect()
    }

    /// Returns the ids of dead letters of the sink of all rows.
    async fn dead_letters(&self) -> Vec<u64> {
        let (dead_letters, _) = life::left(&self.world).await.expect("dead letters");
        let own = dead_letters
            .iter()
            .filter(|dead_letter| dead_letter.place == format!("sink:{}", SINKS[ALL]));
        own.map(|dead_letter| super::dead_letter_id(&dead_letter.original)).collect()
    }
}

const FILE: File = File {
    right: 1,
    commit_seed: 1,
    is_away: false,
    is_renamed: false,
    gives_up: false,
    is_hasty: false,
};

fn life(before: Between, file: File) -> Life {
    Life { before, file, reloads: Vec::new(), redriving: Redriving::No, end: End::CaughtUp }
}

/// Regression: when the sink came back, other sinks were ahead of the checkpoint at which it began. It was not given
/// the records up to there, because the revision that ran them first did not bind it, and no hole recorded that.
#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_comes_back_lacks_nothing_but_what_holes_say() {
    let case = Case::new(RIGHT);
    case.is_stuck.store(true, Ordering::Relaxed);
    let (tables, away) = (case.tables.clone(), File { is_away: true, ..FILE });
    let lives = case.run(vec![life(Between::Nothing, away)]);
    let left_is_ahead = async {
        while tables[0].rows().len() < 50 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        case.world.chaos.kill();
    };
    tokio::join!(lives, left_is_ahead);
    assert_eq!(case.ids(RIGHT), [0_u64; 0]);
    case.is_stuck.store(false, Ordering::Relaxed);
    case.run(vec![life(Between::Nothing, FILE)]).await;
    let (dead_letters, holes) = life::left(&case.world).await.expect("holes");
    let rows = case.ids(ALL);
    let is_in_hole = |id: &u64| {
        let (shard, at) = (id / PURE.records_per_shard, super::source::record(*id).position);
        holes.iter().any(|hole| {
            hole.shard.as_str() == super::source::name(shard as usize)
                && hole.from_exclusive.as_ref() < Some(&at)
                && hole.to_inclusive.as_ref().is_none_or(|to| at <= *to)
        })
    };
    let has_dead_letter = |id: &u64| {
        dead_letters.iter().any(|dead_letter| super::dead_letter_id(&dead_letter.original) == *id)
    };
    let is_lost = |id: &u64| !rows.contains(id) && !has_dead_letter(id) && !is_in_hole(id);
    let lost: Vec<u64> = (0..PURE.records()).filter(is_lost).collect();
    assert_eq!(lost, [0_u64; 0], "{holes:?}");
    assert!(!rows.iter().any(is_in_hole), "the sink has rows that a hole covers: {holes:?}");
}

/// Regression: the sink got its refused rows a second time, and accepted them. A redrive of their dead letters
/// then wrote them a second time.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_sink_is_not_given_rows_that_are_its_dead_letters() {
    let case = Case::new(RIGHT);
    case.run(vec![life(Between::Nothing, FILE)]).await;
    let dead_letters = case.dead_letters().await;
    assert!(!dead_letters.is_empty());
    case.tables[ALL].accept_all();
    case.run(vec![life(Between::SinkRestored { place: ALL, backup: 0 }, FILE)]).await;
    assert_eq!(case.dead_letters().await, dead_letters);
    let mut found = case.ids(ALL);
    assert!(found.len() > 200, "the sink got its rows again");
    found.extend(dead_letters);
    assert_eq!(super::twice(found), [0_u64; 0]);
}

/// Regression: the restored destination had positions under the old name only, and the sink read all records again.
#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_sink_goes_on_where_a_backup_of_before_has_it() {
    let case = Case::new(RIGHT);
    let renamed = File { is_renamed: true, ..FILE };
    case.run(vec![life(Between::Nothing, FILE), life(Between::SinkRenamed, renamed)]).await;
    let before = case.ids(ALL);
    // Backup 1 was taken when the sink had all rows under its old name.
    case.run(vec![life(Between::SinkRestored { place: ALL, backup: 1 }, renamed)]).await;
    assert_eq!(case.ids(ALL), before);
}

/// Regression: the redrive started again from its first dead letter, and wrote existing rows twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_goes_on_after_its_sink_was_renamed() {
    let case = Case::new(RIGHT);
    case.run(vec![life(Between::Nothing, FILE)]).await;
    let dead_letters = case.dead_letters().await.len();
    for table in &case.tables {
        table.accept_all();
    }
    // The sink of all rows has all rows of the redrive; another sink has none.
    case.is_stuck.store(true, Ordering::Relaxed);
    let (tables, rows) = (case.tables.clone(), case.ids(ALL).len());
    let redriven = life::redrive_once(&case.world, FILE);
    let all_is_ahead = async {
        while tables[ALL].rows().len() < rows + dead_letters {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        case.world.chaos.kill();
    };
    let (redriven, ()) = tokio::join!(redriven, all_is_ahead);
    redriven.expect("interrupted");
    case.is_stuck.store(false, Ordering::Relaxed);
    let renamed = File { is_renamed: true, ..FILE };
    case.run(vec![life(Between::SinkRenamed, renamed)]).await;
    life::redrive_once(&case.world, renamed).await.expect("redriven");
    assert_eq!(super::twice(case.ids(ALL)), [0_u64; 0]);
    assert_eq!(case.ids(ALL).len(), rows + dead_letters);
}
