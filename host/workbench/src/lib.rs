//! Tools for a plugin outside any pipeline: test cases, a conformance suite, and benchmarks.
//!
//! [`Workbench`] loads a plugin. A [`PluginTrial`] is one instance of it that processes records and reports the fate
//! of each. `shardmill test` compares the fates with [`case`]s, `plugin conformance` checks the contract, and
//! `plugin bench` measures. The instance is a stage's: same limits, same checks.
//!
//! [`scaffold`] makes a plugin's project, and [`mod@build`] builds its component. Input is a folder or a
//! component; output is a project, a component or a report. The crate reads no stream and writes to no sink. It
//! uses `engine` and `plugin`, so that a plugin is tested by the code that runs it. Its heavy dependencies are
//! the tools for components.

mod assets;
pub mod bench;
pub mod build;
pub mod capture;
pub mod case;
pub mod compare;
pub mod conformance;
pub mod junit;
pub mod manifest;
pub mod redact;
pub mod scaffold;
pub mod update;

use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use shardmill_config::{RejectedMax, StageLimits};
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill_engine::stage::{Fate, Flow, LoadedStage, RunError, StageRunner, fates, first_flow};
use shardmill_plugin::{CallError, Plugin};

/// Name of the shard that plugins see.
const SHARD: &str = "shardId-000000000000";

/// A loaded plugin.
#[derive(Clone)]
pub struct Workbench {
    plugin: Plugin,
}

/// A record to try a plugin on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrialRecord {
    /// Partition key.
    pub key: Bytes,
    /// Payload.
    pub payload: Bytes,
    /// Sequence number.
    pub sequence: SequenceNumber,
    /// Arrival time in milliseconds since 1970.
    pub arrived_ms: u64,
}

impl TrialRecord {
    /// Makes a record from a payload: record number `index` of its shard.
    pub fn new(index: usize, payload: impl Into<Bytes>) -> Self {
        Self {
            key: Bytes::from_static(b"key"),
            payload: payload.into(),
            // Any number works. Those of Kinesis have 56 digits.
            sequence: SequenceNumber::from(index as u64 + 1),
            arrived_ms: 1_700_000_000_000 + index as u64,
        }
    }
}

/// Reason why a trial has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrialError {
    /// The plugin refuses its configuration, or does not start.
    #[error("{0}")]
    Configure(CallError),
    /// The whole batch failed.
    #[error("the batch failed: {0}")]
    Batch(String),
}

impl Workbench {
    /// Makes a workbench for a loaded plugin.
    pub fn new(plugin: Plugin) -> Self {
        Self { plugin }
    }

    /// Returns the plugin.
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// Starts a fresh instance with a configuration.
    ///
    /// # Errors
    /// [`TrialError::Configure`].
    pub fn start(&self, config_json: &str) -> Result<PluginTrial, TrialError> {
        self.start_within(config_json, StageLimits::default())
    }

    /// Starts a fresh instance with a configuration and its own limits.
    ///
    /// # Errors
    /// [`TrialError::Configure`].
    pub(crate) fn start_within(
        &self,
        config_json: &str,
        limits: StageLimits,
    ) -> Result<PluginTrial, TrialError> {
        let mut stage = LoadedStage::alone(self.plugin.clone(), config_json, "trial")
            .map_err(TrialError::Configure)?;
        stage.limits = StageLimits { retry_ms_max: 0, ..limits };
        let context = stage.context("trial", SHARD);
        // The limit of rejected records is off, because records are only tried.
        let rejected_max = RejectedMax::NONE;
        let runner = StageRunner::start(stage, context, rejected_max, CancellationToken::new())
            .map_err(TrialError::Configure)?;
        Ok(PluginTrial { runner })
    }
}

/// A configured instance.
pub struct PluginTrial {
    runner: StageRunner,
}

impl PluginTrial {
    /// Returns the loaded stage with the plugin's descriptor.
    pub fn stage(&self) -> &LoadedStage {
        self.runner.stage()
    }

