//! `cargo xtask test`: everything that must hold, with real parts that are started and ended here.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::book;
use crate::data;
use crate::kinesis_local::KinesisLocal;
use crate::languages::Languages;
use crate::plugins;
use crate::postgres::Cluster;
use crate::process::{cargo, project_root, run};

/// Check format, lints, documentation, the book and bundled plugins, and run all tests.
#[derive(clap::Args)]
pub struct Test {
    /// Only tests whose name contains this; skips the other checks.
    filter: Option<String>,
}

impl Test {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        if self.filter.is_none() {
            check_format_and_lints(&root)?;
            plugins::check(&root)?;
            test_plugins(&root)?;
        }
        data::flights(&root)?;
        test_host(&root, self.filter.as_deref())?;
        if self.filter.is_none() {
            check_documentation(&root)?;
            book::build(&root)?;
        }
        Ok(())
    }
}

fn check_format_and_lints(root: &Path) -> Result<()> {
    for workspace in [root.to_owned(), root.join("plugins")] {
        run(cargo().current_dir(&workspace).args(["fmt", "--all", "--check"]))?;
        // The release profile: its dependencies are compiled for the tests anyway.
        run(cargo()
            .current_dir(&workspace)
            .args(["clippy", "--release", "--workspace", "--all-targets", "--locked", "--"])
            .args(["-D", "warnings"]))?;
    }
    Ok(())
}

fn test_plugins(root: &Path) -> Result<()> {
    run(cargo().current_dir(root.join("plugins")).args(["test", "--release", "--locked"]))
}

/// The host's tests, with a PostgreSQL and a second Kinesis server of their own, and the compilers of
/// plugins' languages.
fn test_host(root: &Path, filter: Option<&str>) -> Result<()> {
    let scratch = tempfile::tempdir().context("failed to make a scratch folder")?;
    let postgres = Cluster::start(scratch.path())?;
    let kinesis_local = KinesisLocal::start(&root.join("target/kinesis-local"))?;
    let languages = Languages::install(root)?;
    let mut tests = cargo();
    tests
        .current_dir(root)
        .args(["test", "--release", "--workspace", "--locked", "--no-fail-fast"])
        .args(filter)
        .env("SHARDMILL_TEST_POSTGRES", &postgres.url)
        .env("SHARDMILL_TEST_POSTGRES_CERTIFICATE", &postgres.certificate)
        .env("SHARDMILL_TEST_POSTGRES_PROGRAMS", &postgres.programs)
        .env("SHARDMILL_TEST_KINESIS_LOCAL", &kinesis_local.url);
    languages.apply_to(&mut tests)?;
    run(&mut tests)
}

/// Private items too: they are what the host's documentation is read for.
fn check_documentation(root: &Path) -> Result<()> {
    run(cargo()
        .current_dir(root)
        .args(["doc", "--release", "--no-deps", "--document-private-items", "--locked"])
        .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"))
}
