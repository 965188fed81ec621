//! Changes of a running pipeline: another plugin for a stage, other files, and the way back.
//!
//! A change is prepared beside the running pipeline and takes effect in one durable step:
//!
//! 1. `candidate.rs` fetches, compiles, configures and checks the new version. Nothing that runs is touched.
//! 2. `trial.rs` runs it on recent records and compares its answers with the incumbent's.
//! 3. `promotion.rs` makes the change durable; each lane changes at its next batch boundary.
//! 4. `probation.rs` watches the new version and may roll it back.
//!
//! Several changes may be prepared at once, but they are promoted one at a time: `Setup` is locked for a
//! promotion, and a change that was prepared beside an older number of changes is prepared again, or put on top of
//! what runs now (`in_turn`). Up to the promotion an error means that nothing was changed, and it says which step
//! failed.

mod candidate;
mod probation;
mod promotion;
mod reload;
mod trial;
mod watch;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

pub(crate) use promotion::LaneRestart;
use promotion::{AnswerTime, Promotion};
pub use reload::{ReloadDiff, ReloadReport};
pub use trial::{ShownDifference, TrialReport};
pub use watch::watch_files;

use crate::lane::{BuildSinks, LaneChange, Shared, WaitingLane};
use crate::stage::{LoadedStage, Revision};
use shardmill_config::{Gates, PipelineConfig};
use shardmill_core::boxed;
use shardmill_core::metric;
use shardmill_core::record::Digest;
use shardmill_core::record::StageName;
use shardmill_core::record::StreamIdentity;
use shardmill_plugin::PluginHost;
use shardmill_state::{Change, ChangeKind, Changes, NewChange, Running, StateStore};

/// The longest time for which a candidate may run beside the incumbent before it takes its place.
pub const SHADOW_MAX: Duration = Duration::from_secs(24 * 3_600);
/// Attempts of a change that has to be prepared again because another change came first.
const TURNS_MAX: u32 = 5;
/// Cause of the refusal after that.
const OTHERS_FIRST: &str = "other changes came first several times; try again";

/// Source of a candidate.
#[derive(Clone, Debug)]
pub enum Component {
    /// Its bytes; the name is for messages.
    Bytes {
        /// Name of the file, as the sender gives it.
        name: String,
        /// The component.
        bytes: Bytes,
    },
    /// A component that ran before: the first digits of its digest.
    Kept(String),
}

/// A requested swap.
#[derive(Clone, Debug)]
pub struct SwapRequest {
    /// The stage.
    pub stage: StageName,
    /// The candidate.
    pub component: Component,
    /// Share of the partition keys that the candidate gets, in percent; `None`: all.
    pub canary_percent: Option<u8>,
    /// Time for which the candidate runs beside the incumbent before it takes its place.
    pub shadow: Duration,
    /// Limits that the candidate must keep; where they are unset, the configuration's apply.
    pub gates: Gates,
    /// Try the candidate and report, but change nothing.
    pub dry_run: bool,
}

/// A step of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The component, or the file.
    Fetch,
    /// The digest that the configuration pins.
    Pin,
    /// Compilation, and the component's world.
    Compile,
    /// Imports against grants, configuration, formats and columns against neighbours and tables.
    Check,
    /// The trial on recent records.
    Trial,
    /// The change itself.
    Promote,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fetch => "fetch",
            Self::Pin => "pin",
            Self::Compile => "compile",
            Self::Check => "check",
            Self::Trial => "trial",
            Self::Promote => "promote",
        })
    }
}

/// A change that was refused: what ran before goes on.
#[derive(Debug, thiserror::Error)]
#[error("refused at step {step}: {cause}; {runs_on}")]
pub struct ChangeRefused {
    /// The step that failed.
    pub step: Step,
    /// The cause.
    pub cause: String,
    /// The version or revision that goes on running.
    pub runs_on: String,
    /// Report of the trial, if there was one.
    pub trial: Option<Box<TrialReport>>,
}

/// Failure of a step, before it is known what goes on running.
struct StepFailed {
    step: Step,
    cause: String,
    trial: Option<Box<TrialReport>>,
}

impl Step {
    /// Logs that a change of the stage is at this step.
    fn begin(self, stage: &str) {
        tracing::debug!(step = %self, stage, "a change");
    }

    fn failed(self, cause: impl std::fmt::Display) -> StepFailed {
        StepFailed { step: self, cause: cause.to_string(), trial: None }
    }
}

/// Version of a plugin in a stage, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Version {
    /// The plugin's name, from its descriptor.
    pub plugin: String,
    /// Its version, from its descriptor.
    pub version: String,
    /// The digest of its component.
    pub digest: String,
}