    /// Returns the linear memory of the instance, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.runner.memory_bytes()
    }

    /// Runs records as one batch and returns the fate of each.
    ///
    /// # Errors
    /// [`TrialError`] if no record of the batch has a result.
    pub fn run(&mut self, records: &[TrialRecord]) -> Result<Vec<Fate>, TrialError> {
        let Some(batch) = batch(records) else { return Ok(Vec::new()) };
        let flow = first_flow(&batch);
        let mut fates_of_all = Vec::with_capacity(flow.len());
        while let rest @ [_, ..] = &flow[fates_of_all.len()..] {
            let (first, outcome) =
                self.runner.run_first(&batch, rest).map_err(|error| match error {
                    RunError::AllFailed(reason)
                    | RunError::TooManyFailed(reason)
                    | RunError::Starved(reason)
                    | RunError::Later(reason, _) => TrialError::Batch(reason),
                    RunError::NoInstance(error) => TrialError::Configure(error),
                    RunError::Stopped(_) => TrialError::Batch("stopped".into()),
                    RunError::TooMuch(_) => {
                        TrialError::Batch("the outputs exceed the limit of one batch".into())
                    }
                })?;
            fates_of_all.extend(fates(self.runner.stage(), first.len(), outcome));
        }
        Ok(fates_of_all)
    }

    /// Runs records as one call, without a search for a culprit if it fails.
    ///
    /// # Errors
    /// [`TrialError::Batch`].
    pub fn run_once(&mut self, records: &[TrialRecord]) -> Result<Vec<Fate>, TrialError> {
        let Some(batch) = batch(records) else { return Ok(Vec::new()) };
        let outcome =
            self.runner.run_once(&batch, &first_flow(&batch)).map_err(TrialError::Batch)?;
        Ok(fates(self.runner.stage(), records.len(), outcome))
    }

    /// Makes a call without records, which a lane never does. The plugin must return nothing, or an error.
    pub(crate) fn call_without_records(&mut self) -> Result<(), String> {
        let Some(mut batch) = batch(&[TrialRecord::new(0, "")]) else { return Ok(()) };
        batch.records.clear();
        match self.runner.run_once(&batch, &[]) {
            Ok(_) => Ok(()),
            Err(_) if self.runner.memory_bytes() > 0 => Ok(()), // The instance is alive: it returned an error.
            Err(reason) => Err(reason),
        }
    }

    /// Prepares a call with these records that can be repeated.
    pub(crate) fn prepared(&mut self, records: &[TrialRecord]) -> PreparedCall<'_> {
        let batch = batch(records);
        let flow = batch.as_ref().map(first_flow).unwrap_or_default();
        PreparedCall { trial: self, batch, flow }
    }
}

/// A call to be measured: only the call itself is repeated.
pub(crate) struct PreparedCall<'t> {
    trial: &'t mut PluginTrial,
    batch: Option<Batch>,
    flow: Flow,
}

impl PreparedCall<'_> {
    /// Calls once.
    pub fn run(&mut self) -> Result<(), TrialError> {
        let Some(batch) = &self.batch else { return Ok(()) };
        let outcome = self.trial.runner.run_once(batch, &self.flow).map_err(TrialError::Batch)?;
        outcome.outputs().for_each(|output| drop(std::hint::black_box(output)));
        Ok(())
    }
}

/// Makes a batch of a shard from the records; `None` if there are none.
pub(crate) fn batch(records: &[TrialRecord]) -> Option<Batch> {
    let position =
        |record: &TrialRecord| Position { sequence: record.sequence.clone(), sub_sequence: 0 };
    let stream = StreamIdentity { name: "trial".into(), arn: "trial".into(), created_ms: 0 };
    let to_inclusive = position(records.last()?);
    let records = records.iter().map(|record| Record {
        position: position(record),
        partition_key: record.key.clone(),
        payload: record.payload.clone(),
        arrived_ms: record.arrived_ms,
    });
    Some(Batch {
        shard: ShardKey { pipeline: "trial".into(), stream: Arc::new(stream), shard: SHARD.into() },
        records: records.collect(),
        range: PositionRange { from_exclusive: None, to_inclusive },
        entry: Entry::Source,
    })
}
