//! The capability `lookup`: rows of reference tables, by key.
//!
//! [`Lookup::get`] answers from [`cache`] what is known. It fetches the rest from [`postgres`] or [`sqlite`], one
//! query at a time, and keeps it. [`words`] defines how keys and rows cross the boundary to the plugin.
//!
//! A row is a JSON object of the columns after the key, in their order, with values as sinks take them: numbers
//! exact, times in ISO 8601, bytes in base64, SQL's NULL as null.
//!
//! A lookup never blames a record for a table: a server that is down, a query that does not fit the table, or a
//! timeout is a retryable failure of the batch. Only errors that depend on the keys or on the rows found are final.

mod cache;
mod found;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod postgres;
mod sqlite;
pub mod words;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool::managed::PoolError;
use tokio::runtime::Handle;

use self::cache::{Cache, CachedRow};
use self::found::{ANSWER_BYTES_MAX, FoundRows};
use self::postgres::PostgresTable;
use self::sqlite::SqliteTable;
use shardmill_config::{LookupConfig, LookupSource};
use shardmill_core::log_throttle::LogThrottle;
use shardmill_core::metric;
use shardmill_core::off_thread;
use shardmill_core::record::LookupName;

/// Minimum interval between warnings that the query returns rows nobody asked for: a plugin may ask any number of
/// times.
const UNREQUESTED_LOGGED_EVERY: Duration = Duration::from_secs(60);

/// A reference table, shared by all lanes of a pipeline.
pub struct Lookup {
    name: LookupName,
    timeout: Duration,
    cache: Cache,
    table: Table,
    runtime: Handle,
    /// Limits the warnings about rows that nobody asked for.
    unrequested_lines: Mutex<LogThrottle>,
}

/// The source of the rows.
enum Table {
    Postgres(Box<PostgresTable>),
    Sqlite(Arc<SqliteTable>),
}

/// A lookup that could not be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LookupError {
    /// Whether the same question may be answered later.
    pub retryable: bool,
    /// Reason, with the name of the lookup, in one line without secrets.
    pub message: String,
}

impl LookupError {
    fn retryable(message: impl Into<String>) -> Self {
        Self { retryable: true, message: message.into() }
    }

    fn lasting(message: impl Into<String>) -> Self {
        Self { retryable: false, message: message.into() }
    }
}

impl Lookup {
    /// Creates a lookup from its configuration. Nothing is connected or opened yet. Its connections will live on
    /// `runtime`, which must drive time and the network.
    ///
    /// # Errors
    /// The connection string is invalid or asks for something unsupported.
    pub fn new(config: &LookupConfig, runtime: Handle) -> Result<Self, LookupError> {
        let (query, timeout) = (config.query.value.as_str(), config.timeout);
        let table = match &config.source {
            LookupSource::Postgres(url) => PostgresTable::new(url.reveal(), query, timeout)
                .map(|table| Table::Postgres(Box::new(table))),
            LookupSource::Sqlite(path) => SqliteTable::new(path.clone(), query, runtime.clone())
                .map(|table| Table::Sqlite(Arc::new(table))),
        };
        let name = config.name.value.clone();
        let table = table.map_err(|error| named(&name, error))?;
        let cache = Cache::new(config.cache);
        let unrequested_lines = Mutex::new(LogThrottle::new(UNREQUESTED_LOGGED_EVERY));
        Ok(Self { name, timeout, cache, table, runtime, unrequested_lines })
    }

    /// Returns the name that plugins ask for.
    pub fn name(&self) -> &LookupName {
        &self.name
    }

    /// Checks that the table can be reached and that its query can run.
    ///
    /// # Errors
    /// Why it cannot, and what to do.
    pub async fn prepare(&self) -> Result<(), LookupError> {
        // A person waits here, not a batch: connecting alone may take longer than one query.
        let deadline = Instant::now() + self.timeout.max(Duration::from_secs(10));
        let prepared = match &self.table {
            Table::Postgres(table) => table.prepare(deadline).await,
            Table::Sqlite(table) => {
                let table = Arc::clone(table);
                let prepared = tokio::task::spawn_blocking(move || table.prepare(deadline)).await;
                prepared.unwrap_or_else(|error| Err(LookupError::retryable(error.to_string())))
            }
        };
        prepared.map_err(|error| named(&self.name, error))
    }

    /// Returns the rows of `keys`, in their order; `None` where the query has no row. Blocks until `deadline` at
    /// most: call it from a blocking thread, never from async code.
    ///
    /// # Errors
    /// [`LookupError`]; then no key is answered.
    pub fn get(
        &self,
        keys: &[&str],
        deadline: Instant,
    ) -> Result<Vec<Option<Arc<str>>>, LookupError> {
        self.get_within(keys, deadline, ANSWER_BYTES_MAX)
    }

