//! Commits: one position range after the other, into one sink.
//!
//! Invariant: each commit covers `(from, to]`, where `from` is the position that the sink has now (`stored`). A sink
//! that keeps its position refuses any other `from`, so a commit lands at most once, however often it is tried. An
//! error of `commit` leaves the outcome open only until the next try: the writer reads the sink's position and answers
//! a commit that had landed as done. A sink that keeps no position (at-least-once) may get the rows of a try again.
//!
//! | outcome of a try | `stored` | published position | dead letters |
//! |---|---|---|---|
//! | committed | `to` | `to` | pending ones up to `to` become visible |
//! | sink unavailable, or too many rows refused | unchanged | unchanged | none becomes visible; retry with backoff |
//! | unavailable for `give_up_after`, sink keeps its position | unchanged | `to` | the rows, pending |
//! | unavailable for `give_up_after`, at-least-once sink | `to` | `to` | the rows, visible |
//! | another owner, or destination closed | unchanged | unchanged | none becomes visible; the delivery ends |
//!
//! The third line is the delicate one. Nobody knows whether the last try landed after all, so the dead letters of
//! the rows stay pending, and `stored` stays: the next commit begins at the same `from` and skips the rows that were
//! given up. When it lands, no earlier try has, and the dead letters become visible. If an earlier try had landed, the
//! sink refuses the commit, and the next acquisition of the shard deletes the dead letters of the try that landed
//! (`host/state/src/pending.rs`).
//!
//! The dead letters of refused rows are written before the commit, as pending, and become visible after it: a crash
//! in between leaves a pending dead letter, which the next acquisition resolves by the sink's position.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::{DeliveryContext, DeliveryProgress};
use crate::refusals::PendingRefusals;
use shardmill_core::budget::Permit;
use shardmill_core::metric;
use shardmill_core::record::{Position, PositionRange, Row};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::sink::{Acquired, Commit, EncodedRows, SinkError, SinkWriter};

/// Retries of a commit that failed, up to the longest pause that is configured.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(100), Duration::MAX).with_jitter();
/// Time for a commit that is under way when its delivery is abandoned.
const LAST_COMMIT_MAX: Duration = Duration::from_secs(2);

/// A commit request: the rows of one commit, and its end.
pub(super) struct PendingCommit {
    /// By ascending position.
    pub(super) rows: Arc<Vec<Row>>,
    /// The rows that were encoded as they arrived; then `rows` has only the refused ones.
    pub(super) encoded: Option<Arc<EncodedRows>>,
    /// Every record up to here has its outcome in this sink once this is committed.
    pub(super) to_inclusive: Position,
    /// The revision that made them.
    pub(super) revision: Arc<str>,
    /// Bytes of their payloads and keys.
    pub(super) bytes: usize,
    /// The budget permit for the memory that they hold.
    pub(super) permit: Option<Permit>,
}

/// A request to a committer. Requests are executed in order.
pub(super) enum CommitRequest {
    Commit(PendingCommit),
    /// Answer once everything before this is committed.
    Flush(oneshot::Sender<()>),
}

/// Commits the rows of one shard to one sink.
pub(super) struct Committer {
    context: Arc<DeliveryContext>,
    writer: Box<dyn SinkWriter>,
    publish: watch::Sender<DeliveryProgress>,
    refusals: PendingRefusals,
    /// The sink's own position: each commit starts there.
    stored: Option<Position>,
    /// There are pending dead letters of refused or given-up rows.
    dead_letters_pending: bool,
    /// Whether the sink itself stores its position.
    keeps_position: bool,
    /// Time of the first failure since the last successful commit; `None`: the last commit succeeded.
    failing_since: Option<Instant>,
}

impl Committer {
    pub(super) fn new(
        acquired: Acquired,
        context: Arc<DeliveryContext>,
        publish: watch::Sender<DeliveryProgress>,
    ) -> Self {
        let refusals = PendingRefusals::new(
            context.dead_letters.clone(),
            context.sink.clone(),
            context.rejected_max,
        );
        Self {
            writer: acquired.writer,
            publish,
            refusals,
            stored: acquired.position,
            dead_letters_pending: false,
            keeps_position: acquired.keeps_position,
            failing_since: None,
            context,
        }
    }

