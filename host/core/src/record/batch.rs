//! Records on their way: as a stream has them, in batches, and as rows for sinks.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::{Position, PositionRange, RouteName, ShardKey, SinkName, StageName};

/// One record of a shard, as it was put.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its place in the shard.
    pub position: Position,
    /// The partition key, 1 to 256 characters.
    pub partition_key: Bytes,
    /// The data, 0 to 10 MiB.
    pub payload: Bytes,
    /// When the stream accepted it, in milliseconds since 1970.
    pub arrived_ms: u64,
}

impl Record {
    /// What it costs beside its bytes: itself, its sequence number, and what the allocator adds to each of
    /// its pieces.
    pub(super) const OVERHEAD_BYTES: usize = size_of::<Self>() + 160;

    /// The memory that it holds, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        self.payload.len() + self.partition_key.len() + Self::OVERHEAD_BYTES
    }
}

/// Consecutive records of one shard, in order, with the span that they cover.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The shard that they come from.
    pub shard: ShardKey,
    /// The records, by ascending position.
    pub records: Vec<Record>,
    /// What is settled once every record here has its outcome.
    pub range: PositionRange,
    /// Where they enter the path.
    pub entry: Entry,
}

/// Where records enter the path.
#[derive(Clone, Debug, Default)]
pub enum Entry {
    /// At its beginning, as the stream has them.
    #[default]
    Source,
    /// Where they failed before: their payloads and keys are what entered there.
    Redrive(Box<Redrive>),
}

/// Records that enter the path where they failed before.
#[derive(Clone, Debug)]
pub struct Redrive {
    /// The stage or the sink.
    pub place: DeadLetterPlace,
    /// The route by which they came there; empty: not known.
    pub route: RouteName,
    /// Where the records are in their own shards, in the order of the batch: what plugins see.
    pub origins: Vec<Position>,
    /// Sinks that have the rows of all these records already, by a replay.
    pub delivered_to: Vec<SinkName>,
    /// Dead letters of these records keep what entered a place whole: it could not be made again.
    pub keeps_whole: bool,
}

/// Where a record failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeadLetterPlace {
    /// On entering this stage.
    Stage(StageName),
    /// On being written by this sink.
    Sink(SinkName),
}

impl fmt::Display for DeadLetterPlace {
    /// As `stage:NAME` or `sink:NAME`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stage(name) => write!(f, "stage:{name}"),
            Self::Sink(name) => write!(f, "sink:{name}"),
        }
    }
}

impl DeadLetterPlace {
    /// Reads `stage:NAME` or `sink:NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("stage", name) => Some(Self::Stage(name.into())),
            ("sink", name) => Some(Self::Sink(name.into())),
            _ => None,
        }
    }
}

impl Batch {
    /// What it costs beside its records: itself, its span, the names of its rows' routes.
    pub(super) const OVERHEAD_BYTES: usize = 512;

    /// The bytes of its payloads and keys.
    pub fn bytes(&self) -> usize {
        self.records.iter().map(|record| record.payload.len() + record.partition_key.len()).sum()
    }

    /// The memory that it holds, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        Self::OVERHEAD_BYTES + self.records.iter().map(Record::occupied_bytes).sum::<usize>()
    }

    /// Where a record is in its own shard, by its index.
    pub fn origin(&self, record: u32) -> &Position {
        let index = record as usize;
        match &self.entry {
            Entry::Redrive(redrive) => &redrive.origins[index],
            Entry::Source => &self.records[index].position,
        }
    }

    /// Whether a sink has the rows of its records already.
    pub fn is_delivered_to(&self, sink: &SinkName) -> bool {
        match &self.entry {
            Entry::Redrive(redrive) => redrive.delivered_to.contains(sink),
            Entry::Source => false,
        }
    }

    /// Parts it after so many records.
    pub fn cut_at(self, records: usize) -> (Self, Option<Self>) {
        let last = records.checked_sub(1).and_then(|last| self.records.get(last));
        match last.map(|record| record.position.clone()) {
            Some(last) => self.cut_after(&last),
            None => (self, None),
        }
    }

    /// Parts it after a position, so that neither part has records on both sides of it. The parts' spans
    /// join without a gap and cover what the batch's did.
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

/// The route that a row took, and which component put it there; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowRoute(Arc<(RouteName, Arc<str>)>);

impl RowRoute {
    /// By the component with this digest; empty: by none, as it came.
    pub fn new(name: RouteName, digest: Arc<str>) -> Self {
        Self(Arc::new((name, digest)))
    }

    /// The route's name.
    pub fn name(&self) -> &RouteName {
        &self.0.0
    }

    /// The digest of the component that made the row; empty: no component did.
    pub fn digest(&self) -> &str {
        &self.0.1
    }
}

impl From<&str> for RowRoute {
    /// A route by which rows go as they came.
    fn from(name: &str) -> Self {
        Self::new(name.into(), "".into())
    }
}

/// One output of the last stage that ran for it, on its way to a sink.
///
/// Cheap to clone: it shares its batch, so that a sink that refuses it can still write a dead
/// letter with the original record.
#[derive(Clone, Debug)]
pub struct Row {
    /// The batch that it comes from.
    pub batch: Arc<Batch>,
    /// Index of its source record in `batch.records`.
    pub record: u32,
    /// Its place among the outputs of that record, from 0: with the position, the row's identity.
    pub ordinal: u32,
    /// The route that it took.
    pub route: RowRoute,
    /// The partition key after the stages.
    pub key: Bytes,
    /// The payload after the stages.
    pub payload: Bytes,
}

impl Row {
    /// The memory that it holds beside its batch where it shares its bytes with nobody, in bytes.
    pub fn occupied_bytes(&self) -> usize {
        self.payload.len() + self.key.len() + size_of::<Self>()
    }

    /// A copy that shares nothing: it keeps its own record alone, not the batch around it.
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

    /// The record that it came from.
    pub fn source(&self) -> &Record {
        &self.batch.records[self.record as usize]
    }

    /// The position of the record that it came from.
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

    /// Two swaps in one batch: what the revision between them ran once was replayed by the last.
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
