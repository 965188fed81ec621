//! The Redshift sink against a stand-in: PostgreSQL behind a proxy that loads from an S3 server.
//!
//! `standin.rs` says what the stand-in can do and what it cannot.

pub mod standin;

use std::fmt::Write as _;
use std::sync::Arc;

use crate::sink_objects::s3;
use crate::sql_sinks::keyed;
use crate::sql_sinks::proxy::{Cut, Proxy};
use crate::sql_sinks::{Log, assert_fences, commit, expect_unavailable, position, route, shard};
use crate::support::pipeline::PipelineToml;
use crate::support::{kill_until_it_ends, postgres_url, shardmill};
use futures::TryStreamExt as _;
use shardmill_config::WriteMode;
use shardmill_core::sink::{Acquired, Sink, SinkWriter};
use shardmill_sink_redshift::{CopySource, RedshiftSink, RedshiftTarget};
use standin::{Kind, ROLE, Standin};
use tokio_postgres::{Client, NoTls};

/// A cluster with a schema of the test's own, and a bucket.
pub struct Cluster {
    pub client: Client,
    schema: String,
    port: u16,
    s3: s3::Server,
}

impl Cluster {
    /// Makes a provisioned cluster.
    pub async fn new(test: &str) -> Self {
        Self::new_as(test, Kind::default()).await
    }

