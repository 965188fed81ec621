//! A pipeline that a program builds and runs, with sources and sinks of its own.
//!
//! [`PipelineBuilder`] collects what `pipeline.toml` describes for `shardmill run`. From there both take the same
//! way: [`Run`] with its lanes, its state folder, its checkpoints and its dead letters. Parts of a process rather
//! than of a pipeline are left out: ports, signals, reloads of files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Display};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use crate::lane::BuildSinks;
use crate::lock::PipelineLock;
use crate::run::{Run, RunSummary};
use crate::supervisor::RunOptions;
use shardmill_config::{
    BUFFER_BYTES, BatchLimits, BoundSinks, Capability, CompileLimits, ConfigError, ConfigFile,
    FileConfig, FileCut, Grants, Located, NAME_RULE, OnPositionMismatch, PipelineConfig,
    RejectedMax, ReloadConfig, SharedParts, SinkConfig, SinkContext, SinkSettings, SourceConfig,
    SourceKind, StageConfig, StageLimits, StageText, Timing, Values, is_name, suggest,
};
use shardmill_core::record::{PipelineName, RouteName, SinkName, StageName, StreamIdentity};
use shardmill_core::sink::Sink;
use shardmill_core::source::ShardSource;
use shardmill_core::stop::Stop;
use shardmill_plugin::{Backends, CompileCache, PluginEngine, PluginHost};

/// When a sink commits: at the first of these limits.
pub use shardmill_config::CommitPolicy;

/// The default commit policy: one commit per second and shard, within an amount of memory that suits any machine.
pub const DEFAULT_COMMIT_POLICY: CommitPolicy = CommitPolicy {
    rows_max: 10_000,
    bytes_max: 4 << 20,
    linger_max: Duration::from_secs(1),
    give_up_after: None,
};
/// The default state folder, as in a file.
const STATE_DIR: &str = "state";

/// A pipeline that can run.
///
/// It may run several times, one after the other: each run goes on where the previous one ended, also in another
/// process.
pub struct Pipeline {
    config: PipelineConfig,
    source: Arc<dyn ShardSource>,
    sinks: Arc<[Arc<dyn Sink>]>,
}

/// The parts of a [`Pipeline`], which [`PipelineBuilder::build`] checks.
#[must_use]
pub struct PipelineBuilder {
    name: String,
    state_dir: PathBuf,
    source: Option<Arc<dyn ShardSource>>,
    stages: Vec<Stage>,
    sinks: Vec<GivenSink>,
    dead_letter_sinks: Vec<GivenSink>,
    buffer_bytes_max: usize,
    rejected_max: RejectedMax,
    timing: Timing,
}

/// A sink of the program, with its commit policy.
struct GivenSink {
    sink: Arc<dyn Sink>,
    commits: CommitPolicy,
}

/// A component in the path of the records, and where its routes go.
#[derive(Clone, Debug)]
#[must_use]
pub struct Stage {
    name: String,
    component: PathBuf,
    config: serde_json::Value,
    capabilities: BTreeSet<Capability>,
    limits: StageLimits,
    routes: BTreeMap<String, Vec<String>>,
}

/// Why a pipeline cannot be built.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A name that is not safe in file names, object keys and metrics.
    #[error("invalid name of a {what}: expected {NAME_RULE}, found {name:?}")]
    Name {
        /// The part that has the name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Two parts have one name.
    #[error("two stages or sinks have the name {name:?}: give each its own")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There is no source.
    #[error("the source is missing: call `source` of the builder")]
    NoSource,
    /// There is no sink.
    #[error("expected at least one sink, found none: call `sink` of the builder")]
    NoSink,
    /// A route goes to an unknown sink.
    #[error("route {route:?} of stage {stage} goes to an unknown sink, {sink:?}: {help}")]
    UnknownSink {
        /// The stage.
        stage: String,
        /// Its route.
        route: String,
        /// The sink's name.
        sink: String,
        /// The known sinks.
        help: String,
    },
    /// No route of the last stage goes to a sink.
    #[error("the last stage, {stage}, binds no route: call `route` of `Stage`")]
    NoRoute {
        /// The stage.
        stage: String,
    },
    /// No route leads to a sink.
    #[error("no route leads to sink {sink}: bind one, or leave the sink out")]
    Unreached {
        /// The sink.
        sink: SinkName,
    },
    /// A stage's configuration is not a JSON object.
    #[error("invalid configuration of stage {stage}: expected a JSON object, found {found}")]
    StageConfig {
        /// The stage.
        stage: String,
        /// The JSON value.
        found: String,
    },
    /// A capability that needs a description of what may be reached.
    #[error(
        "unsupported grant of stage {stage}: `{}` needs tables or hosts, which only a pipeline's file can \
         describe", .capability.name()
    )]
    Grant {
        /// The stage.
        stage: String,
        /// The capability.
        capability: Capability,
    },
    /// A number that is too small or too large.
    #[error("{what} is out of range: expected {expected}, found {found}")]
    OutOfRange {
        /// The number.
        what: String,
        /// The range.
        expected: String,
        /// The value.
        found: String,
    },
}

