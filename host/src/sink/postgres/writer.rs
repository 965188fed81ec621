//! The commit: rows and position in one transaction.
//!
//! The position moves first: that locks out any other owner, and a commit that had landed already is
//! recognised before its rows could collide with themselves.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_postgres::Error;

use super::encode::{Encoded, Encoder, GoneColumn};
use super::session::Session;
use super::table::LiveTable;
use super::{Shared, copy};
use crate::record::{Position, ShardKey};
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
    /// `None` after a failure that the connection did not survive.
    session: Option<Session>,
    /// The counts of a commit whose reply was lost, by where it ends.
    unanswered: Option<(Position, Committed)>,
}

/// How the transaction ended.
enum Ended {
    Committed(Committed),
    /// The server was asked to commit and did not say that it has.
    Unknown(Committed, String),
}

impl PostgresWriter {
    pub(super) fn new(shared: Arc<Shared>, shard: ShardKey, epoch: i64, session: Session) -> Self {
        Self { shared, shard, epoch, session: Some(session), unanswered: None }
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

        session.client.batch_execute(BEGIN).await.map_err(failed)?;
        if !self.move_position(session, commit).await.map_err(failed)? {
            return self.look_where_it_stands(session, commit).await;
        }
        let encoded = self.encode(session, commit).await?;
        let refused = self.copy(session, encoded).await?;
        if !commit.rows.is_empty() {
            self.check_that_table_held_still(session).await?;
        }
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

    /// Moves the position under our epoch and sets the savepoint; false when it is not ours to move
    /// or not where the commit begins.
    async fn move_position(&self, session: &mut Session, commit: &Commit) -> Result<bool, Error> {
        let (client, sink) = (&session.client, &self.shared.sink);
        let statements = match &mut session.position {
            Some(statements) => statements,
            none => none.insert(self.shared.position.prepare(client).await?),
        };
        let moved = statements.move_on(client, sink, &self.shard, self.epoch, &commit.span);
        let (moved, ()) = futures::try_join!(moved, client.batch_execute("SAVEPOINT copy"))?;
        Ok(moved == 1)
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
            return Err(sink.fenced(&self.shard, detail));
        };
        if found.epoch != self.epoch {
            let detail = format!("epoch {} in place of {}", found.epoch, self.epoch);
            return Err(sink.fenced(&self.shard, detail));
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

    /// Encodes by the table as known. What it would refuse is looked at again with the table as it
    /// is now: a column may have been added or altered.
    async fn encode(&self, session: &mut Session, commit: &Commit) -> Result<Encoded, SinkError> {
        if commit.rows.is_empty() {
            return Ok(Encoded::default());
        }
        if let Some(table) = &session.table {
            let encoded = self.encode_for(table, commit).await;
            if let Ok(encoded) = encoded
                && encoded.refusals.is_empty()
            {
                return Ok(encoded);
            }
        }
        session.forget_table();
        let table = self.read_table(session).await?;
        let table = session.table.insert(table);
        self.encode_for(table, commit).await.map_err(|GoneColumn(column)| {
            self.shared.unavailable(format!(
                "column {column:?} is gone from table {}: add it again, or run plugins whose rows \
                 do not bring it",
                self.shared.table
            ))
        })
    }

    async fn encode_for(&self, table: &LiveTable, commit: &Commit) -> Result<Encoded, GoneColumn> {
        let name = self.shared.table.to_string();
        let mut encoder = Encoder::new(table, &name, &self.shared.mode);
        for (index, row) in commit.rows.iter().enumerate() {
            encoder.add(index, row, |key| self.shared.known_columns.contains(key))?;
            if index % ROWS_PER_TURN == ROWS_PER_TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        Ok(encoder.finish())
    }

    async fn read_table(&self, session: &mut Session) -> Result<LiveTable, SinkError> {
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
        sink.known_columns.remember(table.columns.iter().map(|column| column.name.as_str()));
        Ok(table)
    }

    /// Sends the rows; returns all refusals by ascending row.
    async fn copy(
        &self,
        session: &mut Session,
        encoded: Encoded,
    ) -> Result<Vec<Refusal>, SinkError> {
        let (sink, table) = (&self.shared, &self.shared.table);
        let mut refusals = encoded.refusals;
        for group in &encoded.groups {
            copy::copy_group(session, table, &sink.mode, group, &mut refusals).await.map_err(
                |error| sink.unavailable(format!("cannot write to table {table}: {error}")),
            )?;
        }
        refusals.sort_unstable_by_key(|refusal| refusal.row);
        Ok(refusals)
    }

    /// Makes sure that the rows were read by the types which the table has. COPY holds a lock on the
    /// table since its first row: what is read now, it was then. A binary value of one type may be a
    /// wrong value of another.
    async fn check_that_table_held_still(&self, session: &mut Session) -> Result<(), SinkError> {
        let now = self.read_table(session).await?;
        match &session.table {
            Some(table) if table.columns == now.columns => Ok(()),
            _ => Err(self.shared.unavailable(format!(
                "table {} was altered while rows went in; nothing was written, the rows come again",
                self.shared.table
            ))),
        }
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
        let session = sink.connect().await?;
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
            self.session = Some(session);
            return Err(sink.unavailable(format!("the commit did not land: {cause}")));
        }
        match self.look_where_it_stands(&session, commit).await? {
            Ended::Committed(committed) | Ended::Unknown(committed, _) => {
                self.session = Some(session);
                Ok(committed)
            }
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
        // Out of `self` until it is known to be clean: a call that is dropped half-way closes it.
        let mut session = match self.session.take() {
            Some(session) if session.is_open() => session,
            _ => self.shared.connect().await?,
        };
        match self.transact(&mut session, commit, refusals).await {
            Ok(Ended::Committed(committed)) => {
                self.session = Some(session);
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
                    self.session = Some(session);
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
