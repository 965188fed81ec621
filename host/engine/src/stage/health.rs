//! Health of a stage's plugin, over all lanes: a new version is judged by it against the version before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters of one version in one stage; every lane adds to them.
#[derive(Debug, Default)]
pub struct HealthCounts {
    records: AtomicU64,
    rejected: AtomicU64,
    traps: AtomicU64,
    busy_ns: AtomicU64,
}

/// The counters at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Records that were given to it.
    pub records: u64,
    /// Of these, records that it rejected.
    pub rejected: u64,
    /// Calls that trapped or exceeded a limit.
    pub traps: u64,
    /// Time spent in calls.
    pub busy: Duration,
}

impl HealthCounts {
    /// Counts a run of a flow.
    pub fn ran(&self, records: usize, rejected: usize, took: Duration) {
        self.records.fetch_add(records as u64, Ordering::Relaxed);
        self.rejected.fetch_add(rejected as u64, Ordering::Relaxed);
        self.busy_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Counts a call without an answer.
    pub fn trapped(&self) {
        self.traps.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the counters now.
    pub fn seen(&self) -> Health {
        Health {
            records: self.records.load(Ordering::Relaxed),
            rejected: self.rejected.load(Ordering::Relaxed),
            traps: self.traps.load(Ordering::Relaxed),
            busy: Duration::from_nanos(self.busy_ns.load(Ordering::Relaxed)),
        }
    }
}

impl Health {
    /// Returns the share of rejected records, in percent.
    pub fn rejected_percent(&self) -> f64 {
        self.rejected as f64 * 100.0 / self.records.max(1) as f64
    }

    /// Returns the time in calls per record, in nanoseconds.
    pub fn ns_per_record(&self) -> f64 {
        self.busy.as_nanos() as f64 / self.records.max(1) as f64
    }
}
