//! A bound on bytes that several hold together: the sinks' buffers, what readers read ahead, the
//! intake's requests. Memory is bounded by configuration, never by luck.
//!
//! Over the sinks' budget, the oldest buffer is asked to commit first, so that a sink that rolls
//! hourly gives way to the shards that read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

/// A budget; its clones share it.
#[derive(Clone)]
pub struct Budget {
    shared: Arc<Shared>,
}

struct Shared {
    bytes_max: usize,
    /// The metric that shows what is held.
    gauge: &'static str,
    ledger: Mutex<BudgetLedger>,
    released: Notify,
}

#[derive(Default)]
struct BudgetLedger {
    bytes: usize,
    /// Buffers that hold bytes and could commit, oldest first.
    holders: BTreeMap<(Instant, u64), Arc<Notify>>,
}

/// Bytes taken from the budget; given back when dropped.
pub struct Permit {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Budget {
    /// A budget of `bytes_max` bytes; what is held shows as the metric `gauge`.
    pub fn new(bytes_max: usize, gauge: &'static str) -> Self {
        let ledger = Mutex::default();
        Self { shared: Arc::new(Shared { bytes_max, gauge, ledger, released: Notify::new() }) }
    }

    /// Takes bytes, waiting while there are not enough; each wait asks the oldest buffer to commit.
    /// What is larger than the whole budget passes when nothing else is held.
    pub async fn take(&self, bytes: usize) -> Permit {
        loop {
            let released = self.shared.released.notified();
            {
                let mut ledger = self.shared.lock();
                if ledger.bytes == 0 || ledger.bytes + bytes <= self.shared.bytes_max {
                    ledger.bytes += bytes;
                    metrics::gauge!(self.shared.gauge).set(ledger.bytes as f64);
                    return Permit { shared: self.shared.clone(), bytes };
                }
                // Taken off the list: the next waiter asks the next oldest, should this one be
                // blocked.
                if let Some((_, oldest)) = ledger.holders.pop_first() {
                    oldest.notify_one();
                }
            }
            // A holder may register after we looked: look again now and then.
            let _ = tokio::time::timeout(std::time::Duration::from_millis(100), released).await;
        }
    }

    /// The bound, in bytes.
    pub fn bytes_max(&self) -> usize {
        self.shared.bytes_max
    }

    /// Takes bytes; `None` when so many are not free now.
    pub fn try_take(&self, bytes: usize) -> Option<Permit> {
        let mut permit = Permit { shared: self.shared.clone(), bytes: 0 };
        permit.try_grow(bytes).then_some(permit)
    }

    /// Says that a buffer holds bytes since `since` and commits when it is notified.
    pub fn register(&self, since: Instant, id: u64, commit: &Arc<Notify>) {
        self.shared.lock().holders.insert((since, id), commit.clone());
    }

    /// Says that the buffer is empty, or commits already.
    pub fn unregister(&self, since: Instant, id: u64) {
        self.shared.lock().holders.remove(&(since, id));
    }
}

impl Shared {
    fn change(&self, held: usize, bytes: usize) {
        let mut ledger = self.lock();
        ledger.bytes = ledger.bytes - held + bytes;
        metrics::gauge!(self.gauge).set(ledger.bytes as f64);
        drop(ledger);
        if bytes < held {
            self.released.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BudgetLedger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// Takes more; false, and nothing is taken, when so many are not free now.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let mut ledger = self.shared.lock();
        if ledger.bytes.saturating_add(bytes) > self.shared.bytes_max {
            return false;
        }
        ledger.bytes += bytes;
        self.bytes += bytes;
        metrics::gauge!(self.shared.gauge).set(ledger.bytes as f64);
        true
    }

    /// Holds `bytes` from now on. More than before is taken without waiting: it is there already,
    /// and others wait the longer.
    pub fn resize(&mut self, bytes: usize) {
        self.shared.change(self.bytes, bytes);
        self.bytes = bytes;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.change(self.bytes, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn over_the_budget_the_oldest_commits() {
        let budget = Budget::new(100, "test");
        let (old, young) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let begun = Instant::now();
        let held = budget.take(80).await;
        budget.register(begun, 1, &old);
        budget.register(begun + std::time::Duration::from_secs(1), 2, &young);
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { budget.take(50).await.bytes }
        });
        old.notified().await;
        drop(held);
        assert_eq!(waiter.await.expect("taken"), 50);
    }

    #[test]
    fn what_is_not_free_is_not_taken() {
        let budget = Budget::new(10, "test");
        let mut held = budget.try_take(8).expect("free");
        assert!(budget.try_take(3).is_none());
        held.resize(7);
        assert!(budget.try_take(3).is_some());
    }

    #[tokio::test]
    async fn what_is_larger_than_the_budget_passes_alone() {
        let budget = Budget::new(10, "test");
        assert_eq!(budget.take(1_000).await.bytes, 1_000);
    }
}
