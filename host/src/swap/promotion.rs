//! The change itself: durable first, then every lane at its next batch's boundary.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Inner, Setup, Step, StepFailed, candidate};
use crate::lane::{LaneChange, Shared};
use crate::plugin::Instance;
use crate::position::{NewChange, Running, StateError};
use crate::record::ShardId;
use crate::stage::{Components, Generation, GenerationSpec, LoadedStage};

/// How long a change waits for lanes that do not come to a batch's boundary. They change when they do.
const LANES_CHANGE_MAX: Duration = Duration::from_secs(10);

/// Lanes are to be let go and taken over anew, by what is described here.
pub struct TakeOver {
    /// What they share from then on.
    pub shared: Arc<Shared>,
    /// Told when the lanes begin anew, or why they go on as before.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// A change that is proven.
pub(super) struct Promotion {
    /// What is to run.
    pub(super) next: Arc<Generation>,
    /// Bytes of its components, those that may not be stored yet.
    pub(super) components: Components,
    /// What the files describe.
    pub(super) declared: GenerationSpec,
    /// For the history.
    pub(super) change: NewChange,
    /// A change that is undone by it, and why.
    pub(super) undoes: Option<(i64, String)>,
    /// What lanes share from then on, if they must be taken over anew.
    pub(super) taken_over: Option<Arc<Shared>>,
}

/// What became of a promotion.
pub(super) struct Promoted {
    /// Its number in the history.
    pub(super) number: Option<i64>,
    /// The generation that runs now.
    pub(super) generation: String,
    /// Lanes that have changed.
    pub(super) lanes: Vec<LaneChange>,
    /// Lanes that have not yet.
    pub(super) waiting: Vec<ShardId>,
}

impl Inner {
    /// Promotes what was proven beside `before`. Other stages may have been changed since; this one not.
    pub(super) async fn promote_in_turn(
        &self,
        before: &Generation,
        next: &Arc<Generation>,
        components: Components,
        mut change: NewChange,
    ) -> Result<Promoted, StepFailed> {
        let mut setup = self.setup.lock().await;
        let current = setup.shared.generation();
        let mut next = next.clone();
        if current.id != before.id {
            let stage = change.stage.as_str().into();
            let own = |generation: &Generation| generation.spec.stage(&stage).cloned();
            let (Some(proven), true) = (own(&next), own(&current) == own(before)) else {
                let cause = format!("another change of stage {stage} came first; try it again");
                return Err(Step::Promote.failed(cause));
            };
            let mut spec = current.spec.clone();
            let mut stages = spec.stages.iter_mut();
            if let Some(own) = stages.find(|own| own.name == stage) {
                *own = proven;
            }
            next = Arc::new(candidate::load(&setup, &current, spec, next.plugins()).await?);
            (change.before, change.after) = (current.id.to_string(), next.id.to_string());
        }
        let declared = setup.running.declared.clone();
        let promotion =
            Promotion { next, components, declared, change, undoes: None, taken_over: None };
        self.promote(&mut setup, promotion).await
    }

