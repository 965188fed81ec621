//! The admin port: health, metrics, the state of the lanes, and changes.
//!
//! `/health/live` answers while the process does; `/health/ready` is 200 while every lane goes on
//! and 503 with the causes when one is blocked; `/metrics` is Prometheus' text format; `/status` is
//! the lanes as JSON. What changes the pipeline is in [`control`]. With a token in the configuration,
//! everything but health asks for it.

pub mod control;
mod upkeep;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::control::{Control, Door};
use crate::config::{AdminConfig, ConfigError};
use crate::lane::{Board, ShardStatus};
use crate::record::ShardId;

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
    door: Door,
    metrics: PrometheusHandle,
}

impl AdminPort {
    /// Opens the port. From then on the process's metrics are gathered: call it once, before
    /// anything counts. Without a port nobody reads them, and they are not gathered.
    ///
    /// # Errors
    /// [`AdminError`] when the port is in use; another when metrics are gathered already.
    pub async fn open(config: &AdminConfig) -> anyhow::Result<Self> {
        let address = config.listen;
        let door = match &config.token {
            Some(token) => Door::Token(token.clone()),
            None => Door::Loopback,
        };
        let error = |cause| AdminError { address, cause };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        let metrics = PrometheusBuilder::new().install_recorder()?;
        upkeep::begin(&metrics);
        describe();
        Ok(Self { listener, address, door, metrics })
    }

    /// The address, with the port that was chosen if it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves what these boards show and takes orders for `control`, if there is one, until `stop`.
    pub fn serve(self, boards: Vec<Board>, control: Option<Control>, stop: CancellationToken) {
        let shown = Shown { boards, metrics: self.metrics };
        let mut guarded = Router::new()
            .route("/status", get(|State(shown): State<Shown>| async move { Json(shown.shards()) }))
            .route(
                "/metrics",
                get(|State(shown): State<Shown>| async move {
                    // It grows by the clock alone.
                    shown.boards.iter().for_each(Board::show_lags);
                    shown.metrics.run_upkeep();
                    shown.metrics.render()
                }),
            )
            .with_state(shown.clone());
        if let Door::Token(_) = &self.door {
            guarded = control::guarded(guarded, self.door.clone());
        }
        if let Some(control) = control {
            guarded = guarded.merge(control::routes(control, self.door));
        }
        let routes = Router::new()
            .route("/health/live", get(|| async { "live\n" }))
            .route("/health/ready", get(ready))
            .with_state(shown)
            .merge(guarded);
        tokio::spawn(crate::serve::serve(self.listener, routes, stop));
    }
}

/// An error in words, each cause once; of a configuration with its places.
pub fn told(error: &anyhow::Error) -> String {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        return config.render(false);
    }
    let mut told = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Some errors show their cause in their own text.
        if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}

#[derive(Clone)]
struct Shown {
    boards: Vec<Board>,
    metrics: PrometheusHandle,
}

impl Shown {
    /// The shards of all boards.
    fn shards(&self) -> BTreeMap<ShardId, ShardStatus> {
        self.boards.iter().flat_map(Board::snapshot).collect()
    }
}

async fn ready(State(shown): State<Shown>) -> impl IntoResponse {
    let mut blocked = String::new();
    for (part, cause) in shown.boards.iter().flat_map(Board::blocked_run) {
        blocked.push_str(&format!("pipeline: {part}: {cause}\n"));
    }
    for (shard, status) in shown.shards() {
        for (part, cause) in status.blocked {
            blocked.push_str(&format!("{shard}: {part}: {cause}\n"));
        }
    }
    match blocked.is_empty() {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, blocked),
    }
}

/// Says what each metric means, for `# HELP`.
fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_counter!("shardmill_source_records_total", "records read and handed to the sinks");
    describe_counter!("shardmill_source_bytes_total", "bytes of payloads and keys read");
    describe_counter!("shardmill_source_retries_total", "reads tried again, by shard and reason");
    describe_gauge!(
        "shardmill_committed_lag_seconds",
        "age of the oldest record of a shard that a sink has not committed; 0 when it has all"
    );
    describe_gauge!(
        "shardmill_lag_ms",
        "milliseconds between what was read last and the end of the shard; deprecated: see \
         shardmill_committed_lag_seconds"
    );
    describe_counter!("shardmill_replayed_records_total", "records read that some sink had before");
    describe_counter!("shardmill_stage_records_total", "records that entered a stage");
    describe_counter!("shardmill_stage_bytes_total", "payload bytes that entered a stage");
    describe_gauge!(
        "shardmill_stage_memory_bytes",
        "linear memory of a lane's instance of a stage"
    );
    describe_counter!("shardmill_stage_log_lines_dropped_total", "lines over a stage's limit");
    describe_counter!("shardmill_stage_renewals_total", "instances given up because they leak");
    describe_counter!("shardmill_stage_calls_total", "calls of a plugin, with those of searches");
    describe_counter!("shardmill_stage_traps_total", "calls of a plugin that trapped or timed out");
    describe_counter!("shardmill_stage_retries_total", "calls tried again as the plugin asked for");
    describe_counter!(
        "shardmill_stage_starved_total",
        "calls that got too little CPU time to end: run again, no record is blamed"
    );
    describe_counter!("shardmill_sink_rows_total", "rows committed by a sink");
    describe_counter!("shardmill_sink_bytes_total", "bytes committed by a sink");
    describe_counter!("shardmill_sink_retries_total", "commits tried again");
    describe_counter!("shardmill_dead_letters_total", "records dead-lettered, by place");
    describe_counter!("shardmill_changes_total", "changes of what runs, by outcome");
    describe_histogram!(
        "shardmill_change_pause_seconds",
        "between the last batch of a generation and the first of the next, waiting for records left out"
    );
    describe_counter!("shardmill_lane_restarts_total", "lanes started anew after a failure");
    describe_counter!("shardmill_intake_requests_total", "requests answered, by status");
    describe_counter!("shardmill_intake_records_total", "records that the intake put");
    describe_counter!("shardmill_intake_bytes_total", "payload bytes that the intake put");
    describe_gauge!("shardmill_intake_in_flight_bytes", "bytes on their way to the stream");
    describe_gauge!("shardmill_blocked", "parts of a shard's lane that do not go on");
    describe_gauge!("shardmill_read_ahead_bytes", "bytes read that no lane has taken yet");
    describe_counter!("shardmill_source_losses_total", "times that a stream had dropped records");
    describe_counter!("shardmill_source_lost_ms_total", "milliseconds whose records are lost");
    describe_counter!("shardmill_source_astray_aggregates_total", "aggregates of another shard");
    describe_counter!(
        "shardmill_lookup_keys_total",
        "keys asked for: kept, found, or without a row"
    );
    describe_histogram!("shardmill_lookup_seconds", "how long a lookup's query took");
    describe_gauge!("shardmill_buffer_bytes", "bytes that the sinks' buffers hold");
}
