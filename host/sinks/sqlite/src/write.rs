//! Commits rows and position in one transaction, on a blocking thread.
//!
//! Invariant: the position moves from `from` to `to` in the same transaction that inserts the rows of `(from, to]`, and
//! only while the shard's epoch is ours.
//!
//! Order of the steps, and the reason for each:
//! 1. `BEGIN IMMEDIATE` gets the write lock of the file, so nothing changes between the steps.
//! 2. Move the position. It comes before the rows: a commit that has landed already is recognised before its rows could
//!    violate a unique constraint against themselves.
//! 3. Insert the rows. A row that fails undoes only its own statement; the others stay. Where a statement may
//!    fail halfway (FAIL in place of ABORT), a savepoint around each row undoes it.
//! 4. Keep the refused rows as dead letters, while the transaction is open. So a dead letter exists before its range is
//!    committed.
//! 5. `COMMIT`, then check that the file is still the one at its path.
//!
//! | row of the shard in `shardmill_position` | outcome |
//! |---|---|
//! | at `from`, with our epoch | the position moves, the rows are inserted |
//! | at `to`, with our epoch | committed: an earlier try landed, and its answer was lost |
//! | another epoch | fenced: the shard has another owner |
//! | elsewhere, or no row | fenced, with the reason |

use std::sync::Arc;

use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, ErrorCode, ffi, params_from_iter};

use super::connection::LockedConnection;
use super::table::{self, LiveTable, quoted};
use super::{Shared, position, value};
use shardmill_core::masking::sanitized;
use shardmill_core::owner::OwnerName;
use shardmill_core::record::{PositionRange, Row, ShardKey};
use shardmill_core::sink::Refusal;
use shardmill_sinks_common::rows;
use shardmill_sinks_common::rows::RowError;
use shardmill_sinks_common::rows::form::RowForm;
use shardmill_sinks_common::rows::value::RawJson;

/// A commit, with all that a blocking thread needs for it.
pub(super) struct Work {
    pub(super) shared: Arc<Shared>,
    pub(super) shard: ShardKey,
    pub(super) epoch: i64,
    pub(super) range: PositionRange,
    pub(super) rows: Arc<Vec<Row>>,
}

/// Outcome of a commit.
pub(super) enum Written {
    /// All rows are durable.
    Committed,
    /// All rows but the refused ones are written. The transaction is open until the refusals are kept.
    Open(Vec<Refusal>),
}

/// Reason why nothing was committed.
pub(super) enum Failure {
    /// The shard has another owner, which may be known.
    Fenced(String, Option<OwnerName>),
    /// The file cannot be written now.
    Unavailable(String),
}

/// A row that the table refuses, or an error that ends the commit.
enum RowFailure {
    Refused(String),
    Unavailable(String),
}

impl Work {
    /// Commits. After a failure the transaction may be open: dropping `LockedConnection` rolls it back.
    pub(super) fn run(
        self,
        mut locked: LockedConnection,
    ) -> (LockedConnection, Result<Written, Failure>) {
        let outcome = self.write(&mut locked);
        (locked, outcome)
    }

    fn write(&self, locked: &mut LockedConnection) -> Result<Written, Failure> {
        let failed = |error: rusqlite::Error| {
            let said = sanitized(error);
            Failure::Unavailable(format!("cannot commit to table {}: {said}", self.shared.table))
        };
        locked.connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
        let sink = &self.shared.sink;
        let ownership = self.shared.ownership.get();
        let moved = position::move_on(
            &locked.connection,
            (sink, &self.shard),
            self.epoch,
            &self.range,
            ownership,
        );
        if !moved.map_err(failed)? {
            return self.look_where_it_stands(&locked.connection);
        }
        let refused = self.insert_rows(locked).map_err(Failure::Unavailable)?;
        if !refused.is_empty() {
            return Ok(Written::Open(refused));
        }
        commit(locked).map_err(Failure::Unavailable)?;
        Ok(Written::Committed)
    }

