//! Parses dates and times: RFC 3339, also with a space instead of the `T`.
//!
//! Results count from 1970-01-01, in days or microseconds. Digits after the microsecond are rounded to the nearest one,
//! as in PostgreSQL. Years are 0001 to 9999.

use std::borrow::Cow;

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_MINUTE: i64 = 60 * MICROS_PER_SECOND;
const MICROS_PER_HOUR: i64 = 60 * MICROS_PER_MINUTE;
const MICROS_PER_DAY: i64 = 24 * MICROS_PER_HOUR;

/// Most hours of an offset from UTC: PostgreSQL's own limit, more than any place on earth has.
const OFFSET_HOURS_MAX: i64 = 15;

/// Reason why a text is not a date or time.
type Why = Cow<'static, str>;

/// Meaning of a timestamp's offset from UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// A `timestamptz`, with an offset. A text without one is UTC, whatever the server's zone is.
    Instant,
    /// A `timestamp`: a wall clock, without an offset. `Z` is accepted as UTC's wall clock. Another offset is refused,
    /// as it would be lost.
    WallClock,
}

/// Reads `YYYY-MM-DD` as days since 1970-01-01.
pub fn date(text: &str) -> Result<i32, Why> {
    let mut rest = text.as_bytes();
    match take_date(&mut rest) {
        Some(days) if rest.is_empty() => {
            i32::try_from(days).map_err(|_| "the date is out of range".into())
        }
        _ => Err("expected a date such as 2013-01-31".into()),
    }
}

/// Reads `HH:MM[:SS[.ffffff]]` as microseconds since midnight, up to and including 24:00.
pub fn time(text: &str) -> Result<i64, Why> {
    let mut rest = text.as_bytes();
    match take_time(&mut rest) {
        Some(micros) if rest.is_empty() => Ok(micros),
        _ => Err("expected a time such as 23:59:59.123456".into()),
    }
}

/// Reads a date and a time, `T` or a space between them, as microseconds since 1970-01-01.
pub fn timestamp(text: &str, zone: Zone) -> Result<i64, Why> {
    let expected = || match zone {
        Zone::Instant => Why::from("expected a timestamp such as 2013-01-31T23:59:59.123456Z"),
        Zone::WallClock => Why::from("expected a timestamp such as 2013-01-31 23:59:59.123456"),
    };
    let mut rest = text.as_bytes();
    let days = take_date(&mut rest).ok_or_else(expected)?;
    take_any(&mut rest, b"Tt ").ok_or_else(expected)?;
    let micros = take_time(&mut rest).ok_or_else(expected)?;
    let offset = take_offset(&mut rest).ok_or_else(expected)?;
    if !rest.is_empty() {
        return Err(expected());
    }
    if zone == Zone::WallClock && offset != 0 {
        return Err("the column has no time zone, and the offset would be lost".into());
    }
    Ok(days * MICROS_PER_DAY + micros - offset)
}

/// Reads `YYYY-MM-DD` as days.
fn take_date(text: &mut &[u8]) -> Option<i64> {
    let year = take_number(text, 4)?;
    take_any(text, b"-")?;
    let month = take_number(text, 2)?;
    take_any(text, b"-")?;
    let day = take_number(text, 2)?;
    let date = chrono::NaiveDate::from_ymd_opt(
        i32::try_from(year).ok().filter(|year| *year > 0)?,
        u32::try_from(month).ok()?,
        u32::try_from(day).ok()?,
    )?;
    Some(date.signed_duration_since(chrono::NaiveDate::default()).num_days())
}

/// Reads `HH:MM[:SS[.f…]]` as microseconds. A leap second counts as the next minute's first second.
fn take_time(text: &mut &[u8]) -> Option<i64> {
    let hours = take_number(text, 2)?;
    take_any(text, b":")?;
    let minutes = take_number(text, 2).filter(|minutes| *minutes < 60)?;
    let mut micros = hours * MICROS_PER_HOUR + minutes * MICROS_PER_MINUTE;
    if take_any(text, b":").is_some() {
        let seconds = take_number(text, 2).filter(|seconds| *seconds <= 60)?;
        micros += seconds * MICROS_PER_SECOND;
        if take_any(text, b".").is_some() {
            micros += take_fraction(text)?;
        }
    }
    (micros <= MICROS_PER_DAY).then_some(micros)
}

