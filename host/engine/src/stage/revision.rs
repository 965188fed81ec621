//! A loaded revision: everything that decides what a record becomes.
//!
//! A revision is stages, component digests, configurations and bindings. A replay runs the revision that ran first,
//! so its specification (`spec.rs`) and its components' bytes are stored until no replay, no undo and no redrive can
//! need them (see [`shardmill_state`]). `fit.rs` checks that its stages fit each other.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::endless::Endless;
use super::fit::{Misfit, StagePlace};
use super::health::HealthCounts;
use shardmill_config::{ConfigError, PipelineConfig, StageLimits};
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::{BoundRoute, Column};
use shardmill_core::record::{RouteName, SinkName, StageName};
use shardmill_plugin::{
    CallError, Context, Descriptor, Instance, Plugin, PluginHost, Route, Services,
};
use shardmill_state::{CanarySpec, Components, RevisionSpec, StageSpec};

/// Route by which records leave the source.
pub(super) const SOURCE_ROUTE: &str = "source";

/// Destination of the outputs of one route of one stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteTarget {
    /// These sinks; an empty list drops the outputs, on purpose.
    Sinks(Vec<SinkName>),
    /// The next stage, as its upstream route of this index.
    Next(u32),
}

/// A stage with its plugin, validated against its neighbours.
#[derive(Clone)]
pub struct LoadedStage {
    /// Its name.
    pub name: StageName,
    /// Its compiled plugin.
    pub plugin: Plugin,
    /// The plugin's description of itself under this configuration.
    pub descriptor: Arc<Descriptor>,
    /// Its limits.
    pub limits: StageLimits,
    /// Services of the host that the plugin may use.
    pub services: Arc<Services>,
    /// Its configuration as JSON text, with the current values of its variables.
    pub config_json: Arc<str>,
    /// The routes that enter it.
    pub upstream: Arc<[Route]>,
    /// The names of the declared routes, by index.
    pub route_names: Arc<[RouteName]>,
    /// Destination of each declared route, by the route's index.
    pub targets: Arc<[RouteTarget]>,
    /// Health of its plugin.
    pub health: Arc<HealthCounts>,
    /// Its records that ran out of time.
    pub endless: Arc<Endless>,
    /// Another version, which gets some of the partition keys.
    pub canary: Option<Arc<Canary>>,
}

/// A version of a stage that gets a share of the partition keys.
pub struct Canary {
    /// The share of the keys.
    pub spec: CanarySpec,
    /// The stage with that version.
    pub stage: LoadedStage,
}

impl LoadedStage {
    /// Loads a stage outside of any pipeline, with the default limits: it accepts records of any format, and its
    /// routes lead nowhere. Retryable failures are not retried. Blocks.
    ///
    /// # Errors
    /// The plugin's error about its configuration.
    pub fn alone(plugin: Plugin, config_json: &str, stream_name: &str) -> Result<Self, CallError> {
        let upstream: Arc<[Route]> = [source_route(None)].into();
        let limits = StageLimits { retry_ms_max: 0, ..StageLimits::default() };
        let context = context(stream_name, "", config_json, &upstream);
        let services = Arc::new(Services::alone(stream_name.into()));
        let (_, descriptor) = Instance::start(&plugin, &limits, &context, &services)?;
        let routes = descriptor.routes.iter();
        Ok(Self {
            name: descriptor.name.as_str().into(),
            plugin,
            route_names: routes.clone().map(|route| route.name.as_str().into()).collect(),
            targets: routes.map(|_| RouteTarget::Sinks(Vec::new())).collect(),
            descriptor: descriptor.into(),
            limits,
            services,
            config_json: config_json.into(),
            upstream,
            health: Arc::default(),
            endless: Arc::default(),
            canary: None,
        })
    }

    /// Returns the context of an instance for a shard.
    pub fn context(&self, stream_name: &str, shard_id: &str) -> Context {
        context(stream_name, shard_id, &self.config_json, &self.upstream)
    }

    /// Starts an instance, as each lane does.
    ///
    /// # Errors
    /// [`CallError`] where the plugin does not start, or declares other routes than when it was loaded.
    pub(crate) fn start(&self, context: &Context) -> Result<Instance, CallError> {
        let (instance, descriptor) =
            Instance::start(&self.plugin, &self.limits, context, &self.services)?;
        if !self.same_routes(&descriptor) {
            return Err(CallError::contract(
                "configure declares other routes than when the pipeline was loaded",
            ));
        }
        Ok(instance)
    }

