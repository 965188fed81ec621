//! Fuzz target of rows that are spread over columns: compares them with a reader that keeps every pair.

#![allow(clippy::expect_used, reason = "a finding is a panic")]

use std::fmt;

use fastrand::Rng;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::form::RowForm;
use super::{ColumnNames, RowError, shortened, spread};
use shardmill_core::fuzzing::FuzzTarget;

/// Checks that [`spread`] finds each value as it was written, whatever rows came before, and refuses the rest.
pub const ROWS: FuzzTarget = FuzzTarget {
    name: "rows",
    run,
    grow,
    words: &[
        "{\"id\":",
        ",\"make \\\"x\\\"\":",
        "\"\\u0069d\":",
        "null",
        "1e5",
        "\"\\ud800\"",
        "{}",
        "[",
        "}",
        " ",
    ],
};

const COLUMNS: [&str; 4] = ["id", "make \"x\"", "cents", "at"];

/// Byte between the rows of an input. All of them go through one [`RowForm`].
const SEPARATOR: u8 = 0;

/// Values by column, or the fault of the first invalid key.
type Found = Result<Vec<Option<String>>, ExpectedError>;

#[derive(Debug, PartialEq)]
enum ExpectedError {
    UnknownKey(String),
    Refused,
}

fn run(data: &[u8]) {
    let columns = ColumnNames::new(COLUMNS.map(String::from));
    let mut form = RowForm::default();
    for row in data.split(|byte| *byte == SEPARATOR) {
        let mut slots = vec![None; COLUMNS.len()];
        let read = spread(row, &columns, &mut form, &mut slots);
        let found: Found = match read {
            Ok(()) => Ok(slots.iter().map(|slot| slot.map(|raw| raw.get().to_owned())).collect()),
            Err(RowError::UnknownKey(key)) => Err(ExpectedError::UnknownKey(key)),
            Err(RowError::Refused(_)) => Err(ExpectedError::Refused),
        };
        let shown = row.escape_ascii();
        match serde_json::from_slice::<Pairs>(row) {
            Ok(Pairs(pairs)) => assert_eq!(found, reference(pairs), "{shown}"),
            // An invalid key may be found before invalid text.
            Err(_) => assert!(found.is_err(), "{shown}: {found:?}"),
        }
    }
}

fn reference(pairs: Vec<(String, Box<RawValue>)>) -> Found {
    let mut values = vec![None; COLUMNS.len()];
    for (key, value) in pairs {
        let Some(place) = COLUMNS.iter().position(|column| *column == key) else {
            return Err(ExpectedError::UnknownKey(shortened(&key).into_owned()));
        };
        if values[place].replace(value.get().to_owned()).is_some() {
            return Err(ExpectedError::Refused);
        }
    }
    Ok(values)
}

/// All pairs of a JSON object, in their order.
struct Pairs(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}

fn grow(random: &mut Rng) -> Vec<u8> {
    let keys = ["\"id\"", "\"make \\\"x\\\"\"", "\"cents\"", "\"at\""];
    let values = [
        "12",
        "-3.25",
        "null",
        "true",
        "\"Honda\"",
        "\"a\\\"b\"",
        "\"\\u00e9\"",
        "1.5e3",
        "[1,{\"a\":\"}\"}]",
        "\"Škoda\"",
        "{}",
        "0",
        "-0",
    ];
    let mut order: Vec<usize> = (0..4).collect();
    let mut rows = Vec::new();
    for _ in 0..random.usize(1..6) {
        if random.u8(..6) == 0 {
            random.shuffle(&mut order);
        }
        let kept = if random.u8(..8) == 0 { random.usize(..5) } else { 4 };
        let fields: Vec<String> = order[..kept]
            .iter()
            .map(|place| format!("{}:{}", keys[*place], random.choice(&values).expect("some")))
            .collect();
        rows.push(format!("{{{}}}", fields.join(",")));
    }
    rows.join("\0").into_bytes()
}
