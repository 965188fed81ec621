//! The state database: one SQLite file per pipeline (`state.db`), in WAL mode with `synchronous = FULL`.
//!
//! **Invariants.**
//!
//! - A write is durable when [`StateStore::transact`] returns, and all or nothing: one transaction.
//! - It went into the file that is at the path. SQLite goes on writing into a file that was deleted, moved or
//!   replaced, and nobody would ever read that. So device and inode are compared before a transaction and after its
//!   commit; a difference ends the run.
//! - Unreadable content is an error, never a default ([`damaged`]).
//!
//! **Order of writers.** One connection per process, behind a fair lock: writes happen in the order in which they
//! were requested, and no thread waits for its turn. A caller that is dropped before its turn has written nothing;
//! one that is dropped later may have. Between processes (a command beside a running pipeline) SQLite's lock
//! decides. Each transaction starts as a writer (`IMMEDIATE`): one that begins as a reader and writes later fails
//! at once if another process has written in between.
//!
//! **The mark.** The state has a random id and counts its writes. Sinks keep the newest mark that they have seen,
//! so that an older copy of the state is noticed ([`age`](super::agreement::age)). The count starts only after that
//! comparison: an older copy must not catch up by being started again and again.

use std::borrow::Cow;
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Transaction, TransactionBehavior};
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};

use super::damaged;
use super::migrations::{self, NotMigrated, version};
use shardmill_core::boxed;
use shardmill_core::owner::{Ownership, StateMark};
use shardmill_core::private;
use shardmill_core::record::{Position, SequenceNumber};

