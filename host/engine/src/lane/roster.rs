//! What becomes of sinks that are gone, came back, or were renamed since the pipeline ran last: decided
//! for all shards at once, before a lane reads a record.
//!
//! | the sink | what is known of it | what happens |
//! |---|---|---|
//! | gone, nowhere behind the others | its positions | removed: they count no more |
//! | gone, behind the others | its positions | stop, unless the removal is allowed (`--drop-sink`) |
//! | there again | where it was when it was removed | it starts at the checkpoint; the gap is a hole |
//! | new, with `renamed_from` | the old name | all that is kept moves to the new name |
//! | new where one wrote that is ahead and does not write there now | destinations | stop: rows would be doubled |

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::Instant;

use super::Shared;
use super::agreement::compared;
use super::lag::LiveDelivery;
use crate::lane::BuildSinks;
use shardmill_config::{OnPositionMismatch, PipelineConfig, SinkConfig};
use shardmill_core::boxed;
use shardmill_core::record::{Position, ShardId, ShardKey, SinkName, StreamIdentity};
use shardmill_core::sink::Sink;
use shardmill_core::source::ShardSource;
use shardmill_state::{
    Checkpoints, Hole, KnownSinks, Redrives, Roster, RosterChange, ShardState, StateStore,
    is_redrive,
};

/// Shards that an error names.
const SHARDS_SHOWN: usize = 3;

/// How often it is looked whether a sink that is to leave has caught up.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Positions by shard.
type Stands = BTreeMap<ShardId, Option<Position>>;

/// Settles which sinks there are, so that lanes may begin with those of `next`. `before` are the sinks of
/// lanes that have ended just now.
///
/// # Errors
/// What a person must decide, or a destination or the state that is out of reach; nothing was changed
/// then.
pub(crate) async fn resolve(
    next: &Shared,
    stream: &StreamIdentity,
    before: Option<&Shared>,
    build: &BuildSinks,
) -> anyhow::Result<()> {
    let key = keys(&next.config, stream);
    let configured: BTreeSet<&SinkName> = next.sinks.iter().map(|sink| sink.name()).collect();
    // A redrive has positions of its own. Which sinks there are is the pipeline's to record.
    let is_pipeline = !is_redrive(stream);
    let known = next.roster.known(stream).await?;
    let shards = next.checkpoints.shards(stream).await?;
    let gone: Vec<SinkName> = match is_pipeline {
        true => known.names(),
        false => known.positions.keys().collect(),
    }
    .into_iter()
    .filter(|name| !configured.contains(*name) && !is_removed(&known, name))
    .cloned()
    .collect();

    let mut change = RosterChange::default();
    if is_pipeline {
        let arrival = Arrival {
            config: &next.config,
            sinks: &next.sinks,
            dropped: &next.dropped_sinks,
            known: &known,
            shards: &shards,
            build,
            key: &key,
        };
        if let Some(refusal) = arrival.find_duplicates().await? {
            bail!(refusal);
        }
        let returned = next.sinks.iter().filter(|sink| known.removed.contains_key(sink.name()));
        for sink in returned {
            let keys: Vec<ShardKey> = shards.keys().map(&key).collect();
            let keeps_position = sink.kept_positions(&next.config.name, &keys).await?.is_some();
            let own = stands(&**sink, &shards, &key).await?;
            let own = Own { stands: own, keeps_position };
            change.holes.extend(holes(sink.name(), &known, &shards, &own, &key));
            change.returned.push(sink.name().clone());
        }
        change.destinations = next.config.sinks.iter().map(noted).collect();
    }
    if !gone.is_empty() {
        let mut highest = Stands::new();
        for sink in &next.sinks {
            let own = stands(&**sink, &shards, &key).await?;
            for (shard, at) in own {
                let stored = known.stands(sink.name(), &shard).cloned();
                let best = highest.entry(shard).or_default();
                *best = best.take().max(at).max(stored);
            }
        }
        for name in gone {
            let running = before
                .and_then(|shared| shared.sinks.iter().find(|sink| *sink.name() == name).cloned());
            let mut own = match running {
                Some(sink) => stands(&*sink, &shards, &key).await?,
                None => Stands::new(),
            };
            for (shard, state) in &shards {
                let stored = known.stands(&name, shard).cloned();
                let at = own.entry(shard.clone()).or_default();
                // A sink without a position of a shard would have begun it at the checkpoint.
                *at = at.take().max(stored).or_else(|| state.checkpoint.clone());
            }
            let lagging = lagging(&own, &highest);
            if !lagging.is_empty() && !next.dropped_sinks.contains(&name) {
                bail!(lost(&name, &lagging, renamed_to(&name, &known, &next.config.sinks)));
            }
            change.removed.push((name, own));
        }
    }
    for (name, _) in &change.removed {
        tracing::warn!(sink = %name, "removed: its positions do not count any more");
    }
    for hole in &change.holes {
        let from = hole.from_exclusive.as_ref().map(tracing::field::display);
        let to = hole.to_inclusive.as_ref().map(tracing::field::display);
        tracing::warn!(sink = hole.sink.as_ref().map(tracing::field::display),
            shard = %hole.shard.shard, from, to, why = hole.why, "recorded a hole");
    }
    next.roster.record(stream, change).await?;
    Ok(())
}

