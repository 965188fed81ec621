//! The admin port: health, metrics, the state of the lanes, and changes.
//!
//! `/health/live` answers while the process does; `/health/ready` is 200 while every lane goes on
//! and 503 when one is blocked, with the causes for who has the token; `/metrics` is Prometheus' text format;
//! `/status` is the lanes as JSON. What changes the pipeline is in [`control`], and who may ask for what in
//! [`access`].

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

/// The admin port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to open the admin port {address}: {cause}; another process has it: set `listen` under \
     [admin] to a free port, or remove [admin]"
)]
pub struct AdminError {
    address: SocketAddr,
    cause: std::io::Error,
}

/// An open admin port.
pub struct AdminPort {
    listener: TcpListener,
    address: SocketAddr,
    rules: PortRules,
    metrics: PrometheusHandle,
}

impl AdminPort {
    /// Opens the port. From then on the process's metrics are gathered: call it once, before
    /// anything counts. Without a port nobody reads them, and they are not gathered.
    ///
    /// # Errors
    /// [`AdminError`] when the port is in use; another when metrics are gathered already.
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

    /// The address, with the port that was chosen if it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves what these boards show and takes orders for `control`, if there is one, until `stop`; `access`
    /// says from whom.
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
                    // It grows by the clock alone.
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

/// An answer in JSON with nothing in it that steers a terminal: people ask by `curl`.
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
    /// The shards of all boards.
    fn shards(&self) -> BTreeMap<ShardId, ShardStatus> {
        self.registries.iter().flat_map(StatusRegistry::snapshot).collect()
    }
}

/// Shows the lanes. Why one does not go on may quote rows: that is for who has the token, as with health.
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

/// Answers any host and anybody, as an orchestrator's probe needs it; so the causes, which name tables and
/// servers and quote rows, are for who has the token.
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

/// Gives each metric its `# HELP`.
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
