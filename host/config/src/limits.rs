//! Limits of stages, and limits after which a lane blocks or a version is rolled back; with the defaults.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Limits of compiling a plugin. A component is untrusted input, and some would compile for hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompileLimits {
    /// Wall time.
    pub time_max: Duration,
    /// Memory of the compiling process, in bytes.
    pub memory_bytes_max: usize,
    /// Size of the component, in bytes.
    pub component_bytes_max: usize,
}

impl CompileLimits {
    /// Returns the larger value of each limit.
    pub(super) fn larger(self, other: Self) -> Self {
        Self {
            time_max: self.time_max.max(other.time_max),
            memory_bytes_max: self.memory_bytes_max.max(other.memory_bytes_max),
            component_bytes_max: self.component_bytes_max.max(other.component_bytes_max),
        }
    }
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self {
            time_max: Duration::from_secs(180),
            memory_bytes_max: 2 << 30,
            component_bytes_max: 64 << 20,
        }
    }
}

/// Default CPU time of `configure`, in milliseconds. It runs once per instance.
pub(crate) const CONFIGURE_MS_MAX: u64 = 10_000;

/// Limits of one call of a plugin. If a call exceeds one, the culprit record is searched and rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct StageLimits {
    /// CPU time of one call with a whole batch, in milliseconds.
    pub batch_ms_max: u64,
    /// CPU time of one call with one record, in milliseconds.
    pub record_ms_max: u64,
    /// Wall time of each host call, in milliseconds; `None`: as long as the CPU time of the plugin call that makes it,
    /// and at least that of a call with one record. If it is not set, a stored revision does not contain it, so that
    /// the id of the revision does not change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_ms_max: Option<u64>,
    /// CPU time of `configure`, in milliseconds; `None`: [`CONFIGURE_MS_MAX`]. Not stored if not set, as above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configure_ms_max: Option<u64>,
    /// Linear memory of all memories of the instance together, in bytes.
    pub memory_bytes_max: usize,
    /// Elements of all tables of the instance together.
    pub table_elements_max: usize,
    /// Bytes that one call may return.
    pub output_bytes_max: usize,
    /// How long a failure that the plugin calls retryable is tried again, in milliseconds.
    pub retry_ms_max: u64,
    /// Outputs per record of a call, on average.
    pub outputs_per_record_max: usize,
    /// Log lines per second of all instances of the stage together.
    pub log_lines_per_s_max: u32,
}

impl StageLimits {
    /// Returns the CPU time of `configure`, in milliseconds.
    pub fn configure_ms(&self) -> u64 {
        self.configure_ms_max.unwrap_or(CONFIGURE_MS_MAX)
    }

    /// Returns the highest number of bytes of a call's outcome, and of the outcomes of all calls of a search together.
    /// An output takes more memory in the host than its bytes, so an answer may be larger here than in the plugin. It
    /// may not be larger than the plugin's memory could be.
    pub fn answer_bytes_max(&self) -> usize {
        self.output_bytes_max.min(self.memory_bytes_max)
    }

    /// Returns the key that sets this limit.
    pub fn answer_bound(&self) -> &'static str {
        match self.output_bytes_max <= self.memory_bytes_max {
            true => "limits.output",
            false => "limits.memory",
        }
    }

    /// Returns the wall time of a host call inside a plugin call of `call_ms`, in milliseconds. Without an explicit
    /// limit it is at least the time of a single record: a plugin may reject a record because a host call failed, also
    /// in a short call of a search, and would then reject it only because the call was short.
    pub fn host_ms(&self, call_ms: u64) -> u64 {
        self.host_ms_max.unwrap_or_else(|| call_ms.max(self.call_ms_max(1)))
    }

    /// Returns the CPU time of one call with `records` records, in milliseconds.
    pub fn call_ms_max(&self, records: usize) -> u64 {
        self.batch_ms_max.min(self.record_ms_max.saturating_mul(records as u64)).max(1)
    }
}

impl Default for StageLimits {
    fn default() -> Self {
        Self {
            batch_ms_max: 2_000,
            record_ms_max: 500,
            host_ms_max: None,
            configure_ms_max: None,
            memory_bytes_max: 256 << 20,
            table_elements_max: 100_000,
            output_bytes_max: 64 << 20,
            retry_ms_max: 60_000,
            outputs_per_record_max: 10_000,
            log_lines_per_s_max: 100,
        }
    }
}

/// Limits of the recent inputs of each stage that are kept for trials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleLimits {
    /// Batches of one stage.
    pub batches_max: usize,
    /// Bytes of one stage.
    pub bytes_max: usize,
    /// Highest age of a batch.
    pub age_max: Duration,
}

impl SampleLimits {
    /// Keeps nothing.
    pub const NONE: Self = Self { batches_max: 0, bytes_max: 0, age_max: Duration::ZERO };
}

impl Default for SampleLimits {
    fn default() -> Self {
        Self { batches_max: 32, bytes_max: 4 << 20, age_max: Duration::from_secs(600) }
    }
}

/// Limits after which a new version of a plugin is rolled back automatically.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbationLimits {
    /// How long it is watched; zero: not at all.
    pub window: Duration,
    /// Calls that may trap or exceed a limit.
    pub traps_max: u64,
    /// Increase of the rejected records that is allowed, in percent of the records.
    pub rejected_percent_max: u32,
    /// Increase of the time per record that is allowed, as a factor.
    pub slower_max: u32,
}

impl Default for ProbationLimits {
    fn default() -> Self {
        let window = Duration::from_secs(60);
        Self { window, traps_max: 0, rejected_percent_max: 1, slower_max: 5 }
    }
}

/// Limits after which a lane blocks, so that a broken plugin does not turn the whole stream into dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RejectedMax {
    /// Rejected records among the last 1,000.
    pub of_last_1000: u32,
    /// Rejected records in a row.
    pub in_a_row: u32,
}

impl RejectedMax {
    /// No limit.
    pub const NONE: Self = Self { of_last_1000: u32::MAX, in_a_row: u32::MAX };
}

impl Default for RejectedMax {
    fn default() -> Self {
        Self { of_last_1000: 100, in_a_row: 100 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_10_a_call_of_the_host_has_no_less_time_in_a_piece_of_a_search() {
        let limits = StageLimits::default();
        let (batch_ms, record_ms) = (limits.batch_ms_max, limits.record_ms_max);
        for (call_ms, expected_ms) in
            [(batch_ms, batch_ms), (record_ms, record_ms), (record_ms / 4, record_ms)]
        {
            assert_eq!(limits.host_ms(call_ms), expected_ms, "{call_ms}");
        }
        let own = StageLimits { host_ms_max: Some(7), ..limits };
        assert_eq!([batch_ms, 1].map(|call_ms| own.host_ms(call_ms)), [7, 7]);
    }
}
