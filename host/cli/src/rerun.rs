//! `shardmill plugin rollback --replay-from-swap`: after a rollback, reruns the records that the undone version
//! had processed, with the restored version.
//!
//! The rerun goes into the sinks that support it, under position names of its own, beside the pipeline. A table
//! in which the newest row of each key wins takes the rows in place. Other tables get a new table beside them.
//! Objects, streams and HTTP endpoints cannot take back what was written.
//!
//! The rerun has a state folder of its own (`again-<change>`). The folder is made before anything runs, and the
//! file `done` is written at the end. A folder without `done` is a rerun that was interrupted: the next command
//! continues it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::signals::stop_on_signals;
use super::{Console, plugin_host, sinks, stream};
use shardmill_config::{OnLostRecords, PipelineConfig, ReaderKind, Rerun, SourceKind, environment};
use shardmill_core::private::make_folders;
use shardmill_core::record::{ShardId, SinkName, StageName, StreamIdentity};
use shardmill_core::source::ShardSource;
use shardmill_engine::lock::PipelineLock;
use shardmill_engine::ranges::{RangesSource, ShardRange};
use shardmill_engine::stage::Revision;
use shardmill_engine::supervisor::{RunOptions, Supervisor};
use shardmill_state::RevisionSpec;
use shardmill_state::{
    Change, Changes, Checkpoints, Ledger, LedgerEntry, Running, StateStore, Variables,
};

/// File that marks a rerun as complete.
const DONE: &str = "done";

/// Longest wait for lanes that still run the undone version, and interval between looks at them.
const LANES_CHANGE_MAX: Duration = Duration::from_secs(60);
const LANES_LOOK: Duration = Duration::from_millis(200);

/// Report of a rerun.
#[derive(Debug, Serialize)]
pub(super) struct RerunReport {
    /// Records that were rerun.
    pub records: u64,
    /// Those of them that became dead letters, because the restored version or a sink rejected them.
    pub dead_letters: u64,
    /// Place of the rerun rows, per sink.
    pub sinks: BTreeMap<String, String>,
    /// Ranges that the undone version processed and that cannot be rerun, one line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<String>,
}

/// Marks that everything an undone change processed must be rerun. If the command is interrupted, the next one
/// continues.
pub(super) fn begin(config: &PipelineConfig, undone: &Change) -> anyhow::Result<()> {
    let folder = folder(config, undone.number);
    make_folders(&folder).with_context(|| format!("failed to make {}", folder.display()))
}

/// Reruns what an undone change processed.
pub(super) async fn rerun(
    config: &PipelineConfig,
    stage: &str,
    undone: &Change,
    console: &Console,
) -> anyhow::Result<RerunReport> {
    begin(config, undone)?;
    let state = super::state_beside(config)?;
    let (own, sinks_shown) = rerun_config(config, undone.number)?;
    let stop = stop_on_signals(config.timing.drain_max)?;
    // The embedded stream is found through the pipeline's own state folder.
    let found = PipelineConfig { state_dir: config.state_dir.clone(), ..own.clone() };
    let (source, _embedded) = stream::source(&found).await?;
    let ran = Ran { state: state.clone(), stage: stage.into(), undone };
    let RerunRanges { ranges, gone } =
        ran.ranges_when_changed(&*source, stop.token(), console).await?;
    if own.sinks.is_empty() || ranges.is_empty() {
        std::fs::write(folder(config, undone.number).join(DONE), "")?;
        let report = RerunReport { records: 0, dead_letters: 0, sinks: sinks_shown, gone };
        say(&report, undone, console);
        return Ok(report);
    }
    let rerun_dir = config.state_dir.at(folder(config, undone.number));
    let lock = PipelineLock::take_for_replay(&rerun_dir, &config.name)?;
    let host = plugin_host(config)?;
    seed(&state, &own, &host, lock.folder()).await?;
    let source = Arc::new(RangesSource::new(source, ranges));
    let built = sinks::build(&own)?;
    let options = RunOptions::new(true);
    let supervisor = Supervisor::prepare_under(lock, own, host, source, built, options).await?;
    let (statuses, dead_letters) = (supervisor.statuses(), supervisor.dead_letters());
    supervisor.run_until(stop.clone()).await?;
    ensure!(!stop.is_asked(), "stopped: run the same command again to continue");
    std::fs::write(folder(config, undone.number).join(DONE), "")?;
    let records = statuses.snapshot().values().map(|status| status.records_read).sum();
    let report = RerunReport {
        records,
        dead_letters: dead_letters.count().await?,
        sinks: sinks_shown,
        gone,
    };
    say(&report, undone, console);
    Ok(report)
}

