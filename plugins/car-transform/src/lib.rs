//! Reshapes JSON objects: derives, renames, removes and sets fields.
//!
//! | | |
//! |---|---|
//! | accepts | `application/json`: one object per record |
//! | route `rows` | `application/json` |
//! | columns | those of the stage before, reshaped in the same way |
//! | configuration | [`Config`] |
//!
//! With `first_word = { manufacturer = "make" }`, `{"id":7,"make":"Honda 7"}` becomes `{"id":7,"make":"Honda
//! 7","manufacturer":"Honda"}`.
//!
//! Fields keep their order, and values keep their text: numbers of any size and precision are unchanged. If an
//! object has a key twice, its last value is used.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use shardmill_sdk::{Column, Context, Descriptor, Emitter, Error, Plugin, Record, Route};

const ROUTE_ROWS: u32 = 0;

/// Operations on the fields, applied in this order. A written field replaces one with the same name; others are
/// appended. Without any key, objects pass unchanged.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// New field ← the first word of a text field; words are separated by white space. Null if that field is
    /// missing or not a text.
    first_word: BTreeMap<String, String>,
    /// Text fields to convert to upper case. Other values stay unchanged.
    uppercase: Vec<String>,
    /// Fields to remove.
    remove: Vec<String>,
    /// Old name → new name.
    rename: BTreeMap<String, String>,
    /// Field ← constant.
    set: BTreeMap<String, Value>,
}

/// Reshapes objects according to a configuration.
pub struct Reshaper {
    config: Config,
    constants: Vec<(String, Box<RawValue>)>,
}

impl Reshaper {
    /// Prepares a configuration.
    ///
    /// # Errors
    ///
    /// A constant cannot be written as JSON.
    pub fn new(config: Config) -> Result<Self, Error> {
        let constants = config
            .set
            .iter()
            .map(|(name, value)| Ok((name.clone(), to_raw_value(value)?)))
            .collect::<Result<_, Error>>()?;
        Ok(Self { config, constants })
    }

    /// Reshapes one object. This is all of the plugin's work on a record.
    ///
    /// # Errors
    ///
    /// The payload is not a JSON object.
    pub fn write_row(&self, payload: &[u8], row: impl Write) -> Result<(), Error> {
        let text = std::str::from_utf8(payload)?;
        let mut object: Object<'_> = serde_json::from_str(text)
            .map_err(|error| Error::from(error).context("invalid JSON object"))?;
        for (name, source) in &self.config.first_word {
            let word = first_word(object.get(source))?;
            object.set(name, word);
        }
        for name in &self.config.uppercase {
            object.uppercase(name)?;
        }
        for name in &self.config.remove {
            object.0.retain(|(key, _)| key != name);
        }
        for (old, new) in &self.config.rename {
            object.rename(old, new);
        }
        for (name, value) in &self.constants {
            object.set(name, Cow::Borrowed(value));
        }
        object.write(row)
    }

    /// Returns the output columns for these input columns.
    fn columns(&self, upstream: &[Column]) -> Vec<Column> {
        if upstream.is_empty() {
            return Vec::new();
        }
        let mut columns = upstream.to_vec();
        let set = |columns: &mut Vec<Column>, column: Column| match columns
            .iter_mut()
            .find(|existing| existing.name == column.name)
        {
            Some(existing) => *existing = column,
            None => columns.push(column),
        };
        for name in self.config.first_word.keys() {
            let column = Column { name: name.clone(), data_type: "text".into(), nullable: true };
            set(&mut columns, column);
        }
        columns.retain(|column| !self.config.remove.contains(&column.name));
        for (old, new) in &self.config.rename {
            if let Some(index) = columns.iter().position(|column| column.name == *old) {
                let mut column = columns.remove(index);
                column.name.clone_from(new);
                columns.retain(|column| column.name != *new);
                columns.insert(index.min(columns.len()), column);
            }
        }
        for (name, value) in &self.config.set {
            set(&mut columns, constant_column(name, value));
        }
        columns
    }
}

impl Plugin for Reshaper {
    type Config = Config;

    fn configure(config: Config, context: &Context) -> Result<(Self, Descriptor), Error> {
        let reshaper = Self::new(config)?;
        let columns = reshaper.columns(context.upstream_columns());
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("application/json")
            .route(Route::new("rows", "application/json").columns(columns));
        Ok((reshaper, descriptor))
    }

    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        out.emit_with(ROUTE_ROWS, |row| self.write_row(record.payload(), row))
    }
}

shardmill_sdk::export!(Reshaper);

/// An object with its values as JSON text, in their order.
struct Object<'a>(Vec<(Cow<'a, str>, Cow<'a, RawValue>)>);

