//! Regular upkeep of histograms. The recorder keeps each value until upkeep counts it. Without a reader of
//! `/metrics` the values would accumulate as long as the process runs.

use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;

/// Interval of the upkeep, in addition to each reading of `/metrics`.
const INTERVAL: Duration = Duration::from_secs(5);

/// Starts the upkeep: at intervals until the process ends, and whenever plugins have recorded many values.
pub(super) fn begin(metrics: &PrometheusHandle) {
    let of_plugins = metrics.clone();
    shardmill_plugin::count_values_by(move || of_plugins.run_upkeep());
    let metrics = metrics.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(INTERVAL).await;
            metrics.run_upkeep();
        }
    });
}
