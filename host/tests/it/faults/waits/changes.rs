//! Changes of a pipeline whose lanes wait: commands answer in time, and none waits for a lock.

use std::time::{Duration, Instant};

use super::{Run, answers_within, rows_file, text_of};
use crate::faults::dead_letters::Locked;
use crate::support::pipeline::PipelineToml;
use crate::support::{postgres, sqlite, wait_for};
use crate::swap::fixture::Fixture;

/// A command answers within 10 s, whatever the lanes wait for. The rest is slack for a busy machine.
const ANSWER_MAX: Duration = Duration::from_secs(12);

/// The sink's table refuses every row, until a reload names another database.
#[test]
fn fault_01_reloads_of_a_blocked_lane_answer_and_cure_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = rows_file(folder.path(), 20_000);
    let schema = "CREATE TABLE rows (id INTEGER NOT NULL, text TEXT NOT NULL)";
    for name in ["mart.db", "cured.db"] {
        sqlite(&folder.path().join(name)).execute_batch(schema).expect("a table");
    }
    let file = |mart: &str, buffer: &str| {
        let path = folder.path().join(mart);
        let lines = format!("type = \"sqlite\"\npath = \"{}\"\ntable = \"rows\"", path.display());
        PipelineToml::new(folder.path(), "waits")
            .pipeline(&format!("buffer = \"{buffer}\""))
            .timing("drain = \"14 s\"\nretry_pause = \"50 ms\"\nshard_sync = \"200 ms\"\ncheckpoint = \"50 ms\"")
            .file(&rows, "format = \"application/json\"")
            .route_all_to(&["mart"])
            .sink("mart", &lines)
            .write()
    };
    let path = file("mart.db", "1 MiB");
    let trigger = "CREATE TRIGGER refuse BEFORE INSERT ON rows WHEN NEW.id >= 0
        BEGIN SELECT abs(-9223372036854775807 - 1); END";
    sqlite(&folder.path().join("mart.db")).execute_batch(trigger).expect("a trigger");
    let mut run = Run::start(&path);
    run.wait_logged("blocked");

    // The first reload does not help. The second one does, and does not wait for the first.
    file("mart.db", "2 MiB");
    let begun = Instant::now();
    let first = answers_within(&["reload", &path, "--json"], ANSWER_MAX);
    file("cured.db", "2 MiB");
    let second = answers_within(&["reload", &path, "--json"], ANSWER_MAX);
    // By the time of the second answer, the lane may have been restarted and work again.
    for (answer, says) in [(&first, "integer overflow"), (&second, "\"shard\":")] {
        let text = text_of(answer);
        assert!(answer.status.success(), "{text}\n{}", run.text());
        assert!(text.contains("sink mart") && text.contains(says), "{says} in {text}");
    }
    // No answer says that the reload is in force: the lane ends only when its drain is over.
    let first = text_of(&first);
    assert!(first.contains("\"may_be_undone\":true"), "{first}");
    // Less than two drains: the lanes of the first reload have not even started when the second reload comes.
    let cured = sqlite(&folder.path().join("cured.db"));
    let count = || -> u64 {
        cured.query_row("SELECT count(*) FROM rows", (), |row| row.get(0)).expect("a count")
    };
    wait_for(&format!("the rows: {}", run.text()), || count() == 20_000 || !is_running(&mut run));
    assert_eq!(count(), 20_000, "{}", run.text());
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
}

fn is_running(run: &mut Run) -> bool {
    run.process.0.try_wait().expect("a state").is_none()
}

/// A lane that delivers starts the new instances meanwhile, and changes over once the table is unlocked.
#[test]
fn fault_01_a_swap_does_not_break_off_a_delivery_and_names_the_lane_that_waits() {
    let mut fixture = Fixture::new(1);
    fixture.timing = "retry_pause = \"50 ms\"".into();
    let path = fixture.write_pipeline();
    let text = std::fs::read_to_string(&path).expect("the file");
    fixture.start();
    fixture.world.put(0..500, 10);
    fixture.wait_rows(500);
    drop(text);
    // The table refuses rows of the key with a SQLSTATE that blames the sink.
    postgres(&format!(
        "CREATE FUNCTION {0}_refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '53100'; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON {0} FOR EACH ROW EXECUTE FUNCTION {0}_refuse()",
        fixture.table
    ));
    fixture.world.put(500..60_000, 10);
    wait_for("the sink to be blocked", || fixture.log().contains("not now"));
    let version = fixture.version("v2 none");
    let file = fixture.pipeline_file();
    let swap = ["plugin", "swap", "stamp", &version, "--pipeline", &file, "--json"];
    let answer = answers_within(&swap, ANSWER_MAX);
    assert!(answer.status.success(), "{}", text_of(&answer));
    postgres(&format!("DROP TRIGGER refuse ON {}", fixture.table));
    fixture.wait_rows(60_000);
    fixture.world.put(60_000..60_100, 10);
    fixture.wait_rows(60_100);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..60_100);
    assert!(fixture.rows().iter().any(|row| row.version == "v2"));
}

/// Makes a pipeline into `mart`, of PostgreSQL, and into `copy`, of SQLite, which commits after `linger`.
fn into_two(linger: &str) -> Fixture {
    let mut fixture = Fixture::new(1);
    let folder = fixture.world.folder.path().display().to_string();
    fixture.routes = "[\"mart\", \"copy\"]".into();
    fixture.more = format!(
        "[[sink]]\nname = \"copy\"\ntype = \"sqlite\"\npath = \"{folder}/copy.db\"\ntable = \"rows\"\n\
         create = true\n[sink.commit]\nlinger = \"{linger}\"\n"
    );
    fixture
}

