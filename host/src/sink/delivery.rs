//! Deliveries: the buffer, the rhythm and the patience between a lane and one of its sinks.
//!
//! One task per lane and sink. It gathers the rows of consecutive spans, commits them at the first
//! of rows, bytes, age or pressure on the byte budget, tries again while the sink is out of reach,
//! and publishes its position. So a sink that rolls hourly does not stop one that commits every
//! second. Spans that the sink already has are skipped here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::refusals::HeldRefusals;
use super::{Acquired, Commit, SinkError, SinkWriter};
use crate::budget::{Budget, Permit};
use crate::config::Rhythm;
use crate::position::DeadLetters;
use crate::record::{Position, PositionSpan, Row, ShardKey, SinkName};

/// Spans that may wait in the channel before the lane waits: as many as a usual commit has, so that
/// the next one is there when this one is done. Their bytes are bounded by the budget.
const SPANS_IN_CHANNEL_MAX: usize = 16;
/// The longest pause between two tries of a commit.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);

/// One span's rows for one sink.
pub struct Delivery {
    /// Everything up to here is settled once this is committed.
    pub to_inclusive: Position,
    /// The rows, by ascending position.
    pub rows: Vec<Row>,
    /// The generation that made them.
    pub generation: Arc<str>,
    /// The bytes that they hold in memory.
    pub permit: Option<Permit>,
}

enum Message {
    Span(Delivery),
    Flush(oneshot::Sender<()>),
}

/// How far a sink is with one shard.
#[derive(Clone, Debug, Default)]
pub struct Progress {
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
    pub progress: watch::Receiver<Progress>,
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
    pub rhythm: Rhythm,
    /// The process's budget.
    pub budget: Budget,
    /// Where refused rows go.
    pub letters: DeadLetters,
    /// The limits of refusals.
    pub rejected_max: crate::config::RejectedMax,
    /// Ends the task without a commit.
    pub abandon: CancellationToken,
    /// By this it may give rows up: the owner's epoch in the dead letters.
    pub epoch: i64,
    /// Spans up to here are skipped (the sink's position, or the checkpoint if that is believed).
    pub skip_to: Option<Position>,
}

impl DeliveryHandle {
    /// Starts the delivery of a shard that was acquired.
    pub fn start(acquired: Acquired, context: DeliveryContext) -> Self {
        let (sender, receiver) = mpsc::channel(SPANS_IN_CHANNEL_MAX);
        let begin = Progress { position: context.skip_to.clone(), blocked: None };
        let (publish, progress) = watch::channel(begin);
        let sink = context.sink.clone();
        let worker = Worker::new(acquired, context, publish);
        let task = Some(tokio::spawn(worker.run(receiver)));
        Self { sink, sender, progress, task }
    }

    /// Hands a span over; waits while the sink is behind.
    ///
    /// # Errors
    /// When the delivery has ended: [`DeliveryHandle::join`] says why.
    pub async fn send(&self, delivery: Delivery) -> Result<(), DeliveryEnded> {
        self.sender.send(Message::Span(delivery)).await.map_err(|_| DeliveryEnded)
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
    /// again.
    ///
    /// # Errors
    /// Why the delivery ended by itself, if it did and [`DeliveryHandle::ended`] has not said so.
    pub async fn join(self) -> Result<(), SinkError> {
        drop(self.sender);
        let Some(task) = self.task else { return Ok(()) };
        task.await.unwrap_or_else(|panic| {
            let cause = format!("the delivery failed: {panic}");
            Err(SinkError::Unavailable { sink: self.sink, cause })
        })
    }
}

/// The delivery ended before it was asked to.
#[derive(Debug)]
pub struct DeliveryEnded;

/// Rows in hand.
struct Buffer {
    rows: Vec<Row>,
    bytes: usize,
    permits: Vec<Permit>,
    to_inclusive: Position,
    generation: Arc<str>,
    opened: Instant,
}

struct Worker {
    context: DeliveryContext,
    writer: Box<dyn SinkWriter>,
    publish: watch::Sender<Progress>,
    refusals: HeldRefusals,
    /// Where the sink's own position stands: each commit starts there.
    stored: Option<Position>,
    must_cut_at: Option<Position>,
    /// Letters of rows that were refused or given up are not shown yet.
    letters_hidden: bool,
    /// Whether the sink itself says how far it is.
    keeps_position: bool,
    /// Since when no commit went well, if the last one did not.
    failing_since: Option<Instant>,
    buffer: Option<Buffer>,
    /// The rows of the last commit.
    rows_expected: usize,
    pressure: Arc<Notify>,
    id: u64,
}

impl Worker {
    fn new(acquired: Acquired, context: DeliveryContext, publish: watch::Sender<Progress>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let refusals =
            HeldRefusals::new(context.letters.clone(), context.sink.clone(), context.rejected_max);
        Self {
            writer: acquired.writer,
            publish,
            refusals,
            stored: acquired.position,
            must_cut_at: acquired.must_cut_at,
            letters_hidden: false,
            keeps_position: acquired.keeps_position,
            failing_since: None,
            buffer: None,
            rows_expected: 0,
            pressure: Arc::new(Notify::new()),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            context,
        }
    }