    /// Whether another instance declares the same routes.
    pub(super) fn same_routes(&self, other: &Descriptor) -> bool {
        self.descriptor.routes.len() == other.routes.len()
            && self
                .descriptor
                .routes
                .iter()
                .zip(&other.routes)
                .all(|(one, two)| one.name == two.name && one.format == two.format)
    }
}

/// A loaded revision: what lanes run.
pub struct Revision {
    /// Its id.
    pub id: Arc<str>,
    /// Its stored form.
    pub spec: RevisionSpec,
    /// Its stages, in order.
    pub stages: Vec<LoadedStage>,
}

impl Revision {
    /// Calls [`Revision::from_config`] off the async threads, because plugins are compiled and configured.
    ///
    /// # Errors
    /// As [`Revision::from_config`].
    pub async fn load(
        config: &PipelineConfig,
        host: &PluginHost,
        embedded: fn(&Path) -> Option<&'static [u8]>,
    ) -> Result<(Self, Components), ConfigError> {
        let (config, host) = (config.clone(), host.clone());
        off_thread(move || Self::from_config(&config, &host, &embedded)).await
    }

    /// Loads the revision that a configuration describes. Returns also the components' bytes, to be stored. Blocks:
    /// from async code, call [`Revision::load`].
    ///
    /// # Errors
    /// Mismatch, at its line and column in the configuration.
    pub fn from_config(
        config: &PipelineConfig,
        host: &PluginHost,
        embedded: &dyn Fn(&Path) -> Option<&'static [u8]>,
    ) -> Result<(Self, Components), ConfigError> {
        let mut components = Components::new();
        let mut plugins = HashMap::new();
        let mut stages = Vec::new();
        for stage in &config.stages {
            let path = &stage.plugin.value;
            let at_plugin = |message: String, help: &str| {
                config.file.problem(stage.plugin.span.clone(), message, help)
            };
            let cache = &host.cache.with_limits(stage.compile_limits);
            let (plugin, bytes) = match embedded(path) {
                Some(bytes) => {
                    Plugin::load(&host.engine, cache, &path.display().to_string(), bytes)
                        .map(|plugin| (plugin, Bytes::from_static(bytes)))
                }
                None => Plugin::load_file(&host.engine, cache, path),
            }
            .map_err(|error| at_plugin(error.to_string(), "set this to the file of a component"))?;
            if let Some(expected) = &stage.sha256
                && expected.value != plugin.digest.as_str()
            {
                let message = format!(
                    "{}: expected the pinned digest, found {}",
                    path.display(),
                    plugin.digest
                );
                let help = "restore the pinned file, or pin this digest";
                return Err(config.file.problem(expected.span.clone(), message, help));
            }
            let routes = stage.routes.iter();
            stages.push(StageSpec {
                name: stage.name.value.clone(),
                digest: plugin.digest.to_string(),
                config_json: stage.config_text.json.clone(),
                has_variables: stage.config_text.has_variables,
                limits: stage.limits,
                grants: stage.grants.clone(),
                routes: routes
                    .map(|(name, bound)| {
                        (name.clone(), bound.sinks.iter().map(|sink| sink.value.clone()).collect())
                    })
                    .collect(),
                canary: None,
            });
            components.push((plugin.digest.to_string(), bytes));
            plugins.insert(plugin.digest.to_string(), plugin);
        }
        let source_sinks = match stages.is_empty() {
            true => config.sinks.iter().map(|sink| sink.name.value.clone()).collect(),
            false => Vec::new(),
        };
        let source_format = config.source.format.clone();
        let source_columns = config.source.columns.clone();
        let spec = RevisionSpec { source_format, stages, source_sinks, source_columns };
        let revision = Self::assemble(spec, &plugins, host, &config.source.stream_name(), None)
            .map_err(|misfit| misfit.in_config(config))?;
        Ok((revision, components))
    }

    /// Loads a stored revision from the components that were stored with it. Blocks.
    ///
    /// # Errors
    /// A component that is missing or no longer loads.
    pub(crate) fn from_store(
        spec: RevisionSpec,
        host: &PluginHost,
        stream_name: &str,
        component: &dyn Fn(&str) -> anyhow::Result<Vec<u8>>,
    ) -> anyhow::Result<Self> {
        let mut plugins = HashMap::new();
        for digest in spec.digests() {
            let bytes = component(digest)?;
            let path = format!("stored component {}", &digest[..12.min(digest.len())]);
            let plugin = Plugin::load(&host.engine, &host.cache, &path, &bytes)?;
            plugins.insert(digest.to_owned(), plugin);
        }
        let id = spec.id();
        Self::assemble(spec, &plugins, host, stream_name, None)
            .map_err(|misfit| anyhow::anyhow!("stored revision {id}: {}", misfit.message))
    }

