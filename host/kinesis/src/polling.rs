//! Reads one shard by polling with GetRecords: in order, without a gap, and no record twice.
//!
//! Invariant: the iterator never stands after records that are not in the inbox. `poll` keeps the old iterator while it
//! waits for the answer and while the records are opened. It replaces the iterator and fills the inbox without a wait
//! in between, so a future that is dropped at any wait only asks for the same records again. When records are given
//! back, or the iterator has expired, the next iterator starts at the inbox's last record.
//!
//! | outcome of GetRecords | iterator | next call |
//! |---|---|---|
//! | records, or none yet | the next one | after 200 ms if paced; after `poll_interval` if nothing is left |
//! | an answer without a next iterator | none | none: the shard has ended |
//! | an answer that needs more memory than is free | stays | once that memory is booked |
//! | `ExpiredIteratorException` | dropped | at once, with an iterator at the last record |
//! | throttled, or a network error | stays | after a backoff |
//! | any other error | dropped | none: the error is returned, or that the stream was replaced |
//!
//! Memory: an answer is booked before it is requested, and no more records are requested than fit (`answer_size`). The
//! booking then shrinks to what waits in the inbox.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::answer_size::{AnswerSize, payload_of};
use super::booking::{self, Read};
use super::client::{AnswerDate, ErrorClass, call_error, classify};
use super::connection::{self, GET_RECORDS, Passing, ReadAnswer, StreamConnection};
use super::inbox::{self, Inbox};
use shardmill_core::budget::{Account, Permit};
use shardmill_core::metric;
use shardmill_core::record::ShardKey;
use shardmill_core::retry::{Retries, RetryPolicy};
use shardmill_core::source::waiting::Waiting;
use shardmill_core::source::{BatchReader, NextBatch, SourceError};

/// Retries of calls that failed, for each shard separately.
pub(super) const RETRY: RetryPolicy =
    RetryPolicy::doubling(CALL_INTERVAL, Duration::from_secs(10)).with_jitter();
/// Shortest time between two calls for one shard.
///
/// Source: API reference, GetRecords: five calls per second and shard.
const CALL_INTERVAL: Duration = Duration::from_millis(200);

/// Settings of polling.
#[derive(Clone, Debug)]
pub struct Polling {
    /// Most records that a call requests.
    pub records_per_call_max: u32,
    /// Pause after an answer that says that nothing is left.
    pub poll_interval: Duration,
    /// Whether the server limits the calls per second, as AWS does.
    pub is_paced: bool,
}

/// Reader of one shard that polls it.
pub struct PollingReader {
    connection: Arc<StreamConnection>,
    polling: Polling,
    inbox: Inbox,
    account: Arc<Account>,
    /// Memory in the readers' budget for the records in the inbox, and for a batch of one large record until the lane
    /// asks for the next batch.
    permit: Option<Permit>,
    answer_size: AnswerSize,
    iterator: Option<String>,
    ended: bool,
    next_call: Instant,
    retries: Retries,
    lag_ms: u64,
    /// A time up to which everything that had arrived was read with the last answer, in milliseconds since 1970.
    caught_up_ms: Option<i64>,
    /// Whether the last answer had records.
    is_flowing: bool,
    waiting: Waiting,
}

impl PollingReader {
    /// Makes a reader that begins at the inbox's position.
    pub fn new(connection: Arc<StreamConnection>, polling: Polling, inbox: Inbox) -> Self {
        let account = Arc::new(connection.read_ahead.account(inbox.shard().shard.as_str()));
        Self {
            connection,
            polling,
            inbox,
            account,
            permit: None,
            answer_size: AnswerSize::default(),
            iterator: None,
            ended: false,
            next_call: Instant::now(),
            retries: RETRY.start(),
            lag_ms: 0,
            caught_up_ms: None,
            is_flowing: false,
            waiting: Waiting::default(),
        }
    }

