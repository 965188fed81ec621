//! The SQLite sink on real files, through the contract of all sinks.

use crate::sql_sinks::keyed;
use crate::sql_sinks::{Log, assert_fences, commit, expect_unavailable, position, route, shard};
use shardmill_config::WriteMode;
use shardmill_core::sink::{Acquired, Sink, SinkWriter};
use shardmill_sink_sqlite::SqliteSink;

/// A file of the test's own, and a connection to look at it.
struct Mart {
    folder: tempfile::TempDir,
    connection: rusqlite::Connection,
}

impl Mart {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let connection = rusqlite::Connection::open(folder.path().join("mart.db")).expect("a file");
        Self { folder, connection }
    }

    fn sql(&self, sql: &str) {
        self.connection.execute_batch(sql).expect(sql);
    }

    /// Returns the one value of a query, as text; `NULL` for null.
    fn one(&self, query: &str) -> String {
        let query = format!("SELECT CAST(({query}) AS TEXT)");
        let value: Option<String> =
            self.connection.query_row(&query, [], |row| row.get(0)).expect(&query);
        value.unwrap_or_else(|| "NULL".into())
    }

    fn sink(&self, table: &str) -> SqliteSink {
        SqliteSink::new(
            "mart".into(),
            self.folder.path().join("mart.db"),
            table,
            true,
            WriteMode::Append,
        )
        .expect("a sink")
    }

    fn keyed(&self, table: &str, mode: WriteMode) -> SqliteSink {
        SqliteSink::new("mart".into(), self.folder.path().join("mart.db"), table, true, mode)
            .expect("a sink")
    }

    /// Makes a writer for the only shard of an existing table.
    async fn writer(&self, table: &str) -> Box<dyn SinkWriter> {
        let sink = self.sink(table);
        sink.prepare(&[route(&[])]).await.expect("prepared");
        acquire(&sink).await.writer
    }
}

async fn acquire(sink: &SqliteSink) -> Acquired {
    sink.acquire(&shard("shardId-000000000000")).await.expect("acquired")
}

#[tokio::test]
async fn rows_with_keys_leave_what_their_mode_says() {
    for mode in keyed::modes() {
        for seed in 0..5 {
            let mart = Mart::new();
            mart.sql(keyed::TABLE);
            let sink = mart.keyed("cars", mode.clone());
            sink.prepare(&[route(&[])]).await.expect("prepared");
            let mut writer = acquire(&sink).await.writer;
            let shown = async || mart.one(keyed::SHOWN);
            keyed::assert_as_the_model(&mode, seed, true, &mut *writer, shown).await;
        }
    }
}

