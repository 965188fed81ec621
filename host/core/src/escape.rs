//! Strangers' texts where people read them: which characters steer a terminal, and how they are shown in place of
//! doing something.
//!
//! Texts of plugins, records and servers may hold characters that move the cursor, hide or reorder what
//! stands around them, or forge a line. [`controls_terminal`] is the one list of such characters. Every output of the
//! binary goes through one of the functions here: notes, the commands' reports and the errors of the argument
//! parser through [`printable`], JSON through [`printable_json`], the log and rows on a terminal through [`EscapingWriter`].

use std::borrow::Cow;
use std::fmt::{self, Display, Write as _};
use std::io::{self, Write};

use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

/// Characters that stay in a report of several lines.
const LAYOUT: [char; 2] = ['\n', '\t'];

/// Bytes that are shown of a text of a plugin or a server, and of a library that quotes one: it may be as long as
/// their memory.
pub const QUOTED_BYTES_MAX: usize = 8 << 10;
/// Bytes that are copied of a text beyond those that are shown: a secret that begins in what is shown must be found
/// whole.
pub const AHEAD_BYTES: usize = 64 << 10;

/// Whether a character does something to a terminal, or to a reader's view, in place of being shown:
/// controls, format characters (those that reorder text among them), and separators of lines.
pub fn controls_terminal(c: char) -> bool {
    // Most characters: the general category takes a search.
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

/// The text with the characters that steer escaped, but for those of `kept`.
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

/// The beginning of a text, of at most `bytes_max` bytes as it is shown: an escaped character takes up to ten times
/// its bytes. `escapes` says which characters are escaped; `hide` replaces secrets in what is copied of the text,
/// which is never all of a long one. A text that was cut ends with its whole length.
pub fn beginning(
    text: impl Display,
    bytes_max: usize,
    escapes: fn(char) -> bool,
    hide: impl FnOnce(String) -> String,
) -> String {
    let mut copy = Copied { text: String::new(), bytes_max: bytes_max + AHEAD_BYTES, bytes: 0 };
    // A text that fails to be written ends there.
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
        // Writing into a String cannot fail.
        let _ = write!(shown, "… ({bytes} bytes in all)");
    }
    shown
}

/// Keeps the first bytes of what is written, and counts all of them.
struct Copied {
    text: String,
    bytes_max: usize,
    bytes: usize,
}

impl fmt::Write for Copied {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        // Behind a part that was cut, nothing may follow.
        if self.bytes == self.text.len() {
            let room = self.bytes_max - self.text.len();
            self.text.push_str(&part[..part.floor_char_boundary(room)]);
        }
        self.bytes += part.len();
        Ok(())
    }
}

/// A path as messages name it, in one line.
pub fn path(path: &std::path::Path) -> String {
    escaped(&path.display().to_string(), &[])
}

/// A text in quotation marks, for a field of the log. As a plain text field it would be escaped: a second time,
/// where that was done before.
pub fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// A report as it may be printed: ends of lines and tabs stay, all else that steers is escaped.
pub fn printable(text: &str) -> Cow<'_, str> {
    match text.contains(|c: char| controls_terminal(c) && !LAYOUT.contains(&c)) {
        true => Cow::Owned(escaped(text, &LAYOUT)),
        false => Cow::Borrowed(text),
    }
}

/// [`printable`] for a text with colours of ours: sequences that only set colours stay too. Strangers' parts
/// must have been escaped before they were put between them.
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

/// The length of the colour sequence that a text begins with (`ESC [ … m`); 0: there is none.
fn style_length(text: &str) -> usize {
    let Some(parameters) = text.strip_prefix("\x1b[") else { return 0 };
    match parameters.find(|c: char| !c.is_ascii_digit() && c != ';') {
        Some(end) if parameters[end..].starts_with('m') => 2 + end + 1,
        _ => 0,
    }
}

/// JSON as it may be printed: the same value, with each control or format character as a JSON escape, such as `\u001b`.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    if !json.contains(controls_terminal) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        // Between values JSON has ends of lines, too; there they are layout, in strings they are escaped.
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

/// The characters that [`EscapingWriter`] leaves as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptCharacters {
    /// Ends of lines and tabs.
    Layout,
    /// Tabs, and the line end at the end of each write: an event of the log is one line. With styles, the
    /// colours of whoever wrote it.
    OneLine {
        /// Whether colours stay.
        styles: bool,
    },
}

/// An output on which nothing that is written can steer a terminal. Each write must hold whole characters;
/// bytes that are not UTF-8 are shown as `\xXX`.
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

    /// A control, a C1 control, an override and an isolate of direction, a zero-width space, a separator of
    /// lines, a soft hyphen, a tag.
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
        /// A text of many parts, the last ones of which would fit again.
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
        // A secret is found although the text is cut within it.
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
