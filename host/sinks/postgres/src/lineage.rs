//! Lineage: columns that say from which record a row came. By them a window of time can be replaced.

use bytes::BufMut as _;

use super::kind::EPOCH_MICROS;
use super::numeric;
use super::table::LiveTable;
use shardmill_core::record::{Row, SinkName};
use shardmill_sinks_common::rows::decimal::Decimal;

/// The pipeline that wrote the row.
pub(super) const PIPELINE: &str = "shardmill_pipeline";
/// When the stream accepted the record.
pub(super) const ARRIVED_AT: &str = "shardmill_arrived_at";

/// The columns with their types, in the order in which a row brings them.
pub(super) const COLUMNS: [(&str, &str); 4] = [
    (PIPELINE, "text"),
    ("shardmill_shard", "text"),
    ("shardmill_sequence", "numeric"),
    (ARRIVED_AT, "timestamptz"),
];

/// The sink that wrote the row: filled where a table has it, as those that we create do. By it the rows of two
/// sinks of one pipeline are told apart.
pub(super) const SINK: (&str, &str) = ("shardmill_sink", "text");

/// The digest of the component that made the row: filled where a table has it, as those that we create do.
pub(super) const DIGEST: (&str, &str) = ("shardmill_digest", "text");

/// Columns that a table may have, in the order in which a row brings them.
pub(super) const OPTIONAL: [(&str, &str); 2] = [DIGEST, SINK];

/// The columns of a live table that say where a row came from.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    /// Their places; empty: rows do not say it.
    pub(super) places: Vec<u16>,
    has_digest: bool,
    /// The sink's name, where the table has a column for it.
    sink: Option<SinkName>,
}

impl Lineage {
    /// Finds the columns in a table; `sink` is what rows of the sink say.
    ///
    /// # Errors
    /// The name of one that is not there.
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

/// Writes the fields of a row, as [`Lineage::of`] has found them, each behind its length.
///
/// # Errors
/// Why the record has none, which a record of a stream cannot cause.
pub(super) fn put(out: &mut Vec<u8>, row: &Row, lineage: &Lineage) -> Result<(), String> {
    let shard = &row.batch.shard;
    let sequence = &row.batch.origin(row.record).sequence;
    let mut number = Vec::new();
    let decimal = Decimal::parse(sequence.as_str()).ok_or("its sequence number is none")?;
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
