//! Copies of dead letters in sinks, through the real binary: each dead letter is in each of these sinks exactly once.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

use crate::support::pipeline::PipelineToml;
use crate::support::{kill_until_it_ends, output, postgres, shardmill, sqlite};
use serde_json::Value;

/// Writes a pipeline over `rows.ndjson` whose dead letters go to the sinks of `dead_letters`.
fn pipeline(folder: &Path, dead_letters: &str) -> String {
    let mart = folder.join("mart.db");
    let file = PipelineToml::new(folder, "cars")
        .pipeline("rejected_of_last_1000 = 1000\nrejected_in_a_row = 1000000")
        .file(Path::new("rows.ndjson"), "[source.batch]\nrecords = 50")
        .stage("check", "hostile", "config = { trap_on = \"trap\", format = \"application/json\" }")
        .route_all_to(&["mart"])
        .plain_sink(
            "mart",
            &format!(
                "type = \"sqlite\"\npath = \"{}\"\ntable = \"cars\"\n\
                 [sink.commit]\nrows = 100\nlinger = \"20 ms\"",
                mart.display()
            ),
        )
        .table(dead_letters)
        .write();
    let mart = sqlite(&folder.join("mart.db"));
    mart.execute_batch("CREATE TABLE cars (id integer NOT NULL)").expect("a table");
    file
}

/// Returns the numbers of the dead letters, as `dlq list` shows them.
fn listed(folder: &Path) -> BTreeSet<i64> {
    let mut list = shardmill(&["dlq", "list", "--json", "--limit", "100000"]);
    let list = output(list.current_dir(folder));
    let lines = String::from_utf8(list.stdout).expect("text");
    lines.lines().map(id).collect()
}

fn id(line: &str) -> i64 {
    let dead_letter: Value = serde_json::from_str(line).expect("JSON");
    dead_letter["id"].as_i64().expect("an id")
}

fn run(folder: &Path) {
    let ran = output(shardmill(&["run"]).current_dir(folder));
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// Returns the lines of all objects below a folder.
fn lines(folder: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() && !path.ends_with("_shardmill") {
            lines.extend(self::lines(&path));
        } else if path.extension().is_some_and(|extension| extension == "gz") {
            let mut text = String::new();
            let file = std::fs::File::open(path).expect("an object");
            flate2::read::GzDecoder::new(file).read_to_string(&mut text).expect("gzip");
            lines.extend(text.lines().map(String::from));
        }
    }
    lines
}

