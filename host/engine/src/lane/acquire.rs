//! Acquiring a shard: from the positions of the sinks to a lane that can read.
//!
//! Each sink says where it is, the lane starts at the minimum, and the ledger says which revision runs from where.
//! The order of the steps matters:
//!
//! 1. The state's checkpoint and remembered positions are read, before any sink is asked: a sink that cannot be
//!    reached still shows its lag.
//! 2. Every sink is asked whether it can be reached, before one is acquired: acquiring may leave writes behind,
//!    which would be repeated at each try.
//! 3. Each sink is acquired, which fences its earlier writers. Only then is its position final. Its pending dead
//!    letters are resolved with that position, also before the first record.
//! 4. The sink's position is compared with what the state remembers.
//! 5. The lane's start, and the revisions after it, are computed; a new revision is written to the ledger.
//! 6. Records that a sink will not get, because the revision that ran them first does not feed it, become a recorded
//!    hole.
//!
//! | sink's own position | after which position it gets rows |
//! |---|---|
//! | at or after the checkpoint | its own |
//! | none, and the state remembers none | the checkpoint: the sink is new |
//! | before the checkpoint, in a recorded hole | the end of the hole |
//! | before the checkpoint, in a recorded hole, with a promised object | its own: the object must be made again |
//! | before what the state remembers, otherwise | `on_position_mismatch`: stop, the sink's, or the checkpoint |
//! | before rows that were given up | the end of these rows: they are dead letters |

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use super::change::{PendingChange, SwapPause};
use super::lag::{LiveDelivery, LiveLag, ShardLag};
use super::{ActiveSegment, Lane, LaneError, Shared, checkpointer};
use crate::delivery::{DeliveryContext, DeliveryHandle};
use crate::stage::Revision;
use shardmill_config::{OnPositionMismatch, SinkConfig, environment};
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::{Position, ShardKey, ShardStart, SinkName};
use shardmill_core::sink::{Acquired, Sink};
use shardmill_core::source::{NextBatch, ResumePoint, Waiting};
use shardmill_core::stop::Stop;
use shardmill_plugin::{Plugin, PluginHost};
use shardmill_state::RevisionSpec;
use shardmill_state::agreement::{Mismatch, Stands, agree};
use shardmill_state::{
    AcquiredShard, Hole, Ledger, Segment, ShardState, StateStore, Variables, is_redrive,
};

/// A sink that was acquired for the shard.
struct Standing {
    acquired: Acquired,
    /// The owner's epoch in the store of dead letters.
    epoch: i64,
    /// Rows up to here were given up: the sink needs none of them.
    given_up_to: Option<Position>,
    /// The lane hands over only rows after this position.
    skip_to: Option<Position>,
    /// Rows after `skip_to` that are dead letters of the sink already.
    dead_letters: HashSet<(Position, u32)>,
}

impl Standing {
    /// Returns the position that the sink must commit first, without a row, because it skips records that it has not
    /// committed itself.
    fn first_to(&self) -> Option<Position> {
        let own = self.acquired.position.as_ref().max(self.given_up_to.as_ref());
        let is_moved = self.skip_to.as_ref() > own;
        // A promised object must be committed first. And where rows were given up, the sink's position must stay: it
        // says which try has landed.
        let is_free = self.acquired.must_cut_at.is_none() && self.given_up_to.is_none();
        self.skip_to.clone().filter(|_| self.acquired.keeps_position && is_moved && is_free)
    }
}

