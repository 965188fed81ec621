//! The commit: rows and position in one transaction.
//!
//! The invariant: the position moves from `from` to `to` together with the rows of `(from, to]`, and only under the
//! epoch of the current owner. The steps of a transaction and their reasons:
//!
//! 1. Move the position first. The UPDATE locks its row, so any other owner waits. It also detects a commit that landed
//!    before, whose rows would otherwise collide with themselves.
//! 2. Write the rows ([`copy`]). Refused rows are found here.
//! 3. Store refused rows as pending dead letters, before COMMIT: a crash in between leaves pending dead letters above
//!    the position, which are deleted on acquisition. In the other order a refused row could be lost.
//! 4. COMMIT.
//!
//! If step 1 updates no row, or COMMIT gets no answer, the position row decides:
//!
//! | position row | meaning | result |
//! |---|---|---|
//! | missing | somebody deleted it | fenced |
//! | another epoch | another owner has acquired the shard | fenced |
//! | our epoch, position is `to` | this commit landed before | done, with its counts if remembered |
//! | our epoch, position is `from`, after COMMIT without an answer | not landed so far | unavailable, tried again |
//! | our epoch, any other position | somebody else moved it | fenced |
//!
//! A COMMIT without an answer may still be running on the server when the position is read. That is harmless: the
//! next try waits for the row lock of step 1, then finds the position moved.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio_postgres::SimpleQueryMessage;

use super::copy::{self, CopyTarget, RunningCopy, Search, Transaction};
use super::encode::{Encoded, Encoder, GoneColumn};
use super::lineage::Lineage;
use super::merge::PlainCopyBackoff;
use super::session::{BEGIN, SETTINGS};
use super::table::{Fingerprint, LiveTable};
use super::{Failure, Shared};
use shardmill_core::record::{Position, Row, ShardKey};
use shardmill_core::sink::{
    Commit, Committed, LookAhead, Refusal, RefusalLog, SinkError, SinkWriter,
};
use shardmill_pg::{Lent, Link, ServerError};

/// Rows that are encoded before other tasks of the thread run.
const ROWS_PER_TURN: usize = 512;

/// Rows of the next commit that are tried if it is unclear whether the rows or the table are at fault.
const PROBED_ROWS_MAX: usize = 1_000;

/// Savepoints after the position was moved: `rows` before all rows, `copy` before each COPY.
const SAVEPOINTS: &str = "SAVEPOINT rows; SAVEPOINT copy";

/// Makes deferred constraints fail at their rows, not at COMMIT, where no row could be blamed.
const IMMEDIATE: &str = "SET CONSTRAINTS ALL IMMEDIATE";

/// Index of the answer to the UPDATE of the position, among the answers to the first message. Before it come the
/// answers to the statements of `BEGIN`, of the session's settings and of [`IMMEDIATE`], one each.
const MOVE_AT: usize = 3;

/// Commits the rows of one shard.
pub(super) struct PostgresWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    epoch: i64,
    /// End and counts of a commit whose answer was lost.
    unanswered: Option<(Position, Committed)>,
    /// Whether plain COPY is worth trying.
    plain_copy_backoff: PlainCopyBackoff,
    /// Rows of the next commit, if there are any.
    next: Arc<NextRows>,
}

/// Rows that wait for their commit.
#[derive(Default)]
struct NextRows(Mutex<Option<Arc<Vec<Row>>>>);

impl NextRows {
    /// Returns the rows that come after `rows`.
    fn after(&self, rows: &Arc<Vec<Row>>) -> Option<Arc<Vec<Row>>> {
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        next.clone().filter(|next| !Arc::ptr_eq(next, rows) && !next.is_empty())
    }

    /// Drops rows that were committed.
    fn forget(&self, rows: &Arc<Vec<Row>>) {
        let mut next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if next.as_ref().is_some_and(|next| Arc::ptr_eq(next, rows)) {
            *next = None;
        }
    }
}

impl LookAhead for NextRows {
    fn see(&self, rows: &Arc<Vec<Row>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(rows));
    }
}

/// End of a transaction.
enum Ended {
    Committed(Committed),
    /// COMMIT was sent and not confirmed.
    Unknown(Committed, String),
}

impl PostgresWriter {
    pub(super) fn new(shared: Arc<Shared>, shard: ShardKey, epoch: i64) -> Self {
        Self {
            shared,
            shard,
            epoch,
            unanswered: None,
            plain_copy_backoff: PlainCopyBackoff::default(),
            next: Arc::default(),
        }
    }

