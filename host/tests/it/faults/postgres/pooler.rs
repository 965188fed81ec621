//! PgBouncer in transaction mode in front of the server: rows go where they belong, and sessions stay unchanged.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tokio_postgres::{Client, NoTls};

use crate::sink_postgres::address;
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, free_port, postgres, run_ok, shardmill, wait_for};

/// Number of server sessions of the pooler.
const SESSIONS: usize = 2;

/// Pooler in transaction mode with a pool of its own, on loopback.
struct PgBouncer {
    port: u16,
    database: String,
    _process: Process,
    _folder: tempfile::TempDir,
}

impl PgBouncer {
    /// Starts the pooler in front of a database of the throw-away server. PgBouncer refuses to run as root, so it
    /// runs as the server's user.
    fn start(database: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let server = address();
        let (host, server_port) = server.rsplit_once(':').expect("host and port");
        let config = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host={host} port={server_port} user=postgres\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = transaction\ndefault_pool_size = {SESSIONS}\n\
             max_client_conn = 200\n"
        );
        // Versions before 1.21 never track prepared statements, and reject the setting as unknown.
        let text = match follows_statements() {
            true => text + "max_prepared_statements = 0\n",
            false => text,
        };
        fs::write(&config, text).expect("written");
        let data = PathBuf::from(&postgres("SHOW data_directory")[0]);
        let owner = data.metadata().expect("the server's data");
        let own = PathBuf::from("/proc/self").metadata().expect("this process").uid();
        let mut command = Command::new("pgbouncer");
        if own == 0 {
            for path in [folder.path(), &config] {
                chown(path, Some(owner.uid()), Some(owner.gid())).expect("owner changed");
            }
            command = Command::new("setpriv");
            command.args([format!("--reuid={}", owner.uid()), format!("--regid={}", owner.gid())]);
            command.args(["--clear-groups", "pgbouncer"]);
        }
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin")).arg("-q").arg(&config);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process =
            Process(process.expect("pgbouncer: run `cargo xtask test`, which installs it"));
        wait_for("the pooler", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { port, database: database.into(), _process: process, _folder: folder }
    }

    fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{}", self.port, self.database)
    }

    async fn client(&self) -> Client {
        let (client, connection) =
            tokio_postgres::connect(&self.url(), NoTls).await.expect("a pooler");
        tokio::spawn(connection);
        client
    }

    /// Runs statements in each server session, in transactions that overlap; returns the first column of the last
    /// statement's rows, by session.
    async fn in_each_session(&self, sql: &str) -> Vec<Vec<String>> {
        let mut clients = Vec::new();
        for _ in 0..SESSIONS {
            let client = self.client().await;
            client.batch_execute("BEGIN").await.expect("a transaction");
            clients.push(client);
        }
        let mut found = Vec::new();
        for client in &clients {
            let answers = client.simple_query(sql).await.expect(sql);
            let rows = answers.iter().filter_map(|answer| match answer {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(ToOwned::to_owned),
                _ => None,
            });
            found.push(rows.collect());
        }
        for client in &clients {
            client.batch_execute("COMMIT").await.expect("committed");
        }
        found
    }

    /// Returns everything that a session can keep: statements, settings, temporary tables, locks, channels.
    async fn traces(&self) -> Vec<Vec<String>> {
        let mut traces = self
            .in_each_session(
                "SELECT 'statement ' || name FROM pg_prepared_statements
                 UNION ALL SELECT concat_ws(' ', 'setting', name, setting) FROM pg_settings
                     WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding')
                 UNION ALL SELECT 'table ' || relname FROM pg_class
                     WHERE relnamespace = pg_my_temp_schema()
                 UNION ALL SELECT 'lock' FROM pg_locks
                     WHERE locktype = 'advisory' AND pid = pg_backend_pid()
                 UNION ALL SELECT 'channel ' || pg_listening_channels() ORDER BY 1",
            )
            .await;
        traces.sort();
        traces
    }
}