/// Why a run did not begin, or ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A component cannot be loaded, or its formats, columns, routes or imports do not fit its place. One sentence
    /// per problem.
    #[error("{}", .0.join("; "))]
    Misfit(Vec<String>),
    /// Another problem: the state folder is in use, the source or a sink cannot be reached when the run begins, or
    /// going on would lose records.
    #[error(transparent)]
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for PipelineError {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<ConfigError>() {
            Ok(error) => Self::Misfit(error.problems().iter().map(sentence).collect()),
            Err(error) => Self::Failed(error),
        }
    }
}

/// Formats a problem without a place, because there is no file.
fn sentence(problem: &shardmill_config::Problem) -> String {
    match problem.help() {
        Some(help) => format!("{}: {help}", problem.message()),
        None => problem.message().to_owned(),
    }
}

impl Pipeline {
    /// Begins to describe a pipeline. The name is part of the key of every position: under another name, everything
    /// is read again.
    pub fn builder(name: impl Into<String>) -> PipelineBuilder {
        PipelineBuilder {
            name: name.into(),
            state_dir: STATE_DIR.into(),
            source: None,
            stages: Vec::new(),
            sinks: Vec::new(),
            dead_letter_sinks: Vec::new(),
            buffer_bytes_max: BUFFER_BYTES,
            rejected_max: RejectedMax::default(),
            timing: Timing::default(),
        }
    }

    /// Runs until `stop` is asked for, every shard has ended, or the source has no more records. Records in hand at
    /// that time are committed; those that are not committed in time are read again by the next run.
    ///
    /// Each lane calls its plugins on a thread of the runtime for blocking calls, of which tokio has 512 by default:
    /// raise `max_blocking_threads` for a source with several hundred shards. A component is compiled by this
    /// process, once; the state folder keeps the result. A run that is stopped before it has begun counts nothing.
    ///
    /// # Errors
    /// [`PipelineError`]. A sink that fails during the run is not an error: its shards wait, and the log says so.
    pub async fn run(&self, stop: &Stop) -> Result<RunSummary, PipelineError> {
        self.run_as(RunOptions::new(false), stop).await
    }

    /// Does the same as [`Pipeline::run`], and also ends when everything that the source has is committed.
    ///
    /// # Errors
    /// The same as of [`Pipeline::run`].
    pub async fn run_until_caught_up(&self, stop: &Stop) -> Result<RunSummary, PipelineError> {
        self.run_as(RunOptions::new(true), stop).await
    }

    /// Acquires the state folder and validates the components and the sinks, without reading a record: for programs
    /// that watch the lanes of a run, or change its stages during the run.
    ///
    /// # Errors
    /// The same as of [`Pipeline::run`].
    pub async fn prepare(&self, options: RunOptions) -> Result<Run, PipelineError> {
        let stream = self.source.identity().await.map_err(anyhow::Error::from)?;
        let source = source_config(&stream, &self.config.source);
        let config = PipelineConfig { source, ..self.config.clone() };
        let lock = PipelineLock::take(&config.state_dir, &config.name);
        let lock = lock.map_err(anyhow::Error::from)?;
        let options = RunOptions { build_sinks: self.build_sinks(), ..options };
        Ok(Run::prepare(lock, config, self.source.clone(), plugin_host, options).await?)
    }

    async fn run_as(&self, options: RunOptions, stop: &Stop) -> Result<RunSummary, PipelineError> {
        // An error ends this run, but nothing else of the program.
        let stop = stop.child();
        // Nothing has been read yet, so servers that do not answer are not waited for.
        let Some(run) = stop.unless_asked(Box::pin(self.prepare(options))).await else {
            return Ok(RunSummary::default());
        };
        let run = run?;
        let (statuses, dead_letters) = (run.pipeline().statuses(), run.pipeline().dead_letters());
        Box::pin(run.run(&stop)).await?;
        let counted = stop.until_over(RunSummary::of(&statuses, &dead_letters)).await;
        Ok(counted
            .context("counting the dead letters did not finish within the shutdown time")??)
    }

