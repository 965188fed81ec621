//! The live table: its columns as the server has them now, and whether they have changed.

use tokio_postgres::types::Type;

use super::kind::{FROM_TYPE, Kind, TYPE_COLUMN_COUNT, TYPE_COLUMNS};
use shardmill_pg::name::TableName;
use shardmill_pg::{Link, ServerError as Error};
use shardmill_sinks_common::rows::ColumnNames;

/// Query for a text that changes when the table's columns change. Each commit reads it; that takes a tenth of the time
/// of reading the columns.
const FINGERPRINT: &str = "SELECT string_agg(concat_ws(' ', f.attnum, f.attname, f.atttypid, f.atttypmod, \
         f.attidentity, f.attgenerated, f.attnotnull, f.atthasdef), ',' ORDER BY f.attnum) \
     FROM pg_catalog.pg_attribute AS f \
     WHERE f.attrelid = to_regclass($1) AND f.attnum > 0 AND NOT f.attisdropped";

/// Returns the query for columns with their types. A table without columns gives one row without a name; a missing
/// table gives one row without an oid.
fn read_columns() -> String {
    format!(
        "SELECT {TYPE_COLUMNS}, c.oid, a.attname, format_type(a.atttypid, a.atttypmod),
             a.attidentity = 'a' OR a.attgenerated <> '', a.attnotnull,
             a.atthasdef OR a.attidentity <> '', ({FINGERPRINT})
         FROM (SELECT to_regclass($1)::oid AS oid) AS c
         LEFT JOIN pg_catalog.pg_attribute AS a
             ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         LEFT JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
         {FROM_TYPE}
         ORDER BY a.attnum"
    )
}

/// Column of the live table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LiveColumn {
    pub(super) name: String,
    /// Type as people write it, for messages.
    pub(super) data_type: String,
    pub(super) kind: Kind,
    /// `GENERATED ALWAYS`: the table makes the value, so rows must not have it.
    pub(super) is_generated: bool,
    pub(super) not_null: bool,
    pub(super) has_default: bool,
}

/// Table as it was when it was read.
#[derive(Debug)]
pub(super) struct LiveTable {
    pub(super) columns: Vec<LiveColumn>,
    pub(super) names: ColumnNames,
    pub(super) fingerprint: Fingerprint,
}

/// Distinguishes two states of a table; `None` without a table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fingerprint(Option<String>);

impl Fingerprint {
    /// Reads the fingerprint of a table.
    pub(super) async fn read(client: &Link, table: &TableName) -> Result<Self, Error> {
        let name = table.quoted();
        let row = client.query_typed_one(FINGERPRINT, &[(&name, Type::TEXT)]).await?;
        Ok(Self(row.try_get(0)?))
    }
}

impl LiveTable {
    /// Reads the table; `None` if there is no table of that name.
    pub(super) async fn read(client: &Link, table: &TableName) -> Result<Option<Self>, Error> {
        let name = table.quoted();
        let rows = client.query_typed(&read_columns(), &[(&name, Type::TEXT)]).await?;
        let mut columns = Vec::with_capacity(rows.len());
        let mut fingerprint = Fingerprint::default();
        for row in &rows {
            const AT: usize = TYPE_COLUMN_COUNT;
            if row.try_get::<_, Option<u32>>(AT)?.is_none() {
                return Ok(None);
            }
            let Some(name) = row.try_get::<_, Option<String>>(AT + 1)? else { break };
            fingerprint = Fingerprint(row.try_get(AT + 6)?);
            columns.push(LiveColumn {
                name,
                data_type: row.try_get(AT + 2)?,
                kind: Kind::read(row, 0)?,
                is_generated: row.try_get(AT + 3)?,
                not_null: row.try_get(AT + 4)?,
                has_default: row.try_get(AT + 5)?,
            });
        }
        let names = ColumnNames::new(columns.iter().map(|column| column.name.clone()));
        Ok(Some(Self { columns, names, fingerprint }))
    }
}

/// Whether the table does not exist. The error is a sentence.
pub(super) async fn is_missing(client: &Link, table: &TableName) -> Result<bool, String> {
    let found = LiveTable::read(client, table).await;
    found.map(|live| live.is_none()).map_err(|error| format!("cannot read table {table}: {error}"))
}
