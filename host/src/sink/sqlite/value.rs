//! JSON values as SQLite keeps them, by the column's declared type.
//!
//! SQLite has five storage classes and converts between them by a column's affinity, where it may
//! round. What a conversion would change is refused here instead: a decimal that no double holds
//! does not fit a `numeric` column (declare `text` for those).
//!
//! Dates, times and UUIDs are checked and kept as text, as they were written; documents likewise.

use std::borrow::Cow;

use rusqlite::types::{ToSqlOutput, Value, ValueRef};

use crate::sink::rows::decimal::Decimal;
use crate::sink::rows::time::{self, Zone};
use crate::sink::rows::value::{self, Json, RawJson, Why};

/// How a column's values are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Integer,
    Real,
    /// A number as SQLite keeps it: an integer, or a double that shows the same digits.
    Numeric,
    Text,
    /// A document in a column whose affinity turns a bare number into a double.
    Json,
    /// A document in a column that keeps all text; SQLite reads `text` in its type's name.
    JsonText,
    Uuid,
    Date,
    Time,
    Timestamp,
    Timestamptz,
    Blob,
    /// No declared type, or one that says nothing: the value's own class.
    Any,
}

impl Kind {
    /// The kind of a declared type: by its name, else by SQLite's rules of affinity.
    pub(super) fn of(declared: &str) -> Self {
        let lower = declared.to_ascii_lowercase();
        let base = lower.split('(').next().unwrap_or_default().trim();
        match base {
            "bool" | "boolean" => Self::Bool,
            "json" | "jsonb" => Self::Json,
            "json_text" => Self::JsonText,
            "uuid" => Self::Uuid,
            "date" => Self::Date,
            "time" | "time without time zone" => Self::Time,
            "timestamp" | "datetime" | "timestamp without time zone" => Self::Timestamp,
            "timestamptz" | "timestamp with time zone" => Self::Timestamptz,
            "bytea" | "blob" => Self::Blob,
            "numeric" | "decimal" => Self::Numeric,
            "" | "any" => Self::Any,
            _ => Self::by_affinity(base),
        }
    }

    /// Source: sqlite.org/datatype3.html, 3.1, "Determination Of Column Affinity".
    fn by_affinity(declared: &str) -> Self {
        let has = |part| declared.contains(part);
        if has("int") {
            Self::Integer
        } else if has("char") || has("clob") || has("text") {
            Self::Text
        } else if has("blob") {
            Self::Blob
        } else if has("real") || has("floa") || has("doub") {
            Self::Real
        } else {
            Self::Any
        }
    }

    /// The type to create a column with, for one declared as this: a name of the affinity that
    /// keeps the values as they are.
    pub(super) fn created_as(self, declared: &str) -> &str {
        match self {
            Self::Json => "JSON_TEXT",
            Self::Blob => "BLOB",
            _ => declared,
        }
    }

    /// Whether a column of this kind holds every value that the declared kind may bring.
    pub(super) fn holds(self, declared: Self) -> bool {
        match self {
            Self::Any => true,
            Self::Text => !matches!(declared, Self::Blob | Self::Json | Self::JsonText),
            Self::Json | Self::JsonText => matches!(declared, Self::Json | Self::JsonText),
            Self::Numeric => matches!(declared, Self::Integer | Self::Real | Self::Numeric),
            Self::Real => matches!(declared, Self::Integer | Self::Real),
            Self::Timestamptz => matches!(declared, Self::Timestamp | Self::Timestamptz),
            _ => declared == self,
        }
    }
}

/// Reads a JSON value for a column.
pub(super) fn bound<'r>(kind: Kind, raw: RawJson<'r>) -> Result<ToSqlOutput<'r>, Why> {
    let json = Json::of(raw)?;
    if json == Json::Null {
        return Ok(ToSqlOutput::Owned(Value::Null));
    }
    let value = match kind {
        Kind::Bool => Value::Integer(value::boolean(&json)?.into()),
        Kind::Integer => Value::Integer(value::integer(&json)?),
        Kind::Real => Value::Real(not_nan(value::float64(&json)?)?),
        Kind::Numeric => number(&value::decimal(&json)?, raw.get())?,
        Kind::Blob => Value::Blob(value::bytes(&json)?),
        Kind::Uuid => Value::Text(value::uuid(&json)?.to_string()),
        Kind::Json => match json {
            Json::Number(text) => number(&value::decimal(&json)?, text)?,
            _ => return borrowed(value::document(raw)?),
        },
        Kind::JsonText => return borrowed(value::document(raw)?),
        Kind::Any => match json {
            Json::Bool(value) => Value::Integer(value.into()),
            Json::Number(text) => number(&value::decimal(&json)?, text)?,
            Json::Nested(_) => return borrowed(value::document(raw)?),
            Json::Null | Json::Text(_) => return text(json),
        },
        Kind::Text => return text(json),
        Kind::Date | Kind::Time | Kind::Timestamp | Kind::Timestamptz => {
            check_time(kind, value::time_text(&json)?)?;
            return text(json);
        }
    };
    Ok(ToSqlOutput::Owned(value))
}

