//! Sends encoded rows by COPY inside the transaction of a commit, and finds the rows that the table refuses.
//!
//! A COPY that fails loses all its rows. So each one runs after a savepoint, which limits what its failure undoes. Then
//! its rows are split, and each part is tried again. The server mostly names the line that failed, which then becomes a
//! part of its own; otherwise the rows are split in half. A wrong line number only costs time: a row is refused only if
//! it fails alone.
//!
//! | a part fails with | what follows |
//! |---|---|
//! | a key that exists, in a plain COPY of a mode that merges | the same part is merged |
//! | an error of the sink ([`Blame::Sink`]) | the commit fails, no row is refused |
//! | any other error, and the part has several rows | split |
//! | an error of the row ([`Blame::Row`]), one row | refused |
//! | an error of either ([`Blame::Either`]), one row | a suspect: refused if another row is accepted |
//!
//! The search ends early when the limit of refusals is exceeded, or when there are [`SUSPECTS_MAX`] suspects and no row
//! was accepted: then the table is at fault.

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use tokio_postgres::Statement;

use super::Failure;
use super::blame::Blame;
use super::encode::Group;
use super::merge::{self, PlainCopyBackoff};
use super::session::SAVEPOINT;
use super::table::{Fingerprint, LiveTable};
use shardmill_config::WriteMode;
use shardmill_core::sink::{Refusal, SinkError};
use shardmill_pg::name::{TableName, quoted};
use shardmill_pg::{CopyIn, Link, ServerError};

/// Start of binary COPY data: signature, flags, length of the header's extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// End of binary COPY data: a tuple of -1 fields.
const TRAILER: &[u8] = b"\xff\xff";

/// Keeps what was copied, and sets the savepoint for the next COPY.
const NEXT: &str = "RELEASE copy; SAVEPOINT copy";

/// Bytes in one CopyData message: large enough that the cost of framing does not matter.
const CHUNK_BYTES: usize = 256 * 1024;

/// Number of suspects after which the search ends if no row was accepted. The limits of refusals mostly end it earlier.
const SUSPECTS_MAX: usize = 1_000;

/// Number of tries to get any row of the next commit accepted.
const PROBES_MAX: u32 = 32;

/// State of the transaction's staging table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Staging {
    /// It does not exist.
    Missing,
    /// It exists and has no rows.
    Empty,
    /// It has rows.
    Used,
}

/// Transaction in progress, with everything that must not outlive it.
pub(super) struct Transaction<'l> {
    pub(super) link: &'l Link,
    staging: Staging,
    /// Prepared COPY statements, by whether they write into the staging table, and by the indexes of their columns.
    /// Dropped before the transaction ends, which closes them in the server's session.
    statements: HashMap<(bool, Box<[u16]>), Statement>,
    /// Whether plain COPY is worth trying.
    pub(super) plain_copy_backoff: PlainCopyBackoff,
}

impl<'l> Transaction<'l> {
    pub(super) fn new(link: &'l Link, plain_copy_backoff: PlainCopyBackoff) -> Self {
        Self { link, staging: Staging::Missing, statements: HashMap::new(), plain_copy_backoff }
    }

    /// Returns to the state before the first row, because the table has other columns than expected.
    pub(super) async fn restart(&mut self) -> Result<(), ServerError> {
        self.statements.clear();
        self.staging = Staging::Missing;
        self.link.run_in_step("ROLLBACK TO rows; SAVEPOINT copy").await
    }

    /// Prepares the statement that copies rows with these columns, or returns the one prepared before.
    async fn prepared(
        &mut self,
        (table, live): (&TableName, &LiveTable),
        staged: bool,
        places: &[u16],
    ) -> Result<Statement, ServerError> {
        let key = (staged, places.into());
        if let Some(statement) = self.statements.get(&key) {
            return Ok(statement.clone());
        }
        let names: Vec<String> = names(live, places).into_iter().map(quoted).collect();
        let target = if staged { merge::STAGING.to_owned() } else { table.quoted() };
        let copy = format!("COPY {target} ({}) FROM STDIN (FORMAT binary)", names.join(", "));
        let statement = self.link.prepare(&copy, SAVEPOINT).await?;
        self.statements.insert(key, statement.clone());
        Ok(statement)
    }
}

