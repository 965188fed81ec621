//! Converts payloads to lines, for the media types that text sinks accept.
//!
//! All functions are pure functions of the payload, so a replayed row gives the same bytes.

use std::borrow::Cow;
use std::io::{self, Write};

use serde::de::IgnoredAny;

/// Format of payloads, by their media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// `application/json`: one valid JSON text. Newlines between its tokens are removed.
    Json,
    /// `text/plain`: one line, with or without its line end; or one JSON text, whose newlines are removed.
    Text,
    /// `application/x-ndjson`: one or more lines.
    Lines,
}

/// Media types that [`LineFormat::of_media_type`] knows, for error texts.
pub const LINE_MEDIA_TYPES: &str = "application/json, text/plain or application/x-ndjson";

impl LineFormat {
    /// Returns the format of a media type, without regard to its parameters and case; `None`: it is not lines.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        let essence = media_type.split(';').next().unwrap_or_default().trim();
        match essence.to_ascii_lowercase().as_str() {
            "application/json" => Some(Self::Json),
            "text/plain" => Some(Self::Text),
            "application/x-ndjson" => Some(Self::Lines),
            _ => None,
        }
    }

    /// Returns the payload as a line (or as lines) without the last line end.
    ///
    /// # Errors
    /// The reason why it cannot be a line, as a fragment for a dead letter.
    pub fn line(self, payload: &[u8]) -> Result<Cow<'_, [u8]>, String> {
        self.check(payload)?;
        Ok(match self.kept(payload) {
            (line, true) => without_newlines(line),
            (line, false) => Cow::Borrowed(line),
        })
    }

    /// Checks that the payload is a line (or lines).
    ///
    /// # Errors
    /// As [`LineFormat::line`].
    pub fn check(self, payload: &[u8]) -> Result<(), String> {
        let (line, drops_newlines) = self.kept(payload);
        match self {
            Self::Json => {
                check_json(line).map_err(|error| format!("payload is not valid JSON: {error}"))
            }
            Self::Text if drops_newlines => check_json(line).map_err(|_| {
                "payload has a newline and is not JSON: a row must be one line; \
                 escape it in the plugin, or declare the route application/x-ndjson"
                    .into()
            }),
            Self::Lines if line.is_empty() => {
                Err("payload is empty: expected at least one line".into())
            }
            Self::Text | Self::Lines => Ok(()),
        }
    }

    /// Writes the line of a checked payload: the same bytes as [`LineFormat::line`], without a copy.
    ///
    /// # Errors
    /// The errors of the output.
    pub fn write(self, payload: &[u8], output: &mut dyn Write) -> io::Result<()> {
        let (mut rest, drops_newlines) = self.kept(payload);
        while drops_newlines && let Some(at) = memchr::memchr2(b'\n', b'\r', rest) {
            output.write_all(&rest[..at])?;
            rest = &rest[at + 1..];
        }
        output.write_all(rest)
    }

    /// Returns the bytes of the payload that its line is made of; true: newlines in them must be removed.
    fn kept(self, payload: &[u8]) -> (&[u8], bool) {
        match self {
            Self::Json => (payload, true),
            Self::Text => {
                let line = without_line_end(payload);
                (line, line.contains(&b'\n'))
            }
            Self::Lines => (without_line_end(payload), false),
        }
    }
}

fn check_json(payload: &[u8]) -> Result<(), String> {
    let text = std::str::from_utf8(payload).map_err(|error| error.to_string())?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| error.to_string())?;
    Ok(())
}

/// Removes newlines from valid JSON. They can only be between tokens, since strings must escape them. All other bytes
/// stay as they are (long numbers, order and repetition of keys).
pub fn without_newlines(json: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr2(b'\n', b'\r', json).is_none() {
        return Cow::Borrowed(json);
    }
    Cow::Owned(json.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'\r')).collect())
}

fn without_line_end(payload: &[u8]) -> &[u8] {
    let line = payload.strip_suffix(b"\n").unwrap_or(payload);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: LineFormat, payload: &str) -> Option<String> {
        let line = format.line(payload.as_bytes()).ok()?;
        let mut written = Vec::new();
        format.write(payload.as_bytes(), &mut written).expect("a Vec takes all");
        assert_eq!(written, &*line);
        Some(String::from_utf8_lossy(&line).into_owned())
    }

    #[test]
    fn json_keeps_every_byte_but_newlines_between_tokens() {
        let pretty = "{\n  \"id\": 12345678901234567890.10,\r\n \"id\": \"a\\nb\"\n}\n";
        let flat = "{  \"id\": 12345678901234567890.10, \"id\": \"a\\nb\"}";
        assert_eq!(line(LineFormat::Json, pretty).as_deref(), Some(flat));
        assert_eq!(line(LineFormat::Text, pretty).as_deref(), Some(flat));
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for payload in ["", "{", "{}{}", "nul", "\"a\nb\""] {
            assert!(LineFormat::Json.line(payload.as_bytes()).is_err(), "{payload}");
        }
        assert!(LineFormat::Json.line(b"\"\xff\"").is_err());
    }

    #[test]
    fn text_is_one_line_and_ndjson_may_be_several() {
        assert_eq!(line(LineFormat::Text, "a b\r\n").as_deref(), Some("a b"));
        assert_eq!(line(LineFormat::Text, "a\nb"), None);
        assert_eq!(line(LineFormat::Lines, "{}\n{}\n").as_deref(), Some("{}\n{}"));
        assert_eq!(line(LineFormat::Lines, "\n"), None);
    }

    #[test]
    fn media_types_are_known_without_parameters_and_case() {
        let json = LineFormat::of_media_type("Application/JSON; charset=utf-8");
        assert_eq!(json, Some(LineFormat::Json));
        assert_eq!(LineFormat::of_media_type("application/x-bincode"), None);
    }
}
