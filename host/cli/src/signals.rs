//! Signals: the first one requests the end of a command, and a watcher guarantees that the end comes.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::terminal::note;
use shardmill_core::stop::Stop;

/// Time after the drain within which the process must have ended.
const END_WAIT_MAX: Duration = Duration::from_secs(5);
/// Exit code after a second signal.
const EXIT_AT_ONCE: i32 = 130;
/// Exit code if the process had to be ended by force.
const EXIT_FORCED: i32 = 1;

/// Returns the stop that the first SIGTERM or SIGINT requests. A second signal ends the process at once.
///
/// A thread of its own waits for signals and watches the end. The process ends at the latest 5 s after its
/// drain time, whatever its other threads do.
pub(crate) fn stop_on_signals(drain_max: Duration) -> anyhow::Result<Stop> {
    let stop = Stop::new(drain_max);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Registered here, before this function returns, so that no signal is missed.
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

/// Requests a stop at the first signal, and guarantees the end of the process.
async fn watch_end(stop: Stop, mut terminate: Signal, mut interrupt: Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // Something else requested it, such as a fatal error.
        () = stop.asked() => {}
    }
    if !stop.is_asked() {
        // The note comes first: a command with nothing to drain ends the process, and this thread, as soon as a
        // stop is requested.
        note(format_args!("draining; send the signal again to stop at once"));
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
                "error: the process did not end within {} s after its drain of {} s (timing.drain), because \
                 something does not answer; it was ended by force, and what is not committed is read again",
                END_WAIT_MAX.as_secs(),
                stop.drain_max().as_secs_f64()
            ));
            end_now(EXIT_FORCED)
        }
    }
}

/// Ends the process without running exit handlers: these may wait for a stuck thread.
fn end_now(code: i32) -> ! {
    crate::stderr::flush(crate::LOG_WAIT_MAX);
    // SAFETY: ends the process and touches none of its memory.
    unsafe { libc::_exit(code) }
}
