//! Files, compilers and connections beside other users of the machine.

mod compiler;

use std::process::Output;

/// The variable that names the folder of compiled plugins. The tests' own environment has it.
const COMPILED_DIR: &str = "SHARDMILL_COMPILED_DIR";

/// Standard error of a command that ended as it must.
fn said(output: &Output, succeeds: bool) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), succeeds, "{said}");
    said
}
