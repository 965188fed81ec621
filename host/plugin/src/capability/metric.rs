//! The capability `metrics`: time series of a plugin's own.
//!
//! The number of metrics is limited per stage and revision ([`StageMetrics`]), not per instance: an instance is
//! renewed after each trap and could announce other names each time, while a series stays as long as the process.
//! The number of all series is limited by [`SeriesLimit`].

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use metrics::{Counter, Gauge, Histogram};

use crate::bindings::shardmill::plugin::metrics::Kind;
use shardmill_core::escape::escaped;
use shardmill_core::record::StageName;

/// Maximum number of metrics of a stage.
const METRICS_MAX: usize = 32;
/// Maximum number of series of all plugins since the process started: as many as 32 stages may have.
const SERIES_MAX: usize = 1_024;
/// Maximum length of a metric's name, in characters.
const NAME_CHARS_MAX: usize = 64;
/// Number of bytes of a help text that are kept.
const HELP_BYTES_MAX: usize = 256;
/// Maximum number of histogram values that wait to be counted: each is kept until then.
const VALUES_WAITING_MAX: u64 = 65_536;

/// All series of plugins in the process.
static SERIES: SeriesLimit = SeriesLimit::new(SERIES_MAX);
/// Number of values that plugins gave to histograms.
static VALUES: AtomicU64 = AtomicU64::new(0);
/// The function that counts the waiting values.
static UPKEEP: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// Sets the function that counts the waiting values of histograms. Only the first call has an effect.
pub fn count_values_by(upkeep: impl Fn() + Send + Sync + 'static) {
    let _ = UPKEEP.set(Box::new(upkeep));
}

/// The metrics of a stage, shared by its instances.
#[derive(Default)]
pub(super) struct StageMetrics {
    announced: Mutex<Vec<Arc<Metric>>>,
}

/// The metrics that one instance has announced, by the numbers that it got.
#[derive(Default)]
pub(super) struct Metrics {
    known: Vec<Known>,
}

struct Known {
    metric: Arc<Metric>,
    /// Counters take whole numbers: the fraction of the values so far is kept here.
    rest: f64,
}

struct Metric {
    name: String,
    kind: Kind,
    series: Series,
}

enum Series {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

/// A limit on the number of all series.
struct SeriesLimit {
    max: usize,
    /// The series so far, by stage, name and kind.
    known: Mutex<BTreeSet<(StageName, String, u8)>>,
}

impl SeriesLimit {
    const fn new(max: usize) -> Self {
        Self { max, known: Mutex::new(BTreeSet::new()) }
    }

    /// Admits a series, unless it is new and the limit is reached.
    fn admit(&self, stage: &StageName, name: &str, kind: Kind) -> Result<(), String> {
        let series = (stage.clone(), name.to_owned(), kind as u8);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains(&series) && known.len() >= self.max {
            return Err(format!(
                "metric {name} is refused: plugins have announced {} metrics since the process started, \
                 which is the limit; restart it to drop those of earlier versions",
                self.max
            ));
        }
        known.insert(series);
        Ok(())
    }
}

impl StageMetrics {
    fn announce(
        &self,
        stage: &StageName,
        kind: Kind,
        name: &str,
        help: &str,
        series: &SeriesLimit,
    ) -> Result<Arc<Metric>, String> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let is_valid = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.len() <= NAME_CHARS_MAX
            && name.chars().all(fits);
        if !is_valid {
            let name: String = name.chars().take(NAME_CHARS_MAX).collect();
            return Err(format!(
                "invalid metric name {name:?}: expected a-z, 0-9 and _, at most {NAME_CHARS_MAX}, the first a letter"
            ));
        }
        let mut announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        // An instance that was renewed announces the same metrics again.
        if let Some(known) = announced.iter().find(|metric| metric.name == name) {
            return match known.kind == kind {
                true => Ok(known.clone()),
                false => Err(format!("metric {name} is registered with another kind")),
            };
        }
        if announced.len() == METRICS_MAX {
            return Err(format!(
                "metric {name} is refused: expected at most {METRICS_MAX} metrics in all instances of a stage"
            ));
        }
        series.admit(stage, name, kind)?;
        let series = Series::new(stage, kind, name, help);
        let metric = Arc::new(Metric { name: name.to_owned(), kind, series });
        announced.push(metric.clone());
        Ok(metric)
    }
}

impl fmt::Debug for StageMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_list().entries(announced.iter().map(|metric| &metric.name)).finish()
    }
}

impl Metrics {
    /// Announces a metric and returns its number; a known one gets the same number.
    pub fn register(
        &mut self,
        of_stage: &StageMetrics,
        stage: &StageName,
        kind: Kind,
        name: &str,
        help: &str,
    ) -> Result<u32, String> {
        self.register_within(&SERIES, of_stage, stage, kind, name, help)
    }

    fn register_within(
        &mut self,
        series: &SeriesLimit,
        of_stage: &StageMetrics,
        stage: &StageName,
        kind: Kind,
        name: &str,
        help: &str,
    ) -> Result<u32, String> {
        let metric = of_stage.announce(stage, kind, name, help, series)?;
        let known = self.known.iter().position(|known| Arc::ptr_eq(&known.metric, &metric));
        let number = known.unwrap_or_else(|| {
            self.known.push(Known { metric, rest: 0.0 });
            self.known.len() - 1
        });
        Ok(number as u32)
    }

