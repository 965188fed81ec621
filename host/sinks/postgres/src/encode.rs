//! Encodes rows for PostgreSQL's binary COPY, grouped by their columns.
//!
//! A COPY names its columns; the other columns get their defaults. So rows with the same set of columns form a group,
//! in the order of arrival. In modes that merge, only neighbours form a group, because a later row with the same key
//! must win. Pure: no I/O.
//!
//! Wire formats: the `…_recv` functions in PostgreSQL's `src/backend/utils/adt/`.

mod array;

use std::collections::HashMap;
use std::ops::Range;

use bytes::BufMut as _;

use super::kind::{EPOCH_MICROS, Kind};
use super::lineage::{self, Lineage};
use super::numeric;
use super::table::LiveTable;
use shardmill_config::WriteMode;
use shardmill_core::record::Row;
use shardmill_core::sink::Refusal;
use shardmill_sinks_common::rows;
use shardmill_sinks_common::rows::form::{RowForm, leading_ascii, leading_integer, leading_value};
use shardmill_sinks_common::rows::time;
pub use shardmill_sinks_common::rows::time::Zone;
use shardmill_sinks_common::rows::value;
pub use shardmill_sinks_common::rows::value::{Json, RawJson, Why};
use shardmill_sinks_common::rows::{RowError, Slots};

/// Days from 1970-01-01 to 2000-01-01.
const EPOCH_DAYS: i32 = 10_957;

/// PostgreSQL stores 63 bytes of a `name`. A longer one would be an error that does not blame the row.
const NAME_BYTES_MAX: usize = 63;

/// Version number at the start of a `jsonb` document.
const JSONB_VERSION: u8 = 1;

/// Length of a NULL.
const NULL: i32 = -1;

/// Encoded rows with the same columns.
pub(super) struct Group {
    /// Indexes of the columns in the table.
    pub(super) columns: Box<[u16]>,
    /// Indexes of the rows in the commit, ascending.
    pub(super) rows: Vec<usize>,
    /// Ends of the rows in `tuples`.
    ends: Vec<usize>,
    tuples: Vec<u8>,
}

impl Group {
    /// Returns the encoded tuples of some rows.
    pub(super) fn tuples(&self, rows: Range<usize>) -> &[u8] {
        let end_of = |row: usize| row.checked_sub(1).map_or(0, |row| self.ends[row]);
        &self.tuples[end_of(rows.start)..end_of(rows.end)]
    }
}

/// Encoded rows, and those that cannot be encoded.
#[derive(Default)]
pub(super) struct Encoded {
    pub(super) groups: Vec<Group>,
    /// By ascending row.
    pub(super) refusals: Vec<Refusal>,
}

/// Key without a column that was a column before, or is declared.
pub(super) struct GoneColumn(pub(super) String);

/// Encoder of rows for a table.
pub(super) struct Encoder<'t, 'r> {
    table: &'t LiveTable,
    table_name: &'t str,
    slots: Vec<Option<RawJson<'r>>>,
    form: RowForm,
    present: Vec<u16>,
    open: Vec<Group>,
    places: HashMap<Box<[u16]>, usize>,
    last: usize,
    refusals: Vec<Refusal>,
    /// Indexes of columns that each row must have.
    required: Vec<usize>,
    /// Whether rows must stay in order, also those with different columns.
    keeps_order: bool,
    /// Lineage columns to fill.
    lineage: Lineage,
    /// Capacity of the first group, which is mostly the only one.
    bytes_expected: usize,
}