#[tokio::test]
async fn a_key_needs_a_unique_index_and_a_created_table_has_one() {
    let mart = Mart::new();
    mart.sql("CREATE TABLE cars (id integer, make text)");
    let [mode, ..] = keyed::modes();
    let sink = mart.keyed("cars", mode.clone());
    expect_unavailable(sink.prepare(&[route(&[])]).await, "unique index on the key");
    let sink = mart.keyed("made", mode);
    sink.prepare(&[route(&["id integer", "make text?"])]).await.expect("created");
    let mut writer = acquire(&sink).await.writer;
    let rows = [r#"{"id":1,"make":"a"}"#, r#"{"id":1,"make":"b"}"#];
    writer.commit(&commit(0, &rows), &Log::default()).await.expect("committed");
    assert_eq!(mart.one("SELECT group_concat(make) FROM made"), "b");
}

#[tokio::test]
async fn a_commit_lands_once_however_often_it_is_tried() {
    let mart = Mart::new();
    let sink = mart.sink("cars");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared again");
    assert_eq!(sink.position(&shard("shardId-000000000000")).await.expect("none"), None);
    let Acquired { mut writer, position: start, .. } = acquire(&sink).await;
    assert_eq!(start, None);
    let (log, first) = (Log::default(), commit(0, &[r#"{"id":1,"make":"Honda"}"#, r#"{"id":2}"#]));
    for _ in 0..3 {
        let committed = writer.commit(&first, &log).await.expect("committed");
        assert_eq!((committed.rows_written, committed.rows_refused), (2, 0));
    }
    writer.commit(&commit(2, &[r#"{"id":3}"#]), &log).await.expect("committed");
    let no_rows: [&str; 0] = [];
    writer.commit(&commit(3, &no_rows), &log).await.expect("committed");
    assert_eq!(
        mart.one("SELECT group_concat(id || coalesce(make, '-'), ' ') FROM cars"),
        "1Honda 2- 3-"
    );
    let place = sink.position(&shard("shardId-000000000000")).await.expect("a position");
    assert_eq!(place, Some(position(4)));
    assert_eq!(mart.one("SELECT length(sequence) FROM shardmill_position"), "129");
    log.expect(&[]);
}

#[tokio::test]
async fn an_earlier_owner_cannot_commit() {
    let mart = Mart::new();
    mart.sql("CREATE TABLE cars (id bigint PRIMARY KEY)");
    // Two sinks on one file, as two processes would have.
    let (sink, other) = (mart.sink("cars"), mart.sink("cars"));
    assert_fences(&sink, &other).await;
    assert_eq!(mart.one("SELECT group_concat(id, ' ') FROM cars"), "1 2");
}

#[tokio::test]
async fn shards_share_the_file() {
    let mart = Mart::new();
    mart.sql("CREATE TABLE cars (id bigint)");
    let sink = mart.sink("cars");
    let shards = (0..8).map(|n| {
        let sink = &sink;
        async move {
            let mut writer =
                sink.acquire(&shard(&format!("shard-{n}"))).await.expect("acquired").writer;
            for from in 0..10 {
                let row = format!(r#"{{"id":{from}}}"#);
                writer.commit(&commit(from, &[row]), &Log::default()).await.expect("committed");
            }
        }
    });
    futures::future::join_all(shards).await;
    assert_eq!(mart.one("SELECT count(*) FROM cars"), "80");
    assert_eq!(mart.one("SELECT count(DISTINCT sequence) FROM shardmill_position"), "1");
}

#[tokio::test]
async fn bad_rows_are_refused_alone() {
    let mart = Mart::new();
    mart.sql(
        "CREATE TABLE cars (id bigint PRIMARY KEY, make text NOT NULL, doors int CHECK (doors < 9),
             price numeric, built date, twice AS (id * 2) STORED);
         CREATE TRIGGER refuse BEFORE INSERT ON cars WHEN NEW.id = 99
             BEGIN SELECT RAISE(ABORT, 'no such car'); END;",
    );
    let mut writer = mart.writer("cars").await;
    let log = Log::default();
    let rows: [&[u8]; 18] = [
        br#"{"id":1,"make":"Honda"}"#,
        br#"{"id":"one","make":"Honda"}"#,
        br#"{"id":2,"make":null}"#,
        br#"{"id":3}"#,
        br#"{"id":1,"make":"Fiat"}"#,
        br#"{"id":4,"make":"Honda","doors":9}"#,
        br#"{"id":5,"make":"a\u0000b"}"#,
        br#"{"id":6,"make":"Honda","colour":"red"}"#,
        br#"{"id":7,"make":"Honda","price":0.123456789012345678901}"#,
        br#"{"id":8,"make":"Honda","built":"2013-02-30"}"#,
        br#"{"id":9,"make":"Honda","twice":18}"#,
        br#"{"id":99,"make":"Honda"}"#,
        br#"{"id":10,"make":"Honda","id":10}"#,
        b"",
        b"\xff",
        br#"{}"#,
        br#"{"id":9223372036854775808,"make":"Honda"}"#,
        br#"{"id":11,"make":"Honda","doors":4,"price":9.99,"built":"2013-02-28"}"#,
    ];
    let committed = writer.commit(&commit(0, &rows), &log).await.expect("committed");
    assert_eq!((committed.rows_written, committed.rows_refused), (2, 16));
    log.expect(&[
        (1, r#"column "id" of type bigint does not take "one""#),
        (2, "NOT NULL"),
        (3, "NOT NULL"),
        (4, "UNIQUE"),
        (5, "CHECK"),
        (6, "U+0000"),
        (7, r#"no column "colour" in table"#),
        (8, "would round"),
        (9, "expected a date"),
        (10, "generates the column itself"),
        (11, "no such car"),
        (12, r#"the key "id" twice"#),
        (13, "empty"),
        (14, "not valid UTF-8"),
        (15, "has no column"),
        (16, "out of range"),
    ]);
    assert_eq!(mart.one("SELECT group_concat(id, ' ') FROM cars"), "1 11");
    assert_eq!(mart.one("SELECT count(*) FROM shardmill_position WHERE sequence IS NULL"), "0");
}

#[tokio::test]
async fn refusals_that_cannot_be_recorded_stop_the_commit() {
    let mart = Mart::new();
    mart.sql("CREATE TABLE cars (id bigint)");
    let mut writer = mart.writer("cars").await;
    let (full, log) = (Log::full(), Log::default());
    let rows = commit(0, &[r#"{"id":1}"#, r#"{"id":"x"}"#]);
    let error = writer.commit(&rows, &full).await.expect_err("full");
    assert!(error.to_string().contains("the log is full"), "{error}");
    assert_eq!(mart.one("SELECT count(*) FROM cars"), "0");
    // The failed commit left no lock on the file.
    mart.sql("BEGIN IMMEDIATE; ROLLBACK");
    writer.commit(&rows, &log).await.expect("committed");
    log.expect(&[(1, "does not take")]);
    assert_eq!(mart.one("SELECT count(*) FROM cars"), "1");
}

#[tokio::test]
async fn a_dropped_column_or_table_blocks_until_it_is_back() {
    let mart = Mart::new();
    let sink = mart.sink("cars");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared");
    let mut writer = acquire(&sink).await.writer;
    let log = Log::default();
    let row = r#"{"id":1,"make":"Honda"}"#;
    writer.commit(&commit(0, &[row]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars DROP COLUMN make");
    for _ in 0..2 {
        let outcome = writer.commit(&commit(1, &[row]), &log).await;
        expect_unavailable(outcome, "column \"make\" is gone from table");
    }
    mart.sql("ALTER TABLE cars ADD COLUMN make text; ALTER TABLE cars ADD COLUMN doors int");
    writer.commit(&commit(1, &[row, r#"{"id":2,"doors":4}"#]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars RENAME TO gone");
    expect_unavailable(writer.commit(&commit(3, &[row]), &log).await, "is gone: create it again");
    mart.sql("ALTER TABLE gone RENAME TO cars");
    writer.commit(&commit(3, &[row]), &log).await.expect("committed");
    log.expect(&[]);
    assert_eq!(mart.one("SELECT count(*) || ' ' || sum(doors) FROM cars"), "4 4");
}

#[tokio::test]
async fn values_are_exact() {
    let mart = Mart::new();
    // Declared type, JSON value, SQLite's storage class and text.
    let cases = [
        ("boolean", "true", "integer 1"),
        ("bigint", "9223372036854775807", "integer 9223372036854775807"),
        ("bigint", "\"-9223372036854775808\"", "integer -9223372036854775808"),
        ("double precision", "0.25", "real 0.25"),
        ("numeric(10,2)", "12.50", "real 12.5"),
        ("numeric", "1e3", "integer 1000"),
        ("text", "123456789012345678901234567890.5", "text 123456789012345678901234567890.5"),
        ("varchar(10)", "\"\\u00e9\"", "text é"),
        ("jsonb", "{\"a\": 1.10}", "text {\"a\": 1.10}"),
        ("json", "0.12345678901234567890", "text 0.12345678901234567890"),
        (
            "uuid",
            "\"6BA7B810-9dad-11d1-80b4-00c04fd430c8\"",
            "text 6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        ),
        ("date", "\"2013-01-31\"", "text 2013-01-31"),
        ("timestamp", "\"2013-01-31 05:00:00.123456\"", "text 2013-01-31 05:00:00.123456"),
        ("timestamptz", "\"2013-01-31T05:00:00-05:00\"", "text 2013-01-31T05:00:00-05:00"),
        ("bytea", "\"QUI=\"", "blob AB"),
        ("text", "null", "null"),
    ];
    let columns: Vec<String> =
        cases.iter().enumerate().map(|(n, (kind, ..))| format!("c{n} {kind}?")).collect();
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let sink = mart.sink("exact");
    sink.prepare(&[route(&columns)]).await.expect("created");
    sink.prepare(&[route(&columns)]).await.expect("it fits what was created");
    let fields: Vec<String> =
        cases.iter().enumerate().map(|(n, (_, json, _))| format!("\"c{n}\":{json}")).collect();
    let log = Log::default();
    let mut writer = acquire(&sink).await.writer;
    writer
        .commit(&commit(0, &[format!("{{{}}}", fields.join(","))]), &log)
        .await
        .expect("committed");
    log.expect(&[]);
    for (n, (kind, json, expected)) in cases.iter().enumerate() {
        let shown =
            format!("SELECT typeof(c{n}) || coalesce(' ' || CAST(c{n} AS TEXT), '') FROM exact");
        assert_eq!(mart.one(&shown), *expected, "{kind} {json}");
    }
}

#[tokio::test]
async fn routes_are_checked_against_the_live_table() {
    let mart = Mart::new();
    mart.sql("CREATE TABLE cars (id int, twice AS (id * 2) STORED)");
    let sink = mart.sink("cars");
    sink.prepare(&[route(&["id integer"])]).await.expect("it fits");
    for (columns, part) in [
        (&["id text"][..], "is text in route \"cars\" and INT in table cars"),
        (&["make text"], "with columns id, twice"),
        (&["twice integer"], "generates itself"),
        (&["id int); DROP TABLE cars; --"], "invalid type"),
        (&["id int primary key"], "invalid type"),
    ] {
        expect_unavailable(sink.prepare(&[route(columns)]).await, part);
    }
    expect_unavailable(
        mart.sink("missing").prepare(&[route(&[])]).await,
        "no route declares columns",
    );
    // A missing folder is created. A file in its place is an error.
    let path = mart.folder.path().join("mart.db").join("mart.db");
    let elsewhere =
        SqliteSink::new("mart".into(), path, "cars", true, WriteMode::Append).expect("a sink");
    expect_unavailable(elsewhere.prepare(&[]).await, "cannot create folder");
}

#[tokio::test]
async fn names_are_quoted_and_hit_nothing_else() {
    let mart = Mart::new();
    mart.sql("CREATE TABLE cars (id int)");
    let sink = mart.sink("a\"; DROP TABLE cars; --");
    sink.prepare(&[route(&["we\"ird; int"])]).await.expect("created");
    let mut writer = acquire(&sink).await.writer;
    writer.commit(&commit(0, &[r#"{"we\"ird;":5}"#]), &Log::default()).await.expect("committed");
    assert_eq!(mart.one("SELECT \"we\"\"ird;\" FROM \"a\"\"; DROP TABLE cars; --\""), "5");
    assert_eq!(mart.one("SELECT count(*) FROM cars"), "0");
}
