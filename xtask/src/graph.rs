//! `cargo xtask graph`: shows which crate or module uses which, and which heavy dependencies reach a crate.
//!
//! Cargo lists the crates of the workspace; the top-level modules of a crate are read from its sources
//! ([`modules`]). Dependencies of tests are left out, because tests may use crates above. Errors are: an arrow
//! that closes a cycle (with its files), a heavy dependency that `host/dependencies.toml` does not allow
//! ([`heavy`]), and a picture in ARCHITECTURE.md with other arrows. `cargo xtask test` checks all of this, too.

mod heavy;
mod modules;
mod uses;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::uses::Uses;
use crate::process::{metadata, packages, project_root};

/// File with the picture of the crates.
const ARCHITECTURE: &str = "ARCHITECTURE.md";
/// Text before and after a picture.
const FENCES: (&str, &str) = ("```mermaid\n", "```\n");

/// Show which crate or module uses which, layer by layer. Fails on a cycle and on a heavy dependency that
/// host/dependencies.toml does not allow.
#[derive(clap::Args)]
pub struct Graph {
    /// Print the pictures in Mermaid syntax to standard output; ARCHITECTURE.md contains the first one.
    #[arg(long)]
    mermaid: bool,
}

impl Graph {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let graphs = Graphs::read(&root)?;
        if self.mermaid {
            let mut output = std::io::stdout().lock();
            write!(output, "{}", fenced(&graphs.host()))?;
            for (title, uses) in &graphs.modules {
                write!(output, "\n{title}\n\n{}", fenced(uses))?;
            }
            return Ok(());
        }
        eprintln!("crates\n{}", graphs.crates.shown());
        for (title, uses) in &graphs.modules {
            eprintln!("{title}\n{}", uses.shown());
        }
        check(&root)
    }
}

/// Checks that there are no cycles, that heavy dependencies are allowed, and that the picture is current.
pub fn check(root: &Path) -> Result<()> {
    let graphs = Graphs::read(root)?;
    let titled = graphs.modules.iter().map(|(title, uses)| (title.as_str(), uses));
    let circles: Vec<String> = std::iter::once(("crates", &graphs.crates))
        .chain(titled)
        .filter_map(|(title, uses)| Some(format!("{title}:\n{}", uses.circle()?)))
        .collect();
    let mut problems = Vec::new();
    if !circles.is_empty() {
        problems.push(format!(
            "expected no cycles, found some; move what both sides need into a crate or module below both\n{}",
            circles.join("\n")
        ));
    }
    problems.extend(heavy::violations(root, &metadata(root, &["--locked"])?)?);
    let architecture = std::fs::read_to_string(root.join(ARCHITECTURE))
        .with_context(|| format!("failed to read {ARCHITECTURE}"))?;
    if !architecture.contains(&fenced(&graphs.host())) {
        problems.push(format!(
            "{ARCHITECTURE}: expected the picture of the current crates, found another; replace it with the first \
             one of `cargo xtask graph --mermaid`"
        ));
    }
    match problems.is_empty() {
        true => Ok(()),
        false => bail!("{}", problems.join("\n")),
    }
}

/// Graphs of the workspace's crates, and of the modules in each.
struct Graphs {
    crates: Uses,
    /// Graphs of modules, with titles.
    modules: Vec<(String, Uses)>,
    /// Names of the crates under `host`.
    host: BTreeSet<String>,
}

impl Graphs {
    fn read(root: &Path) -> Result<Self> {
        let packages = packages(root)?;
        let own: BTreeSet<&str> = packages.iter().map(name).collect();
        let mut graphs =
            Self { crates: Uses::default(), modules: Vec::new(), host: BTreeSet::new() };
        for package in &packages {
            let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
            let manifest_path = manifest.strip_prefix(root).unwrap_or(&manifest);
            if manifest_path.starts_with("host") {
                graphs.host.insert(name(package).to_owned());
            }
            graphs.crates.add_user(name(package));
            for dependency in package["dependencies"].as_array().into_iter().flatten() {
                // Tests may use crates above.
                if dependency["kind"].is_null() && own.contains(name(dependency)) {
                    graphs.crates.add(name(package), name(dependency), manifest_path);
                }
            }
            let sources = manifest.parent().context("expected a manifest in a folder")?.join("src");
            let roots = ["lib.rs", "main.rs"].map(|file| sources.join(file));
            for file in roots.iter().filter(|file| file.exists()) {
                let shown = file.strip_prefix(root).unwrap_or(file);
                let uses = modules::modules(root, shown).with_context(|| {
                    format!("failed to read the modules of {}", shown.display())
                })?;
                graphs.modules.push((format!("modules of {}", shown.display()), uses));
            }
        }
        Ok(graphs)
    }

    /// Returns the graph of the crates under `host`, with their short names.
    fn host(&self) -> Uses {
        self.crates
            .only(|name| self.host.contains(name))
            .renamed(|name| name.strip_prefix("shardmill-").unwrap_or(name).to_owned())
    }
}

fn fenced(uses: &Uses) -> String {
    format!("{}{}{}", FENCES.0, uses.mermaid(), FENCES.1)
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap_or_default()
}