    /// Finds out why the position did not move: the commit has landed before, or the shard has another owner.
    fn look_where_it_stands(&self, connection: &Connection) -> Result<Written, Failure> {
        let stored =
            position::read(connection, &self.shared.sink, &self.shard).map_err(|error| {
                Failure::Unavailable(format!(
                    "cannot read shardmill_position: {}",
                    sanitized(error)
                ))
            })?;
        match stored {
            None => Err(Failure::Fenced("its row is missing in shardmill_position".into(), None)),
            Some(stored) if stored.epoch != self.epoch => {
                let detail = format!("expected epoch {}, found {}", self.epoch, stored.epoch);
                Err(Failure::Fenced(detail, stored.owner))
            }
            Some(stored) if stored.position.as_ref() == Some(&self.range.to_inclusive) => {
                Ok(Written::Committed)
            }
            Some(stored) => {
                let shown = |position: Option<String>| {
                    position.unwrap_or_else(|| "the beginning".to_owned())
                };
                let detail = format!(
                    "expected position {}, where the commit begins, found {}",
                    shown(self.range.from_exclusive.as_ref().map(ToString::to_string)),
                    shown(stored.position.map(|position| position.to_string()))
                );
                Err(Failure::Fenced(detail, None))
            }
        }
    }

    /// Inserts all rows that the table accepts; returns the refused ones in ascending order.
    fn insert_rows(&self, locked: &mut LockedConnection) -> Result<Vec<Refusal>, String> {
        if self.rows.is_empty() {
            return Ok(Vec::new());
        }
        let open = &mut **locked;
        let live = self.live_table(&open.connection, &mut open.table)?;
        let failed = |error: rusqlite::Error| format!("cannot commit: {}", sanitized(error));
        open.connection.execute_batch("SAVEPOINT all_rows").map_err(failed)?;
        let mut insert = Insert::new(&self.shared, &open.connection, live);
        let mut refusals = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            match insert.row_alone(row) {
                Ok(()) => {}
                Err(RowFailure::Refused(reason)) => refusals.push(Refusal { row: index, reason }),
                Err(RowFailure::Unavailable(cause)) => return Err(cause),
            }
        }
        // Otherwise COMMIT would fail, and SQLite does not say for which row.
        if has_open_foreign_key(&open.connection) {
            open.connection.execute_batch("ROLLBACK TO all_rows").map_err(failed)?;
            refusals = insert.without_orphans(&self.rows)?;
        }
        open.connection.execute_batch("RELEASE all_rows").map_err(failed)?;
        Ok(refusals)
    }

    /// Returns the table as it is now. Reads it again when the file's schema has changed.
    fn live_table<'h>(
        &self,
        connection: &Connection,
        known: &'h mut Option<(i64, LiveTable)>,
    ) -> Result<&'h LiveTable, String> {
        let name = &self.shared.table;
        let failed =
            |error: rusqlite::Error| format!("cannot read table {name}: {}", sanitized(error));
        let version = table::schema_version(connection).map_err(failed)?;
        let live = match known.take() {
            Some((at, live)) if at == version => live,
            _ => LiveTable::read(connection, name).map_err(failed)?.ok_or_else(|| {
                format!(
                    "table {name} is gone: create it again, or name another in the sink's `table`"
                )
            })?,
        };
        self.shared.known_columns.remember(live.columns.iter().map(|column| column.name.as_str()));
        Ok(&known.insert((version, live)).1)
    }
}

/// Commits a transaction that was open until refused rows were kept.
pub(super) fn finish(locked: LockedConnection) -> Result<(), String> {
    commit(&locked)
}

/// Returns whether rows of the transaction refer to parents that do not exist yet.
///
/// Source: SQLite, "Status Parameters for database connections", `SQLITE_DBSTATUS_DEFERRED_FKS`.
fn has_open_foreign_key(connection: &Connection) -> bool {
    let (mut open, mut highest) = (0, 0);
    // SAFETY: the handle belongs to the connection, which outlives the call; the call writes two numbers.
    let asked = unsafe {
        ffi::sqlite3_db_status(
            connection.handle(),
            ffi::SQLITE_DBSTATUS_DEFERRED_FKS,
            &raw mut open,
            &raw mut highest,
            0,
        )
    };
    asked == ffi::SQLITE_OK && open != 0
}

