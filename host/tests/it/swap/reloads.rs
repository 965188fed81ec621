//! Files that change while the pipeline runs.

use std::process::Command;

use super::fixture::{Fixture, stamp};
use crate::support::{run, wait_for};

fn reload(fixture: &Fixture) -> (bool, String) {
    let output = fixture.command(&["reload"]);
    let text = [&output.stdout[..], &output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn sinks_and_stages_come_and_go() {
    let mut fixture = Fixture::new(2);
    fixture.start();
    fixture.world.put(0..500, 20);
    fixture.wait_rows(500);
    let folder = fixture.world.folder.path().display().to_string();
    let extra = format!(
        "[[sink]]\nname = \"copy\"\ntype = \"sqlite\"\npath = \"{folder}/copy.db\"\ntable = \"rows\"\n\
         create = true\n[sink.commit]\nlinger = \"50 ms\"\n"
    );
    let plain = std::fs::read_to_string(fixture.write_pipeline()).expect("the file");
    let with_copy = plain.replace("[\"mart\"]", "[\"mart\", \"copy\"]") + &extra;
    let path = fixture.world.folder.path().join("pipeline.toml");

    std::fs::write(&path, &with_copy).expect("written");
    let diff = run(&["check", &path.display().to_string(), "--diff"]);
    let diff = String::from_utf8_lossy(&diff.stdout).into_owned();
    assert!(diff.contains("+ sink copy") && diff.contains("~ stage stamp: routes"), "{diff}");
    assert!(diff.contains("acquired again"), "{diff}");
    assert!(
        Command::new("kill").args(["-HUP", &fixture.process_id().to_string()]).status().is_ok()
    );
    wait_for("the reload", || fixture.world.logged("reloaded, revision"));
    fixture.world.put(500..1_000, 20);
    fixture.wait_rows(1_000);

    // Adds a stage in front, and changes a plugin's configuration, in place.
    let router = crate::support::plugin("route-json");
    let first = format!(
        "[[stage]]\nname = \"first\"\nplugin = \"{router}\"\nconfig = {{ default = \"all\", rules = [] }}\n"
    );
    let with_stage = with_copy.replacen("[[stage]]", &format!("{first}[[stage]]"), 1);
    std::fs::write(&path, &with_stage).expect("written");
    let (done, printed) = reload(&fixture);
    assert!(done && printed.contains("+ stage first"), "{printed}");
    fixture.world.put(1_000..1_500, 20);
    fixture.wait_rows(1_500);

    std::fs::write(&path, &plain).expect("written");
    let (done, printed) = reload(&fixture);
    assert!(
        done && printed.contains("- sink copy") && printed.contains("- stage first"),
        "{printed}"
    );
    fixture.world.put(1_500..2_000, 20);
    fixture.wait_rows(2_000);
    fixture.stop();

    fixture.assert_each_once_as_the_ledger_says(0..2_000);
    let copy = crate::support::sqlite(&fixture.world.folder.path().join("copy.db"));
    let counts = copy.query_row(
        "SELECT count(*), count(DISTINCT id), min(id), max(id) FROM rows",
        (),
        |row| {
            Ok((
                row.get::<_, u64>(0)?,
                row.get::<_, u64>(1)?,
                row.get::<_, u64>(2)?,
                row.get::<_, u64>(3)?,
            ))
        },
    );
    assert_eq!(counts.expect("counts"), (1_000, 1_000, 500, 1_499));
}

#[test]
fn what_cannot_change_in_place_is_refused_with_the_reason() {
    let mut fixture = Fixture::new(1);
    fixture.start();
    let path = fixture.write_pipeline();
    let plain = std::fs::read_to_string(&path).expect("the file");
    for (from, to, why) in [
        ("name = \"swap", "name = \"other", "is not running"),
        ("poll_interval = \"200 ms\"", "poll_interval = \"300 ms\"", "lanes are reading from it"),
        ("[timing]", "[timing]\nretry_pause = \"2 s\"", "[timing] cannot change"),
        ("table = ", "tabel = ", "tabel"),
        ("stage.wasm", "nowhere.wasm", "nowhere.wasm"),
    ] {
        std::fs::write(&path, plain.replace(from, to)).expect("written");
        let (done, printed) = reload(&fixture);
        assert!(!done && printed.contains(why), "{printed}");
    }
    std::fs::write(&path, &plain).expect("written");
    let (done, printed) = reload(&fixture);
    assert!(done && printed.contains("\"number\":null"), "{printed}");
    fixture.world.put(0..100, 20);
    fixture.wait_rows(100);
    fixture.stop();
}

#[test]
fn watched_files_are_loaded_when_they_are_whole() {
    let mut fixture = Fixture::new(2);
    fixture.more = "[reload]\nwatch = true".into();
    fixture.start();
    fixture.world.put(0..500, 20);
    fixture.wait_rows(500);
    let (v1, v2) = (fixture.version("v1 none"), fixture.version("v2 none"));
    // A file that is written in two halves with a pause between them: the first half alone is never loaded.
    let bytes = std::fs::read(&v2).expect("a component");
    let (half, rest) = bytes.split_at(bytes.len() / 2);
    std::fs::write(fixture.stage_file(), half).expect("written");
    wait_for("the half to be refused", || fixture.world.logged("refused at step"));
    fixture.world.put(500..600, 20);
    fixture.wait_rows(600);
    std::fs::write(fixture.stage_file(), [half, rest].concat()).expect("written");
    wait_for("the whole to be loaded", || fixture.world.logged("the files have changed: reloaded"));
    fixture.world.put(600..1_000, 20);
    fixture.wait_rows(1_000);
    // A file that is replaced by a rename; and one whose plugin traps, which the trial refuses.
    let draft = fixture.file("draft", &stamp("v3 trap 1"));
    std::fs::rename(draft, fixture.stage_file()).expect("renamed");
    wait_for("the third to be refused", || fixture.world.logged("refused at step trial"));
    fixture.world.put(1_000..1_200, 20);
    fixture.wait_rows(1_200);
    fixture.stop();
    std::fs::copy(v1, fixture.stage_file()).expect("written");
    fixture.assert_each_once_as_the_ledger_says(0..1_200);
    let rows = fixture.rows();
    assert!(rows.iter().filter(|row| row.id >= 600).all(|row| row.version == "v2"));
    assert!(rows.iter().filter(|row| row.id < 600).all(|row| row.version == "v1"));
}

/// Renaming a sink changes no stage: the swap before it is still the last change, and a rollback undoes it.
#[test]
fn fault_13_a_rollback_after_a_rename_undoes_the_swap_before_it() {
    let mut fixture = Fixture::new(1);
    fixture.start();
    fixture.world.put(0..100, 20);
    fixture.wait_rows(100);
    fixture.swap(&fixture.version("v2 none"), &[]);
    let path = fixture.world.folder.path().join("pipeline.toml");
    let plain = std::fs::read_to_string(&path).expect("the file");
    let renamed = plain
        .replace("[\"mart\"]", "[\"shop\"]")
        .replace("name = \"mart\"", "name = \"shop\"\nrenamed_from = \"mart\"");
    std::fs::write(&path, renamed).expect("written");
    let (done, printed) = reload(&fixture);
    assert!(done && printed.contains("~ sink mart: renamed to shop"), "{printed}");
    assert!(!printed.contains("stage stamp") && !printed.contains("- sink"), "{printed}");
    fixture.world.put(100..200, 20);
    fixture.wait_rows(200);
    let back = fixture.command(&["plugin", "rollback", "stamp"]);
    assert!(back.status.success(), "{}", String::from_utf8_lossy(&back.stderr));
    fixture.world.put(200..300, 20);
    fixture.wait_rows(300);
    let nothing = fixture.command(&["plugin", "rollback", "stamp"]);
    let error = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert!(error.contains("stage stamp has no swap in force"), "{error}");
    fixture.stop();
    let rows = fixture.rows();
    for (ids, version) in [(100..200, "v2"), (200..300, "v1")] {
        assert!(rows.iter().filter(|row| ids.contains(&row.id)).all(|row| row.version == version));
    }
}

/// The earlier revision sends rows to a sink that was removed, or none to a sink that was added: rows would be lost.
#[test]
fn fault_13_a_rollback_past_a_change_of_sinks_is_refused() {
    let mut fixture = Fixture::new(1);
    fixture.start();
    fixture.world.put(0..100, 20);
    fixture.wait_rows(100);
    let folder = fixture.world.folder.path().display().to_string();
    let path = fixture.world.folder.path().join("pipeline.toml");
    let plain = std::fs::read_to_string(&path).expect("the file");
    let copy = format!(
        "[[sink]]\nname = \"copy\"\ntype = \"sqlite\"\npath = \"{folder}/copy.db\"\ntable = \"rows\"\n\
         create = true\n[sink.commit]\nlinger = \"50 ms\"\n"
    );
    let rolled_back = |cause: &str| {
        let output = fixture.command(&["plugin", "rollback", "stamp"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(cause) && said.contains("shardmill reload"), "{said}");
    };
    // Adds a sink, which the earlier revision gives no rows.
    std::fs::write(&path, plain.replace("[\"mart\"]", "[\"mart\", \"copy\"]") + &copy)
        .expect("written");
    let (done, printed) = reload(&fixture);
    assert!(done, "{printed}");
    rolled_back("sends no rows to sink copy");
    // Replaces the sink: the previous one is gone.
    let (before, mart) = plain.split_once("[[sink]]").expect("the sink");
    assert!(mart.contains("mart"));
    std::fs::write(&path, before.replace("[\"mart\"]", "[\"copy\"]") + &copy).expect("written");
    let (done, printed) = reload(&fixture);
    assert!(done, "{printed}");
    rolled_back("sends rows to sink mart");
    fixture.world.put(100..200, 20);
    let copied = || {
        let copy = crate::support::sqlite(&fixture.world.folder.path().join("copy.db"));
        let count =
            copy.query_row("SELECT count(*) FROM rows WHERE id >= 100", (), |row| row.get(0));
        count.unwrap_or(0_u64)
    };
    wait_for("the rows", || copied() == 100);
    fixture.stop();
}
