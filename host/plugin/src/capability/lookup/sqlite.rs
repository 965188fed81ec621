//! Rows from a SQLite file, opened read-only.
//!
//! The keys are bound as one JSON array that `json_each(?1)` expands. SQLite has no arrays, and a statement with
//! one parameter per key would have to be prepared for each number of keys.

use std::fmt::Write as _;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use deadpool::managed::{Manager, Metrics, Object, Pool, QueueMode, RecycleError, RecycleResult};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, Statement};
use tokio::runtime::Handle;
use tokio::time::timeout_at;

use super::found::{Asked, FoundRows};
use super::{LookupError, pool_error, stopped};
use shardmill_core::masking::sanitized;
use shardmill_core::off_thread;

/// Steps of SQLite's virtual machine between two checks of the deadline: well below a millisecond.
const STEPS: i32 = 10_000;

/// Maximum number of connections, shared by the lanes. One slow query must not stop all, and each connection caches
/// up to 2 MiB of the file.
const CONNECTIONS_MAX: usize = 4;

/// The query of a file, and the connections that lanes share.
pub(super) struct SqliteTable {
    query: String,
    /// Hands out connections in the order of requests, so that a lane that asks constantly is not served before one
    /// that waits.
    connections: Pool<Opener>,
    runtime: Handle,
}

/// Opens the connections of the pool.
///
/// A slot of the pool is empty while a query runs: the query owns the connection and returns it after success. If a
/// query fails, the next call opens the file again.
struct Opener {
    path: PathBuf,
}

struct Open {
    connection: Connection,
    /// Device and inode of the file that was opened.
    file: (u64, u64),
}

impl SqliteTable {
    pub(super) fn new(path: PathBuf, query: &str, runtime: Handle) -> Result<Self, LookupError> {
        // The pool needs no timeouts: each call has a deadline.
        let connections = Pool::builder(Opener { path })
            .max_size(CONNECTIONS_MAX)
            .queue_mode(QueueMode::Lifo)
            .build()
            .map_err(|error| LookupError::lasting(error.to_string()))?;
        Ok(Self { query: query.to_owned(), connections, runtime })
    }

    /// Opens the file, and runs the query without keys.
    pub(super) fn prepare(&self, deadline: Instant) -> Result<(), LookupError> {
        self.fetch(&[], deadline, &mut FoundRows::default())
    }

    /// Adds the rows of `keys` to `found`. Call it from a thread that may block.
    pub(super) fn fetch(
        &self,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut FoundRows,
    ) -> Result<(), LookupError> {
        let mut slot = self.turn(deadline)?;
        let mut open = match slot.take() {
            Some(open) => open,
            None => self.opener().open()?,
        };
        let fetched = self.fetch_on(&mut open.connection, keys, deadline, found);
        if fetched.is_ok() {
            *slot = Some(open);
        }
        fetched
    }

    /// Waits for a connection until `deadline`.
    fn turn(&self, deadline: Instant) -> Result<Object<Opener>, LookupError> {
        let turn = async { timeout_at(deadline.into(), self.connections.get()).await };
        match off_thread::wait_on(&self.runtime, turn).ok_or_else(stopped)? {
            Ok(slot) => slot.map_err(pool_error),
            Err(_) => Err(self.failed("the queries of other lanes took too long")),
        }
    }

    fn opener(&self) -> &Opener {
        self.connections.manager()
    }