/// What the next start would refuse of the sinks that are gone, as far as the state alone can tell: how
/// far each was at the last checkpoint.
///
/// # Errors
/// When the state cannot be read.
#[boxed]
pub async fn start_warnings(
    config: &PipelineConfig,
    state: &StateStore,
) -> anyhow::Result<Vec<String>> {
    let roster = Roster::new(state.clone());
    let stays = |name: &SinkName| {
        config.sinks.iter().any(|sink| {
            let renamed = sink.renamed_from.as_ref().is_some_and(|old| old.value == *name);
            sink.name.value == *name || renamed
        })
    };
    let mut refusals = Vec::new();
    for stream in roster.streams().await? {
        let known = roster.known_in(stream).await?;
        let mut highest = Stands::new();
        for (name, shards) in &known.positions {
            for (shard, at) in shards.iter().filter(|_| stays(name)) {
                let best = highest.entry(shard.clone()).or_default();
                *best = best.take().max(Some(at.clone()));
            }
        }
        let gone = known.names().into_iter();
        for name in gone.filter(|name| !stays(name) && !is_removed(&known, name)) {
            let own = known.checkpoints.iter().map(|(shard, checkpoint)| {
                let at = known.stands(name, shard).cloned().or_else(|| checkpoint.clone());
                (shard.clone(), at)
            });
            let lagging = lagging(&own.collect(), &highest);
            if !lagging.is_empty() {
                refusals.push(lost(name, &lagging, renamed_to(name, &known, &config.sinks)));
            }
        }
    }
    Ok(refusals)
}

