//! The live table: its columns as the cluster has them now, the check against what the routes declare, and its
//! creation.

use super::kind::Kind;
use super::rights;
use super::session::{self, literal};
use shardmill_config::WriteMode;
use shardmill_pg::name::{TableName, quoted};
use shardmill_pg::{Link, ServerError as Error};
use shardmill_sinks_common::rows::ColumnNames;
use shardmill_sinks_common::rows::declared::{
    DeclaredColumn, Fit, LiveFit, check_fit, check_required, create_table_sql, may_create,
};

/// Prefix of the columns that a load adds.
pub(super) const OWN_PREFIX: &str = "shardmill_";

/// Column of the live table.
#[derive(Debug)]
pub(super) struct LiveColumn {
    pub(super) name: String,
    /// Type as Redshift shows it, for messages.
    pub(super) data_type: String,
    pub(super) kind: Kind,
    pub(super) not_null: bool,
    pub(super) has_default: bool,
}

/// Table as it was when it was read.
#[derive(Debug)]
pub(super) struct LiveTable {
    pub(super) columns: Vec<LiveColumn>,
    pub(super) names: ColumnNames,
}

impl LiveTable {
    /// Reads the table; `None` if there is no table of that name.
    pub(super) async fn read(client: &Link, table: &TableName) -> Result<Option<Self>, Error> {
        // Redshift folds names to lower case, also quoted ones, unless the session says otherwise.
        let read = format!(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.atthasdef
             FROM pg_catalog.pg_attribute AS a
             JOIN pg_catalog.pg_class AS c ON c.oid = a.attrelid
             JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
             WHERE lower(n.nspname) = lower({}) AND lower(c.relname) = lower({}) AND c.relkind = 'r'
                 AND a.attnum > 0 AND NOT a.attisdropped
             ORDER BY a.attnum",
            literal(table.schema.as_deref().unwrap_or(super::SCHEMA)),
            literal(&table.table)
        );
        let rows = session::rows(client, &read).await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let column = |row: &tokio_postgres::SimpleQueryRow| {
            let text = |place| row.get(place).unwrap_or_default().to_owned();
            let data_type = text(1);
            LiveColumn {
                name: text(0),
                kind: Kind::of(&data_type),
                data_type,
                not_null: text(2) == "t",
                has_default: text(3) == "t",
            }
        };
        let columns: Vec<LiveColumn> = rows.iter().map(column).collect();
        let names = ColumnNames::new(columns.iter().map(|column| column.name.clone()));
        Ok(Some(Self { columns, names }))
    }
}

/// Makes sure that the table exists and accepts the declared columns. Errors are sentences.
pub(super) async fn prepare(
    client: &Link,
    table: &TableName,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
) -> Result<(), String> {
    for column in declared {
        check_type(column)?;
    }
    let cannot_read = |error: Error| format!("cannot read table {table}: {error}");
    let live = match LiveTable::read(client, table).await.map_err(cannot_read)? {
        Some(live) => live,
        None => {
            rights::refuse_other_relation(client, table).await?;
            create_table(client, table, declared, create, mode).await?;
            LiveTable::read(client, table)
                .await
                .map_err(cannot_read)?
                .ok_or_else(|| format!("table {table} was dropped right after it was created"))?
        }
    };
    for column in declared {
        check(table, &live, column)?;
    }
    check_required(table, mode, live.columns.iter().map(|column| column.name.as_str()))?;
    match live.columns.iter().find(|column| column.name.starts_with(OWN_PREFIX)) {
        Some(column) => Err(format!(
            "unsupported column name {:?} in table {table}: the prefix {OWN_PREFIX} is reserved for loads; \
             rename the column",
            column.name
        )),
        None => Ok(()),
    }
}

/// Checks that Redshift has a declared type.
fn check_type(
    DeclaredColumn { name, data_type, route, .. }: &DeclaredColumn<'_>,
) -> Result<(), String> {
    if Kind::of(data_type) != Kind::Unsupported {
        return Ok(());
    }
    let is_numeric = data_type.trim_start().to_ascii_lowercase().starts_with("numeric");
    let way_out = match is_numeric {
        true => "declare its digits, such as numeric(18, 2), at most 38: Redshift needs them",
        false => "unsupported column type for Redshift",
    };
    Err(format!("route {route:?} declares column {name:?} as {data_type:?}: {way_out}"))
}

/// Checks one declared column against the live table.
fn check(table: &TableName, live: &LiveTable, declared: &DeclaredColumn<'_>) -> Result<(), String> {
    let expected = Kind::of(declared.data_type);
    let live = live.columns.iter().map(|column| LiveFit {
        name: &column.name,
        data_type: &column.data_type,
        // Whether a column is generated is known only at the merge.
        is_generated: false,
        fit: match column.kind {
            Kind::Unsupported => Fit::Unsupported,
            kind if kind.accepts(expected) => Fit::Full,
            _ => Fit::TooNarrow,
        },
    });
    check_fit(table, declared, live)
}

/// Creates the table, if the configuration allows it.
async fn create_table(
    client: &Link,
    table: &TableName,
    declared: &[DeclaredColumn<'_>],
    create: bool,
    mode: &WriteMode,
) -> Result<(), String> {
    may_create(table, declared, create)?;
    let column = |column: &DeclaredColumn<'_>| {
        let null = if column.nullable { "" } else { " NOT NULL" };
        format!("{} {}{null}", quoted(column.name), Kind::of(column.data_type).sql())
    };
    let columns: Vec<String> = declared.iter().map(column).collect();
    // Redshift does not enforce the key, but its planner relies on it.
    let create = create_table_sql(&table.quoted(), columns, mode, quoted);
    session::run(client, &create)
        .await
        .map(drop)
        .map_err(|error| format!("cannot create table {table}: {error}"))
}
