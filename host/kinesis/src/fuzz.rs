//! Fuzz target of aggregates of the Kinesis Producer Library: compares the reader with a second one that is written
//! from the format alone.

#![allow(clippy::expect_used, reason = "a finding is a panic")]

use bytes::Bytes;
use fastrand::Rng;
use md5::{Digest as _, Md5};

use super::aggregate::{self, Opened};
use shardmill_core::fuzzing::{Choices, FuzzTarget};
use shardmill_core::record::HashRange;

/// Checks that [`aggregate::open`] recognises exactly the records that the format calls aggregates, and that
/// their user records come out complete and in order, wherever batches are cut.
pub const AGGREGATE: FuzzTarget = FuzzTarget { name: "aggregate", run, grow, words: &[] };

const MAGIC: [u8; 4] = [0xF3, 0x89, 0x9A, 0xC2];

/// Deepest nesting of groups. The format has no limit; this is the limit of prost.
const GROUPS_MAX: usize = 100;

/// A user record: key, hash, payload.
type User = (Vec<u8>, u128, Vec<u8>);

/// Runs an input. Its first byte says whether the rest is a whole record or only the message, which is then put
/// into a record: a mutation would never find the right digest. Its second byte says where batches are cut and
/// where the shard ends.
fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let (wrapped, cut) = (choices.byte() % 8 != 7, choices.byte());
    let message = choices.rest();
    let record = match wrapped {
        true => [&MAGIC[..], message, &Md5::digest(message)].concat(),
        false => message.to_vec(),
    };
    let record = Bytes::from(record);
    let expected = reference(&record);

    let taken = match aggregate::open(&record, None) {
        Opened::Ordinary => None,
        Opened::Astray => panic!("there is no range to be astray of"),
        Opened::Aggregate(mut aggregate) => {
            let mut taken = Vec::new();
            while !aggregate.is_empty() {
                // Number of user records that fit into a batch; 0: all.
                let (room, mut used) = (usize::from(cut % 4), 0);
                let batch = aggregate.take(|_, _| {
                    used += 1;
                    room == 0 || used <= room
                });
                assert!(!batch.is_empty(), "at least one fits");
                taken.extend(batch);
            }
            Some(taken)
        }
    };
    let found = taken.as_ref().map(|taken| {
        for (place, (number, _)) in taken.iter().enumerate() {
            assert_eq!(*number, place as u64, "sub-sequence numbers have no gaps");
        }
        let user = taken.iter().map(|(_, user)| (&user.partition_key[..], &user.payload[..]));
        user.collect::<Vec<_>>()
    });
    let plain = expected.as_ref().map(|users| {
        users.iter().map(|(key, _, payload)| (&key[..], &payload[..])).collect::<Vec<_>>()
    });
    assert_eq!(found, plain);

    let Some(users) = expected else { return };
    skips(&record, &users, cut.into());
    let range = HashRange::parse("0", &(u128::MAX / 255 * u128::from(cut)).to_string());
    let range = range.expect("a range");
    let belongs = users.iter().all(|(_, hash, _)| range.contains(*hash));
    match aggregate::open(&record, Some(&range)) {
        Opened::Aggregate(_) => assert!(belongs, "it has a user record of another shard"),
        Opened::Astray => assert!(!belongs, "all its user records are in the shard"),
        Opened::Ordinary => panic!("the shard does not change what a record is"),
    }
}

/// Checks that a reader which starts again continues after the records that it has.
fn skips(record: &Bytes, users: &[User], from: u64) {
    let Opened::Aggregate(mut aggregate) = aggregate::open(record, None) else { return };
    let from = from % (users.len() as u64 + 2);
    aggregate.skip_to(from);
    let left = aggregate.take(|_, _| true);
    let numbers: Vec<u64> = left.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (from..users.len() as u64).collect::<Vec<_>>());
    for (number, user) in left {
        assert_eq!(user.payload, users[number as usize].2);
    }
}

/// Reads the user records of a record. `None`: it is an ordinary record.
///
/// Sources: the KPL's "Aggregation format" with its `messages.proto`, and protobuf's "Encoding".
fn reference(record: &[u8]) -> Option<Vec<User>> {
    let inner = record.strip_prefix(&MAGIC)?;
    let (message, digest) = inner.split_at_checked(inner.len().checked_sub(16)?)?;
    if Md5::digest(message)[..] != *digest {
        return None;
    }
    let fields = fields(message)?;
    let table = |tag: u64| -> Vec<&[u8]> {
        let entries = fields.iter().filter(|field| field.tag == tag);
        entries.filter_map(|field| field.bytes()).collect()
    };
    // These three fields are bytes and messages, whatever they are called.
    if fields.iter().any(|field| field.tag <= 3 && field.bytes().is_none()) {
        return None;
    }
    let (keys, hashes) = (table(1), table(2));
    // No stream accepts a longer key.
    let is_key =
        |key: &&[u8]| std::str::from_utf8(key).is_ok_and(|text| text.chars().count() <= 256);
    if !keys.iter().all(is_key) {
        return None;
    }
    table(3).into_iter().map(|inner| user(inner, &keys, &hashes)).collect()
}

