//! Makes aggregated records. It is written from the description of the format, independently of the reader.

use md5::{Digest as _, Md5};

/// Makes an aggregate of pairs (partition key, payload).
pub fn aggregate(records: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, _) in records {
        field(&mut body, 1, key.as_bytes());
    }
    for (index, (_, payload)) in records.iter().enumerate() {
        let mut record = vec![1 << 3];
        varint(&mut record, index);
        field(&mut record, 3, payload);
        field(&mut body, 3, &record);
    }
    [&[0xF3, 0x89, 0x9A, 0xC2][..], &body, &Md5::digest(&body)].concat()
}

fn field(message: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    message.push(number << 3 | 2);
    varint(message, bytes.len());
    message.extend_from_slice(bytes);
}

fn varint(message: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        message.push(number as u8 | 0x80);
        number >>= 7;
    }
    message.push(number as u8);
}
