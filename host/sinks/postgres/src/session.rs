//! What a transaction of the sink begins with, and what is created once.
//!
//! No setting outlives its transaction: behind a pooler in transaction mode the server session is
//! another application's next.

use std::time::Duration;

use shardmill_pg::{Link, PostgresServer, ServerError};

/// Any fixed number: creators wait for each other under it, because concurrent
/// `CREATE TABLE IF NOT EXISTS` may fail on the catalogue's unique indexes. The lock ends with the
/// transaction.
const CREATE_LOCK: i64 = 0x5348_4152_444d_494c;

/// Settings of a transaction, each only where nobody has set it for the role, the database or in the
/// URL. A statement that hangs (a lock, a full disk) must end as a visible error; an owner that was
/// cut off must not keep its locks, which the next owner of the shard waits for; and a commit that
/// the server has confirmed must be on its disk, because the checkpoint follows it. One row, no matter
/// what is set.
pub(super) const SETTINGS: &str = "SELECT \
    CASE WHEN current_setting('statement_timeout') = '0' \
        THEN set_config('statement_timeout', '60s', true) END, \
    CASE WHEN current_setting('lock_timeout') = '0' \
        THEN set_config('lock_timeout', '30s', true) END, \
    CASE WHEN current_setting('idle_in_transaction_session_timeout') = '0' \
        THEN set_config('idle_in_transaction_session_timeout', '60s', true) END, \
    CASE WHEN current_setting('synchronous_commit') = 'off' \
        THEN set_config('synchronous_commit', 'on', true) END";

/// Whatever the role's default, a commit needs to see what other owners have committed meanwhile. A
/// database that is set to be read-only stays so.
pub(super) const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// A COPY without a row.
pub(super) const EMPTY_COPY: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\xff\xff";

/// The savepoint that each COPY runs behind.
pub(super) const SAVEPOINT: &str = "copy";

/// A connection of a command, which gives a server up that says nothing for so long. The error is a sentence.
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