/// The statements of one transaction.
type Work = Box<dyn FnOnce(&Transaction<'_>) -> rusqlite::Result<()> + Send>;

/// Maximum depth of a state database below the state folder: `pipeline/again-1/pipeline/state.db`.
const STATE_DEPTH_MAX: u32 = 4;

/// A pipeline's state database; cheap to clone.
#[derive(Clone)]
pub struct StateStore {
    path: Arc<Path>,
    connection: Arc<Mutex<Connection>>,
    files: Arc<OpenFiles>,
    ownership: Ownership,
    /// Writes are counted once it is known that no sink has seen a later state: an older copy must not catch up by
    /// being started again and again.
    counts: Arc<AtomicBool>,
}

/// Device and inode of the files that the connection has open. SQLite goes on writing into a file that was deleted
/// or moved away, and nobody would ever read that.
struct OpenFiles(Vec<(PathBuf, (u64, u64))>);

impl OpenFiles {
    /// Notes the database and its write-ahead log.
    fn of(path: &Path) -> std::io::Result<Self> {
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        let mut files = vec![(path.to_owned(), file_number(path)?)];
        let log = PathBuf::from(log);
        if let Ok(number) = file_number(&log) {
            files.push((log, number));
        }
        Ok(Self(files))
    }

    /// Checks that the paths still lead to the open files.
    fn check(&self) -> Result<(), WriteFailure> {
        for (path, number) in &self.0 {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match file_number(path) {
                Ok(found) if found == *number => {}
                Ok(_) => return Err(WriteFailure::Gone(format!("{name} was replaced"))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(WriteFailure::Gone(format!("{name} was deleted or moved away")));
                }
                // It cannot be looked at, which does not prove that it is another file.
                Err(_) => {}
            }
        }
        Ok(())
    }
}

fn file_number(path: &Path) -> std::io::Result<(u64, u64)> {
    let found = std::fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Why nothing was written, or why it is unknown whether the write lasts.
pub(super) enum WriteFailure {
    Sql(rusqlite::Error),
    /// The files at the path are not the open ones any more.
    Gone(String),
}

impl From<rusqlite::Error> for WriteFailure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

/// The state database cannot be used, or refused a write.
#[derive(Clone, Debug, thiserror::Error)]
#[error("state database {path}: failed to {action}: {cause}; {way_out}")]
pub struct StateError {
    path: String,
    action: &'static str,
    cause: String,
    way_out: Cow<'static, str>,
    is_final: bool,
}

impl StateError {
    /// Whether a retry cannot help: the database at the path is not the one that was opened, or a value in it is
    /// invalid.
    pub fn is_final(&self) -> bool {
        self.is_final
    }
}

impl StateStore {
    /// Opens `state.db` in the folder. Creates both if they are missing.
    ///
    /// # Errors
    /// [`StateError`]: the folder cannot be written (full, read-only), or the file cannot be used.
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        let path: PathBuf = folder.join("state.db");
        let error = |action, cause: String, way_out: &'static str| StateError {
            path: path.display().to_string(),
            action,
            cause,
            way_out: way_out.into(),
            is_final: false,
        };
        private::make_folders(folder).map_err(|cause| {
            error(
                "create its folder",
                cause.to_string(),
                "free the disk, or set `state_dir` elsewhere",
            )
        })?;
        // Created first, with a private mode: SQLite gives its log and index the mode of the database.
        private::make_database(&path);
        let mut connection = Connection::open(&path).and_then(prepare).map_err(|cause| {
            error("open it", cause.to_string(), "free the disk, or set `state_dir` elsewhere")
        })?;
        migrations::migrate(&mut connection).map_err(|cause| {
            let action = match cause {
                NotMigrated::Sql(_) => "open it",
                _ => "use it",
            };
            error(action, cause.to_string(), cause.way_out())
        })?;
        let mark = mark(&connection)
            .map_err(|cause| error("read its mark", cause.to_string(), "move the file away"))?;
        let files = OpenFiles::of(&path)
            .map_err(|cause| error("check its file", cause.to_string(), "try again"))?;
        Ok(Self {
            path: path.into(),
            connection: Arc::new(Mutex::new(connection)),
            files: Arc::new(files),
            ownership: Ownership::new(mark),
            counts: Arc::default(),
        })
    }

    /// Returns who writes to sinks with this state, and its mark.
    pub fn ownership(&self) -> Ownership {
        self.ownership.clone()
    }

    /// Reads the mark from the file: another process may have advanced it.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read, or was replaced.
    pub async fn mark(&self) -> Result<StateMark, StateError> {
        // Taken before the file is read: another task may write meanwhile.
        let known = self.ownership.mark();
        let found = self.transact("read its mark", |state| mark(state)).await?;
        if found.state != known.state || found.number < known.number {
            let cause = "it was replaced by another or an older file".to_owned();
            return Err(self.failed("read its mark", WriteFailure::Gone(cause)));
        }
        self.ownership.reached(found.number);
        Ok(found)
    }

    /// Checks that the database is still the one that was opened.
    ///
    /// # Errors
    /// [`StateError`]; see [`StateError::is_final`].
    pub async fn verify(&self) -> Result<(), StateError> {
        self.mark().await.map(drop)
    }

    /// Starts to count durable writes, from a number above `seen`, which is the highest number of this state in a
    /// sink. Call it only after it is known that no sink has seen a later state.
    ///
    /// # Errors
    /// [`StateError`]; no sink may be written to then.
    pub async fn begin_counting(&self, seen: i64) -> Result<(), StateError> {
        self.counts.store(true, Ordering::Release);
        self.transact("store its mark", move |state| {
            state.execute("UPDATE state_mark SET number = max(number, ?1)", [seen])
        })
        .await
        .map(drop)
    }

    /// Opens the database of a folder for a command that only reads. `None` if there is none, or if it is of an
    /// older version: opening it would migrate it, under a process of that version that may be using it.
    ///
    /// # Errors
    /// [`StateError`] as of [`StateStore::open`].
    pub fn open_if_current(folder: &Path) -> Result<Option<Self>, StateError> {
        let path = folder.join("state.db");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let found = match path.exists() {
            true => Connection::open_with_flags(&path, flags).and_then(|own| version(&own)),
            false => return Ok(None),
        };
        match found {
            Ok(found) if found < migrations::NEWEST => Ok(None),
            // Opening it gives the error.
            _ => Self::open(folder).map(Some),
        }
    }

    /// Whether a folder has a database of an earlier version. [`StateStore::open`] would migrate it, and a process
    /// of that version could not go on with it.
    ///
    /// # Errors
    /// [`StateError`]: there is a database and it cannot be read.
    pub fn is_of_earlier_version(folder: &Path) -> Result<bool, StateError> {
        let path = folder.join("state.db");
        if !path.exists() {
            return Ok(false);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let found = Connection::open_with_flags(&path, flags).and_then(|connection| {
            connection.busy_timeout(Duration::from_secs(10))?;
            version(&connection)
        });
        found.map(|version| version < migrations::NEWEST).map_err(|cause| StateError {
            path: path.display().to_string(),
            action: "read its version",
            cause: cause.to_string(),
            way_out: "nothing was changed".into(),
            is_final: false,
        })
    }

    /// Runs `work` in one transaction on a blocking thread; it is durable on return.
    ///
    /// # Errors
    /// [`StateError`] naming `action`; nothing was changed, or only a file that was replaced meanwhile.
    pub async fn transact<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StateError> {
        let (give, mut given) = oneshot::channel();
        let work = Box::new(move |state: &Transaction<'_>| {
            // If the caller dropped its future, the transaction is committed nevertheless.
            work(state).map(|value| drop(give.send(value)))
        });
        self.transact_any(action, work).await?;
        given.try_recv().map_err(|_| self.error(action, "its thread returned no value".into()))
    }

    /// Runs `work` as [`StateStore::transact`] does, without a value. All transactions have one type here, so that
    /// this code is compiled once and not for each query.
    #[boxed]
    async fn transact_any(&self, action: &'static str, work: Work) -> Result<(), StateError> {
        let connection = self.turn().await;
        let store = self.clone();
        let done = tokio::task::spawn_blocking(move || store.in_transaction(connection, work));
        self.outcome(action, done.await)
    }

    /// Waits for the connection, in the order of the requests. No thread waits for it, and a caller that is dropped
    /// before its turn writes nothing.
    pub(super) async fn turn(&self) -> OwnedMutexGuard<Connection> {
        self.connection.clone().lock_owned().await
    }

    /// Returns the folder of the database.
    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// Rewrites the database without its free pages if it is not larger than `bytes_max`, and empties its
    /// write-ahead log: deleted content is then gone from the disk.
    ///
    /// # Errors
    /// [`StateError`]; the content is unchanged.
    pub(super) async fn vacuum(&self, bytes_max: i64) -> Result<(), StateError> {
        let action = "remove its free pages";
        let connection = self.turn().await;
        let done = tokio::task::spawn_blocking(move || {
            let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
            if number("PRAGMA page_count")? * number("PRAGMA page_size")? <= bytes_max {
                connection.execute_batch("VACUUM")?;
            }
            number("PRAGMA wal_checkpoint(TRUNCATE)").map(drop).map_err(WriteFailure::Sql)
        });
        self.outcome(action, done.await)
    }

    /// Reads the bytes of a stored component, and compares them with their digest.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn component(&self, digest: String) -> Result<Option<Vec<u8>>, StateError> {
        self.transact("read a stored component", move |state| {
            let mut query = state.prepare("SELECT bytes FROM component WHERE digest = ?1")?;
            let found: Option<Vec<u8>> = query.query_row([&digest], |row| row.get(0)).optional()?;
            found
                .map(|bytes| damaged::validate_component(&digest, &bytes).map(|()| bytes))
                .transpose()
        })
        .await
    }

    /// Reads the components whose digests begin with these digits, at most two: enough to see that they are
    /// ambiguous.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn components(&self, digits: String) -> Result<Vec<(String, Vec<u8>)>, StateError> {
        self.transact("read a stored component", move |state| {
            let mut query = state.prepare(
                "SELECT digest, bytes FROM component WHERE substr(digest, 1, length(?1)) = ?1 LIMIT 2",
            )?;
            let found = query.query_map([digits], |row| {
                let (digest, bytes): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
                damaged::validate_component(&digest, &bytes)?;
                Ok((digest, bytes))
            })?;
            found.collect()
        })
        .await
    }

    /// Returns the error for a write that the store refuses now and accepts once the user has followed the way out.
    /// The lane waits and retries.
    pub(super) fn refused(
        &self,
        action: &'static str,
        cause: String,
        way_out: impl Into<Cow<'static, str>>,
    ) -> StateError {
        StateError { is_final: false, ..self.unreadable(action, cause, way_out) }
    }

    /// Returns the error for a value that cannot be read although the database can. Retries cannot help, so it ends
    /// the run.
    pub(super) fn unreadable(
        &self,
        action: &'static str,
        cause: String,
        way_out: impl Into<Cow<'static, str>>,
    ) -> StateError {
        let (path, way_out) = (self.path.display().to_string(), way_out.into());
        StateError { path, action, cause, way_out, is_final: true }
    }

    fn outcome<T>(
        &self,
        action: &'static str,
        done: Result<Result<T, WriteFailure>, tokio::task::JoinError>,
    ) -> Result<T, StateError> {
        match done {
            Ok(done) => done.map_err(|failure| self.failed(action, failure)),
            Err(cause) => Err(self.error(action, cause.to_string())),
        }
    }

    /// Returns the error for a transaction that was not done, and that may succeed later.
    pub(super) fn error(&self, action: &'static str, cause: String) -> StateError {
        StateError {
            path: self.path.display().to_string(),
            action,
            cause,
            way_out: "nothing was changed; free the disk or repair the file: a running pipeline retries, a command must be \
                      run again"
                .into(),
            is_final: false,
        }
    }

    /// Returns the error for a transaction that failed, or that may not last.
    pub(super) fn failed(&self, action: &'static str, failure: WriteFailure) -> StateError {
        match failure {
            WriteFailure::Sql(cause) if damaged::is_damage(&cause) => {
                self.unreadable(action, damaged::describe(&cause), damaged::WAY_OUT)
            }
            WriteFailure::Sql(cause) => self.error(action, cause.to_string()),
            WriteFailure::Gone(what) => StateError {
                path: self.path.display().to_string(),
                action,
                cause: format!("{what} while this process used it"),
                way_out:
                    "restore the state folder as it was and start again; without it, a start continues \
                          from the sinks' positions, and the dead letters are lost"
                        .into(),
                is_final: true,
            },
        }
    }

    /// Runs `work` in one transaction; it is durable on return.
    pub(super) fn in_transaction(
        &self,
        mut connection: OwnedMutexGuard<Connection>,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), WriteFailure> {
        self.files.check()?;
        // A transaction that starts as a reader cannot become a writer once another process has written: SQLite
        // refuses at once, without waiting for the lock.
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let before = transaction.total_changes();
        work(&transaction)?;
        let counts = self.counts.load(Ordering::Acquire);
        let number = match counts && transaction.total_changes() > before {
            true => Some(count(&transaction)?),
            false => None,
        };
        transaction.commit()?;
        // A commit into a file that nobody can open again is not durable.
        self.files.check()?;
        if let Some(number) = number {
            self.ownership.reached(number);
        }
        Ok(())
    }
}

