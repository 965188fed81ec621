//! `[[lookup]]`: a query that finds rows of a reference table by key, and the cache of its answers.

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

/// Default timeout. A query runs inside a plugin's call, which may take 2 s per batch by default.
const TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);

/// One entry may take most of a cache, but not all of it.
const ENTRIES: RangeInclusive<u64> = 10..=100_000_000;
const BYTES: RangeInclusive<usize> = (1 << 10)..=(64 << 30);
/// 0: no answer is cached.
const TTLS: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(30 * 86_400);

/// Reference table, as a query that finds its rows by key.
#[derive(Clone, Debug)]
pub struct LookupConfig {
    /// Name, unique among lookups.
    pub name: Located<LookupName>,
    /// Database of the table.
    pub source: LookupSource,
    /// Query. Its only parameter is the list of keys; its first column is the key of each row.
    pub query: Located<String>,
    /// Longest time of one query.
    pub timeout: Duration,
    /// Limits of the cache of answers.
    pub cache: LookupCacheLimits,
    /// Where the lookup's table begins in the file.
    pub span: Range<usize>,
}

/// Database in which rows can be looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookupSource {
    /// PostgreSQL, as a connection string.
    Postgres(Secret),
    /// SQLite file; the path is joined with the configuration's folder.
    Sqlite(PathBuf),
}

/// Limits of a lookup's cache. Keys without a row count, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupCacheLimits {
    /// Keys.
    pub entries_max: usize,
    /// Bytes of keys and rows, with the overhead of the cache.
    pub bytes_max: usize,
    /// Longest age of an answer.
    pub ttl: Duration,
}

impl Default for LookupCacheLimits {
    fn default() -> Self {
        Self { entries_max: 100_000, bytes_max: 16 << 20, ttl: Duration::from_secs(300) }
    }
}

/// Reads one `[[lookup]]`. Relative SQLite paths start at `base`.
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

/// Checks that the names of all lookups differ, because plugins ask by name.
pub(super) fn check_unique(lookups: &[LookupConfig], check: &mut Check) {
    let mut seen: BTreeMap<&str, &Range<usize>> = BTreeMap::new();
    for LookupConfig { name, .. } in lookups {
        if let Some(first) = seen.insert(name.value.as_str(), &name.span) {
            let help = format!(
                "it is first used at {}; each lookup needs a name of its own",
                check.place(first)
            );
            let message = format!("the name `{}` is used twice", name.value);
            check.problem(name.span.clone(), message, help);
        }
    }
}

fn source(raw: &Spanned<Text>, base: &Path, check: &mut Check) -> Option<LookupSource> {
    let text = check.filled(raw, "database")?;
    if let Some(path) = text.strip_prefix("sqlite:") {
        return sqlite(path, raw.span(), base, check);
    }
    // A string such as "host=… dbname=…" would work too, but one form is enough to explain.
    if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
        let message = "unsupported database: expected PostgreSQL or SQLite";
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
    // `sqlite://data/x.db` is ambiguous: `data` could be a host or a part of the path.
    if path.starts_with("//") && !path.starts_with("///") {
        let help = "write \"sqlite:data/customers.db\", or \"sqlite:/srv/customers.db\"";
        check.problem(span, "invalid sqlite: URL, found a host", help);
        return None;
    }
    if path.is_empty() || path.starts_with(":memory:") {
        let help = "name a file that exists, such as \"sqlite:data/customers.db\"";
        check.problem(span, "missing database file: a lookup reads an existing one", help);
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
