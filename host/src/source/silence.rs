//! Deadlines of calls: a server that says nothing for too long is given up on, and what is tried again
//! goes over new connections.
//!
//! Only silence counts: an answer that takes minutes and moves is an answer. The SDK's own read timeout
//! ends with the first byte of an answer, its timeout of an attempt would also end long answers that
//! move, and neither leaves a connection that is dead: over HTTP/2 the next call would share it.

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

/// A request may take this long per byte beside the silence: the server says nothing while it is sent.
const UPLOAD_BYTES_PER_S: u64 = 256 << 10;

/// Makes the HTTP client of a server: its calls end when the server says nothing for `silence_max`.
pub(super) fn http_client(silence_max: Duration) -> SharedHttpClient {
    let connections = RwLock::new(Connections { renewed: 0, client: connections() });
    SharedHttpClient::new(Deadlines { silence_max, connections: Arc::new(connections) })
}

/// A client with no connection yet.
fn connections() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_https()
}

/// The connections in use.
#[derive(Debug)]
struct Connections {
    /// How often they were given up.
    renewed: u64,
    client: SharedHttpClient,
}

/// An HTTP client whose calls have a deadline.
#[derive(Clone, Debug)]
struct Deadlines {
    silence_max: Duration,
    connections: Arc<RwLock<Connections>>,
}

impl Deadlines {
    fn client(&self) -> SharedHttpClient {
        self.connections.read().unwrap_or_else(PoisonError::into_inner).client.clone()
    }

    /// Lets calls from now on connect again. Those that are under way keep their connections.
    fn give_up(&self, of: u64) {
        let mut connections = self.connections.write().unwrap_or_else(PoisonError::into_inner);
        // Many calls may have waited on the same ones.
        if connections.renewed == of {
            *connections = Connections { renewed: of + 1, client: self::connections() };
        }
    }
}

impl HttpClient for Deadlines {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let (renewed, client) = {
            let connections = self.connections.read().unwrap_or_else(PoisonError::into_inner);
            (connections.renewed, connections.client.clone())
        };
        let connector = client.http_connector(settings, components);
        SharedHttpConnector::new(DeadlineConnector { deadlines: self.clone(), renewed, connector })
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.client().connector_metadata()
    }
}

/// Sends requests over the connections of one time.
#[derive(Debug)]
struct DeadlineConnector {
    deadlines: Deadlines,
    renewed: u64,
    connector: SharedHttpConnector,
}

impl HttpConnector for DeadlineConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (deadlines, renewed) = (self.deadlines.clone(), self.renewed);
        let silence_max = deadlines.silence_max;
        let upload_ms =
            request.body().content_length().unwrap_or_default() * 1_000 / UPLOAD_BYTES_PER_S;
        let wait_max = silence_max + Duration::from_millis(upload_ms);
        let answer = self.connector.call(request);
        HttpConnectorFuture::new(async move {
            let Ok(answer) = tokio::time::timeout(wait_max, answer).await else {
                deadlines.give_up(renewed);
                return Err(ConnectorError::timeout(Silence(wait_max).into()));
            };
            let mut answer = answer?;
            let body = std::mem::replace(answer.body_mut(), SdkBody::taken());
            *answer.body_mut() = SdkBody::from_body_1_x(DeadlineBody {
                body,
                deadline: Box::pin(tokio::time::sleep(silence_max)),
                is_waiting: false,
                deadlines,
                renewed,
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
                this.deadlines.give_up(this.renewed);
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