fn copied(fixture: &Fixture) -> u64 {
    let copy = sqlite(&fixture.world.folder.path().join("copy.db"));
    copy.query_row("SELECT count(*) FROM rows", (), |row| row.get(0)).unwrap_or_default()
}

/// Rewrites the pipeline's file with only one of the two sinks.
fn only(fixture: &Fixture, stays: &str) {
    let plain = std::fs::read_to_string(fixture.pipeline_file()).expect("the file");
    let parts: Vec<&str> = plain.split("[[sink]]").collect();
    let [head, mart, copy] = parts[..] else { panic!("{plain}") };
    let sink = if stays == "mart" { mart } else { copy };
    let head = head.replace("[\"mart\", \"copy\"]", &format!("[\"{stays}\"]"));
    std::fs::write(fixture.pipeline_file(), format!("{head}[[sink]]{sink}")).expect("written");
}

/// The sink hangs in a commit that waits for a locked table, so it is not shown as blocked for long. Regression: the
/// reload reported success, and was undone when the lanes were restarted.
#[test]
fn fault_13_a_reload_that_takes_away_a_sink_which_lags_is_refused_at_once() {
    let mut fixture = into_two("50 ms");
    fixture.start();
    fixture.world.put(0..100, 10);
    fixture.wait_rows(100);
    let lock = Locked::table(&fixture.table);
    fixture.world.put(100..200, 10);
    wait_for("the other sink to have all rows", || copied(&fixture) == 200);
    only(&fixture, "copy");
    let file = fixture.pipeline_file();
    for command in
        [&["reload", &file, "--dry-run"][..], &["check", &file, "--diff"], &["reload", &file]]
    {
        let answer = answers_within(command, ANSWER_MAX);
        let text = text_of(&answer);
        assert_eq!(answer.status.code(), Some(1), "{command:?}: {text}");
        for part in ["sink mart is missing from the configuration", "lags", "--drop-sink mart"] {
            assert!(text.contains(part), "{command:?}: {part:?} is missing in {text}");
        }
        assert!(!text.contains("reloaded: revision"), "{command:?}: {text}");
    }
    let process = fixture.process_id().to_string();
    let asked = std::process::Command::new("kill").args(["-HUP", &process]).status();
    assert!(asked.expect("kill runs").success());
    wait_for("the signal's reload to be refused", || fixture.log().contains("reload refused:"));
    // None of these changes was ever in force.
    let outcomes: Vec<_> = fixture.history().iter().map(|one| one["outcome"].clone()).collect();
    assert_eq!(outcomes, ["refused", "refused"], "{}", fixture.log());
    assert!(!fixture.log().contains("a change was undone"), "{}", fixture.log());

    drop(lock);
    fixture.wait_rows(200);
    let answer = answers_within(&["reload", &file], ANSWER_MAX);
    let text = text_of(&answer);
    assert!(answer.status.success() && text.contains("reloaded: revision"), "{text}");
    fixture.world.put(200..300, 10);
    wait_for("more rows of the sink that stays", || copied(&fixture) == 300);
    fixture.stop();
    assert_eq!(fixture.rows().len(), 200);
}

/// A sink that gathers rows for a larger commit has the same rows as the others, uncommitted. The reload must not be
/// refused because of them.
#[test]
fn fault_13_a_sink_that_gathers_rows_for_long_can_be_taken_away() {
    let mut fixture = into_two("30 min");
    fixture.start();
    fixture.world.put(0..100, 10);
    fixture.wait_rows(100);
    only(&fixture, "mart");
    let file = fixture.pipeline_file();
    let answer = answers_within(&["reload", &file], ANSWER_MAX);
    let text = text_of(&answer);
    assert!(answer.status.success() && text.contains("- sink copy"), "{text}");
    assert_eq!(copied(&fixture), 100, "{}", fixture.log());
    fixture.world.put(100..200, 10);
    fixture.wait_rows(200);
    fixture.stop();
    assert_eq!(copied(&fixture), 100);
    fixture.assert_each_once_as_the_ledger_says(0..200);
}

/// Regression: the checks of tables, the sinks that drop what they remember of the candidate, and the lanes had a
/// deadline of 8 s each, together more than the promised 10 s.
#[test]
fn fault_01_a_reload_beside_a_locked_table_answers_in_time() {
    let mut fixture = into_two("50 ms");
    fixture.start();
    fixture.world.put(0..100, 10);
    fixture.wait_rows(100);
    wait_for("the copy", || copied(&fixture) == 100);
    let lock = Locked::table(&fixture.table);
    fixture.world.put(100..200, 10);
    wait_for("the other sink to have all rows", || copied(&fixture) == 200);
    let file = fixture.pipeline_file();
    let plain = std::fs::read_to_string(&file).expect("the file");
    let larger = plain.replacen("[pipeline]", "[pipeline]\nbuffer = \"64 MiB\"", 1);
    std::fs::write(&file, larger).expect("written");
    for command in [&["reload", &file, "--dry-run"][..], &["reload", &file]] {
        let answer = answers_within(command, ANSWER_MAX);
        let text = text_of(&answer);
        let is_said = ["did not answer", "not in force yet", "would activate", "reloaded"]
            .iter()
            .any(|part| text.contains(part));
        assert!(is_said, "{command:?}: {text}");
    }
    drop(lock);
    fixture.wait_rows(200);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..200);
}
