//! Runs the fuzz targets by a seed, with the stable compiler.

use std::path::Path;

use anyhow::Result;

use crate::process::{host_tests, run};

/// Time for which each target runs in `cargo xtask test`. All targets run side by side.
const TEST_SECONDS: u64 = 10;
/// Seed of that run. It is fixed, so that a change does not fail because of an older fault.
const TEST_SEED: u64 = 1;

/// A run of fuzz targets.
#[derive(Clone, Debug)]
pub struct Fuzzing {
    /// Time for which each target runs.
    pub seconds: u64,
    /// Seed of the inputs.
    pub seed: u64,
    /// Only this target.
    pub target: Option<String>,
}

impl Fuzzing {
    /// Returns the run of `cargo xtask test`.
    pub fn of_test() -> Self {
        Self { seconds: TEST_SECONDS, seed: TEST_SEED, target: None }
    }

    /// Runs the corpora, then inputs of the seed. They are unit tests of the host: nothing is linked for them
    /// alone.
    pub fn run(&self, root: &Path) -> Result<()> {
        let mut tests = host_tests(root)?;
        tests
            .args(["--lib", "driver::"])
            .env("SHARDMILL_FUZZ_SECONDS", self.seconds.to_string())
            .env("SHARDMILL_FUZZ_SEED", self.seed.to_string());
        if let Some(target) = &self.target {
            tests.env("SHARDMILL_FUZZ_TARGET", target);
        }
        run(&mut tests)
    }
}
