//! Stages: what a batch's records pass, one plugin after the other.
//!
//! [`Generation`] is everything that decides what a record becomes (plugins, configurations,
//! bindings), loaded and proven. [`Chain`] is one lane's instances of it and runs batches. The
//! faults of a plugin end here: they become dead letters of single records, or a blocked lane.

mod chain;
mod columns;
mod cuts;
mod flow;
mod generation;
mod rejections;
mod runner;

pub use chain::{Blocked, Chain, ChainOutcome, Routed};
pub use columns::needed as needed_columns;
pub use flow::{Flow, Item, first_flow};
pub use generation::{Generation, GenerationSpec, LoadedStage, StageSpec, Target, source_route};
pub use rejections::RejectionWindow;
pub use runner::{Rejected, RunError, StageOutcome, StageRunner};
