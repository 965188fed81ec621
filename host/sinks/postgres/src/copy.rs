//! Sends encoded rows by COPY inside the commit's transaction, and finds the rows that the table
//! refuses.
//!
//! A COPY that fails loses all its rows. It runs behind a savepoint, so its failure undoes nothing
//! else; then its rows are cut in parts and each part is tried again. The server mostly names the
//! line at fault, which then is a part of its own; else the rows are cut in half. Whether the hint
//! is right does not matter for the outcome: only a row that fails alone is refused, and where its
//! error may be the table's as well ([`Blame::Either`]), only if another row goes in.

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

/// What opens binary COPY data: signature, flags, length of the header's extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What ends it: a tuple of -1 fields.
const TRAILER: &[u8] = b"\xff\xff";

/// Keeps what was copied, and sets the savepoint for what comes next.
const NEXT: &str = "RELEASE copy; SAVEPOINT copy";

/// Bytes in one CopyData message: large enough that framing does not count.
const CHUNK_BYTES: usize = 256 * 1024;

/// Rows that fail alone, with errors that may be the table's, until the search ends when no row has
/// gone in. Limits of rejections mostly end it before.
const SUSPECTS_MAX: usize = 1_000;

/// Tries to get any row of the next commit in.
const PROBES_MAX: u32 = 32;

/// What is known of the transaction's staging table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Staging {
    /// It is not there.
    Missing,
    /// It is there and has no row.
    Empty,
    /// It has rows.
    Used,
}

/// A transaction under way, with all that must not outlive it.
pub(super) struct Transaction<'l> {
    pub(super) link: &'l Link,
    staging: Staging,
    /// Prepared COPYs, by whether they go into the staging table and by the places of their columns.
    /// Dropped before the transaction ends, which closes them in the server's session.
    statements: HashMap<(bool, Box<[u16]>), Statement>,
    /// Whether rows are likely to have keys that are new.
    pub(super) plain_copy_backoff: PlainCopyBackoff,
}

impl<'l> Transaction<'l> {
    pub(super) fn new(link: &'l Link, plain_copy_backoff: PlainCopyBackoff) -> Self {
        Self { link, staging: Staging::Missing, statements: HashMap::new(), plain_copy_backoff }
    }

    /// Goes back to before the first row, for a table that has other columns than was thought.
    pub(super) async fn restart(&mut self) -> Result<(), ServerError> {
        self.statements.clear();
        self.staging = Staging::Missing;
        self.link.run_in_step("ROLLBACK TO rows; SAVEPOINT copy").await
    }

    /// The statement that copies rows with these columns.
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

/// Where rows go, and how.
#[derive(Clone, Copy)]
pub(super) struct CopyTarget<'t> {
    pub(super) name: &'t TableName,
    pub(super) live: &'t LiveTable,
    pub(super) mode: &'t WriteMode,
}

/// A COPY under way. It takes rows while others are still being encoded, so that the server has its
/// part of the work from the first ones on.
///
/// Dropped before its end, it fails on the server: roll back to a savepoint then.
pub(super) struct RunningCopy {
    copy: CopyIn,
    /// Merges what is staged; `None`: rows go straight into the table.
    merge: Option<String>,
    /// Straight into the table of a mode that merges, in the hope that no row has its like.
    is_plain: bool,
    sent: usize,
}

impl RunningCopy {
    /// Begins to copy rows that bring these columns. The caller has just set the savepoint `copy`.
    ///
    /// No row was sent when this fails, so its errors blame none.
    pub(super) async fn begin(
        transaction: &mut Transaction<'_>,
        target: CopyTarget<'_>,
        columns: &[u16],
    ) -> Result<Self, ServerError> {
        let CopyTarget { name, live, mode } = target;
        // Most rows are new: then they need no merge, which takes three times as long.
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

    /// Sends what is new in `tuples`, all that the rows are so far.
    pub(super) async fn send(&mut self, tuples: &[u8]) -> Result<(), ServerError> {
        for chunk in tuples[self.sent..].chunks(CHUNK_BYTES) {
            self.copy.feed(Bytes::copy_from_slice(chunk)).await?;
        }
        self.sent = tuples.len();
        Ok(())
    }

    /// Ends the COPY. With `read`, the table's fingerprint is read after it, without waiting in between.
    async fn finish(
        mut self,
        transaction: &mut Transaction<'_>,
        read: Option<&TableName>,
    ) -> Result<Option<Fingerprint>, ServerError> {
        self.copy.feed(Bytes::from_static(TRAILER)).await?;
        let table = match (&self.merge, read) {
            (None, Some(table)) => {
                // The connection asks nothing else before it has sent all of the COPY.
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

/// What the search for rows that the table refuses has found.
#[derive(Default)]
pub(super) struct Search {
    /// Rows that are refused whatever becomes of the others.
    pub(super) refusals: Vec<Refusal>,
    /// Rows that fail alone with errors that may be the table's as well.
    pub(super) suspects: Vec<Refusal>,
    /// The first of these errors.
    pub(super) first_suspected: Option<ServerError>,
    /// Whether any row has gone in.
    pub(super) went_in: bool,
    /// Why the search was ended early: then rows are left that were not tried.
    pub(super) limit: Option<SinkError>,
    /// It was ended early because no row has gone in so far.
    pub(super) nothing_goes_in: bool,
    /// The table as it was behind the last row, where it could be asked on the way.
    pub(super) read_after: Option<Fingerprint>,
}

impl Search {
    /// All rows that are refused or suspected, ascending.
    fn rows(&self) -> Vec<usize> {
        let both = self.refusals.iter().chain(&self.suspects);
        let mut rows: Vec<usize> = both.map(|refusal| refusal.row).collect();
        rows.sort_unstable();
        rows
    }
}

/// Copies rows in groups; those that the table refuses are added to those that `search` has already, the
/// others stand. `running` is a COPY that has taken some rows of the first group, or all. `within` says
/// whether so many rows, ascending, may be refused.
///
/// The caller has just set the savepoint `copy`. After an error the transaction is not usable.
pub(super) async fn copy_groups(
    transaction: &mut Transaction<'_>,
    target: CopyTarget<'_>,
    groups: &[Group],
    mut running: Option<RunningCopy>,
    mut search: Search,
    within: &(dyn Fn(&[usize]) -> Result<(), SinkError> + Sync),
) -> Result<Search, Failure> {
    let failed = |error| Failure::server(format!("cannot write to table {}", target.name), error);
    // From the last part to the first: the next one is popped off the end.
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

/// Whether any of these rows, which are not of the transaction's commit, goes in. Leaves no trace.
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
    transaction.staging = staging;
    transaction.link.run_in_step("ROLLBACK TO probe; RELEASE probe").await?;
    Ok(goes_in)
}

fn names<'t>(live: &'t LiveTable, places: &[u16]) -> Vec<&'t str> {
    let places = places.iter().map(|place| usize::from(*place));
    places.map(|place| live.columns[place].name.as_str()).collect()
}

/// Cuts rows around the one that the server named, or in half; never returns them whole.
fn parts(rows: Range<usize>, named: Option<usize>) -> Vec<Range<usize>> {
    let Range { start, end } = rows;
    let cuts = match named.map(|line| start + line).filter(|row| *row < end) {
        Some(row) => [start, row, row + 1, end],
        None => [start, start + (end - start) / 2, end, end],
    };
    cuts.windows(2).map(|cut| cut[0]..cut[1]).filter(|part| !part.is_empty()).collect()
}

/// The row that the server names, from 0: `COPY cars, line 3, column id`. Servers that speak another
/// language give none.
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
