//! The slowest pace at which a peer counts as sending, or as taking an answer.

use std::time::{Duration, Instant};

/// Bytes that are worth a second: a slow line may take its time, a byte now and then may not.
pub(super) const BYTES_PER_SECOND_MIN: u64 = 64 << 10;

/// How far a peer is behind the slowest pace. Who was fast before gains nothing by it: otherwise, a client
/// that sends all but the end of a body could then keep what it holds by a byte now and then.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    lagging_since: Instant,
}

impl Pace {
    /// Begins, not behind.
    pub fn begin(now: Instant) -> Self {
        Self { lagging_since: now }
    }

    /// Notes bytes that came, or that the peer took.
    pub fn came(&mut self, bytes: usize, now: Instant) {
        let worth_us = (bytes as u64).saturating_mul(1_000_000) / BYTES_PER_SECOND_MIN;
        let caught_up_to = self.lagging_since.checked_add(Duration::from_micros(worth_us));
        self.lagging_since = caught_up_to.map_or(now, |at| at.min(now));
    }

    /// Since when the peer is behind, as if it had sent nothing from then on.
    pub fn lagging_since(&self) -> Instant {
        self.lagging_since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_03_a_byte_now_and_then_does_not_keep_the_pace() {
        let second = BYTES_PER_SECOND_MIN as usize;
        let begun = Instant::now();
        // What came in each of ten seconds, and how many of them the peer is behind then.
        for (bytes, lag_s) in
            [(0, 10.0), (1, 10.0), (second / 2, 5.0), (second, 0.0), (100 * second, 0.0)]
        {
            let mut pace = Pace::begin(begun);
            let mut now = begun;
            for _ in 0..10 {
                now += Duration::from_secs(1);
                pace.came(bytes, now);
            }
            let lag = now.duration_since(pace.lagging_since()).as_secs_f64();
            assert!((lag - lag_s).abs() < 0.01, "{bytes}: {lag}");
        }
        // All at once, and then nothing.
        let mut pace = Pace::begin(begun);
        pace.came(100 * second, begun);
        pace.came(1, begun + Duration::from_secs(2));
        let lag = (begun + Duration::from_secs(2)).duration_since(pace.lagging_since());
        assert!(lag > Duration::from_millis(1_999), "{lag:?}");
    }
}
