//! Policy that decides when a failed call is tried again. All calls of the host use it.
//!
//! A [`RetryPolicy`] is a constant beside the loop that retries. It decides from numbers alone, so tests need no clock.
//! [`Retries`] counts the failures of one operation.
//!
//! A loop that waits for a state to change (a stream that becomes active, for example) polls at a fixed interval. That
//! is not a retry, and needs no policy.

use std::time::{Duration, Instant};

/// Pauses after failures, and the limit after which to give up.
///
/// The pause after the first failure is `first`. Each further one is `factor` times as long, up to `max`. Jitter
/// adds up to as much again, so that lanes that failed together do not come back together: with it a pause is
/// between one and two times the value, also at `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    first: Duration,
    factor: u32,
    max: Duration,
    has_jitter: bool,
    limit: Limit,
}

/// Limit after which a policy gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    /// Never: something else ends the loop, the end of the run for example.
    None,
    /// With this number of failures in a row.
    Failures(u32),
    /// When the next try would begin later than this after the first failure.
    Time(Duration),
}

impl RetryPolicy {
    /// Makes a policy without a limit: pauses double from `first` up to `max`, without jitter.
    pub const fn doubling(first: Duration, max: Duration) -> Self {
        Self { first, factor: 2, max, has_jitter: false, limit: Limit::None }
    }

    /// Makes a policy without a limit, with the same pause after each failure.
    pub const fn every(pause: Duration) -> Self {
        Self { first: pause, factor: 1, max: pause, has_jitter: false, limit: Limit::None }
    }

    /// Adds jitter.
    pub const fn with_jitter(self) -> Self {
        Self { has_jitter: true, ..self }
    }

    /// Limits all pauses to `max` (before jitter), because a pipeline may be configured for shorter pauses.
    pub fn at_most(self, max: Duration) -> Self {
        Self { first: self.first.min(max), max: self.max.min(max), ..self }
    }

    /// Gives up after this number of failures in a row, which is also the number of tries.
    pub const fn tries(self, failures_max: u32) -> Self {
        Self { limit: Limit::Failures(failures_max), ..self }
    }

    /// Gives up when the next try would begin later than `time` after the first failure.
    pub const fn within(self, time: Duration) -> Self {
        Self { limit: Limit::Time(time), ..self }
    }

    /// Returns the pause after a number of failures in a row, from 1. `random` is in `0.0..1.0`; it has no effect
    /// without jitter.
    pub fn pause(&self, failures: u32, random: f64) -> Duration {
        let steps = failures.saturating_sub(1);
        let pause = self.first.saturating_mul(self.factor.saturating_pow(steps)).min(self.max);
        match self.has_jitter {
            true => {
                let more_s = pause.as_secs_f64() * random.clamp(0.0, 1.0);
                // A time that is too long for a `Duration` gets no jitter.
                pause.saturating_add(Duration::try_from_secs_f64(more_s).unwrap_or_default())
            }
            false => pause,
        }
    }

    /// Returns the pause before the next try, or `None` to give up. `elapsed` is the time since the first failure.
    pub fn decide(&self, failures: u32, elapsed: Duration, random: f64) -> Option<Duration> {
        let pause = self.pause(failures, random);
        let goes_on = match self.limit {
            Limit::None => true,
            Limit::Failures(max) => failures < max,
            Limit::Time(max) => elapsed.saturating_add(pause) <= max,
        };
        goes_on.then_some(pause)
    }

    /// Starts to count failures.
    pub fn start(self) -> Retries {
        Retries { policy: self, failures: 0, first_failure: None }
    }
}

/// Failures of one operation since its last success.
#[derive(Clone, Debug)]
pub struct Retries {
    policy: RetryPolicy,
    failures: u32,
    first_failure: Option<Instant>,
}

impl Retries {
    /// Counts a failure and returns the pause before the next try. The limit of the policy is ignored: for loops that
    /// something else ends.
    pub fn next_pause(&mut self) -> Duration {
        self.count();
        self.policy.pause(self.failures, fastrand::f64())
    }

    /// Counts a failure and returns the pause before the next try, or `None` to give up.
    pub fn next_pause_or_end(&mut self) -> Option<Duration> {
        let first = self.count();
        self.policy.decide(self.failures, first.elapsed(), fastrand::f64())
    }

