//! One connection to PostgreSQL, with the settings that exactly-once needs, and what its errors say.
//!
//! No secret leaves this file: errors name host and database, never the URL.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, Statement};

use super::position::PositionStatements;
use super::table::LiveTable;

/// A server that does not answer the first packet in this time is tried again by the delivery.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the network may keep sent bytes unacknowledged: a dead peer must not hold a shard for
/// the quarter of an hour that a kernel waits by default.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// After this silence the kernel asks whether the peer still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

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

/// A connection and what was learned and prepared on it.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) position: Option<PositionStatements>,
    /// Counts what [`Session::run_in_step`] ran.
    steps: u64,
    /// What reads the live table.
    pub(super) read_table: Option<Statement>,
    /// The live table as last read, until something suggests that it is another.
    pub(super) table: Option<LiveTable>,
    /// COPY statements by the places of their columns in `table`.
    pub(super) copies: HashMap<Box<[u16]>, Statement>,
}

impl Session {
    pub(super) async fn connect(config: &Config) -> Result<Self, tokio_postgres::Error> {
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %describe(&error), "a connection to PostgreSQL ended");
            }
        });
        client.batch_execute(SETTINGS).await?;
        Ok(Self {
            client,
            position: None,
            steps: 0,
            read_table: None,
            table: None,
            copies: HashMap::new(),
        })
    }

    /// Whether the connection can still be used, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        !self.client.is_closed()
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

    /// Forgets the table, so that it is read anew before the next row.
    pub(super) fn forget_table(&mut self) {
        self.table = None;
        self.copies.clear();
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

/// Reads a connection string and fills in the timeouts that it leaves open.
pub(crate) fn config(url: &str) -> Result<Config, String> {
    if let Some(mode) = ssl_mode(url)
        && matches!(mode, "require" | "verify-ca" | "verify-full")
    {
        return Err(no_tls(mode));
    }
    let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
        format!(
            "the connection string cannot be read: {}: \
             postgres://user:password@host:5432/database is due",
            describe(&error)
        )
    })?;
    if config.get_ssl_mode() == SslMode::Require {
        return Err(no_tls("require"));
    }
    if config.get_application_name().is_none() {
        config.application_name("shardmill");
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(TCP_USER_TIMEOUT);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_idle(KEEPALIVE_IDLE.min(config.get_keepalives_idle()));
        config.keepalives_interval(KEEPALIVE_INTERVAL);
        config.keepalives_retries(KEEPALIVE_RETRIES);
    }
    Ok(config)
}

fn no_tls(mode: &str) -> String {
    format!(
        "the connection string asks for sslmode={mode}, and this version speaks to PostgreSQL \
         without TLS only: use sslmode=disable over a trusted network, a socket or a TLS proxy"
    )
}

/// The `sslmode` of a connection string of either form, as it was written.
fn ssl_mode(text: &str) -> Option<&str> {
    let parameters = match text.starts_with("postgres://") || text.starts_with("postgresql://") {
        true => text.split_once('?')?.1,
        false => text,
    };
    let value = parameters.split_once("sslmode")?.1;
    let value = value.trim_start().strip_prefix('=')?.trim_start().trim_start_matches('\'');
    let is_part = |c: char| c.is_ascii_alphabetic() || c == '-';
    Some(&value[..value.find(|c| !is_part(c)).unwrap_or(value.len())])
}

/// Host and database, for errors.
pub(crate) fn place(config: &Config) -> String {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(host)) => host.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        None => match config.get_hostaddrs().first() {
            Some(address) => address.to_string(),
            None => "(no host)".into(),
        },
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let database = config.get_dbname().or(config.get_user()).unwrap_or("(default)");
    format!("PostgreSQL at {host}:{port}, database {database}")
}

/// An error with all that the server said, or with its causes.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    let Some(said) = error.as_db_error() else {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(deeper) = cause {
            // Writing into a String cannot fail.
            let _ = write!(text, ": {deeper}");
            cause = deeper.source();
        }
        return text;
    };
    let mut text = format!("{} (SQLSTATE {})", said.message(), said.code().code());
    for more in [said.detail(), said.hint()].into_iter().flatten() {
        let _ = write!(text, ": {more}");
    }
    text
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_that_asks_for_tls_is_refused_by_name() {
        for (url, mode) in [
            ("postgres://u:p@h/d?sslmode=require", "require"),
            ("postgresql://h/d?connect_timeout=3&sslmode=verify-full", "verify-full"),
            ("host=h sslmode=verify-ca dbname=d", "verify-ca"),
            ("host=h sslmode = 'require'", "require"),
        ] {
            let error = config(url).expect_err(url);
            assert!(error.contains(&format!("sslmode={mode}")), "{error}");
            assert!(!error.contains("u:p"), "{error}");
        }
        for url in ["postgres://sslmode=require@h/d", "postgres://h/d?sslmode=prefer", "host=h"] {
            assert!(config(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn an_unreadable_string_shows_no_secret() {
        let error = config("postgres://u:secret@h:port/d").expect_err("no port");
        assert!(error.contains("connection string") && !error.contains("secret"), "{error}");
    }
}
