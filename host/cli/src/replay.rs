//! `shardmill replay`: a window of time again, by today's plugins, beside the live table or in the place
//! of its rows.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::dlq::resolve_replays;
use super::signals::stop_on_signals;
use super::{
    Console, PipelineFile, dead_letters, holes, load, plugin_host, sinks, state_beside, stream,
};
use shardmill_config::{PipelineConfig, ReaderKind, ReplaySupport, SourceKind, environment};
use shardmill_core::boxed;
use shardmill_core::record::ReplayId;
use shardmill_core::record::{Position, ShardId, ShardKey, SinkName, StreamIdentity};
use shardmill_core::sink::Sink;
use shardmill_core::source::StartPosition;
use shardmill_core::source::{NextBatch, ResumePoint, ShardSource, Waiting};
use shardmill_engine::lane::roster;
use shardmill_engine::lock::PipelineLock;
use shardmill_engine::supervisor::{RunOptions, Supervisor};
use shardmill_engine::window::WindowSource;
use shardmill_sink_postgres::{
    OtherSink, PostgresSink, PostgresTarget, SwapFailed, TableWindow, WindowDiff,
};
use shardmill_state::{
    Changes, Checkpoints, FailedInReplay, Holes, Redrives, Replays, StateStore, Variables,
};

/// How long the first record of a hole is waited for.
const FIRST_RECORD_MAX: Duration = Duration::from_secs(60);
/// By how much the clock of this machine may have drifted from the server's meanwhile, in milliseconds.
const CLOCKS_DIFFER_MS: i64 = 60_000;
const SECOND_MS: i64 = 1_000;
/// What a sink's name ends with while it is replayed.
const REPLAYED: &str = ".replay";

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// The PostgreSQL sink whose table is meant; it needs `lineage = true`.
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// Records that arrived from here on, such as 2026-01-31T00:00:00Z.
    #[arg(long, value_name = "TIME", required_unless_present = "hole", requires = "to")]
    from: Option<DateTime<Utc>>,
    /// And before this, which is past.
    #[arg(long, value_name = "TIME", required_unless_present = "hole", requires = "from")]
    to: Option<DateTime<Utc>>,
    /// The time of a hole of the sink, by its number, in place of --from and --to: `shardmill check` names
    /// them. With --swap, the hole is filled then.
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["from", "to"])]
    hole: Option<i64>,
    /// Replay nothing: the hole was filled in another way, and is not to be named any more.
    #[arg(long, requires = "hole", conflicts_with = "swap")]
    filled: bool,
    /// The table that the rows go to; default: the sink's with `_replay`. One of an earlier replay is
    /// replaced.
    #[arg(long, value_name = "TABLE")]
    into: Option<String>,
    /// Then replace the live table's rows of that time by these, in one transaction.
    #[arg(long)]
    swap: bool,
    /// Replace them even where today's plugins did not take every record.
    #[arg(long, requires = "swap")]
    with_dead_letters: bool,
}

/// What a replay did.
#[derive(Serialize)]
struct Report {
    /// The table with the new rows; it is gone after a swap.
    shadow: String,
    #[serde(flatten)]
    diff: WindowDiff,
    /// Records that today's plugins, or the table, did not take.
    dead_letters: u64,
    /// Rows deleted from the live table and inserted there, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    swapped: Option<(u64, u64)>,
    /// What the sink was not given, and what fills it.
    holes: Vec<String>,
    /// The live table's rows were replaced, also where the server did not say how many.
    is_replaced: bool,
}

