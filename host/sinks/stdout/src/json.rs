//! Reads JSON in place: no values are built, however large the text is.
//!
//! A tree of values would use up to thirty times the bytes of its text (an array of digits does), and a string without
//! its escapes would be a second copy. All functions except [`checked`] expect text that it has accepted.

use std::cmp::Ordering;
use std::io;

use memchr::{memchr, memchr2};
use serde::de::IgnoredAny;

/// Most levels of nesting of a payload. `serde_json` has the same limit for its values, and [`write_value`] calls
/// itself for each level.
const NESTING_MAX: usize = 127;

/// Receiver of the pieces of a text.
pub(super) type Take<'t> = dyn FnMut(&str) -> io::Result<()> + 't;

/// Returns the payload as text that is one valid JSON value.
///
/// # Errors
/// The reason why it is not, as the end of a sentence.
pub(super) fn checked(payload: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(payload).map_err(|error| error.to_string())?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| error.to_string())?;
    let bytes = text.as_bytes();
    let (mut at, mut nesting) = (0, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = string_end(bytes, at);
                check_escapes(inside(&text[at..end]))?;
                at = end;
                continue;
            }
            b'{' | b'[' => nesting += 1,
            b'}' | b']' => nesting -= 1,
            _ => {}
        }
        if nesting > NESTING_MAX {
            return Err(format!("it is nested deeper than {NESTING_MAX} levels"));
        }
        at += 1;
    }
    Ok(text)
}

/// Checks that each escape is a character, and not half of a surrogate pair.
fn check_escapes(mut text: &str) -> Result<(), String> {
    while let Some(at) = memchr(b'\\', text.as_bytes()) {
        let (_, length) = escape(&text[at..])
            .ok_or("a string is not valid Unicode (a lone surrogate in an escape)")?;
        text = &text[at + length..];
    }
    Ok(())
}

/// Iterates over the members of an object, or the items of an array. A key comes as it is written, with its
/// quotation marks.
pub(super) fn items(value: &str) -> Items<'_> {
    match value.as_bytes().first() {
        Some(b'{') => Items { text: value, at: 1, is_object: true },
        Some(b'[') => Items { text: value, at: 1, is_object: false },
        _ => Items { text: value, at: value.len(), is_object: false },
    }
}

/// Iterator of [`items`].
pub(super) struct Items<'a> {
    text: &'a str,
    at: usize,
    is_object: bool,
}

impl<'a> Items<'a> {
    /// Returns the next string or other value, and moves to its end.
    fn value(&mut self) -> Option<&'a str> {
        let bytes = self.text.as_bytes();
        let begin = token(bytes, self.at);
        if matches!(bytes.get(begin), None | Some(b'}' | b']')) {
            return None;
        }
        self.at = value_end(bytes, begin);
        Some(&self.text[begin..self.at])
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = (Option<&'a str>, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        let key = match self.is_object {
            true => Some(self.value()?),
            false => None,
        };
        Some((key, self.value()?))
    }
}

/// Returns whether a string as it is written, with its quotation marks, has this text.
pub(super) fn is_text(quoted: &str, text: &str) -> bool {
    let inside = inside(quoted);
    match memchr(b'\\', inside.as_bytes()) {
        None => inside == text,
        Some(_) => Characters(inside).eq(text.chars()),
    }
}

/// Writes a value's text in pieces: the characters of a string, or the JSON of any other value without white space,
/// with sorted keys, and with only the last of several members of one name.
pub(super) fn pieces(value: &str, take: &mut Take<'_>) -> io::Result<()> {
    match value.as_bytes().first() {
        Some(b'"') => {
            let mut bytes = [0; 4];
            unescaped(inside(value), take, |c, take| take(c.encode_utf8(&mut bytes)))
        }
        _ => write_value(value, take),
    }
}

fn write_value(value: &str, take: &mut Take<'_>) -> io::Result<()> {
    match value.as_bytes().first() {
        Some(b'"') => write_string(value, take),
        Some(b'{') => write_object(value, take),
        Some(b'[') => {
            take("[")?;
            for (index, (_, item)) in items(value).enumerate() {
                if index > 0 {
                    take(",")?;
                }
                write_value(item, take)?;
            }
            take("]")
        }
        Some(b'-' | b'0'..=b'9') => write_number(value, take),
        _ => take(value),
    }
}

