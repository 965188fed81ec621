//! Column types of Redshift that rows can fill, and their valid values.
//!
//! Source: Amazon Redshift Database Developer Guide, "Data types".

use std::io::Write as _;

use chrono::{DateTime, Datelike as _};

use shardmill_sinks_common::rows::decimal::Decimal;
use shardmill_sinks_common::rows::time;
use shardmill_sinks_common::rows::time::Zone;
use shardmill_sinks_common::rows::value;
use shardmill_sinks_common::rows::value::{Json, RawJson, Why};

/// Longest `varchar`, in bytes.
const VARCHAR_BYTES_MAX: usize = 65_535;
/// Longest `varbyte`, in bytes; also its default length.
const VARBYTE_BYTES: usize = 64_000;
/// Highest number of digits of a `numeric`.
const NUMERIC_DIGITS_MAX: u32 = 38;

/// Form of a column's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    /// Digits in all, and digits after the point.
    Numeric(u32, u32),
    /// Highest number of bytes.
    Varchar(usize),
    /// Highest number of bytes; only one-byte characters.
    Char(usize),
    Date,
    Time,
    Timestamp,
    Timestamptz,
    /// JSON document.
    Super,
    /// Highest number of bytes.
    Varbyte(usize),
    /// `geometry`, `interval`, `hllsketch` and others, which rows cannot fill yet.
    Unsupported,
}

impl Kind {
    /// Parses a type, as Redshift shows it or as a plugin's author wrote it.
    pub(super) fn of(written: &str) -> Self {
        let lower = written.trim().to_ascii_lowercase();
        let (name, rest) = lower.split_once('(').unwrap_or((&lower, ")"));
        let (numbers, suffix) = rest.split_once(')').unwrap_or((rest, ""));
        let mut numbers = numbers.split(',').map(|number| number.trim().parse::<u32>());
        let length = numbers.next().and_then(Result::ok);
        let scale = numbers.next().and_then(Result::ok).unwrap_or(0);
        let bytes = |default| length.map_or(default, |length| length as usize);
        // As in "time(6) without time zone".
        let name = [name.trim(), suffix.trim()].join(" ");
        match name.trim() {
            "bool" | "boolean" => Self::Bool,
            "smallint" | "int2" => Self::Int2,
            "integer" | "int" | "int4" => Self::Int4,
            "bigint" | "int8" => Self::Int8,
            "real" | "float4" => Self::Float4,
            "double precision" | "float8" | "float" => Self::Float8,
            "numeric" | "decimal" => match length {
                Some(digits @ 1..=NUMERIC_DIGITS_MAX) if scale <= digits => {
                    Self::Numeric(digits, scale)
                }
                // Without digits Redshift would use an integer of 18 digits, which nobody expects.
                _ => Self::Unsupported,
            },
            "text" => Self::Varchar(VARCHAR_BYTES_MAX),
            "character varying" | "varchar" | "nvarchar" | "bpchar" => {
                Self::Varchar(bytes(VARCHAR_BYTES_MAX))
            }
            "character" | "char" | "nchar" => Self::Char(bytes(1)),
            "uuid" => Self::Char(36),
            "date" => Self::Date,
            "time" | "time without time zone" => Self::Time,
            "timestamp" | "timestamp without time zone" => Self::Timestamp,
            "timestamptz" | "timestamp with time zone" => Self::Timestamptz,
            "super" | "json" | "jsonb" => Self::Super,
            "varbyte" | "binary varying" | "varbinary" | "bytea" => {
                Self::Varbyte(bytes(VARBYTE_BYTES))
            }
            _ => Self::Unsupported,
        }
    }

    /// Returns the type for a new column.
    pub(super) fn sql(self) -> String {
        match self {
            Self::Bool => "boolean".into(),
            Self::Int2 => "smallint".into(),
            Self::Int4 => "integer".into(),
            Self::Int8 => "bigint".into(),
            Self::Float4 => "real".into(),
            Self::Float8 => "double precision".into(),
            Self::Numeric(digits, scale) => format!("numeric({digits}, {scale})"),
            Self::Varchar(bytes) => format!("varchar({bytes})"),
            Self::Char(bytes) => format!("char({bytes})"),
            Self::Date => "date".into(),
            Self::Time => "time".into(),
            Self::Timestamp => "timestamp".into(),
            Self::Timestamptz => "timestamptz".into(),
            Self::Super => "super".into(),
            Self::Varbyte(bytes) => format!("varbyte({bytes})"),
            Self::Unsupported => "unsupported".into(),
        }
    }