#[boxed]
pub async fn replay(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    let sink: SinkName = options.sink.as_str().into();
    if options.filled {
        return fill(&config, &sink, options.hole, console).await;
    }
    let window_ms = match (options.from, options.to) {
        (Some(from), Some(to)) => window(from, to)?,
        _ => hole_window(&config, &sink, options.hole.unwrap_or_default()).await?,
    };
    let live = live_target(&config, &sink)?;
    let replayed: SinkName = format!("{sink}{REPLAYED}").as_str().into();

    let folder = config.state_dir.join(config.name.as_str()).join("replay");
    let folder = config.state_dir.at(folder);
    let lock = PipelineLock::take_for_replay(&folder, &config.name)?;
    // Before the positions of an earlier replay are forgotten, which say whether it has landed.
    let swap = match options.swap {
        true => Some(Swap::begin(&config, console).await?),
        false => {
            if config.state_dir.join(config.name.as_str()).join("state.db").exists() {
                let state = state_beside(&config)?;
                roster::refuse_unresolved(&config, &state).await?;
                resolve_replays(&config, &state, console).await?;
            }
            None
        }
    };
    forget_state(lock.folder())?;
    let prepared = TableWindow::prepare(
        live,
        options.into.as_deref(),
        (&sink, &replayed),
        &config.name,
        (window_ms.clone(), config.timing.postgres_silence_max),
    );
    let mut table = prepared.await.map_err(anyhow::Error::msg)?;

    let own = replay_config(&config, &sink, &replayed, &table.shadow(), &window_ms)?;
    // The embedded stream is found by the pipeline's own folder.
    let (source, _embedded) =
        stream::source(&PipelineConfig { state_dir: config.state_dir.clone(), ..own.clone() })
            .await?;
    let stream = Arc::new(source.identity().await?);
    check_past(&*source, &window_ms).await?;
    let others = others(&config, &sink);
    if options.swap {
        check_retained(&*source, &window_ms).await?;
        let alone = table.check_alone(&others, &stream).await;
        alone.map_err(|cause| anyhow::anyhow!("nothing was replaced: {cause}"))?;
    }
    let whole_source = source.clone();
    let source = WindowSource::new(source, window_ms.clone());
    let last = source.last();
    let (host, sinks) = (plugin_host(&config)?, sinks::build(&own)?);
    warn_of_changed_variables(&config).await?;
    let run = RunOptions::new(false);
    let supervisor =
        Supervisor::prepare_under(lock, own, host, Arc::new(source), sinks, run).await?;
    let dead_letters = supervisor.dead_letters();
    let stop = stop_on_signals(config.timing.drain_max)?;
    supervisor.run_until(stop.clone()).await?;
    ensure!(!stop.is_asked(), "stopped: the replay begins anew when it is run again");

    let mut report = Report {
        shadow: table.shadow(),
        diff: table.diff().await.map_err(anyhow::Error::msg)?,
        dead_letters: dead_letters.count().await?,
        swapped: None,
        holes: Vec::new(),
        is_replaced: false,
    };
    say(&report, console);
    if let Some(swap) = swap {
        ensure!(
            report.dead_letters == 0 || options.with_dead_letters,
            "nothing was replaced: {} records are not among the new rows, today's plugins or the table \
             did not take them; --with-dead-letters replaces the rows nevertheless",
            report.dead_letters
        );
        let last = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let target = PostgresSink::new(sink.clone(), live)?;
        // If it holds all of the window now, it did when it was read.
        check_retained(&*whole_source, &window_ms).await?;
        check_passed(&target, &config, stream.clone(), (last, &swap.state)).await?;
        let beside = table.check_alone(&others, &stream).await.map_err(anyhow::Error::msg)?;
        let failed = failed_in_replay(dead_letters.failed().await?);
        let window = Window { sink: &sink, live, stream: &stream, window_ms };
        let replaced = swap.replace(&config, window, (&mut table, &beside), failed).await?;
        match replaced {
            Some((deleted, inserted)) => {
                console.say(format!("replaced: {deleted} rows deleted, {inserted} inserted"));
            }
            None => console.say("replaced: the server did it, and did not say how many rows"),
        }
        report.swapped = replaced;
        report.is_replaced = true;
        if options.hole.is_some() {
            fill(&config, &sink, options.hole, console).await?;
        }
    }
    let left = holes::of(&config, Some(&sink)).await?;
    holes::say(&config, &left, console);
    report.holes = left.iter().map(|hole| holes::line(&config, hole)).collect();
    console.report(&report)
}

/// Notes that a hole is filled.
async fn fill(
    config: &PipelineConfig,
    sink: &SinkName,
    number: Option<i64>,
    console: &Console,
) -> anyhow::Result<()> {
    let number = number.unwrap_or_default();
    let own = Holes::new(holes::state_of(config, sink)?);
    let is_own = own.list(Some(sink.clone())).await?.iter().any(|hole| hole.number == number);
    ensure!(is_own && own.fill(number).await?, "sink {sink} has no hole {number} to fill");
    console.say(format!("hole {number} of sink {sink} is filled"));
    Ok(())
}

