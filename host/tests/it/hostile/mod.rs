//! Stages against plugins that misbehave on request: the fault is one record's.

pub mod binary;
pub mod lane;
mod faults;
mod probe;
mod search;
pub mod wat;
