//! What a plugin may ask of the host, if its stage grants it: `wit/0.1.0/capabilities.wit`.
//!
//! [`Services`] is what one stage grants, shared by the stage's instances, with what they have used of it
//! together. What an instance asks is answered in [`calls`]; [`imports`] bounds its arguments first.

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

/// The state of a sandbox, as far as calls of its plugin need it.
pub(crate) trait HasCaller: Send + 'static {
    /// The one that calls, to look at.
    fn caller(&self) -> &HostCaller;
    /// The one that calls.
    fn caller_mut(&mut self) -> &mut HostCaller;
}
pub use log::LOG_TARGET;
pub use metric::count_values_by;

/// What one stage grants its plugin; shared by its instances.
#[derive(Clone, Debug)]
pub struct Services {
    /// The stage, as the log and the metrics call it.
    pub stage: StageName,
    /// What is granted.
    pub granted: BTreeSet<Capability>,
    /// The reference tables that are granted.
    pub lookups: BTreeMap<LookupName, Arc<Lookup>>,
    /// The hosts that are granted.
    pub http: Option<Arc<HttpGrant>>,
    /// Values of variables in its configuration and in the pipeline's file: nothing that the plugin says may show
    /// them. It may have them from a server that repeats what it was sent.
    pub values: Values,
    /// The use that the stage's instances have made of their shared limits.
    used: Arc<StageUse>,
}

/// Limits that the instances of one stage, in one revision, share. An instance is renewed after each trap:
/// limits of its own would begin again with each.
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
    /// For a plugin outside of any pipeline: what needs nothing but the host itself.
    pub fn alone(name: StageName) -> Self {
        let granted = [Capability::Log, Capability::Metrics, Capability::Clock, Capability::Random];
        let used = StageUse::new(name.clone());
        let (lookups, values) = (BTreeMap::new(), Values::default());
        Self { stage: name, granted: granted.into(), lookups, http: None, values, used }
    }
}

/// What the capabilities of a pipeline's stages answer from.
#[derive(Clone, Debug, Default)]
pub struct Backends {
    lookups: BTreeMap<LookupName, Arc<Lookup>>,
    http: BTreeMap<StageName, Arc<HttpGrant>>,
    values: Values,
}

impl Backends {
    /// As configured. Nothing is connected yet; connections will live on `runtime`.
    ///
    /// # Errors
    /// A lookup's or a grant's that cannot be.
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

    /// Proves that every lookup can be reached and its query can run.
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

    /// What one stage gets of it.
    ///
    /// # Errors
    /// A lookup that is granted and not there, in words.
    pub fn services(&self, stage: &StageName, grants: &Grants) -> Result<Services, String> {
        let mut lookups = BTreeMap::new();
        for name in &grants.lookups {
            let Some(lookup) = self.lookups.get(name) else {
                return Err(format!(
                    "stage {stage} is granted lookup `{name}`, which is not there"
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
