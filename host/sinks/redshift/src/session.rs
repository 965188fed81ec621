//! A connection to Redshift: statements and answers are text.
//!
//! Redshift's binary forms of types differ from PostgreSQL's; their texts do not.

use std::time::Duration;

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use shardmill_pg::{Link, PostgresServer, ServerError};

/// Limit of a statement's time, in milliseconds. A load of a large commit on a busy cluster takes minutes; a statement
/// that takes longer ends as a visible error.
const SETTINGS: &str = "SET statement_timeout TO 900000";

/// Connects.
pub(super) async fn connect(
    server: &PostgresServer,
    silence_max: Duration,
) -> Result<Link, ServerError> {
    let link = server.connect(silence_max).await?;
    link.batch_execute(SETTINGS).await?;
    Ok(link)
}

/// Runs statements. Returns the number of rows that the last one affected.
pub(super) async fn run(link: &Link, sql: &str) -> Result<u64, ServerError> {
    let answers = link.simple_query(sql).await?;
    let counts = answers.iter().filter_map(|answer| match answer {
        SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
        _ => None,
    });
    Ok(counts.last().unwrap_or(0))
}

/// Runs a query. Returns its rows.
pub(super) async fn rows(link: &Link, sql: &str) -> Result<Vec<SimpleQueryRow>, ServerError> {
    link.simple_rows(sql).await
}

/// Whether a statement failed because its table does not exist.
pub(super) fn is_no_table(error: &ServerError) -> bool {
    error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE)
}

/// Whether a statement failed because a column does not exist.
pub(super) fn is_no_column(error: &ServerError) -> bool {
    error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_COLUMN)
}

/// Quotes a text for SQL. A backslash is an escape in Redshift but not in PostgreSQL, so none is written.
pub(super) fn literal(text: &str) -> String {
    let parts = text.split('\\').map(|part| format!("'{}'", part.replace('\'', "''")));
    parts.collect::<Vec<_>>().join(" || chr(92) || ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_ends_where_its_text_ends() {
        for (text, sql) in [
            ("cars", "'cars'"),
            ("O'Hara", "'O''Hara'"),
            (r"a\'; drop table b", r"'a' || chr(92) || '''; drop table b'"),
        ] {
            assert_eq!(literal(text), sql);
        }
    }
}