/// Table and mode of a COPY.
#[derive(Clone, Copy)]
pub(super) struct CopyTarget<'t> {
    pub(super) name: &'t TableName,
    pub(super) live: &'t LiveTable,
    pub(super) mode: &'t WriteMode,
}

/// COPY in progress. It receives rows while others are still being encoded, so that the server works in parallel from
/// the first rows on.
///
/// If it is dropped before its end, the server aborts it; the caller must then roll back to a savepoint.
pub(super) struct RunningCopy {
    copy: CopyIn,
    /// Statement that merges the staged rows; `None`: rows go straight into the table.
    merge: Option<String>,
    /// Plain COPY of a mode that merges, which succeeds if all keys are new.
    is_plain: bool,
    sent: usize,
}

impl RunningCopy {
    /// Starts to copy rows with these columns. The caller has just set the savepoint `copy`.
    ///
    /// If this fails, no row was sent, so no row is blamed.
    pub(super) async fn begin(
        transaction: &mut Transaction<'_>,
        target: CopyTarget<'_>,
        columns: &[u16],
    ) -> Result<Self, ServerError> {
        let CopyTarget { name, live, mode } = target;
        // Mostly all keys are new. Then no merge is needed, which takes three times as long.
        let merges = *mode != WriteMode::Append;
        let is_plain = merges && transaction.plain_copy_backoff.should_try();
        let staged = merges && !is_plain;
        if staged {
            match transaction.staging {
                Staging::Missing => {
                    merge::create_staging(transaction.link, name).await?;
                    transaction.link.batch_execute(NEXT).await?;
                }
                Staging::Empty => {}
                Staging::Used => {
                    let truncate = format!("TRUNCATE {}", merge::STAGING);
                    transaction.link.batch_execute(&truncate).await?;
                }
            }
            transaction.staging = Staging::Empty;
        }
        let statement = transaction.prepared((name, live), staged, columns).await?;
        let merge = staged.then(|| merge::statement(mode, name, &names(live, columns)));
        if staged {
            transaction.staging = Staging::Used;
        }
        let mut copy = transaction.link.copy_in(&statement).await?;
        copy.feed(Bytes::from_static(HEADER)).await?;
        Ok(Self { copy, merge, is_plain, sent: 0 })
    }

    /// Sends the new part of `tuples`, which contains all rows so far.
    pub(super) async fn send(&mut self, tuples: &[u8]) -> Result<(), ServerError> {
        for chunk in tuples[self.sent..].chunks(CHUNK_BYTES) {
            self.copy.feed(Bytes::copy_from_slice(chunk)).await?;
        }
        self.sent = tuples.len();
        Ok(())
    }

    /// Ends the COPY. With `read`, the table's fingerprint is requested in the same round trip.
    async fn finish(
        mut self,
        transaction: &mut Transaction<'_>,
        read: Option<&TableName>,
    ) -> Result<Option<Fingerprint>, ServerError> {
        self.copy.feed(Bytes::from_static(TRAILER)).await?;
        let table = match (&self.merge, read) {
            (None, Some(table)) => {
                // The connection sends nothing else before it has sent all of the COPY.
                let read = Fingerprint::read(transaction.link, table);
                let (finished, fingerprint) = futures::join!(self.copy.finish(), read);
                finished?;
                Some(fingerprint?)
            }
            (None, None) => {
                self.copy.finish().await?;
                None
            }
            (Some(merge), _) => {
                self.copy.finish().await?;
                transaction.link.batch_execute(merge).await?;
                None
            }
        };
        if self.is_plain {
            transaction.plain_copy_backoff.succeeded();
        }
        Ok(table)
    }
}

