//! What all requests may hold at once, in bytes.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A bound on bytes in flight.
#[derive(Clone)]
pub(super) struct Budget {
    free: Arc<Semaphore>,
    bytes_max: usize,
}

impl Budget {
    /// So many bytes at once.
    pub fn new(bytes_max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(bytes_max)), bytes_max }
    }

    /// The bound, in bytes.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Reserves bytes; `None` when so many are not free now.
    pub fn reserve(&self, bytes: usize) -> Option<Reserved> {
        let permits = u32::try_from(bytes).ok()?;
        let permit = self.free.clone().try_acquire_many_owned(permits).ok()?;
        show(bytes as f64);
        Some(Reserved { permit })
    }
}

/// Bytes of the budget, given back when dropped.
pub(super) struct Reserved {
    permit: OwnedSemaphorePermit,
}

impl Reserved {
    /// Takes another reservation into this one.
    pub fn add(&mut self, mut other: Self) {
        if let Some(all) = other.permit.split(other.permit.num_permits()) {
            self.permit.merge(all);
        }
    }

    /// Gives back all but so many bytes.
    pub fn shrink(&mut self, bytes: usize) {
        let surplus = self.permit.num_permits().saturating_sub(bytes);
        if let Some(permit) = self.permit.split(surplus) {
            drop(Self { permit });
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        show(-(self.permit.num_permits() as f64));
    }
}

fn show(change_bytes: f64) {
    metrics::gauge!("shardmill_intake_in_flight_bytes").increment(change_bytes);
}
