//! Reads records to put from files: lines, CSV, JSON lines, or length-prefixed bytes.
//!
//! Every record is within the limits that all streams have. Each error names the file and the place in it.

use std::collections::HashMap;
use std::io::{BufRead, Read as _};

use bytes::Bytes;
use serde_json::value::RawValue;

use shardmill_file::BYTE_ORDER_MARK;

use super::put_call::{NewRecord, NotPuttable, RECORD_BYTES_MAX};

/// Bytes of the length before a binary record.
const LENGTH_BYTES: usize = 4;

/// Format of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A record per line, without its end (`\n` or `\r\n`).
    Lines,
    /// A CSV record per line, line breaks within quotes included.
    Csv,
    /// A JSON value per line; blank lines are skipped.
    Ndjson,
    /// A 4-byte big-endian length, then that number of bytes, repeated.
    Binary,
}

/// Rule for a record's partition key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRule {
    /// The same key for all records.
    Fixed(String),
    /// Number of the record over all inputs, from 0: it spreads records over shards.
    Number,
    /// A top-level member of the record, which is a JSON object.
    Member(String),
}

/// Error of an input.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file cannot be read.
    #[error("failed to read {place}: {cause}")]
    Read {
        /// File, and line or byte.
        place: String,
        /// Error of the system.
        cause: std::io::Error,
    },
    /// A line is not JSON.
    #[error("{place}: {cause}; each line must be one JSON value (or use --format lines)")]
    NotJson {
        /// File and line.
        place: String,
        /// Error, with the column.
        cause: JsonError,
    },
    /// The member for the partition key is missing or unsuitable.
    #[error("{place}: {cause}; choose a member that every record has with --key-field, or a --key")]
    Member {
        /// File and line.
        place: String,
        /// Error of the member.
        cause: MemberError,
    },
    /// A binary record is shorter than its length prefix says.
    #[error(
        "{place}: truncated record: expected {expected} bytes from here, found {found}; check that the file is \
         complete and length-prefixed"
    )]
    Truncated {
        /// File, and the byte where the record starts with its length prefix.
        place: String,
        /// Expected bytes, with the length prefix; only those of the prefix if it is cut itself.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// No stream accepts the record.
    #[error("{place}: {cause}")]
    NotPuttable {
        /// File, and line or byte.
        place: String,
        /// Limit that it exceeds.
        cause: NotPuttable,
    },
}

/// Error of text that is not a JSON value.
#[derive(Debug, thiserror::Error)]
#[error("not JSON: {what} at column {column}")]
pub struct JsonError {
    what: String,
    column: usize,
}

impl From<serde_json::Error> for JsonError {
    fn from(error: serde_json::Error) -> Self {
        let column = error.column();
        let text = error.to_string();
        // The line is always 1 here; the caller knows the right one.
        let what = text.split(" at line ").next().unwrap_or(&text).to_owned();
        Self { what, column }
    }
}

/// Error of a member that cannot be the partition key.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The record is not an object.
    #[error(
        "expected a JSON object with a member {member:?} for the partition key, found no object"
    )]
    NoObject {
        /// Name of the member.
        member: String,
    },
    /// The member is missing or null.
    #[error("the record has no member {member:?} for its partition key")]
    Missing {
        /// Name of the member.
        member: String,
    },
    /// The member is an object or a list.
    #[error(
        "invalid partition key in member {member:?}: expected a text, a number, true or false, found \
         {found}"
    )]
    Unfit {
        /// Name of the member.
        member: String,
        /// Kind of its value.
        found: &'static str,
    },
}

/// Checks that bytes are one JSON value.
///
/// # Errors
/// [`JsonError`], with the column.
pub fn check_json(json: &[u8]) -> Result<(), JsonError> {
    serde_json::from_slice::<&RawValue>(json).map(drop).map_err(JsonError::from)
}

