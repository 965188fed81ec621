//! A server that plays STS or Kinesis: it answers as the test says, and remembers its requests.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// A received request.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Operation, from the header `X-Amz-Target`.
    pub target: String,
    /// Header `Authorization`.
    pub authorization: String,
    /// Header `X-Amz-Security-Token`.
    pub token: String,
    /// Body, as text.
    pub body: String,
}

/// A server that plays another one; it ends with its runtime.
pub struct Player {
    /// URL that it listens on.
    pub url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Player {
    /// Answers every request with the result of `answer`.
    pub fn start(answer: fn(&Seen) -> (StatusCode, &'static str)) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        runtime.spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let log = log.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request: Request<Incoming>| {
                        let log = log.clone();
                        async move {
                            let seen = read(request).await;
                            log.lock().expect("a lock").push(seen.clone());
                            let (status, body) = answer(&seen);
                            let mut response = Response::new(Full::new(Bytes::from(body)));
                            *response.status_mut() = status;
                            Ok::<_, Infallible>(response)
                        }
                    });
                    let connection = TokioIo::new(connection);
                    // A client that disconnects looks like an error here.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(connection, service)
                        .await;
                });
            }
        });
        Self { url, seen, _runtime: runtime }
    }

    /// Returns the requests so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("a lock").clone()
    }
}

async fn read(request: Request<Incoming>) -> Seen {
    let header = |name: &str| {
        let value = request.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let (target, authorization, token) =
        (header("x-amz-target"), header("authorization"), header("x-amz-security-token"));
    let body = request.into_body().collect().await.expect("a body").to_bytes();
    Seen { target, authorization, token, body: String::from_utf8_lossy(&body).into_owned() }
}