    fn fetch_on(
        &self,
        connection: &mut Connection,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut FoundRows,
    ) -> Result<(), LookupError> {
        let failed = |error: rusqlite::Error| match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted) => self.failed("the query took too long"),
            _ => self.failed(error),
        };
        // A writer locks a file for moments only. If it takes longer, the stage retries.
        let left = deadline.saturating_duration_since(Instant::now());
        connection.busy_timeout(left).map_err(failed)?;
        let is_late = move || Instant::now() >= deadline;
        connection.progress_handler(STEPS, Some(is_late)).map_err(failed)?;
        let mut statement = connection.prepare_cached(&self.query).map_err(failed)?;
        self.check(&statement)?;
        let columns: Vec<String> = statement.column_names().skip(1).map(json_text).collect();
        let texts = Asked::new(keys, |key| Some(key.to_owned()));
        // An integer key may be written in several ways.
        let numbers = Asked::new(keys, |key| key.parse::<i64>().ok());
        let array = serde_json::Value::from_iter(keys.iter().map(|key| &**key)).to_string();
        let mut rows = statement.query([array]).map_err(failed)?;
        while let Some(row) = rows.next().map_err(failed)? {
            let key = row.get_ref(0).map_err(failed)?;
            let asked = match key {
                ValueRef::Integer(number) => numbers.keys(&number),
                ValueRef::Text(bytes) => {
                    std::str::from_utf8(bytes).ok().and_then(|key| texts.keys(key))
                }
                ValueRef::Real(number) => texts.keys(number.to_string().as_str()),
                ValueRef::Null => continue, // nobody's key
                ValueRef::Blob(_) => None,
            };
            match asked {
                Some(keys) => found.add(keys, &self.json(&columns, row)?)?,
                None => found.add_unrequested(&shown(key)),
            }
        }
        Ok(())
    }

    fn check(&self, statement: &Statement<'_>) -> Result<(), LookupError> {
        let names: Vec<&str> = statement.column_names().collect();
        let twice = (1..names.len()).find(|place| names[1..*place].contains(&names[*place]));
        let cause = if !statement.readonly() {
            "expected a query that only reads, found one that writes".to_owned()
        } else if statement.parameter_count() != 1 {
            format!(
                "expected a query with one parameter, the keys \
                 (WHERE id IN (SELECT value FROM json_each(?1))), found {} parameters",
                statement.parameter_count()
            )
        } else if names.len() < 2 {
            format!(
                "expected a query with at least two columns, the key first, found {}",
                names.len()
            )
        } else if let Some(place) = twice {
            format!("the query has two columns named {:?}: rename one with AS", names[place])
        } else {
            return Ok(());
        };
        // The configuration is wrong, or the table was altered: retryable, because no record must be rejected for
        // it.
        Err(LookupError::retryable(cause))
    }

    /// Returns the columns after the key as a JSON object. `columns`: their names as JSON texts.
    fn json(&self, columns: &[String], row: &Row<'_>) -> Result<String, LookupError> {
        let mut json = String::from("{");
        for (place, column) in columns.iter().enumerate() {
            let value = row.get_ref(place + 1).map_err(|error| self.failed(error))?;
            if place > 0 {
                json.push(',');
            }
            json.push_str(column);
            json.push(':');
            if !write_value(&mut json, value) {
                let cause =
                    format!("{}: invalid UTF-8 in the column {column}", self.opener().place());
                return Err(LookupError::lasting(cause));
            }
        }
        json.push('}');
        Ok(json)
    }

    fn failed(&self, cause: impl std::fmt::Display) -> LookupError {
        self.opener().failed(cause)
    }
}

impl Opener {
    fn open(&self) -> Result<Open, LookupError> {
        let file = self.file()?;
        let connection = open_file(&self.path).map_err(|error| self.failed(error))?;
        Ok(Open { connection, file })
    }

    /// Returns the identity of the file that is at the path now.
    fn file(&self) -> Result<(u64, u64), LookupError> {
        let file = std::fs::metadata(&self.path).map_err(|error| self.failed(error))?;
        Ok(identity(&file))
    }

    fn place(&self) -> String {
        format!("SQLite at {}", self.path.display())
    }

    fn failed(&self, cause: impl std::fmt::Display) -> LookupError {
        LookupError::retryable(format!("{}: {}", self.place(), sanitized(cause)))
    }
}

/// Both functions open or stat files. Only [`SqliteTable::turn`] calls them, on a thread that may block.
impl Manager for Opener {
    /// Empty while a query owns the connection.
    type Type = Option<Open>;
    type Error = LookupError;

    async fn create(&self) -> Result<Option<Open>, LookupError> {
        self.open().map(Some)
    }

    /// Tables are often replaced by renaming a new file over the old one.
    async fn recycle(&self, open: &mut Option<Open>, _: &Metrics) -> RecycleResult<LookupError> {
        match open {
            Some(open) if open.file == self.file()? => Ok(()),
            _ => Err(RecycleError::message("the file was replaced, or a query failed")),
        }
    }
}

fn open_file(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch("PRAGMA query_only = ON")?;
    Ok(connection)
}

