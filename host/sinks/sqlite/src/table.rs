//! Live table: reads its columns as the file has them now, checks them against the columns that routes declare, and
//! creates it.

use rusqlite::{Connection, ErrorCode};

use super::position;
use super::trigger::{self, TriggerEffect};
use super::value::{ColumnType, Kind};
use shardmill_config::WriteMode;
use shardmill_core::masking::sanitized;
use shardmill_sinks_common::rows::ColumnNames;
pub use shardmill_sinks_common::rows::declared::{
    DeclaredColumn, Fit, LiveFit, check_fit, create_table_sql, may_create,
};

/// Query of the columns, without the hidden ones of virtual tables; 2 and 3 mark generated ones. SQLite gives an
/// `INTEGER PRIMARY KEY` a value if the row has none, so it is not required.
const READ_COLUMNS: &str = "SELECT name, type, hidden IN (2, 3), \
        \"notnull\" <> 0 AND dflt_value IS NULL AND hidden = 0 \
            AND NOT (pk = 1 AND upper(type) = 'INTEGER') \
    FROM pragma_table_xinfo(?1) WHERE hidden <> 1 ORDER BY cid";

const IS_STRICT: &str =
    "SELECT count(*) FROM pragma_table_list(?1) WHERE schema = 'main' AND strict";

/// Query of a table's triggers, which may refuse rows.
const TRIGGERS: &str = "SELECT name, sql FROM sqlite_schema \
    WHERE type = 'trigger' AND lower(tbl_name) = lower(?1) ORDER BY name";

/// Query of the tables that may roll back whole transactions.
const MAY_ROLL_BACK: &str = "SELECT name, sql FROM sqlite_schema \
    WHERE type = 'table' AND sql LIKE '%rollback%' ORDER BY name";

/// Query whether any table or trigger of the file contains FAIL, whether a row reaches it or not.
const SAYS_FAIL: &str = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE sql LIKE '%fail%' \
    UNION ALL SELECT 1 FROM sqlite_temp_schema WHERE sql LIKE '%fail%')";

/// Words that begin a constraint, so a declared type must not contain them. All other words of a type may have only
/// letters, digits and underscores, so that SQLite reads nothing else in them.
const CONSTRAINT_WORDS: [&str; 12] = [
    "as",
    "check",
    "collate",
    "constraint",
    "default",
    "foreign",
    "generated",
    "not",
    "null",
    "primary",
    "references",
    "unique",
];

/// A column of the live table.
#[derive(Debug)]
pub(super) struct LiveColumn {
    pub(super) name: String,
    /// Declared type, for messages.
    pub(super) data_type: String,
    pub(super) column_type: ColumnType,
    /// Whether every row must have a value: NOT NULL without a default.
    pub(super) is_required: bool,
    /// Whether the table generates the value. No row may have one.
    pub(super) is_generated: bool,
}

/// A table as it was when it was read.
#[derive(Debug)]
pub(super) struct LiveTable {
    pub(super) columns: Vec<LiveColumn>,
    pub(super) names: ColumnNames,
    /// Whether a statement that fails may leave a part of its changes: a trigger has RAISE(FAIL), or a table that
    /// triggers write to has ON CONFLICT FAIL. ABORT, the default, undoes the statement.
    ///
    /// Source: SQLite, "The ON CONFLICT Clause".
    pub(super) fails_halfway: bool,
}

impl LiveTable {
    /// Reads the table; `None` if there is no table with that name.
    pub(super) fn read(connection: &Connection, table: &str) -> rusqlite::Result<Option<Self>> {
        let strict: i64 =
            connection.prepare_cached(IS_STRICT)?.query_row([table], |row| row.get(0))?;
        let mut statement = connection.prepare_cached(READ_COLUMNS)?;
        let columns = statement
            .query_map([table], |row| {
                let data_type: String = row.get(1)?;
                Ok(LiveColumn {
                    name: row.get(0)?,
                    column_type: ColumnType::of(&data_type, strict > 0),
                    data_type,
                    is_generated: row.get(2)?,
                    is_required: row.get(3)?,
                })
            })?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        if columns.is_empty() {
            return Ok(None);
        }
        let names = ColumnNames::new(columns.iter().map(|column| column.name.clone()));
        let fails_halfway =
            connection.prepare_cached(SAYS_FAIL)?.query_row([], |row| row.get(0))?;
        Ok(Some(Self { columns, names, fails_halfway }))
    }
}

