//! The types of columns, and the conversion of a field to a JSON value of each type.

use chrono::NaiveDate;
use serde::Deserialize;
use shardmill_sdk::{Error, Writer};

/// Type of a column, by its PostgreSQL name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    /// 16 bits, signed.
    Smallint,
    /// 32 bits, signed.
    Integer,
    /// 64 bits, signed.
    Bigint,
    /// A decimal of any size, without an exponent; every digit is kept.
    Numeric,
    /// A finite double.
    #[serde(rename = "double precision")]
    Double,
    /// `true`, `t`, `1`; `false`, `f`, `0`; in any case.
    Boolean,
    /// Any text.
    Text,
    /// `2013-01-31`.
    Date,
    /// `2013-01-31T10:00:00`, with `T` or a space, optionally with a fraction; no offset.
    Timestamp,
    /// Like `timestamp`, with `Z` or an offset such as `+05:30`; without one it is UTC.
    Timestamptz,
    /// Parsed and left out of the row.
    Skip,
}

impl ColumnType {
    /// Returns the name in the database; `None` for a column that is left out.
    pub(crate) fn sql_name(self) -> Option<&'static str> {
        match self {
            Self::Smallint => Some("smallint"),
            Self::Integer => Some("integer"),
            Self::Bigint => Some("bigint"),
            Self::Numeric => Some("numeric"),
            Self::Double => Some("double precision"),
            Self::Boolean => Some("boolean"),
            Self::Text => Some("text"),
            Self::Date => Some("date"),
            Self::Timestamp => Some("timestamp"),
            Self::Timestamptz => Some("timestamptz"),
            Self::Skip => None,
        }
    }

    /// Writes `field` as a JSON value.
    #[inline]
    pub(crate) fn write(self, field: &str, row: &mut Writer<'_>) -> Result<(), Error> {
        let wrong = || self.wrong(field);
        match self {
            // A value that is certainly in range and already in JSON form is copied.
            Self::Smallint if is_whole(field, 4) => write_parts(&[field], row),
            Self::Integer if is_whole(field, 9) => write_parts(&[field], row),
            Self::Bigint if is_whole(field, 18) => write_parts(&[field], row),
            Self::Smallint => write_integer(field.parse::<i16>().map_err(|_| wrong())?, row),
            Self::Integer => write_integer(field.parse::<i32>().map_err(|_| wrong())?, row),
            Self::Bigint => write_integer(field.parse::<i64>().map_err(|_| wrong())?, row),
            Self::Numeric => write_decimal(decimal_parts(field).ok_or_else(wrong)?, row),
            Self::Double => {
                let double = field.parse().ok().filter(|double: &f64| double.is_finite());
                Ok(serde_json::to_writer(row, &double.ok_or_else(wrong)?)?)
            }
            Self::Boolean => {
                let word: &[u8] =
                    if boolean(field).ok_or_else(wrong)? { b"true" } else { b"false" };
                row.append(word);
                Ok(())
            }
            Self::Text => {
                row.append_json_string(field);
                Ok(())
            }
            Self::Date => {
                field.parse::<NaiveDate>().map_err(|_| wrong())?;
                write_parts(&["\"", field, "\""], row)
            }
            Self::Timestamp => {
                let time = Timestamp::parse(field).filter(|time| time.offset.is_empty());
                let Timestamp { date, time, .. } = time.ok_or_else(wrong)?;
                write_parts(&["\"", date, "T", time, "\""], row)
            }
            Self::Timestamptz => {
                let Timestamp { date, time, offset } = Timestamp::parse(field).ok_or_else(wrong)?;
                let offset = if offset.is_empty() { "Z" } else { offset };
                write_parts(&["\"", date, "T", time, offset, "\""], row)
            }
            Self::Skip => Ok(()),
        }
    }

    #[cold]
    fn wrong(self, field: &str) -> Error {
        let expected = self.sql_name().unwrap_or("value");
        Error::reject(format_args!("invalid {expected} `{field}`"))
    }
}

/// Whether a field is an integer in JSON form with at most `digits_max` digits.
#[inline]
fn is_whole(field: &str, digits_max: usize) -> bool {
    let digits = field.strip_prefix('-').unwrap_or(field).as_bytes();
    digits.len() <= digits_max
        && digits.iter().all(u8::is_ascii_digit)
        && matches!(digits, [b'1'..=b'9', ..])
}

