//! Long work away from the async threads: they serve ports, timers and all lanes.

use std::sync::LazyLock;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Cancelled before the runtime is shut down. Of the whole process, as its runtime is.
static ENDS: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);

/// Ends all waits of threads that may block, and those to come. A wait that uses timers of a runtime which is
/// shut down panics, and one that does not end holds the end of the process up.
pub fn end_waits() {
    ENDS.cancel();
}

/// Whether the process ends: what a wait gave then may be nothing that anybody has answered.
pub fn waits_ended() -> bool {
    ENDS.is_cancelled()
}

/// Waits on a thread that may block; `None`: the process ends before. Call it never from async code.
pub fn wait_on<T>(runtime: &Handle, wait: impl Future<Output = T>) -> Option<T> {
    runtime.block_on(async {
        tokio::select! {
            // First, so that no timer is asked after the end.
            biased;
            () = ENDS.cancelled() => None,
            done = wait => Some(done),
        }
    })
}

/// Runs work that may take long on a thread that may block, and passes its panic on.
///
/// On an async thread, work such as a plugin's `configure` would stop the ports and other lanes, and a host call
/// that waits for a server would panic.
pub async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and whoever waits here with it.
            Err(_) => std::future::pending().await,
        },
    }
}
