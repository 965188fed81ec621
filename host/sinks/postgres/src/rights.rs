//! Checks before the first record whether the role can write rows into the table.
//!
//! Privileges are read by name, so that the error can name the GRANT. Then a COPY without rows, in a transaction that
//! is rolled back, finds problems that no list of privileges shows.

use bytes::Bytes;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::lineage;
use super::merge;
use super::position::PositionTable;
use super::session::{BEGIN, EMPTY_COPY, SAVEPOINT, SETTINGS};
use super::table::LiveTable;
use shardmill_config::WriteMode;
use shardmill_pg::name::{TableName, quoted};
use shardmill_pg::{Link, ServerError};
use shardmill_sinks_common::rows::declared::DeclaredColumn;

/// Kind of the relation, and the role's rights on it. Bits of `tgtype`: 1 row, 4 insert, 64 instead of.
///
/// Source: PostgreSQL, `src/include/catalog/pg_trigger.h` and "Access Privilege Inquiry Functions".
const RIGHTS: &str = "
    SELECT c.relkind::text, current_user::text, pg_is_in_recovery(),
        current_setting('transaction_read_only') = 'on',
        EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = c.oid
            AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 4 <> 0 AND t.tgtype & 1 = 0),
        EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = c.oid
            AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 4 <> 0 AND t.tgtype & 64 <> 0),
        has_any_column_privilege(c.oid, 'INSERT'),
        row_security_active(c.oid),
        has_database_privilege(current_database(), 'TEMPORARY'),
        coalesce((SELECT array_agg(a.attname::text) FROM pg_catalog.pg_attribute AS a
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                AND NOT has_column_privilege(c.oid, a.attnum, 'INSERT')), '{}')
    FROM pg_catalog.pg_class AS c WHERE c.oid = to_regclass($1)";

/// The same for the position table; no row if it does not exist.
const POSITION_RIGHTS: &str = "
    SELECT c.relkind::text, current_user::text,
        has_any_column_privilege(c.oid, 'SELECT') AND has_any_column_privilege(c.oid, 'INSERT')
            AND has_any_column_privilege(c.oid, 'UPDATE'),
        row_security_active(c.oid), pg_has_role(c.relowner, 'USAGE'),
        (SELECT count(*) FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = c.oid
            AND NOT a.attisdropped AND a.attname IN ('state_id', 'state_number', 'owner'))
    FROM pg_catalog.pg_class AS c WHERE c.oid = to_regclass($1)";

/// Functions and sequences that the table's defaults, constraints and indexes need and the role may not use: name,
/// whether it is a sequence, and the column whose default it is (null: every row needs it). Sequences of identity
/// columns need no right, and their dependency has the other direction.
///
/// Source: PostgreSQL, "pg_depend", and "Sequence Manipulation Functions": `nextval` needs USAGE or
/// UPDATE.
const FORBIDDEN: &str = "
    SELECT DISTINCT coalesce(p.oid::regprocedure::text, s.oid::regclass::text), s.oid IS NOT NULL,
        CASE WHEN a.attgenerated = '' THEN a.attname::text END
    FROM pg_catalog.pg_depend AS d
        LEFT JOIN pg_catalog.pg_proc AS p
            ON d.refclassid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.refobjid
        LEFT JOIN pg_catalog.pg_class AS s ON d.refclassid = 'pg_catalog.pg_class'::regclass
            AND s.oid = d.refobjid AND s.relkind = 'S'
        LEFT JOIN pg_catalog.pg_constraint AS c
            ON d.classid = 'pg_catalog.pg_constraint'::regclass AND c.oid = d.objid
        LEFT JOIN pg_catalog.pg_index AS i
            ON d.classid = 'pg_catalog.pg_class'::regclass AND i.indexrelid = d.objid
        LEFT JOIN pg_catalog.pg_attrdef AS f
            ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND f.oid = d.objid
        LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
    WHERE coalesce(c.conrelid, i.indrelid, f.adrelid) = to_regclass($1)
        AND CASE WHEN p.oid IS NOT NULL THEN NOT has_function_privilege(p.oid, 'EXECUTE')
            WHEN s.oid IS NOT NULL THEN NOT has_sequence_privilege(s.oid, 'USAGE, UPDATE')
            ELSE false END
    ORDER BY 2, 1, 3";

