//! Encodes rows as a Parquet file: one row group, with the columns that the route declares.
//!
//! Values are read as for a SQL table: exactly, or only that row is refused. This uses the crate's column writers
//! without Arrow, which would double the build time without a benefit here.
//!
//! Source of the types: Parquet format specification, "LogicalTypes.md".

use std::io;
use std::sync::Arc;

use parquet::basic::{
    Compression as Codec, LogicalType, Repetition, TimeUnit, Type as Physical, ZstdLevel,
};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::{ByteArray, FixedLenByteArray};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;

use super::settings::Compression;
use shardmill_core::record::Column;
use shardmill_sinks_common::rows;
use shardmill_sinks_common::rows::form::RowForm;
use shardmill_sinks_common::rows::time;
pub use shardmill_sinks_common::rows::time::Zone;
use shardmill_sinks_common::rows::value;
pub use shardmill_sinks_common::rows::value::{Json, RawJson, Why};
use shardmill_sinks_common::rows::{ColumnNames, RowError};

/// Most digits of a decimal in 64 bits.
const DECIMAL_I64_DIGITS_MAX: u32 = 18;
/// Most digits of a decimal that readers accept: those of 128 bits.
const DECIMAL_DIGITS_MAX: u32 = 38;
/// Microseconds of a day.
const MICROS_PER_DAY: i64 = 86_400_000_000;
/// Bytes of a decimal of more than [`DECIMAL_I64_DIGITS_MAX`] digits.
const DECIMAL_BYTES: usize = 16;

/// Kind of a column's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Int16,
    Int32,
    Int64,
    Float,
    Double,
    /// Any number, as the text in the payload.
    Number,
    Decimal {
        digits: u32,
        scale: u32,
    },
    Text,
    Json,
    Uuid,
    Date,
    Time,
    Timestamp(Zone),
    Bytes,
}

/// Columns of a route in a file.
#[derive(Debug)]
pub(super) struct ParquetSchema {
    names: ColumnNames,
    names_bytes: usize,
    columns: Vec<ParquetColumn>,
    root: Arc<Type>,
}

#[derive(Debug)]
struct ParquetColumn {
    name: String,
    data_type: String,
    kind: Kind,
    nullable: bool,
}

/// One value.
#[derive(Debug)]
enum Cell {
    Null,
    Bool(bool),
    Int32(i32),
    Int64(i64),
    Float(f32),
    Double(f64),
    Bytes(ByteArray),
    Fixed(FixedLenByteArray),
}

impl ParquetSchema {
    /// Makes the schema of declared columns.
    ///
    /// # Errors
    /// A column has a type that a Parquet file cannot have, or there are no columns.
    pub(super) fn of(columns: &[Column]) -> Result<Self, String> {
        if columns.is_empty() {
            return Err("it declares no columns, which a Parquet file needs".into());
        }
        let columns: Vec<ParquetColumn> = columns
            .iter()
            .map(|column| {
                let kind = Kind::of(&column.data_type).ok_or_else(|| {
                    format!(
                        "column {:?} has type {}, which is unsupported in Parquet",
                        column.name, column.data_type
                    )
                })?;
                let (name, data_type) = (column.name.clone(), column.data_type.clone());
                Ok(ParquetColumn { name, data_type, kind, nullable: column.nullable })
            })
            .collect::<Result<_, String>>()?;
        let fields = columns.iter().map(|column| column.field().map(Arc::new));
        let fields = fields.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let root = Type::group_type_builder("row").with_fields(fields).build();
        let root = Arc::new(root.map_err(|error| error.to_string())?);
        let names = ColumnNames::new(columns.iter().map(|column| column.name.clone()));
        let names_bytes = columns.iter().map(|column| column.name.len()).sum();
        Ok(Self { names, names_bytes, columns, root })
    }

    /// Returns the number of columns.
    pub(super) fn width(&self) -> usize {
        self.columns.len()
    }

    /// Returns the length of all names together, in bytes.
    pub(super) fn names_bytes(&self) -> usize {
        self.names_bytes
    }

