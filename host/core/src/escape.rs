//! Makes texts from plugins, records and servers safe to print.
//!
//! Such texts may contain characters that move the cursor, hide or reorder the text around them, or fake a line.
//! [`controls_terminal`] defines these characters, and is the only definition. Every output of the binary goes through
//! a function of this module: notes, reports of commands and errors of the argument parser through [`printable`], JSON
//! through [`printable_json`], the log and rows on a terminal through [`EscapingWriter`].

use std::borrow::Cow;
use std::fmt::{self, Display, Write as _};
use std::io::{self, Write};

use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

/// Characters that are not escaped in a report of several lines.
const LAYOUT: [char; 2] = ['\n', '\t'];

/// Limit of a shown text from a plugin, a server, or a library that quotes one, in bytes. The text itself may be as
/// long as their memory.
pub const QUOTED_BYTES_MAX: usize = 8 << 10;
/// Bytes of a text that are copied beyond those that are shown, so that a secret that begins in the shown part is found
/// whole.
pub const AHEAD_BYTES: usize = 64 << 10;

/// Whether a character changes the state of a terminal, or the reader's view, and is not simply shown: controls, format
/// characters (including those that reorder text), and line separators.
pub fn controls_terminal(c: char) -> bool {
    // Most characters are ASCII, and the general category takes a search.
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    matches!(
        c.general_category(),
        GeneralCategory::Control
            | GeneralCategory::Format
            | GeneralCategory::LineSeparator
            | GeneralCategory::ParagraphSeparator
    )
}

/// Escapes the characters that control a terminal, except those in `kept`.
pub fn escaped(text: &str, kept: &[char]) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match controls_terminal(c) && !kept.contains(&c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// Returns the beginning of a text, at most `bytes_max` bytes as shown: an escaped character takes up to ten times its
/// bytes. `escapes` says which characters are escaped. `hide` replaces secrets in the copied part of the text, which is
/// never all of a long one. A text that was cut ends with its whole length.
pub fn beginning(
    text: impl Display,
    bytes_max: usize,
    escapes: fn(char) -> bool,
    hide: impl FnOnce(String) -> String,
) -> String {
    let mut copy = Copied { text: String::new(), bytes_max: bytes_max + AHEAD_BYTES, bytes: 0 };
    // If the text fails to format, it ends there.
    let _ = write!(copy, "{text}");
    let Copied { text: copied, bytes, .. } = copy;
    let mut is_cut = copied.len() < bytes;
    let mut shown = String::new();
    for c in hide(copied).chars() {
        let whole = shown.len();
        match escapes(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
        if shown.len() > bytes_max {
            shown.truncate(whole);
            is_cut = true;
            break;
        }
    }
    if is_cut {
        // Writing to a String cannot fail.
        let _ = write!(shown, "… ({bytes} bytes in all)");
    }
    shown
}

/// Keeps the first bytes that are written, and counts all of them.
struct Copied {
    text: String,
    bytes_max: usize,
    bytes: usize,
}

impl fmt::Write for Copied {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        // After a part that was cut, nothing may follow.
        if self.bytes == self.text.len() {
            let room = self.bytes_max - self.text.len();
            self.text.push_str(&part[..part.floor_char_boundary(room)]);
        }
        self.bytes += part.len();
        Ok(())
    }
}

/// Formats a path for a message, in one line.
pub fn path(path: &std::path::Path) -> String {
    escaped(&path.display().to_string(), &[])
}

/// Puts a text in quotation marks, for a log field. A plain text field would be escaped by the log, a second time if
/// the text was escaped before.
pub fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// Escapes a report for printing, except line ends and tabs.
pub fn printable(text: &str) -> Cow<'_, str> {
    match text.contains(|c: char| controls_terminal(c) && !LAYOUT.contains(&c)) {
        true => Cow::Owned(escaped(text, &LAYOUT)),
        false => Cow::Borrowed(text),
    }
}

