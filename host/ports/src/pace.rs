//! The lowest pace at which a peer must send a request or read an answer.

use std::time::{Duration, Instant};

/// Bytes that count as one second: slow connections are accepted, single bytes now and then are not.
pub(super) const BYTES_PER_SECOND_MIN: u64 = 64 << 10;

/// How far a peer lags behind the lowest pace. Earlier speed gains it nothing: otherwise, a client could send all but
/// the end of a body, and then keep the resources of the request by sending a byte now and then.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    lagging_since: Instant,
}

impl Pace {
    /// Starts without a lag.
    pub fn begin(now: Instant) -> Self {
        Self { lagging_since: now }
    }

    /// Notes bytes that the peer sent or read.
    pub fn came(&mut self, bytes: usize, now: Instant) {
        let worth_us = (bytes as u64).saturating_mul(1_000_000) / BYTES_PER_SECOND_MIN;
        let caught_up_to = self.lagging_since.checked_add(Duration::from_micros(worth_us));
        self.lagging_since = caught_up_to.map_or(now, |at| at.min(now));
    }

    /// Returns since when the peer lags: as if it had sent nothing from then on.
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
        // Bytes in each of ten seconds, and the lag of the peer after them, in seconds.
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