/// Refuses a change of a running pipeline that takes a sink away while it is behind those that stay: lanes that are
/// let go would find that out when the change is in force already.
///
/// Where records flow, sinks are hardly ever at one place, and one that gathers large commits may have its rows in
/// hand for an hour. So the sink is asked to commit what it has, and has until `end` to come to where the others are
/// now. One that does not go on is refused at once.
///
/// # Errors
/// As of the start with these sinks; or when the state cannot be read.
pub(crate) async fn refuse_lagging(
    running: &Shared,
    config: &PipelineConfig,
    stream: &StreamIdentity,
    end: Instant,
) -> anyhow::Result<()> {
    let known = running.roster.known(stream).await?;
    let leaves = |name: &SinkName| {
        !stays(config, name) && !is_removed(&known, name) && !running.dropped_sinks.contains(name)
    };
    // A sink that a change brought, and with which no lane has begun yet, is unknown and has nothing to lose.
    let leaving: Vec<&SinkName> = known.names().into_iter().filter(|name| leaves(name)).collect();
    if leaving.is_empty() {
        return Ok(());
    }
    let highest = Live::of(running).highest(&known, |name| stays(config, name));
    loop {
        let live = Live::of(running);
        let late = leaving.iter().find_map(|name| {
            let lagging = lagging(&live.own(&known, name), &highest);
            (!lagging.is_empty()).then_some((*name, lagging))
        });
        let Some((name, lagging)) = late else { return Ok(()) };
        let is_blocked = lagging.iter().any(|(shard, _, _)| live.is_blocked(name, shard));
        if is_blocked || Instant::now() >= end {
            bail!(lost(name, &lagging, renamed_to(name, &known, &config.sinks)));
        }
        leaving.iter().for_each(|name| live.ask_to_commit(name));
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The deliveries of the lanes at one moment.
struct Live(Vec<(ShardId, LiveDelivery)>);

impl Live {
    fn of(running: &Shared) -> Self {
        Self(running.statuses.deliveries())
    }

    fn of_sink<'l>(
        &'l self,
        name: &'l SinkName,
    ) -> impl Iterator<Item = &'l (ShardId, LiveDelivery)> {
        self.0.iter().filter(move |(_, own)| own.sink == *name)
    }

    /// How far a sink is in each shard that was begun: as its deliveries say, or the state, which may lag.
    fn own(&self, known: &KnownSinks, name: &SinkName) -> Stands {
        let mut stands: Stands = known
            .checkpoints
            .iter()
            .map(|(shard, checkpoint)| {
                // A sink without a position of a shard would have begun it at the checkpoint.
                let at = known.stands(name, shard).cloned().or_else(|| checkpoint.clone());
                (shard.clone(), at)
            })
            .collect();
        for (shard, own) in self.of_sink(name) {
            let at = own.progress.borrow().position.clone();
            let best = stands.entry(shard.clone()).or_default();
            *best = best.take().max(at);
        }
        stands
    }

    /// How far the sinks that stay are, the first of them in each shard.
    fn highest(&self, known: &KnownSinks, stays: impl Fn(&SinkName) -> bool) -> Stands {
        let mut highest = Stands::new();
        let mut note = |shard: &ShardId, at: Option<Position>| {
            let best = highest.entry(shard.clone()).or_default();
            *best = best.take().max(at);
        };
        for (_, shards) in known.positions.iter().filter(|(name, _)| stays(name)) {
            shards.iter().for_each(|(shard, at)| note(shard, Some(at.clone())));
        }
        for (shard, own) in self.0.iter().filter(|(_, own)| stays(&own.sink)) {
            note(shard, own.progress.borrow().position.clone());
        }
        highest
    }

    /// Whether a sink says of a shard that it does not go on.
    fn is_blocked(&self, name: &SinkName, shard: &ShardId) -> bool {
        let mut own = self.of_sink(name).filter(|(of, _)| of == shard);
        own.any(|(_, own)| own.progress.borrow().blocked.is_some())
    }

    /// Asks a sink to commit what it has in hand. Rows may reach it after that: it is asked again.
    fn ask_to_commit(&self, name: &SinkName) {
        self.of_sink(name).for_each(|(_, own)| own.commit_now.notify_one());
    }
}

/// Whether a sink is in the configuration, by its name or by its former one.
fn stays(config: &PipelineConfig, name: &SinkName) -> bool {
    config.sinks.iter().any(|sink| {
        let renamed = sink.renamed_from.as_ref().is_some_and(|old| old.value == *name);
        sink.name.value == *name || renamed
    })
}

/// A sink with where its rows go, to be noted.
fn noted(sink: &SinkConfig) -> (SinkName, String) {
    (sink.name.value.clone(), sink.destination().unwrap_or_default())
}

/// Whether a sink's removal is on record and it has no position since.
fn is_removed(known: &KnownSinks, name: &SinkName) -> bool {
    known.removed.contains_key(name) && !known.positions.contains_key(name)
}

/// Where a sink says that it stands in each shard that may still move.
async fn stands(
    sink: &dyn Sink,
    shards: &HashMap<ShardId, ShardState>,
    key: &impl Fn(&ShardId) -> ShardKey,
) -> anyhow::Result<Stands> {
    let mut stands = Stands::new();
    for shard in shards.keys() {
        stands.insert(shard.clone(), sink.position(&key(shard)).await?);
    }
    Ok(stands)
}

/// The shards in which a sink has less than another: with its position and the other's.
fn lagging(own: &Stands, highest: &Stands) -> Vec<(ShardId, Option<Position>, Position)> {
    let lagging = own.iter().filter_map(|(shard, at)| {
        let highest = highest.get(shard)?.as_ref()?;
        (at.as_ref() < Some(highest)).then(|| (shard.clone(), at.clone(), highest.clone()))
    });
    lagging.collect()
}

/// The sink that has taken the place of one that is gone, if one has: it is new, and its rows go there.
fn renamed_to<'c>(
    gone: &SinkName,
    known: &KnownSinks,
    sinks: &'c [SinkConfig],
) -> Option<&'c SinkName> {
    let destination = known.destinations.get(gone).filter(|there| !there.is_empty())?;
    let mut new = sinks.iter().filter(|sink| !known.names().contains(&sink.name.value));
    let same = new.find(|sink| sink.destination().as_ref() == Some(destination))?;
    Some(&same.name.value)
}

