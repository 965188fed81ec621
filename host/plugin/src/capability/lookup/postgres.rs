//! Rows from PostgreSQL, by a few connections.
//!
//! The server writes the rows as JSON: `row_to_json` over the user's query as a subquery. It writes integers and
//! numerics with all digits and times in ISO 8601, and knows every type. `to_jsonb` would give the same, but builds
//! a tree first. Only `bytea` is requested in base64, as the sinks take it.
//!
//! Nothing stays in the server's session: no statement and no setting outlives its transaction, because a pooler
//! may lend the session to another application next. So the types of the query's parameter and columns are
//! determined once ([`Description`]), and after that the query is sent without a prepared name.
//!
//! | failure | reaction |
//! |---|---|
//! | a reused connection was lost, or the server changed | once more, on a new connection |
//! | the query no longer fits the known description (class 42) | once more, with a new description |
//! | class 22 or P0001, or rows beyond the limit of one call | final: the keys are to blame |
//! | anything else, or the deadline | retryable, and the connection is closed |

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use deadpool::managed::{Manager, Metrics, Object, Pool, QueueMode, RecycleError, RecycleResult};
use futures::TryStreamExt;
use tokio::time::timeout_at;
use tokio_postgres::Column;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Kind, ToSql, Type};

use super::found::{Asked, FoundRows};
use super::{LookupError, pool_error};
use shardmill_pg::{Link, PostgresServer, ServerError};

/// Maximum number of connections, shared by the lanes. More would not make a server faster; with fewer, one slow
/// query could stop every lane.
const CONNECTIONS_MAX: usize = 4;

/// First pause after a failed connection; it doubles up to the maximum below.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Minimum time for a connection, even if queries have less.
const SILENCE_MIN: Duration = Duration::from_secs(10);

/// Maximum age of a description: new columns of the table are noticed after it, a missing one at once.
const DESCRIPTION_AGE_MAX: Duration = Duration::from_secs(60);

/// Lists the statements that the client library has prepared in the session. It names them by a counter.
const OWN_STATEMENTS: &str =
    "SELECT name FROM pg_catalog.pg_prepared_statements WHERE name ~ '^s[0-9]+$'";

/// Savepoint after which the query is described.
const SAVEPOINT: &str = "describe";

/// The query of a table, and the connections that it runs on.
pub(super) struct PostgresTable {
    place: String,
    query: String,
    timeout: Duration,
    connections: Pool<Connector>,
    description: Mutex<Option<Arc<Description>>>,
}

/// Makes the connections of the pool.
///
/// A slot of the pool is empty while a query runs: the query owns the connection, and returns it once it was
/// answered completely. A query that fails, or that is dropped at its deadline, closes the connection.
struct Connector {
    server: PostgresServer,
    place: String,
    silence_max: Duration,
    refused: Mutex<Option<Refused>>,
}

/// Types of the query's parameter and columns.
struct Description {
    /// The query with two columns: the key, and a JSON object.
    json: String,
    key_type: KeyType,
    /// The type with which keys are bound.
    parameter: Type,
    read_at: Instant,
}

/// The last failed connection, and until when no other is attempted.
struct Refused {
    error: LookupError,
    until: Instant,
    pause: Duration,
}

impl PostgresTable {
    pub(super) fn new(url: &str, query: &str, timeout: Duration) -> Result<Self, LookupError> {
        let server = PostgresServer::parse(url).map_err(LookupError::lasting)?;
        let place = server.place();
        let connector = Connector {
            server,
            place: place.clone(),
            silence_max: timeout.max(SILENCE_MIN),
            refused: Mutex::default(),
        };
        // The pool needs no timeouts: each call has one deadline for all of its steps.
        let connections = Pool::builder(connector)
            .max_size(CONNECTIONS_MAX)
            .queue_mode(QueueMode::Lifo)
            .build()
            .map_err(|error| LookupError::lasting(error.to_string()))?;
        Ok(Self {
            place,
            // The query becomes a subquery, which must not contain a semicolon.
            query: query.trim().trim_end_matches(';').trim_end().to_owned(),
            timeout,
            connections,
            description: Mutex::default(),
        })
    }

    /// Connects, and runs the query without keys.
    pub(super) async fn prepare(&self, deadline: Instant) -> Result<(), LookupError> {
        self.fetch(&[], deadline, &mut FoundRows::default()).await
    }