    /// Returns the program's sinks, by their names in the configuration.
    fn build_sinks(&self) -> BuildSinks {
        let given = self.sinks.clone();
        Arc::new(move |config| {
            let by_name = |own: &SinkConfig| {
                let sink = given.iter().find(|sink| *sink.name() == own.name.value);
                sink.cloned().with_context(|| {
                    format!(
                        "unknown sink {}: expected one that was given to the builder",
                        own.name.value
                    )
                })
            };
            config.sinks.iter().map(by_name).collect()
        })
    }
}

impl PipelineBuilder {
    /// Sets the folder of the state: checkpoints, dead letters, compiled components. It must be this user's alone, and
    /// must last between runs.
    pub fn state_dir(self, folder: impl Into<PathBuf>) -> Self {
        Self { state_dir: folder.into(), ..self }
    }

    /// Sets the source of the records.
    pub fn source(self, source: Arc<dyn ShardSource>) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Adds a stage; records pass the stages in this order. Without a stage, every record goes unchanged to every
    /// sink.
    pub fn stage(mut self, stage: Stage) -> Self {
        self.stages.push(stage);
        self
    }

    /// Adds a sink, under its own name, with [`DEFAULT_COMMIT_POLICY`].
    pub fn sink(self, sink: Arc<dyn Sink>) -> Self {
        self.sink_with(sink, DEFAULT_COMMIT_POLICY)
    }

    /// Adds a sink, under its own name, that commits by this policy.
    pub fn sink_with(mut self, sink: Arc<dyn Sink>, commits: CommitPolicy) -> Self {
        self.sinks.push(GivenSink { sink, commits });
        self
    }

    /// Adds a sink that gets a copy of each dead letter, as JSON, and nothing else. The store of dead letters in the
    /// state folder has them in any case.
    pub fn dead_letter_sink(mut self, sink: Arc<dyn Sink>) -> Self {
        self.dead_letter_sinks.push(GivenSink { sink, commits: DEFAULT_COMMIT_POLICY });
        self
    }

    /// Sets how many bytes of rows may wait for all sinks together; 100 MiB by default.
    pub fn buffer_bytes_max(self, buffer_bytes_max: usize) -> Self {
        Self { buffer_bytes_max, ..self }
    }

    /// Sets how many records may be rejected until their lane blocks.
    pub fn rejected_max(self, rejected_max: RejectedMax) -> Self {
        Self { rejected_max, ..self }
    }

    /// Sets deadlines and pauses.
    pub fn timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    /// Checks that the parts fit together, without opening a file or asking a server: components are loaded, and
    /// sinks are asked, when a run begins.
    ///
    /// # Errors
    /// The first [`BuildError`] that is found.
    pub fn build(self) -> Result<Pipeline, BuildError> {
        self.check_names()?;
        let Some(source) = self.source.clone() else { return Err(BuildError::NoSource) };
        if self.sinks.is_empty() {
            return Err(BuildError::NoSink);
        }
        self.check_bindings()?;
        self.check_policies()?;
        let stages = self.stages.iter().map(Stage::config_of).collect::<Result<_, _>>()?;
        let config = PipelineConfig {
            file: Arc::new(ConfigFile { path: self.name.as_str().into(), text: String::new() }),
            name: PipelineName::new(self.name.as_str()),
            state_dir: self.state_dir.clone().into(),
            source: unnamed_source(),
            stages,
            sinks: self.sinks.iter().map(sink_config).collect(),
            dead_letter_sinks: self.dead_letter_sinks.iter().map(sink_config).collect(),
            dead_letters_bytes_max: None,
            lookups: Vec::new(),
            buffer_bytes_max: self.buffer_bytes_max,
            rejected_max: self.rejected_max,
            on_position_mismatch: OnPositionMismatch::Stop,
            timing: self.timing,
            reload: ReloadConfig::default(),
            admin: None,
            intake: None,
            values: Values::default(),
        };
        let sinks = self.all_sinks().map(|given| given.sink.clone()).collect();
        Ok(Pipeline { config, source, sinks })
    }