fn borrowed(text: &str) -> Result<ToSqlOutput<'_>, Why> {
    Ok(ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())))
}

/// A text that SQLite can keep, borrowed where it can be.
fn text(json: Json<'_>) -> Result<ToSqlOutput<'_>, Why> {
    value::text(&json)?;
    match json {
        Json::Text(Cow::Borrowed(text)) | Json::Number(text) => borrowed(text),
        Json::Text(Cow::Owned(text)) => Ok(ToSqlOutput::Owned(Value::Text(text))),
        Json::Bool(value) => borrowed(if value { "true" } else { "false" }),
        Json::Null | Json::Nested(_) => Err("a string is due".into()),
    }
}

fn check_time(kind: Kind, text: &str) -> Result<(), Why> {
    match kind {
        Kind::Date => time::date(text).map(drop),
        Kind::Time => time::time(text).map(drop),
        Kind::Timestamp => time::timestamp(text, Zone::WallClock).map(drop),
        _ => time::timestamp(text, Zone::Instant).map(drop),
    }
}

/// SQLite keeps a NaN as NULL.
fn not_nan(value: f64) -> Result<f64, Why> {
    if value.is_nan() { Err("SQLite has no NaN".into()) } else { Ok(value) }
}

/// A number that SQLite keeps with all its digits.
fn number(decimal: &Decimal<'_>, written: &str) -> Result<Value, Why> {
    if let Some(integer) = decimal.to_i64() {
        return Ok(Value::Integer(integer));
    }
    let double: Option<f64> =
        written.trim_matches('"').parse().ok().filter(|d: &f64| d.is_finite());
    let shown = double.map(|double| format!("{double:e}"));
    match (double, shown.as_deref().and_then(Decimal::parse)) {
        (Some(double), Some(shown)) if shown.is_same_number(decimal) => Ok(Value::Real(double)),
        _ => Err("SQLite's numbers would round it; a column of type text keeps it".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;

    fn read(kind: Kind, json: &str) -> Result<Value, Why> {
        let raw: Box<RawValue> = serde_json::from_str(json).expect("JSON");
        bound(kind, (&*raw).into()).map(|bound| match bound {
            ToSqlOutput::Owned(value) => value,
            ToSqlOutput::Borrowed(value) => value.try_into().expect("a value"),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn numbers_keep_their_digits_or_are_refused() {
        assert_eq!(read(Kind::Numeric, "12.50"), Ok(Value::Real(12.5)));
        assert_eq!(read(Kind::Numeric, "\"0.1\""), Ok(Value::Real(0.1)));
        assert_eq!(read(Kind::Numeric, "1e3"), Ok(Value::Integer(1000)));
        assert_eq!(read(Kind::Any, "9223372036854775807"), Ok(Value::Integer(i64::MAX)));
        for json in ["9223372036854775809", "0.12345678901234567890", "1e400", "1e-400"] {
            assert!(read(Kind::Numeric, json).is_err(), "{json}");
        }
    }

    #[test]
    fn types_are_read_by_name_then_by_affinity() {
        for (declared, kind) in [
            ("BIGINT", Kind::Integer),
            ("varchar(20)", Kind::Text),
            ("double precision", Kind::Real),
            ("numeric(10, 2)", Kind::Numeric),
            ("timestamptz", Kind::Timestamptz),
            ("", Kind::Any),
            ("geometry", Kind::Any),
        ] {
            assert_eq!(Kind::of(declared), kind, "{declared}");
        }
    }

    #[test]
    fn texts_are_checked_and_kept_as_written() {
        let written = "2013-01-01T05:00:00.123456-05:00";
        let kept = read(Kind::Timestamptz, &format!("{written:?}"));
        assert_eq!(kept, Ok(Value::Text(written.into())));
        assert!(read(Kind::Date, "\"2013-02-30\"").is_err());
        assert!(read(Kind::Text, r#""a\u0000b""#).is_err());
        assert_eq!(read(Kind::Json, "{\"a\": 1.10}"), Ok(Value::Text("{\"a\": 1.10}".into())));
    }
}