impl<'t, 'r> Encoder<'t, 'r> {
    /// Makes an encoder for rows whose payloads have `bytes_expected` in all; encoded, they are hardly larger.
    pub(super) fn new(
        table: &'t LiveTable,
        table_name: &'t str,
        mode: &WriteMode,
        lineage: Lineage,
        bytes_expected: usize,
    ) -> Self {
        let place = |name: &str| table.columns.iter().position(|column| column.name == name);
        Self {
            required: mode.required().filter_map(place).collect(),
            keeps_order: *mode != WriteMode::Append,
            lineage,
            table,
            table_name,
            slots: vec![None; table.columns.len()],
            form: RowForm::default(),
            present: Vec::with_capacity(table.columns.len()),
            open: Vec::new(),
            places: HashMap::new(),
            last: 0,
            refusals: Vec::new(),
            bytes_expected,
        }
    }

    /// Encodes the row at `index` of the commit, or notes why it is refused. `was_column` says for a key without a
    /// column whether it was one before or is declared.
    pub(super) fn add(
        &mut self,
        index: usize,
        row: &'r Row,
        was_column: impl Fn(&str) -> bool,
    ) -> Result<(), GoneColumn> {
        if self.add_by_form(index, &row.payload) {
            return Ok(());
        }
        let outcome =
            match rows::spread(&row.payload, &self.table.names, &mut self.form, &mut self.slots) {
                Ok(()) => self.encode(index, row),
                Err(RowError::Refused(reason)) => Err(reason),
                Err(RowError::UnknownKey(key)) if was_column(&key) => return Err(GoneColumn(key)),
                Err(RowError::UnknownKey(key)) => {
                    Err(format!("no column {key:?} in table {}", self.table_name))
                }
            };
        if let Err(reason) = outcome {
            self.refusals.push(Refusal { row: index, reason });
        }
        Ok(())
    }

    /// Encodes a row straight from its payload if it has the same form and columns as the previous one. Returns false,
    /// without any effect, if it has another form or an error.
    fn add_by_form(&mut self, index: usize, payload: &[u8]) -> bool {
        let Some(group) = self.open.get_mut(self.last) else { return false };
        let places = group.columns.iter().map(|place| usize::from(*place));
        if !self.lineage.places.is_empty() || !places.eq(self.form.fields().map(|(_, place)| place))
        {
            return false;
        }
        let start = group.tuples.len();
        let tuples = &mut group.tuples;
        if put_by_form(tuples, self.table, &self.required, &self.form, payload).is_none() {
            tuples.truncate(start);
            return false;
        }
        group.rows.push(index);
        group.ends.push(group.tuples.len());
        true
    }

    /// Returns the columns of the first group, and its tuples so far.
    pub(super) fn first_group(&self) -> Option<(&[u16], &[u8])> {
        let first = self.open.first().filter(|group| !group.rows.is_empty());
        first.map(|group| (&*group.columns, &*group.tuples))
    }

    /// Returns the rows so far.
    pub(super) fn finish(mut self) -> Encoded {
        self.open.retain(|group| !group.rows.is_empty());
        Encoded { groups: self.open, refusals: self.refusals }
    }

    /// Appends the row in `slots` to the group of its columns.
    fn encode(&mut self, index: usize, row: &Row) -> Result<(), String> {
        self.present.clear();
        for (place, slot) in (0_u16..).zip(&self.slots) {
            if slot.is_some() {
                self.present.push(place);
            }
        }
        if self.present.is_empty() {
            return Err(format!("the row names no column of table {}", self.table_name));
        }
        for place in &self.required {
            if self.slots[*place].is_none_or(|raw| raw.get() == "null") {
                let column = &self.table.columns[*place].name;
                return Err(format!("key column {column:?} is missing or null"));
            }
        }
        for place in &self.lineage.places {
            if self.slots[usize::from(*place)].is_some() {
                let column = &self.table.columns[usize::from(*place)].name;
                return Err(format!(
                    "unexpected lineage column {column:?} in the row: the sink fills it"
                ));
            }
            self.present.push(*place);
        }
        let place = self.group();
        let group = &mut self.open[place];
        let start = group.tuples.len();
        let put = put_tuple(&mut group.tuples, self.table, &self.present, &self.slots);
        let put = put.and_then(|()| match self.lineage.places.is_empty() {
            true => Ok(()),
            false => lineage::put(&mut group.tuples, row, &self.lineage),
        });
        if let Err(reason) = put {
            group.tuples.truncate(start);
            return Err(reason);
        }
        group.rows.push(index);
        group.ends.push(group.tuples.len());
        Ok(())
    }

