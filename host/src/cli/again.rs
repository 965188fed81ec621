//! `shardmill plugin rollback --replay-from-swap`: what the undone version had run, once more by the one
//! that is back, into the sinks that can take it.
//!
//! Under position names of its own, beside the pipeline. A table that keeps the newest row of each key
//! takes the rows in place; other tables get a new one beside them. What is in objects, streams and
//! behind endpoints cannot be taken back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use super::run::stop_on_signals;
use super::{Console, plugin_host, sinks, stream};
use crate::config::{PipelineConfig, ReaderKind, SinkKind, SourceKind};
use crate::lease::PipelineLock;
use crate::position::{Change, Changes, Ledger, LedgerEntry, Running, StateStore};
use crate::record::{ShardId, SinkName, StageName};
use crate::sink::WriteMode;
use crate::source::spans::{ShardSpan, SpansSource};
use crate::stage::{Generation, GenerationSpec};
use crate::supervisor::{RunOptions, Supervisor};

/// The file that says that everything was run again.
const DONE: &str = "done";

/// What was run again.
#[derive(Debug, Serialize)]
pub(super) struct AgainReport {
    /// Records that were run again.
    pub records: u64,
    /// Of these, what the version that is back did not take.
    pub dead_letters: u64,
    /// Where each sink's rows went.
    pub sinks: BTreeMap<String, String>,
}

/// Runs again what an undone change had run.
pub(super) async fn run_again(
    config: &PipelineConfig,
    stage: &str,
    undone: &Change,
    console: &Console,
) -> anyhow::Result<AgainReport> {
    let state = StateStore::open(&config.state_dir.join(config.name.as_str()))?;
    let ledger = Ledger::new(state.clone());
    let spans = spans(&ledger, &stage.into(), undone).await?;
    let (own, places) = again_config(config, undone.number)?;
    let sinks_shown: BTreeMap<_, _> = places;
    if own.sinks.is_empty() || spans.is_empty() {
        return Ok(AgainReport { records: 0, dead_letters: 0, sinks: sinks_shown });
    }
    let lock = PipelineLock::take(&folder(config, undone.number), &config.name)?;
    let host = plugin_host(config)?;
    seed(&state, &own, &host, lock.folder()).await?;
    // The embedded stream is found by the pipeline's own folder.
    let found = PipelineConfig { state_dir: config.state_dir.clone(), ..own.clone() };
    let (source, _embedded) = stream::source(&found).await?;
    let source = Arc::new(SpansSource::new(source, spans));
    let built = sinks::build(&own)?;
    let options = RunOptions::new(true);
    let supervisor = Supervisor::prepare_under(lock, own, host, source, built, options).await?;
    let (board, letters) = (supervisor.board(), supervisor.letters());
    let stop = stop_on_signals(config.timing.drain_max)?;
    supervisor.run_until(stop.clone()).await?;
    ensure!(!stop.is_asked(), "stopped: the same command goes on where it was");
    std::fs::write(folder(config, undone.number).join(DONE), "")?;
    let records = board.snapshot().values().map(|status| status.records_read).sum();
    let report = AgainReport { records, dead_letters: letters.count().await?, sinks: sinks_shown };
    console.say(format!(
        "{} records were run again, {} of them became dead letters",
        report.records, report.dead_letters
    ));
    if report.dead_letters > 0 {
        console.say(format!("`shardmill dlq list --again {}` shows these", undone.number));
    }
    for (sink, place) in &report.sinks {
        console.say(format!("sink {sink}: {place}"));
    }
    Ok(report)
}

/// Whether such a run was begun and did not come to its end.
pub(super) fn is_broken_off(config: &PipelineConfig, undone: &Change) -> bool {
    let folder = folder(config, undone.number);
    folder.exists() && !folder.join(DONE).exists()
}

/// Where the state of what is run again after a change is kept.
pub(super) fn folder(config: &PipelineConfig, number: i64) -> PathBuf {
    config.state_dir.join(config.name.as_str()).join(format!("again-{number}"))
}

