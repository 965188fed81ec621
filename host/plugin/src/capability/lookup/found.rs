//! Collects the rows of a query by the keys that asked for them.

use std::collections::HashMap;
use std::sync::Arc;

use super::LookupError;

/// Maximum size of the rows of one call: as much as a stage may return by default.
pub(super) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The rows found so far.
pub(super) struct FoundRows {
    rows: HashMap<Arc<str>, Arc<str>>,
    bytes: usize,
    bytes_max: usize,
    unrequested: Option<String>,
}

impl Default for FoundRows {
    fn default() -> Self {
        Self::within(ANSWER_BYTES_MAX)
    }
}

impl FoundRows {
    /// Creates an empty set of rows with at most `bytes_max` bytes together.
    pub(super) fn within(bytes_max: usize) -> Self {
        Self { rows: HashMap::new(), bytes: 0, bytes_max, unrequested: None }
    }

    /// Counts the bytes that earlier queries of the same call have found.
    pub(super) fn after(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// Returns the bytes of all rows that the call has found so far.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a row for all keys that mean it. Of several rows for one key, the first counts.
    pub(super) fn add(&mut self, keys: &[Arc<str>], row: &str) -> Result<(), LookupError> {
        let is_new = keys.iter().any(|key| !self.rows.contains_key(key));
        if !is_new {
            return Ok(());
        }
        self.bytes += row.len();
        if self.bytes > self.bytes_max {
            return Err(LookupError::lasting(format!(
                "the rows of one call take more than {} bytes: name fewer columns \
                 in the query, or ask for fewer keys",
                self.bytes_max
            )));
        }
        let row: Arc<str> = row.into();
        for key in keys {
            self.rows.entry(Arc::clone(key)).or_insert_with(|| Arc::clone(&row));
        }
        Ok(())
    }

    /// Notes a row of a key that nobody asked for.
    pub(super) fn add_unrequested(&mut self, key: &str) {
        self.unrequested.get_or_insert_with(|| key.chars().take(64).collect());
    }

    /// Returns the first key of a row that nobody asked for, cut to 64 characters.
    pub(super) fn first_unrequested(&self) -> Option<&str> {
        self.unrequested.as_deref()
    }

    pub(super) fn into_rows(self) -> HashMap<Arc<str>, Arc<str>> {
        self.rows
    }
}

/// The requested keys, grouped by what they mean to the table: `7` and `007` are the same number.
pub(super) struct Asked<M> {
    keys: HashMap<M, Vec<Arc<str>>>,
}

impl<M: Eq + std::hash::Hash> Asked<M> {
    /// Groups keys by `meaning`; a key without one cannot have a row.
    pub(super) fn new(keys: &[Arc<str>], meaning: impl Fn(&str) -> Option<M>) -> Self {
        let mut asked: HashMap<M, Vec<Arc<str>>> = HashMap::with_capacity(keys.len());
        for key in keys {
            if let Some(meaning) = meaning(key) {
                asked.entry(meaning).or_default().push(Arc::clone(key));
            }
        }
        Self { keys: asked }
    }

    pub(super) fn meanings(&self) -> impl Iterator<Item = &M> {
        self.keys.keys()
    }

    pub(super) fn keys<Q>(&self, meaning: &Q) -> Option<&[Arc<str>]>
    where
        M: std::borrow::Borrow<Q>,
        Q: Eq + std::hash::Hash + ?Sized,
    {
        self.keys.get(meaning).map(Vec::as_slice)
    }
}
