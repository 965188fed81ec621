//! Connection to a SQLite file, which the shards of a sink share, one at a time.
//!
//! Invariants:
//! - No transaction outlives its [`LockedConnection`]: dropping it rolls back what a dropped or failed call has left
//!   open. So no lock on the file outlives the call.
//! - Every use is of the file that is at the path. The file may be moved or replaced while it is open, and commits
//!   would go into a file that nobody finds. So the file's id is compared before each use, and again after each commit.
//!
//! | file at the path, compared with the open one | then |
//! |---|---|
//! | the same | it is used |
//! | missing | an error: put it back |
//! | another one, without a log beside it | it is opened, and its positions are read |
//! | another one, with a log beside it | an error: SQLite would replay a log of the old file into the new one |

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::table::LiveTable;
use shardmill_core::masking::sanitized;
use shardmill_sinks_common::local;
use shardmill_sinks_common::local::FileId;

/// Longest wait of a commit for the file's write lock. After that the commit fails, and the delivery retries it
/// visibly.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait of a check for the write lock: a person waits for the check.
const CHECK_BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// Most prepared statements that are kept: one per set of columns, and a few of our own.
const STATEMENTS_MAX: usize = 64;

/// Settings of the file. WAL: readers do not stop the writer. FULL: a commit is durable when it returns, which the
/// checkpoint after it relies on.
const SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;";

/// A connection that is opened on first use.
pub(super) struct SharedConnection {
    path: Arc<Path>,
    slot: Arc<Mutex<Slot>>,
}

/// Place of the connection.
#[derive(Default)]
struct Slot {
    open: Option<Open>,
    /// Id of the file that was opened.
    file: Option<FileId>,
}

/// An open connection, and the table as it was last read.
pub(super) struct Open {
    pub(super) connection: Connection,
    /// The table, and the version of the schema at which it was read.
    pub(super) table: Option<(i64, LiveTable)>,
}

/// Exclusive use of the connection, until dropped.
pub(super) struct LockedConnection {
    slot: OwnedMutexGuard<Slot>,
    path: Arc<Path>,
}

impl SharedConnection {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path: path.into(), slot: Arc::default() }
    }

    /// Returns the path of the database file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the connection, and opens it if it is not open.
    pub(super) async fn lock(&self) -> Result<LockedConnection, String> {
        let slot = Arc::clone(&self.slot).lock_owned().await;
        let path = Arc::clone(&self.path);
        blocking(move || lock(slot, path)).await?
    }
}

fn lock(mut slot: OwnedMutexGuard<Slot>, path: Arc<Path>) -> Result<LockedConnection, String> {
    if let Some(known) = slot.file {
        match FileId::at(&path)? {
            Some(now) if now == known => {}
            None => return Err(moved(&path)),
            Some(_) => {
                may_reopen(&path)?;
                tracing::warn!(file = %path.display(), "the database file was replaced, reading its positions");
                *slot = Slot::default();
            }
        }
    }
    if slot.open.is_none() {
        let connection = open(&path)?;
        slot.file = FileId::at(&path)?;
        slot.open = Some(Open { connection, table: None });
    }
    Ok(LockedConnection { slot, path })
}

fn moved(path: &Path) -> String {
    format!(
        "{} is missing: it was moved or deleted while it was open, and commits would be lost with it; put it \
         back, with the files that end in -wal and -shm",
        path.display()
    )
}

/// Refuses to open another file at the path of the open one if a log is beside it. SQLite would replay a log of the old
/// file into the new one, and damage it.
fn may_reopen(path: &Path) -> Result<(), String> {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    match Path::new(&log).exists() {
        false => Ok(()),
        true => Err(format!(
            "{} was replaced by another file while it was open, and {} may belong to the old one: stop \
             this process, delete that log unless it came with the new file, and start again",
            path.display(),
            log.display()
        )),
    }
}

fn open(path: &Path) -> Result<Connection, String> {
    let failed =
        |error: rusqlite::Error| format!("cannot open {}: {}", path.display(), sanitized(error));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("cannot create folder {}: {error}", folder.display()))?;
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    connection.execute_batch(SETTINGS).map_err(failed)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    Ok(connection)
}

/// Opens the file for a check that does not change it. For a missing file, opens an empty database in memory.
pub(super) fn open_to_check(path: &Path) -> Result<Connection, String> {
    let failed =
        |error: rusqlite::Error| format!("cannot open {}: {}", path.display(), sanitized(error));
    // SQLite creates the log and its index beside the file, so the folder must be writable even if the database exists.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    local::check_writable(folder.unwrap_or(Path::new(".")))?;
    if FileId::at(path)?.is_none() {
        return Connection::open_in_memory().map_err(failed);
    }
    local::check_writable_file(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.busy_timeout(CHECK_BUSY_TIMEOUT).map_err(failed)?;
    Ok(connection)
}

impl LockedConnection {
    /// Checks that the open file is the one at its path.
    pub(super) fn check_file(&self) -> Result<(), String> {
        match FileId::at(&self.path)? {
            now if now == self.slot.file => Ok(()),
            _ => Err(moved(&self.path)),
        }
    }
}

impl std::ops::Deref for LockedConnection {
    type Target = Open;

    fn deref(&self) -> &Open {
        #[expect(clippy::expect_used, reason = "`lock` is the only maker and has filled it")]
        self.slot.open.as_ref().expect("an open connection")
    }
}

impl std::ops::DerefMut for LockedConnection {
    fn deref_mut(&mut self) -> &mut Open {
        #[expect(clippy::expect_used, reason = "`lock` is the only maker and has filled it")]
        self.slot.open.as_mut().expect("an open connection")
    }
}

impl Drop for LockedConnection {
    fn drop(&mut self) {
        let Some(open) = &self.slot.open else { return };
        let is_clean =
            open.connection.is_autocommit() || open.connection.execute_batch("ROLLBACK").is_ok();
        if !is_clean {
            self.slot.open = None;
        }
    }
}

/// Runs a call on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(call)
        .await
        .map_err(|error| format!("a call to SQLite was interrupted: {error}"))
}
