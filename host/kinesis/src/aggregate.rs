//! Aggregated records of the Kinesis Producer Library: many user records in one.
//!
//! Source: the KPL's "Aggregation format": `F3 89 9A C2`, then the protobuf message `AggregatedRecord`, then the 16
//! bytes of the message's MD5. Bytes that do not match this format are an ordinary record, as in Amazon's own client
//! library.
//!
//! Invariant: an aggregate is accepted or refused as a whole, before its first user record is delivered. So a user
//! record has the same sub-sequence number (its index in the aggregate) in every run.
//!
//! The producer chooses the bytes, so they may be hostile. An aggregate of 10 MiB may have a million user records, or
//! one key of 5 MiB that all of them use. Therefore:
//! - [`open`] validates all of it, in time and memory proportional to its bytes: it hashes each key once, and refuses
//!   keys that no stream takes.
//! - [`Aggregate::take`] takes user records out a batch at a time. The rest costs its bytes, and four more for each
//!   key.
//! - A batch with few of an aggregate's bytes copies them; otherwise it would keep the whole aggregate in memory.
//!
//! | bytes | [`Opened`] |
//! |---|---|
//! | no magic number, wrong MD5, invalid message, invalid index or key | `Ordinary` |
//! | valid, and a user record's hash is outside of the shard's range | `Astray` |
//! | valid otherwise, or the shard's range is unknown | `Aggregate` |

use std::ops::Range;

use bytes::Bytes;
use md5::{Digest as _, Md5};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use shardmill_core::record::{HashRange, is_kept_whole};

const MAGIC: [u8; 4] = [0xF3, 0x89, 0x9A, 0xC2];
const DIGEST_BYTES: usize = 16;

/// Most characters of a partition key.
///
/// Source: API reference, PutRecord, `PartitionKey`.
const KEY_CHARS_MAX: usize = 256;
/// Most bytes of [`KEY_CHARS_MAX`] characters in UTF-8.
const KEY_BYTES_MAX: usize = 4 * KEY_CHARS_MAX;

/// One user record of an aggregate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubRecord {
    /// Partition key of the user record.
    pub partition_key: Bytes,
    /// Payload of the user record.
    pub payload: Bytes,
}

/// Kind of a record, by its bytes.
#[derive(Clone, Debug)]
pub enum Opened {
    /// An ordinary record.
    Ordinary,
    /// An aggregate with a user record that belongs to another shard.
    Astray,
    /// An aggregate that belongs to the shard.
    Aggregate(Box<Aggregate>),
}

/// A valid aggregate, from which user records are taken in order.
#[derive(Clone, Debug)]
pub struct Aggregate {
    /// Bytes of the whole record, which user records share.
    data: Bytes,
    /// End of the message in `data`.
    end: usize,
    /// For each partition key, the place of its length in `data`.
    keys: Box<[u32]>,
    /// Number of its user records.
    count: u64,
    next: Cursor,
}

/// A place between two user records.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    /// Index of the next user record, from 0: its sub-sequence number.
    number: u64,
    /// Place of the next field in `data`.
    at: usize,
}

/// Byte ranges of a user record in its aggregate.
struct SubRecordSpan {
    key: Range<usize>,
    payload: Range<usize>,
}

/// Returns whether a record begins like an aggregate. Only such a record needs to be validated.
pub(crate) fn begins_as_aggregate(data: &[u8]) -> bool {
    data.starts_with(&MAGIC)
}

/// Finds out whether a record is an aggregate, and whether all of it belongs to a shard with this range of hashes.
/// Without a range, it does. The time is bounded by the record's bytes: each key is hashed once, however many user
/// records use it.
pub fn open(data: &Bytes, range: Option<&HashRange>) -> Opened {
    match validate(data, range) {
        None => Opened::Ordinary,
        Some((_, false)) => Opened::Astray,
        Some((aggregate, true)) => Opened::Aggregate(Box::new(aggregate)),
    }
}

/// Returns the user records of an aggregate, in order; `None`: it is an ordinary record.
///
/// Payloads share the record's bytes.
pub fn deaggregate(data: &Bytes) -> Option<Vec<SubRecord>> {
    let Opened::Aggregate(mut aggregate) = open(data, None) else { return None };
    Some(aggregate.take(|_, _| true).into_iter().map(|(_, record)| record).collect())
}

impl Aggregate {
    /// Returns the number of its user records.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns whether all user records were taken.
    pub fn is_empty(&self) -> bool {
        self.next.number >= self.count
    }

