//! `cargo xtask plugins`: builds the bundled plugins into `plugins/prebuilt`.
//!
//! The components are committed, so that machines without a WebAssembly compiler can run them. `SOURCES.sha256`
//! next to them records what they were built from. A component is current if the hash of its sources and its
//! own hash are the recorded ones. With the recorded compiler, a new build must give the same bytes. With
//! another compiler the bytes differ, and the build must only succeed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::process::{cargo_for_tests, forget_this_package, project_root, read, run};
use crate::wasm_toolchain::WasmToolchain;

/// Names of the plugins' crates.
const PLUGINS: [&str; 7] =
    ["car-decode", "car-transform", "csv-decode", "hostile", "probe", "route-json", "stamp"];

/// Sources of every component, in addition to its own crate.
const SHARED_SOURCES: [&str; 4] =
    ["wit", "plugins/sdk", "plugins/Cargo.toml", "plugins/Cargo.lock"];

const PREBUILT: &str = "plugins/prebuilt";
/// Build folder of the plugins. The host's tests use it, too, so the plugins' dependencies are compiled only
/// once.
const TARGET_DIR: &str = "target/plugins-in-tests";
const RECORD: &str = "plugins/prebuilt/SOURCES.sha256";
const RECORD_HEAD: &str = "\
# What the components here were built from. Written by `cargo xtask plugins`.
# SHA-256 of the sources, SHA-256 of the component, plugin.
";

/// Build the bundled plugins.
#[derive(clap::Args)]
pub struct Plugins {
    /// Change nothing; fail if a committed component is stale or does not build.
    #[arg(long)]
    check: bool,
}

impl Plugins {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        if self.check { check(&root) } else { rebuild(&root) }
    }
}

fn rebuild(root: &Path) -> Result<()> {
    let builder = Builder::new(root)?;
    let mut record = Record { rustc: builder.toolchain.version()?, plugins: BTreeMap::new() };
    for plugin in PLUGINS {
        let component = builder.build(plugin, &root.join(PREBUILT))?;
        let hashes = Hashes { sources: sources_hash(root, plugin)?, component: hash(&component)? };
        record.plugins.insert(plugin.into(), hashes);
    }
    fs::write(root.join(RECORD), record.to_text())?;
    eprintln!("{} components in {PREBUILT}", PLUGINS.len());
    Ok(())
}

/// Fails if a committed component is stale or does not build.
pub fn check(root: &Path) -> Result<()> {
    let record = Record::read(&root.join(RECORD))?;
    let mut complaints = Vec::new();
    for plugin in PLUGINS {
        let component = root.join(PREBUILT).join(format!("{plugin}.wasm"));
        match record.plugins.get(plugin) {
            None => complaints.push(format!("{plugin}: not recorded")),
            Some(expected) if expected.sources != sources_hash(root, plugin)? => {
                complaints.push(format!("{plugin}: its sources have changed since it was built"));
            }
            Some(expected) if expected.component != hash(&component)? => {
                complaints.push(format!("{plugin}: the component differs from the recorded one"));
            }
            Some(_) => {}
        }
    }
    if complaints.is_empty() {
        compare_rebuilt(root, &record, &mut complaints)?;
    }
    if !complaints.is_empty() {
        let complaints = complaints.join("\n  ");
        bail!("stale in {PREBUILT}:\n  {complaints}\nrun `cargo xtask plugins` and commit");
    }
    eprintln!("{} components in {PREBUILT} are current", PLUGINS.len());
    Ok(())
}

/// Builds all plugins in another folder, and compares them if the compiler is the recorded one.
fn compare_rebuilt(root: &Path, record: &Record, complaints: &mut Vec<String>) -> Result<()> {
    let builder = Builder::new(root)?;
    let same_compiler = builder.toolchain.version()? == record.rustc;
    for plugin in PLUGINS {
        let rebuilt = hash(&builder.build(plugin, &root.join("target/plugins-rebuilt"))?)?;
        if same_compiler
            && record.plugins.get(plugin).is_some_and(|expected| expected.component != rebuilt)
        {
            complaints.push(format!("{plugin}: the same compiler builds a different component"));
        }
    }
    Ok(())
}

