//! Random rows with keys, and the expected content of a table after them.

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::{Map, Value, json};
use shardmill_config::WriteMode;
use shardmill_core::sink::SinkWriter;

use super::{Log, commit};

/// Table of these tests, in SQL that both databases support.
pub const TABLE: &str = "CREATE TABLE cars (id bigint PRIMARY KEY, make text, cents bigint CHECK (cents >= 0), at bigint)";

/// Constraint of the table, to be removed for databases that have none.
#[allow(dead_code, reason = "one of the test programs takes it away")]
pub const CHECK: &str = " CHECK (cents >= 0)";

/// Shows the content of a table: `id make cents at`, ordered by id; `-` is null.
pub const SHOWN: &str = "SELECT string_agg(line, ';') FROM (SELECT id || ' ' || coalesce(make, '-') \
    || ' ' || coalesce(cents || '', '-') || ' ' || coalesce(at || '', '-') AS line FROM cars ORDER BY id) AS t";

/// Makes rows with few distinct keys, each with some of the columns. One in twenty is invalid.
fn rows(random: &mut Rng, count: usize) -> Vec<Map<String, Value>> {
    (0..count).map(|_| row(random)).collect()
}

fn row(random: &mut Rng) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("id".into(), json!(random.u32(..30)));
    row.insert("at".into(), json!(random.u32(..100)));
    if random.bool() {
        row.insert("make".into(), json!(random.choice(["Honda", "Volvo"])));
    }
    if random.bool() {
        row.insert("cents".into(), json!(random.u32(..1_000)));
    }
    match random.u32(..80) {
        0 => _ = row.insert("cents".into(), json!(-1)),
        1 => _ = row.insert("id".into(), Value::Null),
        2 => _ = row.remove("id"),
        3 => _ = row.insert("cents".into(), json!("many")),
        _ => {}
    }
    row
}

/// Expected content of the table.
#[derive(Default)]
struct Model {
    rows: BTreeMap<u64, Map<String, Value>>,
}

impl Model {
    /// Writes rows; returns the indexes of those that must be refused.
    fn write(&mut self, mode: &WriteMode, rows: &[Map<String, Value>], checks: bool) -> Vec<usize> {
        let mut refused = Vec::new();
        for (place, row) in rows.iter().enumerate() {
            let id = row.get("id").and_then(Value::as_u64);
            let is_sound =
                row.get("cents").is_none_or(if checks { Value::is_u64 } else { Value::is_i64 });
            let Some(id) = id.filter(|_| is_sound) else {
                refused.push(place);
                continue;
            };
            match (mode, self.rows.get_mut(&id)) {
                (_, None) => _ = self.rows.insert(id, row.clone()),
                (WriteMode::Ignore { .. }, Some(_)) => {}
                (WriteMode::Upsert { newest_by: Some(_), .. }, Some(there))
                    if there["at"].as_u64() > row["at"].as_u64() => {}
                (_, Some(there)) => there.extend(row.clone()),
            }
        }
        refused
    }

    /// Returns the content as [`SHOWN`] shows it.
    fn shown(&self) -> String {
        let text = |row: &Map<String, Value>, column: &str| match row.get(column) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let lines = self.rows.iter().map(|(id, row)| {
            format!("{id} {} {} {}", text(row, "make"), text(row, "cents"), text(row, "at"))
        });
        lines.collect::<Vec<_>>().join(";")
    }
}

/// Returns the modes that have a key.
pub fn modes() -> [WriteMode; 3] {
    let key = vec!["id".to_owned()];
    [
        WriteMode::Upsert { key: key.clone(), newest_by: None },
        WriteMode::Upsert { key: key.clone(), newest_by: Some("at".into()) },
        WriteMode::Ignore { key },
    ]
}

/// Commits random rows with a writer, each commit twice as after a lost answer. Compares the table's content, which
/// `shown` returns as [`SHOWN`] shows it, with the model. `checks`: whether the table has its [`CHECK`].
pub async fn assert_as_the_model(
    mode: &WriteMode,
    seed: u64,
    checks: bool,
    writer: &mut dyn SinkWriter,
    shown: impl AsyncFn() -> String,
) {
    let (mut random, mut model) = (Rng::with_seed(seed), Model::default());
    let mut from = 0;
    for count in [1, 40, 200, 7, 100] {
        let rows = rows(&mut random, count);
        let expected = model.write(mode, &rows, checks);
        let lines: Vec<String> =
            rows.iter().map(|row| serde_json::to_string(row).expect("JSON")).collect();
        let (log, commit) = (Log::default(), commit(from, &lines));
        writer.commit(&commit, &log).await.expect("committed");
        let refused: Vec<usize> = log.take().into_iter().map(|(row, _)| row).collect();
        assert_eq!(refused, expected, "{mode:?}, seed {seed}");
        writer.commit(&commit, &log).await.expect("answered");
        assert_eq!(shown().await, model.shown(), "{mode:?}, seed {seed}");
        from += count as u64;
    }
}