    /// Reads a payload as one value per column.
    ///
    /// # Errors
    /// The reason why the payload is not a row, as a fragment for a dead letter.
    fn cells(&self, payload: &[u8], form: &mut RowForm) -> Result<Vec<Cell>, String> {
        let mut slots = vec![None; self.columns.len()];
        rows::spread(payload, &self.names, form, &mut slots).map_err(|fault| match fault {
            RowError::Refused(reason) => reason,
            RowError::UnknownKey(key) => format!("the route declares no column {key:?}"),
        })?;
        let read = |(column, slot): (&ParquetColumn, &Option<RawJson<'_>>)| {
            let cell = match slot {
                None => Cell::Null,
                Some(raw) => column
                    .cell(*raw)
                    .map_err(|why| rows::misfit(&column.name, &column.data_type, *raw, &why))?,
            };
            match cell {
                Cell::Null if !column.nullable => {
                    Err(format!("column {:?} is missing or null", column.name))
                }
                cell => Ok(cell),
            }
        };
        self.columns.iter().zip(&slots).map(read).collect()
    }
}

impl ParquetColumn {
    fn field(&self) -> Result<Type, ParquetError> {
        let (physical, logical) = self.kind.types();
        let repetition = if self.nullable { Repetition::OPTIONAL } else { Repetition::REQUIRED };
        let mut field = Type::primitive_type_builder(&self.name, physical)
            .with_repetition(repetition)
            .with_logical_type(logical);
        if let Kind::Decimal { digits, scale } = self.kind {
            field = field.with_precision(signed(digits)).with_scale(signed(scale));
        }
        if physical == Physical::FIXED_LEN_BYTE_ARRAY {
            field = field.with_length(16);
        }
        field.build()
    }

    fn cell(&self, raw: RawJson<'_>) -> Result<Cell, Why> {
        let bytes = |bytes: &[u8]| ByteArray::from(bytes.to_vec());
        if self.kind == Kind::Json {
            let json = value::document(raw)?;
            return Ok(if json == "null" {
                Cell::Null
            } else {
                Cell::Bytes(bytes(json.as_bytes()))
            });
        }
        let json = &Json::of(raw)?;
        if *json == Json::Null {
            return Ok(Cell::Null);
        }
        Ok(match self.kind {
            Kind::Bool => Cell::Bool(value::boolean(json)?),
            Kind::Int16 => Cell::Int32(value::integer::<i16>(json)?.into()),
            Kind::Int32 => Cell::Int32(value::integer(json)?),
            Kind::Int64 => Cell::Int64(value::integer(json)?),
            Kind::Float => Cell::Float(value::float32(json)?),
            Kind::Double => Cell::Double(value::float64(json)?),
            Kind::Number => {
                value::decimal(json)?;
                Cell::Bytes(bytes(value::text(json)?.as_bytes()))
            }
            Kind::Decimal { digits, scale } => decimal_cell(json, digits, scale)?,
            Kind::Text | Kind::Json => Cell::Bytes(bytes(value::text(json)?.as_bytes())),
            Kind::Uuid => Cell::Fixed(value::uuid(json)?.as_bytes().to_vec().into()),
            Kind::Date => Cell::Int32(time::date(value::time_text(json)?)?),
            Kind::Time => match time::time(value::time_text(json)?)? {
                // PostgreSQL's 24:00, which Arrow and its readers do not accept.
                MICROS_PER_DAY.. => {
                    return Err(
                        "expected a time up to 23:59:59.999999, the last one in Parquet".into()
                    );
                }
                micros => Cell::Int64(micros),
            },
            Kind::Timestamp(zone) => Cell::Int64(time::timestamp(value::time_text(json)?, zone)?),
            Kind::Bytes => Cell::Bytes(value::bytes(json)?.into()),
        })
    }
}

/// Makes the cell of a decimal: the number multiplied by 10^scale, as an exact integer.
fn decimal_cell(json: &Json<'_>, digits: u32, scale: u32) -> Result<Cell, Why> {
    let number = value::decimal(json)?;
    let unscaled = number
        .to_unscaled(scale)
        .filter(|unscaled| 10_i128.checked_pow(digits).is_some_and(|max| unscaled.abs() < max))
        .ok_or_else(|| {
            format!("expected a number of {digits} digits, {scale} of them after the point")
        })?;
    match i64::try_from(unscaled) {
        Ok(unscaled) if digits <= DECIMAL_I64_DIGITS_MAX => Ok(Cell::Int64(unscaled)),
        _ => {
            let bytes: [u8; DECIMAL_BYTES] = unscaled.to_be_bytes();
            Ok(Cell::Fixed(bytes.to_vec().into()))
        }
    }
}

