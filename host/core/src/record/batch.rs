//! Records of a stream, batches of them, and rows for sinks.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::{Position, PositionRange, RouteName, ShardKey, SinkName, StageName};

/// One record of a shard, as it was put.
#[derive(Clone, Debug)]
pub struct Record {
    /// Place in the shard.
    pub position: Position,
    /// Partition key, 1 to 256 characters.
    pub partition_key: Bytes,
    /// Data, 0 to 10 MiB.
    pub payload: Bytes,
    /// Time at which the stream accepted the record, in milliseconds since 1970.
    pub arrived_ms: u64,
}

impl Record {
    /// Memory besides the bytes: the struct, its sequence number, and what the allocator adds to each piece.
    pub(super) const OVERHEAD_BYTES: usize = size_of::<Self>() + 160;

    /// Returns the memory that the record occupies, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        self.payload.len() + self.partition_key.len() + Self::OVERHEAD_BYTES
    }
}

/// Consecutive records of one shard, in order, with the position range that they cover.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Shard of the records.
    pub shard: ShardKey,
    /// Records, by ascending position.
    pub records: Vec<Record>,
    /// Range that is finished once every record here has its outcome.
    pub range: PositionRange,
    /// Place where the records enter the pipeline.
    pub entry: Entry,
}

/// Place where records enter the pipeline.
#[derive(Clone, Debug, Default)]
pub enum Entry {
    /// At the first stage, as read from the stream.
    #[default]
    Source,
    /// Where they failed before. Their payloads and keys are what entered that stage or sink then.
    Redrive(Box<Redrive>),
}

/// Records of a redrive: they enter the pipeline where they failed before.
#[derive(Clone, Debug)]
pub struct Redrive {
    /// Stage or sink where they failed.
    pub place: DeadLetterPlace,
    /// Route by which they came there; empty if unknown.
    pub route: RouteName,
    /// Positions of the records in their original shards, in the order of the batch. Plugins see these.
    pub origins: Vec<Position>,
    /// Sinks that already have the rows of all these records, from a replay.
    pub delivered_to: Vec<SinkName>,
    /// Whether new dead letters of these records store the whole payload that entered: it cannot be made again.
    pub keeps_whole: bool,
}

/// Place where a record failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeadLetterPlace {
    /// On entering this stage.
    Stage(StageName),
    /// On being written by this sink.
    Sink(SinkName),
}

impl fmt::Display for DeadLetterPlace {
    /// Writes `stage:NAME` or `sink:NAME`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stage(name) => write!(f, "stage:{name}"),
            Self::Sink(name) => write!(f, "sink:{name}"),
        }
    }
}

impl DeadLetterPlace {
    /// Parses `stage:NAME` or `sink:NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("stage", name) => Some(Self::Stage(name.into())),
            ("sink", name) => Some(Self::Sink(name.into())),
            _ => None,
        }
    }
}

impl Batch {
    /// Memory besides the records: the struct, its range, the names of its rows' routes.
    pub(super) const OVERHEAD_BYTES: usize = 512;

    /// Returns the number of bytes of its payloads and keys.
    pub fn bytes(&self) -> usize {
        self.records.iter().map(|record| record.payload.len() + record.partition_key.len()).sum()
    }

    /// Returns the memory that the batch occupies, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        Self::OVERHEAD_BYTES + self.records.iter().map(Record::occupied_bytes).sum::<usize>()
    }

    /// Returns the position of a record (by index) in its original shard.
    pub fn origin(&self, record: u32) -> &Position {
        let index = record as usize;
        match &self.entry {
            Entry::Redrive(redrive) => &redrive.origins[index],
            Entry::Source => &self.records[index].position,
        }
    }

    /// Whether a sink already has the rows of these records.
    pub fn is_delivered_to(&self, sink: &SinkName) -> bool {
        match &self.entry {
            Entry::Redrive(redrive) => redrive.delivered_to.contains(sink),
            Entry::Source => false,
        }
    }

    /// Splits the batch after a number of records.
    pub fn cut_at(self, records: usize) -> (Self, Option<Self>) {
        let last = records.checked_sub(1).and_then(|last| self.records.get(last));
        match last.map(|record| record.position.clone()) {
            Some(last) => self.cut_after(&last),
            None => (self, None),
        }
    }

    /// Splits the batch after a position: records up to it stay in the first part. The two ranges join without a gap
    /// and together cover the range of the batch. Nothing is split unless both parts get a record.
    pub fn cut_after(mut self, position: &Position) -> (Self, Option<Self>) {
        let cut = self.records.partition_point(|record| record.position <= *position);
        if cut == 0 || cut == self.records.len() {
            return (self, None);
        }
        let records = self.records.split_off(cut);
        let mut entry = self.entry.clone();
        if let (Entry::Redrive(own), Entry::Redrive(rest)) = (&mut self.entry, &mut entry) {
            rest.origins = own.origins.split_off(cut);
        }
        let middle = self.records[cut - 1].position.clone();
        let range = PositionRange {
            from_exclusive: Some(middle.clone()),
            to_inclusive: std::mem::replace(&mut self.range.to_inclusive, middle),
        };
        let rest = Self { shard: self.shard.clone(), records, range, entry };
        (self, Some(rest))
    }
}