/// Returns the partition key in a top-level member of an object: a text as it is; a number, `true` or `false` as
/// written. `json` must have passed [`check_json`].
///
/// # Errors
/// [`MemberError`] when the member is missing, or of another kind.
pub fn key_of_member(json: &[u8], member: &str) -> Result<String, MemberError> {
    let name = || member.to_owned();
    let members: HashMap<std::borrow::Cow<'_, str>, &RawValue> =
        serde_json::from_slice(json).map_err(|_| MemberError::NoObject { member: name() })?;
    let value = members.get(member).map(|value| value.get()).unwrap_or("null");
    match value.as_bytes().first() {
        Some(b'"') => serde_json::from_str(value).map_err(|_| MemberError::Unfit {
            member: name(),
            found: "a text with half a surrogate pair",
        }),
        Some(b'{') => Err(MemberError::Unfit { member: name(), found: "an object" }),
        Some(b'[') => Err(MemberError::Unfit { member: name(), found: "a list" }),
        Some(b'n') | None => Err(MemberError::Missing { member: name() }),
        Some(_) => Ok(value.to_owned()),
    }
}

/// Reader of the records of one file. It ends at the first error.
pub struct Input<R> {
    reader: R,
    name: String,
    format: Format,
    key: KeyRule,
    /// Number of the next record, over all inputs.
    number: u64,
    /// Number of lines read.
    lines: u64,
    /// Number of bytes read.
    offset: u64,
}

impl<R: BufRead> Input<R> {
    /// Makes an input of `reader`, with the `name` for errors and the number of its first record.
    pub fn new(reader: R, name: String, format: Format, key: KeyRule, first_number: u64) -> Self {
        Self { reader, name, format, key, number: first_number, lines: 0, offset: 0 }
    }

    /// Skips lines of any length; in CSV, records, which may have line breaks within quotes.
    ///
    /// # Errors
    /// [`InputError::Read`].
    pub fn skip_lines(&mut self, lines: u64) -> Result<(), InputError> {
        for _ in 0..lines {
            if self.format == Format::Csv {
                self.csv_record()?;
                continue;
            }
            let skipped = self.reader.skip_until(b'\n');
            self.offset += skipped.map_err(|cause| self.unread(cause))? as u64;
            self.lines += 1;
        }
        Ok(())
    }

    /// Reads the next record; `None` at the end.
    ///
    /// # Errors
    /// [`InputError`], with the file and the place.
    pub fn next_record(&mut self) -> Result<Option<NewRecord>, InputError> {
        let started_at = self.offset;
        let payload = match self.format {
            Format::Lines => self.line()?,
            Format::Csv => self.csv_record()?,
            Format::Ndjson => self.json_line()?,
            Format::Binary => self.binary()?,
        };
        let Some(payload) = payload else { return Ok(None) };
        let place = match self.format {
            Format::Lines | Format::Csv | Format::Ndjson => self.line_place(),
            Format::Binary => self.byte_place(started_at),
        };
        let partition_key = match &self.key {
            KeyRule::Fixed(key) => key.clone(),
            KeyRule::Number => self.number.to_string(),
            KeyRule::Member(member) => key_of_member(&payload, member)
                .map_err(|cause| InputError::Member { place: place.clone(), cause })?,
        };
        let record = NewRecord { partition_key, payload: Bytes::from(payload) };
        record.check().map_err(|cause| InputError::NotPuttable { place, cause })?;
        self.number += 1;
        Ok(Some(record))
    }

    fn line(&mut self) -> Result<Option<Vec<u8>>, InputError> {
        Ok(self.line_with_end()?.map(without_end))
    }