/// Whether the role may create a table in a schema, by default the first one of its search path.
const SCHEMA_RIGHTS: &str = "
    SELECT current_user::text, n.nspname::text, has_schema_privilege(n.oid, 'CREATE')
    FROM pg_catalog.pg_namespace AS n WHERE n.nspname = coalesce($1, current_schema())";

/// Longest wait for a lock. A table that is locked now may be free later.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '5s'";

/// Columns that rows will have, as far as known.
pub(super) struct Brought<'a> {
    /// Columns that routes declare; empty: unknown.
    pub(super) declared: &'a [DeclaredColumn<'a>],
    /// Whether rows have lineage.
    pub(super) with_lineage: bool,
}

/// Rights according to the catalogue.
pub(super) struct Rights {
    role: String,
    has_statement_triggers: bool,
    inserts_instead: bool,
    /// Columns that the role may not insert into.
    no_insert: Vec<String>,
}

/// Checks that rows can be written, without writing one. The error is a sentence with the way out.
pub(super) async fn check(
    link: &Link,
    table: &TableName,
    live: &LiveTable,
    mode: &WriteMode,
    brought: &Brought<'_>,
    rights: &Rights,
) -> Result<(), String> {
    let columns = brought.columns(live, rights);
    if let Some(column) = columns.iter().find(|name| rights.no_insert.iter().any(|no| no == *name))
    {
        return Err(format!(
            "role {0} has no INSERT right on column {column:?} of table {table}: GRANT INSERT ON {1} \
             TO {2}",
            rights.role,
            table.quoted(),
            quoted(&rights.role)
        ));
    }
    check_calls(link, table, brought, &columns, rights).await?;
    let begin = format!("{BEGIN}; {SETTINGS}; {LOCK_TIMEOUT}; SAVEPOINT {SAVEPOINT}");
    let tried = async {
        link.batch_execute(&begin).await?;
        if *mode != WriteMode::Append {
            merge::create_staging(link, table).await?;
            link.batch_execute(&format!("EXPLAIN {}", merge::statement(mode, table, &columns)))
                .await?;
            link.batch_execute("RELEASE copy; SAVEPOINT copy").await?;
        }
        // A trigger per statement would run even for a COPY without rows, which a check must not cause. So such a
        // table is not tested.
        if !rights.has_statement_triggers {
            // EXPLAIN takes the lock of COPY. A COPY that fails before the server asks for its data leaves client and
            // server out of step (see `Link::run_in_step`), so a locked table would look like a broken connection.
            let lock = format!("EXPLAIN INSERT INTO {} DEFAULT VALUES", table.quoted());
            link.batch_execute(&lock).await?;
            copy_nothing(link, table, &columns).await?;
        }
        Ok(())
    };
    let tried: Result<(), ServerError> = tried.await;
    link.run_in_step("ROLLBACK").await.map_err(|error| cannot_read(table, &error))?;
    if rights.has_statement_triggers {
        tracing::warn!(%table, "the table has a trigger per statement: whether it accepts rows was not tested");
    }
    let Err(error) = tried else { return Ok(()) };
    let code = error.code();
    // Another session has locked the table, which says nothing about later.
    if code == Some(&SqlState::LOCK_NOT_AVAILABLE) || code == Some(&SqlState::QUERY_CANCELED) {
        tracing::warn!(%table, %error, "failed to test whether the table accepts rows");
        return Ok(());
    }
    let needs = match mode {
        WriteMode::Append => "INSERT",
        WriteMode::Upsert { .. } => "INSERT, UPDATE and SELECT",
        WriteMode::Ignore { .. } => "INSERT and SELECT",
    };
    let way_out = match code == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        true => format!("; role {} needs {needs} on it", rights.role),
        false => String::new(),
    };
    Err(format!("table {table} does not accept rows: {error}{way_out}"))
}

