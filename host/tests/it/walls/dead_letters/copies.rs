//! Copies of dead letters in sinks.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{BUFFER, Folder};
use crate::assets;
use crate::support::{kill_until_it_ends, sqlite};
use crate::walls::memory::LIMITS;

/// Number of dead letters of each record.
const ITEMS: usize = 20;

const COPIES: &str = r#"
[dead_letters]
sinks = ["table", "lake"]
[[sink]]
name = "table"
type = "sqlite"
path = "letters.db"
table = "letters"
create = true
[sink.commit]
rows = 7
bytes = "4 MiB"
linger = "10 ms"
[[sink]]
name = "lake"
type = "objects"
url = "lake"
compression = "none"
[sink.commit]
rows = 7
bytes = "4 MiB"
linger = "10 ms"
"#;

/// Writes a pipeline that makes many items of each record, and rejects all of them.
fn pipeline(folder: &Folder) {
    let many = format!(
        "config = {{ many_on = \"\", many = {ITEMS}, format = \"application/json\" }}\n{LIMITS}"
    );
    let reject =
        format!("config = {{ reject_on = \"\", format = \"application/json\" }}\n{LIMITS}");
    folder
        .pipeline()
        .pipeline(BUFFER)
        .stage("burst", "hostile", &many)
        .stage("check", "hostile", &reject)
        .route_all_to(&["mart"])
        .sqlite("mart", "rows")
        .table(COPIES)
        .write();
    sqlite(&folder.path().join("mart.db"))
        .execute_batch("CREATE TABLE rows (a text)")
        .expect("a table");
}

/// Returns the record of each copy in the table, by the dead letter's number, with its sequence number.
fn in_table(folder: &Folder) -> BTreeMap<i64, (String, Value)> {
    let copies = sqlite(&folder.path().join("letters.db"));
    let mut query =
        copies.prepare("SELECT id, sequence, original FROM letters").expect("the copies");
    let read = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    let read: Vec<(i64, String, String)> =
        read.expect("rows").collect::<Result<_, _>>().expect("rows");
    assert_eq!(read.len(), 3 * ITEMS, "each dead letter once");
    let parsed = |original: String| serde_json::from_str(&original).expect("JSON");
    read.into_iter().map(|(id, sequence, original)| (id, (sequence, parsed(original)))).collect()
}

/// Returns the same from the objects.
fn in_lake(folder: &Folder) -> BTreeMap<i64, (String, Value)> {
    let files = folder.files("lake");
    let files = files.iter().filter(|path| !path.display().to_string().contains("_shardmill"));
    let texts = files.map(|path| fs::read_to_string(path).expect("text"));
    let lines: Vec<String> =
        texts.flat_map(|text| text.lines().map(String::from).collect::<Vec<_>>()).collect();
    assert_eq!(lines.len(), 3 * ITEMS, "each dead letter once");
    let parsed = |line: &String| {
        let copy: Value = serde_json::from_str(line).expect("JSON");
        let sequence = copy["sequence"].as_str().expect("text").to_owned();
        (copy["id"].as_i64().expect("a number"), (sequence, copy["original"].clone()))
    };
    lines.iter().map(parsed).collect()
}

#[test]
fn wall_04_copies_have_a_large_record_once_whatever_is_killed() {
    let large = |n| format!("{{\"id\":{n},\"a\":\"{}\"}}", "x".repeat(100_000));
    let records = [large(0), large(1), "{\"id\":2}".to_owned()];
    let folder = Folder::of_lines(&records);
    pipeline(&folder);
    kill_until_it_ends(4, || folder.command(&["run"]));
    let copies = in_table(&folder);
    assert_eq!(in_lake(&folder), copies);
    let mut by_record: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for (sequence, original) in copies.values() {
        by_record.entry(sequence).or_default().push(original);
    }
    assert_eq!(by_record.len(), records.len());
    let mut seen = Vec::new();
    for originals in by_record.values() {
        assert_eq!(originals.len(), ITEMS);
        let whole: Vec<&str> =
            originals.iter().filter_map(|original| original["text"].as_str()).collect();
        let payload = *whole.first().expect("one has the record whole");
        seen.push(payload.to_owned());
        if payload.len() < 4_096 {
            assert_eq!(whole.len(), ITEMS, "each copy has a small record");
            continue;
        }
        assert_eq!(whole.len(), 1, "one copy has a large record");
        let digest = hex::encode(Sha256::digest(payload));
        let others = originals.iter().filter(|original| original["text"].is_null());
        for other in others {
            assert_eq!(other["sha256"], digest.as_str());
            assert_eq!(other["bytes"], payload.len());
        }
    }
    seen.sort();
    assert_eq!(seen, records);

    // The join from the book.
    let joined =
        format!("SELECT count(*), count(DISTINCT original) FROM ({})", assets::DEAD_LETTERS_SQL);
    let dead_letters = sqlite(&folder.path().join("letters.db"));
    let counts = dead_letters.query_row(&joined, [], |row| Ok((row.get(0)?, row.get(1)?)));
    assert_eq!(counts.expect("counts"), (3 * ITEMS as i64, records.len() as i64));
}
