//! Connects to a server that speaks the Kinesis API, and classifies its errors.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use aws_config::sts::AssumeRoleProvider;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_kinesis::config::{
    ConfigBag, Credentials, Intercept, ProvideCredentials, Region, RuntimeComponents,
    SharedCredentialsProvider, StalledStreamProtectionConfig,
};
use aws_sdk_kinesis::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_kinesis::primitives::{DateTime, DateTimeFormat};

use super::silence;
use crate::served::Served;
use shardmill_config::{AssumeRole, Endpoint, StreamServer, Timing};
use shardmill_core::boxed;
use shardmill_core::masking::{sanitized, sanitized_within};
use shardmill_core::record::StreamRef;
use shardmill_core::source::SourceError;

/// Region in requests to servers other than AWS.
const OTHER_REGION: &str = "us-east-1";
/// Longest wait for credentials and a region: the standard chain asks several sources, some of them programs.
const LOGIN_WAIT_MAX: Duration = Duration::from_secs(60);

/// Most bytes of an error's code that are shown: those of AWS have up to 50.
pub(super) const CODE_BYTES_MAX: usize = 256;

/// Address of a server that is not AWS.
#[derive(Clone, Debug)]
pub enum Address {
    /// A URL of the configuration, or of this process.
    Url(url::Url),
    /// The embedded stream of another process of this user.
    Served(Served),
}

/// Server, and the credentials to use there.
#[derive(Clone, Copy, Debug)]
pub struct Server<'a> {
    /// Address; `None` is AWS.
    pub url: Option<&'a url::Url>,
    /// Embedded stream at the address: once its process has ended, nothing is sent there.
    pub served: Option<&'a Served>,
    /// AWS region; `None`: that of the standard chain.
    pub region: Option<&'a str>,
    /// Role to assume; `None`: the credentials of the standard chain.
    pub assume_role: Option<&'a AssumeRole>,
    /// Silence after which an attempt of a call fails.
    pub silence_max: Duration,
}

impl Default for Server<'_> {
    fn default() -> Self {
        let silence_max = Timing::default().kinesis_silence_max;
        Self { url: None, served: None, region: None, assume_role: None, silence_max }
    }
}

impl<'a> Server<'a> {
    /// Makes the server of a stream at `address`. The embedded stream checks no credentials, so no role is assumed for
    /// it.
    pub fn of(
        server: &'a StreamServer,
        stream: Option<&'a StreamRef>,
        address: Option<&'a Address>,
    ) -> Self {
        let is_embedded = server.endpoint == Endpoint::Embedded;
        let (url, served) = match address {
            None => (None, None),
            Some(Address::Url(url)) => (Some(url), None),
            Some(Address::Served(served)) => (Some(&**served), Some(served)),
        };
        Self {
            url,
            served,
            region: server.region.as_deref().or(stream.and_then(StreamRef::region)),
            assume_role: server.assume_role.as_ref().filter(|_| !is_embedded),
            ..Self::default()
        }
    }

    /// Sets the deadlines of a pipeline.
    pub fn with_timing(self, timing: &Timing) -> Self {
        Self { silence_max: timing.kinesis_silence_max, ..self }
    }

    /// Makes a server that is not AWS and checks no credentials.
    pub fn at(url: &'a url::Url) -> Self {
        Self { url: Some(url), ..Self::default() }
    }
}

