//! Sessions of the pool: which are returned to it, and which are closed.

use shardmill_config::WriteMode;
use shardmill_core::sink::{Acquired, Sink};

use super::{role, sink_at};
use crate::sink_postgres::Mart;
use crate::sql_sinks::{Log, commit, expect_unavailable, shard};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, postgres, postgres_url, run_ok, shardmill, wait_for};

#[tokio::test]
async fn fault_07_a_failed_create_shows_its_cause_until_the_grant_and_then_goes_on() {
    let mart = Mart::new("fault_07_create").await;
    let url = role(&mart.client, "fault_07_create").await;
    mart.sql(
        "CREATE TABLE cars (id bigint); GRANT USAGE ON SCHEMA sink_fault_07_create TO fault_07_create;
         GRANT INSERT ON cars TO fault_07_create",
    )
    .await;
    let sink = sink_at(&url, "sink_fault_07_create.cars", WriteMode::Append, 5_000);
    let shard = shard("shardId-000000000000");
    for _ in 0..3 {
        let refused = sink.acquire(&shard).await.map(drop);
        expect_unavailable(refused, "permission denied for schema");
    }
    mart.sql("GRANT CREATE ON SCHEMA sink_fault_07_create TO fault_07_create").await;
    sink.acquire(&shard).await.map(drop).expect("acquired after the GRANT");
}

#[tokio::test]
async fn fault_07_a_session_with_a_read_only_server_is_not_kept() {
    let mart = Mart::new("fault_07_read_only").await;
    let url = role(&mart.client, "fault_07_read_only").await;
    mart.sql(
        "CREATE TABLE cars (id bigint);
         GRANT USAGE, CREATE ON SCHEMA sink_fault_07_read_only TO fault_07_read_only;
         GRANT INSERT ON cars TO fault_07_read_only",
    )
    .await;
    let sink = sink_at(&url, "sink_fault_07_read_only.cars", WriteMode::Append, 5_000);
    let shard = shard("shardId-000000000000");
    let Acquired { mut writer, .. } = sink.acquire(&shard).await.expect("acquired");
    // New sessions are read-only, as those with a standby after a failover.
    mart.sql("ALTER ROLE fault_07_read_only SET default_transaction_read_only = on").await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE usename = 'fault_07_read_only'";
    mart.sql(end).await;
    let (log, first) = (Log::default(), commit(0, &[r#"{"id":1}"#]));
    // The first commit may find that its session has ended.
    let _ = writer.commit(&first, &log).await;
    for _ in 0..2 {
        expect_unavailable(writer.commit(&first, &log).await.map(drop), "read-only transaction");
    }
    mart.sql("ALTER ROLE fault_07_read_only RESET default_transaction_read_only").await;
    writer.commit(&first, &log).await.expect("a session with the server as it is now");
    assert_eq!(mart.one("SELECT count(*) FROM cars").await, "1");
}

#[test]
fn fault_07_sinks_of_one_server_share_their_connections() {
    let folder = tempfile::tempdir().expect("a folder");
    let schema = format!("fault_07_pool_{}", std::process::id());
    let tables = ["one", "two", "three", "four"];
    postgres(&format!("CREATE SCHEMA {schema}"));
    for table in tables {
        postgres(&format!("CREATE TABLE {schema}.{table} (id bigint)"));
    }
    let file = folder.path().join("rows.ndjson");
    let lines: Vec<String> = (0..20_000).map(|id| format!(r#"{{"id":{id}}}"#)).collect();
    std::fs::write(&file, lines.join("\n")).expect("written");
    let url = format!("{}?application_name={schema}", postgres_url());
    let mut pipeline =
        PipelineToml::new(folder.path(), "pool").file(&file, "").route_all_to(&tables);
    for table in tables {
        pipeline = pipeline.sink(
            table,
            &format!(
                "type = \"postgres\"\nurl = \"{url}\"\ntable = \"{schema}.{table}\"\nconnections = 2"
            ),
        );
    }
    let path = pipeline.write();
    let run = shardmill(&["run", &path]).stdout(std::process::Stdio::null()).spawn();
    let mut run = Process(run.expect("the binary starts"));
    let count =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{schema}'");
    let mut connections = 0;
    wait_for("the rows", || {
        connections = connections.max(postgres(&count)[0].parse::<u32>().expect("a number"));
        tables
            .iter()
            .all(|table| postgres(&format!("SELECT count(*) FROM {schema}.{table}"))[0] == "20000")
    });
    assert!((1..=2).contains(&connections), "{connections} connections for four tables");
    assert!(run.wait().success(), "the file has an end");
    postgres(&format!("DROP SCHEMA {schema} CASCADE"));
}

#[test]
fn fault_30_a_read_only_database_is_respected() {
    let database = format!("fault_30_{}", std::process::id());
    postgres(&format!("CREATE DATABASE {database}"));
    postgres(&format!("ALTER DATABASE {database} SET default_transaction_read_only = on"));
    let mut url = url::Url::parse(&postgres_url()).expect("a URL");
    url.set_path(&database);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("rows.ndjson");
    std::fs::write(&file, "{\"id\":1}\n").expect("written");
    let path = PipelineToml::new(folder.path(), "read-only")
        .file(&file, "")
        .route_all_to(&["mart"])
        .sink("mart", &format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"cars\""))
        .write();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let create = async {
        let (client, connection) =
            tokio_postgres::connect(url.as_str(), tokio_postgres::NoTls).await.expect("a server");
        tokio::spawn(connection);
        let create = "BEGIN READ WRITE; CREATE TABLE cars (id bigint); COMMIT";
        client.batch_execute(create).await.expect("a table");
    };
    runtime.block_on(create);
    let checked = crate::support::run(&["check", &path]);
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(!checked.status.success() && said.contains("read-only"), "{said}");
    runtime.shutdown_background();
    postgres(&format!("ALTER DATABASE {database} SET default_transaction_read_only = off"));
    run_ok(&["run", &path, "--until-caught-up"]);
    postgres(&format!("DROP DATABASE {database} WITH (FORCE)"));
}
