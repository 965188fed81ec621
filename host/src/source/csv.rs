//! Ends of CSV records: a line break within quotes is part of its field (RFC 4180, section 2.6). A source
//! that cut there would make rows that were never in the file. Pure; no I/O.

/// Finds the end of the first record, its line end included; `None`: it is not in these bytes.
pub(super) fn record_end(bytes: &[u8]) -> Option<usize> {
    let line_end = memchr::memchr(b'\n', bytes)? + 1;
    // Nearly all records: a look at many bytes at a time.
    match memchr::memchr(b'"', &bytes[..line_end]) {
        None => Some(line_end),
        Some(_) => RecordScan::default().end(bytes),
    }
}

/// Looks for the end of one record in bytes that come in parts.
///
/// A quote opens a field where one begins: at the start or after `,` `;` tab or `|`, as the delimiter is
/// the plugin's business. Any other quote is text, such as the inches of `5" pipe`.
#[derive(Default)]
pub(super) struct RecordScan {
    place: Place,
}

#[derive(Clone, Copy, Default)]
enum Place {
    #[default]
    FieldBegin,
    Plain,
    Quoted,
    /// After a quote within quotes: it closes the field, or is the first of two that stand for one.
    QuoteInQuotes,
}

impl RecordScan {
    /// Reads on. Gives the number of these bytes up to the record's end, its line end included.
    pub(super) fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, byte) in bytes.iter().enumerate() {
            self.place = match (self.place, byte) {
                (Place::FieldBegin | Place::QuoteInQuotes, b'"') => Place::Quoted,
                (Place::Quoted, b'"') => Place::QuoteInQuotes,
                (Place::Quoted, _) => Place::Quoted,
                (_, b'\n') => return Some(at + 1),
                (_, b',' | b';' | b'\t' | b'|') => Place::FieldBegin,
                _ => Place::Plain,
            };
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_33_a_quoted_line_break_does_not_end_a_record() {
        for (text, first) in [
            ("a,b\nc", Some("a,b\n")),
            ("a,b", None),
            ("", None),
            ("\n", Some("\n")),
            ("\"a\nb\",c\nd", Some("\"a\nb\",c\n")),
            ("1,\"a\nb\nc\"\r\n2", Some("1,\"a\nb\nc\"\r\n")),
            ("1;\"a\nb\"\n2", Some("1;\"a\nb\"\n")),
            ("1,\"a\"\"\nb\"\n2", Some("1,\"a\"\"\nb\"\n")),
            ("1,\"\"\n2", Some("1,\"\"\n")),
            // Text, not quotes.
            ("5\" pipe,1\n6", Some("5\" pipe,1\n")),
            ("a \"b\n6", Some("a \"b\n")),
            // Never closed, or not yet.
            ("1,\"a\nb", None),
            ("1,\"a\n\"", None),
        ] {
            let found = record_end(text.as_bytes()).map(|end| &text[..end]);
            assert_eq!(found, first, "{text:?}");
            let mut scan = RecordScan::default();
            let found =
                (1..=text.len()).find(|end| scan.end(&text.as_bytes()[end - 1..*end]).is_some());
            assert_eq!(found.map(|end| &text[..end]), first, "{text:?} byte by byte");
        }
    }
}
