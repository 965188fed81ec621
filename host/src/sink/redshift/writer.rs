//! The commit: load, then position and rows in one transaction.
//!
//! Until that transaction nothing is visible but to the session itself, so a load can be thrown away
//! at any time. What a connection had in hand when something failed goes with it.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_postgres::{Client, Error};

use super::Shared;
use super::encode::{EncodeError, Encoded, EncodedFile, encode};
use super::ledger::Entry;
use super::table::LiveTable;
use super::{merge, session};
use crate::record::{Position, ShardKey};
use crate::sink::{Commit, Committed, Refusal, RefusalLog, SinkError, SinkWriter};

/// The rows that the session's last COPY left out.
const LOAD_ERRORS: &str = "SELECT trim(filename), line_number, trim(colname), trim(err_reason) \
     FROM stl_load_errors WHERE query = pg_last_copy_id() ORDER BY filename, line_number";

/// Commits one shard's rows.
pub(super) struct RedshiftWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    epoch: i64,
    /// `None` after a failure.
    client: Option<Client>,
    /// The counts of a commit whose reply was lost, by where it ends.
    unanswered: Option<(Position, Committed)>,
}

/// Where the shard stands, as a commit sees it.
enum Standing {
    /// Where the commit begins.
    AtStart,
    /// Where the commit ends: it has landed before.
    AtEnd,
}

/// How the transaction ended.
enum Ended {
    Committed,
    /// The cluster was asked to commit and did not say that it has.
    Unknown(String),
}

impl RedshiftWriter {
    pub(super) fn new(shared: Arc<Shared>, shard: ShardKey, epoch: i64, client: Client) -> Self {
        Self { shared, shard, epoch, client: Some(client), unanswered: None }
    }

