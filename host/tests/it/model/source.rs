//! Shards in memory, read in batches of any size.

use std::sync::Arc;

use async_trait::async_trait;
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError,
};

use super::chaos::{Chaos, Fate};

/// Maximum number of records in a batch.
const BATCH_MAX: usize = 25;

/// A stream in memory.
pub struct Memory {
    pub shards: Vec<Vec<Record>>,
    pub chaos: Arc<Chaos>,
}

impl Memory {
    /// Makes a stream with `records` records per shard. Each payload contains its id; some payloads are not JSON.
    pub fn new(shards: u64, records: u64, chaos: Arc<Chaos>) -> Self {
        let shards = (0..shards).map(|shard| {
            let ids = shard * records..(shard + 1) * records;
            ids.map(record).collect()
        });
        Self { shards: shards.collect(), chaos }
    }
}

/// Returns the record of an id. Sequence numbers have gaps, and two of three records share one, as those of an
/// aggregate do.
pub fn record(id: u64) -> Record {
    let sequence = SequenceNumber::parse(&format!("{}", 1_000 + id / 3 * 7)).expect("a number");
    let payload = match id % 41 {
        40 => format!("no JSON {id}"),
        _ => format!("{{\"id\":{id},\"side\":{}}}", id % 2),
    };
    Record {
        position: Position { sequence, sub_sequence: id % 3 },
        partition_key: format!("key {}", id % 5).into(),
        payload: payload.into(),
        arrived_ms: id,
    }
}

/// Returns a shard's name.
pub fn name(shard: usize) -> String {
    format!("shardId-{shard:012}")
}

impl Chaos {
    /// Makes a call to the source: it may fail, or get no answer until its deadline.
    async fn ask(&self, call: &'static str, shard: &ShardKey) -> Result<(), SourceError> {
        let cause = match self.step().await {
            Fate::GoOn => return Ok(()),
            Fate::Fail => "chaos",
            Fate::NeverAnswered(deadline_ms) => {
                self.unanswered(deadline_ms, async {}).await;
                "chaos: no answer"
            }
        };
        Err(SourceError::Call { call, place: shard.shard.to_string(), cause: cause.into() })
    }
}

#[async_trait]
impl ShardSource for Memory {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        Ok(StreamIdentity { name: "model".into(), arn: "arn:model".into(), created_ms: 1 })
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        let shard = |shard| Shard {
            id: name(shard).as_str().into(),
            parents: Vec::new(),
            is_closed: false,
            hash_range: None,
        };
        Ok((0..self.shards.len()).map(shard).collect())
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        self.chaos.ask("GetShardIterator", shard).await?;
        let place = (0..self.shards.len()).find(|place| name(*place) == shard.shard.as_str());
        let records = self.shards[place.expect("a shard")].clone();
        let next = from
            .after
            .map_or(0, |after| records.partition_point(|record| record.position <= *after));
        let (shard, chaos) = (shard.clone(), self.chaos.clone());
        Ok(Box::new(Reader { shard, records, next, chaos }))
    }
}

struct Reader {
    shard: ShardKey,
    records: Vec<Record>,
    next: usize,
    chaos: Arc<Chaos>,
}

#[async_trait]
impl BatchReader for Reader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        self.chaos.ask("GetRecords", &self.shard).await?;
        if self.next == self.records.len() {
            // An empty answer takes time, as from a server.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            return Ok(NextBatch::Idle { lag_ms: 0, caught_up_ms: None });
        }
        let wanted = self.chaos.rng().usize(1..=BATCH_MAX);
        let end = (self.next + wanted).min(self.records.len());
        let records = self.records[self.next..end].to_vec();
        let before = self.next.checked_sub(1).map(|before| self.records[before].position.clone());
        self.next = end;
        let to_inclusive = records[records.len() - 1].position.clone();
        let range = PositionRange { from_exclusive: before, to_inclusive };
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            range,
            entry: Entry::Source,
        }))
    }
}
