//! HTTP API for changes of a running pipeline: swap, roll back, reload, history.
//!
//! It is served at the admin port. For commands on this machine it is also served at a port on loopback.
//! Commands find that port and its token in a file in the pipeline's folder, which only the owner can read.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::PlainJson;
use super::access::{Access, Right, guarded};
use shardmill_config::Gates;
use shardmill_config::{HttpDeadlines, PipelineConfig, Secret};
use shardmill_core::boxed;
use shardmill_core::escape::escaped;
use shardmill_core::private;
use shardmill_engine::lane::StatusRegistry;
use shardmill_engine::swap::{ChangeRefused, Component, SHADOW_MAX, SwapRequest, Swapper};
use shardmill_ports::PortRules;

/// Maximum size of a component in bytes: the maximum of `limits.component`.
const BODY_BYTES_MAX: usize = 256 << 20;
/// File through which commands on this machine find a running pipeline.
const ADDRESS_FILE: &str = "control.json";
/// File with the token of the admin port, if none is configured.
const TOKEN_FILE: &str = "admin.token";
/// Maximum connections of the control port; only a few commands use it.
const CONNECTIONS_MAX: usize = 32;
/// Bytes that a connection may buffer while it reads: the head of a request and a piece of the body.
pub(super) const BUFFER_BYTES_MAX: usize = 16 << 10;
/// Default number of changes in the history.
const CHANGES_SHOWN: u32 = 50;

/// Function that reads the pipeline file again.
pub type ReadConfig = Arc<dyn Fn() -> anyhow::Result<PipelineConfig> + Send + Sync>;

/// Access to a running pipeline, for changes.
#[derive(Clone)]
pub struct Control {
    /// Makes the changes.
    pub swapper: Swapper,
    /// Reads the pipeline file, for a reload.
    pub read_config: ReadConfig,
    /// Status of the lanes.
    pub statuses: StatusRegistry,
}

/// Address and token of a running pipeline's control port.
#[derive(Serialize, Deserialize)]
pub struct ControlAddress {
    /// Address that it listens on.
    pub address: SocketAddr,
    /// Token that requests must send.
    pub token: String,
}

impl ControlAddress {
    /// Reads the address that the pipeline of this folder has stored, if any. That pipeline may have ended
    /// since.
    ///
    /// # Errors
    /// The file cannot be trusted because others could have written it, or its content is invalid.
    pub fn find(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join(ADDRESS_FILE);
        let unusable = || format!("refused to use {}", path.display());
        match private::read_own(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|cause| {
                anyhow!(
                    "expected the address of a running pipeline, found something else ({cause}); delete the \
                     file, and restart the pipeline"
                )
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error().is_some() => Err(anyhow!(
                "{error}; run the command as the user who runs the pipeline, or delete what is there and \
                 restart the pipeline"
            )),
            // Other errors come from our own checks, and their text says what to do.
            Err(error) => Err(error.into()),
        }
        .with_context(unusable)
    }

    /// Removes the files of a run that was killed. Its port may now belong to another user.
    ///
    /// # Errors
    /// A file exists and cannot be removed.
    pub fn forget(folder: &Path) -> anyhow::Result<()> {
        for name in [ADDRESS_FILE, TOKEN_FILE] {
            let path = folder.join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => bail!(
                    "failed to remove {}: {error}; move away what is there, or let this user write to the \
                     folder",
                    path.display()
                ),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Writes a file in the pipeline's folder. Errors name the file.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    private::write_own(path, bytes).map_err(|cause| {
        anyhow!(
            "failed to write {}: {cause}; free the disk, move away what is there, or let this user write to \
             the folder",
            path.display()
        )
    })
}

/// The control port. Its files are deleted when it ends.
pub struct ControlPort {
    listener: TcpListener,
    folder: PathBuf,
    token: Secret,
    deadlines: HttpDeadlines,
}

impl ControlPort {
    /// Opens the control port on a free port of loopback and stores its address in the pipeline's folder.
    ///
    /// # Errors
    /// No port can be opened, or the file cannot be written.
    #[boxed]
    pub async fn open(folder: &Path, deadlines: HttpDeadlines) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("failed to open the control port on 127.0.0.1")?;
        let mut random = [0; 32];
        getrandom::fill(&mut random)?;
        let token = hex::encode(random);
        let at = ControlAddress { address: listener.local_addr()?, token: token.clone() };
        write(&folder.join(ADDRESS_FILE), &serde_json::to_vec(&at)?)?;
        Ok(Self { listener, folder: folder.to_owned(), token: Secret::new(token), deadlines })
    }

