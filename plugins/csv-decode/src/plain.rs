//! Fast path for lines of plain fields, as nearly all are: no quotes, no escapes, as many fields as columns.
//!
//! It reads eight bytes at a time, and each field only once: the end of a field follows from the bytes that it
//! may contain.

use shardmill_sdk::Writer;

use crate::{Column, ColumnType, Decoder};

const ONES: u64 = u64::MAX / 255;
const HIGH_BITS: u64 = ONES << 7;

/// Bytes to look for in lines with a given delimiter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plain {
    delimiter: u8,
}

impl Plain {
    /// Returns `None` if the end of a field cannot be recognised by its bytes: if the delimiter may be part of
    /// a number, or a null text looks like a number.
    pub(crate) fn new(delimiter: u8, null: &[String]) -> Option<Self> {
        let is_apart = |byte: u8| !byte.is_ascii_alphanumeric() && !matches!(byte, b'-' | b'\\');
        let is_number = |null: &String| {
            null.bytes().next().is_some_and(|byte| byte.is_ascii_digit() || byte == b'-')
        };
        (is_apart(delimiter) && !null.iter().any(is_number)).then_some(Self { delimiter })
    }

    /// Returns the end of a field that needs no escape in JSON. `None`: it needs one, or has a quote.
    #[inline]
    fn text_end(self, line: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(word) = line.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
            let word = u64::from_le_bytes(*word);
            let equal = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
            // Bytes above ASCII stop the loop, too: UTF-8 is validated elsewhere. A borrow from a matching byte
            // can only change the byte after it, which is after the first match.
            let stops = equal(self.delimiter) | equal(b'"') | equal(b'\\') | below(word, 0x20);
            let stops = (stops | word) & HIGH_BITS;
            if stops != 0 {
                let end = at + stops.trailing_zeros() as usize / 8;
                return (line[end] == self.delimiter).then_some(end);
            }
            at += 8;
        }
        for (index, byte) in line.iter().enumerate().skip(at) {
            if *byte == self.delimiter {
                return Some(index);
            }
            if !matches!(byte, b' '..0x80) || matches!(byte, b'"' | b'\\') {
                return None;
            }
        }
        Some(line.len())
    }
}

/// Sets the high bit of each byte that is below a limit of at most 0x80, and possibly of bytes that follow such
/// a byte.
#[inline]
fn below(word: u64, limit: u8) -> u64 {
    word.wrapping_sub(ONES * u64::from(limit)) & !word & HIGH_BITS
}

/// Counts the digits at the beginning.
#[inline]
fn digits(line: &[u8]) -> usize {
    let mut at = 0;
    while let Some(word) = line.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        // A digit is 0x30 to 0x39. Without 0x30 it is at most 9, and adding 6 does not reach the next half
        // byte.
        let word = u64::from_le_bytes(*word) ^ (ONES * 0x30);
        let others = (word | ((word & (ONES * 0x7f)) + ONES * 0x76)) & HIGH_BITS;
        if others != 0 {
            return at + others.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    at + line.iter().skip(at).take_while(|byte| byte.is_ascii_digit()).count()
}

/// Returns the end of an integer in JSON form with at most `digits_max` digits; `None` if there is none.
#[inline]
fn whole_end(line: &[u8], digits_max: usize) -> Option<usize> {
    let sign = usize::from(line.first() == Some(&b'-'));
    let digits = digits(line.get(sign..)?);
    let leads = *line.get(sign)?;
    // In JSON, a number that begins with zero has no further digits; here it also has no sign.
    let is_plain = leads != b'0' || (digits == 1 && sign == 0);
    ((1..=digits_max).contains(&digits) && is_plain).then_some(sign + digits)
}

impl Decoder {
    /// Writes the row of a line if all its fields are plain and match their columns. Returns false otherwise:
    /// another parser may accept the line, and part of a row has been written.
    #[inline]
    pub(crate) fn write_plain(&self, plain: Plain, line: &[u8], row: &mut Writer<'_>) -> bool {
        let mut rest = line;
        let last = self.columns.len() - 1;
        for (index, column) in self.columns.iter().enumerate() {
            let Some(end) = self.write_field(plain, column, rest, row) else { return false };
            match rest.get(end) {
                None if index == last => {}
                Some(byte) if index < last && *byte == plain.delimiter => rest = &rest[end + 1..],
                _ => return false,
            }
        }
        row.append(b"}");
        true
    }

    /// Writes a field and returns its end.
    #[inline]
    fn write_field(
        &self,
        plain: Plain,
        column: &Column,
        rest: &[u8],
        row: &mut Writer<'_>,
    ) -> Option<usize> {
        let whole = match column.column_type {
            ColumnType::Smallint => whole_end(rest, 4),
            ColumnType::Integer => whole_end(rest, 9),
            ColumnType::Bigint => whole_end(rest, 18),
            _ => None,
        };
        if let Some(end) = whole {
            row.append(&column.row_key);
            row.append(&rest[..end]);
            return Some(end);
        }
        let end = plain.text_end(rest)?;
        if column.column_type == ColumnType::Skip {
            return Some(end);
        }
        row.append(&column.row_key);
        let field = &rest[..end];
        if self.null.iter().any(|null| null.as_bytes() == field) {
            column.write_null(row).ok()?;
        } else if column.column_type == ColumnType::Text {
            row.append(b"\"");
            row.append(field);
            row.append(b"\"");
        } else {
            column.column_type.write(std::str::from_utf8(field).ok()?, row).ok()?;
        }
        Some(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_where_they_are_byte_by_byte() {
        let plain = Plain::new(b',', &[]).expect("a delimiter");
        let mut random = shardmill_sdk::Rng::with_seed(2014);
        let bytes = b"0123456789,,-a\"\\\x1f\x7f\x80\xff/:";
        for _ in 0..200_000 {
            let line: Vec<u8> = (0..random.usize(0..24))
                .map(|_| if random.u8(..3) > 0 { b'7' } else { bytes[random.usize(..bytes.len())] })
                .collect();
            let expected = line.iter().take_while(|byte| byte.is_ascii_digit()).count();
            assert_eq!(digits(&line), expected, "{line:?}");
            let is_plain = |byte: &u8| matches!(byte, b' '..0x80) && !b",\"\\".contains(byte);
            let end = line.iter().take_while(|byte| is_plain(byte)).count();
            let expected = line.get(end).is_none_or(|byte| *byte == b',').then_some(end);
            assert_eq!(plain.text_end(&line), expected, "{line:?}");
        }
    }

    #[test]
    fn integers_are_those_of_json() {
        for (text, expected) in
            [("7", Some(1)), ("-7,", Some(2)), ("0", Some(1)), ("1234", Some(4)), ("12345", None)]
        {
            assert_eq!(whole_end(text.as_bytes(), 4), expected, "{text}");
        }
        for text in ["", "-", "-0", "007", "00", "a", "+1", ","] {
            assert_eq!(whole_end(text.as_bytes(), 4), None, "{text}");
        }
    }
}
