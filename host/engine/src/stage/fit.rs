//! Checks that a stage fits its place: imports against grants, formats and columns against its neighbours, routes
//! against bindings.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::columns;
use super::revision::{Canary, LoadedStage, RouteTarget, column, context};
use shardmill_config::{ConfigError, PipelineConfig, environment};
use shardmill_core::record::RouteName;
use shardmill_plugin::{CallErrorKind, Descriptor, Instance, Plugin, PluginHost, Route};
use shardmill_state::{CanarySpec, RevisionSpec, StageSpec};

/// A misfit of one stage, and its place in the stage's table.
pub(super) struct Misfit {
    stage: usize,
    place: Place,
    pub(super) message: String,
    pub(super) help: String,
}

enum Place {
    Plugin,
    Stage,
    Route(RouteName),
}

impl Misfit {
    /// Returns the error at its line and column.
    pub(super) fn in_config(self, config: &PipelineConfig) -> ConfigError {
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

/// A stage's place in a revision that is being assembled.
pub(super) struct StagePlace<'a> {
    pub(super) spec: &'a RevisionSpec,
    pub(super) index: usize,
    pub(super) upstream: &'a Arc<[Route]>,
    pub(super) stream_name: &'a str,
}

impl StagePlace<'_> {
    fn misfit(&self, place: Place, message: String, help: &str) -> Misfit {
        Misfit { stage: self.index, place, message, help: help.into() }
    }

    /// Configures a plugin and checks it against its neighbours.
    pub(super) fn load(
        &self,
        digest: &str,
        plugins: &HashMap<String, Plugin>,
        host: &PluginHost,
    ) -> Result<LoadedStage, Misfit> {
        let stage = &self.spec.stages[self.index];
        let plugin = plugins.get(digest).cloned().ok_or_else(|| {
            let message = format!("component {digest} of stage {} is not loaded", stage.name);
            self.misfit(Place::Plugin, message, "load the component first")
        })?;
        self.check_grants(stage, &plugin)?;
        let mut services =
            host.backends.services(&stage.name, &stage.grants).map_err(|missing| {
                self.misfit(Place::Stage, missing, "add the [[lookup]], or remove the grant")
            })?;
        let resolved = stage.text().resolve(&environment).map_err(|why| {
            let message = format!("stage {}: {why}", stage.name);
            let help =
                "a stage runs with the current values of its variables: set them, then try again";
            self.misfit(Place::Stage, message, help)
        })?;
        services.values.extend(&resolved.values);
        let services = Arc::new(services);
        let context = context(self.stream_name, "", &resolved.json, self.upstream);
        let (_, descriptor) = Instance::start(&plugin, &stage.limits, &context, &services)
            .map_err(|error| {
                // The plugin may quote its configuration.
                let said = services.values.hide(error.to_string());
                let message = format!("stage {} ({plugin:?}): {said}", stage.name);
                let help = match error.kind {
                    CallErrorKind::System => "raise or remove the limit",
                    CallErrorKind::Parts => {
                        "build it from fewer parts: one component, or fewer composed ones"
                    }
                    _ => "see the plugin's documentation for [stage.config]",
                };
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
            config_json: resolved.json.into(),
            upstream: self.upstream.clone(),
            targets: targets.into(),
            health: Arc::default(),
            endless: Arc::default(),
            canary: None,
        })
    }

    /// Loads another version for some of the keys. It must declare the same routes and columns, because later stages
    /// and sinks cannot tell the two apart.
    pub(super) fn load_canary(
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
            let help = "swap it in for all keys: all rows of a route must have the same columns";
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
        let help = format!("to allow it, add under [stage.grant]: {}", grants.join("; "));
        Err(self.misfit(Place::Plugin, message, &help))
    }

    /// Checks the incoming routes against what the plugin accepts and needs.
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
            let help = "this is an error in the plugin: report it to the author";
            self.misfit(Place::Plugin, message, help)
        })?;
        for route in self.upstream.iter() {
            columns::check(&needed, route).map_err(|(complaint, sides)| {
                let message = format!(
                    "stage {} does not fit route {} of {stage_before}: {complaint}",
                    stage.name, route.name
                );
                self.misfit(Place::Plugin, message, &sides)
            })?;
        }
        Ok(())
    }
}

/// Whether a format is accepted. An unknown format (empty) and an empty list of accepted formats fit everything.
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
) -> Result<Vec<RouteTarget>, (Place, String, String)> {
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
            format!("unknown route `{unknown}` of stage {}", stage.name),
            format!("the plugin declares {}{near}", declared.join(", ")),
        ));
    }
    let mut next = 0..;
    let targets =
        descriptor.routes.iter().map(|route| match stage.routes.get(route.name.as_str()) {
            Some(sinks) => Ok(RouteTarget::Sinks(sinks.clone())),
            None if is_last => Err((
                Place::Stage,
                format!(
                    "route `{}` of the last stage, {}, is not bound to a sink",
                    route.name, stage.name
                ),
                format!(
                    "add `{} = [\"SINK\"]` under [stage.routes], or `[]` to drop its records",
                    route.name
                ),
            )),
            None => Ok(RouteTarget::Next(next.next().unwrap_or_default())),
        });
    targets.collect()
}
