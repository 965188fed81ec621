//! The commit: load the rows, then merge them and move the position in one transaction.
//!
//! The steps, and their reasons:
//!
//! 1. Read the ledger. If this commit landed before, nothing is loaded again.
//! 2. Encode, upload, and COPY into the staging table of the session. Nobody else sees it, so a load can be abandoned
//!    at any time. Refused rows are found here, before the transaction.
//! 3. Store refused rows as pending dead letters, before the position can move over them.
//! 4. In one transaction: lock the ledger, read it again (another owner may have come meanwhile), move the position,
//!    merge the staged rows, COMMIT.
//!
//! | ledger row | result |
//! |---|---|
//! | missing, or of another epoch | fenced |
//! | position is the start of the commit | the commit goes on, or is tried again after a COMMIT without an answer |
//! | position is the end of the commit | landed before: done, with its counts if remembered |
//! | any other position | fenced |
//!
//! After any failure the connection is closed, and with it its transaction and its staging table.

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

/// Highest number of loads of one commit. Each but the last finds rows that COPY does not accept.
const LOADS_MAX: usize = 20;

/// Query for the rows that a COPY did not accept, on a provisioned cluster: file, line, column, reason.
const CLUSTER_ERRORS: &str = "SELECT trim(filename), line_number, trim(colname), trim(err_reason) \
     FROM stl_load_errors WHERE query = pg_last_copy_id()";

/// The same for Redshift Serverless, whose users have no `stl_` tables; provisioned clusters have this table, too. The
/// pattern must match the files of this load.
const SERVERLESS_ERRORS: &str = "SELECT trim(file_name), line_number, trim(column_name), trim(error_message) \
     FROM sys_load_error_detail WHERE file_name LIKE";

/// Commits the rows of one shard.
pub(super) struct RedshiftWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    epoch: i64,
    /// `None` after a failure.
    client: Option<Link>,
    /// End and counts of a commit whose answer was lost.
    unanswered: Option<(Position, Committed)>,
}

/// Position of the shard, compared with a commit.
enum Standing {
    /// At the start of the commit.
    AtStart,
    /// At the end of the commit: it landed before.
    AtEnd,
}

/// End of a transaction.
enum Ended {
    Committed,
    /// COMMIT was sent and not confirmed.
    Unknown(String),
}

impl RedshiftWriter {
    pub(super) fn new(shared: Arc<Shared>, shard: ShardKey, epoch: i64, client: Link) -> Self {
        Self { shared, shard, epoch, client: Some(client), unanswered: None }
    }

    /// Runs the steps of the commit, in order.
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
            let detail = format!("its row was deleted from {ledger}");
            return Err(shared.fenced(&self.shard, detail, None));
        };
        if epoch != self.epoch {
            let detail = format!("expected epoch {}, found {epoch}", self.epoch);
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
        let detail =
            format!("expected position {from}, at which the commit begins, found {position}");
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

    /// Encodes on a blocking thread, without rows that were refused before.
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
                 rows do not have it"
            ))),
            Ok(Err(EncodeError::Io(error))) => {
                Err(shared.unavailable(format!("failed to compress rows: {error}")))
            }
            Err(error) => Err(shared.unavailable(format!("failed to encode rows: {error}"))),
        }
    }

    /// Loads the rows of the commit into the staging table. Rows that the error tables of Redshift name are refused. A
    /// COPY that fails completely because of such rows is repeated without them.
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
            // COPY has read the files or failed; in both cases nobody reads them again.
            bucket.remove(&upload).await;
            let sent: usize = encoded.files.iter().map(|file| file.rows.len()).sum();
            let loaded = match &copied {
                Ok(_) => self.loaded(client).await?,
                // Without an answer of the cluster it is unknown what was loaded.
                Err(error) if error.as_db_error().is_none() => return Err(failed(error)),
                Err(_) => 0,
            };
            let named = match (loaded == sent, copied.is_ok()) {
                (true, _) => Vec::new(),
                (false, true) => self.named(client, &upload, &encoded.files).await?,
                // It may have failed for another reason, which is then reported.
                (false, false) => {
                    self.named(client, &upload, &encoded.files).await.unwrap_or_default()
                }
            };
            match copied {
                Ok(_) if loaded + named.len() != sent => {
                    return Err(shared.unavailable(format!(
                        "expected COPY to load or report all {sent} rows for table {}, but it loaded {loaded} \
                         and reported {}; see stl_load_errors or sys_load_error_detail",
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

    /// Returns the number of rows that the last COPY loaded.
    async fn loaded(&self, client: &Link) -> Result<usize, SinkError> {
        let count = session::rows(client, "SELECT pg_last_copy_count()").await;
        let count = count.map_err(|error| self.cannot_learn(&error))?;
        let count = count.first().and_then(|row| row.get(0)).and_then(|text| text.parse().ok());
        Ok(count.unwrap_or_default())
    }

    /// Returns the rows that the error tables name for a load. Which table is readable depends on the kind of cluster
    /// and on the role's rights.
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
                    let reason = format!("COPY does not accept column {column:?}: {why}");
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
        let doing = format!("cannot read what was loaded for table {}", self.shared.table);
        self.shared.failed(&doing, error)
    }

    /// Moves the position and the staged rows, in one transaction.
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
        // The ledger is read again under the lock: another owner may have acquired the shard during the load.
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
                "expected one row in {ledger} for shard {}, found {moved}: it was edited by hand, because \
                 Redshift enforces no keys; delete the wrong rows",
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

    /// Resolves a COMMIT without an answer: reads the ledger on a new connection.
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

    /// Returns the counts of a commit that landed before: the remembered ones, or else as if no row was refused.
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
        // Taken out of `self` until it is known to be clean: dropping this call half-way then closes it.
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

/// Returns the counts of a commit.
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