fn commit(locked: &LockedConnection) -> Result<(), String> {
    locked.connection.execute_batch("COMMIT").map_err(|error| {
        let hint = match error.sqlite_error_code() {
            Some(ErrorCode::ConstraintViolation) => {
                ": a deferred foreign key is violated, and SQLite does not say by which row: \
                 declare it without DEFERRABLE INITIALLY DEFERRED"
            }
            _ => "",
        };
        format!("cannot commit: {}{hint}", sanitized(error))
    })?;
    // If the file was moved meanwhile, the commit is in the moved file. So this is an error; once the file is back, its
    // position shows that the commit has landed.
    locked.check_file()
}

/// Inserter of rows into a table, with one prepared statement per set of columns.
struct Insert<'c, 'r> {
    shared: &'c Shared,
    connection: &'c Connection,
    live: &'c LiveTable,
    slots: Vec<Option<RawJson<'r>>>,
    form: RowForm,
    present: Vec<usize>,
    sql: String,
}

impl<'c, 'r> Insert<'c, 'r> {
    fn new(shared: &'c Shared, connection: &'c Connection, live: &'c LiveTable) -> Self {
        let slots = vec![None; live.columns.len()];
        let (form, present, sql) = (RowForm::default(), Vec::new(), String::new());
        Self { shared, connection, live, slots, form, present, sql }
    }

    fn row(&mut self, row: &'r Row) -> Result<(), RowFailure> {
        match rows::spread(&row.payload, &self.live.names, &mut self.form, &mut self.slots) {
            Ok(()) => {}
            Err(RowError::Refused(reason)) => return Err(RowFailure::Refused(reason)),
            Err(RowError::UnknownKey(key)) => return Err(self.unknown(&key)),
        }
        let present: Vec<usize> =
            (0..self.slots.len()).filter(|place| self.slots[*place].is_some()).collect();
        if present.is_empty() {
            return Err(RowFailure::Refused(format!(
                "the row has no column of table {}",
                self.shared.table
            )));
        }
        if present != self.present {
            self.present = present;
            self.sql = insert_sql(self.shared, self.live, &self.present);
        }
        self.required().map_err(RowFailure::Refused)?;
        let values = self.values().map_err(RowFailure::Refused)?;
        self.connection
            .prepare_cached(&self.sql)
            .and_then(|mut statement| statement.execute(params_from_iter(values)))
            .map(drop)
            .map_err(|error| self.failed(&error))
    }

    /// Inserts a row. Nothing of a refused row is left, whatever the table does on a failure.
    fn row_alone(&mut self, row: &'r Row) -> Result<(), RowFailure> {
        if !self.live.fails_halfway {
            return self.row(row);
        }
        let connection = self.connection;
        let step = |sql: &str| {
            connection.execute_batch(sql).map_err(|error| {
                let said = sanitized(error);
                RowFailure::Unavailable(format!("cannot undo a refused row: {said}"))
            })
        };
        step("SAVEPOINT row_alone")?;
        let inserted = self.row(row);
        if matches!(inserted, Err(RowFailure::Refused(_))) {
            step("ROLLBACK TO row_alone")?;
        }
        // After a failure of the file, SQLite may have ended the transaction.
        if !matches!(inserted, Err(RowFailure::Unavailable(_))) {
            step("RELEASE row_alone")?;
        }
        inserted
    }

