//! Reads one JSON value as the type of its column.
//!
//! A value is read exactly, or refused with the reason. Numbers may also be JSON strings: JavaScript cannot write a
//! 64-bit integer any other way.

use std::borrow::Cow;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::value::RawValue;

use super::decimal::Decimal;

/// Most levels of nesting of a document for a `json` column. PostgreSQL's parser fails at its stack limit (54001), at a
/// depth that depends on the server's settings. A row beyond this limit is refused before it is sent.
const NESTING_MAX: usize = 512;

/// Standard base64; the padding is optional.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Reason why a value does not fit: a fragment that follows the value.
pub type Why = Cow<'static, str>;

/// Text of a JSON value with valid syntax.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawJson<'a>(&'a str);

impl<'a> RawJson<'a> {
    /// Makes one of text that was read as one JSON value.
    pub(super) fn known(text: &'a str) -> Self {
        Self(text)
    }

    /// Returns the text, as it was written.
    pub fn get(self) -> &'a str {
        self.0
    }
}

impl<'a> From<&'a RawValue> for RawJson<'a> {
    fn from(raw: &'a RawValue) -> Self {
        Self(raw.get())
    }
}

/// A JSON value, read only as far as columns need it.
#[derive(Debug, PartialEq)]
pub enum Json<'a> {
    /// `null`, which is SQL's NULL in a column of any type.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// Text of a number, as it was written.
    Number(&'a str),
    /// Characters of a string.
    Text(Cow<'a, str>),
    /// Text of an object or array, as it was written.
    Nested(&'a str),
}

impl<'a> Json<'a> {
    /// Reads a value with valid syntax.
    #[inline]
    pub fn of(raw: RawJson<'a>) -> Result<Self, Why> {
        let text = raw.get();
        Ok(match text.as_bytes().first() {
            Some(b'n') => Self::Null,
            Some(b't') => Self::Bool(true),
            Some(b'f') => Self::Bool(false),
            Some(b'"') => Self::Text(unescaped(text)?),
            Some(b'{' | b'[') => Self::Nested(text),
            _ => Self::Number(text),
        })
    }

    /// Returns the text of a number, which may be a JSON string.
    pub fn number(&self) -> Result<&str, Why> {
        match self {
            Self::Number(text) => Ok(text),
            Self::Text(text) => Ok(text),
            _ => Err("expected a number".into()),
        }
    }

    /// Returns the characters of a string.
    fn string(&self, expected: &'static str) -> Result<&str, Why> {
        match self {
            Self::Text(text) => Ok(text),
            _ => Err(expected.into()),
        }
    }
}

/// Returns a JSON string's characters; borrowed unless it has escapes.
fn unescaped(quoted: &str) -> Result<Cow<'_, str>, Why> {
    match quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(plain) if !plain.contains('\\') => Ok(Cow::Borrowed(plain)),
        _ => serde_json::from_str(quoted)
            .map(Cow::Owned)
            .map_err(|_| "the string is not valid Unicode (a lone surrogate)".into()),
    }
}

/// Reads a boolean: `true`, `false`, or one of these as a string.
pub fn boolean(json: &Json<'_>) -> Result<bool, Why> {
    match json {
        Json::Bool(value) => Ok(*value),
        Json::Text(text) if text == "true" => Ok(true),
        Json::Text(text) if text == "false" => Ok(false),
        _ => Err("expected true or false".into()),
    }
}

/// Reads an integer in its usual form: an optional minus sign, then at most 18 digits. `None`: another form, or not an
/// integer.
#[inline]
pub fn plain_integer(raw: RawJson<'_>) -> Option<i64> {
    let (text, sign) = match raw.get().as_bytes() {
        [b'-', digits @ ..] => (digits, -1),
        digits => (digits, 1),
    };
    if text.is_empty() || text.len() > 18 {
        return None;
    }
    let mut value: i64 = 0;
    for byte in text {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value = value * 10 + i64::from(digit);
    }
    Some(value * sign)
}

/// Returns the characters of a string without escapes, the usual form. `None`: it has escapes, or is not a string.
#[inline]
pub fn plain_text(raw: RawJson<'_>) -> Option<&str> {
    let plain = raw.get().strip_prefix('"')?.strip_suffix('"')?;
    memchr::memchr(b'\\', plain.as_bytes()).is_none().then_some(plain)
}

/// Reads an integer in the range of the type. `3.0` and `3e2` are integers, `3.5` is not.
pub fn integer<T: TryFrom<i64>>(json: &Json<'_>) -> Result<T, Why> {
    let text = json.number()?;
    let value = match text.parse::<i64>() {
        Ok(value) if !text.starts_with('+') => value,
        _ => {
            let number = Decimal::parse(text).ok_or("expected an integer")?;
            match number.to_i64() {
                Some(value) => value,
                None if number.exponent >= 0 => return Err("the integer is out of range".into()),
                None => return Err("expected an integer".into()),
            }
        }
    };
    T::try_from(value).map_err(|_| "the integer is out of range".into())
}

/// Reads a double. `NaN`, `Infinity` and `-Infinity` are strings.
pub fn float64(json: &Json<'_>) -> Result<f64, Why> {
    if let Some(value) = not_finite(json) {
        return Ok(value);
    }
    let (text, number) = decimal_text(json)?;
    let value: f64 = text.parse().map_err(|_| "expected a number")?;
    let lost = !value.is_finite() || (value == 0.0 && !number.is_zero());
    if lost { Err("the number is out of a double's range".into()) } else { Ok(value) }
}

