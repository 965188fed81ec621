//! Stages: a batch's records pass them one after the other, each a plugin.
//!
//! [`Revision`] is a loaded and validated revision: everything that decides what a record becomes (plugins,
//! configurations, bindings). [`Chain`] is one lane's instances of it and runs batches. The faults of a plugin end
//! here: they become dead letters of single records, or block the lane. [`Samples`] are recent inputs, on which a
//! candidate for a stage is tried; its `Health` is what it is judged by.

mod answer;
mod chain;
mod columns;
mod cuts;
mod endless;
mod fate;
mod fit;
mod flow;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod health;
mod packed;
mod revision;
mod runner;
mod samples;

pub(crate) use answer::StageOutcome;
pub use chain::{Blocked, Chain, ChainOutcome};
pub(crate) use chain::{Entered, Routed, Searching};
pub use columns::needed as needed_columns;
pub use fate::{Difference, Fate, TrialOutput};
pub use fate::{fates, show_json, show_payload, written};
pub(crate) use flow::before;
pub use flow::{Flow, Item, first_flow};
pub(crate) use health::{Health, HealthCounts};
pub use revision::{LoadedStage, Revision, RouteTarget, source_route};
pub use runner::{RunError, StageRunner};
pub(crate) use samples::Sample;
pub use samples::Samples;
