//! Deadlines of calls: a server that says nothing for too long is given up on, and what is tried again
//! goes over new connections.
//!
//! Only silence counts: an answer that takes minutes and moves is an answer. The SDK's own read timeout
//! ends with the first byte of an answer, its timeout of an attempt would also end long answers that
//! move, and neither leaves a connection that is dead: over HTTP/2 the next call would share it.
//!
//! The port of an embedded stream may be another user's once the process that served it has ended. So before each
//! attempt, and when its answer has begun, the process must be there ([`Served::look`]); connections to one that
//! has ended are given up. What is left: a request that is between the look and its connection at the moment at
//! which the process ends may reach who has the port then; what he answers is not taken.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_sdk_kinesis::config::RuntimeComponents;
use aws_sdk_kinesis::config::http::HttpRequest;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::embedded::Served;
use crate::private::FileMark;

/// A request may take this long per byte beside the silence: the server says nothing while it is sent.
const UPLOAD_BYTES_PER_S: u64 = 256 << 10;

/// Makes the HTTP client of a server: its calls end when the server says nothing for `silence_max`, or when it is
/// `served` and no longer there.
pub(super) fn http_client(silence_max: Duration, served: Option<Served>) -> SharedHttpClient {
    let process = served.as_ref().and_then(|served| served.look(None));
    let connections = RwLock::new(Connections { renewed: 0, process, client: connections() });
    SharedHttpClient::new(Deadlines { silence_max, served, connections: Arc::new(connections) })
}

/// A client with no connection yet.
fn connections() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_https()
}

/// The connections in use.
#[derive(Clone, Debug)]
struct Connections {
    /// How often they were given up.
    renewed: u64,
    /// Whose they are, where the server is an embedded stream; `None`: nobody's, it has ended.
    process: Option<FileMark>,
    client: SharedHttpClient,
}

/// An HTTP client whose calls have a deadline.
#[derive(Clone, Debug)]
struct Deadlines {
    silence_max: Duration,
    /// The embedded stream that it is the client of.
    served: Option<Served>,
    connections: Arc<RwLock<Connections>>,
}

impl Deadlines {
    fn connections(&self) -> Connections {
        self.connections.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The connections to the process that serves now.
    fn current(&self) -> Connections {
        let connections = self.connections();
        let Some(served) = &self.served else { return connections };
        let process = served.look(connections.process);
        if process != connections.process {
            self.give_up(connections.renewed, process);
        }
        self.connections()
    }

    /// Lets calls from now on connect again, to `process` where the server is an embedded stream. Those that are
    /// under way keep their connections.
    fn give_up(&self, of: u64, process: Option<FileMark>) {
        let mut connections = self.connections.write().unwrap_or_else(PoisonError::into_inner);
        // Many calls may have waited on the same ones.
        if connections.renewed == of {
            *connections = Connections { renewed: of + 1, process, client: self::connections() };
        }
    }
}

impl HttpClient for Deadlines {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        // Asked for at each attempt.
        let Connections { renewed, process, client } = self.current();
        let connector = client.http_connector(settings, components);
        let deadlines = self.clone();
        SharedHttpConnector::new(DeadlineConnector { deadlines, renewed, process, connector })
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.connections().client.connector_metadata()
    }
}

/// Sends requests over the connections of one time.
#[derive(Debug)]
struct DeadlineConnector {
    deadlines: Deadlines,
    renewed: u64,
    process: Option<FileMark>,
    connector: SharedHttpConnector,
}

impl DeadlineConnector {
    /// Why nothing may be sent, where nobody serves.
    fn ended(&self) -> Option<ConnectorError> {
        let served = self.deadlines.served.as_ref()?;
        self.process.is_none().then(|| ConnectorError::io(Ended(served.clone()).into()))
    }
}

impl HttpConnector for DeadlineConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        if let Some(error) = self.ended() {
            return HttpConnectorFuture::ready(Err(error));
        }
        let (deadlines, renewed, process) = (self.deadlines.clone(), self.renewed, self.process);
        let silence_max = deadlines.silence_max;
        let upload_ms =
            request.body().content_length().unwrap_or_default() * 1_000 / UPLOAD_BYTES_PER_S;
        let wait_max = silence_max + Duration::from_millis(upload_ms);
        let answer = self.connector.call(request);
        HttpConnectorFuture::new(async move {
            let Ok(answer) = tokio::time::timeout(wait_max, answer).await else {
                deadlines.give_up(renewed, process);
                return Err(ConnectorError::timeout(Silence(wait_max).into()));
            };
            let mut answer = answer?;
            if let Some(served) = &deadlines.served {
                let now = served.look(process);
                if now != process {
                    // Another user may have answered.
                    deadlines.give_up(renewed, now);
                    return Err(ConnectorError::io(Ended(served.clone()).into()));
                }
            }
            let body = std::mem::replace(answer.body_mut(), SdkBody::taken());
            *answer.body_mut() = SdkBody::from_body_1_x(DeadlineBody {
                body,
                deadline: Box::pin(tokio::time::sleep(silence_max)),
                is_waiting: false,
                deadlines,
                renewed,
                process,
            });
            Ok(answer)
        })
    }
}

/// The body of an answer, each part of which must come in time.
struct DeadlineBody {
    body: SdkBody,
    deadline: Pin<Box<Sleep>>,
    /// Whether the deadline is of the part that is waited for.
    is_waiting: bool,
    deadlines: Deadlines,
    renewed: u64,
    process: Option<FileMark>,
}

impl Body for DeadlineBody {
    type Data = Bytes;
    type Error = aws_smithy_types::body::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        // First: who reads may have been busy for long, while the server was not silent.
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.is_waiting = false;
            return Poll::Ready(frame);
        }
        let silence_max = this.deadlines.silence_max;
        if !this.is_waiting {
            this.is_waiting = true;
            this.deadline.as_mut().reset(Instant::now() + silence_max);
        }
        match this.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => {
                this.deadlines.give_up(this.renewed, this.process);
                Poll::Ready(Some(Err(Silence(silence_max).into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        Body::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> SizeHint {
        Body::size_hint(&self.body)
    }
}

/// The server said nothing for this time.
#[derive(Debug)]
struct Silence(Duration);

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(silence) = self;
        write!(f, "the server said nothing for {}", humantime::format_duration(*silence))
    }
}

impl std::error::Error for Silence {}

/// The process that served the embedded stream has ended.
#[derive(Debug)]
struct Ended(Served);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.0.as_str();
        let port = self.0.port().unwrap_or_default();
        write!(
            f,
            "the embedded stream at {url} has ended; start it again with `shardmill stream serve --port {port}`"
        )
    }
}

impl std::error::Error for Ended {}
