//! Names the process that writes to sinks, and the state that it uses. Exact sinks keep both beside their positions.
//!
//! A state database has an id and a number that grows with each durable write. Sinks store both as of their last
//! commit. So two faults are found before the first record: a state that was restored from an older copy, and a sink
//! that another state has written to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Longest machine name that is stored, in characters.
const HOST_CHARS_MAX: usize = 64;

/// Process that writes to sinks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerName {
    /// Time at which it opened its state, in milliseconds since 1970.
    pub started_ms: i64,
    /// Name of the machine.
    pub host: Arc<str>,
    /// Process id on that machine.
    pub pid: u32,
}

impl OwnerName {
    /// Names this process, which starts to write now.
    pub(crate) fn of_this_process() -> Self {
        Self {
            started_ms: chrono::Utc::now().timestamp_millis(),
            host: host_name().into(),
            pid: std::process::id(),
        }
    }

    /// Parses the text of [`OwnerName::to_text`].
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.rsplitn(3, '/');
        let started_ms = parts.next()?.parse().ok()?;
        let pid = parts.next()?.parse().ok()?;
        Some(Self { started_ms, host: parts.next()?.into(), pid })
    }

    /// Returns the name as sinks store it: `host/pid/milliseconds`.
    pub fn to_text(&self) -> String {
        format!("{}/{}/{}", self.host, self.pid, self.started_ms)
    }

    /// Whether it started after another one. Host and process id decide between two of the same millisecond.
    pub fn is_later_than(&self, other: &Self) -> bool {
        let rank = |own: &Self| (own.started_ms, own.host.clone(), own.pid);
        rank(self) > rank(other)
    }
}

impl fmt::Display for OwnerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let started = chrono::DateTime::from_timestamp_millis(self.started_ms)
            .map_or_else(|| format!("{} ms", self.started_ms), |at| at.to_rfc3339());
        write!(f, "process {} on {}, started {started}", self.pid, self.host)
    }
}

/// A state database at one point of its history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateMark {
    /// Id of the database.
    pub state: Arc<str>,
    /// Number that grows with each durable write.
    pub number: i64,
}

/// Mark of the owner that sinks write beside positions: the process, and its state at this time. Clones share the
/// number.
#[derive(Clone, Debug)]
pub struct Ownership {
    /// The process.
    pub owner: OwnerName,
    state: Arc<str>,
    number: Arc<AtomicI64>,
}

impl Ownership {
    /// Makes the mark of this process, for a state at this point.
    pub fn new(mark: StateMark) -> Self {
        let number = Arc::new(AtomicI64::new(mark.number));
        Self { owner: OwnerName::of_this_process(), state: mark.state, number }
    }

    /// Returns the state as of its last durable write.
    pub fn mark(&self) -> StateMark {
        StateMark { state: self.state.clone(), number: self.number.load(Ordering::Acquire) }
    }

    /// Notes a number that is durable. The number never goes back.
    pub fn reached(&self, number: i64) {
        self.number.fetch_max(number, Ordering::AcqRel);
    }
}

/// Returns the name of the machine, for people who look for the other process.
fn host_name() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = kernel.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    let name: String = name.trim().chars().take(HOST_CHARS_MAX).collect();
    if name.is_empty() { "this machine".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_36_an_owner_survives_its_text() {
        for host in ["db-1", "a/b", "büro"] {
            let owner = OwnerName { started_ms: 1_700_000_000_123, host: host.into(), pid: 7 };
            assert_eq!(OwnerName::parse(&owner.to_text()), Some(owner));
        }
        for text in ["", "a/b", "a/b/c", "1/2"] {
            assert_eq!(OwnerName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn fault_36_of_two_owners_exactly_one_is_later() {
        let owner = |started_ms, host: &str, pid| OwnerName { started_ms, host: host.into(), pid };
        for (early, late) in [
            (owner(1, "b", 9), owner(2, "a", 1)),
            (owner(1, "a", 9), owner(1, "b", 1)),
            (owner(1, "a", 1), owner(1, "a", 2)),
        ] {
            assert!(late.is_later_than(&early) && !early.is_later_than(&late));
        }
    }
}