/// Connects to a server. For AWS, the standard chain gives credentials and a region. For a server at a URL,
/// placeholders are used if the environment has none; but not if a role is assumed, since STS checks credentials.
///
/// # Errors
/// [`SourceError::NoRegion`], [`SourceError::NoCredentials`] and [`SourceError::NoRole`], which say what to set.
#[boxed]
pub async fn connect<'a>(server: &'a Server<'a>) -> Result<Client, SourceError> {
    let http = silence::http_client(server.silence_max, None);
    // The SDK's own protection is off: only our deadlines end a call, since users can set them.
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    if let Some(region) = server.region {
        loader = loader.region(Region::new(region.to_owned()));
    }
    if server.url.is_some() {
        if server.assume_role.is_none() && std::env::var_os("AWS_ACCESS_KEY_ID").is_none() {
            loader = loader.credentials_provider(Credentials::new(
                "local",
                "local",
                None,
                None,
                "shardmill",
            ));
        }
        if server.region.is_none() && std::env::var_os("AWS_REGION").is_none() {
            loader = loader.region(Region::new(OTHER_REGION));
        }
    }
    let login_wait_max = LOGIN_WAIT_MAX.max(server.silence_max);
    let late = |_| SourceError::NoCredentials {
        cause: format!(
            "region and credentials were not found within {}",
            humantime::format_duration(login_wait_max)
        ),
    };
    let mut config = tokio::time::timeout(login_wait_max, loader.load()).await.map_err(late)?;
    if config.region().is_none() {
        return Err(SourceError::NoRegion);
    }
    let provider = config
        .credentials_provider()
        .ok_or_else(|| SourceError::NoCredentials { cause: "no provider is configured".into() })?;
    log_in(&provider, login_wait_max)
        .await
        .map_err(|cause| SourceError::NoCredentials { cause })?;
    if let Some(role) = server.assume_role {
        let provider = assume(role, &config, login_wait_max).await?;
        config = config.into_builder().credentials_provider(provider).build();
    }
    // The address is set for Kinesis only: STS has its own.
    let kinesis = aws_sdk_kinesis::config::Builder::from(&config);
    let kinesis = match server.url {
        Some(url) => kinesis.endpoint_url(url.as_str()),
        None => kinesis,
    };
    let kinesis = match server.served {
        Some(served) => {
            kinesis.http_client(silence::http_client(server.silence_max, Some(served.clone())))
        }
        None => kinesis,
    };
    Ok(Client::from_conf(kinesis.build()))
}

/// Returns the credentials of a role, which are renewed before they expire. Verifies them by a first call.
async fn assume(
    role: &AssumeRole,
    config: &SdkConfig,
    wait_max: Duration,
) -> Result<SharedCredentialsProvider, SourceError> {
    let mut builder =
        AssumeRoleProvider::builder(&role.arn).session_name(&role.session_name).configure(config);
    if let Some(external_id) = &role.external_id {
        builder = builder.external_id(external_id);
    }
    let provider = SharedCredentialsProvider::new(builder.build().await);
    log_in(&provider, wait_max)
        .await
        .map_err(|cause| SourceError::NoRole { role: role.arn.clone(), cause })?;
    Ok(provider)
}

/// Requests credentials once, with a deadline: some come from programs, which may hang.
async fn log_in(provider: &SharedCredentialsProvider, wait_max: Duration) -> Result<(), String> {
    match tokio::time::timeout(wait_max, provider.provide_credentials()).await {
        Ok(provided) => provided.map(drop).map_err(|error| causes(&error)),
        Err(_) => Err(format!("no answer within {}", humantime::format_duration(wait_max))),
    }
}

/// Interceptor of a call that keeps the time of its answer, by the server's clock. The clock of this host may be wrong,
/// so nothing depends on it.
#[derive(Clone, Debug)]
pub struct AnswerDate(Arc<AtomicI64>);

/// Value while no answer with a date has come.
const NO_DATE: i64 = i64::MIN;

impl Default for AnswerDate {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(NO_DATE)))
    }
}

impl AnswerDate {
    /// Returns the `Date` of the last answer, in milliseconds since 1970: whole seconds, rounded down. `None`: the
    /// answer had none.
    pub fn ms(&self) -> Option<i64> {
        let date_ms = self.0.load(Ordering::Relaxed);
        (date_ms != NO_DATE).then_some(date_ms)
    }
}

impl Intercept for AnswerDate {
    fn name(&self) -> &'static str {
        "AnswerDate"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let date = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok());
        let date_ms = date.and_then(|date| date.secs().checked_mul(1_000)).unwrap_or(NO_DATE);
        self.0.store(date_ms, Ordering::Relaxed);
        Ok(())
    }
}

/// Class of an error of a call, which decides what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The server throttles: make the same call later.
    Throttled,
    /// The iterator is older than five minutes.
    ExpiredIterator,
    /// The stream or shard does not exist.
    NotFound,
    /// The network or the server failed: make the same call later.
    Passing,
    /// A retry does not help.
    Lasting,
}

