//! One run of a pipeline: the pipeline, the copy of its dead letters beside it, and the end of both.
//!
//! `shardmill run` and programs that embed the engine both start here. What they have beside it (ports, signals) is
//! theirs.

use std::sync::Arc;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::dead_letter_log::DeadLetterLogSource;
use crate::lane::StatusRegistry;
use crate::lock::PipelineLock;
use crate::supervisor::{RunOptions, Supervisor};
use shardmill_config::PipelineConfig;
use shardmill_core::boxed;
use shardmill_core::source::ShardSource;
use shardmill_core::stop::Stop;
use shardmill_plugin::PluginHost;
use shardmill_state::{DeadLetters, StoredDeadLetter};

/// Makes the host that loads a pipeline's plugins.
pub type MakeHost = fn(&PipelineConfig) -> anyhow::Result<PluginHost>;

/// A pipeline that is validated and owns its state, ready to run.
pub struct Run {
    pipeline: Supervisor,
    /// Copies its dead letters to the sinks under `[dead_letters]`.
    copies: Option<Supervisor>,
    /// Cancelled when the pipeline has ended: no dead letter is written afterwards.
    no_more_dead_letters: CancellationToken,
}

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RunSummary {
    /// Records handed to the sinks.
    pub records: u64,
    /// Of these, records that were read again because only some sinks had them.
    pub replayed: u64,
    /// Dead letters in the store.
    pub dead_letters: u64,
}

impl RunSummary {
    /// Counts the work of a pipeline's lanes, and the dead letters.
    ///
    /// # Errors
    /// When the dead letters cannot be read.
    pub async fn of(statuses: &StatusRegistry, dead_letters: &DeadLetters) -> anyhow::Result<Self> {
        let shards = statuses.snapshot();
        Ok(Self {
            records: shards.values().map(|status| status.records_read).sum(),
            replayed: shards.values().map(|status| status.records_replayed).sum(),
            dead_letters: dead_letters.count().await?,
        })
    }
}

/// Validates one pipeline under its lock, with the sinks that `options` makes.
///
/// # Errors
/// As [`Supervisor::prepare`], and when a sink or the plugins' host cannot be made.
pub async fn prepare(
    lock: PipelineLock,
    config: PipelineConfig,
    source: Arc<dyn ShardSource>,
    host: MakeHost,
    options: RunOptions,
) -> anyhow::Result<Supervisor> {
    let sinks = (options.build_sinks)(&config)?;
    let host = host(&config)?;
    Supervisor::prepare_under(lock, config, host, source, sinks, options).await
}

impl Run {
    /// Validates a pipeline under its lock, and what copies its dead letters. Reads no record.
    ///
    /// # Errors
    /// As [`prepare`].
    #[boxed]
    pub async fn prepare(
        lock: PipelineLock,
        config: PipelineConfig,
        source: Arc<dyn ShardSource>,
        host: MakeHost,
        options: RunOptions,
    ) -> anyhow::Result<Self> {
        // The copies end after the pipeline, with the last dead letter.
        let copied = RunOptions { until_caught_up: false, ..options.clone() };
        let pipeline = prepare(lock, config.clone(), source, host, options).await?;
        let no_more_dead_letters = CancellationToken::new();
        let copies =
            prepare_copies(&config, &pipeline, no_more_dead_letters.clone(), host, copied).await?;
        Ok(Self { pipeline, copies, no_more_dead_letters })
    }

    /// The pipeline itself.
    pub fn pipeline(&self) -> &Supervisor {
        &self.pipeline
    }

    /// Returns the status of the pipeline's lanes, and of those that copy its dead letters.
    pub fn registries(&self) -> Vec<StatusRegistry> {
        [&self.pipeline].into_iter().chain(&self.copies).map(Supervisor::statuses).collect()
    }

    /// Runs until a stop is asked for, or the pipeline ends by itself. When the pipeline or the copy fails, the
    /// other is drained within the same time.
    ///
    /// # Errors
    /// As [`Supervisor::run`].
    #[boxed]
    pub async fn run(self, stop: &Stop) -> anyhow::Result<()> {
        let run = async |supervisor: Supervisor| {
            let ran = supervisor.run_until(stop.clone()).await;
            if ran.is_err() {
                stop.ask();
            }
            ran
        };
        let pipeline = async {
            let ran = run(self.pipeline).await;
            self.no_more_dead_letters.cancel();
            ran
        };
        let copies = async {
            match self.copies {
                Some(copies) => run(copies).await,
                None => Ok(()),
            }
        };
        let (ran, copied) = tokio::join!(pipeline, copies);
        ran.and(copied)
    }
}

/// Makes the pipeline that copies dead letters to the sinks under `[dead_letters]`, if there are any.
async fn prepare_copies(
    config: &PipelineConfig,
    pipeline: &Supervisor,
    no_more_dead_letters: CancellationToken,
    host: MakeHost,
    options: RunOptions,
) -> anyhow::Result<Option<Supervisor>> {
    let folder = pipeline.folder().join("letters");
    let Some(config) = config.for_dead_letters(folder, StoredDeadLetter::columns()) else {
        return Ok(None);
    };
    let (dead_letters, name, limits) =
        (pipeline.dead_letters(), config.name.clone(), config.source.batch);
    let source =
        Arc::new(DeadLetterLogSource::new(dead_letters, name, limits, no_more_dead_letters));
    let lock = PipelineLock::take(&config.state_dir, &config.name)?;
    let copies = prepare(lock, config, source, host, options).await?;
    copies.dead_letters().leave_metrics();
    Ok(Some(copies))
}
