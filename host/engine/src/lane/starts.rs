//! Failed starts of the stages in a lane.
//!
//! `configure` is the plugin's code: it may fail in one shard and not in others, or now and not later. So a failure
//! in one lane never stops the others.
//!
//! | starts that failed in a row | what follows |
//! |---|---|
//! | 1, 2 | another try |
//! | 3 | the lane is blocked; if no lane has ever started and the stages start in no other shard, the run ends |
//! | more | the lane stays blocked, and tries again with growing pauses |
//! | the machine was too busy ([`CallErrorKind::Starved`]) | blocked by the machine; not counted as a failure |
//!
//! Ending the whole run is right only while no lane has ever started: then nothing is lost, and whoever starts the
//! process gets the error at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;

use super::{Lane, LaneError};
use crate::stage::{Chain, Revision};
use shardmill_core::escape::quoted;
use shardmill_core::record::{ShardId, ShardKey};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::stop::Stop;
use shardmill_plugin::{CallError, CallErrorKind};

/// Tries until a lane counts as blocked.
const TRIES: u32 = 3;
/// Pauses between tries, up to the longest one that is configured.
const RETRY: RetryPolicy = RetryPolicy::doubling(Duration::from_millis(200), Duration::MAX);
/// Other shards in which a revision must fail as well before it counts as one that starts nowhere. `configure` may
/// take its full time limit in each of them.
const OTHERS_MAX: usize = 16;

/// Whether stages have started in any lane of this process. Clones share it.
#[derive(Clone, Default)]
pub struct Starts(Arc<Known>);

#[derive(Default)]
struct Known {
    has_started: AtomicBool,
    /// Held by the lane that finds out: the others would ask the same question.
    asking: Mutex<()>,
}

impl Starts {
    /// Notes that the stages have started in a lane.
    pub(super) fn note(&self) {
        self.0.has_started.store(true, Ordering::Relaxed);
    }

    fn has_started(&self) -> bool {
        self.0.has_started.load(Ordering::Relaxed)
    }
}

/// A failed start of the stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FailedStart {
    cause: String,
    /// The machine was too busy for the start to finish.
    is_starved: bool,
}

impl FailedStart {
    /// Makes a failure of the host itself.
    pub(super) fn of_host(cause: impl std::fmt::Display) -> Self {
        Self { cause: cause.to_string(), is_starved: false }
    }
}

impl From<CallError> for FailedStart {
    fn from(error: CallError) -> Self {
        Self { is_starved: error.kind == CallErrorKind::Starved, cause: error.message }
    }
}

/// Consecutive failed starts.
#[derive(Debug, Default)]
pub(super) struct Tries {
    failed: u32,
    /// Starts that found the machine too busy, since the last failure of another kind.
    starved: u32,
}

impl Tries {
    /// Counts a failed start and decides what follows.
    fn next(&mut self, failed: &FailedStart) -> Next {
        if failed.is_starved {
            self.starved = self.starved.saturating_add(1);
            return Next::Starved;
        }
        (self.failed, self.starved) = (self.failed.saturating_add(1), 0);
        next(self.failed)
    }

    /// Returns the pause before the next try.
    fn pause(&self, longest: Duration) -> Duration {
        let failures = if self.starved > 0 { self.starved } else { self.failed };
        RETRY.at_most(longest).pause(failures, 0.0)
    }
}

/// Next step, by the number of failed tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another try.
    Retry,
    /// Another try, with the lane shown as blocked by the machine. This says nothing about the revision.
    Starved,
    /// The moment to decide whether the revision starts nowhere. Comes once.
    Decide,
    /// Another try, with the lane shown as blocked.
    Blocked,
}

fn next(tries: u32) -> Next {
    match tries {
        ..TRIES => Next::Retry,
        TRIES => Next::Decide,
        _ => Next::Blocked,
    }
}

/// Starts the stages of a lane's next revision. Failures are retried as often as a lane may before it counts as
/// blocked; a busy machine is retried without end. The revision at work goes on meanwhile.
///
/// # Errors
/// The cause of the last failure.
pub(super) async fn start_patiently<T: Send + 'static>(
    start: impl Fn() -> Result<T, CallError> + Clone + Send + 'static,
    stop: Stop,
    pause_max: Duration,
) -> Result<T, String> {
    let mut tries = Tries::default();
    loop {
        let failed = match tokio::task::spawn_blocking(start.clone()).await {
            Ok(Ok(started)) => return Ok(started),
            Ok(Err(error)) => FailedStart::from(error),
            Err(panic) => FailedStart::of_host(panic),
        };
        match tries.next(&failed) {
            Next::Retry => {}
            Next::Starved => tracing::warn!(
                cause = %quoted(&failed.cause),
                "the stages of the next revision do not start, because the machine is too busy; retrying"
            ),
            Next::Decide | Next::Blocked => return Err(failed.cause),
        }
        let pause = tokio::time::sleep(tries.pause(pause_max));
        if stop.unless_asked(pause).await.is_none() {
            return Err(failed.cause);
        }
    }
}

