//! Threads that plugins are compiled and configured on: never the async ones.

/// Runs work that may take long, such as a plugin's `configure`, on a thread that may block.
///
/// On an async thread it would stop the ports and other lanes, and a host call that waits for a server would
/// panic there.
pub async fn off_async<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and whoever waits here with it.
            Err(_) => std::future::pending().await,
        },
    }
}
