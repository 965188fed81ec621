//! Standard output: shared by a command's reports and by the rows of a stdout sink, and closed by a reader
//! such as `head` whenever it likes.

use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use tokio_util::sync::CancellationToken;

use crate::terminal::note_styled;
use shardmill_config::{PipelineConfig, SharedOutput};
use shardmill_core::escape::{EscapingWriter, KeptCharacters, printable, printable_json};

/// Cancelled once a reader has closed standard output. The process has one, so this has one.
static CLOSED: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);
/// Why a report could not be printed, where it was not its reader that went away.
static FAILURE: OnceLock<String> = OnceLock::new();
/// Reports go to standard error, because rows go to standard output.
static ROWS_HAVE_STDOUT: AtomicBool = AtomicBool::new(false);
/// Rows go to standard error, because a JSON report goes to standard output.
static ROWS_ON_STDERR: AtomicBool = AtomicBool::new(false);

/// Prints a line of a report; what would steer a terminal is escaped.
pub(crate) fn print_line(line: impl std::fmt::Display) {
    print_styled(&printable(&line.to_string()));
}

/// Prints a line of JSON: the same value, with what would steer a terminal escaped.
pub(crate) fn print_json(json: &str) {
    print_styled(&printable_json(json));
}

/// Prints a line with colours of ours, whose other parts were escaped. A reader that went away breaks
/// nothing: work that has begun goes on, and commands that do nothing but print watch [`closed`]. Any other
/// failure, such as a full disk, is reported at the command's end ([`failure`]): whoever exports letters and then
/// deletes them must not take a cut file for a whole one.
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

/// The error of a command whose report could not be printed, if it could not.
///
/// # Errors
/// The system's first error.
pub(crate) fn failure() -> anyhow::Result<()> {
    match FAILURE.get() {
        Some(cause) => anyhow::bail!(
            "standard output could not be written: {cause}; what was printed is cut short: make room, or \
             write elsewhere, and give the command again"
        ),
        None => Ok(()),
    }
}

/// A token that is cancelled once standard output was found closed.
pub(crate) fn closed() -> CancellationToken {
    CLOSED.clone()
}

/// Leaves standard output to the rows of the pipeline's stdout sinks, if it has any: reports between them
/// would spoil what a program reads.
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

/// Leaves standard output to a JSON report: rows go to standard error.
pub(crate) fn leave_to_report() {
    ROWS_ON_STDERR.store(true, Ordering::Relaxed);
}

/// The output that stdout sinks print to. On a terminal, rows are escaped like all else; a file or a program
/// gets their bytes.
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

/// An output that notes when its reader is gone.
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
