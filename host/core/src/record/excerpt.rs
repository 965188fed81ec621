//! Texts of plugins for people, bounded: one may be as long as the plugin's memory.

use crate::escape::QUOTED_BYTES_MAX;

/// The text's first 8 KiB; what is no UTF-8 is replaced. A cut text ends with its whole length.
pub fn excerpt(text: &[u8]) -> String {
    shortened(text, QUOTED_BYTES_MAX)
}

/// The same with the text's first `bytes_max` bytes.
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
