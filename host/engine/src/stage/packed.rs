//! A batch and its items at a stage, packed: all bytes end to end, and a few numbers per record.

use bytes::Bytes;

use super::flow::{Flow, Item};
use shardmill_core::record::{Batch, Entry, Position, PositionRange, Record, ShardKey};

/// Bytes of a sequence number outside of its position, with the allocator's overhead.
const SEQUENCE_BYTES: usize = 80;
/// Bytes of a packed batch besides its records: the struct, names, its position range.
const BATCH_BYTES: usize = 512;

/// A batch and the flow with which it was about to enter a stage.
pub(super) struct PackedBatch {
    shard: ShardKey,
    range: PositionRange,
    entry: Entry,
    /// Keys and payloads of the records, then of the items.
    arena: Bytes,
    records: Box<[PackedRecord]>,
    items: Items,
}

struct PackedRecord {
    position: Position,
    arrived_ms: u64,
    key_bytes: u32,
    payload_bytes: u32,
}

enum Items {
    /// One item per record, unchanged.
    Records {
        upstream_route: u32,
    },
    Own(Box<[PackedItem]>),
}

struct PackedItem {
    record: u32,
    ordinal: u32,
    upstream_route: u32,
    key_bytes: u32,
    payload_bytes: u32,
}

impl PackedBatch {
    /// Returns the memory that a packed batch would hold, in bytes.
    pub(super) fn bytes_of(batch: &Batch, flow: &Flow) -> usize {
        let items = match route_of_records(batch, flow) {
            Some(_) => 0,
            None => {
                let bytes = flow.iter().map(|item| item.key.len() + item.payload.len());
                bytes.sum::<usize>() + flow.len() * size_of::<PackedItem>()
            }
        };
        occupied(batch.records.len(), batch.bytes() + items + entry_bytes(&batch.entry))
    }

    /// Returns the memory that it holds, in bytes.
    pub(super) fn bytes(&self) -> usize {
        let items = match &self.items {
            Items::Records { .. } => 0,
            Items::Own(items) => items.len() * size_of::<PackedItem>(),
        };
        occupied(self.records.len(), self.arena.len() + items + entry_bytes(&self.entry))
    }

    /// Packs copies of the batch and the flow.
    pub(super) fn pack(batch: &Batch, flow: &Flow) -> Self {
        let route = route_of_records(batch, flow);
        let own = if route.is_some() { &[][..] } else { &flow[..] };
        let mut bytes = batch.bytes();
        bytes += own.iter().map(|item| item.key.len() + item.payload.len()).sum::<usize>();
        let mut arena = Vec::with_capacity(bytes);
        let mut append = |bytes: &Bytes| {
            arena.extend_from_slice(bytes);
            // A record has at most 10 MiB, an output at most what a plugin may hand back.
            u32::try_from(bytes.len()).unwrap_or(u32::MAX)
        };
        let records = batch.records.iter().map(|record| PackedRecord {
            position: record.position.clone(),
            arrived_ms: record.arrived_ms,
            key_bytes: append(&record.partition_key),
            payload_bytes: append(&record.payload),
        });
        let records = records.collect();
        let items = match route {
            Some(upstream_route) => Items::Records { upstream_route },
            None => Items::Own(
                own.iter()
                    .map(|item| PackedItem {
                        record: item.record,
                        ordinal: item.ordinal,
                        upstream_route: item.upstream_route,
                        key_bytes: append(&item.key),
                        payload_bytes: append(&item.payload),
                    })
                    .collect(),
            ),
        };
        Self {
            shard: batch.shard.clone(),
            range: batch.range.clone(),
            entry: batch.entry.clone(),
            arena: arena.into(),
            records,
            items,
        }
    }

