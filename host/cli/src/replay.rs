//! `shardmill replay`: processes a time window again with the current plugins, into a new table beside the live
//! one (the shadow), or in place of the live table's rows (`--swap`).
//!
//! A replay must neither lose nor duplicate rows. Therefore, with `--swap`:
//! 1. The redrive lock is acquired, and an interrupted redrive must be finished first. Otherwise both would
//!    bring rows of the same dead letters.
//! 2. Earlier replays with an unknown outcome are resolved before the positions of earlier replays are
//!    forgotten, because these positions show the outcome.
//! 3. The window must be in the past by the stream's clock, and the stream must still have all its records. The
//!    second check is repeated after reading: if the stream has the whole window then, it had it while it was
//!    read.
//! 4. Only rows of this one sink may be replaced. If others write to the same table, too, the rows must record
//!    which sink wrote them; otherwise the replay is refused.
//! 5. The live sink must have passed the end of the window, or the pipeline would write rows of the window
//!    after the swap.
//! 6. What the new rows cover is stored as pending. Then one transaction deletes the old rows and inserts the
//!    new ones.
//!
//! Outcome of that transaction:
//!
//! | transaction | note in the state | rows |
//! | --- | --- | --- |
//! | committed | confirmed | replaced |
//! | not committed | cancelled | unchanged |
//! | unknown, found in the table | confirmed | replaced, numbers unknown |
//! | unknown, not found in the table | cancelled | unchanged |
//! | unknown, table out of reach | stays pending | resolved by the next redrive or replay |

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

/// Longest wait for the first record of a hole.
const FIRST_RECORD_MAX: Duration = Duration::from_secs(60);
/// Allowance for drift between the clocks of this machine and of the server, in milliseconds.
const CLOCKS_DIFFER_MS: i64 = 60_000;
const SECOND_MS: i64 = 1_000;
/// Suffix of a sink's name during its replay.
const REPLAYED: &str = ".replay";

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// The PostgreSQL sink to replay; it needs `lineage = true`.
    #[arg(long, value_name = "NAME")]
    sink: String,
    /// Start of the window: records that arrived at or after this time, such as 2026-01-31T00:00:00Z.
    #[arg(long, value_name = "TIME", required_unless_present = "hole", requires = "to")]
    from: Option<DateTime<Utc>>,
    /// End of the window: records that arrived before this time. It must be in the past.
    #[arg(long, value_name = "TIME", required_unless_present = "hole", requires = "from")]
    to: Option<DateTime<Utc>>,
    /// Take the window from a hole of the sink, by its number, instead of --from and --to (`shardmill check`
    /// lists the holes). With --swap, the hole is then filled.
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["from", "to"])]
    hole: Option<i64>,
    /// Replay nothing: mark the hole as filled, because it was filled in another way.
    #[arg(long, requires = "hole", conflicts_with = "swap")]
    filled: bool,
    /// Table for the new rows [default: the table of the sink with `_replay`]. A table of an earlier replay is
    /// replaced.
    #[arg(long, value_name = "TABLE")]
    into: Option<String>,
    /// Then replace the live table's rows of the window with the new rows, in one transaction.
    #[arg(long)]
    swap: bool,
    /// Replace the rows even if some records of the window became dead letters.
    #[arg(long, requires = "swap")]
    with_dead_letters: bool,
}

/// Report of a replay.
#[derive(Serialize)]
struct Report {
    /// Table with the new rows. After a swap it no longer exists.
    shadow: String,
    #[serde(flatten)]
    diff: WindowDiff,
    /// Records that the current plugins rejected or the table refused.
    dead_letters: u64,
    /// Number of rows deleted from the live table and inserted into it, with `--swap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    swapped: Option<(u64, u64)>,
    /// Holes in what the sink was given, each with the command that fills it.
    holes: Vec<String>,
    /// Whether the live table's rows were replaced. Also true if the server did not report how many.
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
    // Before the positions of earlier replays are forgotten: they show whether an earlier replay has landed.
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
    // The embedded stream is found through the pipeline's own state folder.
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
    ensure!(!stop.is_asked(), "stopped: the replay starts from the beginning when it is run again");

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
            "nothing was replaced: {} records of the window became dead letters, so their rows are missing; \
             use --with-dead-letters to replace the rows anyway",
            report.dead_letters
        );
        let last = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let target = PostgresSink::new(sink.clone(), live)?;
        // If the stream has the whole window now, it had it while it was read.
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
            None => console.say("replaced: the server has committed, but its reply with the number of rows was lost"),
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

/// Records that a hole is filled.
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

