//! Checks the host's documentation: every link must have a target.
//!
//! `cargo doc` would first check all dependencies, which takes minutes. Cargo's doc tests use the same builds
//! as the other tests. Therefore this module starts cargo's doc tests with this program in place of rustdoc,
//! which makes rustdoc write the documentation instead of testing it.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{host_tests, run};

/// Variable with the output folder, set when this program replaces rustdoc.
const OUT_DIR: &str = "XTASK_DOCUMENTATION";

/// Writes the host's documentation into `target/doc`. A warning is an error.
pub fn check(root: &Path) -> Result<()> {
    let itself = std::env::current_exe().context("failed to find this program")?;
    run(host_tests(root)?
        .args(["--doc", "--quiet"])
        .env("RUSTDOC", itself)
        .env(OUT_DIR, root.join("target/doc")))
}

/// Returns the output folder if cargo has started this program in place of rustdoc.
pub fn is_asked_as_rustdoc() -> Option<OsString> {
    std::env::var_os(OUT_DIR)
}

/// Runs rustdoc with the arguments of a doc test, but without the test.
pub fn stand_in_for_rustdoc(out_dir: &OsStr) -> Result<()> {
    let mut rustdoc = Command::new("rustdoc");
    rustdoc.args(without_test(std::env::args_os().skip(1))).arg("--out-dir").arg(out_dir);
    // Includes private items, because they are the purpose of this documentation.
    rustdoc.args(["--document-private-items", "-Dwarnings", "-Arustdoc::private-intra-doc-links"]);
    run(&mut rustdoc)
}

/// Removes the arguments that make rustdoc test, each with its value.
fn without_test(mut arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--test" | "--no-run") => {}
            Some("--test-run-directory" | "--test-args" | "--test-runtool") => {
                arguments.next();
            }
            _ => kept.push(argument),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::without_test;

    #[test]
    fn a_test_of_documentation_becomes_documentation() {
        let given =
            ["--crate-name", "a", "--test", "src/lib.rs", "--test-run-directory", "x", "-L", "y"];
        let kept = without_test(given.into_iter().map(Into::into));
        assert_eq!(kept, ["--crate-name", "a", "src/lib.rs", "-L", "y"]);
    }
}
