//! Columns that routes declare, and the checks of a table against them, which all SQL sinks make before the first row.

use std::fmt::Display;

use shardmill_config::WriteMode;
use shardmill_core::record::BoundRoute;

/// A column as all routes of one sink declare it.
#[derive(Debug, PartialEq, Eq)]
pub struct DeclaredColumn<'r> {
    /// Name.
    pub name: &'r str,
    /// Type, as the plugin declares it.
    pub data_type: &'r str,
    /// Whether a row may have no value or null.
    pub nullable: bool,
    /// First route that declares it, for errors.
    pub route: &'r str,
}

/// A column of the live table, compared with a declared one.
pub struct LiveFit<'c> {
    /// Name.
    pub name: &'c str,
    /// Type, as people write it.
    pub data_type: &'c str,
    /// Whether the table generates the value. No row may have one.
    pub is_generated: bool,
    /// Whether it can store the declared column's values.
    pub fit: Fit,
}

/// Whether a live column can store the values of a declared one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It can store all of them.
    Full,
    /// It cannot store every one.
    TooNarrow,
    /// It can store none: rows cannot fill a column of its type.
    Unsupported,
}

/// Checks that the live columns can store a declared one.
///
/// # Errors
/// The mismatch, with both sides and the way out.
pub fn check_fit<'c>(
    table: impl Display,
    declared: &DeclaredColumn<'_>,
    live: impl Iterator<Item = LiveFit<'c>>,
) -> Result<(), String> {
    let DeclaredColumn { name, data_type, route, .. } = declared;
    let mut others = Vec::new();
    for column in live {
        if column.name != *name {
            others.push(column.name);
            continue;
        }
        if column.is_generated {
            return Err(format!(
                "route {route:?} declares column {name:?}, which table {table} generates itself: \
                 leave it out of the rows"
            ));
        }
        let why = match column.fit {
            Fit::Full => return Ok(()),
            Fit::TooNarrow => "not every value would fit; alter the column, or declare its type",
            Fit::Unsupported => "rows cannot fill a column of that type yet",
        };
        return Err(format!(
            "column {name:?} is {data_type} in route {route:?} and {} in table {table}: {why}",
            column.data_type
        ));
    }
    Err(format!(
        "route {route:?} declares column {name:?} ({data_type}), which is missing in table {table} with \
         columns {}: add the column, or bind the route to another table",
        others.join(", ")
    ))
}

/// Checks that the columns that a mode needs exist.
///
/// # Errors
/// The first column that is missing.
pub fn check_required<'c>(
    table: impl Display,
    mode: &WriteMode,
    live: impl Iterator<Item = &'c str> + Clone,
) -> Result<(), String> {
    match mode.required().find(|name| !live.clone().any(|column| column == *name)) {
        None => Ok(()),
        Some(name) => Err(format!(
            "table {table} has no column {name:?}, which is in the sink's `key` or `newest_by`: add the column, or \
             change the sink"
        )),
    }
}

/// Returns the statement that creates a table of these columns, each with its type, and the mode's key. `table` and the
/// result of `quoted` are SQL already.
pub fn create_table_sql(
    table: &str,
    mut columns: Vec<String>,
    mode: &WriteMode,
    quoted: impl Fn(&str) -> String,
) -> String {
    let key: Vec<String> = mode.key().iter().map(|name| quoted(name)).collect();
    if !key.is_empty() {
        columns.push(format!("PRIMARY KEY ({})", key.join(", ")));
    }
    format!("CREATE TABLE IF NOT EXISTS {table} ({})", columns.join(", "))
}

/// Checks that a missing table may and can be created, by the configuration and the declared columns.
///
/// # Errors
/// The reason why not, and the way out.
pub fn may_create(
    table: impl Display,
    declared: &[DeclaredColumn<'_>],
    create: bool,
) -> Result<(), String> {
    if !create {
        return Err(format!(
            "table {table} does not exist: create it, or let the sink do so (create = true)"
        ));
    }
    if declared.is_empty() {
        return Err(format!(
            "table {table} does not exist and cannot be created: no route declares columns"
        ));
    }
    Ok(())
}

/// Returns the columns that all routes declare, in the order in which they are first declared. A column that a
/// declaring route does not have is nullable.
pub fn declared_columns(routes: &[BoundRoute]) -> Result<Vec<DeclaredColumn<'_>>, String> {
    let mut columns: Vec<DeclaredColumn<'_>> = Vec::new();
    let declaring = routes.iter().filter(|route| !route.columns.is_empty());
    for route in declaring.clone() {
        for column in &route.columns {
            let (name, data_type) = (column.name.as_str(), column.data_type.trim());
            let nullable = column.nullable || declaring.clone().any(|other| !declares(other, name));
            match columns.iter_mut().find(|known| known.name == name) {
                None => {
                    let route = route.name.as_str();
                    columns.push(DeclaredColumn { name, data_type, nullable, route });
                }
                Some(known) if known.data_type.eq_ignore_ascii_case(data_type) => {
                    known.nullable |= nullable;
                }
                Some(known) => {
                    return Err(format!(
                        "the routes disagree on column {name:?}: {} in route {:?}, {data_type} in \
                         route {:?}: bind them to sinks with a table each, or declare one type",
                        known.data_type,
                        known.route,
                        route.name.as_str()
                    ));
                }
            }
        }
    }
    Ok(columns)
}

fn declares(route: &BoundRoute, name: &str) -> bool {
    route.columns.iter().any(|column| column.name == name)
}
