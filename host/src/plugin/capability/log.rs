//! `log`: a plugin's lines in the host's log, so many a second, each cut to a bound.

use std::time::{Duration, Instant};

use crate::plugin::bindings::shardmill::plugin::log::Level;
use crate::plugin::excerpt;
use crate::record::StageName;
use crate::terminal::escaped;

/// The target of plugins' lines, for filters.
pub const LOG_TARGET: &str = "plugin";

/// Whose lines they are.
pub(super) struct Author {
    /// The stage.
    pub stage: StageName,
    /// The plugin's version; empty in `configure`.
    pub version: String,
    /// The shard; empty outside of a lane.
    pub shard: String,
}

/// How many lines an instance may still write in this second.
pub(super) struct LineBudget {
    lines_per_s_max: u32,
    second_began: Instant,
    lines: u32,
    dropped: u64,
}

impl LineBudget {
    /// A fresh budget; with 0 lines a second, none is shown.
    pub fn new(lines_per_s_max: u32) -> Self {
        Self { lines_per_s_max, second_began: Instant::now(), lines: 0, dropped: 0 }
    }

    /// Writes a line, or counts it as dropped.
    pub fn write(&mut self, author: &Author, level: Level, message: &str) {
        if self.second_began.elapsed() >= Duration::from_secs(1) {
            self.tell_dropped(author);
            self.second_began = Instant::now();
            self.lines = 0;
        }
        if self.lines >= self.lines_per_s_max {
            self.dropped += 1;
            return;
        }
        self.lines += 1;
        emit(author, level, &shown(message));
    }

    /// Says how many lines were dropped since the last time, if any were.
    pub fn tell_dropped(&mut self, author: &Author) {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            let limit = self.lines_per_s_max;
            metrics::counter!("shardmill_stage_log_lines_dropped_total",
                "stage" => author.stage.to_string())
            .increment(dropped);
            let message = format!("{dropped} lines dropped: more than {limit} a second");
            emit(author, Level::Warn, &message);
        }
    }
}

fn emit(author: &Author, level: Level, message: &str) {
    let Author { stage, version, shard } = author;
    match level {
        Level::Trace => tracing::trace!(target: LOG_TARGET, %stage, version, shard, "{message}"),
        Level::Debug => tracing::debug!(target: LOG_TARGET, %stage, version, shard, "{message}"),
        Level::Info => tracing::info!(target: LOG_TARGET, %stage, version, shard, "{message}"),
        Level::Warn => tracing::warn!(target: LOG_TARGET, %stage, version, shard, "{message}"),
        Level::Error => tracing::error!(target: LOG_TARGET, %stage, version, shard, "{message}"),
    }
}

/// One line on the terminal of bounded length, whatever the plugin wrote.
fn shown(message: &str) -> String {
    escaped(&excerpt(message.as_bytes()), &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_of_bounded_length() {
        assert_eq!(shown("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        let long = "ä".repeat(8 << 10);
        let cut = shown(&long);
        assert!(cut.len() < (8 << 10) + 64 && cut.ends_with("(16384 bytes in all)"), "{cut}");
    }

    #[test]
    fn lines_over_the_budget_are_counted() {
        let author = Author { stage: "s".into(), version: "1".into(), shard: String::new() };
        let mut budget = LineBudget::new(2);
        (0..5).for_each(|_| budget.write(&author, Level::Debug, "x"));
        assert_eq!((budget.lines, budget.dropped), (2, 3));
        budget.tell_dropped(&author);
        assert_eq!(budget.dropped, 0);
    }
}
