//! `cargo xtask soak`: runs fuzz targets and randomised tests with many seeds.

use anyhow::{Context as _, Result};

use crate::fuzz::Fuzzing;
use crate::process::{host_tests, project_root, run};
use crate::test::Parts;

/// Tests of the host that make random choices from a seed.
const SEEDED_TESTS: [&str; 3] = ["model::", "resharding::", "crash::"];

/// Run the fuzz targets and the randomised tests, with one seed after the other.
#[derive(clap::Args)]
pub struct Soak {
    /// Number of seeds.
    #[arg(long, default_value_t = 10)]
    rounds: u64,
    /// First seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds for which each fuzz target runs per seed; all run side by side.
    #[arg(long, default_value_t = 60)]
    fuzz_seconds: u64,
    /// Run only fuzz targets.
    #[arg(long)]
    fuzz_only: bool,
    /// Run only this fuzz target.
    #[arg(long)]
    target: Option<String>,
}

impl Soak {
    /// Runs the task. Stops at the first seed that fails, and prints it.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let fuzz_only = self.fuzz_only || self.target.is_some();
        let parts = if fuzz_only { None } else { Some(Parts::start(&root)?) };
        for seed in self.seed..self.seed + self.rounds {
            let fuzzing = Fuzzing { seconds: self.fuzz_seconds, seed, target: self.target.clone() };
            fuzzing.run(&root).with_context(|| format!("seed {seed} failed"))?;
            let Some(parts) = &parts else { continue };
            let mut tests = host_tests(&root)?;
            tests.args(["--test", "it", "--", "--nocapture"]).args(SEEDED_TESTS);
            parts.apply_to(&mut tests)?;
            run(tests.env("SHARDMILL_SEED", seed.to_string()))
                .with_context(|| format!("seed {seed} failed"))?;
        }
        Ok(())
    }
}
