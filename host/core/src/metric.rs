//! Metrics of the host: the name, kind, labels and meaning of each.
//!
//! A new metric is one entry here and the line that counts it: `/metrics` and the book's page are made from
//! [`METRICS`]. Count by the constants: `metrics::counter!(metric::SINK_ROWS_TOTAL, "sink" => sink)`. Metrics of
//! plugins are not listed: their names are chosen by plugins, with the prefix `shardmill_plugin_`.

use std::fmt::Write as _;

/// Metric of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name, with the prefix `shardmill_` and the unit.
    pub name: &'static str,
    /// Kind.
    pub kind: MetricKind,
    /// Labels.
    pub labels: &'static [&'static str],
    /// Meaning, as a sentence.
    pub about: &'static str,
}

/// Kind of a metric, as in Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows while the process runs.
    Counter,
    /// Current value, which may fall.
    Gauge,
    /// Distribution of values.
    Histogram,
}

impl MetricKind {
    /// Returns the name that Prometheus uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Declares the constant of each metric's name, and [`METRICS`].
macro_rules! metrics {
    ($($constant:ident: $kind:ident $name:literal [$($label:literal),*] $about:literal;)+) => {
        $(#[doc = $about] pub const $constant: &str = $name;)+

        /// All metrics of the host, in the order of the book's page.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: $constant,
            kind: MetricKind::$kind,
            labels: &[$($label),*],
            about: $about,
        }),+];
    };
}

