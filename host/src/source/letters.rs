//! Dead letters as one shard that ends by itself: what a redrive reads.
//!
//! A record's position is its letter's place in the redrive. A batch holds letters that enter the path
//! at one place by one route, and that the same sinks have already.

use std::sync::Arc;

use async_trait::async_trait;

use super::{BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError};
use crate::config::{BatchLimits, StartPosition};
use crate::position::{RedriveId, RedrivenLetter, Redrives};
use crate::record::{
    Batch, Entry, PipelineName, Position, PositionSpan, Record, Redrive, SequenceNumber, ShardKey,
    StreamIdentity,
};

/// A redrive as a source.
pub struct LettersSource {
    redrives: Redrives,
    id: RedriveId,
    identity: StreamIdentity,
    limits: BatchLimits,
    without: Arc<[String]>,
}

impl LettersSource {
    /// The letters of a redrive, but for those that enter at the places of `without`.
    pub fn new(
        redrives: Redrives,
        id: RedriveId,
        pipeline: &PipelineName,
        limits: BatchLimits,
        without: Vec<String>,
    ) -> Self {
        Self { redrives, id, identity: id.stream(pipeline), limits, without: without.into() }
    }
}

#[async_trait]
impl ShardSource for LettersSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        Ok(self.identity.clone())
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        Ok(vec![Shard::only(self.id.shard())])
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let after = from.after.cloned();
        Ok(Box::new(LettersReader {
            redrives: self.redrives.clone(),
            id: self.id,
            shard: shard.clone(),
            limits: self.limits,
            without: self.without.clone(),
            after,
        }))
    }
}

struct LettersReader {
    redrives: Redrives,
    id: RedriveId,
    shard: ShardKey,
    limits: BatchLimits,
    without: Arc<[String]>,
    after: Option<Position>,
}

#[async_trait]
impl BatchReader for LettersReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let after = letter_number(self.after.as_ref())?;
        let BatchLimits { records_max, bytes_max, .. } = self.limits;
        let letters =
            self.redrives.letters(self.id, after, (records_max, bytes_max), &self.without).await;
        let mut letters = letters
            .map_err(|error| SourceError::Letters { cause: error.to_string() })?
            .into_iter()
            .peekable();
        let Some(first) = letters.next() else { return Ok(NextBatch::SourceEnd) };
        let (place, route) = (first.place.clone(), first.route.clone());
        let delivered_to = first.delivered_to.clone();
        let mut bytes = first.payload.len();
        let (mut records, mut origins) = (Vec::new(), Vec::new());
        let mut push = |letter: RedrivenLetter| {
            origins.push(letter.origin);
            records.push(Record {
                position: Position {
                    sequence: SequenceNumber::from(letter.ordinal),
                    sub_sequence: 0,
                },
                partition_key: letter.key.into(),
                payload: letter.payload.into(),
                arrived_ms: letter.arrived_ms,
            });
        };
        push(first);
        while let Some(letter) = letters.next_if(|next| {
            bytes += next.payload.len();
            next.place == place
                && next.route == route
                && next.delivered_to == delivered_to
                && bytes <= self.limits.bytes_max
        }) {
            push(letter);
        }
        let Some(to_inclusive) = records.last().map(|record: &Record| record.position.clone())
        else {
            return Ok(NextBatch::SourceEnd);
        };
        let from_exclusive = self.after.replace(to_inclusive.clone());
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            span: PositionSpan { from_exclusive, to_inclusive },
            entry: Entry::Redrive(Box::new(Redrive { place, route, origins, delivered_to })),
        }))
    }
}

/// The number of the letter that was read last; 0 before the first.
///
/// # Errors
/// [`SourceError::Letters`]: a position that is not of letters. Read as any number, it would pass letters
/// over or run them twice.
pub(super) fn letter_number(after: Option<&Position>) -> Result<u64, SourceError> {
    let Some(after) = after else { return Ok(0) };
    after.sequence.as_str().parse().map_err(|error| SourceError::Letters {
        cause: format!("position {after} is not of a dead letter: {error}; restore the state"),
    })
}
