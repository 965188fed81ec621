//! Starts of the stages in a lane that fail: `configure` is the plugin's code, and may fail in one shard and
//! not in others, or now and not later.
//!
//! One lane's failure is tried again, then shown as blocked and tried again with longer pauses; the other
//! lanes go on. Only a revision that starts in no lane is refused as a whole, and only while no lane has
//! ever started: then nothing is lost by that, and whoever starts the process hears at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;

use super::{Lane, LaneError};
use crate::plugin::CallError;
use crate::record::{ShardId, ShardKey};
use crate::stage::{Chain, Generation};
use crate::stop::Stop;

/// Tries until a lane counts as blocked.
const TRIES: u32 = 3;
/// The pause after the first try; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Other shards for which a revision must fail as well to count as one that starts nowhere. With each
/// of them `configure` may take its whole time.
const OTHERS_MAX: usize = 16;

/// Whether stages have started in any lane of this process; its clones are one.
#[derive(Clone, Default)]
pub struct Starts(Arc<Known>);

#[derive(Default)]
struct Known {
    has_started: AtomicBool,
    /// One lane at a time finds out: the others would ask the same.
    asking: Mutex<()>,
}

impl Starts {
    /// The stages have started in a lane.
    pub(super) fn note(&self) {
        self.0.has_started.store(true, Ordering::Relaxed);
    }

    fn has_started(&self) -> bool {
        self.0.has_started.load(Ordering::Relaxed)
    }
}

/// What follows from the number of tries that have failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another try.
    Again,
    /// The first time that it is time to give up the whole revision, if it starts nowhere.
    Decide,
    /// Another try of a lane that is shown as blocked.
    Blocked,
}

fn next(tries: u32) -> Next {
    match tries {
        ..TRIES => Next::Again,
        TRIES => Next::Decide,
        _ => Next::Blocked,
    }
}

fn pause(tries: u32, longest: Duration) -> Duration {
    let doublings = tries.saturating_sub(1).min(16);
    FIRST_PAUSE.saturating_mul(1 << doublings).min(longest)
}

/// Starts the stages of the next revision of a lane, with as many tries as a lane has before it counts as
/// blocked. The revision at work goes on meanwhile.
///
/// # Errors
/// Why they do not start, in words.
pub(super) async fn start_patiently(
    start: impl Fn() -> Result<Chain, CallError> + Clone + Send + 'static,
    stop: Stop,
    pause_max: Duration,
) -> Result<Chain, String> {
    let mut tries = 0;
    loop {
        let started = tokio::task::spawn_blocking(start.clone()).await;
        let cause = match started {
            Ok(Ok(chain)) => return Ok(chain),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic.to_string(),
        };
        tries += 1;
        let is_over = next(tries) != Next::Again;
        if is_over || stop.unless_asked(tokio::time::sleep(pause(tries, pause_max))).await.is_none()
        {
            return Err(cause);
        }
    }
}

impl Lane<'_> {
    /// After a start of the stages that has failed, the `tries`th in a row for the batch in hand: waits
    /// until it is time for the next, or until another revision may run the batch.
    ///
    /// # Errors
    /// [`LaneError::Fatal`] when the stages start in no lane; [`LaneError::Stopped`].
    pub(super) async fn after_failed_start(
        &mut self,
        tries: u32,
        cause: &str,
    ) -> Result<(), LaneError> {
        let next = next(tries);
        if next == Next::Decide && self.starts_nowhere().await? {
            return Err(LaneError::Fatal(format!("shard {}: {cause}", self.shard.shard)));
        }
        match next {
            Next::Again => tracing::warn!(shard = %self.shard.shard, cause, tries,
                "the stages do not start; they are tried again"),
            Next::Decide | Next::Blocked => {
                self.block(super::STAGES, cause);
                if self.change_before_blocked().await? {
                    return Ok(());
                }
            }
        }
        let pause = pause(tries, self.shared.config.timing.retry_pause_max);
        let stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.asked() => return Err(LaneError::Stopped),
            // Another revision may start.
            () = self.change.until_due() => { self.change_before_blocked().await?; }
        }
        Ok(())
    }

    /// Whether the stages start for no other shard that is read either. Never once any lane has started:
    /// a process that works is not ended for what fails later.
    async fn starts_nowhere(&self) -> Result<bool, LaneError> {
        let starts = &self.shared.starts;
        let _asking = self.unless_stopped(starts.0.asking.lock()).await?;
        let running = self.shared.board.running().into_iter().map(|lane| lane.shard);
        let others = running.filter(|shard| *shard != self.shard.shard).take(OTHERS_MAX);
        for shard in others.collect::<Vec<_>>() {
            if starts.has_started() {
                return Ok(false);
            }
            if self.starts_for(shard).await? {
                starts.note();
            }
        }
        Ok(!starts.has_started())
    }

    /// Whether the stages of the revision at work start for another shard. Their instances are dropped.
    async fn starts_for(&self, shard: ShardId) -> Result<bool, LaneError> {
        let generation: Arc<Generation> = self.segments[0].generation.clone();
        let shard = ShardKey { shard, ..self.shard.clone() };
        let (limits, samples) = (self.shared.config.rejected_max, self.shared.samples.clone());
        let stop = self.stop.clone();
        let start =
            move || Chain::start(&generation, &shard, limits, samples, stop.token()).is_ok();
        let started = self.unless_stopped(tokio::task::spawn_blocking(start)).await?;
        Ok(started.unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_08_a_start_that_fails_is_tried_again_then_decided_then_blocked() {
        for (tries, expected, pause_ms) in [
            (1, Next::Again, 200),
            (2, Next::Again, 400),
            (3, Next::Decide, 800),
            (4, Next::Blocked, 1_600),
            (1_000, Next::Blocked, 10_000),
        ] {
            assert_eq!(next(tries), expected, "{tries}");
            let found = pause(tries, Duration::from_secs(10));
            assert_eq!(found, Duration::from_millis(pause_ms), "{tries}");
        }
    }
}
