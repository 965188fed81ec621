//! Redaction of personal data in records before they become cases.
//!
//! Rules name members of JSON payloads by JSON pointer (RFC 6901); `*` matches every element of an array or
//! member of an object. Redacted values keep their shape: letters become `x`, digits become `0`.

use bytes::Bytes;
use serde_json::Value;

use super::TrialRecord;
use shardmill_core::record::Digest;

/// Rules of redaction.
#[derive(Clone, Debug, Default)]
pub struct Redaction {
    pointers: Vec<Vec<String>>,
    keys: bool,
}

impl Redaction {
    /// Makes rules from JSON pointers such as `/user/email`. With `keys`, partition keys are replaced by a
    /// hash.
    ///
    /// # Errors
    /// A text that is not a JSON pointer.
    pub fn new(pointers: &[String], keys: bool) -> Result<Self, String> {
        let pointer = |text: &String| match text.strip_prefix('/') {
            Some(path) => Ok(path.split('/').map(unescaped).collect()),
            None => Err(format!(
                "invalid JSON pointer {text:?}: expected it to begin with /, such as /user/email"
            )),
        };
        Ok(Self { pointers: pointers.iter().map(pointer).collect::<Result<_, _>>()?, keys })
    }

    /// Returns the redacted record. `None`: there are rules, and the payload is not JSON, so they cannot be
    /// applied.
    pub(crate) fn apply(&self, record: &TrialRecord) -> Option<TrialRecord> {
        let mut record = record.clone();
        if self.keys {
            record.key = Bytes::from(Digest::of(&record.key).short().to_owned());
        }
        if self.pointers.is_empty() {
            return Some(record);
        }
        let mut payload: Value = serde_json::from_slice(&record.payload).ok()?;
        for pointer in &self.pointers {
            redact_at(&mut payload, pointer);
        }
        record.payload = payload.to_string().into();
        Some(record)
    }
}

fn unescaped(token: &str) -> String {
    token.replace("~1", "/").replace("~0", "~")
}

fn redact_at(value: &mut Value, path: &[String]) {
    let Some((first, rest)) = path.split_first() else { return redact(value) };
    match value {
        Value::Object(members) if first == "*" => {
            members.values_mut().for_each(|value| redact_at(value, rest));
        }
        Value::Object(members) => {
            if let Some(value) = members.get_mut(first) {
                redact_at(value, rest);
            }
        }
        Value::Array(values) if first == "*" => {
            values.iter_mut().for_each(|value| redact_at(value, rest));
        }
        Value::Array(values) => {
            if let Some(value) = first.parse().ok().and_then(|index: usize| values.get_mut(index)) {
                redact_at(value, rest);
            }
        }
        _ => {}
    }
}

/// Keeps the shape of a value and removes its content.
fn redact(value: &mut Value) {
    match value {
        Value::String(text) => {
            *text = text
                .chars()
                .map(|c| match c {
                    c if c.is_numeric() => '0',
                    c if c.is_alphabetic() => 'x',
                    c => c,
                })
                .collect();
        }
        Value::Number(_) => *value = 0.into(),
        Value::Bool(_) => *value = false.into(),
        Value::Null => {}
        Value::Array(values) => values.iter_mut().for_each(redact),
        Value::Object(members) => members.values_mut().for_each(redact),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(pointers: &[&str], payload: &str) -> Option<String> {
        let pointers: Vec<String> = pointers.iter().map(|pointer| (*pointer).into()).collect();
        let record = Redaction::new(&pointers, true)
            .unwrap()
            .apply(&TrialRecord::new(0, payload.to_owned()))?;
        assert_ne!(record.key, "key");
        Some(String::from_utf8(record.payload.to_vec()).unwrap())
    }

    #[test]
    fn what_is_named_keeps_its_shape() {
        let payload = r#"{"user":{"email":"a.b@c.de","age":44},"ips":["1.2.3.4"],"n":7}"#;
        assert_eq!(
            redacted(&["/user/*", "/ips/0", "/gone/x"], payload).unwrap(),
            r#"{"ips":["0.0.0.0"],"n":7,"user":{"age":0,"email":"x.x@x.xx"}}"#
        );
    }

    #[test]
    fn what_cannot_be_redacted_is_left_out() {
        assert_eq!(redacted(&["/a"], "no JSON"), None);
        assert_eq!(redacted(&[], "no JSON").unwrap(), "no JSON");
        assert!(Redaction::new(&["user".into()], false).is_err());
    }
}
