//! Connections to PostgreSQL, with the settings that exactly-once needs, and the pool of a sink.
//!
//! A shard has none of its own: there may be more shards than a server takes connections.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::{Manager, Metrics, Object, Pool, PoolError, RecycleError, RecycleResult};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{Client, SimpleQueryMessage, Statement};

use super::copy::Statements;
use super::merge::Hope;
use super::table::LiveTable;
use crate::postgres::{PostgresServer, describe};

/// How long a rollback may take before its connection is given up.
const ROLLBACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Any fixed number: creators wait for each other under it, because concurrent
/// `CREATE TABLE IF NOT EXISTS` may fail on the catalogue's unique indexes.
const CREATE_LOCK: i64 = 0x5348_4152_444d_494c;

/// Settings of the session, each only where nobody has set it for the role, the database or in the
/// URL. A statement that hangs (a lock, a full disk) must end as a visible error; an owner that was
/// cut off must not keep its locks, which the next owner of the shard waits for; and a commit that
/// the server has confirmed must be on its disk, because the checkpoint follows it.
const SETTINGS: &str = "\
    SELECT set_config('statement_timeout', '60s', false)
        WHERE current_setting('statement_timeout') = '0';
    SELECT set_config('lock_timeout', '30s', false)
        WHERE current_setting('lock_timeout') = '0';
    SELECT set_config('idle_in_transaction_session_timeout', '60s', false)
        WHERE current_setting('idle_in_transaction_session_timeout') = '0';
    SELECT set_config('synchronous_commit', 'on', false)
        WHERE current_setting('synchronous_commit') = 'off';";

/// What is known of the session's staging table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Staging {
    /// It is not there, or has the columns of another time.
    Missing,
    /// It is there and has no row.
    Empty,
    /// It has rows of the transaction under way.
    Used,
}

/// The connections of a sink.
pub(super) struct SessionPool(Pool<Connector>);

/// A connection on loan. Dropped, it goes back; in the middle of a transaction it is closed, which ends
/// the transaction and its locks at once.
pub(super) struct PooledSession(Option<Object<Connector>>);

/// Makes connections.
struct Connector(PostgresServer);

impl SessionPool {
    /// A pool of at most so many connections. Connects to nothing yet.
    pub(super) fn new(server: PostgresServer, connections_max: usize) -> Result<Self, String> {
        let pool = Pool::builder(Connector(server)).max_size(connections_max).build();
        pool.map(Self).map_err(|error| error.to_string())
    }

    /// A connection, once one is free. The error is a sentence.
    pub(super) async fn take(&self) -> Result<PooledSession, String> {
        let place = || self.0.manager().0.place();
        let taken = self.0.get().await.map_err(|error| match error {
            PoolError::Backend(error) => {
                format!("cannot connect to {}: {}", place(), describe(&error))
            }
            other => format!("no connection to {}: {other}", place()),
        })?;
        Ok(PooledSession(Some(taken)))
    }
}

impl Manager for Connector {
    type Type = Session;
    type Error = tokio_postgres::Error;

    async fn create(&self) -> Result<Session, Self::Error> {
        Session::connect(&self.0).await
    }

    async fn recycle(&self, session: &mut Session, _: &Metrics) -> RecycleResult<Self::Error> {
        match session.client.is_closed() {
            false => Ok(()),
            true => Err(RecycleError::message("it is closed")),
        }
    }
}

impl Deref for PooledSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.0.as_ref().unwrap_or_else(|| unreachable!("it is taken when dropped"))
    }
}

impl DerefMut for PooledSession {
    fn deref_mut(&mut self) -> &mut Session {
        self.0.as_mut().unwrap_or_else(|| unreachable!("it is taken when dropped"))
    }
}

impl Drop for PooledSession {
    fn drop(&mut self) {
        if let Some(session) = self.0.take()
            && !session.is_clean
        {
            drop(Object::take(session));
        }
    }
}

/// A connection and what was learned and prepared on it.
pub(super) struct Session {
    pub(super) client: Client,
    /// Whether it is known to be outside of any transaction.
    pub(super) is_clean: bool,
    /// Counts what [`Session::run_in_step`] ran.
    steps: u64,
    /// What reads the live table.
    pub(super) read_table: Option<Statement>,
    /// The live table as last read, until something suggests that it is another.
    pub(super) table: Option<Arc<LiveTable>>,
    /// What writes rows, by the places of their columns in `table`.
    pub(super) statements: HashMap<Box<[u16]>, Statements>,
    /// The staging table, if rows are merged.
    pub(super) staging: Staging,
    /// Whether rows are likely to have keys that are new.
    pub(super) hope: Hope,
}