    /// The commit on one screen.
    async fn load_and_commit(
        &mut self,
        client: &Client,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<(Ended, Committed), SinkError> {
        if let Standing::AtEnd = self.standing(client, commit).await? {
            return Ok((Ended::Committed, self.answered(commit)));
        }
        let table = self.read_table(client).await?;
        let mut encoded = self.encode(commit, &table).await?;
        self.load(client, &mut encoded).await?;
        if !encoded.refusals.is_empty() {
            refusals.hold(commit, &encoded.refusals).await?;
        }
        let committed = committed(commit, &encoded.refusals);
        let ended = self.transact(client, commit, &table, &encoded).await?;
        Ok((ended, committed))
    }

    /// Compares the ledger with the commit.
    async fn standing(&self, client: &Client, commit: &Commit) -> Result<Standing, SinkError> {
        let (shared, ledger) = (&self.shared, &self.shared.ledger);
        let entry = ledger
            .read(client, &shared.sink, &self.shard)
            .await
            .map_err(|error| shared.failed(&format!("cannot read {ledger}"), &error))?
            .map_err(|cause| shared.unavailable(cause))?;
        let Some(Entry { epoch, position, owner }) = entry else {
            let detail = format!("its row is gone from {ledger}");
            return Err(shared.fenced(&self.shard, detail, None));
        };
        if epoch != self.epoch {
            let detail = format!("epoch {epoch} in place of {}", self.epoch);
            return Err(shared.fenced(&self.shard, detail, owner));
        }
        if position == commit.span.from_exclusive {
            return Ok(Standing::AtStart);
        }
        if position.as_ref() == Some(&commit.span.to_inclusive) {
            return Ok(Standing::AtEnd);
        }
        let shown = |position: &Option<Position>| {
            position.as_ref().map_or_else(|| "the beginning".to_owned(), Position::to_string)
        };
        let (position, from) = (shown(&position), shown(&commit.span.from_exclusive));
        let detail = format!("the position is {position}, the commit begins at {from}");
        Err(shared.fenced(&self.shard, detail, None))
    }

    async fn read_table(&self, client: &Client) -> Result<Arc<LiveTable>, SinkError> {
        let (shared, name) = (&self.shared, &self.shared.table);
        let table = LiveTable::read(client, name)
            .await
            .map_err(|error| shared.failed(&format!("cannot read table {name}"), &error))?
            .ok_or_else(|| {
                shared.unavailable(format!(
                    "table {name} is gone: create it again, or name another in the sink's `table`"
                ))
            })?;
        shared.known_columns.remember(table.columns.iter().map(|column| column.name.as_str()));
        Ok(Arc::new(table))
    }

    /// Encodes off the async threads.
    async fn encode(&self, commit: &Commit, table: &Arc<LiveTable>) -> Result<Encoded, SinkError> {
        if commit.rows.is_empty() {
            return Ok(Encoded::default());
        }
        let (shared, rows, table) = (self.shared.clone(), commit.rows.clone(), table.clone());
        let encoding = tokio::task::spawn_blocking(move || {
            let name = shared.table.to_string();
            let was_column = |key: &str| shared.known_columns.contains(key);
            encode(&rows, &table, &name, &shared.mode, was_column)
        });
        let (shared, name) = (&self.shared, &self.shared.table);
        match encoding.await {
            Ok(Ok(encoded)) => Ok(encoded),
            Ok(Err(EncodeError::GoneColumn(column))) => Err(shared.unavailable(format!(
                "column {column:?} is gone from table {name}: add it again, or run plugins whose \
                 rows do not bring it"
            ))),
            Ok(Err(EncodeError::Io(error))) => {
                Err(shared.unavailable(format!("rows could not be compressed: {error}")))
            }
            Err(error) => Err(shared.unavailable(format!("encoding was broken off: {error}"))),
        }
    }

    /// Brings the encoded rows into the staging table; rows that COPY leaves out are refused.
    async fn load(&self, client: &Client, encoded: &mut Encoded) -> Result<(), SinkError> {
        if encoded.files.is_empty() {
            return Ok(());
        }
        let (shared, bucket) = (&self.shared, &self.shared.bucket);
        let failed = |error: Error| {
            shared.failed(&format!("cannot load rows for table {}", shared.table), &error)
        };
        session::run(client, &merge::create_staging(&shared.table)).await.map_err(failed)?;
        let upload = bucket.upload(&self.shard, &encoded.files).await?;
        let copied = session::run(client, &upload.copy).await;
        bucket.remove(upload).await;
        copied.map_err(failed)?;
        let left_out = self.left_out(client, &encoded.files).await?;
        encoded.refusals.extend(left_out);
        encoded.refusals.sort_unstable_by_key(|refusal| refusal.row);
        if let Some(losers) = merge::keep_winners(&shared.mode) {
            session::run(client, &losers).await.map_err(failed)?;
        }
        Ok(())
    }

    /// The rows that the last COPY left out. Each row sent is loaded or named, or nothing is.
    async fn left_out(
        &self,
        client: &Client,
        files: &[EncodedFile],
    ) -> Result<Vec<Refusal>, SinkError> {
        let (shared, table) = (&self.shared, &self.shared.table);
        let failed = |error: Error| {
            shared.failed(&format!("cannot learn what was loaded for table {table}"), &error)
        };
        let sent: usize = files.iter().map(|file| file.rows.len()).sum();
        let count = session::rows(client, "SELECT pg_last_copy_count()").await.map_err(failed)?;
        let count = count.first().and_then(|row| row.get(0)).and_then(|text| text.parse().ok());
        let loaded: usize = count.unwrap_or_default();
        if loaded == sent {
            return Ok(Vec::new());
        }
        let mut refused: HashMap<usize, String> = HashMap::new();
        for row in session::rows(client, LOAD_ERRORS).await.map_err(failed)? {
            let text = |place| row.get(place).unwrap_or_default();
            let file = text(0).rsplit('/').next().and_then(|name| name.split('.').next());
            let file = file.and_then(|number| files.get(number.parse::<usize>().ok()?));
            let line = text(1).parse::<usize>().ok().and_then(|line| line.checked_sub(1));
            if let Some(index) = file.zip(line).and_then(|(file, line)| file.rows.get(line)) {
                let reason = format!("COPY does not take column {:?}: {}", text(2), text(3));
                refused.entry(*index).or_insert(reason);
            }
        }
        if loaded + refused.len() != sent {
            return Err(shared.unavailable(format!(
                "COPY loaded {loaded} of {sent} rows for table {table} and named {} that it left \
                 out; see stl_load_errors",
                refused.len()
            )));
        }
        Ok(refused.into_iter().map(|(row, reason)| Refusal { row, reason }).collect())
    }

    /// Moves the position and the staged rows, together.
    async fn transact(
        &self,
        client: &Client,
        commit: &Commit,
        table: &LiveTable,
        encoded: &Encoded,
    ) -> Result<Ended, SinkError> {
        let (shared, ledger) = (&self.shared, &self.shared.ledger);
        let failed =
            |error: Error| shared.failed(&format!("cannot commit to {}", shared.table), &error);
        ledger.lock(client).await.map_err(failed)?;
        if let Standing::AtEnd = self.standing(client, commit).await? {
            session::run(client, "ROLLBACK").await.map_err(failed)?;
            if !encoded.files.is_empty() {
                session::run(client, merge::DROP_STAGING).await.map_err(failed)?;
            }
            return Ok(Ended::Committed);
        }
        let to = &commit.span.to_inclusive;
        let owned = shared.ownership.get();
        let moved = ledger.move_to(client, &shared.sink, &self.shard, to, owned);
        let moved = moved.await.map_err(failed)?;
        if moved != 1 {
            return Err(shared.unavailable(format!(
                "{ledger} has {moved} rows for shard {}: one is due; Redshift enforces no key, so \
                 only hands can have done that",
                self.shard.shard
            )));
        }
        if !encoded.files.is_empty() {
            for (set, places) in encoded.sets.iter().enumerate() {
                let columns: Vec<&str> =
                    places.iter().map(|place| table.columns[*place].name.as_str()).collect();
                for statement in merge::statements(&shared.mode, &shared.table, &columns, set) {
                    session::run(client, &statement).await.map_err(failed)?;
                }
            }
            session::run(client, merge::DROP_STAGING).await.map_err(failed)?;
        }
        Ok(match session::commit(client).await {
            Ok(()) => Ended::Committed,
            Err(cause) => Ended::Unknown(cause),
        })
    }

    /// After a COMMIT without an answer: asks a new connection whether it landed.
    async fn settle(
        &mut self,
        commit: &Commit,
        committed: Committed,
        cause: &str,
    ) -> Result<Committed, SinkError> {
        self.unanswered = Some((commit.span.to_inclusive.clone(), committed));
        let client = self.shared.connect().await?;
        let standing = self.standing(&client, commit).await?;
        self.client = Some(client);
        match standing {
            Standing::AtEnd => Ok(self.answered(commit)),
            Standing::AtStart => {
                Err(self.shared.unavailable(format!("the commit did not land: {cause}")))
            }
        }
    }

    /// The counts of a commit that had landed before: as remembered, else as if nothing was refused.
    fn answered(&mut self, commit: &Commit) -> Committed {
        match self.unanswered.take() {
            Some((to, committed)) if to == commit.span.to_inclusive => committed,
            _ => committed(commit, &[]),
        }
    }
}

#[async_trait]
impl SinkWriter for RedshiftWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        // Out of `self` until it is known to be clean: a call that is dropped half-way closes it.
        let client = match self.client.take() {
            Some(client) if !client.is_closed() => client,
            _ => self.shared.connect().await?,
        };
        match self.load_and_commit(&client, commit, refusals).await? {
            (Ended::Committed, committed) => {
                self.client = Some(client);
                self.unanswered = None;
                Ok(committed)
            }
            (Ended::Unknown(cause), committed) => {
                drop(client);
                self.settle(commit, committed, &cause).await
            }
        }
    }
}

/// What a commit wrote.
fn committed(commit: &Commit, refused: &[Refusal]) -> Committed {
    let bytes = |rows: &mut dyn Iterator<Item = usize>| -> u64 {
        rows.map(|row| commit.rows[row].payload.len() as u64).sum()
    };
    let lost = bytes(&mut refused.iter().map(|refusal| refusal.row));
    Committed {
        rows_written: (commit.rows.len() - refused.len()) as u64,
        rows_refused: refused.len() as u64,
        bytes_written: bytes(&mut (0..commit.rows.len())) - lost,
    }
}
