//! The fuzz targets of the host, one line each. Tests run them by a seed (`driver`), libFuzzer by coverage
//! (`README.md`).

#![allow(clippy::expect_used, reason = "a finding is a panic")]

#[cfg(test)]
mod driver;
mod values;

use shardmill_core::fuzzing::FuzzTarget;

/// All targets.
pub static TARGETS: [FuzzTarget; 7] = [
    shardmill_engine::stage::fuzz::OUTCOME,
    shardmill_plugin::capability::lookup::fuzz::ARGUMENTS,
    shardmill_kinesis::fuzz::AGGREGATE,
    shardmill_sink_objects::fuzz::CLAIMS,
    shardmill_sinks_common::fuzz::ROWS,
    values::VALUES,
    shardmill_pg::fuzz::CONNECTION,
];

/// Runs the target of this name with one input, for libFuzzer.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target").run)(data);
}
