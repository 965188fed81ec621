//! The keys of the streams that redrives are: by them the rest of the state tells letters from records.

/// What the ARN of such a stream begins with.
pub(super) const ARN_PREFIX: &str = "letters:";
/// What the keys of such streams look like, as SQLite's GLOB has it.
pub(super) const REDRIVES: &str = "letters:*";

/// Whether a stream's key is that of a redrive's letters.
pub(super) fn is_redrive_key(key: &str) -> bool {
    key.starts_with(ARN_PREFIX)
}

/// The number of the redrive that such a key is of.
pub(super) fn redrive_of(key: &str) -> Option<i64> {
    key.rsplit_once('@')?.1.parse().ok()
}