    async fn run(mut self, mut receiver: mpsc::Receiver<Message>) -> Result<(), SinkError> {
        loop {
            let due = self.due();
            tokio::select! {
                () = self.context.abandon.cancelled() => return Ok(()),
                message = receiver.recv() => match message {
                    Some(Message::Span(delivery)) => self.push(delivery).await?,
                    Some(Message::Flush(done)) => {
                        self.commit().await?;
                        // The lane may have gone: then nobody waits.
                        let _ = done.send(());
                    }
                    None => return Ok(()),
                },
                () = sleep_until(due) => self.commit().await?,
                () = self.pressure.notified() => self.commit().await?,
            }
        }
    }

    /// When the oldest span in hand must be committed.
    fn due(&self) -> Option<Instant> {
        match (&self.buffer, &self.must_cut_at) {
            (Some(buffer), None) => Some(buffer.opened + self.context.rhythm.linger_max),
            _ => None,
        }
    }

    async fn push(&mut self, delivery: Delivery) -> Result<(), SinkError> {
        if self.context.skip_to.as_ref().is_some_and(|have| delivery.to_inclusive <= *have) {
            return Ok(());
        }
        if self.buffer.as_ref().is_some_and(|held| held.generation != delivery.generation) {
            self.commit().await?;
        }
        let buffer = self.buffer.get_or_insert_with(|| {
            let opened = Instant::now();
            self.context.budget.register(opened, self.id, &self.pressure);
            Buffer {
                // The next commit is likely to be as large as the last one.
                rows: Vec::with_capacity(self.rows_expected),
                bytes: 0,
                permits: Vec::new(),
                to_inclusive: delivery.to_inclusive.clone(),
                generation: delivery.generation.clone(),
                opened,
            }
        });
        let known = self
            .context
            .skip_to
            .as_ref()
            .map_or(0, |have| delivery.rows.partition_point(|row| row.position() <= have));
        for row in delivery.rows.into_iter().skip(known) {
            buffer.bytes += row.payload.len() + row.key.len();
            buffer.rows.push(row);
        }
        buffer.permits.extend(delivery.permit);
        buffer.to_inclusive = delivery.to_inclusive;
        let full = buffer.rows.len() >= self.context.rhythm.rows_max
            || buffer.bytes >= self.context.rhythm.bytes_max;
        let at_cut = self.must_cut_at.as_ref().is_some_and(|cut| buffer.to_inclusive >= *cut);
        if full || at_cut {
            self.commit().await?;
        }
        Ok(())
    }

    /// Commits what is in hand; where an earlier owner promised an end, exactly up to there.
    async fn commit(&mut self) -> Result<(), SinkError> {
        let Some(buffer) = self.buffer.take() else { return Ok(()) };
        self.context.budget.unregister(buffer.opened, self.id);
        self.rows_expected = buffer.rows.len();
        let Some(cut) = self.must_cut_at.clone() else {
            return self.commit_span(buffer.rows, buffer.to_inclusive, buffer.generation).await;
        };
        if buffer.to_inclusive < cut {
            self.buffer = Some(buffer);
            return Ok(());
        }
        let (promised, rest): (Vec<Row>, Vec<Row>) =
            buffer.rows.into_iter().partition(|row| *row.position() <= cut);
        self.commit_span(promised, cut.clone(), buffer.generation.clone()).await?;
        self.must_cut_at = None;
        if buffer.to_inclusive > cut {
            self.commit_span(rest, buffer.to_inclusive, buffer.generation).await?;
        }
        Ok(())
    }

