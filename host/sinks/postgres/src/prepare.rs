//! Prepares a table: checks it against what the routes declare, and creates it if the configuration says so.
//!
//! A declared type becomes a part of SQL only after the server has recognised it as the name of a type.

use tokio_postgres::types::Type;

use super::kind::{FROM_TYPE, Kind, TYPE_COLUMNS};
use super::lineage;
use super::merge;
use super::rights;
use super::session;
use super::table::LiveTable;
use shardmill_config::WriteMode;
use shardmill_pg::name::{TableName, quoted};
use shardmill_pg::{Link, ServerError as Error};
use shardmill_sinks_common::rows::declared::{
    DeclaredColumn, Fit, LiveFit, check_fit, check_required, create_table_sql, may_create,
};

/// Returns the query that reads a type by its name.
fn read_type() -> String {
    format!(
        "SELECT {TYPE_COLUMNS} FROM pg_catalog.pg_type AS t {FROM_TYPE} \
         WHERE t.oid = to_regtype($1)"
    )
}

/// Characters of type names besides letters and digits. None of them can end a name, or start a comment or a string.
const TYPE_NAME_PUNCTUATION: &str = "_ .,()[]\"";

/// Makes sure that the table exists and accepts the declared columns. Errors are sentences.
pub(super) async fn prepare(
    client: &Link,
    table: &TableName,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
    with_lineage: bool,
) -> Result<(), String> {
    let kinds = declared_kinds(client, declared).await?;
    let cannot_read = |error: Error| format!("cannot read table {table}: {error}");
    let live = match LiveTable::read(client, table).await.map_err(cannot_read)? {
        Some(live) => live,
        None => {
            create_table(client, table, declared, create, mode, with_lineage).await?;
            LiveTable::read(client, table)
                .await
                .map_err(cannot_read)?
                .ok_or_else(|| format!("table {table} was dropped right after it was created"))?
        }
    };
    for (column, kind) in declared.iter().zip(kinds) {
        check(table, &live, column, kind)?;
    }
    let rights = rights::read(client, table, mode).await?;
    if *mode != WriteMode::Append {
        check_required(table, mode, live.columns.iter().map(|column| column.name.as_str()))?;
        merge::check_key(client, table, mode).await?;
    }
    if with_lineage {
        check_lineage(table, &live)?;
    }
    let brought = rights::Brought { declared, with_lineage };
    rights::check(client, table, &live, mode, &brought, &rights).await?;
    warn_of_refusals(table, &live, declared);
    Ok(())
}

/// Checks the lineage columns.
fn check_lineage(table: &TableName, live: &LiveTable) -> Result<(), String> {
    let fits = |(name, kind): &(&str, &str)| {
        let expected = match *kind {
            "numeric" => Kind::Numeric,
            "timestamptz" => Kind::Timestamptz,
            _ => Kind::Text,
        };
        live.columns.iter().any(|column| column.name == *name && column.kind == expected)
    };
    let missing: Vec<String> = lineage::COLUMNS
        .iter()
        .filter(|column| !fits(column))
        .map(|(name, kind)| format!("ADD COLUMN {name} {kind}"))
        .collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "missing lineage columns in table {table}: ALTER TABLE {} {}; or remove `lineage`",
            table.quoted(),
            missing.join(", ")
        )),
    }
}

/// Checks one declared column against the live table.
fn check(
    table: &TableName,
    live: &LiveTable,
    declared: &DeclaredColumn<'_>,
    expected: Kind,
) -> Result<(), String> {
    let live = live.columns.iter().map(|column| LiveFit {
        name: &column.name,
        data_type: &column.data_type,
        is_generated: column.is_generated,
        fit: match column.kind {
            Kind::Unsupported => Fit::Unsupported,
            kind if kind.accepts(expected) => Fit::Full,
            _ => Fit::TooNarrow,
        },
    });
    check_fit(table, declared, live)
}

/// Warns about NOT NULL columns that may get nulls. Not an error, because a trigger may fill them.
fn warn_of_refusals(table: &TableName, live: &LiveTable, declared: &[DeclaredColumn<'_>]) {
    if declared.is_empty() {
        return;
    }
    let required = live.columns.iter().filter(|column| column.not_null && !column.has_default);
    let is_lineage = |name: &str| lineage::COLUMNS.iter().any(|(own, _)| *own == name);
    for column in required.filter(|column| !column.is_generated && !is_lineage(&column.name)) {
        let name = &column.name;
        match declared.iter().find(|declared| declared.name == name) {
            Some(declared) if !declared.nullable => {}
            Some(_) => {
                tracing::warn!(%table, column = name, "rows may contain null, but the column is NOT NULL")
            }
            None => {
                tracing::warn!(%table, column = name, "no route declares the NOT NULL column, which has no default")
            }
        }
    }
}

/// Reads the kinds of the declared types. Each must be known to the server, and be one that rows can fill.
async fn declared_kinds(
    client: &Link,
    declared: &[DeclaredColumn<'_>],
) -> Result<Vec<Kind>, String> {
    let mut kinds = Vec::with_capacity(declared.len());
    for DeclaredColumn { name, data_type, route, .. } in declared {
        let whose = format!("route {route:?} declares column {name:?} as {data_type:?}");
        let unknown = || format!("{whose}, which is not a type of this PostgreSQL server");
        let is_part = |c: char| c.is_alphanumeric() || TYPE_NAME_PUNCTUATION.contains(c);
        if data_type.is_empty() || !data_type.chars().all(is_part) {
            return Err(unknown());
        }
        let row = match client.query_typed_opt(&read_type(), &[(data_type, Type::TEXT)]).await {
            Ok(row) => row.ok_or_else(unknown)?,
            Err(error) if error.as_db_error().is_some() => {
                return Err(format!("{}: {}", unknown(), error));
            }
            Err(error) => return Err(format!("cannot read types: {error}")),
        };
        let unreadable =
            |error: tokio_postgres::Error| format!("cannot read types: {}", Error::from(error));
        let kind = Kind::read(&row, 0).map_err(unreadable)?;
        if kind == Kind::Unsupported {
            return Err(format!("{whose}: unsupported column type"));
        }
        kinds.push(kind);
    }
    Ok(kinds)
}

/// Creates the table from checked columns, if the configuration allows it.
async fn create_table(
    client: &Link,
    table: &TableName,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
    with_lineage: bool,
) -> Result<(), String> {
    may_create(table, declared, create)?;
    let mut columns: Vec<String> = declared
        .iter()
        .map(|column| {
            let null = if column.nullable { "" } else { " NOT NULL" };
            format!("{} {}{null}", quoted(column.name), column.data_type)
        })
        .collect();
    if with_lineage {
        columns.extend(lineage::COLUMNS.map(|(name, kind)| format!("{name} {kind} NOT NULL")));
        columns.extend(lineage::OPTIONAL.map(|(name, kind)| format!("{name} {kind}")));
    }
    let create = create_table_sql(&table.quoted(), columns, mode, quoted);
    session::create_once(client, &create)
        .await
        .map_err(|error| format!("cannot create table {table}: {error}"))
}