    /// Adds the rows of `keys` to `found`.
    pub(super) async fn fetch(
        &self,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut FoundRows,
    ) -> Result<(), LookupError> {
        // At the deadline the query is dropped together with its connection; the server ends the statement by its
        // own timeout.
        let fetched = timeout_at(deadline.into(), self.fetch_in_time(keys, found)).await;
        fetched.unwrap_or_else(|_| {
            let message = format!("{} did not answer in time", self.place);
            Err(LookupError::retryable(message))
        })
    }

    async fn fetch_in_time(
        &self,
        keys: &[Arc<str>],
        found: &mut FoundRows,
    ) -> Result<(), LookupError> {
        let mut slot = self.connections.get().await.map_err(pool_error)?;
        let mut is_reused = Object::metrics(&slot).recycle_count > 0;
        let mut link = match slot.take() {
            Some(link) => link,
            None => self.connect().await?,
        };
        let mut known = self.known();
        loop {
            let was_known = known.is_some();
            let fetched = self.fetch_on(link, known.take(), keys, found).await;
            match fetched {
                Ok(link) => {
                    *slot = Some(link);
                    return Ok(());
                }
                // The server went away in between: once more, on a new connection.
                Err(FetchError::Failed(error)) if is_reused && is_stale(&error) => {
                    self.connections.retain(|_, _| false);
                    known = self.known();
                }
                // The table was altered: once more, with a new description.
                Err(FetchError::Failed(error)) if was_known && is_altered(&error) => {}
                Err(error) => return Err(self.failed(error)),
            }
            is_reused = false;
            link = self.connect().await?;
        }
    }

    /// Runs the query on a connection and returns the connection, which is closed on failure. Describes the query
    /// first if `known` is `None`.
    async fn fetch_on(
        &self,
        link: Link,
        known: Option<Arc<Description>>,
        keys: &[Arc<str>],
        found: &mut FoundRows,
    ) -> Result<Link, FetchError> {
        let (link, description) = match known {
            Some(known) => (link, known),
            None => {
                let description = self.describe(link).await?;
                (self.connect().await.map_err(FetchError::Lookup)?, description)
            }
        };
        self.query(&link, &description, keys, found).await?;
        Ok(link)
    }

    async fn connect(&self) -> Result<Link, LookupError> {
        self.connections.manager().connect().await
    }

    /// Returns the description, unless it is too old.
    fn known(&self) -> Option<Arc<Description>> {
        let known = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone().filter(|known| known.read_at.elapsed() < DESCRIPTION_AGE_MAX)
    }

    /// Determines the types of the query's parameter and columns, and closes the connection: the client may have to
    /// prepare statements to look up types, and keeps them as long as its connection lives.
    async fn describe(&self, link: Link) -> Result<Arc<Description>, FetchError> {
        let described = Arc::new(self.describe_on(&link).await?);
        let mut known = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(Arc::clone(&described));
        Ok(described)
    }

    async fn describe_on(&self, link: &Link) -> Result<Description, FetchError> {
        let misfit = |message| FetchError::Lookup(LookupError::retryable(message));
        link.batch_execute(&format!("{}; SAVEPOINT {SAVEPOINT}", self.begin())).await?;
        let before = own_statements(link).await?;
        let plain = link.prepare(&self.query, SAVEPOINT).await?;
        let (key_type, parameter) = key_type(plain.params()).map_err(misfit)?;
        let json = json_query(&self.query, plain.columns()).map_err(misfit)?;
        let planned = link.prepare(&json, SAVEPOINT).await.map_err(|error| {
            misfit(format!("expected a SELECT that can be a subquery: {error}"))
        })?;
        // Dropping them closes them, in the same transaction.
        drop((plain, planned));
        for name in own_statements(link).await?.difference(&before) {
            link.batch_execute(&format!("DEALLOCATE {name}")).await?;
        }
        link.batch_execute("COMMIT").await?;
        Ok(Description { json, key_type, parameter, read_at: Instant::now() })
    }

    /// Returns the statements that begin a transaction: the server refuses writes in it, and formats texts the same
    /// everywhere.
    fn begin(&self) -> String {
        format!(
            "BEGIN READ ONLY; SET LOCAL statement_timeout = {}; \
             SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; \
             SET LOCAL IntervalStyle = 'iso_8601'; SET LOCAL extra_float_digits = 1",
            self.timeout.as_millis().max(1)
        )
    }

