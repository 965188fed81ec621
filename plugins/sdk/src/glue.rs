//! Connection between the generated bindings and a plugin. Used by [`export!`](crate::export) and the test
//! harness, not by plugins.

use std::cell::RefCell;

use serde::Deserialize;

use crate::batch::shard_hash;
use crate::bindings::shardmill::plugin::types::{self as raw, Failure, Outcome};
use crate::{Batch, BatchPlugin, Context, Descriptor, Outbox};

/// A configured plugin and its state between calls.
pub struct Instance<P> {
    plugin: P,
    shard_hash: u64,
    /// Size of the last outcome's arena; the next one probably has a similar size.
    arena_bytes_last: usize,
}

impl<P: BatchPlugin> Instance<P> {
    /// Parses the configuration and makes the plugin.
    pub fn configure(context: &Context) -> Result<(Self, Descriptor), String> {
        let config = parse_config::<P::Config>(&context.config)?;
        let (plugin, descriptor) = P::configure(config, context).map_err(|error| error.message)?;
        let shard_hash = shard_hash(&context.shard_id);
        Ok((Self { plugin, shard_hash, arena_bytes_last: 0 }, descriptor))
    }

    /// Runs one batch.
    pub fn process(&mut self, batch: &raw::Batch) -> Result<Outcome, Failure> {
        let batch = Batch::new(batch, self.shard_hash);
        let mut out = Outbox::with_capacity(batch.len(), self.arena_bytes_last);
        match self.plugin.batch(&batch, &mut out) {
            Ok(()) => {
                let outcome = out.finish();
                self.arena_bytes_last = outcome.arena.len();
                Ok(outcome)
            }
            Err(error) => Err(Failure {
                retryable: error.retryable,
                input: error.input,
                message: error.message,
            }),
        }
    }
}

/// The instance of a component. A component has one; `configure` makes it.
pub struct Cell<P>(RefCell<Option<Instance<P>>>);

impl<P: BatchPlugin> Cell<P> {
    /// Makes a cell without an instance.
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    /// Implements the component's `configure`.
    pub fn configure(&self, context: &Context) -> Result<Descriptor, String> {
        let (instance, descriptor) = Instance::configure(context)?;
        *self.0.borrow_mut() = Some(instance);
        Ok(descriptor)
    }

    /// Implements the component's `process`.
    #[expect(clippy::expect_used, reason = "the host broke the contract: a trap says so")]
    pub fn process(&self, batch: &raw::Batch) -> Result<Outcome, Failure> {
        let mut instance = self.0.borrow_mut();
        instance.as_mut().expect("configure comes before process").process(batch)
    }
}

impl<P: BatchPlugin> Default for Cell<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// Parses the configuration. Errors name the invalid key, as in `config.rules[1].route: missing field`.
/// Positions in the JSON text would be misleading, because the user wrote TOML.
fn parse_config<C: for<'de> Deserialize<'de>>(json: &str) -> Result<C, String> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let cause = error.into_inner().to_string();
        let cause = cause.split(" at line ").next().unwrap_or_default();
        if path == "." { format!("config: {cause}") } else { format!("config.{path}: {cause}") }
    })
}

/// Exports a [`Plugin`](crate::Plugin) or [`BatchPlugin`](crate::BatchPlugin) as the component that this crate
/// is compiled to. Use it once per crate. It does nothing in a native build.
#[macro_export]
macro_rules! export {
    ($plugin:ty) => {
        const _: () = {
            const fn is_a_plugin<P: $crate::BatchPlugin>() {}
            is_a_plugin::<$plugin>();
        };

        #[cfg(target_arch = "wasm32")]
        const _: () = {
            use $crate::bindings::exports::shardmill::plugin::stage;

            ::std::thread_local! {
                static INSTANCE: $crate::glue::Cell<$plugin> =
                    const { $crate::glue::Cell::new() };
            }

            struct Component;

            impl stage::Guest for Component {
                fn configure(context: stage::Context) -> Result<stage::Descriptor, String> {
                    INSTANCE.with(|instance| instance.configure(&context))
                }

                fn process(batch: stage::Batch) -> Result<stage::Outcome, stage::Failure> {
                    INSTANCE.with(|instance| instance.process(&batch))
                }
            }

    $crate::bindings::__export_plugin!(Component with_types_in $crate::bindings);
        };
    };
}