    /// Makes the reader show in `waiting` which call it waits for.
    pub(crate) fn shown_by(mut self, waiting: Waiting) -> Self {
        self.waiting = waiting;
        self
    }

    /// Drops iterator and booking, because a subscription continues from the inbox, which is empty.
    pub(super) fn rest(&mut self) {
        self.iterator = None;
        self.permit = None;
    }

    /// Returns where the reader shows which call it waits for.
    pub(super) fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Returns the inbox, for the fan-out reader.
    pub fn inbox(&mut self) -> &mut Inbox {
        &mut self.inbox
    }

    /// Keeps the booking of an event that came, until [`Self::count_occupied`] counts what is in the inbox.
    pub(super) fn keep_permit(&mut self, permit: Permit) {
        self.permit = Some(permit);
    }

    /// Resizes the booking to what waits in the inbox, plus a large batch that the lane has.
    pub(super) fn count_occupied(&mut self) {
        match self.inbox.occupied_bytes() {
            0 => self.permit = None,
            bytes => self.permit.get_or_insert_with(|| self.account.force(0)).resize(bytes),
        }
    }

    /// Returns the account of the read-ahead budget, for the fan-out reader.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Makes one call: for an iterator if there is none, otherwise for records. `Ok(true)`: records were requested and
    /// the server answered.
    async fn poll(&mut self) -> Result<bool, SourceError> {
        tokio::time::sleep_until(self.next_call).await;
        let Some(iterator) = self.iterator.clone() else {
            match self.connection.iterator(&mut self.inbox, &self.waiting).await {
                Ok(iterator) => self.iterator = Some(iterator),
                Err(Passing::Later(cause)) => self.back_off(cause),
                Err(Passing::Gone) => {
                    self.connection.judge_gone(&mut self.inbox).await?;
                    self.waiting.answered();
                    self.ended = true;
                }
                Err(Passing::Never(error)) => return Err(error),
            }
            return Ok(false);
        };
        // The answer is booked before it comes, and no more records are requested than the booking has room for.
        self.permit = None;
        let (least, most) = self.answer_size.booking(self.account.part_bytes(), Instant::now());
        let permit = self.account.take_between(least, most).await;
        let limit = self.answer_size.records(permit.bytes(), self.polling.records_per_call_max);
        let called = Instant::now();
        let call = self.connection.client.get_records().shard_iterator(iterator);
        let call = call.limit(i32::try_from(limit).unwrap_or(i32::MAX));
        let date = AnswerDate::default();
        self.waiting.begins(GET_RECORDS);
        let call = call.customize().interceptor(date.clone());
        let (answer, permit, occupied_bytes) = match booking::read(
            &self.account,
            permit,
            call.send(),
        )
        .await
        {
            Read::Ended { answer, permit, bytes, is_too_long } => {
                if is_too_long {
                    self.answer_size.was_too_long(limit);
                }
                (answer, permit, bytes)
            }
            // The iterator stands before the records: they come again once memory for them is booked.
            Read::Outgrown { needed } => {
                self.waiting.answered();
                tracing::debug!(shard = %self.inbox.shard().shard, needed, "waiting for memory to read again");
                self.answer_size.outgrew(needed, limit);
                self.answer_size.forget_quiet();
                self.next_call = called + self.call_interval();
                return Ok(false);
            }
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                self.waiting.failed(call_error(GET_RECORDS, self.inbox.place(), &error));
                return match classify(&error) {
                    ErrorClass::ExpiredIterator => {
                        self.iterator = None;
                        count_retry(self.inbox.shard(), ErrorClass::ExpiredIterator);
                        Ok(false)
                    }
                    cause @ (ErrorClass::Throttled | ErrorClass::Passing) => {
                        self.back_off(cause);
                        Ok(false)
                    }
                    ErrorClass::NotFound | ErrorClass::Lasting => {
                        // The stream may have been replaced; if so, that error says more than this one.
                        self.iterator = None;
                        self.validate_identity(called).await?;
                        Err(call_error(GET_RECORDS, self.inbox.place(), &error))
                    }
                };
            }
        };
        self.waiting.answered();
        self.retries.reset();
        let bytes: usize = answer.records.iter().map(|record| record.data.as_ref().len()).sum();
        let records = answer.records.len();
        let bytes = payload_of(occupied_bytes, records).max(bytes);
        if let Some(iterator) = &answer.next_shard_iterator {
            connection::check_iterator(GET_RECORDS, iterator, &self.inbox)?;
        }
        // The old iterator stays until the records are open: if this future is dropped here, they are read again.
        let arrived = inbox::open(answer.records, self.inbox.hash_range()).await;
        self.iterator = answer.next_shard_iterator;
        self.ended = self.iterator.is_none();
        self.lag_ms = answer.millis_behind_latest.unwrap_or(0).max(0) as u64;
        self.is_flowing = records > 0;
        self.answer_size.learn(records, bytes, self.lag_ms > 0, Instant::now());
        self.permit = Some(permit);
        // The date is in the answer's head, which the server writes after it has read the shard. So it is at most a
        // moment too late, and mostly too early, as it is rounded down. Retention counts in hours.
        let about = ReadAnswer {
            call: GET_RECORDS,
            lag_ms: self.lag_ms,
            as_of_ms: date.ms(),
            is_end: self.ended,
        };
        self.caught_up_ms = about.as_of_ms.filter(|_| self.lag_ms == 0);
        self.connection.take_in(&mut self.inbox, arrived, about).await?;
        self.count_occupied();
        let pause = match self.is_flowing || self.lag_ms > 0 {
            true => self.call_interval(),
            false => self.polling.poll_interval,
        };
        self.next_call = called + pause;
        Ok(true)
    }

    /// Returns the shortest time between two calls while there are records.
    fn call_interval(&self) -> Duration {
        if self.polling.is_paced { CALL_INTERVAL } else { Duration::ZERO }
    }

    async fn validate_identity(&self, asked: Instant) -> Result<(), SourceError> {
        let shard = self.inbox.shard();
        match self.connection.validate_identity(shard, asked, &self.waiting).await {
            Err(Passing::Never(error)) => Err(error),
            Ok(()) | Err(Passing::Later(_) | Passing::Gone) => Ok(()),
        }
    }

    fn back_off(&mut self, cause: ErrorClass) {
        self.answer_size.forget_quiet();
        let shard = self.inbox.shard();
        count_retry(shard, cause);
        let pause = self.retries.next_pause();
        tracing::debug!(shard = %shard.shard, cause = cause.label(), ?pause, "read failed, trying again later");
        self.next_call = Instant::now() + pause;
    }
}

