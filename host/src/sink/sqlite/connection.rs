//! The one connection to a SQLite file that a sink's shards take turns on.
//!
//! Whoever lets it go ends its transaction: what a dropped or failed call left open is rolled back
//! at once, so that no lock on the file outlives the call.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::table::LiveTable;

/// How long another process may hold the file's write lock before a commit gives up and is retried
/// by the delivery, visibly.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Prepared statements that are kept: one per set of columns, and a few of our own.
const STATEMENTS_MAX: usize = 64;

/// WAL: readers do not stop the writer. FULL: a commit is on the disk when it returns, because the
/// checkpoint follows it.
const SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;";

/// A connection that is opened when it is first needed.
pub(super) struct SharedConnection {
    path: Arc<Path>,
    open: Arc<Mutex<Option<Open>>>,
}

/// An open connection and what was learned on it.
pub(super) struct Open {
    pub(super) connection: Connection,
    /// The table as it was at a version of the schema.
    pub(super) table: Option<(i64, LiveTable)>,
}

/// The connection, held until dropped.
pub(super) struct Held {
    guard: OwnedMutexGuard<Option<Open>>,
}

impl SharedConnection {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path: path.into(), open: Arc::default() }
    }

    /// Waits for the connection, and opens it if need be.
    pub(super) async fn hold(&self) -> Result<Held, String> {
        let guard = Arc::clone(&self.open).lock_owned().await;
        let path = Arc::clone(&self.path);
        blocking(move || hold(guard, &path)).await?
    }
}

fn hold(mut guard: OwnedMutexGuard<Option<Open>>, path: &Path) -> Result<Held, String> {
    if guard.is_none() {
        *guard = Some(Open { connection: open(path)?, table: None });
    }
    Ok(Held { guard })
}

fn open(path: &Path) -> Result<Connection, String> {
    let failed = |error: rusqlite::Error| format!("cannot open {}: {error}", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    connection.execute_batch(SETTINGS).map_err(failed)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    Ok(connection)
}

impl std::ops::Deref for Held {
    type Target = Open;

    fn deref(&self) -> &Open {
        #[expect(clippy::expect_used, reason = "`hold` is the only maker and has filled it")]
        self.guard.as_ref().expect("an open connection")
    }
}

impl std::ops::DerefMut for Held {
    fn deref_mut(&mut self) -> &mut Open {
        #[expect(clippy::expect_used, reason = "`hold` is the only maker and has filled it")]
        self.guard.as_mut().expect("an open connection")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(open) = &*self.guard else { return };
        let is_clean =
            open.connection.is_autocommit() || open.connection.execute_batch("ROLLBACK").is_ok();
        if !is_clean {
            *self.guard = None;
        }
    }
}

/// Runs a call on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(call)
        .await
        .map_err(|error| format!("a call to SQLite did not end properly: {error}"))
}

/// A name as SQL has it: in double quotes.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
