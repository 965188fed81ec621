//! The configuration of a pipeline: `pipeline.toml`, parsed and validated.
//!
//! There are two layers of types: `raw` is what TOML can express, [`PipelineConfig`] is what can run. Only [`load()`]
//! makes the second, and all other crates take only the second. Each error names file, line and column, underlines the
//! text and says what to write instead.
//!
//! This crate does not know the sink types. Each is a crate that implements [`SinkType`] and [`SinkSettings`]; the
//! program passes the list of its types to [`load()`]. A new sink is one folder and one line in that list: the folder
//! reads its own table with the readers of [`reading`], names its keys for the reference, and makes the sink.
//!
//! Example of a validated value: the start of a stream that has not been read yet.
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

/// Pipeline that can run, as far as the file alone shows.
#[derive(Clone, Debug)]
pub struct PipelineConfig {
    /// The file and its text: problems that later checks (plugins, tables) find point into it.
    pub file: Arc<ConfigFile>,
    /// Name of the pipeline: part of the key of every position.
    pub name: PipelineName,
    /// Folder of the state: positions, dead letters, revisions, compiled plugins.
    pub state_dir: StateDir,
    /// Source of records.
    pub source: SourceConfig,
    /// Stages, in the order in which records pass them. Without stages, every record goes to every sink unchanged.
    pub stages: Vec<StageConfig>,
    /// Sinks, at least one.
    pub sinks: Vec<SinkConfig>,
    /// Sinks that get copies of the dead letters, and nothing else.
    pub dead_letter_sinks: Vec<SinkConfig>,
    /// Limit of the store of dead letters, in bytes; `None`: 10 GiB, or half of the free disk.
    pub dead_letters_bytes_max: Option<usize>,
    /// Reference tables that plugins may be granted.
    pub lookups: Vec<LookupConfig>,
    /// Limit of all sinks' buffers together, in bytes.
    pub buffer_bytes_max: usize,
    /// Number of rejected records after which the lane blocks.
    pub rejected_max: RejectedMax,
    /// Action if a sink's position is before the one that the state remembers, or before the checkpoint.
    pub on_position_mismatch: OnPositionMismatch,
    /// Deadlines and pauses.
    pub timing: Timing,
    /// How it is changed while it runs.
    pub reload: ReloadConfig,
    /// Admin port; `None`: none is opened.
    pub admin: Option<AdminConfig>,
    /// Intake; `None`: none is opened.
    pub intake: Option<IntakeConfig>,
    /// Values of variables in the file, which no text of a server or plugin may show.
    pub values: Values,
}

impl PipelineConfig {
    /// Returns the name of each sink with a digest of its table in the file. A digest, because the table may contain a
    /// password.
    pub fn sink_fingerprints(&self) -> Vec<(SinkName, String)> {
        let digest = |sink: &SinkConfig| {
            shardmill_core::record::Digest::of(sink.fingerprint_json.as_bytes()).to_string()
        };
        self.sinks.iter().map(|sink| (sink.name.value.clone(), digest(sink))).collect()
    }

    /// Returns compile limits that are large enough for the component of any stage. A stored component is not known to
    /// belong to a certain stage; with lower limits, a start could refuse what a swap has accepted.
    pub fn compile_limits(&self) -> CompileLimits {
        let limits = self.stages.iter().map(|stage| stage.compile_limits);
        limits.reduce(CompileLimits::larger).unwrap_or_default()
    }

    /// Returns the pipeline that copies dead letters to their sinks; `None` if there are no such sinks. `columns`
    /// describes the copies, and its state is stored under `state_dir`.
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
    /// Whether changed files are loaded automatically.
    pub watch: bool,
    /// Limits of the samples for trials.
    pub samples: SampleLimits,
    /// Limits of a candidate in its trial.
    pub gates: Gates,
    /// Limits after which a new version is rolled back.
    pub probation: ProbationLimits,
}

