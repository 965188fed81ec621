//! Location of the project, and execution of its tools.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Returns the root folder of the project.
pub fn project_root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// Crates of the tests' S3 server. `cargo xtask bench` optimises them, so that a bench does not measure the
/// server.
const S3_SERVER: [&str; 2] = ["s3s", "s3s-fs"];

/// Returns a command for the cargo that runs this task.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    forget_this_package(&mut command);
    command
}

/// Returns cargo for tests: Clippy checks our own crates as they are compiled, and a warning is an error.
///
/// `cargo clippy` would first check all dependencies, 10 minutes of work that no test uses. Therefore Clippy's
/// compiler replaces rustc for our crates, in the same way as in `cargo clippy` (including its separator of
/// arguments). Clippy's compiler does not guarantee optimised code. That is acceptable: the tests need the
/// host's own crate with and without unit tests, and it compiles five times faster without optimisations. The
/// dependencies are compiled as for a release, and shared with it.
pub fn cargo_for_tests() -> Result<Command> {
    let mut command = cargo();
    let own = own_packages()?;
    for package in own.iter().map(String::as_str).chain(S3_SERVER) {
        command.args(["--config", &format!("profile.release.package.{package}.opt-level=0")]);
    }
    // In tests, integer overflow is an error.
    for package in own {
        let setting = format!("profile.release.package.{package}.overflow-checks=true");
        command.args(["--config", &setting]);
    }
    lint(&mut command);
    Ok(command)
}

/// Returns the test command of the workspace, with the packages and features that all parts of the task share.
pub fn host_tests(root: &Path) -> Result<Command> {
    let mut tests = cargo_for_tests()?;
    tests.current_dir(root).args(["test", "--release", "--workspace", "--locked"]);
    Ok(tests)
}

/// Returns cargo's descriptions of the workspace's packages.
pub fn packages(root: &Path) -> Result<Vec<serde_json::Value>> {
    let metadata = metadata(root, &["--no-deps"])?;
    metadata["packages"]
        .as_array()
        .cloned()
        .context("missing packages in the output of `cargo metadata`")
}

/// Returns cargo's description of the workspace and its dependencies.
pub fn metadata(root: &Path, arguments: &[&str]) -> Result<serde_json::Value> {
    let mut metadata = cargo();
    metadata.current_dir(root).args(["metadata", "--format-version", "1"]).args(arguments);
    let output = metadata.output().context("failed to start `cargo metadata`")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("failed to parse the output of `cargo metadata`")
}

/// Returns the names of our own packages without this one, which is already compiled when it runs.
fn own_packages() -> Result<Vec<String>> {
    let packages = packages(&project_root())?;
    let names = packages.iter().filter_map(|package| package["name"].as_str());
    Ok(names.filter(|name| *name != env!("CARGO_PKG_NAME")).map(str::to_owned).collect())
}

/// Makes a cargo command compile the workspace's packages with Clippy's compiler.
pub fn lint(command: &mut Command) {
    // Not through a variable: cargo would pass it to the tests, and some of them compile plugins.
    command
        .args(["--config", "build.rustc-workspace-wrapper='clippy-driver'"])
        .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
}

/// Removes the variables that cargo has set for this package. Build scripts watch some of them, so a nested
/// cargo would compile half of the dependencies again, and so would the next one that is not nested.
pub fn forget_this_package(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || text.starts_with("CARGO_MANIFEST_")
            || text == "LD_LIBRARY_PATH"
        {
            command.env_remove(&name);
        }
    }
}

/// Runs a command to its end, with our standard output and standard error.
pub fn run(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("failed to start `{}`", text(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", text(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output, without the last line end.
pub fn read(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start `{}`", text(command)))?;
    if !output.status.success() {
        bail!("`{}` ended with {}", text(command), output.status);
    }
    let printed = String::from_utf8(output.stdout)
        .with_context(|| format!("`{}`: expected output in UTF-8", text(command)))?;
    Ok(printed.trim_end().to_owned())
}

/// Whether a program of this name is on `PATH`.
pub fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    })
}

fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
