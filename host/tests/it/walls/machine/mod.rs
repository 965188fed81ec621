//! Files, compilers and connections on a machine with other users.

mod compiler;
mod files;
mod postgres;
mod tools;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Output;

/// Variable that names the folder of compiled plugins. It may be set for the tests themselves.
const COMPILED_DIR: &str = "SHARDMILL_COMPILED_DIR";

/// Returns standard error of a command, which must have succeeded or failed as expected.
fn said(output: &Output, succeeds: bool) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), succeeds, "{said}");
    said
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap_or_else(|why| panic!("{}: {why}", path.display())).mode()
        & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("changed");
}

/// Returns a folder and everything below it.
fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    let entries = fs::read_dir(folder).expect("a folder");
    for path in entries.map(|entry| entry.expect("an entry").path()) {
        match fs::symlink_metadata(&path).expect("metadata").is_dir() {
            true => found.extend(tree(&path)),
            false => found.push(path),
        }
    }
    found
}

/// Whether the tests may give files to other users.
fn is_root() -> bool {
    fs::metadata("/proc/self").expect("this process").uid() == 0
}
