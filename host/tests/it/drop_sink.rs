//! `run --drop-sink NAME`: gives up a sink that was removed from the configuration while it lagged.

use std::process::{Output, Stdio};

use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World};
use crate::support::{Process, run, run_ok, shardmill, wait_for};

/// Writes a pipeline of the world's stream into one table per sink. Sink `b` commits only after an hour.
fn pipeline(world: &World, sinks: &[&str]) -> String {
    let file = PipelineToml::new(world.folder.path(), "reading")
        .stream(STREAM, "embedded", "poll_interval = \"20 ms\"")
        .route_all_to(sinks);
    let file = sinks.iter().fold(file, |file, name| match *name {
        "b" => {
            let path = world.folder.path().join("mart.db");
            file.table(&format!(
                "[[sink]]\nname = \"b\"\ntype = \"sqlite\"\npath = \"{}\"\ntable = \"b\"\n\
                 [sink.commit]\nlinger = \"1 h\"",
                path.display()
            ))
        }
        name => file.sqlite(name, name),
    });
    file.write()
}

/// Returns the ids in a sink's table, sorted.
fn ids(world: &World, table: &str) -> Vec<u64> {
    let mart = world.mart();
    let mut query = mart.prepare(&format!("SELECT id FROM {table} ORDER BY id")).expect("sql");
    let ids = query.query_map((), |row| row.get(0)).expect("rows");
    ids.map(|id| id.expect("an id")).collect()
}

fn range(range: std::ops::Range<u64>) -> Vec<u64> {
    range.collect()
}

/// Asserts that a run is refused with all of these texts.
fn assert_refused(arguments: &[&str], parts: &[&str]) {
    let Output { status, stderr, .. } = run(arguments);
    let said = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(1), "{arguments:?}: {said}");
    for part in parts {
        assert!(said.contains(part), "{arguments:?}: {part:?} is missing in {said}");
    }
}

/// Returns what the state says of sinks and shards: a refused start changes none of it.
fn noted(world: &World) -> Vec<String> {
    let state = world.state();
    let tables = [
        "SELECT sink || stream || shard || sequence || sub_sequence FROM sink_position",
        "SELECT shard || coalesce(sequence, '') FROM shard",
        "SELECT sink || coalesce(removed_ms, '') FROM sink_known",
        "SELECT sink || shard FROM sink_removed",
    ];
    let mut noted = Vec::new();
    for table in tables {
        let mut query = state.prepare(table).expect("sql");
        let rows = query.query_map((), |row| row.get::<_, String>(0)).expect("rows");
        noted.extend(rows.map(|row| row.expect("a row")));
    }
    noted
}

