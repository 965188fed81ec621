//! Changes of a running pipeline: another plugin for a stage, other files, and the way back.
//!
//! [`Swapper`] makes one change at a time: a `candidate` is fetched, checked, compiled and configured
//! off the path, a `trial` compares it with the incumbent, then the change is durable and each lane
//! takes it over at its next batch's boundary; `probation` watches it and may undo it. Up to the
//! promotion the incumbent serves, untouched, and an error says which step failed.

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

/// How long a candidate may run beside the incumbent at most before it takes over.
pub const SHADOW_MAX: Duration = Duration::from_secs(24 * 3_600);
/// How often a change that was prepared beside others is prepared again when one of them came first.
const TURNS_MAX: u32 = 5;
/// Why it is given up then.
const OTHERS_FIRST: &str = "other changes came first, again and again; try it again";

/// Where a candidate comes from.
#[derive(Clone, Debug)]
pub enum Component {
    /// Its bytes; the name is for messages.
    Bytes {
        /// The file, as its sender calls it.
        name: String,
        /// The component.
        bytes: Bytes,
    },
    /// One that ran before: the first digits of its digest.
    Kept(String),
}

/// A swap that is asked for.
#[derive(Clone, Debug)]
pub struct SwapRequest {
    /// The stage.
    pub stage: StageName,
    /// The candidate.
    pub component: Component,
    /// Of 100 partition keys, how many the candidate gets; `None`: all.
    pub canary_percent: Option<u8>,
    /// How long the candidate runs beside the incumbent before it takes over.
    pub shadow: Duration,
    /// What it must keep; what is not said here, the configuration says.
    pub gates: Gates,
    /// Try it and report; change nothing.
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
    /// The trial on records that came of late.
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

/// A change that was not made: what ran before runs on.
#[derive(Debug, thiserror::Error)]
#[error("refused at step {step}: {cause}; {runs_on}")]
pub struct ChangeRefused {
    /// The step that failed.
    pub step: Step,
    /// Why.
    pub cause: String,
    /// What runs on.
    pub runs_on: String,
    /// How the trial went, if it came so far.
    pub trial: Option<Box<TrialReport>>,
}

/// Why a step failed, before it is said what runs on.
struct StepFailed {
    step: Step,
    cause: String,
    trial: Option<Box<TrialReport>>,
}

impl Step {
    /// Says in the log that a change of the stage is at this step.
    fn begin(self, stage: &str) {
        tracing::debug!(step = %self, stage, "a change");
    }

    fn failed(self, cause: impl std::fmt::Display) -> StepFailed {
        StepFailed { step: self, cause: cause.to_string(), trial: None }
    }
}

/// A plugin in a stage, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Version {
    /// The plugin's name, as it says.
    pub plugin: String,
    /// Its version, as it says.
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
    /// What ran before.
    pub before: Version,
    /// What runs now.
    pub after: Version,
    /// Of 100 partition keys, how many the new version gets.
    pub percent: u8,
    /// The revision that runs now.
    #[serde(rename = "generation")]
    pub revision: String,
    /// How the trial went; `None`: there was none.
    pub trial: Option<TrialReport>,
    /// Why there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_trial: Option<String>,
    /// The lanes that have changed.
    pub lanes: Vec<LaneChange>,
    /// Those that have not yet, and why: they replay what the old version ran first, or wait for a sink.
    pub waiting: Vec<WaitingLane>,
    /// As in [`ReloadReport::may_be_undone`].
    pub may_be_undone: bool,
    /// How long it is watched, in seconds.
    pub probation_s: u64,
}

/// Changes one running pipeline; its clones share it.
#[derive(Clone)]
pub struct Swapper {
    inner: Arc<Inner>,
}

struct Inner {
    state: StateStore,
    changes: Changes,
    /// The stream that is read.
    stream: Arc<StreamIdentity>,
    /// Of plugins that the binary carries.
    embedded_plugin: fn(&Path) -> Option<&'static [u8]>,
    /// What runs. Locked while a change is made durable, and not while lanes take it over.
    setup: Mutex<Setup>,
    /// Makes the sinks that a configuration names.
    build_sinks: BuildSinks,
    /// To the supervisor: lanes are to be taken over anew.
    restarts: mpsc::Sender<LaneRestart>,
    /// Cancelled when the pipeline has ended: nothing is watched any more.
    ends: CancellationToken,
}

/// What runs, and what it was made of.
#[derive(Clone)]
struct Setup {
    shared: Arc<Shared>,
    config: Arc<PipelineConfig>,
    host: PluginHost,
    running: Running,
    /// Changes so far. What was prepared beside one number is not promoted under another.
    changes: u64,
}

/// What a [`Swapper`] is made with.
pub(crate) struct SwapperParts {
    /// The pipeline's state.
    pub(crate) state: StateStore,
    /// What the lanes share.
    pub(crate) shared: Arc<Shared>,
    /// The stream that is read.
    pub(crate) stream: Arc<StreamIdentity>,
    /// What plugins are loaded with.
    pub(crate) host: PluginHost,
    /// What runs in place of what the files describe.
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
    /// For a pipeline that is about to run.
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

    /// What was changed, and what was refused.
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

    /// Undoes the last change of a stage that is in force.
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
    /// A swap on one screen. Others may go on meanwhile, up to the promotion.
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

    /// Back to what ran before a change: the one with this number, or the stage's last that is in force.
    /// An error comes with what runs on.
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

    /// One try of it; `None`: another change came first.
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
            let cause = format!("stage {stage} has no swap that is in force");
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

    /// What runs now, with the stage as it was before a change.
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
            // The files have changed more than the component.
            (Some(own), Some(was)) if undone.kind == ChangeKind::Reload => {
                *own = was.clone();
                Ok(spec)
            }
            (Some(own), Some(was)) => {
                (own.digest, own.canary) = (was.digest.clone(), was.canary.clone());
                Ok(spec)
            }
            _ => Err(Step::Fetch.failed(format!("stage {stage} was not there before that swap"))),
        }
    }

    /// Notes a change that was refused, and says what runs on.
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
            None => format!("generation {} runs on", before.id),
        };
        if !dry_run {
            let (before, after) = (before.id.to_string(), String::new());
            let change = NewChange { kind, stage, before, after };
            let noted = self.changes.record_refused(change, format!("{step}: {cause}")).await;
            if let Err(error) = noted {
                tracing::warn!(%error, "a refused change is not noted");
            }
            metrics::counter!(metric::CHANGES_TOTAL, "outcome" => "refused").increment(1);
            tracing::warn!(%step, cause, "a change was refused");
        }
        ChangeRefused { step, cause, runs_on, trial }
    }
}