    /// Returns the token of this run.
    pub fn token(&self) -> &Secret {
        &self.token
    }

    /// Writes the token to a file for scripts that use the admin port, and returns its path.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_token(&self) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(TOKEN_FILE);
        write(&path, format!("{}\n", self.token.reveal()).as_bytes())?;
        Ok(path)
    }

    /// Serves until `stop`.
    pub fn serve(self, control: Control, stop: CancellationToken) {
        let access = Access::with_token_only(&self.token);
        let shown =
            |State(statuses): State<StatusRegistry>| async move { PlainJson(statuses.snapshot()) };
        let status =
            Router::new().route("/status", get(shown)).with_state(control.statuses.clone());
        let routes = guarded(status, access.clone(), Right::Read).merge(routes(control, access));
        let rules = PortRules {
            name: "control",
            connections_max: CONNECTIONS_MAX,
            per_peer_max: None,
            deadlines: self.deadlines,
            buffer_bytes_max: Some(BUFFER_BYTES_MAX),
            is_for_own_user: false,
            keeps_files: true,
        };
        let served = shardmill_ports::serve(self.listener, routes, rules, stop);
        let folder = self.folder;
        tokio::spawn(async move {
            served.await;
            if let Err(error) = ControlAddress::forget(&folder) {
                tracing::warn!(%error, "failed to remove the address of the control port");
            }
        });
    }
}

/// Returns the routes, for the admin port or the control port.
pub fn routes(control: Control, access: Access) -> Router {
    let routes = Router::new()
        .route("/stages/{stage}/swap", post(swap))
        .route("/stages/{stage}/rollback", post(roll_back))
        .route("/reload", post(reload))
        .route("/changes", get(changes))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(control);
    // The token also protects the history and the trials, because they show record contents.
    guarded(routes, access, Right::Change)
}

/// Parameters of a swap request, in addition to the component in the body.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SwapQuery {
    /// Name of the component, for messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// First digits of the digest of a component that ran before, instead of a body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub component: Option<String>,
    /// Percentage of partition keys that the candidate gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<u8>,
    /// Duration of the shadow run beside the incumbent, in milliseconds.
    pub shadow_ms: u64,
    /// Maximum number of records with different outputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_changed: Option<u64>,
    /// Maximum number of records that the candidate rejects and the incumbent accepts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rejected: Option<u64>,
    /// Try the candidate and report, but change nothing.
    pub dry_run: bool,
}

async fn swap(
    State(control): State<Control>,
    UrlPath(stage): UrlPath<String>,
    Query(query): Query<SwapQuery>,
    body: Bytes,
) -> Response {
    if query.canary.is_some_and(|percent| !(1..=99).contains(&percent)) {
        return misused(
            "invalid canary: expected 1 to 99, the percentage of partition keys for the candidate",
        );
    }
    if query.shadow_ms > SHADOW_MAX.as_millis() as u64 {
        return misused("invalid shadow_ms: expected at most 86400000 (one day)");
    }
    let component = match query.component {
        Some(digits) => Component::Kept(digits),
        None if body.is_empty() => {
            return misused("missing component: send its bytes as the body, or `component=DIGEST`");
        }
        None => {
            // The name appears in messages, among the host's own lines, so it is escaped.
            let name = query.name.as_deref().unwrap_or("the component");
            let name = escaped(name, &[]);
            Component::Bytes { name, bytes: body }
        }
    };
    let request = SwapRequest {
        stage: stage.as_str().into(),
        component,
        canary_percent: query.canary,
        shadow: Duration::from_millis(query.shadow_ms),
        gates: Gates { changed_max: query.max_changed, newly_rejected_max: query.max_rejected },
        dry_run: query.dry_run,
    };
    answered(finished(async move { control.swapper.swap(request).await }).await)
}