    /// Returns the memory that it uses, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        size_of::<Self>() + self.data.len() + size_of_val(&*self.keys)
    }

    /// Skips the user records before this index.
    pub fn skip_to(&mut self, number: u64) {
        while self.next.number < number.min(self.count) {
            match next_field(&self.data, self.end, &mut self.next.at) {
                Some(Some(Field::Record(_))) => self.next.number += 1,
                Some(Some(_)) => {}
                // Does not happen, since the aggregate was validated. If it did, the rest would end here.
                None | Some(None) => self.count = self.next.number,
            }
        }
    }

    /// Takes user records with their indexes, while `fits` accepts the next one's key and payload lengths in bytes.
    ///
    /// They share the aggregate's bytes if they are most of them. A few are copied: otherwise each batch would keep the
    /// whole aggregate in memory.
    pub fn take(&mut self, mut fits: impl FnMut(usize, usize) -> bool) -> Vec<(u64, SubRecord)> {
        let mut taken = Vec::new();
        let (mut own_bytes, first) = (0, self.next.number);
        while !self.is_empty() {
            let mut after = self.next;
            let Some(span) = self.read(&mut after) else {
                self.count = self.next.number;
                break;
            };
            if !fits(span.key.len(), span.payload.len()) {
                break;
            }
            own_bytes += span.key.len() + span.payload.len();
            taken.push(span);
            self.next = after;
        }
        let bytes = match is_kept_whole(self.data.len(), own_bytes, taken.len()) {
            true => self.data.clone(),
            false => copy(&self.data, &mut taken),
        };
        let share = |span: SubRecordSpan| SubRecord {
            partition_key: bytes.slice(span.key),
            payload: bytes.slice(span.payload),
        };
        (first..).zip(taken.into_iter().map(share)).collect()
    }

    /// Returns the user record at a place, and moves the place after it.
    fn read(&self, cursor: &mut Cursor) -> Option<SubRecordSpan> {
        loop {
            let Field::Record(within) = next_field(&self.data, self.end, &mut cursor.at)?? else {
                continue;
            };
            cursor.number += 1;
            let record = read_record(&self.data, within)?;
            let mut key_at = *self.keys.get(usize::try_from(record.key).ok()?)? as usize;
            let key = delimited(&self.data, self.end, &mut key_at)?;
            return Some(SubRecordSpan { key, payload: record.payload });
        }
    }
}

/// Copies the bytes of the spans, and changes the spans to the copy. Neighbours with the same key share its copy.
fn copy(data: &Bytes, spans: &mut [SubRecordSpan]) -> Bytes {
    let mut bytes = Vec::with_capacity(
        spans.iter().map(|span| span.key.len() + span.payload.len()).sum::<usize>(),
    );
    let mut last: Option<(Range<usize>, Range<usize>)> = None;
    for span in spans {
        let mut append = |range: &Range<usize>| {
            let start = bytes.len();
            bytes.extend_from_slice(&data[range.clone()]);
            start..bytes.len()
        };
        let payload = append(&span.payload);
        let key = match &last {
            Some((own, copied)) if *own == span.key => copied.clone(),
            _ => append(&span.key),
        };
        last = Some((std::mem::replace(&mut span.key, key.clone()), key));
        span.payload = payload;
    }
    bytes.shrink_to_fit();
    bytes.into()
}

/// Whether the hash of a key belongs to the shard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Belongs {
    NotHashed,
    Here,
    Elsewhere,
    /// An explicit hash key that is not a number.
    Invalid,
}

impl Belongs {
    fn of(hash: u128, range: Option<&HashRange>) -> Self {
        match range.is_none_or(|range| range.contains(hash)) {
            true => Self::Here,
            false => Self::Elsewhere,
        }
    }
}

/// Returns the aggregate, and whether all of it belongs to the shard; `None`: it is an ordinary record.
///
/// Reads the message twice: the tables of keys may follow the records that refer to them.
fn validate(data: &Bytes, range: Option<&HashRange>) -> Option<(Aggregate, bool)> {
    let end = data.len().checked_sub(DIGEST_BYTES)?;
    if end < MAGIC.len() || data[..MAGIC.len()] != MAGIC || u32::try_from(end).is_err() {
        return None;
    }
    let start = MAGIC.len();
    if Md5::digest(&data[start..end])[..] != data[end..] {
        return None;
    }
    // First pass: the tables.
    let (mut keys, mut hash_keys) = (Vec::new(), Vec::new());
    let mut at = start;
    loop {
        match next_field(data, end, &mut at)? {
            None => break,
            Some(Field::Key { length_at, range }) => {
                check_key(&data[range])?;
                keys.push(u32::try_from(length_at).ok()?);
            }
            Some(Field::HashKey(within)) => hash_keys.push(hash_of(&data[within], range)),
            Some(Field::Record(_) | Field::Other) => {}
        }
    }
    // Second pass: each record's indexes must be valid. A key is hashed once, when the first record refers to it.
    let mut hashed = vec![Belongs::NotHashed; keys.len()];
    let (mut count, mut is_here) = (0, true);
    let mut at = start;
    while let Some(field) = next_field(data, end, &mut at)? {
        let Field::Record(within) = field else { continue };
        let record = read_record(data, within)?;
        count += 1;
        let key = usize::try_from(record.key).ok()?;
        let own = hashed.get_mut(key)?;
        let belongs = match record.hash_key {
            Some(index) => *hash_keys.get(usize::try_from(index).ok()?)?,
            None => {
                if *own == Belongs::NotHashed {
                    let mut key_at = keys[key] as usize;
                    let key = delimited(data, end, &mut key_at)?;
                    *own = match range {
                        Some(_) => Belongs::of(hash_key(&data[key]), range),
                        None => Belongs::Here,
                    };
                }
                *own
            }
        };
        match belongs {
            Belongs::Here => {}
            Belongs::Elsewhere => is_here = false,
            Belongs::Invalid | Belongs::NotHashed => return None,
        }
    }
    let next = Cursor { number: 0, at: start };
    Some((Aggregate { data: data.clone(), end, keys: keys.into(), count, next }, is_here))
}

