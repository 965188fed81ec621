//! HTTP ports: connections that are counted and that end. axum's own loop has no bound and no deadlines,
//! so a client that sends half a request head would keep its connection for ever, and idle ones would use
//! up the file descriptors of the process.
//!
//! A port keeps a bounded number of connections ([`gate`] decides which). When all are taken, the one that
//! has waited longest for its peer makes room, and 8 more are kept for health checks alone, so that a port
//! under attack still says how the process is.
//!
//! A router of axum and the rules of a port go in; nothing comes out but answers. What is served is not known here. It
//! uses `config` and `core`; its heavy dependencies are axum and hyper.

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

/// Longest pause between two looks at a connection's deadlines, and the pause after a failure to accept
/// one.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Shortest pause between two looks at a connection's deadlines.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Connections that each port keeps for requests of `/health`, beyond its bound.
const HEALTH_CONNECTIONS: usize = 8;
/// Time that a connection that is kept for health may take in all.
const HEALTH_CONNECTION_MAX: Duration = Duration::from_secs(5);
/// Seconds after which a request that found the port full is to be sent again.
const FULL_RETRY_S: &str = "1";

/// Rules of a port: how many connections, until when, of whom.
#[derive(Clone, Debug)]
pub struct PortRules {
    /// The port's name in metrics and logs.
    pub name: &'static str,
    /// Connections that it keeps at once, those for health aside.
    pub connections_max: usize,
    /// Of these, connections of one peer; loopback has no such bound.
    pub per_peer_max: Option<usize>,
    /// When they are closed.
    pub deadlines: HttpDeadlines,
    /// Bytes that a connection may buffer while it reads; `None`: hyper's own bound, for large bodies.
    pub buffer_bytes_max: Option<usize>,
    /// Whether processes of other users of this machine are refused.
    pub is_for_own_user: bool,
    /// Whether open files are kept for its connections beside those of lanes. Not for the embedded stream:
    /// its clients are lanes.
    pub keeps_files: bool,
}

/// Serves `routes` on connections of `listener` until `stop`; requests that have begun are answered
/// then. [`PortRules`] says how many connections there may be, and when each is closed. The open files that
/// they may need are kept from the call on.
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
            // The peer went away before it was accepted.
            Err(error) if is_of_one_connection(&error) => {}
            // No descriptors are free, say: others may close theirs, and one of ours makes room.
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

/// A connection that was let in.
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
        // Its own deadline of heads would count the time between two requests as well.
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
                // Why a connection broke is its client's business.
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

/// The pause between two looks, so that a short deadline is met about in time.
fn look_interval(deadlines: &HttpDeadlines) -> Duration {
    let HttpDeadlines { head_max, body_max, idle_max } = *deadlines;
    let shortest = head_max.min(body_max).min(idle_max);
    (shortest / 4).clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL)
}

fn is_health(path: &str) -> bool {
    path == "/health" || path.starts_with("/health/")
}

/// The answer to a request that found every connection of the port taken.
fn full() -> Response {
    let body = "too many connections are open: send it again later\n";
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, FULL_RETRY_S)], body).into_response()
}

/// The answer to a process of another user, in the words of the Kinesis API: only the embedded stream asks.
fn refused_stranger(cause: &str) -> Response {
    let body = serde_json::json!({ "__type": "AccessDeniedException", "message": cause });
    let media = [(header::CONTENT_TYPE, "application/x-amz-json-1.1")];
    (StatusCode::FORBIDDEN, media, body.to_string()).into_response()
}
