//! The start of each transaction, and statements that create a table once.
//!
//! No setting outlives its transaction: behind a pooler in transaction mode, another application uses the server
//! session next.

use std::time::Duration;

use shardmill_pg::{Link, PostgresServer, ServerError};

/// Key of an advisory lock (any fixed number). Creators wait for each other, because concurrent
/// `CREATE TABLE IF NOT EXISTS` may fail on unique indexes of the catalogue. The lock ends with the transaction.
const CREATE_LOCK: i64 = 0x5348_4152_444d_494c;

/// Settings of a transaction, each applied only if nobody has set it for the role, the database or in the URL.
///
/// - A statement that hangs (a lock, a full disk) must end as a visible error.
/// - An owner that was cut off must not keep its locks, because the next owner of the shard waits for them.
/// - A confirmed commit must be on the server's disk, because the checkpoint follows it.
///
/// The query returns one row in any case.
pub(super) const SETTINGS: &str = "SELECT \
    CASE WHEN current_setting('statement_timeout') = '0' \
        THEN set_config('statement_timeout', '60s', true) END, \
    CASE WHEN current_setting('lock_timeout') = '0' \
        THEN set_config('lock_timeout', '30s', true) END, \
    CASE WHEN current_setting('idle_in_transaction_session_timeout') = '0' \
        THEN set_config('idle_in_transaction_session_timeout', '60s', true) END, \
    CASE WHEN current_setting('synchronous_commit') = 'off' \
        THEN set_config('synchronous_commit', 'on', true) END";

/// Start of a transaction. Whatever the default of the role is, a commit must see what other owners have committed
/// meanwhile. A database that is set to read-only stays read-only.
pub(super) const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// COPY data without a row.
pub(super) const EMPTY_COPY: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\xff\xff";

/// Savepoint before each COPY.
pub(super) const SAVEPOINT: &str = "copy";

/// Connects for a command, with a limit on the server's silence. The error is a sentence.
pub(super) async fn connect(
    server: &PostgresServer,
    silence_max: Duration,
) -> Result<Link, String> {
    let connected = server.connect(silence_max).await;
    connected.map_err(|error| format!("cannot connect to {}: {error}", server.place()))
}

/// Begins a transaction.
pub(super) async fn begin(link: &Link) -> Result<(), ServerError> {
    link.batch_execute(&format!("{BEGIN}; {SETTINGS}")).await
}

/// Runs a `CREATE … IF NOT EXISTS` while no other process runs one.
pub(super) async fn create_once(link: &Link, create: &str) -> Result<(), ServerError> {
    let locked = format!(
        "{BEGIN}; {SETTINGS}; SELECT pg_advisory_xact_lock({CREATE_LOCK}); {create}; COMMIT"
    );
    link.batch_execute(&locked).await
}