#[inline]
fn write_integer(integer: impl itoa::Integer, row: &mut Writer<'_>) -> Result<(), Error> {
    row.append(itoa::Buffer::new().format(integer));
    Ok(())
}

fn write_parts(parts: &[&str], row: &mut Writer<'_>) -> Result<(), Error> {
    for part in parts {
        row.append(part);
    }
    Ok(())
}

/// Returns the sign, the whole digits without leading zeros, and the digits of the fraction. JSON is stricter
/// than usual notation: `+5`, `007` and `.5` are not valid JSON numbers.
fn decimal_parts(field: &str) -> Option<(&str, &str, &str)> {
    let unsigned = field.trim_start_matches(['+', '-']);
    let sign = &field[..field.len() - unsigned.len()];
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let valid = sign.len() <= 1
        && digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty());
    valid.then(|| (sign.trim_start_matches('+'), whole.trim_start_matches('0'), fraction))
}

fn write_decimal(
    (sign, whole, fraction): (&str, &str, &str),
    row: &mut Writer<'_>,
) -> Result<(), Error> {
    let whole = if whole.is_empty() { "0" } else { whole };
    let point = if fraction.is_empty() { "" } else { "." };
    write_parts(&[sign, whole, point, fraction], row)
}

fn boolean(field: &str) -> Option<bool> {
    let is = |word: &&str| field.eq_ignore_ascii_case(word);
    let truth = ["true", "t", "1"].iter().any(is);
    let falsehood = ["false", "f", "0"].iter().any(is);
    (truth || falsehood).then_some(truth)
}

/// The parts of a valid timestamp.
struct Timestamp<'a> {
    date: &'a str,
    time: &'a str,
    /// `Z`, `+05:30`, or nothing.
    offset: &'a str,
}

impl<'a> Timestamp<'a> {
    /// Parses RFC 3339 with `T` or a space and a fraction of at most nine digits; the offset is optional. It
    /// uses fixed positions instead of a general parser, because it runs for every such field.
    fn parse(field: &'a str) -> Option<Self> {
        let (date, rest) = field.split_at_checked("2013-01-31".len())?;
        let rest = rest.strip_prefix(['T', ' '])?;
        let time_length = rest.find(['Z', '+', '-']).unwrap_or(rest.len());
        let (time, offset) = rest.split_at(time_length);
        (is_date(date) && is_time(time) && is_offset(offset)).then_some(Self { date, time, offset })
    }
}

fn is_date(text: &str) -> bool {
    let [y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1] = *text.as_bytes() else { return false };
    let (century, year) = (two_digits(y0, y1), two_digits(y2, y3));
    let (Some(century), Some(year), Some(month), Some(day)) =
        (century, year, two_digits(m0, m1), two_digits(d0, d1))
    else {
        return false;
    };
    NaiveDate::from_ymd_opt((century * 100 + year).cast_signed(), month, day).is_some()
}

fn is_time(text: &str) -> bool {
    let Some(([h0, h1, b':', m0, m1, b':', s0, s1], fraction)) =
        text.as_bytes().split_first_chunk::<8>()
    else {
        return false;
    };
    let below = |tens: &u8, ones: &u8, limit| two_digits(*tens, *ones).is_some_and(|it| it < limit);
    // 60 is a leap second.
    below(h0, h1, 24) && below(m0, m1, 60) && below(s0, s1, 61) && is_fraction(fraction)
}

fn is_fraction(text: &[u8]) -> bool {
    match text {
        [] => true,
        [b'.', digits @ ..] => {
            (1..=9).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit)
        }
        _ => false,
    }
}

fn is_offset(text: &str) -> bool {
    match *text.as_bytes() {
        [] | [b'Z'] => true,
        [b'+' | b'-', h0, h1, b':', m0, m1] => {
            two_digits(h0, h1).is_some_and(|hours| hours < 24)
                && two_digits(m0, m1).is_some_and(|minutes| minutes < 60)
        }
        _ => false,
    }
}

#[inline]
fn two_digits(tens: u8, ones: u8) -> Option<u32> {
    let (tens, ones) = (tens.wrapping_sub(b'0'), ones.wrapping_sub(b'0'));
    (tens < 10 && ones < 10).then(|| u32::from(tens) * 10 + u32::from(ones))
}
