//! The engine: records from a source through stages to sinks, each once, while what runs is changed.
//!
//! `pipeline.rs` is the path of a record on one screen. [`stage`] runs plugins on batches, [`lane`] is one shard taken
//! along the path, `delivery.rs` gathers rows between a lane and a sink, [`supervisor`] starts a lane per shard, and
//! [`swap`] changes what runs. It knows sources and sinks by their contracts alone, and is given both.

pub mod bound;
mod committer;
mod delivery;
mod embed;
pub mod lane;
pub mod lease;
mod letter_log;
pub mod letters;
pub mod lineage;
pub mod masked;
mod pipeline;
mod refusals;
pub mod run;
pub mod spans;
pub mod stage;
pub mod supervisor;
pub mod swap;
pub mod window;

pub use embed::{
    BuildError, CommitPolicy, DEFAULT_COMMIT_POLICY, Pipeline, PipelineBuilder, PipelineError,
    Stage,
};
