//! The embedded stream: a Kinesis server of our own, in memory, on loopback.
//!
//! Inside the process (`demo`, or `run` when no server is found), or as a process of its own
//! (`shardmill stream serve`) that the other commands find by a lock and an address file in the
//! state folder. The same SDK code path talks to it as to AWS.
//!
//! Credentials are not checked, so whoever could reach it would read and write every record: processes of
//! other users of the machine are refused, and so are pages in browsers.
//!
//! Its port may be another user's once it has ended. So who has found it looks at each call whether it still
//! serves: [`Served`](shardmill_kinesis::served::Served).
//!
//! It serves the API of Kinesis and keeps records in memory only: it is for tries and tests. Records are read from it
//! by `kinesis`, as from AWS. It uses `config`, `core`, `kinesis` for how a stream is found, and `ports`; its heavy
//! dependencies are ferrokinesis and axum.

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

/// Shards that all embedded streams may have together.
const SHARDS_MAX: u32 = 10_000;
/// The largest request: PutRecords takes 10 MiB, a third more as base64, and room for JSON.
const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Connections at once: many times those of all clients on one machine.
const CONNECTIONS_MAX: usize = 4_096;
/// Time that a connection may stay without a request: longer than clients keep theirs, so that none is closed
/// under a request.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// Creating and deleting takes this long: enough to be seen, not to be waited for.
const TRANSITION_MS: u64 = 100;

/// Whose processes may use a served stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// Those of the user who serves it, and root's.
    Own,
    /// All of this machine's.
    Any,
}

/// A served stream; it ends when this is dropped.
pub struct EmbeddedStream {
    url: Url,
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
    _published: Option<Published>,
}

impl EmbeddedStream {
    /// Serves on `127.0.0.1:port`; port 0 takes a free one.
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

    /// Serves with options of the server's own, for tests: a short iterator life, throttled writes.
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
            // Requests in hand are not waited for: a subscription goes on for minutes.
            let serve = shardmill_ports::serve(listener, app, rules, CancellationToken::new());
            tokio::select! {
                () = serve => {}
                () = stopped.cancelled() => {}
            }
        });
        Ok(Self { url, stop, task: Some(task), _published: None })
    }

    /// Serves, and lets other processes of this user find it by the state folder.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] when another process serves there, or the port is in use.
    pub async fn serve(state_dir: &Path, port: u16) -> Result<Self, SourceError> {
        Self::serve_for(state_dir, port, Users::Own).await
    }

    /// The same for these users' processes.
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

    /// Where it is served.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Serves until the process is told to stop.
    pub async fn until(mut self, stop: &CancellationToken) {
        if let Some(task) = self.task.take() {
            tokio::select! {
                _ = task => {}
                () = stop.cancelled() => {}
            }
        }
    }
}

/// Refuses what a page in a browser sends, whatever name it came by.
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

/// The lock and the address file of a serving process.
struct Published {
    /// Keeps a second server out.
    lock: File,
    /// Locked, too: by that the others know that this process still serves there.
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
            // Only for the message.
            let _ = file.read_to_string(&mut owner);
            return Err(error(format!(
                "process {} serves a stream from this state folder already; stop it, or set another \
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
        // The locks are what counts; without its own the address is stale.
        if let Some(address) = &self.address {
            let _ = address.unlock();
        }
        let _ = self.lock.unlock();
    }
}
