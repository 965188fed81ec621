//! Stages against plugins that misbehave on request: the fault is one record's.
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod binary;
mod lane;
mod misdeeds;
mod nosy;
mod search;
#[path = "../support/mod.rs"]
mod support;
mod wat;
