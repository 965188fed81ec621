//! Capabilities: what a plugin may call in the host if its stage grants it (`wit/0.1.0/capabilities.wit`).
//!
//! [`Services`] is what one stage grants. The stage's instances share it, together with how much of the shared
//! limits they have used. [`imports`] bounds the arguments of each call before they are copied; [`calls`] answers.
//!
//! There are two checks. A component that imports something that is not granted is refused when it is loaded; each
//! call checks the grant once more ([`HostCaller::granted`]).

mod calls;
mod imports;
mod log;
pub mod lookup;
mod metric;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::runtime::Handle;

use self::log::LineBudget;
use self::lookup::{Lookup, LookupError};
use self::metric::StageMetrics;
use shardmill_config::{Capability, Grants, PipelineConfig, Values};
use shardmill_core::boxed;
use shardmill_core::record::{LookupName, StageName};
use shardmill_net::HttpGrant;

pub(super) use calls::HostCaller;
pub(super) use imports::offer;

/// State of a sandbox, as far as its plugin's calls of the host need it.
pub(crate) trait HasCaller: Send + 'static {
    /// Returns the caller, for reading.
    fn caller(&self) -> &HostCaller;
    /// Returns the caller.
    fn caller_mut(&mut self) -> &mut HostCaller;
}
pub use log::LOG_TARGET;
pub use metric::count_values_by;

/// The grants of one stage to its plugin. Shared by its instances.
#[derive(Clone, Debug)]
pub struct Services {
    /// The stage's name, for the log and metrics.
    pub stage: StageName,
    /// The granted capabilities.
    pub granted: BTreeSet<Capability>,
    /// The granted reference tables.
    pub lookups: BTreeMap<LookupName, Arc<Lookup>>,
    /// The granted hosts.
    pub http: Option<Arc<HttpGrant>>,
    /// Values of variables in the stage's configuration and in the pipeline's file. Nothing that the plugin says
    /// may show them: it may even get them from a server that repeats what it was sent.
    pub values: Values,
    /// The use of the shared limits by the stage's instances.
    used: Arc<StageUse>,
}

/// Limits that the instances of one stage share, within one revision. An instance is renewed after each trap, so
/// limits per instance would start again with each trap.
#[derive(Debug)]
struct StageUse {
    stage: StageName,
    lines: LineBudget,
    metrics: StageMetrics,
}

impl StageUse {
    fn new(stage: StageName) -> Arc<Self> {
        Arc::new(Self { stage, lines: LineBudget::default(), metrics: StageMetrics::default() })
    }
}

impl Drop for StageUse {
    fn drop(&mut self) {
        self.lines.end(&self.stage);
    }
}

impl Services {
    /// Creates the services of a plugin outside of any pipeline: the capabilities that need only the host itself.
    pub fn alone(name: StageName) -> Self {
        let granted = [Capability::Log, Capability::Metrics, Capability::Clock, Capability::Random];
        let used = StageUse::new(name.clone());
        let (lookups, values) = (BTreeMap::new(), Values::default());
        Self { stage: name, granted: granted.into(), lookups, http: None, values, used }
    }
}

/// The sources from which the capabilities of all stages answer.
#[derive(Clone, Debug, Default)]
pub struct Backends {
    lookups: BTreeMap<LookupName, Arc<Lookup>>,
    http: BTreeMap<StageName, Arc<HttpGrant>>,
    values: Values,
}

impl Backends {
    /// Creates them from the configuration. Nothing is connected yet; connections will live on `runtime`.
    ///
    /// # Errors
    /// The first lookup or grant that is invalid.
    pub fn from_config(config: &PipelineConfig, runtime: &Handle) -> anyhow::Result<Self> {
        let mut backends = Self { values: config.values.clone(), ..Self::default() };
        for lookup in &config.lookups {
            let table = Lookup::new(lookup, runtime.clone())?;
            backends.lookups.insert(lookup.name.value.clone(), Arc::new(table));
        }
        for stage in config.stages.iter().filter(|stage| !stage.http_hosts.is_empty()) {
            let grant = HttpGrant::new(&stage.http_hosts, runtime.clone())?;
            backends.http.insert(stage.name.value.clone(), Arc::new(grant));
        }
        Ok(backends)
    }

    /// Checks that every lookup can be reached and its query can run.
    ///
    /// # Errors
    /// The first that cannot, with what to do about it.
    #[boxed]
    pub async fn prepare(&self) -> anyhow::Result<()> {
        for lookup in self.lookups.values() {
            let prepared = lookup.prepare().await;
            prepared.map_err(|error| LookupError {
                message: self.values.hide(error.message),
                ..error
            })?;
        }
        Ok(())
    }

    /// Selects what one stage is granted.
    ///
    /// # Errors
    /// A granted lookup that is not configured, in words.
    pub fn services(&self, stage: &StageName, grants: &Grants) -> Result<Services, String> {
        let mut lookups = BTreeMap::new();
        for name in &grants.lookups {
            let Some(lookup) = self.lookups.get(name) else {
                return Err(format!(
                    "stage {stage} is granted the lookup `{name}`, which is not configured"
                ));
            };
            lookups.insert(name.clone(), lookup.clone());
        }
        Ok(Services {
            stage: stage.clone(),
            granted: grants.capabilities.clone(),
            lookups,
            http: self.http.get(stage).cloned(),
            values: self.values.clone(),
            used: StageUse::new(stage.clone()),
        })
    }
}
