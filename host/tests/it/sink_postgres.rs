//! The PostgreSQL sink against a real server, through the contract of all sinks.
//!
//! `cargo xtask test` starts a throw-away server and names it in `SHARDMILL_TEST_POSTGRES`. Each test has a schema of
//! its own.

use std::sync::Arc;

use crate::sql_sinks::keyed;
use crate::sql_sinks::proxy::{Cut, Proxy};
use crate::sql_sinks::{Log, assert_fences, commit, expect_unavailable, position, route, shard};
use shardmill_config::WriteMode;
use shardmill_core::sink::{Acquired, Sink, SinkWriter};
use shardmill_sink_postgres::{CONNECTIONS_MAX, PostgresSink, PostgresTarget};
use tokio_postgres::{Client, NoTls};

/// Returns the URL of the throw-away server.
pub fn url() -> String {
    std::env::var("SHARDMILL_TEST_POSTGRES").expect(
        "SHARDMILL_TEST_POSTGRES is to name a PostgreSQL, postgres://user@host:port/database: \
         run `cargo xtask test`, which starts one",
    )
}

/// Returns the server's `host:port`.
pub fn address() -> String {
    let url = url::Url::parse(&url()).expect("a URL");
    format!("{}:{}", url.host_str().expect("a host"), url.port().unwrap_or(5432))
}

/// Makes a target with these parts.
pub fn target(
    url: &str,
    table: &str,
    create: bool,
    mode: WriteMode,
    connections_max: usize,
) -> PostgresTarget {
    let (url, table) = (url.into(), table.into());
    PostgresTarget { url, table, create, mode, connections_max, lineage: false, written_for: None }
}

/// A schema of the test's own, and a connection to look at it.
pub struct Mart {
    pub client: Client,
    pub schema: String,
}

impl Mart {
    /// Makes a new schema.
    pub async fn new(test: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(&url(), NoTls).await.expect("a server");
        tokio::spawn(connection);
        let schema = format!("sink_{test}");
        let create = format!(
            "SET client_min_messages = warning; DROP SCHEMA IF EXISTS {schema} CASCADE; \
             CREATE SCHEMA {schema}; SET search_path = {schema}; SET TimeZone = 'UTC'"
        );
        client.batch_execute(&create).await.expect("a schema");
        Self { client, schema }
    }

    /// Runs statements.
    pub async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.expect(sql);
    }

    /// Returns the one value of a query, as text; `NULL` for null.
    pub async fn one(&self, query: &str) -> String {
        let row =
            self.client.query_one(&format!("SELECT ({query})::text"), &[]).await.expect(query);
        row.get::<_, Option<String>>(0).unwrap_or_else(|| "NULL".into())
    }

    /// Makes a sink that appends.
    pub fn sink(&self, table: &str) -> PostgresSink {
        let table = format!("{}.{table}", self.schema);
        PostgresSink::new(
            "mart".into(),
            &target(&url(), &table, true, WriteMode::Append, CONNECTIONS_MAX),
        )
        .expect("a sink")
    }

    /// Makes a writer for the only shard of an existing table.
    pub async fn writer(&self, table: &str) -> Box<dyn SinkWriter> {
        let sink = self.sink(table);
        sink.prepare(&[route(&[])]).await.expect("prepared");
        acquire(&sink).await.writer
    }
}

impl Mart {
    /// Makes a sink that appends through a proxy.
    pub fn sink_through(&self, proxy: &Proxy, table: &str) -> PostgresSink {
        let url = url().replace(&address(), &format!("127.0.0.1:{}", proxy.port));
        let table = format!("{}.{table}", self.schema);
        PostgresSink::new(
            "mart".into(),
            &target(&url, &table, false, WriteMode::Append, CONNECTIONS_MAX),
        )
        .expect("a sink")
    }

    /// Makes a sink with a write mode.
    pub fn keyed(&self, table: &str, mode: WriteMode, create: bool) -> PostgresSink {
        let table = format!("{}.{table}", self.schema);
        PostgresSink::new("mart".into(), &target(&url(), &table, create, mode, CONNECTIONS_MAX))
            .expect("a sink")
    }
}

/// Acquires the only shard.
pub async fn acquire(sink: &PostgresSink) -> Acquired {
    sink.acquire(&shard("shardId-000000000000")).await.expect("acquired")
}

#[tokio::test]
async fn a_commit_lands_once_however_often_it_is_tried() {
    let mart = Mart::new("once").await;
    let sink = mart.sink("cars");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared again");
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
        mart.one("SELECT string_agg(id || coalesce(make, '-'), ' ' ORDER BY id) FROM cars").await,
        "1Honda 2- 3-"
    );
    let place = sink.position(&shard("shardId-000000000000")).await.expect("a position");
    assert_eq!(place, Some(position(4)));
    assert_eq!(mart.one("SELECT length(sequence::text) FROM shardmill_position").await, "129");
    assert_eq!(sink.position(&shard("another")).await.expect("none"), None);
    log.expect(&[]);
}