fn user(message: &[u8], keys: &[&[u8]], hashes: &[&[u8]]) -> Option<User> {
    let (mut key, mut hash, mut payload) = (None, None, None);
    for field in fields(message)? {
        match (field.tag, field.value) {
            (1, Value::Number(index)) => key = Some(index),
            (2, Value::Number(index)) => hash = Some(index),
            (3, Value::Bytes(bytes)) => payload = Some(bytes),
            (1..=3, _) => return None,
            _ => {}
        }
    }
    let entry =
        |table: &[&[u8]], index: u64| Some(table.get(usize::try_from(index).ok()?)?.to_vec());
    let key = entry(keys, key?)?;
    let hash = match hash {
        Some(index) => String::from_utf8(entry(hashes, index)?).ok()?.parse().ok()?,
        None => u128::from_str_radix(&hex::encode(Md5::digest(&key)), 16).ok()?,
    };
    Some((key, hash, payload?.to_vec()))
}

struct Field<'m> {
    tag: u64,
    value: Value<'m>,
}

impl<'m> Field<'m> {
    fn bytes(&self) -> Option<&'m [u8]> {
        match self.value {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }
}

enum Value<'m> {
    Number(u64),
    Bytes(&'m [u8]),
    Other,
}

/// Reads all fields of a message. `None`: the bytes are not a message.
fn fields(mut message: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let (field, rest) = field(message, 0)?;
        fields.push(field);
        message = rest;
    }
    Some(fields)
}

fn field(message: &[u8], depth: usize) -> Option<(Field<'_>, &[u8])> {
    if depth == GROUPS_MAX {
        return None;
    }
    let (key, rest) = varint(message)?;
    let (tag, wire_type) = (key >> 3, key & 7);
    if key > u64::from(u32::MAX) || tag == 0 {
        return None;
    }
    let (value, rest) = match wire_type {
        0 => {
            let (number, rest) = varint(rest)?;
            (Value::Number(number), rest)
        }
        1 => (Value::Other, rest.get(8..)?),
        5 => (Value::Other, rest.get(4..)?),
        2 => {
            let (length, rest) = varint(rest)?;
            let (bytes, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
            (Value::Bytes(bytes), rest)
        }
        // A group, which ends with its own tag.
        3 => {
            let mut rest = rest;
            loop {
                let (key, after) = varint(rest)?;
                if key & 7 == 4 {
                    break if key >> 3 == tag { (Value::Other, after) } else { return None };
                }
                rest = field(rest, depth + 1)?.1;
            }
        }
        _ => return None,
    };
    Some((Field { tag, value }, rest))
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value: u128 = 0;
    for (place, byte) in bytes.iter().enumerate().take(10) {
        value |= u128::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some((u64::try_from(value).ok()?, &bytes[place + 1..]));
        }
    }
    None
}

/// Makes an aggregate that is mostly as a producer would write it.
fn grow(random: &mut Rng) -> Vec<u8> {
    fn put_varint(out: &mut Vec<u8>, mut number: u64) {
        while number > 0x7f {
            out.push(number as u8 | 0x80);
            number >>= 7;
        }
        out.push(number as u8);
    }
    fn put_bytes(out: &mut Vec<u8>, tag: u64, bytes: &[u8]) {
        put_varint(out, tag << 3 | 2);
        put_varint(out, bytes.len() as u64);
        out.extend(bytes);
    }
    let mut message = Vec::new();
    let (keys, hashes) = (random.u64(1..4), random.u64(0..3));
    for key in 0..keys {
        let length = if random.u8(..30) == 0 { random.usize(250..260) } else { random.usize(..6) };
        let letter = if random.bool() { "k" } else { "ä" };
        put_bytes(&mut message, 1, letter.repeat(length).as_bytes());
        if key == 0 && random.bool() {
            put_bytes(&mut message, 4, b"later");
        }
    }
    for _ in 0..hashes {
        let hash = if random.u8(..4) == 0 { random.u128(..) } else { random.u128(..1000) };
        let text = match random.u8(..20) {
            0 => "340282366920938463463374607431768211456".to_owned(),
            _ => hash.to_string(),
        };
        put_bytes(&mut message, 2, text.as_bytes());
    }
    for _ in 0..random.usize(..6) {
        let mut record = Vec::new();
        put_varint(&mut record, 1 << 3);
        put_varint(&mut record, random.u64(..=keys) % (keys + u64::from(random.u8(..9) == 0)));
        if hashes > 0 && random.bool() {
            put_varint(&mut record, 2 << 3);
            put_varint(&mut record, random.u64(..hashes));
        }
        let payload: Vec<u8> = (0..random.usize(..9)).map(|_| random.u8(..)).collect();
        put_bytes(&mut record, 3, &payload);
        if random.u8(..5) == 0 {
            put_bytes(&mut record, 4, b"tag");
        }
        put_bytes(&mut message, 3, &record);
    }
    [vec![0, random.u8(..)], message].concat()
}
