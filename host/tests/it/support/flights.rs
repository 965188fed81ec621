//! The flights as a multiset of lines, read from the CSV and from each kind of sink.

use std::path::Path;

/// Columns, in the CSV's order.
pub const COLUMNS: [&str; 19] = [
    "year",
    "month",
    "day",
    "dep_time",
    "sched_dep_time",
    "dep_delay",
    "arr_time",
    "sched_arr_time",
    "arr_delay",
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "air_time",
    "distance",
    "hour",
    "minute",
    "time_hour",
];
/// Tables that the flights go to.
pub const TABLES: [&str; 3] = ["newark", "kennedy", "laguardia"];

/// Returns the CSV's lines, without its header.
pub fn from_csv(csv: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(csv).expect("the flights");
    sorted(text.lines().skip(1).map(str::to_owned).collect())
}

/// Returns the rows of the three tables, as CSV lines.
pub fn in_sqlite(file: &Path) -> Vec<String> {
    let database = rusqlite::Connection::open(file).expect("the data mart");
    let mut lines = Vec::new();
    for table in TABLES {
        let columns = COLUMNS.map(|column| format!("ifnull({column}, 'NA')")).join(" || ',' || ");
        let mut query = database.prepare(&format!("SELECT {columns} FROM {table}")).expect(table);
        let rows = query.query_map([], |row| row.get::<_, String>(0)).expect(table);
        lines.extend(rows.map(|row| row.expect("a row")));
    }
    sorted(lines)
}

/// Returns the rows of the three tables of a schema, as CSV lines.
pub fn in_postgres(schema: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for table in TABLES {
        let columns = COLUMNS.map(|column| match column {
            "time_hour" => {
                r#"to_char(time_hour AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"#.to_owned()
            }
            other => format!("coalesce({other}::text, 'NA')"),
        });
        let query = format!("SELECT concat_ws(',', {}) FROM {schema}.{table}", columns.join(", "));
        lines.extend(super::postgres(&query));
    }
    sorted(lines)
}

/// Returns the lines of all objects below a folder, as CSV lines.
pub fn in_objects(folder: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "zst") {
                let file = std::fs::File::open(&path).expect("an object");
                let text = zstd::decode_all(file).expect("compressed");
                let text = String::from_utf8(text).expect("text");
                lines.extend(text.lines().map(csv_line));
            }
        }
    }
    sorted(lines)
}

/// Returns a JSON row as the CSV line that it was made from.
fn csv_line(json: &str) -> String {
    let row: serde_json::Value = serde_json::from_str(json).expect("a JSON row");
    let fields = COLUMNS.map(|column| match &row[column] {
        serde_json::Value::Null => "NA".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    });
    fields.join(",")
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort_unstable();
    lines
}

/// Asserts that both have the same lines equally often; shows the first lines that differ.
pub fn same_multiset(place: &str, expected: &[String], found: &[String]) {
    if expected == found {
        println!("{place}: {} records, each exactly once", found.len());
        return;
    }
    let differs = expected.iter().zip(found).position(|(one, two)| one != two);
    let at = differs.unwrap_or(expected.len().min(found.len()));
    panic!(
        "{place}: {} records, expected {}; sorted, at {at}: found {:?}, expected {:?}",
        found.len(),
        expected.len(),
        found.get(at),
        expected.get(at)
    );
}
