//! HTTP ports: connections that end. axum's own loop has no deadlines, so a client that sends half a
//! request head would keep its connection for ever, and would hold up the end of the process.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_service::Service as _;

/// Time for a request's head to arrive, from its first byte on.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// Time that a connection may stay without a request. Load balancers keep theirs for 60 s and answer 502
/// when the server was quicker to close one.
const IDLE_MAX: Duration = Duration::from_secs(75);
/// Pause between two looks at a connection's deadline, and after a failure to accept one.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Serves `routes` on connections of `listener` until `stop`; requests that have begun are answered
/// then. A connection is closed when its request head takes longer than 10 s, or when it has no request
/// for 75 s.
pub async fn serve(listener: TcpListener, routes: Router, stop: CancellationToken) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, routes.clone(), stop.clone()));
            }
            // The peer went away before it was accepted.
            Err(error) if is_of_one_connection(&error) => {}
            // No descriptors are free, say: others may close theirs.
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection; trying again");
                tokio::time::sleep(LOOK_INTERVAL).await;
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

async fn connection(stream: TcpStream, routes: Router, stop: CancellationToken) {
    let activity = Activity::default();
    let counted = activity.clone();
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let in_hand = counted.begin_request();
        let mut routes = routes.clone();
        async move {
            let response = routes.call(request.map(Body::new)).await;
            drop(in_hand);
            response
        }
    });
    let watched = Watched { stream, activity: activity.clone() };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_MAX)
        .serve_connection(TokioIo::new(watched), service);
    let mut connection = std::pin::pin!(connection);
    let mut is_stopping = false;
    loop {
        tokio::select! {
            // Why a connection broke is its client's business.
            _ = &mut connection => return,
            () = stop.cancelled(), if !is_stopping => {
                is_stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep(LOOK_INTERVAL) => {
                let has_request = activity.has_request();
                if (is_stopping && !has_request) || activity.head_is_late() {
                    return;
                }
            }
        }
    }
}

/// Activity of one connection; its clones share it.
#[derive(Clone, Default)]
struct Activity(Arc<Mutex<ActivityState>>);

#[derive(Default)]
struct ActivityState {
    requests: usize,
    /// When the first byte came of a head that is not complete yet.
    head_since: Option<Instant>,
}

/// A request whose response is not made yet.
struct InHand(Activity);

impl Activity {
    fn begin_request(&self) -> InHand {
        let mut state = self.lock();
        state.requests += 1;
        state.head_since = None;
        InHand(self.clone())
    }

    fn came(&self) {
        let mut state = self.lock();
        if state.requests == 0 {
            state.head_since.get_or_insert_with(Instant::now);
        }
    }

    fn has_request(&self) -> bool {
        self.lock().requests > 0
    }

    fn head_is_late(&self) -> bool {
        self.lock().head_since.is_some_and(|since| since.elapsed() > HEAD_MAX)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ActivityState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.lock().requests -= 1;
    }
}

/// A connection's stream that notes when bytes come.
struct Watched {
    stream: TcpStream,
    activity: Activity,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.activity.came();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }
}