impl Kind {
    /// Returns the kind of a SQL type by its name; `None`: the type is not supported.
    fn of(data_type: &str) -> Option<Self> {
        let lower = data_type.trim().to_ascii_lowercase();
        let (name, arguments) = match lower.split_once('(') {
            Some((name, rest)) => (name.trim_end(), Some(rest.strip_suffix(')')?)),
            None => (&*lower, None),
        };
        Some(match (name, arguments) {
            ("boolean" | "bool", None) => Self::Bool,
            ("smallint" | "int2", None) => Self::Int16,
            ("integer" | "int" | "int4", None) => Self::Int32,
            ("bigint" | "int8", None) => Self::Int64,
            ("real" | "float4", None) => Self::Float,
            ("double precision" | "float8", None) => Self::Double,
            ("numeric" | "decimal", None) => Self::Number,
            ("numeric" | "decimal", Some(arguments)) => {
                let (digits, scale) = arguments.split_once(',').unwrap_or((arguments, "0"));
                let (digits, scale) = (digits.trim().parse().ok()?, scale.trim().parse().ok()?);
                let is_sound = (1..=DECIMAL_DIGITS_MAX).contains(&digits) && scale <= digits;
                is_sound.then_some(Self::Decimal { digits, scale })?
            }
            ("text" | "varchar" | "character varying" | "char" | "character" | "citext", _) => {
                Self::Text
            }
            ("json" | "jsonb", None) => Self::Json,
            ("uuid", None) => Self::Uuid,
            ("date", None) => Self::Date,
            ("time" | "time without time zone", None) => Self::Time,
            ("timestamp" | "timestamp without time zone", None) => Self::Timestamp(Zone::WallClock),
            ("timestamptz" | "timestamp with time zone", None) => Self::Timestamp(Zone::Instant),
            ("bytea", None) => Self::Bytes,
            _ => return None,
        })
    }

    fn types(self) -> (Physical, Option<LogicalType>) {
        match self {
            Self::Bool => (Physical::BOOLEAN, None),
            Self::Int16 => (Physical::INT32, Some(LogicalType::integer(16, true))),
            Self::Int32 => (Physical::INT32, None),
            Self::Int64 => (Physical::INT64, None),
            Self::Float => (Physical::FLOAT, None),
            Self::Double => (Physical::DOUBLE, None),
            Self::Decimal { digits, scale } => {
                let physical = match digits <= DECIMAL_I64_DIGITS_MAX {
                    true => Physical::INT64,
                    false => Physical::FIXED_LEN_BYTE_ARRAY,
                };
                (physical, Some(LogicalType::decimal(signed(scale), signed(digits))))
            }
            Self::Text | Self::Number => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
            Self::Json => (Physical::BYTE_ARRAY, Some(LogicalType::Json)),
            Self::Uuid => (Physical::FIXED_LEN_BYTE_ARRAY, Some(LogicalType::Uuid)),
            Self::Date => (Physical::INT32, Some(LogicalType::Date)),
            Self::Time => (Physical::INT64, Some(LogicalType::time(false, TimeUnit::MICROS))),
            Self::Timestamp(zone) => {
                let is_instant = zone == Zone::Instant;
                let logical = LogicalType::timestamp(is_instant, TimeUnit::MICROS);
                (Physical::INT64, Some(logical))
            }
            Self::Bytes => (Physical::BYTE_ARRAY, None),
        }
    }
}