/// Per shard, what the generations of a change ran, from its first record to the last before the
/// rollback.
async fn spans(
    ledger: &Ledger,
    stage: &StageName,
    undone: &Change,
) -> anyhow::Result<BTreeMap<ShardId, ShardSpan>> {
    let version = |spec: &GenerationSpec| {
        let own = spec.stage(stage)?;
        Some((own.digest.clone(), own.canary.clone(), own.config_json.clone()))
    };
    let bad = version(&ledger.spec(&undone.after).await?);
    let entries = ledger.history().await?;
    let mut spans: BTreeMap<ShardId, ShardSpan> = BTreeMap::new();
    for (at, entry) in entries.iter().enumerate() {
        let LedgerEntry { shard, from_exclusive, generation, recorded_ms } = entry;
        // Recorded before the change: an earlier time that the same version ran.
        if *recorded_ms < undone.at_ms || version(&ledger.spec(generation).await?) != bad {
            continue;
        }
        let next = entries.get(at + 1).filter(|next| next.shard == *shard);
        let to_inclusive = next.and_then(|next| next.from_exclusive.clone());
        let span = spans.entry(shard.clone()).or_insert_with(|| ShardSpan {
            from_exclusive: from_exclusive.clone(),
            to_inclusive: None,
        });
        span.to_inclusive = to_inclusive;
    }
    spans.retain(|_, span| span.to_inclusive.is_none() || span.from_exclusive < span.to_inclusive);
    Ok(spans)
}

/// The pipeline with the sinks that can take rows again, and what becomes of each.
fn again_config(
    config: &PipelineConfig,
    number: i64,
) -> anyhow::Result<(PipelineConfig, BTreeMap<String, String>)> {
    let mut own = config.clone();
    if let SourceKind::Kinesis(kinesis) = &mut own.source.kind {
        // The consumer of the pipeline is its own: it has one reader at a time.
        kinesis.reader = ReaderKind::Polling;
        kinesis.create = None;
    }
    let name = |sink: &SinkName| SinkName::from(format!("{sink}.again-{number}").as_str());
    let mut places = BTreeMap::new();
    own.sinks.retain_mut(|sink| {
        let place = divert(&mut sink.kind, number);
        let shown = place.clone().unwrap_or_else(|| "cannot take rows again: left as it is".into());
        places.insert(sink.name.value.to_string(), shown);
        sink.name.value = name(&sink.name.value);
        sink.rhythm.give_up_after = None;
        place.is_some()
    });
    let kept: Vec<SinkName> = own.sinks.iter().map(|sink| sink.name.value.clone()).collect();
    for bound in own.stages.iter_mut().flat_map(|stage| stage.routes.values_mut()) {
        for own in &mut bound.sinks {
            own.value = name(&own.value);
        }
        bound.sinks.retain(|own| kept.contains(&own.value));
    }
    own.letter_sinks.clear();
    (own.admin, own.intake) = (None, None);
    own.state_dir = folder(config, number);
    Ok((own, places))
}

/// Where a sink's rows go: in place, or to a table beside; `None`: it cannot take rows again.
fn divert(kind: &mut SinkKind, number: i64) -> Option<String> {
    let is_newest = |mode: &WriteMode| matches!(mode, WriteMode::Upsert { newest_by: Some(_), .. });
    let (table, create, mode) = match kind {
        SinkKind::Postgres(target) => (&mut target.table, &mut target.create, &target.mode),
        SinkKind::Sqlite { table, create, mode, .. } => (table, create, &*mode),
        _ => return None,
    };
    if is_newest(mode) {
        return Some(format!("in place, in table {table}"));
    }
    *table = format!("{table}_again_{number}");
    *create = true;
    Some(format!("beside, in the new table {table}"))
}

/// Lets the state of the run know what the pipeline itself runs: not what its files say, where something
/// else was swapped in.
async fn seed(
    state: &StateStore,
    own: &PipelineConfig,
    host: &crate::plugin::PluginHost,
    folder: &std::path::Path,
) -> anyhow::Result<()> {
    let (described, mut components) = Generation::from_config(own, host, &|_| None)?;
    let runs = Changes::new(state.clone()).running().await?;
    let runs = runs.context("the pipeline has not said yet what it runs")?.running;
    let mut running = described.spec.clone();
    for stage in &mut running.stages {
        if let Some(runs) = runs.stage(&stage.name) {
            (stage.digest, stage.canary) = (runs.digest.clone(), runs.canary.clone());
        }
    }
    for digest in running.digests().filter(|digest| !described.has(digest)) {
        let bytes = state.component(digest.to_owned()).await?;
        let bytes = bytes.with_context(|| format!("component {digest} is not kept any more"))?;
        components.push((digest.to_owned(), bytes.into()));
    }
    let seeded = StateStore::open(folder)?;
    Ledger::new(seeded.clone()).keep(&running, components).await?;
    let running = Running { declared: described.spec, running };
    Changes::new(seeded).promote(&running, None, None).await?;
    Ok(())
}