/// Admin port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Address to listen on.
    pub listen: std::net::SocketAddr,
    /// Token of requests that change something; `None`: a new one is written to a file of the process's owner at each
    /// start.
    pub token: Option<Secret>,
    /// Token that gives access to `/metrics` and `/status` only. If it or `token` is set, these two need a token.
    pub read_token: Option<Secret>,
    /// Host names under which requests without a token are accepted, besides addresses and `localhost`.
    pub hosts: Vec<String>,
    /// Highest number of connections.
    pub connections_max: usize,
    /// Highest number of connections of one peer that is not on this machine; `None`: no limit.
    pub per_peer_max: Option<usize>,
}

/// Configuration file. `${VAR}` is replaced in string values only, after parsing, so spans stay valid.
#[derive(Debug)]
pub struct ConfigFile {
    /// Path as the user gave it.
    pub path: PathBuf,
    /// Text as written; spans point into it.
    pub text: String,
}

/// Value with its place in the file, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// Value.
    pub value: T,
    /// Bytes of the value in [`ConfigFile::text`].
    pub span: Range<usize>,
}

/// Source of records.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Kind of source.
    pub kind: SourceKind,
    /// Limits of a batch.
    pub batch: BatchLimits,
    /// Media type of the payloads, if declared. It is checked against the first stage.
    pub format: Option<String>,
    /// Columns of the payloads, if known; for pipelines without a stage.
    pub columns: Vec<Column>,
}

impl SourceConfig {
    /// Returns the name of the stream for plugins and positions: its name, or the path of the file.
    pub fn stream_name(&self) -> String {
        match &self.kind {
            SourceKind::Kinesis(kinesis) => kinesis.stream.value.name.to_string(),
            SourceKind::File(file) => file.path.display().to_string(),
        }
    }

    /// Returns the Kinesis stream, if the source is one.
    pub fn kinesis(&self) -> Option<&KinesisConfig> {
        match &self.kind {
            SourceKind::Kinesis(kinesis) => Some(kinesis),
            SourceKind::File(_) => None,
        }
    }
}

/// Kind of source.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one per pipeline")]
pub enum SourceKind {
    /// A Kinesis stream.
    Kinesis(KinesisConfig),
    /// The lines of a file, as one shard.
    File(FileConfig),
}

/// Kinesis stream, and how it is read.
#[derive(Clone, Debug)]
pub struct KinesisConfig {
    /// Stream.
    pub stream: Located<StreamRef>,
    /// Server of the stream.
    pub server: StreamServer,
    /// Start of shards without a position.
    pub start: StartPosition,
    /// Action if the stream has dropped records that were not read yet.
    pub on_lost_records: OnLostRecords,
    /// How to create the stream if it does not exist.
    pub create: Option<CreateStream>,
    /// How shards are read.
    pub reader: ReaderKind,
    /// Highest number of records of one GetRecords call, 1 to 10,000.
    pub records_per_call_max: u32,
    /// Pause between two GetRecords calls of a shard without new records; at least 200 ms against AWS (which allows 5
    /// calls per second and shard).
    pub poll_interval: Duration,
}

/// How shards are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReaderKind {
    /// With GetRecords: 2 MB/s per shard, shared by all readers that poll.
    Polling,
    /// With SubscribeToShard: 2 MB/s per shard and consumer, pushed.
    FanOut {
        /// Name of the consumer, which is registered if it does not exist.
        consumer: String,
    },
}

/// Action if the stream has dropped records that were not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLostRecords {
    /// Stop with an error: a person must decide.
    Stop,
    /// Go on at the oldest record; the loss is logged and counted.
    Continue,
}

/// Server of a stream, and the identity for requests to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamServer {
    /// Address of the server.
    pub endpoint: Endpoint,
    /// AWS region; `None`: that of the ARN, or of the standard chain.
    pub region: Option<String>,
    /// Role to assume, of this account or another.
    pub assume_role: Option<AssumeRole>,
}

/// Role to assume.
///
/// Source: AWS STS API reference, AssumeRole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssumeRole {
    /// ARN of the role.
    pub arn: String,
    /// External id, if the role's trust policy requires one.
    pub external_id: Option<String>,
    /// Name of the session, as shown in the account's logs.
    pub session_name: String,
}

