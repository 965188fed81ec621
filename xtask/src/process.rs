//! Where the project is, and how its tools are run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The root of the project.
pub fn project_root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// The S3 server of the tests. In `cargo xtask bench` it is optimised, so that a bench does not measure the server.
const S3_SERVER: [&str; 2] = ["s3s", "s3s-fs"];

/// The cargo that runs this task, for another run of it.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    forget_this_package(&mut command);
    command
}

/// The same for tests: our own crates are checked by Clippy as they are compiled, and a warning is an error.
///
/// `cargo clippy` would check all dependencies before, 10 minutes of work from nothing that no test uses. So
/// its compiler takes the place of rustc for our crates, in the way of `cargo clippy` itself (whose
/// separator of arguments this is). It does not promise optimised code, which is not wanted here: the tests
/// need the host's own crate with and without the tests within it, and it is compiled in a fifth of the time
/// without optimisations. What a release depends on is compiled as for one, and shared with it.
pub fn cargo_for_tests() -> Result<Command> {
    let mut command = cargo();
    let own = own_packages()?;
    for package in own.iter().map(String::as_str).chain(S3_SERVER) {
        command.args(["--config", &format!("profile.release.package.{package}.opt-level=0")]);
    }
    // A number that is too large is an error in tests, not another number.
    for package in own {
        let setting = format!("profile.release.package.{package}.overflow-checks=true");
        command.args(["--config", &setting]);
    }
    lint(&mut command);
    Ok(command)
}

/// The tests of the workspace, with the packages and features that all parts of the task share.
pub fn host_tests(root: &Path) -> Result<Command> {
    let mut tests = cargo_for_tests()?;
    tests.current_dir(root).args(["test", "--release", "--workspace", "--locked"]);
    Ok(tests)
}

/// The packages of the workspace, as cargo describes them.
pub fn packages(root: &Path) -> Result<Vec<serde_json::Value>> {
    let metadata = metadata(root, &["--no-deps"])?;
    metadata["packages"].as_array().cloned().context("`cargo metadata` names no packages")
}

/// The workspace and its dependencies, as cargo describes them.
pub fn metadata(root: &Path, arguments: &[&str]) -> Result<serde_json::Value> {
    let mut metadata = cargo();
    metadata.current_dir(root).args(["metadata", "--format-version", "1"]).args(arguments);
    let output = metadata.output().context("failed to start `cargo metadata`")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("failed to read what `cargo metadata` prints")
}

/// The names of our own packages, without this one: it is compiled before it can say how.
fn own_packages() -> Result<Vec<String>> {
    let packages = packages(&project_root())?;
    let names = packages.iter().filter_map(|package| package["name"].as_str());
    Ok(names.filter(|name| *name != env!("CARGO_PKG_NAME")).map(str::to_owned).collect())
}

/// Makes a cargo command compile the packages of its workspace by Clippy's compiler.
pub fn lint(command: &mut Command) {
    // Not by a variable: cargo hands these on to the tests, some of which compile plugins.
    command
        .args(["--config", "build.rustc-workspace-wrapper='clippy-driver'"])
        .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
}

/// Removes what cargo told us about this package. Build scripts watch some of it, so a
/// cargo below us would compile half of the dependencies again, and so would the next one
/// that is not.
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

/// Runs a command to its end, its output going where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("failed to start `{}`", text(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", text(command));
    }
    Ok(())
}

/// Runs a command and returns what it prints, without the last line end.
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
        .with_context(|| format!("`{}` prints no UTF-8", text(command)))?;
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
