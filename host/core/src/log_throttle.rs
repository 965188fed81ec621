//! Limits log lines that others can cause at any rate, by records, requests or connections. A line may be longer than
//! what caused it, so little traffic could fill the disk.

use std::time::{Duration, Instant};

/// Pause between two lines of one kind, for one shard or port.
const PAUSE: Duration = Duration::from_secs(10);

/// Decides which lines of one kind are written, and counts the others.
#[derive(Debug)]
pub struct LogThrottle {
    pause: Duration,
    written_at: Option<Instant>,
    left_out: u64,
}

impl Default for LogThrottle {
    fn default() -> Self {
        Self::new(PAUSE)
    }
}

impl LogThrottle {
    /// Makes a limiter of lines at least `pause` apart.
    pub fn new(pause: Duration) -> Self {
        Self { pause, written_at: None, left_out: 0 }
    }

    /// Returns the number of lines that were skipped since the last one; `None`: skip this line, too.
    pub fn line(&mut self, now: Instant) -> Option<u64> {
        let is_early = |at| now.saturating_duration_since(at) < self.pause;
        if self.written_at.is_some_and(is_early) {
            self.left_out += 1;
            return None;
        }
        self.written_at = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_09_a_line_that_others_cause_is_written_once_in_a_while_with_the_number_left_out() {
        let mut throttle = LogThrottle::default();
        let begun = Instant::now();
        for (at_ms, expected) in [
            (0, Some(0)),
            (0, None),
            (1, None),
            (9_999, None),
            (10_000, Some(3)),
            (10_001, None),
            (30_000, Some(1)),
            (45_000, Some(0)),
        ] {
            let now = begun + Duration::from_millis(at_ms);
            assert_eq!(throttle.line(now), expected, "{at_ms}");
        }
    }
}
