//! Dead letters as one shard with an end: the source of a redrive.
//!
//! A record's position is its dead letter's number in the redrive, so a redrive that was interrupted goes on where
//! it was. A batch holds dead letters that enter the path at one place by one route, and that the same sinks have
//! already.

use std::sync::{Arc, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Mutex;

use shardmill_config::BatchLimits;
use shardmill_core::record::{
    Batch, DeadLetterPlace, Entry, PipelineName, Position, PositionRange, Record, Redrive,
    RouteName, SequenceNumber, ShardKey, SinkName, StreamIdentity,
};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError,
};
use shardmill_state::{LostPayload, RedriveId, RedriveRecord, Redrives, StateError};

/// A key and a payload.
pub type Made = (Bytes, Bytes);

/// Makes again the input of a dead letter's place, where only its digest is kept.
#[async_trait]
pub trait Remake: Send {
    /// Makes the input of a dead letter's place.
    ///
    /// # Errors
    /// Why it cannot be made, as a sentence.
    async fn make(
        &mut self,
        dead_letter: &RedriveRecord,
        lost: &LostPayload,
    ) -> Result<Made, String>;
}

/// A redrive as a source.
pub struct RedriveSource {
    redrives: Redrives,
    id: RedriveId,
    identity: StreamIdentity,
    limits: BatchLimits,
    without: Arc<[String]>,
    remade: Arc<Remade>,
}

/// Makes again the payloads that are not kept.
#[derive(Default)]
struct Remade {
    /// Runs one dead letter at a time, because what it makes is large. `None`: nothing can be made.
    remaker: Option<Mutex<Box<dyn Remake>>>,
    /// Position of each sink in the redrive before this run.
    reached: Vec<(SinkName, Option<Position>)>,
    left_out: LeftOut,
}

/// Dead letters that were left out because their input could not be made again: number and reason.
pub type LeftOut = Arc<std::sync::Mutex<Vec<(i64, String)>>>;

impl RedriveSource {
    /// Makes a source of the dead letters of a redrive, except those that enter at the places of `without`. Those of
    /// which only a digest is kept are left out, unless [`RedriveSource::remade_by`] follows.
    pub fn new(
        redrives: Redrives,
        id: RedriveId,
        pipeline: &PipelineName,
        limits: BatchLimits,
        without: Vec<String>,
    ) -> Self {
        let (identity, without) = (id.stream(pipeline), without.into());
        Self { redrives, id, identity, limits, without, remade: Arc::default() }
    }

    /// Makes the same source, with payloads that are made again where only a digest is kept. `reached` has each
    /// sink's position in the redrive.
    pub fn remade_by(
        self,
        remaker: Box<dyn Remake>,
        reached: Vec<(SinkName, Option<Position>)>,
    ) -> Self {
        let (remaker, left_out) = (Some(Mutex::new(remaker)), LeftOut::default());
        Self { remade: Arc::new(Remade { remaker, reached, left_out }), ..self }
    }

    /// Returns the dead letters that were left out so far.
    pub fn left_out(&self) -> LeftOut {
        self.remade.left_out.clone()
    }
}

#[async_trait]
impl ShardSource for RedriveSource {
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
        Ok(Box::new(RedriveReader {
            redrives: self.redrives.clone(),
            id: self.id,
            shard: shard.clone(),
            limits: self.limits,
            without: self.without.clone(),
            remade: self.remade.clone(),
            after,
        }))
    }
}

struct RedriveReader {
    redrives: Redrives,
    id: RedriveId,
    shard: ShardKey,
    limits: BatchLimits,
    without: Arc<[String]>,
    remade: Arc<Remade>,
    after: Option<Position>,
}