/// Result of the search for rows that the table refuses.
#[derive(Default)]
pub(super) struct Search {
    /// Rows that are refused in any case.
    pub(super) refusals: Vec<Refusal>,
    /// Rows that failed alone, with errors that may also be the table's.
    pub(super) suspects: Vec<Refusal>,
    /// First of these errors.
    pub(super) first_suspected: Option<ServerError>,
    /// Whether any row was accepted.
    pub(super) went_in: bool,
    /// Reason why the search ended early: some rows were not tried.
    pub(super) limit: Option<SinkError>,
    /// Whether the search ended early because no row was accepted.
    pub(super) nothing_goes_in: bool,
    /// Table after the last row, if it was read in the same round trip.
    pub(super) read_after: Option<Fingerprint>,
}

impl Search {
    /// Returns all rows that are refused or suspected, ascending.
    fn rows(&self) -> Vec<usize> {
        let both = self.refusals.iter().chain(&self.suspects);
        let mut rows: Vec<usize> = both.map(|refusal| refusal.row).collect();
        rows.sort_unstable();
        rows
    }
}

/// Copies rows in groups. Refused rows are added to those in `search`; the other rows stay in the table. `running` is a
/// COPY that has already received some or all rows of the first group. `within` checks that these rows, ascending, may
/// be refused.
///
/// The caller has just set the savepoint `copy`. After an error the transaction is unusable.
pub(super) async fn copy_groups(
    transaction: &mut Transaction<'_>,
    target: CopyTarget<'_>,
    groups: &[Group],
    mut running: Option<RunningCopy>,
    mut search: Search,
    within: &(dyn Fn(&[usize]) -> Result<(), SinkError> + Sync),
) -> Result<Search, Failure> {
    let failed = |error| Failure::server(format!("cannot write to table {}", target.name), error);
    // In reverse: the next part is popped off the end.
    let mut pending: Vec<(&Group, Range<usize>)> =
        groups.iter().rev().map(|group| (group, 0..group.rows.len())).collect();
    let mut is_after_savepoint = false;
    while let Some((group, part)) = pending.pop() {
        if std::mem::take(&mut is_after_savepoint) {
            transaction.link.batch_execute(NEXT).await.map_err(failed)?;
        }
        let mut copy = match running.take() {
            Some(running) => running,
            None => {
                RunningCopy::begin(transaction, target, &group.columns).await.map_err(failed)?
            }
        };
        let is_plain = copy.is_plain;
        let read = pending.is_empty().then_some(target.name);
        let copied = match copy.send(group.tuples(part.clone())).await {
            Ok(()) => copy.finish(transaction, read).await,
            Err(error) => Err(error),
        };
        let error = match copied {
            Ok(read) => {
                is_after_savepoint = true;
                search.went_in = true;
                search.read_after = read;
                continue;
            }
            Err(error) => error,
        };
        let is_conflict = is_plain && merge::is_key_conflict(&error);
        let blame = Blame::of(&error);
        if !is_conflict && blame == Blame::Sink {
            return Err(failed(error));
        }
        transaction.link.run_in_step("ROLLBACK TO copy").await.map_err(failed)?;
        // Probably a key that exists, which the mode allows. The part is merged next; if another unique index refuses
        // a row, that is found then.
        if is_conflict {
            transaction.plain_copy_backoff.failed();
            pending.push((group, part));
            continue;
        }
        if part.len() > 1 {
            let parts = parts(part, named_line(&error));
            pending.extend(parts.into_iter().rev().map(|part| (group, part)));
            continue;
        }
        let reason = error.to_string();
        let refusal = Refusal { row: group.rows[part.start], reason: reason.clone() };
        match blame {
            Blame::Row => search.refusals.push(refusal),
            Blame::Either | Blame::Sink => {
                search.suspects.push(refusal);
                search.first_suspected.get_or_insert(error);
            }
        }
        // Asked after each refusal, so that a table that refuses everything ends the search early.
        search.limit = within(&search.rows()).err().map(|limit| match limit {
            SinkError::TooManyRefused { sink, cause } => {
                let cause = format!("{cause}; the last reason: {reason}");
                SinkError::TooManyRefused { sink, cause }
            }
            other => other,
        });
        search.nothing_goes_in = !search.went_in && search.suspects.len() >= SUSPECTS_MAX;
        if search.limit.is_some() || search.nothing_goes_in {
            return Ok(search);
        }
    }
    Ok(search)
}

