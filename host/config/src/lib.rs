//! What a pipeline is asked to do: `pipeline.toml`, read and proven.
//!
//! Two types: `raw` is what TOML can say, [`PipelineConfig`] is what can run; only [`load()`] makes
//! the second, and everything below the configuration takes only the second. Each error names file,
//! line and column, underlines the text and says what to write instead.
//!
//! Sink types are not known here. Each is a crate that implements [`SinkType`] and [`SinkSettings`]; the program hands
//! the list of its types to [`load()`]. A new sink is one folder and one line in that list: the folder reads its own
//! table with the readers of [`reading`], names its keys for the reference, and makes the sink.
//!
//! Where a stream is read from the first time is such a value: it is validated here, and nowhere again.
//!
//! ```
//! use shardmill_config::parse_start;
//! use shardmill_core::source::StartPosition;
//!
//! assert_eq!(parse_start("trim-horizon")?, StartPosition::TrimHorizon);
//! assert_eq!(parse_start("at-timestamp:1970-01-01T00:00:01Z")?, StartPosition::AtTimestampMs(1_000));
//! assert!(parse_start("yesterday").is_err());
//! # Ok::<(), shardmill_config::NotAStart>(())
//! ```

mod bindings;
mod capability;
mod check;
mod destination;
mod diagnostic;
mod env;
mod grant_http;
mod intake;
mod json;
mod limits;
mod load;
mod lookup;
mod raw;
pub mod reading;
mod reference;
mod reload;
mod shape;
mod sink;
mod sink_settings;
mod sink_type;
mod source;
mod stage;
mod tables;
mod target;
mod timing;
mod write_mode;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::capability::{Capability, WIT_VERSION};
pub use self::check::{NAME_RULE, is_name};
pub use self::destination::one_spelling;
pub use self::diagnostic::{ConfigError, Problem, error_text, suggest};
pub use self::env::substitute_set;
pub use self::env::{EnvLookup, StageText, StageValues, environment};
pub use self::grant_http::is_travel_header;
pub use self::grant_http::{HttpHostConfig, HttpMethod};
pub use self::limits::{CompileLimits, ProbationLimits, RejectedMax, SampleLimits, StageLimits};
pub use self::load::{BUFFER_BYTES, load, parse};
pub use self::lookup::{LookupCacheLimits, LookupConfig, LookupSource};
pub use self::reload::Gates;
pub use self::sink_settings::{
    ReplaySupport, Rerun, SameSettings, SharedOutput, SharedParts, SinkBuildError, SinkContext,
    SinkSettings,
};
pub use self::sink_type::{Key, KeyDefault, KeyForm, ReadSink, SinkTable, SinkType, SinkTypes};
pub use self::source::{NotAStart, parse_start};
pub use self::target::{CommitPolicy, SinkConfig};
pub use self::timing::{HttpDeadlines, Timing};
pub use self::write_mode::WriteMode;
use shardmill_core::private::StateDir;
use shardmill_core::record::{
    Column, LookupName, PipelineName, RouteName, SinkName, StageName, StreamRef,
};
pub use shardmill_core::secret::Secret;
use shardmill_core::source::StartPosition;
pub use shardmill_core::values::Values;

/// A pipeline that can run, as far as the file alone can tell.
#[derive(Clone, Debug)]
pub struct PipelineConfig {
    /// The file and its text: later checks (plugins, tables) point into it too.
    pub file: Arc<ConfigFile>,
    /// The pipeline's name: part of every position's key.
    pub name: PipelineName,
    /// Where state lives: positions, dead letters, revisions, compiled plugins.
    pub state_dir: StateDir,
    /// Where records come from.
    pub source: SourceConfig,
    /// The stages, in the order in which records pass them; none: every record goes to every sink as
    /// it came.
    pub stages: Vec<StageConfig>,
    /// The sinks, at least one.
    pub sinks: Vec<SinkConfig>,
    /// Sinks that get copies of the dead letters, and nothing else.
    pub dead_letter_sinks: Vec<SinkConfig>,
    /// Bytes that the store of dead letters may hold; `None`: 10 GiB, or half of the free disk.
    pub dead_letters_bytes_max: Option<usize>,
    /// The tables that plugins may be granted to look rows up in.
    pub lookups: Vec<LookupConfig>,
    /// Bytes that all sinks' buffers may hold together.
    pub buffer_bytes_max: usize,
    /// When more records than this are rejected, the lane blocks.
    pub rejected_max: RejectedMax,
    /// What to do when a sink stands behind the checkpoint.
    pub on_position_mismatch: OnPositionMismatch,
    /// Deadlines and pauses.
    pub timing: Timing,
    /// How it is changed while it runs.
    pub reload: ReloadConfig,
    /// The admin port; `None`: none is opened.
    pub admin: Option<AdminConfig>,
    /// The intake; `None`: none is opened.
    pub intake: Option<IntakeConfig>,
    /// Values of variables in the file: no text of a server or a plugin may show them.
    pub values: Values,
}

