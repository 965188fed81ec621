//! Deliveries: the buffers between a lane and its sinks.
//!
//! There is one task per lane and sink. It has two halves: the gatherer collects the rows of consecutive position
//! ranges into commit requests, and the committer (`committer.rs`) executes them one after the other. A request is
//! complete at the first of: rows, bytes, age (the linger time), pressure on the byte budget, or a full encoder (where
//! the sink encodes rows as they arrive). While the committer is busy, the next request grows up to the same bounds, so
//! a slow sink gets fewer and larger commits, and a sink that rolls hourly does not stop one that commits every second.
//!
//! Invariants:
//!
//! - Requests are consecutive: each begins where the one before ended, and rows are in ascending position.
//! - A position range without rows moves the position too: a sink without output still gets an (empty) commit.
//! - A request has rows of one revision only, because a commit records the revision that made it.
//! - Rows that the sink must not get are dropped here, in `Gatherer::push`: rows that it has already, rows before
//!   its start, and rows that are dead letters of this sink.
//! - Where an earlier owner has promised an object that ends at a position (`must_cut_at`), nothing is committed
//!   before that position is in hand, and the first request ends exactly there: the object must be made again with
//!   the same content.
//!
//! | event | request |
//! |---|---|
//! | rows or bytes at the maximum, encoder full, or promised end in hand | at once; `push` waits for the committer |
//! | linger time over, or memory pressure | as soon as the committer has room; until then it grows |
//! | another revision | the buffer before it, at once |
//! | a flush | the buffer at once, then an answer after its commit |
//! | any of these before a promised end is in hand | none: the buffer grows, and a flush is answered without it |
//! | the end of the channel | none: what is in the buffer is read again |

mod committer;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::committer::{CommitRequest, Committer, PendingCommit};
use shardmill_config::{CommitPolicy, Timing};
use shardmill_core::budget::{Account, OpenBuffer, Permit};
use shardmill_core::off_thread::off_thread;
use shardmill_core::record::{Position, Row, ShardKey, ShardStart, SinkName};
use shardmill_core::sink::{Acquired, CutRows, EncodeRows, LookAhead, RowEncoder, SinkError};
use shardmill_core::stop::Stop;
use shardmill_state::DeadLetters;

/// Position ranges that may wait in the channel before the lane waits. This is as many as a usual commit has, so
/// that the next commit is complete when the current one is done. The byte budget bounds their bytes.
const DELIVERIES_IN_CHANNEL_MAX: usize = 16;
/// The same for a sink whose rows are encoded as they arrive. Encoding frees the memory of the rows, so they should
/// not wait in the channel.
const DELIVERIES_IN_CHANNEL_ENCODED_MAX: usize = 2;
/// Commit requests that may wait for the committer. With one, the next request is complete, and encoded where that
/// can be done ahead, when the current commit is done.
const COMMITS_WAITING_MAX: usize = 1;

/// Time for an idle delivery to notice that the lane has ended.
const IDLE_END_MAX: Duration = Duration::from_millis(100);
/// Time to wait for a delivery after it was aborted.
const ABORT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Rows of one position range for one sink.
pub struct Delivery {
    /// Every record up to here has its outcome in this sink once this is committed.
    pub to_inclusive: Position,
    /// The rows, by ascending position.
    pub rows: Vec<Row>,
    /// The revision that made them.
    pub revision: Arc<str>,
    /// The budget permit for the memory that they hold.
    pub permit: Option<Permit>,
}

enum Message {
    Delivery(Delivery),
    Flush(oneshot::Sender<()>),
}

/// How far a sink is with one shard.
#[derive(Clone, Debug, Default)]
pub struct DeliveryProgress {
    /// Committed or given up to here.
    pub position: Option<Position>,
    /// Why the sink is blocked; `None`: it is not.
    pub blocked: Option<String>,
}

/// The lane's end of a delivery.
pub struct DeliveryHandle {
    /// The sink.
    pub sink: SinkName,
    sender: mpsc::Sender<Message>,
    /// How far it is.
    pub progress: watch::Receiver<DeliveryProgress>,
    /// Notified when the buffer should be committed although more would fit.
    pub commit_now: Arc<Notify>,
    /// `None` once the task has ended and its reason was returned.
    task: Option<tokio::task::JoinHandle<Result<(), SinkError>>>,
}