    /// Finds the group for the columns in `present`, which is mostly the last one.
    fn group(&mut self) -> usize {
        if self.open.get(self.last).is_some_and(|group| *group.columns == *self.present) {
            return self.last;
        }
        // With merges the later of two rows with one key wins, whatever columns they have.
        let known = self.places.get(self.present.as_slice()).filter(|_| !self.keeps_order);
        self.last = match known {
            Some(place) => *place,
            None => {
                let columns: Box<[u16]> = self.present.as_slice().into();
                self.places.insert(columns.clone(), self.open.len());
                self.open.push(Group {
                    columns,
                    rows: Vec::new(),
                    ends: Vec::new(),
                    tuples: Vec::with_capacity(std::mem::take(&mut self.bytes_expected)),
                });
                self.open.len() - 1
            }
        };
        self.last
    }
}

/// Writes a tuple: the field count, then each field after its length. Fields without a slot are left to the caller;
/// they come last.
fn put_tuple(
    out: &mut Vec<u8>,
    table: &LiveTable,
    present: &[u16],
    slots: &Slots<'_>,
) -> Result<(), String> {
    out.put_u16(u16::try_from(present.len()).map_err(|_| "the row has too many columns")?);
    for place in present.iter().map(|place| usize::from(*place)) {
        let Some(raw) = slots[place] else { continue };
        let column = &table.columns[place];
        let put = match column.is_generated {
            true => Err("the table generates the column itself".into()),
            false => put_field(out, column.kind, raw),
        };
        put.map_err(|why| rows::misfit(&column.name, &column.data_type, raw, &why))?;
    }
    Ok(())
}

/// Writes the tuple of a row of this form, whose columns are in the table's order; those in `required` must not be
/// null. `None`: the row has another form or an error, and something may have been written.
fn put_by_form(
    out: &mut Vec<u8>,
    table: &LiveTable,
    required: &[usize],
    form: &RowForm,
    payload: &[u8],
) -> Option<()> {
    const NO_VALUE: &[u8] = b"null";
    let start = out.len();
    out.put_u16(0);
    let (mut rest, mut count) = (payload, 0_u16);
    for (before, place) in form.fields() {
        rest = rest.strip_prefix(before.as_bytes())?;
        let column = &table.columns[place];
        let length = match column.kind {
            _ if column.is_generated => return None,
            _ if rest.starts_with(NO_VALUE) => {
                if required.contains(&place) {
                    return None;
                }
                out.put_i32(NULL);
                NO_VALUE.len()
            }
            Kind::Int8 => {
                let (value, length) = leading_integer(rest)?;
                put_int8(out, value);
                length
            }
            Kind::Int4 => {
                let (value, length) = leading_integer(rest)?;
                put_int4(out, i32::try_from(value).ok()?);
                length
            }
            Kind::Text => {
                let text = leading_ascii(rest)?;
                out.put_i32(i32::try_from(text.len()).ok()?);
                out.put_slice(text);
                text.len() + "\"\"".len()
            }
            kind => {
                let value = leading_value(rest)?;
                put_field(out, kind, value).ok()?;
                value.get().len()
            }
        };
        rest = &rest[length..];
        count = count.checked_add(1)?;
    }
    out[start..start + size_of::<u16>()].copy_from_slice(&count.to_be_bytes());
    (rest == b"}").then_some(())
}

fn put_int8(out: &mut Vec<u8>, value: i64) {
    let mut field = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    field[4..].copy_from_slice(&value.to_be_bytes());
    out.extend_from_slice(&field);
}

