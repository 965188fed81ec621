//! Signals: the first one asks for the end of a command, and the end comes.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::terminal::note;
use shardmill_core::stop::Stop;

/// How long after its drain the process has ended.
const END_WAIT_MAX: Duration = Duration::from_secs(5);
/// Exit code after a second signal.
const EXIT_AT_ONCE: i32 = 130;
/// Exit code when the process had to be ended by force.
const EXIT_FORCED: i32 = 1;

/// The end that the first SIGTERM or SIGINT asks for; a second one ends the process at once.
///
/// A thread of its own waits for signals and watches the end: 5 s after its time is over the process has
/// ended, whatever its other threads do.
pub(crate) fn stop_on_signals(drain_max: Duration) -> anyhow::Result<Stop> {
    let stop = Stop::new(drain_max);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Here, so that no signal comes before it is waited for.
    let (terminate, interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let watched = stop.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || runtime.block_on(watch_end(watched, terminate, interrupt)))?;
    Ok(stop)
}

/// Asks for the end at the first signal, and makes sure that it comes.
async fn watch_end(stop: Stop, mut terminate: Signal, mut interrupt: Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // Something else asks for it, such as a fatal error.
        () = stop.asked() => {}
    }
    if !stop.is_asked() {
        // First: whoever has nothing to drain ends the process as soon as the end is asked for, and this thread
        // with it.
        note(format_args!("draining; once more to stop at once"));
        stop.ask();
    }
    let late = async {
        stop.over().await;
        tokio::time::sleep(END_WAIT_MAX).await;
    };
    tokio::select! {
        // Nothing is lost: what is not committed is read again.
        _ = terminate.recv() => end_now(EXIT_AT_ONCE),
        _ = interrupt.recv() => end_now(EXIT_AT_ONCE),
        () = late => {
            note(format_args!(
                "error: the process had not ended {} s after its drain of {} s (timing.drain): something \
                 does not answer; ended by force, what is not committed is read again",
                END_WAIT_MAX.as_secs(),
                stop.drain_max().as_secs_f64()
            ));
            end_now(EXIT_FORCED)
        }
    }
}

/// Ends the process without what usually comes before: that may wait for a thread that is stuck.
fn end_now(code: i32) -> ! {
    crate::stderr::flush(crate::LOG_WAIT_MAX);
    // SAFETY: ends the process, and touches nothing of it.
    unsafe { libc::_exit(code) }
}
