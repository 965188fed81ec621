//! A connection whose every call has a deadline.
//!
//! A server that was stopped, or a network that swallows packets, answers nothing for ever: the kernel
//! notices neither while the peer's kernel acknowledges. So silence ends a call here.
//!
//! Nothing here prepares a statement that outlives its transaction: a pooler in transaction mode may
//! lend the server session to others after it. Queries are typed and unnamed; the one named statement,
//! which COPY needs, is prepared and closed by its caller.

use shardmill_core::boxed;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt as _;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, CopyInSink, Row, SimpleQueryMessage, SimpleQueryRow, Statement};
use tokio_util::sync::DropGuard;

use super::answer::Prepared;
use super::{PostgresServer, describe};

/// Tries to find a name for a prepared statement that the server session does not have.
const NAMES_MAX: u32 = 50;

/// Why a call on a connection failed.
#[derive(Debug)]
pub enum ServerError {
    /// The server or the network said so.
    Failed(tokio_postgres::Error),
    /// The server has no TLS, or no valid certificate, and a file of certificates was given to verify it.
    Unverified {
        /// Why.
        error: tokio_postgres::Error,
        /// The file.
        roots: String,
    },
    /// The connection ended before the call, for this reason.
    Broken(String),
    /// Nothing was heard for this long.
    Silent(Duration),
    /// The answer belongs to another command: the connection is of no use any more.
    OutOfStep,
}

impl ServerError {
    /// The server's own error, if it sent one.
    pub fn as_db_error(&self) -> Option<&DbError> {
        match self {
            Self::Failed(error) => error.as_db_error(),
            Self::Unverified { .. } | Self::Broken(_) | Self::Silent(_) | Self::OutOfStep => None,
        }
    }

    /// The SQLSTATE, if the server gave one.
    pub fn code(&self) -> Option<&SqlState> {
        self.as_db_error().map(DbError::code)
    }

    /// Whether the connection, and others to the same server, are better made again: the server is
    /// ending or starting, cannot be written to (a standby after a failover), or has broken off.
    pub fn condemns_server(&self) -> bool {
        let Some(code) = self.code() else { return true };
        let code = code.code();
        let condemned = ["57P", "08", "XX"];
        code == "25006" || condemned.iter().any(|class| code.starts_with(class))
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => f.write_str(&describe(error)),
            Self::Unverified { error, roots } => write!(
                f,
                "{}: with sslrootcert={roots} the server must have TLS, and a certificate for this host that is \
                 valid by that file: correct the file or the host; or remove sslrootcert, for TLS without \
                 verification (sslmode=prefer); or set sslmode=disable, for plain text",
                describe(error)
            ),
            Self::Broken(cause) => write!(f, "the connection ended: {cause}"),
            Self::Silent(after) => write!(f, "no answer for {after:?}"),
            Self::OutOfStep => f.write_str("the connection's answers were out of step"),
        }
    }
}

impl std::error::Error for ServerError {}

impl From<tokio_postgres::Error> for ServerError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error)
    }
}

/// Why a connection ended, once it has; its clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct EndCause(Arc<OnceLock<String>>);

impl EndCause {
    /// Notes why. To be called before calls that wait are told that the connection is closed.
    pub(super) fn note(&self, error: &tokio_postgres::Error) {
        self.0.get_or_init(|| describe(error));
    }

    /// The error of a call; the client says of one on an ended connection that it is closed, and no more.
    fn of(&self, error: tokio_postgres::Error) -> ServerError {
        match self.0.get().filter(|_| error.is_closed()) {
            Some(cause) => ServerError::Broken(cause.clone()),
            None => ServerError::Failed(error),
        }
    }
}

/// A client, and what is known of its connection.
pub(super) struct Connected {
    pub(super) client: Client,
    pub(super) end_cause: EndCause,
    pub(super) prepared: Prepared,
}