    fn all_sinks(&self) -> impl Iterator<Item = &GivenSink> {
        self.sinks.iter().chain(&self.dead_letter_sinks)
    }

    /// Stages and sinks share one space of names: a dead letter is keyed by the name of the part that it comes from.
    fn check_names(&self) -> Result<(), BuildError> {
        let stages = self.stages.iter().map(|stage| ("stage", stage.name.as_str()));
        let sinks = self.all_sinks().map(|given| ("sink", given.sink.name().as_str()));
        let parts: Vec<_> = stages.chain(sinks).collect();
        let named = [("pipeline", self.name.as_str())].into_iter().chain(parts.iter().copied());
        for (what, name) in named {
            if !is_name(name) {
                return Err(BuildError::Name { what, name: name.to_owned() });
            }
        }
        let mut seen = BTreeSet::new();
        match parts.iter().find(|(_, name)| !seen.insert(*name)) {
            Some((_, name)) => Err(BuildError::NameTaken { name: (*name).to_owned() }),
            None => Ok(()),
        }
    }

    /// Checks that every route goes to known sinks, and that a route leads to every sink.
    fn check_bindings(&self) -> Result<(), BuildError> {
        let sinks: Vec<&str> = self.sinks.iter().map(|given| given.sink.name().as_str()).collect();
        let mut reached = BTreeSet::new();
        for stage in &self.stages {
            for (route, bound) in &stage.routes {
                if let Some(unknown) = bound.iter().find(|sink| !sinks.contains(&sink.as_str())) {
                    return Err(BuildError::UnknownSink {
                        stage: stage.name.clone(),
                        route: route.clone(),
                        sink: unknown.clone(),
                        help: suggest(unknown, "the sinks", &sinks),
                    });
                }
                reached.extend(bound.iter().map(String::as_str));
            }
        }
        let Some(last) = self.stages.last() else { return Ok(()) };
        if last.routes.is_empty() {
            return Err(BuildError::NoRoute { stage: last.name.clone() });
        }
        match sinks.iter().find(|sink| !reached.contains(*sink)) {
            Some(sink) => Err(BuildError::Unreached { sink: SinkName::new(*sink) }),
            None => Ok(()),
        }
    }

    /// Checks that a sink can always commit: its limits are not zero, and not larger than the buffer.
    fn check_policies(&self) -> Result<(), BuildError> {
        let out_of_range = |what: String, expected: String, found: &dyn Display| {
            Err(BuildError::OutOfRange { what, expected, found: found.to_string() })
        };
        for GivenSink { sink, commits } in self.all_sinks() {
            let of_sink =
                |key: &str| format!("`{key}` of the commit policy of sink {}", sink.name());
            if commits.rows_max == 0 {
                return out_of_range(of_sink("rows_max"), "at least 1".into(), &0);
            }
            if !(1..=self.buffer_bytes_max).contains(&commits.bytes_max) {
                let expected = format!("1 to {} bytes, the buffer", self.buffer_bytes_max);
                return out_of_range(of_sink("bytes_max"), expected, &commits.bytes_max);
            }
            if commits.linger_max.is_zero() {
                return out_of_range(of_sink("linger_max"), "more than 0 s".into(), &"0 s");
            }
        }
        Ok(())
    }
}

impl Stage {
    /// Begins to describe a stage whose plugin is a WebAssembly component in a file.
    pub fn component(name: impl Into<String>, file: impl AsRef<Path>) -> Self {
        Self {
            name: name.into(),
            component: file.as_ref().to_owned(),
            config: serde_json::Value::Object(serde_json::Map::new()),
            capabilities: BTreeSet::new(),
            limits: StageLimits::default(),
            routes: BTreeMap::new(),
        }
    }

    /// Sets the plugin's configuration, a JSON object. It is stored in the state folder as it is, so it is not a place
    /// for secrets.
    pub fn config(self, config: serde_json::Value) -> Self {
        Self { config, ..self }
    }

    /// Grants the plugin a capability that it imports.
    pub fn grant(mut self, capability: Capability) -> Self {
        self.capabilities.insert(capability);
        self
    }

    /// Sets the limits of one call of the plugin.
    pub fn limits(self, limits: StageLimits) -> Self {
        Self { limits, ..self }
    }

