//! Rows from a SQLite file, opened for reading only.
//!
//! The keys are bound as one JSON array, which `json_each(?1)` unfolds: SQLite has no arrays, and a
//! statement with a parameter per key would be prepared anew for each number of keys.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::Metadata;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, Statement};

use super::LookupError;
use super::found::{Asked, Found};
use shardmill_core::masking::worded;

/// Steps of SQLite's machine between two looks at the clock: well below a millisecond.
const STEPS: i32 = 10_000;

/// Lanes share these, as with PostgreSQL: one slow query stops nobody else, and each connection keeps up to
/// 2 MiB of the file.
const CONNECTIONS_MAX: usize = 4;

/// A file's query, and the connections that lanes take turns on.
pub(super) struct SqliteTable {
    path: PathBuf,
    query: String,
    connections: Mutex<Connections>,
    /// Notified when a connection is given back, or another call is the first to wait.
    given_back: Condvar,
}

#[derive(Default)]
struct Connections {
    idle: Vec<Open>,
    in_use: usize,
    /// The tickets of calls that wait for a turn, in the order in which they came: a lane that asks again and
    /// again is not served before one that waits.
    waiting: VecDeque<u64>,
    tickets: u64,
}

/// A turn on a connection. The query runs on it without a lock that lanes share.
struct Turn<'t> {
    table: &'t SqliteTable,
    /// A connection to be given back, if it is sound.
    open: Option<Open>,
}

struct Open {
    connection: Connection,
    /// The file that was opened: its device and number.
    file: (u64, u64),
}

impl SqliteTable {
    pub(super) fn new(path: PathBuf, query: &str) -> Self {
        let (connections, given_back) = (Mutex::default(), Condvar::new());
        Self { path, query: query.to_owned(), connections, given_back }
    }

    /// Opens the file, and runs the query without a key.
    pub(super) fn prepare(&self, deadline: Instant) -> Result<(), LookupError> {
        self.fetch(&[], deadline, &mut Found::default())
    }

    /// Adds the rows of `keys` to `found`.
    pub(super) fn fetch(
        &self,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut Found,
    ) -> Result<(), LookupError> {
        let file = std::fs::metadata(&self.path).map_err(|error| self.failed(error))?;
        let mut turn = self.turn(deadline)?;
        // A table is often renewed by renaming a new file over it.
        let mut opened = match turn.open.take() {
            Some(opened) if opened.file == identity(&file) => opened,
            _ => Open {
                connection: self.open_file().map_err(|error| self.failed(error))?,
                file: identity(&file),
            },
        };
        let fetched = self.fetch_on(&mut opened.connection, keys, deadline, found);
        // A connection that failed is opened anew by the next call.
        if fetched.is_ok() {
            turn.open = Some(opened);
        }
        fetched
    }

    /// Waits for a turn until `deadline` at most.
    fn turn(&self, deadline: Instant) -> Result<Turn<'_>, LookupError> {
        let mut connections = self.connections();
        let ticket = connections.tickets;
        connections.tickets += 1;
        connections.waiting.push_back(ticket);
        while connections.in_use == CONNECTIONS_MAX || connections.waiting.front() != Some(&ticket)
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                connections.waiting.retain(|other| *other != ticket);
                drop(connections);
                // Another is the first now.
                self.given_back.notify_all();
                return Err(self.failed("the queries of other lanes took too long"));
            }
            let waited = self.given_back.wait_timeout(connections, left);
            connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        connections.waiting.pop_front();
        connections.in_use += 1;
        let open = connections.idle.pop();
        drop(connections);
        // There may be a connection for the next one too.
        self.given_back.notify_all();
        Ok(Turn { table: self, open })
    }

    /// A panic elsewhere leaves them whole: every change is a single call.
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetch_on(
        &self,
        connection: &mut Connection,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut Found,
    ) -> Result<(), LookupError> {
        let failed = |error: rusqlite::Error| match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted) => self.failed("the query took too long"),
            _ => self.failed(error),
        };
        // A writer holds a file for moments only; what takes longer is tried again by the stage.
        let left = deadline.saturating_duration_since(Instant::now());
        connection.busy_timeout(left).map_err(failed)?;
        let is_late = move || Instant::now() >= deadline;
        connection.progress_handler(STEPS, Some(is_late)).map_err(failed)?;
        let mut statement = connection.prepare_cached(&self.query).map_err(failed)?;
        self.check(&statement)?;
        let columns: Vec<String> = statement.column_names().skip(1).map(json_text).collect();
        let texts = Asked::new(keys, |key| Some(key.to_owned()));
        // An integer is one number however it is written.
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
                None => found.add_stranger(&shown(key)),
            }
        }
        Ok(())
    }

    fn open_file(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.execute_batch("PRAGMA query_only = ON")?;
        Ok(connection)
    }

    fn check(&self, statement: &Statement<'_>) -> Result<(), LookupError> {
        let names: Vec<&str> = statement.column_names().collect();
        let twice = (1..names.len()).find(|place| names[1..*place].contains(&names[*place]));
        let fault = if !statement.readonly() {
            "the query writes, and a lookup only reads".to_owned()
        } else if statement.parameter_count() != 1 {
            format!(
                "the query has {} parameters and is to have one, the keys: \
                 WHERE id IN (SELECT value FROM json_each(?1))",
                statement.parameter_count()
            )
        } else if names.len() < 2 {
            format!(
                "the query has {} columns and is to have two at least, the key first",
                names.len()
            )
        } else if let Some(place) = twice {
            format!("the query has two columns {:?}: give one another name by AS", names[place])
        } else {
            return Ok(());
        };
        // The configuration's fault, or a table's that was altered: no record is to be given up for it.
        Err(LookupError::retryable(fault))
    }

    /// The columns behind the key as a JSON object; `columns` are their names as JSON texts.
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
                let fault =
                    format!("{}: the column {column} has a text that is no UTF-8", self.place());
                return Err(LookupError::lasting(fault));
            }
        }
        json.push('}');
        Ok(json)
    }

    fn place(&self) -> String {
        format!("SQLite at {}", self.path.display())
    }

    fn failed(&self, cause: impl std::fmt::Display) -> LookupError {
        LookupError::retryable(format!("{}: {}", self.place(), worded(cause)))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut connections = self.table.connections();
        connections.in_use -= 1;
        connections.idle.extend(self.open.take());
        drop(connections);
        self.table.given_back.notify_all();
    }
}

/// Appends a value; false: it is no text.
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

/// Elsewhere an open file cannot be replaced.
#[cfg(not(unix))]
fn identity(_file: &Metadata) -> (u64, u64) {
    (0, 0)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn wall_06_turns_on_connections_are_taken_in_the_order_of_the_calls() {
        let table = SqliteTable::new(PathBuf::new(), "");
        let soon = || Instant::now() + Duration::from_millis(50);
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
            while table.connections().waiting.is_empty() {
                assert!(begun.elapsed() < LONG, "nobody waits");
                std::thread::yield_now();
            }
            turns.pop();
            assert!(table.turn(soon()).is_err(), "who came later was served first");
            assert_eq!(first_has_it.recv_timeout(LONG), Ok(()));
            drop(end);
        });
        assert!(table.connections().waiting.is_empty());
        assert_eq!(table.connections().in_use, CONNECTIONS_MAX - 1);
    }
}
