//! The commit: rows and position in one transaction.
//!
//! The position moves first: that locks out any other owner, and a commit that had landed already is
//! recognised before its rows could collide with themselves.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_postgres::{Error, SimpleQueryMessage};

use super::Shared;
use super::copy::{self, RunningCopy};
use super::encode::{Encoded, Encoder, GoneColumn};
use super::lineage::Lineage;
use super::session::{Session, StepError};
use super::table::LiveTable;
use crate::record::{Position, Row, ShardKey};
use crate::sink::{Commit, Committed, Refusal, RefusalLog, SinkError, SinkWriter};

/// Rows that are encoded before other tasks of the thread get their turn.
const ROWS_PER_TURN: usize = 512;

/// Whatever the role's default, a commit needs to see what other owners have committed meanwhile,
/// and deferred constraints must blame their rows before the end.
const BEGIN: &str =
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET CONSTRAINTS ALL IMMEDIATE";

/// Commits one shard's rows.
pub(super) struct PostgresWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    epoch: i64,
    /// The counts of a commit whose reply was lost, by where it ends.
    unanswered: Option<(Position, Committed)>,
}

/// Behind the position: `rows` for all rows, `copy` for those that are copied next.
const SAVEPOINTS: &str = "SAVEPOINT rows; SAVEPOINT copy";

/// How the transaction ended.
enum Ended {
    Committed(Committed),
    /// The server was asked to commit and did not say that it has.
    Unknown(Committed, String),
}

impl PostgresWriter {
    pub(super) fn new(shared: Arc<Shared>, shard: ShardKey, epoch: i64) -> Self {
        Self { shared, shard, epoch, unanswered: None }
    }