    /// Gives a metric a value; `None` if the number is unknown.
    pub fn observe(&mut self, metric: u32, value: f64) -> Option<()> {
        let Known { metric, rest } = self.known.get_mut(metric as usize)?;
        if !value.is_finite() {
            return Some(());
        }
        match &metric.series {
            Series::Counter(counter) => {
                *rest += value.max(0.0);
                let whole = rest.floor();
                *rest -= whole;
                counter.increment(whole as u64);
            }
            Series::Gauge(gauge) => gauge.set(value),
            Series::Histogram(histogram) => {
                histogram.record(value);
                let waiting = VALUES.fetch_add(1, Ordering::Relaxed) % VALUES_WAITING_MAX;
                if let (0, Some(upkeep)) = (waiting, UPKEEP.get()) {
                    upkeep();
                }
            }
        }
        Some(())
    }
}

impl Series {
    fn new(stage: &StageName, kind: Kind, name: &str, help: &str) -> Self {
        let name = format!("shardmill_plugin_{name}");
        let help = escaped(&help[..help.floor_char_boundary(HELP_BYTES_MAX)], &[]);
        let stage = stage.to_string();
        match kind {
            Kind::Counter => {
                metrics::describe_counter!(name.clone(), help);
                Self::Counter(metrics::counter!(name, "stage" => stage))
            }
            Kind::Gauge => {
                metrics::describe_gauge!(name.clone(), help);
                Self::Gauge(metrics::gauge!(name, "stage" => stage))
            }
            Kind::Histogram => {
                metrics::describe_histogram!(name.clone(), help);
                Self::Histogram(metrics::histogram!(name, "stage" => stage))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_validated_and_their_number_is_bounded() {
        let (stage, of_stage) = (StageName::from("s"), StageMetrics::default());
        let mut metrics = Metrics::default();
        let mut register =
            |name: &str| metrics.register(&of_stage, &stage, Kind::Counter, name, "");
        assert_eq!(register("rows"), Ok(0));
        assert_eq!(register("rows"), Ok(0));
        for bad in ["", "Rows", "9", "a-b", &"x".repeat(65)] {
            assert!(register(bad).unwrap_err().contains("expected a-z"), "{bad}");
        }
        (1..METRICS_MAX).for_each(|index| assert!(register(&format!("m{index}")).is_ok()));
        assert!(register("more").unwrap_err().contains("at most 32"));
    }

    #[test]
    fn a_kind_is_for_good_and_numbers_are_checked() {
        let (stage, of_stage) = (StageName::from("s"), StageMetrics::default());
        let mut metrics = Metrics::default();
        metrics.register(&of_stage, &stage, Kind::Counter, "rows", "").unwrap();
        assert!(metrics.register(&of_stage, &stage, Kind::Gauge, "rows", "").is_err());
        assert_eq!(metrics.observe(0, f64::NAN), Some(()));
        assert_eq!(metrics.observe(0, 0.75), Some(()));
        assert_eq!(metrics.known[0].rest, 0.75);
        assert_eq!(metrics.observe(1, 1.0), None);
    }

    #[test]
    fn wall_09_instances_of_a_stage_share_its_metrics() {
        let (stage, of_stage) = (StageName::from("s"), StageMetrics::default());
        let mut refused = 0;
        for instance in 0..100 {
            let mut metrics = Metrics::default();
            // A number is valid only in the instance that got it.
            assert_eq!(metrics.observe(0, 1.0), None);
            let name = format!("of_instance_{instance}");
            let asked = metrics.register(&of_stage, &stage, Kind::Gauge, &name, "");
            match asked {
                Ok(number) => assert_eq!(number, 0),
                Err(why) => {
                    assert!(why.contains("at most 32"), "{why}");
                    refused += 1;
                }
            }
        }
        assert_eq!(refused, 100 - METRICS_MAX);
        let again =
            Metrics::default().register(&of_stage, &stage, Kind::Gauge, "of_instance_7", "");
        assert_eq!(again, Ok(0), "what a stage has is there for each of its instances");
    }

    #[test]
    fn wall_09_series_are_bounded_over_all_stages_and_revisions() {
        let series = SeriesLimit::new(3);
        let register = |stage: &str, name: &str, kind| {
            let (stage, of_stage) = (StageName::from(stage), StageMetrics::default());
            Metrics::default().register_within(&series, &of_stage, &stage, kind, name, "")
        };
        assert_eq!(register("a", "x", Kind::Gauge), Ok(0));
        assert_eq!(register("a", "x", Kind::Counter), Ok(0));
        assert_eq!(register("b", "x", Kind::Gauge), Ok(0));
        // The next revision announces the same series.
        assert_eq!(register("b", "x", Kind::Gauge), Ok(0));
        let refused = register("b", "y", Kind::Gauge).unwrap_err();
        assert!(refused.contains("which is the limit"), "{refused}");
    }
}
