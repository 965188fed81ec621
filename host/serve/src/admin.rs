//! The admin port: health, metrics, the status of the lanes, and changes.
//!
//! `/health/live` answers while the process runs. `/health/ready` is 200 while no lane is blocked, otherwise
//! 503; it shows the causes only to callers with the token. `/metrics` has the Prometheus text format.
//! `/status` is the status of the lanes as JSON. Changes of the pipeline are in [`control`], and the rules of
//! access in [`access`].

pub mod access;
pub mod control;
mod upkeep;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::access::{Access, Caller, Right, guarded};
use self::control::Control;
use shardmill_config::{AdminConfig, HttpDeadlines};
use shardmill_core::boxed;
use shardmill_core::escape::printable_json;
use shardmill_core::metric::{self, Metric, MetricKind};
use shardmill_core::record::ShardId;
use shardmill_engine::lane::{ShardStatus, StatusRegistry};
use shardmill_ports::PortRules;

/// Error: the admin port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to open the admin port {address}: {cause}; another process has it: set `listen` under \
     [admin] to a free port, or remove [admin]"
)]
pub struct AdminError {
    address: SocketAddr,
    cause: std::io::Error,
}

/// An open admin port, not served yet.
pub struct AdminPort {
    listener: TcpListener,
    address: SocketAddr,
    rules: PortRules,
    metrics: PrometheusHandle,
}

impl AdminPort {
    /// Opens the port. From then on the metrics of the process are recorded, so call it once, before anything
    /// is counted. Without a port nobody reads them, and they are not recorded.
    ///
    /// # Errors
    /// [`AdminError`] if the port is in use; another error if metrics are already recorded.
    #[boxed]
    pub async fn open(config: &AdminConfig, deadlines: HttpDeadlines) -> anyhow::Result<Self> {
        let address = config.listen;
        let error = |cause| AdminError { address, cause };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        let metrics = PrometheusBuilder::new().install_recorder()?;
        upkeep::begin(&metrics);
        describe();
        let rules = PortRules {
            name: "admin",
            connections_max: config.connections_max,
            per_peer_max: config.per_peer_max,
            deadlines,
            buffer_bytes_max: Some(control::BUFFER_BYTES_MAX),
            is_for_own_user: false,
            keeps_files: true,
        };
        Ok(Self { listener, address, rules, metrics })
    }

    /// Returns the address; port 0 is replaced by the chosen port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves the status of these registries, and changes through `control` if there is one, until `stop`. `access`
    /// decides who may do what.
    pub fn serve(
        self,
        registries: Vec<StatusRegistry>,
        control: Option<Control>,
        access: Access,
        stop: CancellationToken,
    ) {
        let shown = Shown { registries, metrics: self.metrics, access: access.clone() };
        let read = Router::new()
            .route("/status", get(status))
            .route(
                "/metrics",
                get(|State(shown): State<Shown>| async move {
                    // The lag grows with the clock, so it is computed at each reading.
                    shown.registries.iter().for_each(StatusRegistry::show_lags);
                    shown.metrics.run_upkeep();
                    shown.metrics.render()
                }),
            )
            .with_state(shown.clone());
        let mut routes = Router::new()
            .route("/health/live", get(|| async { "live\n" }))
            .route("/health/ready", get(ready))
            .with_state(shown)
            .merge(guarded(read, access.clone(), Right::Read));
        if let Some(control) = control {
            routes = routes.merge(control::routes(control, access));
        }
        tokio::spawn(shardmill_ports::serve(self.listener, routes, self.rules, stop));
    }
}

/// A JSON answer with the characters escaped that control a terminal: people use `curl`.
struct PlainJson<T>(T);

impl<T: serde::Serialize> IntoResponse for PlainJson<T> {
    fn into_response(self) -> Response {
        match serde_json::to_string(&self.0) {
            Ok(json) => {
                let kind = [(header::CONTENT_TYPE, "application/json")];
                (kind, printable_json(&json).into_owned()).into_response()
            }
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

#[derive(Clone)]
struct Shown {
    registries: Vec<StatusRegistry>,
    metrics: PrometheusHandle,
    access: Access,
}

impl Shown {
    /// Returns the shards of all registries.
    fn shards(&self) -> BTreeMap<ShardId, ShardStatus> {
        self.registries.iter().flat_map(StatusRegistry::snapshot).collect()
    }
}

/// Serves the status of the lanes. The causes of blocked lanes may quote rows, so only callers with the token
/// see them, as in `/health/ready`.
async fn status(
    State(shown): State<Shown>,
    headers: HeaderMap,
) -> PlainJson<BTreeMap<ShardId, ShardStatus>> {
    let mut shards = shown.shards();
    if shown.access.caller(&headers) != Caller::Owner {
        shards.values_mut().for_each(ShardStatus::hide_causes);
    }
    PlainJson(shards)
}

/// Serves readiness to any caller under any host name, as probes of orchestrators need it. The causes name
/// tables and servers and quote rows, so only callers with the token see them.
async fn ready(State(shown): State<Shown>, headers: HeaderMap) -> impl IntoResponse {
    let mut blocked = String::new();
    for (part, cause) in shown.registries.iter().flat_map(StatusRegistry::blocked_run) {
        blocked.push_str(&format!("pipeline: {part}: {cause}\n"));
    }
    for (shard, status) in shown.shards() {
        for (part, cause) in status.blocked {
            blocked.push_str(&format!("{shard}: {part}: {cause}\n"));
        }
    }
    match (blocked.is_empty(), shown.access.caller(&headers)) {
        (true, _) => (StatusCode::OK, "ready\n".to_owned()),
        (false, Caller::Owner) => (StatusCode::SERVICE_UNAVAILABLE, blocked),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "blocked\n".to_owned()),
    }
}

/// Gives each metric its `# HELP` text.
fn describe() {
    for &Metric { name, kind, about, .. } in metric::METRICS {
        match kind {
            MetricKind::Counter => metrics::describe_counter!(name, about),
            MetricKind::Gauge => metrics::describe_gauge!(name, about),
            MetricKind::Histogram => metrics::describe_histogram!(name, about),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wall_12_nothing_in_an_answer_in_json_steers_a_terminal() {
        let value = serde_json::json!({ "error": "failed on \u{202e}\u{9b}2J.wasm" });
        let answer = (StatusCode::CONFLICT, PlainJson(&value)).into_response();
        assert_eq!(answer.status(), StatusCode::CONFLICT);
        assert_eq!(answer.headers()[header::CONTENT_TYPE], "application/json");
        let body = axum::body::to_bytes(answer.into_body(), 1024).await.unwrap();
        assert_eq!(body, r#"{"error":"failed on \u202e\u009b2J.wasm"}"#);
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&body).unwrap(), value);
    }
}
