//! Fills PutRecords requests, and sorts their records by outcome.
//!
//! The producer, the Kinesis sink and the intake use this. A [`PutRequest`] is filled within the limits of PutRecords.
//! A [`PutWriter`] puts it, sorts its records by their outcome, and returns the pause before records that were refused
//! for now are put again. The caller decides about records that are refused for good.

use std::collections::HashSet;
use std::time::Duration;

use super::put_call::{
    BYTES_PER_REQUEST_MAX, NewRecord, Put, PutError, RECORDS_PER_REQUEST_MAX, StreamWriter,
};
use shardmill_core::retry::{Retries, RetryPolicy};
use shardmill_core::source::SourceError;

/// Options of a writer.
#[derive(Clone, Copy, Debug)]
pub struct PutOptions {
    /// Whether a request has at most one record per partition key. The stream may refuse a record and take a later
    /// one of the same key from the same request, so only this keeps the order per key.
    pub strict_order: bool,
    /// Retries of records that were refused for now.
    pub retry: RetryPolicy,
    /// Longest wait for an answer, if the stream's client has no shorter one.
    pub answer_max: Option<Duration>,
}

/// A request that is being filled. `T` is the caller's tag of a record.
#[derive(Debug)]
pub struct PutRequest<T> {
    tags: Vec<T>,
    records: Vec<NewRecord>,
    bytes: usize,
    records_max: usize,
    /// Keys of its records; only with strict order.
    keys: Option<HashSet<String>>,
}

/// Outcome of the offer of a record to a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Offer<T> {
    /// The record was added.
    Added,
    /// Strict order: the request has an earlier record of the same key. Records of other keys can still be added.
    KeyWaits(T, NewRecord),
    /// The record would exceed a limit. Later records must wait too, so that they stay after it.
    Full(T, NewRecord),
}

impl<T> PutRequest<T> {
    fn new(strict_order: bool) -> Self {
        Self {
            tags: Vec::new(),
            records: Vec::new(),
            bytes: 0,
            records_max: RECORDS_PER_REQUEST_MAX,
            keys: strict_order.then(HashSet::new),
        }
    }

    /// Lowers the limit of records, to find the one that makes a request fail. The limit is at least one.
    pub(crate) fn with_records_max(self, records_max: usize) -> Self {
        Self { records_max: records_max.clamp(1, RECORDS_PER_REQUEST_MAX), ..self }
    }

    /// Returns the number of its records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Returns whether it has no record.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Adds a record if it fits into the request. An empty request takes any record.
    pub fn offer(&mut self, tag: T, record: NewRecord) -> Offer<T> {
        if self.keys.as_ref().is_some_and(|keys| keys.contains(&record.partition_key)) {
            return Offer::KeyWaits(tag, record);
        }
        let bytes = self.bytes.saturating_add(record.bytes());
        let is_full = self.len() >= self.records_max || bytes > BYTES_PER_REQUEST_MAX;
        if is_full && !self.is_empty() {
            return Offer::Full(tag, record);
        }
        if let Some(keys) = &mut self.keys {
            keys.insert(record.partition_key.clone());
        }
        self.bytes = bytes;
        self.tags.push(tag);
        self.records.push(record);
        Offer::Added
    }

    fn into_records(self) -> Vec<(T, NewRecord)> {
        self.tags.into_iter().zip(self.records).collect()
    }
}

/// A record that the stream did not take.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused<T> {
    /// Tag of the caller.
    pub tag: T,
    /// Record.
    pub record: NewRecord,
    /// Cause.
    pub cause: String,
}

/// Records of a request by their outcome, in the order of the request.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcomes<T> {
    /// Records that the stream has.
    pub taken: Vec<(T, NewRecord)>,
    /// Records refused for now: they must be put before all records that have not been put yet.
    pub later: Vec<Refused<T>>,
    /// Records refused for good.
    pub never: Vec<Refused<T>>,
}