fn write_object(object: &str, take: &mut Take<'_>) -> io::Result<()> {
    // The place of each key, in four bytes: less than a member has, except with repeated names.
    let begin = object.as_ptr() as usize;
    let keys = items(object).filter_map(|(key, _)| key);
    let mut places: Vec<u32> = keys.map(|key| (key.as_ptr() as usize - begin) as u32).collect();
    let member = |place: u32| Items { text: object, at: place as usize, is_object: true }.next();
    let key = |place: u32| member_key(object, place as usize);
    places.sort_unstable_by(|a, b| compare(key(*a), key(*b)).then(a.cmp(b)));
    take("{")?;
    let mut is_first = true;
    for (index, place) in places.iter().enumerate() {
        let next = places.get(index + 1);
        let is_repeated = next.is_some_and(|next| compare(key(*place), key(*next)).is_eq());
        let Some((Some(name), value)) = member(*place) else { continue };
        if is_repeated {
            continue;
        }
        if !is_first {
            take(",")?;
        }
        is_first = false;
        write_string(name, take)?;
        take(":")?;
        write_value(value, take)?;
    }
    take("}")
}

/// Returns the key that begins at this place of an object.
fn member_key(object: &str, place: usize) -> &str {
    &object[place..string_end(object.as_bytes(), place)]
}

fn compare(a: &str, b: &str) -> Ordering {
    Characters(inside(a)).cmp(Characters(inside(b)))
}

fn write_string(quoted: &str, take: &mut Take<'_>) -> io::Result<()> {
    take("\"")?;
    unescaped(inside(quoted), take, |c, take| match c {
        '"' => take("\\\""),
        '\\' => take("\\\\"),
        '\u{8}' => take("\\b"),
        '\u{c}' => take("\\f"),
        '\n' => take("\\n"),
        '\r' => take("\\r"),
        '\t' => take("\\t"),
        c if c < ' ' => take(&format!("\\u{:04x}", u32::from(c))),
        c => take(c.encode_utf8(&mut [0; 4])),
    })?;
    take("\"")
}

/// Writes a number; an exponent gets a sign and a lower-case `e`, as in `serde_json`.
fn write_number(number: &str, take: &mut Take<'_>) -> io::Result<()> {
    let Some((digits, exponent)) = number.split_once(['e', 'E']) else { return take(number) };
    take(digits)?;
    take(if exponent.starts_with(['+', '-']) { "e" } else { "e+" })?;
    take(exponent)
}

/// Writes the inside of a string: text without escapes to `take`, and each escaped character to `take_escaped`.
fn unescaped(
    mut text: &str,
    take: &mut Take<'_>,
    mut take_escaped: impl FnMut(char, &mut Take<'_>) -> io::Result<()>,
) -> io::Result<()> {
    while let Some(at) = memchr(b'\\', text.as_bytes()) {
        if at > 0 {
            take(&text[..at])?;
        }
        let Some((c, length)) = escape(&text[at..]) else { return Ok(()) };
        take_escaped(c, take)?;
        text = &text[at + length..];
    }
    if text.is_empty() { Ok(()) } else { take(text) }
}

/// Characters of the inside of a string.
struct Characters<'a>(&'a str);

impl Iterator for Characters<'_> {
    type Item = char;

    fn next(&mut self) -> Option<char> {
        let (c, length) = match self.0.chars().next()? {
            '\\' => escape(self.0)?,
            c => (c, c.len_utf8()),
        };
        self.0 = &self.0[length..];
        Some(c)
    }
}

/// Returns the character of the escape at the beginning of a text, and the escape's length; `None`: a lone surrogate.
fn escape(text: &str) -> Option<(char, usize)> {
    let c = match text.as_bytes().get(1)? {
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'u' => {
            let high = hex(text.get(2..6)?)?;
            if !(0xD800..0xDC00).contains(&high) {
                return Some((char::from_u32(high)?, 6));
            }
            let low = hex(text.get(6..12)?.strip_prefix("\\u")?)?;
            if !(0xDC00..0xE000).contains(&low) {
                return None;
            }
            let code = 0x1_0000 + ((high - 0xD800) << 10) + (low - 0xDC00);
            return Some((char::from_u32(code)?, 12));
        }
        other => char::from(*other),
    };
    Some((c, 2))
}

