//! The Redshift sink against its stand-in: refused rows wherever they are reported, rights, silence.

use std::time::{Duration, Instant};

use shardmill_config::WriteMode;
use shardmill_core::sink::Sink;
use shardmill_sink_redshift::RedshiftSink;

use super::role;
use crate::sink_redshift::standin::Kind;
use crate::sink_redshift::{Cluster, writer};
use crate::sql_sinks::proxy::Proxy;
use crate::sql_sinks::{Log, commit, expect_unavailable, route, shard};

/// Returns a row that only COPY refuses: its document is too long.
fn too_long(id: usize) -> String {
    format!(r#"{{"id":{id},"extra":"{}"}}"#, "x".repeat(70_000))
}

#[tokio::test]
async fn fault_30_serverless_names_refused_rows_elsewhere() {
    let kind = Kind { serverless: true, ..Kind::default() };
    let cluster = Cluster::new_as("fault_30", kind).await;
    cluster.sql("CREATE TABLE cars (id bigint, extra super)").await;
    let mut writer = writer(&cluster.sink("cars")).await;
    let log = Log::default();
    let rows = [r#"{"id":1}"#.to_owned(), too_long(100), r#"{"id":2}"#.to_owned()];
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[(1, "COPY does not accept")]);
    assert_eq!(cluster.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test]
async fn fault_08_a_load_that_fails_for_named_rows_is_repeated_without_them() {
    let kind = Kind { errors_max: Some(1), ..Kind::default() };
    let cluster = Cluster::new_as("fault_08_loads", kind).await;
    cluster.sql("CREATE TABLE cars (id bigint, extra super)").await;
    let mut writer = writer(&cluster.sink("cars")).await;
    let row = |id: usize| match id % 3 {
        0 => format!(r#"{{"id":{id}}}"#),
        _ => too_long(id),
    };
    let rows: Vec<String> = (0..9).map(row).collect();
    let log = Log::default();
    let committed = writer.commit(&commit(0, &rows), &log).await.expect("committed");
    assert_eq!((committed.rows_written, committed.rows_refused), (3, 6));
    let refused: Vec<usize> = log.take().into_iter().map(|(row, _)| row).collect();
    assert_eq!(refused, [1, 2, 4, 5, 7, 8]);
    let ids = cluster.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await;
    assert_eq!(ids, "0 3 6");
}

#[tokio::test]
async fn fault_31_redshift_rights_are_named() {
    let cluster = Cluster::new("fault_31").await;
    cluster.sql("CREATE TABLE cars (id bigint); CREATE VIEW seen AS SELECT id FROM cars").await;
    expect_unavailable(cluster.sink("seen").prepare(&[route(&["id bigint"])]).await, "is a view");
    let as_role = role(&cluster.client, "fault_31_redshift").await;
    let user = url::Url::parse(&as_role).expect("a URL").username().to_owned();
    let mut target = cluster.target("cars", WriteMode::Append);
    let mut url = url::Url::parse(&target.url).expect("a URL");
    url.set_username(&user).expect("a user");
    target.url = url.into();
    let sink = RedshiftSink::new("mart".into(), &target).expect("a sink");
    let schema = "redshift_fault_31";
    for (grant, says) in [
        ("GRANT USAGE ON SCHEMA {} TO fault_31_redshift", "no SELECT right"),
        ("GRANT SELECT ON cars TO fault_31_redshift", "no INSERT right"),
        ("GRANT INSERT ON cars TO fault_31_redshift", "GRANT CREATE ON SCHEMA"),
    ] {
        cluster.sql(&grant.replace("{}", schema)).await;
        expect_unavailable(sink.prepare(&[route(&["id bigint"])]).await, says);
    }
    cluster.sql(&format!("GRANT CREATE ON SCHEMA {schema} TO fault_31_redshift")).await;
    sink.prepare(&[route(&["id bigint"])]).await.expect("prepared");
    cluster.sql("DROP OWNED BY fault_31_redshift").await;
}

#[tokio::test]
async fn fault_03_a_silent_cluster_is_given_up() {
    let cluster = Cluster::new("fault_03").await;
    cluster.sql("CREATE TABLE cars (id bigint)").await;
    let mut target = cluster.target("cars", WriteMode::Append);
    let mut url = url::Url::parse(&target.url).expect("a URL");
    let proxy = Proxy::start(format!("127.0.0.1:{}", url.port().expect("a port"))).await;
    url.set_port(Some(proxy.port)).expect("a port");
    target.url = url.into();
    let sink = RedshiftSink::new("mart".into(), &target).expect("a sink");
    let sink = sink.with_silence_max(Duration::from_millis(500));
    let mut writer = sink.acquire(&shard("shardId-000000000000")).await.expect("acquired").writer;
    let log = Log::default();
    proxy.freeze();
    for _ in 0..2 {
        let begun = Instant::now();
        expect_unavailable(writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await, "no answer");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    proxy.thaw();
    writer.commit(&commit(0, &[r#"{"id":1}"#]), &log).await.expect("the cluster goes on");
    assert_eq!(cluster.one("SELECT count(*) FROM cars").await, "1");
}
