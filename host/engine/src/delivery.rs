//! Deliveries: the buffer, the rhythm and the patience between a lane and one of its sinks.
//!
//! One task per lane and sink. It gathers the rows of consecutive spans and hands them to its
//! committer at the first of rows, bytes, age or pressure on the byte budget; while that is busy, the
//! next commit grows, up to the same bounds: a slow sink gets fewer and larger ones. So a sink that
//! rolls hourly does not stop one that commits every second. Spans that the sink already has are
//! skipped here.

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

/// Spans that may wait in the channel before the lane waits: as many as a usual commit has, so that
/// the next one is there when this one is done. Their bytes are bounded by the budget.
const DELIVERIES_IN_CHANNEL_MAX: usize = 16;
/// The same for a sink whose rows are encoded as they arrive, which lets go of what they hold.
const DELIVERIES_IN_CHANNEL_ENCODED_MAX: usize = 2;
/// Parcels that may wait for the committer: with one, the next is there, and encoded where that can be
/// done ahead, when this one is committed.
const COMMITS_WAITING_MAX: usize = 1;

/// How long a delivery that has nothing under way may take to hear that the lane has ended.
const IDLE_END_MAX: Duration = Duration::from_millis(100);
/// How long a delivery that is broken off is waited for.
const ABORT_WAIT_MAX: Duration = Duration::from_secs(1);

/// One span's rows for one sink.
pub struct Delivery {
    /// Everything up to here is settled once this is committed.
    pub to_inclusive: Position,
    /// The rows, by ascending position.
    pub rows: Vec<Row>,
    /// The revision that made them.
    pub revision: Arc<str>,
    /// The bytes that they hold in memory.
    pub permit: Option<Permit>,
}

enum Message {
    Delivery(Delivery),
    Flush(oneshot::Sender<()>),
}

/// How far a sink is with one shard.
#[derive(Clone, Debug, Default)]
pub struct DeliveryProgress {
    /// Committed up to here.
    pub position: Option<Position>,
    /// Why it does not go on; `None`: it does.
    pub blocked: Option<String>,
}

/// The lane's end of a delivery.
pub struct DeliveryHandle {
    /// The sink.
    pub sink: SinkName,
    sender: mpsc::Sender<Message>,
    /// How far it is.
    pub progress: watch::Receiver<DeliveryProgress>,
    /// Told when what is in hand is to be committed, though more would fit.
    pub commit_now: Arc<Notify>,
    /// `None` once it has ended and said why.
    task: Option<tokio::task::JoinHandle<Result<(), SinkError>>>,
}

/// What a delivery needs beside its sink's writer.
pub struct DeliveryContext {
    /// The shard.
    pub shard: ShardKey,
    /// The sink.
    pub sink: SinkName,
    /// When to commit.
    pub commit_policy: CommitPolicy,
    /// Deadlines and pauses.
    pub timing: Timing,
    /// The lane's account in the budget of all sinks' buffers.
    pub account: Arc<Account>,
    /// Where refused rows go.
    pub dead_letters: DeadLetters,
    /// The limits of refusals.
    pub rejected_max: shardmill_config::RejectedMax,
    /// Ends the task without a commit.
    pub abandon: CancellationToken,
    /// By this it may give rows up: the owner's epoch in the dead letters.
    pub epoch: i64,
    /// Spans up to here are skipped (the sink's position, or the checkpoint if that is believed).
    pub skip_to: Option<Position>,
    /// Rows of records before this start are skipped as well: other sinks need them, and this one
    /// takes records from its start on.
    pub from_start: Option<ShardStart>,
    /// Rows that are dead letters of this sink: they were refused or given up before it was restored from a
    /// backup. Written as well, they would be doubled by a redrive.
    pub own_dead_letters: HashSet<(Position, u32)>,
    /// The position that the sink is to commit first, without a row: the end of the part that it skips is then its own, and a
    /// later comparison with the state does not take it for a sink that was restored. With the
    /// revision that runs.
    pub first_to: Option<(Position, Arc<str>)>,
}

impl DeliveryHandle {
    /// Starts the delivery of a shard that was acquired.
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

    /// Where spans are handed over.
    pub fn sender(&self) -> DeliverySender {
        DeliverySender(self.sender.clone())
    }

    /// Waits until everything that was handed over is committed.
    ///
    /// # Errors
    /// When the delivery has ended: [`DeliveryHandle::join`] says why.
    pub async fn flush(&self) -> Result<(), DeliveryEnded> {
        let (done, flushed) = oneshot::channel();
        self.sender.send(Message::Flush(done)).await.map_err(|_| DeliveryEnded)?;
        flushed.await.map_err(|_| DeliveryEnded)
    }