impl Version {
    fn of(stage: &LoadedStage) -> Self {
        Self {
            plugin: stage.descriptor.name.clone(),
            version: stage.descriptor.version.clone(),
            digest: stage.plugin.digest.to_string(),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} ({})", self.plugin, self.version, &self.digest[..12])
    }
}

/// A change that was made.
#[derive(Debug, Serialize)]
pub struct SwapReport {
    /// Its number in the history; `None`: nothing was changed.
    pub number: Option<i64>,
    /// The stage.
    pub stage: String,
    /// The version that ran before.
    pub before: Version,
    /// The version that runs now.
    pub after: Version,
    /// Share of the partition keys that the new version gets, in percent.
    pub percent: u8,
    /// The revision that runs now.
    #[serde(rename = "generation")]
    pub revision: String,
    /// Report of the trial; `None`: there was none.
    pub trial: Option<TrialReport>,
    /// Why there was no trial.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_trial: Option<String>,
    /// The lanes that have changed.
    pub lanes: Vec<LaneChange>,
    /// Lanes that have not changed yet, and why: they replay what the old version ran first, or wait for a sink.
    pub waiting: Vec<WaitingLane>,
    /// The same as [`ReloadReport::may_be_undone`].
    pub may_be_undone: bool,
    /// Length of the probation, in seconds.
    pub probation_s: u64,
}

/// Changes one running pipeline. Clones share it.
#[derive(Clone)]
pub struct Swapper {
    inner: Arc<Inner>,
}

struct Inner {
    state: StateStore,
    changes: Changes,
    /// The stream that is read.
    stream: Arc<StreamIdentity>,
    /// Returns plugins that the binary carries.
    embedded_plugin: fn(&Path) -> Option<&'static [u8]>,
    /// The present setup. Locked while a change is made durable, but not while the lanes change.
    setup: Mutex<Setup>,
    /// Makes the sinks that a configuration names.
    build_sinks: BuildSinks,
    /// To the supervisor: lanes must restart.
    restarts: mpsc::Sender<LaneRestart>,
    /// Cancelled when the pipeline has ended, which ends every trial and probation.
    ends: CancellationToken,
}

/// The revision that runs, and what it was made of.
#[derive(Clone)]
struct Setup {
    shared: Arc<Shared>,
    config: Arc<PipelineConfig>,
    host: PluginHost,
    running: Running,
    /// Number of changes so far. A reload or a rollback that was prepared beside one number is not promoted under
    /// another; a swap may be, if its stage is the same (`promotion::in_turn`).
    changes: u64,
}

/// Parts that a [`Swapper`] is made of.
pub(crate) struct SwapperParts {
    /// The pipeline's state.
    pub(crate) state: StateStore,
    /// State and services that the lanes share.
    pub(crate) shared: Arc<Shared>,
    /// The stream that is read.
    pub(crate) stream: Arc<StreamIdentity>,
    /// Host that loads plugins.
    pub(crate) host: PluginHost,
    /// The specification that runs in place of the files' description.
    pub(crate) running: Running,
    /// Plugins that the binary carries, by path.
    pub(crate) embedded_plugin: fn(&Path) -> Option<&'static [u8]>,
    /// Makes sinks.
    pub(crate) build_sinks: BuildSinks,
    /// To the supervisor.
    pub(crate) restarts: mpsc::Sender<LaneRestart>,
    /// Cancelled when the pipeline has ended.
    pub(crate) ends: CancellationToken,
}

impl Swapper {
    /// Makes a swapper for a pipeline that is about to run.
    pub(crate) fn new(parts: SwapperParts) -> Self {
        let SwapperParts {
            state,
            shared,
            stream,
            host,
            running,
            embedded_plugin,
            build_sinks,
            restarts,
            ends,
        } = parts;
        let changes = Changes::new(state.clone());
        let config = Arc::new(shared.config.clone());
        let setup = Mutex::new(Setup { shared, config, host, running, changes: 0 });
        let inner =
            Inner { state, changes, stream, embedded_plugin, setup, build_sinks, restarts, ends };
        Self { inner: Arc::new(inner) }
    }

    /// Returns the history of changes, made and refused.
    pub fn changes(&self) -> &Changes {
        &self.inner.changes
    }

