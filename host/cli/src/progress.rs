//! Progress of waits and long puts: a progress bar if standard error is a terminal, otherwise plain lines.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal::{moves_cursor, note};

/// Interval between plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Progress of one task.
pub struct ConsoleProgress {
    what: String,
    bar: Option<ProgressBar>,
    printed: Instant,
}

impl ConsoleProgress {
    /// Starts showing progress towards `total`. `None`: the total is unknown.
    pub fn start(what: &str, total: Option<u64>) -> Self {
        let bar = (std::io::stderr().is_terminal() && moves_cursor()).then(|| match total {
            Some(total) => {
                styled(ProgressBar::new(total), "{msg} [{bar:30}] {pos}/{len} ({per_sec})")
            }
            None => styled(ProgressBar::new_spinner(), "{spinner} {msg} {pos} ({elapsed})"),
        });
        if let Some(bar) = &bar {
            bar.set_message(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
        } else {
            note(format_args!("{what} ..."));
        }
        Self { what: what.to_owned(), bar, printed: Instant::now() }
    }

    /// Shows how much is done.
    pub fn at(&mut self, done: u64, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(format!("{} {note}", self.what));
        } else if self.printed.elapsed() >= LINE_INTERVAL {
            self.printed = Instant::now();
            crate::terminal::note(format_args!("{} ... {done} {note}", self.what));
        }
    }

    /// Removes the progress bar at the end of the work.
    pub fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
