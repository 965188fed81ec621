//! One sandbox: a store with its limits and deadline, and the calls into it.

use std::sync::Arc;

use wasmtime::{ResourceLimiter, Store, Trap};

use super::capability::Caller;
use super::{
    Context, Descriptor, Failure, Outcome, Plugin, PluginEngine, Services, WireBatch, bindings,
    descriptor, excerpt,
};
use crate::config::StageLimits;
use crate::system::LimitError;
use crate::terminal::escaped;

/// Bytes that `configure` may hand back, or to the host in one call: a descriptor of thousands of columns.
const CONFIGURE_BYTES_MAX: usize = 1 << 20;

/// The time that `configure` may take, in milliseconds: it runs once per instance.
const CONFIGURE_MS_MAX: u64 = 10_000;

/// A call that gave no answer. The instance is dead: drop it.
#[derive(Clone, Debug)]
pub struct CallError {
    /// What kind of failure it was.
    pub fault: CallFault,
    /// What happened, in one line.
    pub message: String,
    /// The plugin's stack at the trap; empty when there is none.
    pub backtrace: String,
}

/// How a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFault {
    /// The plugin trapped.
    Trap,
    /// The deadline passed.
    Timeout,
    /// It asked for more memory or table elements than it may have.
    Memory,
    /// It handed back more than it may.
    Output,
    /// The system did not give this process what a sandbox needs.
    System,
}

impl CallError {
    /// An answer that is more than the plugin may hand back.
    pub fn output(excess: impl std::fmt::Display) -> Self {
        Self {
            fault: CallFault::Output,
            message: format!("process handed back more than it may: {excess}"),
            backtrace: String::new(),
        }
    }

    /// An answer that breaks the plugin contract counts as a trap.
    pub fn contract(violation: impl std::fmt::Display) -> Self {
        Self {
            fault: CallFault::Trap,
            message: format!("the plugin broke its contract: {violation}"),
            backtrace: String::new(),
        }
    }
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// What the store keeps: for the limiter, and for what the plugin asks of the host.
pub struct Sandbox {
    pub(super) caller: Caller,
    memory_bytes: usize,
    memory_bytes_max: usize,
    table_elements: usize,
    table_elements_max: usize,
    refused: Option<String>,
}

impl ResourceLimiter for Sandbox {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // wasmtime asks per memory; the limit holds for all of them together.
        let total = self.memory_bytes + (desired - current);
        if total > self.memory_bytes_max {
            self.refused = Some(format!(
                "asked for {total} bytes of memory, over its limit of {}",
                self.memory_bytes_max
            ));
            return Ok(false);
        }
        self.memory_bytes = total;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self.table_elements + (desired - current);
        if total > self.table_elements_max {
            self.refused = Some(format!(
                "asked for {total} table elements, over its limit of {}",
                self.table_elements_max
            ));
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }
}

/// A plugin's sandbox, configured and ready to be called.
pub struct Instance {
    store: Store<Sandbox>,
    exports: bindings::PluginWithCapabilities,
    output_bytes_max: usize,
}

impl Instance {
    /// Makes a sandbox and configures the plugin in it.
    ///
    /// # Errors
    /// [`CallError`] when the plugin traps, takes too long, or refuses its configuration (then the
    /// message is the plugin's own).
    pub fn start(
        plugin: &Plugin,
        limits: &StageLimits,
        context: &Context,
        services: &Arc<Services>,
    ) -> Result<(Self, Descriptor), CallError> {
        let mut caller = Caller::new(services.clone(), &context.shard_id, limits);
        caller.call_begins(CONFIGURE_MS_MAX);
        let sandbox = Sandbox {
            caller,
            memory_bytes: 0,
            memory_bytes_max: limits.memory_bytes_max,
            table_elements: 0,
            table_elements_max: limits.table_elements_max,
            refused: None,
        };
        let mut store = Store::new(plugin.engine.wasmtime(), sandbox);
        store.limiter(|sandbox| sandbox);
        store.epoch_deadline_trap();
        store.set_epoch_deadline(PluginEngine::ticks(CONFIGURE_MS_MAX));
        store.set_hostcall_fuel(limits.output_bytes_max.min(CONFIGURE_BYTES_MAX));
        let exports = match plugin.pre.instantiate(&mut store) {
            Ok(exports) => exports,
            Err(error) => return Err(diagnose(&store, &error, "instantiation", CONFIGURE_MS_MAX)),
        };
        let mut instance = Self { store, exports, output_bytes_max: limits.output_bytes_max };
        let answer =
            instance.exports.shardmill_plugin_stage().call_configure(&mut instance.store, context);
        match answer {
            Ok(Ok(descriptor)) => {
                descriptor::check(&descriptor).map_err(CallError::contract)?;
                instance.store.data_mut().caller.configured(&descriptor.version);
                Ok((instance, descriptor))
            }
            Ok(Err(message)) => Err(CallError {
                fault: CallFault::Trap,
                message: format!(
                    "configure refused: {}",
                    escaped(&excerpt(message.as_bytes()), &[])
                ),
                backtrace: String::new(),
            }),
            Err(error) => Err(diagnose(&instance.store, &error, "configure", CONFIGURE_MS_MAX)),
        }
    }

    /// Runs one batch.
    ///
    /// # Errors
    /// [`CallError`]: the instance is dead and must be dropped.
    pub fn process(
        &mut self,
        batch: &WireBatch,
        limit_ms: u64,
    ) -> Result<Result<Outcome, Failure>, CallError> {
        self.store.set_epoch_deadline(PluginEngine::ticks(limit_ms));
        self.store.set_hostcall_fuel(self.output_bytes_max);
        let sandbox = self.store.data_mut();
        sandbox.caller.call_begins(limit_ms);
        // What an earlier call was refused, and got by without, is not this one's fault.
        sandbox.refused = None;
        let answer = self.exports.shardmill_plugin_stage().call_process(&mut self.store, batch);
        answer.map_err(|error| diagnose(&self.store, &error, "process", limit_ms))
    }

    /// Bytes of linear memory that the instance holds.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory_bytes
    }
}

/// Turns wasmtime's error into the kind, one line, and the backtrace.
fn diagnose(
    store: &Store<Sandbox>,
    error: &wasmtime::Error,
    call: &str,
    limit_ms: u64,
) -> CallError {
    let backtrace = error
        .downcast_ref::<wasmtime::WasmBacktrace>()
        .map(ToString::to_string)
        .unwrap_or_default();
    let root = escaped(&error.root_cause().to_string(), &[]);
    let (fault, message) = match (error.downcast_ref::<Trap>(), &store.data().refused) {
        (Some(Trap::Interrupt), _) => {
            (CallFault::Timeout, format!("{call} took longer than its limit of {limit_ms} ms"))
        }
        (_, Some(refused)) => (CallFault::Memory, format!("{call} {refused}, then: {root}")),
        (Some(trap), None) => (CallFault::Trap, format!("{call} trapped: {trap}")),
        (None, None) if root.contains("fuel") => {
            (CallFault::Output, format!("{call} handed back more than it may: {root}"))
        }
        (None, None) => match LimitError::of_refusal(&root) {
            Some(limit) => (CallFault::System, format!("{call} failed: {root}: {limit}")),
            None => (CallFault::Trap, format!("{call} failed: {root}")),
        },
    };
    CallError { fault, message, backtrace }
}
