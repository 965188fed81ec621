//! One sandbox: a wasmtime store with its limits and clock, and the calls into it.
//!
//! Every limit holds per instance and is checked where it is spent:
//!
//! | limit | checked by | fault |
//! |---|---|---|
//! | CPU time, time of host calls | the epoch callback ([`look`]) | `Timeout`, or `Starved`: nobody is to blame |
//! | memory and table elements, all together | [`ResourceLimiter`], before each growth | `Memory` |
//! | bytes that the host copies for one answer or argument | hostcall fuel, before the copy | `Output` |
//! | number of memories, tables and instances | wasmtime, at instantiation | `Parts` |
//!
//! After a [`CallError`] the instance must be dropped. Its memory may be in any state in the middle of a
//! computation, so another call could give wrong answers. The caller starts a new one.

use std::sync::Arc;
use std::time::Duration;

use wasmtime::{ResourceLimiter, Store, StoreContextMut, Trap, UpdateDeadline};

use super::capability::{HasCaller, HostCaller};
use super::clock::{CallTime, Over, Spent};
use super::engine::ticks_of;
use super::features::{PARTS_MAX, Parts};
use super::{
    Context, Descriptor, Failure, Outcome, Plugin, Services, WireBatch, bindings, descriptor,
};
use shardmill_config::StageLimits;
use shardmill_core::escape::escaped;
use shardmill_core::record::excerpt;
use shardmill_core::system::LimitError;

/// Bytes that `configure` may return, or pass to the host in one call: enough for a descriptor of thousands of
/// columns.
const CONFIGURE_BYTES_MAX: usize = 1 << 20;

/// A call that gave no answer. The instance must be dropped.
#[derive(Clone, Debug)]
pub struct CallError {
    /// The kind of the failure.
    pub kind: CallErrorKind,
    /// Description in one line.
    pub message: String,
    /// The plugin's backtrace at the trap; empty if there is none.
    pub backtrace: String,
}

/// The kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallErrorKind {
    /// The plugin trapped.
    Trap,
    /// Its time was used up: its own CPU time, or by waiting for the host.
    Timeout,
    /// The machine was too busy to give it CPU time. Neither the plugin nor its records are to blame.
    Starved,
    /// It asked for more memory or table elements than it may have.
    Memory,
    /// It returned more than it may.
    Output,
    /// Its component has more parts than the host allows.
    Parts,
    /// The system refused what a sandbox needs, such as address space.
    System,
}

impl CallError {
    /// Returns the error for an answer that is larger than allowed.
    pub fn output(excess: impl std::fmt::Display) -> Self {
        Self {
            kind: CallErrorKind::Output,
            message: format!("process returned more than allowed: {excess}"),
            backtrace: String::new(),
        }
    }

