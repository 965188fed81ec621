//! A custom source: weather stations, one shard each, with numbered readings.

use std::time::Duration;

use async_trait::async_trait;
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, ShardId, ShardKey, StreamIdentity,
};
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError, StartPosition,
};

/// Names of the stations.
pub const STATIONS: [&str; 2] = ["north", "south"];
/// Readings of a station, numbered from 1.
pub const READINGS: u64 = 1_000;
/// Readings in a batch.
const BATCH: u64 = 10;
/// Pause between two batches. It makes a run take two seconds, so that it can be killed halfway.
const PAUSE: Duration = Duration::from_millis(20);

/// All stations, as one stream.
pub struct WeatherStations;

#[async_trait]
impl ShardSource for WeatherStations {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        // Positions are stored under this identity, so it must be the same in every run.
        Ok(StreamIdentity { name: "weather".into(), arn: "example:weather".into(), created_ms: 0 })
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        Ok(STATIONS.map(|station| Shard::only(ShardId::new(station))).into())
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        Ok(Box::new(Station { shard: shard.clone(), after: from.after.cloned() }))
    }
}

/// Reader of one station.
struct Station {
    shard: ShardKey,
    /// Position of the last reading that was returned.
    after: Option<Position>,
}

impl Station {
    fn reading(&self, number: u64) -> Record {
        let station = self.shard.shard.as_str();
        let celsius = number as f64 / 2.0;
        Record {
            position: Position { sequence: number.into(), sub_sequence: 0 },
            partition_key: station.to_owned().into(),
            payload: format!("{station},{number},{celsius:.1}").into(),
            arrived_ms: 0,
        }
    }
}

#[async_trait]
impl BatchReader for Station {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let last = self.after.as_ref().map_or(Ok(0), |after| after.sequence.as_str().parse());
        // A position of another source is refused, so that it is not mistaken for a place in this one.
        let last: u64 = last.map_err(|_| SourceError::Call {
            call: "next_batch",
            place: format!("station {}", self.shard.shard),
            cause: format!("expected the number of a reading, found {:?}", self.after),
        })?;
        if last >= READINGS {
            return Ok(NextBatch::SourceEnd);
        }
        // The engine may drop this future at any await, so nothing is changed before the last one.
        tokio::time::sleep(PAUSE).await;
        let records: Vec<Record> =
            (last + 1..=READINGS.min(last + BATCH)).map(|number| self.reading(number)).collect();
        let Some(to_inclusive) = records.last().map(|record| record.position.clone()) else {
            return Ok(NextBatch::SourceEnd);
        };
        let from_exclusive = self.after.replace(to_inclusive.clone());
        let range = PositionRange { from_exclusive, to_inclusive };
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            range,
            entry: Entry::Source,
        }))
    }
}
