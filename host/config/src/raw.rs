//! The shape of each table in TOML, before its values are validated.
//!
//! Each sink type has the shape of its own table in its own crate, made of the value types of this module.
//!
//! Every value keeps its place. Values with a unit, or with a syntax of their own, stay text here; the modules
//! `source`, `stage` and `sink` turn them into [`super::PipelineConfig`].

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error, Unexpected, Visitor};
use serde::{Deserialize, de::IgnoredAny};
use toml::Spanned;

/// Optional value.
pub type Maybe<T> = Option<Spanned<T>>;

/// `[pipeline]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawPipeline {
    pub name: Spanned<Text>,
    pub state_dir: Maybe<Text>,
    pub buffer: Maybe<Size>,
    pub rejected_of_last_1000: Maybe<Count>,
    pub rejected_in_a_row: Maybe<Count>,
    pub on_position_mismatch: Maybe<Text>,
}

/// `[timing]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTiming {
    pub drain: Maybe<DurationText>,
    pub retry_pause: Maybe<DurationText>,
    pub shard_sync: Maybe<DurationText>,
    pub checkpoint: Maybe<DurationText>,
    pub kinesis_silence: Maybe<DurationText>,
    pub postgres_silence: Maybe<DurationText>,
    pub redshift_silence: Maybe<DurationText>,
    pub call_blocked: Maybe<DurationText>,
    pub memory_blocked: Maybe<DurationText>,
    pub memory_turn: Maybe<DurationText>,
    pub give_back: Maybe<DurationText>,
    pub trial: Maybe<DurationText>,
    pub trial_incumbent: Maybe<DurationText>,
    pub http_head: Maybe<DurationText>,
    pub http_body: Maybe<DurationText>,
    pub http_idle: Maybe<DurationText>,
}

/// `[source]` with `type = "kinesis"`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawKinesis {
    #[serde(rename = "type")]
    pub _kind: IgnoredAny,
    pub stream: Spanned<Text>,
    pub endpoint: Maybe<Text>,
    pub region: Maybe<Text>,
    pub assume_role: Option<RawAssumeRole>,
    pub start: Maybe<Text>,
    pub on_lost_records: Maybe<Text>,
    pub create: Option<RawCreate>,
    pub reader: Maybe<Text>,
    pub consumer: Maybe<Text>,
    pub records_per_call: Maybe<Count>,
    pub poll_interval: Maybe<DurationText>,
    pub format: Maybe<Text>,
    pub batch: Option<RawBatch>,
}

/// `[source]` with `type = "file"`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawFile {
    #[serde(rename = "type")]
    pub _kind: IgnoredAny,
    pub path: Spanned<Text>,
    pub skip: Maybe<Count>,
    pub delimiter: Maybe<Text>,
    pub format: Maybe<Text>,
    pub batch: Option<RawBatch>,
}

/// `source.assume_role`
#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a table such as { arn = \"arn:aws:iam::123456789012:role/reader\" }"
)]
pub struct RawAssumeRole {
    pub(super) arn: Spanned<Text>,
    pub(super) external_id: Maybe<Text>,
    pub(super) session_name: Maybe<Text>,
}

/// `[intake]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawIntake {
    pub listen: Spanned<Text>,
    pub body: Maybe<Size>,
    pub in_flight: Maybe<Size>,
    pub key: Maybe<Text>,
    #[serde(default)]
    pub origins: Vec<Spanned<Text>>,
    pub connections: Maybe<Count>,
}

/// `source.create`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { shards = 5 }")]
pub(super) struct RawCreate {
    pub shards: Spanned<Count>,
    pub wait: Maybe<DurationText>,
}

/// `[source.batch]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawBatch {
    pub records: Maybe<Count>,
    pub bytes: Maybe<Size>,
}

/// `[[stage]]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawStage {
    pub name: Spanned<Text>,
    pub plugin: Spanned<Text>,
    pub sha256: Maybe<Text>,
    /// Passed to the plugin as JSON, straight from the TOML tree: see `json`.
    #[serde(rename = "config")]
    pub _config: Option<IgnoredAny>,
    pub grant: Option<RawGrant>,
    pub limits: Option<RawLimits>,
    pub routes: Option<BTreeMap<Spanned<String>, Vec<Spanned<Text>>>>,
}

