//! Sinks that are gone, came back, or were renamed since the last run: decided for all shards at once, before a lane
//! reads a record.
//!
//! Invariant: no sink loses or duplicates records because of a change of names or of the set of sinks, unless a
//! person has allowed that. What a sink is not given becomes a recorded hole, in the same write as the decision.
//!
//! | the sink | known about it | what happens |
//! |---|---|---|
//! | gone, lagging in no shard | its positions | removed: its positions no longer count |
//! | gone, lagging in some shard | its positions | stop, unless the removal is allowed (`--drop-sink`) |
//! | back again | its positions at its removal | it starts at the checkpoint; the records between are a hole |
//! | new, with `renamed_from` | the old name | everything that is kept moves to the new name |
//! | new, where a sink that is ahead wrote and no longer writes | destinations | stop: rows would be duplicated |
//!
//! "Lagging" compares with the sinks that stay: a gone sink that has all they have loses nothing. In a running
//! pipeline the sinks are hardly ever at one position, so a reload first asks the leaving sink to commit
//! (`refuse_lagging`).

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

/// Interval at which a leaving sink's progress is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Positions by shard.
type Stands = BTreeMap<ShardId, Option<Position>>;

/// Decides which sinks there are, so that lanes may begin with those of `next`. `before` has the sinks of lanes that
/// have just ended.
///
/// # Errors
/// A decision that a person must make; or a destination or the state that cannot be reached. Nothing was changed
/// then.
pub(crate) async fn resolve(
    next: &Shared,
    stream: &StreamIdentity,
    before: Option<&Shared>,
    build: &BuildSinks,
) -> anyhow::Result<()> {
    let key = keys(&next.config, stream);
    let configured: BTreeSet<&SinkName> = next.sinks.iter().map(|sink| sink.name()).collect();
    // A redrive has positions of its own, and records nothing about the pipeline's sinks.
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
                // A sink without a position in a shard would have started at the checkpoint.
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
        tracing::warn!(sink = %name, "removed: its positions no longer count");
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

/// Returns what the next start would refuse about sinks that are gone, as far as the state alone can say: by each
/// one's position at the last checkpoint.
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

/// Refuses a change of a running pipeline that removes a sink while it lags the sinks that stay. Lanes that
/// restart would find that out only when the change is in force already.
///
/// While records flow, sinks are hardly ever at one position, and one that gathers large commits may hold its rows
/// for an hour. So the sink is asked to commit what it has, and has until `end` to reach the others' present
/// positions. A sink that is blocked is refused at once.
///
/// # Errors
/// The same as of a start with these sinks; or when the state cannot be read.
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
    // A sink that a change added, and with which no lane has begun yet, is unknown here and loses nothing.
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

    /// Returns a sink's position in each begun shard, from its deliveries or from the state, which may lag.
    fn own(&self, known: &KnownSinks, name: &SinkName) -> Stands {
        let mut stands: Stands = known
            .checkpoints
            .iter()
            .map(|(shard, checkpoint)| {
                // A sink without a position in a shard would have started at the checkpoint.
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

    /// Returns the highest position of the staying sinks in each shard.
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

    /// Whether a sink is blocked in a shard.
    fn is_blocked(&self, name: &SinkName, shard: &ShardId) -> bool {
        let mut own = self.of_sink(name).filter(|(of, _)| of == shard);
        own.any(|(_, own)| own.progress.borrow().blocked.is_some())
    }

    /// Asks a sink to commit what it has in hand. More rows may arrive afterwards, so the caller asks again.
    fn ask_to_commit(&self, name: &SinkName) {
        self.of_sink(name).for_each(|(_, own)| own.commit_now.notify_one());
    }
}

/// Whether a sink is in the configuration, by its name or its former name.
fn stays(config: &PipelineConfig, name: &SinkName) -> bool {
    config.sinks.iter().any(|sink| {
        let renamed = sink.renamed_from.as_ref().is_some_and(|old| old.value == *name);
        sink.name.value == *name || renamed
    })
}

/// Returns a sink's name and destination, to be stored.
fn noted(sink: &SinkConfig) -> (SinkName, String) {
    (sink.name.value.clone(), sink.destination().unwrap_or_default())
}

/// Whether a sink's removal is recorded and it has no position since.
fn is_removed(known: &KnownSinks, name: &SinkName) -> bool {
    known.removed.contains_key(name) && !known.positions.contains_key(name)
}

/// Returns the sink's own position in each begun shard.
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

/// Returns the shards in which a sink lags another, with both positions.
fn lagging(own: &Stands, highest: &Stands) -> Vec<(ShardId, Option<Position>, Position)> {
    let lagging = own.iter().filter_map(|(shard, at)| {
        let highest = highest.get(shard)?.as_ref()?;
        (at.as_ref() < Some(highest)).then(|| (shard.clone(), at.clone(), highest.clone()))
    });
    lagging.collect()
}

/// Returns the sink that has replaced a gone one, if one has: it is new, and writes to the same destination.
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

/// Describes a sink that is gone while it lags the others.
fn lost(
    name: &SinkName,
    lagging: &[(ShardId, Option<Position>, Position)],
    renamed_to: Option<&SinkName>,
) -> String {
    let mut text =
        format!("sink {name} is missing from the configuration, but it lags the other sinks: ");
    for (place, (shard, at, highest)) in lagging.iter().take(SHARDS_SHOWN).enumerate() {
        let comma = if place == 0 { "" } else { ", " };
        // Writing into a String cannot fail.
        let _ = match at {
            Some(at) => {
                write!(
                    text,
                    "{comma}in shard {shard} it has records up to {at}, the others up to {highest}"
                )
            }
            None => {
                write!(
                    text,
                    "{comma}in shard {shard} it has no records, the others up to {highest}"
                )
            }
        };
    }
    if lagging.len() > SHARDS_SHOWN {
        let _ = write!(text, ", and it lags in {} more shards", lagging.len() - SHARDS_SHOWN);
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
        "; put it back into the configuration until it has caught up, or start once with `--drop-sink {name}` \
         to give these records up"
    );
    text
}

/// Own positions of a sink that came back.
struct Own {
    stands: Stands,
    /// False: the sink cannot say where it is.
    keeps_position: bool,
}

/// Returns the records that a returned sink was not given while it was away, in each begun shard.
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
        // A shard that was begun while the sink was away is missing from its beginning on.
        let was = removed.at.get(shard).cloned().flatten();
        let from_exclusive = match own.stands.get(shard).cloned().flatten() {
            // A sink that keeps positions and has none was restored to before its first commit.
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

/// Moves what is kept under the old names of renamed sinks. This comes before anything that is kept is read, because
/// the stored revisions contain the names of sinks.
///
/// # Errors
/// When both names have positions, or the new one writes elsewhere; or when something cannot be reached.
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
            // It was moved before, and `renamed_from` is still in the file; unless both have run.
            if !known.names().contains(old) {
                adopt_restored(&**sink, old, &known, &key).await?;
            } else if !is_removed(&known, old) {
                bail!(
                    "sink {new} cannot continue sink {old} (renamed_from): both have run and have positions of \
                     their own; remove `renamed_from`, or put sink {old} back"
                );
            }
            continue;
        }
        if let (Some(was), Some(is)) = (known.destinations.get(old), config.destination())
            && *was != is
            && !was.is_empty()
        {
            bail!(
                "sink {new} cannot continue sink {old} (renamed_from): expected the same destination, found \
                 {was} for {old} and {is} for {new}; rename the sink first, start once, then change the \
                 destination"
            );
        }
        // The destination comes first: if this is interrupted, it can be repeated.
        let listed = source.shards().await.context("failed to list the shards")?;
        let listed = listed.into_iter().map(|shard| shard.id);
        let begun = Checkpoints::new(state.clone()).shards(stream).await?;
        let shards: BTreeSet<ShardId> = begun.into_keys().chain(listed).collect();
        let mut keys: Vec<ShardKey> = shards.iter().map(&key).collect();
        // Positions of unfinished redrives are kept under the sinks' names, too.
        keys.extend(redrives.unfinished().await?.iter().map(|one| redrives.key(one.id)));
        for key in &keys {
            sink.adopt(old, key).await?;
        }
        roster.rename(old, new).await?;
        tracing::warn!(from = %old, to = %new, "a sink was renamed: it goes on from its position");
    }
    Ok(())
}

/// Moves what a destination keeps under the old name of a sink that was renamed before. The destination was restored
/// from a backup of the time of the old name. Under the new name it would have no position, and rows that exist
/// would be written again.
async fn adopt_restored(
    sink: &dyn Sink,
    old: &SinkName,
    known: &KnownSinks,
    key: &impl Fn(&ShardId) -> ShardKey,
) -> anyhow::Result<()> {
    // Shards without a checkpoint are included: the sink may have committed in them.
    for shard in known.checkpoints.keys() {
        let key = key(shard);
        if sink.position(&key).await?.is_none() {
            sink.adopt(old, &key).await?;
        }
    }
    Ok(())
}

/// Refuses a command that writes to sinks, beside a start, where the next start must first decide who a sink is.
/// Under its new name, what the sink has would be unknown, and written again.
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
                    "sink {name} continues sink {old} (renamed_from), but the pipeline has not been started \
                     with the new name yet: start it once (`shardmill run`), so that the positions of {old} \
                     move to {name}, then run the command again"
                );
            }
            let destination = sink.destination().filter(|there| !there.is_empty());
            let Some(destination) = destination else { continue };
            if let Some(old) = earlier(&known, name, &destination, &config.sinks).first() {
                bail!(
                    "sink {name} is new at a destination to which sink {old} has written and no longer writes: \
                     rows could be duplicated. If it is the same sink, add renamed_from = \"{old}\" to sink \
                     {name}; otherwise put sink {old} back. Then start the pipeline once (`shardmill run`), \
                     which reports anything else that you must decide, and run the command again"
                );
            }
        }
    }
    Ok(())
}

