//! Finds the values of variables in texts, in any encoding, so that they can be hidden.

use std::collections::BTreeSet;

use crate::secret::Secret;

/// Values of variables, which no message and no log may show. Servers and plugins may repeat what they received.
#[derive(Clone, Debug, Default)]
pub struct Values(Vec<Variable>);

/// Variable with its value.
#[derive(Clone, Debug)]
struct Variable {
    name: String,
    value: Secret,
    /// Texts to search for; see [`forms`].
    forms: Vec<Secret>,
}

/// A shorter value is hidden only inside quotes, because it may be a part of any word.
const HIDDEN_BYTES_MIN: usize = 6;

/// A longer value appears in no URL: servers refuse such URLs.
const URL_BYTES_MAX: usize = 16 << 10;

/// Bytes with which an encoded character can begin.
const ENCODED: [u8; 4] = *b"%+&\\";

/// Longest HTML entity of one character, in bytes.
const ENTITY_BYTES_MAX: usize = 10;

impl Values {
    /// Adds the value of a variable.
    pub fn add(&mut self, name: &str, value: &str) {
        let is_known = |known: &Variable| known.value.reveal() == value;
        if !value.is_empty() && !self.0.iter().any(is_known) {
            let forms = forms(value);
            self.0.push(Variable { name: name.to_owned(), value: Secret::new(value), forms });
            // Longest first: a value may be a part of another.
            self.0.sort_by_key(|variable| std::cmp::Reverse(variable.value.reveal().len()));
        }
    }