/// Whether this version tracks prepared statements: from 1.21 on.
fn follows_statements() -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let said = Command::new("pgbouncer")
        .env("PATH", format!("{path}:/usr/sbin"))
        .arg("--version")
        .output();
    let said = String::from_utf8(said.expect("pgbouncer").stdout).expect("text");
    let version = said.split_whitespace().nth(1).unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or_default());
    (numbers.next(), numbers.next()) >= (Some(1), Some(21))
}

#[test]
fn fault_26_behind_a_pooler_rows_land_in_their_tables_and_sessions_stay_as_they_were() {
    const ROWS: usize = 6_000;
    let database = format!("fault_26_{}", std::process::id());
    postgres(&format!("CREATE DATABASE {database}"));
    let pooler = PgBouncer::start(&database);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let tables = ["one", "two", "merged"];
    let create = "CREATE TABLE one (id bigint, of text); CREATE TABLE two (id bigint, of text); \
        CREATE TABLE merged (id bigint PRIMARY KEY, of text); \
        CREATE TABLE places (id bigint PRIMARY KEY, name text, mood text); \
        INSERT INTO places VALUES (1, 'Rome', 'fine')";
    runtime.block_on(async { pooler.client().await.batch_execute(create).await.expect("tables") });
    // Another application with the same client library has left statements under the names that our client uses.
    let leave: String =
        (0..6).map(|n| format!("PREPARE s{n} AS SELECT count(*) FROM places; ")).collect();
    runtime.block_on(pooler.in_each_session(&leave));
    let before = runtime.block_on(pooler.traces());
    assert_eq!(before.len(), SESSIONS);

    let folders: Vec<tempfile::TempDir> =
        tables.iter().map(|_| tempfile::tempdir().expect("a folder")).collect();
    let mut files = Vec::new();
    for (table, folder) in tables.iter().zip(&folders) {
        let rows = folder.path().join("rows.ndjson");
        // Each key of the merged table comes twice, so that rows go through the staging table.
        let id = |n: usize| if *table == "merged" { n % (ROWS / 2) } else { n };
        let lines: Vec<String> =
            (0..ROWS).map(|n| format!(r#"{{"id":{},"of":"{table}"}}"#, id(n))).collect();
        fs::write(&rows, lines.join("\n")).expect("written");
        let mode = match *table {
            "merged" => "mode = \"upsert\"\nkey = [\"id\"]\n",
            _ => "",
        };
        let sink = format!(
            "[[sink]]\nname = \"mart\"\ntype = \"postgres\"\nurl = \"{}\"\ntable = \"{table}\"\n\
             {mode}[sink.commit]\nrows = 100\nlinger = \"50 ms\"",
            pooler.url()
        );
        let lookup = format!(
            "[[lookup]]\nname = \"places\"\nurl = \"{}\"\n\
             query = \"SELECT id, name, mood FROM places WHERE id = ANY($1)\"",
            pooler.url()
        );
        let pipeline = PipelineToml::new(folder.path(), table)
            .file(&rows, "")
            .route_all_to(&["mart"])
            .table(&sink)
            .table(&lookup);
        files.push(pipeline.write());
    }
    for path in &files {
        run_ok(&["check", path]);
    }
    assert_eq!(runtime.block_on(pooler.traces()), before, "after `check`");
    let runs: Vec<Process> = files
        .iter()
        .map(|path| {
            let mut run = shardmill(&["run", path, "--until-caught-up"]);
            Process(run.stdout(Stdio::null()).spawn().expect("the binary starts"))
        })
        .collect();
    for mut run in runs {
        assert!(run.wait().success());
    }
    let counts = "SELECT concat_ws(' ', count(*), count(DISTINCT id), min(of), max(of)) FROM ";
    for (table, rows) in tables.iter().zip([ROWS, ROWS, ROWS / 2]) {
        let found = runtime.block_on(pooler.in_each_session(&format!("{counts}{table}")));
        assert_eq!(found[0][0], format!("{rows} {rows} {table} {table}"));
    }
    assert_eq!(runtime.block_on(pooler.traces()), before, "after all rows");
    runtime.shutdown_background();
    drop(pooler);
    postgres(&format!("DROP DATABASE {database} WITH (FORCE)"));
}