/// Returns the arrival times of a hole's records: from the first record in the hole to the time at which the
/// hole was recorded.
async fn hole_window(
    config: &PipelineConfig,
    sink: &SinkName,
    number: i64,
) -> anyhow::Result<Range<u64>> {
    let state = holes::state_of(config, sink)?;
    let recorded = Holes::new(state.clone()).list(Some(sink.clone())).await?;
    let mut recorded = recorded.into_iter().filter(|hole| hole.number == number);
    let Some(hole) = recorded.next() else {
        bail!("unknown hole {number} of sink {sink}: `shardmill check` lists the holes")
    };
    let mut own = config.clone();
    if let SourceKind::Kinesis(kinesis) = &mut own.source.kind {
        kinesis.create = None;
        // The pipeline's fan-out consumer belongs to the pipeline: it has one reader at a time.
        kinesis.reader = ReaderKind::Polling;
    }
    let (source, _embedded) = stream::source(&own).await?;
    let stream = Arc::new(source.identity().await?);
    ensure!(
        stream.key() == hole.stream,
        "hole {number} is of stream {}, which was deleted or is no longer the source: its records are gone",
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
    let first = first.context("the first record of the hole did not arrive in time")??;
    let is_inside = |at: &Position| hole.to_inclusive.as_ref().is_none_or(|to| at <= to);
    let Some(first) = first.filter(|first| is_inside(&first.position)) else {
        bail!("the stream no longer has records of hole {number}: a replay cannot fill it");
    };
    // The time of the hole is by this machine's clock; arrival times of records are by the server's.
    let own_now_ms = Utc::now().timestamp_millis();
    let now_ms = source.now_ms().await?.unwrap_or(own_now_ms);
    let recorded_ms = hole.recorded_ms.saturating_add(now_ms - own_now_ms);
    // The server's time has whole seconds: records that arrived within the current second belong to the window.
    let end_ms = (now_ms + SECOND_MS).min(recorded_ms.saturating_add(CLOCKS_DIFFER_MS));
    let window_ms = first.arrived_ms..u64::try_from(end_ms).unwrap_or(0);
    ensure!(
        !window_ms.is_empty(),
        "the records of hole {number} arrived in the future: check the clocks of this machine and of the server"
    );
    Ok(window_ms)
}

/// Renames the places of failures in the replay to the names of the pipeline.
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

/// Returns the pipeline's other PostgreSQL tables.
fn others<'c>(
    config: &'c PipelineConfig,
    sink: &SinkName,
) -> Vec<(&'c SinkName, &'c PostgresTarget)> {
    let sinks = config.sinks.iter().chain(&config.dead_letter_sinks);
    let others = sinks.filter(|other| other.name.value != *sink);
    others.filter_map(|other| Some((&other.name.value, sinks::postgres(other)?))).collect()
}

/// Warns about variables of the stages that had other values when the pipeline ran: a replay uses the current
/// values.
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

/// The right to replace rows, and the state in which a replacement is noted. No redrive may run at the same
/// time: it would bring rows of dead letters that the replay brings too.
struct Swap {
    state: StateStore,
    _lock: PipelineLock,
}

/// Rows to replace: those of a sink, a stream and a time window.
struct Window<'w> {
    sink: &'w SinkName,
    live: &'w PostgresTarget,
    stream: &'w StreamIdentity,
    window_ms: Range<u64>,
}

impl Swap {
    async fn begin(config: &PipelineConfig, console: &Console) -> anyhow::Result<Self> {
        // An error here is better than making a lock in a folder that was never used.
        dead_letters(config)?;
        let lock = PipelineLock::take_for_redrive(&config.state_dir, &config.name)
            .context("a redrive and a replay that replaces rows cannot run at the same time")?;
        let state = state_beside(config)?;
        roster::refuse_unresolved(config, &state).await?;
        let redrives = Redrives::new(state.clone(), config.name.clone());
        ensure!(
            redrives.unfinished().await?.iter().all(|one| one.is_rest),
            "a redrive was interrupted after it had delivered some dead letters: finish it with `shardmill dlq \
             redrive` first"
        );
        resolve_replays(config, &state, console).await?;
        Ok(Self { state, _lock: lock })
    }

    /// Replaces the rows and returns how many were deleted and inserted, if the server reported it.
    ///
    /// First the state notes, as pending, which dead letters the rows belong to. The note counts only after the
    /// rows are in the table. See the table of outcomes in the module documentation.
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
                "cannot find out whether the rows of the window were replaced: {cause}; and then: {unknown}. \
                 The next `shardmill dlq redrive` or `shardmill replay` of this pipeline resolves it"
            ),
        }
    }
}

/// Confirms a replay whose rows are in the table. If this fails, the next redrive or replay resolves it from
/// the table before it matters.
async fn confirm(replays: &Replays, id: ReplayId) {
    if let Err(error) = replays.confirm(id).await {
        tracing::warn!(%error, "failed to store that a replay was confirmed; the next redrive or replay resolves it");
    }
}

