//! Fuzz target of the values that are bound for SQLite.

#![allow(
    missing_docs,
    reason = "shared with the fuzz targets alone; each name says what it is a case of"
)]
#![allow(clippy::expect_used, reason = "a finding is a panic")]

use rusqlite::types::{ToSqlOutput, Value as Stored};

use super::value::{ColumnType, bound};
use shardmill_sinks_common::fuzz::{FuzzColumn, Type, Value};
use shardmill_sinks_common::rows::value::RawJson;

pub const COLUMNS: [FuzzColumn; 14] = [
    column("SQLite boolean", Type::AsNumber(&Type::Bool), |raw| read("boolean", raw)),
    column("SQLite integer", Type::Integer(64), |raw| read("integer", raw)),
    column("SQLite real", Type::SqliteReal, |raw| read("real", raw)),
    column("SQLite numeric", Type::SqliteNumeric, |raw| read("numeric", raw)),
    column("SQLite text", Type::Text, |raw| read("text", raw)),
    column("SQLite json_text", Type::Document, |raw| read("json_text", raw)),
    column("SQLite json", Type::SqliteJson, |raw| read("json", raw)),
    column("SQLite uuid", Type::Uuid, read_uuid),
    column("SQLite date", Type::AsWritten(&Type::Date), |raw| read("date", raw)),
    column("SQLite time", Type::AsWritten(&Type::Time), |raw| read("time", raw)),
    column("SQLite timestamp", Type::AsWritten(&Type::Timestamp), |raw| read("timestamp", raw)),
    column("SQLite timestamptz", Type::AsWritten(&Type::Timestamptz), |raw| {
        read("timestamptz", raw)
    }),
    column("SQLite blob", Type::Bytes, |raw| read("blob", raw)),
    column("SQLite without a type", Type::SqliteAny, |raw| read("", raw)),
];

const fn column(
    name: &'static str,
    values: Type,
    read: fn(RawJson<'_>) -> Option<Value>,
) -> FuzzColumn {
    FuzzColumn { name, values, read }
}

fn read(declared: &str, raw: RawJson<'_>) -> Option<Value> {
    let stored = match bound(ColumnType::of(declared, false), raw).ok()? {
        ToSqlOutput::Owned(stored) => stored,
        ToSqlOutput::Borrowed(stored) => stored.try_into().expect("a value"),
        other => panic!("{other:?}"),
    };
    Some(match stored {
        Stored::Null => Value::Null,
        Stored::Integer(integer) => Value::Integer(integer),
        Stored::Real(double) => Value::float64(double),
        Stored::Text(text) => Value::Text(text),
        Stored::Blob(bytes) => Value::Bytes(bytes),
    })
}

/// Reads a UUID, which is stored in one form only: otherwise equal ones would not compare equal.
fn read_uuid(raw: RawJson<'_>) -> Option<Value> {
    match read("uuid", raw)? {
        Value::Text(text) => {
            assert!(text.len() == 36 && text.to_lowercase() == text, "{text}");
            Some(Value::Bytes(hex::decode(text.replace('-', "")).expect("digits")))
        }
        other => Some(other),
    }
}
