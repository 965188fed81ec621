//! Input side: a batch and its records, borrowed from the arena.

use std::time::{Duration, SystemTime};

use crate::Rng;
use crate::bindings::shardmill::plugin::types as raw;
use crate::words::{Input, InputWords, Span};

/// Records of one call, in the order of their shard.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    arena: &'a [u8],
    inputs: &'a [InputWords],
    shard_hash: u64,
}

impl<'a> Batch<'a> {
    /// Makes a batch from the arguments of the host.
    ///
    /// # Panics
    ///
    /// The inputs end within a record: the host has violated the contract.
    pub(crate) fn new(raw: &'a raw::Batch, shard_hash: u64) -> Self {
        let (inputs, rest) = raw.inputs.as_chunks();
        assert!(rest.is_empty(), "the host passed a part of a record");
        Self { arena: &raw.arena, inputs, shard_hash }
    }

    /// Returns the number of records; at least 1 in calls by the host.
    pub fn len(&self) -> usize {
        self.inputs.len()
    }

    /// Whether the batch has no records.
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty()
    }

    /// Returns an iterator over the records, first to last.
    pub fn records(&self) -> Records<'a> {
        Records { batch: *self, next: 0 }
    }

    /// Returns the record at `index`, counted from 0.
    #[inline]
    pub fn get(&self, index: usize) -> Option<Record<'a>> {
        let words = self.inputs.get(index)?;
        let index = u32::try_from(index).ok()?;
        Some(Record { words, arena: self.arena, index, shard_hash: self.shard_hash })
    }
}

/// Iterator over the records of a [`Batch`].
pub struct Records<'a> {
    batch: Batch<'a>,
    next: usize,
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    #[inline]
    fn next(&mut self) -> Option<Record<'a>> {
        let record = self.batch.get(self.next)?;
        self.next += 1;
        Some(record)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.batch.len() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Records<'_> {}

/// One record, borrowed from its batch. Reading it copies nothing.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    words: &'a InputWords,
    arena: &'a [u8],
    index: u32,
    shard_hash: u64,
}

impl<'a> Record<'a> {
    /// Returns the payload: any bytes, possibly none.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.bytes(self.input().payload)
    }

    /// Returns the partition key.
    pub fn key(&self) -> &'a str {
        self.text(self.input().key)
    }

    /// Returns the sequence number in the shard: up to 129 decimal digits, so it does not fit an integer.
    pub fn sequence(&self) -> &'a str {
        self.text(self.input().sequence)
    }

    /// Returns the index within an aggregated record, from 0; 0 if not aggregated.
    pub fn sub_sequence(&self) -> u32 {
        self.input().sub_sequence
    }

    /// Returns the route that the record came from, as an index into [`Context::upstream`](crate::Context).
    pub fn upstream_route(&self) -> usize {
        self.input().route as usize
    }

    /// Returns the time at which the stream accepted the record, in milliseconds since the Unix epoch.
    pub fn arrived_ms(&self) -> u64 {
        self.input().arrived_ms
    }

    /// Returns the time to use as "now": the time at which the stream accepted the record. A replay sees the
    /// same time.
    pub fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.input().arrived_ms)
    }

    /// Returns a generator of random numbers for this record, seeded from its shard, sequence number and
    /// sub-sequence number. Every call starts the same series, and so does a replay. Not for secrets.
    pub fn rng(&self) -> Rng {
        let sequence = fnv1a(self.shard_hash, self.bytes(self.input().sequence));
        Rng::with_seed(fnv1a(sequence, &self.input().sub_sequence.to_le_bytes()))
    }

    /// Returns the index of the record in its batch, from 0. It may differ in a replay, so no output should
    /// depend on it.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Returns the record's words with names. Unused parts cost nothing.
    #[inline]
    fn input(&self) -> Input {
        Input::from_words(self.words)
    }

    #[inline]
    fn bytes(&self, span: Span) -> &'a [u8] {
        &self.arena[span.start as usize..][..span.length as usize]
    }

    /// Returns a text. The host guarantees UTF-8 here.
    #[expect(clippy::panic, reason = "the host broke the contract: a trap says so")]
    fn text(&self, span: Span) -> &'a str {
        match std::str::from_utf8(self.bytes(span)) {
            Ok(text) => text,
            Err(error) => {
                panic!("the host passed a key or sequence that is not valid UTF-8: {error}")
            }
        }
    }
}

/// Returns the hash of a shard that seeds [`Record::rng`].
pub(crate) fn shard_hash(shard_id: &str) -> u64 {
    const FNV1A_OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    fnv1a(FNV1A_OFFSET_BASIS, shard_id.as_bytes())
}

/// Continues an FNV-1a hash. Its definition is fixed, unlike that of the standard library's hasher, so a plugin
/// compiled by another version of Rust gets the same numbers.
fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    const FNV1A_PRIME: u64 = 0x0000_0100_0000_01b3;
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV1A_PRIME))
}
