//! Settings of a Kinesis sink: `[[sink]]` with `type = "kinesis"`.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::KinesisSink;
use shardmill_config::reading::{
    Check, Maybe, RawAssumeRole, RawCommit, Spanned, Text, server, stream, without_user,
};
use shardmill_config::{
    CommitPolicy, Endpoint, Key, KeyDefault, KeyForm, ReadSink, SharedParts, SinkBuildError,
    SinkContext, SinkSettings, SinkTable, SinkType, StreamServer,
};
use shardmill_core::record::StreamRef;
use shardmill_core::sink::Sink;

/// Sink type of Kinesis streams.
pub const TYPE: &dyn SinkType = &KinesisType;

struct KinesisType;

/// A Kinesis stream that rows are put on.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamTarget {
    /// Stream.
    pub stream: StreamRef,
    /// Server of the stream.
    pub server: StreamServer,
    /// Whether a request has at most one record per partition key.
    pub strict_order: bool,
}

/// `[[sink]]` with `type = "kinesis"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawKinesis {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    stream: Spanned<Text>,
    endpoint: Maybe<Text>,
    region: Maybe<Text>,
    assume_role: Option<RawAssumeRole>,
    strict_order: Option<bool>,
    commit: Option<RawCommit>,
}

impl SinkType for KinesisType {
    fn name(&self) -> &'static str {
        "kinesis"
    }

    fn about(&self) -> &'static str {
        "Records of another Kinesis stream, at least once."
    }

    fn keys(&self) -> &'static [Key] {
        &[
            Key {
                name: "stream",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"cars\""),
                about: "The stream's name, or its ARN if it belongs to another account.",
            },
            Key {
                name: "endpoint",
                form: KeyForm::Text,
                default: KeyDefault::None,
                about: "A server that speaks the Kinesis API, or `embedded`; without it: AWS.",
            },
            Key {
                name: "region",
                form: KeyForm::Text,
                default: KeyDefault::None,
                about: "The AWS region; without it: that of the ARN, or of the standard chain.",
            },
            Key {
                name: "assume_role",
                form: KeyForm::Table,
                default: KeyDefault::None,
                about: "The role to assume: `{ arn = \"…\" }`, with `external_id` and `session_name` as needed.",
            },
            Key {
                name: "strict_order",
                form: KeyForm::Flag,
                default: KeyDefault::Value("false"),
                about: "A request has at most one record per partition key, so that their order holds even if the \
                        stream refuses some of them for now.",
            },
        ]
    }

    fn commit_policy(&self) -> CommitPolicy {
        // Ten full requests. A short time, because readers of the stream wait for the records.
        CommitPolicy::patient(5_000, 4 << 20, Duration::from_millis(200))
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let raw: RawKinesis = table.shaped(check)?;
        let settings = target(&raw, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(raw: &RawKinesis, check: &mut Check) -> Option<StreamTarget> {
    let stream = stream(&raw.stream, check);
    let server = server(&raw.endpoint, &raw.region, raw.assume_role.as_ref(), check);
    let strict_order = raw.strict_order.unwrap_or(false);
    Some(StreamTarget { stream: stream?.value, server: server?, strict_order })
}

impl SinkSettings for StreamTarget {
    fn destination(&self) -> Option<String> {
        let Self { stream, server, .. } = self;
        let place = match &server.endpoint {
            Endpoint::Aws => format!("{:?}", server.region.as_deref().unwrap_or_default()),
            Endpoint::Embedded => "embedded".to_owned(),
            Endpoint::Url(url) => without_user(url.as_str()),
        };
        Some(format!("kinesis {stream} at {place}"))
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn stream_server(&self) -> Option<&StreamServer> {
        Some(&self.server)
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        let state_dir = context.pipeline.state_dir.to_path_buf();
        let sink = KinesisSink::new(context.name.clone(), self.clone(), state_dir);
        Ok(Arc::new(sink.with_timing(context.pipeline.timing)))
    }
}
