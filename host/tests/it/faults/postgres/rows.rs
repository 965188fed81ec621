//! Deciding whether a row or the table is at fault.

use async_trait::async_trait;
use shardmill_config::RejectedMax;
use shardmill_config::WriteMode;
use shardmill_core::sink::{Commit, Refusal, RefusalLog, Sink, SinkError, SinkWriter};

use super::sink_at;
use crate::sink_postgres::{Mart, address, url};
use crate::sql_sinks::proxy::Proxy;
use crate::sql_sinks::{Log, commit, expect_unavailable, route, shard};

/// Makes a table whose trigger refuses ids. Ids from 100 to 199 raise a SQLSTATE that only the trigger uses; ids from
/// 200 on raise one that the server uses too.
async fn mart(test: &str) -> Mart {
    let mart = Mart::new(test).await;
    mart.sql(
        "CREATE TABLE cars (id bigint);
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN
                 IF NEW.id >= 200 THEN RAISE EXCEPTION 'not today' USING ERRCODE = 'no_data_found'; END IF;
                 IF NEW.id >= 100 THEN RAISE EXCEPTION 'no such car' USING ERRCODE = 'CAR01'; END IF;
                 RETURN NEW; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON cars FOR EACH ROW EXECUTE FUNCTION refuse();",
    )
    .await;
    mart
}

#[tokio::test]
async fn fault_08_a_code_that_only_user_code_raises_blames_the_row() {
    let mart = mart("fault_08_own").await;
    let (mut writer, log) = (mart.writer("cars").await, Log::default());
    // The row is alone in its commit.
    writer.commit(&commit(0, &[r#"{"id":100}"#]), &log).await.expect("committed");
    log.expect(&[(0, "CAR01")]);
    let rows = [r#"{"id":1}"#, r#"{"id":101}"#, r#"{"id":2}"#];
    writer.commit(&commit(1, &rows), &log).await.expect("committed");
    log.expect(&[(1, "CAR01")]);
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test]
async fn fault_08_any_other_code_blames_the_row_if_another_goes_in() {
    let mart = mart("fault_08_either").await;
    let (mut writer, log) = (mart.writer("cars").await, Log::default());
    let rows = [r#"{"id":200}"#, r#"{"id":1}"#, r#"{"id":201}"#, r#"{"id":2}"#];
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[(0, "P0002"), (2, "P0002")]);
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ' ORDER BY id) FROM cars").await, "1 2");
}

#[tokio::test]
async fn fault_08_rows_of_the_next_commit_show_whose_fault_it_is() {
    let mart = mart("fault_08_next").await;
    let (mut writer, log) = (mart.writer("cars").await, Log::default());
    let ahead = writer.looks_ahead().expect("it looks ahead");
    let first = commit(0, &[r#"{"id":200}"#]);
    ahead.see(&first.rows);
    // There is no other row to compare with: the table may be at fault.
    expect_unavailable(writer.commit(&first, &log).await, "P0002");
    let next = commit(1, &[r#"{"id":201}"#, r#"{"id":7}"#]);
    ahead.see(&next.rows);
    writer.commit(&first, &log).await.expect("the next commit has a row that goes in");
    log.expect(&[(0, "P0002")]);
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "0", "the next row was only tried");
    writer.commit(&next, &log).await.expect("committed");
    log.expect(&[(0, "P0002")]);
    assert_eq!(mart.one("SELECT string_agg(id::text, ' ') FROM cars").await, "7");
}

#[tokio::test]
async fn fault_08_a_table_that_takes_nothing_refuses_no_row() {
    let mart = Mart::new("fault_08_table").await;
    mart.sql(
        "CREATE TABLE cars (id bigint PRIMARY KEY);
         CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM no_such_function(NEW.id); RETURN NEW; END $$;
         CREATE TRIGGER broken BEFORE INSERT ON cars FOR EACH ROW EXECUTE FUNCTION broken();",
    )
    .await;
    for mode in [WriteMode::Append, WriteMode::Ignore { key: vec!["id".into()] }] {
        let sink = mart.keyed("cars", mode, false);
        let mut writer = crate::sink_postgres::acquire(&sink).await.writer;
        let log = Log::default();
        let ahead = writer.looks_ahead().expect("it looks ahead");
        let next = commit(3, &[r#"{"id":4}"#]);
        ahead.see(&next.rows);
        let rows = [r#"{"id":1}"#, r#"{"id":2}"#, r#"{"id":3}"#];
        expect_unavailable(writer.commit(&commit(0, &rows), &log).await, "42883");
        log.expect(&[]);
    }
}

/// Letter log with the limits on rejected records that a pipeline has.
struct Limited(RejectedMax);

#[async_trait]
impl RefusalLog for Limited {
    async fn record(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        self.check(commit, &refusals.iter().map(|refusal| refusal.row).collect::<Vec<_>>())
    }

    fn check(&self, _: &Commit, refused: &[usize]) -> Result<(), SinkError> {
        match refused.len() > self.0.in_a_row as usize {
            true => Err(SinkError::TooManyRefused { sink: "mart".into(), cause: "limit".into() }),
            false => Ok(()),
        }
    }
}

#[tokio::test]
async fn fault_08_the_search_stops_at_the_limits_of_rejections() {
    let mart = mart("fault_08_limit").await;
    let proxy = Proxy::start(address()).await;
    let sink = mart.sink_through(&proxy, "cars");
    let mut writer: Box<dyn SinkWriter> = crate::sink_postgres::acquire(&sink).await.writer;
    let rows: Vec<String> =
        (0..10_000).map(|id| format!(r#"{{"id":{}}}"#, 100 + id % 100)).collect();
    proxy.count("PGCOPY");
    let outcome = writer.commit(&commit(0, &rows), &Limited(RejectedMax::default())).await;
    assert!(matches!(outcome, Err(SinkError::TooManyRefused { .. })), "{outcome:?}");
    assert!(proxy.counted() < 500, "{} COPYs", proxy.counted());
}

#[tokio::test]
async fn fault_30_a_domain_over_a_domain_takes_rows() {
    let mart = Mart::new("fault_30_domain").await;
    mart.sql(
        "CREATE DOMAIN a AS bigint; CREATE DOMAIN b AS a CHECK (VALUE > 0); CREATE DOMAIN c AS b;
         CREATE DOMAIN many AS c[];
         CREATE TABLE cars (id c, ids c[], more many)",
    )
    .await;
    let sink = sink_at(&url(), "sink_fault_30_domain.cars", WriteMode::Append, 5_000);
    let declared = ["id sink_fault_30_domain.c?", "ids sink_fault_30_domain.c[]?"];
    sink.prepare(&[route(&declared)]).await.expect("prepared");
    let mut writer = sink.acquire(&shard("shardId-000000000000")).await.expect("acquired").writer;
    let log = Log::default();
    let rows = [r#"{"id":1,"ids":[1,2],"more":[3]}"#, r#"{"id":0}"#];
    writer.commit(&commit(0, &rows), &log).await.expect("committed");
    log.expect(&[(1, "23514")]);
    let shown = "SELECT string_agg(concat_ws(' ', id, ids, more), ';') FROM cars";
    assert_eq!(mart.one(shown).await, "1 {1,2} {3}");
}
