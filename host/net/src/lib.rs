//! HTTP requests to the hosts that a grant lists, and to no others: for the plugins' capability `http`, and for the
//! HTTP sink.
//!
//! [`HttpGrant::send`] does all steps: it checks the request against the grant, adds the headers of the grant, checks
//! the address ([`resolver`], [`address`]), and reads the answer up to its limit. It does not follow redirects, which
//! would lead past the grant, and ignores proxies of the environment, which would connect to unchecked addresses.
//!
//! An [`HttpFailure`] says whether the same request may succeed later. This crate does not know plugins or sinks. It
//! uses `config` for the grant and `core`; its only heavy dependency is reqwest.
//!
//! ```
//! use std::time::{Duration, Instant};
//!
//! use shardmill_config::{HttpHostConfig, HttpMethod};
//! use shardmill_net::{HttpGrant, HttpRequest};
//!
//! let runtime = tokio::runtime::Runtime::new()?;
//! let host = HttpHostConfig {
//!     host: "127.0.0.1".into(),
//!     port: None,
//!     headers: Vec::new(),
//!     methods: vec![HttpMethod::Get],
//!     private: false,
//!     response_bytes_max: 1 << 20,
//! };
//! let grant = HttpGrant::new(&[host], runtime.handle().clone())?;
//! let get = |url: &str| {
//!     let request = HttpRequest { method: "GET".into(), url: url.into(), ..HttpRequest::default() };
//!     grant.send(request, Instant::now() + Duration::from_secs(1))
//! };
//! // A host that is not listed, and one whose address is not public.
//! for url in ["https://example.com/", "https://127.0.0.1/"] {
//!     assert!(get(url).is_err_and(|refused| !refused.retryable), "{url}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address;
mod resolver;
mod retry_after;
mod watched;

use std::error::Error as _;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Client, Method};
use tokio::runtime::Handle;
use url::{Host, Url};

use self::address::is_allowed;
use self::resolver::{GuardedResolver, RefusedAddress};
use self::watched::{Sent, WatchedBody};
use shardmill_config::{HttpHostConfig, HttpMethod, is_travel_header};
use shardmill_core::masking::sanitized;
use shardmill_core::off_thread;

/// User agent, unless the plugin or the grant sets another.
const USER_AGENT: &str = concat!("shardmill/", env!("CARGO_PKG_VERSION"));

/// Characters of a `Location` that are shown.
const LOCATION_CHARS: usize = 300;

/// Limit of the headers of one answer: many times what servers send.
const ANSWER_HEADERS_MAX: usize = 1_000;

/// Limits of reading a body when only the status matters: bytes and time.
const SAID_BYTES_MAX: usize = 64 << 10;
const SAID_TIME_MAX: Duration = Duration::from_secs(1);

/// Limit of the headers of one request: more than any API needs.
pub const HEADERS_MAX: usize = 100;
/// Limit of the bytes of all headers together.
pub const HEADER_BYTES_MAX: usize = 64 << 10;
/// Limit of the URL of a plugin's request, with its method, in bytes: more than servers accept.
pub const URL_BYTES_MAX: usize = 16 << 10;

/// Requests that the plugin of one stage, or one sink, may send, and the hosts. Its lanes share it and its connections.
pub struct HttpGrant {
    hosts: Vec<GrantedHost>,
    public: Client,
    private: Client,
    runtime: Handle,
}

/// Granted host, with its headers ready to be sent.
struct GrantedHost {
    config: HttpHostConfig,
    headers: HeaderMap,
}

/// Request of a plugin.
#[derive(Clone, Debug, Default)]
pub struct HttpRequest {
    /// Method, such as `GET`.
    pub method: String,
    /// URL, with scheme and host.
    pub url: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// Body; empty: none.
    pub body: Vec<u8>,
}

/// Answer with any status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpResponse {
    /// Status, such as 200.
    pub status: u16,
    /// Names in lower case, and values. Invalid UTF-8 is replaced by U+FFFD.
    pub headers: Vec<(String, String)>,
    /// Body, not longer than the limit of the grant.
    pub body: Vec<u8>,
}

