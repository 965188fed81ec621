//! Misbehaves on demand: what the host's tests throw at the wall.
//!
//! Records pass through untouched on the route `out`, except those whose payload contains
//! a marker of the configuration: `[stage.config]` with `trap_on = "bad"` traps on a
//! record that contains `bad`. [`Config`] lists the misdeeds.
//!
//! It implements the raw interface, because the SDK's outbox prevents most of what it
//! does.

use std::cell::{Cell, RefCell};
use std::hint::black_box;

use serde::Deserialize;
use shardmill_sdk::bindings::exports::shardmill::plugin::stage::Guest;
use shardmill_sdk::bindings::shardmill::plugin::types::{
    Batch, Context, Descriptor, Failure, Outcome, Route,
};
use shardmill_sdk::words::{Input, Output, Reject, Span};

/// The markers, one per misdeed, and what the plugin says about itself. An empty marker is
/// in every payload. If several match a record, the first in this order counts.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Traps.
    trap_on: Option<String>,
    /// Loops until the host's deadline.
    loop_on: Option<String>,
    /// Recurses until the stack is full.
    recurse_on: Option<String>,
    /// Allocates memory until the host refuses, then traps.
    grow_on: Option<String>,
    /// Returns an arena of `flood_bytes`.
    flood_on: Option<String>,
    /// Fails the batch, retryable. With `retry_calls`, for that many calls only.
    retry_on: Option<String>,
    /// Fails the batch for good without naming the culprit.
    fail_on: Option<String>,
    /// Fails the batch for good and names the culprit.
    blame_on: Option<String>,
    /// Fails the batch and blames an input that does not exist.
    bad_blame_on: Option<String>,
    /// Emits a payload whose span ends outside of the arena.
    bad_span_on: Option<String>,
    /// Emits a payload whose span starts near 2^32, so that its end overflows.
    overflow_span_on: Option<String>,
    /// Emits on a route that was not declared.
    bad_route_on: Option<String>,
    /// Emits for an input that does not exist.
    bad_input_on: Option<String>,
    /// Emits a key that is no UTF-8.
    bad_key_on: Option<String>,
    /// Returns the batch's outputs in reverse (no misdeed in a batch of one).
    unordered_on: Option<String>,
    /// Returns outputs whose last word is missing.
    cut_short_on: Option<String>,
    /// Emits and rejects the same record.
    both_on: Option<String>,
    /// Rejects the same record twice.
    double_reject_on: Option<String>,
    /// Rejects a record that does not exist.
    bad_reject_on: Option<String>,
    /// Rejects the record, as is its right.
    reject_on: Option<String>,
    /// Filters the record, as is its right.
    filter_on: Option<String>,
    /// Emits the record twice, as is its right.
    twice_on: Option<String>,
    /// Emits what it was told about the record, as a JSON object.
    report_on: Option<String>,

    /// How many calls `retry_on` fails in an instance. Absent: all.
    retry_calls: Option<u32>,
    /// The size of the arena of `flood_on`, in bytes. Absent: 64 MiB.
    flood_bytes: Option<u32>,
    /// Refuses the configuration with this message.
    refuse: Option<String>,
    /// `trap` or `loop` in `configure`.
    configure: Option<InConfigure>,
    /// What it accepts. Absent: anything.
    accepts: Vec<String>,
    /// The format of the routes. Absent: `application/octet-stream`.
    format: Option<String>,
    /// The names of the routes. Records go to the first. Absent: `out`.
    routes: Option<Vec<String>>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum InConfigure {
    Trap,
    Loop,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Misdeed {
    Trap,
    Loop,
    Recurse,
    Grow,
    Flood,
    Retry,
    Fail,
    Blame,
    BadBlame,
    BadSpan,
    OverflowSpan,
    BadRoute,
    BadInput,
    BadKey,
    Unordered,
    CutShort,
    Both,
    DoubleReject,
    BadReject,
    Reject,
    Filter,
    Twice,
    Report,
}

impl Config {
    fn misdeed(&self, payload: &[u8]) -> Option<Misdeed> {
        let markers = [
            (&self.trap_on, Misdeed::Trap),
            (&self.loop_on, Misdeed::Loop),
            (&self.recurse_on, Misdeed::Recurse),
            (&self.grow_on, Misdeed::Grow),
            (&self.flood_on, Misdeed::Flood),
            (&self.retry_on, Misdeed::Retry),
            (&self.fail_on, Misdeed::Fail),
            (&self.blame_on, Misdeed::Blame),
            (&self.bad_blame_on, Misdeed::BadBlame),
            (&self.bad_span_on, Misdeed::BadSpan),
            (&self.overflow_span_on, Misdeed::OverflowSpan),
            (&self.bad_route_on, Misdeed::BadRoute),
            (&self.bad_input_on, Misdeed::BadInput),
            (&self.bad_key_on, Misdeed::BadKey),
            (&self.unordered_on, Misdeed::Unordered),
            (&self.cut_short_on, Misdeed::CutShort),
            (&self.both_on, Misdeed::Both),
            (&self.double_reject_on, Misdeed::DoubleReject),
            (&self.bad_reject_on, Misdeed::BadReject),
            (&self.reject_on, Misdeed::Reject),
            (&self.filter_on, Misdeed::Filter),
            (&self.twice_on, Misdeed::Twice),
            (&self.report_on, Misdeed::Report),
        ];
        let found = |marker: &&Option<String>| {
            marker.as_deref().is_some_and(|marker| contains(payload, marker.as_bytes()))
        };
        markers.iter().find(|(marker, _)| found(marker)).map(|(_, misdeed)| *misdeed)
    }

    fn descriptor(&self) -> Descriptor {
        let format = self.format.as_deref().unwrap_or("application/octet-stream");
        let names = self.routes.clone().unwrap_or_else(|| vec!["out".into()]);
        let mut descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        descriptor.accepts = self.accepts.clone();
        descriptor.routes = names.iter().map(|name| Route::new(name, format)).collect();
        descriptor
    }
}

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::default();
    static RETRIED_CALLS: Cell<u32> = const { Cell::new(0) };
}

