//! `cargo xtask bench NAME`: measures something against a baseline, in the same run.

use anyhow::Result;

use crate::process::{cargo, project_root, run};

/// Measure something against a baseline.
#[derive(clap::Args)]
pub struct Bench {
    #[command(subcommand)]
    bench: Name,
}

#[derive(clap::Subcommand)]
enum Name {
    /// What the wall between host and plugin costs, against the same plugin as native code.
    Wall {
        /// One JSON object per line instead of a table.
        #[arg(long)]
        json: bool,
    },
}

impl Bench {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let (name, json) = match self.bench {
            Name::Wall { json } => ("wall", json),
        };
        let mut command = cargo();
        command.args(["bench", "--quiet", "--package", "benches", "--bench", name, "--"]);
        if json {
            command.arg("--json");
        }
        run(command.current_dir(project_root()))
    }
}