    /// Forgets all failures after the operation has succeeded.
    pub fn reset(&mut self) {
        (self.failures, self.first_failure) = (0, None);
    }

    /// Counts a failure. Returns the time of the first one.
    fn count(&mut self) -> Instant {
        self.failures = self.failures.saturating_add(1);
        *self.first_failure.get_or_insert_with(Instant::now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const DOUBLING: RetryPolicy = RetryPolicy::doubling(ms(200), ms(10_000));

    #[test]
    fn pauses_grow_from_the_first_to_the_longest() {
        let jittered = DOUBLING.with_jitter();
        for (policy, failures, random, expected_ms) in [
            (DOUBLING, 0, 0.5, 200),
            (DOUBLING, 1, 0.5, 200),
            (DOUBLING, 2, 0.5, 400),
            (DOUBLING, 6, 0.5, 6_400),
            (DOUBLING, 7, 0.5, 10_000),
            (DOUBLING, 1_000, 0.5, 10_000),
            (DOUBLING, u32::MAX, 0.5, 10_000),
            // Jitter adds between nothing and as much again.
            (jittered, 1, 0.0, 200),
            (jittered, 1, 0.5, 300),
            (jittered, 3, 0.25, 1_000),
            (jittered, 1_000, 0.0, 10_000),
            (jittered, 1_000, 1.0, 20_000),
            // Random numbers beyond their range change nothing.
            (jittered, 1, 7.0, 400),
            (jittered, 1, -1.0, 200),
            (RetryPolicy::every(ms(30)), 1, 0.5, 30),
            (RetryPolicy::every(ms(30)), 9, 0.5, 30),
            (RetryPolicy::every(Duration::MAX).with_jitter().at_most(ms(7)), 1, 0.0, 7),
            // A pipeline may ask for shorter pauses, even than the first.
            (DOUBLING.at_most(ms(1_000)), 2, 0.5, 400),
            (DOUBLING.at_most(ms(1_000)), 9, 0.5, 1_000),
            (DOUBLING.at_most(ms(50)), 1, 0.5, 50),
            (DOUBLING.at_most(ms(60_000)), 9, 0.5, 10_000),
            (DOUBLING.at_most(ms(0)), 9, 0.5, 0),
        ] {
            let found = policy.pause(failures, random);
            assert_eq!(found, ms(expected_ms), "{policy:?}, {failures} failures, random {random}");
        }
    }

    #[test]
    fn a_policy_gives_up_by_its_limit() {
        let (tries, within) = (DOUBLING.tries(3), DOUBLING.within(ms(1_000)));
        for (policy, failures, elapsed_ms, expected_ms) in [
            (DOUBLING, u32::MAX, u64::MAX, Some(10_000)),
            (tries, 1, u64::MAX, Some(200)),
            (tries, 2, 0, Some(400)),
            (tries, 3, 0, None),
            (tries, 4, 0, None),
            (within, 1, 0, Some(200)),
            (within, 1, 800, Some(200)),
            (within, 1, 801, None),
            (within, 2, 600, Some(400)),
            (within, 2, 601, None),
            (DOUBLING.within(ms(0)), 1, 0, None),
            (DOUBLING.tries(1), 1, 0, None),
        ] {
            let found = policy.decide(failures, ms(elapsed_ms), 0.5);
            let expected = expected_ms.map(ms);
            assert_eq!(found, expected, "{policy:?}, {failures} failures, {elapsed_ms} ms");
        }
    }

    #[test]
    fn failures_are_counted_until_a_success() {
        let mut retries = DOUBLING.tries(3).start();
        assert_eq!(retries.next_pause_or_end(), Some(ms(200)));
        assert_eq!(retries.next_pause_or_end(), Some(ms(400)));
        assert_eq!(retries.next_pause_or_end(), None);
        assert_eq!(retries.next_pause(), ms(1_600), "whatever the limit");
        retries.reset();
        assert_eq!(retries.next_pause_or_end(), Some(ms(200)));
        let jittered = DOUBLING.with_jitter().start().next_pause();
        assert!((ms(200)..=ms(400)).contains(&jittered), "{jittered:?}");
    }
}
