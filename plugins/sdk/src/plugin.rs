//! The traits that a plugin implements.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Batch, Context, Descriptor, Emitter, Error, Outbox, Record};

/// A plugin that processes one record at a time, as most do.
pub trait Plugin: Sized + 'static {
    /// Type of the TOML table `[stage.config]`. Give it `#[serde(deny_unknown_fields)]`, so that a misspelt key
    /// is refused. Use [`NoConfig`] if there is nothing to configure.
    type Config: DeserializeOwned;

    /// Makes an instance. It is called once, before the first record. The same configuration must give the same
    /// descriptor.
    ///
    /// # Errors
    ///
    /// The configuration is invalid. The pipeline is then refused.
    fn configure(config: Self::Config, context: &Context) -> Result<(Self, Descriptor), Error>;

    /// Processes one record: emits any number of outputs, or none to filter it.
    ///
    /// # Errors
    ///
    /// Rejects the record, or requests a retry. What was emitted for the record is removed.
    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error>;
}

/// A plugin that processes a whole batch, to share work among its records. Every [`Plugin`] is one.
///
/// Batches are cut by size and time, so they differ in a replay: the result of a record must not depend on its
/// neighbours.
///
/// ```
/// use shardmill_sdk::{Batch, BatchPlugin, Context, Descriptor, Error, NoConfig, Outbox, Route};
///
/// struct DropEmpty;
///
/// impl BatchPlugin for DropEmpty {
///     type Config = NoConfig;
///
///     fn configure(_: NoConfig, _: &Context) -> Result<(Self, Descriptor), Error> {
///         let route = Route::new("out", "application/octet-stream");
///         Ok((DropEmpty, Descriptor::new("drop-empty", "0.1.0").route(route)))
///     }
///
///     fn batch(&mut self, batch: &Batch<'_>, out: &mut Outbox) -> Result<(), Error> {
///         for record in batch.records().filter(|record| !record.payload().is_empty()) {
///             out.at(&record).pass(0);
///         }
///         Ok(())
///     }
/// }
/// # use shardmill_sdk::testing::{Fate, Harness};
/// # let mut plugin = Harness::<DropEmpty>::new("{}")?;
/// # assert_eq!(plugin.run(&[b"", b"a"])?, [Fate::Filtered, Fate::delivered("out", b"a")]);
/// # Ok::<(), String>(())
/// ```
pub trait BatchPlugin: Sized + 'static {
    /// As [`Plugin::Config`].
    type Config: DeserializeOwned;

    /// As [`Plugin::configure`].
    ///
    /// # Errors
    ///
    /// The configuration is invalid.
    fn configure(config: Self::Config, context: &Context) -> Result<(Self, Descriptor), Error>;

    /// Processes one batch. Records that `out` gets nothing for are filtered.
    ///
    /// # Errors
    ///
    /// Fails the whole batch: the host then searches for the record that causes it. To
    /// reject one record, use [`Emitter::reject`].
    fn batch(&mut self, batch: &Batch<'_>, out: &mut Outbox) -> Result<(), Error>;
}

impl<P: Plugin> BatchPlugin for P {
    type Config = P::Config;

    fn configure(config: P::Config, context: &Context) -> Result<(Self, Descriptor), Error> {
        <P as Plugin>::configure(config, context)
    }

    fn batch(&mut self, batch: &Batch<'_>, out: &mut Outbox) -> Result<(), Error> {
        for record in batch.records() {
            let mut emitter = out.at(&record);
            match self.record(&record, &mut emitter) {
                Ok(()) => {}
                Err(error) if error.retryable => {
                    return Err(Error { input: Some(record.index()), ..error });
                }
                Err(error) => emitter.reject(&error.message),
            }
        }
        Ok(())
    }
}

/// Configuration of a plugin that has none: any key in `[stage.config]` is refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}