/// Returns `None` for bytes that no stream takes as a partition key. An empty key is accepted.
fn check_key(key: &[u8]) -> Option<()> {
    if key.len() > KEY_BYTES_MAX {
        return None;
    }
    let key = std::str::from_utf8(key).ok()?;
    (key.chars().count() <= KEY_CHARS_MAX).then_some(())
}

/// Returns where an explicit hash key belongs; it is a decimal number.
fn hash_of(decimal: &[u8], range: Option<&HashRange>) -> Belongs {
    let hash = std::str::from_utf8(decimal).ok().and_then(|text| text.parse().ok());
    hash.map_or(Belongs::Invalid, |hash| Belongs::of(hash, range))
}

/// Returns the hash of a partition key, which decides the shard: its MD5 as a number.
///
/// Source: API reference, PutRecord: "an MD5 hash function is used to map partition keys to 128-bit
/// integer values".
fn hash_key(partition_key: &[u8]) -> u128 {
    u128::from_be_bytes(Md5::digest(partition_key).into())
}

/// Field of `AggregatedRecord`, with the byte range of its content.
enum Field {
    /// Field 1, `partition_key_table`.
    Key { length_at: usize, range: Range<usize> },
    /// Field 2, `explicit_hash_key_table`.
    HashKey(Range<usize>),
    /// Field 3, `records`.
    Record(Range<usize>),
    /// Any other field: it is skipped, as protobuf requires.
    Other,
}

/// Returns the field at a place, and moves the place after it. The inner `None`: the message ends there. The outer
/// `None`: the bytes are not a valid message.
fn next_field(data: &[u8], end: usize, at: &mut usize) -> Option<Option<Field>> {
    let mut rest = data.get(*at..end)?;
    if rest.is_empty() {
        return Some(None);
    }
    let (tag, wire_type) = decode_key(&mut rest).ok()?;
    *at = end - rest.len();
    if !matches!(tag, 1..=3) {
        skip_field(wire_type, tag, &mut rest, DecodeContext::default()).ok()?;
        *at = end - rest.len();
        return Some(Some(Field::Other));
    }
    if wire_type != WireType::LengthDelimited {
        return None;
    }
    let length_at = *at;
    let range = delimited(data, end, at)?;
    Some(Some(match tag {
        1 => Field::Key { length_at, range },
        2 => Field::HashKey(range),
        _ => Field::Record(range),
    }))
}

/// Returns the content after the length at a place, and moves the place after the content.
fn delimited(data: &[u8], end: usize, at: &mut usize) -> Option<Range<usize>> {
    let mut rest = data.get(*at..end)?;
    let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
    let start = end - rest.len();
    let content_end = start.checked_add(length).filter(|content_end| *content_end <= end)?;
    *at = content_end;
    Some(start..content_end)
}

/// `Record` within the message. Tags (field 4) are skipped: nothing reads them.
struct WireRecord {
    /// Index into the table of partition keys.
    key: u64,
    /// Index into the table of explicit hash keys.
    hash_key: Option<u64>,
    payload: Range<usize>,
}

/// Reads a `Record`; `None`: the bytes are not a valid one. As in every protobuf message, the last of several values
/// counts.
fn read_record(data: &[u8], within: Range<usize>) -> Option<WireRecord> {
    let (mut at, end) = (within.start, within.end);
    let (mut key, mut hash_key, mut payload) = (None, None, None);
    while at < end {
        let mut rest = data.get(at..end)?;
        let (tag, wire_type) = decode_key(&mut rest).ok()?;
        match (tag, wire_type) {
            (1, WireType::Varint) => key = Some(decode_varint(&mut rest).ok()?),
            (2, WireType::Varint) => hash_key = Some(decode_varint(&mut rest).ok()?),
            (3, WireType::LengthDelimited) => {
                let mut content_at = end - rest.len();
                payload = Some(delimited(data, end, &mut content_at)?);
                at = content_at;
                continue;
            }
            (1..=3, _) => return None,
            _ => skip_field(wire_type, tag, &mut rest, DecodeContext::default()).ok()?,
        }
        at = end - rest.len();
    }
    // Both are required (proto2): to Amazon's library, a message without them is not an aggregate.
    Some(WireRecord { key: key?, hash_key, payload: payload? })
}

#[cfg(test)]
#[path = "aggregate_tests.rs"]
mod tests;