/// Builder of components, with `shardmill plugin build`.
struct Builder {
    toolchain: WasmToolchain,
    shardmill: PathBuf,
    root: PathBuf,
}

impl Builder {
    fn new(root: &Path) -> Result<Self> {
        let toolchain = WasmToolchain::find(root)?;
        Ok(Self {
            toolchain,
            shardmill: build_shardmill(cargo_for_tests()?, "--workspace", root)?,
            root: root.to_owned(),
        })
    }

    fn build(&self, plugin: &str, folder: &Path) -> Result<PathBuf> {
        let component = folder.join(format!("{plugin}.wasm"));
        let mut command = Command::new(&self.shardmill);
        command.args(["plugin", "build"]).arg(self.root.join("plugins").join(plugin));
        command.arg("-o").arg(&component);
        command.env("CARGO_TARGET_DIR", self.root.join(TARGET_DIR));
        forget_this_package(&mut command);
        run(self.toolchain.apply_to(&mut command))?;
        Ok(component)
    }
}

/// Builds the host with `cargo`, and returns the path of its binary. The host uses the usual compiler, so it is
/// built separately from the plugins. `packages` selects whose features apply: those of the workspace, as in
/// the tests, or those of the host alone, as for users.
pub fn build_shardmill(mut cargo: Command, packages: &str, root: &Path) -> Result<PathBuf> {
    let messages = read(
        cargo
            .args(["build", "--release", packages, "--bin", "shardmill"])
            .args(["--message-format", "json-render-diagnostics"])
            .current_dir(root),
    )?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo did not build a shardmill binary")
}

struct Record {
    /// Version line of the compiler.
    rustc: String,
    plugins: BTreeMap<String, Hashes>,
}

struct Hashes {
    sources: String,
    component: String,
}

impl Record {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("failed to read {}", path.display()))?;
        let mut record = Self { rustc: String::new(), plugins: BTreeMap::new() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [sources, component, plugin] => {
                    let hashes = Hashes { sources: sources.into(), component: component.into() };
                    record.plugins.insert(plugin.into(), hashes);
                }
                _ => record.rustc = line.to_owned(),
            }
        }
        Ok(record)
    }

    fn to_text(&self) -> String {
        let mut text = format!("{RECORD_HEAD}{}\n", self.rustc);
        for (plugin, hashes) in &self.plugins {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{} {} {plugin}", hashes.sources, hashes.component);
        }
        text
    }
}

/// Returns one hash over the paths and contents of all sources of a plugin.
fn sources_hash(root: &Path, plugin: &str) -> Result<String> {
    let mut files = Vec::new();
    let own = format!("plugins/{plugin}");
    for source in SHARED_SOURCES.iter().copied().chain([own.as_str()]) {
        collect_files(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut hasher = Sha256::new();
    for file in files {
        let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
        let contents =
            fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        // The length separates the contents of neighbouring files.
        hasher.update(format!("{name}\n{}\n", contents.len()));
        hasher.update(contents);
    }
    Ok(hex::encode(hasher.finalize()))
}

fn collect_files(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            collect_files(&entry?.path(), files)?;
        }
    } else {
        ensure!(path.is_file(), "missing {}", path.display());
        files.push(path.to_owned());
    }
    Ok(())
}

fn hash(file: &Path) -> Result<String> {
    let bytes = fs::read(file).with_context(|| format!("failed to read {}", file.display()))?;
    Ok(hex::encode(Sha256::digest(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_text() {
        let hashes = Hashes { sources: "ab".into(), component: "cd".into() };
        let record = Record {
            rustc: "rustc 1.96.0 (ac68faa20 2026-05-25)".into(),
            plugins: BTreeMap::from([("car-decode".into(), hashes)]),
        };
        assert!(
            record.to_text().ends_with("\nrustc 1.96.0 (ac68faa20 2026-05-25)\nab cd car-decode\n")
        );
    }

    #[test]
    fn each_plugin_has_sources_of_its_own() {
        let root = project_root();
        let hashes: Vec<_> =
            PLUGINS.iter().map(|plugin| sources_hash(&root, plugin).unwrap()).collect();
        let distinct = hashes.iter().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(distinct.len(), PLUGINS.len());
    }
}
