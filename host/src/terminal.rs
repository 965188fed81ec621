//! Strangers' texts on a terminal: what records and plugins say must not steer it.

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