    /// Runs the query for some keys.
    async fn query(
        &self,
        link: &Link,
        description: &Description,
        keys: &[Arc<str>],
        found: &mut FoundRows,
    ) -> Result<(), FetchError> {
        let Description { json, key_type, parameter, .. } = description;
        let asked = Asked::new(keys, |key| key_type.meaning(key));
        let array = key_type.array(asked.meanings().map(String::as_str));
        link.batch_execute(&self.begin()).await?;
        let values = [(&*array as &(dyn ToSql + Sync), parameter.clone())];
        let rows = link.client().query_typed_raw(json, values).await;
        let failed = |error: tokio_postgres::Error| link.failed(error);
        let mut rows = pin!(rows.map_err(failed)?);
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let key = row.try_get::<_, Option<&str>>(0).map_err(failed)?;
            let json = row.try_get::<_, Option<&str>>(1).map_err(failed)?;
            let (Some(key), Some(json)) = (key, json) else {
                continue; // NULL is nobody's key.
            };
            match asked.keys(key) {
                Some(keys) => found.add(keys, json).map_err(FetchError::Lookup)?,
                None => found.add_unrequested(key),
            }
        }
        link.batch_execute("COMMIT").await?;
        Ok(())
    }

    /// Classes 22 (data exception) and P0001 (`RAISE EXCEPTION`) blame the keys. All other errors are the server's
    /// or the configuration's, and must not cost records.
    fn failed(&self, error: FetchError) -> LookupError {
        let error = match error {
            FetchError::Lookup(error) => return error,
            FetchError::Failed(error) => error,
        };
        let blames_keys = error.code().is_some_and(|code| {
            code.code().starts_with("22") || *code == SqlState::RAISE_EXCEPTION
        });
        let message = format!("{}: {error}", self.place);
        LookupError { retryable: !blames_keys, message }
    }
}

impl Connector {
    /// Connects, unless the last attempt failed a moment ago: all lanes together must not ask a server that is down
    /// more often than one would.
    async fn connect(&self) -> Result<Link, LookupError> {
        let mut pause = PAUSE;
        if let Some(refused) = &*self.refused() {
            if Instant::now() < refused.until {
                return Err(refused.error.clone());
            }
            pause = (refused.pause * 2).min(PAUSE_MAX);
        }
        let error = match self.server.connect(self.silence_max).await {
            Ok(link) => {
                *self.refused() = None;
                return Ok(link);
            }
            Err(error) => LookupError::retryable(format!("{}: {error}", self.place)),
        };
        let until = Instant::now() + pause;
        *self.refused() = Some(Refused { error: error.clone(), until, pause });
        Err(error)
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Manager for Connector {
    /// Empty while a query owns the connection.
    type Type = Option<Link>;
    type Error = LookupError;

    async fn create(&self) -> Result<Option<Link>, LookupError> {
        self.connect().await.map(Some)
    }

    async fn recycle(&self, link: &mut Option<Link>, _: &Metrics) -> RecycleResult<LookupError> {
        match link {
            Some(link) if !link.is_closed() => Ok(()),
            _ => Err(RecycleError::message("the connection was closed")),
        }
    }
}

enum FetchError {
    Failed(ServerError),
    Lookup(LookupError),
}

impl From<ServerError> for FetchError {
    fn from(error: ServerError) -> Self {
        Self::Failed(error)
    }
}

/// Lists the statements that the client library has prepared in the session.
async fn own_statements(link: &Link) -> Result<BTreeSet<String>, ServerError> {
    let rows = link.simple_rows(OWN_STATEMENTS).await?;
    Ok(rows.iter().filter_map(|row| row.get(0)).map(ToOwned::to_owned).collect())
}

/// Whether the connection alone may be to blame: it was lost, or the server is not the same any more.
fn is_stale(error: &ServerError) -> bool {
    error.condemns_server()
}

/// Whether the query no longer fits its description. Class 42, "syntax error or access rule violation", covers
/// missing columns and functions.
fn is_altered(error: &ServerError) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("42") || code == SqlState::DATATYPE_MISMATCH.code())
}

/// How keys are bound, by the type of the query's parameter.
#[derive(Clone, Copy)]
enum KeyType {
    Text,
    /// Trailing blanks do not count.
    PaddedText,
    Int2,
    Int4,
    Int8,
    Uuid,
}