/// Everything that a delivery needs besides its sink's writer.
pub struct DeliveryContext {
    /// The shard.
    pub shard: ShardKey,
    /// The sink.
    pub sink: SinkName,
    /// The commit policy.
    pub commit_policy: CommitPolicy,
    /// Deadlines and pauses.
    pub timing: Timing,
    /// The lane's account in the budget of all sinks' buffers.
    pub account: Arc<Account>,
    /// Store of the dead letters of refused rows.
    pub dead_letters: DeadLetters,
    /// Limits on refused rows.
    pub rejected_max: shardmill_config::RejectedMax,
    /// Ends the task without a commit.
    pub abandon: CancellationToken,
    /// The owner's epoch in the store of dead letters: with it the delivery may give rows up.
    pub epoch: i64,
    /// Rows up to here are skipped (the sink's position, or the checkpoint where the configuration prefers that).
    pub skip_to: Option<Position>,
    /// Rows of records before this start are skipped as well: other sinks need them, but this one takes records only
    /// from its own start.
    pub from_start: Option<ShardStart>,
    /// Rows that are dead letters of this sink already: they were refused or given up before the sink was restored
    /// from a backup. If they were written as well, a redrive would duplicate them.
    pub own_dead_letters: HashSet<(Position, u32)>,
    /// Position that the sink commits first, without a row, and the revision that runs. The sink's own position then
    /// covers the records that it skips. Without this commit, a later comparison with the state would take the sink
    /// for one that was restored from a backup.
    pub first_to: Option<(Position, Arc<str>)>,
}

impl DeliveryHandle {
    /// Starts the delivery of an acquired shard.
    pub fn start(acquired: Acquired, context: DeliveryContext) -> Self {
        let deliveries_max = match acquired.writer.encodes_rows() {
            Some(_) => DELIVERIES_IN_CHANNEL_ENCODED_MAX,
            None => DELIVERIES_IN_CHANNEL_MAX,
        };
        let (sender, receiver) = mpsc::channel(deliveries_max);
        let position = match &context.first_to {
            Some(_) => acquired.position.clone(),
            None => context.skip_to.clone(),
        };
        let begin = DeliveryProgress { position, blocked: None };
        let (publish, progress) = watch::channel(begin);
        let sink = context.sink.clone();
        let context = Arc::new(context);
        let gatherer = Gatherer::new(&acquired, context.clone());
        let commit_now = gatherer.pressure.clone();
        let committer = Committer::new(acquired, context, publish);
        let (requests, inbox) = mpsc::channel(COMMITS_WAITING_MAX);
        let task = Some(tokio::spawn(async move {
            let ((), committed) =
                tokio::join!(gatherer.run(receiver, requests), committer.run(inbox));
            committed
        }));
        Self { sink, sender, progress, commit_now, task }
    }

    /// Returns a sender of position ranges.
    pub fn sender(&self) -> DeliverySender {
        DeliverySender(self.sender.clone())
    }

    /// Waits until everything that was handed over is committed or given up, except rows that wait for a promised end.
    ///
    /// # Errors
    /// When the delivery has ended: [`DeliveryHandle::join`] says why.
    pub async fn flush(&self) -> Result<(), DeliveryEnded> {
        let (done, flushed) = oneshot::channel();
        self.sender.send(Message::Flush(done)).await.map_err(|_| DeliveryEnded)?;
        flushed.await.map_err(|_| DeliveryEnded)
    }

    /// Asks for a commit of everything that was handed over, without waiting. A delivery whose channel is full has
    /// enough to commit anyway.
    pub(crate) fn flush_soon(&self) {
        let (done, _) = oneshot::channel();
        // A delivery that has ended reports that by `ended` or `join`.
        let _ = self.sender.try_send(Message::Flush(done));
    }

    /// Completes when the delivery ends by itself, with the reason; only once.
    pub async fn ended(&mut self) -> SinkError {
        let Some(task) = &mut self.task else { return std::future::pending().await };
        let ended = task.await;
        self.task = None;
        match ended {
            Ok(Err(error)) => error,
            Ok(Ok(())) => self.unavailable("the delivery task ended unexpectedly".into()),
            Err(panic) => self.unavailable(format!("the delivery failed: {panic}")),
        }
    }

