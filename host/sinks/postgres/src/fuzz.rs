//! Reads values back from PostgreSQL's binary form, like the server's `…_recv` functions.

#![allow(
    missing_docs,
    reason = "shared with the fuzz targets alone; each name says what it is a case of"
)]
#![allow(clippy::expect_used, reason = "a finding is a panic")]

use tokio_postgres::types::Type as ServerType;

use super::encode::put_field;
use super::kind::{EPOCH_MICROS, Element, Kind};
use shardmill_sinks_common::fuzz::{FuzzColumn, Number, Type, Value};
use shardmill_sinks_common::rows::value::RawJson;

pub const COLUMNS: [FuzzColumn; 21] = [
    column("PostgreSQL bool", Type::Bool, |raw| read(Kind::Bool, raw)),
    column("PostgreSQL int2", Type::Integer(16), |raw| read(Kind::Int2, raw)),
    column("PostgreSQL int4", Type::Integer(32), |raw| read(Kind::Int4, raw)),
    column("PostgreSQL int8", Type::Integer(64), |raw| read(Kind::Int8, raw)),
    column("PostgreSQL float4", Type::Float32, |raw| read(Kind::Float4, raw)),
    column("PostgreSQL float8", Type::Float64, |raw| read(Kind::Float8, raw)),
    column("PostgreSQL numeric", Type::Numeric, |raw| read(Kind::Numeric, raw)),
    column("PostgreSQL text", Type::Text, |raw| read(Kind::Text, raw)),
    column("PostgreSQL name", Type::BoundedText(63, false), |raw| read(Kind::Name, raw)),
    column("PostgreSQL json", Type::Document, |raw| read(Kind::Json, raw)),
    column("PostgreSQL jsonb", Type::Document, |raw| read(Kind::Jsonb, raw)),
    column("PostgreSQL uuid", Type::Uuid, |raw| read(Kind::Uuid, raw)),
    column("PostgreSQL date", Type::Date, |raw| read(Kind::Date, raw)),
    column("PostgreSQL time", Type::Time, |raw| read(Kind::Time, raw)),
    column("PostgreSQL timestamp", Type::Timestamp, |raw| read(Kind::Timestamp, raw)),
    column("PostgreSQL timestamptz", Type::Timestamptz, |raw| read(Kind::Timestamptz, raw)),
    column("PostgreSQL bytea", Type::Bytes, |raw| read(Kind::Bytea, raw)),
    column("PostgreSQL int4[]", Type::Array(&Type::Integer(32)), |raw| {
        read_array(ServerType::INT4, raw)
    }),
    column("PostgreSQL text[]", Type::Array(&Type::Text), |raw| read_array(ServerType::TEXT, raw)),
    column("PostgreSQL numeric[]", Type::Array(&Type::Numeric), |raw| {
        read_array(ServerType::NUMERIC, raw)
    }),
    column("PostgreSQL jsonb[]", Type::Array(&Type::Document), |raw| {
        read_array(ServerType::JSONB, raw)
    }),
];

const fn column(
    name: &'static str,
    values: Type,
    read: fn(RawJson<'_>) -> Option<Value>,
) -> FuzzColumn {
    FuzzColumn { name, values, read }
}

fn read_array(element: ServerType, raw: RawJson<'_>) -> Option<Value> {
    read(Kind::Array(Element::known(element.oid())), raw)
}

fn read(kind: Kind, raw: RawJson<'_>) -> Option<Value> {
    let mut wire = Vec::new();
    put_field(&mut wire, kind, raw).ok()?;
    let mut wire = Wire(&wire);
    let value = wire.field(kind);
    assert!(wire.0.is_empty(), "{} bytes follow the field", wire.0.len());
    Some(value)
}

/// Rest of a message.
struct Wire<'w>(&'w [u8]);

