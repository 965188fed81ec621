//! A connection on which every call has a deadline.
//!
//! A server process that was stopped, or a network that drops packets, never answers. The kernel does not notice while
//! the kernel of the peer still acknowledges packets. So a call ends here after a time of silence.
//!
//! Two more invariants:
//! - No prepared statement outlives its transaction. A pooler in transaction mode may lend the server session to others
//!   afterwards. Queries are typed and unnamed. COPY needs a named statement, which its caller prepares and closes
//!   within the transaction.
//! - After an error, the connection is used again only if the next answer belongs to the next command
//!   ([`Link::run_in_step`]). Otherwise a COMMIT could look confirmed before it is.

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

/// Number of further tries to find a name for a prepared statement that does not exist in the server session.
const NAMES_MAX: u32 = 50;

/// Reason why a call on a connection failed.
#[derive(Debug)]
pub enum ServerError {
    /// Error of the server or the network.
    Failed(tokio_postgres::Error),
    /// `sslrootcert` was given, but the server has no TLS or no valid certificate.
    Unverified {
        /// Cause.
        error: tokio_postgres::Error,
        /// File of certificates.
        roots: String,
    },
    /// The connection ended before the call, for this reason.
    Broken(String),
    /// No answer for this long.
    Silent(Duration),
    /// The answer belongs to another command: the connection must not be used any more.
    OutOfStep,
}

impl ServerError {
    /// Returns the server's own error, if it sent one.
    pub fn as_db_error(&self) -> Option<&DbError> {
        match self {
            Self::Failed(error) => error.as_db_error(),
            Self::Unverified { .. } | Self::Broken(_) | Self::Silent(_) | Self::OutOfStep => None,
        }
    }

    /// Returns the SQLSTATE, if the server sent one.
    pub fn code(&self) -> Option<&SqlState> {
        self.as_db_error().map(DbError::code)
    }

    /// Whether this connection, and all others to the server, should be closed and opened again: the server is shutting
    /// down or starting, has an internal error, cannot be written to (a standby after a failover), or the connection
    /// broke.
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
                "{}: with sslrootcert={roots} the server must have TLS and a certificate for this host that this \
                 file verifies: correct the file or the host; or remove sslrootcert, for TLS without \
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

/// Reason why a connection ended, once it has. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct EndCause(Arc<OnceLock<String>>);

impl EndCause {
    /// Notes the reason. Must be called before waiting calls learn that the connection is closed.
    pub(super) fn note(&self, error: &tokio_postgres::Error) {
        self.0.get_or_init(|| describe(error));
    }

    /// Returns the error of a call. The client only reports that an ended connection is closed; the noted reason
    /// replaces that.
    fn of(&self, error: tokio_postgres::Error) -> ServerError {
        match self.0.get().filter(|_| error.is_closed()) {
            Some(cause) => ServerError::Broken(cause.clone()),
            None => ServerError::Failed(error),
        }
    }
}

/// Client with the state of its connection.
pub(super) struct Connected {
    pub(super) client: Client,
    pub(super) end_cause: EndCause,
    pub(super) prepared: Prepared,
}

/// Connection. Dropping it closes it and cancels what it is doing.
pub struct Link {
    client: Client,
    end_cause: EndCause,
    prepared: Prepared,
    silence_max: Duration,
    /// Number of commands that [`Link::run_in_step`] ran.
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

    /// Converts the error of a call on [`Link::client`].
    pub fn failed(&self, error: tokio_postgres::Error) -> ServerError {
        self.end_cause.of(error)
    }

    /// Whether the connection can no longer be used.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Returns the time without an answer after which a call fails.
    pub fn silence_max(&self) -> Duration {
        self.silence_max
    }

    /// Waits for an answer, at most as long as the server may be silent.
    async fn heard<T>(
        &self,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, ServerError> {
        self.prepared.begin();
        // After a timeout the answer may still arrive, and would look like that of the next call. `Silent` condemns the
        // connection, so there is no next call.
        match tokio::time::timeout(self.silence_max, call).await {
            Ok(outcome) => outcome.map_err(|error| self.failed(error)),
            Err(_) => Err(ServerError::Silent(self.silence_max)),
        }
    }

    /// Runs statements without parameters, in one message. After one that fails, no other runs.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn batch_execute(&self, sql: &str) -> Result<(), ServerError> {
        self.heard(self.client.batch_execute(sql)).await
    }

    /// Runs statements in one message. Returns their answers as text.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn simple_query(&self, sql: &str) -> Result<Vec<SimpleQueryMessage>, ServerError> {
        self.heard(self.client.simple_query(sql)).await
    }