    /// Returns the error for an answer that breaks the plugin contract. It counts as a trap.
    pub fn contract(violation: impl std::fmt::Display) -> Self {
        Self {
            kind: CallErrorKind::Trap,
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

/// The data of a store: the counts of the limiter, and what the plugin's calls of the host need.
pub struct Sandbox {
    caller: HostCaller,
    /// Number of linear memories of its component.
    memories: usize,
    memory_bytes: usize,
    memory_bytes_max: usize,
    table_elements: usize,
    table_elements_max: usize,
    refused: Option<String>,
}

impl HasCaller for Sandbox {
    fn caller(&self) -> &HostCaller {
        &self.caller
    }

    fn caller_mut(&mut self) -> &mut HostCaller {
        &mut self.caller
    }
}

impl ResourceLimiter for Sandbox {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // wasmtime asks for each memory; the limit holds for all of them together.
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

    fn instances(&self) -> usize {
        PARTS_MAX.instances
    }

    fn tables(&self) -> usize {
        PARTS_MAX.tables
    }

    fn memories(&self) -> usize {
        PARTS_MAX.memories
    }
}

/// A plugin's sandbox, configured and ready to be called.
pub struct Instance {
    store: Store<Sandbox>,
    exports: bindings::PluginWithCapabilities,
    limits: StageLimits,
    starved: u32,
    are_long: bool,
}

impl Instance {
    /// Makes a sandbox and configures the plugin in it.
    ///
    /// # Errors
    /// [`CallError`] when the plugin traps, takes too long, or refuses its configuration (then the message is the
    /// plugin's own).
    pub fn start(
        plugin: &Plugin,
        limits: &StageLimits,
        context: &Context,
        services: &Arc<Services>,
    ) -> Result<(Self, Descriptor), CallError> {
        let time = CallTime::of_ms(limits.configure_ms(), limits.host_ms_max);
        let mut caller = HostCaller::new(services.clone(), &context.shard_id, limits);
        caller.clock.begin(time);
        let sandbox = Sandbox {
            caller,
            memories: plugin.memories,
            memory_bytes: 0,
            memory_bytes_max: limits.memory_bytes_max,
            table_elements: 0,
            table_elements_max: limits.table_elements_max,
            refused: None,
        };
        let mut store = Store::new(plugin.engine.wasmtime(), sandbox);
        store.limiter(|sandbox| sandbox);
        store.epoch_deadline_callback(look);
        store.set_epoch_deadline(1);
        store.set_hostcall_fuel(limits.output_bytes_max.min(CONFIGURE_BYTES_MAX));
        let exports = match plugin.pre.instantiate(&mut store) {
            Ok(exports) => exports,
            Err(error) => return Err(diagnose(&store, &error, "instantiation")),
        };
        let mut instance = Self { store, exports, limits: *limits, starved: 0, are_long: false };
        let answer =
            instance.exports.shardmill_plugin_stage().call_configure(&mut instance.store, context);
        match answer {
            Ok(Ok(descriptor)) => {
                descriptor::check(&descriptor).map_err(CallError::contract)?;
                instance.store.data_mut().caller.configured(&descriptor.version);
                Ok((instance, descriptor))
            }
            Ok(Err(message)) => Err(CallError {
                kind: CallErrorKind::Trap,
                // The message may repeat a secret of the configuration. Secrets are hidden before it is cut: half
                // of one would not be found.
                message: format!(
                    "configure refused: {}",
                    escaped(&excerpt(services.values.hide(message).as_bytes()), &[])
                ),
                backtrace: String::new(),
            }),
            Err(error) => Err(diagnose(&instance.store, &error, "configure")),
        }
    }

    /// Gives the next calls more wall time, after `times` starved calls in a row.
    pub fn starved_before(&mut self, times: u32) {
        self.starved = times;
    }

    /// Sets whether the next calls are expected to last so long that reading the thread's clock for them is worth its
    /// cost.
    pub fn measured(&mut self, are_long: bool) {
        self.are_long = are_long;
    }

    /// Runs one batch, with at most `limit_ms` of the plugin's own CPU time.
    ///
    /// # Errors
    /// [`CallError`]: the instance is unusable and must be dropped.
    pub fn process(
        &mut self,
        batch: &WireBatch,
        limit_ms: u64,
    ) -> Result<Result<Outcome, Failure>, CallError> {
        // The clocks are first read at the next epoch tick: no call can be over a limit before that.
        self.store.set_epoch_deadline(1);
        // Bounds what the host copies out of the plugin's memory for one answer or argument, before it is read.
        self.store.set_hostcall_fuel(self.limits.output_bytes_max);
        let sandbox = self.store.data_mut();
        let time = CallTime::of_ms(limit_ms, Some(self.limits.host_ms(limit_ms)));
        let time = time.after_starved(self.starved);
        match self.are_long {
            true => sandbox.caller.clock.begin_measured(time),
            false => sandbox.caller.clock.begin(time),
        }
        // An earlier call may have been refused memory and done without: that is not this call's fault.
        sandbox.refused = None;
        let answer = self.exports.shardmill_plugin_stage().call_process(&mut self.store, batch);
        answer.map_err(|error| diagnose(&self.store, &error, "process"))
    }

    /// Returns the time of the last call, which lasted `took`, without the time that it waited for a core.
    pub fn busy(&self, took: Duration) -> Duration {
        self.store.data().caller.clock.busy(took)
    }

    /// Bytes of linear memory that the instance holds.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory_bytes
    }
}

/// Reads the clocks of the running call when the epoch has advanced, and says after how many ticks to look again.
fn look(mut store: StoreContextMut<'_, Sandbox>) -> wasmtime::Result<UpdateDeadline> {
    let left = store.data_mut().caller.clock.look();
    Ok(left.map_or(UpdateDeadline::Interrupt, |left| UpdateDeadline::Continue(ticks_of(left))))
}

/// Turns wasmtime's error into a kind, one line and a backtrace. The order matters: a call that was interrupted for
/// its time fails with a trap too, and a refused growth mostly ends in a trap of the plugin's own allocator.
fn diagnose(store: &Store<Sandbox>, error: &wasmtime::Error, call: &str) -> CallError {
    let backtrace = error
        .downcast_ref::<wasmtime::WasmBacktrace>()
        .map(ToString::to_string)
        .unwrap_or_default();
    let root = escaped(&error.root_cause().to_string(), &[]);
    let sandbox = store.data();
    if let (Some(Trap::Interrupt), Some(over)) =
        (error.downcast_ref::<Trap>(), sandbox.caller.clock.over())
    {
        let (kind, message) = out_of_time(over, call);
        return CallError { kind, message, backtrace };
    }
    let (kind, message) = match (error.downcast_ref::<Trap>(), &sandbox.refused) {
        // The prefix is wasmtime's wording; the limits are ours.
        (None, _) if root.starts_with("resource limit exceeded:") => {
            let Parts { memories, tables, instances, .. } = PARTS_MAX;
            let message = format!(
                "{call} failed: {root}; the components of a plugin may have {memories} memories, {tables} \
                 tables and {instances} instances of modules together"
            );
            (CallErrorKind::Parts, message)
        }
        (_, Some(refused)) => (CallErrorKind::Memory, format!("{call} {refused}, then: {root}")),
        (Some(trap), None) => (CallErrorKind::Trap, format!("{call} trapped: {trap}")),
        (None, None) if root.contains("fuel") => {
            (CallErrorKind::Output, format!("{call} returned more than allowed: {root}"))
        }
        (None, None) => match LimitError::of_refusal(&root, sandbox.memories) {
            Some(limit) => (CallErrorKind::System, format!("{call} failed: {root}: {limit}")),
            None => (CallErrorKind::Trap, format!("{call} failed: {root}")),
        },
    };
    // Many plugins trap if the host gives no answer: the reason for the missing answer is what helps.
    let (kind, message) = match sandbox.caller.clock.late() {
        Some((host_call, budget)) if kind == CallErrorKind::Trap => {
            let budget_ms = budget.as_millis();
            let late = format!("its call of {host_call} had used up its {budget_ms} ms");
            (CallErrorKind::Timeout, format!("{message}; {late} (limits.host_time)"))
        }
        _ => (kind, message),
    };
    CallError { kind, message, backtrace }
}

/// Returns kind and description of a call that was ended for its time.
fn out_of_time(
    (over, spent, time): (Over, Spent, CallTime),
    call: &str,
) -> (CallErrorKind, String) {
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    match over {
        Over::Cpu => {
            let limit_ms = time.cpu_max.as_millis();
            (
                CallErrorKind::Timeout,
                format!("{call} took longer than its limit of {limit_ms} ms of CPU time"),
            )
        }
        Over::Host => {
            let (host, wall) = (seconds(spent.host), seconds(spent.wall));
            let budget_ms = time.host_max.as_millis();
            let message = format!(
                "{call} waited for the host for {host} of {wall}, though each call of the host ended within \
                 its {budget_ms} ms (limits.host_time)"
            );
            (CallErrorKind::Timeout, message)
        }
        Over::Starved => {
            let (wall, cpu_ms) = (seconds(spent.wall), spent.cpu.as_millis());
            let message = format!(
                "{call} got {cpu_ms} ms of CPU time within {wall}: the machine is too busy; it is run again, \
                 and no record is blamed"
            );
            (CallErrorKind::Starved, message)
        }
    }
}