impl<'a> Lane<'a> {
    /// Acquires the shard in every sink and makes its lane.
    ///
    /// # Errors
    /// [`LaneError::Fatal`] when positions contradict each other or a revision is missing. Of the others,
    /// [`LaneError::needs_a_person`] says which cannot be retried.
    pub async fn acquire(
        shared: &'a Shared,
        shard: ShardKey,
        stop: &Stop,
    ) -> Result<Self, LaneError> {
        let state = shared.checkpoints.shards(&shard.stream).await?;
        let state = state.get(&shard.shard).cloned().unwrap_or_default();
        let known = shared.checkpoints.sink_positions(&shard).await?;
        // This comes before the sinks are reached: one that cannot be reached has a lag all the same.
        let mut arrivals = shared.checkpoints.arrivals(&shard).await?;
        let names = shared.sinks.iter().map(|sink| sink.name().clone());
        let arrivals = names.map(|name| (name.clone(), arrivals.remove(&name)));
        let lag =
            LiveLag { shard: ShardLag::new(arrivals, state.caught_up_ms), ..LiveLag::default() };
        shared.statuses.lag(&shard.shard, |known| *known = lag);
        for sink in &shared.sinks {
            sink.reach(&shard).await?;
        }
        let mut standings = Vec::new();
        for place in acquisition_order(&shared.sinks) {
            let (sink, config) = (&shared.sinks[place], &shared.config.sinks[place]);
            let mut acquired = sink.acquire(&shard).await?;
            if !acquired.keeps_position {
                acquired.position = known.get(sink.name()).cloned();
            }
            let at = acquired.position.as_ref();
            let AcquiredShard { epoch, given_up_to } =
                shared.dead_letters.acquire_shard(&shard, sink.name(), at).await?;
            let mut own = Stands {
                stands: acquired.position.clone().max(given_up_to.clone()),
                remembered: known.get(sink.name()).cloned(),
            };
            let mut policy = shared.config.on_position_mismatch;
            if own.stands < state.checkpoint {
                // Records in a recorded hole are not given to the sink now either. But an object that it has
                // promised must be read again: its claim log cannot continue otherwise.
                let end = shared.holes.end_around(&shard, sink.name(), own.stands.as_ref()).await?;
                match (end, &acquired.must_cut_at) {
                    (Some(_), Some(_)) => policy = OnPositionMismatch::Sink,
                    (end, _) => own.stands = own.stands.max(end),
                }
            }
            let skip_to = agree(&own, state.checkpoint.as_ref(), policy)
                .map_err(|found| LaneError::Fatal(mismatch(&shard, config, &found)))?;
            let dead_letters =
                shared.dead_letters.rows_above(&shard, sink.name(), skip_to.as_ref()).await?;
            let standing = Standing { acquired, epoch, given_up_to, skip_to, dead_letters };
            standings.push((place, standing));
        }
        standings.sort_by_key(|(place, _)| *place);
        let standings: Vec<Standing> =
            standings.into_iter().map(|(_, standing)| standing).collect();
        let needs: Vec<Option<Position>> =
            standings.iter().map(|standing| standing.skip_to.clone()).collect();
        let start = start_of(shared, &shard, &state, &needs, stop).await?;
        // A promised object counts as committed: the revision that promised it must make it.
        let highest = standings
            .iter()
            .flat_map(|standing| [standing.skip_to.clone(), standing.acquired.must_cut_at.clone()])
            .max()
            .flatten();
        // A dead letter of a stage shows that its record was run. If another revision ran the record again, an output
        // could be lost, or the record could have both a dead letter and rows.
        let ran = highest.clone().max(shared.dead_letters.highest_of_stages(&shard).await?);
        let (change, wanted) = PendingChange::begin(shared, &shard, stop);
        let place = Place { start: start.as_ref(), ran: ran.as_ref(), state: &state };
        let segments = segments(shared, &wanted, &shard, place).await?;
        record_unbound(shared, &shard, &segments, &needs).await?;
        let dead_lettered_to = shared.dead_letters.dead_lettered_to(&shard, start.as_ref()).await?;
        let abandon = CancellationToken::new();
        let mut unbudgeted_to = Vec::new();
        let account = shared.budget.account(shard.shard.as_str());
        let account = Arc::new(account);
        let mut deliveries = Vec::new();
        for (standing, config) in standings.into_iter().zip(&shared.config.sinks) {
            // A sink with a promised object cannot commit before the promised end. If its rows waited for the memory
            // that its own buffer holds, the lane would wait forever. These rows are bounded without the budget,
            // because the earlier owner had them in memory.
            unbudgeted_to.push(standing.acquired.must_cut_at.clone());
            let first_to = standing.first_to().map(|to| (to, wanted.id.clone()));
            // Other sinks need records from before the shard's start; this sink never gets them.
            let is_from_start = start.is_some() && standing.skip_to.is_none();
            let context = DeliveryContext {
                shard: shard.clone(),
                sink: config.name.value.clone(),
                commit_policy: config.commit_policy,
                timing: shared.config.timing,
                account: account.clone(),
                dead_letters: shared.dead_letters.clone(),
                rejected_max: shared.config.rejected_max,
                abandon: abandon.clone(),
                epoch: standing.epoch,
                skip_to: standing.skip_to,
                from_start: is_from_start.then(|| state.start.clone()),
                own_dead_letters: standing.dead_letters,
                first_to,
            };
            deliveries.push(DeliveryHandle::start(standing.acquired, context));
        }
        let waiting = Waiting::default();
        tracing::info!(shard = %shard.shard, from = start.as_ref().map(tracing::field::display),
            "reading");
        shared.statuses.update(&shard.shard, |status| status.acquired(start.as_ref()));
        let live = deliveries.iter().map(|own| LiveDelivery {
            sink: own.sink.clone(),
            progress: own.progress.clone(),
            commit_now: own.commit_now.clone(),
        });
        let live = live.collect();
        shared.statuses.lag(&shard.shard, |lag| lag.deliveries = live);
        if let Some(first) = segments.first() {
            shared.statuses.runs(&shard.shard, &first.revision.id, None);
        }
        Ok(Self {
            shared,
            stop: stop.clone(),
            checkpointer: checkpointer::start(shared, &shard, &deliveries),
            abandon,
            deliveries,
            account,
            unbudgeted_to,
            at: start,
            highest,
            replayed: 0,
            segments,
            change,
            chain: None,
            swap_pause: SwapPause::default(),
            dead_lettered_to,
            start: state.start,
            caught_up_ms: state.caught_up_ms,
            read_up_to_ms: None,
            waits: waiting.watch(shared.config.timing.call_blocked_after),
            waiting,
            shard,
        })
    }
}