    /// The commit on one screen; leaves its transaction open when it fails.
    async fn transact(
        &mut self,
        session: &mut Session,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Ended, SinkError> {
        let sink = Arc::clone(&self.shared);
        let failed =
            |error: Error| sink.failed(&format!("cannot commit to {}", sink.table), &error);

        if !self.begin(session, commit).await.map_err(failed)? {
            return self.look_where_it_stands(session, commit).await;
        }
        let refused = match &commit.rows[..] {
            [] => Vec::new(),
            rows => self.write_rows(session, rows).await?,
        };
        if !refused.is_empty() {
            refusals.hold(commit, &refused).await?;
        }
        let committed = Committed {
            rows_written: (commit.rows.len() - refused.len()) as u64,
            rows_refused: refused.len() as u64,
            bytes_written: bytes_written(commit, &refused),
        };
        Ok(match session.commit().await {
            Ok(()) => {
                session.emptied();
                Ended::Committed(committed)
            }
            Err(cause) => Ended::Unknown(committed, cause),
        })
    }

    /// Begins the transaction, moves the position under our epoch and sets the savepoints; false when
    /// it is not ours to move or not where the commit begins.
    ///
    /// One message: the server runs none of its statements behind one that failed.
    async fn begin(&self, session: &Session, commit: &Commit) -> Result<bool, Error> {
        let sink = &self.shared;
        let ownership = sink.ownership.get();
        let move_on =
            sink.position.move_on(&sink.sink, &self.shard, self.epoch, &commit.span, ownership);
        let begin = format!("{BEGIN}; {move_on}; {SAVEPOINTS}");
        let answers = session.client.simple_query(&begin).await?;
        let counts = answers.iter().filter_map(|answer| match answer {
            SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
            _ => None,
        });
        // That of the UPDATE: the others concern no rows.
        Ok(counts.max() == Some(1))
    }

    /// After the position did not move: the commit has landed before, or the shard has another owner.
    async fn look_where_it_stands(
        &mut self,
        session: &Session,
        commit: &Commit,
    ) -> Result<Ended, SinkError> {
        let sink = Arc::clone(&self.shared);
        let found = sink
            .position
            .read(&session.client, &sink.sink, &self.shard)
            .await
            .map_err(|error| sink.failed(&format!("cannot read {}", sink.position), &error))?;
        let Some(found) = found else {
            let detail = format!("its row is gone from {}", sink.position);
            return Err(sink.fenced(&self.shard, detail, None));
        };
        if found.epoch != self.epoch {
            let detail = format!("epoch {} in place of {}", found.epoch, self.epoch);
            return Err(sink.fenced(&self.shard, detail, found.owner));
        }
        let position = found.position().map_err(|cause| sink.unavailable(cause))?;
        if position.as_ref() == Some(&commit.span.to_inclusive) {
            session
                .client
                .batch_execute("ROLLBACK")
                .await
                .map_err(|error| sink.failed("cannot end a transaction", &error))?;
            return Ok(Ended::Committed(self.answered(commit)));
        }
        let shown = |position: Option<&Position>| {
            position.map_or_else(|| "the beginning".to_owned(), Position::to_string)
        };
        Err(sink.fenced(
            &self.shard,
            format!(
                "the position is {}, the commit begins at {}",
                shown(position.as_ref()),
                shown(commit.span.from_exclusive.as_ref())
            ),
            None,
        ))
    }

    /// The counts of a commit that had landed before: as remembered, else as if nothing was refused.
    fn answered(&mut self, commit: &Commit) -> Committed {
        match self.unanswered.take() {
            Some((to, committed)) if to == commit.span.to_inclusive => committed,
            _ => Committed {
                rows_written: commit.rows.len() as u64,
                rows_refused: 0,
                bytes_written: bytes_written(commit, &[]),
            },
        }
    }

    /// Writes the rows by the table as known; if it turns out to be another by now, once more by that
    /// one. Returns all refusals by ascending row.
    ///
    /// COPY holds a lock on the table since its first row: what is read behind it, the table was all
    /// along. A binary value of one type may be a wrong value of another.
    async fn write_rows(
        &self,
        session: &mut Session,
        rows: &[Row],
    ) -> Result<Vec<Refusal>, SinkError> {
        let (sink, name) = (&self.shared, &self.shared.table);
        let mut is_fresh = session.table.is_none();
        let mut table = match &session.table {
            Some(table) => table.clone(),
            None => self.read_table(session).await?,
        };
        loop {
            session.table = Some(table.clone());
            let written = self.write_rows_for(session, &table, rows).await?;
            let gone = match written {
                Ok((refusals, read_behind)) => {
                    let behind = match read_behind {
                        Some(behind) => self.know(behind),
                        None => self.read_table(session).await?,
                    };
                    if behind.columns == table.columns {
                        return Ok(refusals);
                    }
                    None
                }
                Err(GoneColumn(column)) => Some(column),
            };
            match gone {
                Some(column) if is_fresh => {
                    return Err(sink.unavailable(format!(
                        "column {column:?} is gone from table {name}: add it again, or run plugins \
                         whose rows do not bring it"
                    )));
                }
                None if is_fresh => {
                    return Err(sink.unavailable(format!(
                        "table {name} was altered while rows went in; nothing was written, the rows \
                         come again"
                    )));
                }
                _ => {}
            }
            session.run_in_step("ROLLBACK TO rows; SAVEPOINT copy").await.map_err(|error| {
                sink.unavailable(format!("cannot write to table {name} again: {error}"))
            })?;
            session.forget_table();
            table = self.read_table(session).await?;
            is_fresh = true;
        }
    }

    /// Encodes the rows for `table` and copies them; gives the table as it was behind them, where it
    /// could be asked on the way.
    async fn write_rows_for(
        &self,
        session: &mut Session,
        table: &LiveTable,
        rows: &[Row],
    ) -> Result<Result<(Vec<Refusal>, Option<LiveTable>), GoneColumn>, SinkError> {
        let (sink, name) = (&self.shared, &self.shared.table);
        let failed =
            |error: StepError| sink.unavailable(format!("cannot write to table {name}: {error}"));
        let shown = name.to_string();
        let bytes_expected = rows.iter().map(|row| row.payload.len()).sum();
        let lineage = match sink.lineage {
            true => Lineage::of(table, &sink.lineage_name),
            false => Ok(Lineage::default()),
        };
        let lineage = match lineage {
            Ok(lineage) => lineage,
            Err(gone) => return Ok(Err(GoneColumn(gone.into()))),
        };
        let mut encoder = Encoder::new(table, &shown, &sink.mode, lineage, bytes_expected);
        let mut running: Option<RunningCopy> = None;
        for (turn, some) in rows.chunks(ROWS_PER_TURN).enumerate() {
            for (row, index) in some.iter().zip(turn * ROWS_PER_TURN..) {
                if let Err(gone) = encoder.add(index, row, |key| sink.known_columns.contains(key)) {
                    return Ok(Err(gone));
                }
            }
            if let Some((columns, tuples)) = encoder.first_group() {
                let copy = match &mut running {
                    Some(copy) => copy,
                    none => none.insert(
                        RunningCopy::begin(session, name, &sink.mode, columns)
                            .await
                            .map_err(|error| failed(error.into()))?,
                    ),
                };
                copy.send(tuples).await.map_err(|error| failed(error.into()))?;
            }
            tokio::task::yield_now().await;
        }
        let Encoded { groups, mut refusals } = encoder.finish();
        let copied =
            copy::copy_groups(session, name, &sink.mode, &groups, running.take(), &mut refusals);
        let read_behind = copied.await.map_err(failed)?;
        refusals.sort_unstable_by_key(|refusal| refusal.row);
        Ok(Ok((refusals, read_behind)))
    }

    async fn read_table(&self, session: &mut Session) -> Result<Arc<LiveTable>, SinkError> {
        let (sink, name) = (&self.shared, &self.shared.table);
        let failed = |error| sink.failed(&format!("cannot read table {name}"), &error);
        let prepared = match &mut session.read_table {
            Some(prepared) => prepared,
            none => none.insert(LiveTable::prepare_read(&session.client).await.map_err(failed)?),
        };
        let table = LiveTable::read(&session.client, prepared, name)
            .await
            .map_err(failed)?
            .ok_or_else(|| {
                sink.unavailable(format!(
                    "table {name} is gone: create it again, or name another in the sink's `table`"
                ))
            })?;
        Ok(self.know(table))
    }

    /// Remembers the columns that the table has.
    fn know(&self, table: LiveTable) -> Arc<LiveTable> {
        let names = table.columns.iter().map(|column| column.name.as_str());
        self.shared.known_columns.remember(names);
        Arc::new(table)
    }

    /// After a COMMIT without an answer: asks a new connection whether it landed.
    async fn settle(
        &mut self,
        commit: &Commit,
        committed: Committed,
        cause: &str,
    ) -> Result<Committed, SinkError> {
        self.unanswered = Some((commit.span.to_inclusive.clone(), committed));
        let sink = Arc::clone(&self.shared);
        let session = sink.session().await?;
        let found = sink
            .position
            .read(&session.client, &sink.sink, &self.shard)
            .await
            .map_err(|error| sink.failed(&format!("cannot read {}", sink.position), &error))?;
        let is_at_start = found.as_ref().is_some_and(|found| {
            found.epoch == self.epoch
                && found.position().ok().as_ref() == Some(&commit.span.from_exclusive)
        });
        if is_at_start {
            return Err(sink.unavailable(format!("the commit did not land: {cause}")));
        }
        match self.look_where_it_stands(&session, commit).await? {
            Ended::Committed(committed) | Ended::Unknown(committed, _) => Ok(committed),
        }
    }
}

#[async_trait]
impl SinkWriter for PostgresWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let mut session = self.shared.session().await?;
        // Until it is known to be: a call that is dropped half-way gives up its connection.
        session.is_clean = false;
        match self.transact(&mut session, commit, refusals).await {
            Ok(Ended::Committed(committed)) => {
                session.is_clean = true;
                self.unanswered = None;
                Ok(committed)
            }
            Ok(Ended::Unknown(committed, cause)) => {
                drop(session);
                self.settle(commit, committed, &cause).await
            }
            Err(error) => {
                if session.roll_back().await {
                    session.forget_table();
                    session.is_clean = true;
                }
                Err(error)
            }
        }
    }
}

/// The payload bytes of the rows that were written.
fn bytes_written(commit: &Commit, refused: &[Refusal]) -> u64 {
    let all: usize = commit.rows.iter().map(|row| row.payload.len()).sum();
    let lost: usize = refused.iter().map(|refusal| commit.rows[refusal.row].payload.len()).sum();
    (all - lost) as u64
}
