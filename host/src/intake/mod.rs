//! The intake: an HTTP port that takes events and puts them on the stream.
//!
//! `POST /events` is answered 200 only when the stream has every record of the request. Any other
//! answer may leave some of them on the stream: who sends again delivers at least once. Within a
//! request the order per partition key holds as far as PutRecords gives it: a record that was
//! refused for a moment may be overtaken by a later one. `GET /health` is 200 while puts succeed.

mod batcher;
pub mod events;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::batcher::{Refusal, Submission};
use self::events::{BadEvents, Shape};
use crate::budget::{Budget, Permit};
use crate::config::IntakeConfig;
use crate::source::producer::StreamWriter;
use crate::stop::Stop;

/// What a record costs beside its bytes, so that many small ones are bounded as well.
const RECORD_OVERHEAD_BYTES: usize = 128;
/// How long a body may take to arrive; it holds its bytes of the budget meanwhile.
const BODY_WAIT_MAX: Duration = Duration::from_secs(30);
/// Requests that wait for the batcher; the bytes in flight are the bound that counts.
const SUBMISSIONS_MAX: usize = 1_024;
/// What a client is told to wait when too much is in flight, in seconds.
const BUSY_RETRY_S: &str = "1";
/// What a client is told to wait when the stream is out of reach, in seconds.
const STREAM_RETRY_S: &str = "5";

/// The intake's port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to open the intake port {address}: {cause}; another process has it: set `listen` under \
     [intake] to a free port, or remove [intake]"
)]
pub struct IntakeError {
    address: SocketAddr,
    cause: std::io::Error,
}

/// An open port.
pub struct IntakePort {
    listener: TcpListener,
    address: SocketAddr,
    config: IntakeConfig,
}

/// A serving intake.
pub struct Intake {
    served: JoinHandle<()>,
}

impl IntakePort {
    /// Opens the port; requests wait until [`IntakePort::serve`].
    ///
    /// # Errors
    /// [`IntakeError`] when it is in use.
    pub async fn open(config: &IntakeConfig) -> Result<Self, IntakeError> {
        let error = |cause| IntakeError { address: config.listen, cause };
        let listener = TcpListener::bind(config.listen).await.map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        Ok(Self { listener, address, config: config.clone() })
    }

    /// The address, with the port that was chosen if it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`; requests in hand are answered then.
    pub fn serve(self, writer: StreamWriter, stop: CancellationToken) -> Intake {
        let (submissions, submitted) = mpsc::channel(SUBMISSIONS_MAX);
        let (failing_shown, failing) = watch::channel(None);
        tokio::spawn(batcher::run(writer, submitted, failing_shown));
        let door = Door {
            budget: Budget::new(
                self.config.in_flight_bytes_max,
                "shardmill_intake_in_flight_bytes",
            ),
            config: Arc::new(self.config),
            submissions,
            failing,
            stop: stop.clone(),
        };
        let routes = Router::new()
            .route("/events", post(take))
            .route("/health", get(health))
            .with_state(door);
        let served = tokio::spawn(crate::serve::serve(self.listener, routes, stop));
        Intake { served }
    }
}

impl Intake {
    /// Waits until it has stopped and every request in hand is answered, until the time of the end is
    /// over at most.
    pub async fn finished(self, stop: &Stop) {
        if stop.until_over(self.served).await.is_none() {
            tracing::warn!("requests were still in hand; they were not answered");
        }
    }
}

/// What handlers share.
#[derive(Clone)]
struct Door {
    config: Arc<IntakeConfig>,
    budget: Budget,
    submissions: mpsc::Sender<Submission>,
    failing: watch::Receiver<Option<String>>,
    stop: CancellationToken,
}

/// A request that is not answered 200.
enum Turned {
    Bad(BadEvents),
    Encoded { found: String },
    Slow,
    Cut(String),
    Large { bytes_max: usize },
    Many { records_max: usize },
    Busy,
    Refused(Refusal),
    Stopping,
}

async fn health(State(door): State<Door>) -> Response {
    let failing = door.failing.borrow().clone();
    match (door.stop.is_cancelled(), failing) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned()).into_response(),
        (false, Some(cause)) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{cause}\n")).into_response()
        }
        (false, None) => "ready\n".into_response(),
    }
}

async fn take(State(door): State<Door>, headers: HeaderMap, body: Body) -> Response {
    let response = match door.take(&headers, body).await {
        Ok(records) => json(StatusCode::OK, serde_json::json!({ "records": records })),
        Err(turned) => turned.into_response(),
    };
    let status = response.status().as_u16().to_string();
    metrics::counter!("shardmill_intake_requests_total", "status" => status).increment(1);
    response
}

