//! Conversion of a request body into records. Pure; no I/O.

use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use bytes::Bytes;

use shardmill_kinesis::input::{JsonError, MemberError, check_json, key_of_member};

use shardmill_file::without_mark;
use shardmill_kinesis::put_call::{NewRecord, NotPuttable};

/// Header with the partition key of all records of a request.
pub(crate) const KEY_HEADER: &str = "x-partition-key";

/// Format of the events in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One JSON value.
    Json,
    /// One JSON value per line; blank lines are skipped.
    Ndjson,
    /// The body unchanged, as one record.
    Opaque,
}

impl Shape {
    /// Chooses the format by `Content-Type`, without its parameters.
    pub fn of(headers: &HeaderMap) -> Self {
        let media = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media = media.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
        match media.to_ascii_lowercase().as_str() {
            "application/json" => Self::Json,
            "application/x-ndjson" => Self::Ndjson,
            _ => Self::Opaque,
        }
    }
}

/// Error: a body without events, or with an invalid event.
#[derive(Debug, thiserror::Error)]
pub enum BadEvents {
    /// The body is empty.
    #[error("the body is empty: send at least one event")]
    Empty,
    /// The header is not a valid partition key.
    #[error("invalid header {KEY_HEADER}: {cause}")]
    Header {
        /// Found value and expected value.
        cause: String,
    },
    /// An event is not valid JSON.
    #[error("line {line}: {cause}; send another Content-Type if the events are not JSON")]
    NotJson {
        /// Line number, from 1.
        line: usize,
        /// Cause, with the column.
        cause: JsonError,
    },
    /// The member with the partition key is missing or unsuitable.
    #[error("line {line}: {cause}; add it, or send the header {KEY_HEADER}")]
    Member {
        /// Line number, from 1.
        line: usize,
        /// Value found instead.
        cause: MemberError,
    },
    /// A record that exceeds a limit of Kinesis.
    #[error("line {line}: {cause}")]
    NotPuttable {
        /// Line number, from 1. A record of the whole body has line 1.
        line: usize,
        /// The exceeded limit.
        cause: NotPuttable,
    },
}

/// Returns the maximum number of records in a body. It bounds the result of [`records`].
pub fn records_max(shape: Shape, body: &[u8]) -> usize {
    match shape {
        Shape::Json | Shape::Opaque => 1,
        Shape::Ndjson => body.iter().filter(|byte| **byte == b'\n').count() + 1,
    }
}

/// Returns the length of the partition key in the header, in bytes; 0 without the header.
pub(crate) fn header_key_bytes(headers: &HeaderMap) -> usize {
    headers.get(KEY_HEADER).map_or(0, |value| value.len())
}

/// Returns the records of a body in order. They share its bytes.
///
/// The partition key is that of the header, otherwise that of the JSON member, otherwise random, which spreads
/// the records over the shards.
///
/// # Errors
/// [`BadEvents`]: nothing of the body may be put then.
pub fn records(
    shape: Shape,
    headers: &HeaderMap,
    body: &Bytes,
    key_member: Option<&str>,
) -> Result<Vec<NewRecord>, BadEvents> {
    let header_key = header_key(headers)?;
    let mut records = Vec::new();
    for (line, event) in events(shape, body) {
        if shape != Shape::Opaque {
            check_json(&event).map_err(|cause| BadEvents::NotJson { line, cause })?;
        }
        let partition_key = match (&header_key, key_member, shape) {
            (Some(key), _, _) => key.clone(),
            (None, Some(member), Shape::Json | Shape::Ndjson) => {
                key_of_member(&event, member).map_err(|cause| BadEvents::Member { line, cause })?
            }
            _ => uuid::Uuid::new_v4().to_string(),
        };
        let record = NewRecord { partition_key, payload: event };
        record.check().map_err(|cause| BadEvents::NotPuttable { line, cause })?;
        records.push(record);
    }
    match records.is_empty() {
        true => Err(BadEvents::Empty),
        false => Ok(records),
    }
}