/// Returns a number that changes with each change of the file's schema.
pub(super) fn schema_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("PRAGMA schema_version")?.query_row([], |row| row.get(0))
}

/// Checks that the table exists and accepts the declared columns; creates it if that is configured. Errors are complete
/// messages.
pub(super) fn prepare(
    connection: &mut Connection,
    table: &str,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
) -> Result<(), String> {
    for column in declared {
        check_type(column)?;
    }
    let cannot_read =
        |error: rusqlite::Error| format!("cannot read table {table}: {}", sanitized(error));
    let live = match LiveTable::read(connection, table).map_err(cannot_read)? {
        Some(live) => live,
        None => {
            create_table(connection, table, declared, create, mode)?;
            LiveTable::read(connection, table)
                .map_err(cannot_read)?
                .ok_or_else(|| format!("table {table} was created, and is missing now"))?
        }
    };
    check_key(connection, table, mode)?;
    declared.iter().try_for_each(|column| check(table, &live, column))?;
    check_insert(connection, table, declared)
}

/// Checks whether rows could be written, in a transaction that is rolled back; returns warnings.
pub(super) fn try_out(
    connection: &mut Connection,
    table: &str,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
) -> Result<Vec<String>, String> {
    let failed =
        |error: rusqlite::Error| format!("cannot write to table {table}: {}", sanitized(error));
    match connection.execute_batch("BEGIN IMMEDIATE") {
        Ok(()) => {}
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
            return Ok(vec![
                "another process has the write lock of the database file: writing rows to the table was \
                 not tried"
                    .into(),
            ]);
        }
        Err(error) => return Err(failed(error)),
    }
    let found = prepare(connection, table, declared, create, mode)
        .and_then(|()| position::check(connection))
        .and_then(|()| warnings(connection, table, declared));
    connection.execute_batch("ROLLBACK").map_err(failed)?;
    found
}