    /// Inserts rows one by one, and refuses those whose parent is neither in the table nor among the rows of the
    /// commit. Used only for a commit that violates a deferred foreign key, since it is slow. A row whose parent comes
    /// later is tried again after the others, until a round inserts none.
    fn without_orphans(&mut self, rows: &'r [Row]) -> Result<Vec<Refusal>, String> {
        let connection = self.connection;
        let step = |sql: &str| {
            let done = connection.execute_batch(sql);
            done.map_err(|error| {
                format!(
                    "cannot search for the row that violates a foreign key: {}",
                    sanitized(error)
                )
            })
        };
        let mut refusals = Vec::new();
        let mut waiting: Vec<usize> = (0..rows.len()).collect();
        loop {
            let before = waiting.len();
            let mut orphans = Vec::new();
            for index in waiting {
                step("SAVEPOINT one_row")?;
                match self.row(&rows[index]) {
                    Ok(()) if has_open_foreign_key(connection) => {
                        step("ROLLBACK TO one_row")?;
                        orphans.push(index);
                    }
                    Ok(()) => {}
                    Err(RowFailure::Refused(reason)) => {
                        step("ROLLBACK TO one_row")?;
                        refusals.push(Refusal { row: index, reason })
                    }
                    Err(RowFailure::Unavailable(cause)) => return Err(cause),
                }
                step("RELEASE one_row")?;
            }
            waiting = orphans;
            if waiting.is_empty() || waiting.len() == before {
                break;
            }
        }
        let reason = "a deferred foreign key refers to a row that does not exist";
        refusals.extend(waiting.into_iter().map(|row| Refusal { row, reason: reason.into() }));
        refusals.sort_by_key(|refusal| refusal.row);
        Ok(refusals)
    }

    /// Checks that the row has a value for each column that the write mode needs (key, and `newest_by`).
    fn required(&self) -> Result<(), String> {
        for name in self.shared.mode.required() {
            let place = self.live.columns.iter().position(|column| column.name == name);
            let raw = place.and_then(|place| self.slots[place]);
            if raw.is_none_or(|raw| raw.get() == "null") {
                return Err(format!(
                    "column {name:?} is missing or null, which the sink's `key` or `newest_by` needs"
                ));
            }
        }
        Ok(())
    }

    /// Returns the values of the present columns.
    fn values(&self) -> Result<Vec<ToSqlOutput<'r>>, String> {
        let mut values = Vec::with_capacity(self.present.len());
        for place in &self.present {
            let (Some(raw), column) = (self.slots[*place], &self.live.columns[*place]) else {
                continue;
            };
            let value = match column.is_generated {
                true => Err("the table generates the column itself".into()),
                false => value::bound(column.column_type, raw),
            };
            values.push(
                value.map_err(|why| rows::misfit(&column.name, &column.data_type, raw, &why))?,
            );
        }
        Ok(values)
    }

    fn unknown(&self, key: &str) -> RowFailure {
        let table = &self.shared.table;
        if self.shared.known_columns.contains(key) {
            return RowFailure::Unavailable(format!(
                "column {key:?} is gone from table {table}: add it again, or run plugins whose \
                 rows do not have it"
            ));
        }
        RowFailure::Refused(format!("no column {key:?} in table {table}"))
    }

    /// Classifies an error of an insertion: violated constraints, types and sizes are the row's fault, all others are
    /// the file's. If the table has rolled back the whole transaction, the row cannot be refused alone.
    fn failed(&self, error: &rusqlite::Error) -> RowFailure {
        let blamed = matches!(
            error.sqlite_error_code(),
            Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig)
        );
        if blamed && !self.connection.is_autocommit() {
            return RowFailure::Refused(sanitized(error));
        }
        let table = &self.shared.table;
        let hint = if blamed {
            ": the table rolls back whole transactions (ON CONFLICT ROLLBACK, or RAISE(ROLLBACK) in a \
             trigger), so such a row stops the others of its commit: use ABORT instead"
        } else {
            ""
        };
        RowFailure::Unavailable(format!(
            "cannot write to table {table}: {}{hint}",
            sanitized(error)
        ))
    }
}

fn insert_sql(shared: &Shared, live: &LiveTable, present: &[usize]) -> String {
    let columns: Vec<&str> =
        present.iter().map(|place| live.columns[*place].name.as_str()).collect();
    let names: Vec<String> = columns.iter().map(|name| quoted(name)).collect();
    let marks = vec!["?"; present.len()].join(", ");
    let (table, names) = (quoted(&shared.table), names.join(", "));
    let clause = shared.mode.on_conflict(&table, &columns, quoted);
    format!("INSERT INTO {table} ({names}) VALUES ({marks}) {clause}")
}