    /// Adds all values of another set.
    pub fn extend(&mut self, other: &Self) {
        for variable in &other.0 {
            self.add(&variable.name, variable.value.reveal());
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Replaces each value in a text with `${NAME}`.
    pub fn hide(&self, text: String) -> String {
        self.hide_in_quotes(self.hide_long(text, false))
    }

    /// Does the same for the beginning of a text, at whose end a value may have been cut.
    pub fn hide_beginning(&self, text: String) -> String {
        self.hide_in_quotes(self.hide_long(text, true))
    }

    /// Replaces the values of at least [`HIDDEN_BYTES_MIN`] bytes, in one pass, because `${NAME}` itself may contain a
    /// value.
    fn hide_long(&self, text: String, may_be_cut: bool) -> String {
        let forms: Vec<(&str, &str)> = (self.0.iter())
            .flat_map(|it| it.forms.iter().map(move |form| (it.name.as_str(), form.reveal())))
            .collect();
        if forms.is_empty() {
            return text;
        }
        let begins = begins(&forms);
        let bytes = text.as_bytes();
        let (mut hidden, mut kept, mut at) = (String::new(), 0, 0);
        while at < bytes.len() {
            if !begins[usize::from(bytes[at])] {
                at += 1;
                continue;
            }
            let rest = &bytes[at..];
            // Of several of the same length, the first counts: it belongs to the longest value.
            let shown = (forms.iter().rev())
                .filter_map(|(name, form)| Some((shown_length(rest, form, may_be_cut)?, *name)))
                .max_by_key(|(length, _)| *length);
            match shown {
                // Both ends are at character boundaries, because a value consists of whole characters.
                Some((length, name)) => {
                    hidden.push_str(&text[kept..at]);
                    hidden.push_str(&format!("${{{name}}}"));
                    at += length;
                    kept = at;
                }
                None => at += self.written_length(rest).unwrap_or(1),
            }
        }
        hidden.push_str(&text[kept..]);
        hidden
    }

    /// Returns the length of the `${NAME}` that a text begins with. The same text may pass here more than once.
    fn written_length(&self, text: &[u8]) -> Option<usize> {
        let after = text.strip_prefix(b"${")?;
        let mut names = self.0.iter().map(|variable| variable.name.as_bytes());
        let is_first =
            |name: &&[u8]| after.strip_prefix(*name).is_some_and(|rest| rest.starts_with(b"}"));
        names.find(is_first).map(|name| name.len() + 3)
    }

    /// Replaces the shorter values.
    fn hide_in_quotes(&self, text: String) -> String {
        let mut hidden = text;
        for Variable { name, value, .. } in &self.0 {
            let value = value.reveal();
            if value.len() >= HIDDEN_BYTES_MIN {
                continue;
            }
            for quote in ['"', '`', '\''] {
                let shown = format!("{quote}{value}{quote}");
                if hidden.contains(&shown) {
                    hidden = hidden.replace(&shown, &format!("{quote}${{{name}}}{quote}"));
                }
            }
        }
        hidden
    }
}

/// Returns the texts by which a value is found: as it is, as a message quotes it, and as a URL parser writes it in each
/// part of a URL (which turns a backslash in a path into a slash, resolves `..` and drops line ends). Each is also
/// returned in lower and upper case. [`shown_length`] finds them in any encoding. Texts shorter than
/// [`HIDDEN_BYTES_MIN`] are left out.
fn forms(value: &str) -> Vec<Secret> {
    if value.len() < HIDDEN_BYTES_MIN {
        return Vec::new();
    }
    let quoted = format!("{value:?}");
    let mut forms =
        vec![value.to_owned(), value.trim().to_owned(), quoted[1..quoted.len() - 1].to_owned()];
    if value.len() <= URL_BYTES_MAX {
        for (before, after) in
            [("http://h/", ""), ("http://h/?", ""), ("http://h/#", ""), ("http://", "@h/")]
        {
            let url = url::Url::parse(&format!("{before}{value}{after}"));
            let url = url.map(String::from).unwrap_or_default();
            let form = url.strip_prefix(before).and_then(|form| form.strip_suffix(after));
            forms.extend(form.map(percent_decoded));
        }
    }
    let cased: Vec<String> = (forms.iter())
        .flat_map(|form| [form.to_ascii_lowercase(), form.to_ascii_uppercase()])
        .collect();
    forms.extend(cased);
    let mut known = BTreeSet::new();
    forms.retain(|form| form.len() >= HIDDEN_BYTES_MIN && known.insert(form.clone()));
    forms.into_iter().map(Secret::new).collect()
}

/// Returns the bytes with which a form, or `${NAME}`, can begin in a text.
fn begins(forms: &[(&str, &str)]) -> [bool; 256] {
    let mut begins = [false; 256];
    begins[usize::from(b'$')] = true;
    for byte in ENCODED {
        begins[usize::from(byte)] = true;
    }
    for first in forms.iter().filter_map(|(_, form)| form.as_bytes().first()) {
        begins[usize::from(*first)] = true;
    }
    begins
}

/// Returns the length of this form at the beginning of a text, in any mix of encodings; `None` if the text begins with
/// something else. A text that `may_be_cut` may end inside the form, after [`HIDDEN_BYTES_MIN`] of its bytes.
fn shown_length(text: &[u8], form: &str, may_be_cut: bool) -> Option<usize> {
    // This ends most searches early.
    let first = text.first()?;
    if !ENCODED.contains(first) && form.as_bytes().first() != Some(first) {
        return None;
    }
    // One character can have encodings of several lengths, of which one is the beginning of the other: a backslash is
    // one byte, or two if escaped. So all possible ends are followed.
    let mut ends = vec![0_usize];
    for (place, c) in form.char_indices() {
        let mut next = Vec::new();
        for end in ends {
            let rest = &text[end..];
            if may_be_cut && place >= HIDDEN_BYTES_MIN && is_cut(rest) {
                return Some(text.len());
            }
            each_shown_length(rest, c, |length| {
                if !next.contains(&(end + length)) {
                    next.push(end + length);
                }
            });
        }
        if next.is_empty() {
            return None;
        }
        ends = next;
    }
    ends.into_iter().max()
}

/// Calls `found` with the length of each encoding of a character that this text begins with: the character itself,
/// percent-encoding, an HTML entity, or an escape in a JSON string, once or twice.
fn each_shown_length(text: &[u8], c: char, mut found: impl FnMut(usize)) {
    let mut buffer = [0; 4];
    let plain = c.encode_utf8(&mut buffer).as_bytes();
    if text.starts_with(plain) {
        found(plain.len());
    }
    let is_encoded = |(place, byte): (usize, &u8)| {
        text.get(3 * place..).and_then(percent_byte).is_some_and(|found| found == *byte)
    };
    if plain.iter().enumerate().all(is_encoded) {
        found(3 * plain.len());
    }
    if c == ' ' && text.starts_with(b"+") {
        found(1);
    }
    if let Some((_, length)) = entity(text).filter(|(shown, _)| *shown == c) {
        found(length);
    }
    // Four backslashes: escaped twice. A quote then has three before it.
    let backslashes = text.iter().take(5).take_while(|byte| **byte == b'\\').count();
    if c == '\\' {
        for length in [2, 4] {
            if backslashes >= length {
                found(length);
            }
        }
    }
    if (1..=3).contains(&backslashes) {
        let after = text.get(backslashes).copied();
        let escaped = match c {
            '"' | '\'' | '/' => u8::try_from(c).ok(),
            '\n' => Some(b'n'),
            '\r' => Some(b'r'),
            '\t' => Some(b't'),
            _ => None,
        };
        if after.is_some() && after == escaped {
            found(backslashes + 1);
        }
        if let Some(length) = code_units_length(text, backslashes, c) {
            found(length);
        }
    }
}

/// Returns the length of a character's JSON escape: one `\u0041`, or two for a surrogate pair, each with this number of
/// backslashes.
fn code_units_length(text: &[u8], backslashes: usize, c: char) -> Option<usize> {
    let mut buffer = [0; 2];
    let mut at = 0;
    for unit in c.encode_utf16(&mut buffer).iter() {
        let (slashes, rest) = text.get(at..)?.split_at_checked(backslashes)?;
        let digits = rest.strip_prefix(b"u")?.get(..4)?;
        let shown = u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        if shown != *unit || slashes.iter().any(|byte| *byte != b'\\') {
            return None;
        }
        at += backslashes + 5;
    }
    Some(at)
}

/// Returns the character of the HTML entity that a text begins with, and the length of the entity.
fn entity(text: &[u8]) -> Option<(char, usize)> {
    let inside = text.strip_prefix(b"&")?;
    let end = inside.iter().take(ENTITY_BYTES_MAX).position(|byte| *byte == b';')?;
    let name = std::str::from_utf8(&inside[..end]).ok()?.to_ascii_lowercase();
    let c = match name.as_str() {
        "quot" => '"',
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "apos" => '\'',
        _ => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix('x') {
                Some(digits) => u32::from_str_radix(digits, 16).ok()?,
                None => number.parse().ok()?,
            };
            char::from_u32(code)?
        }
    };
    Some((c, end + 2))
}

/// Whether a text ends here, possibly inside an encoded character.
fn is_cut(rest: &[u8]) -> bool {
    let is_inside = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(*byte, b'#' | b'\\');
    match rest {
        [] | [b'%'] | [b'%', _] => true,
        [b'&' | b'\\', more @ ..] => more.len() < ENTITY_BYTES_MAX && more.iter().all(is_inside),
        // A character that was cut, after a lossy conversion to UTF-8.
        _ => rest == "\u{fffd}".as_bytes(),
    }
}

/// Decodes percent-encoding. Returns the text unchanged if the result is not UTF-8.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut plain, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let encoded = percent_byte(&bytes[at..]);
        plain.push(encoded.unwrap_or(bytes[at]));
        at += if encoded.is_some() { 3 } else { 1 };
    }
    String::from_utf8(plain).unwrap_or_else(|_| text.to_owned())
}