/// The component.
pub struct Hostile;

impl Guest for Hostile {
    fn configure(context: Context) -> Result<Descriptor, String> {
        let config: Config =
            serde_json::from_str(&context.config).map_err(|error| error.to_string())?;
        match config.configure {
            Some(InConfigure::Trap) => trap(),
            Some(InConfigure::Loop) => spin(),
            None => {}
        }
        if let Some(message) = config.refuse {
            return Err(message);
        }
        let descriptor = config.descriptor();
        CONFIG.set(config);
        Ok(descriptor)
    }

    fn process(batch: Batch) -> Result<Outcome, Failure> {
        CONFIG.with_borrow(|config| process(config, &batch))
    }
}

#[cfg(target_arch = "wasm32")]
shardmill_sdk::bindings::__export_plugin!(Hostile with_types_in shardmill_sdk::bindings);

fn process(config: &Config, batch: &Batch) -> Result<Outcome, Failure> {
    let mut outcome = Outcome { arena: Vec::new(), outputs: Vec::new(), rejects: Vec::new() };
    let mut outputs = Vec::new();
    let mut reversed = false;
    let mut cut_short = false;
    let (inputs, _) = batch.inputs.as_chunks();
    let nowhere = inputs.len() as u32;
    for (index, input) in (0..).zip(inputs.iter().map(Input::from_words)) {
        let pass = Output { input: index, route: 0, key: None, payload: None };
        let outside = |start| Some(Span { start, length: 16 });
        let failure = |retryable, input| {
            Err(Failure { retryable, input, message: "hostile: as configured".into() })
        };
        let payload = slice(batch, input.payload);
        match config.misdeed(payload) {
            None => outputs.push(pass),
            Some(Misdeed::Trap) => trap(),
            Some(Misdeed::Loop) => spin(),
            Some(Misdeed::Recurse) => {
                black_box(recurse(1));
            }
            Some(Misdeed::Grow) => grow(),
            Some(Misdeed::Flood) => {
                let bytes = config.flood_bytes.unwrap_or(64 << 20);
                outcome.arena.resize(outcome.arena.len() + bytes as usize, b'x');
                outputs.push(pass);
            }
            Some(Misdeed::Retry) => {
                let calls = RETRIED_CALLS.get();
                if config.retry_calls.is_none_or(|limit| calls < limit) {
                    RETRIED_CALLS.set(calls + 1);
                    return failure(true, None);
                }
                outputs.push(pass);
            }
            Some(Misdeed::Fail) => return failure(false, None),
            Some(Misdeed::Blame) => return failure(false, Some(index)),
            Some(Misdeed::BadBlame) => return failure(false, Some(nowhere)),
            Some(Misdeed::BadSpan) => {
                let end = outcome.arena.len() as u32;
                outputs.push(Output { payload: outside(end), ..pass });
            }
            Some(Misdeed::OverflowSpan) => {
                outputs.push(Output { payload: outside(u32::MAX - 8), ..pass });
            }
            Some(Misdeed::BadRoute) => outputs.push(Output { route: 1_000, ..pass }),
            Some(Misdeed::BadInput) => outputs.push(Output { input: nowhere, ..pass }),
            Some(Misdeed::BadKey) => {
                let key = append(&mut outcome, b"\xff\xfe");
                outputs.push(Output { key: Some(key), ..pass });
            }
            Some(Misdeed::Unordered) => {
                reversed = true;
                outputs.push(pass);
            }
            Some(Misdeed::CutShort) => {
                cut_short = true;
                outputs.push(pass);
            }
            Some(Misdeed::Both) => {
                reject(&mut outcome, index);
                outputs.push(pass);
            }
            Some(Misdeed::DoubleReject) => {
                reject(&mut outcome, index);
                reject(&mut outcome, index);
            }
            Some(Misdeed::BadReject) => reject(&mut outcome, nowhere),
            Some(Misdeed::Reject) => reject(&mut outcome, index),
            Some(Misdeed::Filter) => {}
            Some(Misdeed::Twice) => {
                outputs.push(pass);
                outputs.push(pass);
            }
            Some(Misdeed::Report) => {
                let payload = append(&mut outcome, report(batch, &input).as_bytes());
                outputs.push(Output { payload: Some(payload), ..pass });
            }
        }
    }
    if reversed {
        outputs.reverse();
    }
    outcome.outputs = outputs.into_iter().flat_map(Output::to_words).collect();
    if cut_short {
        outcome.outputs.pop();
    }
    Ok(outcome)
}

