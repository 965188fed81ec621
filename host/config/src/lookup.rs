//! `[[lookup]]`: a query that finds rows of a reference table by key, and how long they are kept.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::raw::{RawLookup, RawLookupCache, Text};
use super::shape::shaped;
use super::{Located, Secret};
use shardmill_core::record::LookupName;
use shardmill_pg::PostgresServer;

/// A query waits within a plugin's call, whose time per batch is 2 s by default.
const TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);

/// An entry may take up most of a cache, but not all of it.
const ENTRIES: RangeInclusive<u64> = 10..=100_000_000;
const BYTES: RangeInclusive<usize> = (1 << 10)..=(64 << 30);
/// 0: nothing is kept.
const TTLS: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(30 * 86_400);

/// A reference table, as a query that finds its rows by key.
#[derive(Clone, Debug)]
pub struct LookupConfig {
    /// Its name, unique among lookups.
    pub name: Located<LookupName>,
    /// Where the table is.
    pub source: LookupSource,
    /// The query. Its one parameter is the keys, its first column the key of each row.
    pub query: Located<String>,
    /// How long one query may take.
    pub timeout: Duration,
    /// What is kept of its answers.
    pub cache: LookupCacheLimits,
    /// Where the lookup's table begins in the file.
    pub span: Range<usize>,
}

/// The databases that rows can be looked up in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookupSource {
    /// PostgreSQL, by a connection string.
    Postgres(Secret),
    /// A SQLite file; the path is joined with the configuration's folder.
    Sqlite(PathBuf),
}

/// What the cache of a lookup may hold, keys without a row included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupCacheLimits {
    /// Keys.
    pub entries_max: usize,
    /// Bytes of keys, rows and what keeping them costs.
    pub bytes_max: usize,
    /// How old an answer may be.
    pub ttl: Duration,
}

impl Default for LookupCacheLimits {
    fn default() -> Self {
        Self { entries_max: 100_000, bytes_max: 16 << 20, ttl: Duration::from_secs(300) }
    }
}

/// Reads one `[[lookup]]`; `base` is the folder that a SQLite path starts from.
pub(super) fn read(
    table: Spanned<DeValue<'_>>,
    base: &Path,
    check: &mut Check,
) -> Option<LookupConfig> {
    let span = table.span();
    let raw: RawLookup = shaped(table, check)?;
    let name = check.name(&raw.name, "lookup");
    let source = source(&raw.url, base, check);
    let query = check.filled(&raw.query, "query");
    let timeout = check.duration(&raw.timeout, TIMEOUT, TIMEOUTS);
    let cache = cache(raw.cache, check);
    Some(LookupConfig {
        name: name?,
        source: source?,
        query: Located { value: query?, span: raw.query.span() },
        timeout: timeout?,
        cache: cache?,
        span,
    })
}

/// A plugin asks by name: each has a name of its own.
pub(super) fn check_unique(lookups: &[LookupConfig], check: &mut Check) {
    let mut seen: BTreeMap<&str, &Range<usize>> = BTreeMap::new();
    for LookupConfig { name, .. } in lookups {
        if let Some(first) = seen.insert(name.value.as_str(), &name.span) {
            let help = format!(
                "it is first used at {}; each lookup needs a name of its own",
                check.place(first)
            );
            let message = format!("the name `{}` is taken", name.value);
            check.problem(name.span.clone(), message, help);
        }
    }
}

fn source(raw: &Spanned<Text>, base: &Path, check: &mut Check) -> Option<LookupSource> {
    let text = check.filled(raw, "database")?;
    if let Some(path) = text.strip_prefix("sqlite:") {
        return sqlite(path, raw.span(), base, check);
    }
    // A string such as "host=… dbname=…" would do as well; one form is enough to explain.
    if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
        let message = "this names no database that rows can be looked up in";
        let help = "write \"postgres://user:${PGPASSWORD}@host:5432/database\" or \
                    \"sqlite:data/customers.db\"";
        check.problem(raw.span(), message, help);
        return None;
    }
    if let Err(cause) = PostgresServer::parse(&text) {
        let help = "write \"postgres://user:${PGPASSWORD}@host:5432/database\"";
        check.problem(raw.span(), cause, help);
        return None;
    }
    Some(LookupSource::Postgres(Secret::new(text)))
}

fn sqlite(path: &str, span: Range<usize>, base: &Path, check: &mut Check) -> Option<LookupSource> {
    // `sqlite://data/x.db` could be read in two ways: as a host `data`, or as a path.
    if path.starts_with("//") && !path.starts_with("///") {
        let help = "write \"sqlite:data/customers.db\", or \"sqlite:/srv/customers.db\"";
        check.problem(span, "a sqlite: URL has no host", help);
        return None;
    }
    if path.is_empty() || path.starts_with(":memory:") {
        let help = "name a file that exists, such as \"sqlite:data/customers.db\"";
        check.problem(span, "a lookup reads a database file", help);
        return None;
    }
    let path = path.strip_prefix("//").unwrap_or(path);
    Some(LookupSource::Sqlite(base.join(path)))
}

fn cache(raw: Option<RawLookupCache>, check: &mut Check) -> Option<LookupCacheLimits> {
    let default = LookupCacheLimits::default();
    let Some(raw) = raw else { return Some(default) };
    let entries_max = check.count(&raw.entries, default.entries_max, ENTRIES);
    let bytes_max = check.size(&raw.bytes, default.bytes_max, BYTES);
    let ttl = check.duration(&raw.ttl, default.ttl, TTLS);
    Some(LookupCacheLimits { entries_max: entries_max?, bytes_max: bytes_max?, ttl: ttl? })
}
