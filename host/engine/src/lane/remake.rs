//! Makes again what entered the place of a dead letter, where only its digest is kept.
//!
//! It is made of the record, as it was put, by the stages before, of the revision that ran. A letter of a redrive
//! has come through several runs: each begins with what the one before made. What comes out is compared with the
//! digest; anything else is refused, and the letter stays as it is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::RevisionStore;
use crate::redrive_source::{Made, Remake};
use crate::stage::{Blocked, Chain, Entered, Revision, Samples};
use shardmill_config::{RejectedMax, SampleLimits};
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::REDRIVE_SHARD;
use shardmill_core::record::{
    Batch, DeadLetterPlace, Entry, PipelineName, Position, PositionRange, Record, Redrive,
    ShardKey, StreamIdentity,
};
use shardmill_core::retry::RetryPolicy;
use shardmill_state::{
    Ledger, LostPayload, REDRIVE_STREAM, RedriveRecord, StagesRun, entered_digest,
};

/// The largest number of revisions that are kept loaded.
const REVISIONS_MAX: usize = 4;
/// Runs of a record that a busy machine does not let end.
const STARVED_RETRY: RetryPolicy = RetryPolicy::every(Duration::from_secs(1)).tries(3);

/// Runs revisions of then on single records.
pub struct Remaker {
    revisions: RevisionStore,
    ledger: Ledger,
    pipeline: PipelineName,
    stream_name: String,
    loaded: HashMap<String, Arc<Revision>>,
    /// The stages that ran last: mostly the next letter needs the same.
    chain: Option<(String, ShardKey, Chain)>,
    /// The run that was made last: mostly the next letter is of the same record.
    last: Option<LastRun>,
    stop: CancellationToken,
    _stops: DropGuard,
}

/// A run and all that came out of it. A record may have become thousands of letters, and each would run it as a
/// whole again.
struct LastRun {
    of: RunKey,
    made: HashMap<String, Made>,
}

/// The properties that decide what comes out of a run.
#[derive(PartialEq, Eq)]
struct RunKey {
    revision: String,
    place: Option<String>,
    route: Option<String>,
    shard: ShardKey,
    origin: Position,
    arrived_ms: u64,
    entered: Made,
    target: DeadLetterPlace,
}

#[async_trait]
impl Remake for Remaker {
    async fn make(
        &mut self,
        dead_letter: &RedriveRecord,
        lost: &LostPayload,
    ) -> Result<Made, String> {
        self.remake(dead_letter, lost).await
    }
}

impl Remaker {
    /// Over the pipeline's state; `stream_name` is what its plugins are told.
    pub fn new(
        revisions: RevisionStore,
        ledger: Ledger,
        pipeline: PipelineName,
        stream_name: String,
    ) -> Self {
        let stop = CancellationToken::new();
        let _stops = stop.clone().drop_guard();
        let (loaded, chain, last) = (HashMap::new(), None, None);
        Self { revisions, ledger, pipeline, stream_name, loaded, chain, last, stop, _stops }
    }

    async fn remake(
        &mut self,
        dead_letter: &RedriveRecord,
        lost: &LostPayload,
    ) -> Result<Made, String> {
        let mut made: Made = (lost.partition_key.clone().into(), lost.original.clone().into());
        for (index, step) in lost.steps.iter().enumerate() {
            let target = match lost.steps.get(index + 1) {
                None => dead_letter.place.clone(),
                Some(next) => entry_place(next)?.ok_or("its runs do not follow each other")?,
            };
            made = self.run(dead_letter, lost, step, &target, made).await?;
        }
        match entered_digest(&made.0, &made.1) == lost.sha256 {
            true => Ok(made),
            false => Err(other_digest(&lost.sha256)),
        }
    }

    /// Takes one step.
    async fn run(
        &mut self,
        dead_letter: &RedriveRecord,
        lost: &LostPayload,
        step: &StagesRun,
        target: &DeadLetterPlace,
        (key, payload): Made,
    ) -> Result<Made, String> {
        let entry = match entry_place(step)? {
            None => Entry::Source,
            Some(place) => Entry::Redrive(Box::new(Redrive {
                place,
                route: step.route.clone().unwrap_or_default().into(),
                origins: vec![dead_letter.origin.clone()],
                delivered_to: Vec::new(),
                keeps_whole: true,
            })),
        };
        // As plugins saw it then.
        let (stream, shard) = match entry {
            Entry::Source => (self.stream_name.clone(), lost.shard.clone()),
            Entry::Redrive(_) => (REDRIVE_STREAM.to_owned(), REDRIVE_SHARD.into()),
        };
        let arn = format!("remake:{}", self.pipeline).into();
        let stream = StreamIdentity { name: stream.as_str().into(), arn, created_ms: 0 };
        let shard = ShardKey { pipeline: self.pipeline.clone(), stream: stream.into(), shard };
        let of = RunKey {
            revision: step.revision.clone(),
            place: step.place.clone(),
            route: step.route.clone(),
            shard: shard.clone(),
            origin: dead_letter.origin.clone(),
            arrived_ms: dead_letter.arrived_ms,
            entered: (key.clone(), payload.clone()),
            target: target.clone(),
        };
        if let Some(last) = self.last.as_ref().filter(|last| last.of == of) {
            return last.made(&step.sha256);
        }
        // Two of them are not held at once.
        self.last = None;
        let position = dead_letter.origin.clone();
        let range = PositionRange { from_exclusive: None, to_inclusive: position.clone() };
        let arrived_ms = dead_letter.arrived_ms;
        let record = Record { position, partition_key: key, payload, arrived_ms };
        let batch = Batch { shard: shard.clone(), records: vec![record], range, entry };
        let entered = self.entering(&step.revision, &shard, batch, target).await?;
        let made = off_thread(move || {
            let made = |entered: Entered| {
                let digest = entered_digest(&entered.key, &entered.payload);
                (digest, (entered.key, entered.payload))
            };
            entered.into_iter().map(made).collect::<HashMap<String, Made>>()
        });
        let made = made.await;
        self.last.insert(LastRun { of, made }).made(&step.sha256)
    }