    /// Puts another plugin in a stage's place.
    ///
    /// # Errors
    /// [`ChangeRefused`]: nothing was changed.
    #[boxed]
    pub async fn swap(&self, request: SwapRequest) -> Result<SwapReport, ChangeRefused> {
        let setup = self.inner.setup.lock().await.clone();
        let kind = match request.canary_percent {
            Some(_) => ChangeKind::Canary,
            None => ChangeKind::Swap,
        };
        let before = setup.shared.revision();
        let made = self.inner.swap(&setup, &before, kind, &request).await;
        let probation = setup.config.reload.probation;
        match made {
            Ok(report) => {
                if report.number.is_some() {
                    self.begin_probation(&before, &report.stage, report.number, probation);
                }
                Ok(report)
            }
            Err(failed) => {
                let stage = request.stage.to_string();
                Err(self.inner.refused(kind, stage, &before, failed, request.dry_run).await)
            }
        }
    }

    /// Undoes a stage's last change that is in force.
    ///
    /// # Errors
    /// [`ChangeRefused`]: nothing was changed.
    #[boxed]
    pub async fn roll_back(
        &self,
        stage: &StageName,
        reason: &str,
    ) -> Result<SwapReport, ChangeRefused> {
        match self.inner.roll_back(stage, None, reason).await {
            Ok(report) => Ok(report),
            Err((before, failed)) => {
                let stage = stage.to_string();
                Err(self.inner.refused(ChangeKind::Rollback, stage, &before, failed, false).await)
            }
        }
    }
}

impl Inner {
    /// Makes a swap. The whole flow is on one screen. Other changes may be made meanwhile, up to the promotion.
    async fn swap(
        self: &Arc<Self>,
        setup: &Setup,
        before: &Arc<Revision>,
        kind: ChangeKind,
        request: &SwapRequest,
    ) -> Result<SwapReport, StepFailed> {
        let stage = request.stage.as_str();
        Step::Fetch.begin(stage);
        let incumbent = candidate::stage(before, &request.stage)?;
        let (name, bytes) = self.fetch(&request.component).await?;
        Step::Pin.begin(stage);
        let digest = Digest::of(&bytes);
        candidate::check_pin(&setup.config, &request.stage, &digest)?;
        Step::Compile.begin(stage);
        let plugin = candidate::compile(setup, &request.stage, &name, &bytes).await?;
        Step::Check.begin(stage);
        let spec =
            candidate::replaced(&before.spec, &request.stage, &digest, request.canary_percent);
        let next =
            candidate::load(setup, before, spec, [(digest.to_string(), plugin)].into()).await?;
        let next = Arc::new(next);
        let fresh = candidate::stage(&next, &request.stage)?;
        let tried = fresh.canary.as_ref().map_or(&fresh, |canary| &canary.stage);
        Step::Trial.begin(stage);
        let gates = request.gates.or(&setup.config.reload.gates);
        let (trial, no_trial) = candidate::try_out(
            &setup.shared,
            (&incumbent, tried),
            request.shadow,
            &gates,
            &self.ends,
        )
        .await?;
        let mut report = SwapReport {
            number: None,
            stage: request.stage.to_string(),
            before: Version::of(&incumbent),
            after: Version::of(tried),
            percent: request.canary_percent.unwrap_or(100),
            revision: next.id.to_string(),
            trial,
            no_trial,
            lanes: Vec::new(),
            waiting: Vec::new(),
            may_be_undone: false,
            probation_s: 0,
        };
        let change = NewChange {
            kind,
            stage: request.stage.to_string(),
            before: before.id.to_string(),
            after: next.id.to_string(),
        };
        if request.dry_run {
            self.rehearse_in_turn(before, &next, change).await.map_err(|mut failed| {
                failed.trial = report.trial.take().map(Box::new);
                failed
            })?;
            return Ok(report);
        }
        if next.id == before.id {
            return Ok(report);
        }
        let components = vec![(digest.to_string(), bytes)];
        let promoted = self.promote_in_turn(before, &next, components, change).await;
        let promoted = promoted.map_err(|mut failed| {
            failed.trial = report.trial.take().map(Box::new);
            failed
        })?;
        (report.number, report.revision) = (promoted.number, promoted.revision);
        (report.lanes, report.waiting) = (promoted.lanes, promoted.waiting);
        report.may_be_undone = promoted.may_be_undone;
        report.probation_s = setup.config.reload.probation.window.as_secs();
        Ok(report)
    }

    /// Goes back to what ran before a change: the one with this number, or the stage's last that is in force. An
    /// error carries the revision that goes on running.
    async fn roll_back(
        self: &Arc<Self>,
        stage: &StageName,
        number: Option<i64>,
        reason: &str,
    ) -> Result<SwapReport, (Arc<Revision>, StepFailed)> {
        for _ in 0..TURNS_MAX {
            let beside = self.setup.lock().await.clone();
            let before = beside.shared.revision();
            let made = self.roll_back_beside(&beside, stage, number, reason).await;
            if let Some(report) = made.map_err(|failed| (before, failed))? {
                return Ok(report);
            }
        }
        Err((self.setup.lock().await.shared.revision(), Step::Promote.failed(OTHERS_FIRST)))
    }

