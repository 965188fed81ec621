//! Inbox of a shard: the records between the server and a lane. Both readers fill it; it takes aggregates apart, drops
//! what is not ours, and cuts batches.
//!
//! Invariants:
//! - `from.after` is the last record that was read, `handed_over` the last one in a batch. The records between them
//!   wait in `queue`. A reader always asks the server for what follows `from.after`.
//! - Batches have adjacent ranges `(from, to]`: each begins where the one before ended.
//! - A record is taken in once. The server begins *at* the last record, not after it, because that record may be an
//!   aggregate that was read in part.
//!
//! | record that arrives | `from.after` | queue |
//! |---|---|---|
//! | before `from.after` | stays | dropped: it was read |
//! | at `from.after`, with unread user records | moves to its last user record | from the first unread one |
//! | at `from.after`, without any | stays | dropped: it was read |
//! | an aggregate that belongs to another shard | stays | dropped and counted: its producer sends it again |
//! | it arrived before the configured start of the shard | moves to it | dropped; never when a reader resumes |
//! | any other | moves to it | added |
//!
//! Lost records: once the server has accepted a start, `unvalidated` says which record must come first. If that record
//! comes, nothing is missing. If a later one comes, the records between are gone or never existed; that is a
//! [`LostRecordsGap`], which the connection judges by the stream's retention. If no record comes and the server says
//! that nothing is left, `gap_before_nothing` is the gap. The gap stays until it is judged, since the judging waits
//! for a call and may be dropped.

use std::collections::VecDeque;
use std::time::Instant;

use aws_sdk_kinesis::types::Record as WireRecord;
use bytes::Bytes;

use super::aggregate::{self, Aggregate, Opened};
use shardmill_config::BatchLimits;
use shardmill_core::log_throttle::LogThrottle;
use shardmill_core::metric;
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::{
    Batch, Entry, HashRange, Position, PositionRange, Record, SequenceNumber, ShardKey, ShardStart,
};
use shardmill_core::source::{LostRecords, SourceError};

/// Start of the reading of a shard.
#[derive(Clone, Debug)]
pub struct ReadFrom {
    /// Position after which it begins.
    pub after: Option<Position>,
    /// Configured start of the shard; used only while there is no `after`.
    pub start: ShardStart,
    /// Part of the hash range that the shard has, where known. An aggregate outside of it belongs to another shard.
    pub hash_range: Option<HashRange>,
    /// A time up to which everything that had arrived was read, in milliseconds since 1970.
    pub caught_up_ms: Option<i64>,
}

/// Place at which the server begins a subscription or an iterator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerStart {
    /// At this record, which the server gives again. The inbox drops the part that was read: the API has no position
    /// inside an aggregate.
    AtSequence(SequenceNumber),
    /// At the first record that arrived at this time or later, in milliseconds since 1970.
    AtMs(i64),
    /// At the oldest record of the shard.
    Horizon,
}

/// Bytes of aggregates in one answer up to which they are validated on the async thread: some 100 µs of work. More are
/// validated on another thread, so that other tasks do not wait.
const VALIDATED_IN_PLACE_BYTES: usize = 64 << 10;

/// A record as the server gave it, with the result of opening it.
#[derive(Debug)]
pub struct Arrived {
    sequence: String,
    arrived_ms: Option<i64>,
    partition_key: Bytes,
    payload: Bytes,
    opened: Opened,
}

impl Arrived {
    fn new(record: WireRecord, range: Option<&HashRange>) -> Self {
        let payload = Bytes::from(record.data.into_inner());
        Self {
            sequence: record.sequence_number,
            arrived_ms: record.approximate_arrival_timestamp.and_then(|at| at.to_millis().ok()),
            partition_key: Bytes::from(record.partition_key.unwrap_or_default()),
            opened: aggregate::open(&payload, range),
            payload,
        }
    }
}

/// Finds out which records of an answer are aggregates; `range` is of the shard that they come from.
///
/// Dropping the future drops the records. So a reader may move its own place past them only after this has returned.
pub async fn open(records: Vec<WireRecord>, range: Option<HashRange>) -> Vec<Arrived> {
    let data = records.iter().map(|record| record.data.as_ref());
    let aggregates = data.filter(|data| aggregate::begins_as_aggregate(data));
    let bytes: usize = aggregates.map(<[u8]>::len).sum();
    let open = move || records.into_iter().map(|one| Arrived::new(one, range.as_ref())).collect();
    match bytes > VALIDATED_IN_PLACE_BYTES {
        true => off_thread(open).await,
        false => open(),
    }
}

