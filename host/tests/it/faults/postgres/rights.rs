//! Tables that can never take a row: `check` and the start must notice them.

use shardmill_config::WriteMode;
use shardmill_core::sink::Sink;

use super::{role, sink_at};
use crate::sink_postgres::{Mart, url};
use crate::sql_sinks::{commit, expect_unavailable, route, shard};

fn upsert() -> WriteMode {
    WriteMode::Upsert { key: vec!["id".into()], newest_by: None }
}

#[tokio::test]
async fn fault_31_missing_rights_are_named_and_granted_one_by_one() {
    let mart = Mart::new("fault_31_rights").await;
    let url = role(&mart.client, "fault_31_rights").await;
    let schema = "sink_fault_31_rights";
    mart.sql("CREATE TABLE cars (id bigint PRIMARY KEY, make text, secret text)").await;
    let append = sink_at(&url, &format!("{schema}.cars"), WriteMode::Append, 5_000);
    let merge = sink_at(&url, &format!("{schema}.cars"), upsert(), 5_000);
    let routes = [route(&["id bigint", "make text?"])];
    for (grant, append_says, merge_says) in [
        ("SELECT 1", "permission denied for schema", "permission denied for schema"),
        ("GRANT USAGE ON SCHEMA {} TO fault_31_rights", "no INSERT right", "no INSERT right"),
        ("GRANT INSERT (id) ON cars TO fault_31_rights", "no INSERT right on column \"make\"", ""),
        ("GRANT INSERT ON cars TO fault_31_rights", "may not create it: GRANT CREATE", ""),
        ("GRANT CREATE ON SCHEMA {} TO fault_31_rights", "", "needs INSERT, UPDATE and SELECT"),
        ("GRANT SELECT, UPDATE ON cars TO fault_31_rights", "", ""),
    ] {
        mart.sql(&grant.replace("{}", schema)).await;
        for (sink, says) in [(&append, append_says), (&merge, merge_says)] {
            match (says, sink.prepare(&routes).await) {
                ("", outcome)
                    if grant.starts_with("GRANT SELECT") || std::ptr::eq(sink, &append) =>
                {
                    outcome.unwrap_or_else(|why| panic!("after {grant}: {why}"));
                }
                ("", _) => {}
                (says, outcome) => expect_unavailable(outcome, says),
            }
        }
    }
    for sink in [&append, &merge] {
        sink.acquire(&shard("shardId-000000000000")).await.map(drop).expect("acquired");
    }
    // The position table exists by now, and belongs to another role.
    mart.sql("CREATE TABLE others (LIKE shardmill_position); ALTER TABLE shardmill_position OWNER TO postgres").await;
    expect_unavailable(append.prepare(&routes).await, "cannot store positions");
    mart.sql("GRANT SELECT, INSERT, UPDATE ON shardmill_position TO fault_31_rights").await;
    append.prepare(&routes).await.expect("prepared");
    mart.sql("ALTER TABLE cars ENABLE ROW LEVEL SECURITY").await;
    expect_unavailable(append.prepare(&routes).await, "row-level security");
    mart.sql("DROP OWNED BY fault_31_rights").await;
}