/// Returns the window in milliseconds since 1970.
fn window(from: DateTime<Utc>, to: DateTime<Utc>) -> anyhow::Result<Range<u64>> {
    let ms = |time: DateTime<Utc>| {
        u64::try_from(time.timestamp_millis()).context("invalid time: expected one after 1970")
    };
    let window_ms = ms(from)?..ms(to)?;
    ensure!(!window_ms.is_empty(), "--from must be before --to");
    Ok(window_ms)
}

/// Checks that the window is past by the clock that gives records their arrival times. Otherwise records of the
/// window may still arrive.
async fn check_past(source: &dyn ShardSource, window_ms: &Range<u64>) -> anyhow::Result<()> {
    let end_ms = i64::try_from(window_ms.end).unwrap_or(i64::MAX);
    let Some(mut now_ms) = source.now_ms().await? else { return Ok(()) };
    // The server's time is rounded down to whole seconds.
    if (now_ms + 1..=now_ms + SECOND_MS).contains(&end_ms) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        now_ms = source.now_ms().await?.unwrap_or(now_ms);
    }
    let now = DateTime::from_timestamp_millis(now_ms).unwrap_or_default();
    ensure!(
        end_ms <= now_ms,
        "--to must be in the past, because records of that time may still arrive; the stream's clock says {}",
        now.to_rfc3339()
    );
    Ok(())
}

/// Returns the table of the sink to replay.
fn live_target<'c>(
    config: &'c PipelineConfig,
    name: &SinkName,
) -> anyhow::Result<&'c PostgresTarget> {
    let Some(sink) = config.sinks.iter().find(|sink| sink.name.value == *name) else {
        bail!("unknown sink {name}: it is not in the pipeline");
    };
    match (sink.settings.replay(), sinks::postgres(sink)) {
        (ReplaySupport::Supported, Some(target)) => Ok(target),
        (ReplaySupport::Needs(setting), _) => bail!(
            "the rows of sink {name} do not record their source positions: set {setting}. Only rows written \
             after that can be replayed"
        ),
        _ => bail!("sink {name} cannot be replayed: expected a sink of type \"postgres\""),
    }
}

/// Returns the pipeline with only this sink, which writes to the shadow table.
fn replay_config(
    config: &PipelineConfig,
    sink: &SinkName,
    replayed: &SinkName,
    shadow: &str,
    window_ms: &Range<u64>,
) -> anyhow::Result<PipelineConfig> {
    let mut own = config.clone();
    let SourceKind::Kinesis(kinesis) = &mut own.source.kind else {
        bail!("a file source cannot be replayed: its lines have no arrival times");
    };
    let from_ms = i64::try_from(window_ms.start).context("--from is out of range")?;
    kinesis.start = StartPosition::AtTimestampMs(from_ms);
    kinesis.create = None;
    // The pipeline's fan-out consumer belongs to the pipeline: it has one reader at a time.
    kinesis.reader = ReaderKind::Polling;
    own.sinks.retain(|own| own.name.value == *sink);
    for own in &mut own.sinks {
        own.name.value = replayed.clone();
        // The replayed sink has no earlier name: the live sink's positions are not its own.
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

/// Removes the state of an earlier replay.
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

/// Checks that the stream still has the whole window. Rows of records that are gone could not be produced
/// again.
async fn check_retained(source: &dyn ShardSource, window_ms: &Range<u64>) -> anyhow::Result<()> {
    let Some(from_ms) = source.retained_from_ms().await? else { return Ok(()) };
    let from = DateTime::from_timestamp_millis(from_ms).unwrap_or_default();
    let begins_ms = i64::try_from(window_ms.start).unwrap_or(i64::MAX);
    ensure!(
        begins_ms >= from_ms,
        "nothing was replaced: the stream has records from {} on, and rows of earlier records could not be \
         produced again; start the window there",
        from.to_rfc3339()
    );
    Ok(())
}

/// Checks that the live sink has passed the window. Otherwise the pipeline would write rows of the window after
/// the swap.
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
        // Records in a hole are never given to the sink, however far the shard has been read.
        let stands =
            stands.clone().max(holes.end_around(&key, live.name(), stands.as_ref()).await?);
        ensure!(
            stands.as_ref() >= Some(&last),
            "nothing was replaced: in shard {} the pipeline has not reached the end of the window ({last}) \
             and would write these rows again; let it run on first",
            key.shard
        );
    }
    Ok(())
}

fn say(report: &Report, console: &Console) {
    let Report { shadow, diff, dead_letters, .. } = report;
    console.say(format!(
        "{} rows are equal, {} are only in the live table, {} only in {shadow}; {dead_letters} dead letters",
        diff.same, diff.only_live, diff.only_shadow
    ));
    for row in &diff.samples_live {
        console.say(format!("- {row}"));
    }
    for row in &diff.samples_shadow {
        console.say(format!("+ {row}"));
    }
}
