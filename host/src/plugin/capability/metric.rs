//! `metrics`: series of a plugin's own.

use metrics::{Counter, Gauge, Histogram};

use crate::plugin::bindings::shardmill::plugin::metrics::Kind;
use crate::record::StageName;

/// Metrics that one plugin may have.
const METRICS_MAX: usize = 32;
/// Characters of a metric's name.
const NAME_CHARS_MAX: usize = 64;
/// Characters of a help text that are kept.
const HELP_BYTES_MAX: usize = 256;

/// The metrics of one instance. Instances of one stage share their series.
#[derive(Default)]
pub(super) struct Metrics {
    registered: Vec<Metric>,
}

struct Metric {
    name: String,
    kind: Kind,
    series: Series,
}

enum Series {
    /// Counters take whole numbers: what is left of the values given waits here.
    Counter {
        counter: Counter,
        rest: f64,
    },
    Gauge(Gauge),
    Histogram(Histogram),
}

impl Metrics {
    /// Announces a metric, or finds it again.
    pub fn register(
        &mut self,
        stage: &StageName,
        kind: Kind,
        name: &str,
        help: &str,
    ) -> Result<u32, String> {
        if let Some(known) = self.registered.iter().position(|metric| metric.name == name) {
            return match self.registered[known].kind == kind {
                true => Ok(known as u32),
                false => Err(format!("metric {name} is registered with another kind")),
            };
        }
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let sound = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.len() <= NAME_CHARS_MAX
            && name.chars().all(fits);
        if !sound {
            let name: String = name.chars().take(NAME_CHARS_MAX).collect();
            return Err(format!(
                "a metric's name is a-z, 0-9 and _, at most {NAME_CHARS_MAX}, the first a letter: not {name:?}"
            ));
        }
        if self.registered.len() == METRICS_MAX {
            return Err(format!("a plugin has at most {METRICS_MAX} metrics: {name} is too many"));
        }
        self.registered.push(Metric {
            name: name.to_owned(),
            kind,
            series: Series::new(stage, kind, name, help),
        });
        Ok(self.registered.len() as u32 - 1)
    }

    /// Gives a metric a value; `None` if there is no such metric.
    pub fn observe(&mut self, metric: u32, value: f64) -> Option<()> {
        let metric = self.registered.get_mut(metric as usize)?;
        if !value.is_finite() {
            return Some(());
        }
        match &mut metric.series {
            Series::Counter { counter, rest } => {
                *rest += value.max(0.0);
                let whole = rest.floor();
                *rest -= whole;
                counter.increment(whole as u64);
            }
            Series::Gauge(gauge) => gauge.set(value),
            Series::Histogram(histogram) => histogram.record(value),
        }
        Some(())
    }
}

impl Series {
    fn new(stage: &StageName, kind: Kind, name: &str, help: &str) -> Self {
        let name = format!("shardmill_plugin_{name}");
        let help = help[..help.floor_char_boundary(HELP_BYTES_MAX)].to_owned();
        let stage = stage.to_string();
        match kind {
            Kind::Counter => {
                metrics::describe_counter!(name.clone(), help);
                Self::Counter { counter: metrics::counter!(name, "stage" => stage), rest: 0.0 }
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
    fn names_are_proven_and_their_number_is_bounded() {
        let stage = StageName::from("s");
        let mut metrics = Metrics::default();
        let mut register = |name: &str| metrics.register(&stage, Kind::Counter, name, "");
        assert_eq!(register("rows"), Ok(0));
        assert_eq!(register("rows"), Ok(0));
        for bad in ["", "Rows", "9", "a-b", &"x".repeat(65)] {
            assert!(register(bad).unwrap_err().contains("name is a-z"), "{bad}");
        }
        (1..METRICS_MAX).for_each(|index| assert!(register(&format!("m{index}")).is_ok()));
        assert!(register("more").unwrap_err().contains("at most 32"));
    }

    #[test]
    fn a_kind_is_for_good_and_numbers_are_checked() {
        let stage = StageName::from("s");
        let mut metrics = Metrics::default();
        metrics.register(&stage, Kind::Counter, "rows", "").unwrap();
        assert!(metrics.register(&stage, Kind::Gauge, "rows", "").is_err());
        assert_eq!(metrics.observe(0, f64::NAN), Some(()));
        assert_eq!(metrics.observe(0, 0.75), Some(()));
        assert!(
            matches!(metrics.registered[0].series, Series::Counter { rest, .. } if rest == 0.75)
        );
        assert_eq!(metrics.observe(1, 1.0), None);
    }
}
