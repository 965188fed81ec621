//! Rows for SQL sinks: spreads a payload, which is one JSON object, over the columns of a table.
//!
//! No I/O and no SQL. Values are borrowed as the JSON text of the payload. So 64-bit integers and decimals of any
//! precision keep their exact value until [`value`] reads them by the column's type. A payload that is not a row is
//! refused alone.
//!
//! A repeated key is refused: keeping one of the two values would silently lose the other.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::Deserializer as _;
use serde::de::{self, DeserializeSeed, MapAccess, Visitor};
use serde_json::value::RawValue;

use self::form::RowForm;
use self::value::RawJson;

use shardmill_core::record::BoundRoute;
use shardmill_core::record::SinkName;
use shardmill_core::sink::SinkError;

pub mod decimal;
pub mod declared;
pub mod form;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod time;
pub mod value;

/// Most characters of a refused value that its reason shows.
const SHOWN_CHARS_MAX: usize = 60;

/// Names of a table's columns, with an index by name.
#[derive(Debug, Default)]
pub struct ColumnNames {
    names: Vec<String>,
    places: HashMap<String, usize>,
}

impl ColumnNames {
    /// Makes an index of names in the table's order.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let names: Vec<String> = names.into_iter().collect();
        let places = names.iter().cloned().enumerate().map(|(place, name)| (name, place)).collect();
        Self { names, places }
    }

    /// Returns the name of a column, by its place.
    pub(super) fn name(&self, place: usize) -> &str {
        &self.names[place]
    }

    /// Returns the number of columns.
    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    /// Returns the place of a column. Tries `likely` first, since rows mostly have the table's order.
    fn find(&self, key: &str, likely: usize) -> Option<usize> {
        match self.names.get(likely) {
            Some(name) if name == key => Some(likely),
            _ => self.places.get(key).copied(),
        }
    }
}

/// Reason why a payload is not a row of the table.
#[derive(Debug, PartialEq, Eq)]
pub enum RowError {
    /// The payload is invalid.
    Refused(String),
    /// The object has a key for which there is no column. The sink decides whether that is the fault of the row or of
    /// the table.
    UnknownKey(String),
}

/// One row, as JSON values by column place; `None` where the object does not have the key.
pub type Slots<'a> = [Option<RawJson<'a>>];

/// Spreads a payload over `slots`, one per column, which are cleared first. `form` was learned from earlier rows.
pub fn spread<'a>(
    payload: &'a [u8],
    columns: &ColumnNames,
    form: &mut RowForm,
    slots: &mut Slots<'a>,
) -> Result<(), RowError> {
    debug_assert_eq!(columns.len(), slots.len());
    slots.fill(None);
    let text = std::str::from_utf8(payload).map_err(|error| {
        RowError::Refused(format!(
            "the row is not valid UTF-8 from byte {}: expected a JSON object",
            error.valid_up_to()
        ))
    })?;
    if form.read(text, slots) {
        return Ok(());
    }
    slots.fill(None);
    if text.trim_ascii().is_empty() {
        return Err(RowError::Refused("the row is empty: expected a JSON object".into()));
    }
    let (mut row_error, mut order) = (None, Vec::with_capacity(columns.len()));
    let mut json = serde_json::Deserializer::from_str(text);
    let read = json
        .deserialize_map(Spread { columns, slots, order: &mut order, row_error: &mut row_error })
        .and_then(|()| json.end());
    match (row_error, read) {
        (Some(row_error), _) => Err(row_error),
        (None, Err(error)) => {
            Err(RowError::Refused(format!("the row is not a JSON object: {error}")))
        }
        (None, Ok(())) => {
            form.saw(order, columns);
            Ok(())
        }
    }
}

/// Visitor that fills slots from a JSON object.
struct Spread<'s, 'a> {
    columns: &'s ColumnNames,
    slots: &'s mut Slots<'a>,
    /// Places of the columns in the object's order.
    order: &'s mut Vec<usize>,
    row_error: &'s mut Option<RowError>,
}