fn contains(payload: &[u8], marker: &[u8]) -> bool {
    marker.is_empty() || payload.windows(marker.len()).any(|window| window == marker)
}

fn slice(batch: &Batch, span: Span) -> &[u8] {
    &batch.arena[span.start as usize..][..span.length as usize]
}

fn append(outcome: &mut Outcome, bytes: &[u8]) -> Span {
    let start = outcome.arena.len() as u32;
    outcome.arena.extend_from_slice(bytes);
    Span { start, length: bytes.len() as u32 }
}

fn reject(outcome: &mut Outcome, input: u32) {
    let reason = append(outcome, b"hostile: as configured");
    outcome.rejects.extend(Reject { input, reason }.to_words());
}

fn report(batch: &Batch, input: &Input) -> String {
    let text = |span| String::from_utf8_lossy(slice(batch, span)).into_owned();
    serde_json::json!({
        "key": text(input.key),
        "sequence": text(input.sequence),
        "sub_sequence": input.sub_sequence,
        "route": input.route,
        "arrived_ms": input.arrived_ms,
    })
    .to_string()
}

#[expect(clippy::panic, reason = "a trap is what was ordered")]
fn trap() -> ! {
    panic!("hostile: as configured")
}

fn spin() -> ! {
    let mut turns = 0_u64;
    loop {
        turns = black_box(turns.wrapping_add(1));
    }
}

#[expect(unconditional_recursion, reason = "a full stack is what was ordered")]
fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1))) + depth
}

fn grow() -> ! {
    const PIECE_BYTES: usize = 1 << 20;
    loop {
        black_box(Vec::<u8>::with_capacity(PIECE_BYTES)).leak();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(config: &str, payload: &[u8]) -> Result<Outcome, Failure> {
        let config = serde_json::from_str(config).unwrap();
        let span = |start, length| Span { start, length };
        let arena = [payload, b"7"].concat();
        let length = payload.len() as u32;
        let input = Input {
            key: span(length, 1),
            payload: span(0, length),
            sequence: span(length, 1),
            sub_sequence: 0,
            route: 0,
            arrived_ms: 1,
        };
        process(&config, &Batch { arena, inputs: input.to_words().into() })
    }

    fn outputs(outcome: &Outcome) -> Vec<Output> {
        outcome.outputs.as_chunks().0.iter().map(Output::from_words).collect()
    }

    #[test]
    fn a_record_without_a_marker_passes() {
        let outcome = run(r#"{"trap_on":"bad"}"#, b"good").unwrap();
        assert!(matches!(outputs(&outcome)[..], [Output { payload: None, .. }]));
    }

    #[test]
    fn a_marker_triggers_its_misdeed() {
        let outcome = run(r#"{"bad_route_on":"bad"}"#, b"a bad one").unwrap();
        assert_eq!(outputs(&outcome)[0].route, 1_000);
        assert!(run(r#"{"retry_on":""}"#, b"any").unwrap_err().retryable);
        let outcome = run(r#"{"both_on":"bad"}"#, b"bad").unwrap();
        assert_eq!((outputs(&outcome).len(), outcome.rejects.len()), (1, 3));
    }

    #[test]
    fn retries_end() {
        let config = r#"{"retry_on":"bad","retry_calls":1}"#;
        assert!(run(config, b"bad").is_err());
        assert!(run(config, b"bad").is_ok());
    }
}