/// Reads a float of single precision.
pub fn float32(json: &Json<'_>) -> Result<f32, Why> {
    if let Some(value) = not_finite(json) {
        return Ok(value);
    }
    let (text, number) = decimal_text(json)?;
    let value: f32 = text.parse().map_err(|_| "expected a number")?;
    let lost = !value.is_finite() || (value == 0.0 && !number.is_zero());
    if lost { Err("the number is out of a real's range".into()) } else { Ok(value) }
}

/// Reads one of the three values for which JSON has no number.
pub fn not_finite<T: From<f32>>(json: &Json<'_>) -> Option<T> {
    match json {
        Json::Text(text) => match &**text {
            "NaN" => Some(T::from(f32::NAN)),
            "Infinity" => Some(T::from(f32::INFINITY)),
            "-Infinity" => Some(T::from(f32::NEG_INFINITY)),
            _ => None,
        },
        _ => None,
    }
}

/// Reads a decimal number of any precision.
pub fn decimal<'j>(json: &'j Json<'_>) -> Result<Decimal<'j>, Why> {
    Ok(decimal_text(json)?.1)
}

fn decimal_text<'j>(json: &'j Json<'_>) -> Result<(&'j str, Decimal<'j>), Why> {
    let text = json.number()?;
    Ok((text, Decimal::parse(text).ok_or("expected a number")?))
}

/// Returns the characters of a string, or a number or boolean as it was written.
pub fn text<'j>(json: &'j Json<'_>) -> Result<&'j str, Why> {
    let text = match json {
        Json::Text(text) => &**text,
        Json::Number(text) => text,
        Json::Bool(true) => "true",
        Json::Bool(false) => "false",
        Json::Null | Json::Nested(_) => return Err("expected a string".into()),
    };
    if text.as_bytes().contains(&0) {
        return Err("databases cannot store the character U+0000 in a text".into());
    }
    Ok(text)
}

/// Returns a document for a `json` column: any value, as it was written.
pub fn document(raw: RawJson<'_>) -> Result<&str, Why> {
    let text = raw.get();
    if is_nested_deeper_than(text, NESTING_MAX) {
        return Err(format!("the document is nested deeper than {NESTING_MAX} levels").into());
    }
    Ok(text)
}

/// Returns whether brackets outside of strings are nested deeper than `levels`. The syntax must be valid.
fn is_nested_deeper_than(json: &str, levels: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    json.bytes().any(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > levels
    })
}

/// Reads bytes: a string of base64, or of hexadecimal digits after `\x`.
pub fn bytes(json: &Json<'_>) -> Result<Vec<u8>, Why> {
    let expected = "expected bytes as base64, or as hexadecimal digits after \\x";
    let text = json.string(expected)?;
    match text.strip_prefix("\\x") {
        Some(digits) => hex::decode(digits).map_err(|_| expected.into()),
        None => BASE64.decode(text).map_err(|_| expected.into()),
    }
}

/// Reads a UUID.
pub fn uuid(json: &Json<'_>) -> Result<uuid::Uuid, Why> {
    let expected = "expected a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    uuid::Uuid::try_parse(json.string(expected)?).map_err(|_| expected.into())
}

/// Returns the characters of a date or time.
pub fn time_text<'j>(json: &'j Json<'_>) -> Result<&'j str, Why> {
    json.string("expected a date or time as a string")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Json<'_> {
        Json::Number(text)
    }

    fn string(text: &str) -> Json<'_> {
        Json::Text(Cow::Borrowed(text))
    }

    #[test]
    fn integers_keep_their_exact_value_or_are_refused() {
        assert_eq!(integer::<i64>(&number("9223372036854775807")), Ok(i64::MAX));
        assert_eq!(integer::<i64>(&string("9007199254740993")), Ok(9_007_199_254_740_993));
        assert_eq!(integer::<i16>(&number("3.2e4")), Ok(32_000));
        for (value, part) in [
            (number("9223372036854775808"), "out of range"),
            (number("3.5"), "an integer"),
            (string("+1"), "an integer"),
            (string(""), "an integer"),
            (Json::Bool(true), "a number"),
        ] {
            let why = integer::<i64>(&value).expect_err("no integer");
            assert!(why.contains(part), "{value:?}: {why}");
        }
        assert!(integer::<i16>(&number("32768")).is_err());
    }

    #[test]
    fn floats_are_refused_where_they_would_lose_everything() {
        assert_eq!(float64(&number("1e308")), Ok(1e308));
        assert!(float64(&string("NaN")).is_ok_and(f64::is_nan));
        assert_eq!(float32(&string("-Infinity")), Ok(f32::NEG_INFINITY));
        for text in ["1e309", "1e-400", "inf", "nan", "0x10"] {
            assert!(float64(&string(text)).is_err(), "{text}");
        }
        assert!(float32(&number("1e39")).is_err());
    }

    #[test]
    fn bytes_come_as_base64_or_hexadecimal() {
        assert_eq!(bytes(&string("AP8=")), Ok(vec![0, 255]));
        assert_eq!(bytes(&string("AP8")), Ok(vec![0, 255]));
        assert_eq!(bytes(&string("\\x00Ff")), Ok(vec![0, 255]));
        for text in ["A", "\\x0", "\\xzz", "ä"] {
            assert!(bytes(&string(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn nesting_is_counted_outside_of_strings() {
        assert!(!is_nested_deeper_than(r#"{"a":["\"[[[["]}"#, 2));
        assert!(is_nested_deeper_than("[[[]]]", 2));
    }

    #[test]
    fn text_holds_no_nul() {
        assert!(text(&string("a\0b")).is_err());
        assert_eq!(text(&number("1.50")), Ok("1.50"));
    }
}
