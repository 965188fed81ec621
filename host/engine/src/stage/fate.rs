//! Outcomes of records, and their differences before and after a change, as text for people.

use std::fmt::Write as _;
use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use imara_diff::{Algorithm, Diff, InternedInput, Token};
use serde_json::Value;

use super::{LoadedStage, StageOutcome};
use shardmill_core::escape::printable;

/// One output of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrialOutput {
    /// The route's name.
    pub route: String,
    /// The partition key; `None`: unchanged.
    pub key: Option<Bytes>,
    /// The payload; `None`: unchanged.
    pub payload: Option<Bytes>,
}

/// Outcome of one record. Neither outputs nor a rejection means filtered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// Its outputs, in order.
    pub outputs: Vec<TrialOutput>,
    /// Reason of its rejection.
    pub rejected: Option<String>,
    /// The plugin's stack, when it trapped.
    pub backtrace: String,
    /// It was rejected because the call trapped or exceeded a limit.
    pub trapped: bool,
}

/// Returns the outcome of each of a stage's items.
pub fn fates(stage: &LoadedStage, items: usize, outcome: StageOutcome) -> Vec<Fate> {
    let mut fates = vec![Fate::default(); items];
    let routes = &stage.route_names;
    for output in outcome.outputs() {
        fates[output.item].outputs.push(TrialOutput {
            route: routes[output.route].to_string(),
            key: output.key,
            payload: output.payload,
        });
    }
    for rejected in outcome.rejected {
        let fate = &mut fates[rejected.item];
        fate.rejected = Some(stage.services.values.hide(rejected.reason));
        fate.backtrace = rejected.backtrace;
        fate.trapped = rejected.trapped;
    }
    fates
}

/// Two texts that should be equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    expected: String,
    found: String,
    /// Stacks of traps.
    backtraces: String,
}

impl Difference {
    /// Compares two texts; `None`: they are equal. `backtraces` are shown below them.
    pub fn of(expected: String, found: String, backtraces: String) -> Option<Self> {
        (expected != found).then_some(Self { expected, found, backtraces })
    }

    /// Compares the outcomes of one record before and after a change.
    pub(crate) fn between(before: &Fate, after: &Fate) -> Self {
        let backtraces = after.backtrace.trim_end();
        let backtraces = match backtraces {
            "" => String::new(),
            lines => format!("{lines}\n"),
        };
        Self { expected: shown_fate(before), found: shown_fate(after), backtraces }
    }

    /// Returns the lines: `-` is expected, `+` is found; coloured for a terminal. Control characters in the texts
    /// are escaped.
    pub fn render(&self, coloured: bool) -> String {
        let mut text = String::new();
        let (red, green, end) =
            if coloured { ("\x1b[31m", "\x1b[32m", "\x1b[0m") } else { ("", "", "") };
        // The diff compares lines.
        let input = InternedInput::new(self.expected.as_str(), self.found.as_str());
        let mut show = |before: &str, tokens: &[Token], after: &str| {
            for token in tokens {
                let line = printable(input.interner[*token].trim_end_matches('\n'));
                let _ = writeln!(text, "{before} {line}{after}");
            }
        };
        let mut shown = 0;
        for hunk in Diff::compute(Algorithm::Myers, &input).hunks() {
            let (expected, found) = (range(&hunk.before), range(&hunk.after));
            show(" ", &input.before[shown..expected.start], "");
            shown = expected.end;
            show(&format!("{red}-"), &input.before[expected], end);
            show(&format!("{green}+"), &input.after[found], end);
        }
        show(" ", &input.before[shown..], "");
        text.push_str(&printable(&self.backtraces));
        text
    }
}

fn range(lines: &Range<u32>) -> Range<usize> {
    lines.start as usize..lines.end as usize
}

fn shown_fate(fate: &Fate) -> String {
    let mut text = String::new();
    for output in &fate.outputs {
        let _ = write!(text, "output → {}", output.route);
        if let Some(key) = &output.key {
            let _ = write!(text, " key {:?}", String::from_utf8_lossy(key));
        }
        text.push('\n');
        match output.payload.as_ref().map(|payload| (written(payload), payload)) {
            None => text.push_str("    as it came\n"),
            Some((("json", value), _)) => show_json(&mut text, &value),
            Some((_, payload)) => show_payload(&mut text, payload, false),
        }
    }
    match &fate.rejected {
        Some(reason) => {
            let _ = writeln!(text, "rejected: {reason}");
        }
        None if fate.outputs.is_empty() => text.push_str("filtered\n"),
        None => {}
    }
    text
}

/// Adds a JSON value in several indented lines.
pub fn show_json(text: &mut String, value: &Value) {
    // `Value` decides the order of members, the same on both sides.
    let pretty = serde_json::to_string_pretty(value).unwrap_or_default();
    for line in pretty.lines() {
        let _ = writeln!(text, "    {line}");
    }
}

/// Adds a payload in indented lines: as text where it is text and `as_base64` is false, otherwise in hexadecimal.
pub fn show_payload(text: &mut String, bytes: &[u8], as_base64: bool) {
    match std::str::from_utf8(bytes) {
        Ok(plain) if !as_base64 => {
            for line in plain.split('\n') {
                let _ = writeln!(text, "    {}", line.escape_debug());
            }
        }
        _ => {
            let _ = writeln!(text, "    {} ({} bytes)", hex::encode(bytes), bytes.len());
        }
    }
}

/// Returns bytes as the author of a test case would write them: the members `json`, `text` or `base64`.
pub fn written(bytes: &[u8]) -> (&'static str, Value) {
    if let Ok(value @ (Value::Object(_) | Value::Array(_))) = serde_json::from_slice(bytes) {
        return ("json", value);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\t')) => {
            ("text", text.into())
        }
        _ => ("base64", BASE64.encode(bytes).into()),
    }
}
