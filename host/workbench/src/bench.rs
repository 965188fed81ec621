//! Measurement of a plugin's speed: `shardmill plugin bench`.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{TrialError, TrialRecord, Workbench};

/// Instances started to measure the start time.
const STARTS: usize = 11;
/// Bars of the histogram.
const BARS: usize = 10;
/// Characters of the longest bar.
const BAR_CHARS: usize = 40;

/// Result of a measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Records per call.
    pub batch_records: usize,
    /// Number of measured calls.
    pub calls: usize,
    /// Nanoseconds per record: median over the calls. The fields below are the 10th and 90th percentile.
    pub ns_per_record: f64,
    /// See `ns_per_record`.
    pub ns_per_record_p10: f64,
    /// See `ns_per_record`.
    pub ns_per_record_p90: f64,
    /// Records per second, at the median.
    pub records_per_s: f64,
    /// Payload MiB per second, at the median.
    pub mib_per_s: f64,
    /// Linear memory of the instance at the end, in bytes.
    pub memory_bytes: usize,
    /// Median time to make and configure an instance, in microseconds.
    pub start_us: f64,
    /// Times per record of all calls, in nanoseconds, ascending.
    #[serde(skip)]
    times_ns: Vec<f64>,
}

/// Calls the plugin with batches of `records` for the given duration.
///
/// # Errors
/// [`TrialError`] if the plugin does not start or a call fails.
pub fn run(
    workbench: &Workbench,
    config_json: &str,
    records: &[TrialRecord],
    duration: Duration,
) -> Result<Measured, TrialError> {
    let mut starts_us = Vec::new();
    for _ in 0..STARTS {
        let begun = Instant::now();
        workbench.start(config_json)?;
        // A start makes two instances: one is only asked for its descriptor, the other one stays.
        starts_us.push(begun.elapsed().as_secs_f64() * 1e6 / 2.0);
    }
    let mut trial = workbench.start(config_json)?;
    let mut call = trial.prepared(records);
    for _ in 0..3 {
        call.run()?;
    }
    let mut times_ns = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < duration || times_ns.is_empty() {
        let called = Instant::now();
        call.run()?;
        times_ns.push(called.elapsed().as_secs_f64() * 1e9 / records.len().max(1) as f64);
    }
    times_ns.sort_by(f64::total_cmp);
    starts_us.sort_by(f64::total_cmp);
    let at = |share: f64| times_ns[((times_ns.len() - 1) as f64 * share) as usize];
    let payload_bytes: usize = records.iter().map(|record| record.payload.len()).sum();
    let bytes_per_record = payload_bytes as f64 / records.len().max(1) as f64;
    let records_per_s = 1e9 / at(0.5);
    Ok(Measured {
        batch_records: records.len(),
        calls: times_ns.len(),
        ns_per_record: at(0.5),
        ns_per_record_p10: at(0.1),
        ns_per_record_p90: at(0.9),
        records_per_s,
        mib_per_s: records_per_s * bytes_per_record / f64::from(1 << 20),
        memory_bytes: trial.memory_bytes(),
        start_us: starts_us[STARTS / 2],
        times_ns,
    })
}

impl Measured {
    /// Draws a histogram of the calls' times. Its bars divide the range from the fastest call to the 99th
    /// percentile into ten parts. Slower calls are in the last bar.
    pub fn histogram(&self) -> String {
        let last = self.times_ns[(self.times_ns.len() - 1) * 99 / 100];
        let first = self.times_ns[0];
        let width = ((last - first) / BARS as f64).max(f64::MIN_POSITIVE);
        let mut counts = [0_usize; BARS];
        for time in &self.times_ns {
            counts[(((time - first) / width) as usize).min(BARS - 1)] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(1).max(1);
        let bars = counts.iter().enumerate().map(|(index, count)| {
            let bar = "█".repeat((count * BAR_CHARS).div_ceil(most));
            format!("{:>10.0} ns  {bar} {count}", first + width * index as f64)
        });
        bars.collect::<Vec<_>>().join("\n")
    }
}