async fn roll_back(State(control): State<Control>, UrlPath(stage): UrlPath<String>) -> Response {
    let stage = stage.as_str().into();
    answered(
        finished(async move { control.swapper.roll_back(&stage, "rolled back by hand").await })
            .await,
    )
}

/// Parameters of a reload request.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReloadQuery {
    /// Report what would change, and change nothing.
    pub dry_run: bool,
}

async fn reload(State(control): State<Control>, Query(query): Query<ReloadQuery>) -> Response {
    let config = match (control.read_config)() {
        Ok(config) => config,
        Err(error) => return misused(&shardmill_config::error_text(&error)),
    };
    let dry_run = query.dry_run;
    answered(finished(async move { control.swapper.reload(config, dry_run).await }).await)
}

/// Parameters of a request for the history.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ChangesQuery {
    stage: Option<String>,
    limit: Option<u32>,
}

async fn changes(State(control): State<Control>, Query(query): Query<ChangesQuery>) -> Response {
    let limit = query.limit.unwrap_or(CHANGES_SHOWN);
    match control.swapper.changes().list(query.stage, limit).await {
        Ok(changes) => PlainJson(changes).into_response(),
        Err(error) => {
            let body = PlainJson(serde_json::json!({ "error": error.to_string() }));
            (StatusCode::INTERNAL_SERVER_ERROR, body).into_response()
        }
    }
}

/// Runs a change to its end, even if the caller disconnects.
async fn finished<T: Send + 'static>(change: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(change).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn answered<T: Serialize>(done: Result<T, ChangeRefused>) -> Response {
    match done {
        Ok(report) => PlainJson(report).into_response(),
        Err(refused) => {
            let body = serde_json::json!({
                "error": refused.to_string(),
                "step": refused.step,
                "cause": refused.cause,
                "trial": refused.trial,
            });
            (StatusCode::CONFLICT, PlainJson(body)).into_response()
        }
    }
}

fn misused(cause: &str) -> Response {
    (StatusCode::BAD_REQUEST, PlainJson(serde_json::json!({ "error": cause }))).into_response()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use shardmill_config::Timing;

    fn refused<T>(done: anyhow::Result<T>, path: &Path) -> String {
        let error = shardmill_config::error_text(&done.err().expect("an error"));
        assert!(error.contains(&path.display().to_string()), "{error}");
        error
    }

    #[tokio::test]
    async fn errors_at_the_files_of_the_control_port_name_the_file_and_the_way_out() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path();
        let (address, token) = (folder.join(ADDRESS_FILE), folder.join(TOKEN_FILE));
        let deadlines = Timing::default().http;
        let port = ControlPort::open(folder, deadlines).await.unwrap();
        assert!(ControlAddress::find(folder).unwrap().is_some());
        ControlAddress::forget(folder).unwrap();
        assert!(ControlAddress::find(folder).unwrap().is_none());

        fs::create_dir(&token).unwrap();
        for error in
            [refused(ControlAddress::forget(folder), &token), refused(port.write_token(), &token)]
        {
            assert!(error.contains("move away what is there"), "{error}");
        }
        fs::create_dir(&address).unwrap();
        for error in [
            refused(ControlAddress::forget(folder), &address),
            refused(ControlPort::open(folder, deadlines).await, &address),
        ] {
            assert!(error.contains("move away what is there"), "{error}");
        }
        let error = refused(ControlAddress::find(folder), &address);
        assert!(error.contains("move it away"), "{error}");
        fs::remove_dir(&address).unwrap();
        private::write_own(&address, b"{}").unwrap();
        let error = refused(ControlAddress::find(folder), &address);
        assert!(error.contains("delete the file"), "{error}");
    }
}
