//! Values of variables that this process has read. What it says shows their names, whoever worded it: a library's
//! line of the log, a server that repeats its request, the system about a path.
//!
//! Sinks, stages and the configuration hide values where their texts are made, as those also go into dead letters and
//! the state. Here is the last door: standard error, the reports of commands, and the causes of what is blocked.
//! Records pass it as they are: those that `stream tail` and `dlq` show, and the rows of a stdout sink.

use std::sync::{LazyLock, PoisonError, RwLock};

use serde_json::Value;

use crate::config::Values;

static VALUES: LazyLock<RwLock<Values>> = LazyLock::new(RwLock::default);

/// Hides these from now on.
pub(crate) fn learn(values: &Values) {
    VALUES.write().unwrap_or_else(PoisonError::into_inner).extend(values);
}

/// Puts `${NAME}` in the place of each value in a text.
pub(crate) fn hide(text: String) -> String {
    let values = VALUES.read().unwrap_or_else(PoisonError::into_inner);
    match values.is_empty() {
        true => text,
        false => values.hide(text),
    }
}

/// The same in the texts of a JSON document: numbers and what parts them stay what they are.
pub(crate) fn hide_json(json: String) -> String {
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
        // Nobody reads it as JSON.
        Err(_) => hidden,
    }
}

/// Hides values in the texts of a document; whether there were any.
fn hide_texts(value: &mut Value) -> bool {
    match value {
        Value::String(text) => {
            let hidden = hide(text.clone());
            let is_changed = hidden != *text;
            *text = hidden;
            is_changed
        }
        Value::Array(values) => {
            // Each of them: `any` would end at the first.
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
    fn wall_17_a_report_in_json_stays_json_without_values() {
        let mut values = Values::default();
        values.add("WALL_17_PORT", "4432100");
        values.add("WALL_17_SINK", "mart");
        learn(&values);
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