    /// Runs the steps of the commit, in order. If one fails, its transaction is left open.
    async fn transact(
        &mut self,
        link: &Link,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Ended, Failure> {
        let sink = Arc::clone(&self.shared);
        let failed = |error| Failure::server(format!("cannot commit to {}", sink.table), error);

        if !self.begin(link, commit).await.map_err(failed)? {
            return self.look_where_it_stands(link, commit).await;
        }
        let refused = match &commit.rows[..] {
            [] => Vec::new(),
            _ => {
                // Dropping it closes its statements, before the end of the transaction.
                let mut transaction =
                    Transaction::new(link, std::mem::take(&mut self.plain_copy_backoff));
                let refused = self.write_rows(&mut transaction, commit, refusals).await?;
                self.plain_copy_backoff = transaction.plain_copy_backoff;
                refused
            }
        };
        // Before COMMIT: a refused row must have its dead letter before the position covers it.
        if !refused.is_empty() {
            refusals.record(commit, &refused).await?;
        }
        let committed = Committed {
            rows_written: (commit.rows.len() - refused.len()) as u64,
            rows_refused: refused.len() as u64,
            bytes_written: bytes_written(commit, &refused),
        };
        Ok(match link.commit().await {
            Ok(()) => Ended::Committed(committed),
            Err(cause) => Ended::Unknown(committed, cause),
        })
    }

    /// Begins the transaction, moves the position under our epoch, and sets the savepoints. Returns false if the
    /// position did not move: another owner, or not at the start of the commit.
    ///
    /// All of it is one message: after a statement that fails, the server runs no other.
    async fn begin(&self, link: &Link, commit: &Commit) -> Result<bool, ServerError> {
        let sink = &self.shared;
        let ownership = sink.ownership.get();
        let move_on =
            sink.position.move_on(&sink.sink, &self.shard, self.epoch, &commit.range, ownership);
        let begin = format!("{BEGIN}; {SETTINGS}; {IMMEDIATE}; {move_on}; {SAVEPOINTS}");
        let answers = link.simple_query(&begin).await?;
        let mut counts = answers.iter().filter_map(|answer| match answer {
            SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
            _ => None,
        });
        Ok(counts.nth(MOVE_AT) == Some(1))
    }

    /// Finds out why the position did not move: the commit landed before, or the shard has another owner.
    async fn look_where_it_stands(
        &mut self,
        link: &Link,
        commit: &Commit,
    ) -> Result<Ended, Failure> {
        let sink = Arc::clone(&self.shared);
        let found =
            sink.position.read(link, &sink.sink, &self.shard).await.map_err(|error| {
                Failure::server(format!("cannot read {}", sink.position), error)
            })?;
        let Some(found) = found else {
            let detail = format!("its row was deleted from {}", sink.position);
            return Err(sink.fenced(&self.shard, detail, None).into());
        };
        if found.epoch != self.epoch {
            let detail = format!("expected epoch {}, found {}", self.epoch, found.epoch);
            return Err(sink.fenced(&self.shard, detail, found.owner).into());
        }
        let position = found.position().map_err(|cause| sink.unavailable(cause))?;
        if position.as_ref() == Some(&commit.range.to_inclusive) {
            link.run_in_step("ROLLBACK")
                .await
                .map_err(|error| Failure::server("cannot end a transaction", error))?;
            return Ok(Ended::Committed(self.answered(commit)));
        }
        let shown = |position: Option<&Position>| {
            position.map_or_else(|| "the beginning".to_owned(), Position::to_string)
        };
        let detail = format!(
            "expected position {}, at which the commit begins, found {}",
            shown(commit.range.from_exclusive.as_ref()),
            shown(position.as_ref())
        );
        Err(sink.fenced(&self.shard, detail, None).into())
    }

    /// Returns the counts of a commit that landed before: the remembered ones, or else as if no row was refused.
    fn answered(&mut self, commit: &Commit) -> Committed {
        match self.unanswered.take() {
            Some((to, committed)) if to == commit.range.to_inclusive => committed,
            _ => Committed {
                rows_written: commit.rows.len() as u64,
                rows_refused: 0,
                bytes_written: bytes_written(commit, &[]),
            },
        }
    }

    /// Writes the rows for the table as known. If the table has changed since it was read, reads it again and writes
    /// the rows once more. Returns all refusals by ascending row.
    ///
    /// The race: the table may be altered between reading its columns and the first row, and a binary value of one type
    /// may be read as a wrong value of another. COPY locks the table from the first row to the end of the transaction.
    /// So the table that is read after the rows is the one that they went into, and it is compared with the known one.
    async fn write_rows(
        &self,
        transaction: &mut Transaction<'_>,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Vec<Refusal>, Failure> {
        let (sink, name) = (&self.shared, &self.shared.table);
        let known = sink.live().clone();
        let mut is_fresh = known.is_none();
        let mut table = match known {
            Some(table) => table,
            None => self.read_table(transaction.link).await?,
        };
        loop {
            let written = self.write_rows_for(transaction, &table, commit, refusals).await;
            if written.is_err() {
                sink.live().take();
            }
            let gone = match written? {
                Ok((refusals, read_after)) => {
                    let after =
                        match read_after {
                            Some(after) => after,
                            None => Fingerprint::read(transaction.link, name).await.map_err(
                                |error| Failure::server(format!("cannot read table {name}"), error),
                            )?,
                        };
                    // The fingerprint may change without a change of the columns that matter.
                    if after == table.fingerprint
                        || self.read_table(transaction.link).await?.columns == table.columns
                    {
                        return Ok(refusals);
                    }
                    None
                }
                Err(GoneColumn(column)) => Some(column),
            };
            match gone {
                Some(column) if is_fresh => {
                    return Err(sink
                        .unavailable(format!(
                            "column {column:?} is gone from table {name}: add it again, or run \
                             plugins whose rows do not have it"
                        ))
                        .into());
                }
                None if is_fresh => {
                    return Err(sink
                        .unavailable(format!(
                            "table {name} was altered while rows were written; nothing was committed, \
                             the rows will be written again"
                        ))
                        .into());
                }
                _ => {}
            }
            transaction.restart().await.map_err(|error| {
                Failure::server(format!("cannot write to table {name} again"), error)
            })?;
            table = self.read_table(transaction.link).await?;
            is_fresh = true;
        }
    }

    /// Encodes the rows for `table` and copies them. Also returns the fingerprint of the table after the rows, if it
    /// was read in the same round trip.
    async fn write_rows_for(
        &self,
        transaction: &mut Transaction<'_>,
        table: &LiveTable,
        commit: &Commit,
        log: &dyn RefusalLog,
    ) -> Result<Result<(Vec<Refusal>, Option<Fingerprint>), GoneColumn>, Failure> {
        let (sink, name, rows) = (&self.shared, &self.shared.table, &commit.rows[..]);
        let failed = |error| Failure::server(format!("cannot write to table {name}"), error);
        let target = CopyTarget { name, live: table, mode: &sink.mode };
        let shown = name.to_string();
        let bytes_expected = rows.iter().map(|row| row.payload.len()).sum();
        let lineage = match self.lineage(table) {
            Ok(lineage) => lineage,
            Err(gone) => return Ok(Err(gone)),
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
                        RunningCopy::begin(transaction, target, columns).await.map_err(failed)?,
                    ),
                };
                copy.send(tuples).await.map_err(failed)?;
            }
            tokio::task::yield_now().await;
        }
        let Encoded { groups, refusals } = encoder.finish();
        let search = Search { refusals, ..Search::default() };
        let within = |refused: &[usize]| log.check(commit, refused);
        let running = running.take();
        let search =
            copy::copy_groups(transaction, target, &groups, running, search, &within).await?;
        let found = self.judge(transaction, target, commit, search).await?;
        Ok(Ok(found))
    }

    /// Decides whether rows or the table are at fault, if the errors do not tell: the rows, if another row was
    /// accepted; the table otherwise, unless a row of the next commit would be accepted.
    async fn judge(
        &self,
        transaction: &mut Transaction<'_>,
        target: CopyTarget<'_>,
        commit: &Commit,
        search: Search,
    ) -> Result<(Vec<Refusal>, Option<Fingerprint>), Failure> {
        let failed =
            |error| Failure::server(format!("cannot write to table {}", target.name), error);
        let Search { mut refusals, suspects, first_suspected, went_in, read_after, .. } = search;
        if let Some(error) = first_suspected
            && !went_in
            && (search.nothing_goes_in
                || !self.next_goes_in(transaction, target, commit).await.map_err(failed)?)
        {
            return Err(failed(error));
        }
        if let Some(limit) = search.limit {
            return Err(limit.into());
        }
        refusals.extend(suspects);
        refusals.sort_unstable_by_key(|refusal| refusal.row);
        Ok((refusals, read_after))
    }

    /// Whether the table would accept a row of the next commit.
    async fn next_goes_in(
        &self,
        transaction: &mut Transaction<'_>,
        target: CopyTarget<'_>,
        commit: &Commit,
    ) -> Result<bool, ServerError> {
        let Some(next) = self.next.after(&commit.rows) else { return Ok(false) };
        let shown = target.name.to_string();
        let Ok(lineage) = self.lineage(target.live) else { return Ok(false) };
        let mut encoder = Encoder::new(target.live, &shown, target.mode, lineage, 0);
        for (index, row) in next.iter().take(PROBED_ROWS_MAX).enumerate() {
            if encoder.add(index, row, |_| false).is_err() {
                return Ok(false);
            }
        }
        copy::any_goes_in(transaction, target, &encoder.finish().groups).await
    }

    /// Finds the lineage columns, if rows store lineage.
    fn lineage(&self, table: &LiveTable) -> Result<Lineage, GoneColumn> {
        match self.shared.lineage {
            true => Lineage::of(table, &self.shared.lineage_name)
                .map_err(|gone| GoneColumn(gone.into())),
            false => Ok(Lineage::default()),
        }
    }

    async fn read_table(&self, link: &Link) -> Result<Arc<LiveTable>, Failure> {
        let (sink, name) = (&self.shared, &self.shared.table);
        let table = LiveTable::read(link, name)
            .await
            .map_err(|error| Failure::server(format!("cannot read table {name}"), error))?
            .ok_or_else(|| {
                sink.unavailable(format!(
                    "table {name} is gone: create it again, or name another in the sink's `table`"
                ))
            })?;
        Ok(self.know(table))
    }

    /// Remembers the table, and the names of its columns.
    fn know(&self, table: LiveTable) -> Arc<LiveTable> {
        let names = table.columns.iter().map(|column| column.name.as_str());
        self.shared.known_columns.remember(names);
        let table = Arc::new(table);
        *self.shared.live() = Some(Arc::clone(&table));
        table
    }

    /// Resolves a COMMIT without an answer: reads the position on a new connection.
    async fn resolve(
        &mut self,
        commit: &Commit,
        committed: Committed,
        cause: &str,
    ) -> Result<Committed, SinkError> {
        // Remembered first: any way out of this function may be followed by a try that finds the commit landed.
        self.unanswered = Some((commit.range.to_inclusive.clone(), committed));
        let sink = Arc::clone(&self.shared);
        let session = sink.session().await?;
        let found = sink.position.read(&session, &sink.sink, &self.shard).await;
        if let Err(error) = &found {
            let cause = sink.failed(&format!("cannot read {}", sink.position), error);
            session.fail(error).await;
            return Err(cause);
        }
        let is_at_start = found.is_ok_and(|found| {
            found.is_some_and(|found| {
                found.epoch == self.epoch
                    && found.position().ok().as_ref() == Some(&commit.range.from_exclusive)
            })
        });
        if is_at_start {
            session.give_back();
            // If it lands later, the next try finds the position moved, and returns the counts noted above.
            return Err(sink.unavailable(format!("the commit did not land: {cause}")));
        }
        let stands = self.look_where_it_stands(&session, commit).await;
        conclude(&sink, session, stands).await.map(|ended| match ended {
            Ended::Committed(committed) | Ended::Unknown(committed, _) => committed,
        })
    }
}

