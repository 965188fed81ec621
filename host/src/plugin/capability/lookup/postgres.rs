//! Rows from PostgreSQL: a few connections, on each the query prepared.
//!
//! The server itself writes the rows as JSON, `row_to_json` over the user's query as a subquery: it
//! writes integers and numerics with all their digits and times in ISO 8601, and knows every type.
//! `to_jsonb` would do the same by way of a tree that it builds first. Only `bytea` is asked for in
//! base64, as the sinks take it.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use tokio::sync::Semaphore;
use tokio::time::timeout_at;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Kind, ToSql, Type};
use tokio_postgres::{Client, Column, Error, Statement};

use super::LookupError;
use super::found::{Asked, Found};
use crate::postgres::{PostgresServer, describe};

/// Lanes share these. More would not make a server faster, and fewer would let one slow query stop
/// every lane.
const CONNECTIONS_MAX: usize = 4;

/// After a connection fails, the next is tried after this, doubled up to the most.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// A table's query, and the connections that it runs on.
pub(super) struct PostgresTable {
    server: PostgresServer,
    place: String,
    query: String,
    timeout: Duration,
    connections: Semaphore,
    idle: Mutex<Vec<Session>>,
    refused: Mutex<Option<Refused>>,
}

/// A connection with the query prepared on it.
struct Session {
    client: Client,
    statement: Statement,
    key_type: KeyType,
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
        Ok(Self {
            place: server.place(),
            server,
            // The query becomes a subquery, where no semicolon may stand.
            query: query.trim().trim_end_matches(';').trim_end().to_owned(),
            timeout,
            connections: Semaphore::new(CONNECTIONS_MAX),
            idle: Mutex::default(),
            refused: Mutex::default(),
        })
    }

    /// Connects, and runs the query without a key.
    pub(super) async fn prepare(&self, deadline: Instant) -> Result<(), LookupError> {
        self.fetch(&[], deadline, &mut Found::default()).await
    }

    /// Adds the rows of `keys` to `found`.
    pub(super) async fn fetch(
        &self,
        keys: &[Arc<str>],
        deadline: Instant,
        found: &mut Found,
    ) -> Result<(), LookupError> {
        // What is dropped at the deadline takes its connection along; the server ends the statement
        // by its own timeout.
        let fetched = timeout_at(deadline.into(), self.fetch_in_time(keys, found)).await;
        fetched.unwrap_or_else(|_| {
            let message = format!("{} gave no answer in time", self.place);
            Err(LookupError::retryable(message))
        })
    }

    async fn fetch_in_time(&self, keys: &[Arc<str>], found: &mut Found) -> Result<(), LookupError> {
        let _permit = self.connections.acquire().await;
        if let Some(session) = self.idle_session() {
            match session.fetch(keys, found).await {
                Ok(()) => {
                    self.idle().push(session);
                    return Ok(());
                }
                // The server went away in between, or the table is another now: once more, anew.
                Err(FetchError::Failed(error)) if session.is_stale(&error) => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        let session = self.connect().await?;
        session.fetch(keys, found).await.map_err(|error| self.failed(error))?;
        self.idle().push(session);
        Ok(())
    }

    fn idle_session(&self) -> Option<Session> {
        let mut idle = self.idle();
        idle.retain(|session| !session.client.is_closed());
        idle.pop()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects, unless it failed a moment ago: all lanes together ask a server that is down no more
    /// often than one would.
    async fn connect(&self) -> Result<Session, LookupError> {
        let mut pause = PAUSE;
        if let Some(refused) = &*self.refused() {
            if Instant::now() < refused.until {
                return Err(refused.error.clone());
            }
            pause = (refused.pause * 2).min(PAUSE_MAX);
        }
        let connected = Session::connect(&self.server, &self.query, self.timeout).await;
        let error = match connected {
            Ok(session) => {
                *self.refused() = None;
                return Ok(session);
            }
            Err(ConnectError::Failed(error)) => {
                LookupError::retryable(format!("{}: {}", self.place, describe(&error)))
            }
            Err(ConnectError::Query(fault)) => LookupError::retryable(fault),
        };
        let until = Instant::now() + pause;
        *self.refused() = Some(Refused { error: error.clone(), until, pause });
        Err(error)
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
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
        let message = format!("{}: {}", self.place, describe(&error));
        LookupError { retryable: !blames_keys, message }
    }
}

enum ConnectError {
    Failed(Error),
    /// What is wrong with the query.
    Query(String),
}

impl From<Error> for ConnectError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

enum FetchError {
    Failed(Error),
    Lookup(LookupError),
}

impl From<Error> for FetchError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Session {
    async fn connect(
        server: &PostgresServer,
        query: &str,
        timeout: Duration,
    ) -> Result<Self, ConnectError> {
        let client = server.connect().await?;
        // The first makes the server refuse writes; the last make its texts the same everywhere.
        let settings = format!(
            "SET default_transaction_read_only = on; SET statement_timeout = {}; \
             SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'iso_8601'; \
             SET extra_float_digits = 1",
            timeout.as_millis().max(1)
        );
        client.batch_execute(&settings).await?;
        let plain = client.prepare(query).await?;
        let key_type = key_type(plain.params()).map_err(ConnectError::Query)?;
        let json = json_query(query, plain.columns()).map_err(ConnectError::Query)?;
        let statement = client.prepare_typed(&json, plain.params()).await.map_err(|error| {
            ConnectError::Query(format!(
                "the query is no SELECT that can stand in brackets: {}",
                describe(&error)
            ))
        })?;
        Ok(Self { client, statement, key_type })
    }

    async fn fetch(&self, keys: &[Arc<str>], found: &mut Found) -> Result<(), FetchError> {
        let asked = Asked::new(keys, |key| self.key_type.meaning(key));
        let array = self.key_type.array(asked.meanings().map(String::as_str));
        let rows = self.client.query_raw(&self.statement, [&*array as &(dyn ToSql + Sync)]).await?;
        let mut rows = pin!(rows);
        while let Some(row) = rows.try_next().await? {
            let (Some(key), Some(json)) =
                (row.try_get::<_, Option<&str>>(0)?, row.try_get::<_, Option<&str>>(1)?)
            else {
                continue; // NULL is nobody's key.
            };
            match asked.keys(key) {
                Some(keys) => found.add(keys, json).map_err(FetchError::Lookup)?,
                None => found.add_stranger(key),
            }
        }
        Ok(())
    }

    /// Whether an error may be the connection's alone: it was lost, or what it has prepared does not
    /// fit the table any longer.
    fn is_stale(&self, error: &Error) -> bool {
        let stale = [
            SqlState::FEATURE_NOT_SUPPORTED, // "cached plan must not change result type"
            SqlState::INVALID_SQL_STATEMENT_NAME,
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
        ];
        let is_lost = self.client.is_closed() || error.is_closed() || error.as_db_error().is_none();
        is_lost || error.code().is_some_and(|code| stale.contains(code))
    }
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

fn key_type(params: &[Type]) -> Result<KeyType, String> {
    let [param] = params else {
        return Err(format!(
            "the query has {} parameters and is to have one, the keys: WHERE id = ANY($1)",
            params.len()
        ));
    };
    Ok(match *param {
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
    })
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
fn json_query(query: &str, columns: &[Column]) -> Result<String, String> {
    if columns.len() < 2 {
        return Err(format!(
            "the query has {} columns and is to have two at least, the key first",
            columns.len()
        ));
    }
    let (mut names, mut fields) = (BTreeSet::new(), Vec::new());
    for (place, column) in columns.iter().enumerate().skip(1) {
        let name = column.name();
        if !names.insert(name) {
            return Err(format!("the query has two columns {name:?}: give one another name by AS"));
        }
        let value = match is_bytea(column.type_()) {
            // The server breaks base64 into lines.
            true => format!("translate(encode(q.c{place}, 'base64'), E'\\n', '')"),
            false => format!("q.c{place}"),
        };
        fields.push(format!("{value} AS \"{}\"", name.replace('"', "\"\"")));
    }
    let places: Vec<String> = (0..columns.len()).map(|place| format!("c{place}")).collect();
    // The line break ends a comment that the query may end with.
    Ok(format!(
        "SELECT q.c0::text, (SELECT row_to_json(r.*) FROM (SELECT {}) r)::text FROM ({query}\n) q({})",
        fields.join(", "),
        places.join(", ")
    ))
}

fn is_bytea(column: &Type) -> bool {
    match column.kind() {
        Kind::Domain(base) => is_bytea(base),
        _ => *column == Type::BYTEA,
    }
}