/// Reads the state's id, and the number of its last counted write.
fn mark(connection: &Connection) -> rusqlite::Result<StateMark> {
    connection.query_row("SELECT id, number FROM state_mark", [], |row| {
        Ok(StateMark { state: row.get::<_, String>(0)?.into(), number: row.get(1)? })
    })
}

/// Counts the write in progress.
fn count(transaction: &rusqlite::Transaction<'_>) -> rusqlite::Result<i64> {
    transaction
        .prepare_cached("UPDATE state_mark SET number = number + 1 RETURNING number")?
        .query_row([], |row| row.get(0))
}

/// Collects the digests of all components that pipelines with their state below a folder still need.
///
/// # Errors
/// One of their databases cannot be read: then it is unknown what it needs.
pub fn needed_components(state_dir: &Path) -> Result<HashSet<String>, StateError> {
    let (mut needed, mut folders) = (HashSet::new(), vec![(state_dir.to_owned(), 0)]);
    while let Some((folder, depth)) = folders.pop() {
        let error = |cause: String| StateError {
            path: folder.display().to_string(),
            action: "read which components are needed",
            cause,
            way_out: "compiled plugins that are not needed any more stay".into(),
            is_final: false,
        };
        let state = folder.join("state.db");
        if state.exists() {
            let digests = digests(&state).map_err(|cause| error(cause.to_string()))?;
            needed.extend(digests);
        }
        if depth == STATE_DEPTH_MAX {
            continue;
        }
        for entry in std::fs::read_dir(&folder).map_err(|cause| error(cause.to_string()))? {
            let entry = entry.map_err(|cause| error(cause.to_string()))?;
            // A link may lead in circles, and no state of ours lies under one.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push((entry.path(), depth + 1));
            }
        }
    }
    Ok(needed)
}