fn say(report: &RerunReport, undone: &Change, console: &Console) {
    console.say(format!(
        "{} records were rerun, {} of them became dead letters",
        report.records, report.dead_letters
    ));
    if report.dead_letters > 0 {
        console.say(format!("`shardmill dlq list --again {}` lists them", undone.number));
    }
    for gone in &report.gone {
        console.say(format!("not rerun: {gone}"));
    }
    for (sink, place) in &report.sinks {
        console.say(format!("sink {sink}: {place}"));
    }
}

/// Whether a rerun was started and did not finish.
pub(super) fn is_broken_off(config: &PipelineConfig, undone: &Change) -> bool {
    let folder = folder(config, undone.number);
    folder.exists() && !folder.join(DONE).exists()
}

/// Returns the state folder of the rerun after a change.
pub(super) fn folder(config: &PipelineConfig, number: i64) -> PathBuf {
    config.state_dir.join(config.name.as_str()).join(format!("again-{number}"))
}

/// Records that an undone change processed, according to the ledger.
struct Ran<'c> {
    state: StateStore,
    stage: StageName,
    undone: &'c Change,
}

/// Position ranges that can be rerun, and descriptions of those that cannot.
struct RerunRanges {
    ranges: BTreeMap<ShardId, ShardRange>,
    gone: Vec<String>,
}

impl Ran<'_> {
    /// Returns, for each shard that the stream lists, the range that the undone version processed: from its
    /// first record to the last one before the rollback. Waits for lanes that still run the undone version.
    async fn ranges_when_changed(
        &self,
        source: &dyn ShardSource,
        stop: &CancellationToken,
        console: &Console,
    ) -> anyhow::Result<RerunRanges> {
        let stream = source.identity().await?;
        let listed: BTreeSet<ShardId> =
            source.shards().await?.into_iter().map(|shard| shard.id).collect();
        let end = tokio::time::Instant::now() + LANES_CHANGE_MAX;
        let mut is_announced = false;
        loop {
            let found = self.ranges(&stream).await?;
            let ended = Checkpoints::new(self.state.clone()).shards(&stream).await?;
            let is_open = |shard: &ShardId, range: &ShardRange| {
                let has_ended = ended.get(shard).is_some_and(|state| state.ended);
                range.to_inclusive.is_none() && !has_ended && listed.contains(shard)
            };
            let open = found.of_stream.iter().filter(|(shard, range)| is_open(shard, range));
            let open: Vec<&str> = open.map(|(shard, _)| shard.as_str()).collect();
            if open.is_empty() {
                return Ok(found.listed(&listed));
            }
            let open = open.join(", ");
            ensure!(
                tokio::time::Instant::now() < end,
                "the undone version still runs in {open}: let the pipeline run until its lanes have changed \
                 (see `shardmill plugin history --shards`), then run the same command again"
            );
            if !std::mem::replace(&mut is_announced, true) {
                console.say(format!("waiting for {open}: the undone version still runs there"));
            }
            tokio::select! {
                () = tokio::time::sleep(LANES_LOOK) => {}
                () = stop.cancelled() => {
                    anyhow::bail!("stopped: run the same command again to continue")
                }
            }
        }
    }

    async fn ranges(&self, stream: &StreamIdentity) -> anyhow::Result<FoundRanges> {
        let ledger = Ledger::new(self.state.clone());
        let version = |spec: &RevisionSpec| {
            let own = spec.stage(&self.stage)?;
            Some((own.digest.clone(), own.canary.clone(), own.text()))
        };
        let bad = version(&ledger.spec(&self.undone.after).await?);
        let entries = ledger.history().await?;
        let mut versions = BTreeMap::new();
        for entry in &entries {
            if !versions.contains_key(&entry.revision) {
                let is_bad = version(&ledger.spec(&entry.revision).await?) == bad;
                versions.insert(entry.revision.clone(), is_bad);
            }
        }
        let is_undone = |entry: &LedgerEntry| {
            // Entries from before the change are of an earlier time at which the same version ran.
            entry.recorded_ms >= self.undone.at_ms && versions[&entry.revision]
        };
        Ok(FoundRanges::of(&entries, &stream.key(), is_undone))
    }
}