/// Does the same for a text that has colours of ours: sequences that only set colours are kept, too. Foreign parts must
/// have been escaped before they were inserted.
pub fn printable_styled(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\x1b') {
        shown.push_str(&printable(&rest[..at]));
        rest = &rest[at..];
        let length = style_length(rest);
        match length {
            0 => {
                shown.push_str("\\u{1b}");
                rest = &rest[1..];
            }
            length => {
                shown.push_str(&rest[..length]);
                rest = &rest[length..];
            }
        }
    }
    shown.push_str(&printable(rest));
    shown
}

/// Returns the length of the colour sequence (`ESC [ … m`) that a text begins with; 0 if there is none.
fn style_length(text: &str) -> usize {
    let Some(parameters) = text.strip_prefix("\x1b[") else { return 0 };
    match parameters.find(|c: char| !c.is_ascii_digit() && c != ';') {
        Some(end) if parameters[end..].starts_with('m') => 2 + end + 1,
        _ => 0,
    }
}

/// Escapes JSON for printing. The value is the same; control and format characters become JSON escapes such as
/// `\u001b`.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    if !json.contains(controls_terminal) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        // Line ends between JSON values are layout and stay. Inside strings, JSON already escapes them.
        match controls_terminal(c) && !LAYOUT.contains(&c) {
            true => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                // Writing into a String cannot fail.
                let _ = write!(shown, "\\u{unit:04x}");
            }),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// Characters that [`EscapingWriter`] does not escape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptCharacters {
    /// Line ends and tabs.
    Layout,
    /// Tabs, and the line end at the end of each write: a log event is one line.
    OneLine {
        /// Whether colour sequences are kept, too.
        styles: bool,
    },
}

/// Output on which no text can control a terminal. Each write must contain whole characters; bytes that are not UTF-8
/// are shown as `\xXX`.
pub struct EscapingWriter<W> {
    output: W,
    kept: KeptCharacters,
}

impl<W: Write> EscapingWriter<W> {
    /// Wraps an output.
    pub fn new(output: W, kept: KeptCharacters) -> Self {
        Self { output, kept }
    }
}

