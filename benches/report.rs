//! Output of all benches: one line per case, for people or as JSON.
#![allow(clippy::print_stdout, reason = "this is what a bench is for")]
#![allow(dead_code, reason = "no bench uses all of it")]

/// Report of a bench. Arguments that are not options name cases; without any, all cases run.
pub struct Report {
    bench: &'static str,
    unit: &'static str,
    json: bool,
    only: Vec<String>,
}

impl Report {
    /// Parses the command line.
    pub fn start(bench: &'static str, unit: &'static str) -> Self {
        let (options, only): (Vec<_>, Vec<_>) =
            std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
        let json = options.iter().any(|option| option == "--json");
        if !json {
            println!("{:<36} {:>12} {:>12} {:>7}  ({unit})", "case", "value", "baseline", "ratio");
        }
        Self { bench, unit, json, only }
    }

    /// Whether a case is selected.
    pub fn wants(&self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == case)
    }

    /// Prints the line of a case in the unit of the bench.
    pub fn line(&self, case: &str, value: f64, baseline: f64) {
        self.line_in(case, value, baseline, self.unit);
    }

    /// Prints the line of a case in another unit.
    pub fn line_in(&self, case: &str, value: f64, baseline: f64, unit: &str) {
        let ratio = value / baseline;
        if !self.json {
            println!("{case:<36} {value:>12.2} {baseline:>12.2} {ratio:>7.2}  {unit}");
            return;
        }
        let line = serde_json::json!({
            "bench": self.bench,
            "case": case,
            "value": rounded(value),
            "baseline": rounded(baseline),
            "ratio": rounded(ratio),
            "unit": unit,
        });
        println!("{line}");
    }
}

/// Returns the round with the median ratio. Both sides of a round are measured in turn, so their ratio is valid
/// although the speed of the machine drifts.
pub fn median_round(ours: &[f64], baseline: &[f64]) -> (f64, f64) {
    let mut rounds: Vec<_> = ours.iter().copied().zip(baseline.iter().copied()).collect();
    rounds.sort_by(|one, other| (one.0 / one.1).total_cmp(&(other.0 / other.1)));
    rounds[rounds.len() / 2]
}

/// Rounds to two decimals. More would suggest a precision that was not measured.
fn rounded(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}
