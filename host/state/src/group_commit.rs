//! Writes of many lanes, in one transaction: each commit waits for the disk, and lanes write at the same
//! time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Transaction;
use tokio::sync::oneshot;

use super::store::{StateError, StateStore};

/// An entry that can be written with others. To write it twice changes nothing.
pub(super) trait BatchedEntry: Clone + Send + 'static {
    /// For messages: the failed action.
    const ACTION: &'static str;

    /// Writes it.
    fn write(&self, state: &Transaction<'_>) -> rusqlite::Result<()>;
}

/// Entries that wait to be written. Whoever comes to the database first writes what all of them have.
pub(super) struct GroupCommit<E> {
    store: StateStore,
    waiting: Arc<Mutex<Vec<Waiting<E>>>>,
}

struct Waiting<E> {
    entry: E,
    /// Told what became of it. Closed: nobody waits any more, and it is not written.
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
                biased;
                outcome = &mut written => match outcome {
                    Ok(outcome) => return outcome,
                    Err(_) => continue,
                },
                connection = self.store.turn() => {
                    let own = self.clone();
                    // It tells all who wait, also when the one who began it has gone.
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
        // While somebody else has the database, all of them gather.
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