/// A connection. Dropped, it is closed, and with it what it had in hand.
pub struct Link {
    client: Client,
    end_cause: EndCause,
    prepared: Prepared,
    silence_max: Duration,
    /// Counts what [`Link::run_in_step`] ran.
    steps: AtomicU64,
    _ended: DropGuard,
}

impl Link {
    pub(super) fn new(
        Connected { client, end_cause, prepared }: Connected,
        silence_max: Duration,
        ended: DropGuard,
    ) -> Self {
        Self { client, end_cause, prepared, silence_max, steps: AtomicU64::new(0), _ended: ended }
    }

    /// The error of a call on [`Link::client`].
    pub fn failed(&self, error: tokio_postgres::Error) -> ServerError {
        self.end_cause.of(error)
    }

    /// Whether it can be used no more.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Time without an answer after which a call fails.
    pub fn silence_max(&self) -> Duration {
        self.silence_max
    }

    /// Waits for an answer, for so long as the server may be silent.
    async fn heard<T>(
        &self,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, ServerError> {
        self.prepared.begin();
        match tokio::time::timeout(self.silence_max, call).await {
            Ok(outcome) => outcome.map_err(|error| self.failed(error)),
            Err(_) => Err(ServerError::Silent(self.silence_max)),
        }
    }

    /// Runs statements without values, in one message: behind one that fails none is run.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn batch_execute(&self, sql: &str) -> Result<(), ServerError> {
        self.heard(self.client.batch_execute(sql)).await
    }

