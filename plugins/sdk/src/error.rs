//! Error of a plugin that cannot process a record or a batch.

use std::fmt::{self, Display, Write};

/// Reason why a record was not processed.
///
/// `?` converts any standard error to a rejection, with its causes joined by `: `. Therefore this type itself
/// does not implement [`std::error::Error`].
#[derive(Debug)]
pub struct Error {
    pub(crate) retryable: bool,
    /// The index of the culprit in its batch, if known.
    pub(crate) input: Option<u32>,
    pub(crate) message: String,
}

impl Error {
    /// The record can never be processed: it is dead-lettered with this reason, which
    /// should say what was expected and what was found.
    pub fn reject(reason: impl Display) -> Self {
        Self { retryable: false, input: None, message: reason.to_string() }
    }

    /// The record may be processed later: the host pauses, then repeats the batch.
    pub fn retry(reason: impl Display) -> Self {
        Self { retryable: true, input: None, message: reason.to_string() }
    }

    /// Prepends what was being done: `context: reason`.
    #[must_use]
    pub fn context(mut self, context: impl Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl<E: std::error::Error> From<E> for Error {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            // Writing to a String cannot fail.
            let _ = write!(message, ": {error}");
            cause = error.source();
        }
        Self { retryable: false, input: None, message }
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
