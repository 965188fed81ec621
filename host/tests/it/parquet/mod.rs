//! Parquet files of an objects sink, read by pyarrow and by DuckDB.

#[allow(dead_code, reason = "the SQL sinks' tests use the rest")]
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use crate::sql_sinks::{Log, commit, route, shard};
use crate::support::flights::{from_csv, same_multiset};
use crate::support::pipeline::PipelineToml;
use crate::support::{root, run_ok, some_flights_csv, with_tools};
use serde_json::{Value, json};
use shardmill_core::sink::Sink as _;
use shardmill_sink_objects::{
    Compression, FolderTemplate, ObjectFormat, ObjectLayout, ObjectsSink,
};

fn layout(compression: Compression) -> ObjectLayout {
    let folder = FolderTemplate::default();
    ObjectLayout { format: ObjectFormat::Parquet, compression, folder }
}

/// Returns what both readers find below a folder.
fn read_back(folder: &Path) -> Value {
    let script = root().join("host/tests/it/parquet/read.py");
    let mut command = Command::new("python");
    let output = crate::support::output(with_tools(&mut command).arg(script).arg(folder));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Columns: the type, the JSON value in a row, the type's name in each reader, and the value that both readers find.
const TYPES: [(&str, &str, &str, &str, &str); 20] = [
    ("boolean?", "true", "bool", "BOOLEAN", "True"),
    ("smallint?", "-32768", "int16", "SMALLINT", "-32768"),
    ("integer?", "2147483647", "int32", "INTEGER", "2147483647"),
    ("bigint?", "\"-9223372036854775808\"", "int64", "BIGINT", "-9223372036854775808"),
    ("real?", "1.5", "float", "FLOAT", "1.5"),
    ("double precision?", "0.1", "double", "DOUBLE", "0.1"),
    ("numeric(10, 2)?", "-12.5", "decimal128(10, 2)", "DECIMAL(10,2)", "-12.50"),
    (
        "numeric(38,4)?",
        "1234567890123456789012345678901234.5678",
        "decimal128(38, 4)",
        "DECIMAL(38,4)",
        "1234567890123456789012345678901234.5678",
    ),
    ("numeric(20,0)?", "-7", "decimal128(20, 0)", "DECIMAL(20,0)", "-7"),
    ("numeric?", "1.500", "string", "VARCHAR", "1.500"),
    ("text?", "\"B\\u00fcssing \\u2603\"", "string", "VARCHAR", "Büssing ☃"),
    ("varchar(9)?", "\"a\"", "string", "VARCHAR", "a"),
    ("jsonb?", "{\"a\": [1,2]}", "", "JSON", "{\"a\": [1,2]}"),
    (
        "uuid?",
        "\"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"",
        "",
        "UUID",
        "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    ),
    ("date?", "\"2013-01-31\"", "date32[day]", "DATE", "2013-01-31"),
    ("time?", "\"23:59:59.123456\"", "time64[us]", "TIME", "23:59:59.123456"),
    (
        "timestamp?",
        "\"2013-01-31 23:59:59.5\"",
        "timestamp[us]",
        "TIMESTAMP",
        "2013-01-31T23:59:59.500000",
    ),
    (
        "timestamptz?",
        "\"2013-01-31T23:59:59+01:00\"",
        "timestamp[us, tz=UTC]",
        "TIMESTAMP WITH TIME ZONE",
        "1359673199000000",
    ),
    ("bytea?", "\"\\\\x00ff\"", "binary", "BLOB", "00ff"),
    ("bigint", "1", "int64", "BIGINT", "1"),
];

#[tokio::test]
async fn every_type_is_read_back() {
    let columns: Vec<String> =
        TYPES.iter().enumerate().map(|(place, column)| format!("c{place} {}", column.0)).collect();
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let full: Vec<String> = TYPES
        .iter()
        .enumerate()
        .map(|(place, column)| format!("\"c{place}\":{}", column.1))
        .collect();
    let full = format!("{{{}}}", full.join(","));
    let rows = [full.as_str(), r#"{"c19":1}"#, r#"{"c19":1,"c12":null,"c0":null}"#];
    let expected_full: Vec<Value> = TYPES.iter().map(|column| json!(column.4)).collect();
    let mut expected_empty = vec![Value::Null; TYPES.len()];
    expected_empty[19] = json!("1");

    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let folder = tempfile::tempdir().expect("a folder");
        let url = url::Url::from_directory_path(folder.path()).expect("a URL");
        let sink = ObjectsSink::new("logs".into(), &url, &BTreeMap::new(), layout(compression));
        let sink = sink.expect("a sink");
        sink.prepare(&[route(&columns)]).await.expect("prepared");
        let mut owner = sink.acquire(&shard("shardId-000000000000")).await.expect("acquired");
        let log = Log::default();
        let done = owner.writer.commit(&commit(0, &rows), &log).await.expect("committed");
        assert_eq!((done.rows_written, done.rows_refused), (3, 0));
        let found = read_back(folder.path());
        for (reader, at) in [("pyarrow", 2), ("duckdb", 3)] {
            assert_eq!(
                found[reader]["rows"],
                json!([expected_full, expected_empty, expected_empty]),
                "{reader}"
            );
            for (place, column) in TYPES.iter().enumerate() {
                let expected = [column.2, column.3][at - 2];
                let name = &found[reader]["types"][format!("c{place}")];
                // pyarrow's names of JSON and UUID depend on its version.
                assert!(
                    expected.is_empty() || name == expected,
                    "{reader}: {} is {name}",
                    column.0
                );
            }
        }
        let audit = sink.verify(true).await.expect("verified");
        assert_eq!((audit.rows, audit.problems.len()), (3, 0), "{audit:?}");
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = url::Url::from_directory_path(folder.path()).expect("a URL");
    let sink = ObjectsSink::new("logs".into(), &url, &BTreeMap::new(), layout(Compression::Zstd));
    let sink = sink.expect("a sink");
    let columns = ["id bigint", "price numeric(5,2)?", "small smallint?"];
    sink.prepare(&[route(&columns)]).await.expect("prepared");
    let mut owner = sink.acquire(&shard("shardId-000000000000")).await.expect("acquired");
    let rows = [
        r#"{"id":1,"price":999.99}"#,
        r#"{"id":2,"price":1000}"#,
        r#"{"id":3,"price":0.005}"#,
        r#"{"id":null}"#,
        r#"{"price":1}"#,
        r#"{"id":6,"small":40000}"#,
        r#"{"id":7,"colour":1}"#,
        "no JSON",
        r#"{"id":9}"#,
    ];
    let log = Log::default();
    let done = owner.writer.commit(&commit(0, &rows), &log).await.expect("committed");
    assert_eq!((done.rows_written, done.rows_refused), (2, 7));
    log.expect(&[
        (1, "5 digits, 2 of them"),
        (2, "5 digits, 2 of them"),
        (3, "\"id\" is missing or null"),
        (4, "\"id\" is missing or null"),
        (5, "\"small\" of type smallint"),
        (6, "declares no column \"colour\""),
        (7, "not a JSON object"),
    ]);
    let found = read_back(folder.path());
    assert_eq!(found["duckdb"]["rows"], json!([["1", "999.99", null], ["9", null, null]]));

    for (columns, part) in [
        (vec![], "declares no columns"),
        (vec!["at interval"], "type interval, which is unsupported"),
    ] {
        let error = sink.prepare(&[route(&columns)]).await.expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// 84,194 flights written by the real binary, in folders by airport.
#[test]
fn the_flights_are_read_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let flights = some_flights_csv(folder.path());
    let example = std::fs::read_to_string(root().join("examples/flights/pipeline.toml"));
    let example = example.expect("the example");
    let begin = example.find("[stage.config]").expect("its first configuration");
    let end = begin + example[begin..].find("[[stage]]").expect("its second stage");
    let logs = format!(
        "type = \"objects\"\nurl = \"{}/logs\"\nformat = \"parquet\"\n\
         folder = \"{{route}}/origin={{row.origin}}\"",
        folder.path().display()
    );
    let pipeline = PipelineToml::new(folder.path(), "flights")
        .timing("")
        .file(&flights, "format = \"text/csv\"")
        .stage("decode", "csv-decode", &example[begin..end])
        .route_all_to(&["logs"])
        .plain_sink("logs", &logs)
        .write();
    run_ok(&["run", &pipeline]);
    let said = run_ok(&["objects", "verify", &pipeline, "--content"]);
    assert!(said.contains("84194 rows"), "{said}");

    let logs = folder.path().join("logs/all");
    let mut airports: Vec<_> = std::fs::read_dir(&logs)
        .expect("folders")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    airports.sort();
    assert_eq!(airports, ["origin=EWR", "origin=JFK", "origin=LGA"]);
    let found = read_back(&logs);
    let expected = from_csv(&flights);
    for reader in ["pyarrow", "duckdb"] {
        let rows = found[reader]["rows"].as_array().expect("rows");
        let mut lines: Vec<String> = rows.iter().map(csv_line).collect();
        lines.sort_unstable();
        same_multiset(reader, &expected, &lines);
    }
}

/// Returns a row as the CSV line that it was made from.
fn csv_line(row: &Value) -> String {
    let fields = row.as_array().expect("a row").iter().enumerate();
    let text = |(place, value): (usize, &Value)| match (place, value.as_str()) {
        (_, None) => "NA".to_owned(),
        (18, Some(micros)) => {
            let micros = micros.parse().expect("microseconds");
            let at = chrono::DateTime::from_timestamp_micros(micros).expect("a time");
            at.format("%Y-%m-%dT%H:%M:%SZ").to_string()
        }
        (_, Some(text)) => text.to_owned(),
    };
    fields.map(text).collect::<Vec<_>>().join(",")
}
