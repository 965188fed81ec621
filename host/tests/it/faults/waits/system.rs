//! Limits of the system: a start names the limit and the required value.

use std::process::{Command, Output, Stdio};

use super::{rows_file, text_of};
use crate::support::pipeline::PipelineToml;
use crate::support::world::{Pipeline, World};

/// Runs the binary under a limit of the shell's `ulimit`.
fn limited(ulimit: &str, arguments: &str) -> Output {
    let mut command = Command::new("bash");
    let script = format!("ulimit {ulimit}; exec {} {arguments}", env!("CARGO_BIN_EXE_shardmill"));
    crate::support::output(command.args(["-c", &script]).stdin(Stdio::null()))
}

fn plain(folder: &std::path::Path) -> String {
    let rows = rows_file(folder, 10);
    PipelineToml::new(folder, "limits")
        .file(&rows, "format = \"application/json\"")
        .route_all_to(&["mart"])
        .sink("mart", "type = \"discard\"")
        .write()
}

#[test]
fn fault_45_a_limit_of_the_address_space_is_named_with_what_is_needed() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = plain(folder.path());
    for command in ["check", "run"] {
        for mebibytes in [1_000, 2_000, 3_000, 4_000] {
            let output =
                limited(&format!("-v {}", mebibytes * 1_024), &format!("{command} {file}"));
            let text = text_of(&output);
            assert_eq!(output.status.code(), Some(1), "{command}, {mebibytes} MiB: {text}");
            assert!(text.contains("address space") && text.contains("ulimit -v"), "{text}");
            assert!(text.contains(&format!("{mebibytes} MiB")), "{text}");
            assert!(!text.contains("stage.config"), "{text}");
        }
    }
    let enough = limited(&format!("-v {}", 16 << 20), &format!("run {file}"));
    assert!(enough.status.success(), "{}", text_of(&enough));
}

/// One sandbox fits into the address space; those of all shards do not.
#[test]
fn fault_45_the_address_space_is_checked_for_all_lanes_before_they_begin() {
    let world = World::new(8);
    let file = world.pipeline(&Pipeline::default());
    let output = limited(&format!("-v {}", 12 << 20), &format!("run {file} --until-caught-up"));
    let text = text_of(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("8 shards") && text.contains("ulimit -v"), "{text}");
}

#[test]
fn fault_45_a_limit_of_open_files_is_named_with_what_is_needed() {
    let world = World::new(16);
    world.put(0..100, 50);
    let file = world.pipeline(&Pipeline::default());
    for (limit, what) in [(24, "a start without a shard"), (80, "16 shards")] {
        let output = limited(&format!("-n {limit}"), &format!("run {file} --until-caught-up"));
        let text = text_of(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(what) && text.contains("ulimit -n"), "{text}");
        assert!(text.contains(&format!("found {limit}")), "{text}");
        assert!(!text.contains("Too many open files"), "{text}");
    }
}

/// A soft limit is only a default: the process raises it as far as the system allows.
#[test]
fn fault_45_a_soft_limit_of_open_files_is_raised() {
    let world = World::new(16);
    world.put(0..100, 50);
    let file = world.pipeline(&Pipeline::default());
    let output = limited("-S -n 24", &format!("run {file} --until-caught-up"));
    assert!(output.status.success(), "{}", text_of(&output));
    world.assert_each_once_in_order(100);
}
