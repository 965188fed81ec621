//! JSON arrays in the binary form of PostgreSQL's arrays.
//!
//! Source: PostgreSQL's `array_recv` (src/backend/utils/adt/arrayfuncs.c): the number of dimensions,
//! whether there are nulls, the elements' type, each dimension's length and first index, the elements
//! behind their lengths.

use bytes::BufMut as _;
use serde_json::value::RawValue;

use super::encode::put_field;
use super::kind::{Element, Kind};
use crate::sink::rows::value::{RawJson, Why};

/// PostgreSQL's own limit, `MAXDIM`.
const DIMENSIONS_MAX: usize = 6;
/// Where indexes begin unless one says otherwise.
const FIRST_INDEX: i32 = 1;

/// Writes an array without its length.
pub(super) fn put(out: &mut Vec<u8>, element: Element, raw: RawJson<'_>) -> Result<(), Why> {
    let kind = element.kind();
    let mut array = Array {
        // An array in an array of documents is a document.
        nests: !matches!(kind, Kind::Json | Kind::Jsonb),
        lengths: Vec::new(),
        element_depth: None,
        elements: Vec::new(),
    };
    array.take(raw, 0)?;
    // An array without elements has no dimensions, however deep it was written.
    let lengths = if array.elements.is_empty() { &[][..] } else { &array.lengths };
    let count = |count: usize| i32::try_from(count).map_err(|_| "the array is too long");
    out.put_i32(count(lengths.len())?);
    out.put_i32(array.elements.iter().any(|element| element.get() == "null").into());
    out.put_u32(element.oid);
    for length in lengths {
        out.put_i32(count(*length)?);
        out.put_i32(FIRST_INDEX);
    }
    array.elements.iter().try_for_each(|element| put_field(out, kind, *element))
}

struct Array<'r> {
    nests: bool,
    /// The length of each dimension, the outermost first.
    lengths: Vec<usize>,
    /// How deep the arrays lie that hold elements, or could.
    element_depth: Option<usize>,
    elements: Vec<RawJson<'r>>,
}

impl<'r> Array<'r> {
    /// Takes a JSON array that lies `depth` arrays deep.
    fn take(&mut self, raw: RawJson<'r>, depth: usize) -> Result<(), Why> {
        if depth == DIMENSIONS_MAX {
            return Err(format!("an array has at most {DIMENSIONS_MAX} dimensions").into());
        }
        let items: Vec<&RawValue> =
            serde_json::from_str(raw.get()).map_err(|_| "a JSON array is due")?;
        let items: Vec<RawJson<'_>> = items.into_iter().map(RawJson::from).collect();
        let ragged = || Err("all its arrays of one depth must have one length".into());
        match self.lengths.get(depth) {
            None => self.lengths.push(items.len()),
            Some(length) if *length != items.len() => return ragged(),
            Some(_) => {}
        }
        let is_array = |item: &RawJson<'_>| self.nests && item.get().starts_with('[');
        let arrays = items.iter().filter(|item| is_array(item)).count();
        if arrays > 0 && arrays < items.len() {
            return ragged();
        }
        if arrays > 0 {
            return items.into_iter().try_for_each(|item| self.take(item, depth + 1));
        }
        // One that is empty counts too: the server would read fewer elements than are written.
        if *self.element_depth.get_or_insert(depth) != depth {
            return ragged();
        }
        self.elements.extend(items);
        Ok(())
    }
}