    /// Whether a column of this kind suits the declared kind. A value that is too long, or has too many digits, is an
    /// error of its row.
    pub(super) fn accepts(self, declared: Self) -> bool {
        let is_integer = |kind| matches!(kind, Self::Int2 | Self::Int4 | Self::Int8);
        match self {
            Self::Int2 => declared == Self::Int2,
            Self::Int4 => matches!(declared, Self::Int2 | Self::Int4),
            Self::Int8 => is_integer(declared),
            Self::Float4 => matches!(declared, Self::Int2 | Self::Float4),
            Self::Float8 => {
                matches!(declared, Self::Int2 | Self::Int4 | Self::Float4 | Self::Float8)
            }
            Self::Numeric(digits, scale) => match declared {
                Self::Numeric(more, more_scale) => {
                    more_scale <= scale
                        && more.saturating_sub(more_scale) <= digits.saturating_sub(scale)
                }
                _ => is_integer(declared),
            },
            Self::Varchar(_) | Self::Char(_) => {
                !matches!(declared, Self::Super | Self::Varbyte(_) | Self::Unsupported)
            }
            Self::Timestamptz => matches!(declared, Self::Timestamp | Self::Timestamptz),
            Self::Varbyte(_) => matches!(declared, Self::Varbyte(_)),
            Self::Unsupported => false,
            Self::Bool | Self::Date | Self::Time | Self::Timestamp | Self::Super => {
                declared == self
            }
        }
    }

    /// Appends a value to a line of JSON, in the form that COPY reads for this type.
    ///
    /// # Errors
    /// The reason why the column does not accept the value.
    pub(super) fn put(self, out: &mut Vec<u8>, raw: RawJson<'_>) -> Result<(), Why> {
        let json = Json::of(raw)?;
        if json == Json::Null {
            out.extend(b"null");
            return Ok(());
        }
        match self {
            Self::Bool => {
                let word: &[u8] = if value::boolean(&json)? { b"true" } else { b"false" };
                out.extend(word);
            }
            Self::Int2 => put_number(out, value::integer::<i16>(&json)?),
            Self::Int4 => put_number(out, value::integer::<i32>(&json)?),
            Self::Int8 => put_number(out, value::integer::<i64>(&json)?),
            Self::Float4 => put_float(out, value::float32(&json)?.into()),
            Self::Float8 => put_float(out, value::float64(&json)?),
            Self::Numeric(digits, scale) => {
                let decimal = value::decimal(&json)?;
                put_number(out, plain(&decimal, digits, scale)?);
            }
            Self::Varchar(bytes_max) => {
                put_text(out, at_most(value::text(&json)?, bytes_max)?);
            }
            Self::Char(bytes_max) => {
                let text = at_most(value::text(&json)?, bytes_max)?;
                if !text.is_ascii() {
                    return Err(
                        "expected one-byte characters, which a column of type char needs".into()
                    );
                }
                put_text(out, text);
            }
            Self::Date => {
                let days = time::date(value::time_text(&json)?)?;
                put_text(out, &moment(i64::from(days) * MICROS_PER_DAY, "%Y-%m-%d")?);
            }
            Self::Time => {
                let micros = time::time(value::time_text(&json)?)?;
                put_text(out, &clock(micros));
            }
            Self::Timestamp => {
                let micros = time::timestamp(value::time_text(&json)?, Zone::WallClock)?;
                put_text(out, &moment(micros, "%Y-%m-%d %H:%M:%S%.6f")?);
            }
            Self::Timestamptz => {
                let micros = time::timestamp(value::time_text(&json)?, Zone::Instant)?;
                put_text(out, &moment(micros, "%Y-%m-%d %H:%M:%S%.6f+00")?);
            }
            Self::Super => out.extend(value::document(raw)?.as_bytes()),
            Self::Varbyte(bytes_max) => {
                let bytes = value::bytes(&json)?;
                if bytes.len() > bytes_max {
                    return Err(too_long(bytes.len(), bytes_max));
                }
                put_text(out, &hex::encode(bytes));
            }
            Self::Unsupported => return Err("unsupported column type".into()),
        }
        Ok(())
    }
}

const MICROS_PER_DAY: i64 = 86_400_000_000;

fn put_number(out: &mut Vec<u8>, number: impl std::fmt::Display) {
    // Writing into a Vec cannot fail.
    let _infallible = write!(out, "{number}");
}