/// Position ranges that a version processed, according to the ledger.
#[derive(Debug, Default, PartialEq, Eq)]
struct FoundRanges {
    of_stream: BTreeMap<ShardId, ShardRange>,
    /// Shards of earlier streams, not of the current one.
    of_others: BTreeSet<String>,
}

impl FoundRanges {
    /// Collects the ranges of a stream's shards from the ledger entries of all shards. A range ends where the
    /// next entry of the same shard begins; without a next entry it is open.
    fn of(entries: &[LedgerEntry], stream: &str, is_meant: impl Fn(&LedgerEntry) -> bool) -> Self {
        let mut found = Self::default();
        for (at, entry) in entries.iter().enumerate().filter(|(_, entry)| is_meant(entry)) {
            if entry.stream != stream {
                found.of_others.insert(format!("{} of stream {}", entry.shard, entry.stream));
                continue;
            }
            let next = entries.get(at + 1);
            let next =
                next.filter(|next| (&next.stream, &next.shard) == (&entry.stream, &entry.shard));
            let to_inclusive = next.and_then(|next| next.from_exclusive.clone());
            let range = found.of_stream.entry(entry.shard.clone()).or_insert_with(|| ShardRange {
                from_exclusive: entry.from_exclusive.clone(),
                to_inclusive: None,
            });
            range.to_inclusive = to_inclusive;
        }
        found.of_stream.retain(|_, range| {
            range.to_inclusive.is_none() || range.from_exclusive < range.to_inclusive
        });
        found
    }

    /// Keeps the ranges of shards that the stream still lists, and describes the others.
    fn listed(self, listed: &BTreeSet<ShardId>) -> RerunRanges {
        let (ranges, unlisted): (BTreeMap<_, _>, BTreeMap<_, _>) =
            self.of_stream.into_iter().partition(|(shard, _)| listed.contains(shard));
        let end = |position: &Option<shardmill_core::record::Position>, none: &str| {
            position.as_ref().map_or_else(|| none.to_owned(), ToString::to_string)
        };
        let unlisted = unlisted.iter().map(|(shard, range)| {
            format!(
                "shard {shard} is no longer listed: its records after {} up to {} are gone",
                end(&range.from_exclusive, "its beginning"),
                end(&range.to_inclusive, "its end")
            )
        });
        let others = self.of_others.iter().map(|shard| {
            format!("shard {shard}: the pipeline now reads another stream, or the stream was created again")
        });
        let gone = unlisted.chain(others).collect();
        RerunRanges { ranges, gone }
    }
}

