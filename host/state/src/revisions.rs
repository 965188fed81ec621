//! Rewrites stored revisions, and everything that names them.

use rusqlite::Transaction;

use crate::RevisionSpec;

/// Rewrites every stored revision for which `edit` returns true, and the record of what runs. The id of a revision
/// is the digest of its content, so everything that names a changed one (ledger, changes, variables, dead letters)
/// gets the new id. Returns how many were changed.
///
/// # Errors
/// The database's, or a revision that cannot be read.
pub(super) fn rewrite(
    state: &Transaction<'_>,
    mut edit: impl FnMut(&mut RevisionSpec) -> bool,
) -> rusqlite::Result<usize> {
    let mut rewritten = 0;
    let mut query = state.prepare("SELECT id, spec FROM generation")?;
    let stored =
        query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    for (id, json) in stored.collect::<rusqlite::Result<Vec<_>>>()? {
        let mut spec = read(&format!("revision {id}"), &json)?;
        if !edit(&mut spec) {
            continue;
        }
        rewritten += 1;
        let new_id = spec.id();
        state.execute(
            "INSERT INTO generation VALUES (?1, ?2) ON CONFLICT DO NOTHING",
            (&*new_id, spec.to_json()),
        )?;
        for rename in [
            "UPDATE ledger SET generation = ?2 WHERE generation = ?1",
            "UPDATE change SET before = ?2 WHERE before = ?1",
            "UPDATE change SET after = ?2 WHERE after = ?1",
            "UPDATE OR REPLACE variable SET generation = ?2 WHERE generation = ?1",
            "UPDATE letters SET made = replace(made, ?1, ?2) WHERE instr(made, ?1) > 0",
        ] {
            state.execute(rename, (&id, &*new_id))?;
        }
        if id != *new_id {
            state.execute("DELETE FROM generation WHERE id = ?1", [&id])?;
        }
    }
    let mut query = state.prepare("SELECT declared, running FROM running")?;
    let running =
        query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    for (declared, running) in running.collect::<rusqlite::Result<Vec<_>>>()? {
        let mut edited = |json: &str| {
            let mut spec = read("the record of the running revision", json)?;
            rewritten += usize::from(edit(&mut spec));
            Ok::<_, rusqlite::Error>(spec.to_json())
        };
        let edited = (edited(&declared)?, edited(&running)?);
        state.execute("UPDATE running SET declared = ?1, running = ?2", edited)?;
    }
    Ok(rewritten)
}

fn read(what: &str, json: &str) -> rusqlite::Result<RevisionSpec> {
    serde_json::from_str(json).map_err(|error| {
        let cause = format!("{what} cannot be read: {error}");
        let text = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(0, text, cause.into())
    })
}
