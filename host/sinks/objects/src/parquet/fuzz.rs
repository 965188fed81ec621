//! Fuzz target of the values in a Parquet file.

#![allow(
    missing_docs,
    reason = "shared with the fuzz targets alone; each name says what it is a case of"
)]
#![allow(clippy::expect_used, reason = "a finding is a panic")]

use super::{Cell, Kind, ParquetColumn};
use shardmill_sinks_common::fuzz::{FuzzColumn, Number, Type, Value};
use shardmill_sinks_common::rows::value::RawJson;

pub const COLUMNS: [FuzzColumn; 17] = [
    column("Parquet boolean", Type::Bool, |raw| read("boolean", raw)),
    column("Parquet smallint", Type::Integer(16), |raw| read("smallint", raw)),
    column("Parquet integer", Type::Integer(32), |raw| read("integer", raw)),
    column("Parquet bigint", Type::Integer(64), |raw| read("bigint", raw)),
    column("Parquet real", Type::Float32, |raw| read("real", raw)),
    column("Parquet double", Type::Float64, |raw| read("double precision", raw)),
    column("Parquet numeric", Type::NumberText, |raw| read("numeric", raw)),
    column("Parquet numeric(10, 2)", Type::Decimal(10, 2), |raw| read("numeric(10, 2)", raw)),
    column("Parquet numeric(38, 10)", Type::Decimal(38, 10), |raw| read("numeric(38, 10)", raw)),
    column("Parquet text", Type::Text, |raw| read("text", raw)),
    column("Parquet json", Type::Document, |raw| read("json", raw)),
    column("Parquet uuid", Type::Uuid, |raw| read("uuid", raw)),
    column("Parquet date", Type::Date, |raw| read("date", raw)),
    column("Parquet time", Type::TimeOfDay, |raw| read("time", raw)),
    column("Parquet timestamp", Type::Timestamp, |raw| read("timestamp", raw)),
    column("Parquet timestamptz", Type::Timestamptz, |raw| read("timestamptz", raw)),
    column("Parquet bytea", Type::Bytes, |raw| read("bytea", raw)),
];

const fn column(
    name: &'static str,
    values: Type,
    read: fn(RawJson<'_>) -> Option<Value>,
) -> FuzzColumn {
    FuzzColumn { name, values, read }
}

fn read(data_type: &str, raw: RawJson<'_>) -> Option<Value> {
    let kind = Kind::of(data_type).expect("a type");
    let column =
        ParquetColumn { name: "a".into(), data_type: data_type.into(), kind, nullable: true };
    let cell = column.cell(raw).ok()?;
    // The number times 10^scale as an integer, of 8 or 16 bytes.
    let decimal = |unscaled: i128| match kind {
        Kind::Decimal { scale, .. } => {
            let digits = unscaled.unsigned_abs().to_string();
            Value::Decimal(Number::of(unscaled < 0, &digits, -i64::from(scale)), scale.into())
        }
        _ => panic!("{kind:?} has no unit"),
    };
    Some(match (cell, kind) {
        (Cell::Null, _) => Value::Null,
        (Cell::Bool(value), Kind::Bool) => Value::Bool(value),
        (Cell::Int32(value), Kind::Int16 | Kind::Int32) => Value::Integer(value.into()),
        (Cell::Int32(value), Kind::Date) => Value::Days(value.into()),
        (Cell::Int64(value), Kind::Int64) => Value::Integer(value),
        (Cell::Int64(value), Kind::Time | Kind::Timestamp(_)) => Value::Micros(value),
        (Cell::Int64(value), Kind::Decimal { .. }) => decimal(value.into()),
        (Cell::Float(value), Kind::Float) => Value::float32(value),
        (Cell::Double(value), Kind::Double) => Value::float64(value),
        (Cell::Fixed(bytes), Kind::Decimal { .. }) => {
            decimal(i128::from_be_bytes(bytes.data().try_into().expect("16 bytes")))
        }
        (Cell::Fixed(bytes), Kind::Uuid) => Value::Bytes(bytes.data().to_vec()),
        (Cell::Bytes(bytes), Kind::Bytes) => Value::Bytes(bytes.data().to_vec()),
        (Cell::Bytes(bytes), Kind::Text | Kind::Json | Kind::Number) => {
            Value::Text(String::from_utf8(bytes.data().to_vec()).expect("UTF-8"))
        }
        (cell, kind) => panic!("{kind:?} has no {cell:?}"),
    })
}
