//! Notes to people and the log on standard error, and whether styles are wanted there.

use std::io::{self, IsTerminal, Write};

use shardmill_core::escape::printable;

/// Writes a line to standard error. `eprintln!` would panic if the reader has gone, and block if the reader has
/// stopped; the work matters more than the note.
pub fn note(line: std::fmt::Arguments<'_>) {
    note_styled(&printable(&line.to_string()));
}

/// Writes a text that contains our own styles to standard error. The caller has escaped the rest.
pub(crate) fn note_styled(text: &str) {
    crate::stderr::say(format!("{text}\n"));
}

/// Whether colours and other styles are wanted on an output: it is a terminal other than `dumb`, and `NO_COLOR`
/// is unset or empty (<https://no-color.org>).
pub(crate) fn is_styled(output: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    output.is_terminal() && set("NO_COLOR").is_none() && moves_cursor()
}

/// Whether the terminal can move its cursor, as progress bars need. `TERM=dumb` cannot.
pub(crate) fn moves_cursor() -> bool {
    std::env::var_os("TERM").is_none_or(|name| name != "dumb")
}

/// Standard error for the log: it never waits for its reader. Each write must consist of whole lines.
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
