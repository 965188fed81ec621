//! Settings of an HTTP sink: `[[sink]]` with `type = "http"`.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use url::Url;

use crate::HttpSink;
use shardmill_config::reading::{
    Check, Count, DurationText, Maybe, RESPONSE_BYTES, RawCommit, RawHeaders, Spanned, Text,
    headers, path_digits,
};
use shardmill_config::{
    CommitPolicy, HttpHostConfig, HttpMethod, Key, KeyDefault, KeyForm, ReadSink, SharedParts,
    SinkBuildError, SinkContext, SinkSettings, SinkTable, SinkType,
};
use shardmill_core::sink::Sink;

/// Sink type of HTTP endpoints.
pub const TYPE: &dyn SinkType = &HttpType;

/// Statuses about permission, time or load: they cannot refuse rows.
const NOT_OF_ROWS: [u16; 7] = [401, 403, 407, 408, 425, 429, 503];

const TIMEOUT: Duration = Duration::from_secs(30);
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(600);

struct HttpType;

/// An HTTP endpoint that rows are posted to.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpTarget {
    /// URL, `https://…`.
    pub url: Url,
    /// Host of the URL, with the headers that are sent.
    pub host: HttpHostConfig,
    /// Format of a request's body.
    pub body: HttpBody,
    /// Longest time of a request, up to the head of its answer.
    pub timeout: Duration,
    /// Further statuses that refuse rows.
    pub refuse: Vec<u16>,
}

/// Format of a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpBody {
    /// An array of the rows.
    Json,
    /// One row per line.
    Ndjson,
}

/// `[[sink]]` with `type = "http"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawHttp {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    url: Spanned<Text>,
    headers: Option<RawHeaders>,
    private: Option<bool>,
    format: Maybe<Text>,
    timeout: Maybe<DurationText>,
    #[serde(default)]
    refuse: Vec<Spanned<Count>>,
    commit: Option<RawCommit>,
}

impl SinkType for HttpType {
    fn name(&self) -> &'static str {
        "http"
    }

    fn about(&self) -> &'static str {
        "An HTTP endpoint, at least once: many rows in one POST, with an `Idempotency-Key`, the shard and its \
         positions in headers."
    }

    fn keys(&self) -> &'static [Key] {
        &[
            Key {
                name: "url",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"https://api.example.com/cars\""),
                about: "The endpoint.",
            },
            Key {
                name: "headers",
                form: KeyForm::Table,
                default: KeyDefault::None,
                about: "Headers of each request, such as `{ authorization = \"Bearer ${TOKEN}\" }`.",
            },
            Key {
                name: "private",
                form: KeyForm::Flag,
                default: KeyDefault::Value("false"),
                about: "Whether the endpoint may have a private address, and may be used without TLS.",
            },
            Key {
                name: "format",
                form: KeyForm::Text,
                default: KeyDefault::Value("\"json\""),
                about: "The body of a request: `json`, an array of rows, or `ndjson`, one row per line.",
            },
            Key {
                name: "timeout",
                form: KeyForm::Duration,
                default: KeyDefault::Value("\"30 s\""),
                about: "The longest time until the answer begins.",
            },
            Key {
                name: "refuse",
                form: KeyForm::List,
                default: KeyDefault::None,
                about: "Statuses that refuse rows, in addition to 400, 413, 415 and 422.",
            },
        ]
    }

    fn commit_policy(&self) -> CommitPolicy {
        // Endpoints can usually take this much in one request.
        CommitPolicy::patient(1_000, 1 << 20, Duration::from_secs(1))
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let raw: RawHttp = table.shaped(check)?;
        let settings = target(&raw, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(raw: &RawHttp, check: &mut Check) -> Option<HttpTarget> {
    let private = raw.private.unwrap_or(false);
    let url = endpoint_url(&raw.url, private, check);
    let headers = headers(raw.headers.as_ref(), check);
    let bodies = [("json", HttpBody::Json), ("ndjson", HttpBody::Ndjson)];
    let body = check.choice(&raw.format, "format", HttpBody::Json, &bodies);
    let timeout = check.duration(&raw.timeout, TIMEOUT, TIMEOUTS);
    let refuse = refused_statuses(&raw.refuse, check);
    let (url, headers) = (url?, headers?);
    let host = HttpHostConfig {
        host: url.host_str()?.to_owned(),
        port: url.port(),
        headers,
        methods: vec![HttpMethod::Post],
        private,
        response_bytes_max: RESPONSE_BYTES,
    };
    let (body, timeout, refuse) = (body?, timeout?, refuse?);
    Some(HttpTarget { url, host, body, timeout, refuse })
}

/// Reads the statuses that refuse rows, in addition to those that always do.
fn refused_statuses(raw: &[Spanned<Count>], check: &mut Check) -> Option<Vec<u16>> {
    let mut statuses = Vec::new();
    let mut sound = true;
    for status in raw {
        let number = status.get_ref().0;
        match u16::try_from(number) {
            Ok(number) if (400..=599).contains(&number) && !NOT_OF_ROWS.contains(&number) => {
                statuses.push(number);
            }
            _ => {
                let help = "set a status of 400 to 599 that refuses rows, such as 409; 401, 403, 407, 408, \
                            425, 429 and 503 are about permission, time or load";
                check.problem(status.span(), format!("{number} cannot refuse rows"), help);
                sound = false;
            }
        }
    }
    sound.then_some(statuses)
}

/// Reads the URL of the endpoint.
fn endpoint_url(raw: &Spanned<Text>, private: bool, check: &mut Check) -> Option<Url> {
    let text = check.filled(raw, "URL")?;
    let help = "write for example \"https://api.example.com/events\"";
    let (message, help) = match Url::parse(&text) {
        Err(cause) => (format!("invalid URL: {cause}"), help),
        Ok(url) if url.host_str().is_none() || !matches!(url.scheme(), "https" | "http") => {
            (format!("expected an HTTP endpoint, found `{}://`", url.scheme()), help)
        }
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            let help = "set headers = { authorization = \"Basic ${TOKEN}\" }";
            ("the URL has a user or a password, which are not sent".to_owned(), help)
        }
        Ok(url) if url.scheme() == "http" && !private => {
            let help = "use https://, or set private = true for a host of your own network";
            ("rows would be sent without encryption".to_owned(), help)
        }
        Ok(url) => return Some(url),
    };
    check.problem(raw.span(), message, help);
    None
}

impl SinkSettings for HttpTarget {
    fn destination(&self) -> Option<String> {
        let origin = self.url.origin().ascii_serialization();
        Some(format!("http {origin} path {}", path_digits(&self.url)))
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        let values = context.pipeline.values.clone();
        Ok(Arc::new(HttpSink::new(context.name.clone(), self.clone(), values)?))
    }
}
