//! Embedded stream: a Kinesis server in memory, on the loopback interface, for tries and tests.
//!
//! It runs inside the process (`demo`, or `run` when no server is found), or as a process of its own (`shardmill stream
//! serve`), which the other commands find by a lock and an address file in the state folder. `kinesis` reads from it
//! with the same code as from AWS.
//!
//! Credentials are not checked, so everybody who can connect can read and write all records. Therefore processes of
//! other users of the machine are refused, and so are pages in browsers.
//!
//! After it has ended, its port may belong to another user. So clients check at each call whether it still serves:
//! [`Served`](shardmill_kinesis::served::Served).
//!
//! This crate uses `config`, `core`, `kinesis` (where a served stream is found), and `ports`; its heavy dependencies
//! are ferrokinesis and axum.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use ferrokinesis::store::StoreOptions;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use url::Url;

use shardmill_config::{HttpDeadlines, Timing};
use shardmill_core::boxed;
use shardmill_core::private;
use shardmill_core::source::SourceError;
use shardmill_kinesis::served::{FOLDER, address_path};
use shardmill_ports::{PortRules, names};

/// Most shards of all embedded streams together.
const SHARDS_MAX: u32 = 10_000;
/// Most bytes of a request: PutRecords has 10 MiB, a third more as base64, and room for JSON.
const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Most connections at once: many times those of all clients on one machine.
const CONNECTIONS_MAX: usize = 4_096;
/// Longest time of a connection without a request: longer than clients keep theirs, so that the server never closes one
/// while a request is on its way.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// Time that creating and deleting takes: long enough to be visible, short enough not to wait for.
const TRANSITION_MS: u64 = 100;

/// Users whose processes may use a served stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// The user who serves it, and root.
    Own,
    /// All users of this machine.
    Any,
}

/// A running server; it ends when this is dropped.
pub struct EmbeddedStream {
    url: Url,
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
    _published: Option<Published>,
}

impl EmbeddedStream {
    /// Starts a server on `127.0.0.1:port`; port 0 selects a free one.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] when the port is in use.
    pub async fn start(port: u16) -> Result<Self, SourceError> {
        Self::start_for(port, Users::Own).await
    }

    async fn start_for(port: u16, users: Users) -> Result<Self, SourceError> {
        let options = StoreOptions {
            shard_limit: SHARDS_MAX,
            create_stream_ms: TRANSITION_MS,
            delete_stream_ms: TRANSITION_MS,
            update_stream_ms: TRANSITION_MS,
            ..StoreOptions::default()
        };
        Self::start_as(port, options, users).await
    }

    /// Starts a server with other options, for tests: iterators that expire early, throttled writes.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] when the port is in use.
    pub async fn start_with(port: u16, options: StoreOptions) -> Result<Self, SourceError> {
        Self::start_as(port, options, Users::Own).await
    }

    #[boxed]
    async fn start_as(port: u16, options: StoreOptions, users: Users) -> Result<Self, SourceError> {
        let address = format!("127.0.0.1:{port}");
        let error = |cause: String| SourceError::Embedded { address: address.clone(), cause };
        let listener = TcpListener::bind(&address).await.map_err(|cause| {
            error(format!("{cause}; another process has the port: choose one with --port"))
        })?;
        let bound = listener.local_addr().map_err(|cause| error(cause.to_string()))?;
        let url =
            Url::parse(&format!("http://{bound}")).map_err(|cause| error(cause.to_string()))?;
        let (app, _store) = ferrokinesis::create_app(options);
        let app = app.layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX));
        let app = app.layer(middleware::from_fn(refuse_pages));
        let rules = PortRules {
            name: "stream",
            connections_max: CONNECTIONS_MAX,
            per_peer_max: None,
            deadlines: HttpDeadlines { idle_max: IDLE_MAX, ..Timing::default().http },
            buffer_bytes_max: None,
            is_for_own_user: users == Users::Own,
            keeps_files: false,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            // Does not wait for running requests: a subscription lasts for minutes.
            let serve = shardmill_ports::serve(listener, app, rules, CancellationToken::new());
            tokio::select! {
                () = serve => {}
                () = stopped.cancelled() => {}
            }
        });
        Ok(Self { url, stop, task: Some(task), _published: None })
    }

    /// Starts a server that other processes of this user find by the state folder.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] when another process serves there, or the port is in use.
    pub async fn serve(state_dir: &Path, port: u16) -> Result<Self, SourceError> {
        Self::serve_for(state_dir, port, Users::Own).await
    }

    /// Starts a server that processes of these users may use, and find by the state folder.
    ///
    /// # Errors
    /// As [`EmbeddedStream::serve`].
    #[boxed]
    pub async fn serve_for(state_dir: &Path, port: u16, users: Users) -> Result<Self, SourceError> {
        let mut published = Published::lock(state_dir)?;
        let mut served = Self::start_for(port, users).await?;
        published.write(state_dir, &served.url)?;
        served._published = Some(published);
        Ok(served)
    }

    /// Returns the URL of the server.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Serves until `stop` is cancelled.
    pub async fn until(mut self, stop: &CancellationToken) {
        if let Some(task) = self.task.take() {
            tokio::select! {
                _ = task => {}
                () = stop.cancelled() => {}
            }
        }
    }
}

/// Refuses requests of pages in browsers, whatever host name they use.
async fn refuse_pages(request: Request, next: Next) -> Response {
    if names::is_of_page(request.headers()) || !names::is_direct(&request, &[]) {
        let cause = "expected a request from a program, sent to an address or to localhost; requests from \
                     pages in browsers are refused";
        let body = serde_json::json!({ "__type": "AccessDeniedException", "message": cause });
        let media = [(axum::http::header::CONTENT_TYPE, "application/x-amz-json-1.1")];
        return (StatusCode::FORBIDDEN, media, body.to_string()).into_response();
    }
    next.run(request).await
}

impl Drop for EmbeddedStream {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Lock and address file of a serving process.
struct Published {
    /// Prevents a second server on the same state folder.
    lock: File,
    /// Address file, which is locked, too: the lock shows other processes that this one still serves.
    address: Option<File>,
}

impl Published {
    fn lock(state_dir: &Path) -> Result<Self, SourceError> {
        let folder = state_dir.join(FOLDER);
        let path = folder.join("lock");
        let error =
            |cause: String| SourceError::Embedded { address: path.display().to_string(), cause };
        private::make_folders(&folder).map_err(|cause| error(cause.to_string()))?;
        let mut file = private::open_lock(&path).map_err(|cause| error(cause.to_string()))?;
        if file.try_lock().is_err() {
            let mut owner = String::new();
            // Used only in the message.
            let _ = file.read_to_string(&mut owner);
            return Err(error(format!(
                "process {} already serves a stream from this state folder; stop it, or set another \
                 state_dir",
                owner.trim()
            )));
        }
        private::sign_lock(&file).map_err(|cause| error(cause.to_string()))?;
        Ok(Self { lock: file, address: None })
    }

    fn write(&mut self, state_dir: &Path, url: &Url) -> Result<(), SourceError> {
        let path = address_path(state_dir);
        let written = private::publish_own(&path, format!("{url}\n").as_bytes());
        let written = written.map_err(|cause| SourceError::Embedded {
            address: path.display().to_string(),
            cause: cause.to_string(),
        })?;
        self.address = Some(written);
        Ok(())
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // The files stay, but an address file without a lock is stale.
        if let Some(address) = &self.address {
            let _ = address.unlock();
        }
        let _ = self.lock.unlock();
    }
}
