//! A proxy in front of a Kinesis server that injects faults: throttling, server errors, broken connections, slow and
//! silent answers, trimmed records. Faults are drawn from a seed.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, BodyStream, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// Fault of one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// No fault.
    None,
    /// Answers with ProvisionedThroughputExceededException.
    Throttled,
    /// Answers with ResourceInUseException.
    InUse,
    /// Answers with HTTP 500.
    ServerError,
    /// Breaks the connection before the server receives the request.
    Reset,
    /// Breaks the connection after the server has done its work.
    ResetAfter,
    /// Delays the answer.
    Slow(Duration),
    /// Sends nothing more of the body after this time, and keeps the connection open. Zero: only the head is sent.
    Silent(Duration),
    /// Removes records before this sequence number from the answer, as if the stream had dropped them.
    Trim(String),
    /// Replaces the payload of every record in the answer.
    Swell(Bytes),
    /// Makes the server's clock slow by this much: in the answers' dates, in the records' arrival times, and in the
    /// times at which it is asked to begin.
    SlowClock(Duration),
    /// Removes the date from the answer.
    NoDate,
    /// Removes these shards from the answer.
    Unlisted(Vec<String>),
}

type Choose = Box<dyn FnMut(&str, &mut fastrand::Rng) -> Fault + Send>;

/// Running proxy; it ends with its runtime.
pub struct Proxy {
    /// URL that it listens on.
    pub url: String,
    /// Requests so far, in order: the operation, and the fault that the request met.
    pub seen: Arc<Mutex<Vec<(String, Fault)>>>,
    choose: Arc<Mutex<Choose>>,
    runtime: tokio::runtime::Runtime,
}

impl Proxy {
    /// Listens on loopback in front of `upstream`, such as `127.0.0.1:4567`.
    pub fn start(
        upstream: &str,
        seed: u64,
        choose: impl FnMut(&str, &mut fastrand::Rng) -> Fault + Send + 'static,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let choose: Arc<Mutex<Choose>> = Arc::new(Mutex::new(Box::new(choose)));
        let seen: Arc<Mutex<Vec<(String, Fault)>>> = Arc::default();
        let random = Arc::new(Mutex::new(fastrand::Rng::with_seed(seed)));
        let (upstream, chosen, log) = (upstream.to_owned(), choose.clone(), seen.clone());
        runtime.spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (upstream, chosen, log) = (upstream.clone(), chosen.clone(), log.clone());
                let random = random.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request: Request<Incoming>| {
                        let target = request.headers().get("x-amz-target");
                        let target = target.and_then(|it| it.to_str().ok()).unwrap_or_default();
                        let operation = target.rsplit('.').next().unwrap_or_default().to_owned();
                        let fault = {
                            let mut choose = chosen.lock().expect("a lock");
                            choose(&operation, &mut random.lock().expect("a lock"))
                        };
                        log.lock().expect("a lock").push((operation, fault.clone()));
                        answer(upstream.clone(), request, fault)
                    });
                    let connection = TokioIo::new(connection);
                    // A fault looks like an error here.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(connection, service)
                        .await;
                });
            }
        });
        Self { url, seen, choose, runtime }
    }

    /// Chooses faults with this function from now on.
    pub fn choose(&self, choose: impl FnMut(&str, &mut fastrand::Rng) -> Fault + Send + 'static) {
        *self.choose.lock().expect("a lock") = Box::new(choose);
    }

    /// Returns how many requests of an operation met a fault for which `is` returns true.
    pub fn count(&self, operation: &str, is: impl Fn(&Fault) -> bool) -> usize {
        let seen = self.seen.lock().expect("a lock");
        seen.iter().filter(|(name, fault)| name == operation && is(fault)).count()
    }

    /// Returns the runtime, for a client of the test's own.
    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

fn broken() -> std::io::Error {
    std::io::ErrorKind::ConnectionReset.into()
}

