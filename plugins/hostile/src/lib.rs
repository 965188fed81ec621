//! A plugin that misbehaves on demand, for the host's tests of the sandbox.
//!
//! Records pass unchanged to the route `out`, except those whose payload contains a marker of the
//! configuration: `[stage.config]` with `trap_on = "bad"` traps on a record that contains `bad`. [`Config`]
//! lists the faults.
//!
//! It implements the raw interface, because the SDK's outbox prevents most of these faults.

mod acts;
mod config;

use std::cell::{Cell, RefCell};
use std::hint::black_box;

use shardmill_sdk::bindings::exports::shardmill::plugin::stage::Guest;
use shardmill_sdk::bindings::shardmill::plugin::types::{
    Batch, Context, Descriptor, Failure, Outcome,
};
use shardmill_sdk::words::{Input, Output, Reject, Span};

use acts::{copy, grow, recurse, spin, trap};
pub use config::Config;
use config::{Fault, InConfigure};

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
            _ => {}
        }
        if let Some(message) = config.refuse {
            return Err(message);
        }
        let mut descriptor = config.descriptor();
        match config.configure {
            Some(InConfigure::BadName) => descriptor.name = acts::no_utf8(),
            Some(InConfigure::ManyRoutes) => {
                descriptor.routes = vec![descriptor.routes[0].clone(); 1_000_000];
            }
            _ => {}
        }
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
    let mut corrupts = false;
    let many = config.many.unwrap_or(1_000_000) as usize;
    let (inputs, _) = batch.inputs.as_chunks();
    let nowhere = inputs.len() as u32;
    for (index, input) in (0..).zip(inputs.iter().map(Input::from_words)) {
        let pass = Output { input: index, route: 0, key: None, payload: None };
        let outside = |start| Some(Span { start, length: 16 });
        let failure = |retryable, input| {
            Err(Failure { retryable, input, message: "hostile: as configured".into() })
        };
        let payload = slice(batch, input.payload);
        match config.fault(payload) {
            None => outputs.push(pass),
            Some(Fault::Trap) => trap(),
            Some(Fault::Loop) => spin(),
            Some(Fault::Copy) => copy(),
            Some(Fault::Recurse) => {
                black_box(recurse(1));
            }
            Some(Fault::Grow) => grow(),
            Some(Fault::Flood) => {
                let bytes = config.flood_bytes.unwrap_or(64 << 20);
                outcome.arena.resize(outcome.arena.len() + bytes as usize, b'x');
                outputs.push(pass);
            }
            Some(Fault::Many) => outputs.extend(vec![pass; many]),
            Some(Fault::SharePayload) => {
                let payload = Some(append(&mut outcome, &mebibyte()));
                outputs.extend(vec![Output { payload, ..pass }; many]);
            }
            Some(Fault::ShareKey) => {
                let key = Some(append(&mut outcome, &mebibyte()));
                outputs.extend(vec![Output { key, ..pass }; many]);
            }
            Some(Fault::Retry) => {
                let calls = RETRIED_CALLS.get();
                if config.retry_calls.is_none_or(|limit| calls < limit) {
                    RETRIED_CALLS.set(calls + 1);
                    return failure(true, None);
                }
                outputs.push(pass);
            }
            Some(Fault::Fail) => return failure(false, None),
            Some(Fault::Blame) => return failure(false, Some(index)),
            Some(Fault::BadBlame) => return failure(false, Some(nowhere)),
            Some(Fault::BadMessage) => {
                return Err(Failure { retryable: false, input: None, message: acts::no_utf8() });
            }
            Some(Fault::BadSpan) => {
                let end = outcome.arena.len() as u32;
                outputs.push(Output { payload: outside(end), ..pass });
            }
            Some(Fault::OverflowSpan) => {
                outputs.push(Output { payload: outside(u32::MAX - 8), ..pass });
            }
            Some(Fault::BadRoute) => outputs.push(Output { route: 1_000, ..pass }),
            Some(Fault::BadInput) => outputs.push(Output { input: nowhere, ..pass }),
            Some(Fault::BadKey) => {
                let key = append(&mut outcome, b"\xff\xfe");
                outputs.push(Output { key: Some(key), ..pass });
            }
            Some(Fault::Unordered) => {
                reversed = true;
                outputs.push(pass);
            }
            Some(Fault::CutShort) => {
                cut_short = true;
                outputs.push(pass);
            }
            Some(Fault::Both) => {
                reject(&mut outcome, index);
                outputs.push(pass);
            }
            Some(Fault::DoubleReject) => {
                reject(&mut outcome, index);
                reject(&mut outcome, index);
            }
            Some(Fault::BadReject) => reject(&mut outcome, nowhere),
            Some(Fault::Corrupt) => {
                corrupts = true;
                outputs.push(pass);
            }
            Some(Fault::BadReason) => reject_for(&mut outcome, index, b"bad: \xff\xfe"),
            Some(Fault::LongReason) => reject_for(&mut outcome, index, &mebibyte()),
            Some(Fault::Reject) => reject(&mut outcome, index),
            Some(Fault::Filter) => {}
            Some(Fault::Twice) => {
                outputs.push(pass);
                outputs.push(pass);
            }
            Some(Fault::Overlap) => {
                let whole = append(&mut outcome, payload);
                let end = Span { start: whole.start + 1, length: whole.length - 1 };
                outputs.push(Output { payload: Some(whole), ..pass });
                outputs.push(Output { payload: Some(end), ..pass });
            }
            Some(Fault::Strain) => {
                acts::strain();
                outputs.push(pass);
            }
            Some(Fault::Leak) => {
                black_box(mebibyte()).leak();
                outputs.push(pass);
            }
            Some(Fault::Report) => {
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
    if corrupts {
        acts::corrupt();
    }
    Ok(outcome)
}

fn slice(batch: &Batch, span: Span) -> &[u8] {
    &batch.arena[span.start as usize..][..span.length as usize]
}

fn mebibyte() -> Vec<u8> {
    vec![b'x'; 1 << 20]
}

fn append(outcome: &mut Outcome, bytes: &[u8]) -> Span {
    let start = outcome.arena.len() as u32;
    outcome.arena.extend_from_slice(bytes);
    Span { start, length: bytes.len() as u32 }
}

fn reject(outcome: &mut Outcome, input: u32) {
    reject_for(outcome, input, b"hostile: as configured");
}

fn reject_for(outcome: &mut Outcome, input: u32, reason: &[u8]) {
    let reason = append(outcome, reason);
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
    fn a_marker_triggers_its_fault() {
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
