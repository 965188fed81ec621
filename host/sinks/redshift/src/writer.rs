//! The commit: load, then position and rows in one transaction.
//!
//! Until that transaction nothing is visible but to the session itself, so a load can be thrown away
//! at any time. What a connection had in hand when something failed goes with it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use async_trait::async_trait;

use super::Shared;
use super::encode::{EncodeError, Encoded, EncodedFile, encode};
use super::files::Upload;
use super::ledger::LedgerRow;
use super::table::LiveTable;
use super::{merge, session};
use shardmill_core::masking::sanitized;
use shardmill_core::record::{Position, ShardKey};
use shardmill_core::sink::{Commit, Committed, Refusal, RefusalLog, SinkError, SinkWriter};
use shardmill_pg::{Link, ServerError as Error};

/// Loads of one commit at most: each but the last finds rows that COPY does not take.
const LOADS_MAX: usize = 20;

/// Where a provisioned cluster names the rows that a COPY did not take: file, line, column, reason.
const CLUSTER_ERRORS: &str = "SELECT trim(filename), line_number, trim(colname), trim(err_reason) \
     FROM stl_load_errors WHERE query = pg_last_copy_id()";

/// Where Redshift Serverless does, which has no `stl_` tables for users, and provisioned clusters too.
/// The condition is that the file is of this load.
const SERVERLESS_ERRORS: &str = "SELECT trim(file_name), line_number, trim(column_name), trim(error_message) \
     FROM sys_load_error_detail WHERE file_name LIKE";

