//! Fast path for rows of one form. Most plugins write the same columns in the same order, with plain values. Then the
//! text before each value is known, and values are found without parsing.
//!
//! Invariant: a row that is read here gives the same values as serde_json, which reads all other rows.

use super::value::RawJson;
use super::{ColumnNames, Slots};

/// Form of rows, as learned from earlier ones.
#[derive(Debug, Default)]
pub struct RowForm {
    /// Text before each value, such as `,"make":`, and the place of its column.
    fields: Vec<(String, usize)>,
    /// Order of the columns in the last row that serde_json read.
    seen: Vec<usize>,
}

impl RowForm {
    /// Reads a row that has this form. Returns false if it has another; some slots may be filled then.
    pub(super) fn read<'a>(&self, row: &'a str, slots: &mut Slots<'a>) -> bool {
        let mut rest = row;
        for (before, place) in &self.fields {
            let Some(after) = rest.strip_prefix(before.as_str()) else { return false };
            let Some(length) = plain_value(after.as_bytes()) else { return false };
            let (value, after) = after.split_at(length);
            slots[*place] = Some(RawJson::known(value));
            rest = after;
        }
        !self.fields.is_empty() && rest == "}"
    }

    /// Iterates over the fields of the form: the text before each value, and the place of its column.
    pub fn fields(&self) -> impl Iterator<Item = (&str, usize)> {
        self.fields.iter().map(|(before, place)| (before.as_str(), *place))
    }

    /// Notes the order of columns in a row. If two rows in succession have the same order, it becomes the form. Where
    /// rows differ from each other, learning each one would cost more than it saves.
    pub(super) fn saw(&mut self, order: Vec<usize>, columns: &ColumnNames) {
        if order != self.seen {
            self.seen = order;
            return;
        }
        let before = |(index, place): (usize, &usize)| {
            let opens = if index == 0 { '{' } else { ',' };
            // Writing a text as JSON does not fail.
            let name = serde_json::to_string(columns.name(*place)).unwrap_or_default();
            (format!("{opens}{name}:"), *place)
        };
        self.fields = order.iter().enumerate().map(before).collect();
    }
}

/// Reads an integer in its usual form at the beginning of a text (an optional minus sign, then 1 to 18 digits without
/// leading zeros), and returns it with its length. It is the whole value only if a comma or brace follows. `None`:
/// another value.
#[inline]
pub fn leading_integer(text: &[u8]) -> Option<(i64, usize)> {
    let sign = usize::from(*text.first()? == b'-');
    let (mut value, mut at) = (0_i64, sign);
    while let Some(digit) = text.get(at).map(|byte| byte.wrapping_sub(b'0')).filter(|it| *it < 10) {
        if at - sign == 18 {
            return None;
        }
        value = value * 10 + i64::from(digit);
        at += 1;
    }
    let digits = at - sign;
    let is_whole = digits == 1 || (digits > 1 && text[sign] != b'0');
    is_whole.then_some((if sign == 1 { -value } else { value }, at))
}

/// Returns an ASCII string without escapes at the beginning of a text, without its quotation marks. `None`: another
/// value.
#[inline]
pub fn leading_ascii(text: &[u8]) -> Option<&[u8]> {
    let inside = text.strip_prefix(b"\"")?;
    let end = inside.iter().position(|byte| matches!(byte, b'"' | b'\\' | ..b' ' | 0x80..))?;
    (inside[end] == b'"').then(|| &inside[..end])
}

/// Returns any plain value at the beginning of a text. `None`: it is not plain, or not a value.
pub fn leading_value(text: &[u8]) -> Option<RawJson<'_>> {
    let value = &text[..plain_value(text)?];
    std::str::from_utf8(value).ok().map(RawJson::known)
}

