//! The encoding of `lookup.get`: keys as a plugin passes them, and rows as it gets them.

use std::sync::Arc;

/// Maximum number of keys in one call: more than any batch has, and few enough to keep in memory.
pub(crate) const KEYS_PER_CALL_MAX: usize = 100_000;
/// Maximum length of a key, in bytes: longer than what a database index takes.
pub const KEY_BYTES_MAX: usize = 8 << 10;
/// Maximum size of all keys of a call. Their spans may overlap, so it can exceed the length of the arena.
pub(crate) const KEYS_BYTES_MAX: usize = 8 << 20;

/// The words for "no row".
const NONE: [u32; 2] = [u32::MAX, 0];

/// Keys that cannot be looked up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum BadKeys {
    #[error("expected two words for each key, found {0} words in all")]
    Odd(usize),
    #[error(
        "a call asked for {0} keys, over the limit of {KEYS_PER_CALL_MAX}: ask in several calls"
    )]
    TooMany(usize),
    #[error("key {key} has {bytes} bytes, over the limit of {KEY_BYTES_MAX}")]
    TooLong { key: usize, bytes: u32 },
    #[error(
        "the keys of a call have more than {KEYS_BYTES_MAX} bytes together: ask in several calls"
    )]
    TooLarge,
    #[error("key {key} ends at byte {end} of an arena of {arena} bytes")]
    OutOfArena { key: usize, end: u64, arena: usize },
    #[error("key {0} is not valid UTF-8")]
    NotText(usize),
}

impl BadKeys {
    /// Whether they are only too many or too long: the plugin gets an error. Anything else breaks the contract of
    /// `lookup.get` and is a trap.
    pub(crate) fn is_excess(&self) -> bool {
        matches!(self, Self::TooMany(_) | Self::TooLong { .. } | Self::TooLarge)
    }
}

/// The rows do not fit into an answer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the rows take more than {bytes_max} bytes, the limit of one answer: ask for fewer keys")]
pub struct TooLarge {
    bytes_max: usize,
}

/// Reads the keys that a plugin asks for: two words per key, the span of its text in `arena`. The words may lie in
/// the plugin's memory, in its byte order.
///
/// Number and lengths are checked before any key is read. Overlapping spans could name the whole arena 100,000
/// times, and only reading that would take minutes.
///
/// # Errors
/// [`BadKeys`] if the words are not valid keys, or too many.
pub fn keys<'a>(arena: &'a [u8], words: &[u32]) -> Result<Vec<&'a str>, BadKeys> {
    let (spans, []) = words.as_chunks::<2>() else { return Err(BadKeys::Odd(words.len())) };
    if spans.len() > KEYS_PER_CALL_MAX {
        return Err(BadKeys::TooMany(spans.len()));
    }
    let words = |[start, length]: &[u32; 2]| (u32::from_le(*start), u32::from_le(*length));
    let mut bytes_in_all = 0;
    for (key, span) in spans.iter().enumerate() {
        let (_, bytes) = words(span);
        if bytes as usize > KEY_BYTES_MAX {
            return Err(BadKeys::TooLong { key, bytes });
        }
        bytes_in_all += bytes as usize;
        if bytes_in_all > KEYS_BYTES_MAX {
            return Err(BadKeys::TooLarge);
        }
    }
    let text = |(key, span): (usize, &[u32; 2])| {
        let (start, length) = words(span);
        let end = u64::from(start) + u64::from(length);
        let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
        let bytes = range.and_then(|(start, end)| arena.get(start..end));
        let bytes = bytes.ok_or(BadKeys::OutOfArena { key, end, arena: arena.len() })?;
        std::str::from_utf8(bytes).map_err(|_| BadKeys::NotText(key))
    };
    spans.iter().enumerate().map(text).collect()
}

