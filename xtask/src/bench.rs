//! `cargo xtask bench NAME`: measures something against a baseline in the same run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::data;
use crate::languages::Languages;
use crate::plugins::build_shardmill;
use crate::postgres::Cluster;
use crate::process::{cargo, forget_this_package, project_root, run};

/// Measure something against a baseline.
#[derive(clap::Args)]
pub struct Bench {
    /// The bench to run.
    #[arg(value_enum)]
    bench: Name,
    /// Print one JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
    /// Also draw the figures, if the bench has a picture.
    #[arg(long)]
    picture: bool,
    /// Run only these cases.
    cases: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// Cost of the sandbox, against native code.
    Wall,
    /// Records per second from a stream, against a bare loop of SDK calls.
    Read,
    /// Cost of a thousand idle lanes, against bare loops of SDK calls.
    Lanes,
    /// A file through a plugin into NDJSON, against the same work in plain Rust.
    File,
    /// Memory after 100 million records, against memory after the first million.
    Flat,
    /// A plugin in each language, against native Rust.
    Languages,
    /// Rows into tables and objects, against a bare COPY and a bare loop of PutObject calls.
    Sinks,
    /// Time from a record's arrival until its row is visible, against a bare loop of SDK calls and INSERTs.
    Latency,
    /// Swap pauses of lanes in 200 swaps under load, against a restart.
    Swap,
    /// Latency of an honest lane beside hostile ones, against its latency beside honest ones.
    Fair,
}

/// Languages of [`Name::Languages`], as `shardmill new plugin` names them.
const LANGUAGES: [&str; 5] = ["rust", "c", "go", "js", "python"];
/// File of the picture of that bench.
const LANGUAGES_PICTURE: &str = "docs/languages.svg";

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
            Name::Languages => "languages",
            Name::Sinks => "sinks",
            Name::Latency => "latency",
            Name::Swap => "swap",
            Name::Fair => "fair",
        };
        let mut command = cargo();
        command.args(["bench", "--quiet", "--package", "benches", "--bench", name, "--"]);
        if self.json {
            command.arg("--json");
        }
        if self.bench == Name::File {
            data::flights(&root)?;
        }
        if self.bench == Name::Languages {
            command.env("SHARDMILL_LANGUAGES", build_languages(&root)?);
        } else if !matches!(self.bench, Name::Wall | Name::Fair) {
            command.env("SHARDMILL_BIN", build_shardmill(cargo(), "--package=shardmill", &root)?);
        }
        if self.picture {
            command.env("SHARDMILL_PICTURE", root.join(LANGUAGES_PICTURE));
        }
        let scratch = tempfile::tempdir().context("failed to make a scratch folder")?;
        let mut postgres = None;
        if matches!(self.bench, Name::Sinks | Name::Latency | Name::Swap) {
            let cluster = postgres.insert(Cluster::start(scratch.path())?);
            // The baselines connect without TLS, so that the comparison does not include it.
            command.env("SHARDMILL_TEST_POSTGRES", format!("{}?sslmode=disable", cluster.url));
        }
        run(command.args(self.cases).current_dir(root))
    }
}

/// Makes a new plugin in each language and builds it. Returns the folder of the components.
fn build_languages(root: &Path) -> Result<PathBuf> {
    let shardmill = build_shardmill(cargo(), "--package=shardmill", root)?;
    let languages = Languages::install(root)?;
    let folder = root.join("target/bench-languages");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    for language in LANGUAGES {
        let plugin = folder.join(language);
        let mut new = Command::new(&shardmill);
        run(new.args(["new", "plugin", "greet", "--lang", language, "--dir"]).arg(&plugin))?;
        let mut build = Command::new(&shardmill);
        build.args(["plugin", "build"]).arg(&plugin).arg("-o");
        build.arg(folder.join(format!("{language}.wasm")));
        forget_this_package(&mut build);
        languages.put_on_path(&mut build)?;
        run(&mut build)?;
    }
    Ok(folder)
}
