//! Upsert and ignore: rows are copied into a staging table of the transaction, and merged from there by one statement.
//!
//! If all keys are new, a plain COPY into the table has the same result in a third of the time. So that is tried first,
//! with a backoff after failures ([`PlainCopyBackoff`]).
//!
//! The staging table has the columns of the target but none of its constraints, so violations are found at the merge.
//! It keeps the order in which rows were copied (by `ctid`, because it is never updated), which decides between rows of
//! one commit with the same key. The merge runs in the order of the key, so that lanes that write the same rows lock
//! them in the same order and do not deadlock.

use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use shardmill_config::WriteMode;
use shardmill_pg::name::{TableName, quoted};
use shardmill_pg::{Link, ServerError};

/// Quoted name of the staging table. Each transaction that merges makes its own: behind a pooler, a later user of the
/// session would otherwise find it.
pub(super) const STAGING: &str = "pg_temp.\"shardmill_staging\"";

/// Backoff of plain COPY: whether to try it for the next part. It is tried as long as it succeeds. After a failure a
/// number of parts is merged before the next try; the number doubles with each further failure.
#[derive(Debug, Default)]
pub(super) struct PlainCopyBackoff {
    parts_to_wait: u32,
    last_wait: u32,
}

/// Number of parts that are merged after a failed plain COPY: after the first one, and at most.
const WAIT_PARTS: u32 = 8;
const WAIT_PARTS_MAX: u32 = 1024;

impl PlainCopyBackoff {
    /// Whether to try plain COPY for this part. Counts the parts.
    pub(super) fn should_try(&mut self) -> bool {
        let now = self.parts_to_wait == 0;
        self.parts_to_wait = self.parts_to_wait.saturating_sub(1);
        now
    }

    pub(super) fn succeeded(&mut self) {
        self.last_wait = 0;
    }

    pub(super) fn failed(&mut self) {
        self.last_wait = (self.last_wait * 2).clamp(WAIT_PARTS, WAIT_PARTS_MAX);
        self.parts_to_wait = self.last_wait;
    }
}

/// Whether a COPY failed because a key exists already: in the table, in the same part, or in a concurrent transaction
/// that waits for ours (a deadlock).
pub(super) fn is_key_conflict(error: &ServerError) -> bool {
    let code = error.code();
    code == Some(&SqlState::UNIQUE_VIOLATION) || code == Some(&SqlState::T_R_DEADLOCK_DETECTED)
}

/// Creates the staging table in the current transaction, with the current columns of the target.
pub(super) async fn create_staging(link: &Link, table: &TableName) -> Result<(), ServerError> {
    link.batch_execute(&format!(
        "DROP TABLE IF EXISTS {STAGING}; \
             CREATE TEMPORARY TABLE \"shardmill_staging\" ON COMMIT DROP \
                 AS SELECT * FROM {} WITH NO DATA",
        table.quoted()
    ))
    .await
}

/// Returns the statement that merges the staged rows with these columns.
pub(super) fn statement(mode: &WriteMode, table: &TableName, columns: &[&str]) -> String {
    let target = table.quoted();
    let names: Vec<String> = columns.iter().map(|name| quoted(name)).collect();
    let names = names.join(", ");
    let key: Vec<String> = mode.key().iter().map(|name| quoted(name)).collect();
    let key = key.join(", ");
    // Of several rows with one key, the first in this order is taken.
    let order = match mode {
        WriteMode::Upsert { newest_by: Some(by), .. } => format!("{} DESC, ctid DESC", quoted(by)),
        WriteMode::Upsert { newest_by: None, .. } => "ctid DESC".into(),
        WriteMode::Append | WriteMode::Ignore { .. } => "ctid".into(),
    };
    let on_conflict = mode.on_conflict("target", columns, quoted);
    format!(
        "INSERT INTO {target} AS target ({names}) \
         SELECT DISTINCT ON ({key}) {names} FROM {STAGING} ORDER BY {key}, {order} {on_conflict}"
    )
}

/// Finds unique constraints or indexes on exactly these columns that are deferrable.
const DEFERRABLE_KEYS: &str = "
    SELECT i.indexrelid::regclass::text
    FROM pg_catalog.pg_index AS i
    WHERE i.indrelid = to_regclass($1) AND i.indisunique AND i.indisvalid AND NOT i.indimmediate
        AND i.indpred IS NULL
        AND (SELECT array_agg(a.attname::text ORDER BY a.attname::text)
             FROM pg_catalog.pg_attribute AS a
             WHERE a.attrelid = i.indrelid
                 AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))
            = (SELECT array_agg(k ORDER BY k) FROM unnest($2::text[]) AS k)
    LIMIT 1";

/// Checks that the table has a unique index on the key that `ON CONFLICT` can use. The error is a sentence.
pub(super) async fn check_key(
    client: &Link,
    table: &TableName,
    mode: &WriteMode,
) -> Result<(), String> {
    let names: Vec<&str> = mode.key().iter().map(|name| &**name).collect();
    let key: Vec<String> = mode.key().iter().map(|name| quoted(name)).collect();
    let (target, key) = (table.quoted(), key.join(", "));
    let misfit = |error: ServerError| format!("invalid key ({key}) for table {table}: {error}");
    // EXPLAIN plans the statement without running it: the planner looks for the index.
    let plan = format!(
        "EXPLAIN INSERT INTO {target} ({key}) SELECT {key} FROM {target} WHERE false \
         ON CONFLICT ({key}) DO NOTHING"
    );
    match client.batch_execute(&plan).await {
        Ok(()) => {}
        Err(error) if error.code() == Some(&SqlState::INVALID_COLUMN_REFERENCE) => {
            return Err(format!(
                "missing unique index on ({key}) of table {table}, which matches rows by key: \
                 CREATE UNIQUE INDEX ON {target} ({key})"
            ));
        }
        // Another check reports which right is missing, and for what.
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {}
        Err(error) => return Err(misfit(error)),
    }
    // The planner accepts a deferrable index; only the first row would fail.
    let values: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
        [(&target, Type::TEXT), (&names, Type::TEXT_ARRAY)];
    let late = client.query_typed_opt(DEFERRABLE_KEYS, &values).await.map_err(misfit)?;
    match late.map(|row| row.try_get::<_, String>(0)) {
        None => Ok(()),
        Some(index) => Err(format!(
            "the unique constraint {} on ({key}) of table {table} is DEFERRABLE, which ON CONFLICT \
             does not support: drop it, and add one that is not deferrable",
            index.unwrap_or_default()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_copy_that_fails_again_waits_longer() {
        let mut plain_copy_backoff = PlainCopyBackoff::default();
        let waited = |plain_copy_backoff: &mut PlainCopyBackoff| {
            (0..).take_while(|_| !plain_copy_backoff.should_try()).count()
        };
        assert_eq!(waited(&mut plain_copy_backoff), 0);
        for expected in [8, 16, 32] {
            plain_copy_backoff.failed();
            assert_eq!(waited(&mut plain_copy_backoff), expected);
        }
        plain_copy_backoff.succeeded();
        assert_eq!(waited(&mut plain_copy_backoff), 0);
        plain_copy_backoff.failed();
        assert_eq!(waited(&mut plain_copy_backoff), 8);
    }
}
