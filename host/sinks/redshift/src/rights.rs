//! Checks before the first record whether the role can load rows.
//!
//! Source: guide, "Access privilege inquiry functions".

use super::session::{self, literal};
use shardmill_config::WriteMode;
use shardmill_pg::Link;
use shardmill_pg::name::{TableName, quoted};

/// Checks the rights that the statements of a commit need. The error is a sentence with the way out.
pub(super) async fn check(
    link: &Link,
    table: &TableName,
    ledger: &TableName,
    mode: &WriteMode,
) -> Result<(), String> {
    // The staging table is created by a SELECT without rows, so SELECT is needed.
    let needs: &[&str] = match mode {
        WriteMode::Append | WriteMode::Ignore { .. } => &["SELECT", "INSERT"],
        WriteMode::Upsert { .. } => &["SELECT", "INSERT", "UPDATE"],
    };
    check_table(link, table, needs).await?;
    if !is(link, "has_database_privilege(current_database(), 'TEMP')").await? {
        return Err(format!(
            "role {} may not create temporary tables, which loads need: GRANT TEMP ON DATABASE",
            role(link).await?
        ));
    }
    let look = format!("SELECT 1 FROM {} LIMIT 0", ledger.quoted());
    match link.simple_rows(&look).await {
        Err(error) if session::is_no_table(&error) => check_schema(link, ledger).await,
        _ => check_table(link, ledger, &["SELECT", "INSERT", "UPDATE"]).await,
    }
}

/// Refuses a name that belongs to a relation that is not a table; otherwise it would look like a missing table.
pub(super) async fn refuse_other_relation(link: &Link, table: &TableName) -> Result<(), String> {
    let find = format!(
        "SELECT c.relkind FROM pg_catalog.pg_class AS c \
         JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
         WHERE lower(n.nspname) = lower({}) AND lower(c.relname) = lower({})",
        literal(table.schema.as_deref().unwrap_or(super::SCHEMA)),
        literal(&table.table)
    );
    let rows = session::rows(link, &find).await;
    let rows = rows.map_err(|error| format!("cannot read table {table}: {error}"))?;
    match rows.first().and_then(|row| row.get(0)) {
        None | Some("r") => Ok(()),
        Some("v") => Err(format!("{table} is a view: expected a table")),
        Some(_) => Err(format!("{table} is not a table: expected a table")),
    }
}

async fn check_table(link: &Link, table: &TableName, needs: &[&str]) -> Result<(), String> {
    let name = table.quoted();
    for privilege in needs {
        if !is(link, &format!("has_table_privilege({}, '{privilege}')", literal(&name))).await? {
            let role = role(link).await?;
            return Err(format!(
                "role {role} has no {privilege} right on table {table}: GRANT {} ON {name} TO {}",
                needs.join(", "),
                quoted(&role)
            ));
        }
    }
    Ok(())
}

async fn check_schema(link: &Link, ledger: &TableName) -> Result<(), String> {
    let schema = ledger.schema.as_deref().unwrap_or(super::SCHEMA);
    if is(link, &format!("has_schema_privilege({}, 'CREATE')", literal(schema))).await? {
        return Ok(());
    }
    let role = role(link).await?;
    Err(format!(
        "the position table {ledger} does not exist, and role {role} may not create it: GRANT CREATE ON \
         SCHEMA {} TO {}, or run the pipeline once as a role that may",
        quoted(schema),
        quoted(&role)
    ))
}

/// Evaluates a condition.
async fn is(link: &Link, condition: &str) -> Result<bool, String> {
    Ok(one(link, condition).await? == "t")
}

async fn role(link: &Link) -> Result<String, String> {
    one(link, "current_user").await
}

async fn one(link: &Link, expression: &str) -> Result<String, String> {
    let rows = session::rows(link, &format!("SELECT {expression}")).await;
    let rows = rows.map_err(|error| format!("cannot read the rights of the role: {error}"))?;
    Ok(rows.first().and_then(|row| row.get(0)).unwrap_or_default().to_owned())
}