impl ErrorClass {
    /// Returns the class as a metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::ExpiredIterator => "expired-iterator",
            Self::NotFound => "not-found",
            Self::Passing => "unreachable",
            Self::Lasting => "refused",
        }
    }
}

/// Classifies an error of the SDK.
///
/// Source: API reference, "Common Errors" and the errors of GetRecords and PutRecords.
pub fn classify<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>) -> ErrorClass {
    match error {
        SdkError::ServiceError(service) => match service.err().code().unwrap_or_default() {
            "ProvisionedThroughputExceededException"
            | "LimitExceededException"
            | "KMSThrottlingException"
            | "ThrottlingException" => ErrorClass::Throttled,
            "ExpiredIteratorException" => ErrorClass::ExpiredIterator,
            "ResourceNotFoundException" => ErrorClass::NotFound,
            "InternalFailure"
            | "InternalFailureException"
            | "ServiceUnavailable"
            | "ServiceUnavailableException"
            | "RequestExpired" => ErrorClass::Passing,
            "" => ErrorClass::Passing,
            _ => ErrorClass::Lasting,
        },
        SdkError::ConstructionFailure(_) => ErrorClass::Lasting,
        _ => ErrorClass::Passing,
    }
}

/// Makes the error of a call, with its place and the beginning of the server's message.
pub fn call_error<E, R>(
    call: &'static str,
    place: impl Into<String>,
    error: &SdkError<E, R>,
) -> SourceError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug + 'static,
{
    let cause = match error {
        SdkError::ServiceError(service) => {
            let error = service.err();
            let (code, message) =
                (error.code().unwrap_or("no code"), error.message().unwrap_or("no message"));
            format!("{}: {}", sanitized_within(code, CODE_BYTES_MAX), sanitized(message))
        }
        other => causes(other),
    };
    SourceError::Call { call, place: place.into(), cause }
}

/// Returns an error with its causes, each once, the outermost first; in one line of bounded length.
fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = Vec::new();
    for text in chain.map(sanitized) {
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
    }
    sanitized(texts.join(": "))
}

#[cfg(test)]
mod tests {
    use aws_sdk_kinesis::error::ErrorMetadata;
    use aws_sdk_kinesis::operation::get_records::GetRecordsError;

    use super::*;
    use shardmill_core::escape::QUOTED_BYTES_MAX;

    /// Returns the error text of a call that the server answered with this code and message.
    fn said(code: &str, message: &str) -> String {
        let meta = ErrorMetadata::builder().code(code).message(message).build();
        let error = SdkError::service_error(GetRecordsError::generic(meta), ());
        call_error("GetRecords", "stream s", &error).to_string()
    }

    #[test]
    fn wall_02_what_a_server_says_is_one_line_of_bounded_length() {
        let short = said("ValidationException", "no\nerror: forged\r\u{202e}");
        assert!(short.ends_with("ValidationException: no\\nerror: forged\\r\\u{202e}"), "{short}");
        let long = "x".repeat(20 << 20);
        let cut = said(&long, &long);
        assert!(cut.len() < QUOTED_BYTES_MAX + 1_024, "{} bytes", cut.len());
        assert_eq!(cut.matches("… (20971520 bytes in all)").count(), 2, "{cut}");
    }

    #[test]
    fn wall_02_the_causes_of_an_error_are_one_line_of_bounded_length() {
        #[derive(Debug, thiserror::Error)]
        #[error("{text}")]
        struct Cause {
            text: String,
            source: Option<Box<Cause>>,
        }
        let inner = Cause { text: "b\nc".into(), source: None };
        let outer = Cause { text: "a".into(), source: Some(Box::new(inner)) };
        assert_eq!(causes(&outer), "a: b\\nc");
        let cause = |letter: &str, source| Cause { text: letter.repeat(20 << 20), source };
        let known = causes(&cause("a", Some(Box::new(cause("b", None)))));
        assert!(known.len() < QUOTED_BYTES_MAX + 64, "{} bytes", known.len());
    }
}
