//! Converts TOML to JSON text: the configuration that a plugin receives and that a revision stores.
//!
//! Numbers keep every digit. Dates and times become strings, because JSON has none.

use serde_json::{Map, Number, Value};
use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::check::Check;

/// Converts a table. Values that JSON does not have (`inf`, `nan`, integers beyond 64 bits) are noted as problems and
/// left out.
pub(super) fn from_table(table: &DeTable<'_>, check: &mut Check) -> Value {
    let entries = table.iter().filter_map(|(key, value)| {
        Some((key.get_ref().clone().into_owned(), from_value(value, check)?))
    });
    Value::Object(entries.collect::<Map<_, _>>())
}

fn from_value(value: &Spanned<DeValue<'_>>, check: &mut Check) -> Option<Value> {
    let number = match value.get_ref() {
        DeValue::String(text) => return Some(Value::String(text.clone().into_owned())),
        DeValue::Boolean(flag) => return Some(Value::Bool(*flag)),
        DeValue::Datetime(time) => return Some(Value::String(time.to_string())),
        DeValue::Array(values) => {
            let values = values.iter().filter_map(|value| from_value(value, check));
            return Some(Value::Array(values.collect()));
        }
        DeValue::Table(table) => return Some(from_table(table, check)),
        DeValue::Integer(integer) => from_integer(integer),
        DeValue::Float(float) => float.as_str().trim_start_matches('+').parse::<Number>().ok(),
    };
    if number.is_none() {
        let message =
            format!("the number {} cannot be converted to JSON", check.text(&value.span()));
        check.problem(value.span(), message, "write it in quotes, as text");
    }
    number.map(Value::Number)
}

fn from_integer(integer: &DeInteger<'_>) -> Option<Number> {
    let (digits, radix) = (integer.as_str(), integer.radix());
    let signed = i64::from_str_radix(digits, radix).map(Number::from);
    signed.or_else(|_| u64::from_str_radix(digits, radix).map(Number::from)).ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::ConfigFile;

    fn json(text: &str) -> Result<String, crate::ConfigError> {
        let file = Arc::new(ConfigFile { path: PathBuf::from("t.toml"), text: text.into() });
        let table = DeTable::parse(text).expect("valid TOML");
        let mut check = Check::new(&file);
        let value = from_table(table.get_ref(), &mut check);
        check.finish(Some(value.to_string()))
    }

    #[test]
    fn numbers_keep_every_digit() {
        let text = "a = 9223372036854775807\nb = -9_223\nc = 0xff\nd = 18446744073709551615\n\
                    e = 1.10\nf = +2.5e3\ng = 0.1000000000000000055511151231257827";
        let expected = r#"{"a":9223372036854775807,"b":-9223,"c":255,"d":18446744073709551615,"e":1.10,"f":2.5e+3,"g":0.1000000000000000055511151231257827}"#;
        assert_eq!(json(text).expect("numbers"), expected);
    }

    #[test]
    fn all_else_has_its_form() {
        let text = "a = [1, \"x\", true]\nb = 2026-01-31T00:00:00Z\n[c]\nd = {}\n";
        let expected = r#"{"a":[1,"x",true],"b":"2026-01-31T00:00:00Z","c":{"d":{}}}"#;
        assert_eq!(json(text).expect("values"), expected);
    }

    #[test]
    fn what_json_cannot_say_is_a_problem() {
        for text in ["a = inf", "a = -nan", "a = 18446744073709551616"] {
            let error = json(text).expect_err(text).to_string();
            assert!(error.starts_with("t.toml:1:5: the number"), "{error}");
        }
    }
}
