//! What a stage may use, and when a lane gives up; with the defaults.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What compiling a plugin may use: a component is input too, and some compile for hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompileLimits {
    /// Wall time.
    pub time_max: Duration,
    /// Memory of the process that compiles, in bytes.
    pub memory_bytes_max: usize,
    /// The component itself, in bytes.
    pub component_bytes_max: usize,
}

impl CompileLimits {
    /// The larger of each limit.
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

/// The CPU time that `configure` may take by itself, in milliseconds: it runs once per instance.
pub(crate) const CONFIGURE_MS_MAX: u64 = 10_000;

/// What one call of a plugin may use. Going over is the failure of the guilty record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct StageLimits {
    /// The plugin's CPU time in one call with a whole batch, in milliseconds.
    pub batch_ms_max: u64,
    /// The plugin's CPU time in one call with one record, in milliseconds.
    pub record_ms_max: u64,
    /// Wall time of each call of the host, in milliseconds; `None`: as much as the CPU time of the plugin's
    /// call that makes it. Left out of a stored revision where it is not set: its id stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_ms_max: Option<u64>,
    /// The plugin's CPU time in `configure`, in milliseconds; `None`: [`CONFIGURE_MS_MAX`]. Left out as above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configure_ms_max: Option<u64>,
    /// Linear memory of all the instance's memories, in bytes.
    pub memory_bytes_max: usize,
    /// Elements of all the instance's tables.
    pub table_elements_max: usize,
    /// Bytes that one call may hand back.
    pub output_bytes_max: usize,
    /// How long a failure that the plugin calls retryable is tried again, in milliseconds.
    pub retry_ms_max: u64,
    /// Outputs per record of a call, on average.
    pub outputs_per_record_max: usize,
    /// Log lines that all instances of the stage together may write in a second.
    pub log_lines_per_s_max: u32,
}

impl StageLimits {
    /// The CPU time of `configure`, in milliseconds.
    pub fn configure_ms(&self) -> u64 {
        self.configure_ms_max.unwrap_or(CONFIGURE_MS_MAX)
    }

    /// Bytes that the outcome of a call may hold, and that of all calls of a search together. Outputs cost the
    /// host more than their bytes, so that an answer may be larger here than it was in the plugin's memory: it
    /// may not be more than that memory could be.
    pub fn answer_bytes_max(&self) -> usize {
        self.output_bytes_max.min(self.memory_bytes_max)
    }

    /// The key that sets it.
    pub fn answer_bound(&self) -> &'static str {
        match self.output_bytes_max <= self.memory_bytes_max {
            true => "limits.output",
            false => "limits.memory",
        }
    }

    /// The wall time of a call of the host that the plugin makes within a call of `call_ms`, in milliseconds.
    /// Without a limit of its own, at least as much as one record has alone: the plugin may reject a record
    /// for a call of the host that failed, in a hasty piece of a search too.
    pub fn host_ms(&self, call_ms: u64) -> u64 {
        self.host_ms_max.unwrap_or_else(|| call_ms.max(self.call_ms_max(1)))
    }

    /// The CPU time of one call with `records` records, in milliseconds.
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

/// What is kept of what entered each stage of late, for trials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleLimits {
    /// Batches of one stage.
    pub batches_max: usize,
    /// Bytes of one stage.
    pub bytes_max: usize,
    /// How old a batch may become.
    pub age_max: Duration,
}

impl SampleLimits {
    /// Nothing is kept.
    pub const NONE: Self = Self { batches_max: 0, bytes_max: 0, age_max: Duration::ZERO };
}

impl Default for SampleLimits {
    fn default() -> Self {
        Self { batches_max: 32, bytes_max: 4 << 20, age_max: Duration::from_secs(600) }
    }
}

/// When a new version of a plugin is undone by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbationLimits {
    /// For how long it is watched; zero: not at all.
    pub window: Duration,
    /// Calls that may trap or go over a limit.
    pub traps_max: u64,
    /// Of 100 records, how many more it may reject than the version before.
    pub rejected_percent_max: u32,
    /// How many times as long as the version before it may take per record.
    pub slower_max: u32,
}

impl Default for ProbationLimits {
    fn default() -> Self {
        let window = Duration::from_secs(60);
        Self { window, traps_max: 0, rejected_percent_max: 1, slower_max: 5 }
    }
}

/// When a lane blocks instead of filling the dead letters.
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