/// Returns the events of a body with their line numbers, from 1. Blank lines are skipped.
fn events(shape: Shape, body: &Bytes) -> impl Iterator<Item = (usize, Bytes)> {
    let text = match shape {
        Shape::Opaque => &body[..],
        Shape::Json | Shape::Ndjson => without_mark(body),
    };
    let is_blank = move |event: &[u8]| match shape {
        Shape::Opaque => event.is_empty(),
        Shape::Json | Shape::Ndjson => event.trim_ascii().is_empty(),
    };
    let end = move |byte: &u8| shape == Shape::Ndjson && *byte == b'\n';
    let lines = text.split(end).map(move |line| match (shape, line) {
        (Shape::Ndjson, [line @ .., b'\r']) => line,
        _ => line,
    });
    let events = lines.zip(1..).filter(move |(line, _)| !is_blank(line));
    events.map(|(line, number)| (number, body.slice_ref(line)))
}

fn header_key(headers: &HeaderMap) -> Result<Option<String>, BadEvents> {
    let Some(value) = headers.get(KEY_HEADER) else { return Ok(None) };
    let bad = |cause: String| BadEvents::Header { cause };
    let key = str::from_utf8(value.as_bytes()).map_err(|_| bad("expected UTF-8".into()))?;
    let record = NewRecord { partition_key: key.to_owned(), payload: Bytes::new() };
    record.check().map_err(|cause| bad(cause.to_string()))?;
    Ok(Some(record.partition_key))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn read(
        shape: Shape,
        key: &[(&'static str, &'static str)],
        body: &'static str,
        member: Option<&str>,
    ) -> Result<Vec<(String, String)>, String> {
        let body = Bytes::from_static(body.as_bytes());
        let records =
            records(shape, &headers(key), &body, member).map_err(|bad| bad.to_string())?;
        assert!(records.len() <= records_max(shape, &body));
        let text = |record: NewRecord| {
            (record.partition_key, String::from_utf8(record.payload.to_vec()).unwrap())
        };
        Ok(records.into_iter().map(text).collect())
    }

    #[test]
    fn the_content_type_says_the_shape() {
        for (media, shape) in [
            ("application/json", Shape::Json),
            ("Application/JSON; charset=utf-8", Shape::Json),
            ("application/x-ndjson", Shape::Ndjson),
            ("application/jsonl", Shape::Opaque),
            ("", Shape::Opaque),
        ] {
            assert_eq!(Shape::of(&headers(&[("content-type", media)])), shape, "{media}");
        }
        assert_eq!(Shape::of(&HeaderMap::new()), Shape::Opaque);
    }

    #[test]
    fn the_header_goes_before_the_member_and_chance_comes_last() {
        let body = "{\"id\":1}\r\n\n{\"id\":\"b\"}\n";
        let key = [(KEY_HEADER, "k")];
        let of = |one: &str, two: &str| {
            Ok(vec![(one.into(), "{\"id\":1}".into()), (two.into(), "{\"id\":\"b\"}".into())])
        };
        assert_eq!(read(Shape::Ndjson, &key, body, Some("id")), of("k", "k"));
        assert_eq!(read(Shape::Ndjson, &[], body, Some("id")), of("1", "b"));
        let by_chance = read(Shape::Ndjson, &[], body, None).unwrap();
        assert_ne!(by_chance[0].0, by_chance[1].0);
        // Data that is not JSON has no members.
        assert_eq!(read(Shape::Opaque, &[], "x\ny", Some("id")).unwrap()[0].1, "x\ny");
    }

    #[test]
    fn a_bad_line_is_named() {
        for (shape, body, expected) in [
            (Shape::Json, " ", "the body is empty"),
            (Shape::Ndjson, "\n\n", "the body is empty"),
            (Shape::Opaque, "", "the body is empty"),
            (Shape::Json, "{} {}", "line 1: not JSON: trailing characters at column 4"),
            (Shape::Ndjson, "{\"id\":1}\n\n{\n", "line 3: not JSON"),
            (Shape::Ndjson, "{\"id\":1}\n{}", "line 2: the record has no member \"id\""),
            (Shape::Json, "{\"id\":\"\"}", "line 1: the partition key has 0 characters"),
        ] {
            let said = read(shape, &[], body, Some("id")).unwrap_err();
            assert!(said.starts_with(expected), "{body}: {said}");
        }
        let said = read(Shape::Opaque, &[(KEY_HEADER, "")], "x", None).unwrap_err();
        assert!(
            said.starts_with("invalid header x-partition-key: the partition key has 0"),
            "{said}"
        );
    }
}