/// Route that a row took, and the component that put it there; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowRoute(Arc<(RouteName, Arc<str>)>);

impl RowRoute {
    /// Combines a route and the digest of the component. The digest is empty if no component made the row.
    pub fn new(name: RouteName, digest: Arc<str>) -> Self {
        Self(Arc::new((name, digest)))
    }

    /// Returns the name of the route.
    pub fn name(&self) -> &RouteName {
        &self.0.0
    }

    /// Returns the digest of the component that made the row; empty if none did.
    pub fn digest(&self) -> &str {
        &self.0.1
    }
}

impl From<&str> for RowRoute {
    /// Makes a route for rows that no component made.
    fn from(name: &str) -> Self {
        Self::new(name.into(), "".into())
    }
}

/// One output of the last stage that ran for a record, on its way to a sink.
///
/// Cheap to clone: it shares its batch. So a sink that refuses the row can still write a dead letter with the original
/// record.
#[derive(Clone, Debug)]
pub struct Row {
    /// Batch of the record that it came from.
    pub batch: Arc<Batch>,
    /// Index of that record in `batch.records`.
    pub record: u32,
    /// Index among the outputs of that record, from 0. Position and ordinal together identify the row.
    pub ordinal: u32,
    /// Route that it took.
    pub route: RowRoute,
    /// Partition key after the stages.
    pub key: Bytes,
    /// Payload after the stages.
    pub payload: Bytes,
}

impl Row {
    /// Returns the memory that the row occupies besides its batch, if its bytes are not shared, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        self.payload.len() + self.key.len() + size_of::<Self>()
    }

    /// Returns a copy that shares nothing: it keeps only its own record, not the whole batch.
    pub fn detached(&self) -> Self {
        let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let source = self.source();
        let record = Record {
            position: source.position.clone(),
            partition_key: copy(&source.partition_key),
            payload: copy(&source.payload),
            arrived_ms: source.arrived_ms,
        };
        let entry = match &self.batch.entry {
            Entry::Source => Entry::Source,
            Entry::Redrive(redrive) => Entry::Redrive(Box::new(Redrive {
                place: redrive.place.clone(),
                route: redrive.route.clone(),
                origins: vec![redrive.origins[self.record as usize].clone()],
                delivered_to: redrive.delivered_to.clone(),
                keeps_whole: redrive.keeps_whole,
            })),
        };
        let (shard, range) = (self.batch.shard.clone(), self.batch.range.clone());
        Self {
            batch: Arc::new(Batch { shard, records: vec![record], range, entry }),
            record: 0,
            ordinal: self.ordinal,
            route: self.route.clone(),
            key: copy(&self.key),
            payload: copy(&self.payload),
        }
    }

    /// Returns the record that the row came from.
    pub fn source(&self) -> &Record {
        &self.batch.records[self.record as usize]
    }

    /// Returns the position of that record.
    pub fn position(&self) -> &Position {
        &self.source().position
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PipelineName, SequenceNumber, ShardId, StreamIdentity};
    use super::*;

    fn batch(positions: impl Iterator<Item = Position>) -> Batch {
        let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 0 };
        let shard = ShardKey {
            pipeline: PipelineName::new("cars"),
            stream: Arc::new(stream),
            shard: ShardId::new("shardId-000000000000"),
        };
        let record = |position| Record {
            position,
            partition_key: Bytes::new(),
            payload: Bytes::new(),
            arrived_ms: 0,
        };
        let records: Vec<Record> = positions.map(record).collect();
        let to_inclusive = records.last().expect("a record").position.clone();
        Batch {
            shard,
            records,
            range: PositionRange { from_exclusive: None, to_inclusive },
            entry: Entry::Source,
        }
    }

    /// Regression: with two swaps in one batch, records of the middle revision were replayed by the last one.
    #[test]
    fn a_batch_is_cut_at_every_swap_in_it() {
        let at =
            |sequence: u64| Position { sequence: SequenceNumber::from(sequence), sub_sequence: 0 };
        for seed in 0..1_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let first = random.u64(1..50);
            let numbers: Vec<u64> = (first..first + random.u64(1..50)).collect();
            let mut swaps: Vec<Position> =
                (0..random.usize(0..6)).map(|_| at(random.u64(0..120))).collect();
            swaps.sort();
            let mut parts = vec![batch(numbers.iter().map(|number| at(*number)))];
            for swap in &swaps {
                let (first, rest) = parts.pop().expect("a part").cut_after(swap);
                parts.push(first);
                parts.extend(rest);
            }

            let all: Vec<Position> = parts
                .iter()
                .flat_map(|part| &part.records)
                .map(|record| record.position.clone())
                .collect();
            assert_eq!(all, numbers.iter().map(|number| at(*number)).collect::<Vec<_>>());
            let mut end = None;
            for part in &parts {
                assert_eq!(part.range.from_exclusive, end, "seed {seed}");
                let (first, last) = (&part.records[0].position, &part.range.to_inclusive);
                assert_eq!(*last, part.records[part.records.len() - 1].position, "seed {seed}");
                assert!(!swaps.iter().any(|swap| first <= swap && swap < last), "seed {seed}");
                end = Some(last.clone());
            }
        }
    }
}