/// When the records of a hole arrived: from the first that is in it to the time when it was recorded.
async fn hole_window(
    config: &PipelineConfig,
    sink: &SinkName,
    number: i64,
) -> anyhow::Result<Range<u64>> {
    let state = holes::state_of(config, sink)?;
    let recorded = Holes::new(state.clone()).list(Some(sink.clone())).await?;
    let mut recorded = recorded.into_iter().filter(|hole| hole.number == number);
    let Some(hole) = recorded.next() else { bail!("sink {sink} has no hole {number}") };
    let mut own = config.clone();
    if let SourceKind::Kinesis(kinesis) = &mut own.source.kind {
        kinesis.create = None;
        // The consumer of the pipeline is its own: it has one reader at a time.
        kinesis.reader = ReaderKind::Polling;
    }
    let (source, _embedded) = stream::source(&own).await?;
    let stream = Arc::new(source.identity().await?);
    ensure!(
        stream.key() == hole.stream,
        "hole {number} is of stream {}, which was deleted or is not the source any more: its records are \
         gone",
        hole.stream
    );
    let begun = Checkpoints::new(state).shards(&stream).await?;
    let start = begun.get(&hole.shard).map(|shard| shard.start.clone()).unwrap_or_default();
    let key = ShardKey { pipeline: config.name.clone(), stream, shard: hole.shard.clone() };
    let (after, waiting) = (hole.from_exclusive.as_ref(), Waiting::default());
    let from = ResumePoint { after, start: &start, caught_up_ms: None, waiting: &waiting };
    let first = async {
        let mut reader = source.open(&key, from).await?;
        loop {
            match reader.next_batch().await? {
                NextBatch::Batch(batch) => {
                    if let Some(first) = batch.records.first() {
                        return Ok::<_, anyhow::Error>(Some(first.clone()));
                    }
                }
                NextBatch::Idle { .. } | NextBatch::Lost(_) => {}
                _ => return Ok(None),
            }
        }
    };
    let first = tokio::time::timeout(FIRST_RECORD_MAX, first).await;
    let first = first.context("the first record of the hole did not come")??;
    let is_inside = |at: &Position| hole.to_inclusive.as_ref().is_none_or(|to| at <= to);
    let Some(first) = first.filter(|first| is_inside(&first.position)) else {
        bail!("the stream holds no record of hole {number} any more: nothing fills it from there");
    };
    // The hole was recorded by this machine's clock; records arrive by the server's.
    let own_now_ms = Utc::now().timestamp_millis();
    let now_ms = source.now_ms().await?.unwrap_or(own_now_ms);
    let recorded_ms = hole.recorded_ms.saturating_add(now_ms - own_now_ms);
    // The server tells whole seconds: what has arrived within the one that it names is in the window too.
    let end_ms = (now_ms + SECOND_MS).min(recorded_ms.saturating_add(CLOCKS_DIFFER_MS));
    let window_ms = first.arrived_ms..u64::try_from(end_ms).unwrap_or(0);
    ensure!(
        !window_ms.is_empty(),
        "the records of hole {number} arrived in the future: compare the clocks"
    );
    Ok(window_ms)
}

/// What failed in the replay, by the names of the pipeline.
fn failed_in_replay(mut failed: Vec<FailedInReplay>) -> Vec<FailedInReplay> {
    for one in &mut failed {
        if one.place.starts_with("sink:")
            && let Some(place) = one.place.strip_suffix(REPLAYED)
        {
            one.place = place.to_owned();
        }
    }
    failed
}

/// The pipeline's other tables in PostgreSQL.
fn others<'c>(
    config: &'c PipelineConfig,
    sink: &SinkName,
) -> Vec<(&'c SinkName, &'c PostgresTarget)> {
    let sinks = config.sinks.iter().chain(&config.dead_letter_sinks);
    let others = sinks.filter(|other| other.name.value != *sink);
    others.filter_map(|other| Some((&other.name.value, sinks::postgres(other)?))).collect()
}

/// Says which variables of the stages were set otherwise when the pipeline ran: a replay uses today's.
async fn warn_of_changed_variables(config: &PipelineConfig) -> anyhow::Result<()> {
    if config.state_dir.join(config.name.as_str()).join("state.db").exists() {
        let state = state_beside(config)?;
        if let Some(noted) = Changes::new(state.clone()).running().await? {
            let variables = Variables::new(state);
            let changed_variables =
                variables.changed_variables(&noted.running, &environment).await?;
            changed_variables.warn(&noted.running.id());
        }
    }
    Ok(())
}

/// The right to replace rows, and where it is noted: no redrive may run meanwhile, it would bring letters
/// that the replay brings too.
struct Swap {
    state: StateStore,
    _lock: PipelineLock,
}

/// What is replaced.
struct Window<'w> {
    sink: &'w SinkName,
    live: &'w PostgresTarget,
    stream: &'w StreamIdentity,
    window_ms: Range<u64>,
}

