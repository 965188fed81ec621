//! Files, compilers and connections beside other users of the machine.

mod compiler;
mod files;
mod postgres;
mod tools;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Output;

/// The variable that names the folder of compiled plugins. The tests' own environment has it.
const COMPILED_DIR: &str = "SHARDMILL_COMPILED_DIR";

/// Standard error of a command that ended as it must.
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

/// Everything below a folder, and itself.
fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    let entries = fs::read_dir(folder).expect("a folder");
    for path in entries.map(|entry| entry.expect("an entry").path()) {
        match fs::symlink_metadata(&path).expect("there").is_dir() {
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