impl RedriveReader {
    /// Returns a dead letter with its payload; `None`: the payload could not be made again, and the dead letter is left
    /// out.
    async fn whole(
        &self,
        mut dead_letter: RedriveRecord,
    ) -> Result<Option<RedriveRecord>, SourceError> {
        let Some(lost) = dead_letter.lost.take() else { return Ok(Some(dead_letter)) };
        let made = match &self.remade.remaker {
            Some(remaker) => remaker.lock().await.make(&dead_letter, &lost).await,
            None => Err("only a digest of the input is stored".into()),
        };
        match made {
            Ok((key, payload)) => {
                // Copied, because they may be a small part of a plugin's answer, which they would keep in memory.
                (dead_letter.key, dead_letter.payload) = (key.to_vec(), payload.to_vec());
                Ok(Some(dead_letter))
            }
            Err(why) => {
                tracing::warn!(
                    letter = lost.dead_letter,
                    cause = why,
                    "a dead letter is left out of the redrive"
                );
                let reached = self.remade.reached.clone();
                let left = self.redrives.leave_out(self.id, lost.dead_letter, reached).await;
                left.map_err(unreadable)?;
                let mut left_out =
                    self.remade.left_out.lock().unwrap_or_else(PoisonError::into_inner);
                left_out.push((lost.dead_letter, why));
                Ok(None)
            }
        }
    }
}

/// Converts an error of the state to one of a source.
pub(crate) fn unreadable(error: StateError) -> SourceError {
    SourceError::DeadLetters { cause: error.to_string(), is_final: error.is_final() }
}

/// Properties that the dead letters of one batch share.
#[derive(PartialEq, Eq)]
struct Common {
    place: DeadLetterPlace,
    route: RouteName,
    delivered_to: Vec<SinkName>,
    keeps_whole: bool,
}

impl Common {
    fn of(dead_letter: &RedriveRecord) -> Self {
        Self {
            place: dead_letter.place.clone(),
            route: dead_letter.route.clone(),
            delivered_to: dead_letter.delivered_to.clone(),
            keeps_whole: dead_letter.keeps_whole,
        }
    }
}

#[async_trait]
impl BatchReader for RedriveReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let after = dead_letter_number(self.after.as_ref())?;
        let BatchLimits { records_max, bytes_max, .. } = self.limits;
        let (mut records, mut origins): (Vec<Record>, Vec<Position>) = (Vec::new(), Vec::new());
        let (mut common, mut bytes) = (None, 0);
        while common.is_none() {
            let limits = (records_max, bytes_max);
            let dead_letters =
                self.redrives.dead_letters(self.id, after, limits, &self.without).await;
            let dead_letters = dead_letters.map_err(unreadable)?;
            if dead_letters.is_empty() {
                return Ok(NextBatch::SourceEnd);
            }
            for dead_letter in dead_letters {
                let own = Common::of(&dead_letter);
                if common.as_ref().is_some_and(|common| *common != own) {
                    break;
                }
                // A dead letter that is left out is not read again.
                let Some(dead_letter) = self.whole(dead_letter).await? else { continue };
                bytes += dead_letter.key.len() + dead_letter.payload.len();
                if common.is_some() && bytes > bytes_max {
                    break;
                }
                common = Some(own);
                origins.push(dead_letter.origin);
                records.push(Record {
                    position: Position {
                        sequence: SequenceNumber::from(dead_letter.ordinal),
                        sub_sequence: 0,
                    },
                    partition_key: dead_letter.key.into(),
                    payload: dead_letter.payload.into(),
                    arrived_ms: dead_letter.arrived_ms,
                });
            }
        }
        let (Some(common), Some(last)) = (common, records.last()) else {
            return Ok(NextBatch::SourceEnd);
        };
        let to_inclusive = last.position.clone();
        let from_exclusive = self.after.replace(to_inclusive.clone());
        let Common { place, route, delivered_to, keeps_whole } = common;
        let redrive = Redrive { place, route, origins, delivered_to, keeps_whole };
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            range: PositionRange { from_exclusive, to_inclusive },
            entry: Entry::Redrive(Box::new(redrive)),
        }))
    }
}

/// Returns the number of the dead letter that was read last; 0 before the first.
///
/// # Errors
/// [`SourceError::DeadLetters`]: a position that is not of dead letters. If it were read as any number, dead letters
/// would be skipped or run twice.
pub(super) fn dead_letter_number(after: Option<&Position>) -> Result<u64, SourceError> {
    let Some(after) = after else { return Ok(0) };
    after.sequence.as_str().parse().map_err(|error| SourceError::DeadLetters {
        cause: format!(
            "not a valid position of a dead letter: {after}: {error}; restore the state folder"
        ),
        is_final: true,
    })
}
