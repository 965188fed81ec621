//! Shortens texts of plugins for people: a plugin can return a text as long as its memory.

use crate::escape::QUOTED_BYTES_MAX;

/// Returns the first 8 KiB of the text. Invalid UTF-8 is replaced. A text that was cut ends with its whole length.
pub fn excerpt(text: &[u8]) -> String {
    shortened(text, QUOTED_BYTES_MAX)
}

/// Returns the first `bytes_max` bytes of the text, in the same way.
pub fn shortened(text: &[u8], bytes_max: usize) -> String {
    let mut kept = String::from_utf8_lossy(&text[..text.len().min(bytes_max)]).into_owned();
    if text.len() > bytes_max {
        // The cut may have gone through a character.
        kept.truncate(kept.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
        kept.push_str(&format!("… ({} bytes in all)", text.len()));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_text_is_whole_and_a_long_one_is_cut() {
        assert_eq!(excerpt(b"why"), "why");
        assert_eq!(excerpt(b"\xff"), "\u{fffd}");
        let long = excerpt("xä".repeat(QUOTED_BYTES_MAX).as_bytes());
        assert!(long.len() < QUOTED_BYTES_MAX + 64 && !long.contains('\u{fffd}'), "{long}");
        assert!(long.ends_with("… (24576 bytes in all)"), "{long}");
    }
}
