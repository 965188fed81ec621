//! Sends encoded rows by COPY inside the commit's transaction, and finds the rows that the table
//! refuses.
//!
//! A COPY that fails loses all its rows. It runs behind a savepoint, so its failure undoes nothing
//! else; then its rows are cut in parts and each part is tried again. The server mostly names the
//! line at fault, which then is a part of its own; else the rows are cut in half. Whether the hint
//! is right does not matter for the outcome: only a row that fails alone is refused.

use std::ops::Range;
use std::pin::Pin;

use bytes::Bytes;
use futures::SinkExt as _;
use tokio_postgres::{CopyInSink, Error, Statement};

use super::encode::Group;
use super::merge;
use super::name::{TableName, quoted};
use super::session::{self, Session, Staging, StepError};
use super::table::LiveTable;
use crate::postgres::describe;
use crate::sink::{Refusal, WriteMode};

/// What opens binary COPY data: signature, flags, length of the header's extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What ends it: a tuple of -1 fields.
const TRAILER: &[u8] = b"\xff\xff";

/// Keeps what was copied, and sets the savepoint for what comes next.
const NEXT: &str = "RELEASE copy; SAVEPOINT copy";

/// Bytes in one CopyData message: large enough that framing does not count.
const CHUNK_BYTES: usize = 256 * 1024;

/// A COPY under way. It takes rows while others are still being encoded, so that the server has its
/// part of the work from the first ones on.
///
/// Dropped before its end, it fails on the server: roll back to a savepoint then.
pub(super) struct RunningCopy {
    sink: Pin<Box<CopyInSink<Bytes>>>,
    /// Merges what is staged; `None`: rows go straight into the table.
    merge: Option<Statement>,
    /// Straight into the table of a mode that merges, in the hope that no row has its like.
    hopes: bool,
    sent: usize,
}

impl RunningCopy {
    /// Begins to copy rows that bring these columns. The caller has just set the savepoint `copy`.
    pub(super) async fn begin(
        session: &mut Session,
        table: &TableName,
        mode: &WriteMode,
        columns: &[u16],
    ) -> Result<Self, Error> {
        if *mode != WriteMode::Append && session.staging == Staging::Missing {
            merge::create_staging(&session.client, table).await?;
            session.client.batch_execute(NEXT).await?;
            session.staging = Staging::Empty;
        }
        let statements = prepared(session, table, mode, columns).await?;
        // Most rows are new: then they need no merge, which takes three times as long.
        let hopes = statements.merge.is_some() && session.hope.is_due();
        let (copy, merge) = match statements.merge {
            Some((stage, merge)) if !hopes => {
                if session.staging == Staging::Used {
                    let truncate = format!("TRUNCATE {}", merge::STAGING);
                    session.client.batch_execute(&truncate).await?;
                }
                session.staging = Staging::Used;
                (stage, Some(merge))
            }
            _ => (statements.copy, None),
        };
        let mut sink = Box::pin(session.client.copy_in(&copy).await?);
        sink.feed(Bytes::from_static(HEADER)).await?;
        Ok(Self { sink, merge, hopes, sent: 0 })
    }

    /// Sends what is new in `tuples`, all that the rows are so far.
    pub(super) async fn send(&mut self, tuples: &[u8]) -> Result<(), Error> {
        for chunk in tuples[self.sent..].chunks(CHUNK_BYTES) {
            self.sink.feed(Bytes::copy_from_slice(chunk)).await?;
        }
        self.sent = tuples.len();
        Ok(())
    }

    /// Ends the COPY. With `read`, the table is read behind it, without waiting in between.
    async fn finish(
        mut self,
        session: &mut Session,
        read: Option<(&Statement, &TableName)>,
    ) -> Result<Option<LiveTable>, Error> {
        self.sink.feed(Bytes::from_static(TRAILER)).await?;
        let finish = self.sink.as_mut().finish();
        let table = match (&self.merge, read) {
            (None, Some((read, table))) => {
                // The connection asks nothing else before it has sent all of the COPY.
                let read = LiveTable::read(&session.client, read, table);
                let (finished, table) = futures::join!(finish, read);
                finished?;
                table?
            }
            (None, None) => {
                finish.await?;
                None
            }
            (Some(merge), _) => {
                finish.await?;
                session.client.execute(merge, &[]).await?;
                None
            }
        };
        if self.hopes {
            session.hope.was_right();
        }
        Ok(table)
    }
}

