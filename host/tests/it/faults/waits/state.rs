//! State: many lanes write together, and what nothing needs any more is removed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::rows_file;
use crate::support::pipeline::PipelineToml;
use crate::support::world::{Pipeline, World};
use crate::support::{output, plugin, run_ok, shardmill, sqlite, wait_for};

/// Variable that names a folder of compiled plugins for all pipelines.
const COMPILED_DIR: &str = "SHARDMILL_COMPILED_DIR";

/// Checkpoints of many shards that wait to be written at the same time share a few commits.
#[test]
fn fault_39_checkpoints_of_many_lanes_are_written_together() {
    const SHARDS: usize = 48;
    const RECORDS: u64 = 5_000;
    /// Pause between two checkpoints of a lane.
    const CHECKPOINT: Duration = Duration::from_millis(500);
    let world = World::new(SHARDS as u32);
    // The file already has `[timing]`, so the test edits its text.
    let file = world.pipeline(&Pipeline::default());
    let text = std::fs::read_to_string(&file).expect("the file");
    std::fs::write(&file, text.replace("checkpoint = \"50 ms\"", "checkpoint = \"500 ms\""))
        .expect("written");
    let log = std::fs::File::create(world.log()).expect("a log");
    let mut command = crate::support::shardmill(&["run", &file, "-v"]);
    let run = command.stdout(std::process::Stdio::null()).stderr(log).spawn().expect("started");
    let run = crate::support::Process(run);
    wait_for("all lanes", || {
        std::fs::read_to_string(world.log()).unwrap_or_default().matches(" reading").count()
            >= SHARDS
    });
    let state = world.state();
    state.busy_timeout(Duration::from_secs(10)).expect("set");
    let checkpoints = || -> Vec<Option<String>> {
        let mut query = state.prepare("SELECT sequence FROM shard ORDER BY shard").expect("SQL");
        let rows = query.query_map([], |row| row.get(0)).expect("rows");
        rows.map(|sequence| sequence.expect("a sequence")).collect()
    };
    let version = || -> i64 {
        // SQLite increases it by one with each commit of another connection.
        state.query_row("PRAGMA data_version", (), |row| row.get(0)).expect("a version")
    };
    let waiting = |before: &[Option<String>]| {
        checkpoints().iter().zip(before).filter(|(now, before)| now == before).count()
    };
    // In the first round each lane also records that it has caught up.
    world.put(0..RECORDS, RECORDS);
    world.wait_rows(RECORDS);
    let first = vec![None; SHARDS];
    wait_for("the first checkpoints", || waiting(&first) == 0);
    // The lock lets nobody write until every lane has requested its checkpoint, however busy the machine is.
    state.execute_batch("BEGIN IMMEDIATE").expect("locked");
    let before = checkpoints();
    world.put(RECORDS..2 * RECORDS, RECORDS);
    world.wait_rows(2 * RECORDS);
    std::thread::sleep(CHECKPOINT * 4);
    let late = waiting(&before);
    state.execute_batch("COMMIT").expect("unlocked");
    let (mut last, mut commits) = (version(), 0);
    let begun = Instant::now();
    while waiting(&before) > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", checkpoints());
        let now = version();
        commits += usize::from(now != last);
        last = now;
    }
    assert_eq!(late, SHARDS, "waiting checkpoints");
    // Without sharing, each lane would make a commit of its own.
    assert!(commits < late / 2, "{commits} commits for {late} checkpoints");
    assert_eq!(run.terminate(), Some(0));
}