impl<'w> Wire<'w> {
    fn bytes(&mut self, length: usize) -> &'w [u8] {
        let (taken, rest) = self.0.split_at_checked(length).expect("the message is complete");
        self.0 = rest;
        taken
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("as many bytes")
    }

    fn int4(&mut self) -> i32 {
        i32::from_be_bytes(self.number())
    }

    /// Reads a length and a field, which must hold the value and nothing else.
    fn field(&mut self, kind: Kind) -> Value {
        let length = self.int4();
        if length == -1 {
            return Value::Null;
        }
        let mut field = Wire(self.bytes(usize::try_from(length).expect("a length")));
        let value = field.value(kind);
        assert!(field.0.is_empty(), "{} bytes follow the value", field.0.len());
        value
    }

    fn value(&mut self, kind: Kind) -> Value {
        match kind {
            Kind::Bool => match self.number::<1>() {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => panic!("not a boolean: {other}"),
            },
            Kind::Int2 => Value::Integer(i16::from_be_bytes(self.number()).into()),
            Kind::Int4 => Value::Integer(self.int4().into()),
            Kind::Int8 => Value::Integer(i64::from_be_bytes(self.number())),
            Kind::Float4 => Value::float32(f32::from_be_bytes(self.number())),
            Kind::Float8 => Value::float64(f64::from_be_bytes(self.number())),
            Kind::Numeric => self.numeric(),
            Kind::Text | Kind::Name | Kind::Enum | Kind::Json => self.text(),
            Kind::Jsonb => {
                assert_eq!(self.number(), [1], "the version of jsonb");
                self.text()
            }
            Kind::Uuid | Kind::Bytea => Value::Bytes(self.rest().to_vec()),
            Kind::Date => Value::Days(i64::from(self.int4()) + EPOCH_MICROS / 86_400_000_000),
            Kind::Time => Value::Micros(i64::from_be_bytes(self.number())),
            Kind::Timestamp | Kind::Timestamptz => {
                Value::Micros(i64::from_be_bytes(self.number()) + EPOCH_MICROS)
            }
            Kind::Array(element) => self.array(element),
            Kind::Unsupported => panic!("no value of an unsupported type is written"),
        }
    }

    fn rest(&mut self) -> &'w [u8] {
        std::mem::take(&mut self.0)
    }

    fn text(&mut self) -> Value {
        Value::Text(String::from_utf8(self.rest().to_vec()).expect("UTF-8"))
    }

    /// Reads a number like `numeric_recv`.
    fn numeric(&mut self) -> Value {
        let [count, weight, sign, scale] =
            [(); 4].map(|()| i64::from(i16::from_be_bytes(self.number())));
        let names = [(-0x4000, "NaN"), (-0x3000, "Infinity"), (-0x1000, "-Infinity")];
        if let Some((_, name)) = names.into_iter().find(|(wire, _)| *wire == sign) {
            assert_eq!((count, weight, scale), (0, 0, 0));
            return Value::NotFinite(name);
        }
        assert!([0, 0x4000].contains(&sign) && (0..=16_383).contains(&scale), "{sign} {scale}");
        let groups: Vec<i16> = (0..count).map(|_| i16::from_be_bytes(self.number())).collect();
        assert!(groups.iter().all(|group| (0..10_000).contains(group)), "{groups:?}");
        let digits: String = groups.iter().map(|group| format!("{group:04}")).collect();
        let exponent = (weight + 1 - count) * 4;
        Value::Decimal(Number::of(sign != 0, &digits, exponent), scale)
    }

    /// Reads an array like `array_recv`.
    fn array(&mut self, element: Element) -> Value {
        let (dimensions, has_nulls) = (self.int4(), self.int4());
        assert_eq!(u32::from_be_bytes(self.number()), element.oid);
        let lengths: Vec<usize> = (0..dimensions)
            .map(|_| {
                let length = self.int4();
                assert_eq!(self.int4(), 1, "the first index");
                usize::try_from(length).expect("a length")
            })
            .collect();
        let count = if lengths.is_empty() { 0 } else { lengths.iter().product() };
        let elements: Vec<Value> = (0..count).map(|_| self.field(element.kind())).collect();
        assert_eq!(has_nulls == 1, elements.contains(&Value::Null));
        Value::Array(lengths, elements)
    }
}