/// A record or an aggregate that waits for its lane.
enum Queued {
    Record(Record),
    Aggregate { aggregate: Box<Aggregate>, sequence: SequenceNumber, arrived_ms: u64 },
}

impl Queued {
    /// Returns the memory that it uses, in bytes.
    fn occupied_bytes(&self) -> usize {
        match self {
            Self::Record(record) => record.occupied_bytes(),
            Self::Aggregate { aggregate, .. } => size_of::<Self>() + aggregate.occupied_bytes(),
        }
    }
}

/// Records on their way from the server to a lane.
pub struct Inbox {
    shard: ShardKey,
    limits: BatchLimits,
    from: ReadFrom,
    /// Last record of the last batch.
    handed_over: Option<Position>,
    queue: VecDeque<Queued>,
    /// Start that the server accepted, until its answer shows that nothing is missing there.
    unvalidated: Option<Unvalidated>,
    /// Bytes of memory that the queue uses.
    occupied_bytes: usize,
    /// Bytes of the last batch, if its only record is larger than a batch may be; otherwise 0. The lane keeps the batch
    /// until it asks for the next one.
    large_in_hand: usize,
    gap: Option<LostRecordsGap>,
    /// Lost records that were not reported to the lane yet.
    lost: Option<LostRecords>,
    /// Whether records that arrived before the start are dropped. Never when a reader resumes after a record.
    drops_older: bool,
    /// Arrival time of the newest record that the server gave, in milliseconds since 1970.
    last_arrived_ms: Option<i64>,
    /// Limits the log lines about aggregates of other shards: a producer can put any number of them.
    astray: LogThrottle,
}

/// Start that the server accepted, until its answer shows that nothing is missing there.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unvalidated {
    /// A record that was read. If it comes again, nothing after it is lost.
    Record(Position),
    /// The shard's beginning, none of whose records may be missing.
    Beginning,
}

/// Lost-records gap: the server began later than it was asked to. The records between are gone, or never existed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostRecordsGap {
    /// Requested start: a record that had been read. `None`: the shard's beginning.
    pub asked: Option<Position>,
    /// First record that came, and its arrival time in milliseconds since 1970. `None`: nothing is left.
    pub came: Option<(SequenceNumber, i64)>,
}

impl Inbox {
    /// Makes an empty inbox.
    pub fn new(shard: ShardKey, limits: BatchLimits, from: ReadFrom) -> Self {
        let handed_over = from.after.clone();
        let drops_older = from.after.is_none();
        let (queue, unvalidated, gap) = (VecDeque::new(), None, None);
        let last_arrived_ms = None;
        Self {
            shard,
            limits,
            from,
            handed_over,
            queue,
            occupied_bytes: 0,
            large_in_hand: 0,
            unvalidated,
            gap,
            lost: None,
            drops_older,
            last_arrived_ms,
            astray: LogThrottle::default(),
        }
    }

    /// Returns the shard.
    pub fn shard(&self) -> &ShardKey {
        &self.shard
    }

    /// Returns whether no record waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Returns the bytes of memory that waiting records use, plus those of the last batch if it is larger than a batch
    /// may be: payloads, keys, and the overhead of each record. The usual batch that a lane has is counted elsewhere,
    /// per lane.
    pub fn occupied_bytes(&self) -> usize {
        self.occupied_bytes + self.large_in_hand
    }

    /// Drops what waits and moves back to the last batch, so that the server is asked for the records again.
    pub fn give_back(&mut self) {
        self.queue = VecDeque::new();
        self.occupied_bytes = 0;
        self.from.after = self.handed_over.clone();
    }

    /// Notes that the server accepted a start at [`Inbox::server_start`]. The next record that arrives shows whether
    /// records are missing.
    ///
    /// Call it only after the server has accepted. While a subscription is refused, records still arrive from the
    /// earlier iterator; they follow the last record that was read, and would be reported as a gap where nothing is
    /// lost.
    pub(crate) fn start_accepted(&mut self) {
        self.unvalidated = match self.from.after.clone() {
            Some(after) => Some(Unvalidated::Record(after)),
            None => self.from.caught_up_ms.map(|_| Unvalidated::Beginning),
        };
    }