/// Returns a function that makes a shard's key.
fn keys(config: &PipelineConfig, stream: &StreamIdentity) -> impl Fn(&ShardId) -> ShardKey + use<> {
    let (pipeline, stream) = (config.name.clone(), Arc::new(stream.clone()));
    move |shard| ShardKey {
        pipeline: pipeline.clone(),
        stream: stream.clone(),
        shard: shard.clone(),
    }
}

/// The next start, or the one under way: its sinks, and what is known about the earlier ones.
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
    /// Looks for a sink whose destination has more rows of another sink than it would begin with: these rows would
    /// be written twice. Returns the error.
    async fn find_duplicates(&self) -> anyhow::Result<Option<String>> {
        for (sink, config) in self.sinks.iter().zip(&self.config.sinks) {
            let name = sink.name();
            let Some(destination) = config.destination() else { continue };
            let was = self.known.destinations.get(name);
            if was == Some(&destination) {
                continue;
            }
            for old in earlier(self.known, name, &destination, &self.config.sinks) {
                // A sink that goes on elsewhere is not given up.
                let goes_on = self.config.sinks.iter().any(|sink| sink.name.value == *old);
                if self.dropped.contains(old) && !goes_on {
                    continue;
                }
                let Some(duplicates) = self.duplicates(sink, config, old).await? else { continue };
                let way_out = match (was, goes_on) {
                    (Some(was), true) => format!(
                        "Give both sinks their earlier destinations again ({name}: {was}; {old}: \
                         {destination}), or give {name} a destination to which no other sink has written"
                    ),
                    (None, true) => {
                        format!("Give {name} a destination to which no other sink has written")
                    }
                    (Some(was), false) => format!(
                        "Give sink {name} its earlier destination again ({was}) and put sink {old} back, or \
                         start once with `--drop-sink {old}` to accept duplicates of these records"
                    ),
                    (None, false) => format!(
                        "If it is the same sink, add renamed_from = \"{old}\" to sink {name}; otherwise put \
                         sink {old} back, or start once with `--drop-sink {old}` to accept duplicates of these \
                         records"
                    ),
                };
                return Ok(Some(format!(
                    "sink {name} is new at a destination to which sink {old} has written and no longer writes: \
                     {duplicates}. {way_out}"
                )));
            }
        }
        Ok(None)
    }

    /// Describes the records of a shard that a sink would write again where another has written them; `None`: there
    /// are none.
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
        // The state remembers its position at its former destination.
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