fn refusal(status: u16, code: &str) -> Result<Response<Body>, std::io::Error> {
    let body = format!(r#"{{"__type":"{code}","message":"injected"}}"#);
    Response::builder()
        .status(status)
        .header("content-type", "application/x-amz-json-1.1")
        .body(whole(body))
        .map_err(std::io::Error::other)
}

async fn answer(
    upstream: String,
    request: Request<Incoming>,
    fault: Fault,
) -> Result<Response<Body>, std::io::Error> {
    match fault {
        Fault::Throttled => return refusal(400, "ProvisionedThroughputExceededException"),
        Fault::InUse => return refusal(400, "ResourceInUseException"),
        Fault::ServerError => return refusal(500, "InternalFailure"),
        Fault::Reset => return Err(broken()),
        _ => {}
    }
    let (head, body) = request.into_parts();
    let request = match &fault {
        Fault::SlowClock(slow) => {
            let bytes = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
            let mut asked: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            put_back(asked.pointer_mut("/Timestamp"), -slow.as_secs_f64());
            put_back(asked.pointer_mut("/StartingPosition/Timestamp"), -slow.as_secs_f64());
            let body = match bytes.is_empty() {
                true => whole(bytes),
                false => whole(asked.to_string()),
            };
            let mut request = Request::from_parts(head, body);
            request.headers_mut().remove("content-length");
            request
        }
        _ => Request::from_parts(head, body.map_err(std::io::Error::other).boxed_unsync()),
    };
    let connection = TcpStream::connect(upstream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(connection))
        .await
        .map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(std::io::Error::other)?;
    let (mut head, body) = response.into_parts();
    match fault {
        Fault::ResetAfter => {
            body.collect().await.map_err(std::io::Error::other)?;
            Err(broken())
        }
        Fault::Slow(pause) => {
            tokio::time::sleep(pause).await;
            Ok(Response::from_parts(head, body.map_err(std::io::Error::other).boxed_unsync()))
        }
        Fault::Silent(after) => {
            let until = tokio::time::sleep(after);
            let until = async move {
                if !after.is_zero() {
                    until.await;
                }
            };
            let speaking = BodyStream::new(body).take_until(Box::pin(until));
            let silence = futures::stream::pending::<Result<Frame<Bytes>, hyper::Error>>();
            let body = StreamBody::new(speaking.chain(silence));
            Ok(Response::from_parts(head, body.map_err(std::io::Error::other).boxed_unsync()))
        }
        Fault::NoDate => {
            // Without this, the proxy's own HTTP server would add a date.
            head.headers.insert("date", "unknown".parse().expect("a header"));
            Ok(Response::from_parts(head, body.map_err(std::io::Error::other).boxed_unsync()))
        }
        Fault::SlowClock(slow) if head.headers["content-type"] != "application/x-amz-json-1.1" => {
            put_back_date(&mut head, slow);
            Ok(Response::from_parts(head, body.map_err(std::io::Error::other).boxed_unsync()))
        }
        Fault::Trim(_) | Fault::Swell(_) | Fault::SlowClock(_) | Fault::Unlisted(_) => {
            let bytes = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
            let mut answer: serde_json::Value =
                serde_json::from_slice(&bytes).map_err(std::io::Error::other)?;
            if let Some(records) = answer["Records"].as_array_mut() {
                change(records, &fault);
            }
            match &fault {
                Fault::SlowClock(slow) => put_back_date(&mut head, *slow),
                Fault::Unlisted(unlisted) => {
                    if let Some(shards) = answer["Shards"].as_array_mut() {
                        let id = |shard: &serde_json::Value| {
                            shard["ShardId"].as_str().unwrap_or_default().to_owned()
                        };
                        shards.retain(|shard| !unlisted.contains(&id(shard)));
                    }
                }
                _ => {}
            }
            head.headers.remove("content-length");
            head.headers.remove("x-amz-crc32");
            Ok(Response::from_parts(head, whole(answer.to_string())))
        }
        _ => Ok(Response::from_parts(head, body.map_err(std::io::Error::other).boxed_unsync())),
    }
}

/// Moves a time in seconds back, if there is one.
fn put_back(time: Option<&mut serde_json::Value>, by_s: f64) {
    if let Some(time) = time
        && let Some(at_s) = time.as_f64()
    {
        *time = (at_s - by_s).into();
    }
}

fn put_back_date(head: &mut hyper::http::response::Parts, by: Duration) {
    let date = head.headers["date"].to_str().expect("a date");
    let date = chrono::DateTime::parse_from_rfc2822(date).expect("a date") - by;
    let date = date.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    head.headers.insert("date", date.parse().expect("a header"));
}

fn change(records: &mut Vec<serde_json::Value>, fault: &Fault) {
    match fault {
        Fault::Trim(first) => records.retain(|record| {
            let sequence = record["SequenceNumber"].as_str().unwrap_or_default();
            (sequence.len(), sequence) >= (first.len(), first.as_str())
        }),
        Fault::SlowClock(slow) => {
            for record in records {
                let arrived = record.pointer_mut("/ApproximateArrivalTimestamp");
                put_back(arrived, slow.as_secs_f64());
            }
        }
        Fault::Swell(payload) => {
            let payload = BASE64_STANDARD.encode(payload);
            for record in records {
                record["Data"] = payload.clone().into();
            }
        }
        _ => {}
    }
}