/// The error for a sink that is gone while it is behind the others.
fn lost(
    name: &SinkName,
    lagging: &[(ShardId, Option<Position>, Position)],
    renamed_to: Option<&SinkName>,
) -> String {
    let mut text =
        format!("sink {name} is gone from the configuration, but it is behind the other sinks: ");
    for (place, (shard, at, highest)) in lagging.iter().take(SHARDS_SHOWN).enumerate() {
        let comma = if place == 0 { "" } else { ", " };
        // Writing into a String cannot fail.
        let _ = match at {
            Some(at) => {
                write!(text, "{comma}in shard {shard} it has records only up to {at} of {highest}")
            }
            None => {
                write!(text, "{comma}in shard {shard} it has no records, others up to {highest}")
            }
        };
    }
    if lagging.len() > SHARDS_SHOWN {
        let _ = write!(text, ", and so on in {} more shards", lagging.len() - SHARDS_SHOWN);
    }
    if let Some(new) = renamed_to {
        let _ = write!(
            text,
            "; sink {new} is new and writes to the same place: if it is the same sink, add \
             renamed_from = \"{name}\" to it"
        );
    }
    let _ = write!(
        text,
        "; put it back and let it finish, or start once with `--drop-sink {name}` to give these records up"
    );
    text
}

/// Where a sink that came back stands by its own account.
struct Own {
    stands: Stands,
    /// Otherwise it cannot say.
    keeps_position: bool,
}

/// What a sink that came back was not given while it was away, in each shard that was begun.
fn holes(
    name: &SinkName,
    known: &KnownSinks,
    shards: &HashMap<ShardId, ShardState>,
    own: &Own,
    key: &impl Fn(&ShardId) -> ShardKey,
) -> Vec<Hole> {
    let Some(removed) = known.removed.get(name) else { return Vec::new() };
    let since = chrono::DateTime::from_timestamp_millis(removed.removed_ms);
    let since = since.map_or_else(
        || format!("{} ms", removed.removed_ms),
        |at| at.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
    );
    let mut holes = Vec::new();
    for (shard, state) in shards {
        // A shard that was begun meanwhile is missing from its beginning on.
        let was = removed.at.get(shard).cloned().flatten();
        let from_exclusive = match own.stands.get(shard).cloned().flatten() {
            // One that keeps a position and has none was restored to before its first commit.
            None if !own.keeps_position => was,
            stands => stands,
        };
        let Some(to) = state.checkpoint.clone().filter(|to| from_exclusive.as_ref() < Some(to))
        else {
            continue;
        };
        holes.push(Hole {
            sink: Some(name.clone()),
            shard: key(shard),
            from_exclusive,
            to_inclusive: Some(to),
            why: format!("it was removed at {since} and has come back since"),
        });
    }
    holes.sort_by(|one, two| one.shard.shard.cmp(&two.shard.shard));
    holes
}

/// Moves what is kept under the old names of sinks that say so. Comes before anything that is kept is read:
/// what runs, and what ran, is stored with the sinks' names.
///
/// # Errors
/// Where both names have positions, or the new one writes elsewhere; or what is out of reach.
pub(crate) async fn rename(
    config: &PipelineConfig,
    sinks: &[Arc<dyn Sink>],
    state: &StateStore,
    source: &dyn ShardSource,
    stream: &StreamIdentity,
) -> anyhow::Result<()> {
    if is_redrive(stream) || config.sinks.iter().all(|sink| sink.renamed_from.is_none()) {
        return Ok(());
    }
    let (roster, key) = (Roster::new(state.clone()), keys(config, stream));
    let known = roster.known(stream).await?;
    let redrives = Redrives::new(state.clone(), config.name.clone());
    for (sink, config) in sinks.iter().zip(&config.sinks) {
        let Some(old) = config.renamed_from.as_ref().map(|old| &old.value) else { continue };
        let new = &config.name.value;
        if known.names().contains(new) {
            // It was moved before, and the key is still there; unless both have run.
            if !known.names().contains(old) {
                adopt_restored(&**sink, old, &known, &key).await?;
            } else if !is_removed(&known, old) {
                bail!(
                    "sink {new} cannot go on as sink {old} (renamed_from): both have run, and have \
                     positions of their own; leave `renamed_from` out, or put sink {old} back"
                );
            }
            continue;
        }
        if let (Some(was), Some(is)) = (known.destinations.get(old), config.destination())
            && *was != is
            && !was.is_empty()
        {
            bail!(
                "sink {new} cannot go on as sink {old} (renamed_from): rows of {old} went to {was}, those \
                 of {new} go to {is}; rename first, start once, then change where the rows go"
            );
        }
        // At the destination first: that can be done again where it is broken off.
        let listed = source.shards().await.context("cannot look for shards")?;
        let listed = listed.into_iter().map(|shard| shard.id);
        let begun = Checkpoints::new(state.clone()).shards(stream).await?;
        let shards: BTreeSet<ShardId> = begun.into_keys().chain(listed).collect();
        let mut keys: Vec<ShardKey> = shards.iter().map(&key).collect();
        // What sinks have of redrives that were broken off is kept under their names, too.
        keys.extend(redrives.unfinished().await?.iter().map(|one| redrives.key(one.id)));
        for key in &keys {
            sink.adopt(old, key).await?;
        }
        roster.rename(old, new).await?;
        tracing::warn!(from = %old, to = %new, "a sink was renamed: it goes on where it was");
    }
    Ok(())
}