impl PipelineConfig {
    /// Each sink's name with a digest of its description in the file, which may hold a password.
    pub fn sink_fingerprints(&self) -> Vec<(SinkName, String)> {
        let digest = |sink: &SinkConfig| {
            shardmill_core::record::Digest::of(sink.fingerprint_json.as_bytes()).to_string()
        };
        self.sinks.iter().map(|sink| (sink.name.value.clone(), digest(sink))).collect()
    }

    /// Limits within which each component compiles that one of the stages takes. A stored component is not known
    /// to be of one stage: with less, a start could refuse what a swap took.
    pub fn compile_limits(&self) -> CompileLimits {
        let limits = self.stages.iter().map(|stage| stage.compile_limits);
        limits.reduce(CompileLimits::larger).unwrap_or_default()
    }

    /// The pipeline that copies dead letters, described by `columns`, to their sinks; `None` when there
    /// are none. Its state is kept under `state_dir`.
    pub fn for_dead_letters(&self, state_dir: PathBuf, columns: Vec<Column>) -> Option<Self> {
        if self.dead_letter_sinks.is_empty() {
            return None;
        }
        let format = Some("application/json".into());
        Some(Self {
            state_dir: self.state_dir.at(state_dir),
            source: SourceConfig { format, columns, ..self.source.clone() },
            stages: Vec::new(),
            sinks: self.dead_letter_sinks.clone(),
            dead_letter_sinks: Vec::new(),
            lookups: Vec::new(),
            admin: None,
            intake: None,
            ..self.clone()
        })
    }
}

/// How a pipeline is changed while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReloadConfig {
    /// Whether changed files are loaded by themselves.
    pub watch: bool,
    /// What is kept for trials.
    pub samples: SampleLimits,
    /// What a candidate must keep in its trial.
    pub gates: Gates,
    /// When a new version is undone by itself.
    pub probation: ProbationLimits,
}

/// The admin port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: std::net::SocketAddr,
    /// The token of requests that change something; `None`: a new one is written for the owner of the process
    /// at each start.
    pub token: Option<Secret>,
    /// The token that opens `/metrics` and `/status` and nothing else. Once it or `token` is set, both ask for one.
    pub read_token: Option<Secret>,
    /// Names under which requests without a token may come, beside addresses and `localhost`.
    pub hosts: Vec<String>,
    /// Connections at once.
    pub connections_max: usize,
    /// Of these, connections of one peer that is not on this machine; `None`: any number.
    pub per_peer_max: Option<usize>,
}

/// A configuration file. `${VAR}` is replaced in string values only, after parsing, so spans hold.
#[derive(Debug)]
pub struct ConfigFile {
    /// The path as the user gave it.
    pub path: PathBuf,
    /// Its text as written (spans point into it).
    pub text: String,
}

/// A value and where it stands in the file, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Its bytes in [`ConfigFile::text`].
    pub span: Range<usize>,
}

/// Where records come from.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// What is read.
    pub kind: SourceKind,
    /// How batches are cut.
    pub batch: BatchLimits,
    /// The media type of the payloads, when the user declares it: checked against the first stage.
    pub format: Option<String>,
    /// The columns of the payloads, where they are known: for pipelines without a stage.
    pub columns: Vec<Column>,
}

impl SourceConfig {
    /// What plugins and positions call the stream: its name, or the file's path.
    pub fn stream_name(&self) -> String {
        match &self.kind {
            SourceKind::Kinesis(kinesis) => kinesis.stream.value.name.to_string(),
            SourceKind::File(file) => file.path.display().to_string(),
        }
    }

    /// The Kinesis stream, if that is what is read.
    pub fn kinesis(&self) -> Option<&KinesisConfig> {
        match &self.kind {
            SourceKind::Kinesis(kinesis) => Some(kinesis),
            SourceKind::File(_) => None,
        }
    }
}

/// What is read.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one per pipeline")]
pub enum SourceKind {
    /// A Kinesis stream.
    Kinesis(KinesisConfig),
    /// The lines of a file, as one shard.
    File(FileConfig),
}

/// A Kinesis stream and how it is read.
#[derive(Clone, Debug)]
pub struct KinesisConfig {
    /// The stream.
    pub stream: Located<StreamRef>,
    /// The server that has it.
    pub server: StreamServer,
    /// Where a shard without a position starts.
    pub start: StartPosition,
    /// What to do when the stream no longer holds what was not read yet.
    pub on_lost_records: OnLostRecords,
    /// Create the stream when it does not exist.
    pub create: Option<CreateStream>,
    /// How shards are read.
    pub reader: ReaderKind,
    /// The most records that one GetRecords call asks for, 1 to 10,000.
    pub records_per_call_max: u32,
    /// The pause between two GetRecords calls of one shard that has nothing new, at least 200 ms
    /// against AWS (5 calls per second and shard).
    pub poll_interval: Duration,
}

