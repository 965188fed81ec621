//! A generation: everything that decides what a record becomes.
//!
//! Stages, digests, configurations and bindings. A replay runs the generation that ran first, so
//! its specification and its components' bytes are stored until the checkpoint has passed it (see
//! [`crate::position`]). Here it is loaded, and its parts are checked against each other.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::columns;
use super::health::HealthCounts;
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
    /// Another component that some of the partition keys go to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySpec>,
}

/// A component that has a share of a stage's partition keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanarySpec {
    /// The SHA-256 of the component's bytes, in hex.
    pub digest: String,
    /// Of 100 partition keys, how many it gets: 1 to 99.
    pub percent: u8,
}

impl CanarySpec {
    /// Whether the records of a partition key are its: by a checksum of the key, which says nothing of
    /// the shard that it is in. A key is always of one side, so its records stay in order.
    pub fn takes(&self, partition_key: &[u8]) -> bool {
        crc32fast::hash(partition_key) % 100 < u32::from(self.percent)
    }
}

impl StageSpec {
    /// What is other in a stage of the same name, in words.
    pub fn changes_to(&self, other: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        let short = |digest: &str| digest[..12.min(digest.len())].to_owned();
        if self.digest != other.digest {
            changes.push(format!("plugin {} → {}", short(&self.digest), short(&other.digest)));
        }
        if self.canary != other.canary {
            changes.push("canary".into());
        }
        if self.config_json != other.config_json {
            changes.push("config".into());
        }
        if self.limits != other.limits {
            changes.push("limits".into());
        }
        if self.grants != other.grants {
            changes.push("grant".into());
        }
        if self.routes != other.routes {
            changes.push("routes".into());
        }
        changes
    }
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

    /// A stage by its name.
    pub fn stage(&self, name: &StageName) -> Option<&StageSpec> {
        self.stages.iter().find(|stage| stage.name == *name)
    }

    /// The digests of all its components.
    pub fn digests(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().flat_map(|stage| {
            let canary = stage.canary.as_ref().map(|canary| canary.digest.as_str());
            [stage.digest.as_str()].into_iter().chain(canary)
        })
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
    /// How its plugin does.
    pub health: Arc<HealthCounts>,
    /// Another version that has some of the partition keys.
    pub canary: Option<Arc<Canary>>,
}

/// A version of a stage that has a share of the partition keys.
pub struct Canary {
    /// Which keys.
    pub spec: CanarySpec,
    /// The stage with that version.
    pub stage: LoadedStage,
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
            health: Arc::default(),
            canary: None,
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

/// Components' bytes, by their digests.
pub type Components = Vec<(String, Bytes)>;

/// A stage's place in a generation that is being assembled.
struct StagePlace<'a> {
    spec: &'a GenerationSpec,
    index: usize,
    upstream: &'a Arc<[Route]>,
    stream_name: &'a str,
}

impl StagePlace<'_> {
    fn misfit(&self, place: Place, message: String, help: &str) -> Misfit {
        Misfit { stage: self.index, place, message, help: help.into() }
    }

    /// Configures a plugin and checks it against its neighbours.
    fn load(
        &self,
        digest: &str,
        plugins: &HashMap<String, Plugin>,
        host: &PluginHost,
    ) -> Result<LoadedStage, Misfit> {
        let stage = &self.spec.stages[self.index];
        let plugin = plugins.get(digest).cloned().ok_or_else(|| {
            let message = format!("component {digest} of stage {} is not loaded", stage.name);
            self.misfit(Place::Plugin, message, "load it")
        })?;
        self.check_grants(stage, &plugin)?;
        let services = host.backends.services(&stage.name, &stage.grants).map_err(|missing| {
            self.misfit(Place::Stage, missing, "add the [[lookup]], or do not grant it")
        })?;
        let services = Arc::new(services);
        let context = context(self.stream_name, "", &stage.config_json, self.upstream);
        let (_, descriptor) = Instance::start(&plugin, &stage.limits, &context, &services)
            .map_err(|error| {
                let message = format!("stage {} ({plugin:?}): {error}", stage.name);
                let help = "see the plugin's documentation for [stage.config]";
                self.misfit(Place::Stage, message, help)
            })?;
        self.check_upstream(stage, &plugin, &descriptor)?;
        let is_last = self.index + 1 == self.spec.stages.len();
        let targets = targets(stage, &descriptor, is_last)
            .map_err(|(place, message, help)| self.misfit(place, message, &help))?;
        let route_names = descriptor.routes.iter().map(|route| route.name.as_str().into());
        Ok(LoadedStage {
            name: stage.name.clone(),
            plugin,
            route_names: route_names.collect(),
            descriptor: descriptor.into(),
            limits: stage.limits,
            services,
            config_json: stage.config_json.as_str().into(),
            upstream: self.upstream.clone(),
            targets: targets.into(),
            health: Arc::default(),
            canary: None,
        })
    }