impl Session {
    pub(super) async fn connect(server: &PostgresServer) -> Result<Self, tokio_postgres::Error> {
        let client = server.connect().await?;
        client.batch_execute(SETTINGS).await?;
        Ok(Self {
            client,
            is_clean: true,
            steps: 0,
            read_table: None,
            table: None,
            statements: HashMap::new(),
            staging: Staging::Missing,
            hope: Hope::default(),
        })
    }

    /// Ends the transaction in hand, if any; false when the connection is to be given up.
    pub(super) async fn roll_back(&mut self) -> bool {
        let rollback = self.run_in_step("ROLLBACK");
        matches!(tokio::time::timeout(ROLLBACK_TIMEOUT, rollback).await, Ok(Ok(())))
    }

    /// Runs a command after an error, and makes sure that the answer is the answer to it.
    ///
    /// When a COPY fails before the server has asked for its data (no such column), the server
    /// answers the client's two Sync messages with one ReadyForQuery each. tokio-postgres takes the
    /// second for the end of its next command, and from there on each command gets the answer of the
    /// one before: a COMMIT would look done before it is (rust-postgres issue 789). A value that only
    /// this command returns shows whether client and server are in step.
    pub(super) async fn run_in_step(&mut self, command: &str) -> Result<(), StepError> {
        self.steps += 1;
        let expected = self.steps.to_string();
        let command = format!("{command}; SELECT {expected}");
        let answers = self.client.simple_query(&command).await.map_err(StepError::Failed)?;
        let value = answers.iter().find_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        if value == Some(expected.as_str()) { Ok(()) } else { Err(StepError::OutOfStep) }
    }

    /// Commits. Whatever is no plain confirmation is an error, and says nothing of what was done.
    pub(super) async fn commit(&self) -> Result<(), String> {
        match self.client.simple_query("COMMIT").await.as_deref() {
            Ok([SimpleQueryMessage::CommandComplete(_)]) => Ok(()),
            Ok(_) => Err("the server did not confirm the commit".into()),
            Err(error) => Err(describe(error)),
        }
    }

    /// Notes that a transaction has ended, which empties the staging table.
    pub(super) fn emptied(&mut self) {
        if self.staging == Staging::Used {
            self.staging = Staging::Empty;
        }
    }

    /// Forgets the table, so that it is read anew before the next row.
    pub(super) fn forget_table(&mut self) {
        self.table = None;
        self.statements.clear();
        self.staging = Staging::Missing;
    }
}

/// Runs a `CREATE … IF NOT EXISTS` while no other process runs one.
pub(super) async fn create_once(
    client: &Client,
    create: &str,
) -> Result<(), tokio_postgres::Error> {
    let locked = format!("BEGIN; SELECT pg_advisory_xact_lock({CREATE_LOCK}); {create}; COMMIT");
    client.batch_execute(&locked).await
}

/// Why a command after an error did not run.
pub(super) enum StepError {
    /// The server or the connection failed.
    Failed(tokio_postgres::Error),
    /// The answer belongs to another command: the connection is to be given up.
    OutOfStep,
}

impl std::fmt::Display for StepError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(error) => f.write_str(&describe(error)),
            Self::OutOfStep => f.write_str("the connection's answers were out of step"),
        }
    }
}

impl From<tokio_postgres::Error> for StepError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error)
    }
}

/// Whether the error of a COPY blames its rows rather than the server, the table or the network.
///
/// Classes 22 (data exception) and 23 (integrity constraint), P0001 (a trigger's `RAISE EXCEPTION`),
/// and 54000 and 54001: a value too large for its index or page is a row's fault too, and would
/// otherwise block its shard for good.
pub(super) fn blames_rows(error: &tokio_postgres::Error) -> bool {
    let Some(said) = error.as_db_error() else { return false };
    let blamed = [
        SqlState::RAISE_EXCEPTION,
        SqlState::PROGRAM_LIMIT_EXCEEDED,
        SqlState::STATEMENT_TOO_COMPLEX,
    ];
    let code = said.code();
    let by_class = code.code().starts_with("22") || code.code().starts_with("23");
    said.parsed_severity() != Some(Severity::Fatal) && (by_class || blamed.contains(code))
}