    /// Binds a route of the plugin to a sink; one route may go to several. Outputs of a bound route go to no later
    /// stage.
    pub fn route(mut self, route: impl Into<String>, sink: impl Into<String>) -> Self {
        self.routes.entry(route.into()).or_default().push(sink.into());
        self
    }

    /// Drops the outputs of a route, on purpose.
    pub fn drop_route(mut self, route: impl Into<String>) -> Self {
        self.routes.entry(route.into()).or_default();
        self
    }

    /// Returns the stage as a file would describe it.
    fn config_of(&self) -> Result<StageConfig, BuildError> {
        if !self.config.is_object() {
            let found = self.config.to_string();
            return Err(BuildError::StageConfig { stage: self.name.clone(), found });
        }
        let described = [Capability::Lookup, Capability::Http];
        if let Some(capability) = described.into_iter().find(|it| self.capabilities.contains(it)) {
            return Err(BuildError::Grant { stage: self.name.clone(), capability });
        }
        let config_json = self.config.to_string();
        let bound = |(route, sinks): (&String, &Vec<String>)| {
            let sinks = sinks.iter().map(|sink| unplaced(SinkName::new(sink.as_str()))).collect();
            (RouteName::new(route.as_str()), BoundSinks { key_span: 0..0, sinks })
        };
        Ok(StageConfig {
            name: unplaced(StageName::new(self.name.as_str())),
            plugin: unplaced(self.component.clone()),
            sha256: None,
            config_text: StageText::plain(config_json.as_str()),
            config_json,
            grants: Grants { capabilities: self.capabilities.clone(), lookups: BTreeSet::new() },
            http_hosts: Vec::new(),
            limits: self.limits,
            compile_limits: CompileLimits::default(),
            routes: self.routes.iter().map(bound).collect(),
            span: 0..0,
        })
    }
}

/// A value that is in no file.
fn unplaced<T>(value: T) -> Located<T> {
    Located { value, span: 0..0 }
}

/// Settings of a sink that the program has made.
struct ProgramSink(Arc<dyn Sink>);

impl Debug for ProgramSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ProgramSink").field(self.0.name()).finish()
    }
}

impl PartialEq for ProgramSink {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl SinkSettings for ProgramSink {
    fn destination(&self) -> Option<String> {
        None
    }

    /// Asked before a sink has said where it is; each one says it itself when a shard is acquired.
    fn is_exact(&self) -> bool {
        false
    }

    fn build(
        &self,
        _context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, shardmill_config::SinkBuildError> {
        Ok(self.0.clone())
    }
}

/// Returns a sink of the program in the form of a configuration.
///
/// A configuration says how a sink is made, and where it writes. A sink of the program exists already, and only the
/// program knows where it writes.
fn sink_config(given: &GivenSink) -> SinkConfig {
    let name = given.sink.name();
    SinkConfig {
        name: unplaced(name.clone()),
        renamed_from: None,
        commit_policy: given.commits,
        settings: Arc::new(ProgramSink(given.sink.clone())),
        span: 0..0,
        fingerprint_json: serde_json::json!({ "name": name, "type": "program" }).to_string(),
    }
}

/// The source before it was asked for its name.
fn unnamed_source() -> SourceConfig {
    let file = FileConfig { path: PathBuf::new(), cut: FileCut::Lines, skip_lines: 0 };
    SourceConfig {
        kind: SourceKind::File(file),
        batch: BatchLimits::default(),
        format: None,
        columns: Vec::new(),
    }
}

/// Returns a source of the program in the form of a configuration. Of its type, only the name of the stream is ever
/// used, which is a file's path.
fn source_config(stream: &StreamIdentity, unnamed: &SourceConfig) -> SourceConfig {
    let file = FileConfig { path: (&*stream.name).into(), cut: FileCut::Lines, skip_lines: 0 };
    SourceConfig { kind: SourceKind::File(file), ..unnamed.clone() }
}

/// Makes the host of the plugins. Components are compiled in this process, without the limits of `shardmill run`,
/// which starts a process for that: run components only of people whom the program trusts.
fn plugin_host(config: &PipelineConfig) -> anyhow::Result<PluginHost> {
    shardmill_core::system::check_start()?;
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    let cache = CompileCache::in_folder(config.state_dir.join("compiled"));
    let backends = Backends::from_config(config, &tokio::runtime::Handle::current())?;
    Ok(PluginHost { engine, cache: cache.with_limits(config.compile_limits()), backends })
}

#[cfg(test)]
mod tests;