impl Swap {
    async fn begin(config: &PipelineConfig, console: &Console) -> anyhow::Result<Self> {
        // An error here is better than a lock in a folder that was never used.
        dead_letters(config)?;
        let lock = PipelineLock::take_for_redrive(&config.state_dir, &config.name)
            .context("a redrive and a replay that replaces rows cannot run at the same time")?;
        let state = state_beside(config)?;
        roster::refuse_unresolved(config, &state).await?;
        let redrives = Redrives::new(state.clone(), config.name.clone());
        ensure!(
            redrives.unfinished().await?.iter().all(|one| one.is_rest),
            "a redrive was broken off, and has brought some letters: finish it by `shardmill dlq redrive` \
             first"
        );
        resolve_replays(config, &state, console).await?;
        Ok(Self { state, _lock: lock })
    }

    /// Replaces the rows; gives how many were deleted and inserted, where the server has said it.
    ///
    /// First it is noted, as pending, which letters the rows are of; the note counts once the rows are there.
    async fn replace(
        &self,
        config: &PipelineConfig,
        window: Window<'_>,
        (table, beside): (&mut TableWindow, &[OtherSink]),
        failed: Vec<FailedInReplay>,
    ) -> anyhow::Result<Option<(u64, u64)>> {
        let Window { sink, live, stream, window_ms } = window;
        let replays = Replays::new(self.state.clone());
        let both = replays.failed_both(stream, window_ms.clone(), &failed).await?;
        let with_rows = table.with_rows(both).await.map_err(anyhow::Error::msg)?;
        let id = replays.begin((stream, sink), window_ms, failed, with_rows).await?;
        let cause = match table.swap(id, beside, stream).await {
            Ok(counts) => {
                confirm(&replays, id).await;
                return Ok(Some(counts));
            }
            Err(SwapFailed::Nothing(cause)) => {
                replays.cancel(id).await?;
                bail!(cause);
            }
            Err(SwapFailed::Unknown(cause)) => cause,
        };
        match TableWindow::has_landed(
            live,
            &config.name,
            (sink, id),
            config.timing.postgres_silence_max,
        )
        .await
        {
            Ok(true) => {
                confirm(&replays, id).await;
                Ok(None)
            }
            Ok(false) => {
                replays.cancel(id).await?;
                bail!("nothing was replaced: the connection was lost: {cause}");
            }
            Err(unknown) => bail!(
                "whether the window was replaced is not known: {cause}; and then: {unknown}. The next \
                 `shardmill dlq redrive` or `shardmill replay` of this pipeline finds it out"
            ),
        }
    }
}

/// The rows are there: if this cannot be noted now, it is found out before it matters.
async fn confirm(replays: &Replays, id: ReplayId) {
    if let Err(error) = replays.confirm(id).await {
        tracing::warn!(%error, "the next redrive finds out which letters were replayed");
    }
}

/// The window in milliseconds since 1970.
fn window(from: DateTime<Utc>, to: DateTime<Utc>) -> anyhow::Result<Range<u64>> {
    let ms = |time: DateTime<Utc>| {
        u64::try_from(time.timestamp_millis()).context("a time before 1970 is in no stream")
    };
    let window_ms = ms(from)?..ms(to)?;
    ensure!(!window_ms.is_empty(), "--from must be before --to");
    Ok(window_ms)
}

/// The window must be past by the clock that gives records their times: records of a later time may come
/// yet.
async fn check_past(source: &dyn ShardSource, window_ms: &Range<u64>) -> anyhow::Result<()> {
    let end_ms = i64::try_from(window_ms.end).unwrap_or(i64::MAX);
    let Some(mut now_ms) = source.now_ms().await? else { return Ok(()) };
    // The clock is told in whole seconds, rounded down.
    if (now_ms + 1..=now_ms + SECOND_MS).contains(&end_ms) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        now_ms = source.now_ms().await?.unwrap_or(now_ms);
    }
    let now = DateTime::from_timestamp_millis(now_ms).unwrap_or_default();
    ensure!(
        end_ms <= now_ms,
        "--to must be past: records of that time may come yet; by the stream's clock it is {}",
        now.to_rfc3339()
    );
    Ok(())
}