    /// Another version for some of the keys: what follows the stage must not tell the two apart.
    fn load_canary(
        &self,
        stage: &LoadedStage,
        spec: &CanarySpec,
        plugins: &HashMap<String, Plugin>,
        host: &PluginHost,
    ) -> Result<Canary, Misfit> {
        let canary = self.load(&spec.digest, plugins, host)?;
        let columns = |descriptor: &Descriptor| {
            let routes = descriptor.routes.iter();
            routes.map(|route| route.columns.iter().map(column).collect()).collect::<Vec<Vec<_>>>()
        };
        if !stage.same_routes(&canary.descriptor)
            || columns(&stage.descriptor) != columns(&canary.descriptor)
        {
            let message =
                format!("the canary of stage {} declares other routes or columns", stage.name);
            let help = "swap it in for all keys: some rows cannot have other columns than the rest";
            return Err(self.misfit(Place::Plugin, message, help));
        }
        Ok(Canary { spec: spec.clone(), stage: canary })
    }

    fn check_grants(&self, stage: &StageSpec, plugin: &Plugin) -> Result<(), Misfit> {
        let ungranted: Vec<_> =
            plugin.capabilities.difference(&stage.grants.capabilities).collect();
        if ungranted.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = ungranted.iter().map(|one| one.name()).collect();
        let grants: Vec<_> = ungranted.iter().map(|one| one.grant_example()).collect();
        let (path, name) = (&plugin.path, &stage.name);
        let message =
            format!("{path} imports {}, which stage {name} does not grant", names.join(", "));
        let help = format!("if it may, add under [stage.grant]: {}", grants.join("; "));
        Err(self.misfit(Place::Plugin, message, &help))
    }

    /// Checks what comes against what the plugin accepts and needs.
    fn check_upstream(
        &self,
        stage: &StageSpec,
        plugin: &Plugin,
        descriptor: &Descriptor,
    ) -> Result<(), Misfit> {
        let stage_before = match self.index.checked_sub(1) {
            None => "the source".to_owned(),
            Some(before) => format!("stage {}", self.spec.stages[before].name),
        };
        let mut upstream = self.upstream.iter();
        if let Some(route) = upstream.find(|route| !accepts(&descriptor.accepts, &route.format)) {
            let message = format!(
                "stage {} accepts {}, but route {} of {stage_before} carries {}",
                stage.name,
                descriptor.accepts.join(", "),
                route.name,
                route.format
            );
            let help = "put a stage in between, or bind that route to a sink";
            return Err(self.misfit(Place::Plugin, message, help));
        }
        let needed = columns::needed(descriptor).map_err(|message| {
            let message = format!("stage {} ({plugin:?}): {message}", stage.name);
            let help = "this is the plugin's own fault: see its author";
            self.misfit(Place::Plugin, message, help)
        })?;
        for route in self.upstream.iter() {
            columns::check(&needed, route).map_err(|(complaint, sides)| {
                let message = format!(
                    "stage {} needs of route {} of {stage_before} {complaint}",
                    stage.name, route.name
                );
                self.misfit(Place::Plugin, message, &sides)
            })?;
        }
        Ok(())
    }
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
        let spec = GenerationSpec { source_format, stages, source_sinks, source_columns };
        let generation = Self::assemble(spec, &plugins, host, &config.source.stream_name(), None)
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
        let mut plugins = HashMap::new();
        for digest in spec.digests() {
            let bytes = component(digest)?;
            let path = format!("stored component {}", &digest[..12.min(digest.len())]);
            let plugin = Plugin::load(&host.engine, &host.cache, &path, &bytes)?;
            plugins.insert(digest.to_owned(), plugin);
        }
        let id = spec.id();
        Self::assemble(spec, &plugins, host, stream_name, None)
            .map_err(|misfit| anyhow::anyhow!("stored generation {id}: {}", misfit.message))
    }

    /// A generation of plugins that are loaded, in place of another: stages that are the same go on to
    /// be judged by what they did there.
    ///
    /// # Errors
    /// What does not fit, in words, with the way out.
    pub fn rebuilt(
        spec: GenerationSpec,
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

    /// Its plugins, by digest.
    pub fn plugins(&self) -> HashMap<String, Plugin> {
        let versions = self.stages.iter().flat_map(|stage| {
            let canary = stage.canary.as_ref().map(|canary| &canary.stage.plugin);
            [&stage.plugin].into_iter().chain(canary)
        });
        versions.map(|plugin| (plugin.digest.to_string(), plugin.clone())).collect()
    }

    /// Configures each plugin once and checks formats and bindings from the source to the sinks.
    fn assemble(
        spec: GenerationSpec,
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
            }
            let routes = stage.descriptor.routes.iter().zip(stage.targets.iter());
            let on = routes.filter(|(_, target)| matches!(target, Target::Next(_)));
            let on: Vec<Route> = on.map(|(route, _)| route.clone()).collect();
            stages.push(stage);
            upstream = on.into();
        }
        Ok(Self { id: spec.id(), spec, stages })
    }

    /// The stage that has exactly this specification, canary left aside.
    fn stage_as(&self, due: &StageSpec) -> Option<&LoadedStage> {
        let plain = |spec: &StageSpec| StageSpec { canary: None, ..spec.clone() };
        let at = self.spec.stages.iter().position(|own| plain(own) == plain(due))?;
        self.stages.get(at)
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