    /// Returns the batch and the flow as they were.
    pub(super) fn unpack(&self) -> (Batch, Flow) {
        let mut rest = self.arena.clone();
        let mut next = |bytes: u32| rest.split_to(rest.len().min(bytes as usize));
        let records = self.records.iter().map(|record| Record {
            position: record.position.clone(),
            partition_key: next(record.key_bytes),
            payload: next(record.payload_bytes),
            arrived_ms: record.arrived_ms,
        });
        let (shard, range, entry) = (self.shard.clone(), self.range.clone(), self.entry.clone());
        let batch = Batch { shard, records: records.collect(), range, entry };
        let flow = match &self.items {
            Items::Records { upstream_route } => {
                super::flow::entering_flow(&batch, *upstream_route)
            }
            Items::Own(items) => {
                let items = items.iter().map(|item| Item {
                    record: item.record,
                    ordinal: item.ordinal,
                    upstream_route: item.upstream_route,
                    key: next(item.key_bytes),
                    payload: next(item.payload_bytes),
                });
                items.collect()
            }
        };
        (batch, flow)
    }
}

fn occupied(records: usize, bytes: usize) -> usize {
    BATCH_BYTES + records * (size_of::<PackedRecord>() + SEQUENCE_BYTES) + bytes
}

/// Returns the bytes of a redrive's entry besides the records.
fn entry_bytes(entry: &Entry) -> usize {
    match entry {
        Entry::Source => 0,
        Entry::Redrive(redrive) => redrive.origins.len() * (size_of::<Position>() + SEQUENCE_BYTES),
    }
}

/// Returns the upstream route of the items, if they are the unchanged records.
fn route_of_records(batch: &Batch, flow: &Flow) -> Option<u32> {
    let route = flow.first()?.upstream_route;
    let is_same =
        |one: &Bytes, other: &Bytes| (one.as_ptr(), one.len()) == (other.as_ptr(), other.len());
    let mut pairs = flow.iter().zip(&batch.records).zip(0u32..);
    let are_records = flow.len() == batch.records.len()
        && pairs.all(|((item, record), index)| {
            (item.record, item.ordinal, item.upstream_route) == (index, 0, route)
                && is_same(&item.key, &record.partition_key)
                && is_same(&item.payload, &record.payload)
        });
    are_records.then_some(route)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::stage::flow::first_flow;
    use shardmill_core::record::{PipelineName, SequenceNumber, ShardId, StreamIdentity};

    fn batch(payload_bytes: usize) -> Batch {
        let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 0 };
        let shard = ShardKey {
            pipeline: PipelineName::new("cars"),
            stream: Arc::new(stream),
            shard: ShardId::new("shardId-000000000000"),
        };
        // The batch is a small part of one large answer.
        let answer = Bytes::from(vec![7; 100 * payload_bytes]);
        let record = |number: u64| Record {
            position: Position { sequence: SequenceNumber::from(number), sub_sequence: 1 },
            partition_key: Bytes::from(format!("key-{number}")),
            payload: answer.slice(..payload_bytes),
            arrived_ms: number,
        };
        let records: Vec<Record> = (1..=10).map(record).collect();
        let to_inclusive = records[9].position.clone();
        let range = PositionRange { from_exclusive: None, to_inclusive };
        Batch { shard, records, range, entry: Entry::Source }
    }

    #[test]
    fn fault_38_a_sample_is_what_entered_and_occupies_no_more_than_is_counted() {
        let batch = batch(1_000);
        let as_came = first_flow(&batch);
        let mut parts: Flow =
            as_came.iter().flat_map(|item| [item.clone(), item.clone()]).collect();
        for (index, item) in parts.iter_mut().enumerate() {
            item.ordinal = index as u32 % 2;
            item.payload = item.payload.slice(..index);
        }
        for flow in [as_came, parts, Flow::new()] {
            let packed = PackedBatch::pack(&batch, &flow);
            assert_eq!(packed.bytes(), PackedBatch::bytes_of(&batch, &flow));
            let (unpacked, entered) = packed.unpack();
            assert_eq!(format!("{unpacked:?}"), format!("{batch:?}"));
            assert_eq!(entered, flow);
            // The rest of the answer, 100 kB, is not kept.
            assert!(packed.arena.len() < 11_000, "{}", packed.arena.len());
        }
    }
}
