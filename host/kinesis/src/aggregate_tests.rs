//! Tests of KPL aggregates: validity, user records, and the time that validation takes.

use std::time::{Duration, Instant};

use prost::Message as _;

use super::*;

/// `AggregatedRecord`, as the generated code of any protobuf library would read it.
#[derive(Clone, PartialEq, prost::Message)]
struct AggregatedRecord {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    partition_keys: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    explicit_hash_keys: Vec<Bytes>,
    #[prost(message, repeated, tag = "3")]
    records: Vec<AggregatedUserRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AggregatedUserRecord {
    #[prost(uint64, required, tag = "1")]
    key: u64,
    #[prost(uint64, optional, tag = "2")]
    explicit_hash_key: Option<u64>,
    #[prost(bytes = "bytes", required, tag = "3")]
    data: Bytes,
}

fn sealed(body: &[u8]) -> Bytes {
    [&MAGIC[..], body, &Md5::digest(body)].concat().into()
}

fn aggregate(explicit_hash_key: Option<u64>, key: u64) -> Bytes {
    let record = AggregatedUserRecord { key, explicit_hash_key, data: Bytes::from("one") };
    let message = AggregatedRecord {
        partition_keys: vec![Bytes::from("a"), Bytes::from("b")],
        explicit_hash_keys: vec![Bytes::from("7")],
        records: vec![record.clone(), AggregatedUserRecord { key: 1, ..record }],
    };
    sealed(&message.encode_to_vec())
}

/// Makes an aggregate of this number of records that all refer to one key.
fn one_key(key: &str, records: usize, payload_bytes: usize) -> Bytes {
    let record = AggregatedUserRecord {
        key: 0,
        explicit_hash_key: None,
        data: vec![b'x'; payload_bytes].into(),
    };
    let message = AggregatedRecord {
        partition_keys: vec![Bytes::copy_from_slice(key.as_bytes())],
        explicit_hash_keys: Vec::new(),
        records: vec![record; records],
    };
    sealed(&message.encode_to_vec())
}

fn everything() -> HashRange {
    HashRange::parse("0", &u128::MAX.to_string()).expect("a range")
}

fn opened(data: &Bytes) -> Aggregate {
    match open(data, Some(&everything())) {
        Opened::Aggregate(aggregate) => *aggregate,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_aggregate_is_taken_apart() {
    let records = deaggregate(&aggregate(None, 0)).expect("an aggregate");
    let keys: Vec<_> = records.iter().map(|record| &record.partition_key[..]).collect();
    assert_eq!(keys, [b"a", b"b"]);
    assert_eq!(records[1].payload, "one");
    assert_eq!(hash_key(b"a"), 0x0cc1_75b9_c0f1_b6a8_31c3_99e2_6977_2661, "MD5 of `a`");
}

#[test]
fn an_explicit_hash_key_decides_the_shard() {
    let range = |start, end: &str| HashRange::parse(start, end).expect("a range");
    let is_here = |aggregate: &Bytes, range: HashRange| {
        matches!(open(aggregate, Some(&range)), Opened::Aggregate(_))
    };
    let explicit = aggregate(Some(0), 0);
    assert!(is_here(&explicit, range("7", "7")));
    let others = range("8", &u128::MAX.to_string());
    assert!(matches!(open(&explicit, Some(&others)), Opened::Astray));
    // MD5 of `a` and of `b`: 0x0c… and 0x92….
    let by_key = aggregate(None, 0);
    assert!(is_here(&by_key, everything()));
    let half = range("0", &(u128::MAX / 2).to_string());
    assert!(matches!(open(&by_key, Some(&half)), Opened::Astray), "one of two is elsewhere");
}

#[test]
fn what_is_not_whole_is_an_ordinary_record() {
    let whole = aggregate(None, 0);
    for length in 0..whole.len() {
        assert_eq!(deaggregate(&Bytes::copy_from_slice(&whole[..length])), None, "{length}");
    }
    for byte in 0..whole.len() {
        let mut bad = whole.to_vec();
        bad[byte] ^= 1;
        assert_eq!(deaggregate(&bad.into()), None, "byte {byte}");
    }
    assert_eq!(deaggregate(&aggregate(None, 2)), None, "a key that is not there");
    assert_eq!(deaggregate(&aggregate(Some(1), 0)), None, "a hash that is not there");
}

#[test]
fn wall_01_keys_that_no_stream_takes_make_an_ordinary_record() {
    for (key, is_aggregate) in [
        ("k".repeat(256), true),
        ("k".repeat(257), false),
        // Characters count, not bytes.
        ("é".repeat(256), true),
        ("🚗".repeat(256), true),
        ("🚗".repeat(257), false),
        ("k".repeat(500_000), false),
    ] {
        let found = deaggregate(&one_key(&key, 2, 3));
        assert_eq!(found.is_some(), is_aggregate, "{} bytes", key.len());
    }
    let mut message = AggregatedRecord {
        partition_keys: vec![Bytes::from("k"), Bytes::from_static(b"\xff")],
        explicit_hash_keys: vec![Bytes::from("x")],
        records: vec![AggregatedUserRecord { key: 0, explicit_hash_key: None, data: "d".into() }],
    };
    assert_eq!(deaggregate(&sealed(&message.encode_to_vec())), None, "a key that is not UTF-8");
    message.partition_keys.pop();
    assert!(deaggregate(&sealed(&message.encode_to_vec())).is_some(), "nothing names the hash");
    message.records[0].explicit_hash_key = Some(0);
    assert_eq!(deaggregate(&sealed(&message.encode_to_vec())), None, "not a hash");
}

/// Checks a million records that refer to one key, and one hash with half a million digits.
#[test]
fn wall_01_the_time_to_validate_grows_with_the_bytes_alone() {
    const TIME_MAX: Duration = Duration::from_secs(5);
    let key = "k".repeat(256);
    let begun = Instant::now();
    let aggregate = opened(&one_key(&key, 1_000_000, 0));
    assert_eq!(aggregate.count(), 1_000_000, "never cut by a count");
    assert!(begun.elapsed() < TIME_MAX, "{:?}", begun.elapsed());
    let record =
        AggregatedUserRecord { key: 0, explicit_hash_key: Some(0), data: Bytes::from("d") };
    let message = AggregatedRecord {
        partition_keys: vec![Bytes::from("k")],
        explicit_hash_keys: vec![format!("{}7", "0".repeat(500_000)).into()],
        records: vec![record; 80_000],
    };
    let begun = Instant::now();
    opened(&sealed(&message.encode_to_vec()));
    assert!(begun.elapsed() < TIME_MAX, "{:?}", begun.elapsed());
}

#[test]
fn wall_01_an_aggregate_that_waits_occupies_its_bytes_and_its_keys_places() {
    // Keys of two bytes each, the smallest, and records of six.
    let message = AggregatedRecord {
        partition_keys: vec![Bytes::new(); 100_000],
        explicit_hash_keys: Vec::new(),
        records: vec![
            AggregatedUserRecord { key: 0, explicit_hash_key: None, data: Bytes::new() };
            100_000
        ],
    };
    let data = sealed(&message.encode_to_vec());
    let aggregate = opened(&data);
    let occupied = aggregate.occupied_bytes();
    assert!((data.len()..2 * data.len()).contains(&occupied), "{occupied} for {}", data.len());
}

/// Checks that sub-sequence numbers are indexes in the aggregate: the settings of batches do not change them.
#[test]
fn wall_01_parts_of_any_size_are_the_whole() {
    let records: Vec<_> = (0..1_000u64)
        .map(|number| AggregatedUserRecord {
            key: number % 7,
            explicit_hash_key: None,
            data: format!("record {number}").into(),
        })
        .collect();
    let message = AggregatedRecord {
        partition_keys: (0..7).map(|key| format!("key-{key}").into()).collect(),
        explicit_hash_keys: Vec::new(),
        records,
    };
    let data = sealed(&message.encode_to_vec());
    let whole: Vec<_> = opened(&data).take(|_, _| true);
    assert_eq!(whole.len(), 1_000);
    for (number, record) in &whole {
        assert_eq!(record.payload, format!("record {number}"));
        assert_eq!(record.partition_key, format!("key-{}", number % 7));
    }
    for size in [1, 3, 100, 999] {
        let (mut aggregate, mut parts) = (opened(&data), Vec::new());
        while !aggregate.is_empty() {
            let mut left = size;
            let part = aggregate.take(|_, _| {
                left -= 1;
                left >= 0
            });
            assert!(!part.is_empty());
            parts.extend(part);
        }
        assert_eq!(parts, whole, "parts of {size}");
        let mut rest = opened(&data);
        rest.skip_to(size as u64);
        assert_eq!(rest.take(|_, _| true), whole[size as usize..], "behind {size}");
    }
    let mut none = opened(&data);
    none.skip_to(5_000);
    assert!(none.is_empty() && none.take(|_, _| true).is_empty());
}

/// Checks that a small part is a copy, so that it does not keep the whole aggregate in memory.
#[test]
fn wall_02_a_part_of_an_aggregate_does_not_keep_all_of_it_in_memory() {
    let data = one_key("key", 10_000, 100);
    let within = data.as_ptr_range();
    let mut aggregate = opened(&data);
    let mut left = 10;
    let part = aggregate.take(|_, _| {
        left -= 1;
        left >= 0
    });
    assert_eq!(part.len(), 10);
    assert!(part.iter().all(|(_, record)| !within.contains(&record.payload.as_ptr())));
    // Neighbours share the key that they have in common.
    let keys = part.iter().map(|(_, record)| record.partition_key.as_ptr());
    assert_eq!(keys.collect::<std::collections::HashSet<_>>().len(), 1);
    let rest = aggregate.take(|_, _| true);
    assert!(rest.iter().all(|(_, record)| within.contains(&record.payload.as_ptr())));
}

/// `Record` with fields that may be missing.
#[derive(Clone, PartialEq, prost::Message)]
struct LooseRecord {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    partition_keys: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    explicit_hash_keys: Vec<Bytes>,
    #[prost(message, repeated, tag = "3")]
    records: Vec<LooseUserRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LooseUserRecord {
    #[prost(uint64, optional, tag = "1")]
    key: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    explicit_hash_key: Option<u64>,
    #[prost(bytes = "bytes", optional, tag = "3")]
    data: Option<Bytes>,
}

/// Reads a message by generated code, as a whole.
fn read_by_reference(body: &[u8]) -> Option<Vec<(Bytes, Bytes)>> {
    let message = LooseRecord::decode(body).ok()?;
    if message.partition_keys.iter().any(|key| check_key(key).is_none()) {
        return None;
    }
    let records = message.records.iter().map(|record| {
        if let Some(index) = record.explicit_hash_key {
            let decimal = message.explicit_hash_keys.get(usize::try_from(index).ok()?)?;
            std::str::from_utf8(decimal).ok()?.parse::<u128>().ok()?;
        }
        let key = message.partition_keys.get(usize::try_from(record.key?).ok()?)?;
        Some((key.clone(), record.data.clone()?))
    });
    records.collect()
}

/// Checks that any message, and any damaged one, is read as generated code reads it.
#[test]
fn wall_01_every_message_is_read_as_by_another_reader() {
    let (mut taken, mut refused) = (0, 0);
    for seed in 0..20_000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let text = |random: &mut fastrand::Rng, length: usize| -> Bytes {
            (0..length).map(|_| random.alphanumeric()).collect::<String>().into()
        };
        let mut records: Vec<_> = (0..4u64)
            .map(|index| AggregatedUserRecord {
                key: random.u64(0..4),
                explicit_hash_key: (index % 2 == 0).then_some(random.u64(1..3)),
                data: text(&mut random, index as usize * 3),
            })
            .collect();
        records.truncate(random.usize(0..5));
        let message = AggregatedRecord {
            partition_keys: (0..3).map(|_| text(&mut random, 3)).collect(),
            explicit_hash_keys: vec![text(&mut random, 1), "77".into()],
            records,
        };
        let mut body = message.encode_to_vec();
        // Tables after the records that refer to them, as protobuf allows.
        if random.bool() {
            let (partition_keys, explicit_hash_keys) = (vec!["later".into()], vec!["5".into()]);
            let later = AggregatedRecord { partition_keys, explicit_hash_keys, records: vec![] };
            body.extend(later.encode_to_vec());
        }
        for _ in 0..random.usize(0..3) {
            let place = random.usize(0..body.len());
            match random.u8(0..3) {
                0 => body[place] = random.u8(..),
                1 => body.insert(place, random.u8(..)),
                _ => _ = body.remove(place),
            }
        }
        let found = deaggregate(&sealed(&body));
        let found: Option<Vec<_>> = found.map(|records| {
            records.into_iter().map(|record| (record.partition_key, record.payload)).collect()
        });
        assert_eq!(found, read_by_reference(&body), "seed {seed}: {body:02x?}");
        if found.is_some() { taken += 1 } else { refused += 1 }
    }
    assert!(taken > 1_000 && refused > 1_000, "{taken} taken, {refused} refused");
}