fn hex(digits: &str) -> Option<u32> {
    u32::from_str_radix(digits, 16).ok()
}

/// Returns a string without its quotation marks.
fn inside(quoted: &str) -> &str {
    quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default()
}

/// Returns the place of the next token. Between values there are only white space, commas and colons.
fn token(bytes: &[u8], mut at: usize) -> usize {
    while matches!(bytes.get(at), Some(b' ' | b'\t' | b'\n' | b'\r' | b',' | b':')) {
        at += 1;
    }
    at
}

/// Returns the end of the string that begins at this place.
fn string_end(bytes: &[u8], begin: usize) -> usize {
    let mut at = begin + 1;
    while let Some(found) = bytes.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        if bytes[at + found] == b'"' {
            return at + found + 1;
        }
        at += found + 2;
    }
    bytes.len()
}

/// Returns the end of the value that begins at this place.
fn value_end(bytes: &[u8], begin: usize) -> usize {
    let (mut at, mut nesting) = (begin, 0_usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = string_end(bytes, at),
            b'{' | b'[' => {
                nesting += 1;
                at += 1;
                continue;
            }
            b'}' | b']' => {
                nesting = nesting.saturating_sub(1);
                at += 1;
            }
            b' ' | b'\t' | b'\n' | b'\r' | b',' | b':' => {
                at += 1;
                continue;
            }
            _ => at = scalar_end(bytes, at),
        }
        if nesting == 0 {
            return at;
        }
    }
    bytes.len()
}

/// Returns the end of the number, `true`, `false` or `null` that begins at this place.
fn scalar_end(bytes: &[u8], begin: usize) -> usize {
    let is_end =
        |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | b',' | b':' | b'}' | b']');
    bytes[begin..].iter().position(is_end).map_or(bytes.len(), |length| begin + length)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn text(value: &str) -> String {
        let mut text = String::new();
        let mut take = |piece: &str| {
            text.push_str(piece);
            Ok(())
        };
        pieces(value, &mut take).expect("a String takes all");
        text
    }

    #[test]
    fn a_value_has_the_text_that_serde_json_gives_it() {
        for json in [
            "null",
            "true",
            "-0",
            "12345678901234567890.10",
            "1E5",
            "1e-5",
            "1.0e+05",
            "[ ]",
            "{ }",
            r#""""#,
            r#""a\n\u001b[1m\u00e9\ud83d\ude00\/\\\"\b\f\r\t""#,
            r#"[ "a\n\u001b\u007f\u00e9\ud83d\ude00\/\\\"\b\f\r\t" , [1, -2.5E3], "é" ]"#,
            r#"{ "b" : 1, "a\u0062" : [ ] , "a" : {"z":"}","y":"]\""}, "b" : null, "é": 1, "e\u0301": 2 }"#,
            r#"{"a":1,"\u0061":2,"":{"":[[{}]]}}"#,
        ] {
            let expected = match serde_json::from_str(json).expect("JSON") {
                Value::String(text) => text,
                value => value.to_string(),
            };
            assert_eq!(checked(json.as_bytes()), Ok(json));
            assert_eq!(text(json), expected, "{json}");
        }
    }

    #[test]
    fn a_payload_that_has_no_value_is_not_accepted() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        let texts = [r#"{"a":"\ud83d"}"#, r#""\ude00""#, r#""\ud83d\u0041""#, "{", "", "{}{}"];
        let texts = texts.map(String::from);
        for json in texts.into_iter().chain([nested(NESTING_MAX), nested(NESTING_MAX + 1)]) {
            let is_value = serde_json::from_str::<Value>(&json).is_ok();
            assert_eq!(checked(json.as_bytes()).is_ok(), is_value, "{json}");
        }
        assert!(checked(b"\"\xff\"").is_err());
    }
}
