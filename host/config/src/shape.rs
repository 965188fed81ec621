//! Reads one table with serde, and turns serde's errors into problems with a place and a help text.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeValue, ValueDeserializer};

use super::check::Check;
use super::diagnostic::suggest;

/// Deserializes one table.
pub(super) fn shaped<T: DeserializeOwned>(
    table: Spanned<DeValue<'_>>,
    check: &mut Check,
) -> Option<T> {
    let span = table.span();
    refuse_lists(&table, check)?;
    let shaped = T::deserialize(ValueDeserializer::from(table));
    shaped.map_err(|error| misshapen(&error, span, check)).ok()
}

/// Refuses lists where a table or a single value is expected. serde would accept a list as a table, with the values in
/// the order of the fields. No table of ours is a list, and only few keys take one ([`Check::takes_list`]).
fn refuse_lists(table: &Spanned<DeValue<'_>>, check: &mut Check) -> Option<()> {
    let within = table.get_ref().as_table().into_iter().flat_map(|table| table.iter());
    let within = within.filter(|(key, _)| !check.takes_list(key.get_ref())).map(|(_, value)| value);
    let values = std::iter::once(table).chain(within);
    let lists: Vec<_> = values.filter(|value| value.get_ref().is_array()).collect();
    for list in &lists {
        check.problem(
            list.span(),
            "invalid value: found a list",
            "write a single value or a table",
        );
    }
    lists.is_empty().then_some(())
}

/// Notes a problem for serde's error, in the user's words. serde's own message would show values, and a value may come
/// from a variable with a secret.
fn misshapen(error: &toml::de::Error, table: Range<usize>, check: &mut Check) {
    let message = error.message();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let span = error.span().unwrap_or(table);
    if message.starts_with("unknown field") {
        let (key, known) = quoted.split_first().map_or(("", &[][..]), |(key, known)| (*key, known));
        check.problem(span, format!("unknown key `{key}`"), suggest(key, "allowed", known));
    } else if message.starts_with("missing field") {
        let key = quoted.first().copied().unwrap_or_default();
        check.problem(span, format!("the key `{key}` is missing"), format!("add {}", example(key)));
    } else if let Some((found, expected)) = mismatch(message) {
        let help = match expected {
            "a sequence" => "a list in brackets, such as [\"mart\", \"logs\"]",
            "a boolean" => "true or false, without quotes",
            "a map" => "a table",
            expected => expected,
        };
        check.problem(span, format!("invalid value: found {found}"), format!("write {help}"));
    } else {
        check.problem(span, message, "change this value");
    }
}

/// Splits serde's "invalid type: string "x", expected y" into the kind of the found value and the expectation.
fn mismatch(message: &str) -> Option<(&'static str, &str)> {
    let (prefix, rest) = message.split_once(": ")?;
    let expected = rest.split_once(", expected ").map(|(_, expected)| expected)?;
    let found = match rest.split([' ', ',']).next()? {
        _ if prefix == "invalid value" => "a number out of range",
        "string" => "text",
        "integer" => "a whole number",
        "floating" => "a number with a decimal point",
        "boolean" => "true or false",
        "sequence" => "a list",
        "map" => "a table",
        _ => "another type",
    };
    prefix.starts_with("invalid").then_some((found, expected))
}

fn example(key: &str) -> String {
    match key {
        "name" => "a name, such as name = \"cars\"".into(),
        "type" => "the type, such as type = \"kinesis\" for the source".into(),
        "query" => {
            "the query, such as query = \"SELECT id, name FROM customers WHERE id = ANY($1)\""
                .into()
        }
        "host" => "the host, such as host = \"api.example.com\"".into(),
        "stream" => "the stream's name, such as stream = \"test\"".into(),
        "plugin" => "the component's file, such as plugin = \"decode.wasm\"".into(),
        "path" => "the database file, such as path = \"data/cars.db\"".into(),
        "table" => "the table's name, such as table = \"cars\"".into(),
        "url" => "the destination, such as url = \"data/logs\" or \"s3://bucket/logs\"".into(),
        "shards" => "the number of shards, such as shards = 5".into(),
        key => format!("{key} = ..."),
    }
}
