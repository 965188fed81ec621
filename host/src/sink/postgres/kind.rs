//! The column types that rows can fill, as families that share a wire form.

use tokio_postgres::types::{Kind as TypeKind, Oid, Type};

/// How a column's values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    Numeric,
    /// `text`, `varchar`, `char(n)`, `citext`.
    Text,
    /// `name`: text of at most 63 bytes.
    Name,
    /// An enum: its binary form is its label.
    Enum,
    Json,
    Jsonb,
    Uuid,
    Date,
    Time,
    Timestamp,
    Timestamptz,
    Bytea,
    /// An array of any depth, by its elements' type; of enums and domains, none can be filled yet.
    Array(Oid),
    /// Ranges, `inet`, `interval` and the rest: no row can fill it yet.
    Unsupported,
}

impl Kind {
    /// The family of a type, a domain's base type standing for the domain.
    pub(super) fn of(oid: u32, name: &str, is_enum: bool) -> Self {
        match Type::from_oid(oid) {
            Some(Type::BOOL) => Self::Bool,
            Some(Type::INT2) => Self::Int2,
            Some(Type::INT4) => Self::Int4,
            Some(Type::INT8) => Self::Int8,
            Some(Type::FLOAT4) => Self::Float4,
            Some(Type::FLOAT8) => Self::Float8,
            Some(Type::NUMERIC) => Self::Numeric,
            Some(Type::TEXT | Type::VARCHAR | Type::BPCHAR) => Self::Text,
            Some(Type::NAME) => Self::Name,
            Some(Type::JSON) => Self::Json,
            Some(Type::JSONB) => Self::Jsonb,
            Some(Type::UUID) => Self::Uuid,
            Some(Type::DATE) => Self::Date,
            Some(Type::TIME) => Self::Time,
            Some(Type::TIMESTAMP) => Self::Timestamp,
            Some(Type::TIMESTAMPTZ) => Self::Timestamptz,
            Some(Type::BYTEA) => Self::Bytea,
            None if is_enum => Self::Enum,
            None if name == "citext" => Self::Text,
            Some(array) => match array.kind() {
                TypeKind::Array(element) => match Self::of(element.oid(), "", false) {
                    Self::Unsupported => Self::Unsupported,
                    _ => Self::Array(element.oid()),
                },
                _ => Self::Unsupported,
            },
            None => Self::Unsupported,
        }
    }

    /// Whether a column of this kind holds every value that the declared kind may bring.
    pub(super) fn holds(self, declared: Self) -> bool {
        match self {
            Self::Int4 => matches!(declared, Self::Int2 | Self::Int4),
            Self::Int8 => matches!(declared, Self::Int2 | Self::Int4 | Self::Int8),
            Self::Numeric => matches!(
                declared,
                Self::Int2 | Self::Int4 | Self::Int8 | Self::Float4 | Self::Float8 | Self::Numeric
            ),
            Self::Float8 => {
                matches!(declared, Self::Int2 | Self::Int4 | Self::Float4 | Self::Float8)
            }
            Self::Float4 => matches!(declared, Self::Int2 | Self::Float4),
            // A text keeps what is written; which texts an enum or a name takes, only a row shows.
            Self::Text => {
                let needs_form = matches!(declared, Self::Json | Self::Jsonb | Self::Bytea);
                !needs_form && !matches!(declared, Self::Array(_) | Self::Unsupported)
            }
            Self::Name | Self::Enum => matches!(declared, Self::Text | Self::Name | Self::Enum),
            Self::Json | Self::Jsonb => matches!(declared, Self::Json | Self::Jsonb),
            Self::Timestamptz => matches!(declared, Self::Timestamp | Self::Timestamptz),
            Self::Array(element) => match declared {
                Self::Array(other) => {
                    Self::of(element, "", false).holds(Self::of(other, "", false))
                }
                _ => false,
            },
            Self::Unsupported => false,
            Self::Bool
            | Self::Int2
            | Self::Uuid
            | Self::Date
            | Self::Time
            | Self::Timestamp
            | Self::Bytea => declared == self,
        }
    }
}