/// Encodes rows for a plugin: an arena, and two words per key. `bytes_max`, at most 4 GiB, limits the arena: a
/// plugin may ask for one large row many times.
///
/// # Errors
/// [`TooLarge`] if they take more.
pub fn found(rows: &[Option<Arc<str>>], bytes_max: usize) -> Result<(Vec<u8>, Vec<u32>), TooLarge> {
    let bytes_max = bytes_max.min(u32::MAX as usize);
    let bytes = rows.iter().flatten().map(|row| row.len()).fold(0_usize, usize::saturating_add);
    if bytes > bytes_max {
        return Err(TooLarge { bytes_max });
    }
    let mut arena = Vec::with_capacity(bytes);
    let mut words = Vec::with_capacity(rows.len() * 2);
    for row in rows {
        // The casts are lossless: the arena has at most `u32::MAX` bytes.
        words.extend(row.as_ref().map_or(NONE, |row| [arena.len() as u32, row.len() as u32]));
        arena.extend_from_slice(row.as_ref().map_or(&[], |row| row.as_bytes()));
    }
    Ok((arena, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_become_texts_or_are_refused() {
        let arena = "añb".as_bytes();
        assert_eq!(keys(arena, &[0, 1, 1, 2, 3, 1, 4, 0]), Ok(vec!["a", "ñ", "b", ""]));
        assert_eq!(keys(arena, &[]), Ok(vec![]));
        assert_eq!(keys(arena, &[0]), Err(BadKeys::Odd(1)));
        assert_eq!(keys(arena, &[0, 1, 1, 1]), Err(BadKeys::NotText(1)));
        for span in [[0, 5], [4, 1], [5, 0], [u32::MAX, 0], [u32::MAX, 8192]] {
            let end = u64::from(span[0]) + u64::from(span[1]);
            assert_eq!(keys(arena, &span), Err(BadKeys::OutOfArena { key: 0, end, arena: 4 }));
        }
        let many = vec![0; 2 * KEYS_PER_CALL_MAX + 2];
        assert_eq!(keys(arena, &many), Err(BadKeys::TooMany(KEYS_PER_CALL_MAX + 1)));
    }

    #[test]
    fn wall_06_keys_are_bounded_before_they_are_read() {
        // Not text: if any of it were read, the error would say so.
        let arena = vec![0xff; 64 << 20];
        let span = |bytes: usize| [0, bytes as u32];
        let many = |bytes: usize, count: usize| vec![span(bytes); count].concat();
        let too_long = BadKeys::TooLong { key: 0, bytes: 8193 };
        assert_eq!(keys(&arena, &span(KEY_BYTES_MAX + 1)), Err(too_long));
        assert_eq!(keys(&arena, &many(KEY_BYTES_MAX, 1_025)), Err(BadKeys::TooLarge));
        assert_eq!(keys(&arena, &many(84, KEYS_PER_CALL_MAX)), Err(BadKeys::TooLarge));
        assert_eq!(keys(&arena, &many(KEY_BYTES_MAX, 1_024)), Err(BadKeys::NotText(0)));
        let text = vec![b'x'; KEY_BYTES_MAX];
        let found = keys(&text, &many(KEY_BYTES_MAX, 1_024)).expect("as many as may be");
        assert_eq!(found.len(), 1_024);
        for (bad, is_excess) in [
            (BadKeys::TooLarge, true),
            (BadKeys::TooMany(1), true),
            (BadKeys::TooLong { key: 0, bytes: 1 }, true),
            (BadKeys::Odd(1), false),
            (BadKeys::NotText(0), false),
            (BadKeys::OutOfArena { key: 0, end: 1, arena: 0 }, false),
        ] {
            assert_eq!(bad.is_excess(), is_excess, "{bad}");
        }
    }

    #[test]
    fn rows_become_spans_that_give_them_back() {
        let rows: Vec<Option<Arc<str>>> =
            vec![Some("{\"a\":1}".into()), None, Some("".into()), Some("{}".into())];
        let (arena, words) = found(&rows, 9).expect("9 bytes");
        assert_eq!(words, [0, 7, u32::MAX, 0, 7, 0, 7, 2]);
        assert_eq!(keys(&arena, &[0, 7, 7, 0, 7, 2]), Ok(vec!["{\"a\":1}", "", "{}"]));
        assert_eq!(found(&rows, 8), Err(TooLarge { bytes_max: 8 }));
    }
}
