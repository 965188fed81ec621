//! Changes of a running pipeline by HTTP: swap, roll back, reload, history.
//!
//! Served at the admin port, and for this machine's own commands at a port of loopback that they find,
//! with its token, by a file in the pipeline's folder which only its owner can read.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::{PipelineConfig, Secret};
use crate::lane::Board;
use crate::swap::{ChangeRefused, Component, Gates, SHADOW_MAX, SwapOrder, Swapper};

/// The largest component that is taken, in bytes: as `limits.component` can be at most.
const BODY_BYTES_MAX: usize = 256 << 20;
/// The file by which this machine's commands find a running pipeline.
const ADDRESS_FILE: &str = "control.json";
/// Changes that the history shows when nothing else is asked for.
const CHANGES_SHOWN: u32 = 50;

/// Reads the pipeline's file again.
pub type ReadConfig = Arc<dyn Fn() -> anyhow::Result<PipelineConfig> + Send + Sync>;

/// What changes a running pipeline.
#[derive(Clone)]
pub struct Control {
    /// Makes the changes.
    pub swapper: Swapper,
    /// Reads the pipeline's file, for a reload.
    pub read_config: ReadConfig,
    /// What is shown of the lanes.
    pub board: Board,
}

/// Who may ask for changes at a port.
#[derive(Clone)]
pub enum Door {
    /// Who has the token.
    Token(Secret),
    /// Every process of this machine, but no page in a browser: those send where they come from, or
    /// come by another name than this machine's.
    Loopback,
}

/// Where the control port of a running pipeline is, and the token that it asks for.
#[derive(Serialize, Deserialize)]
pub struct ControlAddress {
    /// Where it listens.
    pub address: SocketAddr,
    /// What requests must bring.
    pub token: String,
}

impl ControlAddress {
    /// The one of the pipeline whose folder this is, if it left one: it may be gone since.
    pub fn find(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(ADDRESS_FILE)).ok()?).ok()
    }
}

/// The control port; its file is deleted with it.
pub struct ControlPort {
    listener: TcpListener,
    file: PathBuf,
    token: Secret,
}

impl ControlPort {
    /// Opens it on a free port of loopback and leaves its address in the pipeline's folder.
    ///
    /// # Errors
    /// When no port can be opened or the file cannot be written.
    pub async fn open(folder: &Path) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let mut random = [0; 32];
        getrandom::fill(&mut random)?;
        let token = hex::encode(random);
        let at = ControlAddress { address: listener.local_addr()?, token: token.clone() };
        let file = folder.join(ADDRESS_FILE);
        // Made for its owner's eyes alone, then put in place whole.
        let mut draft = tempfile::NamedTempFile::new_in(folder)?;
        draft.write_all(&serde_json::to_vec(&at)?)?;
        draft.persist(&file)?;
        Ok(Self { listener, file, token: Secret::new(token) })
    }

    /// Serves until `stop`.
    pub fn serve(self, control: Control, stop: CancellationToken) {
        let door = Door::Token(self.token.clone());
        let shown = |State(board): State<Board>| async move { Json(board.snapshot()) };
        let status = Router::new().route("/status", get(shown)).with_state(control.board.clone());
        let routes = guarded(status, door.clone()).merge(routes(control, door));
        tokio::spawn(async move {
            let served = axum::serve(self.listener, routes)
                .with_graceful_shutdown(async move { stop.cancelled().await });
            if let Err(error) = served.await {
                tracing::error!(%error, "the control port failed");
            }
            let _ = std::fs::remove_file(&self.file);
        });
    }
}

/// The routes, for a router of the admin port or of their own.
pub fn routes(control: Control, door: Door) -> Router {
    let routes = Router::new()
        .route("/stages/{stage}/swap", post(swap))
        .route("/stages/{stage}/rollback", post(roll_back))
        .route("/reload", post(reload))
        .route("/changes", get(changes))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(control);
    guarded(routes, door)
}

/// Routes that only those may use whom the door lets in.
pub(super) fn guarded(routes: Router, door: Door) -> Router {
    routes.layer(middleware::from_fn_with_state(door, admit))
}

async fn admit(State(door): State<Door>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is_admitted = match &door {
        Door::Token(token) => bears(headers, token),
        Door::Loopback => is_local(headers),
    };
    match is_admitted {
        true => next.run(request).await,
        false => {
            let cause = match door {
                Door::Token(_) => {
                    "the token is missing or wrong: send `Authorization: Bearer TOKEN`"
                }
                Door::Loopback => "requests from web pages are not taken",
            };
            let body = Json(serde_json::json!({ "error": cause }));
            (StatusCode::UNAUTHORIZED, body).into_response()
        }
    }
}

