//! HTTP ports with a limited number of connections, and with deadlines for each.
//!
//! axum's own loop has neither: a client that sends half of a request head would keep its connection forever, and idle
//! connections would use up the file descriptors of the process.
//!
//! [`gate`] decides which connections a port keeps. When all places are taken, the connection that has waited longest
//! for its client makes room. 8 more places are reserved for health checks, so that a port under attack still reports
//! the state of the process.
//!
//! Input is an axum router and the rules of a port. This crate does not know what is served. It uses `config` and
//! `core`; its heavy dependencies are axum and hyper.

mod activity;
mod body;
mod gate;
pub mod names;
mod pace;
mod peer;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_service::Service as _;

use self::activity::Watched;
use self::body::{AnswerBody, RequestBody};
pub use self::body::{BodyLate, read as read_body};
use self::gate::{Gate, Pass};
pub use self::pace::Pace;
use shardmill_config::HttpDeadlines;
use shardmill_core::log_throttle::LogThrottle;

/// Longest pause between two checks of a connection's deadlines, and the pause after a failure to accept a connection.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Shortest pause between two checks of a connection's deadlines.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Connections that each port reserves for requests of `/health`, beyond its limit.
const HEALTH_CONNECTIONS: usize = 8;
/// Time limit of a connection that is kept for `/health`.
const HEALTH_CONNECTION_MAX: Duration = Duration::from_secs(5);
/// `Retry-After` of a request that found the port full, in seconds.
const FULL_RETRY_S: &str = "1";

/// Rules of a port: number of connections, deadlines, accepted peers.
#[derive(Clone, Debug)]
pub struct PortRules {
    /// Name of the port in metrics and logs.
    pub name: &'static str,
    /// Highest number of connections, without those for `/health`.
    pub connections_max: usize,
    /// Highest number of connections of one peer; not for loopback.
    pub per_peer_max: Option<usize>,
    /// Deadlines.
    pub deadlines: HttpDeadlines,
    /// Bytes that a connection may buffer while it reads; `None`: hyper's own limit, for large bodies.
    pub buffer_bytes_max: Option<usize>,
    /// Whether processes of other users of this machine are refused.
    pub is_for_own_user: bool,
    /// Whether file descriptors are reserved for its connections, in addition to those of lanes. Not for the embedded
    /// stream, whose clients are lanes.
    pub keeps_files: bool,
}

/// Serves `routes` on connections of `listener` until `stop`; requests that have begun are still answered.
/// [`PortRules`] limits the connections and their time. The file descriptors are reserved from this call on.
pub fn serve(
    listener: TcpListener,
    routes: Router,
    rules: PortRules,
    stop: CancellationToken,
) -> impl Future<Output = ()> + Send + 'static {
    let gate = Gate::open(&rules, HEALTH_CONNECTIONS);
    accept(listener, routes, rules, gate, stop)
}

async fn accept(
    listener: TcpListener,
    routes: Router,
    rules: PortRules,
    gate: Gate,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    let mut failures = LogThrottle::default();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Some(pass) = gate.admit(peer.ip()).await {
                    pass.room().await;
                    let served = Connection {
                        stream,
                        peer,
                        routes: routes.clone(),
                        rules: rules.clone(),
                        pass,
                    };
                    connections.spawn(served.run(stop.clone()));
                }
            }
            // The peer disconnected before it was accepted.
            Err(error) if is_of_one_connection(&error) => {}
            // For example, no descriptor is free: other parts may close theirs, and one of our connections makes room.
            Err(error) => {
                if let Some(left_out) = failures.line(Instant::now()) {
                    tracing::warn!(%error, port = rules.name, left_out,
                        "failed to accept a connection; trying again");
                }
                let pause = match gate.make_room(Instant::now()) {
                    true => LOOK_INTERVAL_MIN,
                    false => LOOK_INTERVAL,
                };
                tokio::time::sleep(pause).await;
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Connection that was let in.
struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    routes: Router,
    rules: PortRules,
    pass: Pass,
}

impl Connection {
    async fn run(self, stop: CancellationToken) {
        let Self { stream, peer, routes, rules, pass } = self;
        let deadlines = rules.deadlines;
        let stranger = match (rules.is_for_own_user, stream.local_addr()) {
            (true, Ok(local)) => tokio::select! {
                found = peer::refusal(peer, local) => found,
                () = pass.ended() => return,
            },
            _ => None,
        };
        let is_for_health = pass.is_for_health();
        let activity = pass.activity().clone();
        let counted = activity.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let in_hand = counted.begin_request();
            let refused = match &stranger {
                Some(cause) => Some(refused_stranger(cause)),
                None if is_for_health && !is_health(request.uri().path()) => Some(full()),
                None => None,
            };
            let (mut routes, counted) = (routes.clone(), counted.clone());
            async move {
                let response = match refused {
                    Some(response) => response,
                    None => {
                        let body = |body| RequestBody::new(body, counted, deadlines.body_max);
                        routes.call(request.map(|incoming| Body::new(body(incoming)))).await?
                    }
                };
                Ok::<_, Infallible>(response.map(|body| AnswerBody::new(body, in_hand)))
            }
        });
        let mut builder = hyper::server::conn::http1::Builder::new();
        // hyper's own deadline of heads would also count the time between two requests.
        builder.header_read_timeout(None::<Duration>).keep_alive(!is_for_health);
        if let Some(bytes_max) = rules.buffer_bytes_max {
            builder.max_buf_size(bytes_max);
        }
        let watched = Watched::new(stream, activity.clone());
        let connection = builder.serve_connection(TokioIo::new(watched), service);
        let mut connection = std::pin::pin!(connection);
        let look_interval = look_interval(&deadlines);
        let begun = Instant::now();
        let mut is_stopping = false;
        loop {
            tokio::select! {
                // The reason why a connection broke does not matter here.
                _ = &mut connection => return,
                () = pass.ended() => return,
                () = stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = tokio::time::sleep(look_interval) => {
                    let is_over = is_for_health && begun.elapsed() > HEALTH_CONNECTION_MAX;
                    let is_done = is_stopping && !activity.is_at_work();
                    if is_over || is_done || activity.is_late(&deadlines, Instant::now()) {
                        return;
                    }
                }
            }
        }
    }
}

/// Returns the pause between two checks, short enough for a short deadline.
fn look_interval(deadlines: &HttpDeadlines) -> Duration {
    let HttpDeadlines { head_max, body_max, idle_max } = *deadlines;
    let shortest = head_max.min(body_max).min(idle_max);
    (shortest / 4).clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL)
}

fn is_health(path: &str) -> bool {
    path == "/health" || path.starts_with("/health/")
}

/// Makes the answer for a port whose connections are all taken.
fn full() -> Response {
    let body = "too many open connections: try again later\n";
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, FULL_RETRY_S)], body).into_response()
}

/// Makes the answer to a process of another user, in the form of the Kinesis API, because only the embedded stream
/// checks this.
fn refused_stranger(cause: &str) -> Response {
    let body = serde_json::json!({ "__type": "AccessDeniedException", "message": cause });
    let media = [(header::CONTENT_TYPE, "application/x-amz-json-1.1")];
    (StatusCode::FORBIDDEN, media, body.to_string()).into_response()
}
