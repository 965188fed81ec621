//! Fuzz target of JSON values in columns of every type of every sink: compares them with a slow reader written from the
//! documented rules.
//!
//! The module `fuzz` of each sink reads back the bytes that the sink would send to its database. The reference
//! here computes the value that they must have. A value is kept exactly or refused.

#![allow(
    missing_docs,
    reason = "shared with the fuzz targets alone; each name says what it is a case of"
)]
#![allow(clippy::expect_used, reason = "a finding is a panic")]

use fastrand::Rng;
use serde_json::value::RawValue;

pub use self::number::Number;
use super::rows::value::RawJson;

pub mod clock;
mod number;

pub use super::rows::fuzz::ROWS;

/// Words of JSON that columns of some types read in a special way.
pub const WORDS: [&str; 20] = [
    "null",
    "true",
    "\"NaN\"",
    "\"-Infinity\"",
    "1e5",
    "-0",
    "e-",
    "9223372036854775807",
    "0.1",
    "\\u0000",
    "\\ud800",
    "T24:00",
    "-01-01",
    "+15:00",
    ".9999995",
    "{}",
    "[]",
    "\\\\x",
    "==",
    "urn:uuid:",
];

/// Type of a column, named by the rule for its values.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    Bool,
    /// An integer of this number of bits.
    Integer(u32),
    Float32,
    Float64,
    /// PostgreSQL's `numeric` without a scale.
    Numeric,
    /// Digits in all, and of them after the point.
    Decimal(u32, u32),
    /// A number, as it was written.
    NumberText,
    Text,
    /// Text of at most this number of bytes, and whether its characters must have one byte each.
    BoundedText(usize, bool),
    Document,
    Uuid,
    Date,
    Time,
    /// A time before 24:00.
    TimeOfDay,
    Timestamp,
    Timestamptz,
    /// Times of another type, within the years 1 to 9999 in UTC.
    YearsOf(&'static Type),
    Bytes,
    Array(&'static Type),
    /// SQLite's double, which rounds fractions but no integer.
    SqliteReal,
    /// A number that SQLite stores with all its digits.
    SqliteNumeric,
    /// A document, but a bare number is kept as one.
    SqliteJson,
    /// Anything, as SQLite stores it.
    SqliteAny,
    /// Another type's values as text, as they were written.
    AsWritten(&'static Type),
    /// Booleans, as 0 and 1.
    AsNumber(&'static Type),
}

/// Value in a database.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    /// Bits of a float. All NaN are the same.
    Float32(u32),
    Float64(u64),
    /// A number, and the digits that are shown after its point.
    Decimal(Number, i64),
    NotFinite(&'static str),
    Text(String),
    Bytes(Vec<u8>),
    Days(i64),
    Micros(i64),
    /// Length of each dimension, and the elements.
    Array(Vec<usize>, Vec<Value>),
}

impl Value {
    pub fn float32(value: f32) -> Self {
        Self::Float32(if value.is_nan() { u32::MAX } else { value.to_bits() })
    }

    pub fn float64(value: f64) -> Self {
        Self::Float64(if value.is_nan() { u64::MAX } else { value.to_bits() })
    }
}

/// Column of a sink, and how its values are read back. `None`: the sink refuses the value.
#[derive(Clone, Copy)]
pub struct FuzzColumn {
    pub name: &'static str,
    pub values: Type,
    pub read: fn(RawJson<'_>) -> Option<Value>,
}

/// Checks that a column keeps a value exactly or refuses it. The first byte of an input is the column, the rest a
/// JSON value.
pub fn check(columns: &[FuzzColumn], data: &[u8]) {
    let Some((column, json)) = data.split_first() else { return };
    let Ok(raw) = serde_json::from_slice::<&RawValue>(json) else { return };
    if has_lone_surrogate(raw.get()) {
        // In documents, each database decides about it; elsewhere it is not a valid text.
        return;
    }
    let column = columns[usize::from(*column) % columns.len()];
    let found = (column.read)(raw.into());
    let expected = reference(column.values, raw.get());
    assert_eq!(found, expected, "{} as {} ({:?})", raw.get(), column.name, column.values);
}

/// Returns whether a string anywhere in the JSON is not Unicode.
fn has_lone_surrogate(json: &str) -> bool {
    json.contains("\\u") && serde_json::from_str::<serde_json::Value>(json).is_err()
}

/// Kind of a JSON value.
enum Json<'j> {
    Null,
    Bool(bool),
    Number(&'j str),
    Text(String),
    Nested,
}

fn parsed(json: &str) -> Json<'_> {
    match serde_json::from_str::<serde_json::Value>(json) {
        Ok(serde_json::Value::Null) => Json::Null,
        Ok(serde_json::Value::Bool(value)) => Json::Bool(value),
        Ok(serde_json::Value::Number(_)) => Json::Number(json),
        Ok(serde_json::Value::String(text)) => Json::Text(text),
        // A value that is nested too deep for this reader is nested, too.
        _ => Json::Nested,
    }
}

/// Computes the value that a column of a type keeps for a JSON value. `None`: the column refuses it.
fn reference(values: Type, json: &str) -> Option<Value> {
    let value = parsed(json);
    if matches!(value, Json::Null) {
        return Some(Value::Null);
    }
    // Numbers may come as strings.
    let number_text = match &value {
        Json::Number(text) => Some(*text),
        Json::Text(text) => Some(text.as_str()),
        _ => None,
    };
    let number = || Some(Number::read(number_text?)?.0);
    let text = match &value {
        Json::Text(text) => Some(text.as_str()),
        _ => None,
    };
    match values {
        Type::Bool => match (&value, text) {
            (Json::Bool(value), _) => Some(Value::Bool(*value)),
            (_, Some("true")) => Some(Value::Bool(true)),
            (_, Some("false")) => Some(Value::Bool(false)),
            _ => None,
        },
        Type::AsNumber(other) => match reference(*other, json)? {
            Value::Bool(value) => Some(Value::Integer(value.into())),
            _ => None,
        },
        Type::Integer(bits) => {
            let integer = number()?.to_integer()?;
            let half = 1_i128 << (bits - 1);
            (-half..half).contains(&integer).then_some(Value::Integer(integer as i64))
        }
        Type::Float64 => match text.and_then(not_finite) {
            Some(value) => Some(Value::float64(value)),
            None => {
                let (number, value) = (number()?, number_text?.parse::<f64>().ok()?);
                let is_lost = value.is_infinite() || (value == 0.0 && !number.is_zero());
                (!is_lost).then(|| Value::float64(value))
            }
        },
        Type::Float32 => match text.and_then(not_finite) {
            Some(value) => Some(Value::float32(value as f32)),
            None => {
                let (number, value) = (number()?, number_text?.parse::<f32>().ok()?);
                let is_lost = value.is_infinite() || (value == 0.0 && !number.is_zero());
                (!is_lost).then(|| Value::float32(value))
            }
        },
        Type::Numeric => {
            let names = ["NaN", "Infinity", "-Infinity"];
            if let Some(name) = names.into_iter().find(|name| text == Some(name)) {
                return Some(Value::NotFinite(name));
            }
            let (number, scale) = Number::read(number_text?)?;
            let fits = scale <= 16_383 && number.whole_digits() <= 131_072;
            fits.then_some(Value::Decimal(number, scale))
        }
        Type::Decimal(digits, scale) => {
            let number = number()?;
            let fits = number.is_zero()
                || (number.exponent >= -i64::from(scale)
                    && number.whole_digits() <= i64::from(digits) - i64::from(scale));
            fits.then_some(Value::Decimal(number, scale.into()))
        }
        Type::NumberText => {
            number()?;
            Some(Value::Text(number_text?.into()))
        }
        Type::Text => match value {
            Json::Text(text) => (!text.contains('\0')).then_some(Value::Text(text)),
            Json::Number(_) | Json::Bool(_) => Some(Value::Text(json.into())),
            Json::Null | Json::Nested => None,
        },
        Type::BoundedText(bytes_max, is_ascii) => match reference(Type::Text, json)? {
            Value::Text(text) => {
                let fits = text.len() <= bytes_max && (text.is_ascii() || !is_ascii);
                fits.then_some(Value::Text(text))
            }
            _ => None,
        },
        Type::Document => (depth(json) <= 512).then(|| Value::Text(json.into())),
        Type::Uuid => uuid(text?).map(Value::Bytes),
        Type::Date => clock::date(text?).map(Value::Days),
        Type::Time => clock::time(text?).map(Value::Micros),
        Type::TimeOfDay => match clock::time(text?)? {
            86_400_000_000.. => None,
            micros => Some(Value::Micros(micros)),
        },
        Type::Timestamp => match clock::timestamp(text?)? {
            (micros, 0) => Some(Value::Micros(micros)),
            _ => None,
        },
        Type::Timestamptz => {
            clock::timestamp(text?).map(|(micros, offset)| Value::Micros(micros - offset))
        }
        Type::YearsOf(other) => match reference(*other, json)? {
            Value::Micros(micros) => {
                let years =
                    clock::micros_of("0001-01-01")..clock::micros_of("9999-12-31") + 86_400_000_000;
                years.contains(&micros).then_some(Value::Micros(micros))
            }
            _ => None,
        },
        Type::Bytes => bytes(text?).map(Value::Bytes),
        Type::Array(element) => array(*element, json),
        Type::SqliteReal => match (text.and_then(not_finite), number()) {
            (Some(value), _) => (!value.is_nan()).then(|| Value::float64(value)),
            (None, Some(number)) if number.exponent >= 0 => {
                let double = number_text?.parse::<f64>().ok()?;
                number.is_shown_by(double).then(|| Value::float64(double))
            }
            (None, _) => reference(Type::Float64, json),
        },
        Type::SqliteNumeric => {
            let number = number()?;
            if let Some(integer) =
                number.to_integer().and_then(|integer| i64::try_from(integer).ok())
            {
                return Some(Value::Integer(integer));
            }
            let double = number_text?.parse::<f64>().ok()?;
            let is_kept = double.is_finite() && number.is_shortest_of(double);
            is_kept.then(|| Value::float64(double))
        }
        Type::SqliteJson => match value {
            Json::Number(_) => reference(Type::SqliteNumeric, json),
            _ => reference(Type::Document, json),
        },
        Type::SqliteAny => match value {
            Json::Bool(value) => Some(Value::Integer(value.into())),
            Json::Number(_) => reference(Type::SqliteNumeric, json),
            Json::Nested => reference(Type::Document, json),
            Json::Null | Json::Text(_) => reference(Type::Text, json),
        },
        Type::AsWritten(other) => {
            reference(*other, json)?;
            Some(Value::Text(text?.into()))
        }
    }
}

/// Reads one of the three texts that stand for numbers which JSON does not have.
fn not_finite(text: &str) -> Option<f64> {
    match text {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

/// Counts how deep brackets are nested outside of strings.
fn depth(json: &str) -> usize {
    let without_escapes = json.replace("\\\\", "").replace("\\\"", "");
    let bare = without_escapes.split('"').step_by(2).collect::<String>();
    let (mut deepest, mut open) = (0, 0_usize);
    for c in bare.chars() {
        match c {
            '{' | '[' => open += 1,
            '}' | ']' => open -= 1,
            _ => {}
        }
        deepest = deepest.max(open);
    }
    deepest
}

/// Reads a UUID in one of its usual forms.
fn uuid(text: &str) -> Option<Vec<u8>> {
    let braced = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    // RFC 9562, section 4: the letters of the name may be upper-case or lower-case.
    let is_name = text.get(..9).is_some_and(|name| name.eq_ignore_ascii_case("urn:uuid:"));
    let named = is_name.then(|| &text[9..]);
    let inner = named.or(braced).unwrap_or(text);
    let is_bare = inner.len() == text.len();
    let parts: Vec<&str> = inner.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    if lengths != [8, 4, 4, 4, 12] && !(is_bare && lengths == [32]) {
        return None;
    }
    hexadecimal(&parts.concat())
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect())
}

/// Reads bytes: hexadecimal digits after `\x`, or base64 with all, some or none of its padding.
fn bytes(text: &str) -> Option<Vec<u8>> {
    if let Some(digits) = text.strip_prefix("\\x") {
        return hexadecimal(digits);
    }
    let body = text.trim_end_matches('=');
    let (padding, expected) = (text.len() - body.len(), (4 - body.len() % 4) % 4);
    if body.len() % 4 == 1 || padding > expected {
        return None;
    }
    let mut bits = String::new();
    for c in body.chars() {
        let alphabet = ('A'..='Z').chain('a'..='z').chain('0'..='9').chain(['+', '/']);
        let place = alphabet.into_iter().position(|letter| letter == c)?;
        bits.push_str(&format!("{place:06b}"));
    }
    let (whole, rest) = bits.split_at(bits.len() / 8 * 8);
    // Bits after the last whole byte are zero.
    if rest.contains('1') {
        return None;
    }
    let bytes = whole.as_bytes().chunks(8);
    bytes.map(|byte| u8::from_str_radix(std::str::from_utf8(byte).ok()?, 2).ok()).collect()
}

/// Most dimensions of an array in PostgreSQL.
const DIMENSIONS_MAX: usize = 6;

/// Reads an array of PostgreSQL: all its parts of one depth have the same shape.
fn array(element: Type, json: &str) -> Option<Value> {
    let nests = !matches!(element, Type::Document);
    let mut elements = Vec::new();
    let shape = shape(json, nests, &mut elements)?;
    if shape.len() > DIMENSIONS_MAX {
        return None;
    }
    let elements: Vec<Value> =
        elements.iter().map(|json| reference(element, json)).collect::<Option<_>>()?;
    let shape = if elements.is_empty() { Vec::new() } else { shape };
    Some(Value::Array(shape, elements))
}

fn shape(json: &str, nests: bool, elements: &mut Vec<String>) -> Option<Vec<usize>> {
    let items: Vec<Box<RawValue>> = serde_json::from_str(json).ok()?;
    let arrays = items.iter().filter(|item| nests && item.get().starts_with('[')).count();
    if arrays == 0 {
        elements.extend(items.iter().map(|item| item.get().to_owned()));
        return Some(vec![items.len()]);
    }
    let shapes: Option<Vec<Vec<usize>>> = match arrays == items.len() {
        true => items.iter().map(|item| shape(item.get(), nests, elements)).collect(),
        false => None,
    };
    let shapes = shapes?;
    let is_one = shapes.iter().all(|shape| *shape == shapes[0]);
    is_one.then(|| [vec![items.len()], shapes[0].clone()].concat())
}

/// Makes a column and a value that it mostly takes.
pub fn grow(columns: &[FuzzColumn], random: &mut Rng) -> Vec<u8> {
    let place = random.usize(..columns.len());
    let mut json = String::new();
    write_json(columns[place].values, random, &mut json);
    [vec![place as u8], json.into_bytes()].concat()
}

fn write_json(values: Type, random: &mut Rng, out: &mut String) {
    if random.u8(..20) == 0 {
        out.push_str(
            random.choice(["null", "true", "{\"a\":[1]}", "\"\"", "[]"]).unwrap_or("null"),
        );
        return;
    }
    let quoted = |out: &mut String, text: &str| {
        out.push_str(&serde_json::to_string(text).expect("text has a JSON form"));
    };
    match values {
        Type::Bool | Type::AsNumber(_) => {
            out.push_str(
                random.choice(["true", "false", "\"true\"", "\"false\"", "1"]).unwrap_or("1"),
            );
        }
        Type::Integer(_)
        | Type::Float32
        | Type::Float64
        | Type::Numeric
        | Type::Decimal(..)
        | Type::NumberText
        | Type::SqliteReal
        | Type::SqliteNumeric
        | Type::SqliteJson => {
            let number = number::written(random);
            if random.u8(..4) == 0 { quoted(out, &number) } else { out.push_str(&number) }
        }
        Type::Text | Type::BoundedText(..) | Type::SqliteAny => {
            let letters = ["a", "é", " ", "\"", "\\", "🚗", "\u{1}", "12"];
            let text: String =
                (0..random.usize(..8)).filter_map(|_| random.choice(letters)).collect();
            quoted(out, &text);
        }
        Type::Document => {
            let deep = random.choice([1, 2, 511, 512, 513]).unwrap_or(1);
            out.push_str(&"[".repeat(deep));
            out.push_str(&"]".repeat(deep));
        }
        Type::Uuid => {
            let digits = format!("{:032x}", random.u128(..));
            let hyphenated =
                [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
            let hyphenated = hyphenated.join("-");
            let forms =
                [digits, format!("{{{hyphenated}}}"), format!("urn:uuid:{hyphenated}"), hyphenated];
            quoted(out, random.choice(&forms).map_or("", String::as_str));
        }
        Type::Date | Type::Time | Type::TimeOfDay | Type::Timestamp | Type::Timestamptz => {
            quoted(out, &clock::written(values, random));
        }
        Type::YearsOf(other) | Type::AsWritten(other) => write_json(*other, random, out),
        Type::Bytes => {
            let bytes: Vec<u8> = (0..random.usize(..6)).map(|_| random.u8(..)).collect();
            match random.bool() {
                true => quoted(out, &format!("\\x{}", hex::encode(bytes))),
                false => {
                    use base64::Engine as _;
                    quoted(out, &base64::engine::general_purpose::STANDARD.encode(bytes));
                }
            }
        }
        Type::Array(element) => {
            let depth = random.usize(1..4);
            write_array(*element, random, out, depth);
        }
    }
}

fn write_array(element: Type, random: &mut Rng, out: &mut String, depth: usize) {
    out.push('[');
    for place in 0..2 {
        if place > 0 {
            out.push(',');
        }
        let depth = if random.u8(..8) == 0 { depth.saturating_sub(1) } else { depth };
        match (depth, random.u8(..8)) {
            (_, 0) => out.push_str("[]"),
            (0 | 1, _) => write_json(element, random, out),
            _ => write_array(element, random, out, depth - 1),
        }
    }
    out.push(']');
}
