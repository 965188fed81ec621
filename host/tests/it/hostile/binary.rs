//! The real binary with plugins that must not run, or must not go on running.

use std::process::Output;

use super::wat::Guest;
use crate::support::pipeline::PipelineToml;
use crate::support::world::{Pipeline, World};
use crate::support::{free_port, http_get, wait_for};

/// The lane stops, says why, and does not drain the stream into the dead letters. With a fixed plugin it goes on at
/// the record where it stopped.
#[test]
fn a_plugin_that_rejects_everything_stops_its_lane_until_it_is_fixed() {
    const RECORDS: u64 = 2_000;
    let world = World::new(1);
    world.put(0..RECORDS, 10);
    let port = free_port();
    let broken = Pipeline {
        stage: Some(format!(
            "plugin = \"{}\"\nconfig = {{ reject_on = '', routes = [\"all\"], \
             format = \"application/json\" }}",
            crate::support::plugin("hostile")
        )),
        sink: crate::support::admin(port),
        ..Pipeline::default()
    };
    let run = world.start(&broken);
    let ready = || http_get(port, "/health/ready");
    wait_for("the lane to block", || ready().contains("rejected_in_a_row"));
    let state = ready();
    assert!(state.starts_with("HTTP/1.1 503"), "{state}");
    for expected in ["shardId-000000000000", "stage route (plugin hostile 0.1.0, ", "as configured"]
    {
        assert!(state.contains(expected), "{expected}: {state}");
    }
    assert!(
        http_get(port, "/metrics").contains("shardmill_blocked{shard=\"shardId-000000000000\"} 1")
    );
    assert_eq!(run.terminate(), Some(0));
    let dead_letters = "SELECT count(*) FROM dead_letter";
    let dead_letters =
        || -> u64 { world.state().query_row(dead_letters, (), |row| row.get(0)).expect("sql") };
    assert_eq!(dead_letters(), 0);
    assert_eq!(world.rows(), 0);

    world.catch_up(&Pipeline::default());
    world.assert_each_once_in_order(RECORDS);
    assert_eq!(dead_letters(), 0);
}

/// Makes a component that takes long to compile: one function with very many branches.
pub fn heavy() -> tempfile::NamedTempFile {
    const BRANCHES: usize = 200_000;
    let branch = "(if (i64.eqz (local.get 0))
        (then (local.set 1 (i64.add (local.get 1) (local.get 0))))
        (else (local.set 0 (i64.mul (local.get 0) (local.get 1)))))";
    let items =
        format!("(func (param i64 i64) (result i64) {} (local.get 1))", branch.repeat(BRANCHES));
    Guest { items: &items, ..Guest::default() }.build("plugin")
}

/// Checks a pipeline of one stage, which must be refused; returns the output as one line.
fn refused(plugin: &str, lines: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = PipelineToml::new(folder.path(), "refused")
        .timing("")
        .table("[source]\ntype = \"kinesis\"\nstream = \"test\"")
        .stage("only", plugin, &format!("routes = {{ out = [\"console\"] }}\n{lines}"))
        .plain_sink("console", "type = \"stdout\"")
        .write();
    let checked: Output = crate::support::run(&["check", "--offline", &path]);
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert_eq!(checked.status.code(), Some(2), "{said}");
    assert!(said.contains("pipeline.toml:11:10"), "{said}");
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_component_over_a_limit_of_compilation_is_refused_with_its_place() {
    let heavy = heavy();
    let heavy = heavy.path().display().to_string();
    for (limit, expected) in [
        ("compile_time = \"1 s\"", "longer than its limit of 1 s (limits.compile_time)"),
        ("compile_memory = \"64 MiB\"", "than its limit of 67108864 bytes (limits.compile_memory)"),
        ("component = \"64 KiB\"", "over the limit of 65536 (limits.component)"),
    ] {
        let said = refused(&heavy, &format!("[stage.limits]\n{limit}"));
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn what_is_not_granted_is_refused_with_its_place() {
    let probe = crate::support::plugin("probe");
    let all = ["log", "metrics", "clock", "random"];
    for missing in all {
        let granted = all.iter().filter(|name| **name != missing);
        let granted: Vec<String> = granted.map(|name| format!("{name} = true")).collect();
        let said = refused(&probe, &format!("grant = {{ {} }}", granted.join(", ")));
        let expected = format!("probe.wasm imports {missing}, which stage only does not grant");
        assert!(said.contains(&expected), "{expected}: {said}");
        assert!(said.contains(&format!("add under [stage.grant]: {missing} = true")), "{said}");
    }
}