    /// Gives the payloads that a record becomes on its way to a place.
    async fn entering(
        &mut self,
        id: &str,
        shard: &ShardKey,
        batch: Batch,
        target: &DeadLetterPlace,
    ) -> Result<Vec<Entered>, String> {
        let batch = Arc::new(batch);
        let mut chain = self.chain(id, shard).await?;
        let mut starved = STARVED_RETRY.start();
        loop {
            let (own, place) = (batch.clone(), target.clone());
            let run = tokio::task::spawn_blocking(move || {
                let entered = chain.entering(&own, &place);
                (chain, entered)
            });
            let (back, entered) = run.await.map_err(|panic| format!("a stage failed: {panic}"))?;
            match entered {
                Ok(entered) => {
                    self.chain = Some((id.to_owned(), shard.clone(), back));
                    return Ok(entered);
                }
                Err(Blocked::Later(_, pause)) => {
                    tokio::time::sleep(pause).await;
                    chain = back;
                }
                Err(Blocked::Starved(why)) => {
                    let pause = starved.next_pause_or_end();
                    let pause =
                        pause.ok_or_else(|| format!("revision {id} does not run it: {why}"))?;
                    tokio::time::sleep(pause).await;
                    chain = back;
                }
                Err(Blocked::Retry(why) | Blocked::Broken(why)) => {
                    return Err(format!("revision {id} does not run it: {why}"));
                }
                Err(Blocked::Stopped(_)) => {
                    return Err(format!("revision {id} was stopped"));
                }
                // One record is never parted.
                Err(Blocked::TooMuch(_)) => {
                    return Err(format!("revision {id} makes too much of it"));
                }
            }
        }
    }

    /// The stages of a revision for a shard.
    async fn chain(&mut self, id: &str, shard: &ShardKey) -> Result<Chain, String> {
        match self.chain.take() {
            Some((own, of, chain)) if own == id && of == *shard => return Ok(chain),
            _ => {}
        }
        let revision = self.revision(id).await?;
        let (shard, stop) = (shard.clone(), self.stop.clone());
        let start = move || {
            let samples = Samples::new(SampleLimits::NONE);
            Chain::start(&revision, &shard, RejectedMax::NONE, samples, &stop)
        };
        let started = tokio::task::spawn_blocking(start).await;
        let started = started.map_err(|panic| format!("a stage failed: {panic}"))?;
        started.map_err(|error| format!("revision {id} does not start: {error}"))
    }

    async fn revision(&mut self, id: &str) -> Result<Arc<Revision>, String> {
        if let Some(known) = self.loaded.get(id) {
            return Ok(known.clone());
        }
        let missing =
            |cause: String| format!("revision {id}, which ran first, cannot run it again: {cause}");
        let spec = self.ledger.spec(id).await;
        let spec = spec.map_err(|error| missing(error.to_string()))?;
        let loaded = self.revisions.load(spec, &self.stream_name).await;
        let loaded = Arc::new(loaded.map_err(|error| missing(format!("{error:#}")))?);
        if self.loaded.len() >= REVISIONS_MAX {
            self.loaded.clear();
        }
        self.loaded.insert(id.to_owned(), loaded.clone());
        Ok(loaded)
    }
}

impl LastRun {
    /// Gives what has a digest.
    fn made(&self, sha256: &str) -> Result<Made, String> {
        self.made.get(sha256).cloned().ok_or_else(|| other_digest(sha256))
    }
}

/// Where a run entered the stages; `None`: at the source.
fn entry_place(step: &StagesRun) -> Result<Option<DeadLetterPlace>, String> {
    let Some(place) = &step.place else { return Ok(None) };
    let place = DeadLetterPlace::parse(place);
    place.map(Some).ok_or_else(|| format!("not a place of a dead letter: {:?}", step.place))
}

fn other_digest(expected: &str) -> String {
    format!(
        "the stages before did not make what entered there: expected a payload with the digest \
         {expected}, found none. A stage that is not deterministic, or variables that are set otherwise \
         today, make another one; the record as it was put is kept (`shardmill dlq show`)"
    )
}