    fn unavailable(&self, cause: String) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause }
    }

    /// Ends the delivery and waits until it has ended. What is not committed is dropped and read again. A commit
    /// that outlasts the shutdown is aborted: the sink refuses it, because this writer no longer owns the shard, or
    /// it has landed, and the next owner sees that in the sink's position.
    ///
    /// # Errors
    /// Why the delivery ended by itself, if it did and [`DeliveryHandle::ended`] has not said so.
    pub async fn join(self, stop: &Stop) -> Result<(), SinkError> {
        let Self { sink, sender, task, .. } = self;
        drop(sender);
        let Some(mut task) = task else { return Ok(()) };
        let ended = match stop.until_over(&mut task).await {
            Some(ended) => ended,
            // The shutdown ran out of time elsewhere. This delivery is idle and ends at once, so that is not an
            // error.
            None if let Ok(ended) = tokio::time::timeout(IDLE_END_MAX, &mut task).await => ended,
            None => {
                task.abort();
                // The task ends at its next await. One that never reaches an await is left to itself.
                match tokio::time::timeout(ABORT_WAIT_MAX, task).await {
                    Ok(ended) => ended,
                    Err(_) => return Err(broken_off(sink)),
                }
            }
        };
        match ended {
            Ok(ended) => ended,
            Err(error) if error.is_cancelled() => Err(broken_off(sink)),
            Err(panic) => {
                let cause = format!("the delivery failed: {panic}");
                Err(SinkError::Unavailable { sink, cause })
            }
        }
    }
}

fn broken_off(sink: SinkName) -> SinkError {
    let cause = "a commit did not finish in time and was aborted; its records are read again";
    SinkError::Unavailable { sink, cause: cause.into() }
}

/// Hands position ranges to a delivery.
pub struct DeliverySender(mpsc::Sender<Message>);

impl DeliverySender {
    /// Hands a position range over; waits while the sink is lagging.
    ///
    /// # Errors
    /// When the delivery has ended: [`DeliveryHandle::ended`] says why.
    pub async fn send(self, delivery: Delivery) -> Result<(), DeliveryEnded> {
        self.0.send(Message::Delivery(delivery)).await.map_err(|_| DeliveryEnded)
    }
}

/// The delivery ended before it was asked to.
#[derive(Debug)]
pub struct DeliveryEnded;

/// Rows that are gathered for the next commit.
struct Buffer {
    rows: Vec<Row>,
    /// Encodes rows on arrival instead of keeping them.
    encoder: Option<Box<dyn RowEncoder>>,
    count: usize,
    bytes: usize,
    permit: Option<Permit>,
    to_inclusive: Position,
    revision: Arc<str>,
    opened: Instant,
    /// Registration in the budget, which notifies the delivery with the largest buffer when others need memory.
    open: OpenBuffer,
}

/// Gathers rows into commit requests, while the committer is busy with those before them.
struct Gatherer {
    context: Arc<DeliveryContext>,
    /// Makes an encoder for each commit, where the sink encodes rows as they arrive.
    encode: Option<Arc<dyn EncodeRows>>,
    /// Sees the rows of a request before their commit begins.
    ahead: Option<Arc<dyn LookAhead>>,
    must_cut_at: Option<Position>,
    buffer: Option<Buffer>,
    /// The buffer is committed as soon as the committer has room; until then it grows.
    must_commit: bool,
    /// Number of rows in the last request.
    rows_expected: usize,
    /// Rows after the end that an earlier owner promised. They go through `push` again, so that they are encoded as
    /// all others.
    rest_of_promise: Option<Delivery>,
    pressure: Arc<Notify>,
}

/// The committer has ended. Its own result has the reason.
struct CommitterEnded;

impl Gatherer {
    fn new(acquired: &Acquired, context: Arc<DeliveryContext>) -> Self {
        Self {
            encode: acquired.writer.encodes_rows(),
            ahead: acquired.writer.looks_ahead(),
            must_cut_at: acquired.must_cut_at.clone(),
            buffer: None,
            must_commit: false,
            rows_expected: 0,
            rest_of_promise: None,
            pressure: Arc::new(Notify::new()),
            context,
        }
    }

    async fn run(
        mut self,
        receiver: mpsc::Receiver<Message>,
        requests: mpsc::Sender<CommitRequest>,
    ) {
        let context = self.context.clone();
        tokio::select! {
            () = context.abandon.cancelled() => {}
            // Where the committer has ended, its result has the reason.
            _ = self.gather(receiver, &requests) => {}
        }
    }