    /// Makes a cluster of another kind.
    pub async fn new_as(test: &str, kind: Kind) -> Self {
        let url = url::Url::parse(&postgres_url()).expect("a URL");
        let (client, connection) =
            tokio_postgres::connect(url.as_str(), NoTls).await.expect("a server");
        tokio::spawn(connection);
        client.batch_execute(standin::DATABASE).await.expect("a database");
        let schema = format!("redshift_{test}");
        let create = format!(
            "SET client_min_messages = warning; DROP SCHEMA IF EXISTS {schema} CASCADE; \
             CREATE SCHEMA {schema}; SET search_path = {schema}, public; SET TimeZone = 'UTC'"
        );
        client.batch_execute(&create).await.expect("a schema");
        let s3 = s3::start().await;
        let server = url.socket_addrs(|| Some(5432)).expect("an address")[0].to_string();
        let standin = Standin::start_as(server, s3.store.clone(), s3::BUCKET, kind);
        let port = standin.await.port;
        Self { client, schema, port, s3 }
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

    /// Returns the URL of a port.
    fn url(port: u16) -> String {
        let mut url = url::Url::parse(&postgres_url()).expect("a URL");
        url.set_port(Some(port)).expect("a port");
        url.set_host(Some("127.0.0.1")).expect("a host");
        url.into()
    }

    /// Makes a target in the test's schema.
    pub fn target(&self, table: &str, mode: WriteMode) -> RedshiftTarget {
        RedshiftTarget {
            url: Self::url(self.port),
            table: format!("{}.{table}", self.schema),
            create: true,
            mode,
            staging: CopySource {
                url: s3::url(),
                options: self.s3.options.clone(),
                iam_role: ROLE.into(),
                region: Some("eu-west-1".into()),
            },
        }
    }

    /// Makes a sink that appends.
    pub fn sink(&self, table: &str) -> RedshiftSink {
        RedshiftSink::new("mart".into(), &self.target(table, WriteMode::Append)).expect("a sink")
    }

    /// Returns the number of objects in the bucket.
    async fn objects(&self) -> usize {
        self.s3.store.list(None).try_collect::<Vec<_>>().await.expect("a listing").len()
    }
}

/// Acquires the only shard.
pub async fn acquire(sink: &RedshiftSink) -> Acquired {
    sink.acquire(&shard("shardId-000000000000")).await.expect("acquired")
}

/// Prepares a sink, and acquires its only shard.
pub async fn writer(sink: &RedshiftSink) -> Box<dyn SinkWriter> {
    sink.prepare(&[route(&[])]).await.expect("prepared");
    acquire(sink).await.writer
}

#[tokio::test]
async fn a_commit_lands_once_however_often_it_is_tried() {
    let cluster = Cluster::new("once").await;
    let sink = cluster.sink("cars");
    let declared = route(&["id bigint", "make text?", "extra jsonb?", "price numeric(8, 2)?"]);
    sink.prepare(std::slice::from_ref(&declared)).await.expect("prepared");
    sink.prepare(&[declared]).await.expect("prepared again");
    let Acquired { mut writer, position: start, .. } = acquire(&sink).await;
    assert_eq!(start, None);
    let rows = [r#"{"id":1,"make":"Honda","extra":{"a":[1,"\n"]},"price":"12.5"}"#, r#"{"id":2}"#];
    let (log, first) = (Log::default(), commit(0, &rows));
    for _ in 0..3 {
        let committed = writer.commit(&first, &log).await.expect("committed");
        assert_eq!((committed.rows_written, committed.rows_refused), (2, 0));
    }
    writer.commit(&commit(2, &[r#"{"id":3}"#]), &log).await.expect("committed");
    let no_rows: [&str; 0] = [];
    writer.commit(&commit(3, &no_rows), &log).await.expect("committed");
    let shown = "SELECT string_agg(concat(id, make, extra, price), ' ' ORDER BY id) FROM cars";
    assert_eq!(cluster.one(shown).await, r#"1Honda{"a": [1, "\n"]}12.50 2 3"#);
    let place = sink.position(&shard("shardId-000000000000")).await.expect("a position");
    assert_eq!(place, Some(position(4)));
    assert_eq!(cluster.one("SELECT length(sequence) FROM shardmill_position").await, "129");
    assert_eq!(sink.position(&shard("another")).await.expect("none"), None);
    assert_eq!(cluster.objects().await, 0, "loaded files are removed");
    log.expect(&[]);
}

#[tokio::test]
async fn an_earlier_owner_cannot_commit() {
    let cluster = Cluster::new("fence").await;
    cluster.sql("CREATE TABLE cars (id bigint)").await;
    let sink = cluster.sink("cars");
    assert_fences(&sink, &sink).await;
    assert_eq!(cluster.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_load_side_by_side() {
    let cluster = Cluster::new("side").await;
    cluster.sql("CREATE TABLE cars (id bigint)").await;
    let sink = Arc::new(cluster.sink("cars"));
    let loading = (0..8_u64).map(|n| {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move {
            let shard = shard(&format!("shard-{n}"));
            let mut writer = sink.acquire(&shard).await.expect("acquired").writer;
            for from in 0..5 {
                let rows = [format!(r#"{{"id":{}}}"#, n * 100 + from)];
                writer.commit(&commit(from, &rows), &Log::default()).await.expect("committed");
            }
        })
    });
    for loaded in futures::future::join_all(loading).await {
        loaded.expect("no panic");
    }
    assert_eq!(cluster.one("SELECT count(DISTINCT id) FROM cars").await, "40");
    assert_eq!(cluster.one("SELECT count(*) FROM cars").await, "40");
    assert_eq!(cluster.one("SELECT count(*) FROM shardmill_position").await, "8");
}

#[tokio::test]
async fn bad_rows_are_refused_alone() {
    let cluster = Cluster::new("refused").await;
    cluster
        .sql(
            "CREATE TABLE cars (id bigint NOT NULL, make varchar(10) DEFAULT 'none', doors smallint,
                 price numeric(6, 2), built date, extra super)",
        )
        .await;
    let mut writer = writer(&cluster.sink("cars")).await;
    let long = format!(r#"{{"id":15,"extra":"{}"}}"#, "x".repeat(70_000));
    let large = format!(r#"{{"id":16,"extra":["{}"]}}"#, "x".repeat(4 << 20));
    let rows: [&[u8]; 18] = [
        br#"{"id":1,"make":"Honda"}"#,
        br#"{"id":"one"}"#,
        br#"{"id":null}"#,
        br#"{"make":"Honda"}"#,
        br#"{"id":4,"doors":40000}"#,
        br#"{"id":5,"make":"a\u0000b"}"#,
        br#"{"id":6,"colour":"red"}"#,
        br#"{"id":7,"make":"much too long for it"}"#,
        br#"{"id":9,"price":12345.67}"#,
        br#"{"id":10,"price":0.001}"#,
        br#"{"id":11,"built":"2013-02-30"}"#,
        br#"{"id":12,"id":12}"#,
        b"[1]",
        b"\xff\xfe\x00",
        br#"{}"#,
        long.as_bytes(),
        large.as_bytes(),
        br#"{"id":17,"make":null,"built":"2013-02-28","price":"1e3"}"#,
    ];
    let log = Log::default();
    let committed = writer.commit(&commit(0, &rows), &log).await.expect("committed");
    assert_eq!((committed.rows_written, committed.rows_refused), (2, 16));
    log.expect(&[
        (1, r#"column "id" of type bigint does not take "one""#),
        (2, "NOT NULL"),
        (3, "NOT NULL"),
        (4, "out of range"),
        (5, "U+0000"),
        (6, r#"no column "colour" in table"#),
        (7, "expected at most 10 bytes, found 20 bytes"),
        (8, "4 digits before the point"),
        (9, "2 after it"),
        (10, "expected a date"),
        (11, r#"the key "id" twice"#),
        (12, "a JSON object"),
        (13, "not valid UTF-8"),
        (14, "names no column"),
        (15, "COPY does not accept column"),
        (16, "expected a row of at most 4194304 bytes"),
    ]);
    let shown =
        "SELECT string_agg(concat_ws(',', id, make, price, built), ' ' ORDER BY id) FROM cars";
    assert_eq!(cluster.one(shown).await, "1,Honda 17,1000.00,2013-02-28");
    let default = "SELECT string_agg(coalesce(make, '-'), ' ' ORDER BY id) FROM cars";
    let (log, next) = (Log::default(), commit(18, &[r#"{"id":18}"#]));
    writer.commit(&next, &log).await.expect("committed");
    assert_eq!(cluster.one(default).await, "Honda - none", "missing fields get their defaults");
}

#[tokio::test]
async fn what_cannot_become_a_dead_letter_stops_its_commit() {
    let cluster = Cluster::new("full").await;
    cluster.sql("CREATE TABLE cars (id bigint)").await;
    let mut writer = writer(&cluster.sink("cars")).await;
    let commit = commit(0, &[r#"{"id":1}"#, r#"{"id":"one"}"#]);
    writer.commit(&commit, &Log::full()).await.expect_err("no room for a dead letter");
    assert_eq!(cluster.one("SELECT count(*) FROM cars").await, "0");
    let log = Log::default();
    writer.commit(&commit, &log).await.expect("committed");
    log.expect(&[(1, "expected an integer")]);
    assert_eq!(cluster.one("SELECT count(*) FROM cars").await, "1");
}

#[tokio::test]
async fn rows_with_keys_are_as_the_model_has_them() {
    for (mode, seed) in keyed::modes().iter().flat_map(|mode| (0..3).map(move |seed| (mode, seed)))
    {
        let cluster = Cluster::new("keyed").await;
        let table = keyed::TABLE.replace(" PRIMARY KEY", " NOT NULL");
        cluster.sql(&table.replace(keyed::CHECK, "")).await;
        let sink = RedshiftSink::new("mart".into(), &cluster.target("cars", mode.clone()));
        let mut writer = writer(&sink.expect("a sink")).await;
        let shown = async || match cluster.one(keyed::SHOWN).await {
            none if none == "NULL" => String::new(),
            shown => shown,
        };
        keyed::assert_as_the_model(mode, seed, false, writer.as_mut(), shown).await;
    }
}

#[tokio::test]
async fn what_does_not_fit_is_said_before_the_first_row() {
    let cluster = Cluster::new("misfit").await;
    cluster
        .sql("CREATE TABLE cars (id integer); CREATE TABLE own (id bigint, shardmill_row bigint)")
        .await;
    for (table, columns, part) in [
        ("cars", "id bigint", "not every value would fit"),
        ("cars", "make text", "with columns id"),
        ("new", "price numeric", "declare its digits"),
        ("new", "span interval", "unsupported column type"),
        ("own", "id bigint", "the prefix shardmill_"),
    ] {
        let outcome = cluster.sink(table).prepare(&[route(&[columns])]).await;
        expect_unavailable(outcome, part);
    }
    let mut target = cluster.target("missing", WriteMode::Append);
    target.create = false;
    let sink = RedshiftSink::new("mart".into(), &target).expect("a sink");
    expect_unavailable(sink.prepare(&[route(&["id bigint"])]).await, "does not exist");
}

#[tokio::test]
async fn what_is_gone_is_waited_for_and_named() {
    let cluster = Cluster::new("gone").await;
    cluster.sql("CREATE TABLE cars (id bigint, make varchar(10))").await;
    let (log, first) = (Log::default(), commit(0, &[r#"{"id":1,"make":"Honda"}"#]));

    let mut target = cluster.target("cars", WriteMode::Append);
    target.staging.iam_role = "arn:aws:iam::123456789012:role/Other".into();
    let sink = RedshiftSink::new("mart".into(), &target).expect("a sink");
    expect_unavailable(writer(&sink).await.commit(&first, &log).await, "Access Denied");
    assert_eq!(cluster.objects().await, 0, "a failed load leaves no files");

    let mut target = cluster.target("cars", WriteMode::Append);
    target.staging.options.insert("aws_secret_access_key".into(), "another".into());
    let sink = RedshiftSink::new("mart".into(), &target).expect("a sink");
    let cannot_write = "the credentials must be allowed";
    expect_unavailable(writer(&sink).await.commit(&first, &log).await, cannot_write);

    let mut writer = writer(&cluster.sink("cars")).await;
    writer.commit(&first, &log).await.expect("committed");
    cluster.sql("ALTER TABLE cars DROP COLUMN make").await;
    let second = commit(1, &[r#"{"id":2,"make":"Fiat"}"#]);
    expect_unavailable(writer.commit(&second, &log).await, r#"column "make" is gone"#);
    cluster.sql("DROP TABLE cars").await;
    expect_unavailable(writer.commit(&second, &log).await, "is gone: create it again");
    cluster.sql("CREATE TABLE cars (id bigint, make varchar(10))").await;
    writer.commit(&second, &log).await.expect("committed");
    assert_eq!(cluster.one("SELECT string_agg(id::text, ' ') FROM cars").await, "2");
    log.expect(&[]);
}

/// Cuts the connection at each step of a commit and retries, as a delivery does.
#[tokio::test]
async fn a_cut_at_any_step_leaves_each_row_once() {
    let cluster = Cluster::new("cut").await;
    cluster.sql("CREATE TABLE cars (id bigint)").await;
    let proxy = Proxy::start(format!("127.0.0.1:{}", cluster.port)).await;
    let mut target = cluster.target("cars", WriteMode::Append);
    target.url = Cluster::url(proxy.port);
    let sink = RedshiftSink::new("mart".into(), &target).expect("a sink");
    let mut writer = writer(&sink).await;
    let log = Log::default();
    let words = [
        "CREATE TEMP",
        "COPY ",
        "pg_last_copy_count",
        "LOCK",
        "UPDATE",
        "INSERT",
        "DROP",
        "COMMIT",
    ];
    let cuts = words.into_iter().flat_map(|word| [Cut::Before(word), Cut::After(word)]);
    let mut from = 0;
    for cut in cuts {
        let rows = [format!(r#"{{"id":{from}}}"#)];
        let commit = commit(from, &rows);
        proxy.cut(cut);
        let mut tries = 0;
        while let Err(error) = writer.commit(&commit, &log).await {
            tries += 1;
            assert!(tries < 5, "{cut:?}: {error}");
        }
        assert!(proxy.has_cut(), "{cut:?}");
        from += 1;
    }
    let (count, distinct) = ("SELECT count(*) FROM cars", "SELECT count(DISTINCT id) FROM cars");
    assert_eq!(cluster.one(count).await, from.to_string());
    assert_eq!(cluster.one(distinct).await, from.to_string());
    assert_eq!(cluster.objects().await, 0);
}

/// Kills the real binary at random moments of a file, and starts it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_leaves_each_row_once() {
    const ROWS: u64 = 4_000;
    let cluster = Cluster::new("killed").await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut lines = String::new();
    for id in 0..ROWS {
        writeln!(lines, "{{\"id\":{id},\"make\":\"Honda\"}}").expect("text");
    }
    let rows = folder.path().join("rows.ndjson");
    std::fs::write(&rows, lines).expect("written");
    let mut options = String::new();
    for (name, value) in &cluster.s3.options {
        writeln!(options, "{name} = \"{value}\"").expect("text");
    }
    let (url, schema, staging) = (Cluster::url(cluster.port), &cluster.schema, s3::url());
    let warehouse = format!(
        "type = \"redshift\"\nurl = \"{url}\"\ntable = \"{schema}.cars\"\nmode = \"append\"\n\
         staging = \"{staging}\"\niam_role = \"{ROLE}\"\n[sink.options]\n{options}\
         [sink.commit]\nrows = 200\nlinger = \"20 ms\""
    );
    let config = PipelineToml::new(folder.path(), "warehouse")
        .timing("")
        .file(&rows, "[source.batch]\nrecords = 50")
        .route_all_to(&["warehouse"])
        .plain_sink("warehouse", &warehouse)
        .write();
    cluster.sql("CREATE TABLE cars (id bigint, make varchar(10))").await;
    let count = "SELECT count(*) FROM cars";
    let killed = move || kill_until_it_ends(2014, || shardmill(&["run", &config]));
    let kills = tokio::task::spawn_blocking(killed).await.expect("it ends");
    assert_eq!(cluster.one(count).await, ROWS.to_string(), "after {kills} kills");
    assert_eq!(cluster.one("SELECT count(DISTINCT id) FROM cars").await, ROWS.to_string());
}
