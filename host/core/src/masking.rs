//! Hides the values of variables that this process has read, in everything that it prints.
//!
//! Values are passwords, tokens and the like. A text with a value can come from anywhere: a log line of a library, a
//! server that repeats the request, the system's error about a path. Sinks, stages and the configuration already hide
//! values where they make their texts, because these texts also go into dead letters and the state. This module is the
//! last check: standard error, the reports of commands, and the causes of blocked lanes.
//!
//! Records are not changed: those that `stream tail` and `dlq` show, and the rows of a stdout sink.

use std::fmt::Display;
use std::sync::{LazyLock, PoisonError, RwLock};

use serde_json::Value;

use crate::escape::{QUOTED_BYTES_MAX, beginning, controls_terminal};
use crate::values::Values;

/// Limit of a message that quotes others, in bytes: what they wrote, and the same again for names and ways out.
const MESSAGE_BYTES_MAX: usize = 2 * QUOTED_BYTES_MAX;
/// Limit of a report of several lines, in bytes: more than a person reads to its end.
const REPORT_BYTES_MAX: usize = 64 << 10;

static VALUES: LazyLock<RwLock<Values>> = LazyLock::new(RwLock::default);

/// Hides these values from now on.
pub fn register(values: &Values) {
    VALUES.write().unwrap_or_else(PoisonError::into_inner).extend(values);
}

/// Replaces each value in a text with `${NAME}`.
pub fn hide(text: String) -> String {
    let values = VALUES.read().unwrap_or_else(PoisonError::into_inner);
    match values.is_empty() {
        true => text,
        false => values.hide(text),
    }
}

/// Returns the beginning of a text of a server, a database or a library, for a message: at most [`QUOTED_BYTES_MAX`]
/// bytes, in one line, without values. Use it where a foreign error becomes a text, so that no copy of a long one is
/// passed on, and none of its line ends looks like one of ours.
pub fn sanitized(text: impl Display) -> String {
    sanitized_within(text, QUOTED_BYTES_MAX)
}

/// Does the same with at most `bytes_max` bytes.
pub fn sanitized_within(text: impl Display, bytes_max: usize) -> String {
    beginning(text, bytes_max, controls_terminal, hide)
}

/// Returns a message as one line of limited length, without values.
pub fn message(text: impl Display) -> String {
    sanitized_within(text, MESSAGE_BYTES_MAX)
}

/// Returns a report of limited length, without values. Line ends and terminal controls stay; whoever prints the report
/// escapes the controls.
pub fn report(text: impl Display) -> String {
    beginning(text, REPORT_BYTES_MAX, |_| false, hide)
}

/// Replaces each value in the strings of a JSON document with `${NAME}`. Numbers and structure do not change.
pub fn hide_json(json: String) -> String {
    let hidden = hide(json.clone());
    if hidden == json {
        return json;
    }
    match serde_json::from_str::<Value>(&json) {
        Ok(mut value) => match hide_texts(&mut value) {
            true => value.to_string(),
            // As it was written, with its members in their order.
            false => json,
        },
        // Not JSON, so nobody reads it as JSON.
        Err(_) => hidden,
    }
}

/// Replaces values in the strings of a document. Returns whether there were any.
fn hide_texts(value: &mut Value) -> bool {
    match value {
        Value::String(text) => {
            let hidden = hide(text.clone());
            let is_changed = hidden != *text;
            *text = hidden;
            is_changed
        }
        Value::Array(values) => {
            // All of them: `any` would stop at the first.
            values.iter_mut().filter_map(|value| hide_texts(value).then_some(())).count() > 0
        }
        Value::Object(members) => {
            let mut is_changed = false;
            let hidden = std::mem::take(members).into_iter().map(|(name, mut value)| {
                let shown = hide(name.clone());
                is_changed |= hide_texts(&mut value) || shown != name;
                (shown, value)
            });
            *members = hidden.collect();
            is_changed
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_17_what_a_server_words_is_one_short_line_without_values() {
        let mut values = Values::default();
        values.add("WALL_17_PASSWORD", "tr0ub4dor&3");
        register(&values);
        let said = sanitized("wrong: tr0ub4dor&3\nerror: forged");
        assert_eq!(said, "wrong: ${WALL_17_PASSWORD}\\nerror: forged");
        // Half of a value would not be found later.
        let long =
            format!("{}tr0ub4dor&3{}", "x".repeat(QUOTED_BYTES_MAX - 5), "y".repeat(1 << 20));
        let said = sanitized(&long);
        assert!(!said.contains("tr0ub") && said.len() < QUOTED_BYTES_MAX + 64, "{said}");
        assert!(said.ends_with(&format!("… ({} bytes in all)", long.len())), "{said}");
        let printed = report(format!("first\nsecond {long}"));
        assert!(printed.starts_with("first\nsecond xxx") && printed.len() < REPORT_BYTES_MAX + 64);
    }

    #[test]
    fn wall_17_a_report_in_json_stays_json_without_values() {
        let mut values = Values::default();
        values.add("WALL_17_PORT", "4432100");
        values.add("WALL_17_SINK", "mart");
        register(&values);
        let shown =
            hide_json(r#"{"bytes":14432100,"said":"at 4432100","4432100":[4432100,null]}"#.into());
        let value: Value = serde_json::from_str(&shown).expect("JSON");
        assert_eq!(value["bytes"], 14_432_100);
        assert_eq!(value["said"], "at ${WALL_17_PORT}");
        assert_eq!(value["${WALL_17_PORT}"][0], 4_432_100);
        let ordered = r#"{"sink":"mart","bytes":4432100,"a":2}"#;
        assert_eq!(hide_json(ordered.into()), ordered, "no text has a value");
    }
}
