//! Data between two stages: one arena, and the items in it.

use std::ops::Range;

use bytes::Bytes;

use shardmill_core::record::Batch;
use shardmill_plugin::{Input, Span, WireBatch};

/// One record, or one output of the stage before, that enters a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Index of its source record in the batch.
    pub record: u32,
    /// Its number among the items of that record at this point of the path, from 0.
    pub ordinal: u32,
    /// Index of the route that it came by, among the routes that enter the stage.
    pub upstream_route: u32,
    /// Its partition key.
    pub key: Bytes,
    /// Its payload.
    pub payload: Bytes,
}

/// Items by ascending (record, ordinal).
pub type Flow = Vec<Item>;

/// Returns the records of a batch as the first stage gets them.
pub fn first_flow(batch: &Batch) -> Flow {
    entering_flow(batch, 0)
}

/// Returns the records of a batch as a stage gets them by one of its upstream routes.
pub(crate) fn entering_flow(batch: &Batch, upstream_route: u32) -> Flow {
    let numbered = batch.records.iter().zip(0u32..);
    numbered
        .map(|(record, index)| Item {
            record: index,
            ordinal: 0,
            upstream_route,
            key: record.partition_key.clone(),
            payload: record.payload.clone(),
        })
        .collect()
}

/// Returns the items of the records before `record`.
pub fn before(items: &[Item], record: u32) -> &[Item] {
    &items[..items.partition_point(|item| item.record < record)]
}

/// Packs items into `wire`, whose buffers are reused: keys, sequence numbers and payloads end to end in one arena.
pub(crate) fn pack(batch: &Batch, items: &[Item], wire: &mut WireBatch) {
    wire.arena.clear();
    wire.inputs.clear();
    for item in items {
        let record = &batch.records[item.record as usize];
        let origin = batch.origin(item.record);
        let key = append(&mut wire.arena, &item.key);
        let payload = append(&mut wire.arena, &item.payload);
        let sequence = append(&mut wire.arena, origin.sequence.as_str().as_bytes());
        let input = Input {
            key,
            payload,
            sequence,
            // An aggregate has at most 10 MiB of records of at least six bytes: it fits.
            sub_sequence: origin.sub_sequence as u32,
            route: item.upstream_route,
            arrived_ms: record.arrived_ms,
        };
        wire.inputs.extend_from_slice(&input.to_words());
    }
}

#[inline]
fn append(arena: &mut Vec<u8>, bytes: &[u8]) -> Span {
    let start = arena.len() as u32;
    arena.extend_from_slice(bytes);
    Span { start, length: bytes.len() as u32 }
}

/// Returns the span as a range, if it lies within `arena_bytes`.
#[inline]
pub fn within(span: Span, arena_bytes: usize) -> Option<Range<usize>> {
    let start = span.start as usize;
    let end = start.checked_add(span.length as usize)?;
    (end <= arena_bytes).then_some(start..end)
}