#[test]
fn dead_letters_are_copied_to_each_sink_that_is_named_for_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let table = format!("letters_{}", std::process::id());
    let dead_letters = format!(
        r#"
[dead_letters]
sinks = ["table", "lake", "warehouse"]
[[sink]]
name = "table"
type = "sqlite"
path = "letters.db"
table = "letters"
create = true
[[sink]]
name = "lake"
type = "objects"
url = "lake"
[[sink]]
name = "warehouse"
type = "postgres"
url = "{}"
table = "{table}"
create = true
"#,
        crate::support::postgres_url()
    );
    pipeline(folder, &dead_letters);
    let rows = b"{\"id\":1}\n{\"id\":\n\xff\xfe\n{\"id\":2,\"name\":\"trap\"}\n{\"id\":\"a\\u0000b\"}\n{\"id\":3}\n";
    std::fs::write(folder.join("rows.ndjson"), rows).expect("written");
    let checked = output(shardmill(&["check", "pipeline.toml"]).current_dir(folder));
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(said.contains("sink lake: ready"), "{said}");
    run(folder);
    // A second run with more rows: dead letters that were copied are not copied again.
    let rows = [&rows[..], b"no JSON\n{\"id\":4}\n"].concat();
    std::fs::write(folder.join("rows.ndjson"), rows).expect("written");
    run(folder);

    let expected = listed(folder);
    assert_eq!(expected.len(), 5);
    let copies = sqlite(&folder.join("letters.db"));
    let mut query =
        copies.prepare("SELECT id, place, original FROM letters ORDER BY id").expect("a table");
    let read = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    let read: Vec<(i64, String, String)> =
        read.expect("rows").collect::<Result<_, _>>().expect("rows");
    assert_eq!(
        read.iter().map(|(id, ..)| *id).collect::<Vec<_>>(),
        Vec::from_iter(expected.clone())
    );
    let place = |place: &str| read.iter().filter(|(_, own, _)| own == place).count();
    assert_eq!((place("stage:check"), place("stage:route"), place("sink:mart")), (1, 3, 1));
    assert!(read.iter().any(|(.., original)| original == r#"{"base64":"//4="}"#), "{read:?}");

    let lake = lines(&folder.join("lake"));
    assert_eq!((lake.len(), lake.iter().map(|line| id(line)).collect()), (5, expected.clone()));
    let ids = postgres(&format!("SELECT id FROM {table}"));
    assert_eq!(ids.len(), 5);
    assert_eq!(
        ids.iter().map(|id| id.parse().expect("an id")).collect::<BTreeSet<i64>>(),
        expected
    );
    postgres(&format!("DROP TABLE {table}"));
}

#[test]
fn killed_runs_leave_each_dead_letter_once() {
    const ROWS: u64 = 3_000;
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    pipeline(
        folder,
        r#"
[dead_letters]
sinks = ["letters"]
[[sink]]
name = "letters"
type = "sqlite"
path = "letters.db"
table = "letters"
create = true
[sink.commit]
rows = 30
linger = "10 ms"
"#,
    );
    let mut rows = String::new();
    for id in 0..ROWS {
        // The route refuses a third of the rows, and the table another third.
        match id % 3 {
            0 => writeln!(rows, "{{\"id\":{id}}}"),
            1 => writeln!(rows, "{id} is no object"),
            _ => writeln!(rows, "{{\"id\":\"number {id}\"}}"),
        }
        .expect("text");
    }
    std::fs::write(folder.join("rows.ndjson"), rows).expect("written");
    let kills = kill_until_it_ends(5, || {
        let mut run = shardmill(&["run"]);
        run.current_dir(folder);
        run
    });
    let copies = sqlite(&folder.join("letters.db"));
    let count = |what: &str| -> u64 {
        copies
            .query_row(&format!("SELECT {what} FROM letters"), [], |row| row.get(0))
            .expect("rows")
    };
    let expected = listed(folder);
    assert_eq!(expected.len() as u64, ROWS / 3 * 2, "after {kills} kills");
    assert_eq!((count("count(*)"), count("count(DISTINCT id)")), (ROWS / 3 * 2, ROWS / 3 * 2));
}

#[test]
fn fault_13_check_foresees_what_a_start_says_of_a_sink_of_dead_letters_that_was_restored() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    pipeline(
        folder,
        "[dead_letters]\nsinks = [\"table\"]\n[[sink]]\nname = \"table\"\ntype = \"sqlite\"\n\
         path = \"letters.db\"\ntable = \"letters\"\ncreate = true\n",
    );
    let copies = folder.join("letters.db");
    std::fs::write(folder.join("rows.ndjson"), "no JSON\n").expect("written");
    run(folder);
    std::fs::copy(&copies, folder.join("backup.db")).expect("copied");
    std::fs::write(folder.join("rows.ndjson"), "no JSON\nneither\n").expect("written");
    run(folder);
    let check = || {
        let checked = output(shardmill(&["check", "pipeline.toml"]).current_dir(folder));
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        String::from_utf8_lossy(&checked.stdout).into_owned()
    };
    assert!(!check().contains("warning: sink table has an earlier position"), "{}", check());
    std::fs::copy(folder.join("backup.db"), &copies).expect("restored");
    let said = check();
    assert!(
        said.contains("warning") && said.contains("sink table has an earlier position"),
        "{said}"
    );
}