fn digests(state: &Path) -> rusqlite::Result<Vec<String>> {
    let state = Connection::open_with_flags(state, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    state.busy_timeout(Duration::from_secs(2))?;
    let mut digests = state.prepare("SELECT digest FROM component")?;
    digests.query_map([], |row| row.get(0))?.collect()
}

fn prepare(connection: Connection) -> rusqlite::Result<Connection> {
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Converts a position to two columns. Sequence numbers are zero-padded, so that text order is number order.
/// SQLite's own numbers are doubles past 64 bits: neighbouring sequence numbers would compare equal.
pub(super) fn columns(position: &Position) -> (String, u64) {
    (position.sequence.zero_padded(), position.sub_sequence)
}

/// Reverses [`columns`].
pub(super) fn position(sequence: String, sub_sequence: u64) -> rusqlite::Result<Position> {
    let sequence = SequenceNumber::parse(&sequence).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.into())
    })?;
    Ok(Position { sequence, sub_sequence })
}

/// Returns the time in milliseconds since 1970, for columns that people read.
pub(super) fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wall_04_dead_letters_of_an_earlier_version_share_their_record() {
        let folder = tempfile::tempdir().expect("a folder");
        let old = Connection::open(folder.path().join("state.db")).expect("a database");
        old.execute_batch(crate::assets::schemas::V5).expect("the schema of version 5");
        let dead_letter =
            "INSERT INTO dead_letter VALUES (?1, 'shard', ?2, 0, ?3, ?4, 0, x'6b', ?5, x'6b', ?6,
                          7, 'p', 'd', 'why', '', 9, 'all')";
        let original = vec![b'o'; 1_000];
        for (stream, sequence, place, output, was, entered) in [
            ("s", "1", "stage:a", 0, &original[..], &original[..]),
            ("s", "1", "stage:b", 0, &original[..], &b"e"[..]),
            ("s", "1", "stage:b", 1, &original[..], &b"f"[..]),
            // Of a redrive in progress.
            ("letters:p@5", "1", "stage:c", 0, &b"e"[..], &b"e"[..]),
        ] {
            let values = (stream, sequence, place, output, was, entered);
            old.execute(dead_letter, values).expect("a letter");
        }
        old.execute("INSERT INTO redrive VALUES (5, 1, 2)", []).expect("a redrive");
        old.pragma_update(None, "user_version", 5).expect("set");
        drop(old);
        let store = StateStore::open(folder.path()).expect("opened");
        let dead_letters = crate::DeadLetters::new(store.clone());
        let found = dead_letters.select(Default::default(), 10).await.expect("letters");
        let entered: Vec<&[u8]> =
            found.iter().map(|dead_letter| &dead_letter.entered[..]).collect();
        assert_eq!(entered, [&original[..], &b"e"[..], &b"f"[..]]);
        assert!(found.iter().all(|dead_letter| dead_letter.original == original));
        let ids: Vec<i64> = found.iter().map(|dead_letter| dead_letter.id).collect();
        assert_eq!(ids, [1, 2, 3], "numbers stay");
        let look = |state: &Transaction<'_>| -> rusqlite::Result<(i64, i64, i64)> {
            let number = |sql: &str| state.query_row(sql, [], |row| row.get(0));
            Ok((
                number("SELECT count(*) FROM letter_record")?,
                number("SELECT count(*) FROM letters WHERE record = 1")?,
                number("SELECT bytes FROM letter_store")?,
            ))
        };
        let (records, of_record, bytes) = store.transact("look", look).await.expect("read");
        assert_eq!((records, of_record), (1, 4), "the redrive's letter is of that record");
        assert!((1_000 + 4 * 512..1_000 + 5 * 600).contains(&bytes), "{bytes}");
        dead_letters.purge(Default::default()).await.expect("purged");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn two_processes_that_read_and_then_write_wait_for_each_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let stores = [(); 2].map(|()| StateStore::open(folder.path()).expect("opened"));
        let count = async |store: &StateStore| {
            for _ in 0..100 {
                let counted = store.transact("count", |state| {
                    let number: i64 =
                        state.query_row("SELECT number FROM state_mark", [], |row| row.get(0))?;
                    // Another connection may write at this moment.
                    std::thread::yield_now();
                    state.execute("UPDATE state_mark SET number = ?1", [number + 1])
                });
                counted.await.expect("counted");
            }
        };
        tokio::join!(count(&stores[0]), count(&stores[1]));
        let number = stores[0].mark().await.expect("read").number;
        assert_eq!(number, 200);
    }
}
