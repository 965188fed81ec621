//! Reads values back from the JSON that Redshift's COPY gets.

#![allow(
    missing_docs,
    reason = "shared with the fuzz targets alone; each name says what it is a case of"
)]
#![allow(clippy::expect_used, reason = "a finding is a panic")]

use super::kind::Kind;
use shardmill_sinks_common::fuzz::{FuzzColumn, Number, Type, Value, clock};
use shardmill_sinks_common::rows::value::RawJson;

pub const COLUMNS: [FuzzColumn; 15] = [
    column("Redshift boolean", Type::Bool, |raw| read(Kind::Bool, raw)),
    column("Redshift smallint", Type::Integer(16), |raw| read(Kind::Int2, raw)),
    column("Redshift integer", Type::Integer(32), |raw| read(Kind::Int4, raw)),
    column("Redshift bigint", Type::Integer(64), |raw| read(Kind::Int8, raw)),
    column("Redshift real", Type::Float32, |raw| read(Kind::Float4, raw)),
    column("Redshift double precision", Type::Float64, |raw| read(Kind::Float8, raw)),
    column("Redshift numeric(10, 2)", Type::Decimal(10, 2), |raw| read(Kind::Numeric(10, 2), raw)),
    column("Redshift numeric(38, 38)", Type::Decimal(38, 38), |raw| {
        read(Kind::Numeric(38, 38), raw)
    }),
    column("Redshift varchar(5)", Type::BoundedText(5, false), |raw| read(Kind::Varchar(5), raw)),
    column("Redshift char(5)", Type::BoundedText(5, true), |raw| read(Kind::Char(5), raw)),
    column("Redshift date", Type::Date, |raw| read(Kind::Date, raw)),
    column("Redshift time", Type::Time, |raw| read(Kind::Time, raw)),
    column("Redshift timestamp", Type::YearsOf(&Type::Timestamp), |raw| read(Kind::Timestamp, raw)),
    column("Redshift timestamptz", Type::YearsOf(&Type::Timestamptz), |raw| {
        read(Kind::Timestamptz, raw)
    }),
    column("Redshift super", Type::Document, |raw| read(Kind::Super, raw)),
];

const fn column(
    name: &'static str,
    values: Type,
    read: fn(RawJson<'_>) -> Option<Value>,
) -> FuzzColumn {
    FuzzColumn { name, values, read }
}

fn read(kind: Kind, raw: RawJson<'_>) -> Option<Value> {
    let mut out = Vec::new();
    kind.put(&mut out, raw).ok()?;
    let json = String::from_utf8(out).expect("UTF-8");
    if json == "null" {
        return Some(Value::Null);
    }
    let text = || -> String { serde_json::from_str(&json).expect("a JSON string") };
    // COPY accepts only these forms: `dateformat 'auto'` would guess.
    let moment = |end: &str| -> i64 {
        let text = text();
        let text = text.strip_suffix(end).expect("the end");
        assert_eq!(text.len(), "2013-01-31 23:59:59.123456".len(), "{text}");
        clock::timestamp(text).expect("a timestamp").0
    };
    Some(match kind {
        Kind::Bool => Value::Bool(json.parse().expect("a truth value")),
        Kind::Int2 | Kind::Int4 | Kind::Int8 => Value::Integer(json.parse().expect("an integer")),
        Kind::Float4 => Value::float32(double(&json) as f32),
        Kind::Float8 => Value::float64(double(&json)),
        Kind::Numeric(_, scale) => {
            let (number, shown) = Number::read(&json).expect("a number");
            assert!(!json.contains(['e', 'E']), "{json}");
            assert_eq!(shown, i64::from(scale), "{json}");
            Value::Decimal(number, shown)
        }
        Kind::Varchar(_) | Kind::Char(_) => Value::Text(text()),
        Kind::Date => Value::Days(clock::date(&text()).expect("a date")),
        Kind::Time => Value::Micros(clock::time(&text()).expect("a time")),
        Kind::Timestamp => Value::Micros(moment("")),
        Kind::Timestamptz => Value::Micros(moment("+00")),
        Kind::Super => Value::Text(json),
        Kind::Varbyte(_) => Value::Bytes(hex::decode(text()).expect("digits")),
        Kind::Unsupported => panic!("no value of an unsupported type is written"),
    })
}

fn double(json: &str) -> f64 {
    match json {
        "\"NaN\"" => f64::NAN,
        "\"Infinity\"" => f64::INFINITY,
        "\"-Infinity\"" => f64::NEG_INFINITY,
        number => number.parse().expect("a number"),
    }
}