#[test]
fn a_lagging_sink_that_is_gone_is_dropped_by_its_name_alone() {
    let world = World::new(2);
    for table in ["a", "b", "c"] {
        let create = format!(
            "CREATE TABLE {table} (id INTEGER NOT NULL, key TEXT NOT NULL, n INTEGER NOT NULL)"
        );
        world.mart().execute(&create, ()).expect("created");
    }
    world.put(0..40, 10);
    let all = pipeline(&world, &["a", "b", "c"]);
    let mut command = shardmill(&["run", &all]);
    let running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let running = Process(running.expect("the binary starts"));
    wait_for("rows of a and c", || ["a", "c"].iter().all(|name| ids(&world, name).len() == 40));
    let positions = "SELECT count(*) FROM sink_position WHERE sink IN ('a', 'c')";
    wait_for("their positions in the state", || {
        world.state().query_row(positions, (), |row| row.get::<_, u64>(0)) == Ok(4)
    });
    drop(running);
    assert!(ids(&world, "b").is_empty(), "it commits after an hour");

    // Without `--drop-sink b`, or with a name that gives up nothing, the start is refused and changes nothing.
    let file = pipeline(&world, &["a", "c"]);
    let before = noted(&world);
    let start = ["run", &file, "--until-caught-up"];
    assert_refused(&start, &["sink b is missing", "lags the other sinks", "`--drop-sink b`"]);
    for (name, parts) in [
        ("bb", &["--drop-sink bb", "unknown sink", "gone from the configuration: `b`"][..]),
        ("B", &["--drop-sink B", "unknown sink", "gone from the configuration: `b`"]),
        ("a", &["--drop-sink a", "still configured", "pipeline.toml"]),
        ("", &["unknown sink", "gone from the configuration: `b`"]),
    ] {
        let dropping = [&start[..], &["--drop-sink", name]].concat();
        assert_refused(&dropping, parts);
        let both = [&start[..], &["--drop-sink", "b", "--drop-sink", name]].concat();
        assert_refused(&both, parts);
    }
    assert_eq!(noted(&world), before);

    // The other sinks go on from their positions.
    world.put(40..60, 10);
    let dropping = [&start[..], &["--drop-sink", "b"]].concat();
    let said = run_ok(&dropping);
    assert!(!said.contains("no effect"), "{said}");
    for name in ["a", "c"] {
        assert_eq!(ids(&world, name), range(0..60), "{name}");
    }
    assert!(ids(&world, "b").is_empty(), "a dropped sink gets no rows");

    // A service may always pass the option: the run says that it has no effect, and starts.
    world.put(60..80, 10);
    let said = run_ok(&dropping);
    assert!(said.contains("sink b was dropped before") && said.contains("no effect"), "{said}");
    world.put(80..100, 10);
    let said = run_ok(&start);
    assert!(!said.contains("dropped"), "{said}");
    for name in ["a", "c"] {
        assert_eq!(ids(&world, name), range(0..100), "{name}");
    }
    assert_refused(
        &[&start[..], &["--drop-sink", "bb"]].concat(),
        &["unknown sink", "gone from the configuration: none"],
    );

    // A sink that comes back is configured again. It lacks the records that it was not given.
    let all = pipeline(&world, &["a", "b", "c"]);
    let again = ["run", &all, "--until-caught-up"];
    assert_refused(&[&again[..], &["--drop-sink", "b"]].concat(), &["still configured"]);
    world.put(100..110, 10);
    let said = run_ok(&again);
    assert_eq!(said.matches("sink b lacks the records of shard").count(), 2, "{said}");
    for (name, expected) in [("a", 0..110), ("b", 100..110), ("c", 0..110)] {
        assert_eq!(ids(&world, name), range(expected), "{name}");
    }
}

#[test]
fn a_pipeline_that_never_ran_has_no_sink_to_drop() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("rows.ndjson"), "{\"id\":1}\n").expect("written");
    let file = PipelineToml::new(folder.path(), "fresh")
        .file(&folder.path().join("rows.ndjson"), "format = \"application/json\"")
        .route_all_to(&["void"])
        .sink("void", "type = \"discard\"")
        .write();
    assert_refused(
        &["run", &file, "--drop-sink", "mart"],
        &["--drop-sink mart", "unknown sink", "gone from the configuration: none"],
    );
    assert_refused(&["run", &file, "--drop-sink", "void"], &["void is still configured"]);
    run_ok(&["run", &file]);
}

/// Sinks that copy dead letters have names and positions of their own.
#[test]
fn a_sink_of_dead_letters_is_dropped_by_the_same_option() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("rows.ndjson"), "no JSON\n{\"id\":1}\n").expect("written");
    let pipeline = |dead_letters: &[&str]| {
        let file = PipelineToml::new(folder.path(), "letters")
            .file(&folder.path().join("rows.ndjson"), "format = \"application/json\"")
            .route_all_to(&["void"])
            .sink("void", "type = \"discard\"")
            .table(&format!("[dead_letters]\nsinks = {dead_letters:?}"));
        dead_letters.iter().fold(file, |file, name| file.sink(name, "type = \"discard\"")).write()
    };
    run_ok(&["run", &pipeline(&["x", "y"])]);
    let file = pipeline(&["x"]);
    assert_refused(&["run", &file, "--drop-sink", "z"], &["unknown sink", "`y`"]);
    assert_refused(&["run", &file, "--drop-sink", "x"], &["x is still configured"]);
    run_ok(&["run", &file, "--drop-sink", "y"]);
    let said = run_ok(&["run", &file, "--drop-sink", "y"]);
    assert!(said.contains("sink y was dropped before"), "{said}");
}
