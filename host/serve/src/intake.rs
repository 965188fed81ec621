//! The intake: an HTTP port that accepts events and puts them on the stream.
//!
//! `POST /events` is answered with 200 only after the stream has every record of the request. With any other
//! answer, some records may be on the stream, so a client that sends again delivers at least once. Within a
//! request, records with the same partition key keep their order, with one exception: a later record may overtake
//! one that was refused temporarily. `GET /health` is 200 while puts succeed.
//!
//! Clients are not authenticated. Bytes are reserved as they arrive, and a body that stalls gives its bytes
//! back when another body needs them ([`arrivals`]). A web page may send events only if its origin is
//! configured.

mod arrivals;
mod batcher;
pub mod events;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ACCEPT_ENCODING, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_MAX_AGE, CONTENT_ENCODING, CONTENT_LENGTH,
    CONTENT_TYPE, ORIGIN, RETRY_AFTER, TRANSFER_ENCODING, VARY,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::arrivals::{Arrivals, NoRoom};
use self::batcher::{Submission, SubmissionRefusal};
use self::events::{BadEvents, Shape};
use shardmill_config::{HttpDeadlines, IntakeConfig};
use shardmill_core::boxed;
use shardmill_core::budget::{Budget, Permit};
use shardmill_core::metric;
use shardmill_core::stop::Stop;
use shardmill_kinesis::put_call::StreamWriter;
use shardmill_ports::{BodyLate, PortRules};

/// Cost of a record besides its bytes. It bounds many small records, too.
const RECORD_OVERHEAD_BYTES: usize = 128;
/// Initial size of a body's buffer, in bytes.
const BODY_BYTES_MIN: usize = 4 << 10;
/// Bytes that a connection may buffer while it reads: the head of a request and a piece of the body.
const BUFFER_BYTES_MAX: usize = 16 << 10;
/// Requests that may wait for the batcher. The limit that matters is the bytes in flight.
const SUBMISSIONS_MAX: usize = 1_024;
/// `Retry-After` in seconds if too many bytes are in flight.
const BUSY_RETRY_S: &str = "1";
/// `Retry-After` in seconds if the stream cannot be reached.
const STREAM_RETRY_S: &str = "5";

/// Error: the intake port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to open the intake port {address}: {cause}; another process has it: set `listen` under \
     [intake] to a free port, or remove [intake]"
)]
pub struct IntakeError {
    address: SocketAddr,
    cause: std::io::Error,
}

/// An open intake port, not served yet.
pub struct IntakePort {
    listener: TcpListener,
    address: SocketAddr,
    config: IntakeConfig,
    deadlines: HttpDeadlines,
}

/// A serving intake.
pub struct Intake {
    served: JoinHandle<()>,
}

impl IntakePort {
    /// Opens the port. Requests wait until [`IntakePort::serve`].
    ///
    /// # Errors
    /// [`IntakeError`] if the port is in use.
    #[boxed]
    pub async fn open(
        config: &IntakeConfig,
        deadlines: HttpDeadlines,
    ) -> Result<Self, IntakeError> {
        let error = |cause| IntakeError { address: config.listen, cause };
        let listener = TcpListener::bind(config.listen).await.map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        Ok(Self { listener, address, config: config.clone(), deadlines })
    }

    /// Returns the address; port 0 is replaced by the chosen port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, and still answers the requests in progress.
    pub fn serve(self, writer: StreamWriter, stop: CancellationToken) -> Intake {
        let (submissions, submitted) = mpsc::channel(SUBMISSIONS_MAX);
        let (failing_shown, failing) = watch::channel(None);
        tokio::spawn(batcher::run(writer, submitted, failing_shown));
        let rules = PortRules {
            name: "intake",
            connections_max: self.config.connections_max,
            // The intake listens on loopback only, where peers cannot be distinguished.
            per_peer_max: None,
            deadlines: self.deadlines,
            buffer_bytes_max: Some(BUFFER_BYTES_MAX),
            is_for_own_user: false,
            keeps_files: true,
        };
        let budget = Budget::new(self.config.in_flight_bytes_max, metric::INTAKE_IN_FLIGHT_BYTES);
        let door = Door {
            arrivals: Arrivals::new(budget),
            config: Arc::new(self.config),
            submissions,
            failing,
            stop: stop.clone(),
        };
        let routes = Router::new()
            .route("/events", post(take).options(preflight))
            .route("/health", get(health))
            .with_state(door);
        let served = tokio::spawn(shardmill_ports::serve(self.listener, routes, rules, stop));
        Intake { served }
    }
}