    /// Commits one span, with patience: only a lost shard, the end of the lane, or the end of the
    /// configured patience stops it.
    async fn commit_span(
        &mut self,
        rows: Vec<Row>,
        to_inclusive: Position,
        generation: Arc<str>,
    ) -> Result<(), SinkError> {
        let span = PositionSpan { from_exclusive: self.stored.clone(), to_inclusive };
        let commit = Commit { span, rows: rows.into(), generation };
        let sink = self.context.sink.to_string();
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(RETRY_PAUSE_MAX)
            .without_max_times()
            .with_jitter()
            .build();
        let committed = loop {
            let error = match self.writer.commit(&commit, &self.refusals).await {
                Ok(committed) => break committed,
                Err(error @ SinkError::Fenced { .. }) => return Err(error),
                Err(error) => error,
            };
            metrics::counter!("shardmill_sink_retries_total", "sink" => sink.clone()).increment(1);
            self.block(&error);
            if self.patience_is_over(&error) {
                match self.give_up(&commit, &error).await {
                    Ok(()) => return Ok(()),
                    Err(fenced @ SinkError::Fenced { .. }) => return Err(fenced),
                    Err(error) => self.block(&error),
                }
            }
            let pause = pauses.next().unwrap_or(RETRY_PAUSE_MAX);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.context.abandon.cancelled() => return Err(error),
            }
        };
        metrics::counter!("shardmill_sink_rows_total", "sink" => sink.clone())
            .increment(committed.rows_written);
        metrics::counter!("shardmill_sink_bytes_total", "sink" => sink.clone())
            .increment(committed.bytes_written);
        if committed.rows_refused > 0 {
            metrics::counter!("shardmill_dead_letters_total", "place" => format!("sink:{sink}"))
                .increment(committed.rows_refused);
            self.letters_hidden = true;
        }
        self.failing_since = None;
        if self.letters_hidden {
            self.letters_hidden = !settle(&self.context, &commit.span.to_inclusive).await;
        }
        self.refusals.committed(&commit);
        self.stored = Some(commit.span.to_inclusive.clone());
        self.context.skip_to.clone_from(&self.stored);
        self.publish.send_replace(Progress { position: self.stored.clone(), blocked: None });
        Ok(())
    }

    /// Whether the sink has been out of reach for as long as the configuration waits. Rows that it
    /// refuses are another matter: a broken plugin must not drain a stream into the dead letters.
    fn patience_is_over(&mut self, error: &SinkError) -> bool {
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let is_out_of_reach = matches!(error, SinkError::Unavailable { .. });
        let limit = self.context.rhythm.give_up_after;
        is_out_of_reach && limit.is_some_and(|limit| since.elapsed() >= limit)
    }

    /// Writes the commit's rows to the dead letters, so that the lane goes on without the sink. The
    /// next commit begins where the sink stands, and passes over these rows.
    async fn give_up(&mut self, commit: &Commit, error: &SinkError) -> Result<(), SinkError> {
        let context = &self.context;
        let reason = format!("given up: {error}");
        let letter = |row: &Row| self.refusals.letter(row, reason.clone());
        let letters: Vec<_> = commit.rows.iter().map(letter).collect();
        let (rows, to) = (letters.len() as u64, &commit.span.to_inclusive);
        let whose = (&context.shard, &context.sink);
        let given_up =
            context.letters.give_up(whose, context.epoch, to, letters, self.keeps_position);
        let is_ours = given_up.await.map_err(|error| SinkError::Unavailable {
            sink: context.sink.clone(),
            cause: error.to_string(),
        })?;
        if !is_ours {
            return Err(SinkError::Fenced {
                sink: context.sink.clone(),
                shard: context.shard.shard.to_string(),
                detail: "its dead letters have another owner".into(),
            });
        }
        metrics::counter!("shardmill_dead_letters_total", "place" => format!("sink:{}", context.sink))
            .increment(rows);
        tracing::warn!(shard = %context.shard.shard, sink = %context.sink, rows, up_to = %to,
            "given up: the rows are in the dead letters");
        if self.keeps_position {
            self.letters_hidden = true;
        } else {
            self.stored = Some(to.clone());
        }
        self.context.skip_to = Some(to.clone());
        // It stays blocked in everybody's eyes until a commit goes well.
        self.publish.send_modify(|progress| progress.position = Some(to.clone()));
        Ok(())
    }

    fn block(&self, error: &SinkError) {
        let context = &self.context;
        self.publish.send_if_modified(|progress| {
            let cause = Some(error.to_string());
            let changed = progress.blocked != cause;
            if changed {
                tracing::warn!(shard = %context.shard.shard, %error, "blocked; trying again");
                progress.blocked = cause;
            }
            changed
        });
    }
}

/// Shows the letters of the rows that were refused; false: they stay hidden until the next commit, or
/// until the shard is acquired again.
async fn settle(context: &DeliveryContext, up_to: &Position) -> bool {
    let settled = context.letters.settle(&context.shard, &context.sink, up_to);
    settled.await.inspect_err(|error| tracing::warn!(%error, "dead letters stay hidden")).is_ok()
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
