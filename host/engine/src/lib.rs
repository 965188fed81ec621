//! The engine: takes records from a source through stages to sinks, each once, while what runs may change.
//!
//! `pipeline.rs` is the path of a record on one screen. [`stage`] runs plugins on batches, [`lane`] takes one shard
//! along the path, `delivery.rs` gathers rows between a lane and a sink, [`supervisor`] starts a lane per shard, and
//! [`swap`] changes what runs. The engine knows sources and sinks only by their contracts, and is given both.
//!
//! A program can have a pipeline of its own: [`Pipeline::builder`] takes sources and sinks of the program, and
//! components as [`Stage`]s. `examples/embed` has a sink that writes each row once. Here each record of a list goes to
//! another list, without a stage:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use std::time::Duration;
//!
//! use async_trait::async_trait;
//! use shardmill_core::record::*;
//! use shardmill_core::sink::*;
//! use shardmill_core::source::*;
//! use shardmill_core::stop::Stop;
//! use shardmill_engine::Pipeline;
//!
//! /// One shard of words; a position is the number of words up to there.
//! struct Words(&'static [&'static str]);
//!
//! #[async_trait]
//! impl ShardSource for Words {
//!     async fn identity(&self) -> Result<StreamIdentity, SourceError> {
//!         Ok(StreamIdentity { name: "words".into(), arn: "words".into(), created_ms: 0 })
//!     }
//!     async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
//!         Ok(vec![Shard::only(ShardId::new("all"))])
//!     }
//!     fn start(&self) -> &StartPosition {
//!         &StartPosition::TrimHorizon
//!     }
//!     async fn open(
//!         &self,
//!         shard: &ShardKey,
//!         from: ResumePoint<'_>,
//!     ) -> Result<Box<dyn BatchReader>, SourceError> {
//!         Ok(Box::new(WordsReader { words: self.0, shard: shard.clone(), after: from.after.cloned() }))
//!     }
//! }
//!
//! struct WordsReader { words: &'static [&'static str], shard: ShardKey, after: Option<Position> }
//!
//! #[async_trait]
//! impl BatchReader for WordsReader {
//!     async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
//!         let read: usize = self.after.as_ref().map_or(0, |it| it.sequence.as_str().parse().unwrap());
//!         let Some(word) = self.words.get(read) else { return Ok(NextBatch::SourceEnd) };
//!         let position = Position { sequence: (read as u64 + 1).into(), sub_sequence: 0 };
//!         let record = Record {
//!             position: position.clone(),
//!             partition_key: "key".into(),
//!             payload: (*word).into(),
//!             arrived_ms: 0,
//!         };
//!         let from_exclusive = self.after.replace(position.clone());
//!         let range = PositionRange { from_exclusive, to_inclusive: position };
//!         let (shard, records) = (self.shard.clone(), vec![record]);
//!         Ok(NextBatch::Batch(Batch { shard, records, range, entry: Entry::Source }))
//!     }
//! }
//!
//! /// Keeps rows, and no position: the engine keeps it in the state folder.
//! #[derive(Clone)]
//! struct List { name: SinkName, rows: Arc<Mutex<Vec<String>>> }
//!
//! #[async_trait]
//! impl Sink for List {
//!     fn name(&self) -> &SinkName {
//!         &self.name
//!     }
//!     async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
//!         Ok(())
//!     }
//!     async fn acquire(&self, _shard: &ShardKey) -> Result<Acquired, SinkError> {
//!         let writer = Box::new(self.clone());
//!         Ok(Acquired { writer, position: None, keeps_position: false, must_cut_at: None })
//!     }
//!     async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
//!         Ok(None)
//!     }
//! }
//!
//! #[async_trait]
//! impl SinkWriter for List {
//!     async fn commit(
//!         &mut self,
//!         commit: &Commit,
//!         _refusals: &dyn RefusalLog,
//!     ) -> Result<Committed, SinkError> {
//!         let text = |row: &Row| String::from_utf8_lossy(&row.payload).into_owned();
//!         self.rows.lock().unwrap().extend(commit.rows.iter().map(text));
//!         Ok(Committed { rows_written: commit.rows.len() as u64, ..Committed::default() })
//!     }
//! }
//!
//! # let folder = tempfile::tempdir()?;
//! # let state_dir = folder.path();
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let list = List { name: SinkName::new("list"), rows: Arc::default() };
//! let pipeline = Pipeline::builder("words")
//!     .state_dir(state_dir)
//!     .source(Arc::new(Words(&["one", "two", "three"])))
//!     .sink(Arc::new(list.clone()))
//!     .build()?;
//! let summary = pipeline.run(&Stop::new(Duration::from_secs(20))).await?;
//! assert_eq!(summary.records, 3);
//! assert_eq!(*list.rows.lock().unwrap(), ["one", "two", "three"]);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

#[cfg(test)]
mod assets;
pub mod bound;
mod dead_letter_log;
mod delivery;
mod embed;
pub mod lane;
pub mod lock;
pub mod masked;
mod pipeline;
pub mod ranges;
pub mod redrive_source;
mod refusals;
pub mod run;
pub mod shard_lineage;
pub mod stage;
pub mod supervisor;
pub mod swap;
pub mod window;

pub use embed::{
    BuildError, CommitPolicy, DEFAULT_COMMIT_POLICY, Pipeline, PipelineBuilder, PipelineError,
    Stage,
};
