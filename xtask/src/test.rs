//! `cargo xtask test`: checks everything, with real servers that are started and stopped here.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::book;
use crate::data;
use crate::deny;
use crate::documentation;
use crate::fuzz::Fuzzing;
use crate::graph;
use crate::kinesis_local::KinesisLocal;
use crate::languages::Languages;
use crate::plugins;
use crate::postgres::{self, Cluster};
use crate::process::{cargo, host_tests, lint, project_root, run};
use crate::words;

/// Also compiles, and so checks, what no test runs: the benches.
const EVERY_TARGET: [&str; 2] = ["--all-targets", "--no-run"];
/// Variable of the test harness with the number of threads.
const TEST_THREADS: &str = "RUST_TEST_THREADS";

/// Check format, lints, dependencies, documentation, the book and bundled plugins, and run all tests.
#[derive(clap::Args)]
pub struct Test {
    /// Run only tests whose name contains this text; skips the other checks.
    filter: Option<String>,
}

impl Test {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let Some(filter) = self.filter else { return check_all(&root) };
        timed("build of the tests", || run(host_tests(&root)?.arg("--no-run")))?;
        test_host(&root, &Parts::start(&root)?, Some(&filter))
    }
}

fn check_all(root: &Path) -> Result<()> {
    // Runs beside the compiler, because downloads wait for the network, and the end of a build waits for its
    // last crate. Package managers install everything but mdBook. Both do nothing if everything is installed.
    let installed = in_background(root, Parts::install);
    let mdbook = in_background(root, |root| book::mdbook(root).map(drop));
    let dependencies = in_background(root, deny::check);

    timed("format", || check_format(root))?;
    timed("arrows", || graph::check(root))?;
    timed("words", || words::check(root))?;
    // First, because the check of the plugins needs it.
    timed("build and lints of the tests", || run(host_tests(root)?.args(EVERY_TARGET)))?;
    timed("licences, bans and sources", || join(dependencies))?;
    timed("what else is to be installed", || join(installed))?;
    // The plugins are compiled into another folder, and linked one after the other: that leaves a core for
    // their tests.
    let bundled = in_background(root, plugins::check);
    timed("fuzz targets", || Fuzzing::of_test().run(root))?;
    timed("tests and lints of the bundled plugins", || test_plugins(root))?;
    timed("bundled plugins", || join(bundled))?;
    let parts = timed("real parts", || Parts::start(root))?;
    timed("tests of the host", || test_host(root, &parts, None))?;
    drop(parts);
    timed("documentation", || documentation::check(root))?;
    timed("book", || join(mdbook).and_then(|()| book::build(root)))
}

/// Starts a part in the background that starts no servers. If the task fails meanwhile, its programs end by
/// themselves.
fn in_background(root: &Path, part: fn(&Path) -> Result<()>) -> JoinHandle<Result<()>> {
    let root = root.to_owned();
    thread::spawn(move || part(&root))
}

fn join(part: JoinHandle<Result<()>>) -> Result<()> {
    part.join().unwrap_or_else(|_| bail!("a part of the task panicked; see above"))
}

/// Runs a part of the task, and prints how long it took: CI limits the time of the whole.
fn timed<T>(what: &str, part: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let done = part()?;
    eprintln!("{what}: {} s", begun.elapsed().as_secs());
    Ok(done)
}

fn check_format(root: &Path) -> Result<()> {
    for workspace in [root.to_owned(), root.join("plugins")] {
        run(cargo().current_dir(&workspace).args(["fmt", "--all", "--check"]))?;
    }
    Ok(())
}

fn test_plugins(root: &Path) -> Result<()> {
    let mut tests = cargo();
    lint(&mut tests);
    // Nothing is measured here, and each test is short: most of the time is compilation.
    for setting in ["opt-level=0", "codegen-units=16", "lto=false", "panic='unwind'", "strip=false"]
    {
        tests.args(["--config", &format!("profile.release.{setting}")]);
    }
    // Not in the target folder of the root's packages: a package that is both a library and a WebAssembly
    // module has an output file without a hash in its name, so this build would replace what the benches link.
    tests.env("CARGO_TARGET_DIR", root.join("target/tests-of-plugins"));
    run(tests.current_dir(root.join("plugins")).args(["test", "--release", "--locked"]))
}

fn test_host(root: &Path, parts: &Parts, filter: Option<&str>) -> Result<()> {
    let mut tests = host_tests(root)?;
    tests.arg("--no-fail-fast").args(filter);
    if std::env::var_os(TEST_THREADS).is_none() {
        tests.env(TEST_THREADS, test_threads().to_string());
    }
    parts.apply_to(&mut tests)?;
    run(&mut tests)
}

/// Returns the number of concurrent tests. Most wait more than they work; with more tests the cores would be
/// saturated.
fn test_threads() -> usize {
    2 * std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Real services for the host's tests: two PostgreSQL servers, a second Kinesis server, and the compilers of
/// plugin languages. All are stopped when dropped.
pub struct Parts {
    postgres: Cluster,
    /// A server that a test restarts, without effects on other tests.
    restarted_postgres: Cluster,
    kinesis_local: KinesisLocal,
    languages: Languages,
    /// Folder in which all tests keep compiled plugins.
    compiled: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Parts {
    /// Installs what is missing, so that a start finds everything.
    fn install(root: &Path) -> Result<()> {
        data::flights(root)?;
        postgres::install_pooler()?;
        postgres::find_or_install()?;
        KinesisLocal::install(&kinesis_local(root))?;
        Languages::install(root)?;
        Ok(())
    }

    /// Starts all parts.
    pub fn start(root: &Path) -> Result<Self> {
        Self::install(root)?;
        let scratch = tempfile::tempdir().context("failed to make a scratch folder")?;
        Ok(Self {
            postgres: Cluster::start(scratch.path())?,
            restarted_postgres: Cluster::start(scratch.path())?,
            kinesis_local: KinesisLocal::start(&kinesis_local(root))?,
            languages: Languages::install(root)?,
            compiled: scratch.path().join("compiled"),
            _scratch: scratch,
        })
    }

    /// Sets the variables through which the tests of a command find the parts.
    pub fn apply_to(&self, command: &mut Command) -> Result<()> {
        command
            .env("SHARDMILL_TEST_POSTGRES", &self.postgres.url)
            .env("SHARDMILL_TEST_RESTARTED_POSTGRES", &self.restarted_postgres.url)
            .env("SHARDMILL_TEST_POSTGRES_CERTIFICATE", &self.postgres.certificate)
            .env("SHARDMILL_TEST_POSTGRES_PROGRAMS", &self.postgres.programs)
            .env("SHARDMILL_TEST_KINESIS_LOCAL", &self.kinesis_local.url)
            .env("SHARDMILL_COMPILED_DIR", &self.compiled);
        self.languages.apply_to(command)
    }
}

fn kinesis_local(root: &Path) -> PathBuf {
    root.join("target/kinesis-local")
}

/// Start the real services of the tests (PostgreSQL, a Kinesis server, compilers), run a command with them in
/// its environment, and stop them.
#[derive(clap::Args)]
pub struct WithParts {
    /// The command and its arguments, such as `cargo test --release --test it fault_07`.
    #[arg(trailing_var_arg = true, required = true)]
    command: Vec<OsString>,
}

impl WithParts {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let parts = Parts::start(&root)?;
        let (program, arguments) = self.command.split_first().context("missing command")?;
        let mut command = Command::new(program);
        command.args(arguments);
        parts.apply_to(&mut command)?;
        run(&mut command)
    }
}