    /// Commits until there are no more requests, the lane ends, or the shard is lost.
    pub(super) async fn run(
        mut self,
        mut requests: mpsc::Receiver<CommitRequest>,
    ) -> Result<(), SinkError> {
        if let Some((to_inclusive, revision)) = self.context.first_to.clone() {
            let rows = Arc::default();
            let (encoded, bytes, permit) = (None, 0, None);
            self.commit(PendingCommit { rows, encoded, to_inclusive, revision, bytes, permit })
                .await?;
        }
        loop {
            let request = tokio::select! {
                biased;
                () = self.context.abandon.cancelled() => return Ok(()),
                request = requests.recv() => request,
            };
            match request {
                Some(CommitRequest::Commit(pending)) => self.commit(pending).await?,
                // The lane may have ended; then nobody waits for the answer.
                Some(CommitRequest::Flush(done)) => drop(done.send(())),
                None => return Ok(()),
            }
        }
    }

    /// Commits one position range, with retries: only a lost shard, a closed destination, the end of the lane, or
    /// the end of `give_up_after` stops it.
    async fn commit(&mut self, pending: PendingCommit) -> Result<(), SinkError> {
        let PendingCommit { rows, encoded, to_inclusive, revision, bytes, mut permit } = pending;
        let is_copied = encoded.is_none() && self.writer.copies_rows();
        if let Some(permit) = permit.as_mut().filter(|_| is_copied) {
            // The sink makes a copy of the rows, which counts as well. The permit returns both with the rows.
            permit.resize(permit.bytes() + bytes);
        }
        let range = PositionRange { from_exclusive: self.stored.clone(), to_inclusive };
        let commit = Commit { range, rows, encoded, revision };
        let sink = self.context.sink.to_string();
        let mut retries = RETRY.at_most(self.context.timing.retry_pause_max).start();
        let committed = loop {
            let calls = self.writer.calls();
            let attempt = self.writer.commit(&commit, &self.refusals);
            let attempt = unless_abandoned(attempt, &self.context);
            let error = match shown(attempt, calls, &self.context, &self.publish).await {
                Ok(committed) => break committed,
                Err(error @ (SinkError::Fenced { .. } | SinkError::Closed { .. })) => {
                    return Err(error);
                }
                Err(error) => error,
            };
            metrics::counter!(metric::SINK_RETRIES_TOTAL, "sink" => sink.clone()).increment(1);
            block(&self.context, &self.publish, &error);
            if self.patience_is_over(&error) {
                match self.give_up(&commit, &error).await {
                    Ok(()) => return Ok(()),
                    Err(fenced @ SinkError::Fenced { .. }) => return Err(fenced),
                    Err(error) => block(&self.context, &self.publish, &error),
                }
            }
            let pause = retries.next_pause();
            // A destination may say how long to wait (such as Retry-After). That is obeyed, but not beyond
            // `give_up_after`: then the rows are given up.
            let asked = self.writer.asked_to_wait().unwrap_or_default();
            let pause = pause.max(asked.min(self.patience_left()));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.context.abandon.cancelled() => return Err(error),
            }
        };
        metrics::counter!(metric::SINK_ROWS_TOTAL, "sink" => sink.clone())
            .increment(committed.rows_written);
        metrics::counter!(metric::SINK_BYTES_TOTAL, "sink" => sink.clone())
            .increment(committed.bytes_written);
        if committed.rows_refused > 0 {
            metrics::counter!(metric::DEAD_LETTERS_TOTAL, "place" => format!("sink:{sink}"))
                .increment(committed.rows_refused);
            self.dead_letters_pending = true;
        }
        self.failing_since = None;
        if self.dead_letters_pending {
            self.dead_letters_pending =
                !confirm_dead_letters(&self.context, &commit.range.to_inclusive).await;
        }
        self.refusals.committed(&commit);
        self.stored = Some(commit.range.to_inclusive.clone());
        self.publish
            .send_replace(DeliveryProgress { position: self.stored.clone(), blocked: None });
        Ok(())
    }

    /// Whether the sink has been unavailable for `give_up_after`. Rows that the sink refuses do not count: a broken
    /// plugin must not drain a stream into the dead letters.
    fn patience_is_over(&mut self, error: &SinkError) -> bool {
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let is_out_of_reach = matches!(error, SinkError::Unavailable { .. });
        let limit = self.context.commit_policy.give_up_after;
        is_out_of_reach && limit.is_some_and(|limit| since.elapsed() >= limit)
    }

    /// Returns the time left until `give_up_after`; without that setting, it never ends.
    fn patience_left(&self) -> Duration {
        let Some(limit) = self.context.commit_policy.give_up_after else { return Duration::MAX };
        let failing_for = self.failing_since.map(|since| since.elapsed()).unwrap_or_default();
        limit.saturating_sub(failing_for)
    }

    /// Writes the commit's rows to the dead letters, so that the lane goes on without the sink. The next commit
    /// begins at the sink's own position and skips these rows.
    async fn give_up(&mut self, commit: &Commit, error: &SinkError) -> Result<(), SinkError> {
        let context = &self.context;
        let reason = format!("given up: {error}");
        let dead_letter =
            |row: &Row| self.refusals.dead_letter(row, reason.clone(), &commit.revision);
        let dead_letters: Vec<_> = commit.rows.iter().map(dead_letter).collect();
        let (rows, range, to) =
            (dead_letters.len() as u64, &commit.range, &commit.range.to_inclusive);
        let whose = (&context.shard, &context.sink);
        let given_up = context.dead_letters.give_up(
            whose,
            context.epoch,
            range,
            dead_letters,
            self.keeps_position,
        );
        let is_ours = given_up.await.map_err(|error| SinkError::Unavailable {
            sink: context.sink.clone(),
            cause: error.to_string(),
        })?;
        if !is_ours {
            return Err(SinkError::Fenced {
                sink: context.sink.clone(),
                shard: context.shard.shard.to_string(),
                detail: "its dead letters belong to another owner".into(),
                by: None,
            });
        }
        metrics::counter!(metric::DEAD_LETTERS_TOTAL, "place" => format!("sink:{}", context.sink))
            .increment(rows);
        tracing::warn!(shard = %context.shard.shard, sink = %context.sink, rows, up_to = %to,
            "gave up on the sink: the rows are now dead letters");
        if self.keeps_position {
            self.dead_letters_pending = true;
        } else {
            self.stored = Some(to.clone());
        }
        // The sink stays blocked in the status until a commit succeeds.
        self.publish.send_modify(|progress| progress.position = Some(to.clone()));
        Ok(())
    }
}

