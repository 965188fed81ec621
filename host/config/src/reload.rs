//! `[reload]`: changes of a running pipeline.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::raw::{RawProbation, RawReload, RawTrial};
use super::shape::shaped;
use super::{ProbationLimits, ReloadConfig, SampleLimits};

/// Limits that a candidate must keep in its trial to be promoted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gates {
    /// Records for which its result may differ from the incumbent's; `None`: any number.
    pub changed_max: Option<u64>,
    /// Records that it may reject and the incumbent does not; `None`: any number.
    pub newly_rejected_max: Option<u64>,
}

impl Gates {
    /// Fills the limits that are not set with those of `others`.
    pub fn or(self, others: &Self) -> Self {
        Self {
            changed_max: self.changed_max.or(others.changed_max),
            newly_rejected_max: self.newly_rejected_max.or(others.newly_rejected_max),
        }
    }
}

/// 0: no samples are kept, and candidates are not tried.
const BATCHES: RangeInclusive<u64> = 0..=1_000;
/// For each stage. Hardly a batch fits into less than 64 KiB.
const BYTES: RangeInclusive<usize> = (64 << 10)..=(1 << 30);
const AGES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(86_400);
/// Zero: a new version is not watched.
const WINDOWS: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(86_400);
const COUNTS: RangeInclusive<u64> = 0..=1_000_000_000;

/// Reads `[reload]`.
pub(super) fn read(table: Spanned<DeValue<'_>>, check: &mut Check) -> Option<ReloadConfig> {
    let raw: RawReload = shaped(table, check)?;
    let trial = trial(raw.trial.unwrap_or_default(), check);
    let probation = probation(raw.probation.unwrap_or_default(), check);
    let ((samples, gates), probation) = (trial?, probation?);
    Some(ReloadConfig { watch: raw.watch.unwrap_or(false), samples, gates, probation })
}

fn trial(raw: RawTrial, check: &mut Check) -> Option<(SampleLimits, Gates)> {
    let default = SampleLimits::default();
    let batches_max = check.count(&raw.batches, default.batches_max, BATCHES);
    let bytes_max = check.size(&raw.bytes, default.bytes_max, BYTES);
    let age_max = check.duration(&raw.age, default.age_max, AGES);
    let mut gate = |raw| match raw {
        None => Some(None),
        some => check.count(&some, 0, COUNTS).map(Some),
    };
    let (changed_max, newly_rejected_max) = (gate(raw.max_changed), gate(raw.max_rejected));
    let samples =
        SampleLimits { batches_max: batches_max?, bytes_max: bytes_max?, age_max: age_max? };
    let gates = Gates { changed_max: changed_max?, newly_rejected_max: newly_rejected_max? };
    Some((samples, gates))
}

fn probation(raw: RawProbation, check: &mut Check) -> Option<ProbationLimits> {
    let default = ProbationLimits::default();
    let window = check.duration(&raw.window, default.window, WINDOWS);
    let traps_max = check.count(&raw.traps, default.traps_max, COUNTS);
    let rejected = check.count(&raw.rejected_percent, default.rejected_percent_max, 0..=100);
    let slower_max = check.count(&raw.slower, default.slower_max, 2..=1_000);
    Some(ProbationLimits {
        window: window?,
        traps_max: traps_max?,
        rejected_percent_max: rejected?,
        slower_max: slower_max?,
    })
}