/// Returns what the next start would refuse about sinks that write where others have written, by the sinks' present
/// positions. `stream` is the stream that a start would read; `None`: a Kinesis stream, whose server is not asked.
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

/// Returns sinks of other names whose rows went to a destination, and no longer do.
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

/// Makes a sink under another name, to ask for that one's position.
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
    build(&config)?.pop().context("the configuration made no sink")
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

    /// Makes a delivery at a position, with the handle that asks it to commit.
    fn delivery(sink: &str, progress: DeliveryProgress) -> (ShardId, LiveDelivery) {
        // The last value stays readable after the sender is gone, as when the lane has ended.
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
        // The state's checkpoint and positions lag a little.
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
        // A sink without a position would have started at the checkpoint.
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
        assert!(is_notified(0).await, "it is notified although it does not listen yet");
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
        // The sink's position at its removal (`None`: the shard was begun later), its own position, the checkpoint,
        // and the expected begin of the hole.
        for (was, stands, checkpoint, expected) in [
            (Some(at(5)), at(5), at(9), Some(at(5))),
            // The state lagged at the removal.
            (Some(at(5)), at(7), at(9), Some(at(7))),
            (Some(at(5)), at(9), at(9), None),
            (Some(at(5)), at(12), at(9), None),
            // The sink keeps no position.
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
            // The cases without a position are of sinks that keep none.
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