/// Answer of which only the head counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// Status, such as 200.
    pub status: u16,
    /// Target of a redirect, without parts that could be secret.
    pub location: Option<String>,
    /// Pause that the server asks for.
    pub retry_after: Option<Duration>,
    /// Beginning of the body, as far as it arrived in time; only for messages.
    pub said: Vec<u8>,
}

/// Reason why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct HttpFailure {
    /// Whether the same request may succeed later. False if it is not allowed, or invalid.
    pub retryable: bool,
    /// Reason, in one line without secrets.
    pub message: String,
}

impl HttpFailure {
    fn retryable(message: impl Into<String>) -> Self {
        Self { retryable: true, message: message.into() }
    }

    fn refused(message: impl Into<String>) -> Self {
        Self { retryable: false, message: message.into() }
    }
}

impl HttpGrant {
    /// Makes a grant of these hosts, without connecting. Connections live on `runtime`, which must drive time and the
    /// network.
    ///
    /// # Errors
    /// The client cannot be made: the certificates of the machine cannot be read, or a header of the grant is invalid.
    pub fn new(hosts: &[HttpHostConfig], runtime: Handle) -> Result<Self, HttpFailure> {
        shardmill_tls::install();
        let hosts: Result<Vec<_>, _> = hosts.iter().cloned().map(GrantedHost::new).collect();
        Ok(Self { hosts: hosts?, public: client(false)?, private: client(true)?, runtime })
    }

    /// Sends a request and reads the answer. Blocks until `deadline` at most: call it from a blocking thread, never
    /// from async code.
    ///
    /// # Errors
    /// [`HttpFailure`] if the request is not granted, if no answer arrives, or if the answer is too long. An answer is
    /// never an error, whatever its status.
    pub fn send(
        &self,
        mut request: HttpRequest,
        deadline: Instant,
    ) -> Result<HttpResponse, HttpFailure> {
        let body = std::mem::take(&mut request.body);
        let (granted, mut prepared) = self.prepared(request)?;
        if !body.is_empty() {
            prepared = prepared.body(body);
        }
        let limit = granted.config.response_bytes_max;
        let answer =
            async { tokio::time::timeout_at(deadline.into(), read(prepared, limit)).await };
        let answer = match off_thread::wait_on(&self.runtime, answer) {
            Some(Ok(answer)) => answer,
            Some(Err(_)) => {
                Err(HttpFailure::retryable("no complete answer within the time of the call"))
            }
            None => Err(HttpFailure::retryable("no answer before the pipeline stopped")),
        };
        answer.map_err(|failure| granted.named(failure))
    }

    /// Sends a request of which only the status of the answer matters. A head that arrives after the whole request was
    /// sent is the answer, whatever happens to the body: a body that is long, slow, cut or badly encoded says nothing
    /// about the request.
    ///
    /// # Errors
    /// [`HttpFailure`] if the request is not granted, if no head arrives before `deadline`, or if the answer is a
    /// success but the request was not sent completely.
    pub async fn deliver(
        &self,
        mut request: HttpRequest,
        deadline: Instant,
    ) -> Result<ResponseHead, HttpFailure> {
        let body = std::mem::take(&mut request.body);
        let (granted, prepared) = self.prepared(request)?;
        let (body, sent) = WatchedBody::new(body.into());
        let prepared = prepared.body(reqwest::Body::wrap(body));
        deliver(prepared, sent, deadline.into()).await.map_err(|failure| granted.named(failure))
    }

    /// Prepares the request for the client, without its body.
    fn prepared(
        &self,
        request: HttpRequest,
    ) -> Result<(&GrantedHost, reqwest::RequestBuilder), HttpFailure> {
        let url = Url::parse(&request.url)
            .map_err(|error| HttpFailure::refused(format!("invalid URL: {error}")))?;
        let granted = self.granted(&url)?;
        let method = granted.method(&request.method)?;
        let headers = granted.headers(&request.headers)?;
        let client = if granted.config.private { &self.private } else { &self.public };
        Ok((granted, client.request(method, url).headers(headers)))
    }

