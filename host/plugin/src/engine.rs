//! The one wasmtime engine of the process, and the clock that interrupts plugins.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use wasmtime::{Config, Engine};

use super::features;

/// Interval at which the epoch advances: the resolution of every deadline. At 5 ms the ticker costs nothing
/// measurable, and a deadline is at most one tick late.
pub(crate) const EPOCH_TICK: Duration = Duration::from_millis(5);

/// Limit on the stack of a plugin's call, in bytes. Deep recursion traps here, well below the 2 MiB of the calling
/// threads.
const WASM_STACK_BYTES_MAX: usize = 1 << 20;

/// A shared engine; cheap to clone. The ticker ends with its last clone.
#[derive(Clone)]
pub struct PluginEngine {
    engine: Engine,
    _ticker: Arc<Ticker>,
}

struct Ticker {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PluginEngine {
    /// Makes the engine and starts its ticker.
    ///
    /// # Errors
    /// wasmtime's, when the processor or the system lacks what compiled code needs, and the
    /// system's when no thread can be started.
    pub fn new() -> wasmtime::Result<Self> {
        let engine = Engine::new(&config())?;
        let (stop, stopped) = mpsc::channel();
        let ticking = engine.clone();
        let thread = std::thread::Builder::new().name("epoch-ticker".into()).spawn(move || {
            while stopped.recv_timeout(EPOCH_TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                ticking.increment_epoch();
            }
        })?;
        Ok(Self { engine, _ticker: Arc::new(Ticker { stop: Some(stop), thread: Some(thread) }) })
    }

    /// Returns the wasmtime engine.
    pub fn wasmtime(&self) -> &Engine {
        &self.engine
    }
}

pub(super) fn config() -> Config {
    let mut config = Config::new();
    features::restrict(&mut config);
    config
        .wasm_component_model(true)
        .epoch_interruption(true)
        // A synchronous call costs 300 ns without it and 800 ns with it.
        .concurrency_support(false)
        .max_wasm_stack(WASM_STACK_BYTES_MAX);
    config
}

/// Returns the number of epoch ticks that cover a duration, rounded up.
pub(super) fn ticks_of(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(EPOCH_TICK.as_nanos())).unwrap_or(u64::MAX).max(1)
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // If the ticker panicked, that does not matter any more.
            let _ = thread.join();
        }
    }
}