impl Intake {
    /// Waits until the intake has stopped and all requests in progress are answered, at most until the end of
    /// the stop's time.
    pub async fn finished(self, stop: &Stop) {
        if stop.until_over(self.served).await.is_none() {
            tracing::warn!("the intake ended with unanswered requests");
        }
    }
}

/// State that the handlers share.
#[derive(Clone)]
struct Door {
    config: Arc<IntakeConfig>,
    arrivals: Arrivals,
    submissions: mpsc::Sender<Submission>,
    failing: watch::Receiver<Option<String>>,
    stop: CancellationToken,
}

/// Reason for an answer other than 200.
enum Turned {
    Bad(BadEvents),
    Encoded { found: String },
    Coded { found: String },
    Page { origin: String },
    Slow(String),
    Cut(String),
    Large { bytes_max: usize },
    Many { records_max: usize },
    Busy,
    Refused(SubmissionRefusal),
    Stopping,
}

/// Serves health to any caller, so it says only whether puts succeed. The cause is in the log.
async fn health(State(door): State<Door>) -> Response {
    let is_failing = door.failing.borrow().is_some();
    match door.stop.is_cancelled() || is_failing {
        true => (StatusCode::SERVICE_UNAVAILABLE, "blocked\n").into_response(),
        false => "ready\n".into_response(),
    }
}

async fn take(State(door): State<Door>, headers: HeaderMap, body: Body) -> Response {
    let mut response = match door.take(&headers, body).await {
        Ok(records) => json(StatusCode::OK, serde_json::json!({ "records": records })),
        Err(turned) => turned.into_response(),
    };
    let status = response.status().as_u16().to_string();
    metrics::counter!(metric::INTAKE_REQUESTS_TOTAL, "status" => status).increment(1);
    door.allow_origin(&headers, &mut response);
    response
}