    async fn gather(
        &mut self,
        mut receiver: mpsc::Receiver<Message>,
        requests: &mpsc::Sender<CommitRequest>,
    ) -> Result<(), CommitterEnded> {
        loop {
            let deadline = self.deadline();
            tokio::select! {
                () = requests.closed() => return Err(CommitterEnded),
                message = receiver.recv() => match message {
                    Some(Message::Delivery(delivery)) => self.push(delivery, requests).await?,
                    Some(Message::Flush(done)) => {
                        self.hand_over(requests).await?;
                        requests.send(CommitRequest::Flush(done)).await.map_err(|_| CommitterEnded)?;
                    }
                    None => return Ok(()),
                },
                () = sleep_until(deadline) => self.must_commit = true,
                () = self.pressure.notified() => self.must_commit = self.buffer.is_some(),
                room = requests.reserve(), if self.must_commit => {
                    drop(room);
                    self.hand_over(requests).await?;
                }
            }
        }
    }

    /// Returns when the oldest rows in hand must be committed.
    fn deadline(&self) -> Option<Instant> {
        match (&self.buffer, &self.must_cut_at) {
            (Some(buffer), None) if !self.must_commit => {
                Some(buffer.opened + self.context.commit_policy.linger_max)
            }
            _ => None,
        }
    }

    async fn push(
        &mut self,
        delivery: Delivery,
        requests: &mpsc::Sender<CommitRequest>,
    ) -> Result<(), CommitterEnded> {
        let Delivery { to_inclusive, mut rows, revision, mut permit } = delivery;
        let skip_to = self.context.skip_to.as_ref();
        if skip_to.is_some_and(|have| to_inclusive <= *have) {
            return Ok(());
        }
        let known = skip_to.map_or(0, |have| rows.partition_point(|row| row.position() <= have));
        rows.drain(..known);
        if let Some(start) = &self.context.from_start {
            let is_before = |row: &Row| {
                let arrived_ms = i64::try_from(row.source().arrived_ms).unwrap_or(i64::MAX);
                start.is_after(&row.position().sequence, arrived_ms)
            };
            rows.retain(|row| !is_before(row));
        }
        let dead_letters = &self.context.own_dead_letters;
        if !dead_letters.is_empty() {
            rows.retain(|row| !dead_letters.contains(&(row.position().clone(), row.ordinal)));
        }
        if self.buffer.as_ref().is_some_and(|buffered| buffered.revision != revision) {
            self.hand_over(requests).await?;
        }
        loop {
            let (more, cut) = self.take(rows, (&to_inclusive, &revision), permit.take()).await;
            permit = more;
            match cut {
                None => break,
                Some(rest) => rows = rest,
            }
            self.hand_over(requests).await?;
        }
        let Some(buffer) = &mut self.buffer else { return Ok(()) };
        buffer.to_inclusive = to_inclusive;
        let full = buffer.count >= self.context.commit_policy.rows_max
            || buffer.bytes >= self.context.commit_policy.bytes_max;
        let at_cut = self.must_cut_at.as_ref().is_some_and(|cut| buffer.to_inclusive >= *cut);
        if full || at_cut {
            self.hand_over(requests).await?;
        }
        if let Some(rest) = self.rest_of_promise.take() {
            // No promise is left, so this recursion is one level deep.
            Box::pin(self.push(rest, requests)).await?;
        }
        Ok(())
    }