/// Copies rows in groups; those that the table refuses are added to `refusals`, the others stand.
/// `running` is a COPY that has taken some rows of the first group, or all. Gives the table as it was
/// behind the last row, where it could be asked on the way.
///
/// The caller has just set the savepoint `copy`. After an error the transaction is not usable.
pub(super) async fn copy_groups(
    session: &mut Session,
    table: &TableName,
    mode: &WriteMode,
    groups: &[Group],
    mut running: Option<RunningCopy>,
    refusals: &mut Vec<Refusal>,
) -> Result<Option<LiveTable>, StepError> {
    // From the last part to the first: the next one is popped off the end.
    let mut pending: Vec<(&Group, Range<usize>)> =
        groups.iter().rev().map(|group| (group, 0..group.rows.len())).collect();
    let mut is_behind_savepoint = false;
    let mut read_behind = None;
    while let Some((group, part)) = pending.pop() {
        if std::mem::take(&mut is_behind_savepoint) {
            session.client.batch_execute(NEXT).await?;
        }
        let mut copy = match running.take() {
            Some(running) => running,
            None => RunningCopy::begin(session, table, mode, &group.columns).await?,
        };
        copy.send(group.tuples(part.clone())).await?;
        let hopes = copy.hopes;
        let read = session.read_table.clone().filter(|_| pending.is_empty());
        let read = read.as_ref().map(|read| (read, table));
        let error = match copy.finish(session, read).await {
            Ok(read) => {
                is_behind_savepoint = true;
                read_behind = read;
                continue;
            }
            Err(error) => error,
        };
        let in_vain = hopes && merge::found_like(&error);
        if !in_vain && !session::blames_rows(&error) {
            return Err(error.into());
        }
        session.run_in_step("ROLLBACK TO copy").await?;
        if in_vain {
            session.hope.was_wrong();
            pending.push((group, part));
        } else if part.len() == 1 {
            let reason = describe(&error);
            refusals.push(Refusal { row: group.rows[part.start], reason });
        } else {
            let parts = parts(part, guilty_line(&error));
            pending.extend(parts.into_iter().rev().map(|part| (group, part)));
        }
    }
    Ok(read_behind)
}

/// How a group's rows are written.
#[derive(Clone)]
pub(super) struct Statements {
    /// Into the table.
    copy: Statement,
    /// Into the staging table, and from there; `None` when rows are appended.
    merge: Option<(Statement, Statement)>,
}

/// The statements for a group's columns, from the session's store.
async fn prepared(
    session: &mut Session,
    table: &TableName,
    mode: &WriteMode,
    places: &[u16],
) -> Result<Statements, Error> {
    if let Some(statements) = session.statements.get(places) {
        return Ok(statements.clone());
    }
    let live = session.table.as_ref();
    let columns = live.map_or_else(Vec::new, |live| names(live, places));
    let names: Vec<String> = columns.iter().map(|name| quoted(name)).collect();
    let names = names.join(", ");
    let into = |target: &str| format!("COPY {target} ({names}) FROM STDIN (FORMAT binary)");
    let client = &session.client;
    let copy = client.prepare(&into(&table.quoted())).await?;
    let merge = match mode {
        WriteMode::Append => None,
        _ => Some((
            client.prepare(&into(merge::STAGING)).await?,
            client.prepare(&merge::statement(mode, table, &columns)).await?,
        )),
    };
    let statements = Statements { copy, merge };
    session.statements.insert(places.into(), statements.clone());
    Ok(statements)
}

fn names<'t>(live: &'t LiveTable, places: &[u16]) -> Vec<&'t str> {
    let places = places.iter().map(|place| usize::from(*place));
    places.map(|place| live.columns[place].name.as_str()).collect()
}

/// Cuts rows around the one that the server named, or in half; never returns them whole.
fn parts(rows: Range<usize>, guilty: Option<usize>) -> Vec<Range<usize>> {
    let Range { start, end } = rows;
    let cuts = match guilty.map(|line| start + line).filter(|row| *row < end) {
        Some(row) => [start, row, row + 1, end],
        None => [start, start + (end - start) / 2, end, end],
    };
    cuts.windows(2).map(|cut| cut[0]..cut[1]).filter(|part| !part.is_empty()).collect()
}

/// The row that the server names, from 0: `COPY cars, line 3, column id`. Servers that speak another
/// language give none.
fn guilty_line(error: &Error) -> Option<usize> {
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
        for guilty in [None, Some(0), Some(1), Some(2)] {
            assert!(parts(0..2, guilty).iter().all(|part| part.len() == 1));
        }
    }
}
