//! Lookups against a real PostgreSQL and real SQLite files: the rows that they return, what is cached, and what is
//! refused.
//!
//! `cargo xtask test` starts a throw-away server and names it in `SHARDMILL_TEST_POSTGRES`. Each test has a schema of
//! its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::PrometheusBuilder;
use shardmill_cli::registry::SINK_TYPES;
use shardmill_config::{
    Located, LookupCacheLimits, LookupConfig, LookupSource, PipelineConfig, Secret,
};
use shardmill_plugin::capability::lookup::{Lookup, LookupError};
use tokio::runtime::Handle;
use tokio_postgres::{Client, NoTls};

fn url() -> String {
    std::env::var("SHARDMILL_TEST_POSTGRES").expect(
        "SHARDMILL_TEST_POSTGRES is to name a PostgreSQL, postgres://user@host:port/database: \
         run `cargo xtask test`, which starts one",
    )
}

fn config(source: LookupSource, query: &str) -> LookupConfig {
    LookupConfig {
        name: Located { value: "customers".into(), span: 0..0 },
        source,
        query: Located { value: query.into(), span: 0..0 },
        timeout: Duration::from_secs(10),
        cache: LookupCacheLimits::default(),
        span: 0..0,
    }
}

fn open(config: &LookupConfig) -> Arc<Lookup> {
    Arc::new(Lookup::new(config, Handle::current()).expect("a lookup"))
}

/// Calls the lookup as a lane does: from a blocking thread.
async fn get(lookup: &Arc<Lookup>, keys: &[&str]) -> Result<Vec<Option<String>>, LookupError> {
    let lookup = Arc::clone(lookup);
    let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
    let asked = move || {
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        lookup.get(&keys, Instant::now() + Duration::from_secs(20))
    };
    let rows = tokio::task::spawn_blocking(asked).await.expect("no panic")?;
    Ok(rows.into_iter().map(|row| row.map(|row| row.to_string())).collect())
}

/// Returns the rows as text, `-` for none.
async fn rows(lookup: &Arc<Lookup>, keys: &[&str]) -> String {
    let rows = get(lookup, keys).await.expect("rows");
    let texts: Vec<String> = rows.into_iter().map(|row| row.unwrap_or("-".into())).collect();
    texts.join(" ")
}

async fn refusal(lookup: &Arc<Lookup>) -> String {
    lookup.prepare().await.expect_err("a refusal").to_string()
}

/// Schema of a test's own.
struct Mart {
    client: Client,
    schema: String,
}

impl Mart {
    async fn new(test: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(&url(), NoTls).await.expect("a server");
        tokio::spawn(connection);
        let schema = format!("lookup_{test}");
        let create = format!(
            "SET client_min_messages = warning; DROP SCHEMA IF EXISTS {schema} CASCADE; \
             CREATE SCHEMA {schema}; SET search_path = {schema}"
        );
        client.batch_execute(&create).await.expect("a schema");
        Self { client, schema }
    }

