//! Finds the ends of CSV records. A line break within quotes is part of its field (RFC 4180, section 2.6); a source
//! that ended a record there would make rows that are not in the file.

/// Finds the end of the first record, with its line end; `None`: the end is not in these bytes. `delimiter` is the byte
/// between fields, if known.
pub(super) fn record_end(bytes: &[u8], delimiter: Option<u8>) -> Option<usize> {
    let line_end = memchr::memchr(b'\n', bytes)? + 1;
    // Nearly all records have no quote; `memchr` looks at many bytes at a time.
    match memchr::memchr(b'"', &bytes[..line_end]) {
        None => Some(line_end),
        Some(_) => RecordScan { delimiter, ..RecordScan::default() }.end(bytes),
    }
}

/// Scanner that finds the end of one record in bytes that come in parts.
///
/// A quote opens a field only at the field's beginning: at the start or after the delimiter. If only the plugin knows
/// the delimiter, `,`, `;`, tab and `|` count. Any other quote is text, such as the inches of `5" pipe`.
#[derive(Default)]
pub struct RecordScan {
    place: Place,
    delimiter: Option<u8>,
}

#[derive(Clone, Copy, Default)]
enum Place {
    #[default]
    FieldBegin,
    Plain,
    Quoted,
    /// After a quote within quotes: it closes the field, or is the first of two that mean one quote.
    QuoteInQuotes,
}

impl RecordScan {
    fn is_delimiter(&self, byte: u8) -> bool {
        match self.delimiter {
            Some(delimiter) => byte == delimiter,
            None => matches!(byte, b',' | b';' | b'\t' | b'|'),
        }
    }

    /// Scans the next bytes. Returns the number of them up to the record's end, with its line end; `None`: it is not
    /// here.
    pub fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, byte) in bytes.iter().enumerate() {
            self.place = match (self.place, byte) {
                (Place::FieldBegin | Place::QuoteInQuotes, b'"') => Place::Quoted,
                (Place::Quoted, b'"') => Place::QuoteInQuotes,
                (Place::Quoted, _) => Place::Quoted,
                (_, b'\n') => return Some(at + 1),
                (_, byte) if self.is_delimiter(*byte) => Place::FieldBegin,
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
            let found = record_end(text.as_bytes(), None).map(|end| &text[..end]);
            assert_eq!(found, first, "{text:?}");
            let mut scan = RecordScan::default();
            let found =
                (1..=text.len()).find(|end| scan.end(&text.as_bytes()[end - 1..*end]).is_some());
            assert_eq!(found.map(|end| &text[..end]), first, "{text:?} byte by byte");
        }
    }

    #[test]
    fn fault_33_a_quote_opens_a_field_after_the_delimiter_alone() {
        for (text, delimiter, first) in [
            ("2:\"x\n9:z\"\n3", b':', "2:\"x\n9:z\"\n"),
            ("1,a;\"b\n2,c\n", b',', "1,a;\"b\n"),
            ("1;\"a\n2;b\"\n", b';', "1;\"a\n2;b\"\n"),
        ] {
            let end = record_end(text.as_bytes(), Some(delimiter));
            assert_eq!(end.map(|end| &text[..end]), Some(first));
        }
    }
}
