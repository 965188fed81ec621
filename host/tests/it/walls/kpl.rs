//! Aggregates of the Kinesis Producer Library, and the memory that records keep alive.

mod aggregates;
mod memory;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::{PutRecordsRequestEntry, Shard};
use md5::{Digest as _, Md5};

use crate::support::world::{STREAM, World, hashes};
use crate::support::{ADMIN_TOKEN, Process, shardmill};

/// Makes an aggregate of user records that all have one key.
fn one_key(key: &str, payloads: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut body = Vec::new();
    field(&mut body, 1, key.as_bytes());
    for payload in payloads {
        let mut record = vec![1 << 3, 0];
        field(&mut record, 3, &payload);
        field(&mut body, 3, &record);
    }
    [&[0xF3, 0x89, 0x9A, 0xC2][..], &body, &Md5::digest(&body)].concat()
}

fn field(message: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    message.push(number << 3 | 2);
    let mut length = bytes.len();
    while length >= 0x80 {
        message.push(length as u8 | 0x80);
        length >>= 7;
    }
    message.push(length as u8);
    message.extend_from_slice(bytes);
}

/// Returns a partition key whose hash belongs to a shard's range.
fn key_of(shard: &Shard) -> String {
    let (first, last) = hashes(shard);
    let keys = (0..).map(|number| format!("key-{number}"));
    let hash = |key: &String| u128::from_be_bytes(Md5::digest(key).into());
    keys.into_iter().find(|key| (first..=last).contains(&hash(key))).expect("there is always one")
}

/// Puts records on a shard, each in a call of its own.
fn put_on(world: &World, shard: &Shard, records: impl Iterator<Item = Vec<u8>>) {
    let hash = hashes(shard).0.to_string();
    for record in records {
        let entry = PutRecordsRequestEntry::builder().data(Blob::new(record)).partition_key("key");
        let entry = entry.explicit_hash_key(&hash).build().expect("an entry");
        let put = world.client.put_records().stream_name(STREAM).records(entry);
        let answer = world.block_on(put.send()).expect("put");
        assert_eq!(answer.failed_record_count(), Some(0));
    }
}

/// Starts a pipeline of the world.
fn start(world: &World, path: &str) -> Process {
    let log = std::fs::File::create(world.log()).expect("a log");
    let out = std::fs::File::create(world.folder.path().join("out")).expect("a file");
    let run = shardmill(&["run", path, "-v"]).stdout(out).stderr(log).spawn();
    Process(run.expect("the binary starts"))
}

/// Sends a GET with the token of the tests, which must be answered in time; `None` if nobody listens yet, or if there
/// was no answer.
fn get(port: u16, path: &str, time_max: Duration) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(time_max)).expect("set");
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\nConnection: \
         close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Returns the sum of a metric's series.
fn metric(port: u16, name: &str) -> f64 {
    let text = get(port, "/metrics", Duration::from_secs(10)).unwrap_or_default();
    let lines = text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}
