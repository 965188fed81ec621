//! `cargo xtask bench NAME`: measures something against a baseline, in the same run.

use anyhow::Result;

use crate::data;
use crate::plugins::build_shardmill;
use crate::process::{cargo, project_root, run};

/// Measure something against a baseline.
#[derive(clap::Args)]
pub struct Bench {
    /// What is measured.
    #[arg(value_enum)]
    bench: Name,
    /// One JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
    /// Only these cases.
    cases: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// What the wall between host and plugin costs, against native code.
    Wall,
    /// Records per second off a stream, against a bare loop of SDK calls.
    Read,
    /// What a thousand idle lanes cost, against bare loops of SDK calls.
    Lanes,
    /// A file through a plugin into NDJSON, against the same in plain Rust.
    File,
    /// Memory after 100 million records, against memory after the first million.
    Flat,
}

impl Bench {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let name = match self.bench {
            Name::Wall => "wall",
            Name::Read => "read",
            Name::Lanes => "lanes",
            Name::File => "file",
            Name::Flat => "flat",
        };
        let mut command = cargo();
        command.args(["bench", "--quiet", "--package", "benches", "--bench", name, "--"]);
        if self.json {
            command.arg("--json");
        }
        if self.bench == Name::File {
            data::flights(&root)?;
        }
        if self.bench != Name::Wall {
            command.env("SHARDMILL_BIN", build_shardmill(&root)?);
        }
        run(command.args(self.cases).current_dir(root))
    }
}