    /// Runs a query in one message. Returns its rows as text.
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

    /// Runs an unnamed query. Parameters and columns must have built-in types: for others the client would prepare
    /// statements of its own.
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

    /// Runs an unnamed query that returns exactly one row.
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

    /// Runs an unnamed query that returns at most one row.
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

    /// Runs an unnamed statement. Returns the number of affected rows.
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

    /// Prepares a statement under a name that does not exist in the server session. The caller must drop it before the
    /// transaction ends; the client sends in order, so the statement is closed in time.
    ///
    /// Behind a pooler, other clients may have left statements in the session under the names that this client chooses.
    /// The error aborts the transaction, so this function returns to `savepoint` and tries the next name.
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
            // The server refuses the name, not the statement: another client of the pooler has left one of that name.
            let is_taken = error.code() == Some(&SqlState::DUPLICATE_PSTATEMENT);
            if !is_taken || names_left == 0 {
                return Err(error);
            }
            names_left -= 1;
            self.run_in_step(&format!("ROLLBACK TO {savepoint}")).await?;
        }
    }

    /// Starts a COPY with a prepared statement.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn copy_in(&self, statement: &Statement) -> Result<CopyIn, ServerError> {
        let sink = self.heard(self.client.copy_in(statement)).await?;
        let end_cause = self.end_cause.clone();
        Ok(CopyIn { sink: Box::pin(sink), end_cause, silence_max: self.silence_max })
    }

    /// Runs a command after an error, and checks that the answer belongs to it.
    ///
    /// If a COPY fails before the server asks for its data (for example because of a missing column), the server
    /// answers each of the client's two Sync messages with a ReadyForQuery. tokio-postgres takes the second for the end
    /// of its next command. From then on, each command gets the answer of the previous one, and a COMMIT would look
    /// done before it is (rust-postgres issue 789). So this function also selects a value that only this command
    /// returns.
    ///
    /// # Errors
    /// [`ServerError::OutOfStep`] if the answer belongs to another command.
    pub async fn run_in_step(&self, command: &str) -> Result<(), ServerError> {
        self.ask_in_step(command, "true").await.map(drop)
    }

    /// Runs a command after an error, and returns the value of an expression; see [`Link::run_in_step`].
    ///
    /// # Errors
    /// [`ServerError::OutOfStep`] if the answer belongs to another command.
    pub(crate) async fn ask_in_step(
        &self,
        command: &str,
        expression: &str,
    ) -> Result<Option<String>, ServerError> {
        // A number that no other command on this connection returns.
        let expected = self.steps.fetch_add(1, Ordering::Relaxed).to_string();
        let command = format!("{command}; SELECT {expected}, {expression}");
        let rows = self.simple_rows(&command).await?;
        let row = rows.last().filter(|row| row.get(0) == Some(expected.as_str()));
        row.map(|row| row.get(1).map(ToOwned::to_owned)).ok_or(ServerError::OutOfStep)
    }

    /// Commits. Any answer except a plain confirmation is an error, after which the outcome is unknown: the transaction
    /// may be committed or not.
    ///
    /// # Errors
    /// The reason why the outcome is unknown.
    pub async fn commit(&self) -> Result<(), String> {
        match self.simple_query("COMMIT").await.as_deref() {
            Ok([SimpleQueryMessage::CommandComplete(_)]) => Ok(()),
            Ok(_) => Err("the server did not confirm the commit".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Waits for a call that may take long, as long as the server is alive. After each time of silence, another
    /// connection checks whether the server still answers.
    ///
    /// # Errors
    /// [`ServerError::Silent`] if it does not.
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
            // The call itself is silent. Another connection tells a slow statement from a dead server.
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

    /// Returns the underlying client, for calls that this type does not have. They have no deadline.
    pub fn client(&self) -> &Client {
        self.prepared.begin();
        &self.client
    }
}

/// COPY in progress. If it is dropped before its end, the server aborts it.
pub struct CopyIn {
    sink: Pin<Box<CopyInSink<Bytes>>>,
    end_cause: EndCause,
    silence_max: Duration,
}

impl CopyIn {
    /// Sends bytes. Fails if the server accepts none for too long. The server answers only after the last bytes.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn feed(&mut self, bytes: Bytes) -> Result<(), ServerError> {
        match tokio::time::timeout(self.silence_max, self.sink.feed(bytes)).await {
            Ok(outcome) => outcome.map_err(|error| self.end_cause.of(error)),
            Err(_) => Err(ServerError::Silent(self.silence_max)),
        }
    }

    /// Ends the COPY and waits for the answer of the server.
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
