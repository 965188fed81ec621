//! Keys of the streams of redrives. By them, the rest of the state distinguishes dead letters from records.

/// Prefix of the ARN of such a stream.
pub(super) const ARN_PREFIX: &str = "letters:";
/// Pattern that matches the keys of such streams, for GLOB in SQLite.
pub(super) const REDRIVES: &str = "letters:*";

/// Whether this is the key of a redrive's stream.
pub(super) fn is_redrive_key(key: &str) -> bool {
    key.starts_with(ARN_PREFIX)
}

/// Returns the number of the redrive with this key.
pub(super) fn redrive_of(key: &str) -> Option<i64> {
    key.rsplit_once('@')?.1.parse().ok()
}