/// The table of the sink that is meant.
fn live_target<'c>(
    config: &'c PipelineConfig,
    name: &SinkName,
) -> anyhow::Result<&'c PostgresTarget> {
    let Some(sink) = config.sinks.iter().find(|sink| sink.name.value == *name) else {
        bail!("the pipeline has no sink {name}");
    };
    match (sink.settings.replay(), sinks::postgres(sink)) {
        (ReplaySupport::Supported, Some(target)) => Ok(target),
        (ReplaySupport::Needs(setting), _) => bail!(
            "sink {name} does not say from which record a row came: set {setting}. Only rows that \
             are written from then on can be replayed"
        ),
        _ => bail!("sink {name} is not of type \"postgres\": only such a table can be replayed"),
    }
}

/// The pipeline with nothing but the one sink, which writes to the shadow.
fn replay_config(
    config: &PipelineConfig,
    sink: &SinkName,
    replayed: &SinkName,
    shadow: &str,
    window_ms: &Range<u64>,
) -> anyhow::Result<PipelineConfig> {
    let mut own = config.clone();
    let SourceKind::Kinesis(kinesis) = &mut own.source.kind else {
        bail!("a file's lines have no time of arrival: nothing can be replayed by time");
    };
    let from_ms = i64::try_from(window_ms.start).context("--from is out of range")?;
    kinesis.start = StartPosition::AtTimestampMs(from_ms);
    kinesis.create = None;
    // The consumer of the pipeline is its own: it has one reader at a time.
    kinesis.reader = ReaderKind::Polling;
    own.sinks.retain(|own| own.name.value == *sink);
    for own in &mut own.sinks {
        own.name.value = replayed.clone();
        // It goes on as nobody: the positions of the live sink are not its own.
        own.renamed_from = None;
        own.commit_policy.give_up_after = None;
        if let Some(target) = sinks::postgres(own) {
            own.settings = Arc::new(target.replayed(shadow, sink));
        }
    }
    for bound in own.stages.iter_mut().flat_map(|stage| stage.routes.values_mut()) {
        bound.sinks.retain(|own| own.value == *sink);
        for own in &mut bound.sinks {
            own.value = replayed.clone();
        }
    }
    own.dead_letter_sinks.clear();
    (own.admin, own.intake) = (None, None);
    own.state_dir = config.state_dir.at(config.state_dir.join(config.name.as_str()).join("replay"));
    Ok(own)
}

/// Forgets a replay that was broken off.
fn forget_state(folder: &Path) -> anyhow::Result<()> {
    for file in ["state.db", "state.db-wal", "state.db-shm"] {
        let path = folder.join(file);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("failed to remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The stream must hold all of the window still: rows of records that are gone could not be made again.
async fn check_retained(source: &dyn ShardSource, window_ms: &Range<u64>) -> anyhow::Result<()> {
    let Some(from_ms) = source.retained_from_ms().await? else { return Ok(()) };
    let from = DateTime::from_timestamp_millis(from_ms).unwrap_or_default();
    let begins_ms = i64::try_from(window_ms.start).unwrap_or(i64::MAX);
    ensure!(
        begins_ms >= from_ms,
        "nothing was replaced: the stream holds records from {} on, rows of earlier ones could not be \
         made again; let the window begin there",
        from.to_rfc3339()
    );
    Ok(())
}

/// The pipeline itself must be past the window, or it would write rows of it after the swap.
async fn check_passed(
    live: &PostgresSink,
    config: &PipelineConfig,
    stream: Arc<shardmill_core::record::StreamIdentity>,
    (last, state): (BTreeMap<ShardId, Position>, &StateStore),
) -> anyhow::Result<()> {
    let holes = Holes::new(state.clone());
    for (shard, last) in last {
        let pipeline = config.name.clone();
        let key = ShardKey { pipeline, stream: stream.clone(), shard };
        let stands = live.position(&key).await?;
        // What lies in a hole is not given to the sink, however far the shard is read.
        let stands =
            stands.clone().max(holes.end_around(&key, live.name(), stands.as_ref()).await?);
        ensure!(
            stands.as_ref() >= Some(&last),
            "nothing was replaced: in shard {} the pipeline has not come to the window's end ({last}), \
             it would write these rows again; let it run on first",
            key.shard
        );
    }
    Ok(())
}

fn say(report: &Report, console: &Console) {
    let Report { shadow, diff, dead_letters, .. } = report;
    console.say(format!(
        "{} rows are the same, {} are in the live table only, {} in {shadow} only; {dead_letters} dead \
         letters",
        diff.same, diff.only_live, diff.only_shadow
    ));
    for row in &diff.samples_live {
        console.say(format!("- {row}"));
    }
    for row in &diff.samples_shadow {
        console.say(format!("+ {row}"));
    }
}
