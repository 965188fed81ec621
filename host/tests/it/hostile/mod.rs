//! Stages against plugins that misbehave on request: the fault is one record's.

pub mod binary;
mod faults;
pub mod lane;
mod probe;
mod search;
pub mod wat;