    fn line_with_end(&mut self) -> Result<Option<Vec<u8>>, InputError> {
        // The longest record and its line end. A longer line is refused without reading the rest.
        let bytes_max = RECORD_BYTES_MAX as u64 + 2;
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(bytes_max).read_until(b'\n', &mut line);
        self.lines += 1;
        let read = read.map_err(|cause| self.unread(cause))?;
        self.offset += read as u64;
        if read == 0 {
            return Ok(None);
        }
        if self.lines == 1 && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Some(line))
    }

    /// Reads a line, and those that belong to it by line breaks within quotes.
    fn csv_record(&mut self) -> Result<Option<Vec<u8>>, InputError> {
        let Some(mut record) = self.line_with_end()? else { return Ok(None) };
        let mut scan = shardmill_file::csv::RecordScan::default();
        let mut is_whole = scan.end(&record).is_some();
        // A record that is too long is refused later, without reading the rest.
        while !is_whole && record.len() <= RECORD_BYTES_MAX {
            let Some(line) = self.line_with_end()? else { break };
            is_whole = scan.end(&line).is_some();
            record.extend_from_slice(&line);
        }
        Ok(Some(without_end(record)))
    }

    fn json_line(&mut self) -> Result<Option<Vec<u8>>, InputError> {
        while let Some(line) = self.line()? {
            if line.trim_ascii().is_empty() {
                continue;
            }
            // A line that is too long was not read to its end, so it is refused for its size and not as invalid JSON.
            if line.len() <= RECORD_BYTES_MAX {
                let place = || self.line_place();
                check_json(&line).map_err(|cause| InputError::NotJson { place: place(), cause })?;
            }
            return Ok(Some(line));
        }
        Ok(None)
    }

    fn binary(&mut self) -> Result<Option<Vec<u8>>, InputError> {
        let started_at = self.offset;
        let length = self.up_to(LENGTH_BYTES)?;
        let Ok(prefix) = <[u8; LENGTH_BYTES]>::try_from(length.as_slice()) else {
            return match length.len() {
                0 => Ok(None),
                found => {
                    let place = self.byte_place(started_at);
                    Err(InputError::Truncated { place, expected: LENGTH_BYTES, found })
                }
            };
        };
        let bytes = u32::from_be_bytes(prefix) as usize;
        if bytes > RECORD_BYTES_MAX {
            let (place, cause) = (self.byte_place(started_at), NotPuttable::Size { bytes });
            return Err(InputError::NotPuttable { place, cause });
        }
        let payload = self.up_to(bytes)?;
        if payload.len() < bytes {
            let (expected, found) = (LENGTH_BYTES + bytes, LENGTH_BYTES + payload.len());
            return Err(InputError::Truncated {
                place: self.byte_place(started_at),
                expected,
                found,
            });
        }
        Ok(Some(payload))
    }

    /// Reads this number of bytes, or fewer at the end.
    fn up_to(&mut self, bytes: usize) -> Result<Vec<u8>, InputError> {
        let mut read = Vec::new();
        let result = self.reader.by_ref().take(bytes as u64).read_to_end(&mut read);
        result.map_err(|cause| self.unread(cause))?;
        self.offset += read.len() as u64;
        Ok(read)
    }

    fn unread(&self, cause: std::io::Error) -> InputError {
        InputError::Read { place: self.byte_place(self.offset), cause }
    }

    fn line_place(&self) -> String {
        format!("{}:{}", self.name, self.lines)
    }

    fn byte_place(&self, offset: u64) -> String {
        format!("{} at byte {offset}", self.name)
    }
}