/// Returns the indexes of the sinks in the order of acquisition. Sinks whose acquisition leaves something that only
/// grows come last, so that a failure of the others costs nothing.
fn acquisition_order(sinks: &[Arc<dyn Sink>]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..sinks.len()).collect();
    places.sort_by_key(|place| sinks[*place].acquires_last());
    places
}

fn mismatch(shard: &ShardKey, sink: &SinkConfig, found: &Mismatch) -> String {
    format!(
        "position mismatch of sink {} in shard {}: {found}. Either its destination was restored from a backup, \
         or another application has moved the checkpoint. Set `on_position_mismatch = \"sink\"` under \
         [pipeline] to read again from the sink's position, or \"checkpoint\" to go on from the checkpoint",
        sink.name.value, shard.shard
    )
}

/// Returns the position after which the lane begins: the lowest that a sink needs. `None`: at the start of the
/// shard.
///
/// After a loss of the state, one sink may have a position and another none. Each goes on by itself: the lane begins
/// at the earlier of the two, the record after that position or the start of the shard.
async fn start_of(
    shared: &Shared,
    shard: &ShardKey,
    state: &ShardState,
    needs: &[Option<Position>],
    stop: &Stop,
) -> Result<Option<Position>, LaneError> {
    let is_mixed = needs.contains(&None);
    let Some(lowest) = needs.iter().flatten().min().cloned() else { return Ok(None) };
    if !is_mixed {
        return Ok(Some(lowest));
    }
    let starts_later = match &state.start {
        ShardStart::Horizon => false,
        ShardStart::AtSequence(start) => lowest.sequence < *start,
        // Only the stream knows which comes first, the record or the time.
        ShardStart::AtMs(_) => {
            let first = first_from_start(shared, shard, &state.start, stop).await?;
            first.is_none_or(|first| first > lowest)
        }
    };
    Ok(starts_later.then_some(lowest))
}

/// Returns the first record that the stream has at or after a start; `None`: none so far.
async fn first_from_start(
    shared: &Shared,
    shard: &ShardKey,
    start: &ShardStart,
    stop: &Stop,
) -> Result<Option<Position>, LaneError> {
    let waiting = Waiting::default();
    let from = ResumePoint { after: None, start, caught_up_ms: None, waiting: &waiting };
    let look = async {
        let mut reader = shared.source.open(shard, from).await?;
        match reader.next_batch().await? {
            NextBatch::Batch(batch) => Ok(batch.records.first().map(|it| it.position.clone())),
            NextBatch::Idle { .. }
            | NextBatch::Lost(_)
            | NextBatch::ShardEnd { .. }
            | NextBatch::SourceEnd => Ok(None),
        }
    };
    stop.unless_asked(look).await.unwrap_or(Err(LaneError::Stopped))
}