    /// Makes a revision of loaded plugins, in place of another. Stages with the same specification keep their health
    /// counters. Blocks.
    ///
    /// # Errors
    /// Mismatch, and what to do.
    pub fn rebuilt(
        spec: RevisionSpec,
        plugins: &HashMap<String, Plugin>,
        host: &PluginHost,
        stream_name: &str,
        before: &Self,
    ) -> Result<Self, String> {
        Self::assemble(spec, plugins, host, stream_name, Some(before))
            .map_err(|misfit| format!("{}: {}", misfit.message, misfit.help))
    }

    /// Whether one of its components has the digest.
    pub fn has(&self, digest: &str) -> bool {
        self.spec.digests().any(|own| own == digest)
    }

    /// Returns its plugins, by digest.
    pub fn plugins(&self) -> HashMap<String, Plugin> {
        let versions = self.stages.iter().flat_map(|stage| {
            let canary = stage.canary.as_ref().map(|canary| &canary.stage.plugin);
            [&stage.plugin].into_iter().chain(canary)
        });
        versions.map(|plugin| (plugin.digest.to_string(), plugin.clone())).collect()
    }

    /// Configures each plugin once and checks formats and bindings from the source to the sinks.
    fn assemble(
        spec: RevisionSpec,
        plugins: &HashMap<String, Plugin>,
        host: &PluginHost,
        stream_name: &str,
        before: Option<&Self>,
    ) -> Result<Self, Misfit> {
        let mut upstream: Arc<[Route]> = [source_route(spec.source_format.as_deref())].into();
        let mut stages = Vec::new();
        for (index, own) in spec.stages.iter().enumerate() {
            let place = StagePlace { spec: &spec, index, upstream: &upstream, stream_name };
            let mut stage = place.load(&own.digest, plugins, host)?;
            if let Some(canary) = &own.canary {
                stage.canary = Some(place.load_canary(&stage, canary, plugins, host)?.into());
            }
            if let Some(before) = before.and_then(|before| before.stage_as(own)) {
                stage.health = before.health.clone();
                stage.endless = before.endless.clone();
            }
            let routes = stage.descriptor.routes.iter().zip(stage.targets.iter());
            let on = routes.filter(|(_, target)| matches!(target, RouteTarget::Next(_)));
            let on: Vec<Route> = on.map(|(route, _)| route.clone()).collect();
            stages.push(stage);
            upstream = on.into();
        }
        Ok(Self { id: spec.id(), spec, stages })
    }

    /// Returns the stage that has exactly this specification, apart from a canary.
    fn stage_as(&self, expected: &StageSpec) -> Option<&LoadedStage> {
        let plain = |spec: &StageSpec| StageSpec { canary: None, ..spec.clone() };
        let at = self.spec.stages.iter().position(|own| plain(own) == plain(expected))?;
        self.stages.get(at)
    }

    /// Returns the routes of all stages that are bound to a sink.
    pub fn routes_to(&self, sink: &SinkName) -> Vec<BoundRoute> {
        let mut bound = Vec::new();
        if self.spec.source_sinks.contains(sink) {
            bound.push(BoundRoute {
                name: SOURCE_ROUTE.into(),
                format: self.spec.source_format.clone().unwrap_or_default(),
                columns: self.spec.source_columns.clone(),
            });
        }
        for stage in &self.stages {
            for (route, target) in stage.descriptor.routes.iter().zip(stage.targets.iter()) {
                if matches!(target, RouteTarget::Sinks(sinks) if sinks.contains(sink)) {
                    bound.push(BoundRoute {
                        name: route.name.as_str().into(),
                        format: route.format.clone(),
                        columns: route.columns.iter().map(column).collect(),
                    });
                }
            }
        }
        bound
    }
}

/// Returns the route that stands for the source; without a format where none is declared.
pub fn source_route(format: Option<&str>) -> Route {
    let format = format.unwrap_or_default().into();
    Route { name: SOURCE_ROUTE.into(), format, columns: Vec::new() }
}

/// Makes the context that a plugin gets in `configure`.
pub(super) fn context(
    stream_name: &str,
    shard_id: &str,
    config_json: &str,
    upstream: &[Route],
) -> Context {
    Context {
        stream_name: stream_name.into(),
        shard_id: shard_id.into(),
        config: config_json.into(),
        upstream: upstream.to_vec(),
        extra: Vec::new(),
    }
}

/// Converts a column to the form that sinks know.
pub(super) fn column(column: &shardmill_plugin::Column) -> Column {
    Column {
        name: column.name.clone(),
        data_type: column.data_type.clone(),
        nullable: column.nullable,
    }
}