    /// Tries a rollback once; `None`: another change came first.
    async fn roll_back_beside(
        self: &Arc<Self>,
        beside: &Setup,
        stage: &StageName,
        number: Option<i64>,
        reason: &str,
    ) -> Result<Option<SwapReport>, StepFailed> {
        let before = &beside.shared.revision();
        let incumbent = candidate::stage(before, stage)?;
        let last = self.changes.last_in_force(stage.as_str()).await;
        let last = last.map_err(|error| Step::Fetch.failed(error))?;
        let Some(undone) = last.filter(|last| number.is_none_or(|number| number == last.number))
        else {
            let cause = format!("stage {stage} has no swap in force that could be rolled back");
            return Err(Step::Fetch.failed(cause));
        };
        let spec = self.spec_before(beside, before, stage, &undone).await?;
        candidate::check_bindings(&beside.config, &spec)?;
        let next = candidate::load(beside, before, spec, HashMap::new()).await?;
        let next = Arc::new(next);
        let change = NewChange {
            kind: ChangeKind::Rollback,
            stage: stage.to_string(),
            before: before.id.to_string(),
            after: next.id.to_string(),
        };
        let promotion = Promotion {
            next: next.clone(),
            components: Vec::new(),
            declared: beside.running.declared.clone(),
            change,
            undoes: Some((undone.number, reason.to_owned())),
            restart_with: None,
            files: None,
        };
        let setup = self.setup.lock().await;
        if setup.changes != beside.changes {
            return Ok(None);
        }
        let promoted = self.promote(setup, promotion, AnswerTime::begin()).await?;
        Ok(Some(SwapReport {
            number: promoted.number,
            stage: stage.to_string(),
            before: Version::of(incumbent.canary.as_ref().map_or(&incumbent, |one| &one.stage)),
            after: Version::of(&candidate::stage(&next, stage)?),
            percent: 100,
            revision: next.id.to_string(),
            trial: None,
            no_trial: None,
            lanes: promoted.lanes,
            waiting: promoted.waiting,
            may_be_undone: promoted.may_be_undone,
            probation_s: 0,
        }))
    }

    /// Returns the revision that runs now, with the stage as it was before a change.
    async fn spec_before(
        &self,
        setup: &Setup,
        current: &Revision,
        stage: &StageName,
        undone: &Change,
    ) -> Result<shardmill_state::RevisionSpec, StepFailed> {
        let was = setup.shared.ledger.spec(&undone.before).await;
        let was = was.map_err(|error| Step::Fetch.failed(error))?;
        let mut spec = current.spec.clone();
        let own = spec.stages.iter_mut().find(|own| own.name == *stage);
        match (own, was.stage(stage)) {
            // A reload may have changed more than the stage's component.
            (Some(own), Some(was)) if undone.kind == ChangeKind::Reload => {
                *own = was.clone();
                Ok(spec)
            }
            (Some(own), Some(was)) => {
                (own.digest, own.canary) = (was.digest.clone(), was.canary.clone());
                Ok(spec)
            }
            _ => Err(Step::Fetch.failed(format!("stage {stage} did not exist before that swap"))),
        }
    }

    /// Stores a refused change in the history, and says what goes on running.
    async fn refused(
        &self,
        kind: ChangeKind,
        stage: String,
        before: &Revision,
        failed: StepFailed,
        dry_run: bool,
    ) -> ChangeRefused {
        let StepFailed { step, cause, trial } = failed;
        let incumbent = before.stages.iter().find(|own| own.name.as_str() == stage);
        let runs_on = match incumbent {
            Some(incumbent) => format!("{} runs on in stage {stage}", Version::of(incumbent)),
            None => format!("revision {} runs on", before.id),
        };
        if !dry_run {
            let (before, after) = (before.id.to_string(), String::new());
            let change = NewChange { kind, stage, before, after };
            let noted = self.changes.record_refused(change, format!("{step}: {cause}")).await;
            if let Err(error) = noted {
                tracing::warn!(%error, "failed to store a refused change in the history");
            }
            metrics::counter!(metric::CHANGES_TOTAL, "outcome" => "refused").increment(1);
            tracing::warn!(%step, cause, "a change was refused");
        }
        ChangeRefused { step, cause, runs_on, trial }
    }
}
