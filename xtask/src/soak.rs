//! `cargo xtask soak`: the crash test with many seeds, for as long as one likes.

use anyhow::{Context as _, Result};

use crate::data;
use crate::postgres::Cluster;
use crate::process::{cargo, project_root, run};

/// Run the crash test with one seed after the other.
#[derive(clap::Args)]
pub struct Soak {
    /// How many seeds.
    #[arg(long, default_value_t = 10)]
    rounds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Soak {
    /// Runs the task; stops at the first seed that fails, which is printed.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        data::flights(&root)?;
        let scratch = tempfile::tempdir().context("failed to make a scratch folder")?;
        let postgres = Cluster::start(scratch.path())?;
        for seed in self.seed..self.seed + self.rounds {
            run(cargo()
                .current_dir(&root)
                .args(["test", "--release", "--package", "shardmill", "--test", "it", "crash::"])
                .args(["--", "--nocapture"])
                .env("SHARDMILL_TEST_POSTGRES", &postgres.url)
                .env("SHARDMILL_SEED", seed.to_string()))
            .with_context(|| format!("seed {seed} failed"))?;
        }
        Ok(())
    }
}