    /// Finds the grant for a URL: host and port must be listed, and the scheme and address allowed.
    fn granted(&self, url: &Url) -> Result<&GrantedHost, HttpFailure> {
        let refused = |message: String| Err(HttpFailure::refused(message));
        if !matches!(url.scheme(), "https" | "http") {
            return refused(format!("`{}://` is not granted: use https://", url.scheme()));
        }
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return refused("the URL has no host".to_owned());
        };
        // Credentials belong into the headers of the grant.
        if !url.username().is_empty() || url.password().is_some() {
            return refused(
                "unsupported user or password in the URL: they are not sent".to_owned(),
            );
        }
        let is_port = |granted: &HttpHostConfig| match granted.port {
            Some(granted) => granted == port,
            None => url.port().is_none(),
        };
        let granted = self
            .hosts
            .iter()
            .find(|granted| granted.config.host == host && is_port(&granted.config));
        let Some(granted) = granted else {
            return refused(format!(
                "{host}:{port} is not granted: add it to `http` in [stage.grant]"
            ));
        };
        let private = granted.config.private;
        if url.scheme() == "http" && !private {
            return refused(format!("{host} is granted for https:// only"));
        }
        // The resolver does not see a literal address, so it is checked here.
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        if let Some(address) = literal.filter(|address| !is_allowed(*address, private)) {
            let name = "the URL".to_owned();
            return refused(RefusedAddress { name, address, private }.to_string());
        }
        Ok(granted)
    }
}

impl GrantedHost {
    fn new(config: HttpHostConfig) -> Result<Self, HttpFailure> {
        let mut headers = HeaderMap::new();
        for (name, value) in &config.headers {
            let parsed = HeaderName::from_bytes(name.as_bytes())
                .ok()
                .zip(HeaderValue::from_str(value.reveal()).ok());
            let Some((parsed, mut value)) = parsed else {
                let message = format!("the grant of {}: invalid header {name:?}", config.host);
                return Err(HttpFailure::refused(message));
            };
            value.set_sensitive(true);
            headers.insert(parsed, value);
        }
        Ok(Self { config, headers })
    }

    /// Adds the name of the host to a failure.
    fn named(&self, failure: HttpFailure) -> HttpFailure {
        let place = &self.config.host;
        HttpFailure { message: format!("{place}: {}", failure.message), ..failure }
    }

    fn method(&self, name: &str) -> Result<Method, HttpFailure> {
        let granted = self.config.methods.iter().find(|method| method.name() == name);
        let Some(granted) = granted else {
            let methods: Vec<&str> = self.config.methods.iter().map(|m| m.name()).collect();
            return Err(HttpFailure::refused(format!(
                "the method {:?} is not granted for {}: {} are",
                shortened(name),
                self.config.host,
                methods.join(", ")
            )));
        };
        Ok(match granted {
            HttpMethod::Get => Method::GET,
            HttpMethod::Head => Method::HEAD,
            HttpMethod::Post => Method::POST,
            HttpMethod::Put => Method::PUT,
            HttpMethod::Patch => Method::PATCH,
            HttpMethod::Delete => Method::DELETE,
            HttpMethod::Options => Method::OPTIONS,
        })
    }

    /// Joins the headers of the plugin and of the grant. A plugin cannot replace one of the grant.
    fn headers(&self, asked: &[(String, String)]) -> Result<HeaderMap, HttpFailure> {
        let refused = |message: String| Err(HttpFailure::refused(message));
        if asked.len() > HEADERS_MAX {
            return refused(format!("the request has more than {HEADERS_MAX} headers"));
        }
        let mut headers = HeaderMap::new();
        for (name, value) in asked {
            let Ok(parsed) = HeaderName::from_bytes(name.as_bytes()) else {
                return refused(format!("not a valid header name: {:?}", shortened(name)));
            };
            if is_travel_header(parsed.as_str()) {
                return refused(format!("the header `{parsed}` cannot be set by a plugin"));
            }
            if self.headers.contains_key(&parsed) {
                return refused(format!("the header `{parsed}` is set by the grant"));
            }
            let Ok(value) = HeaderValue::from_str(value) else {
                return refused(format!(
                    "invalid value of header `{parsed}`: expected one line of text"
                ));
            };
            headers.append(parsed, value);
        }
        headers.extend(self.headers.clone());
        Ok(headers)
    }
}

impl fmt::Debug for HttpGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.hosts.iter().map(|granted| &granted.config);
        f.debug_list().entries(hosts).finish()
    }
}

