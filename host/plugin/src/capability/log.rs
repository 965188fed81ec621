//! The capability `log`: lines in the host's log, a limited number per second, each cut to a maximum length.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::bindings::shardmill::plugin::log::Level;
use shardmill_core::escape::{QUOTED_BYTES_MAX, beginning, controls_terminal};
use shardmill_core::metric;
use shardmill_core::record::StageName;

/// Target of plugins' log lines, for filters.
pub const LOG_TARGET: &str = "plugin";

/// Period for which lines are counted.
const SECOND: Duration = Duration::from_secs(1);

/// The origin of log lines.
pub(super) struct Author {
    /// The stage.
    pub stage: StageName,
    /// The plugin's version; empty in `configure`.
    pub version: String,
    /// The shard; empty outside of a lane.
    pub shard: String,
}

/// The number of lines that a stage may still write in this second. All instances of the stage's revision share it,
/// also those that are renewed after a trap: a budget per instance would start again with each.
#[derive(Debug, Default)]
pub(super) struct LineBudget {
    lines: Mutex<Lines>,
}

#[derive(Debug, Default)]
struct Lines {
    second_began: Option<Instant>,
    written: u32,
    dropped: u64,
    /// The limit at the last request.
    lines_per_s_max: u32,
}

/// Whether a line is written, and the count to log before it.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    is_written: bool,
    /// Lines that were dropped in the previous second.
    dropped_before: u64,
}

impl LineBudget {
    /// Takes one line from the budget. Returns false if none is left; the line is then counted. After the second
    /// has passed, logs how many were dropped.
    pub fn take(&self, author: &Author, lines_per_s_max: u32) -> bool {
        let taken = self.taken(Instant::now(), lines_per_s_max);
        log_dropped(author, taken.dropped_before, lines_per_s_max);
        taken.is_written
    }

    fn taken(&self, now: Instant, lines_per_s_max: u32) -> Taken {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dropped_before = 0;
        if lines.second_began.is_none_or(|began| now.saturating_duration_since(began) >= SECOND) {
            dropped_before = lines.dropped;
            *lines = Lines { second_began: Some(now), written: 0, dropped: 0, lines_per_s_max };
        }
        let is_written = lines.written < lines_per_s_max;
        match is_written {
            true => lines.written += 1,
            false => lines.dropped += 1,
        }
        Taken { is_written, dropped_before }
    }

    /// Logs how many lines were dropped since the last such message.
    pub fn end(&mut self, stage: &StageName) {
        let lines = self.lines.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (version, shard) = (String::new(), String::new());
        let author = Author { stage: stage.clone(), version, shard };
        log_dropped(&author, std::mem::take(&mut lines.dropped), lines.lines_per_s_max);
    }
}

fn log_dropped(author: &Author, dropped: u64, lines_per_s_max: u32) {
    if dropped > 0 {
        let stage = author.stage.to_string();
        metrics::counter!(metric::STAGE_LOG_LINES_DROPPED_TOTAL, "stage" => stage)
            .increment(dropped);
        let message = format!("{dropped} lines dropped: more than {lines_per_s_max} a second");
        emit(author, Level::Warn, &message);
    }
}

/// Writes a line that [`line()`] returned.
pub(super) fn emit(author: &Author, level: Level, line: &str) {
    let Author { stage, version, shard } = author;
    match level {
        Level::Trace => tracing::trace!(target: LOG_TARGET, %stage, version, shard, "{line}"),
        Level::Debug => tracing::debug!(target: LOG_TARGET, %stage, version, shard, "{line}"),
        Level::Info => tracing::info!(target: LOG_TARGET, %stage, version, shard, "{line}"),
        Level::Warn => tracing::warn!(target: LOG_TARGET, %stage, version, shard, "{line}"),
        Level::Error => tracing::error!(target: LOG_TARGET, %stage, version, shard, "{line}"),
    }
}

/// Turns a text of the plugin into one line of bounded length. Escaping may make a character ten times longer, so
/// the bound holds after it. `hide` replaces secrets in the part that is copied.
pub(super) fn line(message: &str, hide: impl FnOnce(String) -> String) -> String {
    beginning(message, QUOTED_BYTES_MAX, controls_terminal, hide)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_core::escape::AHEAD_BYTES;

    fn shown(message: &str) -> String {
        line(message, |copied| copied)
    }

    #[test]
    fn wall_06_a_line_is_cut_before_it_is_copied() {
        let message = "x".repeat(64 << 20);
        let mut copied_bytes = 0;
        let cut = line(&message, |copied| {
            copied_bytes = copied.len();
            "all hidden".into()
        });
        assert_eq!(copied_bytes, QUOTED_BYTES_MAX + AHEAD_BYTES);
        assert_eq!(cut, "all hidden… (67108864 bytes in all)");
        assert_eq!(line("a secret", |copied| copied.replace("secret", "${S}")), "a ${S}");
    }

    #[test]
    fn a_line_is_one_line_of_bounded_length() {
        assert_eq!(shown("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        let long = "ä".repeat(8 << 10);
        let cut = shown(&long);
        assert!(cut.len() < (8 << 10) + 64 && cut.ends_with("(16384 bytes in all)"), "{cut}");
    }

    #[test]
    fn wall_09_a_line_of_escapes_is_not_longer_than_another() {
        let cut = shown(&"\u{202e}".repeat(8 << 10));
        assert!(cut.len() < (8 << 10) + 64, "{} bytes", cut.len());
    }

    #[test]
    fn wall_09_lines_over_the_budget_of_a_stage_are_counted() {
        let budget = LineBudget::default();
        let begun = Instant::now();
        let take = |ms| {
            let taken = budget.taken(begun + Duration::from_millis(ms), 2);
            (taken.is_written, taken.dropped_before)
        };
        assert_eq!(
            [0, 1, 2, 3, 999].map(take),
            [(true, 0), (true, 0), (false, 0), (false, 0), (false, 0)]
        );
        assert_eq!([1_000, 1_001, 1_002].map(take), [(true, 3), (true, 0), (false, 0)]);
        assert_eq!(take(60_000), (true, 1));
        assert_eq!(budget.taken(begun, 0), Taken { is_written: false, dropped_before: 0 });
    }
}