/// Returns a line without its end, `\n` or `\r\n`.
fn without_end(mut line: Vec<u8>) -> Vec<u8> {
    if line.pop_if(|last| *last == b'\n').is_some() {
        line.pop_if(|last| *last == b'\r');
    }
    line
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn read(format: Format, key: KeyRule, bytes: &[u8]) -> Result<Vec<(String, String)>, String> {
        let mut input = Input::new(bytes, "in".into(), format, key, 5);
        let mut records = Vec::new();
        while let Some(record) = input.next_record().map_err(|error| error.to_string())? {
            let payload = String::from_utf8(record.payload.to_vec()).unwrap();
            records.push((record.partition_key, payload));
        }
        Ok(records)
    }

    fn pairs(expected: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        Ok(expected.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect())
    }

    #[test]
    fn lines_lose_their_ends_and_nothing_else() {
        let found = read(Format::Lines, KeyRule::Number, b"a\r\n\n b \nlast\r");
        assert_eq!(found, pairs(&[("5", "a"), ("6", ""), ("7", " b "), ("8", "last\r")]));
        assert_eq!(read(Format::Lines, KeyRule::Number, b""), pairs(&[]));
    }

    #[test]
    fn fault_33_quoted_line_breaks_and_a_byte_order_mark() {
        let text = b"\xEF\xBB\xBFa,b\r\n1,\"x\r\ny\"\r\n2,z\n";
        let expected = [("5", "a,b"), ("6", "1,\"x\r\ny\""), ("7", "2,z")];
        assert_eq!(read(Format::Csv, KeyRule::Number, text), pairs(&expected));
        assert_eq!(read(Format::Csv, KeyRule::Number, b"1,\"x\ny"), pairs(&[("5", "1,\"x\ny")]));
        assert_eq!(read(Format::Lines, KeyRule::Number, b"\xEF\xBB\xBFa\n"), pairs(&[("5", "a")]));
        assert_eq!(read(Format::Ndjson, KeyRule::Number, b"\xEF\xBB\xBF{}"), pairs(&[("5", "{}")]));
    }

    #[test]
    fn fault_33_a_header_of_csv_is_left_out_with_its_line_breaks() {
        let text = b"\xEF\xBB\xBF\"a\nb\",c\n1,2\n";
        let mut input = Input::new(&text[..], "in".into(), Format::Csv, KeyRule::Number, 0);
        input.skip_lines(1).unwrap();
        assert_eq!(input.next_record().unwrap().unwrap().payload, "1,2");
        assert!(input.next_record().unwrap().is_none());
    }

    #[test]
    fn skipped_lines_count_in_places() {
        let mut input =
            Input::new(&b"head\n{}\n{"[..], "in".into(), Format::Ndjson, KeyRule::Number, 0);
        input.skip_lines(1).unwrap();
        assert_eq!(input.next_record().unwrap().unwrap().payload, "{}");
        let said = input.next_record().unwrap_err().to_string();
        assert!(
            said.starts_with("in:3: not JSON: EOF while parsing an object at column 1;"),
            "{said}"
        );
    }

    #[test]
    fn a_member_is_the_key() {
        let member = || KeyRule::Member("id".into());
        let text = b"{\"id\":\"caf\\u00e9\"}\n\n{\"id\":1.50}\n {\"id\":true,\"x\":{\"id\":2}}";
        let expected = [
            ("caf\u{e9}", "{\"id\":\"caf\\u00e9\"}"),
            ("1.50", "{\"id\":1.50}"),
            ("true", " {\"id\":true,\"x\":{\"id\":2}}"),
        ];
        assert_eq!(read(Format::Ndjson, member(), text), pairs(&expected));
        for (bad, expected) in [
            ("{}", "has no member \"id\""),
            ("{\"id\":null}", "has no member \"id\""),
            ("[1]", "expected a JSON object"),
            ("{\"id\":{}}", "found an object"),
            ("{\"id\":[]}", "found a list"),
            ("{\"id\":\"\"}", "has 0 characters"),
            ("{\"id\":\"\\ud800\"}", "half a surrogate pair"),
        ] {
            let text = format!("{{\"id\":1}}\n{bad}\n");
            let said = read(Format::Ndjson, member(), text.as_bytes()).unwrap_err();
            assert!(said.starts_with("in:2: ") && said.contains(expected), "{bad}: {said}");
        }
    }

    #[test]
    fn binary_records_are_cut_by_their_lengths() {
        let whole = b"\0\0\0\x02ab\0\0\0\0\0\0\0\x01\n";
        let fixed = || KeyRule::Fixed("k".into());
        assert_eq!(
            read(Format::Binary, fixed(), whole),
            pairs(&[("k", "ab"), ("k", ""), ("k", "\n")])
        );
        for (end, at) in [(2, 0), (5, 0), (8, 6), (14, 10)] {
            let said = read(Format::Binary, fixed(), &whole[..end]).unwrap_err();
            assert!(said.starts_with(&format!("in at byte {at}: ")), "cut at {end}: {said}");
        }
        let said = read(Format::Binary, fixed(), b"text, not lengths").unwrap_err();
        assert!(said.starts_with("in at byte 0: the record has 1952807028 bytes"), "{said}");
    }

    #[test]
    fn what_no_stream_takes_is_refused_at_its_place() {
        let mut text = b"ok\n".to_vec();
        text.resize(3 + RECORD_BYTES_MAX + 1, b'x');
        for format in [Format::Lines, Format::Ndjson] {
            let text = match format {
                Format::Lines => &text[..],
                _ => &text[3..],
            };
            let said = read(format, KeyRule::Number, text).unwrap_err();
            assert!(said.contains("Kinesis takes at most 10485760"), "{said}");
        }
        let long = KeyRule::Fixed("é".repeat(257));
        let said = read(Format::Lines, long, b"a").unwrap_err();
        assert!(said.starts_with("in:1: the partition key has 257 characters"), "{said}");
        assert!(read(Format::Lines, KeyRule::Fixed("é".repeat(256)), b"a").is_ok());
    }
}
