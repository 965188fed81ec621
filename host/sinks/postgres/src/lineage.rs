//! Lineage: columns that store from which record a row came. With them a time window can be replaced.

use bytes::BufMut as _;

use super::kind::EPOCH_MICROS;
use super::numeric;
use super::table::LiveTable;
use shardmill_core::record::{Row, SinkName};
use shardmill_sinks_common::rows::decimal::Decimal;

/// Pipeline that wrote the row.
pub(super) const PIPELINE: &str = "shardmill_pipeline";
/// Time at which the stream accepted the record.
pub(super) const ARRIVED_AT: &str = "shardmill_arrived_at";

/// Lineage columns with their types, in the order of a row's fields.
pub(super) const COLUMNS: [(&str, &str); 4] = [
    (PIPELINE, "text"),
    ("shardmill_shard", "text"),
    ("shardmill_sequence", "numeric"),
    (ARRIVED_AT, "timestamptz"),
];

/// Sink that wrote the row. Optional; tables that we create have the column. It distinguishes the rows of two sinks of
/// one pipeline.
pub(super) const SINK: (&str, &str) = ("shardmill_sink", "text");

/// Digest of the component that made the row. Optional; tables that we create have the column.
pub(super) const DIGEST: (&str, &str) = ("shardmill_digest", "text");

/// Optional columns, in the order of a row's fields.
pub(super) const OPTIONAL: [(&str, &str); 2] = [DIGEST, SINK];

/// Lineage columns of a live table.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    /// Indexes of the columns; empty: rows have no lineage.
    pub(super) places: Vec<u16>,
    has_digest: bool,
    /// Name of the sink, if the table has a column for it.
    sink: Option<SinkName>,
}

impl Lineage {
    /// Finds the columns in a table. `sink` is the value of the sink column.
    ///
    /// # Errors
    /// The name of a missing column.
    pub(super) fn of(table: &LiveTable, sink: &SinkName) -> Result<Self, &'static str> {
        let place = |name: &'static str| {
            let found = table.columns.iter().position(|column| column.name == name);
            found.and_then(|place| u16::try_from(place).ok()).ok_or(name)
        };
        let mut places: Vec<u16> =
            COLUMNS.iter().map(|(name, _)| place(name)).collect::<Result<_, _>>()?;
        let [digest, sinks] = OPTIONAL.map(|(name, _)| place(name).ok());
        places.extend(digest.into_iter().chain(sinks));
        Ok(Self { places, has_digest: digest.is_some(), sink: sinks.map(|_| sink.clone()) })
    }
}

/// Writes the lineage fields of a row, each after its length.
///
/// # Errors
/// The reason why the record has no valid lineage; records of a stream always do.
pub(super) fn put(out: &mut Vec<u8>, row: &Row, lineage: &Lineage) -> Result<(), String> {
    let shard = &row.batch.shard;
    let sequence = &row.batch.origin(row.record).sequence;
    let mut number = Vec::new();
    let decimal = Decimal::parse(sequence.as_str()).ok_or("its sequence number is invalid")?;
    numeric::put(&decimal, &mut number).map_err(|why| why.into_owned())?;
    let arrived_micros = i64::try_from(row.source().arrived_ms)
        .ok()
        .and_then(|ms| ms.checked_mul(1_000))
        .ok_or("its time of arrival is out of range")?;
    let arrived_at = (arrived_micros - EPOCH_MICROS).to_be_bytes();
    let (pipeline, shard) = (shard.pipeline.as_str().as_bytes(), shard.shard.as_str().as_bytes());
    let always = [pipeline, shard, &number, &arrived_at];
    let digest = lineage.has_digest.then(|| row.route.digest().as_bytes());
    let sink = lineage.sink.as_ref().map(|sink| sink.as_str().as_bytes());
    for field in always.into_iter().chain(digest).chain(sink) {
        out.put_i32(i32::try_from(field.len()).map_err(|_| "a name is too long")?);
        out.put_slice(field);
    }
    Ok(())
}