#[tokio::test]
async fn a_repeated_commit_does_not_collide_with_its_own_rows() {
    let mart = Mart::new("collide").await;
    mart.sql("CREATE TABLE cars (id bigint PRIMARY KEY)").await;
    let mut writer = mart.writer("cars").await;
    let (log, first) = (Log::default(), commit(0, &[r#"{"id":1}"#, r#"{"id":2}"#]));
    writer.commit(&first, &log).await.expect("committed");
    writer.commit(&first, &log).await.expect("answered");
    log.expect(&[]);
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "2");
}

#[tokio::test]
async fn an_earlier_owner_cannot_commit() {
    let mart = Mart::new("fence").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let sink = mart.sink("cars");
    assert_fences(&sink, &sink).await;
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test]
async fn shards_are_acquired_at_once() {
    let mart = Mart::new("race").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let sink = Arc::new(mart.sink("cars"));
    let acquiring = (0..16).map(|n| {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move { sink.acquire(&shard(&format!("shard-{n}"))).await.is_ok() })
    });
    for acquired in futures::future::join_all(acquiring).await {
        assert!(acquired.expect("no panic"));
    }
    assert_eq!(mart.one("SELECT count(*) FROM shardmill_position").await, "16");
}

/// Returns the number of connections to this database with this application name.
async fn connections(mart: &Mart, name: &str) -> u64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE application_name";
    mart.one(&format!("{count} = '{name}'")).await.parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_share_the_connections_that_there_are() {
    let mart = Mart::new("pool").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let (url, table) = (format!("{}?application_name=pool", url()), "sink_pool.cars");
    let sink = PostgresSink::new("mart".into(), &target(&url, table, false, WriteMode::Append, 2));
    let sink = Arc::new(sink.expect("a sink"));
    let committing = (0..12_u64).map(|n| {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move {
            let shard = shard(&format!("shard-{n}"));
            let mut writer = sink.acquire(&shard).await.expect("acquired").writer;
            for from in 0..10 {
                let rows = [format!(r#"{{"id":{}}}"#, n * 100 + from)];
                writer.commit(&commit(from, &rows), &Log::default()).await.expect("committed");
            }
            writer
        })
    });
    let writers = futures::future::join_all(committing).await;
    assert_eq!(connections(&mart, "pool").await, 2, "for {} shards", writers.len());
    assert_eq!(mart.one("SELECT count(DISTINCT id) FROM cars").await, "120");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "120");
}

#[tokio::test]
async fn a_commit_that_is_dropped_half_way_holds_no_lock() {
    let mart = Mart::new("halfway").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let sink = mart.sink("cars");
    let mut writer = mart.writer("cars").await;
    mart.sql("BEGIN; LOCK TABLE cars").await;
    let (log, first) = (Log::default(), commit(0, &[r#"{"id":1}"#]));
    let soon = std::time::Duration::from_millis(300);
    let stuck = tokio::time::timeout(soon, writer.commit(&first, &log)).await;
    assert!(stuck.is_err(), "the table is locked");
    // The first commit still waits for the lock and has moved the position; acquiring the shard needs the same row.
    mart.sql("COMMIT").await;
    let mut owner = tokio::time::timeout(std::time::Duration::from_secs(20), acquire(&sink))
        .await
        .expect("no lock is left")
        .writer;
    owner.commit(&first, &log).await.expect("committed");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "1");
}

#[tokio::test]
async fn bad_rows_are_refused_alone() {
    let mart = Mart::new("refused").await;
    mart.sql(
        "CREATE TABLE cars (id bigint PRIMARY KEY, make varchar(10) NOT NULL, doors smallint,
             price numeric(6, 2), built date, twice bigint GENERATED ALWAYS AS (id * 2) STORED,
             CHECK (doors < 9))",
    )
    .await;
    let mut writer = mart.writer("cars").await;
    let log = Log::default();
    let rows: [&[u8]; 20] = [
        br#"{"id":1,"make":"Honda"}"#,
        br#"{"id":"one","make":"Honda"}"#,
        br#"{"id":2,"make":null}"#,
        br#"{"id":3}"#,
        br#"{"id":1,"make":"Fiat"}"#,
        br#"{"id":4,"make":"Honda","doors":40000}"#,
        br#"{"id":5,"make":"a\u0000b"}"#,
        br#"{"id":6,"make":"Honda","colour":"red"}"#,
        br#"{"id":7,"make":"much too long for it"}"#,
        br#"{"id":8,"make":"Honda","doors":9}"#,
        br#"{"id":9,"make":"Honda","price":12345.67}"#,
        br#"{"id":10,"make":"Honda","built":"2013-02-30"}"#,
        br#"{"id":11,"make":"Honda","twice":22}"#,
        br#"{"id":12,"make":"Honda","id":12}"#,
        br#"[1]"#,
        b"",
        b"\xff\xfe\x00",
        br#"{}"#,
        br#"{"id":9223372036854775808,"make":"Honda"}"#,
        br#"{"id":13,"make":"Honda","doors":4,"price":9.99,"built":"2013-02-28"}"#,
    ];
    let committed = writer.commit(&commit(0, &rows), &log).await.expect("committed");
    assert_eq!((committed.rows_written, committed.rows_refused), (2, 18));
    log.expect(&[
        (1, r#"column "id" of type bigint does not take "one""#),
        (2, "23502"),
        (3, "23502"),
        (4, "23505"),
        (5, "out of range"),
        (6, "U+0000"),
        (7, r#"no column "colour" in table"#),
        (8, "22001"),
        (9, "23514"),
        (10, "22003"),
        (11, "expected a date"),
        (12, "generates the column itself"),
        (13, r#"the key "id" twice"#),
        (14, "a JSON object"),
        (15, "empty"),
        (16, "not valid UTF-8"),
        (17, "names no column"),
        (18, "out of range"),
    ]);
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 13");
}

#[tokio::test]
async fn many_refused_rows_among_many_are_found() {
    let mart = Mart::new("many").await;
    mart.sql(
        "CREATE TABLE makes (make text PRIMARY KEY);
         INSERT INTO makes VALUES ('Honda');
         CREATE TABLE cars (id bigint PRIMARY KEY CHECK (id % 100 <> 17),
             make text REFERENCES makes DEFERRABLE INITIALLY DEFERRED);
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'no car % here', NEW.id; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON cars FOR EACH ROW
             WHEN (NEW.id % 250 = 3) EXECUTE FUNCTION refuse();",
    )
    .await;
    let mut writer = mart.writer("cars").await;
    let log = Log::default();
    let make = |id: usize| if id % 300 == 5 { "Unknown" } else { "Honda" };
    let rows: Vec<String> =
        (0..1000).map(|id| format!(r#"{{"id":{id},"make":"{}"}}"#, make(id))).collect();
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    let recorded = log.take();
    let refused: Vec<usize> = recorded.iter().map(|(row, _)| *row).collect();
    let culprit = |id: &usize| id % 100 == 17 || id % 250 == 3 || id % 300 == 5;
    assert_eq!(refused, (0..1000).filter(culprit).collect::<Vec<_>>());
    for (row, reason) in recorded {
        let state = if row % 100 == 17 {
            "23514"
        } else if row % 250 == 3 {
            "P0001"
        } else {
            "23503"
        };
        assert!(reason.contains(state), "{row}: {reason}");
    }
    let (refused, written) = (refused.len(), mart.one("SELECT count(*) FROM cars").await);
    assert_eq!(written, (1000 - refused).to_string());
}

/// Makes hexadecimal digits that the server cannot compress enough for an index page.
fn incompressible(length: usize) -> String {
    let mut state = 1_u64;
    let digit = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'a' + u8::try_from(state >> 60).expect("four bits"))
    };
    std::iter::repeat_with(digit).take(length).collect()
}

#[tokio::test]
async fn a_row_too_large_for_its_index_is_refused_alone() {
    let mart = Mart::new("large").await;
    mart.sql("CREATE TABLE cars (id bigint, note text); CREATE INDEX ON cars (note)").await;
    let mut writer = mart.writer("cars").await;
    let log = Log::default();
    let noise = incompressible(20_000);
    let rows = [r#"{"id":1}"#.to_owned(), format!(r#"{{"id":2,"note":"{noise}"}}"#)];
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[(1, "54000")]);
    let nested = format!(r#"{{"note":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    mart.sql("ALTER TABLE cars ALTER note TYPE jsonb USING NULL").await;
    writer.commit(&commit(2, &[nested.as_str(), r#"{"id":3}"#]), &log).await.expect("committed");
    log.expect(&[(0, "nested")]);
}

#[tokio::test]
async fn refusals_that_cannot_be_recorded_stop_the_commit() {
    let mart = Mart::new("full").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let mut writer = mart.writer("cars").await;
    let (full, log) = (Log::full(), Log::default());
    let rows = commit(0, &[r#"{"id":1}"#, r#"{"id":"x"}"#]);
    let error = writer.commit(&rows, &full).await.expect_err("full");
    assert!(error.to_string().contains("the log is full"), "{error}");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "0");
    writer.commit(&rows, &log).await.expect("committed");
    log.expect(&[(1, "does not take")]);
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "1");
}

#[tokio::test]
async fn a_dropped_column_or_table_blocks_until_it_is_back() {
    let mart = Mart::new("dropped").await;
    let sink = mart.sink("cars");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared");
    let mut writer = acquire(&sink).await.writer;
    let log = Log::default();
    let row = r#"{"id":1,"make":"Honda"}"#;
    writer.commit(&commit(0, &[row]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars DROP COLUMN make").await;
    expect_unavailable(writer.commit(&commit(1, &[row]), &log).await, "\"make\"");
    expect_unavailable(
        writer.commit(&commit(1, &[row]), &log).await,
        "column \"make\" is gone from table",
    );
    mart.sql("ALTER TABLE cars ADD COLUMN make text, ADD COLUMN doors int").await;
    writer.commit(&commit(1, &[row, r#"{"id":2,"doors":4}"#]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars RENAME TO gone").await;
    expect_unavailable(writer.commit(&commit(3, &[row]), &log).await, "cars");
    expect_unavailable(writer.commit(&commit(3, &[row]), &log).await, "is gone: create it again");
    mart.sql("ALTER TABLE gone RENAME TO cars").await;
    writer.commit(&commit(3, &[row]), &log).await.expect("committed");
    log.expect(&[]);
    assert_eq!(mart.one("SELECT count(*) || ' ' || sum(doors) FROM cars").await, "4 4");
}

#[tokio::test]
async fn a_statement_trigger_that_raises_leaves_no_answer_out_of_step() {
    let mart = Mart::new("statement").await;
    mart.sql(
        "CREATE TABLE cars (id bigint);
         CREATE TABLE closed (at int);
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN IF EXISTS (SELECT FROM sink_statement.closed) THEN RAISE EXCEPTION 'closed'; END IF;
                RETURN NULL; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON cars EXECUTE FUNCTION refuse();",
    )
    .await;
    let mut writer = mart.writer("cars").await;
    let log = Log::default();
    writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await.expect("committed");
    mart.sql("INSERT INTO closed VALUES (1)").await;
    let rows = [r#"{"id":2}"#, r#"{"id":3}"#];
    writer.commit(&commit(1, &rows), &log).await.expect("committed");
    log.expect(&[(0, "P0001"), (1, "P0001")]);
    mart.sql("DELETE FROM closed").await;
    writer.commit(&commit(3, &[r#"{"id":4}"#]), &log).await.expect("committed");
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 4");
}

#[tokio::test]
async fn a_table_that_may_not_be_written_blocks() {
    let mart = Mart::new("rights").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    mart.sql("CREATE VIEW seen AS SELECT id FROM cars GROUP BY id").await;
    expect_unavailable(mart.sink("seen").prepare(&[route(&[])]).await, "is a view");
    let mut writer = acquire(&mart.sink("seen")).await.writer;
    let log = Log::default();
    for _ in 0..3 {
        let outcome = writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await;
        expect_unavailable(outcome, "cannot write to table sink_rights.seen");
    }
    mart.sql("DROP VIEW seen; CREATE TABLE seen (id bigint)").await;
    writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await.expect("committed");
    assert_eq!(mart.one("SELECT count(*) FROM seen").await, "1");
}

#[tokio::test]
async fn an_altered_type_misreads_nothing() {
    let mart = Mart::new("altered").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let mut writer = mart.writer("cars").await;
    let log = Log::default();
    writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await.expect("committed");
    // Both types have eight bytes, so the server could take one for the other.
    mart.sql("ALTER TABLE cars ALTER id TYPE double precision").await;
    writer.commit(&commit(1, &[r#"{"id":2}"#]), &log).await.expect("committed");
    // With another length the server refuses the bytes. The rows are not to blame for that either.
    mart.sql("ALTER TABLE cars ALTER id TYPE smallint").await;
    writer.commit(&commit(2, &[r#"{"id":3}"#]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars ALTER id TYPE numeric").await;
    writer.commit(&commit(3, &[r#"{"id":4.5}"#]), &log).await.expect("committed");
    log.expect(&[]);
    let ids = mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await;
    assert_eq!(ids, "1 2 3 4.5");
}

#[tokio::test]
async fn a_lost_connection_is_made_anew() {
    let mart = Mart::new("lost").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let proxy = Proxy::start(address()).await;
    let mut writer = acquire(&mart.sink_through(&proxy, "cars")).await.writer;
    let log = Log::default();
    writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await.expect("committed");
    for word in ["BEGIN", "SAVEPOINT", "PGCOPY"] {
        proxy.cut(Cut::Before(word));
        let outcome = writer.commit(&commit(1, &[r#"{"id":2}"#]), &log).await;
        expect_unavailable(outcome, "sink_lost.cars");
        assert!(proxy.has_cut(), "{word} was not sent");
    }
    writer.commit(&commit(1, &[r#"{"id":2}"#]), &log).await.expect("committed");
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test]
async fn a_commit_whose_reply_is_lost_is_resolved_by_the_position() {
    let mart = Mart::new("reply").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let proxy = Proxy::start(address()).await;
    let mut writer = acquire(&mart.sink_through(&proxy, "cars")).await.writer;
    let log = Log::default();
    let rows = commit(0, &[r#"{"id":1}"#, r#"{"id":"x"}"#]);

    proxy.cut(Cut::Before("COMMIT\0"));
    expect_unavailable(writer.commit(&rows, &log).await, "the commit did not land");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "0");

    proxy.cut(Cut::After("COMMIT\0"));
    let committed = writer.commit(&rows, &log).await.expect("it took effect");
    assert_eq!((committed.rows_written, committed.rows_refused), (1, 1));
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "1");

    // The server is also unreachable when the sink asks for the outcome: the next attempt of the same commit asks
    // again.
    let rows = commit(2, &[r#"{"id":2}"#, r#"{"id":"x"}"#]);
    proxy.cut(Cut::AfterAndRefuse("COMMIT\0"));
    expect_unavailable(writer.commit(&rows, &log).await, "cannot connect");
    proxy.accept();
    let committed = writer.commit(&rows, &log).await.expect("it took effect");
    assert_eq!((committed.rows_written, committed.rows_refused), (1, 1));
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test]
async fn values_are_exact() {
    let mart = Mart::new("exact").await;
    mart.sql("CREATE TYPE colour AS ENUM ('red', 'blue'); CREATE DOMAIN positive AS bigint CHECK (VALUE > 0)").await;
    let digits = "123456789012345678901234567890.123456789012345678901234567890";
    // Column type, JSON value, text in the table.
    let cases: Vec<(&str, String, &str)> = vec![
        ("bool", "true".into(), "true"),
        ("int2", "-32768".into(), "-32768"),
        ("int4", "2147483647".into(), "2147483647"),
        ("int8", "9223372036854775807".into(), "9223372036854775807"),
        ("int8", "\"-9223372036854775808\"".into(), "-9223372036854775808"),
        ("int8", "1.5e1".into(), "15"),
        ("positive", "7".into(), "7"),
        ("float4", "0.1".into(), "0.1"),
        ("float8", "0.30000000000000004".into(), "0.30000000000000004"),
        ("float8", "\"-Infinity\"".into(), "-Infinity"),
        ("numeric", digits.into(), digits),
        (
            "numeric",
            format!("\"-{digits}\""),
            "-123456789012345678901234567890.123456789012345678901234567890",
        ),
        ("numeric", "1.5e20".into(), "150000000000000000000"),
        ("numeric", "1.50E-7".into(), "0.000000150"),
        ("numeric", "0.00".into(), "0.00"),
        ("numeric", "100000000".into(), "100000000"),
        ("numeric", "\"NaN\"".into(), "NaN"),
        ("numeric(8, 2)", "12.345".into(), "12.35"),
        ("text", r#""é \"quoted\" \ud83d\ude97""#.into(), "é \"quoted\" 🚗"),
        ("text", "1.50".into(), "1.50"),
        ("char(5)", "\"ab\"".into(), "ab"),
        ("name", "\"ab\"".into(), "ab"),
        ("colour", "\"blue\"".into(), "blue"),
        ("json", r#"{"b":1.10, "a":[]}"#.into(), r#"{"b":1.10, "a":[]}"#),
        (
            "jsonb",
            r#"{"b":1.10, "a":[9223372036854775808]}"#.into(),
            r#"{"a": [9223372036854775808], "b": 1.10}"#,
        ),
        ("jsonb", "\"text\"".into(), "\"text\""),
        (
            "uuid",
            "\"6BA7B810-9dad-11d1-80b4-00c04fd430c8\"".into(),
            "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        ),
        ("date", "\"2013-01-31\"".into(), "2013-01-31"),
        ("date", "\"0001-01-01\"".into(), "0001-01-01"),
        ("time", "\"23:59:59.999999\"".into(), "23:59:59.999999"),
        ("timestamp", "\"2013-01-31 05:00:00.123456\"".into(), "2013-01-31 05:00:00.123456"),
        (
            "timestamptz",
            "\"2013-01-31T05:00:00.000001-05:00\"".into(),
            "2013-01-31 10:00:00.000001+00",
        ),
        ("timestamptz", "\"1999-12-31 23:59:59.999999\"".into(), "1999-12-31 23:59:59.999999+00"),
        ("timestamptz", "\"9999-12-31T23:59:59.999999Z\"".into(), "9999-12-31 23:59:59.999999+00"),
        ("bytea", "\"AP8=\"".into(), "\\x00ff"),
        ("bytea", "\"\\\\xC0de\"".into(), "\\xc0de"),
        ("bytea", "\"\"".into(), "\\x"),
        ("text", "null".into(), "NULL"),
        ("jsonb", "null".into(), "NULL"),
    ];
    let columns: Vec<String> =
        cases.iter().enumerate().map(|(n, (kind, ..))| format!("c{n} {kind}")).collect();
    mart.sql(&format!("CREATE TABLE exact ({})", columns.join(", "))).await;
    let fields: Vec<String> =
        cases.iter().enumerate().map(|(n, (_, json, _))| format!("\"c{n}\":{json}")).collect();
    let mut writer = mart.writer("exact").await;
    let log = Log::default();
    let row = format!("{{{}}}", fields.join(","));
    writer.commit(&commit(0, &[row]), &log).await.expect("committed");
    log.expect(&[]);
    for (n, (kind, json, text)) in cases.iter().enumerate() {
        assert_eq!(mart.one(&format!("SELECT c{n} FROM exact")).await, *text, "{kind} {json}");
    }
}

#[tokio::test]
async fn numerics_are_what_the_server_reads() {
    let mart = Mart::new("numerics").await;
    mart.sql("CREATE TABLE numbers (id int, exact numeric, written text)").await;
    let mut texts = Vec::new();
    for whole in ["0", "7", "9999", "10000", "10001", "123450000", "99999999999999999999"] {
        for fraction in ["", ".0", ".5", ".0001", ".00001", ".12345678901234567890", ".1000000"] {
            for exponent in ["", "e0", "e1", "E-3", "e+17", "e-40", "e300"] {
                texts.push(format!("{whole}{fraction}{exponent}"));
                texts.push(format!("-{whole}{fraction}{exponent}"));
            }
        }
    }
    let row = |(id, text): (usize, &String)| {
        format!(r#"{{"id":{id},"exact":{text},"written":"{text}"}}"#)
    };
    let rows: Vec<String> = texts.iter().enumerate().map(row).collect();
    let mut writer = mart.writer("numbers").await;
    let log = Log::default();
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[]);
    let different = "SELECT count(*) FROM numbers WHERE exact::text <> (written::numeric)::text";
    assert_eq!(mart.one(different).await, "0");
    assert_eq!(mart.one("SELECT count(*) FROM numbers").await, texts.len().to_string());
}

/// Raises the error that the server gives for a full disk (53100, `disk_full`): no row is to blame.
#[tokio::test]
async fn a_full_disk_is_waited_for() {
    let mart = Mart::new("disk").await;
    mart.sql(
        "CREATE TABLE cars (id bigint);
         CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device'
                USING ERRCODE = 'disk_full'; END $$;
         CREATE TRIGGER full_disk BEFORE INSERT ON cars FOR EACH ROW WHEN (NEW.id = 700)
             EXECUTE FUNCTION full_disk();",
    )
    .await;
    let mut writer = mart.writer("cars").await;
    let rows: Vec<String> = (0..1_000).map(|id| format!(r#"{{"id":{id}}}"#)).collect();
    let (log, commit) = (Log::default(), commit(0, &rows));
    for _ in 0..3 {
        expect_unavailable(writer.commit(&commit, &log).await, "53100");
        assert_eq!(mart.one("SELECT count(*) FROM cars").await, "0");
    }
    mart.sql("DROP TRIGGER full_disk ON cars").await;
    writer.commit(&commit, &log).await.expect("committed");
    log.expect(&[]);
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "1000");
}

#[tokio::test]
async fn a_gigabyte_in_one_commit_is_written_once() {
    const ROWS: usize = 64;
    const MAKE_BYTES: usize = 16 << 20;
    let mart = Mart::new("gigabyte").await;
    mart.sql(
        "CREATE TABLE cars (make text NOT NULL CHECK (length(make) > 9));
         ALTER TABLE cars ALTER make SET STORAGE EXTERNAL",
    )
    .await;
    let mut writer = mart.writer("cars").await;
    let mut commit = commit(0, &[""; ROWS]);
    let large = bytes::Bytes::from(format!(r#"{{"make":"{}"}}"#, "x".repeat(MAKE_BYTES)));
    for row in Arc::get_mut(&mut commit.rows).expect("the only owner") {
        row.payload = large.clone();
    }
    Arc::get_mut(&mut commit.rows).expect("the only owner")[40].payload =
        r#"{"make":"short"}"#.into();
    let log = Log::default();
    let committed = writer.commit(&commit, &log).await.expect("committed");
    assert_eq!((committed.rows_written, committed.rows_refused), (ROWS as u64 - 1, 1));
    writer.commit(&commit, &log).await.expect("answered");
    log.expect(&[(40, "23514")]);
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, (ROWS - 1).to_string());
    let bytes = mart.one("SELECT sum(length(make)) FROM cars").await;
    assert_eq!(bytes, ((ROWS - 1) * MAKE_BYTES).to_string());
    mart.sql("DROP TABLE cars").await;
}

#[tokio::test]
async fn arrays_are_of_enums_and_domains_as_well() {
    let mart = Mart::new("element").await;
    mart.sql(
        "CREATE TYPE colour AS ENUM ('red', 'blue');
         CREATE DOMAIN positive AS bigint CHECK (VALUE > 0);
         CREATE DOMAIN shade AS colour CHECK (VALUE <> 'red');
         CREATE TABLE cars (id int, colours colour[], counts positive[], shades shade[], spans inet[])",
    )
    .await;
    let sink = mart.sink("cars");
    let declared = ["id int", "colours sink_element.colour[]", "counts sink_element.positive[]"];
    sink.prepare(&[route(&declared)]).await.expect("prepared");
    expect_unavailable(sink.prepare(&[route(&["spans inet[]"])]).await, "unsupported column type");
    expect_unavailable(sink.prepare(&[route(&["counts text[]"])]).await, "not every value");
    let mut writer = acquire(&sink).await.writer;
    let rows = [
        r#"{"id":0,"colours":[["red"],["blue"]],"counts":[1,null],"shades":["blue"]}"#,
        r#"{"id":1,"colours":["green"]}"#,
        r#"{"id":2,"counts":[0]}"#,
        r#"{"id":3,"shades":["red"]}"#,
        r#"{"id":4,"spans":["10.0.0.1"]}"#,
        r#"{"id":5,"colours":[],"shades":null}"#,
    ];
    let log = Log::default();
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[(1, "22P02"), (2, "23514"), (3, "23514"), (4, "unsupported column type")]);
    let shown =
        "SELECT string_agg(concat_ws(' ', id, colours, counts, shades), ';' ORDER BY id) FROM cars";
    assert_eq!(mart.one(shown).await, "0 {{red},{blue}} {1,NULL} {blue};5 {}");
}

#[tokio::test]
async fn rows_say_from_which_record_they_came() {
    let mart = Mart::new("lineage").await;
    let mut target = target(&url(), "sink_lineage.cars", true, WriteMode::Append, 1);
    target.lineage = true;
    let sink = PostgresSink::new("mart".into(), &target).expect("a sink");
    sink.prepare(&[route(&["id bigint", "make text?"])]).await.expect("prepared");
    let mut writer = acquire(&sink).await.writer;
    let rows = [r#"{"id":1}"#, r#"{"id":2,"make":"Fiat"}"#, r#"{"id":3,"shardmill_shard":"none"}"#];
    let log = Log::default();
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[(2, "unexpected lineage column")]);
    let shown = "SELECT string_agg(concat_ws(' ', id, make, shardmill_pipeline, shardmill_shard,
        shardmill_sequence % 1000, shardmill_arrived_at), ';' ORDER BY id) FROM cars";
    let expected = "1 cars any 1 1970-01-01 00:00:00+00;2 Fiat cars any 2 1970-01-01 00:00:00+00";
    assert_eq!(mart.one(shown).await, expected);
    mart.sql("ALTER TABLE cars DROP COLUMN shardmill_shard").await;
    let second = commit(3, &[r#"{"id":4}"#]);
    expect_unavailable(writer.commit(&second, &log).await, r#"column "shardmill_shard""#);
    let add = "ADD COLUMN shardmill_shard text";
    expect_unavailable(sink.prepare(&[route(&["id bigint"])]).await, add);
    mart.sql("ALTER TABLE cars ADD COLUMN shardmill_shard text").await;
    writer.commit(&second, &log).await.expect("committed");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "3");
}

#[tokio::test]
async fn keys_that_are_absent_take_the_columns_default() {
    let mart = Mart::new("defaults").await;
    mart.sql("CREATE TABLE cars (id bigint, make text DEFAULT 'none', n serial)").await;
    let mut writer = mart.writer("cars").await;
    let rows =
        [r#"{"id":1}"#, r#"{"make":"Fiat","id":2}"#, r#"{"id":3,"make":null}"#, r#"{"id":4}"#];
    writer.commit(&commit(0, &rows), &Log::default()).await.expect("committed");
    let shown = "SELECT string_agg(id || coalesce(make, 'NULL'), ' ' ORDER BY id) FROM cars";
    assert_eq!(mart.one(shown).await, "1none 2Fiat 3NULL 4none");
}

#[tokio::test]
async fn routes_are_checked_against_the_live_table() {
    let mart = Mart::new("checked").await;
    mart.sql(
        "CREATE TABLE cars (id int, tags inet, twice int GENERATED ALWAYS AS (id * 2) STORED)",
    )
    .await;
    let sink = mart.sink("cars");
    sink.prepare(&[route(&["id integer"])]).await.expect("it fits");
    for (columns, part) in [
        (&["id bigint"][..], "is bigint in route \"cars\" and integer in table sink_checked.cars"),
        (&["make text"], "with columns id, tags, twice"),
        (&["tags inet"], "unsupported column type"),
        (&["twice integer"], "generates itself"),
        (&["id intt"], "not a type of this PostgreSQL"),
        (&["id int); DROP TABLE cars; --"], "not a type of this PostgreSQL"),
    ] {
        expect_unavailable(sink.prepare(&[route(columns)]).await, part);
    }
    let mut other = route(&["id text"]);
    other.name = "other".into();
    expect_unavailable(sink.prepare(&[route(&["id integer"]), other]).await, "disagree on column");
    let mut csv = route(&[]);
    csv.format = "text/csv".into();
    expect_unavailable(sink.prepare(&[csv]).await, "application/json");
    expect_unavailable(
        mart.sink("missing").prepare(&[route(&[])]).await,
        "no route declares columns",
    );
    let never = PostgresSink::new(
        "mart".into(),
        &target(&url(), "missing", false, WriteMode::Append, CONNECTIONS_MAX),
    )
    .expect("a sink");
    expect_unavailable(never.prepare(&[route(&["id int"])]).await, "create = true");
}

#[tokio::test]
async fn rows_with_keys_leave_what_their_mode_says() {
    for (number, mode) in keyed::modes().into_iter().enumerate() {
        for seed in 0..5 {
            let mart = Mart::new(&format!("keyed_{number}")).await;
            mart.sql(keyed::TABLE).await;
            let sink = mart.keyed("cars", mode.clone(), false);
            sink.prepare(&[route(&[])]).await.expect("prepared");
            let mut writer = acquire(&sink).await.writer;
            let shown = async || mart.one(keyed::SHOWN).await;
            keyed::assert_as_the_model(&mode, seed, true, &mut *writer, shown).await;
        }
    }
}

#[tokio::test]
async fn a_key_needs_a_unique_index_and_a_created_table_has_one() {
    let mart = Mart::new("key_index").await;
    mart.sql("CREATE TABLE cars (id int, year int, make text)").await;
    let key = |columns: &[&str]| WriteMode::Upsert {
        key: columns.iter().map(|name| (*name).to_owned()).collect(),
        newest_by: None,
    };
    let routes = [route(&["id int", "year int", "make text?"])];
    let sink = mart.keyed("cars", key(&["id", "year"]), false);
    expect_unavailable(sink.prepare(&routes).await, "CREATE UNIQUE INDEX ON");
    mart.sql("CREATE UNIQUE INDEX ON cars (year, id)").await;
    sink.prepare(&routes).await.expect("it is there");
    let sink = mart.keyed("cars", key(&["id", "wheels"]), false);
    expect_unavailable(sink.prepare(&routes).await, "no column \"wheels\"");

    let sink = mart.keyed("made", key(&["id", "year"]), true);
    sink.prepare(&routes).await.expect("created");
    let mut writer = acquire(&sink).await.writer;
    let rows = [r#"{"id":1,"year":2,"make":"a"}"#, r#"{"id":1,"year":2,"make":"b"}"#];
    writer.commit(&commit(0, &rows), &Log::default()).await.expect("committed");
    assert_eq!(mart.one("SELECT string_agg(make, ' ') FROM made").await, "b");
}

#[tokio::test]
async fn an_upsert_goes_on_when_the_table_is_altered() {
    let mart = Mart::new("keyed_altered").await;
    mart.sql(keyed::TABLE).await;
    let [mode, ..] = keyed::modes();
    let sink = mart.keyed("cars", mode, false);
    sink.prepare(&[route(&[])]).await.expect("prepared");
    let mut writer = acquire(&sink).await.writer;
    let log = Log::default();
    writer.commit(&commit(0, &[r#"{"id":1,"make":"a"}"#]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars ADD COLUMN wheels int").await;
    writer.commit(&commit(1, &[r#"{"id":1,"wheels":3}"#]), &log).await.expect("committed");
    mart.sql("ALTER TABLE cars ALTER COLUMN wheels TYPE text").await;
    writer.commit(&commit(2, &[r#"{"id":1,"wheels":"four"}"#]), &log).await.expect("committed");
    log.expect(&[]);
    assert_eq!(mart.one("SELECT make || wheels FROM cars").await, "afour");
}

/// Lanes that write the same keys in different orders wait for each other; none fails for good.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_that_upsert_the_same_keys_all_get_through() {
    const LANES: u64 = 4;
    let mart = Mart::new("keyed_lanes").await;
    mart.sql(keyed::TABLE).await;
    let [mode, ..] = keyed::modes();
    let sink = Arc::new(mart.keyed("cars", mode, false));
    sink.prepare(&[route(&[])]).await.expect("prepared");
    let lanes = (0..LANES).map(|lane| {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move {
            let taken = sink.acquire(&shard(&format!("shardId-{lane}"))).await.expect("acquired");
            let (mut writer, mut random) = (taken.writer, fastrand::Rng::with_seed(lane));
            for turn in 0..20 {
                let mut ids: Vec<u32> = (0..200).collect();
                random.shuffle(&mut ids);
                let rows = ids.iter().map(|id| format!(r#"{{"id":{id},"cents":{lane}}}"#));
                let commit = commit(turn * 200, &rows.collect::<Vec<_>>());
                // The server ends one of two transactions that wait for each other. A delivery then retries.
                let mut tries = 0;
                while let Err(error) = writer.commit(&commit, &Log::default()).await {
                    assert!(error.to_string().contains("deadlock") && tries < 20, "{error}");
                    tries += 1;
                }
            }
        })
    });
    for lane in lanes.collect::<Vec<_>>() {
        lane.await.expect("no panic");
    }
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "200");
}

#[tokio::test]
async fn names_are_quoted_and_hit_nothing_else() {
    let mart = Mart::new("quoted").await;
    mart.sql("CREATE TABLE cars (id int)").await;
    let table = "\"a\"\"; DROP TABLE cars; --\"";
    let sink = mart.sink(table);
    sink.prepare(&[route(&["we\"ird; int"])]).await.expect("created");
    let mut writer = acquire(&sink).await.writer;
    writer.commit(&commit(0, &[r#"{"we\"ird;":5}"#]), &Log::default()).await.expect("committed");
    assert_eq!(mart.one(&format!("SELECT \"we\"\"ird;\" FROM {table}")).await, "5");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "0");
}

/// The throw-away server has a certificate of its own, for 127.0.0.1 and no other name.
#[tokio::test]
async fn tls_is_spoken_with_a_server_that_proves_who_it_is() {
    let certificate = std::env::var("SHARDMILL_TEST_POSTGRES_CERTIFICATE")
        .expect("SHARDMILL_TEST_POSTGRES_CERTIFICATE names the server's certificate: run `cargo xtask test`");
    let mart = Mart::new("tls").await;
    mart.sql("CREATE TABLE cars (id int)").await;
    let sink = |url: &str| {
        PostgresSink::new(
            "mart".into(),
            &target(url, "sink_tls.cars", false, WriteMode::Append, CONNECTIONS_MAX),
        )
        .expect("a sink")
    };
    for mode in ["require", "verify-full"] {
        let name = format!("tls-{mode}");
        let url =
            format!("{}?sslmode={mode}&sslrootcert={certificate}&application_name={name}", url());
        let sink = sink(&url);
        sink.prepare(&[route(&[])]).await.expect("prepared");
        let mut writer = sink.acquire(&shard(mode)).await.expect("acquired").writer;
        writer.commit(&commit(0, &[r#"{"id":1}"#]), &Log::default()).await.expect("committed");
        let encrypted = format!(
            "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
             WHERE application_name = '{name}'"
        );
        assert_eq!(mart.one(&encrypted).await, "true");
    }
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "2");

    // The certificate has no trusted issuer; or it is for another name.
    let stranger = sink(&format!("{}?sslmode=verify-full", url()));
    expect_unavailable(stranger.prepare(&[route(&[])]).await, "UnknownIssuer");
    let elsewhere = url().replace("127.0.0.1", "localhost");
    let elsewhere = format!("{elsewhere}?sslmode=require&sslrootcert={certificate}");
    expect_unavailable(sink(&elsewhere).prepare(&[route(&[])]).await, "not valid for name");
}

#[tokio::test]
async fn a_server_out_of_reach_is_unavailable() {
    let url = "postgres://user:secret@127.0.0.1:1/mart";
    let sink = PostgresSink::new(
        "mart".into(),
        &target(url, "cars", false, WriteMode::Append, CONNECTIONS_MAX),
    )
    .expect("a sink");
    let error = sink.prepare(&[]).await.expect_err("nobody listens");
    let text = error.to_string();
    assert!(text.contains("PostgreSQL at 127.0.0.1:1, database mart"), "{text}");
    assert!(!text.contains("secret"), "{text}");
}

#[tokio::test]
async fn arrays_of_any_depth_are_written() {
    let mart = Mart::new("arrays").await;
    mart.sql(
        "CREATE TABLE arrays (id bigint, ints int[], texts text[], prices numeric[], \
         times timestamptz[], documents jsonb[], uuids uuid[])",
    )
    .await;
    let (mut writer, log) = (mart.writer("arrays").await, Log::default());
    let rows = [
        r#"{"id":1,"ints":[1,null,-3],"texts":["a","","\"\u2603\""],"prices":[1.50,"NaN"]}"#,
        r#"{"id":2,"ints":[[1,2],[3,4],[5,6]],"texts":[],"prices":null}"#,
        r#"{"id":3,"times":["2013-01-31T23:59:59+01:00"],"documents":[[1,2],{"a":[]}, null]}"#,
        r#"{"id":4,"uuids":["6ba7b810-9dad-11d1-80b4-00c04fd430c8"],"ints":[[],[]]}"#,
        r#"{"id":5,"ints":[[1,2],[3]]}"#,
        r#"{"id":6,"ints":[1,[2]]}"#,
        r#"{"id":7,"ints":[[[[[[[1]]]]]]]}"#,
        r#"{"id":8,"ints":7}"#,
        r#"{"id":9,"ints":["x"]}"#,
        r#"{"id":10,"texts":["\u0000"]}"#,
        r#"{"id":11,"ints":[[[1]],[2]]}"#,
    ];
    let done = writer.commit(&commit(0, &rows), &log).await.expect("committed");
    assert_eq!((done.rows_written, done.rows_refused), (4, 7));
    log.expect(&[
        (4, "of the same depth"),
        (5, "of the same depth"),
        (6, "at most 6 dimensions"),
        (7, "expected a JSON array"),
        (8, "expected an integer"),
        (9, "texts"),
        (10, "of the same depth"),
    ]);
    let shown = "SELECT string_agg(concat_ws('|', id, ints, texts, prices, times, documents, uuids), \
                 E'\\n' ORDER BY id) FROM arrays";
    assert_eq!(
        mart.one(shown).await,
        "1|{1,NULL,-3}|{a,\"\",\"\\\"☃\\\"\"}|{1.50,NaN}\n\
         2|{{1,2},{3,4},{5,6}}|{}\n\
         3|{\"2013-01-31 22:59:59+00\"}|{\"[1, 2]\",\"{\\\"a\\\": []}\",NULL}\n\
         4|{}|{6ba7b810-9dad-11d1-80b4-00c04fd430c8}"
    );
    // The declared columns of a route are compared with the table.
    let sink = mart.sink("arrays");
    sink.prepare(&[route(&["id bigint?", "ints smallint[]?"])]).await.expect("they fit");
    expect_unavailable(sink.prepare(&[route(&["id bigint?", "ints text[]?"])]).await, "ints");
}