fn client(private: bool) -> Result<Client, HttpFailure> {
    Client::builder()
        .tls_backend_rustls()
        .redirect(Policy::none())
        .no_proxy()
        .referer(false)
        // Retries are the decision of the plugin: its request may not be idempotent.
        .retry(reqwest::retry::never())
        .https_only(!private)
        // A head with an unusual header is still an answer. To drop it would cause the request to be sent again.
        .http1_max_headers(ANSWER_HEADERS_MAX)
        .http1_ignore_invalid_headers_in_responses(true)
        .http1_allow_obsolete_multiline_headers_in_responses(true)
        .http1_allow_spaces_after_header_name_in_responses(true)
        .user_agent(USER_AGENT)
        .dns_resolver(GuardedResolver { private })
        .build()
        .map_err(|error| HttpFailure::refused(described(error)))
}

/// Sends the request, and reads the head, and the part of the body that arrives soon.
async fn deliver(
    prepared: reqwest::RequestBuilder,
    sent: Sent,
    deadline: tokio::time::Instant,
) -> Result<ResponseHead, HttpFailure> {
    let head = tokio::time::timeout_at(deadline, prepared.send()).await;
    let mut head = head
        .map_err(|_| HttpFailure::retryable("no answer within the `timeout` of a request"))?
        .map_err(failure)?;
    let status = head.status().as_u16();
    let text = |name: reqwest::header::HeaderName| head.headers().get(name)?.to_str().ok();
    let location = text(reqwest::header::LOCATION).map(shown_location);
    let retry_after = text(reqwest::header::RETRY_AFTER)
        .and_then(|value| retry_after::pause(value, text(reqwest::header::DATE)));
    let mut said = Vec::new();
    let reading = async {
        while let Ok(Some(chunk)) = head.chunk().await {
            let room = SAID_BYTES_MAX - said.len();
            said.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if said.len() == SAID_BYTES_MAX {
                break;
            }
        }
    };
    // A server may answer with success before it has read the whole request. Then the rest must have been sent, too.
    // The body is read at the same time, because a server may write it first.
    let complete = async {
        match status {
            200..=299 => tokio::time::timeout_at(deadline, sent.all()).await.unwrap_or(false),
            _ => true,
        }
    };
    let (_, complete) = tokio::join!(tokio::time::timeout(SAID_TIME_MAX, reading), complete);
    if !complete {
        return Err(HttpFailure::retryable(format!(
            "answered {status} before the whole request was sent, and took no more of it"
        )));
    }
    Ok(ResponseHead { status, location, retry_after, said })
}

/// Shortens a `Location` for messages: without user, password, query and fragment, which may be secret.
fn shown_location(text: &str) -> String {
    let end = text.find(['?', '#']).unwrap_or(text.len());
    let plain = &text[..end];
    let plain = match (plain.find("://"), plain.find('@')) {
        (Some(scheme), Some(at)) if !plain[scheme + 3..at].contains('/') => {
            format!("{}{}", &plain[..scheme + 3], &plain[at + 1..])
        }
        _ => plain.to_owned(),
    };
    plain.chars().take(LOCATION_CHARS).collect()
}

/// Sends the request, and reads up to `limit` bytes of the body.
async fn read(
    prepared: reqwest::RequestBuilder,
    limit: usize,
) -> Result<HttpResponse, HttpFailure> {
    let mut answer = prepared.send().await.map_err(failure)?;
    let status = answer.status().as_u16();
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let headers =
        answer.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(failure)? {
        if body.len() + chunk.len() > limit {
            return Err(HttpFailure::refused(format!(
                "the answer has more than {limit} bytes, the limit `response` of the grant"
            )));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(HttpResponse { status, headers, body })
}

/// Converts an error of the client, without the URL: the plugin knows it, and logs do not need it.
fn failure(error: reqwest::Error) -> HttpFailure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(deeper) = cause {
        if let Some(refused) = deeper.downcast_ref::<RefusedAddress>() {
            return HttpFailure::refused(refused.to_string());
        }
        cause = deeper.source();
    }
    let retryable = !error.is_builder();
    HttpFailure { retryable, message: described(error) }
}

fn described(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        // Writing into a String cannot fail.
        let _ = write!(text, ": {deeper}");
        cause = deeper.source();
    }
    sanitized(text)
}

/// Shortens a text of a plugin for an error.
fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}
