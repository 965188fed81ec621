//! Aggregated records of the Kinesis Producer Library: many user records in one.
//!
//! Source: the KPL's "Aggregation format": `F3 89 9A C2`, then the protobuf message
//! `AggregatedRecord`, then the 16 bytes of the message's MD5. Anything that does not fit this is an
//! ordinary record, as Amazon's own client library has it.
//!
//! Who can put a record chooses its bytes: an aggregate of 10 MiB may have a million user records, or one
//! key of half of its bytes that all of them name. So an aggregate is validated as a whole, in time and
//! memory that grow with its bytes alone, and then taken apart a batch at a time: what was not taken yet
//! costs its bytes and four more for each key.

use std::ops::Range;

use bytes::Bytes;
use md5::{Digest as _, Md5};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use shardmill_core::record::{HashRange, is_kept_whole};

const MAGIC: [u8; 4] = [0xF3, 0x89, 0x9A, 0xC2];
const DIGEST_BYTES: usize = 16;

/// The most characters of a partition key.
///
/// Source: API reference, PutRecord, `PartitionKey`.
const KEY_CHARS_MAX: usize = 256;
/// The most bytes that so many characters have in UTF-8.
const KEY_BYTES_MAX: usize = 4 * KEY_CHARS_MAX;

/// One user record of an aggregate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubRecord {
    /// Its own partition key.
    pub partition_key: Bytes,
    /// Its payload.
    pub payload: Bytes,
}

/// The meaning of a record's bytes.
#[derive(Clone, Debug)]
pub enum Opened {
    /// They are no aggregate.
    Ordinary,
    /// They are an aggregate with a user record that belongs in another shard.
    Astray,
    /// They are an aggregate.
    Aggregate(Box<Aggregate>),
}

/// A valid aggregate, of which user records are taken in order.
#[derive(Clone, Debug)]
pub struct Aggregate {
    /// The whole record: user records share its bytes.
    data: Bytes,
    /// Where the message ends in `data`.
    end: usize,
    /// Where each partition key's length lies in `data`.
    keys: Box<[u32]>,
    /// How many user records it has.
    count: u64,
    next: Cursor,
}

/// A place between two user records.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    /// The number of the next user record, from 0: its sub-sequence number.
    number: u64,
    /// The next field's place in `data`.
    at: usize,
}

/// Where a user record lies in its aggregate.
struct SubRecordSpan {
    key: Range<usize>,
    payload: Range<usize>,
}

/// Whether a record begins as an aggregate does: only then is it more work than to move it.
pub(crate) fn begins_as_aggregate(data: &[u8]) -> bool {
    data.starts_with(&MAGIC)
}

/// Finds out whether a record is an aggregate, and whether all of it belongs in a shard with this range of
/// hashes; without a range, it does. The time that this takes is bounded by the record's bytes: each key is
/// hashed once, however many user records name it.
pub fn open(data: &Bytes, range: Option<&HashRange>) -> Opened {
    match validate(data, range) {
        None => Opened::Ordinary,
        Some((_, false)) => Opened::Astray,
        Some((aggregate, true)) => Opened::Aggregate(Box::new(aggregate)),
    }
}

/// The user records of an aggregate, in order; `None`: it is an ordinary record.
///
/// Payloads share the record's bytes.
pub fn deaggregate(data: &Bytes) -> Option<Vec<SubRecord>> {
    let Opened::Aggregate(mut aggregate) = open(data, None) else { return None };
    Some(aggregate.take(|_, _| true).into_iter().map(|(_, record)| record).collect())
}

impl Aggregate {
    /// How many user records it has.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether all user records were taken.
    pub fn is_empty(&self) -> bool {
        self.next.number >= self.count
    }