/// How shards are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReaderKind {
    /// By GetRecords: 2 MB/s per shard, shared by all who poll.
    Polling,
    /// By SubscribeToShard: 2 MB/s per shard and consumer, pushed.
    FanOut {
        /// The consumer's name; it is registered if it is not there.
        consumer: String,
    },
}

/// What to do when the stream no longer holds records that were not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLostRecords {
    /// Stop with an error: a person must decide.
    Stop,
    /// Go on with the oldest record that there is; the loss is told and counted.
    Continue,
}

/// The server that has a stream, and as whom it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamServer {
    /// Where it is.
    pub endpoint: Endpoint,
    /// The AWS region; `None`: that of the ARN, or the standard chain.
    pub region: Option<String>,
    /// The role to assume, of this account or another.
    pub assume_role: Option<AssumeRole>,
}

/// A role to assume.
///
/// Source: AWS STS API reference, AssumeRole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssumeRole {
    /// The role's ARN.
    pub arn: String,
    /// What the role's trust policy asks for, if it does.
    pub external_id: Option<String>,
    /// The session's name, as it shows in the account's logs.
    pub session_name: String,
}

/// The lines of a file, or of standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// The file; `-` is standard input.
    pub path: PathBuf,
    /// Where a record ends.
    pub cut: FileCut,
    /// Records to leave out at the beginning.
    pub skip_lines: u64,
}

/// Where the records of a file end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileCut {
    /// At each line break.
    Lines,
    /// At each line break outside quotes, as RFC 4180 says. A quote opens a field behind the delimiter;
    /// `None`: behind any of those that are usual.
    Csv {
        /// The byte between two fields.
        delimiter: Option<u8>,
    },
}

/// The HTTP port that takes events and puts them on the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntakeConfig {
    /// Where it listens.
    pub listen: std::net::SocketAddr,
    /// The largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Bytes of all requests whose records the stream does not have yet; beyond: 429.
    pub in_flight_bytes_max: usize,
    /// The JSON member that is the partition key; `None`: the header, or at random.
    pub key_member: Option<String>,
    /// Origins of the pages in browsers that may send events.
    pub origins: Vec<String>,
    /// Connections at once.
    pub connections_max: usize,
}

/// The server that speaks the Kinesis API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// AWS, by the standard chain.
    Aws,
    /// The embedded stream: ours on loopback.
    Embedded,
    /// Another server.
    Url(url::Url),
}

/// How to create a stream that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateStream {
    /// Its number of shards, at least 1.
    pub shards: u32,
    /// How long to wait until it is ACTIVE.
    pub wait_max: Duration,
}

/// A batch is cut at the first of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Records, at least 1.
    pub records_max: usize,
    /// Payload bytes; one larger record travels alone.
    pub bytes_max: usize,
}

impl Default for BatchLimits {
    /// 1,024 records and 256 KiB: they make the fixed cost of a plugin's call vanish.
    fn default() -> Self {
        Self { records_max: 1_024, bytes_max: 256 << 10 }
    }
}

/// One plugin in the path.
#[derive(Clone, Debug)]
pub struct StageConfig {
    /// Its name, unique in the pipeline.
    pub name: Located<StageName>,
    /// The component's file, absolute or relative to the configuration file (already joined).
    pub plugin: Located<PathBuf>,
    /// The digest that the file must have, 64 lower-case hex digits.
    pub sha256: Option<Located<String>>,
    /// `[stage.config]` as JSON text, with today's values of its variables. It is never stored.
    pub config_json: String,
    /// The same as the file has it, which is what is stored.
    pub config_text: StageText,
    /// What its plugin may ask of the host.
    pub grants: Grants,
    /// The hosts that its plugin may send requests to, for `http`. No part of the revision: they
    /// hold secrets.
    pub http_hosts: Vec<HttpHostConfig>,
    /// What one batch may use.
    pub limits: StageLimits,
    /// What compiling its plugin may use.
    pub compile_limits: CompileLimits,
    /// Which route goes to which sinks. A route bound to no sink (`[]`) is dropped on purpose.
    pub routes: BTreeMap<RouteName, BoundSinks>,
    /// Where the stage's table begins, for errors about what is missing in it.
    pub span: Range<usize>,
}

/// The sinks of one route, with the places in the file.
#[derive(Clone, Debug)]
pub struct BoundSinks {
    /// The route's key in the file.
    pub key_span: Range<usize>,
    /// The sinks, each existing.
    pub sinks: Vec<Located<SinkName>>,
}

/// What a stage's plugin may ask of the host; part of the revision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// The capabilities.
    pub capabilities: BTreeSet<Capability>,
    /// The reference tables, for `lookup`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub lookups: BTreeSet<LookupName>,
}

impl Grants {
    /// Whether nothing is granted.
    pub fn is_empty(&self) -> bool {
        self.capabilities.is_empty()
    }
}

/// What to do when a sink stands behind the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPositionMismatch {
    /// Stop, name both, name the choices.
    Stop,
    /// Believe the sink: start there.
    Sink,
    /// Believe the checkpoint: start there.
    Checkpoint,
}