    /// Does the same as [`Lookup::get`], with a limit on the bytes of the rows that are fetched.
    ///
    /// # Errors
    /// As [`Lookup::get`].
    pub(super) fn get_within(
        &self,
        keys: &[&str],
        deadline: Instant,
        bytes_max: usize,
    ) -> Result<Vec<Option<Arc<str>>>, LookupError> {
        let rows = self.find(keys, deadline, bytes_max);
        rows.map_err(|error| named(&self.name, error))
    }

    fn find(
        &self,
        keys: &[&str],
        deadline: Instant,
        bytes_max: usize,
    ) -> Result<Vec<CachedRow>, LookupError> {
        let mut known: Vec<Option<CachedRow>> = vec![None; keys.len()];
        let (mut missed, mut absent, mut bytes) = (0, 0, 0);
        loop {
            // The keys of one query at a time. Its result is kept at once, because other lanes wait for these keys.
            let standing = self.cache.stand(keys, known);
            known = standing.known;
            let claim = standing.claim;
            if !claim.keys.is_empty() {
                let mut found = FoundRows::within(bytes_max).after(bytes);
                self.fetch(&claim.keys, deadline, &mut found)?;
                bytes = found.bytes();
                let found = found.into_rows();
                claim.keep(&found);
                missed += found.len();
                absent += claim.keys.len() - found.len();
                let claimed: HashSet<&str> = claim.keys.iter().map(|key| &**key).collect();
                for (key, known) in keys.iter().zip(&mut known) {
                    if known.is_none() && claimed.contains(key) {
                        *known = Some(found.get(*key).cloned());
                    }
                }
            }
            drop(claim);
            if standing.is_partial {
                continue;
            }
            if standing.awaited == 0 {
                break;
            }
            // If the cache can hold almost nothing, lanes may fetch each other's keys repeatedly.
            if Instant::now() >= deadline || !self.cache.wait(keys, &known, deadline) {
                return Err(LookupError::retryable("another lane's query took too long"));
            }
        }
        self.count("hit", keys.len() - missed - absent);
        self.count("miss", missed);
        self.count("absent", absent);
        Ok(known.into_iter().map(Option::flatten).collect())
    }

    /// Fetches rows for distinct keys, by one query.
    fn fetch(
        &self,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut FoundRows,
    ) -> Result<(), LookupError> {
        let started = Instant::now();
        let deadline = deadline.min(started + self.timeout);
        match &self.table {
            Table::Postgres(table) => {
                let fetched =
                    off_thread::wait_on(&self.runtime, table.fetch(keys, deadline, found));
                fetched.unwrap_or_else(|| Err(stopped()))?;
            }
            Table::Sqlite(table) => table.fetch(keys, deadline, found)?,
        }
        let seconds = started.elapsed().as_secs_f64();
        metrics::histogram!(metric::LOOKUP_SECONDS, "lookup" => self.name.to_string())
            .record(seconds);
        if let Some(key) = found.first_unrequested().filter(|_| self.may_log_unrequested()) {
            tracing::warn!(
                lookup = %self.name,
                "the query returned a row for the key {key:?}, which was not requested: its first column \
                 must be the key as requested"
            );
        }
        Ok(())
    }

    fn may_log_unrequested(&self) -> bool {
        let mut lines = self.unrequested_lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.line(Instant::now()).is_some()
    }

    fn count(&self, result: &'static str, keys: usize) {
        if keys > 0 {
            let name = self.name.to_string();
            metrics::counter!(metric::LOOKUP_KEYS_TOTAL, "lookup" => name, "result" => result)
                .increment(keys as u64);
        }
    }
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookup").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Returns the error of a wait that ended because the process stops.
fn stopped() -> LookupError {
    LookupError::retryable("no answer before the pipeline stopped")
}

/// Converts an error of the pool. Its own errors are about settings that are not used here.
fn pool_error(error: PoolError<LookupError>) -> LookupError {
    match error {
        PoolError::Backend(error) => error,
        other => LookupError::retryable(other.to_string()),
    }
}

fn named(name: &LookupName, error: LookupError) -> LookupError {
    LookupError { message: format!("lookup `{name}`: {}", error.message), ..error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_lookup() {
        let error = named(&"cars".into(), LookupError::lasting("gone"));
        assert_eq!(error.to_string(), "lookup `cars`: gone");
        assert!(!error.retryable);
    }
}
