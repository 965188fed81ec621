//! Aggregated records of the Kinesis Producer Library: many user records in one.
//!
//! Source: the KPL's "Aggregation format": `F3 89 9A C2`, then the protobuf message
//! `AggregatedRecord`, then the 16 bytes of the message's MD5. Anything that does not fit this is an
//! ordinary record, as Amazon's own client library has it.

use bytes::Bytes;
use md5::{Digest as _, Md5};
use prost::Message as _;

use crate::record::HashRange;

const MAGIC: [u8; 4] = [0xF3, 0x89, 0x9A, 0xC2];
const DIGEST_BYTES: usize = 16;

/// One user record of an aggregate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubRecord {
    /// Its own partition key.
    pub partition_key: Bytes,
    /// Its payload.
    pub payload: Bytes,
    /// The hash that decides its shard: given by the producer, or of the key.
    pub hash_key: u128,
}

impl SubRecord {
    /// Whether it belongs in a shard with this range.
    pub fn is_in(&self, range: &HashRange) -> bool {
        range.contains(self.hash_key)
    }
}

/// The user records of an aggregate, in order; `None`: it is an ordinary record.
///
/// Payloads share the record's bytes.
pub fn deaggregate(data: &Bytes) -> Option<Vec<SubRecord>> {
    let body_end = data.len().checked_sub(DIGEST_BYTES)?;
    if body_end < MAGIC.len() || data[..MAGIC.len()] != MAGIC {
        return None;
    }
    let body = data.slice(MAGIC.len()..body_end);
    if Md5::digest(&body)[..] != data[body_end..] {
        return None;
    }
    let aggregate = AggregatedRecord::decode(body).ok()?;
    let AggregatedRecord { partition_keys, explicit_hash_keys, records } = aggregate;
    records
        .into_iter()
        .map(|record| {
            let partition_key = partition_keys.get(usize::try_from(record.key).ok()?)?.clone();
            let hash_key = match record.explicit_hash_key {
                None => hash_key(&partition_key),
                Some(index) => {
                    let decimal = explicit_hash_keys.get(usize::try_from(index).ok()?)?;
                    std::str::from_utf8(decimal).ok()?.parse().ok()?
                }
            };
            std::str::from_utf8(&partition_key).ok()?;
            Some(SubRecord { partition_key, payload: record.data, hash_key })
        })
        .collect()
}

/// Where a partition key lies in the range of all shards: its MD5 as a number.
///
/// Source: API reference, PutRecord: "an MD5 hash function is used to map partition keys to 128-bit
/// integer values".
fn hash_key(partition_key: &[u8]) -> u128 {
    u128::from_be_bytes(Md5::digest(partition_key).into())
}

/// `AggregatedRecord`. Tags (field 4 of a record) are left out: nothing reads them.
#[derive(Clone, PartialEq, prost::Message)]
struct AggregatedRecord {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    partition_keys: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    explicit_hash_keys: Vec<Bytes>,
    #[prost(message, repeated, tag = "3")]
    records: Vec<AggregatedUserRecord>,
}

/// `Record` within it.
#[derive(Clone, PartialEq, prost::Message)]
struct AggregatedUserRecord {
    /// An index into `partition_keys`.
    #[prost(uint64, required, tag = "1")]
    key: u64,
    /// An index into `explicit_hash_keys`.
    #[prost(uint64, optional, tag = "2")]
    explicit_hash_key: Option<u64>,
    #[prost(bytes = "bytes", required, tag = "3")]
    data: Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aggregate(explicit_hash_key: Option<u64>, key: u64) -> Vec<u8> {
        let record = AggregatedUserRecord { key, explicit_hash_key, data: Bytes::from("one") };
        let message = AggregatedRecord {
            partition_keys: vec![Bytes::from("a"), Bytes::from("b")],
            explicit_hash_keys: vec![Bytes::from("7")],
            records: vec![record.clone(), AggregatedUserRecord { key: 1, ..record }],
        };
        let body = message.encode_to_vec();
        [&MAGIC[..], &body, &Md5::digest(&body)].concat()
    }

    #[test]
    fn an_aggregate_is_taken_apart() {
        let records = deaggregate(&aggregate(None, 0).into()).expect("an aggregate");
        let keys: Vec<_> = records.iter().map(|record| &record.partition_key[..]).collect();
        assert_eq!(keys, [b"a", b"b"]);
        assert_eq!(records[1].payload, "one");
        assert_eq!(records[0].hash_key, 0x0cc1_75b9_c0f1_b6a8_31c3_99e2_6977_2661, "MD5 of `a`");
    }

    #[test]
    fn an_explicit_hash_key_decides_the_shard() {
        let range = |start, end: &str| HashRange::parse(start, end).expect("a range");
        let records = deaggregate(&aggregate(Some(0), 0).into()).expect("an aggregate");
        assert!(records[0].is_in(&range("7", "7")));
        assert!(!records[0].is_in(&range("8", &u128::MAX.to_string())));
    }

    #[test]
    fn what_is_not_whole_is_an_ordinary_record() {
        let whole = aggregate(None, 0);
        for length in 0..whole.len() {
            assert_eq!(deaggregate(&Bytes::copy_from_slice(&whole[..length])), None, "{length}");
        }
        for byte in 0..whole.len() {
            let mut bad = whole.clone();
            bad[byte] ^= 1;
            assert_eq!(deaggregate(&bad.into()), None, "byte {byte}");
        }
        assert_eq!(deaggregate(&aggregate(None, 2).into()), None, "a key that is not there");
        assert_eq!(deaggregate(&aggregate(Some(1), 0).into()), None, "a hash that is not there");
    }
}