/// Moves what a destination keeps under the old name of a sink that was renamed before: it was restored from
/// a backup of the time when the sink had that name. By its new name it would have no position, and rows that
/// are there would be written again.
async fn adopt_restored(
    sink: &dyn Sink,
    old: &SinkName,
    known: &KnownSinks,
    key: &impl Fn(&ShardId) -> ShardKey,
) -> anyhow::Result<()> {
    // Also those of which no checkpoint was written: the sink may have committed all the same.
    for shard in known.checkpoints.keys() {
        let key = key(shard);
        if sink.position(&key).await?.is_none() {
            sink.adopt(old, &key).await?;
        }
    }
    Ok(())
}

/// Refuses a command that writes to sinks beside a start, where the next start has to settle first who a sink
/// is: by its new name, what it has would not be known, and written again.
///
/// # Errors
/// The sink, and what to do first; or when the state cannot be read.
#[boxed]
pub async fn refuse_unresolved(config: &PipelineConfig, state: &StateStore) -> anyhow::Result<()> {
    let roster = Roster::new(state.clone());
    for stream in roster.streams().await? {
        let known = roster.known_in(stream).await?;
        for sink in &config.sinks {
            let name = &sink.name.value;
            if known.names().contains(name) {
                continue;
            }
            let renamed = sink.renamed_from.as_ref().map(|old| &old.value);
            if let Some(old) = renamed.filter(|old| known.names().contains(old)) {
                bail!(
                    "sink {name} is to go on as sink {old} (renamed_from), and the pipeline has not been \
                     started with that name yet: start it once (`shardmill run`), so that {name} has what \
                     {old} has, then give the command again"
                );
            }
            let destination = sink.destination().filter(|there| !there.is_empty());
            let Some(destination) = destination else { continue };
            if let Some(old) = earlier(&known, name, &destination, &config.sinks).first() {
                bail!(
                    "sink {name} is new where sink {old} has written, which is not in the configuration any \
                     more: its rows could be written once more. If it is the same sink, add renamed_from = \
                     \"{old}\" to sink {name}; else put sink {old} back. Then start the pipeline once \
                     (`shardmill run`), which says what else is to be decided, and give the command again"
                );
            }
        }
    }
    Ok(())
}

/// What a shard's positions are kept under.
fn keys(config: &PipelineConfig, stream: &StreamIdentity) -> impl Fn(&ShardId) -> ShardKey + use<> {
    let (pipeline, stream) = (config.name.clone(), Arc::new(stream.clone()));
    move |shard| ShardKey {
        pipeline: pipeline.clone(),
        stream: stream.clone(),
        shard: shard.clone(),
    }
}

/// A start to come, or the one that is under way: its sinks, and what is known of those before.
struct Arrival<'a, K> {
    config: &'a PipelineConfig,
    sinks: &'a [Arc<dyn Sink>],
    dropped: &'a HashSet<SinkName>,
    known: &'a KnownSinks,
    shards: &'a HashMap<ShardId, ShardState>,
    build: &'a BuildSinks,
    key: K,
}

