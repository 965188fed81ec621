//! Dead letters, replays and swaps: a rerun record takes effect once.

mod redrives;
mod replays;
mod swaps;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::{Process, output, postgres_url, shardmill, sqlite};

/// Pipeline in a folder of its own.
struct Folder {
    folder: tempfile::TempDir,
    name: String,
}

impl Folder {
    /// Uses a name that no other test has, because several tests keep positions in one database.
    fn new(test: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self { folder, name: format!("{test}-{}", std::process::id()) }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn file(&self) -> PathBuf {
        self.path().join("pipeline.toml")
    }

    /// Returns a table name that no other test has.
    fn table(&self, name: &str) -> String {
        format!("{}_{name}", self.name.replace('-', "_"))
    }

    /// Edits the pipeline's file.
    fn replace(&self, old: &str, new: &str) {
        let text = std::fs::read_to_string(self.file()).expect("read");
        assert!(text.contains(old), "{old}: {text}");
        std::fs::write(self.file(), text.replace(old, new)).expect("written");
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = shardmill(arguments);
        command.current_dir(self.path());
        command
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let done = output(&mut self.command(arguments));
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {error}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// Runs a command that must fail; returns its error.
    fn refused(&self, arguments: &[&str]) -> String {
        let done: Output = output(&mut self.command(arguments));
        let said = String::from_utf8_lossy(&done.stdout);
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {said}");
        String::from_utf8_lossy(&done.stderr).into_owned()
    }

    fn report(&self, arguments: &[&str]) -> Value {
        let said = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(said.lines().last().unwrap_or_default()).expect("JSON")
    }

    /// Runs `dlq redrive`; returns how many dead letters were redriven, failed again, and are left.
    fn redriven(&self, arguments: &[&str]) -> (u64, u64, u64) {
        let report = self.report(&[&["dlq", "redrive"], arguments].concat());
        let count = |name: &str| report[name].as_u64().unwrap_or_default();
        (count("letters"), count("failed_again"), count("left"))
    }

    /// Returns the places (stage or sink) of the dead letters, sorted.
    fn dead_letters(&self) -> Vec<String> {
        let listed = self.ok(&["dlq", "list", "--json", "--limit", "10000"]);
        let place = |line: &str| {
            let dead_letter: Value = serde_json::from_str(line).expect("JSON");
            dead_letter["place"].as_str().expect("a place").to_owned()
        };
        let mut places: Vec<String> = listed.lines().map(place).collect();
        places.sort_unstable();
        places
    }

    fn start(&self, arguments: &[&str]) -> Process {
        let mut command = self.command(arguments);
        let started = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Process(started.expect("the binary starts"))
    }

    fn state(&self) -> rusqlite::Connection {
        sqlite(&self.path().join("state").join(&self.name).join("state.db"))
    }

    /// Runs an SQL query on the state; returns the number.
    fn count_in_state(&self, sql: &str) -> u64 {
        self.state().query_row(sql, [], |row| row.get(0)).expect(sql)
    }
}

/// Lock on a table: nobody else can use the table until this is dropped.
pub(super) struct Locked {
    runtime: tokio::runtime::Runtime,
    client: Option<tokio_postgres::Client>,
}

impl Locked {
    pub(super) fn table(table: &str) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let client = runtime.block_on(async {
            let (client, connection) =
                tokio_postgres::connect(&postgres_url(), tokio_postgres::NoTls)
                    .await
                    .expect("a server");
            tokio::spawn(connection);
            let lock = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
            client.batch_execute(&lock).await.expect("locked");
            client
        });
        Self { runtime, client: Some(client) }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            // The lock is released before this returns, not some time later.
            let ended = self.runtime.block_on(client.batch_execute("ROLLBACK"));
            if !std::thread::panicking() {
                ended.expect("unlocked");
            }
        }
    }
}