/// Converts a small number to the type that the crate expects.
fn signed(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Rows of a file, column by column.
pub(super) struct ParquetRows {
    schema: Arc<ParquetSchema>,
    form: RowForm,
    columns: Vec<Values>,
}

/// Values of a column and, for each row, whether there is one.
struct Values {
    present: Vec<i16>,
    cells: Cells,
}

enum Cells {
    Bool(Vec<bool>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Float(Vec<f32>),
    Double(Vec<f64>),
    Bytes(Vec<ByteArray>),
    Fixed(Vec<FixedLenByteArray>),
}

impl ParquetRows {
    /// Makes a file without rows.
    pub(super) fn new(schema: Arc<ParquetSchema>) -> Self {
        let values = |column: &ParquetColumn| {
            let cells = match column.kind.types().0 {
                Physical::BOOLEAN => Cells::Bool(Vec::new()),
                Physical::INT32 => Cells::Int32(Vec::new()),
                Physical::FLOAT => Cells::Float(Vec::new()),
                Physical::DOUBLE => Cells::Double(Vec::new()),
                Physical::BYTE_ARRAY => Cells::Bytes(Vec::new()),
                Physical::FIXED_LEN_BYTE_ARRAY => Cells::Fixed(Vec::new()),
                Physical::INT64 | Physical::INT96 => Cells::Int64(Vec::new()),
            };
            Values { present: Vec::new(), cells }
        };
        let columns = schema.columns.iter().map(values).collect();
        Self { schema, form: RowForm::default(), columns }
    }

    /// Returns the columns.
    pub(super) fn schema(&self) -> &ParquetSchema {
        &self.schema
    }

    /// Adds a row.
    ///
    /// # Errors
    /// The reason why the payload is not a row, as a fragment for a dead letter. Nothing of it is kept.
    pub(super) fn push(&mut self, payload: &[u8]) -> Result<(), String> {
        let cells = self.schema.cells(payload, &mut self.form)?;
        for (column, cell) in self.columns.iter_mut().zip(cells) {
            column.present.push(i16::from(!matches!(cell, Cell::Null)));
            match (&mut column.cells, cell) {
                (_, Cell::Null) => {}
                (Cells::Bool(values), Cell::Bool(value)) => values.push(value),
                (Cells::Int32(values), Cell::Int32(value)) => values.push(value),
                (Cells::Int64(values), Cell::Int64(value)) => values.push(value),
                (Cells::Float(values), Cell::Float(value)) => values.push(value),
                (Cells::Double(values), Cell::Double(value)) => values.push(value),
                (Cells::Bytes(values), Cell::Bytes(value)) => values.push(value),
                (Cells::Fixed(values), Cell::Fixed(value)) => values.push(value),
                (_, cell) => unreachable!("a column's kind gives no {cell:?}"),
            }
        }
        Ok(())
    }

    /// Returns the bytes of the file.
    ///
    /// # Errors
    /// An error of the crate, which is not the fault of a row.
    pub(super) fn finish(self, compression: Compression) -> io::Result<Vec<u8>> {
        let mut file = self.write(compression).map_err(io::Error::other)?;
        // The vector grew by doubling. It waits for its commit beside many others, so its unused capacity is freed.
        file.shrink_to_fit();
        Ok(file)
    }

    fn write(self, compression: Compression) -> Result<Vec<u8>, ParquetError> {
        let codec = match compression {
            Compression::None => Codec::UNCOMPRESSED,
            Compression::Gzip => Codec::GZIP(Default::default()),
            Compression::Zstd => Codec::ZSTD(ZstdLevel::default()),
        };
        let properties = WriterProperties::builder()
            .set_compression(codec)
            // The default has the crate's version, so another release of the crate would give other bytes.
            .set_created_by("shardmill".into())
            .build();
        let root = self.schema.root.clone();
        let mut file = SerializedFileWriter::new(Vec::new(), root, Arc::new(properties))?;
        let mut group = file.next_row_group()?;
        for (values, column) in self.columns.iter().zip(&self.schema.columns) {
            let present = column.nullable.then_some(&*values.present);
            let Some(mut open) = group.next_column()? else { break };
            match (open.untyped(), &values.cells) {
                (ColumnWriter::BoolColumnWriter(out), Cells::Bool(values)) => {
                    out.write_batch(values, present, None)
                }
                (ColumnWriter::Int32ColumnWriter(out), Cells::Int32(values)) => {
                    out.write_batch(values, present, None)
                }
                (ColumnWriter::Int64ColumnWriter(out), Cells::Int64(values)) => {
                    out.write_batch(values, present, None)
                }
                (ColumnWriter::FloatColumnWriter(out), Cells::Float(values)) => {
                    out.write_batch(values, present, None)
                }
                (ColumnWriter::DoubleColumnWriter(out), Cells::Double(values)) => {
                    out.write_batch(values, present, None)
                }
                (ColumnWriter::ByteArrayColumnWriter(out), Cells::Bytes(values)) => {
                    out.write_batch(values, present, None)
                }
                (ColumnWriter::FixedLenByteArrayColumnWriter(out), Cells::Fixed(values)) => {
                    out.write_batch(values, present, None)
                }
                _ => Err(ParquetError::General("a column has values of another kind".into())),
            }?;
            open.close()?;
        }
        group.close()?;
        file.into_inner()
    }
}
