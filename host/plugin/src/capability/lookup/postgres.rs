//! Rows from PostgreSQL, by a few connections.
//!
//! The server itself writes the rows as JSON, `row_to_json` over the user's query as a subquery: it
//! writes integers and numerics with all their digits and times in ISO 8601, and knows every type.
//! `to_jsonb` would do the same by way of a tree that it builds first. Only `bytea` is asked for in
//! base64, as the sinks take it.
//!
//! Nothing stays in the server's session: no statement and no setting outlives its transaction, because
//! a pooler may lend the session to another application next. So what the query's parameter and columns
//! are is learnt once ([`Description`]), and the query goes without a name.

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

/// Lanes share these. More would not make a server faster, and fewer would let one slow query stop
/// every lane.
const CONNECTIONS_MAX: usize = 4;

/// After a connection fails, the next is tried after this, doubled up to the most.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// A connection may take as long as this, even where queries may not.
const SILENCE_MIN: Duration = Duration::from_secs(10);

/// Columns that were added to the table are noticed after this; that one is gone, at once.
const DESCRIPTION_AGE_MAX: Duration = Duration::from_secs(60);

/// Statements that the client library has prepared in the session. It names them by a counter.
const OWN_STATEMENTS: &str =
    "SELECT name FROM pg_catalog.pg_prepared_statements WHERE name ~ '^s[0-9]+$'";

/// The savepoint after which the query is described.
const SAVEPOINT: &str = "describe";

/// A table's query, and the connections that it runs on.
pub(super) struct PostgresTable {
    place: String,
    query: String,
    timeout: Duration,
    connections: Pool<Connector>,
    description: Mutex<Option<Arc<Description>>>,
}

/// Makes the connections of the pool.
///
/// A slot of the pool is empty while a query runs: the connection belongs to the query, and comes back when the
/// query has been answered to its end. A query that fails, or is dropped at its deadline, closes the connection.
struct Connector {
    server: PostgresServer,
    place: String,
    silence_max: Duration,
    refused: Mutex<Option<Refused>>,
}

/// The query's parameter and columns.
struct Description {
    /// The query whose rows are a key and a JSON object.
    json: String,
    key_type: KeyType,
    /// The type by which keys are bound.
    parameter: Type,
    read_at: Instant,
}

/// That no connection could be made, and until when none is tried.
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
        // Waits have no limits of their own: each call has one deadline for all of its steps.
        let connections = Pool::builder(connector)
            .max_size(CONNECTIONS_MAX)
            .queue_mode(QueueMode::Lifo)
            .build()
            .map_err(|error| LookupError::lasting(error.to_string()))?;
        Ok(Self {
            place,
            // The query becomes a subquery, where no semicolon may stand.
            query: query.trim().trim_end_matches(';').trim_end().to_owned(),
            timeout,
            connections,
            description: Mutex::default(),
        })
    }

    /// Connects, and runs the query without a key.
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
        // What is dropped at the deadline takes its connection along; the server ends the statement
        // by its own timeout.
        let fetched = timeout_at(deadline.into(), self.fetch_in_time(keys, found)).await;
        fetched.unwrap_or_else(|_| {
            let message = format!("{} gave no answer in time", self.place);
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
                // The table is another by now: once more, by a new description.
                Err(FetchError::Failed(error)) if was_known && is_altered(&error) => {}
                Err(error) => return Err(self.failed(error)),
            }
            is_reused = false;
            link = self.connect().await?;
        }
    }

    /// Runs the query on a connection, which is closed if that fails. Gives the connection to use next.
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

    /// The description, unless it is old.
    fn known(&self) -> Option<Arc<Description>> {
        let known = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone().filter(|known| known.read_at.elapsed() < DESCRIPTION_AGE_MAX)
    }

    /// Learns what the query's parameter and columns are, and closes the connection: the client may have
    /// to prepare statements to learn of types, and keeps them for its connection's life.
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
            misfit(format!("the query is not a SELECT that can stand in brackets: {error}"))
        })?;
        // Closes them, in the same transaction.
        drop((plain, planned));
        for name in own_statements(link).await?.difference(&before) {
            link.batch_execute(&format!("DEALLOCATE {name}")).await?;
        }
        link.batch_execute("COMMIT").await?;
        Ok(Description { json, key_type, parameter, read_at: Instant::now() })
    }

    /// Begins a transaction. It makes the server refuse writes, and its texts the same everywhere.
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

    /// Classes 22 (data exception) and P0001 (`RAISE EXCEPTION`) blame the keys. All else is the
    /// server's failure or the configuration's, and must not cost records.
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
    /// Connects, unless it failed a moment ago: all lanes together ask a server that is down no more
    /// often than one would.
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
    /// Empty while a query has the connection.
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