/// Whether the request brings the token. Compared by digest: how long that takes tells nothing.
fn bears(headers: &HeaderMap, token: &Secret) -> bool {
    use crate::plugin::Digest;
    let brought = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let brought = brought.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    Digest::of(brought.as_bytes()) == Digest::of(token.reveal().as_bytes())
}

/// Whether no browser sent it for a page: such a request names its origin, or a host that only its
/// name server says is this machine.
fn is_local(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let is_ours = name == "localhost"
        || name
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback());
    is_ours && !headers.contains_key(header::ORIGIN)
}

/// What a swap's request says beside the component's bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SwapQuery {
    /// What to call the component in messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The first digits of the digest of a component that ran before, in place of a body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub component: Option<String>,
    /// Of 100 partition keys, how many the candidate gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<u8>,
    /// How long it runs beside the incumbent first, in milliseconds.
    pub shadow_ms: u64,
    /// Records that it may give something else for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_changed: Option<u64>,
    /// Records that it may reject which the incumbent takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rejected: Option<u64>,
    /// Try it and report; change nothing.
    pub dry_run: bool,
}

async fn swap(
    State(control): State<Control>,
    UrlPath(stage): UrlPath<String>,
    Query(query): Query<SwapQuery>,
    body: Bytes,
) -> Response {
    if query.canary.is_some_and(|percent| !(1..=99).contains(&percent)) {
        return misused("canary is 1 to 99: of 100 partition keys, how many the candidate gets");
    }
    if query.shadow_ms > SHADOW_MAX.as_millis() as u64 {
        return misused("shadow_ms is at most one day (86400000)");
    }
    let component = match query.component {
        Some(digits) => Component::Kept(digits),
        None if body.is_empty() => {
            return misused("send the component's bytes as the body, or `component=DIGEST`");
        }
        None => {
            let name = query.name.unwrap_or_else(|| "the component".into());
            Component::Bytes { name, bytes: body }
        }
    };
    let order = SwapOrder {
        stage: stage.as_str().into(),
        component,
        canary_percent: query.canary,
        shadow: Duration::from_millis(query.shadow_ms),
        gates: Gates { changed_max: query.max_changed, newly_rejected_max: query.max_rejected },
        dry_run: query.dry_run,
    };
    answered(finished(async move { control.swapper.swap(order).await }).await)
}

async fn roll_back(State(control): State<Control>, UrlPath(stage): UrlPath<String>) -> Response {
    let stage = stage.as_str().into();
    answered(
        finished(async move { control.swapper.roll_back(&stage, "rolled back by hand").await })
            .await,
    )
}

/// What a reload's request says.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReloadQuery {
    /// Say what would change, and change nothing.
    pub dry_run: bool,
}

async fn reload(State(control): State<Control>, Query(query): Query<ReloadQuery>) -> Response {
    let config = match (control.read_config)() {
        Ok(config) => config,
        Err(error) => return misused(&super::told(&error)),
    };
    let dry_run = query.dry_run;
    answered(finished(async move { control.swapper.reload(config, dry_run).await }).await)
}

/// What is asked of the history.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ChangesQuery {
    stage: Option<String>,
    limit: Option<u32>,
}

async fn changes(State(control): State<Control>, Query(query): Query<ChangesQuery>) -> Response {
    let limit = query.limit.unwrap_or(CHANGES_SHOWN);
    match control.swapper.changes().list(query.stage, limit).await {
        Ok(changes) => Json(changes).into_response(),
        Err(error) => {
            let body = Json(serde_json::json!({ "error": error.to_string() }));
            (StatusCode::INTERNAL_SERVER_ERROR, body).into_response()
        }
    }
}

/// A change goes on to its end, whether or not the one who asked for it waits.
async fn finished<T: Send + 'static>(change: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(change).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn answered<T: Serialize>(done: Result<T, ChangeRefused>) -> Response {
    match done {
        Ok(report) => Json(report).into_response(),
        Err(refused) => {
            let body = serde_json::json!({
                "error": refused.to_string(),
                "step": refused.step,
                "cause": refused.cause,
                "trial": refused.trial,
            });
            (StatusCode::CONFLICT, Json(body)).into_response()
        }
    }
}

fn misused(cause: &str) -> Response {
    (StatusCode::BAD_REQUEST, Json(serde_json::json!({ "error": cause }))).into_response()
}
