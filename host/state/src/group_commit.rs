//! Group commit: entries of many lanes are written in one transaction.
//!
//! Each commit waits for the disk, and lanes write checkpoints at the same time. Every writer adds its entry to a
//! list and asks for the connection. Whoever gets it first writes all entries of the list and reports the outcome
//! to each writer.
//!
//! The races:
//!
//! - **A writer is dropped before its entry is taken.** Its channel is closed, so the entry is left out: a write
//!   that was abandoned is never made later.
//! - **The writer that got the connection is dropped.** The write runs on a blocking thread and reports to all
//!   others.
//! - **The thread panics.** All channels close without an outcome. The writers start over; an entry that was
//!   written after all is written twice, so [`BatchedEntry`] must be idempotent.
//! - **A writer gets the connection although its entry was just written.** The connection is free a moment before
//!   the outcome arrives. It writes what has gathered since, possibly nothing, and then receives its own outcome.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Transaction;
use tokio::sync::oneshot;

use super::store::{StateError, StateStore};

/// An entry that is written together with others. Writing it twice must change nothing.
pub(super) trait BatchedEntry: Clone + Send + 'static {
    /// The action that error messages name.
    const ACTION: &'static str;

    /// Writes it within a transaction.
    fn write(&self, state: &Transaction<'_>) -> rusqlite::Result<()>;
}

/// Entries that wait to be written. Whoever gets the database first writes all of them.
pub(super) struct GroupCommit<E> {
    store: StateStore,
    waiting: Arc<Mutex<Vec<Waiting<E>>>>,
}

struct Waiting<E> {
    entry: E,
    /// Receives the outcome. Closed: nobody waits any more, and the entry is not written.
    done: oneshot::Sender<Result<(), StateError>>,
}

impl<E> Clone for GroupCommit<E> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), waiting: self.waiting.clone() }
    }
}

impl<E: BatchedEntry> GroupCommit<E> {
    pub(super) fn new(store: StateStore) -> Self {
        Self { store, waiting: Arc::default() }
    }

    /// Writes an entry; it is durable on return.
    ///
    /// # Errors
    /// [`StateError`]; nothing was changed.
    pub(super) async fn write(&self, entry: E) -> Result<(), StateError> {
        loop {
            let (done, mut written) = oneshot::channel();
            self.lock().push(Waiting { entry: entry.clone(), done });
            tokio::select! {
                // The outcome first: if another writer has written this entry meanwhile, the connection is not
                // needed.
                biased;
                outcome = &mut written => match outcome {
                    Ok(outcome) => return outcome,
                    Err(_) => continue,
                },
                connection = self.store.turn() => {
                    let own = self.clone();
                    // It reports to all who wait, even if this future is dropped.
                    tokio::task::spawn_blocking(move || own.write_waiting(connection));
                }
            }
            match written.await {
                Ok(outcome) => return outcome,
                // The thread has panicked.
                Err(_) => continue,
            }
        }
    }

    fn write_waiting(&self, connection: tokio::sync::OwnedMutexGuard<rusqlite::Connection>) {
        let mut taken = std::mem::take(&mut *self.lock());
        // Abandoned entries are left out: their writers got no answer, and may have decided otherwise.
        taken.retain(|waiting| !waiting.done.is_closed());
        let write_all = |state: &Transaction<'_>| {
            taken.iter().try_for_each(|waiting| waiting.entry.write(state))
        };
        let outcome = self
            .store
            .in_transaction(connection, write_all)
            .map_err(|failure| self.store.failed(E::ACTION, failure));
        for waiting in taken {
            let _ = waiting.done.send(outcome.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waiting<E>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Mark(i64);

    impl BatchedEntry for Mark {
        const ACTION: &'static str = "write a mark";

        fn write(&self, state: &Transaction<'_>) -> rusqlite::Result<()> {
            state.execute("INSERT INTO mark VALUES (?1)", [self.0]).map(drop)
        }
    }

    #[tokio::test]
    async fn fault_39_entries_that_wait_at_the_same_time_are_one_transaction() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let schema = "CREATE TABLE mark (n INTEGER)";
        store.transact("make a table", |state| state.execute_batch(schema)).await.expect("made");
        let group = GroupCommit::new(store.clone());
        // While another task has the database, all entries gather.
        let turn = store.turn().await;
        let writes = (0..500).map(|n| group.write(Mark(n)));
        let all = futures::future::join_all(writes);
        tokio::pin!(all);
        assert!(futures::poll!(&mut all).is_pending());
        assert_eq!(group.lock().len(), 500);
        drop(turn);
        assert!(all.await.into_iter().all(|written| written.is_ok()));
        assert!(group.lock().is_empty());
        let count = "SELECT count(*) FROM mark";
        let marks =
            store.transact("count", move |state| state.query_row(count, [], |row| row.get(0)));
        assert_eq!(marks.await.map_err(|error| error.to_string()), Ok(500_i64));
    }

    #[tokio::test]
    async fn fault_01_a_write_that_is_dropped_before_its_turn_is_never_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let turn = store.turn().await;
        let mut dropped = Box::pin(
            store.transact("drop a table", |state| state.execute_batch("DROP TABLE shard")),
        );
        assert!(futures::poll!(&mut dropped).is_pending());
        drop((dropped, turn));
        let count = "SELECT count(*) FROM shard";
        let count =
            store.transact("count", move |state| state.query_row(count, [], |row| row.get(0)));
        assert_eq!(count.await.map_err(|error| error.to_string()), Ok(0_i64));
    }
}