/// Lines of a file or of standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// File; `-` is standard input.
    pub path: PathBuf,
    /// How the file is cut into records.
    pub cut: FileCut,
    /// Number of records to skip at the beginning.
    pub skip_lines: u64,
}

/// How a file is cut into records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileCut {
    /// At each line break.
    Lines,
    /// At each line break outside quotes (RFC 4180). A quote opens a field after the delimiter; `None`: after any of
    /// the usual delimiters.
    Csv {
        /// Byte between two fields.
        delimiter: Option<u8>,
    },
}

/// HTTP port that receives events and puts them into the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntakeConfig {
    /// Address to listen on.
    pub listen: std::net::SocketAddr,
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Limit of the bytes of all requests whose records are not in the stream yet; above it, requests get 429.
    pub in_flight_bytes_max: usize,
    /// JSON member that contains the partition key; `None`: the header, or a random key.
    pub key_member: Option<String>,
    /// Origins of the web pages that may send events.
    pub origins: Vec<String>,
    /// Highest number of connections.
    pub connections_max: usize,
}

/// Server with the Kinesis API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// AWS, by the standard chain.
    Aws,
    /// Embedded stream, on loopback.
    Embedded,
    /// Another server.
    Url(url::Url),
}

/// How to create a missing stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateStream {
    /// Number of shards, at least 1.
    pub shards: u32,
    /// How long to wait until it is ACTIVE.
    pub wait_max: Duration,
}

/// Limits of a batch: it is cut at the first one that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Records, at least 1.
    pub records_max: usize,
    /// Payload bytes. A larger record gets a batch of its own.
    pub bytes_max: usize,
}

impl Default for BatchLimits {
    /// 1,024 records and 256 KiB: with these the fixed cost of a plugin call is negligible.
    fn default() -> Self {
        Self { records_max: 1_024, bytes_max: 256 << 10 }
    }
}

/// Stage: one plugin and its settings.
#[derive(Clone, Debug)]
pub struct StageConfig {
    /// Name, unique in the pipeline.
    pub name: Located<StageName>,
    /// File of the component, absolute or already joined with the folder of the configuration file.
    pub plugin: Located<PathBuf>,
    /// Expected digest of the file, 64 lower-case hex digits.
    pub sha256: Option<Located<String>>,
    /// `[stage.config]` as JSON text, with the current values of its variables. It is never stored.
    pub config_json: String,
    /// The same as written in the file; this form is stored.
    pub config_text: StageText,
    /// Capabilities that its plugin may use.
    pub grants: Grants,
    /// Hosts to which its plugin may send requests (`http`). They are not part of the revision, because they contain
    /// secrets.
    pub http_hosts: Vec<HttpHostConfig>,
    /// Limits of one call.
    pub limits: StageLimits,
    /// Limits of compiling its plugin.
    pub compile_limits: CompileLimits,
    /// Sinks of each route. A route without a sink (`[]`) is dropped on purpose.
    pub routes: BTreeMap<RouteName, BoundSinks>,
    /// Where the stage's table begins, for problems about missing keys.
    pub span: Range<usize>,
}

/// Sinks of one route, with their places in the file.
#[derive(Clone, Debug)]
pub struct BoundSinks {
    /// Place of the route's key.
    pub key_span: Range<usize>,
    /// Sinks; all exist.
    pub sinks: Vec<Located<SinkName>>,
}

/// Capabilities that a stage's plugin may use. They are part of the revision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// Capabilities.
    pub capabilities: BTreeSet<Capability>,
    /// Reference tables, for `lookup`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub lookups: BTreeSet<LookupName>,
}

impl Grants {
    /// Whether nothing is granted.
    pub fn is_empty(&self) -> bool {
        self.capabilities.is_empty()
    }
}

/// Action if a sink's position is before the one that the state remembers, or before the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPositionMismatch {
    /// Stop, and name both positions and the choices.
    Stop,
    /// Go on after the sink's position.
    Sink,
    /// Go on after the checkpoint, or after the sink's position if that is later.
    Checkpoint,
}
