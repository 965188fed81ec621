//! Encodes JSON arrays in PostgreSQL's binary form of arrays.
//!
//! Source: PostgreSQL's `array_recv` (src/backend/utils/adt/arrayfuncs.c). The form is: number of dimensions, whether
//! there are nulls, type of the elements, length and first index of each dimension, then the elements after their
//! lengths.

use std::fmt;

use bytes::BufMut as _;
use serde::Deserializer as _;
use serde::de::{self, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::put_field;
use crate::kind::{Element, Kind};
use shardmill_sinks_common::rows::value::{RawJson, Why};

/// Limit of PostgreSQL, `MAXDIM`.
const DIMENSIONS_MAX: usize = 6;
/// Default first index of a dimension.
const FIRST_INDEX: i32 = 1;

/// Writes an array without its length.
///
/// Elements are written as they are read. A list of them would take eight times the text of an array of digits.
pub(super) fn put(out: &mut Vec<u8>, element: Element, raw: RawJson<'_>) -> Result<(), Why> {
    let kind = element.kind();
    // An array inside an array of documents is a document.
    let nests = !matches!(kind, Kind::Json | Kind::Jsonb);
    let dimensions = if nests { brackets(raw.get()).clamp(1, DIMENSIONS_MAX) } else { 1 };
    let start = out.len();
    put_header(out, element, false, &[0; DIMENSIONS_MAX][..dimensions]);
    let after_header = out.len();
    let mut array =
        Array { out, kind, nests, lengths: [None; DIMENSIONS_MAX], depth: None, has_null: false };
    array.take(raw, 0)?;
    let Array { lengths, depth, has_null, .. } = array;
    if out.len() == after_header {
        // An array without elements has no dimensions, however deeply it is nested.
        out.truncate(start);
        put_header(out, element, false, &[]);
        return Ok(());
    }
    if depth.map(|depth| depth + 1) != Some(dimensions) {
        return Err(RAGGED.into());
    }
    let mut header = Vec::with_capacity(after_header - start);
    let lengths = lengths.map(Option::unwrap_or_default).map(i32::try_from);
    let lengths = lengths.into_iter().take(dimensions).collect::<Result<Vec<_>, _>>();
    put_header(&mut header, element, has_null, &lengths.map_err(|_| "the array is too long")?);
    out[start..after_header].copy_from_slice(&header);
    Ok(())
}

/// Reason why nested arrays cannot be dimensions.
const RAGGED: &str = "arrays of the same depth must have the same length";

fn put_header(out: &mut Vec<u8>, element: Element, has_null: bool, lengths: &[i32]) {
    // There are at most six dimensions.
    out.put_i32(lengths.len() as i32);
    out.put_i32(has_null.into());
    out.put_u32(element.oid);
    for length in lengths {
        out.put_i32(*length);
        out.put_i32(FIRST_INDEX);
    }
}

/// Counts the opening brackets at the start of a text: the depth of its first item.
fn brackets(text: &str) -> usize {
    text.bytes().filter(|byte| !byte.is_ascii_whitespace()).take_while(|byte| *byte == b'[').count()
}

struct Array<'o> {
    out: &'o mut Vec<u8>,
    kind: Kind,
    nests: bool,
    /// Length of each dimension, the outermost first, as far as known.
    lengths: [Option<usize>; DIMENSIONS_MAX],
    /// Depth of the arrays that contain elements, or are empty.
    depth: Option<usize>,
    has_null: bool,
}

impl Array<'_> {
    /// Writes a JSON array at nesting level `depth`.
    fn take(&mut self, raw: RawJson<'_>, depth: usize) -> Result<(), Why> {
        if depth == DIMENSIONS_MAX {
            return Err(format!("an array has at most {DIMENSIONS_MAX} dimensions").into());
        }
        let mut fault = None;
        let items = Items { array: self, depth, fault: &mut fault };
        let read = serde_json::Deserializer::from_str(raw.get()).deserialize_seq(items);
        match (fault, read) {
            (Some(fault), _) => Err(fault),
            (None, read) => read.map_err(|_| "expected a JSON array".into()),
        }
    }

    /// Writes an item of an array at nesting level `depth`. `in_arrays`: the first item of it was an array.
    fn take_item(&mut self, item: RawJson<'_>, depth: usize, in_arrays: bool) -> Result<(), Why> {
        if self.is_array(item) != in_arrays {
            return Err(RAGGED.into());
        }
        if in_arrays {
            return self.take(item, depth + 1);
        }
        self.has_null |= item.get() == "null";
        put_field(self.out, self.kind, item)
    }

    fn is_array(&self, item: RawJson<'_>) -> bool {
        self.nests && item.get().starts_with('[')
    }

    /// Checks that an array at nesting level `depth` has the same length as others of that level.
    fn has(&mut self, count: usize, depth: usize, in_arrays: bool) -> Result<(), Why> {
        let is_as_others = *self.lengths[depth].get_or_insert(count) == count;
        // Empty arrays count, too: the server would otherwise read fewer elements than are written.
        match is_as_others && (in_arrays || *self.depth.get_or_insert(depth) == depth) {
            true => Ok(()),
            false => Err(RAGGED.into()),
        }
    }
}

/// Visits the items of a JSON array one by one.
struct Items<'i, 'o> {
    array: &'i mut Array<'o>,
    depth: usize,
    fault: &'i mut Option<Why>,
}

impl<'de> Visitor<'de> for Items<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self { array, depth, fault } = self;
        let mut failed = |why| {
            *fault = Some(why);
            de::Error::custom("an item")
        };
        let (mut count, mut in_arrays) = (0, false);
        while let Some(item) = items.next_element::<&RawValue>()? {
            let item = RawJson::from(item);
            if count == 0 {
                in_arrays = array.is_array(item);
            }
            count += 1;
            array.take_item(item, depth, in_arrays).map_err(&mut failed)?;
        }
        array.has(count, depth, in_arrays).map_err(failed)
    }
}
