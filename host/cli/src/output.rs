//! Standard output. A command's reports and the rows of a stdout sink share it, and a reader such as `head` may
//! close it at any time.

use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use tokio_util::sync::CancellationToken;

use crate::terminal::note_styled;
use shardmill_config::{PipelineConfig, SharedOutput};
use shardmill_core::escape::{EscapingWriter, KeptCharacters, printable, printable_json};

/// Cancelled when a reader has closed standard output. A process has one standard output, hence one static.
static CLOSED: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);
/// Cause, other than a closed reader, for which a report could not be printed.
static FAILURE: OnceLock<String> = OnceLock::new();
/// Whether reports go to standard error, because rows go to standard output.
static ROWS_HAVE_STDOUT: AtomicBool = AtomicBool::new(false);
/// Whether rows go to standard error, because a JSON report goes to standard output.
static ROWS_ON_STDERR: AtomicBool = AtomicBool::new(false);

/// Prints a line of a report and escapes what would control a terminal.
pub(crate) fn print_line(line: impl std::fmt::Display) {
    print_styled(&printable(&line.to_string()));
}

/// Prints a line of JSON and escapes what would control a terminal; the JSON value stays the same.
pub(crate) fn print_json(json: &str) {
    print_styled(&printable_json(json));
}

/// Prints a line that contains our own colours; the caller has escaped the rest.
///
/// A closed reader is not an error: work that has started continues, and commands that only print watch
/// [`closed`]. Any other failure, such as a full disk, is reported at the end of the command ([`failure`]).
/// Whoever exports dead letters and then deletes them must not mistake a truncated file for a complete one.
pub(crate) fn print_styled(line: &str) {
    if ROWS_HAVE_STDOUT.load(Ordering::Relaxed) {
        note_styled(line);
    } else {
        let printed = writeln!(ClosingOutput(io::stdout()), "{line}");
        if let Err(error) = printed.as_ref()
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            FAILURE.get_or_init(|| error.to_string());
            CLOSED.cancel();
        }
    }
}

/// Returns an error if a report of the command could not be printed.
///
/// # Errors
/// The first error that the system reported.
pub(crate) fn failure() -> anyhow::Result<()> {
    match FAILURE.get() {
        Some(cause) => anyhow::bail!(
            "failed to write standard output: {cause}; the output is incomplete: free some space, or write \
             elsewhere, and run the command again"
        ),
        None => Ok(()),
    }
}

/// Returns a token that is cancelled when standard output is found closed.
pub(crate) fn closed() -> CancellationToken {
    CLOSED.clone()
}

/// Leaves standard output to the rows of the pipeline's stdout sinks, if it has any. Reports between the rows
/// would break programs that read them.
pub(crate) fn leave_to_rows(config: &PipelineConfig) {
    let mut sinks = config.sinks.iter().chain(&config.dead_letter_sinks);
    if sinks.any(|sink| sink.settings.prints_rows()) {
        ROWS_HAVE_STDOUT.store(true, Ordering::Relaxed);
    }
}

/// Whether standard output was left to rows.
pub(crate) fn is_for_rows() -> bool {
    ROWS_HAVE_STDOUT.load(Ordering::Relaxed)
}

/// Leaves standard output to a JSON report; rows go to standard error.
pub(crate) fn leave_to_report() {
    ROWS_ON_STDERR.store(true, Ordering::Relaxed);
}

/// Returns the output of stdout sinks. On a terminal, rows are escaped like all other text; a file or a program
/// gets their exact bytes.
pub(crate) fn for_rows() -> SharedOutput {
    match ROWS_ON_STDERR.load(Ordering::Relaxed) {
        true => rows_to(io::stderr(), io::stderr().is_terminal()),
        false => rows_to(ClosingOutput(io::stdout()), io::stdout().is_terminal()),
    }
}

fn rows_to(output: impl Write + Send + 'static, is_terminal: bool) -> SharedOutput {
    match is_terminal {
        true => Arc::new(Mutex::new(EscapingWriter::new(output, KeptCharacters::Layout))),
        false => Arc::new(Mutex::new(output)),
    }
}

/// Output that notes when its reader is gone.
struct ClosingOutput<W>(W);

impl<W: Write> ClosingOutput<W> {
    fn noted<T>(&self, done: io::Result<T>) -> io::Result<T> {
        if done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            CLOSED.cancel();
        }
        done
    }
}

impl<W: Write> Write for ClosingOutput<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let done = self.0.write(bytes);
        self.noted(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        let done = self.0.flush();
        self.noted(done)
    }
}
