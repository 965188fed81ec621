//! The schema of the state database, as numbered steps from one version to the next.
//!
//! The version is kept in `user_version`. A database of an earlier version is brought to the newest one when it
//! is opened, in one transaction: a process that ends in the middle leaves the earlier version.
//!
//! A step that has been published is never edited, because a database that took it does not take it again. A
//! change of the schema is a new step, with a copy of the schema that it makes in `migrations/schemas`: the tests
//! open a database of each version with the present code.
//!
//! The crate `rusqlite_migration` needs an older `rusqlite` (0.40 in its version 2.6), and two of them cannot be
//! linked into one program.

use rusqlite::{Connection, TransactionBehavior};

use super::assets;

/// A version of the schema, with the step that leads to it from the version before.
struct Version {
    /// Its number, as in `user_version`.
    number: i64,
    /// SQL that leads to it from the version before; for the first one, from an empty database.
    step: &'static str,
    /// The column that the last commit of this version added. Builds between two versions wrote the same number
    /// before the schema was complete; their databases lack it.
    completed_by: Column,
}

/// A column that identifies a complete schema.
struct Column {
    table: &'static str,
    column: &'static str,
}

/// All supported versions, in order. Version 1 existed for hours only and is not supported.
const VERSIONS: [Version; 5] = [
    Version {
        number: 2,
        step: assets::TO_2,
        completed_by: Column { table: "shard", column: "caught_up_ms" },
    },
    Version {
        number: 3,
        step: assets::TO_3,
        completed_by: Column { table: "redrive", column: "letter" },
    },
    Version {
        number: 4,
        step: assets::TO_4,
        completed_by: Column { table: "letter_log_stream", column: "created_ms" },
    },
    Version {
        number: 5,
        step: assets::TO_5,
        completed_by: Column { table: "change", column: "reason" },
    },
    Version {
        number: 6,
        step: assets::TO_6,
        completed_by: Column { table: "letter_carrier", column: "carrier" },
    },
];

const OLDEST: i64 = VERSIONS[0].number;
/// The version that this build reads and writes.
pub(super) const NEWEST: i64 = VERSIONS[VERSIONS.len() - 1].number;

/// A database that was not brought to the newest version; it is unchanged.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotMigrated {
    /// The database cannot be read or written.
    #[error(transparent)]
    Sql(#[from] rusqlite::Error),
    /// A newer build wrote it.
    #[error(
        "expected schema version {OLDEST} to {NEWEST}, found {found}, which a newer shardmill wrote"
    )]
    Newer {
        /// Its version.
        found: i64,
    },
    /// No step leads from its version to the newest one.
    #[error("expected schema version {OLDEST} to {NEWEST}, found {found}, which is not supported")]
    Unsupported {
        /// Its version.
        found: i64,
    },
    /// A build between two versions wrote it.
    #[error(
        "expected schema version {version} with the column {column} of table {table}, found it without: a \
         build between two versions wrote it"
    )]
    Unfinished {
        /// The version that it claims to have.
        version: i64,
        /// The table that lacks the column, or is missing itself.
        table: &'static str,
        /// The missing column.
        column: &'static str,
    },
}

impl NotMigrated {
    /// Returns what the user can do.
    pub(super) fn way_out(&self) -> &'static str {
        match self {
            Self::Sql(_) => "free the disk, or set `state_dir` elsewhere",
            Self::Newer { .. } => "run the version of shardmill that wrote it",
            Self::Unsupported { .. } | Self::Unfinished { .. } => {
                "run the version of shardmill that wrote it, or set `state_dir` elsewhere: a start with a new \
                 state continues from the sinks' positions, without the dead letters of this one"
            }
        }
    }
}

/// Brings a database to the newest version; an empty one too.
///
/// # Errors
/// [`NotMigrated`]; nothing was changed then.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), NotMigrated> {
    if version(connection)? != NEWEST {
        let change = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Read again within the transaction: another process may have migrated it meanwhile.
        for missing in steps_after(&change, version(&change)?)? {
            change.execute_batch(missing.step)?;
            change.pragma_update(None, "user_version", missing.number)?;
        }
        change.commit()?;
    }
    steps_after(connection, version(connection)?).map(drop)
}

/// Reads the version of a database; 0: it is empty.
///
/// # Errors
/// The database cannot be read.
pub(super) fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

/// Returns the versions after `found`, the version of a database, after checking that its schema is complete.
fn steps_after(connection: &Connection, found: i64) -> Result<&'static [Version], NotMigrated> {
    const ALL: &[Version] = &VERSIONS;
    if found == 0 {
        return Ok(ALL);
    }
    let Some(at) = ALL.iter().position(|version| version.number == found) else {
        return Err(match found > NEWEST {
            true => NotMigrated::Newer { found },
            false => NotMigrated::Unsupported { found },
        });
    };
    let Column { table, column } = ALL[at].completed_by;
    let is_complete = connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM pragma_table_info(?1) WHERE name = ?2)",
        [table, column],
        |row| row.get(0),
    )?;
    match is_complete {
        true => Ok(&ALL[at + 1..]),
        false => Err(NotMigrated::Unfinished { version: found, table, column }),
    }
}

#[cfg(test)]
mod tests;
