//! Column types that rows can fill, grouped by their wire form.

use tokio_postgres::types::{Oid, Type};
use tokio_postgres::{Error, Row};

/// Microseconds from 1970-01-01 to 2000-01-01, the epoch of PostgreSQL's timestamps.
pub(super) const EPOCH_MICROS: i64 = 946_684_800_000_000;

/// Wire form of a column's values.
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
    /// Enum: its binary form is its label.
    Enum,
    Json,
    Jsonb,
    Uuid,
    Date,
    Time,
    Timestamp,
    Timestamptz,
    Bytea,
    /// Array of any depth.
    Array(Element),
    /// Ranges, `inet`, `interval` and others, which rows cannot fill yet.
    Unsupported,
}

/// Element type of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Element {
    /// Type that the wire form of an array names.
    pub(super) oid: Oid,
    form: ElementForm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ElementForm {
    /// Form of a built-in type; for a domain, of its base type.
    Known(Oid),
    Enum,
    Text,
}

impl Element {
    /// Makes an element of a built-in type.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn known(oid: Oid) -> Self {
        Self { oid, form: ElementForm::Known(oid) }
    }

    /// Returns the form of each element.
    pub(super) fn kind(self) -> Kind {
        match self.form {
            ElementForm::Known(oid) => Kind::of(oid, "", false),
            ElementForm::Enum => Kind::Enum,
            ElementForm::Text => Kind::Text,
        }
    }
}

/// Columns that [`Kind::read`] needs, selected `FROM` [`FROM_TYPE`].
pub(super) const TYPE_COLUMNS: &str =
    "b.oid, b.typname, b.typtype = 'e', e.oid, eb.oid, eb.typname, eb.typtype = 'e'";
/// Number of these columns.
pub(super) const TYPE_COLUMN_COUNT: usize = 7;

/// SQL expression for the base type of a type. A domain may be based on a domain.
macro_rules! base_type {
    ($of:literal) => {
        concat!(
            "CASE ",
            $of,
            ".typtype WHEN 'd' THEN (\
             WITH RECURSIVE below (oid, typtype, typbasetype) AS ( \
                 SELECT d.oid, d.typtype, d.typbasetype FROM pg_catalog.pg_type AS d \
                 WHERE d.oid = ",
            $of,
            ".typbasetype \
                 UNION ALL \
                 SELECT d.oid, d.typtype, d.typbasetype FROM below \
                 JOIN pg_catalog.pg_type AS d ON below.typtype = 'd' AND d.oid = below.typbasetype) \
             SELECT below.oid FROM below WHERE below.typtype <> 'd') ELSE ",
            $of,
            ".oid END"
        )
    };
}

/// Joins to a type `t`: its base type if it is a domain, and the element type of an array, also as its base type.
pub(super) const FROM_TYPE: &str = concat!(
    " LEFT JOIN pg_catalog.pg_type AS b ON b.oid = ",
    base_type!("t"),
    " LEFT JOIN pg_catalog.pg_type AS e ON e.oid = b.typelem AND e.typarray = b.oid \
     LEFT JOIN pg_catalog.pg_type AS eb ON eb.oid = ",
    base_type!("e")
);

impl Kind {
    /// Reads the kind of a type from [`TYPE_COLUMNS`], which begin at column `at`.
    pub(super) fn read(row: &Row, at: usize) -> Result<Self, Error> {
        let Some(element) = row.try_get::<_, Option<u32>>(at + 3)? else {
            return Ok(Self::of(row.try_get(at)?, row.try_get(at + 1)?, row.try_get(at + 2)?));
        };
        let base = row.try_get(at + 4)?;
        let form = match Self::of(base, row.try_get(at + 5)?, row.try_get(at + 6)?) {
            Self::Unsupported => return Ok(Self::Unsupported),
            Self::Enum => ElementForm::Enum,
            Self::Text => ElementForm::Text,
            _ => ElementForm::Known(base),
        };
        Ok(Self::Array(Element { oid: element, form }))
    }

    /// Returns the kind of a type that is not an array. For a domain, its base type is given.
    fn of(oid: u32, name: &str, is_enum: bool) -> Self {
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
            _ => Self::Unsupported,
        }
    }

    /// Whether a column of this kind can store every value of the declared kind.
    pub(super) fn accepts(self, declared: Self) -> bool {
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
            // A text column stores any text. JSON and bytes are refused: their values are encoded in forms of their
            // own (`encode.rs`).
            Self::Text => {
                let needs_form = matches!(declared, Self::Json | Self::Jsonb | Self::Bytea);
                !needs_form && !matches!(declared, Self::Array(_) | Self::Unsupported)
            }
            Self::Name | Self::Enum => matches!(declared, Self::Text | Self::Name | Self::Enum),
            Self::Json | Self::Jsonb => matches!(declared, Self::Json | Self::Jsonb),
            Self::Timestamptz => matches!(declared, Self::Timestamp | Self::Timestamptz),
            Self::Array(element) => match declared {
                Self::Array(other) => element.kind().accepts(other.kind()),
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
