//! Fuzz targets: code that reads foreign bytes, run with random inputs.
//!
//! Each target is a module `fuzz` beside the code that it tests. It compares the code with a slow reference: plain code
//! that follows the documented rules and shares nothing with the code under test. A finding is a panic. Targets are
//! compiled for tests and for libFuzzer; `fuzz/src/lib.rs` lists and runs them.

#![allow(clippy::expect_used, reason = "a finding is a panic")]

mod choices;

pub use choices::Choices;

/// Code under test, and a way to make inputs for it.
pub struct FuzzTarget {
    /// Name of the target, and of its corpus in `fuzz/corpus`.
    pub name: &'static str,
    /// Runs the code with one input. Panics on a finding.
    pub run: fn(&[u8]),
    /// Makes an input that is mostly valid; random bytes alone are refused early.
    pub grow: fn(&mut fastrand::Rng) -> Vec<u8>,
    /// Words that mutations insert into inputs.
    pub words: &'static [&'static str],
}
