//! Long work away from the async threads: they serve ports, timers and all lanes.

/// Runs work that may take long on a thread that may block, and passes its panic on.
///
/// On an async thread, work such as a plugin's `configure` would stop the ports and other lanes, and a host call
/// that waits for a server would panic.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and whoever waits here with it.
            Err(_) => std::future::pending().await,
        },
    }
}