/// Position of a lane as it begins.
#[derive(Clone, Copy)]
struct Place<'p> {
    /// The lane reads records after this.
    start: Option<&'p Position>,
    /// Records up to here have an outcome: in a sink, or as a dead letter.
    ran: Option<&'p Position>,
    state: &'p ShardState,
}

/// Returns the revisions to run after the start, the first at work first. A revision that is new for the shard is
/// recorded after the last record that has an outcome, in a sink or as a dead letter.
async fn segments(
    shared: &Shared,
    wanted: &Arc<Revision>,
    shard: &ShardKey,
    place: Place<'_>,
) -> Result<Vec<ActiveSegment>, LaneError> {
    let Place { start, ran, state } = place;
    let mut segments = shared.ledger.segments(shard).await?;
    if segments.last().is_none_or(|last| *last.revision != *wanted.id) {
        let last_from = segments.last().map(|last| last.from_exclusive.clone());
        let from_exclusive = match last_from {
            Some(last_from) => last_from.max(ran.cloned()),
            None => None,
        };
        segments.retain(|segment| segment.from_exclusive < from_exclusive);
        let revision = wanted.id.to_string();
        let segment = Segment { from_exclusive, revision };
        shared.ledger.record(shard, &segment).await?;
        segments.push(segment);
    }
    // Of the segments that begin at or before the start, only the last is still needed.
    let first = segments.iter().rposition(|segment| segment.from_exclusive.as_ref() <= start);
    segments.drain(..first.unwrap_or(0));
    let mut active = Vec::new();
    for index in 0..segments.len() {
        let (own, next) = (&segments[index], segments.get(index + 1));
        let ends_at = next.and_then(|next| next.from_exclusive.as_ref());
        let found = shared.revisions.get(shared, wanted, &own.revision).await;
        let revision = match found {
            // The revision was pruned after all sinks, except restored ones, had these records. So the revision
            // wanted now makes rows for the restored sinks alone.
            Err(LaneError::Fatal(cause))
                if ends_at.is_some() && ends_at <= state.reread_to.as_ref() =>
            {
                tracing::warn!(shard = %shard.shard, up_to = ends_at.map(tracing::field::display),
                    revision = %own.revision, instead = %wanted.id, %cause,
                    "the current revision replays these records, only for sinks that were restored: the \
                     revision that ran first is no longer stored");
                wanted.clone()
            }
            found => found?,
        };
        active.push(ActiveSegment { from_exclusive: own.from_exclusive.clone(), revision });
    }
    Ok(active)
}

/// Records a hole where a sink is not given records that it needs, because the revisions that ran them first do not
/// feed it. This happens to a sink that is new or comes back, while other sinks are ahead of the checkpoint where it
/// begins.
async fn record_unbound(
    shared: &Shared,
    shard: &ShardKey,
    segments: &[ActiveSegment],
    needs: &[Option<Position>],
) -> Result<(), LaneError> {
    let Some(newest) = segments.last() else { return Ok(()) };
    // Redriven dead letters enter where they failed, for the sinks of the pipeline of now.
    if is_redrive(&shard.stream) {
        return Ok(());
    }
    for (sink, after) in shared.sinks.iter().map(|sink| sink.name()).zip(needs) {
        if !newest.revision.spec.sinks().any(|bound| bound == sink) {
            continue;
        }
        for (from_exclusive, to_inclusive) in unbound(segments, sink, after.as_ref()) {
            let known = shared.holes.end_around(shard, sink, from_exclusive.as_ref()).await?;
            let from_exclusive = from_exclusive.max(known);
            if from_exclusive.as_ref() >= Some(&to_inclusive) {
                continue;
            }
            let from = from_exclusive.as_ref().map(tracing::field::display);
            tracing::warn!(%sink, shard = %shard.shard, from, to = %to_inclusive,
                "recorded a hole: the sink was not in the pipeline when these records first ran");
            let hole = Hole {
                sink: Some(sink.clone()),
                shard: shard.clone(),
                from_exclusive,
                to_inclusive: Some(to_inclusive),
                why: "it was not in the pipeline when these records were run first".into(),
            };
            shared.holes.record(hole).await?;
        }
    }
    Ok(())
}