    /// Returns where the server must begin so that no record is missed.
    pub(crate) fn server_start(&self) -> ServerStart {
        match (&self.from.after, &self.from.start) {
            (Some(after), _) => ServerStart::AtSequence(after.sequence.clone()),
            (None, ShardStart::AtSequence(at)) => ServerStart::AtSequence(at.clone()),
            (None, ShardStart::AtMs(at_ms)) => ServerStart::AtMs(*at_ms),
            (None, ShardStart::Horizon) => ServerStart::Horizon,
        }
    }

    /// Returns the arrival time of the newest record that the server gave, in milliseconds since 1970.
    pub(crate) fn last_arrived_ms(&self) -> Option<i64> {
        self.last_arrived_ms
    }

    /// Returns a time up to which everything that had arrived was read, in milliseconds since 1970.
    pub fn caught_up_ms(&self) -> Option<i64> {
        self.from.caught_up_ms
    }

    /// Notes that everything that had arrived by `at_ms` was read.
    pub(crate) fn is_caught_up_at(&mut self, at_ms: i64) {
        self.from.caught_up_ms = Some(at_ms);
    }

    /// Returns a gap that was found and not judged yet.
    pub fn gap(&self) -> Option<LostRecordsGap> {
        self.gap.clone()
    }

    /// Notes that the gap was judged.
    pub(crate) fn forget_gap(&mut self) {
        self.gap = None;
    }

    /// Returns the gap that there is if the server has nothing more, although the accepted start expects a record.
    pub(crate) fn gap_before_nothing(&self) -> Option<LostRecordsGap> {
        let asked = match self.unvalidated.as_ref()? {
            Unvalidated::Record(asked) => Some(asked.clone()),
            Unvalidated::Beginning => None,
        };
        Some(LostRecordsGap { asked, came: None })
    }

    /// Keeps lost records for the lane.
    pub fn lose(&mut self, lost: LostRecords) {
        self.lost = Some(lost);
    }

    /// Takes the lost records that the lane does not know of yet.
    pub(crate) fn take_lost(&mut self) -> Option<LostRecords> {
        self.lost.take()
    }

    /// Notes that nothing is missing at the accepted start, or that the loss was judged.
    pub(crate) fn mark_validated(&mut self) {
        self.unvalidated = None;
    }

    /// Returns the last record that was read.
    pub fn after(&self) -> Option<&Position> {
        self.from.after.as_ref()
    }

    /// Returns the shard's part of the hash range, where known.
    pub fn hash_range(&self) -> Option<HashRange> {
        self.from.hash_range
    }

    /// Takes in the records of an answer, in the server's order.
    ///
    /// # Errors
    /// [`SourceError::Call`] for an invalid sequence number.
    pub fn accept(&mut self, records: Vec<Arrived>, call: &'static str) -> Result<(), SourceError> {
        for record in records {
            self.accept_one(record, call)?;
        }
        Ok(())
    }

    fn accept_one(&mut self, record: Arrived, call: &'static str) -> Result<(), SourceError> {
        let Arrived { sequence, arrived_ms, partition_key, payload, opened } = record;
        let sequence = SequenceNumber::parse(&sequence).map_err(|error| SourceError::Call {
            call,
            place: self.place(),
            cause: error.to_string(),
        })?;
        self.last_arrived_ms = self.last_arrived_ms.max(arrived_ms);
        let arrived_ms = arrived_ms.unwrap_or(0);
        let asked = match self.unvalidated.take() {
            Some(Unvalidated::Record(asked)) => Some(Some(asked)),
            Some(Unvalidated::Beginning) => Some(None),
            None => None,
        };
        if let Some(asked) = asked
            && asked.as_ref().is_none_or(|asked| sequence > asked.sequence)
        {
            self.gap = Some(LostRecordsGap { asked, came: Some((sequence.clone(), arrived_ms)) });
        }
        let after = self.from.after.as_ref();
        if after.is_some_and(|after| sequence < after.sequence) {
            return Ok(());
        }
        // The record may be an aggregate of which some user records were read.
        let read = after.filter(|after| sequence == after.sequence);
        let unread_from = read.map_or(0, |after| after.sub_sequence.saturating_add(1));
        let is_older = self.drops_older && self.from.start.is_after(&sequence, arrived_ms);
        let arrived_ms = u64::try_from(arrived_ms).unwrap_or(0);
        let (count, queued) = match opened {
            Opened::Ordinary => {
                let position = Position { sequence: sequence.clone(), sub_sequence: 0 };
                let record = Record { position, partition_key, payload, arrived_ms };
                (1, Queued::Record(record))
            }
            // Amazon's own library drops the whole aggregate too: its producer sees in the answer to its put that the
            // aggregate went to another shard, and sends the records again.
            Opened::Astray => {
                if let Some(left_out) = self.astray.line(Instant::now()) {
                    tracing::warn!(shard = %self.shard.shard, %sequence, left_out,
                        "dropped an aggregate of another shard: its producer sends it again");
                }
                metrics::counter!(metric::SOURCE_ASTRAY_AGGREGATES_TOTAL).increment(1);
                return Ok(());
            }
            Opened::Aggregate(mut aggregate) => {
                aggregate.skip_to(unread_from);
                let (count, sequence) = (aggregate.count(), sequence.clone());
                (count, Queued::Aggregate { aggregate, sequence, arrived_ms })
            }
        };
        if unread_from >= count {
            return Ok(());
        }
        self.from.after = Some(Position { sequence, sub_sequence: count - 1 });
        if !is_older {
            self.occupied_bytes += queued.occupied_bytes();
            self.queue.push_back(queued);
        }
        Ok(())
    }

