//! Limits how many records may be rejected. A broken plugin must not drain a whole stream into the dead letters:
//! over the limit, its lane is blocked.

use std::collections::VecDeque;

use shardmill_config::RejectedMax;

/// Number of records over which the share of rejections is counted.
const WINDOW_RECORDS: usize = 1_000;

/// The outcomes of a lane's last 1,000 records.
#[derive(Clone, Debug)]
pub struct RejectionWindow {
    limits: RejectedMax,
    outcomes: VecDeque<bool>,
    rejected: u32,
    in_a_row: u32,
}

impl RejectionWindow {
    /// Creates an empty window.
    pub fn new(limits: RejectedMax) -> Self {
        let outcomes = VecDeque::with_capacity(WINDOW_RECORDS);
        Self { limits, outcomes, rejected: 0, in_a_row: 0 }
    }

    /// Counts records that were not rejected.
    pub fn accept(&mut self, records: usize) {
        for _ in 0..records.min(WINDOW_RECORDS) {
            // Only a rejection can pass a limit.
            let _ = self.count(false);
        }
    }

    /// Counts one record.
    ///
    /// # Errors
    /// The limit that is exceeded, in words.
    pub fn count(&mut self, rejected: bool) -> Result<(), String> {
        if self.outcomes.len() == WINDOW_RECORDS && self.outcomes.pop_front() == Some(true) {
            self.rejected -= 1;
        }
        self.outcomes.push_back(rejected);
        self.rejected += u32::from(rejected);
        self.in_a_row = if rejected { self.in_a_row + 1 } else { 0 };
        if self.in_a_row > self.limits.in_a_row {
            return Err(format!(
                "more than {} records in a row were rejected (rejected_in_a_row)",
                self.limits.in_a_row
            ));
        }
        if self.rejected > self.limits.of_last_1000 {
            return Err(format!(
                "more than {} of the last {WINDOW_RECORDS} records were rejected (rejected_of_last_1000)",
                self.limits.of_last_1000
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_rejects_trips() {
        let mut window = RejectionWindow::new(RejectedMax { of_last_1000: 1000, in_a_row: 3 });
        assert!((0..3).all(|_| window.count(true).is_ok()));
        assert!(window.count(true).is_err());
    }

    #[test]
    fn a_share_trips_and_old_ones_are_forgotten() {
        let mut window = RejectionWindow::new(RejectedMax { of_last_1000: 2, in_a_row: 1000 });
        assert!(window.count(true).is_ok());
        assert!(window.count(true).is_ok());
        assert!((0..999).all(|_| window.count(false).is_ok()));
        // Both are older than the last 1,000 records now.
        assert!((0..2).all(|_| window.count(true).is_ok()));
        assert!(window.count(true).is_err());
    }
}
