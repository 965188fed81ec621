//! What both readers share: records as the stream gave them, taken apart, filtered, and cut into
//! batches.

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

/// How the reading of a shard begins.
#[derive(Clone, Debug)]
pub struct ReadFrom {
    /// Behind this record.
    pub after: Option<Position>,
    /// Where the shard was begun: it counts while there is no `after`.
    pub start: ShardStart,
    /// The shard's part of the hash range, where known: an aggregate of another one is not ours.
    pub hash_range: Option<HashRange>,
    /// Everything that had arrived by then was read, in milliseconds since 1970.
    pub caught_up_ms: Option<i64>,
}

/// Where a subscription or an iterator begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerStart {
    /// At this record, which is given again. What was read of it is dropped here: inside an
    /// aggregate there is no other way to go on.
    AtSequence(SequenceNumber),
    /// At the first record of this time or later, milliseconds since 1970.
    AtMs(i64),
    /// At the oldest record.
    Horizon,
}

/// Bytes of aggregates in one answer up to which they are validated where they come in: some 100 µs of
/// work. More are validated off the async threads, where everything else waits for nobody's bytes.
const VALIDATED_IN_PLACE_BYTES: usize = 64 << 10;

/// A record as the server gave it, with the meaning of its bytes.
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
/// Dropping the future drops the records: only then may the reader move behind them.
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

/// A record, or more than one, that waits for its lane.
enum Queued {
    Record(Record),
    Aggregate { aggregate: Box<Aggregate>, sequence: SequenceNumber, arrived_ms: u64 },
}

impl Queued {
    /// The memory that it holds, in bytes.
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
    /// The last record that a batch held.
    handed_over: Option<Position>,
    queue: VecDeque<Queued>,
    /// What is not shown yet about the place at which the server was told to begin.
    unvalidated: Option<Unvalidated>,
    /// What the queue holds in memory.
    occupied_bytes: usize,
    /// Bytes that the last batch holds, where it is larger than a batch may be because its one record is. The lane has
    /// it until it asks for the next.
    large_in_hand: usize,
    gap: Option<LostRecordsGap>,
    /// What is lost, until the lane has heard of it.
    lost: Option<LostRecords>,
    /// Records that arrived before the start are dropped: not where a reader goes on after a record.
    drops_older: bool,
    /// When the last record arrived that the server gave, in milliseconds since 1970.
    last_arrived_ms: Option<i64>,
    /// Lines about aggregates of other shards: who may put records may put any number of them.
    astray: LogThrottle,
}

/// A place at which the server was told to begin, until its answer shows that nothing is missing there.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unvalidated {
    /// This record was read: if it comes again, nothing after it is gone.
    Record(Position),
    /// The shard's beginning, of which none is to be missed.
    Beginning,
}

/// The server began later than it was told to: what lies between is gone, or was never there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostRecordsGap {
    /// The record that was asked for; it had been read. `None`: the shard's beginning.
    pub asked: Option<Position>,
    /// The first that came, and when it arrived, in milliseconds since 1970. `None`: nothing is left.
    pub came: Option<(SequenceNumber, i64)>,
}

impl Inbox {
    /// An empty one.
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

    /// The shard.
    pub fn shard(&self) -> &ShardKey {
        &self.shard
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Returns the bytes of memory that waiting records hold, and the last batch if it is larger than usual: payloads,
    /// keys, and what each record costs beside them. Usual batches that lanes have in hand are counted for each lane.
    pub fn occupied_bytes(&self) -> usize {
        self.occupied_bytes + self.large_in_hand
    }

    /// Forgets what waits: the server is asked for it again.
    pub fn give_back(&mut self) {
        self.queue = VecDeque::new();
        self.occupied_bytes = 0;
        self.from.after = self.handed_over.clone();
    }

    /// Notes that the server accepted a start at [`Inbox::server_start`]. From now on the first record that
    /// arrives shows whether records are missing. Call it only after the server accepted: while a subscription
    /// is refused, records still arrive from the earlier iterator, and they follow the last record that was
    /// read. To expect the start's first record then would report lost records where none are lost.
    pub(crate) fn start_accepted(&mut self) {
        self.unvalidated = match self.from.after.clone() {
            Some(after) => Some(Unvalidated::Record(after)),
            None => self.from.caught_up_ms.map(|_| Unvalidated::Beginning),
        };
    }

    /// Where the server must begin, so that no record is missed.
    pub(crate) fn server_start(&self) -> ServerStart {
        match (&self.from.after, &self.from.start) {
            (Some(after), _) => ServerStart::AtSequence(after.sequence.clone()),
            (None, ShardStart::AtSequence(at)) => ServerStart::AtSequence(at.clone()),
            (None, ShardStart::AtMs(at_ms)) => ServerStart::AtMs(*at_ms),
            (None, ShardStart::Horizon) => ServerStart::Horizon,
        }
    }

    /// When the last record arrived that the server gave, in milliseconds since 1970.
    pub(crate) fn last_arrived_ms(&self) -> Option<i64> {
        self.last_arrived_ms
    }

    /// A time up to which everything was read, in milliseconds since 1970.
    pub fn caught_up_ms(&self) -> Option<i64> {
        self.from.caught_up_ms
    }

    /// Everything that had arrived by `at_ms` was read.
    pub(crate) fn is_caught_up_at(&mut self, at_ms: i64) {
        self.from.caught_up_ms = Some(at_ms);
    }

    /// A gap that has shown and was not judged.
    pub fn gap(&self) -> Option<LostRecordsGap> {
        self.gap.clone()
    }

    /// The gap was judged.
    pub(crate) fn forget_gap(&mut self) {
        self.gap = None;
    }

    /// The gap that there may be if the server has nothing more, although it was told to begin where
    /// something should be.
    pub(crate) fn gap_before_nothing(&self) -> Option<LostRecordsGap> {
        let asked = match self.unvalidated.as_ref()? {
            Unvalidated::Record(asked) => Some(asked.clone()),
            Unvalidated::Beginning => None,
        };
        Some(LostRecordsGap { asked, came: None })
    }

    /// The lane is to hear of lost records.
    pub fn lose(&mut self, lost: LostRecords) {
        self.lost = Some(lost);
    }

    /// What was lost since the last call.
    pub(crate) fn take_lost(&mut self) -> Option<LostRecords> {
        self.lost.take()
    }

    /// Nothing is missing where the server was told to begin, or it was judged.
    pub(crate) fn mark_validated(&mut self) {
        self.unvalidated = None;
    }

    /// The last record that was read.
    pub fn after(&self) -> Option<&Position> {
        self.from.after.as_ref()
    }

    /// The shard's part of the hash range, where known.
    pub fn hash_range(&self) -> Option<HashRange> {
        self.from.hash_range
    }

    /// Takes in what the server gave, in its order.
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
        // Of this record, what was read before.
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
            // Amazon's own library drops the whole aggregate too: its producer sees from the answer
            // that it went astray and sends the records once more.
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

    /// Cuts the next batch off what waits. An aggregate is taken apart as far as the batch goes.
    pub fn cut(&mut self) -> Option<Batch> {
        let limits = self.limits;
        // Who asks for a batch has settled the one before.
        self.large_in_hand = 0;
        let mut records: Vec<Record> = Vec::new();
        let mut bytes = 0;
        // The first record always fits.
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
            // A long queue would keep its length.
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

    /// The place, for errors.
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