/// Returns the position ranges after a position that revisions without the sink run.
fn unbound(
    segments: &[ActiveSegment],
    sink: &SinkName,
    after: Option<&Position>,
) -> Vec<(Option<Position>, Position)> {
    let mut stretches: Vec<(Option<Position>, Position)> = Vec::new();
    for (own, next) in segments.iter().zip(segments.iter().skip(1)) {
        let from = own.from_exclusive.as_ref().max(after);
        let Some(to) = next.from_exclusive.clone().filter(|to| from < Some(to)) else { continue };
        if own.revision.spec.sinks().any(|bound| bound == sink) {
            continue;
        }
        match stretches.last_mut() {
            Some((_, end)) if Some(&*end) == from => *end = to,
            _ => stretches.push((from.cloned(), to)),
        }
    }
    stretches
}

/// Revisions that ran before, loaded from the state database when a replay needs them. Clones share them.
#[derive(Clone)]
pub struct RevisionStore {
    host: PluginHost,
    state: StateStore,
    /// Loaded revisions. The lanes that run them keep them alive.
    loaded: Arc<Mutex<HashMap<String, Weak<Revision>>>>,
}

impl RevisionStore {
    /// Makes a store over the pipeline's state database.
    pub fn new(host: PluginHost, state: StateStore) -> Self {
        Self { host, state, loaded: Arc::default() }
    }

    /// Returns the bytes of a component that was stored with a revision.
    ///
    /// # Errors
    /// When it is not stored any more, or the state database cannot be read.
    pub async fn component(&self, digest: &str) -> anyhow::Result<Vec<u8>> {
        let bytes = self.state.component(digest.to_owned()).await?;
        bytes.ok_or_else(|| anyhow::anyhow!("component {digest} is no longer stored"))
    }

    /// Loads a plugin whose component was stored with a revision.
    ///
    /// # Errors
    /// As [`RevisionStore::component`], and when it no longer loads.
    pub async fn plugin(&self, digest: &str) -> anyhow::Result<Plugin> {
        let bytes = self.component(digest).await?;
        let (host, name) = (self.host.clone(), format!("component {}", &digest[..12]));
        let load = move || Plugin::load(&host.engine, &host.cache, &name, &bytes);
        Ok(off_thread(load).await?)
    }

    /// Loads a revision from the components that were stored with it.
    ///
    /// # Errors
    /// A component is not stored any more, or it does not load.
    pub(crate) async fn load(
        &self,
        spec: RevisionSpec,
        stream_name: &str,
    ) -> anyhow::Result<Revision> {
        let mut components = HashMap::new();
        for digest in spec.digests() {
            components.insert(digest.to_owned(), self.component(digest).await?);
        }
        // This comes first: a variable that is set differently may be why the revision does not load.
        let changed_variables =
            Variables::new(self.state.clone()).changed_variables(&spec, &environment).await?;
        changed_variables.warn(&spec.id());
        let (host, stream_name) = (self.host.clone(), stream_name.to_owned());
        let load = move || {
            let component = |digest: &str| {
                let kept = components.get(digest).cloned();
                kept.ok_or_else(|| anyhow::anyhow!("component {digest} is missing"))
            };
            Revision::from_store(spec, &host, &stream_name, &component)
        };
        off_thread(load).await.context("failed to load it")
    }

    /// Returns a revision by its id; `wanted` is the newest.
    async fn get(
        &self,
        shared: &Shared,
        wanted: &Arc<Revision>,
        id: &str,
    ) -> Result<Arc<Revision>, LaneError> {
        if id == &*wanted.id {
            return Ok(wanted.clone());
        }
        let known = self.loaded.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        if let Some(revision) = known.and_then(|known| known.upgrade()) {
            return Ok(revision);
        }
        let missing = |cause: String| {
            LaneError::Fatal(format!(
                "records must be replayed by revision {id}, which ran first, but it cannot be used: {cause}; \
                 restore the state folder, or run the configuration of that time until all sinks have finished"
            ))
        };
        let spec = Ledger::new(self.state.clone())
            .spec(id)
            .await
            .map_err(|error| missing(error.to_string()))?;
        let revision = self
            .load(spec, &shared.config.source.stream_name())
            .await
            .map_err(|error| missing(format!("{error:#}")))?;
        let revision = Arc::new(revision);
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|_, known| known.strong_count() > 0);
        loaded.insert(id.to_owned(), Arc::downgrade(&revision));
        Ok(revision)
    }
}
