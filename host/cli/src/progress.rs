//! Progress on waits and long puts: a bar when standard error is a terminal, plain lines when not.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal::{moves_cursor, note};

/// How often a plain line is printed.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Progress of one piece of work.
pub struct ConsoleProgress {
    what: String,
    bar: Option<ProgressBar>,
    printed: Instant,
}

impl ConsoleProgress {
    /// Progress towards `total`; `None`: nobody knows how much there is.
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

    /// How far the work is.
    pub fn at(&mut self, done: u64, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(format!("{} {note}", self.what));
        } else if self.printed.elapsed() >= LINE_INTERVAL {
            self.printed = Instant::now();
            crate::terminal::note(format_args!("{} ... {done} {note}", self.what));
        }
    }

    /// The work is done.
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
