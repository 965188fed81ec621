//! Encodes rows as files for COPY: one JSON object per line, compressed with gzip.
//!
//! A column that a row does not have gets its default. So rows with the same columns form a set, and the sets are
//! merged one after the other. The invariant: a row is never in an earlier set than a previous row with the same key,
//! because it must not be merged before that one. Pure: no I/O.

use std::collections::{HashMap, HashSet};
use std::io::Write as _;

use bytes::Bytes;
use flate2::write::GzEncoder;

use super::kind::Kind;
use super::merge::{ROW, SET};
use super::table::LiveTable;
use shardmill_config::WriteMode;
use shardmill_core::record::Row;
use shardmill_core::sink::Refusal;
use shardmill_sinks_common::rows;
use shardmill_sinks_common::rows::form::RowForm;
use shardmill_sinks_common::rows::value::RawJson;
use shardmill_sinks_common::rows::{RowError, Slots};

/// Bytes of lines per file. The slices of a cluster load files in parallel, best from 1 MB compressed (guide, "Loading
/// data files").
const FILE_BYTES: usize = 32 << 20;

/// Longest line that COPY accepts: "the maximum size of a single input row is 4 MB".
const LINE_BYTES_MAX: usize = 4 << 20;

/// Rows for COPY, and those that no column accepts.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    pub(super) files: Vec<EncodedFile>,
    /// Indexes of the columns of each set.
    pub(super) sets: Vec<Vec<usize>>,
    /// By ascending row.
    pub(super) refusals: Vec<Refusal>,
}

/// File for COPY.
#[derive(Debug)]
pub(super) struct EncodedFile {
    pub(super) bytes: Bytes,
    /// For each line, the index of its row in the commit.
    pub(super) rows: Vec<usize>,
}

/// Reason why rows cannot be encoded for a table.
#[derive(Debug)]
pub(super) enum EncodeError {
    /// Key without a column that was a column before, or is declared.
    GoneColumn(String),
    Io(std::io::Error),
}

impl From<std::io::Error> for EncodeError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// Encodes rows for a table, except those in `skipped`. `was_column` says for a key without a column whether it was one
/// before or is declared.
pub(super) fn encode(
    rows: &[Row],
    skipped: &HashSet<usize>,
    table: &LiveTable,
    table_name: &str,
    mode: &WriteMode,
    was_column: impl Fn(&str) -> bool,
) -> Result<Encoded, EncodeError> {
    let place = |name: &str| table.columns.iter().position(|column| column.name == name);
    let required: Vec<usize> = mode.required().filter_map(place).collect();
    let key: Vec<usize> = mode.key().iter().filter_map(|name| place(name)).collect();
    let mut encoded = Encoded::default();
    let (mut sets, mut form) = (Sets::default(), RowForm::default());
    let mut slots: Vec<Option<RawJson<'_>>> = vec![None; table.columns.len()];
    let (mut line, mut file) = (Vec::new(), OpenFile::default());
    for (index, row) in rows.iter().enumerate().filter(|(index, _)| !skipped.contains(index)) {
        line.clear();
        let outcome = match rows::spread(&row.payload, &table.names, &mut form, &mut slots) {
            Ok(()) => check(&slots, table, &required)
                .and_then(|()| put_columns(&mut line, table, &slots))
                .and_then(|()| {
                    put_place(&mut line, index, sets.of(&slots, key_of(&slots, &key, table)))
                }),
            Err(RowError::Refused(reason)) => Err(reason),
            Err(RowError::UnknownKey(key)) if was_column(&key) => {
                return Err(EncodeError::GoneColumn(key));
            }
            Err(RowError::UnknownKey(key)) => {
                Err(format!("no column {key:?} in table {table_name}"))
            }
        };
        if let Err(reason) = outcome {
            encoded.refusals.push(Refusal { row: index, reason });
            continue;
        }
        file.push(&line, index)?;
        if file.line_bytes >= FILE_BYTES {
            encoded.files.push(std::mem::take(&mut file).finish()?);
        }
    }
    if !file.rows.is_empty() {
        encoded.files.push(file.finish()?);
    }
    encoded.sets = sets.columns;
    Ok(encoded)
}

/// Checks for nulls. COPY loads them into the staging table, and the merge would fail as a whole.
fn check(slots: &Slots<'_>, table: &LiveTable, required: &[usize]) -> Result<(), String> {
    if slots.iter().all(Option::is_none) {
        return Err("the row names no column of the table".into());
    }
    let is_null = |slot: &Option<RawJson<'_>>| slot.is_none_or(|raw| raw.get() == "null");
    for place in required {
        if is_null(&slots[*place]) {
            let name = &table.columns[*place].name;
            return Err(format!("key column {name:?} is missing or null"));
        }
    }
    for (slot, column) in slots.iter().zip(&table.columns) {
        let takes_default = slot.is_none() && column.has_default;
        if column.not_null && is_null(slot) && !takes_default {
            return Err(format!(
                "column {:?} is NOT NULL, but missing or null in the row",
                column.name
            ));
        }
    }
    Ok(())
}