impl<'a> Object<'a> {
    fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_ref())
    }

    fn set(&mut self, name: &'a str, value: Cow<'a, RawValue>) {
        match self.0.iter_mut().find(|(key, _)| key == name) {
            Some((_, existing)) => *existing = value,
            None => self.0.push((Cow::Borrowed(name), value)),
        }
    }

    fn uppercase(&mut self, name: &str) -> Result<(), Error> {
        if let Some((_, value)) = self.0.iter_mut().find(|(key, _)| key == name)
            && let Some(text) = text(value)
        {
            *value = Cow::Owned(to_raw_value(&text.to_uppercase())?);
        }
        Ok(())
    }

    fn rename(&mut self, old: &str, new: &'a str) {
        if old == new || self.get(old).is_none() {
            return;
        }
        self.0.retain(|(key, _)| key != new);
        if let Some((key, _)) = self.0.iter_mut().find(|(key, _)| key == old) {
            *key = Cow::Borrowed(new);
        }
    }

    fn write(&self, mut row: impl Write) -> Result<(), Error> {
        let mut separator: &[u8] = b"{";
        for (key, value) in &self.0 {
            row.write_all(separator)?;
            serde_json::to_writer(&mut row, key)?;
            row.write_all(b":")?;
            row.write_all(value.get().as_bytes())?;
            separator = b",";
        }
        row.write_all(if self.0.is_empty() { b"{}" } else { b"}" })?;
        Ok(())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut object = Object(Vec::with_capacity(8));
                while let Some((Key(key), value)) = map.next_entry::<Key<'_>, &RawValue>()? {
                    match object.0.iter_mut().find(|(existing, _)| *existing == key) {
                        Some((_, existing)) => *existing = Cow::Borrowed(value),
                        None => object.0.push((key, Cow::Borrowed(value))),
                    }
                }
                Ok(object)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

/// A key, borrowed unless it contains escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

fn first_word(value: Option<&RawValue>) -> Result<Cow<'static, RawValue>, Error> {
    let text = value.and_then(text);
    let word = text.as_deref().and_then(|text| text.split_whitespace().next());
    Ok(Cow::Owned(to_raw_value(&word)?))
}

/// Returns the value if it is a text.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    serde_json::from_str::<Key<'_>>(value.get()).ok().map(|Key(text)| text)
}

fn constant_column(name: &str, value: &Value) -> Column {
    let data_type = match value {
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_i64() => "bigint",
        Value::Number(_) => "double precision",
        Value::Null | Value::String(_) => "text",
        Value::Array(_) | Value::Object(_) => "jsonb",
    };
    Column { name: name.into(), data_type: data_type.into(), nullable: value.is_null() }
}

#[cfg(test)]
mod tests {
    use shardmill_sdk::testing::{Fate, Harness};

    use super::*;

    fn reshape(config: &str, payload: &str) -> String {
        match Harness::<Reshaper>::new(config).unwrap().run_one(payload.as_bytes()) {
            Fate::Delivered(outputs) => String::from_utf8(outputs[0].payload.clone()).unwrap(),
            other => panic!("not delivered: {other:?}"),
        }
    }

    fn reason(payload: &[u8]) -> String {
        match Harness::<Reshaper>::new("{}").unwrap().run_one(payload) {
            Fate::Rejected(reason) => reason,
            other => panic!("not rejected: {other:?}"),
        }
    }

    #[test]
    fn the_manufacturer_is_derived() {
        let config = r#"{"first_word":{"manufacturer":"make"}}"#;
        assert_eq!(
            reshape(config, r#"{"id":7,"make":"Honda 7"}"#),
            r#"{"id":7,"make":"Honda 7","manufacturer":"Honda"}"#
        );
        assert_eq!(reshape(config, r#"{"make":""}"#), r#"{"make":"","manufacturer":null}"#);
        assert_eq!(reshape(config, r#"{"make":7}"#), r#"{"make":7,"manufacturer":null}"#);
        assert_eq!(reshape(config, "{}"), r#"{"manufacturer":null}"#);
    }

    #[test]
    fn numbers_keep_their_text() {
        let exact = r#"{"a":18446744073709551616,"b":0.10000000000000000001,"c":-0.0,"d":1e400}"#;
        assert_eq!(reshape("{}", exact), exact);
    }

    #[test]
    fn fields_are_reshaped_in_order() {
        let config = r#"{"uppercase":["make","id"],"remove":["junk"],
            "rename":{"id":"car_id"},"set":{"source":"demo","make2":null}}"#;
        assert_eq!(
            reshape(config, r#"{"id":7,"junk":[1],"make":"h\u00e9"}"#),
            "{\"car_id\":7,\"make\":\"H\u{c9}\",\"make2\":null,\"source\":\"demo\"}"
        );
    }

    #[test]
    fn a_written_field_replaces_its_namesake() {
        assert_eq!(reshape(r#"{"rename":{"a":"b"}}"#, r#"{"b":1,"a":2}"#), r#"{"b":2}"#);
        assert_eq!(reshape(r#"{"set":{"a":0}}"#, r#"{"a":1,"b":2}"#), r#"{"a":0,"b":2}"#);
        assert_eq!(reshape("{}", r#"{"a":1,"\u0061":2}"#), r#"{"a":2}"#);
        assert_eq!(reshape("{}", "{}"), "{}");
    }

    #[test]
    fn what_is_no_object_is_rejected() {
        assert!(reason(b"").starts_with("invalid JSON object: EOF"));
        assert!(reason(b"[1]").contains("expected a JSON object"));
        assert!(reason(b"{} {}").contains("trailing characters"));
        assert!(reason(b"{\"a\":\"\xff\"}").contains("invalid utf-8"));
    }

    #[test]
    fn columns_follow_the_fields() {
        let cars =
            Route::new("cars", "application/json").column("id", "bigint").column("make", "text");
        let config = r#"{"first_word":{"manufacturer":"make"},"rename":{"id":"car_id"},
            "remove":["make"],"set":{"year":2014}}"#;
        let plugin = Harness::<Reshaper>::after(cars, config).unwrap();
        let columns: Vec<_> = plugin.descriptor().routes[0]
            .columns
            .iter()
            .map(|column| (column.name.as_str(), column.data_type.as_str(), column.nullable))
            .collect();
        assert_eq!(
            columns,
            [
                ("car_id", "bigint", false),
                ("manufacturer", "text", true),
                ("year", "bigint", false)
            ]
        );
    }
}