#[tokio::test]
async fn fault_31_what_is_not_a_table_is_refused_and_nothing_is_written() {
    let mart = Mart::new("fault_31_kinds").await;
    mart.sql(
        "CREATE TABLE cars (id bigint PRIMARY KEY);
         CREATE VIEW seen AS SELECT id FROM cars;
         CREATE MATERIALIZED VIEW kept AS SELECT id FROM cars;
         CREATE SEQUENCE counted;
         CREATE VIEW writable AS SELECT id FROM cars;
         CREATE FUNCTION pass_on() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO sink_fault_31_kinds.cars VALUES (NEW.id); RETURN NEW; END $$;
         CREATE TRIGGER pass_on INSTEAD OF INSERT ON writable FOR EACH ROW EXECUTE FUNCTION pass_on();
         CREATE TABLE parted (id bigint PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE part PARTITION OF parted DEFAULT;
         CREATE TABLE audited (id bigint);
         CREATE TABLE audit (at int);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO sink_fault_31_kinds.audit VALUES (1); RETURN NULL; END $$;
         CREATE TRIGGER note AFTER INSERT ON audited EXECUTE FUNCTION note();",
    )
    .await;
    let sink =
        |table: &str, mode| sink_at(&url(), &format!("sink_fault_31_kinds.{table}"), mode, 5_000);
    for (table, says) in
        [("seen", "is a view"), ("kept", "is a materialized view"), ("counted", "is a sequence")]
    {
        expect_unavailable(sink(table, WriteMode::Append).prepare(&[route(&[])]).await, says);
    }
    for table in ["cars", "writable", "parted", "audited"] {
        let sink = sink(table, WriteMode::Append);
        sink.prepare(&[route(&["id bigint"])]).await.unwrap_or_else(|why| panic!("{table}: {why}"));
        let mut writer = sink.acquire(&shard(table)).await.expect("acquired").writer;
        assert_eq!(mart.one("SELECT count(*) FROM audit").await, "0", "{table}");
        if table != "audited" {
            let rows = [format!(r#"{{"id":{}}}"#, table.len())];
            writer.commit(&commit(0, &rows), &crate::sql_sinks::Log::default()).await.expect(table);
        }
    }
    for table in ["cars", "parted"] {
        let sink = sink(table, upsert());
        sink.prepare(&[route(&["id bigint"])]).await.unwrap_or_else(|why| panic!("{table}: {why}"));
    }
    expect_unavailable(sink("writable", upsert()).prepare(&[route(&[])]).await, "is a view");
}

#[tokio::test]
async fn fault_30_a_deferrable_key_is_refused() {
    let mart = Mart::new("fault_30_key").await;
    mart.sql(
        "CREATE TABLE late (id bigint PRIMARY KEY DEFERRABLE, make text);
         CREATE TABLE pair (a int, b int, UNIQUE (b, a) DEFERRABLE INITIALLY DEFERRED, UNIQUE (a, b));
         CREATE TABLE fine (id bigint PRIMARY KEY, other int UNIQUE DEFERRABLE)",
    )
    .await;
    let key = |names: &[&str]| WriteMode::Upsert {
        key: names.iter().map(|name| (*name).into()).collect(),
        newest_by: None,
    };
    for (table, mode, says) in [
        ("late", key(&["id"]), "DEFERRABLE"),
        ("late", WriteMode::Ignore { key: vec!["id".into()] }, "DEFERRABLE"),
        ("pair", key(&["a", "b"]), "DEFERRABLE"),
    ] {
        let sink = mart.keyed(table, mode, false);
        expect_unavailable(sink.prepare(&[route(&[])]).await, says);
    }
    mart.keyed("fine", key(&["id"]), false).prepare(&[route(&[])]).await.expect("prepared");
}

#[tokio::test]
async fn fault_31_an_upsert_without_the_right_to_temporary_tables_is_refused() {
    let mart = Mart::new("fault_31_temp").await;
    let database = format!("fault_31_temp_{}", std::process::id());
    let as_role = role(&mart.client, "fault_31_temp").await;
    mart.sql(&format!("CREATE DATABASE {database}")).await;
    mart.sql(&format!("REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC")).await;
    let mut own = url::Url::parse(&url()).expect("a URL");
    own.set_path(&database);
    let (client, connection) =
        tokio_postgres::connect(own.as_str(), tokio_postgres::NoTls).await.expect("a server");
    let connection = tokio::spawn(connection);
    let create = "CREATE TABLE cars (id bigint PRIMARY KEY); \
        GRANT ALL ON cars TO fault_31_temp; GRANT CREATE ON SCHEMA public TO fault_31_temp";
    client.batch_execute(create).await.expect("a table");
    let mut as_role = url::Url::parse(&as_role).expect("a URL");
    as_role.set_path(&database);
    let append = sink_at(as_role.as_str(), "public.cars", WriteMode::Append, 5_000);
    append.prepare(&[route(&["id bigint"])]).await.expect("prepared");
    let merge = sink_at(as_role.as_str(), "public.cars", upsert(), 5_000);
    expect_unavailable(merge.prepare(&[route(&["id bigint"])]).await, "temporary tables");
    let grant = format!("GRANT TEMPORARY ON DATABASE {database} TO fault_31_temp");
    client.batch_execute(&grant).await.expect("granted");
    merge.prepare(&[route(&["id bigint"])]).await.expect("prepared");
    drop((append, merge, client));
    connection.await.expect("no panic").expect("closed");
    mart.sql(&format!("DROP DATABASE {database} WITH (FORCE)")).await;
}

#[tokio::test]
async fn fault_31_what_each_row_calls_must_be_allowed() {
    let mart = Mart::new("fault_31_calls").await;
    let url = role(&mart.client, "fault_31_calls").await;
    let schema = "sink_fault_31_calls";
    mart.sql(&format!(
        "CREATE FUNCTION is_fine(bigint) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT true';
         REVOKE EXECUTE ON FUNCTION is_fine FROM PUBLIC;
         CREATE TABLE cars (id bigint CHECK (is_fine(id)), n bigserial,
             own bigint GENERATED BY DEFAULT AS IDENTITY);
         GRANT USAGE, CREATE ON SCHEMA {schema} TO fault_31_calls;
         GRANT INSERT, SELECT, UPDATE ON cars TO fault_31_calls"
    ))
    .await;
    let sink = sink_at(&url, &format!("{schema}.cars"), WriteMode::Append, 5_000);
    let routes = [route(&["id bigint"])];
    for (grant, says) in [
        ("SELECT 1", "GRANT EXECUTE ON FUNCTION"),
        ("GRANT EXECUTE ON FUNCTION is_fine TO fault_31_calls", "GRANT USAGE ON SEQUENCE"),
        ("GRANT USAGE ON SEQUENCE cars_n_seq TO fault_31_calls", ""),
    ] {
        mart.sql(grant).await;
        match says {
            "" => sink.prepare(&routes).await.unwrap_or_else(|why| panic!("after {grant}: {why}")),
            says => expect_unavailable(sink.prepare(&routes).await, says),
        }
    }
    mart.sql("DROP OWNED BY fault_31_calls").await;
}

#[tokio::test]
async fn fault_31_a_position_table_that_is_not_as_ours_is_refused() {
    let mart = Mart::new("fault_31_places").await;
    mart.sql("CREATE TABLE cars (id bigint)").await;
    let table = "sink_fault_31_places.cars";
    let sink = sink_at(&url(), table, WriteMode::Append, 5_000);
    let routes = [route(&["id bigint"])];
    sink.acquire(&shard("shardId-000000000000")).await.map(drop).expect("acquired");
    sink.prepare(&routes).await.expect("prepared");
    for (spoil, says) in [
        ("ALTER TABLE shardmill_position DROP CONSTRAINT shardmill_position_pkey", "ON CONFLICT"),
        ("ALTER TABLE shardmill_position ADD PRIMARY KEY (pipeline, sink, stream, shard)", ""),
        ("ALTER TABLE shardmill_position RENAME sub_sequence TO sub", "sub_sequence"),
        ("ALTER TABLE shardmill_position RENAME sub TO sub_sequence", ""),
        ("ALTER TABLE shardmill_position ALTER sequence TYPE text", "numeric"),
    ] {
        mart.sql(spoil).await;
        match says {
            "" => sink.prepare(&routes).await.unwrap_or_else(|why| panic!("after {spoil}: {why}")),
            says => expect_unavailable(sink.prepare(&routes).await, says),
        }
    }
}