/// Starts a line with the columns of a row.
fn put_columns(line: &mut Vec<u8>, table: &LiveTable, slots: &Slots<'_>) -> Result<(), String> {
    line.push(b'{');
    for (column, slot) in table.columns.iter().zip(slots) {
        let Some(raw) = slot else { continue };
        // Writing to a Vec cannot fail.
        let _infallible = serde_json::to_writer(&mut *line, &column.name);
        line.push(b':');
        let put = column.kind.put(line, *raw);
        put.map_err(|why| rows::misfit(&column.name, &column.data_type, *raw, &why))?;
        if column.kind == Kind::Super {
            keep_on_line(line);
        }
        line.push(b',');
    }
    Ok(())
}

/// Ends a line with the index of the row and its set.
fn put_place(line: &mut Vec<u8>, index: usize, set: usize) -> Result<(), String> {
    // Writing to a Vec cannot fail.
    let _infallible = writeln!(line, "\"{ROW}\":{index},\"{SET}\":{set}}}");
    match line.len() {
        bytes if bytes > LINE_BYTES_MAX => {
            Err(format!("expected a row of at most {LINE_BYTES_MAX} bytes for COPY, found {bytes}"))
        }
        _ => Ok(()),
    }
}

/// Replaces line ends between the values of a document, because a line is a row.
fn keep_on_line(line: &mut [u8]) {
    // Inside a JSON string a line end is an escape, so these are between values.
    line.iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
}

/// Assigns numbers to the sets of columns.
#[derive(Default)]
struct Sets {
    columns: Vec<Vec<usize>>,
    /// Last set with these columns.
    numbers: HashMap<Vec<usize>, usize>,
    /// Last set that contains a row with this key.
    keys: HashMap<Vec<u8>, usize>,
}

impl Sets {
    /// Returns the set of a row. The key is empty if rows are appended.
    fn of(&mut self, slots: &Slots<'_>, key: Vec<u8>) -> usize {
        let columns: Vec<usize> = present(slots).collect();
        let earliest = self.keys.get(&key).copied().unwrap_or(0);
        let number = match self.numbers.get(&columns) {
            Some(number) if *number >= earliest => *number,
            _ => {
                self.numbers.insert(columns.clone(), self.columns.len());
                self.columns.push(columns);
                self.columns.len() - 1
            }
        };
        if !key.is_empty() {
            self.keys.insert(key, number);
        }
        number
    }
}

/// Returns the key of a row whose values are valid, in a form that does not depend on how they are written.
fn key_of(slots: &Slots<'_>, places: &[usize], table: &LiveTable) -> Vec<u8> {
    let mut key = Vec::new();
    for place in places {
        if let Some(raw) = slots[*place] {
            let _fits = table.columns[*place].kind.put(&mut key, raw);
            // Redshift ignores trailing blanks when it compares texts.
            let end = key.strip_suffix(b"\"").unwrap_or(&key).trim_ascii_end().len();
            key.truncate(end);
        }
        key.push(0);
    }
    key
}

/// Returns the indexes of the columns of a row.
fn present(slots: &Slots<'_>) -> impl Iterator<Item = usize> {
    slots.iter().enumerate().filter(|(_, slot)| slot.is_some()).map(|(place, _)| place)
}

struct OpenFile {
    gzip: GzEncoder<Vec<u8>>,
    line_bytes: usize,
    rows: Vec<usize>,
}

impl Default for OpenFile {
    fn default() -> Self {
        // The file is read once and removed: not worth the best ratio.
        let gzip = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        Self { gzip, line_bytes: 0, rows: Vec::new() }
    }
}

impl OpenFile {
    fn push(&mut self, line: &[u8], row: usize) -> std::io::Result<()> {
        self.gzip.write_all(line)?;
        self.line_bytes += line.len();
        self.rows.push(row);
        Ok(())
    }

    fn finish(self) -> std::io::Result<EncodedFile> {
        Ok(EncodedFile { bytes: self.gzip.finish()?.into(), rows: self.rows })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;

    #[test]
    fn no_row_overtakes_one_with_its_key() {
        let value: Box<RawValue> = serde_json::from_str("1").expect("JSON");
        let (some, mut sets) = (Some(RawJson::from(&*value)), Sets::default());
        let (short, long) = ([some, None], [some, some]);
        let mut set = |slots: &Slots<'_>, key: &str| sets.of(slots, key.as_bytes().to_vec());
        assert_eq!(set(&short, "a"), 0);
        assert_eq!(set(&long, "a"), 1);
        assert_eq!(set(&short, "b"), 0, "another row may go with the first");
        assert_eq!(set(&short, "a"), 2, "this one sets what the one before it has set");
        assert_eq!(set(&long, "b"), 1);
        assert_eq!(set(&short, ""), 2, "rows that are appended go anywhere");
    }
}
