//! A generation: everything that decides what a record becomes.
//!
//! Stages, digests, configurations and bindings. A replay runs the generation that ran first, so
//! its specification and its components' bytes are stored until the checkpoint has passed it (see
//! [`crate::position`]). Here it is loaded, and its parts are checked against each other.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::columns;
use crate::config::{ConfigError, Grants, PipelineConfig, StageLimits};
use crate::plugin::{
    CallError, Context, Descriptor, Digest, Instance, Plugin, PluginHost, Route, Services,
};
use crate::record::{RouteName, SinkName, StageName};
use crate::sink::{BoundRoute, Column};

/// The route by which records leave the source.
pub(super) const SOURCE_ROUTE: &str = "source";

/// One stage, as it is stored: the component is named by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageSpec {
    /// The stage's name.
    pub name: StageName,
    /// The SHA-256 of the component's bytes, in hex.
    pub digest: String,
    /// The stage's configuration as JSON text.
    pub config_json: String,
    /// Its limits.
    pub limits: StageLimits,
    /// What its plugin may ask of the host.
    #[serde(default, skip_serializing_if = "Grants::is_empty")]
    pub grants: Grants,
    /// Its bindings.
    pub routes: BTreeMap<RouteName, Vec<SinkName>>,
}

/// A generation, as it is stored. Equal specifications are one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationSpec {
    /// The media type of the stream's payloads, where declared.
    pub source_format: Option<String>,
    /// The stages, in order.
    pub stages: Vec<StageSpec>,
    /// Where records go as they came, when there is no stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_sinks: Vec<SinkName>,
    /// What columns they have then, where that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_columns: Vec<Column>,
}

impl GenerationSpec {
    /// The specification as JSON, always in the same form.
    pub fn to_json(&self) -> String {
        // Maps are ordered and every key is text: this cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The generation's id: the first 16 hex digits of its digest.
    pub fn id(&self) -> Arc<str> {
        Digest::of(self.to_json().as_bytes()).as_str()[..16].into()
    }

    /// Every sink that a route of it is bound to.
    pub fn sinks(&self) -> impl Iterator<Item = &SinkName> {
        let bound = self.stages.iter().flat_map(|stage| stage.routes.values().flatten());
        bound.chain(&self.source_sinks)
    }
}

/// Where the outputs of one route of one stage go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// To these sinks; none: dropped on purpose.
    Sinks(Vec<SinkName>),
    /// On to the next stage, as its upstream route of this index.
    Next(u32),
}

/// A stage with its plugin, proven against its neighbours.
#[derive(Clone)]
pub struct LoadedStage {
    /// Its name.
    pub name: StageName,
    /// Its compiled plugin.
    pub plugin: Plugin,
    /// What the plugin says of itself under this configuration.
    pub descriptor: Arc<Descriptor>,
    /// Its limits.
    pub limits: StageLimits,
    /// What its plugin may ask of the host.
    pub services: Arc<Services>,
    /// Its configuration as JSON text.
    pub config_json: Arc<str>,
    /// The routes that enter it.
    pub upstream: Arc<[Route]>,
    /// The names of the declared routes, by index.
    pub route_names: Arc<[RouteName]>,
    /// Where each declared route goes, by the route's index.
    pub targets: Arc<[Target]>,
}

