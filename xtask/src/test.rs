//! `cargo xtask test`: everything that must hold, with real parts that are started and ended here.

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

/// Compile, and so check, what no test runs as well: the benches.
const EVERY_TARGET: [&str; 2] = ["--all-targets", "--no-run"];
/// Known to the tests' own harness.
const TEST_THREADS: &str = "RUST_TEST_THREADS";

/// Check format, lints, dependencies, documentation, the book and bundled plugins, and run all tests.
#[derive(clap::Args)]
pub struct Test {
    /// Only tests whose name contains this; skips the other checks.
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
    // Beside the compiler: downloads wait for the network, and the end of a build for its last crate. All
    // but mdBook comes by package managers; both are done when they are there already.
    let installed = in_background(root, Parts::install);
    let mdbook = in_background(root, |root| book::mdbook(root).map(drop));
    let dependencies = in_background(root, deny::check);

    timed("format", || check_format(root))?;
    timed("arrows", || graph::check(root))?;
    // First: what checks the plugins is a part of it.
    timed("build and lints of the tests", || run(host_tests(root)?.args(EVERY_TARGET)))?;
    timed("licences, bans and sources", || join(dependencies))?;
    timed("what else is to be installed", || join(installed))?;
    // They are compiled to another folder, and linked one after the other: that leaves a core for their tests.
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

/// Begins what starts no servers: where the task fails meanwhile, its programs end by themselves.
fn in_background(root: &Path, part: fn(&Path) -> Result<()>) -> JoinHandle<Result<()>> {
    let root = root.to_owned();
    thread::spawn(move || part(&root))
}

fn join(part: JoinHandle<Result<()>>) -> Result<()> {
    part.join().unwrap_or_else(|_| bail!("it panicked, see above"))
}

/// Runs a part of the task, and says how long it took: the whole has a bound in CI.
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
    // Nothing is measured here, and each test runs for a moment: most of the time is the compiler's.
    for setting in ["opt-level=0", "codegen-units=16", "lto=false", "panic='unwind'", "strip=false"]
    {
        tests.args(["--config", &format!("profile.release.{setting}")]);
    }
    // Not where the root's packages are. A package that is a library and a module of WebAssembly has an output without
    // a hash in its name: what is compiled here would take the place of what the benches are linked with.
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

/// How many tests run at a time: most wait more than they work. With more, the cores have nothing left to give.
fn test_threads() -> usize {
    2 * std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// The real parts of the host's tests: two servers of PostgreSQL and a second Kinesis server of their own, and the
/// compilers of plugins' languages. All are ended when dropped.
pub struct Parts {
    postgres: Cluster,
    /// A server that a test restarts, under nobody else's feet.
    restarted_postgres: Cluster,
    kinesis_local: KinesisLocal,
    languages: Languages,
    /// A folder in which all tests keep compiled plugins.
    compiled: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Parts {
    /// Installs what is missing, so that a start finds all of it.
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

    /// Tells the tests of a command where the parts are.
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

/// Start the tests' real parts (PostgreSQL, a Kinesis server, compilers), run a command that finds them
/// in its environment, and end them.
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
        let (program, arguments) = self.command.split_first().context("a command is missing")?;
        let mut command = Command::new(program);
        command.args(arguments);
        parts.apply_to(&mut command)?;
        run(&mut command)
    }
}
