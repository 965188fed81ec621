//! Runs a plugin natively, so that its tests need no WebAssembly.

use crate::bindings::shardmill::plugin::types as raw;
use crate::glue::Instance;
use crate::words::{Input, Output, Reject, Span};
use crate::{BatchPlugin, Context, Descriptor, Route};

/// Arrival time of the first record of a run, in milliseconds since the Unix epoch.
pub const ARRIVED_MS: u64 = 1_400_000_000_000;

/// A configured plugin for tests.
///
/// Record `n` of a run has the key `key-n`, the sequence number `n` and the sub-sequence number 0, and arrived
/// `n` ms after [`ARRIVED_MS`].
pub struct Harness<P> {
    instance: Instance<P>,
    descriptor: Descriptor,
}

/// Result for one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// One or more outputs, in the order in which they were emitted.
    Delivered(Vec<Emitted>),
    /// Neither an output nor a reject.
    Filtered,
    /// Rejected, with the reason.
    Rejected(String),
}

impl Fate {
    /// Makes the fate of a single output on `route` with the record's own key.
    pub fn delivered(route: &str, payload: &[u8]) -> Self {
        Self::Delivered(vec![Emitted { route: route.into(), key: None, payload: payload.into() }])
    }
}

/// One output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emitted {
    /// Name of the route.
    pub route: String,
    /// New partition key, if the plugin gave one.
    pub key: Option<String>,
    /// The payload; that of the input if the plugin passed it on.
    pub payload: Vec<u8>,
}

impl<P: BatchPlugin> Harness<P> {
    /// Configures the plugin with `config`, a JSON object, after a source of unknown format.
    ///
    /// # Errors
    ///
    /// The plugin's refusal.
    pub fn new(config: &str) -> Result<Self, String> {
        Self::after(Route::new("source", "application/octet-stream"), config)
    }

    /// Configures the plugin with `config`, a JSON object, after another stage's route.
    ///
    /// # Errors
    ///
    /// The plugin's refusal.
    pub fn after(upstream: Route, config: &str) -> Result<Self, String> {
        let context = Context {
            stream_name: "test".into(),
            shard_id: "shardId-000000000000".into(),
            config: config.into(),
            upstream: vec![upstream],
            extra: Vec::new(),
        };
        let (instance, descriptor) = Instance::configure(&context)?;
        Ok(Self { instance, descriptor })
    }

    /// Returns the plugin's descriptor.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Runs one batch and returns the fate of each record.
    ///
    /// # Errors
    ///
    /// The message with which the plugin failed the whole batch.
    ///
    /// # Panics
    ///
    /// The plugin emits on a route that it did not declare.
    pub fn run(&mut self, payloads: &[&[u8]]) -> Result<Vec<Fate>, String> {
        let batch = batch_of(payloads);
        let outcome = self.instance.process(&batch).map_err(|failure| failure.message)?;
        let slice = |span: &Span| &outcome.arena[span.start as usize..][..span.length as usize];
        let text = |span: &Span| String::from_utf8_lossy(slice(span)).into_owned();

        let mut fates = vec![Fate::Filtered; payloads.len()];
        for output in outcome.outputs.as_chunks().0.iter().map(Output::from_words) {
            let emitted = Emitted {
                route: self.descriptor.routes[output.route as usize].name.clone(),
                key: output.key.as_ref().map(text),
                payload: match &output.payload {
                    Some(span) => slice(span).into(),
                    None => payloads[output.input as usize].into(),
                },
            };
            match &mut fates[output.input as usize] {
                Fate::Delivered(all) => all.push(emitted),
                fate => *fate = Fate::Delivered(vec![emitted]),
            }
        }
        for reject in outcome.rejects.as_chunks().0.iter().map(Reject::from_words) {
            fates[reject.input as usize] = Fate::Rejected(text(&reject.reason));
        }
        Ok(fates)
    }

    /// Runs a batch of one record.
    ///
    /// # Panics
    ///
    /// The plugin fails the batch.
    #[expect(clippy::panic, reason = "this is test support: the test should fail")]
    pub fn run_one(&mut self, payload: &[u8]) -> Fate {
        match self.run(&[payload]).as_deref() {
            Ok([fate]) => fate.clone(),
            Ok(fates) => panic!("one record has {} fates", fates.len()),
            Err(message) => panic!("the plugin failed the batch: {message}"),
        }
    }
}

/// Packs payloads in the same way as the host.
#[expect(clippy::expect_used, reason = "this is test support: the test should fail")]
fn batch_of(payloads: &[&[u8]]) -> raw::Batch {
    let mut arena = Vec::new();
    let mut append = |bytes: &[u8]| {
        let start = u32::try_from(arena.len()).expect("a test batch is below 4 GiB");
        arena.extend_from_slice(bytes);
        let length = u32::try_from(bytes.len()).expect("a test payload is below 4 GiB");
        Span { start, length }
    };
    let inputs = payloads
        .iter()
        .zip(0_u64..)
        .flat_map(|(payload, number)| {
            let input = Input {
                key: append(format!("key-{number}").as_bytes()),
                payload: append(payload),
                sequence: append(number.to_string().as_bytes()),
                sub_sequence: 0,
                route: 0,
                arrived_ms: ARRIVED_MS + number,
            };
            input.to_words()
        })
        .collect();
    raw::Batch { arena, inputs }
}
