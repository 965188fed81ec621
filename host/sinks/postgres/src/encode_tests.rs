//! Tests of rows that are encoded by the form of the row before.

use std::sync::Arc;

use super::super::table::{Fingerprint, LiveColumn};
use super::*;
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, RowRoute, SequenceNumber, ShardKey,
    StreamIdentity,
};
use shardmill_sinks_common::rows::ColumnNames;

const COLUMNS: [(&str, Kind); 6] = [
    ("id", Kind::Int8),
    ("make \"x\"", Kind::Text),
    ("cents", Kind::Int4),
    ("price", Kind::Numeric),
    ("at", Kind::Timestamptz),
    ("hex", Kind::Text),
];
const USUAL: [&str; COLUMNS.len()] =
    ["12", "\"Honda\"", "-7", "3.25", "\"2026-01-02T03:04:05Z\"", "null"];
const VALUES: [&str; 34] = [
    "0",
    "-0",
    "01",
    "-",
    "1.0",
    "1e3",
    "2147483648",
    "-2147483648",
    "999999999999999999",
    "1000000000000000000",
    "9223372036854775807",
    "-9223372036854775808",
    "9223372036854775808",
    "true",
    "null",
    "nulls",
    "\"\"",
    "\"NaN\"",
    "\"a b\"",
    "\"a,b\"",
    "\"a}b\"",
    "\"\u{7f}\"",
    "\"Škoda 🚗\"",
    "\"\\u00e9\"",
    "\"\\u0000\"",
    "\"a\\\"b\"",
    "\"a\nb\"",
    "\"open",
    "[1,2]",
    "{\"a\":\"}\"}",
    " 1",
    "1 ",
    "",
    "1\",\"id\":2",
];

fn table(generated: Option<usize>) -> LiveTable {
    let column = |(place, (name, kind)): (usize, &(&str, Kind))| LiveColumn {
        name: (*name).to_owned(),
        data_type: format!("{kind:?}"),
        kind: *kind,
        is_generated: generated == Some(place),
        not_null: false,
        has_default: false,
    };
    LiveTable {
        columns: COLUMNS.iter().enumerate().map(column).collect(),
        names: ColumnNames::new(COLUMNS.map(|(name, _)| name.to_owned())),
        fingerprint: Fingerprint::default(),
    }
}

/// Makes a payload that mostly has common values for all columns.
fn payload(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut order: Vec<usize> = (0..COLUMNS.len()).collect();
    if random.u8(..10) == 0 {
        random.shuffle(&mut order);
        order.truncate(random.usize(..=COLUMNS.len()));
    }
    let field = |place: usize| {
        let value =
            if random.u8(..25) == 0 { random.choice(VALUES).expect("some") } else { USUAL[place] };
        let name = serde_json::to_string(COLUMNS[place].0).expect("a text");
        format!("{name}:{value}")
    };
    let fields: Vec<String> = order.into_iter().map(field).collect();
    let end =
        if random.u8(..40) == 0 { *random.choice(&["", "} ", "}}"]).expect("some") } else { "}" };
    let mut payload = format!("{{{}{end}", fields.join(",")).into_bytes();
    if random.u8(..40) == 0 {
        let at = random.usize(..payload.len());
        payload[at] = random.u8(..);
    }
    payload
}

fn rows(payloads: Vec<Vec<u8>>) -> Vec<Row> {
    let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 0 };
    let shard =
        ShardKey { pipeline: "mart".into(), stream: Arc::new(stream), shard: "shard".into() };
    let position = Position { sequence: SequenceNumber::from(1), sub_sequence: 0 };
    let record = Record {
        position: position.clone(),
        partition_key: "key".into(),
        payload: "".into(),
        arrived_ms: 0,
    };
    let range = PositionRange { from_exclusive: None, to_inclusive: position };
    let batch = Arc::new(Batch { shard, records: vec![record], range, entry: Entry::Source });
    let row = |payload: Vec<u8>| Row {
        batch: batch.clone(),
        record: 0,
        ordinal: 0,
        route: RowRoute::from("sold"),
        key: "key".into(),
        payload: payload.into(),
    };
    payloads.into_iter().map(row).collect()
}

/// Encoded row: its columns and its tuple, or the reason of its refusal.
type Outcome = Result<(Box<[u16]>, Vec<u8>), String>;

fn outcomes(encoder: Encoder<'_, '_>, count: usize) -> Vec<Option<Outcome>> {
    let encoded = encoder.finish();
    let mut found = vec![None; count];
    for group in &encoded.groups {
        for (at, row) in group.rows.iter().enumerate() {
            let tuple = group.tuples(at..at + 1).to_vec();
            found[*row] = Some(Ok((group.columns.clone(), tuple)));
        }
    }
    for Refusal { row, reason } in encoded.refusals {
        found[row] = Some(Err(reason));
    }
    found
}

/// A row is encoded in the same way alone and after any other rows.
#[test]
fn rows_of_the_form_are_encoded_as_any_row_is() {
    let by_id = WriteMode::Upsert { key: vec!["id".into()], newest_by: Some("hex".into()) };
    let (mut by_form, mut total) = (0, 0);
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let table = table((seed % 7 == 0).then(|| random.usize(..COLUMNS.len())));
        let mode = if seed % 3 == 0 { &by_id } else { &WriteMode::Append };
        let new = || Encoder::new(&table, "cars", mode, Lineage::default(), 0);
        let rows = rows((0..200).map(|_| payload(&mut random)).collect());
        let (mut encoder, mut gone) = (new(), Vec::new());
        for (index, row) in rows.iter().enumerate() {
            total += 1;
            if encoder.add_by_form(index, &row.payload) {
                by_form += 1;
            } else {
                encoder.add(index, row, |_| true).unwrap_or_else(|_| gone.push(index));
            }
        }
        let found = outcomes(encoder, rows.len());
        for (index, (row, found)) in rows.iter().zip(found).enumerate() {
            let mut alone = new();
            let is_gone = alone.add(0, row, |_| true).is_err();
            assert_eq!(is_gone, gone.contains(&index), "seed {seed}: {:?}", row.payload);
            let alone = outcomes(alone, 1).remove(0);
            assert_eq!(found, alone, "seed {seed}: {:?}", row.payload);
        }
    }
    assert!(by_form * 3 > total, "{by_form} of {total} rows");
}
