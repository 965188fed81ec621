//! Output on standard error: notes to people, the log, and whether styles are wanted there.

use std::io::{self, IsTerminal, Write};

use shardmill_core::escape::printable;

/// Writes a line to standard error. `eprintln!` would panic where its reader is gone, and wait where its reader
/// has stopped; the work matters more than the note.
pub fn note(line: std::fmt::Arguments<'_>) {
    note_styled(&printable(&line.to_string()));
}

/// Writes a text with styles of our own to standard error. Its other parts must have been escaped.
pub(crate) fn note_styled(text: &str) {
    crate::stderr::say(format!("{text}\n"));
}

/// Whether colours and other styles are wanted on an output: it is a terminal, that terminal is not
/// `dumb`, and `NO_COLOR` is unset or empty (<https://no-color.org>).
pub(crate) fn is_styled(output: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    output.is_terminal() && set("NO_COLOR").is_none() && moves_cursor()
}

/// Whether a terminal can move its cursor, which progress bars need: `TERM=dumb` cannot.
pub(crate) fn moves_cursor() -> bool {
    std::env::var_os("TERM").is_none_or(|name| name != "dumb")
}

/// Standard error as the log writes it: it never waits for its reader. Each write must hold whole lines.
pub(crate) struct LogOutput;

impl Write for LogOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        crate::stderr::queue(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
