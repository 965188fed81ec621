//! Stages against plugins that misbehave on request: only the culprits are affected.

pub mod binary;
mod faults;
pub mod lane;
mod probe;
mod search;
pub mod wat;