impl LoadedStage {
    /// A stage outside of any pipeline, with the default limits: it takes records of any format,
    /// and its routes go nowhere. A failure that may pass is not tried again.
    ///
    /// # Errors
    /// What the plugin says to its configuration.
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
            targets: routes.map(|_| Target::Sinks(Vec::new())).collect(),
            descriptor: descriptor.into(),
            limits,
            services,
            config_json: config_json.into(),
            upstream,
        })
    }

    /// What an instance for a shard is told of its place.
    pub fn context(&self, stream_name: &str, shard_id: &str) -> Context {
        context(stream_name, shard_id, &self.config_json, &self.upstream)
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

/// A generation, loaded: what lanes run.
pub struct Generation {
    /// Its id.
    pub id: Arc<str>,
    /// As it is stored.
    pub spec: GenerationSpec,
    /// Its stages, in order.
    pub stages: Vec<LoadedStage>,
}

/// What is wrong with one stage, and where in its table.
struct Misfit {
    stage: usize,
    place: Place,
    message: String,
    help: String,
}

enum Place {
    Plugin,
    Stage,
    Route(RouteName),
}

impl Generation {
    /// Loads the generation that a configuration describes; the components' bytes come with it,
    /// to be stored.
    ///
    /// # Errors
    /// What does not fit, at its line and column in the configuration.
    pub fn from_config(
        config: &PipelineConfig,
        host: &PluginHost,
        embedded: &dyn Fn(&Path) -> Option<&'static [u8]>,
    ) -> Result<(Self, Vec<Vec<u8>>), ConfigError> {
        let mut components = Vec::new();
        let mut plugins = Vec::new();
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
                        .map(|plugin| (plugin, bytes.to_vec()))
                }
                None => Plugin::load_file(&host.engine, cache, path),
            }
            .map_err(|error| at_plugin(error.to_string(), "name a component's file here"))?;
            if let Some(due) = &stage.sha256
                && due.value != plugin.digest.as_str()
            {
                let message = format!("{} has the digest {}", path.display(), plugin.digest);
                let help =
                    "the file is not the one that was pinned: restore it, or pin this digest";
                return Err(config.file.problem(due.span.clone(), message, help));
            }
            let routes = stage.routes.iter();
            stages.push(StageSpec {
                name: stage.name.value.clone(),
                digest: plugin.digest.to_string(),
                config_json: stage.config_json.clone(),
                limits: stage.limits,
                grants: stage.grants.clone(),
                routes: routes
                    .map(|(name, bound)| {
                        (name.clone(), bound.sinks.iter().map(|sink| sink.value.clone()).collect())
                    })
                    .collect(),
            });
            plugins.push(plugin);
            components.push(bytes);
        }
        let source_sinks = match stages.is_empty() {
            true => config.sinks.iter().map(|sink| sink.name.value.clone()).collect(),
            false => Vec::new(),
        };
        let source_format = config.source.format.clone();
        let source_columns = config.source.columns.clone();
        let spec = GenerationSpec { source_format, stages, source_sinks, source_columns };
        let generation = Self::assemble(spec, plugins, host, &config.source.stream_name())
            .map_err(|misfit| misfit.in_config(config))?;
        Ok((generation, components))
    }

    /// Loads a stored generation from the components that were stored with it.
    ///
    /// # Errors
    /// A component that is missing or no longer loads, in words.
    pub fn from_store(
        spec: GenerationSpec,
        host: &PluginHost,
        stream_name: &str,
        component: &dyn Fn(&str) -> anyhow::Result<Vec<u8>>,
    ) -> anyhow::Result<Self> {
        let mut plugins = Vec::new();
        for stage in &spec.stages {
            let bytes = component(&stage.digest)?;
            let path = format!("stored component {}", &stage.digest[..12.min(stage.digest.len())]);
            plugins.push(Plugin::load(&host.engine, &host.cache, &path, &bytes)?);
        }
        let id = spec.id();
        Self::assemble(spec, plugins, host, stream_name)
            .map_err(|misfit| anyhow::anyhow!("stored generation {id}: {}", misfit.message))
    }

    /// Configures each plugin once and checks formats and bindings from the source to the sinks.
    fn assemble(
        spec: GenerationSpec,
        plugins: Vec<Plugin>,
        host: &PluginHost,
        stream_name: &str,
    ) -> Result<Self, Misfit> {
        let last = spec.stages.len().saturating_sub(1);
        let mut upstream: Arc<[Route]> = [source_route(spec.source_format.as_deref())].into();
        let mut stages = Vec::new();
        for (index, (stage, plugin)) in spec.stages.iter().zip(plugins).enumerate() {
            let misfit = |place, message: String, help: &str| Misfit {
                stage: index,
                place,
                message,
                help: help.into(),
            };
            let granted = &stage.grants.capabilities;
            let ungranted: Vec<_> = plugin.capabilities.difference(granted).collect();
            if !ungranted.is_empty() {
                let names: Vec<_> = ungranted.iter().map(|one| one.name()).collect();
                let grants: Vec<_> = ungranted.iter().map(|one| one.grant_example()).collect();
                let message = format!(
                    "{} imports {}, which stage {} does not grant",
                    plugin.path,
                    names.join(", "),
                    stage.name
                );
                let help = format!("if it may, add under [stage.grant]: {}", grants.join("; "));
                return Err(misfit(Place::Plugin, message, &help));
            }
            let services =
                host.backends.services(&stage.name, &stage.grants).map_err(|missing| {
                    misfit(Place::Stage, missing, "add the [[lookup]], or do not grant it")
                })?;
            let services = Arc::new(services);
            let context = context(stream_name, "", &stage.config_json, &upstream);
            let (_, descriptor) = Instance::start(&plugin, &stage.limits, &context, &services)
                .map_err(|error| {
                    let message = format!("stage {} ({plugin:?}): {error}", stage.name);
                    misfit(
                        Place::Stage,
                        message,
                        "see the plugin's documentation for [stage.config]",
                    )
                })?;
            let stage_before = match index.checked_sub(1) {
                None => "the source".to_owned(),
                Some(before) => format!("stage {}", spec.stages[before].name),
            };
            let refused =
                upstream.iter().find(|route| !accepts(&descriptor.accepts, &route.format));
            if let Some(route) = refused {
                let message = format!(
                    "stage {} accepts {}, but route {} of {stage_before} carries {}",
                    stage.name,
                    descriptor.accepts.join(", "),
                    route.name,
                    route.format
                );
                return Err(misfit(
                    Place::Plugin,
                    message,
                    "put a stage in between, or bind that route to a sink",
                ));
            }
            let needed = columns::needed(&descriptor).map_err(|message| {
                let message = format!("stage {} ({plugin:?}): {message}", stage.name);
                misfit(Place::Plugin, message, "this is the plugin's own fault: see its author")
            })?;
            for route in upstream.iter() {
                columns::check(&needed, route).map_err(|(complaint, sides)| {
                    let message = format!(
                        "stage {} needs of route {} of {stage_before} {complaint}",
                        stage.name, route.name
                    );
                    misfit(Place::Plugin, message, &sides)
                })?;
            }
            let targets = targets(stage, &descriptor, index == last)
                .map_err(|(place, message, help)| misfit(place, message, &help))?;
            let on: Vec<Route> = descriptor
                .routes
                .iter()
                .zip(&targets)
                .filter(|(_, target)| matches!(target, Target::Next(_)))
                .map(|(route, _)| route.clone())
                .collect();
            let route_names = descriptor.routes.iter().map(|route| route.name.as_str().into());
            stages.push(LoadedStage {
                name: stage.name.clone(),
                plugin,
                route_names: route_names.collect(),
                descriptor: descriptor.into(),
                limits: stage.limits,
                services,
                config_json: stage.config_json.as_str().into(),
                upstream,
                targets: targets.into(),
            });
            upstream = on.into();
        }
        Ok(Self { id: spec.id(), spec, stages })
    }

    /// The routes that are bound to a sink, over all stages.
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
                if matches!(target, Target::Sinks(sinks) if sinks.contains(sink)) {
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

/// The route that stands for the source; without a format where none is declared.
pub fn source_route(format: Option<&str>) -> Route {
    let format = format.unwrap_or_default().into();
    Route { name: SOURCE_ROUTE.into(), format, columns: Vec::new() }
}

/// What a plugin is told of its place.
fn context(stream_name: &str, shard_id: &str, config_json: &str, upstream: &[Route]) -> Context {
    Context {
        stream_name: stream_name.into(),
        shard_id: shard_id.into(),
        config: config_json.into(),
        upstream: upstream.to_vec(),
        extra: Vec::new(),
    }
}

fn column(column: &crate::plugin::Column) -> Column {
    Column {
        name: column.name.clone(),
        data_type: column.data_type.clone(),
        nullable: column.nullable,
    }
}

/// Whether a format is among the accepted ones. An unknown format (empty) and an empty list fit
/// everything.
fn accepts(accepted: &[String], format: &str) -> bool {
    accepted.is_empty()
        || format.is_empty()
        || accepted.iter().any(|one| one == "*/*" || one.eq_ignore_ascii_case(format))
}

/// Binds the declared routes as the configuration says.
fn targets(
    stage: &StageSpec,
    descriptor: &Descriptor,
    is_last: bool,
) -> Result<Vec<Target>, (Place, String, String)> {
    let declared: Vec<&str> = descriptor.routes.iter().map(|route| route.name.as_str()).collect();
    if let Some(unknown) = stage.routes.keys().find(|name| !declared.contains(&name.as_str())) {
        let near = declared
            .iter()
            .max_by(|a, b| {
                let nearness = |name: &str| strsim::jaro_winkler(name, unknown.as_str());
                nearness(a).total_cmp(&nearness(b))
            })
            .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        return Err((
            Place::Route(unknown.clone()),
            format!("stage {} declares no route `{unknown}`", stage.name),
            format!("it declares {}{near}", declared.join(", ")),
        ));
    }
    let mut next = 0..;
    let targets =
        descriptor.routes.iter().map(|route| match stage.routes.get(route.name.as_str()) {
            Some(sinks) => Ok(Target::Sinks(sinks.clone())),
            None if is_last => Err((
                Place::Stage,
                format!(
                    "route `{}` of stage {}, the last one, is bound to no sink",
                    route.name, stage.name
                ),
                format!(
                    "add `{} = [\"SINK\"]` under [stage.routes], or `[]` to drop its records",
                    route.name
                ),
            )),
            None => Ok(Target::Next(next.next().unwrap_or_default())),
        });
    targets.collect()
}

impl Misfit {
    fn in_config(self, config: &PipelineConfig) -> ConfigError {
        let stage = &config.stages[self.stage];
        let span: Range<usize> = match &self.place {
            Place::Plugin => stage.plugin.span.clone(),
            Place::Stage => stage.span.clone(),
            Place::Route(name) => {
                stage.routes.get(name).map_or(stage.span.clone(), |bound| bound.key_span.clone())
            }
        };
        config.file.problem(span, self.message, &self.help)
    }
}