fn key_type(params: &[Type]) -> Result<(KeyType, Type), String> {
    let [param] = params else {
        return Err(format!(
            "expected a query with one parameter, the keys (WHERE id = ANY($1)), found {} parameters",
            params.len()
        ));
    };
    let key_type = match *param {
        Type::TEXT_ARRAY | Type::VARCHAR_ARRAY => KeyType::Text,
        Type::BPCHAR_ARRAY => KeyType::PaddedText,
        Type::INT2_ARRAY => KeyType::Int2,
        Type::INT4_ARRAY => KeyType::Int4,
        Type::INT8_ARRAY => KeyType::Int8,
        Type::UUID_ARRAY => KeyType::Uuid,
        _ => {
            return Err(format!(
                "unsupported type {param} of the query's parameter: expected an array of text, varchar, \
                 smallint, integer, bigint or uuid; cast it, for example \
                 WHERE id::text = ANY($1::text[])"
            ));
        }
    };
    Ok((key_type, param.clone()))
}

impl KeyType {
    /// Returns how the server shows a key; `None`: no value of this type is written like that.
    fn meaning(self, key: &str) -> Option<String> {
        match self {
            Self::Text => (!key.contains('\0')).then(|| key.to_owned()),
            Self::PaddedText => (!key.contains('\0')).then(|| key.trim_end_matches(' ').to_owned()),
            Self::Int2 => key.parse::<i16>().ok().map(|number| number.to_string()),
            Self::Int4 => key.parse::<i32>().ok().map(|number| number.to_string()),
            Self::Int8 => key.parse::<i64>().ok().map(|number| number.to_string()),
            Self::Uuid => uuid::Uuid::parse_str(key).ok().map(|uuid| uuid.to_string()),
        }
    }

    /// Returns the array to bind, from texts that [`KeyType::meaning`] returned.
    fn array<'k>(self, keys: impl Iterator<Item = &'k str>) -> Box<dyn ToSql + Sync + Send + 'k> {
        fn parsed<'k, T: std::str::FromStr>(keys: impl Iterator<Item = &'k str>) -> Vec<T> {
            keys.filter_map(|key| key.parse().ok()).collect()
        }
        match self {
            Self::Text | Self::PaddedText => Box::new(keys.collect::<Vec<&str>>()),
            Self::Int2 => Box::new(parsed::<i16>(keys)),
            Self::Int4 => Box::new(parsed::<i32>(keys)),
            Self::Int8 => Box::new(parsed::<i64>(keys)),
            Self::Uuid => Box::new(parsed::<uuid::Uuid>(keys)),
        }
    }
}

/// Turns the user's query into one with two columns: the key as text, and the other columns as a JSON object.
///
/// Columns are selected by name, not by position: if the table is altered, one column's values must not appear
/// under another's name.
fn json_query(query: &str, columns: &[Column]) -> Result<String, String> {
    let [key, others @ ..] = columns else {
        return Err("expected a query with at least two columns, the key first, found none".into());
    };
    if others.is_empty() {
        return Err("expected a query with at least two columns, the key first, found 1".into());
    }
    let (mut names, mut fields) = (BTreeSet::new(), Vec::new());
    for column in others {
        let name = column.name();
        if !names.insert(name) {
            return Err(format!("the query has two columns named {name:?}: rename one with AS"));
        }
        let quoted = quoted(name);
        let value = match is_bytea(column.type_()) {
            // The server breaks base64 into lines.
            true => format!("translate(encode(q.{quoted}, 'base64'), E'\\n', '')"),
            false => format!("q.{quoted}"),
        };
        fields.push(format!("{value} AS {quoted}"));
    }
    // If another column has the name of the key, only positions can tell them apart.
    let (key_name, places) = match names.contains(key.name()) {
        false => (quoted(key.name()), String::new()),
        true => {
            let others = others.iter().map(|column| quoted(column.name()));
            let places: Vec<String> =
                std::iter::once("\"shardmill key\"".to_owned()).chain(others).collect();
            ("\"shardmill key\"".to_owned(), format!("({})", places.join(", ")))
        }
    };
    // The line break ends a comment at the end of the query.
    Ok(format!(
        "SELECT q.{key_name}::text, (SELECT row_to_json(r.*) FROM (SELECT {}) r)::text \
         FROM ({query}\n) q{places}",
        fields.join(", ")
    ))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn is_bytea(column: &Type) -> bool {
    match column.kind() {
        Kind::Domain(base) => is_bytea(base),
        _ => *column == Type::BYTEA,
    }
}
