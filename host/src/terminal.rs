//! What is written to a terminal: strangers' texts that must not steer it, styles where they are wanted,
//! and notes on standard error.

use std::io::{IsTerminal, Write as _};

/// Writes a line to standard error. `eprintln!` would panic where its reader is gone; the work matters more
/// than the note.
pub fn note(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Whether colours and other styles are wanted on an output: it is a terminal, that terminal is not
/// `dumb`, and `NO_COLOR` is unset or empty (<https://no-color.org>).
pub fn is_styled(output: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    output.is_terminal() && set("NO_COLOR").is_none() && moves_cursor()
}

/// Whether a terminal can move its cursor, which progress bars need: `TERM=dumb` cannot.
pub fn moves_cursor() -> bool {
    std::env::var_os("TERM").is_none_or(|name| name != "dumb")
}

/// The text with its control characters escaped, but for those of `kept`.
pub fn escaped(text: &str, kept: &[char]) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() && !kept.contains(&c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_do_nothing() {
        assert_eq!(escaped("a\nb\x1b[2J", &[]), "a\\nb\\u{1b}[2J");
        assert_eq!(escaped("a\nb\x1b[2J", &['\n']), "a\nb\\u{1b}[2J");
    }
}