/// Returns the length of the value at the beginning, if it is plain: a number without exponent, a string without
/// escapes, `true`, `false` or `null`. `None`: it is not plain, or not a value.
fn plain_value(text: &[u8]) -> Option<usize> {
    match text.first()? {
        b'"' => {
            let end = text[1..].iter().position(|byte| matches!(byte, b'"' | b'\\' | ..b' '))?;
            (text[1 + end] == b'"').then_some(end + 2)
        }
        b't' => text.starts_with(b"true").then_some(4),
        b'f' => text.starts_with(b"false").then_some(5),
        b'n' => text.starts_with(b"null").then_some(4),
        b'-' => number(&text[1..]).map(|length| length + 1),
        _ => number(text),
    }
}

/// Returns the length of a number without sign and exponent.
fn number(text: &[u8]) -> Option<usize> {
    let whole = digits(text);
    if whole == 0 || (whole > 1 && text[0] == b'0') {
        return None;
    }
    match text.get(whole)? {
        b'.' => match digits(&text[whole + 1..]) {
            0 => None,
            fraction if matches!(text.get(whole + 1 + fraction), Some(b'e' | b'E')) => None,
            fraction => Some(whole + 1 + fraction),
        },
        b'e' | b'E' => None,
        _ => Some(whole),
    }
}

fn digits(text: &[u8]) -> usize {
    text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::super::spread;
    use super::*;

    fn columns() -> ColumnNames {
        ColumnNames::new(["id", "make \"x\"", "cents", "at"].map(String::from))
    }

    /// Values that are read here, values that only serde_json reads, and texts that are not values.
    const VALUES: [&str; 33] = [
        "0",
        "7",
        "-1",
        "10",
        "01",
        "-",
        "-0",
        "1.5",
        "0.50",
        "1.",
        ".5",
        "1e3",
        "1.5E-3",
        "1.5e",
        "9223372036854775808",
        "true",
        "false",
        "null",
        "tru",
        "nulls",
        "\"\"",
        "\"Honda\"",
        "\"a b\"",
        "\"Škoda 🚗\"",
        "\"\\u00e9\"",
        "\"a\\\"b\"",
        "\"a\nb\"",
        "\"open",
        "[1,2]",
        "{\"a\":\"}\"}",
        " 1",
        "1 ",
        "",
    ];

    fn row(random: &mut fastrand::Rng) -> String {
        let names =
            ["\"id\"", "\"make \\\"x\\\"\"", "\"cents\"", "\"at\"", "\"\\u0069d\"", "\"none\""];
        let mut fields = Vec::new();
        let mut order: Vec<usize> = (0..4).collect();
        if random.u8(..10) == 0 {
            random.shuffle(&mut order);
            order.truncate(random.usize(..5));
        }
        for place in order {
            let name = if random.u8(..60) == 0 {
                *random.choice(&names).expect("some")
            } else {
                names[place]
            };
            let common = random.u8(..20) > 0;
            let value = if common {
                ["12", "\"Honda\"", "-3.25", "null"][place]
            } else {
                random.choice(VALUES).expect("some")
            };
            fields.push(format!("{name}:{value}"));
        }
        let end = if random.u8(..40) == 0 {
            *random.choice(&["", "} ", "}}", ",}"]).expect("some")
        } else {
            "}"
        };
        format!("{{{}{end}", fields.join(","))
    }

    #[test]
    fn rows_of_the_form_are_read_as_serde_json_reads_them() {
        let columns = columns();
        let (mut by_form, mut total) = (0, 0);
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut form = RowForm::default();
            for _ in 0..200 {
                let row = row(&mut random);
                let (mut slots, mut expected) = (vec![None; 4], vec![None; 4]);
                if form.read(&row, &mut slots) {
                    by_form += 1;
                }
                total += 1;
                let read = spread(row.as_bytes(), &columns, &mut form, &mut slots);
                let rule = spread(row.as_bytes(), &columns, &mut RowForm::default(), &mut expected);
                assert_eq!(read, rule, "seed {seed}: {row}");
                if rule.is_ok() {
                    assert_eq!(slots, expected, "seed {seed}: {row}");
                }
            }
        }
        assert!(by_form * 2 > total, "{by_form} of {total} rows");
    }
}