    /// Cuts the next batch from the queue. Takes only as many user records from an aggregate as fit into the batch.
    pub fn cut(&mut self) -> Option<Batch> {
        let limits = self.limits;
        // A lane asks for a batch after it has finished the one before.
        self.large_in_hand = 0;
        let mut records: Vec<Record> = Vec::new();
        let mut bytes = 0;
        // The first record always fits: one that is larger than a batch travels alone.
        let mut fits = |key: usize, payload: usize, count: usize| {
            bytes += key + payload;
            count == 0 || (count < limits.records_max && bytes <= limits.bytes_max)
        };
        while let Some(first) = self.queue.front_mut() {
            let is_taken = match first {
                Queued::Record(next) => {
                    fits(next.partition_key.len(), next.payload.len(), records.len())
                }
                Queued::Aggregate { aggregate, sequence, arrived_ms } => {
                    let mut count = records.len();
                    let taken = aggregate.take(|key, payload| {
                        let is_taken = fits(key, payload, count);
                        count += 1;
                        is_taken
                    });
                    records.extend(taken.into_iter().map(|(sub_sequence, record)| Record {
                        position: Position { sequence: sequence.clone(), sub_sequence },
                        partition_key: record.partition_key,
                        payload: record.payload,
                        arrived_ms: *arrived_ms,
                    }));
                    aggregate.is_empty()
                }
            };
            if !is_taken {
                break;
            }
            let Some(taken) = self.queue.pop_front() else { break };
            self.occupied_bytes -= taken.occupied_bytes();
            if let Queued::Record(record) = taken {
                records.push(record);
            }
        }
        if self.queue.is_empty() {
            // Frees the capacity of a queue that was long.
            self.queue = VecDeque::new();
        }
        let to_inclusive = records.last()?.position.clone();
        let from_exclusive = self.handed_over.replace(to_inclusive.clone());
        let range = PositionRange { from_exclusive, to_inclusive };
        let batch = Batch { shard: self.shard.clone(), records, range, entry: Entry::Source };
        if batch.bytes() > limits.bytes_max {
            self.large_in_hand = batch.occupied_bytes();
        }
        Some(batch)
    }

    /// Returns stream, shard and position as text for errors.
    pub fn place(&self) -> String {
        let (stream, shard) = (&self.shard.stream.name, &self.shard.shard);
        match &self.from.after {
            Some(after) => format!("stream {stream}, shard {shard}, after {after}"),
            None => format!("stream {stream}, shard {shard}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_older(arrived_ms: i64, start_ms: i64) -> bool {
        ShardStart::AtMs(start_ms).is_after(&SequenceNumber::from(1), arrived_ms)
    }

    #[test]
    fn what_arrived_before_the_start_is_older() {
        assert!(is_older(1_499, 1_500));
        assert!(!is_older(1_500, 1_500));
        assert!(!is_older(1_501, 1_500));
    }

    #[test]
    fn a_server_that_knows_seconds_loses_nothing_in_the_second_of_the_start() {
        assert!(!is_older(1_000, 1_500));
        assert!(is_older(0, 1_500));
    }
}