    /// The memory that it holds, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        size_of::<Self>() + self.data.len() + size_of_val(&*self.keys)
    }

    /// Passes over the user records before this number.
    pub fn skip_to(&mut self, number: u64) {
        while self.next.number < number.min(self.count) {
            match next_field(&self.data, self.end, &mut self.next.at) {
                Some(Some(Field::Record(_))) => self.next.number += 1,
                Some(Some(_)) => {}
                // It was validated: this does not happen.
                None | Some(None) => self.count = self.next.number,
            }
        }
    }

    /// Takes user records with their numbers, as long as `fits` says so of the next one's key and payload,
    /// in bytes. They share the aggregate's bytes if they are most of them; a few are copied, or each batch
    /// would hold all of the aggregate.
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

    /// Finds the user record at a place, and moves the place behind it.
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

/// Copies what the spans name, and lets them name it there. Neighbours with one key share its copy.
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

/// How an entry of a table of keys stands to the shard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Belongs {
    NotHashed,
    Here,
    Elsewhere,
    /// It is no hash.
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

/// The aggregate, and whether all of it belongs in the shard; `None`: it is an ordinary record.
fn validate(data: &Bytes, range: Option<&HashRange>) -> Option<(Aggregate, bool)> {
    let end = data.len().checked_sub(DIGEST_BYTES)?;
    if end < MAGIC.len() || data[..MAGIC.len()] != MAGIC || u32::try_from(end).is_err() {
        return None;
    }
    let start = MAGIC.len();
    if Md5::digest(&data[start..end])[..] != data[end..] {
        return None;
    }
    // The tables may follow the records that name their entries: they are read first.
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

/// Whether bytes are a partition key that a stream would take; an empty one is taken, as before.
fn check_key(key: &[u8]) -> Option<()> {
    if key.len() > KEY_BYTES_MAX {
        return None;
    }
    let key = std::str::from_utf8(key).ok()?;
    (key.chars().count() <= KEY_CHARS_MAX).then_some(())
}

/// Where an explicit hash key belongs.
fn hash_of(decimal: &[u8], range: Option<&HashRange>) -> Belongs {
    let hash = std::str::from_utf8(decimal).ok().and_then(|text| text.parse().ok());
    hash.map_or(Belongs::Invalid, |hash| Belongs::of(hash, range))
}

/// Where a partition key lies in the range of all shards: its MD5 as a number.
///
/// Source: API reference, PutRecord: "an MD5 hash function is used to map partition keys to 128-bit
/// integer values".
fn hash_key(partition_key: &[u8]) -> u128 {
    u128::from_be_bytes(Md5::digest(partition_key).into())
}

/// A field of `AggregatedRecord`, with the place of its content.
enum Field {
    /// Field 1, `partition_key_table`.
    Key { length_at: usize, range: Range<usize> },
    /// Field 2, `explicit_hash_key_table`.
    HashKey(Range<usize>),
    /// Field 3, `records`.
    Record(Range<usize>),
    /// Any other: it is passed over, as protobuf has it.
    Other,
}

/// The field at a place, which moves behind it; the inner `None`: the message ends there. The outer one: it
/// is no message.
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

/// The content behind a length at a place, which moves behind it.
fn delimited(data: &[u8], end: usize, at: &mut usize) -> Option<Range<usize>> {
    let mut rest = data.get(*at..end)?;
    let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
    let start = end - rest.len();
    let content_end = start.checked_add(length).filter(|content_end| *content_end <= end)?;
    *at = content_end;
    Some(start..content_end)
}

/// `Record` within the message. Tags (field 4) are passed over: nothing reads them.
struct WireRecord {
    /// An index into the table of partition keys.
    key: u64,
    /// An index into the table of explicit hash keys.
    hash_key: Option<u64>,
    payload: Range<usize>,
}

/// Reads a `Record`; `None`: it is none. As in every protobuf message, the last of several values counts.
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
    // Both are required (proto2): Amazon's library does not take a message without them for an aggregate.
    Some(WireRecord { key: key?, hash_key, payload: payload? })
}

#[cfg(test)]
#[path = "aggregate_tests.rs"]
mod tests;