#[async_trait]
impl SinkWriter for PostgresWriter {
    fn copies_rows(&self) -> bool {
        true
    }

    fn looks_ahead(&self) -> Option<Arc<dyn LookAhead>> {
        Some(self.next.clone())
    }

    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let shared = Arc::clone(&self.shared);
        let session = shared.session().await?;
        let ended = self.transact(&session, commit, refusals).await;
        let committed = match conclude(&shared, session, ended).await? {
            Ended::Committed(committed) => committed,
            Ended::Unknown(committed, cause) => self.resolve(commit, committed, &cause).await?,
        };
        self.unanswered = None;
        // Otherwise the rows of this commit would stay in memory until the next one is shown.
        self.next.forget(&commit.rows);
        Ok(committed)
    }
}

/// Returns the connection after a finished transaction, rolls back a failed one, and closes the connection if it is
/// unknown what the server did.
async fn conclude(
    sink: &Shared,
    session: Lent<'_>,
    ended: Result<Ended, Failure>,
) -> Result<Ended, SinkError> {
    match ended {
        Ok(ended @ Ended::Committed(_)) => {
            session.give_back();
            Ok(ended)
        }
        Ok(ended @ Ended::Unknown(..)) => Ok(ended),
        Err(Failure::Server { doing, error }) => {
            session.fail(&error).await;
            Err(sink.failed(&doing, &error))
        }
        Err(Failure::Sink(error)) => {
            session.roll_back().await;
            Err(error)
        }
    }
}

/// Sums the payload bytes of the rows that were written.
fn bytes_written(commit: &Commit, refused: &[Refusal]) -> u64 {
    let all: usize = commit.rows.iter().map(|row| row.payload.len()).sum();
    let lost: usize = refused.iter().map(|refusal| commit.rows[refusal.row].payload.len()).sum();
    (all - lost) as u64
}
