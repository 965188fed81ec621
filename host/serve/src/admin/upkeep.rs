//! Counts the values of histograms, which are kept one by one until then: without a reader of `/metrics` they
//! would pile up for as long as the process runs.

use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;

/// How often the values are counted, besides at each reading.
const INTERVAL: Duration = Duration::from_secs(5);

/// Counts values from time to time, until the process ends, and whenever plugins have given many.
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