impl<T> Outcomes<T> {
    /// Sorts the records of a request by what the stream answered for each.
    fn of(request: PutRequest<T>, outcomes: Vec<Put>) -> Self {
        let mut sorted = Self { taken: Vec::new(), later: Vec::new(), never: Vec::new() };
        for ((tag, record), outcome) in request.into_records().into_iter().zip(outcomes) {
            match outcome {
                Put::Taken => sorted.taken.push((tag, record)),
                Put::Later(cause) => sorted.later.push(Refused { tag, record, cause }),
                Put::Never(cause) => sorted.never.push(Refused { tag, record, cause }),
            }
        }
        sorted
    }
}

/// Outcome of a request. It returns all records, so none is lost.
#[derive(Debug)]
pub enum PutAnswer<T> {
    /// The stream answered for each record.
    Each(Outcomes<T>),
    /// The call failed for now: throttled, or not reachable. The stream may have the records.
    Later {
        /// Records, in their order.
        records: Vec<(T, NewRecord)>,
        /// Cause.
        cause: String,
    },
    /// One of the records exceeds a limit, perhaps the stream's own. The stream took none.
    Records {
        /// Records, in their order.
        records: Vec<(T, NewRecord)>,
        /// Error of the call.
        error: SourceError,
    },
    /// The stream does not exist, or access to it is denied.
    Stream {
        /// Records, in their order.
        records: Vec<(T, NewRecord)>,
        /// Error of the call.
        error: SourceError,
    },
}

/// Writer that puts requests on a stream, one after another.
pub struct PutWriter {
    stream: StreamWriter,
    options: PutOptions,
    retries: Retries,
}

impl PutWriter {
    /// Makes a writer for a stream.
    pub fn new(stream: StreamWriter, options: PutOptions) -> Self {
        Self { stream, options, retries: options.retry.start() }
    }

    /// Sets strict order.
    pub fn strict_order(mut self, strict_order: bool) -> Self {
        self.options.strict_order = strict_order;
        self
    }

    /// Returns whether a request has at most one record per partition key.
    pub fn is_strict(&self) -> bool {
        self.options.strict_order
    }

    /// Begins a request.
    pub fn request<T>(&self) -> PutRequest<T> {
        PutRequest::new(self.options.strict_order)
    }

    /// Puts a request.
    pub async fn put<T>(&self, request: PutRequest<T>) -> PutAnswer<T> {
        let call = self.stream.put(&request.records);
        let answer = match self.options.answer_max {
            None => call.await,
            Some(longest) => match tokio::time::timeout(longest, call).await {
                Ok(answer) => answer,
                Err(_) => {
                    let cause = format!("no answer within {} s", longest.as_secs());
                    return PutAnswer::Later { records: request.into_records(), cause };
                }
            },
        };
        match answer {
            Ok(outcomes) => PutAnswer::Each(Outcomes::of(request, outcomes)),
            Err(PutError::Later(error)) => {
                PutAnswer::Later { records: request.into_records(), cause: error.to_string() }
            }
            Err(PutError::Records(error)) => {
                PutAnswer::Records { records: request.into_records(), error }
            }
            Err(PutError::Stream(error)) => {
                PutAnswer::Stream { records: request.into_records(), error }
            }
        }
    }

    /// Counts a request with records that were refused for now. Returns the pause before the next one, or `None` after
    /// the last retry.
    pub fn retry_after(&mut self) -> Option<Duration> {
        self.retries.next_pause_or_end()
    }