/// Answers a browser that asks whether its page may send events (a CORS preflight).
async fn preflight(State(door): State<Door>, headers: HeaderMap) -> Response {
    if let Err(turned) = door.refuse_pages(&headers) {
        return turned.into_response();
    }
    let allowed = [
        (ACCESS_CONTROL_ALLOW_METHODS, "POST"),
        (ACCESS_CONTROL_ALLOW_HEADERS, "content-type, x-partition-key"),
        (ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    let mut response = (StatusCode::NO_CONTENT, allowed).into_response();
    door.allow_origin(&headers, &mut response);
    response
}

impl Door {
    /// Handles a request until the stream has its records. Returns their number.
    async fn take(&self, headers: &HeaderMap, body: Body) -> Result<usize, Turned> {
        if self.stop.is_cancelled() {
            return Err(Turned::Stopping);
        }
        self.refuse_pages(headers)?;
        refuse_encodings(headers)?;
        refuse_codings(headers)?;
        let (body, mut reserved) = self.body(headers, body).await?;
        let shape = Shape::of(headers);
        // Each record has its own copy of the header's key.
        let record_overhead = RECORD_OVERHEAD_BYTES + events::header_key_bytes(headers);
        let overhead = events::records_max(shape, &body).saturating_mul(record_overhead);
        // A single record is accepted whatever its overhead.
        if overhead > record_overhead {
            let bytes_max = self.arrivals.bytes_max();
            if body.len().saturating_add(overhead) > bytes_max {
                let records_max = bytes_max.saturating_sub(body.len()) / record_overhead;
                return Err(Turned::Many { records_max });
            }
            if !self.arrivals.try_grow(&mut reserved, overhead).await {
                return Err(Turned::Busy);
            }
        }
        let key_member = self.config.key_member.as_deref();
        let records = events::records(shape, headers, &body, key_member).map_err(Turned::Bad)?;
        let count = records.len();
        let (answer, answered) = oneshot::channel();
        let submitted = self.submissions.send(Submission { records, reserved, answer }).await;
        submitted.map_err(|_| Turned::Stopping)?;
        match answered.await {
            Ok(Ok(())) => Ok(count),
            Ok(Err(refusal)) => Err(Turned::Refused(refusal)),
            Err(_) => Err(Turned::Stopping),
        }
    }

    /// Reads a body up to its limit and reserves bytes as they arrive. Bytes that are declared but not sent
    /// take no room from other requests.
    async fn body(&self, headers: &HeaderMap, mut body: Body) -> Result<(Bytes, Permit), Turned> {
        let bytes_max = self.config.body_bytes_max.min(self.arrivals.bytes_max());
        let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let declared = declared.map(|text| text.parse().unwrap_or(usize::MAX));
        if declared.is_some_and(|bytes| bytes > bytes_max) {
            return Err(Turned::Large { bytes_max });
        }
        let expected_max = declared.unwrap_or(bytes_max);
        let mut arrival = self.arrivals.begin();
        loop {
            let piece = tokio::select! {
                piece = shardmill_ports::read_body(&mut body) => piece,
                () = arrival.gave_way() => return Err(Turned::Busy),
            };
            match piece {
                None => return Ok(arrival.finish()),
                Some(Ok(piece)) if arrival.len() + piece.len() > bytes_max => {
                    return Err(Turned::Large { bytes_max });
                }
                Some(Ok(piece)) => {
                    match self.arrivals.add(&mut arrival, &piece, expected_max).await {
                        Ok(()) => {}
                        Err(NoRoom) => return Err(Turned::Busy),
                    }
                }
                Some(Err(error)) => return Err(cut(error)),
            }
        }
    }

    /// Refuses requests from web pages whose origin is not configured. The `Host` header is not checked,
    /// because it is the proxy's.
    fn refuse_pages(&self, headers: &HeaderMap) -> Result<(), Turned> {
        let allowed = &self.config.origins;
        let is_allowed = |origin: &HeaderValue| {
            allowed.iter().any(|allowed| origin.as_bytes().eq_ignore_ascii_case(allowed.as_bytes()))
        };
        match headers.get_all(ORIGIN).iter().find(|&origin| !is_allowed(origin)) {
            Some(origin) => {
                Err(Turned::Page { origin: String::from_utf8_lossy(origin.as_bytes()).into() })
            }
            None => Ok(()),
        }
    }

    /// Allows the page to read the answer; without this header its browser would hide it.
    fn allow_origin(&self, headers: &HeaderMap, response: &mut Response) {
        if let Some(origin) = headers.get(ORIGIN)
            && self.refuse_pages(headers).is_ok()
        {
            response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            response.headers_mut().insert(VARY, http_value("origin"));
        }
    }
}

/// Converts a body's read error into the reason for the answer.
fn cut(error: axum::Error) -> Turned {
    let error = error.into_inner();
    match error.downcast_ref::<BodyLate>() {
        Some(late) => Turned::Slow(late.to_string()),
        None => Turned::Cut(error.to_string()),
    }
}

/// Refuses a compressed body. Stored unchanged, it would reach the stream as bytes that no plugin expects.
/// `identity` means no encoding (RFC 9110, section 8.4).
fn refuse_encodings(headers: &HeaderMap) -> Result<(), Turned> {
    let mut found = listed(headers, CONTENT_ENCODING);
    found.retain(|one| !one.eq_ignore_ascii_case("identity"));
    match found.is_empty() {
        true => Ok(()),
        false => Err(Turned::Encoded { found: found.join(", ") }),
    }
}

/// Refuses transfer codings other than `chunked`. The server decodes only that one; a body with another coding
/// would be stored undecoded (RFC 9112, section 6.1).
fn refuse_codings(headers: &HeaderMap) -> Result<(), Turned> {
    let found = listed(headers, TRANSFER_ENCODING);
    match &found[..] {
        [] => Ok(()),
        [only] if only.eq_ignore_ascii_case("chunked") => Ok(()),
        _ => Err(Turned::Coded { found: found.join(", ") }),
    }
}

/// Returns the members of a list header. Several headers of the same name form one list.
fn listed(headers: &HeaderMap, name: HeaderName) -> Vec<String> {
    let members = headers.get_all(name).iter().flat_map(|value| {
        let listed = String::from_utf8_lossy(value.as_bytes()).into_owned();
        listed.split(',').map(|one| one.trim().to_owned()).collect::<Vec<_>>()
    });
    members.filter(|one| !one.is_empty()).collect()
}

impl IntoResponse for Turned {
    fn into_response(self) -> Response {
        let (status, retry, error) = match self {
            Self::Bad(
                bad @ BadEvents::NotPuttable {
                    cause: shardmill_kinesis::put_call::NotPuttable::Size { .. },
                    ..
                },
            ) => (StatusCode::PAYLOAD_TOO_LARGE, None, bad.to_string()),
            Self::Encoded { found } => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                None,
                format!(
                    "unsupported Content-Encoding {found:?}: expected none; send the body uncompressed"
                ),
            ),
            Self::Coded { found } => (
                StatusCode::NOT_IMPLEMENTED,
                None,
                format!(
                    "unsupported Transfer-Encoding {found:?}: expected none or \"chunked\"; send the body \
                     uncompressed"
                ),
            ),
            Self::Bad(bad) => (StatusCode::BAD_REQUEST, None, bad.to_string()),
            Self::Cut(cause) => {
                (StatusCode::BAD_REQUEST, None, format!("failed to read the body: {cause}"))
            }
            Self::Page { origin } => (
                StatusCode::FORBIDDEN,
                None,
                format!(
                    "unknown origin {origin:?}: expected one of `origins` under [intake], or a request that \
                     does not come from a web page"
                ),
            ),
            Self::Slow(cause) => (StatusCode::REQUEST_TIMEOUT, None, cause),
            Self::Large { bytes_max } => (
                StatusCode::PAYLOAD_TOO_LARGE,
                None,
                format!("the body is too large: expected at most {bytes_max} bytes; send it in parts"),
            ),
            Self::Many { records_max } => (
                StatusCode::PAYLOAD_TOO_LARGE,
                None,
                format!("the body has too many lines: expected at most {records_max}; send it in parts"),
            ),
            Self::Busy => (
                StatusCode::TOO_MANY_REQUESTS,
                Some(BUSY_RETRY_S),
                "too many bytes in flight to the stream; try again later".to_owned(),
            ),
            Self::Refused(SubmissionRefusal::Records(cause)) => {
                (StatusCode::UNPROCESSABLE_ENTITY, None, cause)
            }
            // The cause goes to the log: the text of a server may name accounts, and this port answers any
            // caller.
            Self::Refused(SubmissionRefusal::Stream(_)) => (
                StatusCode::SERVICE_UNAVAILABLE,
                Some(STREAM_RETRY_S),
                "the stream does not accept events now (see the intake's log for the cause); try again later"
                    .to_owned(),
            ),
            Self::Stopping => (
                StatusCode::SERVICE_UNAVAILABLE,
                Some(STREAM_RETRY_S),
                "the intake is stopping; try another instance, or try again later".to_owned(),
            ),
        };
        let mut response = json(status, serde_json::json!({ "error": error }));
        if status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            // RFC 9110, section 15.5.16: this header names the encodings that are accepted.
            response.headers_mut().insert(ACCEPT_ENCODING, http_value("identity"));
        }
        if let Some(seconds) = retry {
            response.headers_mut().insert(RETRY_AFTER, http_value(seconds));
        }
        response
    }
}

fn json(status: StatusCode, body: serde_json::Value) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

fn http_value(text: &'static str) -> HeaderValue {
    HeaderValue::from_static(text)
}
