//! Invalid values in the state database: a failing disk, a truncated copy or a person has changed them. None of
//! them is replaced by a default, because records would be lost or doubled without a message.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, Type, ValueRef};
use rusqlite::{Error, ErrorCode};

use shardmill_core::record::Digest;

/// The way out when a value or the whole file cannot be read.
pub(super) const WAY_OUT: &str = "nothing was changed; the file is damaged: restore the state folder from a copy, or move it away: the \
     next start then continues from the sinks' positions, and the dead letters are lost";

/// Whether an error says that the file is damaged, as opposed to out of reach (locked, full disk, missing table).
pub(super) fn is_damage(cause: &Error) -> bool {
    let code = cause.sqlite_error_code();
    matches!(code, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
        || matches!(
            cause,
            Error::FromSqlConversionFailure(..)
                | Error::IntegralValueOutOfRange(..)
                | Error::InvalidColumnType(..)
                | Error::Utf8Error(..)
        )
}

/// Describes an error by the name of the column and the expected value.
pub(super) fn describe(cause: &Error) -> String {
    match cause {
        Error::FromSqlConversionFailure(_, _, cause) => cause.to_string(),
        Error::InvalidColumnType(_, column, Type::Null) => format!("column {column} is missing"),
        Error::InvalidColumnType(_, column, found) => {
            format!("invalid column {column}: found a value of type {found}")
        }
        Error::IntegralValueOutOfRange(column, found) => {
            format!("invalid number {found} in column {} of the query: out of range", column + 1)
        }
        cause => cause.to_string(),
    }
}

/// Returns the error for a value that is never written to this column.
pub(super) fn invalid(column: usize, kind: Type, cause: impl Into<String>) -> Error {
    Error::FromSqlConversionFailure(column, kind, cause.into().into())
}

/// A column that is 0 or 1. SQLite has no boolean type; any other number is an error, not `true`.
pub(super) struct Flag(pub(super) bool);

impl FromSql for Flag {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value.as_i64()? {
            0 => Ok(Self(false)),
            1 => Ok(Self(true)),
            other => Err(FromSqlError::Other(format!("expected 0 or 1, found {other}").into())),
        }
    }
}

/// Reads the digest of a component in a stored revision.
pub(super) fn digest<'d, D: serde::Deserializer<'d>>(from: D) -> Result<String, D::Error> {
    let digits = <String as serde::Deserialize>::deserialize(from)?;
    match digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        true => Ok(digits),
        false => Err(serde::de::Error::custom(format!(
            "invalid digest {digits:?}: expected 64 hexadecimal digits"
        ))),
    }
}

/// Checks that a component's bytes have the digest that names them.
pub(super) fn validate_component(digest: &str, bytes: &[u8]) -> rusqlite::Result<()> {
    let found = Digest::of(bytes);
    match found.as_str() == digest {
        true => Ok(()),
        false => {
            let cause = format!("invalid component {digest}: its bytes have the digest {found}");
            Err(invalid(0, Type::Blob, cause))
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    #[test]
    fn what_cannot_be_read_differs_from_what_is_out_of_reach() {
        let database = Connection::open_in_memory().expect("a database");
        let read = |sql: &str| database.query_row(sql, [], |row| row.get::<_, u64>(0)).map(drop);
        for (sql, is_damaged, expected) in [
            ("SELECT 'x' AS sub", true, "invalid column sub: found a value of type Text"),
            ("SELECT NULL AS sub", true, "column sub is missing"),
            ("SELECT -1 AS sub", true, "invalid number -1 in column 1"),
            ("SELECT 1 WHERE 0", false, "no rows"),
            ("SELECT * FROM absent", false, "no such table"),
        ] {
            let error = read(sql).expect_err(sql);
            assert_eq!(is_damage(&error), is_damaged, "{sql}");
            assert!(describe(&error).contains(expected), "{sql}: {}", describe(&error));
        }
        let flag = |sql: &str| database.query_row(sql, [], |row| row.get::<_, Flag>(0));
        assert!(flag("SELECT 1").is_ok_and(|flag| flag.0));
        assert!(flag("SELECT 0").is_ok_and(|flag| !flag.0));
        for sql in ["SELECT 2", "SELECT -1", "SELECT 'x'", "SELECT NULL"] {
            assert!(flag(sql).is_err_and(|error| is_damage(&error)), "{sql}");
        }
    }

    #[test]
    fn bytes_are_compared_with_their_digest() {
        let digest = Digest::of(b"bytes");
        assert!(validate_component(digest.as_str(), b"bytes").is_ok());
        let error = validate_component(digest.as_str(), b"other").expect_err("other bytes");
        assert!(describe(&error).contains("invalid component"), "{}", describe(&error));
    }
}