/// Whether the table accepts any of these rows, which belong to the next commit. All changes are undone.
pub(super) async fn any_goes_in(
    transaction: &mut Transaction<'_>,
    target: CopyTarget<'_>,
    groups: &[Group],
) -> Result<bool, ServerError> {
    let staging = transaction.staging;
    transaction.link.run_in_step("SAVEPOINT probe; SAVEPOINT copy").await?;
    let mut pending: Vec<(&Group, Range<usize>)> =
        groups.iter().rev().map(|group| (group, 0..group.rows.len())).collect();
    let mut goes_in = false;
    for _ in 0..PROBES_MAX {
        let Some((group, part)) = pending.pop() else { break };
        let mut copy = RunningCopy::begin(transaction, target, &group.columns).await?;
        copy.send(group.tuples(part.clone())).await?;
        let Err(error) = copy.finish(transaction, None).await else {
            goes_in = true;
            break;
        };
        if Blame::of(&error) == Blame::Sink && !merge::is_key_conflict(&error) {
            return Err(error);
        }
        transaction.link.run_in_step("ROLLBACK TO copy").await?;
        if part.len() > 1 {
            pending.extend(parts(part, None).into_iter().rev().map(|part| (group, part)));
        }
    }
    // The rollback below also undoes changes to the staging table.
    transaction.staging = staging;
    transaction.link.run_in_step("ROLLBACK TO probe; RELEASE probe").await?;
    Ok(goes_in)
}

fn names<'t>(live: &'t LiveTable, places: &[u16]) -> Vec<&'t str> {
    let places = places.iter().map(|place| usize::from(*place));
    places.map(|place| live.columns[place].name.as_str()).collect()
}

/// Splits rows around the one that the server named, or in half. Never returns all of them as one part.
fn parts(rows: Range<usize>, named: Option<usize>) -> Vec<Range<usize>> {
    let Range { start, end } = rows;
    let cuts = match named.map(|line| start + line).filter(|row| *row < end) {
        Some(row) => [start, row, row + 1, end],
        None => [start, start + (end - start) / 2, end, end],
    };
    cuts.windows(2).map(|cut| cut[0]..cut[1]).filter(|part| !part.is_empty()).collect()
}

/// Returns the row that the server names, from 0, as in `COPY cars, line 3, column id`. Servers with another message
/// language name none that can be parsed.
fn named_line(error: &ServerError) -> Option<usize> {
    let context = error.as_db_error()?.where_()?;
    let line = context.lines().find(|line| line.starts_with("COPY "))?;
    let number = line.split_once(", line ")?.1;
    let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    number[..digits].parse::<usize>().ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_rows_and_are_smaller() {
        assert_eq!(parts(4..10, Some(2)), [4..6, 6..7, 7..10]);
        assert_eq!(parts(4..10, Some(0)), [4..5, 5..10]);
        assert_eq!(parts(4..10, Some(6)), [4..7, 7..10]);
        assert_eq!(parts(4..6, None), [4..5, 5..6]);
        for named in [None, Some(0), Some(1), Some(2)] {
            assert!(parts(0..2, named).iter().all(|part| part.len() == 1));
        }
    }
}