impl<W: Write> Write for EscapingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(shown_bytes(bytes, self.kept).as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

fn shown_bytes(bytes: &[u8], kept: KeptCharacters) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            // Writing into a String cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    match kept {
        KeptCharacters::Layout => printable(&text).into_owned(),
        KeptCharacters::OneLine { styles } => {
            let (line, end) = match text.strip_suffix('\n') {
                Some(line) => (line, "\n"),
                None => (text.as_str(), ""),
            };
            let line = line.replace('\n', "\\n");
            let line = if styles { printable_styled(&line) } else { escaped(&line, &['\t']) };
            line + end
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A control, a C1 control, a direction override and isolate, a zero-width space, a line separator, a soft hyphen,
    /// a tag.
    const STEERING: &str =
        "\x1b\u{9b}\u{202e}\u{2066}\u{200b}\u{2028}\u{ad}\u{e0041}\u{feff}\u{7f}\r";

    #[test]
    fn control_characters_are_shown_and_do_nothing() {
        assert_eq!(escaped("a\nb\x1b[2J", &[]), "a\\nb\\u{1b}[2J");
        assert_eq!(escaped("a\nb\x1b[2J", &['\n']), "a\nb\\u{1b}[2J");
    }

    #[test]
    fn wall_12_all_that_steers_is_escaped_and_all_else_is_not() {
        assert!(STEERING.chars().all(controls_terminal));
        let plain = "plain äöü 漢字 🚗 \u{301} '\"\\{}";
        assert!(!plain.chars().any(controls_terminal));
        assert_eq!(printable(plain), plain);
        for text in [
            escaped(STEERING, &[]),
            printable(STEERING).into_owned(),
            printable_styled(STEERING),
            printable_json(STEERING).into_owned(),
        ] {
            assert!(!text.chars().any(controls_terminal), "{text}");
        }
    }

    #[test]
    fn wall_12_the_beginning_of_a_text_is_one_line_of_bounded_length() {
        let plain = |text: &str| beginning(text, 16, controls_terminal, |copied| copied);
        for (text, expected) in [
            ("", ""),
            ("why", "why"),
            ("exactly 16 bytes", "exactly 16 bytes"),
            ("a\nerror: forged", "a\\nerror: forged"),
            ("a\r\n\x1b[2J", "a\\r\\n\\u{1b}[2J"),
            ("17 bytes are cut.", "17 bytes are cut… (17 bytes in all)"),
            ("ääääääääää", "ääääääää… (20 bytes in all)"),
            ("\u{202e}\u{202e}\u{202e}", "\\u{202e}\\u{202e}… (9 bytes in all)"),
        ] {
            assert_eq!(plain(text), expected, "{text:?}");
        }
        let kept = |text: &str| beginning(text, 16, |_| false, |copied| copied);
        assert_eq!(kept("a\nb\t\x1b"), "a\nb\t\x1b");
    }

    #[test]
    fn wall_02_no_more_than_the_beginning_of_a_text_is_copied() {
        /// A text of many parts, of which the last ones would fit again.
        struct Parts;
        impl Display for Parts {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let part = "ä".repeat(32 << 10);
                (0..100).try_for_each(|_| f.write_str(&part))?;
                f.write_str("x")
            }
        }
        let mut copied_bytes = 0;
        let shown = beginning(Parts, 100, controls_terminal, |copied| {
            copied_bytes = copied.len();
            copied
        });
        assert_eq!(copied_bytes, 100 + AHEAD_BYTES);
        assert_eq!(shown, format!("{}… (6553601 bytes in all)", "ä".repeat(50)));
        // A secret is found although the text is cut inside it.
        let text = format!("{}secret", "x".repeat(97));
        let hide = |copied: String| copied.replace("secret", "$S");
        assert_eq!(beginning(&text, 100, controls_terminal, hide), format!("{}$S", "x".repeat(97)));
    }

    #[test]
    fn wall_12_a_path_is_one_line() {
        let path = path(std::path::Path::new("a/b\nerror: forged\u{202e}.wasm"));
        assert_eq!(path, "a/b\\nerror: forged\\u{202e}.wasm");
    }

    #[test]
    fn wall_12_json_keeps_its_value() {
        let value = serde_json::json!({ "a": STEERING, STEERING: [1, "ä"] });
        let shown = printable_json(&serde_json::to_string_pretty(&value).unwrap()).into_owned();
        assert!(!shown.contains(|c: char| controls_terminal(c) && c != '\n'), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    #[test]
    fn wall_12_of_sequences_only_colours_of_ours_stay() {
        let text = "\x1b[31m- red\x1b[0m\n\x1b[2J\x1b]0;title\x07\x1b[1;4m\x1b";
        let expected = "\x1b[31m- red\x1b[0m\n\\u{1b}[2J\\u{1b}]0;title\\u{7}\x1b[1;4m\\u{1b}";
        assert_eq!(printable_styled(text), expected);
    }

    #[test]
    fn wall_12_an_event_of_the_log_is_one_line() {
        let written = |bytes: &[u8], kept| {
            let mut output = Vec::new();
            EscapingWriter::new(&mut output, kept).write_all(bytes).unwrap();
            String::from_utf8(output).unwrap()
        };
        let line = b"WARN x\nERROR forged\x1b[2J\xe2\x80\xae\xff\n";
        let plain = KeptCharacters::OneLine { styles: false };
        assert_eq!(written(line, plain), "WARN x\\nERROR forged\\u{1b}[2J\\u{202e}\\xff\n");
        let styled = KeptCharacters::OneLine { styles: true };
        assert_eq!(written(b"\x1b[2mx\x1b[0m\x1b[2J\n", styled), "\x1b[2mx\x1b[0m\\u{1b}[2J\n");
        assert_eq!(written(b"a\tb\nc\x1bd\n", KeptCharacters::Layout), "a\tb\nc\\u{1b}d\n");
    }
}