impl<'a> Visitor<'a> for Spread<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        let mut likely = 0;
        while let Some(key) = map.next_key_seed(Key { columns: self.columns, likely })? {
            let place = match key {
                Ok(place) => place,
                Err(unknown) => {
                    *self.row_error = Some(RowError::UnknownKey(unknown));
                    return Err(de::Error::custom("unknown key"));
                }
            };
            let raw: &RawValue = map.next_value()?;
            self.order.push(place);
            if self.slots[place].replace(raw.into()).is_some() {
                let name = &self.columns.names[place];
                *self.row_error =
                    Some(RowError::Refused(format!("the row has the key {name:?} twice")));
                return Err(de::Error::custom("repeated key"));
            }
            likely = place + 1;
        }
        Ok(())
    }
}

/// Visitor that reads one key: as a column's place, or as a text without a column.
struct Key<'s> {
    columns: &'s ColumnNames,
    likely: usize,
}

impl<'a> DeserializeSeed<'a> for Key<'_> {
    type Value = Result<usize, String>;

    fn deserialize<D: de::Deserializer<'a>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Result<usize, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a column's name")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.columns.find(key, self.likely).ok_or_else(|| shortened(key).into_owned()))
    }
}

/// Makes the reason for a value that does not fit its column.
pub fn misfit(column: &str, data_type: &str, raw: RawJson<'_>, why: &str) -> String {
    format!("column {column:?} of type {data_type} does not take {}: {why}", shortened(raw.get()))
}

/// Returns the beginning of a text, with a mark if it was cut.
pub(crate) fn shortened(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", &text[..end], text.len())),
    }
}

/// Every column that a route has declared or that the table has had, for all shards of a sink. If one of them is
/// missing, the table has changed, and rows that have it are not at fault.
#[derive(Debug, Default)]
pub struct KnownColumns(Mutex<HashSet<String>>);

impl KnownColumns {
    /// Notes columns.
    pub fn remember<'n>(&self, names: impl IntoIterator<Item = &'n str>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            if !known.contains(name) {
                known.insert(name.to_owned());
            }
        }
    }

    /// Returns whether the column was ever in the table, or declared.
    pub fn contains(&self, name: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }
}

/// Checks that the format of every route is JSON.
pub fn check_formats(sink: &SinkName, routes: &[BoundRoute]) -> Result<(), SinkError> {
    let is_json = |format: &str| {
        let essence = format.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json") || essence.ends_with("+json")
    };
    match routes.iter().find(|route| !is_json(&route.format)) {
        None => Ok(()),
        Some(route) => Err(SinkError::Unavailable {
            sink: sink.clone(),
            cause: format!(
                "route {:?} carries {:?}, a SQL table takes application/json objects: \
                 add a stage that makes them, or bind the route to another sink",
                route.name.as_str(),
                route.format
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(payload: &[u8]) -> Result<Vec<Option<String>>, RowError> {
        let columns = ColumnNames::new(["id".to_owned(), "make".to_owned()]);
        let mut slots = vec![None; columns.len()];
        spread(payload, &columns, &mut RowForm::default(), &mut slots)?;
        Ok(slots.iter().map(|slot| slot.map(|raw| raw.get().to_owned())).collect())
    }

    #[test]
    fn values_stay_as_they_were_written() {
        let row = read(br#" {"make": "B\u00fcssing", "id":1.50e2 } "#);
        assert_eq!(row, Ok(vec![Some("1.50e2".into()), Some(r#""B\u00fcssing""#.into())]));
        assert_eq!(read(br#"{"\u0069d":7}"#), Ok(vec![Some("7".into()), None]));
        assert_eq!(read(b"{}"), Ok(vec![None, None]));
    }

    #[test]
    fn what_is_no_row_says_why() {
        for (payload, part) in [
            (&b""[..], "empty"),
            (b"\xff\xfe", "UTF-8 from byte 0"),
            (b"[1]", "a JSON object"),
            (b"12", "a JSON object"),
            (b"{\"id\":1", "EOF"),
            (b"{\"id\":1}{}", "trailing"),
            (b"{\"id\":1,\"id\":2}", "twice"),
        ] {
            match read(payload) {
                Err(RowError::Refused(reason)) => assert!(reason.contains(part), "{reason}"),
                other => panic!("{payload:?}: {other:?}"),
            }
        }
        assert_eq!(read(b"{\"colour\":1}"), Err(RowError::UnknownKey("colour".into())));
    }
}