/// `[stage.grant]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawGrant {
    #[serde(default)]
    pub log: bool,
    #[serde(default)]
    pub metrics: bool,
    #[serde(default)]
    pub clock: bool,
    #[serde(default)]
    pub random: bool,
    #[serde(default)]
    pub lookup: Vec<Spanned<Text>>,
    #[serde(default)]
    pub http: Vec<RawHttpHost>,
}

/// `[stage.limits]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawLimits {
    pub batch_time: Maybe<DurationText>,
    pub record_time: Maybe<DurationText>,
    pub host_time: Maybe<DurationText>,
    pub configure_time: Maybe<DurationText>,
    pub memory: Maybe<Size>,
    pub tables: Maybe<Count>,
    pub output: Maybe<Size>,
    pub retry: Maybe<DurationText>,
    pub outputs: Maybe<Count>,
    pub log_lines: Maybe<Count>,
    pub compile_time: Maybe<DurationText>,
    pub compile_memory: Maybe<Size>,
    pub component: Maybe<Size>,
}

/// Headers that are sent: names and values.
pub type RawHeaders = BTreeMap<Spanned<String>, Spanned<Text>>;

/// `[sink.commit]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct RawCommit {
    pub(super) rows: Maybe<Count>,
    pub(super) bytes: Maybe<Size>,
    pub(super) linger: Maybe<DurationText>,
    pub(super) on_failure: Maybe<Text>,
    pub(super) give_up_after: Maybe<DurationText>,
}

/// `[[lookup]]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawLookup {
    pub name: Spanned<Text>,
    pub url: Spanned<Text>,
    pub query: Spanned<Text>,
    pub timeout: Maybe<DurationText>,
    pub cache: Option<RawLookupCache>,
}

/// `[lookup.cache]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawLookupCache {
    pub entries: Maybe<Count>,
    pub bytes: Maybe<Size>,
    pub ttl: Maybe<DurationText>,
}

/// Host in `stage.grant.http`
#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a list of tables such as [{ host = \"api.example.com\" }]"
)]
pub(super) struct RawHttpHost {
    pub host: Spanned<Text>,
    pub headers: Option<RawHeaders>,
    pub methods: Maybe<Vec<Spanned<Text>>>,
    pub private: Option<bool>,
    pub response: Maybe<Size>,
}

/// `[dead_letters]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawDeadLetters {
    #[serde(default)]
    pub sinks: Vec<Spanned<Text>>,
    pub bytes: Maybe<Size>,
}

/// `[reload]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawReload {
    pub watch: Option<bool>,
    pub trial: Option<RawTrial>,
    pub probation: Option<RawProbation>,
}

/// `[reload.trial]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTrial {
    pub batches: Maybe<Count>,
    pub bytes: Maybe<Size>,
    pub age: Maybe<DurationText>,
    pub max_changed: Maybe<Count>,
    pub max_rejected: Maybe<Count>,
}

/// `[reload.probation]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawProbation {
    pub window: Maybe<DurationText>,
    pub traps: Maybe<Count>,
    pub rejected_percent: Maybe<Count>,
    pub slower: Maybe<Count>,
}

/// `[admin]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAdmin {
    pub listen: Maybe<Text>,
    pub token: Maybe<Text>,
    pub read_token: Maybe<Text>,
    #[serde(default)]
    pub hosts: Vec<Spanned<Text>>,
    pub connections: Maybe<Count>,
    pub connections_per_peer: Maybe<Count>,
}

/// Declares a TOML string type whose error says in the user's words what is expected.
macro_rules! quoted {
    ($(#[$doc:meta])* $name:ident, $expecting:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(pub String);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Quoted;
                impl Visitor<'_> for Quoted {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: Error>(self, text: &str) -> Result<$name, E> {
                        Ok($name(text.to_owned()))
                    }
                }
                deserializer.deserialize_str(Quoted)
            }
        }
    };
}

quoted! {
    /// Any text.
    Text, "text in quotes"
}
quoted! {
    /// Duration with its unit.
    DurationText, "a duration in quotes with its unit, such as \"200 ms\" or \"5 min\""
}
quoted! {
    /// Number of bytes with its unit.
    Size, "a size in quotes with its unit, such as \"256 KiB\" or \"64 MiB\""
}

/// Whole number, 0 or more.
#[derive(Clone, Copy, Debug)]
pub struct Count(pub u64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;
        impl Visitor<'_> for Whole {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number without quotes, 0 or more")
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<Count, E> {
                Ok(Count(number))
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<Count, E> {
                let whole = u64::try_from(number);
                whole.map(Count).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
            }
        }
        deserializer.deserialize_u64(Whole)
    }
}