/// Returns the byte whose percent-encoding a text begins with.
fn percent_byte(text: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = text else { return None };
    let digit = |digit: &u8| char::from(*digit).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_17_messages_hide_values_also_as_they_are_quoted() {
        let mut values = Values::default();
        values.add("LONG", "hunter2\"x");
        values.add("SHORT", "on");
        for (message, expected) in [
            ("\"hunter2\\\"x\" is not valid", "\"${LONG}\" is not valid"),
            ("hunter2\"x", "${LONG}"),
            ("one \"on\" on", "one \"${SHORT}\" on"),
        ] {
            assert_eq!(values.hide(message.into()), expected);
        }
    }

    #[test]
    fn wall_17_values_are_hidden_as_a_url_has_them_and_where_a_text_was_cut() {
        let mut values = Values::default();
        values.add("KEY", "a b/c+ü%41");
        for (message, expected) in [
            ("/x?k=a%20b%2fc%2B%C3%BC%2541&d", "/x?k=${KEY}&d"),
            ("/x?k=a+b%2Fc%2b%c3%bc%2541", "/x?k=${KEY}"),
            ("ü a b/c+ü%41 ü", "ü ${KEY} ü"),
            ("50 % of a b + c %", "50 % of a b + c %"),
            ("a%20b%2", "a%20b%2"),
        ] {
            assert_eq!(values.hide(message.into()), expected);
        }
        for (message, expected) in [
            ("said a b/c+ü", "said ${KEY}"),
            ("said a b/", "said a b/"),
            ("a b/c+ü%41, a b/c+", "${KEY}, ${KEY}"),
        ] {
            assert_eq!(values.hide_beginning(message.into()), expected);
        }
    }

    #[test]
    fn wall_17_values_are_hidden_as_a_server_may_encode_them() {
        let mut values = Values::default();
        values.add("PATH", "back\\slash9secret");
        values.add("QUERY", "quo\"te\\back9");
        values.add("MARKS", "<a&b>'c\"");
        values.add("UP", "x/../Up\nper/ö🚗");
        for (message, expected) in [
            // As a URL parser writes them.
            ("/p/back/slash9secret/x?k=back\\slash9secret", "/p/${PATH}/x?k=${PATH}"),
            ("/p/quo%22te/back9/x?k=quo%22te\\back9", "/p/${QUERY}/x?k=${QUERY}"),
            ("/p/quo\"te/back9/x", "/p/${QUERY}/x"),
            ("/p/Upper/%C3%B6%F0%9F%9A%97?", "/p/${UP}?"),
            // Escaped in JSON, once and twice.
            ("{\"k\":\"quo%22te\\\\back9\"}", "{\"k\":\"${QUERY}\"}"),
            ("quo\\\"te\\\\back9", "${QUERY}"),
            ("quo\\\\\\\"te\\\\\\\\back9", "${QUERY}"),
            ("\\u003ca\\u0026b\\u003E\\u0027c\\\"!", "${MARKS}!"),
            ("\\\\u003ca&b>'c\\\\\\\"!", "${MARKS}!"),
            ("x\\/..\\/Up\\nper\\/\\u00f6\\ud83d\\ude97", "${UP}"),
            // In HTML.
            ("&lt;a&amp;b&gt;&#39;c&quot;", "${MARKS}"),
            ("&lt;a&amp;b&gt;&#x27;c&#34;", "${MARKS}"),
            ("&LT;A&AMP;B&GT;&#X27;C&QUOT;", "${MARKS}"),
            // In another case.
            ("back/slash9secret BACK%5CSLASH9SECRET", "${PATH} ${PATH}"),
            // Other texts.
            ("Back/Slash9Secret back slash9secret", "Back/Slash9Secret back slash9secret"),
            ("quo\\te\\back9 % & \\ + ü", "quo\\te\\back9 % & \\ + ü"),
        ] {
            let hidden = values.hide(message.into());
            assert_eq!(hidden, expected, "{message}");
            assert_eq!(values.hide(hidden), expected, "a second time: {message}");
        }
        for (message, expected) in [
            ("said back/slash9se", "said ${PATH}"),
            ("said quo%22te\\\\", "said ${QUERY}"),
            ("said quo%22te%5", "said ${QUERY}"),
            ("said back/", "said back/"),
        ] {
            assert_eq!(values.hide_beginning(message.into()), expected, "{message}");
        }
    }

    #[test]
    fn wall_17_a_name_that_is_like_a_value_stays_a_name() {
        let mut values = Values::default();
        values.add("SECRET", "secret");
        values.add("OTHER", "{secret}");
        let hidden = values.hide("a secret, A SECRET, ${SECRET}, {secret}".into());
        assert_eq!(hidden, "a ${SECRET}, A ${SECRET}, ${SECRET}, ${OTHER}");
        assert_eq!(values.hide(hidden.clone()), hidden);
    }

    #[test]
    fn wall_17_the_forms_of_a_value_are_bounded() {
        let long = "a\\\"<B>".repeat(URL_BYTES_MAX);
        for value in ["back\\slash9secret", "a/../b\\c?d=e#f@g:h", &long] {
            let forms = forms(value);
            assert!(forms.len() <= 21, "{} forms", forms.len());
            let bytes_max = 8 * value.len();
            assert!(forms.iter().all(|form| form.reveal().len() <= bytes_max));
            assert!(forms.iter().all(|form| form.reveal().len() >= HIDDEN_BYTES_MIN));
        }
        assert!(forms("short").is_empty());
        assert_eq!(forms("123456").len(), 1);
    }
}