/// Commits one shard's rows.
pub(super) struct RedshiftWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    epoch: i64,
    /// `None` after a failure.
    client: Option<Link>,
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
    pub(super) fn new(shared: Arc<Shared>, shard: ShardKey, epoch: i64, client: Link) -> Self {
        Self { shared, shard, epoch, client: Some(client), unanswered: None }
    }

    /// The commit on one screen.
    async fn load_and_commit(
        &mut self,
        client: &Link,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<(Ended, Committed), SinkError> {
        if let Standing::AtEnd = self.standing(client, commit).await? {
            return Ok((Ended::Committed, self.answered(commit)));
        }
        let table = self.read_table(client).await?;
        let encoded = self.load(client, commit, &table, refusals).await?;
        if !encoded.refusals.is_empty() {
            refusals.record(commit, &encoded.refusals).await?;
        }
        let committed = committed(commit, &encoded.refusals);
        let ended = self.transact(client, commit, &table, &encoded).await?;
        Ok((ended, committed))
    }

    /// Compares the ledger with the commit.
    async fn standing(&self, client: &Link, commit: &Commit) -> Result<Standing, SinkError> {
        let (shared, ledger) = (&self.shared, &self.shared.ledger);
        let entry = ledger
            .read(client, &shared.sink, &self.shard)
            .await
            .map_err(|error| shared.failed(&format!("cannot read {ledger}"), &error))?
            .map_err(|cause| shared.unavailable(cause))?;
        let Some(LedgerRow { epoch, position, owner }) = entry else {
            let detail = format!("its row is gone from {ledger}");
            return Err(shared.fenced(&self.shard, detail, None));
        };
        if epoch != self.epoch {
            let detail = format!("epoch {epoch} in place of {}", self.epoch);
            return Err(shared.fenced(&self.shard, detail, owner));
        }
        if position == commit.range.from_exclusive {
            return Ok(Standing::AtStart);
        }
        if position.as_ref() == Some(&commit.range.to_inclusive) {
            return Ok(Standing::AtEnd);
        }
        let shown = |position: &Option<Position>| {
            position.as_ref().map_or_else(|| "the beginning".to_owned(), Position::to_string)
        };
        let (position, from) = (shown(&position), shown(&commit.range.from_exclusive));
        let detail = format!("the position is {position}, the commit begins at {from}");
        Err(shared.fenced(&self.shard, detail, None))
    }

    async fn read_table(&self, client: &Link) -> Result<Arc<LiveTable>, SinkError> {
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

    /// Encodes off the async threads, but for rows that were refused before.
    async fn encode(
        &self,
        commit: &Commit,
        skipped: &[Refusal],
        table: &Arc<LiveTable>,
    ) -> Result<Encoded, SinkError> {
        if commit.rows.is_empty() {
            return Ok(Encoded::default());
        }
        let (shared, rows, table) = (self.shared.clone(), commit.rows.clone(), table.clone());
        let skipped: HashSet<usize> = skipped.iter().map(|refusal| refusal.row).collect();
        let encoding = tokio::task::spawn_blocking(move || {
            let name = shared.table.to_string();
            let was_column = |key: &str| shared.known_columns.contains(key);
            encode(&rows, &skipped, &table, &name, &shared.mode, was_column)
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

    /// Brings the commit's rows into the staging table; rows that Redshift's error tables name are
    /// refused. A COPY that fails as a whole for such rows is repeated without them.
    async fn load(
        &self,
        client: &Link,
        commit: &Commit,
        table: &Arc<LiveTable>,
        log: &dyn RefusalLog,
    ) -> Result<Encoded, SinkError> {
        let (shared, bucket) = (&self.shared, &self.shared.bucket);
        let failed = |error: &Error| {
            shared.failed(&format!("cannot load rows for table {}", shared.table), error)
        };
        let mut refused: Vec<Refusal> = Vec::new();
        let mut loads_left = LOADS_MAX;
        let mut has_staging = false;
        loop {
            let mut encoded = self.encode(commit, &refused, table).await?;
            if encoded.files.is_empty() {
                encoded.refusals.append(&mut refused);
                encoded.refusals.sort_unstable_by_key(|refusal| refusal.row);
                return Ok(encoded);
            }
            if !has_staging {
                let create = merge::create_staging(&shared.table);
                session::run(client, &create).await.map_err(|error| failed(&error))?;
                has_staging = true;
            }
            let upload = bucket.upload(&self.shard, &encoded.files).await?;
            let copied = session::run(client, &upload.copy).await;
            loads_left -= 1;
            bucket.remove(&upload).await;
            let sent: usize = encoded.files.iter().map(|file| file.rows.len()).sum();
            let loaded = match &copied {
                Ok(_) => self.loaded(client).await?,
                Err(error) if error.as_db_error().is_none() => return Err(failed(error)),
                Err(_) => 0,
            };
            let named = match (loaded == sent, copied.is_ok()) {
                (true, _) => Vec::new(),
                (false, true) => self.named(client, &upload, &encoded.files).await?,
                // It may have failed for another reason, which is the one to show.
                (false, false) => {
                    self.named(client, &upload, &encoded.files).await.unwrap_or_default()
                }
            };
            match copied {
                Ok(_) if loaded + named.len() != sent => {
                    return Err(shared.unavailable(format!(
                        "COPY loaded {loaded} of {sent} rows for table {} and named {} that it left \
                         out; see stl_load_errors or sys_load_error_detail",
                        shared.table,
                        named.len()
                    )));
                }
                Err(error) if named.is_empty() || loads_left == 0 => return Err(failed(&error)),
                _ => {}
            }
            refused.extend(named);
            refused.sort_unstable_by_key(|refusal| refusal.row);
            let rows: Vec<usize> = refused.iter().map(|refusal| refusal.row).collect();
            log.check(commit, &rows)?;
            if copied.is_err() {
                continue;
            }
            encoded.refusals.append(&mut refused);
            encoded.refusals.sort_unstable_by_key(|refusal| refusal.row);
            if let Some(losers) = merge::keep_winners(&shared.mode) {
                session::run(client, &losers).await.map_err(|error| failed(&error))?;
            }
            return Ok(encoded);
        }
    }

    /// How many rows the last COPY loaded.
    async fn loaded(&self, client: &Link) -> Result<usize, SinkError> {
        let count = session::rows(client, "SELECT pg_last_copy_count()").await;
        let count = count.map_err(|error| self.cannot_learn(&error))?;
        let count = count.first().and_then(|row| row.get(0)).and_then(|text| text.parse().ok());
        Ok(count.unwrap_or_default())
    }

    /// The rows that the error tables name for a load. Which of the two there is depends on the kind of
    /// cluster, and on the role's rights.
    async fn named(
        &self,
        client: &Link,
        upload: &Upload,
        files: &[EncodedFile],
    ) -> Result<Vec<Refusal>, SinkError> {
        let of_load = session::literal(&format!("%/{}/%", upload.load));
        let serverless = format!("{SERVERLESS_ERRORS} {of_load}");
        let mut named: HashMap<usize, String> = HashMap::new();
        let mut last_error = None;
        for query in [CLUSTER_ERRORS, serverless.as_str()] {
            let rows = match session::rows(client, query).await {
                Ok(rows) => rows,
                Err(error) if error.as_db_error().is_some() => {
                    last_error = Some(error);
                    continue;
                }
                Err(error) => return Err(self.cannot_learn(&error)),
            };
            for row in rows {
                let text = |place| row.get(place).unwrap_or_default();
                let mut path = text(0).rsplit('/');
                let file = path.next().and_then(|name| name.split('.').next());
                let file = file.and_then(|number| files.get(number.parse::<usize>().ok()?));
                let line = text(1).parse::<usize>().ok().and_then(|line| line.checked_sub(1));
                if let Some(index) = file.zip(line).and_then(|(file, line)| file.rows.get(line)) {
                    let (column, why) = (sanitized(text(2)), sanitized(text(3)));
                    let reason = format!("COPY does not take column {column:?}: {why}");
                    named.entry(*index).or_insert(reason);
                }
            }
            if !named.is_empty() {
                break;
            }
        }
        match (named.is_empty(), last_error) {
            (true, Some(error)) => Err(self.cannot_learn(&error)),
            _ => Ok(named.into_iter().map(|(row, reason)| Refusal { row, reason }).collect()),
        }
    }

    fn cannot_learn(&self, error: &Error) -> SinkError {
        let doing = format!("cannot learn what was loaded for table {}", self.shared.table);
        self.shared.failed(&doing, error)
    }

    /// Moves the position and the staged rows, together.
    async fn transact(
        &self,
        client: &Link,
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
        let to = &commit.range.to_inclusive;
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
        Ok(match client.commit().await {
            Ok(()) => Ended::Committed,
            Err(cause) => Ended::Unknown(cause),
        })
    }

    /// After a COMMIT without an answer: asks a new connection whether it landed.
    async fn resolve(
        &mut self,
        commit: &Commit,
        committed: Committed,
        cause: &str,
    ) -> Result<Committed, SinkError> {
        self.unanswered = Some((commit.range.to_inclusive.clone(), committed));
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
            Some((to, committed)) if to == commit.range.to_inclusive => committed,
            _ => committed(commit, &[]),
        }
    }
}

#[async_trait]
impl SinkWriter for RedshiftWriter {
    fn copies_rows(&self) -> bool {
        true
    }

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
                self.resolve(commit, committed, &cause).await
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