    /// Makes a change durable and lets the lanes take it over.
    pub(super) async fn promote(
        &self,
        setup: &mut Setup,
        promotion: Promotion,
    ) -> Result<Promoted, StepFailed> {
        let Promotion { next, components, declared, change, undoes, mut taken_over } = promotion;
        Step::Promote.begin(&change.stage);
        let failed = |error: StateError| Step::Promote.failed(error);
        let before = setup.shared.generation();
        let sinks = taken_over.as_ref().map_or(&setup.shared.sinks, |shared| &shared.sinks);
        candidate::check_tables(&setup.shared, sinks, &before, &next).await?;
        let routes = |generation: &Generation| {
            let sinks = setup.shared.sinks.iter();
            sinks.map(|sink| generation.routes_to(sink.name())).collect::<Vec<_>>()
        };
        // Sinks hold what they know of the rows that come: where others come, they are taken over anew.
        if taken_over.is_none() && routes(&before) != routes(&next) {
            taken_over = Some(Arc::new(setup.shared.with_generation(next.clone())));
        }
        if taken_over.is_some() {
            start_everywhere(&setup.shared, &next).await?;
        }
        setup.shared.ledger.keep(&next.spec, components).await.map_err(failed)?;
        tracing::debug!(generation = %next.id, "its components are kept");
        let running = Running { declared, running: next.spec.clone() };
        let number = self.changes.promote(&running, Some(change), undoes).await.map_err(failed)?;
        tracing::debug!(generation = %next.id, number, "it is noted; the lanes change");
        let was = std::mem::replace(&mut setup.running, running);
        let done = match taken_over {
            None => {
                setup.shared.current.send_replace(next.clone());
                Ok(())
            }
            Some(shared) => {
                let done = self.take_over(shared.clone()).await;
                if done.is_ok() {
                    setup.shared = shared;
                }
                done
            }
        };
        let changed = match done {
            Ok(()) => setup.shared.board.changed_to(&next.id, LANES_CHANGE_MAX).await,
            Err(cause) => Err(cause),
        };
        let (lanes, waiting) = match changed {
            Ok(changed) => changed,
            Err(cause) => {
                self.take_back(setup, &before, was, number, &cause).await;
                return Err(Step::Promote.failed(cause));
            }
        };
        tracing::debug!(generation = %next.id, lanes = lanes.len(), "the lanes have changed");
        metrics::counter!("shardmill_changes_total", "outcome" => "promoted").increment(1);
        if let Err(error) = setup.shared.ledger.prune(&next.spec).await {
            tracing::warn!(%error, "components that are not needed any more stay");
        }
        Ok(Promoted { number, generation: next.id.to_string(), lanes, waiting })
    }

    /// Lets the lanes go and takes them over anew.
    async fn take_over(&self, shared: Arc<Shared>) -> Result<(), String> {
        let (done, told) = oneshot::channel();
        let stopped = || "the pipeline has stopped".to_owned();
        self.take_overs.send(TakeOver { shared, done }).await.map_err(|_| stopped())?;
        told.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Every lane back to what ran before: one of them could not change.
    async fn take_back(
        &self,
        setup: &mut Setup,
        before: &Arc<Generation>,
        was: Running,
        number: Option<i64>,
        cause: &str,
    ) {
        let undoes = number.map(|number| (number, cause.to_owned()));
        if let Err(error) = self.changes.promote(&was, None, undoes).await {
            tracing::error!(%error, "the next start runs what was refused just now");
        }
        setup.running = was;
        setup.shared.current.send_replace(before.clone());
        // Lanes that do not start the one before either say so themselves.
        let _ = setup.shared.board.changed_to(&before.id, LANES_CHANGE_MAX).await;
    }
}

/// Starts instances for each shard that is read, and lets them go: a lane that is taken over anew with a
/// generation that does not start would stop the pipeline.
async fn start_everywhere(shared: &Arc<Shared>, next: &Arc<Generation>) -> Result<(), StepFailed> {
    let shards = shared.board.snapshot().into_iter().filter(|(_, status)| status.running);
    let shards: Vec<ShardId> = shards.map(|(shard, _)| shard).collect();
    let (shared, next) = (shared.clone(), next.clone());
    candidate::blocking(Step::Promote, move || {
        let stream = shared.config.source.stream_name();
        for shard in shards {
            for stage in &next.stages {
                let canary = stage.canary.as_ref().map(|canary| &canary.stage);
                for version in [stage].into_iter().chain(canary) {
                    let context = version.context(&stream, shard.as_str());
                    let LoadedStage { plugin, limits, services, .. } = version;
                    Instance::start(plugin, limits, &context, services)
                        .map_err(|error| format!("it does not start in shard {shard}: {error}"))?;
                }
            }
        }
        Ok::<(), String>(())
    })
    .await
}