    /// Resets the count of failures: no record of the last request was refused for now.
    pub fn succeeded(&mut self) {
        self.retries.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use bytes::Bytes;

    fn record(key: &str, payload_bytes: usize) -> NewRecord {
        NewRecord { partition_key: key.into(), payload: Bytes::from(vec![b'x'; payload_bytes]) }
    }

    /// Returns the indexes of the waiting records that the next request takes.
    fn taken(strict_order: bool, records_max: usize, waiting: &[(&str, usize)]) -> Vec<usize> {
        let mut request = PutRequest::new(strict_order).with_records_max(records_max);
        for (place, (key, bytes)) in waiting.iter().enumerate() {
            match request.offer(place, record(key, *bytes)) {
                Offer::Added | Offer::KeyWaits(..) => {}
                Offer::Full(..) => break,
            }
        }
        request.tags
    }

    #[test]
    fn a_request_is_filled_up_to_its_limits() {
        const MAX: usize = BYTES_PER_REQUEST_MAX;
        let all = RECORDS_PER_REQUEST_MAX;
        for (name, strict_order, records_max, waiting, expected) in [
            ("nothing waits", false, all, &[][..], &[][..]),
            ("all fit", false, all, &[("a", 1), ("a", 1), ("b", 1)], &[0, 1, 2]),
            ("two records at most", false, 2, &[("a", 1), ("b", 1), ("c", 1)], &[0, 1]),
            ("one record at least", false, 0, &[("a", 1), ("b", 1)], &[0]),
            // Keys count: one byte each.
            ("exactly the bytes", false, all, &[("a", MAX - 3), ("b", 1)], &[0, 1]),
            ("a byte too much", false, all, &[("a", MAX - 3), ("b", 2)], &[0]),
            ("a long key too much", false, all, &[("a", MAX - 3), ("bb", 1)], &[0]),
            // A small record after it would fit, but would be put before it.
            ("none after a full one", false, all, &[("a", 9), ("b", MAX), ("c", 1)], &[0]),
            ("a large one goes alone", false, all, &[("a", 2 * MAX), ("b", 1)], &[0]),
            ("one per key", true, all, &[("a", 1), ("a", 1), ("b", 1), ("a", 1)], &[0, 2]),
            ("one key", true, all, &[("a", 1), ("a", 1)], &[0]),
            ("keys that wait take no room", true, 2, &[("a", 1), ("a", MAX), ("b", 1)], &[0, 2]),
        ] {
            assert_eq!(taken(strict_order, records_max, waiting), expected, "{name}");
        }
    }

    #[test]
    fn a_request_has_at_most_500_records() {
        let waiting = [("a", 1); RECORDS_PER_REQUEST_MAX + 1];
        let found = taken(false, usize::MAX, &waiting);
        assert_eq!(found, (0..RECORDS_PER_REQUEST_MAX).collect::<Vec<_>>());
    }

    #[test]
    fn a_record_that_is_not_added_comes_back() {
        let mut request = PutRequest::new(true).with_records_max(1);
        assert!(request.is_empty());
        assert_eq!(request.offer(0, record("a", 1)), Offer::Added);
        assert_eq!(request.offer(1, record("a", 2)), Offer::KeyWaits(1, record("a", 2)));
        assert_eq!(request.offer(2, record("b", 3)), Offer::Full(2, record("b", 3)));
        assert_eq!(request.len(), 1);
    }

    #[test]
    fn records_are_sorted_by_outcome_in_their_order() {
        let (later, never) = (|| Put::Later("busy".into()), || Put::Never("bad".into()));
        for (outcomes, taken, expected_later, expected_never) in [
            (vec![Put::Taken, Put::Taken, Put::Taken], &[0, 1, 2][..], &[][..], &[][..]),
            (vec![later(), Put::Taken, later()], &[1], &[0, 2], &[]),
            (vec![never(), later(), Put::Taken], &[2], &[1], &[0]),
            (vec![later(), later(), later()], &[], &[0, 1, 2], &[]),
            (vec![never(), never(), never()], &[], &[], &[0, 1, 2]),
        ] {
            let mut request = PutRequest::new(false);
            for place in 0..3 {
                assert_eq!(request.offer(place, record("a", place)), Offer::Added);
            }
            let found = Outcomes::of(request, outcomes);
            let places = |refused: &[Refused<usize>], cause: &str| -> Vec<usize> {
                assert!(refused.iter().all(|one| one.cause == cause), "{refused:?}");
                assert!(refused.iter().all(|one| one.record == record("a", one.tag)));
                refused.iter().map(|one| one.tag).collect()
            };
            assert_eq!(found.taken.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), taken);
            assert_eq!(places(&found.later, "busy"), expected_later);
            assert_eq!(places(&found.never, "bad"), expected_never);
        }
    }
}
