//! Makes again the input of a dead letter's place, where only its digest is kept.
//!
//! It is made from the original record, by the earlier stages of the revision that ran. A dead letter of a redrive
//! has come through several runs: each begins with the result of the one before. The result is compared with the
//! digest. Anything else is refused, and the dead letter stays as it is.

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

/// Number of revisions that are kept loaded.
const REVISIONS_MAX: usize = 4;
/// Retries of a record's run when the machine is too busy.
const STARVED_RETRY: RetryPolicy = RetryPolicy::every(Duration::from_secs(1)).tries(3);

/// Runs earlier revisions on single records.
pub struct Remaker {
    revisions: RevisionStore,
    ledger: Ledger,
    pipeline: PipelineName,
    stream_name: String,
    loaded: HashMap<String, Arc<Revision>>,
    /// The chain that ran last: usually the next dead letter needs the same.
    chain: Option<(String, ShardKey, Chain)>,
    /// The run that was made last: usually the next dead letter is of the same record.
    last: Option<LastRun>,
    stop: CancellationToken,
    _stops: DropGuard,
}

/// A run and all its results. A record may have become thousands of dead letters, and without this each would run
/// the whole record again.
struct LastRun {
    of: RunKey,
    made: HashMap<String, Made>,
}

/// Properties that decide the results of a run.
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
    /// Makes a remaker over the pipeline's state; `stream_name` is the name that plugins get.
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
                Some(next) => {
                    entry_place(next)?.ok_or("its recorded runs do not follow each other")?
                }
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
        // The same context as plugins had then.
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
        // Dropped first, so that two of them are never in memory at once.
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

    /// Returns the payloads that a record becomes on its way to a place.
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
                // A single record cannot be run in parts.
                Err(Blocked::TooMuch(_)) => {
                    return Err(format!("revision {id} makes more of it than fits in memory"));
                }
            }
        }
    }

    /// Returns the stages of a revision for a shard.
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
            |cause: String| format!("revision {id}, which ran first, cannot rerun it: {cause}");
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
    /// Returns the payload with a digest.
    fn made(&self, sha256: &str) -> Result<Made, String> {
        self.made.get(sha256).cloned().ok_or_else(|| other_digest(sha256))
    }
}

/// Returns where a run entered the stages; `None`: at the source.
fn entry_place(step: &StagesRun) -> Result<Option<DeadLetterPlace>, String> {
    let Some(place) = &step.place else { return Ok(None) };
    let place = DeadLetterPlace::parse(place);
    place.map(Some).ok_or_else(|| format!("not a place of a dead letter: {:?}", step.place))
}

fn other_digest(expected: &str) -> String {
    format!(
        "the earlier stages did not make the same input again: expected a payload with the digest {expected}, \
         found none. The cause is a stage that is not deterministic, or a variable with another value now; the \
         original record is stored (`shardmill dlq show`)"
    )
}