    async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.expect(sql);
    }

    /// Configures a lookup in this schema; its connections have the schema's name.
    fn config(&self, query: &str) -> LookupConfig {
        let url = format!(
            "{}?application_name={schema}&options=-c%20search_path%3D{schema}%20-c%20TimeZone%3DAsia/Tokyo",
            url(),
            schema = self.schema
        );
        config(LookupSource::Postgres(Secret::new(url)), query)
    }

    fn lookup(&self, query: &str) -> Arc<Lookup> {
        open(&self.config(query))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_values_keep_every_digit() {
    let mart = Mart::new("types").await;
    mart.sql(
        r#"CREATE TYPE mood AS ENUM ('fine');
        CREATE DOMAIN raw AS bytea;
        CREATE TABLE t (id bigint PRIMARY KEY, "odd ""name" smallint, b bigint, n numeric, d double precision,
            f boolean, s text, at timestamptz, l timestamp, day date, i interval, y bytea, r raw, j jsonb,
            u uuid, m mood, a int[], z text);
        INSERT INTO t VALUES (9007199254740993, -32768, 9223372036854775807,
            123456789012345678901234567890.1234500, 0.1, true, E'a"\\\n\u00f1', '2026-01-31 12:00:00.000001+02',
            '2026-01-31 12:00:00', '2026-01-31', '1 day 2 hours', decode(repeat('00ff', 60), 'hex'), '\x0102',
            '{"x": 1.10}', '6f9619ff-8b86-d011-b42d-00c04fc964ff', 'fine', '{1,2}', NULL);"#,
    )
    .await;
    let lookup = mart.lookup("SELECT * FROM t WHERE id = ANY($1); ");
    lookup.prepare().await.expect("prepared");
    let found = rows(&lookup, &["9007199254740993"]).await;
    let value: serde_json::Value = serde_json::from_str(&found).expect("JSON");
    assert!(!found.contains('\n'), "{found}");
    let y = value["y"].as_str().expect("base64");
    assert_eq!((y.len(), &y[..8]), (160, "AP8A/wD/"));
    let expected = format!(
        r#"{{"odd \"name":-32768,"b":9223372036854775807,"n":123456789012345678901234567890.1234500,"d":0.1,"f":true,"s":"a\"\\\nñ","at":"2026-01-31T10:00:00.000001+00:00","l":"2026-01-31T12:00:00","day":"2026-01-31","i":"P1DT2H","y":"{y}","r":"AQI=","j":{{"x": 1.10}},"u":"6f9619ff-8b86-d011-b42d-00c04fc964ff","m":"fine","a":[1,2],"z":null}}"#
    );
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_keys_are_bound_by_the_parameters_type() {
    let mart = Mart::new("keys").await;
    let uuid = "6F9619FF-8B86-D011-B42D-00C04FC964FF";
    for (kind, value, asked) in [
        ("smallint", "7", ["7", "007", "70000", "seven"]),
        ("integer", "-7", ["-7", "-07", "3000000000", ""]),
        (
            "bigint",
            "9223372036854775807",
            ["9223372036854775807", "+9223372036854775807", "1e3", "9223372036854775808"],
        ),
        ("text", "a b", ["a b", "a b", "a", "a\0b"]),
        ("varchar(9)", "ñ", ["ñ", "ñ", "n", "longer than nine"]),
        ("char(5)", "ab", ["ab", "ab  ", "b", "a\0"]),
        ("uuid", uuid, [uuid, &uuid.to_lowercase(), "6f9619ff", ""]),
    ] {
        mart.sql("DROP TABLE IF EXISTS t").await;
        mart.sql(&format!(
            "CREATE TABLE t (id {kind}, v int); INSERT INTO t VALUES ('{value}', 1)"
        ))
        .await;
        let lookup = mart.lookup("SELECT id, v FROM t WHERE id = ANY($1) -- by key");
        let found = rows(&lookup, &asked).await;
        assert_eq!(found, r#"{"v":1} {"v":1} - -"#, "{kind}");
    }
    mart.sql("DROP TABLE t; CREATE TABLE t (id numeric, v int); INSERT INTO t VALUES (1.5, 1)")
        .await;
    let refused = refusal(&mart.lookup("SELECT id, v FROM t WHERE id = ANY($1)")).await;
    assert!(refused.contains("_numeric") && refused.contains("$1::text[]"), "{refused}");
    let cast = mart.lookup("SELECT id, v FROM t WHERE id::text = ANY($1::text[])");
    assert_eq!(rows(&cast, &["1.5", "2"]).await, r#"{"v":1} -"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_queries_that_cannot_serve_are_refused_at_load() {
    let mart = Mart::new("refused").await;
    mart.sql(
        "CREATE TABLE t (id int, v int);
        CREATE FUNCTION put(k int) RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (k, k) RETURNING 1';
        INSERT INTO t VALUES (1, 1)",
    )
    .await;
    for (query, expected) in [
        ("SELECT id, v FROM t", "one parameter, the keys"),
        ("SELECT id, v FROM t WHERE id = ANY($1) AND v = $2", "found 2 parameters"),
        ("SELECT id FROM t WHERE id = ANY($1)", "at least two columns, the key first, found 1"),
        ("SELECT id, v, v FROM t WHERE id = ANY($1)", "two columns named \"v\""),
        ("SELECT id, v FROM t WHERE id = $1", "unsupported type int4"),
        ("SELECT id, v FROM tt WHERE id = ANY($1)", "\"lookup_refused.tt\" does not exist"),
        ("SELECT id, v FROM t WHERE id = ANY($1); SELECT 1, 2", "multiple commands"),
        ("DELETE FROM t WHERE id = ANY($1) RETURNING id, v", "expected a SELECT"),
        (
            "WITH d AS (DELETE FROM t WHERE id = ANY($1) RETURNING id, v) SELECT * FROM d",
            "expected a SELECT",
        ),
        ("SELECT id, v FROM t WHERE id = ANY($1) FOR UPDATE", "read-only transaction"),
    ] {
        let refused = refusal(&mart.lookup(query)).await;
        let expected = expected.replace("lookup_refused.tt", "tt");
        assert!(
            refused.starts_with("lookup `customers`: ") && refused.contains(&expected),
            "{query}: {refused}"
        );
    }
    // The server refuses what shows only when the query runs.
    let sly = mart.lookup("SELECT id, put(id) FROM t WHERE id = ANY($1)");
    let refused = get(&sly, &["1"]).await.expect_err("a write");
    assert!(refused.message.contains("read-only transaction"), "{refused}");
    let left = mart.client.query_one("SELECT count(*) FROM t", &[]).await.expect("a count");
    assert_eq!(left.get::<_, i64>(0), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_gives_thousands_of_keys_by_few_queries() {
    let mart = Mart::new("many").await;
    mart.sql("CREATE TABLE t AS SELECT n AS id, 'v' || n AS v FROM generate_series(0, 24998, 2) n")
        .await;
    let lookup = mart.lookup("SELECT id, v FROM t WHERE id = ANY($1)");
    let keys: Vec<String> = (0..25_000).map(|n| n.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    for _ in 0..2 {
        let rows = get(&lookup, &keys).await.expect("rows");
        for (n, row) in rows.iter().enumerate() {
            let expected = (n % 2 == 0).then(|| format!(r#"{{"v":"v{n}"}}"#));
            assert_eq!(*row, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_not_fetched_again_until_it_is_too_old() {
    let mart = Mart::new("kept").await;
    mart.sql("CREATE TABLE t (id int, v int); INSERT INTO t VALUES (1, 1)").await;
    let query = "SELECT id, v FROM t WHERE id = ANY($1)";
    let (kept, mut config) = (mart.lookup(query), mart.config(query));
    config.cache.ttl = Duration::ZERO;
    let (fresh, mut small) = (open(&config), mart.config(query));
    small.cache.entries_max = 1;
    let small = open(&small);
    for lookup in [&kept, &fresh, &small] {
        assert_eq!(rows(lookup, &["1", "2", "1"]).await, r#"{"v":1} - {"v":1}"#);
    }
    mart.sql("UPDATE t SET v = 2; INSERT INTO t VALUES (2, 2), (3, 3)").await;
    assert_eq!(rows(&kept, &["1", "2", "3"]).await, r#"{"v":1} - {"v":3}"#);
    assert_eq!(rows(&fresh, &["1", "2", "3"]).await, r#"{"v":2} {"v":2} {"v":3}"#);
    // A cache for one row still answers every key.
    let found = rows(&small, &["3", "2"]).await;
    assert!(found.starts_with(r#"{"v":3} "#), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_is_asked_again() {
    let mart = Mart::new("back").await;
    mart.sql("CREATE TABLE t (id int, v int); INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)").await;
    let lookup = mart.lookup("SELECT id, v FROM t WHERE id = ANY($1)");
    assert_eq!(rows(&lookup, &["1"]).await, r#"{"v":1}"#);
    mart.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lookup_back'")
        .await;
    assert_eq!(rows(&lookup, &["2"]).await, r#"{"v":2}"#);
    // The prepared query does not match the table any more.
    mart.sql("ALTER TABLE t ALTER v TYPE text").await;
    assert_eq!(rows(&lookup, &["3"]).await, r#"{"v":"3"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_is_a_failure_that_may_pass() {
    let gone = LookupSource::Postgres(Secret::new("postgres://u:hunter2@127.0.0.1:1/d"));
    let lookup = open(&config(gone, "SELECT 1, 2 WHERE '1' = ANY($1)"));
    for _ in 0..3 {
        let error = get(&lookup, &["1"]).await.expect_err("no server");
        assert!(error.retryable && error.message.contains("127.0.0.1:1"), "{error:?}");
        assert!(!format!("{error:?} {lookup:?}").contains("hunter2"), "{error:?}");
    }
    let url = "postgres://u:hunter2@h/d?sslmode=require&sslrootcert=/missing.pem";
    let tls = LookupSource::Postgres(Secret::new(url));
    let refused = Lookup::new(&config(tls, "SELECT"), Handle::current()).expect_err("no such file");
    assert!(refused.message.contains("sslrootcert=/missing.pem"), "{refused}");
    assert!(!refused.message.contains("hunter2"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_takes_too_long_ends_and_the_next_is_answered() {
    let mart = Mart::new("slow").await;
    mart.sql("CREATE TABLE t (id int, s int); INSERT INTO t VALUES (1, 60), (2, 0)").await;
    let mut config = mart.config("SELECT id, pg_sleep(s)::text AS v FROM t WHERE id = ANY($1)");
    config.timeout = Duration::from_millis(300);
    let lookup = open(&config);
    let error = get(&lookup, &["1"]).await.expect_err("it sleeps for a minute");
    assert!(error.retryable, "{error:?}");
    assert_eq!(rows(&lookup, &["2", "3"]).await, r#"{"v":""} -"#);
    // The server has cancelled the statement too.
    loop {
        let asleep = "SELECT count(*) FROM pg_stat_activity \
                      WHERE application_name = 'lookup_slow' AND wait_event = 'PgSleep'";
        let asleep = mart.client.query_one(asleep, &[]).await.expect("a count");
        if asleep.get::<_, i64>(0) == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Lanes that ask at the same time share four connections, which stay open for later queries.
#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_has_four_connections_at_most() {
    const CONNECTIONS: i64 = 4;
    let mart = Mart::new("four").await;
    mart.sql(
        "CREATE TABLE t (id int, v int); INSERT INTO t SELECT n, n FROM generate_series(1, 12) n",
    )
    .await;
    let lookup = mart.lookup("SELECT id, v, pg_sleep(0.3)::text AS s FROM t WHERE id = ANY($1)");
    lookup.prepare().await.expect("prepared");
    let lanes: Vec<_> = (1..=12)
        .map(|key: i32| {
            let lookup = Arc::clone(&lookup);
            tokio::spawn(async move { rows(&lookup, &[&key.to_string()]).await })
        })
        .collect();
    let asleep = "SELECT count(*) FROM pg_stat_activity \
                  WHERE application_name = 'lookup_four' AND wait_event = 'PgSleep'";
    let mut most = 0;
    while !lanes.iter().all(tokio::task::JoinHandle::is_finished) {
        let now = mart.client.query_one(asleep, &[]).await.expect("a count").get::<_, i64>(0);
        most = most.max(now);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for (key, lane) in (1..=12).zip(lanes) {
        assert_eq!(lane.await.expect("a lane"), format!(r#"{{"v":{key},"s":""}}"#));
    }
    assert_eq!(most, CONNECTIONS);
    let kept = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lookup_four'";
    let deadline = Instant::now() + Duration::from_secs(10);
    // One further connection was closed after the query had been described: the server may not have noticed yet.
    while mart.client.query_one(kept, &[]).await.expect("a count").get::<_, i64>(0) != CONNECTIONS {
        assert!(Instant::now() < deadline, "expected {CONNECTIONS} open connections");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_the_query_cannot_stand_are_the_keys_fault() {
    let mart = Mart::new("fault").await;
    mart.sql("CREATE TABLE t (id int, v int); INSERT INTO t VALUES (1, 0), (2, 1)").await;
    let lookup = mart.lookup("SELECT id, 1 / v AS v FROM t WHERE id = ANY($1)");
    let error = get(&lookup, &["1"]).await.expect_err("a division by zero");
    assert!(!error.retryable && error.message.contains("22012"), "{error:?}");
    assert_eq!(rows(&lookup, &["2"]).await, r#"{"v":1}"#);
}

/// Lanes that ask for the same keys at the same time wait for each other, in any order of the keys: each key is
/// fetched once.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_that_ask_at_once_share_what_one_fetches() {
    let mart = Mart::new("lanes").await;
    mart.sql(
        "CREATE TABLE t (id int, v int); INSERT INTO t SELECT n, n FROM generate_series(1, 99) n",
    )
    .await;
    // The query is slow enough for lanes to meet while it runs.
    let lookup = mart.lookup("SELECT id, v, pg_sleep(0.005)::text AS s FROM t WHERE id = ANY($1)");
    let counted = Arc::new(PrometheusBuilder::new().build_recorder());
    let keys: Vec<String> = (1..=100).map(|n| n.to_string()).collect();
    let lanes: Vec<_> = (0..8)
        .map(|lane| {
            let (lookup, counted, mut keys) =
                (Arc::clone(&lookup), Arc::clone(&counted), keys.clone());
            keys.rotate_left(lane * 10);
            tokio::task::spawn_blocking(move || {
                let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                let deadline = Instant::now() + Duration::from_secs(20);
                let found = || lookup.get(&keys, deadline).expect("rows");
                let found = metrics::with_local_recorder(&*counted, found);
                for (key, row) in keys.iter().zip(found) {
                    let expected = (*key != "100").then(|| format!(r#"{{"v":{key},"s":""}}"#));
                    assert_eq!(row.as_deref(), expected.as_deref());
                }
            })
        })
        .collect();
    for lane in lanes {
        lane.await.expect("a lane");
    }
    let counted = counted.handle().render();
    for (result, keys) in [("miss", 99), ("absent", 1), ("hit", 700)] {
        let expected = format!(
            "shardmill_lookup_keys_total{{lookup=\"customers\",result=\"{result}\"}} {keys}\n"
        );
        assert!(counted.contains(&expected), "{expected}{counted}");
    }
}

/// Makes a SQLite file with a script.
fn sqlite(folder: &Path, script: &str) -> LookupSource {
    let path = folder.join("t.db");
    let connection = rusqlite::Connection::open(&path).expect("a database");
    connection.execute_batch(script).expect(script);
    LookupSource::Sqlite(path)
}

const SQLITE_QUERY: &str = "SELECT * FROM t WHERE id IN (SELECT value FROM json_each(?1))";

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_values_keep_every_digit() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = sqlite(
        folder.path(),
        r#"CREATE TABLE t (id INTEGER PRIMARY KEY, b INTEGER, "odd ""name" TEXT, d REAL, y BLOB, z);
        INSERT INTO t VALUES (7, 9223372036854775807, 'a"ñ' || char(10), 0.1, x'0102', NULL),
            (8, -1, '', 9e999, x'', 1.0);"#,
    );
    let lookup = open(&config(table, SQLITE_QUERY));
    lookup.prepare().await.expect("prepared");
    let found = rows(&lookup, &["7", "007", "8", "9", "x", "7"]).await;
    let seven = r#"{"b":9223372036854775807,"odd \"name":"a\"ñ\n","d":0.1,"y":"AQI=","z":null}"#;
    let eight = r#"{"b":-1,"odd \"name":"","d":"Infinity","y":"","z":1.0}"#;
    assert_eq!(found, format!("{seven} {seven} {eight} - - {seven}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_finds_texts_and_the_first_row_of_a_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = sqlite(
        folder.path(),
        "CREATE TABLE t (id TEXT, v INT); INSERT INTO t VALUES ('07', 1), ('a''b\"', 2), ('a''b\"', 3), (NULL, 4)",
    );
    let lookup = open(&config(table, &format!("{SQLITE_QUERY} ORDER BY v DESC")));
    assert_eq!(rows(&lookup, &["07", "7", "a'b\"", ""]).await, r#"{"v":1} - {"v":3} -"#);
    let many: Vec<String> = (0..25_000).map(|n| n.to_string()).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).chain(["07"]).collect();
    let found = get(&lookup, &many).await.expect("rows");
    assert_eq!(found.iter().flatten().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_queries_that_cannot_serve_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let table =
        sqlite(folder.path(), "CREATE TABLE t (id INT, v INT); INSERT INTO t VALUES (1, 1)");
    for (query, expected) in [
        ("SELECT * FROM t", "one parameter, the keys"),
        ("SELECT * FROM t WHERE id = ?1 AND v = ?2", "found 2 parameters"),
        (
            "SELECT id FROM t WHERE id IN (SELECT value FROM json_each(?1))",
            "at least two columns, the key first, found 1",
        ),
        ("SELECT id, v, v FROM t WHERE id = ?1", "two columns named \"v\""),
        ("SELECT * FROM tt WHERE id = ?1", "no such table: tt"),
        ("DELETE FROM t WHERE id <> ?1 RETURNING id, v", "found one that writes"),
    ] {
        let refused = refusal(&open(&config(table.clone(), query))).await;
        assert!(
            refused.starts_with("lookup `customers`: ") && refused.contains(expected),
            "{query}: {refused}"
        );
    }
    let gone = LookupSource::Sqlite(folder.path().join("gone.db"));
    let refused = refusal(&open(&config(gone, SQLITE_QUERY))).await;
    assert!(refused.contains("gone.db") && !folder.path().join("gone.db").exists(), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_may_be_replaced_or_written_meanwhile() {
    let folder = tempfile::tempdir().expect("a folder");
    let table =
        sqlite(folder.path(), "CREATE TABLE t (id INT, v INT); INSERT INTO t VALUES (1, 1)");
    let mut config = config(table, SQLITE_QUERY);
    config.cache.ttl = Duration::ZERO;
    let lookup = open(&config);
    assert_eq!(rows(&lookup, &["1"]).await, r#"{"v":1}"#);
    sqlite(folder.path(), "UPDATE t SET v = 2");
    assert_eq!(rows(&lookup, &["1"]).await, r#"{"v":2}"#);
    let other = tempfile::tempdir_in(folder.path()).expect("a folder");
    sqlite(other.path(), "CREATE TABLE t (id INT, v INT); INSERT INTO t VALUES (1, 3)");
    std::fs::rename(other.path().join("t.db"), folder.path().join("t.db")).expect("renamed");
    assert_eq!(rows(&lookup, &["1"]).await, r#"{"v":3}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_query_that_takes_too_long_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = sqlite(folder.path(), "CREATE TABLE t (id INT, v INT)");
    let endless = "WITH RECURSIVE n(v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n) \
                   SELECT ?1, max(v) FROM n";
    let mut config = config(table, endless);
    config.timeout = Duration::from_millis(100);
    let error = get(&open(&config), &["1"]).await.expect_err("no end");
    assert!(error.retryable && error.message.contains("took too long"), "{error:?}");
}

#[test]
fn a_configured_lookup_arrives() {
    let text = r#"
[pipeline]
name = "p"
[source]
type = "kinesis"
stream = "s"
[[sink]]
name = "out"
type = "discard"
[[lookup]]
name = "one"
url = "postgres://u:${SECRET}@h/d"
query = "SELECT id, name FROM t WHERE id = ANY($1)"
[[lookup]]
name = "two"
url = "sqlite:ref/t.db"
query = "SELECT 1"
timeout = "5 s"
[lookup.cache]
entries = 10
bytes = "1 KiB"
ttl = "0 s"
"#;
    let variables = |name: &str| (name == "SECRET").then(|| "hunter2".to_owned());
    let config: PipelineConfig =
        shardmill_config::parse("conf/p.toml", text, &SINK_TYPES, &variables)
            .expect("a configuration");
    assert!(!format!("{config:?}").contains("hunter2"));
    let [one, two] = &config.lookups[..] else { panic!("two lookups") };
    let LookupSource::Postgres(url) = &one.source else { panic!("PostgreSQL") };
    assert_eq!(url.reveal(), "postgres://u:hunter2@h/d");
    assert_eq!((one.timeout, one.cache), (Duration::from_secs(1), LookupCacheLimits::default()));
    let LookupSource::Sqlite(path) = &two.source else { panic!("SQLite") };
    assert_eq!(path, Path::new("conf/ref/t.db"));
    assert_eq!((two.name.value.as_str(), two.timeout), ("two", Duration::from_secs(5)));
    let cache = LookupCacheLimits { entries_max: 10, bytes_max: 1024, ttl: Duration::ZERO };
    assert_eq!(two.cache, cache);
}

#[tokio::test(flavor = "multi_thread")]
async fn wall_18_a_lookup_speaks_tls_where_the_server_has_it() {
    let mart = Mart::new("tls").await;
    mart.sql("CREATE TABLE t (id bigint PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let ssl = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let lookup = mart.lookup(&format!("SELECT id, ({ssl}) AS ssl FROM t WHERE id = ANY($1)"));
    lookup.prepare().await.expect("prepared");
    assert_eq!(rows(&lookup, &["1"]).await, r#"{"ssl":true}"#);
}
