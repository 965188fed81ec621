//! The live table: its columns as the file has them now, the check against what routes declare, and
//! its creation.

use rusqlite::Connection;

use super::connection::quoted;
use super::value::Kind;
use crate::sink::WriteMode;
use crate::sink::rows::ColumnNames;
use crate::sink::rows::declared::{
    DeclaredColumn, Fit, LiveFit, check_fit, create_table_sql, may_create,
};

/// Columns without the hidden ones of virtual tables; 2 and 3 mark generated ones.
const READ_COLUMNS: &str = "SELECT name, type, hidden IN (2, 3) FROM pragma_table_xinfo(?1) \
    WHERE hidden <> 1 ORDER BY cid";

/// Words of a declared type. Each is letters alone, so that nothing in one is read as SQL, and none
/// begins a constraint.
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
    /// The declared type, for messages.
    pub(super) data_type: String,
    pub(super) kind: Kind,
    /// The table makes the value, no row may bring it.
    pub(super) is_generated: bool,
}

/// The table as it was when it was read.
#[derive(Debug)]
pub(super) struct LiveTable {
    pub(super) columns: Vec<LiveColumn>,
    pub(super) names: ColumnNames,
}

impl LiveTable {
    /// Reads the table; `None` when there is none of that name.
    pub(super) fn read(connection: &Connection, table: &str) -> rusqlite::Result<Option<Self>> {
        let mut statement = connection.prepare_cached(READ_COLUMNS)?;
        let columns = statement
            .query_map([table], |row| {
                let data_type: String = row.get(1)?;
                Ok(LiveColumn {
                    name: row.get(0)?,
                    kind: Kind::of(&data_type),
                    data_type,
                    is_generated: row.get(2)?,
                })
            })?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        if columns.is_empty() {
            return Ok(None);
        }
        let names = ColumnNames::new(columns.iter().map(|column| column.name.clone()));
        Ok(Some(Self { columns, names }))
    }
}

/// A number that grows with each change of the file's schema.
pub(super) fn schema_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("PRAGMA schema_version")?.query_row([], |row| row.get(0))
}

/// Makes sure that the table is there and takes the declared columns. Errors are sentences.
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
    let cannot_read = |error| format!("cannot read table {table}: {error}");
    let live = match LiveTable::read(connection, table).map_err(cannot_read)? {
        Some(live) => live,
        None => {
            create_table(connection, table, declared, create, mode)?;
            LiveTable::read(connection, table)
                .map_err(cannot_read)?
                .ok_or_else(|| format!("table {table} was created and is gone again"))?
        }
    };
    check_key(connection, table, mode)?;
    declared.iter().try_for_each(|column| check(table, &live, column))
}

/// Proves that the table has a unique index on the mode's key, which `ON CONFLICT` needs.
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
    // Compiled, not run.
    connection.prepare(&insert).map(drop).map_err(|error| {
        let key = mode.key().join(", ");
        format!(
            "rows cannot find their like in table {table} by the key ({key}): {error}: \
             the table needs these columns and a unique index on the key"
        )
    })
}

/// Checks one declared column against the live table.
fn check(table: &str, live: &LiveTable, declared: &DeclaredColumn<'_>) -> Result<(), String> {
    let due = Kind::of(declared.data_type);
    let live = live.columns.iter().map(|column| LiveFit {
        name: &column.name,
        data_type: &column.data_type,
        is_generated: column.is_generated,
        fit: if column.kind.holds(due) { Fit::Holds } else { Fit::TooNarrow },
    });
    check_fit(table, declared, live)
}

/// Checks that a declared type is a type's name and nothing more: words, then at most two numbers.
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
        "route {:?} declares column {:?} as {declared:?}, which is no type's name",
        column.route, column.name
    ))
}

/// Creates the table from checked columns, if that is asked for.
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
        .map_err(|error| format!("cannot create table {table}: {error}"))
}