impl<K: Fn(&ShardId) -> ShardKey> Arrival<'_, K> {
    /// Looks for a sink on the destination of another one that has more there than this one would begin with:
    /// these rows would come twice. Gives the error.
    async fn find_duplicates(&self) -> anyhow::Result<Option<String>> {
        for (sink, config) in self.sinks.iter().zip(&self.config.sinks) {
            let name = sink.name();
            let Some(destination) = config.destination() else { continue };
            let was = self.known.destinations.get(name);
            if was == Some(&destination) {
                continue;
            }
            for old in earlier(self.known, name, &destination, &self.config.sinks) {
                // One that goes on elsewhere is not given up.
                let goes_on = self.config.sinks.iter().any(|sink| sink.name.value == *old);
                if self.dropped.contains(old) && !goes_on {
                    continue;
                }
                let Some(duplicates) = self.duplicates(sink, config, old).await? else { continue };
                let way_out = match (was, goes_on) {
                    (Some(was), true) => format!(
                        "Give both sinks the destinations back that they had ({name}: {was}; {old}: \
                         {destination}), or give {name} a destination to which no other sink has written"
                    ),
                    (None, true) => {
                        format!("Give {name} a destination to which no other sink has written")
                    }
                    (Some(was), false) => format!(
                        "Give sink {name} the destination back that it had ({was}) and put sink {old} back, \
                         or start once with `--drop-sink {old}` to have these records twice"
                    ),
                    (None, false) => format!(
                        "If it is the same sink, add renamed_from = \"{old}\" to sink {name}; else put sink \
                         {old} back, or start once with `--drop-sink {old}` to have these records twice"
                    ),
                };
                return Ok(Some(format!(
                    "sink {name} is new where sink {old} has written, which does not write there any more: \
                     {duplicates}. {way_out}"
                )));
            }
        }
        Ok(None)
    }

    /// The records of a shard that a sink would write again where another one has written them; `None`: there are
    /// none.
    async fn duplicates(
        &self,
        sink: &Arc<dyn Sink>,
        config: &SinkConfig,
        old: &SinkName,
    ) -> anyhow::Result<Option<String>> {
        let (name, key) = (sink.name(), &self.key);
        let alias = as_named(self.config, config, old, self.build)?;
        let theirs = stands(&*alias, self.shards, key).await?;
        let own = stands(&**sink, self.shards, key).await?;
        let keys: Vec<ShardKey> = self.shards.keys().map(key).collect();
        let keeps_position = sink.kept_positions(&self.config.name, &keys).await?.is_some();
        // The state remembers how far it was at its former destination.
        let has_moved = self.known.destinations.contains_key(name) && keeps_position;
        for (shard, state) in self.shards {
            let stored = self.known.stands(old, shard).cloned();
            let ahead = theirs.get(shard).cloned().flatten().max(stored);
            let own = own.get(shard).cloned().flatten();
            let begins = match (has_moved, self.config.on_position_mismatch) {
                (true, OnPositionMismatch::Sink | OnPositionMismatch::Stop) => own,
                (true, OnPositionMismatch::Checkpoint) => own.max(state.checkpoint.clone()),
                (false, _) => {
                    let own = own.or_else(|| self.known.stands(name, shard).cloned());
                    own.max(state.checkpoint.clone())
                }
            };
            if ahead <= begins {
                continue;
            }
            let at = ahead.map(|at| at.to_string()).unwrap_or_default();
            let begins = match begins {
                Some(begins) => format!("after {begins}"),
                None => "at its beginning".to_owned(),
            };
            return Ok(Some(format!(
                "in shard {shard}, {old} has records up to {at}, and {name} would begin {begins} and write them \
                 again"
            )));
        }
        Ok(None)
    }
}

/// Says what the next start would refuse of sinks that write where others have written, as far as the sinks
/// themselves stand now. `stream` is the stream that a start would read; `None`: a Kinesis stream, whose server is not
/// asked.
///
/// # Errors
/// When the state or a sink cannot be read.
#[boxed]
pub async fn duplicate_warnings(
    config: &PipelineConfig,
    state: &StateStore,
    sinks: &[Arc<dyn Sink>],
    (stream, build): (Option<&StreamIdentity>, &BuildSinks),
) -> anyhow::Result<Vec<String>> {
    let roster = Roster::new(state.clone());
    let checkpoints = Checkpoints::new(state.clone());
    let mut said = Vec::new();
    for stream in compared(roster.streams().await?, stream, &config.source.stream_name()) {
        let arrival = Arrival {
            config,
            sinks,
            dropped: &HashSet::new(),
            known: &roster.known(&stream).await?,
            shards: &checkpoints.shards(&stream).await?,
            build,
            key: keys(config, &stream),
        };
        said.extend(arrival.find_duplicates().await?);
    }
    Ok(said)
}