/// Checks that the role may use everything that the server calls for each row. A COPY without rows calls none of it.
async fn check_calls(
    link: &Link,
    table: &TableName,
    brought: &Brought<'_>,
    columns: &[&str],
    rights: &Rights,
) -> Result<(), String> {
    let forbidden = link.query_typed(FORBIDDEN, &[(&table.quoted(), Type::TEXT)]).await;
    let unreadable = |error: tokio_postgres::Error| cannot_read(table, &error.into());
    for row in &forbidden.map_err(|error| cannot_read(table, &error))? {
        let name: String = row.try_get(0).map_err(unreadable)?;
        let is_sequence: bool = row.try_get(1).map_err(unreadable)?;
        let default_of: Option<String> = row.try_get(2).map_err(unreadable)?;
        let role = quoted(&rights.role);
        let grant = match is_sequence {
            true => format!("GRANT USAGE ON SEQUENCE {name} TO {role}"),
            false => format!("GRANT EXECUTE ON FUNCTION {name} TO {role}"),
        };
        let Some(column) = default_of else {
            return Err(format!(
                "role {0} may not call function {name}, which a constraint, an index or a generated \
                 column of table {table} needs for each row: {grant}",
                rights.role
            ));
        };
        if !brought.declared.is_empty() && columns.contains(&column.as_str()) {
            continue;
        }
        let problem = format!(
            "role {0} may not use {name}, the default of column {column:?} of table {table}",
            rights.role
        );
        if brought.declared.is_empty() {
            tracing::warn!(%table, "{problem}: rows without that column block the sink; {grant}");
        } else {
            return Err(format!("{problem}, and rows do not have the column: {grant}"));
        }
    }
    Ok(())
}

/// Reads the catalogue, and refuses what it clearly forbids.
pub(super) async fn read(
    link: &Link,
    table: &TableName,
    mode: &WriteMode,
) -> Result<Rights, String> {
    let name = table.quoted();
    let row = link.query_typed_opt(RIGHTS, &[(&name, Type::TEXT)]).await;
    let row = row.map_err(|error| cannot_read(table, &error))?;
    let row = row.ok_or_else(|| format!("table {table} was dropped during the check"))?;
    let unreadable = |error: tokio_postgres::Error| cannot_read(table, &error.into());
    let text = |at: usize| row.try_get::<_, String>(at).map_err(unreadable);
    let is = |at: usize| row.try_get::<_, bool>(at).map_err(unreadable);
    let (kind, role) = (text(0)?, text(1)?);
    let rights = Rights {
        has_statement_triggers: is(4)?,
        inserts_instead: is(5)?,
        no_insert: row.try_get(9).map_err(unreadable)?,
        role,
    };
    let merges = *mode != WriteMode::Append;
    match kind.as_str() {
        "r" | "p" => {}
        "v" if rights.inserts_instead && !merges => {}
        "v" => {
            return Err(format!(
                "{table} is a view: expected a table{}",
                if merges { "" } else { ", or a view with an INSTEAD OF INSERT trigger" }
            ));
        }
        "f" if !merges => tracing::warn!(%table,
            "a foreign table: its rows and the position are not written in one transaction, so a crash may \
             cause duplicate rows"),
        other => return Err(format!("{table} is {}: expected a table", relation(other))),
    }
    if is(3)? {
        let why =
            if is(2)? { "the server is a standby" } else { "default_transaction_read_only is on" };
        return Err(format!(
            "table {table} cannot be written to: transactions are read-only, {why}"
        ));
    }
    if !is(6)? {
        return Err(format!(
            "role {0} has no INSERT right on table {table}: GRANT INSERT ON {name} TO {1}",
            rights.role,
            quoted(&rights.role)
        ));
    }
    if is(7)? {
        return Err(format!(
            "row-level security of table {table} applies to role {0}, and COPY does not support it: \
             use the table's owner, or ALTER ROLE {1} BYPASSRLS",
            rights.role,
            quoted(&rights.role)
        ));
    }
    if merges && !is(8)? {
        return Err(format!(
            "role {0} may not create temporary tables, which merging rows by key needs: GRANT TEMPORARY ON \
             DATABASE … TO {1}",
            rights.role,
            quoted(&rights.role)
        ));
    }
    Ok(rights)
}

/// Runs a COPY without rows.
async fn copy_nothing(link: &Link, table: &TableName, columns: &[&str]) -> Result<(), ServerError> {
    let names: Vec<String> = columns.iter().map(|name| quoted(name)).collect();
    let copy = format!("COPY {} ({}) FROM STDIN (FORMAT binary)", table.quoted(), names.join(", "));
    let statement = link.prepare(&copy, SAVEPOINT).await?;
    let mut copy = link.copy_in(&statement).await?;
    copy.feed(Bytes::from_static(EMPTY_COPY)).await?;
    copy.finish().await.map(drop)
}