    /// Runs statements in one message; their answers as text.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn simple_query(&self, sql: &str) -> Result<Vec<SimpleQueryMessage>, ServerError> {
        self.heard(self.client.simple_query(sql)).await
    }

    /// Runs a query in one message; its rows as text.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn simple_rows(&self, sql: &str) -> Result<Vec<SimpleQueryRow>, ServerError> {
        let answers = self.simple_query(sql).await?;
        let rows = answers.into_iter().filter_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Runs a query without a name. Values and columns must be of built-in types: to learn of others,
    /// the client would prepare statements of its own.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn query_typed(
        &self,
        sql: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, ServerError> {
        self.heard(self.client.query_typed(sql, values)).await
    }

    /// The same, for exactly one row.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn query_typed_one(
        &self,
        sql: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Row, ServerError> {
        self.heard(self.client.query_typed_one(sql, values)).await
    }

    /// The same, for one row or none.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn query_typed_opt(
        &self,
        sql: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Option<Row>, ServerError> {
        self.heard(self.client.query_typed_opt(sql, values)).await
    }

    /// Runs a statement without a name; the rows that it concerned.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn execute_typed(
        &self,
        sql: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<u64, ServerError> {
        self.heard(self.client.execute_typed(sql, values)).await
    }

    /// Prepares a statement under a name that the server session does not have. It must be dropped
    /// before the transaction ends, which closes it in time: the client sends in order.
    ///
    /// Behind a pooler, others may have left statements in the session, with the names that this
    /// client would give. That aborts the transaction, so it goes back to `savepoint`, and takes the
    /// next name.
    ///
    /// # Errors
    /// [`ServerError`].
    #[boxed]
    pub async fn prepare(&self, sql: &str, savepoint: &str) -> Result<Statement, ServerError> {
        let mut names_left = NAMES_MAX;
        loop {
            let error = match self.heard(self.client.prepare(sql)).await {
                Ok(statement) => return Ok(statement),
                Err(error) => error,
            };
            let is_taken = error.code() == Some(&SqlState::DUPLICATE_PSTATEMENT);
            if !is_taken || names_left == 0 {
                return Err(error);
            }
            names_left -= 1;
            self.run_in_step(&format!("ROLLBACK TO {savepoint}")).await?;
        }
    }

    /// Begins a COPY by a prepared statement.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn copy_in(&self, statement: &Statement) -> Result<CopyIn, ServerError> {
        let sink = self.heard(self.client.copy_in(statement)).await?;
        let end_cause = self.end_cause.clone();
        Ok(CopyIn { sink: Box::pin(sink), end_cause, silence_max: self.silence_max })
    }

    /// Runs a command after an error, and makes sure that the answer is the answer to it.
    ///
    /// When a COPY fails before the server has asked for its data (no such column), the server
    /// answers the client's two Sync messages with one ReadyForQuery each. tokio-postgres takes the
    /// second for the end of its next command, and from there on each command gets the answer of the
    /// one before: a COMMIT would look done before it is (rust-postgres issue 789). A value that only
    /// this command returns shows whether client and server are in step.
    ///
    /// # Errors
    /// [`ServerError::OutOfStep`] when they are not.
    pub async fn run_in_step(&self, command: &str) -> Result<(), ServerError> {
        self.ask_in_step(command, "true").await.map(drop)
    }

    /// Runs a command after an error, then asks for the value of an expression; see
    /// [`Link::run_in_step`].
    ///
    /// # Errors
    /// [`ServerError::OutOfStep`] when client and server are out of step.
    pub(crate) async fn ask_in_step(
        &self,
        command: &str,
        expression: &str,
    ) -> Result<Option<String>, ServerError> {
        let expected = self.steps.fetch_add(1, Ordering::Relaxed).to_string();
        let command = format!("{command}; SELECT {expected}, {expression}");
        let rows = self.simple_rows(&command).await?;
        let row = rows.last().filter(|row| row.get(0) == Some(expected.as_str()));
        row.map(|row| row.get(1).map(ToOwned::to_owned)).ok_or(ServerError::OutOfStep)
    }

    /// Commits. Whatever is no plain confirmation is an error, and says nothing of what was done.
    ///
    /// # Errors
    /// Why it is not known whether the transaction was committed.
    pub async fn commit(&self) -> Result<(), String> {
        match self.simple_query("COMMIT").await.as_deref() {
            Ok([SimpleQueryMessage::CommandComplete(_)]) => Ok(()),
            Ok(_) => Err("the server did not confirm the commit".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Waits for a call that may take long, for as long as the server is alive: after each silence it is
    /// asked by another connection whether it still answers.
    ///
    /// # Errors
    /// [`ServerError::Silent`] when it does not.
    pub async fn unbounded<T>(
        &self,
        server: &PostgresServer,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, ServerError> {
        let mut call = std::pin::pin!(call);
        loop {
            if let Ok(outcome) = tokio::time::timeout(self.silence_max, &mut call).await {
                return outcome.map_err(|error| self.failed(error));
            }
            let other = server.connect(self.silence_max).await;
            let answers = match &other {
                Ok(other) => other.batch_execute("SELECT 1").await.is_ok(),
                Err(_) => false,
            };
            if !answers {
                return Err(ServerError::Silent(self.silence_max));
            }
        }
    }

    /// The connection below, for what this type does not offer. Such calls have no deadline of their own.
    pub fn client(&self) -> &Client {
        self.prepared.begin();
        &self.client
    }
}

/// A COPY under way. Dropped before its end, it fails on the server.
pub struct CopyIn {
    sink: Pin<Box<CopyInSink<Bytes>>>,
    end_cause: EndCause,
    silence_max: Duration,
}

impl CopyIn {
    /// Sends bytes. Only a server that takes none for too long is silent here: it answers at the end.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn feed(&mut self, bytes: Bytes) -> Result<(), ServerError> {
        match tokio::time::timeout(self.silence_max, self.sink.feed(bytes)).await {
            Ok(outcome) => outcome.map_err(|error| self.end_cause.of(error)),
            Err(_) => Err(ServerError::Silent(self.silence_max)),
        }
    }

    /// Ends the COPY and waits for the server's word.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn finish(&mut self) -> Result<u64, ServerError> {
        match tokio::time::timeout(self.silence_max, self.sink.as_mut().finish()).await {
            Ok(outcome) => outcome.map_err(|error| self.end_cause.of(error)),
            Err(_) => Err(ServerError::Silent(self.silence_max)),
        }
    }
}