/// Sinks of other names whose rows went to a destination, and do not go there any more.
fn earlier<'k>(
    known: &'k KnownSinks,
    name: &SinkName,
    destination: &str,
    sinks: &[SinkConfig],
) -> Vec<&'k SinkName> {
    let there = known.destinations.iter().filter(|(_, there)| *there == destination);
    let goes_on = |other: &SinkName| {
        let own = sinks.iter().find(|sink| sink.name.value == *other);
        own.is_some_and(|own| own.destination().as_deref() == Some(destination))
    };
    there.map(|(other, _)| other).filter(|other| *other != name && !goes_on(other)).collect()
}

/// A sink under another name, to ask how far that is.
fn as_named(
    config: &PipelineConfig,
    sink: &SinkConfig,
    name: &SinkName,
    build: &BuildSinks,
) -> anyhow::Result<Arc<dyn Sink>> {
    let mut config = config.clone();
    let mut own = sink.clone();
    own.name.value = name.clone();
    config.sinks = vec![own];
    build(&config)?.pop().context("no sink was made")
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::sync::{Notify, watch};

    use super::*;
    use crate::delivery::DeliveryProgress;
    use shardmill_core::record::SequenceNumber;
    use shardmill_state::Removed;

    fn at(sequence: u64) -> Option<Position> {
        Some(Position { sequence: SequenceNumber::from(sequence), sub_sequence: 0 })
    }

    fn key(shard: &ShardId) -> ShardKey {
        let stream = StreamIdentity { name: "s".into(), arn: "s".into(), created_ms: 0 };
        ShardKey { pipeline: "p".into(), stream: stream.into(), shard: shard.clone() }
    }

    #[test]
    fn fault_04_a_sink_that_is_gone_lags_where_another_has_more() {
        let stands = |at: [Option<Position>; 3]| -> Stands {
            ["a", "b", "c"].map(ShardId::from).into_iter().zip(at).collect()
        };
        for (own, highest, expected) in [
            ([at(5), at(9), None], [at(5), at(9), None], vec![]),
            ([at(5), at(9), None], [at(6), at(9), None], vec!["a"]),
            ([at(5), at(10), None], [at(5), at(9), at(1)], vec!["c"]),
            ([None, None, None], [None, None, None], vec![]),
        ] {
            let lagging = lagging(&stands(own), &stands(highest));
            let found: Vec<&str> = lagging.iter().map(|(shard, _, _)| shard.as_str()).collect();
            assert_eq!(found, expected);
        }
    }

    /// A delivery that is at a place, with what it is told to hurry by.
    fn delivery(sink: &str, progress: DeliveryProgress) -> (ShardId, LiveDelivery) {
        // The last state stays when the sender is gone, as when the lane has ended.
        let (_, progress) = watch::channel(progress);
        let own = LiveDelivery { sink: sink.into(), progress, commit_now: Arc::new(Notify::new()) };
        ("s".into(), own)
    }

    #[test]
    fn fault_13_a_sink_that_leaves_is_compared_with_what_the_others_have_now() {
        let shard = ShardId::from("s");
        let progress = |position, blocked: Option<&str>| DeliveryProgress {
            position,
            blocked: blocked.map(str::to_owned),
        };
        // The state's checkpoint and positions, as of a moment ago.
        let mut known = KnownSinks::default();
        known.checkpoints.insert(shard.clone(), at(3));
        for (sink, position) in [("a", 3), ("b", 4), ("gone", 3)] {
            let position = at(position).expect("a position");
            known.positions.insert(sink.into(), [(shard.clone(), position)].into());
        }
        let stays = |name: &SinkName| ["b", "c"].contains(&name.as_str());
        for (a, b, expected) in [
            (at(3), at(9), Some((at(3), 9))),
            (at(9), at(9), None),
            (at(10), at(9), None),
            // The state is ahead of a delivery that has not begun.
            (None, None, Some((at(3), 4))),
        ] {
            let live = Live(vec![
                delivery("a", progress(a, None)),
                delivery("b", progress(b, None)),
                delivery("gone", progress(at(99), None)),
            ]);
            let lagging = lagging(&live.own(&known, &"a".into()), &live.highest(&known, stays));
            let found: Vec<_> =
                lagging.into_iter().map(|(_, own, highest)| (own, Some(highest))).collect();
            let expected: Vec<_> =
                expected.into_iter().map(|(own, highest)| (own, at(highest))).collect();
            assert_eq!(found, expected);
        }
        // One that has no position would have begun at the checkpoint.
        let live = Live(Vec::new());
        assert_eq!(live.own(&known, &"new".into()), Stands::from([(shard.clone(), at(3))]));
        let blocked = Live(vec![delivery("a", progress(at(3), Some("locked")))]);
        assert!(blocked.is_blocked(&"a".into(), &shard));
        assert!(!blocked.is_blocked(&"b".into(), &shard));
        assert!(!blocked.is_blocked(&"a".into(), &"other".into()));
    }

    #[tokio::test]
    async fn fault_13_a_sink_that_leaves_is_asked_to_commit_what_it_has() {
        let nothing = DeliveryProgress::default;
        let live = Live(vec![delivery("a", nothing()), delivery("b", nothing())]);
        live.ask_to_commit(&"a".into());
        let is_notified = |place: usize| {
            let commit_now = live.0[place].1.commit_now.clone();
            async move { commit_now.notified().now_or_never().is_some() }
        };
        assert!(is_notified(0).await, "it is told though it does not listen yet");
        assert!(!is_notified(1).await);
    }

    #[test]
    fn a_sink_that_was_restored_to_nothing_while_it_was_away_lacks_all() {
        let (name, shard) = (SinkName::from("mart"), ShardId::from("shard"));
        let mut known = KnownSinks::default();
        let was = [(shard.clone(), at(5))].into();
        known.removed.insert(name.clone(), Removed { removed_ms: 0, at: was });
        let state = ShardState { checkpoint: at(5), ..ShardState::default() };
        let own = Own { stands: [(shard.clone(), None)].into(), keeps_position: true };
        let holes = holes(&name, &known, &[(shard, state)].into(), &own, &key);
        let found: Vec<_> = holes
            .iter()
            .map(|hole| (hole.from_exclusive.clone(), hole.to_inclusive.clone()))
            .collect();
        assert_eq!(found, [(None, at(5))]);
    }

    #[test]
    fn fault_04_the_gap_of_a_sink_that_came_back_is_a_hole() {
        let name = SinkName::from("mart");
        let state =
            |checkpoint: Option<Position>| ShardState { checkpoint, ..ShardState::default() };
        // Where it was when it was removed (`None`: the shard was begun later), where it stands itself,
        // the checkpoint, and where the hole begins.
        for (was, stands, checkpoint, expected) in [
            (Some(at(5)), at(5), at(9), Some(at(5))),
            // The state lagged when it was removed.
            (Some(at(5)), at(7), at(9), Some(at(7))),
            (Some(at(5)), at(9), at(9), None),
            (Some(at(5)), at(12), at(9), None),
            // It keeps no position itself.
            (Some(at(5)), None, at(9), Some(at(5))),
            (Some(None), None, at(9), Some(None)),
            (None, None, at(9), Some(None)),
            (Some(at(5)), at(5), None, None),
        ] {
            let shard = ShardId::from("shard");
            let mut known = KnownSinks::default();
            let at = was.clone().map(|at| (shard.clone(), at)).into_iter().collect();
            known.removed.insert(name.clone(), Removed { removed_ms: 1_000, at });
            let shards = [(shard.clone(), state(checkpoint.clone()))].into();
            // One that keeps a position has one, in all of these but those without.
            let keeps_position = stands.is_some();
            let own = Own { stands: [(shard, stands.clone())].into(), keeps_position };
            let holes = holes(&name, &known, &shards, &own, &key);
            let found = holes.first().map(|hole| hole.from_exclusive.clone());
            assert_eq!(found, expected, "{was:?} {stands:?} {checkpoint:?}");
            for hole in holes {
                assert_eq!(hole.to_inclusive, checkpoint);
                assert!(hole.why.contains("1970-01-01T00:00:01Z"), "{}", hole.why);
            }
        }
    }
}
