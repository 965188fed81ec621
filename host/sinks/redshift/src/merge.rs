//! Statements that move rows from the staging table of the session into the target, for each mode.
//!
//! Redshift enforces no unique key and has no ON CONFLICT. While the ledger is locked, no other load of ours changes
//! the target, so an UPDATE followed by an INSERT of the missing rows has the same effect.

use super::table::OWN_PREFIX;
use shardmill_config::WriteMode;
use shardmill_pg::name::{TableName, quoted};

/// Staging table that COPY loads into. It belongs to the session, and is dropped with it.
pub(super) const STAGING: &str = "shardmill_staging";
/// Drops it. It exists only during a commit.
pub(super) const DROP_STAGING: &str = "DROP TABLE shardmill_staging";
/// Column of the staging table for the index of the row in the commit.
pub(super) const ROW: &str = "shardmill_row";
/// Column of the staging table for the number of the row's set.
pub(super) const SET: &str = "shardmill_set";

/// Creates the staging table: the target's columns without their constraints, and our own.
pub(super) fn create_staging(table: &TableName) -> String {
    debug_assert!(ROW.starts_with(OWN_PREFIX) && SET.starts_with(OWN_PREFIX));
    format!(
        "CREATE TEMP TABLE {STAGING} AS SELECT *, 0::bigint AS {ROW}, 0::bigint AS {SET} FROM {} \
         WHERE false",
        table.quoted()
    )
}

/// Deletes staged rows that another row of their set with the same key replaces.
pub(super) fn keep_winners(mode: &WriteMode) -> Option<String> {
    let order = match mode {
        WriteMode::Append => return None,
        WriteMode::Upsert { newest_by: Some(by), .. } => format!("{} DESC, {ROW} DESC", quoted(by)),
        WriteMode::Upsert { newest_by: None, .. } => format!("{ROW} DESC"),
        WriteMode::Ignore { .. } => ROW.to_owned(),
    };
    let key = list(mode.key());
    Some(format!(
        "DELETE FROM {STAGING} USING \
         (SELECT {ROW}, ROW_NUMBER() OVER (PARTITION BY {SET}, {key} ORDER BY {order}) AS place \
          FROM {STAGING}) AS ranked \
         WHERE {STAGING}.{ROW} = ranked.{ROW} AND ranked.place > 1"
    ))
}

/// Moves the rows of one set, which have these columns, to the target.
pub(super) fn statements(
    mode: &WriteMode,
    table: &TableName,
    columns: &[&str],
    set: usize,
) -> Vec<String> {
    let target = table.quoted();
    let names = list(columns);
    if *mode == WriteMode::Append {
        return vec![format!(
            "INSERT INTO {target} ({names}) SELECT {names} FROM {STAGING} WHERE {SET} = {set}"
        )];
    }
    let same = |column: &String| format!("target.{0} = staged.{0}", quoted(column));
    let same: Vec<String> = mode.key().iter().map(same).collect();
    let same = same.join(" AND ");
    let mut statements = Vec::new();
    if let WriteMode::Upsert { key, newest_by } = mode {
        let others = columns.iter().filter(|name| !key.iter().any(|key| key == *name));
        let updates: Vec<String> =
            others.map(|name| quoted(name)).map(|name| format!("{name} = staged.{name}")).collect();
        let newer = newest_by.as_deref().map(quoted).map_or(String::new(), |by| {
            format!(" AND (target.{by} IS NULL OR target.{by} <= staged.{by})")
        });
        if !updates.is_empty() {
            statements.push(format!(
                "UPDATE {target} AS target SET {} FROM {STAGING} AS staged \
                 WHERE staged.{SET} = {set} AND {same}{newer}",
                updates.join(", ")
            ));
        }
    }
    let staged: Vec<String> =
        columns.iter().map(|name| format!("staged.{}", quoted(name))).collect();
    let first = mode.key().first().map(|name| quoted(name)).unwrap_or_default();
    statements.push(format!(
        "INSERT INTO {target} ({names}) SELECT {} FROM {STAGING} AS staged \
         LEFT JOIN {target} AS target ON {same} \
         WHERE staged.{SET} = {set} AND target.{first} IS NULL",
        staged.join(", ")
    ));
    statements
}

fn list(names: &[impl AsRef<str>]) -> String {
    let names: Vec<String> = names.iter().map(|name| quoted(name.as_ref())).collect();
    names.join(", ")
}