    /// Takes rows up to `to_inclusive` into the buffer. Where the commit is full, returns the rows that belong to
    /// the next one, with their part of the permit.
    async fn take(
        &mut self,
        mut rows: Vec<Row>,
        (to_inclusive, revision): (&Position, &Arc<str>),
        permit: Option<Permit>,
    ) -> (Option<Permit>, Option<Vec<Row>>) {
        // The object that an earlier owner promised is cut exactly at its end, so its rows are kept as rows.
        let encode = self.encode.as_ref().filter(|_| self.must_cut_at.is_none());
        let buffer = self.buffer.get_or_insert_with(|| {
            Buffer {
                // The next commit is likely to be as large as the last one.
                rows: match &encode {
                    Some(_) => Vec::new(),
                    None => Vec::with_capacity(self.rows_expected),
                },
                encoder: encode.map(|encode| encode.begin()),
                count: 0,
                bytes: 0,
                permit: None,
                to_inclusive: to_inclusive.clone(),
                revision: revision.clone(),
                opened: Instant::now(),
                open: self.context.account.open_buffer(&self.pressure),
            }
        });
        let bytes_of = |rows: &[Row]| -> usize {
            rows.iter().map(|row| row.payload.len() + row.key.len()).sum()
        };
        buffer.count += rows.len();
        buffer.bytes += bytes_of(&rows);
        let came_bytes = permit.as_ref().map(Permit::bytes);
        match (&mut buffer.permit, permit) {
            (Some(buffered), Some(more)) => buffered.absorb(more),
            (buffered, more) => *buffered = more.or(buffered.take()),
        }
        let mut rest_permit = None;
        let mut cut = None;
        match buffer.encoder.take() {
            None => buffer.rows.append(&mut rows),
            Some(encoder) if rows.is_empty() => buffer.encoder = Some(encoder),
            Some(mut encoder) => {
                let counted = buffer.permit.as_ref().map(Permit::bytes);
                let occupied_bytes_max = counted
                    .map_or(usize::MAX, |bytes| self.context.account.encoded_bytes_max(bytes));
                let encoded = off_thread(move || {
                    let cut = encoder.push(rows, occupied_bytes_max);
                    (encoder, cut)
                });
                let (encoder, cut_rows) = encoded.await;
                if let Some(CutRows { to_inclusive, rest }) = cut_rows {
                    buffer.count -= rest.len();
                    buffer.bytes -= bytes_of(&rest);
                    if let Some(to_inclusive) = to_inclusive {
                        buffer.to_inclusive = to_inclusive;
                    }
                    // These rows share memory with the rows before them, so everything that arrived with them stays
                    // counted.
                    rest_permit = match (&mut buffer.permit, came_bytes) {
                        (Some(permit), Some(bytes)) => Some(permit.split(bytes)),
                        _ => None,
                    };
                    cut = Some(rest);
                }
                // The encoder dropped the rows, and with them the memory that they held.
                if let Some(permit) = &mut buffer.permit {
                    permit.resize(encoder.occupied_bytes());
                }
                buffer.encoder = Some(encoder);
            }
        }
        buffer.open.resize(buffer.permit.as_ref().map_or(0, Permit::bytes));
        (rest_permit, cut)
    }

    /// Hands the buffer to the committer; where an earlier owner promised an end, exactly up to that end.
    async fn hand_over(
        &mut self,
        requests: &mpsc::Sender<CommitRequest>,
    ) -> Result<(), CommitterEnded> {
        self.must_commit = false;
        let Some(mut buffer) = self.buffer.take() else { return Ok(()) };
        let cut = match &self.must_cut_at {
            // Nothing can be committed before the promised end is in hand.
            Some(cut) if buffer.to_inclusive < *cut => {
                self.buffer = Some(buffer);
                return Ok(());
            }
            _ => self.must_cut_at.take(),
        };
        drop(buffer.open);
        self.rows_expected = buffer.rows.len();
        if let Some(cut) = cut {
            let (promised, rest) = buffer.rows.into_iter().partition(|row| *row.position() <= cut);
            let pending = PendingCommit {
                rows: Arc::new(promised),
                encoded: None,
                to_inclusive: cut.clone(),
                revision: buffer.revision.clone(),
                bytes: 0,
                permit: None,
            };
            requests.send(CommitRequest::Commit(pending)).await.map_err(|_| CommitterEnded)?;
            if buffer.to_inclusive == cut {
                return Ok(());
            }
            if self.encode.is_some() && !rest.is_empty() {
                let Buffer { to_inclusive, revision, permit, .. } = buffer;
                self.rest_of_promise =
                    Some(Delivery { to_inclusive, rows: rest, revision, permit });
                return Ok(());
            }
            buffer.rows = rest;
        }
        let (rows, encoded) = match buffer.encoder {
            None => (buffer.rows, None),
            Some(encoder) => {
                let (refused, encoded) = off_thread(move || encoder.finish()).await;
                if let Some(permit) = &mut buffer.permit {
                    permit.resize(encoded.occupied_bytes);
                }
                (refused, Some(Arc::new(encoded)))
            }
        };
        let pending = PendingCommit {
            rows: Arc::new(rows),
            encoded,
            to_inclusive: buffer.to_inclusive,
            revision: buffer.revision,
            bytes: buffer.bytes,
            permit: buffer.permit,
        };
        let room = requests.reserve().await.map_err(|_| CommitterEnded)?;
        if let Some(ahead) = &self.ahead {
            ahead.see(&pending.rows);
        }
        room.send(CommitRequest::Commit(pending));
        Ok(())
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
