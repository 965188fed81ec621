//! The state database: one SQLite file per pipeline, every commit fsynced.

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

/// Statements of one transaction.
type Work = Box<dyn FnOnce(&Transaction<'_>) -> rusqlite::Result<()> + Send>;

/// How deep below the state folder a state database lies: `pipeline/again-1/pipeline/state.db`.
const STATE_DEPTH_MAX: u32 = 4;

/// A pipeline's state database; cheap to clone.
#[derive(Clone)]
pub struct StateStore {
    path: Arc<Path>,
    connection: Arc<Mutex<Connection>>,
    files: Arc<OpenFiles>,
    ownership: Ownership,
    /// Writes count from when it is known that no sink has seen a later state: a copy that was found
    /// to be older must not catch up by being started again and again.
    counts: Arc<AtomicBool>,
}

/// The files that the connection has open, as the file system numbers them. SQLite writes on into a
/// file that was deleted or moved away, and nobody would ever read that.
struct OpenFiles(Vec<(PathBuf, (u64, u64))>);

impl OpenFiles {
    /// The database and its write-ahead log.
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

    /// Looks whether the paths still lead to the open files.
    fn check(&self) -> Result<(), WriteFailure> {
        for (path, number) in &self.0 {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match file_number(path) {
                Ok(found) if found == *number => {}
                Ok(_) => return Err(WriteFailure::Gone(format!("{name} was replaced"))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(WriteFailure::Gone(format!("{name} was deleted or moved away")));
                }
                // It cannot be looked at: no proof that it is another.
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

/// Why nothing was written, or nobody knows whether it lasts.
pub(super) enum WriteFailure {
    Sql(rusqlite::Error),
    /// The open files are not those at the path any more.
    Gone(String),
}

impl From<rusqlite::Error> for WriteFailure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

/// The state database cannot be used.
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
    /// Whether trying again cannot help: the database at the path is not the one that was opened, or a value in it
    /// cannot be read.
    pub fn is_final(&self) -> bool {
        self.is_final
    }
}

impl StateStore {
    /// Opens or creates `state.db` in the folder, which is created as well.
    ///
    /// # Errors
    /// [`StateError`]: the folder cannot be written (full, read-only), or the file is not ours.
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
                "make its folder",
                cause.to_string(),
                "free the disk, or set `state_dir` elsewhere",
            )
        })?;
        // The log and its index get the mode of the database.
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
            .map_err(|cause| error("look at its file", cause.to_string(), "try again"))?;
        Ok(Self {
            path: path.into(),
            connection: Arc::new(Mutex::new(connection)),
            files: Arc::new(files),
            ownership: Ownership::new(mark),
            counts: Arc::default(),
        })
    }

    /// Who writes to sinks by this state, with its mark.
    pub fn ownership(&self) -> Ownership {
        self.ownership.clone()
    }

    /// The mark as it is in the file: another process may have moved it on.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read, or is another by now.
    pub async fn mark(&self) -> Result<StateMark, StateError> {
        // Before the file is read: another task may write meanwhile.
        let known = self.ownership.mark();
        let found = self.transact("read its mark", |state| mark(state)).await?;
        if found.state != known.state || found.number < known.number {
            let cause = "it was replaced by another or an older one".to_owned();
            return Err(self.failed("read its mark", WriteFailure::Gone(cause)));
        }
        self.ownership.reached(found.number);
        Ok(found)
    }

    /// Looks whether the database is still the one that was opened.
    ///
    /// # Errors
    /// [`StateError`]; see [`StateError::is_final`].
    pub async fn verify(&self) -> Result<(), StateError> {
        self.mark().await.map(drop)
    }

    /// Counts durable writes from here on, beginning above `seen` (a number of this state that a sink
    /// has seen): no sink knows a later state than this one.
    ///
    /// # Errors
    /// [`StateError`]; no sink may be written to then.
    pub async fn begin_counting(&self, seen: i64) -> Result<(), StateError> {
        self.counts.store(true, Ordering::Release);
        self.transact("note its mark", move |state| {
            state.execute("UPDATE state_mark SET number = max(number, ?1)", [seen])
        })
        .await
        .map(drop)
    }

    /// Opens the database of a folder for a command that only asks, if it is there and of this version:
    /// one of an older version is left as it is, for the process that runs with it.
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
            // Opening it says what is wrong with it.
            _ => Self::open(folder).map(Some),
        }
    }

    /// Whether a folder has a database of an earlier version, which [`StateStore::open`] would change: a
    /// process of that version that uses it could not go on.
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
    /// [`StateError`] naming `action`; nothing was changed.
    pub async fn transact<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StateError> {
        let (give, mut given) = oneshot::channel();
        let work = Box::new(move |state: &Transaction<'_>| {
            // The caller may have dropped its future. The transaction is written nevertheless.
            work(state).map(|value| drop(give.send(value)))
        });
        self.transact_any(action, work).await?;
        given.try_recv().map_err(|_| self.error(action, "its thread gave no value".into()))
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

    /// The connection, in the order in which it was asked for: no thread waits for it, and what is dropped
    /// before its turn is never written.
    pub(super) async fn turn(&self) -> OwnedMutexGuard<Connection> {
        self.connection.clone().lock_owned().await
    }

    /// The folder of the database.
    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// Rewrites the database without its free pages, if it is not larger than `bytes_max`, and empties its
    /// write-ahead log: what was deleted is gone from the disk.
    ///
    /// # Errors
    /// [`StateError`]; nothing that is in use was changed.
    pub(super) async fn vacuum(&self, bytes_max: i64) -> Result<(), StateError> {
        let action = "drop its free pages";
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

    /// The component's bytes, stored with a revision.
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

    /// The components whose digests begin with these digits, with their bytes; two at most.
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

    /// Gives the error for what the store does not take now, and takes once the way out was gone: a lane waits for it.
    pub(super) fn refused(
        &self,
        action: &'static str,
        cause: String,
        way_out: impl Into<Cow<'static, str>>,
    ) -> StateError {
        StateError { is_final: false, ..self.unreadable(action, cause, way_out) }
    }

    /// Gives the error for something in the database that cannot be read, though the database itself can. No further
    /// try helps: it ends the run.
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

    /// Why something was not done.
    pub(super) fn error(&self, action: &'static str, cause: String) -> StateError {
        StateError {
            path: self.path.display().to_string(),
            action,
            cause,
            way_out: "nothing was changed; free the disk or mend the file: a pipeline that runs tries it again, else give the command again".into(),
            is_final: false,
        }
    }

    /// Why a transaction was not done, or does not last.
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
                    "put the state folder back as it was and start again; without it, a start goes \
                          on from the sinks' positions, and the dead letters are lost"
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
        // One that began as a reader could not write once another process has written meanwhile: it would
        // fail at once, without a wait for its turn.
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let before = transaction.total_changes();
        work(&transaction)?;
        let counts = self.counts.load(Ordering::Acquire);
        let number = match counts && transaction.total_changes() > before {
            true => Some(count(&transaction)?),
            false => None,
        };
        transaction.commit()?;
        // What went into a file that nobody can open again is not durable.
        self.files.check()?;
        if let Some(number) = number {
            self.ownership.reached(number);
        }
        Ok(())
    }
}