/// Reads a fraction's digits as microseconds, rounded to the nearest.
fn take_fraction(text: &mut &[u8]) -> Option<i64> {
    let length = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at(length);
    let micros = (0..6).fold(0, |micros, place| {
        micros * 10 + digits.get(place).map_or(0, |digit| i64::from(digit - b'0'))
    });
    let round_up = digits.get(6).is_some_and(|digit| *digit >= b'5');
    *text = rest;
    (length > 0).then_some(micros + i64::from(round_up))
}

/// Reads an offset as microseconds: `Z`, `±HH[:MM]` or `±HHMM`. No offset is zero.
fn take_offset(text: &mut &[u8]) -> Option<i64> {
    let sign = match take_any(text, b"Zz+-") {
        None | Some(b'Z' | b'z') => return Some(0),
        Some(b'-') => -1,
        Some(_) => 1,
    };
    let hours = take_number(text, 2).filter(|hours| *hours <= OFFSET_HOURS_MAX)?;
    let colon = take_any(text, b":").is_some();
    let minutes = match text.is_empty() && !colon {
        true => 0,
        false => take_number(text, 2).filter(|minutes| *minutes < 60)?,
    };
    Some(sign * (hours * MICROS_PER_HOUR + minutes * MICROS_PER_MINUTE))
}

/// Reads exactly `length` digits as a number.
fn take_number(text: &mut &[u8], length: usize) -> Option<i64> {
    let (digits, rest) = text.split_at_checked(length)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    *text = rest;
    Some(digits.iter().fold(0, |value, digit| value * 10 + i64::from(digit - b'0')))
}

/// Takes the next byte, if it is one of these.
fn take_any(text: &mut &[u8], wanted: &[u8]) -> Option<u8> {
    let (first, rest) = text.split_first().filter(|(first, _)| wanted.contains(first))?;
    *text = rest;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_exact_to_the_microsecond() {
        for (text, micros) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1969-12-31 23:59:59.999999", -1),
            ("1970-01-01T00:00:01.5-00:30", 1_801_500_000),
            ("1970-01-01 01:00:00+01", 0),
            ("1970-01-01T00:00:00.1234565Z", 123_457),
            ("1970-01-01T00:00:00.123456499Z", 123_456),
            ("2016-12-31T23:59:60Z", 1_483_228_800_000_000),
            ("9999-12-31T23:59:59.999999Z", 253_402_300_799_999_999),
        ] {
            assert_eq!(timestamp(text, Zone::Instant), Ok(micros), "{text}");
        }
    }

    #[test]
    fn a_wall_clock_has_no_offset_to_lose() {
        assert_eq!(timestamp("1970-01-02 00:00:00", Zone::WallClock), Ok(MICROS_PER_DAY));
        assert_eq!(timestamp("1970-01-02T00:00Z", Zone::WallClock), Ok(MICROS_PER_DAY));
        assert!(timestamp("1970-01-02T00:00:00+02:00", Zone::WallClock).is_err());
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "2013-02-29T00:00:00Z",
            "2013-1-1T00:00:00Z",
            "0000-01-01T00:00:00Z",
            "2013-01-01",
            "2013-01-01T24:00:01Z",
            "2013-01-01T00:60:00Z",
            "2013-01-01T00:00:00.Z",
            "2013-01-01T00:00:00ZZ",
            "2013-01-01T00:00:00+1",
            "2013-01-01T00:00:00+99:00",
            "2013-01-01T00:00:00é",
        ] {
            assert!(timestamp(text, Zone::Instant).is_err(), "{text}");
        }
        assert_eq!(date("2000-02-29"), Ok(11_016));
        assert!(date("2000-02-29 ").is_err());
        assert_eq!(time("24:00"), Ok(MICROS_PER_DAY));
        assert!(time("24:00:00.000001").is_err());
    }
}