#[async_trait]
impl BatchReader for PollingReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        loop {
            if let Some(lost) = self.inbox.take_lost() {
                return Ok(NextBatch::Lost(lost));
            }
            let batch = self.inbox.cut();
            self.count_occupied();
            if let Some(batch) = batch {
                return Ok(NextBatch::Batch(batch));
            }
            if self.ended {
                let caught_up_ms = self.inbox.caught_up_ms().max(self.inbox.last_arrived_ms());
                return Ok(NextBatch::ShardEnd { caught_up_ms });
            }
            if self.poll().await? && self.inbox.is_empty() && !self.ended {
                let Self { lag_ms, caught_up_ms, .. } = *self;
                return Ok(NextBatch::Idle { lag_ms, caught_up_ms });
            }
        }
    }

    fn give_back(&mut self) {
        if !self.inbox.is_empty() {
            self.inbox.give_back();
            self.count_occupied();
            (self.iterator, self.ended) = (None, false);
        }
    }
}

/// Counts a retry of a call in the metrics.
pub(super) fn count_retry(shard: &ShardKey, cause: ErrorClass) {
    metrics::counter!(metric::SOURCE_RETRIES_TOTAL,
        "shard" => shard.shard.to_string(), "reason" => cause.label())
    .increment(1);
}