/// Waits for an attempt, and shows the sink as blocked when there is no answer for long. Every call has its own
/// deadline, but one attempt may make and retry many calls.
async fn shown<T>(
    attempt: impl Future<Output = T>,
    calls: &'static str,
    context: &DeliveryContext,
    publish: &watch::Sender<DeliveryProgress>,
) -> T {
    let after = context.timing.call_blocked_after;
    tokio::pin!(attempt);
    tokio::select! {
        done = &mut attempt => return done,
        () = tokio::time::sleep(after) => {}
    }
    let cause = format!("no answer to {calls} for more than {}", humantime::format_duration(after));
    block(context, publish, &SinkError::Unavailable { sink: context.sink.clone(), cause });
    attempt.await
}

fn block(context: &DeliveryContext, publish: &watch::Sender<DeliveryProgress>, error: &SinkError) {
    publish.send_if_modified(|progress| {
        let cause = Some(error.to_string());
        let changed = progress.blocked != cause;
        if changed {
            tracing::warn!(shard = %context.shard.shard, %error, "blocked; retrying");
            progress.blocked = cause;
        }
        changed
    });
}

/// Waits for an attempt. When the delivery is abandoned meanwhile, the attempt has [`LAST_COMMIT_MAX`] to end; then
/// it is dropped, because its server may be silent. The next owner of the shard reads from the sink's position
/// whether the commit landed.
async fn unless_abandoned<T>(
    attempt: impl Future<Output = Result<T, SinkError>>,
    context: &DeliveryContext,
) -> Result<T, SinkError> {
    let time_is_over = async {
        context.abandon.cancelled().await;
        tokio::time::sleep(LAST_COMMIT_MAX).await;
    };
    tokio::select! {
        biased;
        done = attempt => done,
        () = time_is_over => Err(SinkError::Unavailable {
            sink: context.sink.clone(),
            cause: "the lane ended during a commit".into(),
        }),
    }
}

/// Makes the pending dead letters up to `up_to` visible; false: they stay pending until the next commit, or until
/// the shard is acquired again.
async fn confirm_dead_letters(context: &DeliveryContext, up_to: &Position) -> bool {
    let confirmed = context.dead_letters.confirm(&context.shard, &context.sink, up_to);
    confirmed.await.inspect_err(|error| tracing::warn!(%error, "dead letters stay pending")).is_ok()
}
