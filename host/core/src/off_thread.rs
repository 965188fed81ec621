//! Runs long work outside the async threads, which serve ports, timers and all lanes.

use std::sync::LazyLock;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Cancelled before the runtime shuts down. One for the process, because the runtime is, too.
static ENDS: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);

/// Ends all waits on blocking threads, also future ones. A wait that uses timers of a runtime that has shut down would
/// panic, and one that does not end would keep the process from ending.
pub fn end_waits() {
    ENDS.cancel();
}

/// Whether the process is ending. A wait may then have returned without an answer of any server.
pub fn waits_ended() -> bool {
    ENDS.is_cancelled()
}

/// Waits on a blocking thread; `None`: the process ends first. Never call it from async code.
pub fn wait_on<T>(runtime: &Handle, wait: impl Future<Output = T>) -> Option<T> {
    runtime.block_on(async {
        tokio::select! {
            // First, so that no timer is used after the end.
            biased;
            () = ENDS.cancelled() => None,
            done = wait => Some(done),
        }
    })
}

/// Runs work that may take long on a blocking thread. A panic there continues in the caller.
///
/// On an async thread, work such as a plugin's `configure` would stop the ports and other lanes, and a host call that
/// waits for a server would panic.
pub async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and the caller ends with it.
            Err(_) => std::future::pending().await,
        },
    }
}