/// Checks that the role can store positions. The error is a sentence with the way out.
pub(super) async fn check_position(link: &Link, position: &PositionTable) -> Result<(), String> {
    let table = position.name();
    let name = table.quoted();
    let found = link.query_typed_opt(POSITION_RIGHTS, &[(&name, Type::TEXT)]).await;
    let found = found.map_err(|error| cannot_read(table, &error))?;
    let unreadable = |error: tokio_postgres::Error| cannot_read(table, &error.into());
    let Some(row) = found else { return check_schema(link, table).await };
    let kind: String = row.try_get(0).map_err(unreadable)?;
    let role: String = row.try_get(1).map_err(unreadable)?;
    if !matches!(kind.as_str(), "r" | "p") {
        return Err(format!("{table} is {}: expected a table of positions", relation(&kind)));
    }
    if !row.try_get::<_, bool>(2).map_err(unreadable)? {
        return Err(format!(
            "role {role} cannot store positions in table {table}: GRANT SELECT, INSERT, UPDATE ON {name} \
             TO {}",
            quoted(&role)
        ));
    }
    if row.try_get::<_, bool>(3).map_err(unreadable)? {
        return Err(format!(
            "row-level security of the position table {table} applies to role {role} and may hide positions: \
             ALTER TABLE {name} DISABLE ROW LEVEL SECURITY"
        ));
    }
    let (is_owner, later): (bool, i64) =
        (row.try_get(4).map_err(unreadable)?, row.try_get(5).map_err(unreadable)?);
    if !is_owner && !PositionTable::is_wide_with(later) {
        return Err(position.cannot_widen());
    }
    let tried = link.batch_execute(&position.trial()).await;
    tried.map_err(|error| {
        format!(
            "cannot store positions in table {table}: {error}. It differs from the table that shardmill creates: \
             restore its columns and its primary key (pipeline, sink, stream, shard)"
        )
    })
}

/// Checks that a missing table can be created.
async fn check_schema(link: &Link, table: &TableName) -> Result<(), String> {
    let found = link.query_typed_opt(SCHEMA_RIGHTS, &[(&table.schema, Type::TEXT)]).await;
    let found = found.map_err(|error| cannot_read(table, &error))?;
    let unreadable = |error: tokio_postgres::Error| cannot_read(table, &error.into());
    let Some(row) = found else {
        return Err(match &table.schema {
            Some(schema) => format!("schema {schema:?} does not exist: create it"),
            None => "no schema of the role's search_path exists: name the table's schema".into(),
        });
    };
    let role: String = row.try_get(0).map_err(unreadable)?;
    let schema: String = row.try_get(1).map_err(unreadable)?;
    match row.try_get::<_, bool>(2).map_err(unreadable)? {
        true => Ok(()),
        false => Err(format!(
            "the position table {table} does not exist, and role {role} may not create it: GRANT CREATE \
             ON SCHEMA {} TO {}, or run the pipeline once as a role that may",
            quoted(&schema),
            quoted(&role)
        )),
    }
}

impl Brought<'_> {
    /// Returns the columns to test: the declared ones, or all that a row may have.
    fn columns<'l>(&self, live: &'l LiveTable, rights: &Rights) -> Vec<&'l str> {
        let is_lineage = |name: &str| {
            lineage::COLUMNS.iter().chain(&lineage::OPTIONAL).any(|(own, _)| *own == name)
        };
        let is_brought = |name: &str| match is_lineage(name) {
            true => self.with_lineage,
            false if self.declared.is_empty() => !rights.no_insert.iter().any(|no| no == name),
            false => self.declared.iter().any(|declared| declared.name == name),
        };
        let columns = live.columns.iter().filter(|column| !column.is_generated);
        columns.map(|column| column.name.as_str()).filter(|name| is_brought(name)).collect()
    }
}

/// Describes a kind of relation.
fn relation(kind: &str) -> &'static str {
    match kind {
        "v" => "a view",
        "m" => "a materialized view",
        "S" => "a sequence",
        "f" => "a foreign table",
        "c" => "a composite type",
        "i" | "I" => "an index",
        _ => "not a table",
    }
}

fn cannot_read(table: &TableName, error: &ServerError) -> String {
    format!("cannot read the rights on table {table}: {error}")
}