/// Returns the pipeline with only the sinks that can take rows again, and a description of what happens in each
/// sink.
fn rerun_config(
    config: &PipelineConfig,
    number: i64,
) -> anyhow::Result<(PipelineConfig, BTreeMap<String, String>)> {
    let mut own = config.clone();
    if let SourceKind::Kinesis(kinesis) = &mut own.source.kind {
        // The pipeline's fan-out consumer belongs to the pipeline: it has one reader at a time.
        kinesis.reader = ReaderKind::Polling;
        kinesis.create = None;
        // Records older than the retention cannot be rerun. They are reported, and the rest is rerun.
        kinesis.on_lost_records = OnLostRecords::Continue;
    }
    let name = |sink: &SinkName| SinkName::from(format!("{sink}.again-{number}").as_str());
    let mut places = BTreeMap::new();
    own.sinks.retain_mut(|sink| {
        let own = sink.name.value.to_string();
        let Some(Rerun { settings, place }) = sink.settings.rerun(&sink.name.value, number) else {
            places.insert(own, "cannot take rows again: unchanged".to_owned());
            return false;
        };
        places.insert(own, place);
        sink.settings = settings;
        sink.name.value = name(&sink.name.value);
        sink.commit_policy.give_up_after = None;
        true
    });
    let kept: Vec<SinkName> = own.sinks.iter().map(|sink| sink.name.value.clone()).collect();
    for bound in own.stages.iter_mut().flat_map(|stage| stage.routes.values_mut()) {
        for own in &mut bound.sinks {
            own.value = name(&own.value);
        }
        bound.sinks.retain(|own| kept.contains(&own.value));
    }
    own.dead_letter_sinks.clear();
    (own.admin, own.intake) = (None, None);
    own.state_dir = config.state_dir.at(folder(config, number));
    Ok((own, places))
}

/// Makes the state of the rerun start with what the pipeline really runs. Its files may say something else, if
/// another version was swapped in.
async fn seed(
    state: &StateStore,
    own: &PipelineConfig,
    host: &shardmill_plugin::PluginHost,
    folder: &std::path::Path,
) -> anyhow::Result<()> {
    let (described, mut components) = Revision::load(own, host, |_| None).await?;
    let runs = Changes::new(state.clone()).running().await?;
    let runs = runs.context("the pipeline has not stored yet which revision it runs")?.running;
    Variables::new(state.clone()).changed_variables(&runs, &environment).await?.warn(&runs.id());
    let mut running = described.spec.clone();
    for stage in &mut running.stages {
        if let Some(runs) = runs.stage(&stage.name) {
            (stage.digest, stage.canary) = (runs.digest.clone(), runs.canary.clone());
        }
    }
    for digest in running.digests().filter(|digest| !described.has(digest)) {
        let bytes = state.component(digest.to_owned()).await?;
        let bytes = bytes.with_context(|| format!("component {digest} is no longer stored"))?;
        components.push((digest.to_owned(), bytes.into()));
    }
    let seeded = StateStore::open(folder)?;
    Ledger::new(seeded.clone()).store_revision(&running, components).await?;
    let running = Running { declared: described.spec, running };
    Changes::new(seeded).record_running(&running, None, None).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_core::record::{Position, SequenceNumber};

    fn entry(stream: &str, shard: &str, from: u64, revision: &str) -> LedgerEntry {
        let at = |n: u64| Position { sequence: SequenceNumber::from(n), sub_sequence: 0 };
        LedgerEntry {
            stream: stream.into(),
            shard: shard.into(),
            from_exclusive: (from > 0).then(|| at(from)),
            revision: revision.into(),
            recorded_ms: 1,
        }
    }

    #[test]
    fn fault_11_only_listed_shards_of_this_stream_are_rerun() {
        let entries = [
            entry("cars@1", "a", 0, "bad"),
            entry("cars@2", "a", 0, "good"),
            entry("cars@2", "a", 5, "bad"),
            entry("cars@2", "a", 9, "good"),
            entry("cars@2", "b", 0, "bad"),
            entry("cars@2", "c", 3, "bad"),
            entry("cars@2", "c", 3, "good"),
            entry("letters", "d", 0, "bad"),
        ];
        let found = FoundRanges::of(&entries, "cars@2", |entry| entry.revision == "bad");
        let RerunRanges { ranges, gone } = found.listed(&[ShardId::from("a")].into());
        let [(shard, range)] = &ranges.into_iter().collect::<Vec<_>>()[..] else { panic!("one") };
        let ends = [&range.from_exclusive, &range.to_inclusive]
            .map(|end| end.as_ref().map(ToString::to_string));
        assert_eq!((shard.as_str(), ends), ("a", [Some("5".into()), Some("9".into())]));
        assert_eq!(gone.len(), 3, "{gone:?}");
        assert!(gone[0].contains("shard b is no longer listed"), "{gone:?}");
    }
}