impl Lane<'_> {
    /// Counts a failed start of the stages in `tries`, for the batch in hand. Waits until it is time for the next
    /// try, or until another revision may run the batch.
    ///
    /// # Errors
    /// [`LaneError::Fatal`] when the stages start in no lane; [`LaneError::Stopped`].
    pub(super) async fn after_failed_start(
        &mut self,
        tries: &mut Tries,
        failed: &FailedStart,
    ) -> Result<(), LaneError> {
        let (next, cause) = (tries.next(failed), failed.cause.as_str());
        if next == Next::Decide && self.starts_nowhere().await? {
            return Err(LaneError::Fatal(format!("shard {}: {cause}", self.shard.shard)));
        }
        let blocked = match next {
            Next::Retry => {
                let said = quoted(cause);
                tracing::warn!(shard = %self.shard.shard, cause = %said, tries = tries.failed,
                    "the stages do not start; retrying");
                None
            }
            Next::Starved => Some(super::STARVED),
            Next::Decide | Next::Blocked => Some(super::STAGES),
        };
        if let Some(part) = blocked {
            self.block(part, cause);
            if self.change_before_blocked().await? {
                return Ok(());
            }
        }
        let pause = tries.pause(self.shared.config.timing.retry_pause_max);
        let stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.asked() => return Err(LaneError::Stopped),
            // Another revision may start.
            () = self.change.until_ready() => { self.change_before_blocked().await?; }
        }
        Ok(())
    }

    /// Whether the stages start in no other shard that is read either. False once any lane has started, because a
    /// working process must not end for a later failure; false as well where the machine is too busy to find out.
    async fn starts_nowhere(&self) -> Result<bool, LaneError> {
        let starts = &self.shared.starts;
        let _asking = self.unless_stopped(starts.0.asking.lock()).await?;
        let running = self.shared.statuses.running().into_iter().map(|lane| lane.shard);
        let others = running.filter(|shard| *shard != self.shard.shard).take(OTHERS_MAX);
        for shard in others.collect::<Vec<_>>() {
            if starts.has_started() {
                return Ok(false);
            }
            match self.starts_for(shard).await? {
                Ok(()) => starts.note(),
                Err(failed) if failed.is_starved => return Ok(false),
                Err(_) => {}
            }
        }
        Ok(!starts.has_started())
    }

    /// Tries to start the stages of the revision at work for another shard, and drops their instances.
    async fn starts_for(&self, shard: ShardId) -> Result<Result<(), FailedStart>, LaneError> {
        let revision: Arc<Revision> = self.segments[0].revision.clone();
        let shard = ShardKey { shard, ..self.shard.clone() };
        let (limits, samples) = (self.shared.config.rejected_max, self.shared.samples.clone());
        let stop = self.stop.clone();
        let start = move || {
            let started = Chain::start(&revision, &shard, limits, samples, stop.token());
            started.map(drop).map_err(FailedStart::from)
        };
        let started = self.unless_stopped(tokio::task::spawn_blocking(start)).await?;
        Ok(started.unwrap_or_else(|panic| Err(FailedStart::of_host(panic))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_08_a_start_that_fails_is_retried_then_decided_then_blocked() {
        for (tries, expected, pause_ms) in [
            (1, Next::Retry, 200),
            (2, Next::Retry, 400),
            (3, Next::Decide, 800),
            (4, Next::Blocked, 1_600),
            (1_000, Next::Blocked, 10_000),
        ] {
            assert_eq!(next(tries), expected, "{tries}");
            let counted = Tries { failed: tries, starved: 0 };
            let found = counted.pause(Duration::from_secs(10));
            assert_eq!(found, Duration::from_millis(pause_ms), "{tries}");
        }
    }

    fn call_error(kind: CallErrorKind) -> CallError {
        CallError { kind, message: format!("{kind:?}"), backtrace: String::new() }
    }

    #[test]
    fn wall_10_a_start_that_was_starved_does_not_count_as_one_that_failed() {
        let (trap, starved) = (call_error(CallErrorKind::Trap), call_error(CallErrorKind::Starved));
        let mut tries = Tries::default();
        for (error, expected, pause_ms) in [
            (&starved, Next::Starved, 200),
            (&starved, Next::Starved, 400),
            (&trap, Next::Retry, 200),
            (&starved, Next::Starved, 200),
            (&starved, Next::Starved, 400),
            (&starved, Next::Starved, 800),
            (&trap, Next::Retry, 400),
            (&trap, Next::Decide, 800),
            (&starved, Next::Starved, 200),
            (&trap, Next::Blocked, 1_600),
        ] {
            let found = tries.next(&FailedStart::from(error.clone()));
            assert_eq!(found, expected, "{tries:?}");
            let pause = tries.pause(Duration::from_secs(10));
            assert_eq!(pause, Duration::from_millis(pause_ms), "{tries:?}");
        }
        let panicked = FailedStart::of_host("it panicked");
        assert_eq!(Tries::default().next(&panicked), Next::Retry);
    }

    /// Makes starts that fail in this way `failures` times, and then return their number.
    async fn started_after(kind: CallErrorKind, failures: u32) -> Result<u32, String> {
        let tries = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let start = move || match tries.fetch_add(1, Ordering::Relaxed) {
            tried if tried < failures => Err(call_error(kind)),
            tried => Ok(tried + 1),
        };
        let stop = Stop::new(Duration::from_secs(1));
        start_patiently(start, stop, Duration::from_millis(1)).await
    }

    #[tokio::test]
    async fn wall_10_the_next_revision_is_started_for_as_long_as_the_machine_is_too_busy() {
        assert_eq!(started_after(CallErrorKind::Starved, 20).await, Ok(21));
        assert_eq!(started_after(CallErrorKind::Trap, 2).await, Ok(3));
        assert_eq!(started_after(CallErrorKind::Trap, 3).await, Err("Trap".into()));
    }
}