    /// Asks for a commit of everything that was handed over, without a wait. A delivery whose channel is full
    /// has enough to commit.
    pub(crate) fn flush_soon(&self) {
        let (done, _) = oneshot::channel();
        // Who has ended says so elsewhere.
        let _ = self.sender.try_send(Message::Flush(done));
    }

    /// Completes when the delivery ends by itself, with the reason; once.
    pub async fn ended(&mut self) -> SinkError {
        let Some(task) = &mut self.task else { return std::future::pending().await };
        let ended = task.await;
        self.task = None;
        match ended {
            Ok(Err(error)) => error,
            Ok(Ok(())) => self.unavailable("the delivery ended".into()),
            Err(panic) => self.unavailable(format!("the delivery failed: {panic}")),
        }
    }

    fn unavailable(&self, cause: String) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause }
    }

    /// Ends the delivery and waits until it has. What is not committed is dropped; it will be read
    /// again. A commit that outlasts the time of the end is broken off: the sink refuses it to a writer
    /// that has lost the shard, and whoever acquires the shard next reads what came of it.
    ///
    /// # Errors
    /// Why the delivery ended by itself, if it did and [`DeliveryHandle::ended`] has not said so.
    pub async fn join(self, stop: &Stop) -> Result<(), SinkError> {
        let Self { sink, sender, task, .. } = self;
        drop(sender);
        let Some(mut task) = task else { return Ok(()) };
        let ended = match stop.until_over(&mut task).await {
            Some(ended) => ended,
            // Nothing of it is under way, and it ends at once: what did not come to its end is another part.
            None if let Ok(ended) = tokio::time::timeout(IDLE_END_MAX, &mut task).await => ended,
            None => {
                task.abort();
                // It ends at its next wait. One that never comes to it is left behind.
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
    let cause = "a commit did not end in time and was broken off; its records are read again";
    SinkError::Unavailable { sink, cause: cause.into() }
}

/// Hands spans over to a delivery.
pub struct DeliverySender(mpsc::Sender<Message>);

impl DeliverySender {
    /// Hands a span over; waits while the sink is behind.
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

/// Rows in hand.
struct Buffer {
    rows: Vec<Row>,
    /// What became of rows that are not kept.
    encoder: Option<Box<dyn RowEncoder>>,
    count: usize,
    bytes: usize,
    permit: Option<Permit>,
    to_inclusive: Position,
    revision: Arc<str>,
    opened: Instant,
    /// By this it is asked to commit when others need its bytes.
    open: OpenBuffer,
}

/// Gathers rows into parcels, while the committer is busy with those before them.
struct Gatherer {
    context: Arc<DeliveryContext>,
    /// What rows become as they arrive.
    encode: Option<Arc<dyn EncodeRows>>,
    /// Who is shown a parcel before its turn comes.
    ahead: Option<Arc<dyn LookAhead>>,
    must_cut_at: Option<Position>,
    buffer: Option<Buffer>,
    /// The buffer is to be committed as soon as the one before it is: until then it grows.
    must_commit: bool,
    /// The rows of the last parcel.
    rows_expected: usize,
    /// Rows after an earlier owner's promise: they are encoded as those that arrive.
    rest_of_promise: Option<Delivery>,
    pressure: Arc<Notify>,
}

/// The committer has ended, and says why itself.
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
            // Where the committer has ended, it says why.
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

    /// When the oldest span in hand must be committed.
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
            // Nothing is promised any more: it comes back once.
            Box::pin(self.push(rest, requests)).await?;
        }
        Ok(())
    }

    /// Takes rows up to `to_inclusive` into the buffer. Gives those that belong to the next commit, if this
    /// one is as large as it may be, with their part of the permit.
    async fn take(
        &mut self,
        mut rows: Vec<Row>,
        (to_inclusive, revision): (&Position, &Arc<str>),
        permit: Option<Permit>,
    ) -> (Option<Permit>, Option<Vec<Row>>) {
        // An earlier owner's promise is cut exactly at its end, and kept in its layout: of rows.
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
                    // They share with the rows before them: all that came with them is still held.
                    rest_permit = match (&mut buffer.permit, came_bytes) {
                        (Some(permit), Some(bytes)) => Some(permit.split(bytes)),
                        _ => None,
                    };
                    cut = Some(rest);
                }
                // The rows are gone, and with them what they held.
                if let Some(permit) = &mut buffer.permit {
                    permit.resize(encoder.occupied_bytes());
                }
                buffer.encoder = Some(encoder);
            }
        }
        buffer.open.resize(buffer.permit.as_ref().map_or(0, Permit::bytes));
        (rest_permit, cut)
    }

    /// Hands over what is in hand; where an earlier owner promised an end, exactly up to there.
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