/// The names of the statements that the client library has prepared in the session.
async fn own_statements(link: &Link) -> Result<BTreeSet<String>, ServerError> {
    let rows = link.simple_rows(OWN_STATEMENTS).await?;
    Ok(rows.iter().filter_map(|row| row.get(0)).map(ToOwned::to_owned).collect())
}

/// Whether an error may be the connection's alone: it was lost, or the server is no longer the same.
fn is_stale(error: &ServerError) -> bool {
    error.condemns_server()
}

/// Whether an error says that the query no longer fits its description: class 42, "syntax error or
/// access rule violation", has the columns and functions that are not there.
fn is_altered(error: &ServerError) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("42") || code == SqlState::DATATYPE_MISMATCH.code())
}

/// How keys are bound: by the type of the query's parameter.
#[derive(Clone, Copy)]
enum KeyType {
    Text,
    /// Blanks at the end do not count.
    PaddedText,
    Int2,
    Int4,
    Int8,
    Uuid,
}

fn key_type(params: &[Type]) -> Result<(KeyType, Type), String> {
    let [param] = params else {
        return Err(format!(
            "the query has {} parameters and is to have one, the keys: WHERE id = ANY($1)",
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
                "the query's parameter is of type {param}, and the keys are an array of text, \
                 varchar, smallint, integer, bigint or uuid: cast it, such as \
                 WHERE id::text = ANY($1::text[])"
            ));
        }
    };
    Ok((key_type, param.clone()))
}

impl KeyType {
    /// What the server shows for a key; `None`: no value of this type is written so.
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

    /// The array to bind, of what [`KeyType::meaning`] gave.
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

/// The user's query as one of two columns: the key as text, and the others as a JSON object.
///
/// Columns are asked for by name, not by place: a table that is altered must not show one column's
/// values under another's name.
fn json_query(query: &str, columns: &[Column]) -> Result<String, String> {
    let [key, others @ ..] = columns else {
        return Err("the query has no columns and is to have two at least, the key first".into());
    };
    if others.is_empty() {
        return Err("the query has 1 columns and is to have two at least, the key first".into());
    }
    let (mut names, mut fields) = (BTreeSet::new(), Vec::new());
    for column in others {
        let name = column.name();
        if !names.insert(name) {
            return Err(format!("the query has two columns {name:?}: give one another name by AS"));
        }
        let quoted = quoted(name);
        let value = match is_bytea(column.type_()) {
            // The server breaks base64 into lines.
            true => format!("translate(encode(q.{quoted}, 'base64'), E'\\n', '')"),
            false => format!("q.{quoted}"),
        };
        fields.push(format!("{value} AS {quoted}"));
    }
    // A second column of the key's name would be taken for it: only places tell them apart.
    let (key_name, places) = match names.contains(key.name()) {
        false => (quoted(key.name()), String::new()),
        true => {
            let others = others.iter().map(|column| quoted(column.name()));
            let places: Vec<String> =
                std::iter::once("\"shardmill key\"".to_owned()).chain(others).collect();
            ("\"shardmill key\"".to_owned(), format!("({})", places.join(", ")))
        }
    };
    // The line break ends a comment that the query may end with.
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
