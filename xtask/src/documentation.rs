//! Checks the host's documentation: every link leads somewhere.
//!
//! `cargo doc` would check all dependencies before, minutes of work from nothing. Cargo's tests of the
//! documentation use what the other tests are compiled from. So cargo is asked for these tests, with this
//! program in place of rustdoc, which makes rustdoc write the documentation rather than test it.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{host_tests, run};

/// Set to the folder of the documentation where this program stands in for rustdoc.
const OUT_DIR: &str = "XTASK_DOCUMENTATION";

/// Writes the host's documentation into `target/doc`; a warning is an error.
pub fn check(root: &Path) -> Result<()> {
    let itself = std::env::current_exe().context("failed to find this program")?;
    run(host_tests(root)?
        .args(["--doc", "--quiet"])
        .env("RUSTDOC", itself)
        .env(OUT_DIR, root.join("target/doc")))
}

/// The folder to document into, where cargo has started this program as rustdoc.
pub fn is_asked_as_rustdoc() -> Option<OsString> {
    std::env::var_os(OUT_DIR)
}

/// Runs rustdoc with the arguments of a test of documentation, without the test.
pub fn stand_in_for_rustdoc(out_dir: &OsStr) -> Result<()> {
    let mut rustdoc = Command::new("rustdoc");
    rustdoc.args(without_test(std::env::args_os().skip(1))).arg("--out-dir").arg(out_dir);
    // Private items too: they are what the host's documentation is read for.
    rustdoc.args(["--document-private-items", "-Dwarnings", "-Arustdoc::private-intra-doc-links"]);
    run(&mut rustdoc)
}

/// Leaves out the arguments that make rustdoc test, each with its value.
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