/// The state's id, and the number of its last counted write.
fn mark(connection: &Connection) -> rusqlite::Result<StateMark> {
    connection.query_row("SELECT id, number FROM state_mark", [], |row| {
        Ok(StateMark { state: row.get::<_, String>(0)?.into(), number: row.get(1)? })
    })
}

/// Counts the write under way.
fn count(transaction: &rusqlite::Transaction<'_>) -> rusqlite::Result<i64> {
    transaction
        .prepare_cached("UPDATE state_mark SET number = number + 1 RETURNING number")?
        .query_row([], |row| row.get(0))
}

/// The digests of the components that pipelines with their state below a folder keep.
///
/// # Errors
/// Why one of them cannot be read: then it is not known what they need.
pub fn needed_components(state_dir: &Path) -> Result<HashSet<String>, StateError> {
    let (mut needed, mut folders) = (HashSet::new(), vec![(state_dir.to_owned(), 0)]);
    while let Some((folder, depth)) = folders.pop() {
        let error = |cause: String| StateError {
            path: folder.display().to_string(),
            action: "read which components are kept",
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
            // A link may lead in circles, and nothing of ours is behind one.
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

/// A position as two columns. Sequence numbers are padded: text order is then number order, which
/// SQLite's own numbers (doubles past 64 bits) cannot give.
pub(super) fn columns(position: &Position) -> (String, u64) {
    (position.sequence.zero_padded(), position.sub_sequence)
}

/// The reverse of [`columns`].
pub(super) fn position(sequence: String, sub_sequence: u64) -> rusqlite::Result<Position> {
    let sequence = SequenceNumber::parse(&sequence).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.into())
    })?;
    Ok(Position { sequence, sub_sequence })
}

/// Milliseconds since 1970, for columns that people read.
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
            // Of a redrive under way.
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
                    // Another connection may write in this moment.
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