impl Door {
    /// Takes a request in until the stream has its records; gives their number.
    async fn take(&self, headers: &HeaderMap, body: Body) -> Result<usize, Turned> {
        if self.stop.is_cancelled() {
            return Err(Turned::Stopping);
        }
        refuse_encodings(headers)?;
        let (body, mut reserved) = self.body(headers, body).await?;
        let shape = Shape::of(headers);
        // Each record has the header's key for itself.
        let record_overhead = RECORD_OVERHEAD_BYTES + events::header_key_bytes(headers);
        let overhead = events::records_max(shape, &body).saturating_mul(record_overhead);
        // A single record is taken whatever it costs beside its bytes.
        if overhead > record_overhead {
            if body.len().saturating_add(overhead) > self.budget.bytes_max() {
                let records_max = (self.budget.bytes_max() - body.len()) / record_overhead;
                return Err(Turned::Many { records_max });
            }
            if !reserved.try_grow(overhead) {
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

    /// Reads a body within its limit, its bytes reserved before they arrive.
    async fn body(&self, headers: &HeaderMap, body: Body) -> Result<(Bytes, Permit), Turned> {
        let bytes_max = self.config.body_bytes_max.min(self.budget.bytes_max());
        let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        // Without a length, it may be the largest.
        let bytes = declared.map_or(bytes_max, |text| text.parse().unwrap_or(usize::MAX));
        if bytes > bytes_max {
            return Err(Turned::Large { bytes_max });
        }
        let mut reserved = self.budget.try_take(bytes).ok_or(Turned::Busy)?;
        let read = tokio::time::timeout(BODY_WAIT_MAX, axum::body::to_bytes(body, bytes_max));
        let body = match read.await {
            Ok(Ok(body)) => body,
            Ok(Err(error)) if declared.is_none() && is_over_limit(&error) => {
                return Err(Turned::Large { bytes_max });
            }
            Ok(Err(error)) => return Err(Turned::Cut(error.to_string())),
            Err(_) => return Err(Turned::Slow),
        };
        reserved.resize(body.len());
        Ok((body, reserved))
    }
}

/// Refuses a body that is compressed: stored as it is, it would reach the stream as bytes that no plugin
/// expects. `identity` says that nothing was done to it (RFC 9110, section 8.4).
fn refuse_encodings(headers: &HeaderMap) -> Result<(), Turned> {
    let encodings = headers.get_all(CONTENT_ENCODING).iter().flat_map(|value| {
        let listed = String::from_utf8_lossy(value.as_bytes()).into_owned();
        listed.split(',').map(|one| one.trim().to_owned()).collect::<Vec<_>>()
    });
    let found: Vec<_> =
        encodings.filter(|one| !one.is_empty() && !one.eq_ignore_ascii_case("identity")).collect();
    match found.is_empty() {
        true => Ok(()),
        false => Err(Turned::Encoded { found: found.join(", ") }),
    }
}

/// Whether a body was longer than its limit, by what `http_body_util` calls that.
fn is_over_limit(error: &axum::Error) -> bool {
    error.to_string().contains("length limit exceeded")
}

impl IntoResponse for Turned {
    fn into_response(self) -> Response {
        let (status, retry, error) = match self {
            Self::Bad(
                bad @ BadEvents::NotPuttable {
                    cause: crate::source::producer::NotPuttable::Size { .. },
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
            Self::Bad(bad) => (StatusCode::BAD_REQUEST, None, bad.to_string()),
            Self::Cut(cause) => {
                (StatusCode::BAD_REQUEST, None, format!("the body did not arrive: {cause}"))
            }
            Self::Slow => (
                StatusCode::REQUEST_TIMEOUT,
                None,
                format!("the body did not arrive within {} s", BODY_WAIT_MAX.as_secs()),
            ),
            Self::Large { bytes_max } => (
                StatusCode::PAYLOAD_TOO_LARGE,
                None,
                format!("the body has more than {bytes_max} bytes; send it in parts"),
            ),
            Self::Many { records_max } => (
                StatusCode::PAYLOAD_TOO_LARGE,
                None,
                format!("the body has more than {records_max} lines; send it in parts"),
            ),
            Self::Busy => (
                StatusCode::TOO_MANY_REQUESTS,
                Some(BUSY_RETRY_S),
                "too many bytes are on their way to the stream; send it again later".to_owned(),
            ),
            Self::Refused(Refusal::Records(cause)) => {
                (StatusCode::UNPROCESSABLE_ENTITY, None, cause)
            }
            Self::Refused(Refusal::Stream(cause)) => {
                (StatusCode::SERVICE_UNAVAILABLE, Some(STREAM_RETRY_S), cause)
            }
            Self::Stopping => (
                StatusCode::SERVICE_UNAVAILABLE,
                Some(STREAM_RETRY_S),
                "the intake is stopping; send it again to another, or later".to_owned(),
            ),
        };
        let mut response = json(status, serde_json::json!({ "error": error }));
        if status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            // RFC 9110, section 15.5.16: this says which encodings would do.
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

fn http_value(text: &'static str) -> axum::http::HeaderValue {
    axum::http::HeaderValue::from_static(text)
}