#[test]
fn fault_39_compiled_plugins_that_nothing_needs_are_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = rows_file(folder.path(), 10);
    let pipeline = |name: &str, stage: &str| {
        PipelineToml::new(folder.path(), name)
            .file(&rows, "format = \"application/json\"")
            .stage(
                "first",
                &plugin(stage),
                "config = { default = \"all\", rules = [] }\nroutes = { all = [\"mart\"] }",
            )
            .sink("mart", "type = \"discard\"")
    };
    // The environment of the tests may already name a folder for all pipelines.
    let run = |pipeline: &str| {
        let mut command = shardmill(&["run", pipeline]);
        let output = output(command.env_remove(COMPILED_DIR).env_remove("XDG_CACHE_HOME"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&pipeline("one", "route-json").write());
    let compiled = folder.path().join("state/compiled");
    let files = || {
        let files = std::fs::read_dir(&compiled).expect("a folder");
        let mut names: Vec<String> = files
            .map(|file| file.expect("a file").file_name().into_string().expect("text"))
            .collect();
        // This file is the key that seals the others.
        names.retain(|name| name != "seal.key");
        names.sort();
        names
    };
    let needed = files();
    assert_eq!(needed.len(), 1);
    let old = SystemTime::now() - Duration::from_secs(24 * 3_600);
    let file = |name: &str| {
        let file = std::fs::File::create(compiled.join(name)).expect("a file");
        file.set_modified(old).expect("set");
    };
    file(&format!("{}-0123456789abcdef.cwasm", "ab".repeat(32)));
    file("notes.txt");
    let own = std::fs::File::options().write(true).open(compiled.join(&needed[0])).expect("a file");
    own.set_modified(old).expect("set");
    // Another pipeline with its state in the same folder does not need any of these files.
    run(&pipeline("two", "route-json").write());
    wait_for("the file to be removed", || !files().iter().any(|name| name.starts_with("abab")));
    assert!(files().contains(&needed[0]) && files().contains(&"notes.txt".to_owned()));
}

#[test]
fn compiled_plugins_in_a_shared_folder_are_made_once_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let shared = folder.path().join("shared");
    let run = |name: &str| {
        let own = folder.path().join(name);
        std::fs::create_dir(&own).expect("a folder");
        let rows = rows_file(&own, 10);
        let pipeline = PipelineToml::new(&own, name)
            .file(&rows, "format = \"application/json\"")
            .route_all_to(&["mart"])
            .sink("mart", "type = \"discard\"")
            .write();
        let mut command = shardmill(&["run", &pipeline]);
        let output = output(command.env(COMPILED_DIR, &shared));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!own.join("state/compiled").exists());
    };
    let modified =
        |path: &Path| std::fs::metadata(path).expect("a file").modified().expect("a time");
    run("one");
    let entries = std::fs::read_dir(&shared).expect("a folder");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.retain(|file| !file.ends_with("seal.key"));
    let [file] = &files[..] else { panic!("one component: {files:?}") };
    let strange = shared.join(format!("{}-0123456789abcdef.cwasm", "ab".repeat(32)));
    let old = SystemTime::now() - Duration::from_secs(24 * 3_600);
    for path in [file, &strange] {
        let file = std::fs::File::options().append(true).create(true).open(path).expect("a file");
        file.set_modified(old).expect("set");
    }
    run("two");
    assert_eq!((modified(file), modified(&strange)), (old, old), "a file has changed");
}

/// Regression: the ledger rows of a finished redrive named its components forever, so they were never removed.
#[test]
fn fault_39_what_a_finished_redrive_kept_is_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = folder.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\nno JSON\n").expect("written");
    let pipeline = |config: &str| {
        PipelineToml::new(folder.path(), "redriven")
            .file(&rows, "")
            .stage(
                "route",
                &plugin("hostile"),
                &format!("config = {config}\nroutes = {{ out = [\"mart\"] }}"),
            )
            .sink("mart", "type = \"discard\"")
            .write()
    };
    let file = pipeline("{ trap_on = \"no JSON\" }");
    run_ok(&["run", &file]);
    let file = pipeline("{}");
    run_ok(&["dlq", "redrive", "--all", "--pipeline", &file]);
    run_ok(&["run", &file]);
    let state = sqlite(&folder.path().join("state/redriven/state.db"));
    let count = "SELECT count(*) FROM ledger WHERE stream GLOB 'letters:*'";
    let count: u64 = state.query_row(count, (), |row| row.get(0)).expect("a count");
    assert_eq!(count, 0);
}