fn put_float(out: &mut Vec<u8>, number: f64) {
    match number.is_finite() {
        true => put_number(out, number),
        false if number.is_nan() => put_text(out, "NaN"),
        false if number > 0.0 => put_text(out, "Infinity"),
        false => put_text(out, "-Infinity"),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Writing a string into a Vec cannot fail.
    let _infallible = serde_json::to_writer(out, text);
}

fn at_most(text: &str, bytes_max: usize) -> Result<&str, Why> {
    if text.len() <= bytes_max { Ok(text) } else { Err(too_long(text.len(), bytes_max)) }
}

fn too_long(bytes: usize, bytes_max: usize) -> Why {
    format!("expected at most {bytes_max} bytes, found {bytes} bytes").into()
}

/// Formats a number without exponent, with all digits after the point. COPY would silently cut digits off.
fn plain(decimal: &Decimal<'_>, digits: u32, scale: u32) -> Result<String, Why> {
    let misfit = || {
        let whole = digits.saturating_sub(scale);
        format!("expected at most {whole} digits before the point and {scale} after it").into()
    };
    let unscaled = decimal.to_unscaled(scale).ok_or_else(misfit)?;
    let magnitude = unscaled.unsigned_abs();
    if magnitude >= 10_u128.pow(digits) {
        return Err(misfit());
    }
    let sign = if unscaled < 0 { "-" } else { "" };
    let one = 10_u128.pow(scale);
    let (whole, fraction) = (magnitude / one, magnitude % one);
    Ok(match scale {
        0 => format!("{sign}{whole}"),
        _ => format!("{sign}{whole}.{fraction:0width$}", width = scale as usize),
    })
}

/// Formats a time of day. The end of the day is 24:00.
fn clock(micros: i64) -> String {
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{fraction:06}", seconds % 60)
}

/// Formats a time in microseconds since 1970. Years were parsed as 1 to 9999, but an offset may have moved the time out
/// of that range, where the text has more digits than COPY reads.
fn moment(micros: i64, form: &str) -> Result<String, Why> {
    let moment = DateTime::from_timestamp_micros(micros);
    let moment = moment.filter(|moment| (1..=9999).contains(&moment.year()));
    let moment = moment.ok_or("the year in UTC is out of range: expected 0001 to 9999")?;
    Ok(moment.format(form).to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;

    fn put(kind: Kind, json: &str) -> Result<String, String> {
        let raw: Box<RawValue> = serde_json::from_str(json).expect("JSON");
        let mut out = Vec::new();
        kind.put(&mut out, (&*raw).into()).map_err(|why| why.into_owned())?;
        Ok(String::from_utf8(out).expect("UTF-8"))
    }

    #[test]
    fn types_are_read_as_shown_and_as_written() {
        for (written, kind) in [
            ("character varying(256)", Kind::Varchar(256)),
            ("Text", Kind::Varchar(65_535)),
            ("uuid", Kind::Char(36)),
            ("numeric(10,2)", Kind::Numeric(10, 2)),
            ("decimal( 38 )", Kind::Numeric(38, 0)),
            ("numeric", Kind::Unsupported),
            ("numeric(39,2)", Kind::Unsupported),
            ("timestamp(6) without time zone", Kind::Timestamp),
            ("timestamp with time zone", Kind::Timestamptz),
            ("jsonb", Kind::Super),
            ("binary varying(1024)", Kind::Varbyte(1024)),
            ("interval", Kind::Unsupported),
        ] {
            assert_eq!(Kind::of(written), kind, "{written}");
            if kind != Kind::Unsupported {
                assert_eq!(Kind::of(&kind.sql()), kind, "{written}");
            }
        }
    }

    #[test]
    fn values_become_what_copy_reads() {
        for (kind, json, expected) in [
            (Kind::Int8, "\"9007199254740993\"", "9007199254740993"),
            (Kind::Numeric(10, 2), "12.5", "12.50"),
            (Kind::Numeric(10, 2), "-0.05", "-0.05"),
            (Kind::Numeric(10, 0), "1e3", "1000"),
            (Kind::Float8, "\"NaN\"", "\"NaN\""),
            (Kind::Varchar(4), "\"a\\\"\\u00e9\"", "\"a\\\"é\""),
            (Kind::Date, "\"2013-02-28\"", "\"2013-02-28\""),
            (Kind::Time, "\"23:59:59.5\"", "\"23:59:59.500000\""),
            (
                Kind::Timestamptz,
                "\"2013-01-01T05:00:00.123456-05:00\"",
                "\"2013-01-01 10:00:00.123456+00\"",
            ),
            (Kind::Time, "\"24:00\"", "\"24:00:00.000000\""),
            (Kind::Time, "\"23:59:60\"", "\"24:00:00.000000\""),
            (Kind::Super, "{\"a\": [1.10]}", "{\"a\": [1.10]}"),
            (Kind::Varbyte(3), "\"AQL/\"", "\"0102ff\""),
            (Kind::Bool, "null", "null"),
        ] {
            assert_eq!(put(kind, json).as_deref(), Ok(expected), "{kind:?} {json}");
        }
    }

    #[test]
    fn what_copy_would_change_is_refused() {
        for (kind, json, part) in [
            (Kind::Int2, "40000", "out of range"),
            (Kind::Numeric(4, 2), "100", "2 digits before the point"),
            (Kind::Numeric(4, 2), "1.005", "2 after it"),
            (Kind::Varchar(3), "\"éé\"", "4 bytes"),
            (Kind::Char(3), "\"é\"", "one-byte"),
            (Kind::Varchar(3), "\"a\\u0000\"", "U+0000"),
            (Kind::Date, "\"2013-02-30\"", "date"),
            (Kind::Varbyte(1), "\"AQL/\"", "3 bytes"),
            (Kind::Timestamptz, "\"9999-12-31T23:59:59-01:00\"", "out of range"),
            (Kind::Timestamptz, "\"0001-01-01T00:00:00+01:00\"", "out of range"),
            (Kind::Timestamp, "\"9999-12-31T24:00:00\"", "out of range"),
        ] {
            let why = put(kind, json).expect_err(json);
            assert!(why.contains(part), "{kind:?} {json}: {why}");
        }
    }
}