fn put_int4(out: &mut Vec<u8>, value: i32) {
    let mut field = [0, 0, 0, 4, 0, 0, 0, 0];
    field[4..].copy_from_slice(&value.to_be_bytes());
    out.extend_from_slice(&field);
}

/// Writes a value after its length.
pub(super) fn put_field(out: &mut Vec<u8>, kind: Kind, raw: RawJson<'_>) -> Result<(), Why> {
    if put_plain(out, kind, raw).is_some() {
        return Ok(());
    }
    if raw.get() == "null" {
        out.put_i32(NULL);
        return Ok(());
    }
    let json = Json::of(raw)?;
    let start = out.len();
    out.put_i32(0);
    put_value(out, kind, &json, raw)?;
    let length = out.len() - start - size_of::<i32>();
    let length = i32::try_from(length).map_err(|_| "the value is too large")?;
    out[start..start + size_of::<i32>()].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

/// Writes common values of common types after their lengths. `None`: it is another value, and nothing was written.
#[inline]
fn put_plain(out: &mut Vec<u8>, kind: Kind, raw: RawJson<'_>) -> Option<()> {
    match kind {
        Kind::Int8 => put_int8(out, value::plain_integer(raw)?),
        Kind::Int4 => put_int4(out, i32::try_from(value::plain_integer(raw)?).ok()?),
        Kind::Text => {
            let text = value::plain_text(raw)?;
            out.put_i32(i32::try_from(text.len()).ok()?);
            out.put_slice(text.as_bytes());
        }
        _ => return None,
    }
    Some(())
}

/// Writes a value that is not null.
fn put_value(out: &mut Vec<u8>, kind: Kind, json: &Json<'_>, raw: RawJson<'_>) -> Result<(), Why> {
    match kind {
        Kind::Bool => out.put_u8(value::boolean(json)?.into()),
        Kind::Int2 => out.put_i16(value::integer(json)?),
        Kind::Int4 => out.put_i32(value::integer(json)?),
        Kind::Int8 => out.put_i64(value::integer(json)?),
        Kind::Float4 => out.put_f32(value::float32(json)?),
        Kind::Float8 => out.put_f64(value::float64(json)?),
        Kind::Numeric => match value::not_finite(json) {
            Some(value) => numeric::put_not_finite(value, out),
            None => numeric::put(&value::decimal(json)?, out)?,
        },
        Kind::Text | Kind::Enum => out.put_slice(value::text(json)?.as_bytes()),
        Kind::Name => match value::text(json)? {
            name if name.len() <= NAME_BYTES_MAX => out.put_slice(name.as_bytes()),
            _ => return Err(format!("expected a name of at most {NAME_BYTES_MAX} bytes").into()),
        },
        Kind::Json => out.put_slice(value::document(raw)?.as_bytes()),
        Kind::Jsonb => {
            out.put_u8(JSONB_VERSION);
            out.put_slice(value::document(raw)?.as_bytes());
        }
        Kind::Uuid => out.put_slice(value::uuid(json)?.as_bytes()),
        Kind::Date => out.put_i32(time::date(value::time_text(json)?)? - EPOCH_DAYS),
        Kind::Time => out.put_i64(time::time(value::time_text(json)?)?),
        Kind::Timestamp => put_timestamp(out, json, Zone::WallClock)?,
        Kind::Timestamptz => put_timestamp(out, json, Zone::Instant)?,
        Kind::Bytea => out.put_slice(&value::bytes(json)?),
        Kind::Array(element) => array::put(out, element, raw)?,
        Kind::Unsupported => return Err("unsupported column type".into()),
    }
    Ok(())
}

fn put_timestamp(out: &mut Vec<u8>, json: &Json<'_>, zone: Zone) -> Result<(), Why> {
    out.put_i64(time::timestamp(value::time_text(json)?, zone)? - EPOCH_MICROS);
    Ok(())
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