/// Compiles an insertion, without running it. This fails for a view without a trigger, and for a table that accepts no
/// rows.
fn check_insert(
    connection: &Connection,
    table: &str,
    declared: &[DeclaredColumn<'_>],
) -> Result<(), String> {
    let columns: Vec<String> = declared.iter().map(|column| quoted(column.name)).collect();
    let values = match columns.is_empty() {
        true => "DEFAULT VALUES".to_owned(),
        false => {
            format!("({}) VALUES ({})", columns.join(", "), vec!["?"; columns.len()].join(", "))
        }
    };
    let insert = format!("INSERT INTO {} {values}", quoted(table));
    connection.prepare(&insert).map(drop).map_err(|error| {
        format!(
            "cannot write rows to {table}: {}: set `table` to a table, or to a view with an INSTEAD OF \
             INSERT trigger",
            sanitized(error)
        )
    })
}

/// Finds reasons why the table may refuse rows that fit its columns.
fn warnings(
    connection: &Connection,
    table: &str,
    declared: &[DeclaredColumn<'_>],
) -> Result<Vec<String>, String> {
    let failed =
        |error: rusqlite::Error| format!("cannot read table {table}: {}", sanitized(error));
    let live = LiveTable::read(connection, table).map_err(failed)?;
    let mut warnings = Vec::new();
    for column in live.iter().flat_map(|live| &live.columns) {
        let (name, data_type) = (&column.name, &column.data_type);
        let own = declared.iter().find(|declared| declared.name == *name);
        if column.column_type.takes_some_texts_only() && (own.is_some() || declared.is_empty()) {
            warnings.push(format!(
                "column {name:?} of table {table} has the type {data_type}, in which SQLite stores text \
                 such as 01234 or 15E2621 as a number: rows with such text become dead letters; \
                 declare the column TEXT to keep all text"
            ));
        }
        if column.is_required && own.is_none() && !declared.is_empty() {
            warnings.push(format!(
                "column {name:?} of table {table} is NOT NULL without a default, and no route declares \
                 it: rows without it become dead letters"
            ));
        }
    }
    let triggers = named_sql(connection, TRIGGERS, [table]).map_err(failed)?;
    for (name, sql) in named_sql(connection, MAY_ROLL_BACK, []).map_err(failed)? {
        let is_own = name.eq_ignore_ascii_case(table);
        let is_written = || triggers.iter().any(|(_, sql)| trigger::names_on_insert(sql, &name));
        if trigger::rolls_back_conflicts(&sql) && (is_own || is_written()) {
            warnings.push(format!(
                "table {name} rolls back whole transactions (ON CONFLICT ROLLBACK): a row that violates such a \
                 constraint blocks its shard; create the table with ON CONFLICT ABORT, or without the clause"
            ));
        }
    }
    for (name, sql) in triggers {
        match trigger::reading(&sql) {
            TriggerEffect::TakesAll => {}
            TriggerEffect::RefusesAll => {
                return Err(format!(
                    "trigger {name:?} of table {table} refuses every row (it raises an error without a \
                     condition): drop it, or name another table"
                ));
            }
            TriggerEffect::MayRefuse(effect) => {
                warnings.push(format!("trigger {name:?} of table {table} {effect}"));
            }
        }
    }
    Ok(warnings)
}

/// Returns the names of entries of the schema, with their statements.
fn named_sql(
    connection: &Connection,
    query: &str,
    parameters: impl rusqlite::Params,
) -> rusqlite::Result<Vec<(String, String)>> {
    let mut query = connection.prepare(query)?;
    let rows = query.query_map(parameters, |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// Checks that the table has a unique index on the mode's key, which `ON CONFLICT` needs.
fn check_key(connection: &Connection, table: &str, mode: &WriteMode) -> Result<(), String> {
    if *mode == WriteMode::Append {
        return Ok(());
    }
    let columns: Vec<&str> = mode.required().collect();
    let names: Vec<String> = columns.iter().map(|name| quoted(name)).collect();
    let marks = vec!["?"; columns.len()].join(", ");
    let clause = mode.on_conflict(&quoted(table), &columns, quoted);
    let insert =
        format!("INSERT INTO {} ({}) VALUES ({marks}) {clause}", quoted(table), names.join(", "));
    // Only compiled, not run.
    connection.prepare(&insert).map(drop).map_err(|error| {
        let key = mode.key().join(", ");
        format!(
            "rows cannot be matched by key ({key}) in table {table}: {}: \
             the table needs these columns and a unique index on the key",
            sanitized(error)
        )
    })
}

/// Checks one declared column against the live table.
fn check(table: &str, live: &LiveTable, declared: &DeclaredColumn<'_>) -> Result<(), String> {
    let expected = Kind::of(declared.data_type);
    let live = live.columns.iter().map(|column| LiveFit {
        name: &column.name,
        data_type: &column.data_type,
        is_generated: column.is_generated,
        fit: if column.column_type.kind.accepts(expected) { Fit::Full } else { Fit::TooNarrow },
    });
    check_fit(table, declared, live)
}

/// Checks that a declared type is the name of a type and nothing else: words, then numbers in parentheses.
fn check_type(column: &DeclaredColumn<'_>) -> Result<(), String> {
    let declared = column.data_type;
    let (words, numbers) = match declared.split_once('(') {
        None => (declared, Some("")),
        Some((words, numbers)) => (words, numbers.strip_suffix(')')),
    };
    let is_word = |word: &str| {
        word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && !CONSTRAINT_WORDS.contains(&word.to_ascii_lowercase().as_str())
    };
    let are_numbers = numbers
        .is_some_and(|numbers| numbers.chars().all(|c| c.is_ascii_digit() || c == ',' || c == ' '));
    if !words.trim().is_empty() && words.split(' ').all(is_word) && are_numbers {
        return Ok(());
    }
    Err(format!(
        "route {:?} declares column {:?} with an invalid type: {declared:?}",
        column.route, column.name
    ))
}

/// Creates the table from checked columns, if that is configured.
fn create_table(
    connection: &Connection,
    table: &str,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
) -> Result<(), String> {
    may_create(table, declared, create)?;
    let columns: Vec<String> = declared
        .iter()
        .map(|column| {
            let data_type = Kind::of(column.data_type).created_as(column.data_type);
            let null = if column.nullable { "" } else { " NOT NULL" };
            format!("{} {data_type}{null}", quoted(column.name))
        })
        .collect();
    let create = create_table_sql(&quoted(table), columns, mode, quoted);
    connection
        .execute_batch(&create)
        .map_err(|error| format!("cannot create table {table}: {}", sanitized(error)))
}

/// Returns a name in double quotes, for SQL.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