/// Appends a value; false: it is a text that is not UTF-8.
fn write_value(json: &mut String, value: ValueRef<'_>) -> bool {
    match value {
        ValueRef::Null => json.push_str("null"),
        // Writing into a String cannot fail.
        ValueRef::Integer(number) => _ = write!(json, "{number}"),
        ValueRef::Real(number) => match serde_json::Number::from_f64(number) {
            Some(number) => _ = write!(json, "{number}"),
            // As PostgreSQL writes it; SQLite has no NaN.
            None => json.push_str(if number > 0.0 { "\"Infinity\"" } else { "\"-Infinity\"" }),
        },
        ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => json.push_str(&json_text(text)),
            Err(_) => return false,
        },
        ValueRef::Blob(bytes) => {
            json.push('"');
            STANDARD.encode_string(bytes, json);
            json.push('"');
        }
    }
    true
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn shown(key: ValueRef<'_>) -> String {
    match key {
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        ValueRef::Null | ValueRef::Blob(_) => "(bytes)".to_owned(),
    }
}

#[cfg(unix)]
fn identity(file: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (file.dev(), file.ino())
}

/// On other systems an open file cannot be replaced.
#[cfg(not(unix))]
fn identity(_file: &Metadata) -> (u64, u64) {
    (0, 0)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::runtime::Runtime;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Creates a table in a new file, by `script`.
    fn table(folder: &Path, runtime: &Runtime, script: &str) -> SqliteTable {
        let path = folder.join("t.db");
        Connection::open(&path).expect("a database").execute_batch(script).expect(script);
        let query = "SELECT * FROM t WHERE id IN (SELECT value FROM json_each(?1))";
        SqliteTable::new(path, query, runtime.handle().clone()).expect("a table")
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[test]
    fn wall_06_turns_on_connections_are_taken_in_the_order_of_the_calls() {
        let (folder, runtime) =
            (tempfile::tempdir().expect("a folder"), Runtime::new().expect("one"));
        let table = table(folder.path(), &runtime, "CREATE TABLE t (id INT, v INT)");
        let mut turns: Vec<_> =
            (0..CONNECTIONS_MAX).map(|_| table.turn(soon()).expect("a connection")).collect();
        assert!(table.turn(soon()).is_err(), "all are in use");
        let (first, first_has_it) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let table = &table;
            scope.spawn(move || {
                let _turn = table.turn(Instant::now() + LONG).expect("the first turn");
                first.send(()).expect("a test");
                let _ = ended.recv_timeout(LONG);
            });
            let begun = Instant::now();
            while table.connections.status().waiting == 0 {
                assert!(begun.elapsed() < LONG, "nobody waits");
                std::thread::yield_now();
            }
            turns.pop();
            assert!(table.turn(soon()).is_err(), "who came later was served first");
            assert_eq!(first_has_it.recv_timeout(LONG), Ok(()));
            drop(end);
        });
        let status = table.connections.status();
        assert_eq!((status.waiting, status.available, status.size), (0, 1, CONNECTIONS_MAX));
    }

    #[test]
    fn a_connection_comes_back_after_success_alone() {
        let (folder, runtime) =
            (tempfile::tempdir().expect("a folder"), Runtime::new().expect("one"));
        let table = table(
            folder.path(),
            &runtime,
            "CREATE TABLE t (id INT, v TEXT); INSERT INTO t VALUES (1, 'a'), (2, CAST(x'ff' AS TEXT))",
        );
        let fetch = |key: &str| {
            table.fetch(&[key.into()], Instant::now() + LONG, &mut FoundRows::default())
        };
        let is_kept = || {
            let slot = table.turn(soon()).expect("a turn");
            Object::metrics(&slot).recycle_count > 0
        };
        assert_eq!(fetch("1"), Ok(()));
        assert!(is_kept());
        // A text that is not UTF-8.
        assert!(fetch("2").is_err());
        assert!(!is_kept());
        assert_eq!(fetch("1"), Ok(()));
        std::fs::remove_file(folder.path().join("t.db")).expect("removed");
        let gone = fetch("1").expect_err("no file");
        assert!(gone.retryable && gone.message.contains("t.db"), "{gone:?}");
        assert_eq!(table.connections.status().size, 0);
    }
}
