//! Fuzz targets: code that reads the bytes of strangers, run with bytes that nobody has thought of.
//!
//! Each target lies beside what it attacks, as a module `fuzz`, and compares it with a slow reference: plain
//! code that follows the documented rules and shares nothing with what it checks. A finding is a panic.
//! Compiled for tests and for libFuzzer; `fuzz_targets.rs` lists the targets and runs them.

#![allow(clippy::expect_used, reason = "a finding is a panic")]

mod choices;

pub use choices::Choices;

/// Code under test, and a way to make inputs for it.
pub struct FuzzTarget {
    /// The target's name, which is also the name of its corpus in `fuzz/corpus`.
    pub name: &'static str,
    /// Runs the code with one input. Panics on a finding.
    pub run: fn(&[u8]),
    /// Makes an input that is mostly valid: random bytes alone are refused at once.
    pub grow: fn(&mut fastrand::Rng) -> Vec<u8>,
    /// Words that mutations put into inputs.
    pub words: &'static [&'static str],
}