metrics! {
    SOURCE_RECORDS_TOTAL: Counter "shardmill_source_records_total" []
        "Records read and handed on.";
    SOURCE_BYTES_TOTAL: Counter "shardmill_source_bytes_total" []
        "Bytes of payloads and partition keys read.";
    SOURCE_RETRIES_TOTAL: Counter "shardmill_source_retries_total" ["shard", "reason"]
        "Reads tried again.";
    SOURCE_LOSSES_TOTAL: Counter "shardmill_source_losses_total" ["shard"]
        "Times that a stream had dropped records before they were read.";
    SOURCE_LOST_MS_TOTAL: Counter "shardmill_source_lost_ms_total" ["shard"]
        "Milliseconds of the stream whose records were lost.";
    SOURCE_ASTRAY_AGGREGATES_TOTAL: Counter "shardmill_source_astray_aggregates_total" []
        "Aggregates that were read from a shard that does not contain their hash keys.";
    LAG_MS: Gauge "shardmill_lag_ms" ["shard"]
        "Milliseconds between the last record read and the end of the shard. Deprecated: see shardmill_committed_lag_seconds.";
    COMMITTED_LAG_SECONDS: Gauge "shardmill_committed_lag_seconds" ["shard", "sink"]
        "Age of the oldest record of a shard that a sink has not committed; 0 when it has all.";
    REPLAYED_RECORDS_TOTAL: Counter "shardmill_replayed_records_total" []
        "Records read that some sink had committed before.";
    READ_AHEAD_BYTES: Gauge "shardmill_read_ahead_bytes" []
        "Bytes read that no lane has taken yet.";
    STAGE_RECORDS_TOTAL: Counter "shardmill_stage_records_total" ["stage"]
        "Records that entered a stage.";
    STAGE_BYTES_TOTAL: Counter "shardmill_stage_bytes_total" ["stage"]
        "Payload bytes that entered a stage.";
    STAGE_CALLS_TOTAL: Counter "shardmill_stage_calls_total" ["stage"]
        "Calls of a plugin, including those that search for the culprit record.";
    STAGE_TRAPS_TOTAL: Counter "shardmill_stage_traps_total" ["stage"]
        "Calls of a plugin that trapped or timed out.";
    STAGE_RETRIES_TOTAL: Counter "shardmill_stage_retries_total" ["stage"]
        "Calls tried again because the plugin asked for it.";
    STAGE_STARVED_TOTAL: Counter "shardmill_stage_starved_total" ["stage"]
        "Calls that got too little CPU time to finish. They are rerun, and no record is rejected for it.";
    STAGE_RENEWALS_TOTAL: Counter "shardmill_stage_renewals_total" ["stage"]
        "Instances replaced because their memory grew.";
    STAGE_MEMORY_BYTES: Gauge "shardmill_stage_memory_bytes" ["stage", "shard"]
        "Linear memory of a lane's instance of a stage.";
    STAGE_LOG_LINES_DROPPED_TOTAL: Counter "shardmill_stage_log_lines_dropped_total" ["stage"]
        "Log lines of a plugin that were dropped because of its stage's limit.";
    LOOKUP_KEYS_TOTAL: Counter "shardmill_lookup_keys_total" ["lookup", "result"]
        "Keys looked up: kept, found, or without a row.";
    LOOKUP_SECONDS: Histogram "shardmill_lookup_seconds" ["lookup"]
        "Duration of a lookup's query.";
    BUFFER_BYTES: Gauge "shardmill_buffer_bytes" []
        "Bytes that the sinks' buffers hold.";
    SINK_ROWS_TOTAL: Counter "shardmill_sink_rows_total" ["sink"]
        "Rows committed by a sink.";
    SINK_BYTES_TOTAL: Counter "shardmill_sink_bytes_total" ["sink"]
        "Bytes committed by a sink.";
    SINK_RETRIES_TOTAL: Counter "shardmill_sink_retries_total" ["sink"]
        "Commits tried again.";
    DEAD_LETTERS_TOTAL: Counter "shardmill_dead_letters_total" ["place"]
        "Records that became dead letters, by place.";
    DEAD_LETTERS_BYTES: Gauge "shardmill_dead_letters_bytes" []
        "Bytes that the store of dead letters holds.";
    DEAD_LETTERS_BYTES_MAX: Gauge "shardmill_dead_letters_bytes_max" []
        "Limit of the store of dead letters. When it is reached, lanes with dead letters wait.";
    DEAD_LETTERS_NEARLY_FULL: Gauge "shardmill_dead_letters_nearly_full" []
        "1 if the store of dead letters is at least 80 % full, else 0.";
    BLOCKED: Gauge "shardmill_blocked" ["shard"]
        "Parts of a shard's lane that are blocked.";
    LANE_RESTARTS_TOTAL: Counter "shardmill_lane_restarts_total" []
        "Lanes restarted after a failure.";
    CHANGES_TOTAL: Counter "shardmill_changes_total" ["outcome"]
        "Changes of plugins or configuration, by outcome.";
    CHANGE_PAUSE_SECONDS: Histogram "shardmill_change_pause_seconds" []
        "Time between the last batch of one revision and the first of the next, without the wait for records.";
    INTAKE_REQUESTS_TOTAL: Counter "shardmill_intake_requests_total" ["status"]
        "Requests that the intake answered.";
    INTAKE_RECORDS_TOTAL: Counter "shardmill_intake_records_total" []
        "Records that the intake put into the stream.";
    INTAKE_BYTES_TOTAL: Counter "shardmill_intake_bytes_total" []
        "Payload bytes that the intake put into the stream.";
    INTAKE_IN_FLIGHT_BYTES: Gauge "shardmill_intake_in_flight_bytes" []
        "Bytes that the intake has taken and not yet put into the stream.";
    PORT_CONNECTIONS: Gauge "shardmill_port_connections" ["port"]
        "Connections that a port has open.";
    PORT_CONNECTIONS_CLOSED_TOTAL: Counter "shardmill_port_connections_closed_total" ["port", "for"]
        "Connections closed to make room (room), or because their peer has too many (peer).";
}

/// Returns the book's page of metrics, in Markdown.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nThe admin port serves these under `/metrics`, in Prometheus' text format. This page is made \
         from the code.\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n",
    );
    for Metric { name, kind, labels, about } in METRICS {
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        // Writing to a string does not fail.
        let _ =
            writeln!(page, "| `{name}` | {} | {} | {about} |", kind.as_str(), labels.join(", "));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Source: Prometheus, "Metric and label naming": a prefix, the unit, and `_total` for counters.
    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        for Metric { name, kind, labels, about } in METRICS {
            assert!(name.starts_with("shardmill_"), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == MetricKind::Counter, "{name}");
            let is_plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(is_plain(name) && labels.iter().all(|label| is_plain(label)), "{name}");
            assert!(about.ends_with('.') && !about.contains('|'), "{name}: {about}");
        }
    }

    #[test]
    fn each_name_is_there_once() {
        let mut names: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }
}
