//! Reads one shard by enhanced fan-out: the server pushes, and each consumer has 2 MB/s of its own.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_kinesis::primitives::event_stream::EventReceiver;
use aws_sdk_kinesis::types::error::SubscribeToShardEventStreamError;
use aws_sdk_kinesis::types::{SubscribeToShardEvent, SubscribeToShardEventStream};
use tokio::time::Instant;

use super::booking::{self, Read};
use super::client::{AnswerDate, ErrorClass, call_error, classify};
use super::connection::{Passing, ReadAnswer, StreamConnection};
use super::inbox;
use super::polling::{PollingReader, RETRY, count_retry};
use shardmill_core::retry::Retries;
use shardmill_core::source::{BatchReader, NextBatch, SourceError};

/// The shortest time between two subscriptions to one shard: before, the server refuses the second.
///
/// Source: API reference, SubscribeToShard: 5 s.
const SUBSCRIBE_INTERVAL: Duration = Duration::from_secs(5);
/// The pause before a subscription that another one kept out is tried again.
///
/// Source: API reference, SubscribeToShard: one call per second, consumer and shard.
const IN_USE_INTERVAL: Duration = Duration::from_secs(1);
/// Time to poll between two of them, however long they take.
const IN_USE_PAUSE_MIN: Duration = Duration::from_millis(500);
/// How long an event may have travelled, with what waited before it: far more than it does.
const EVENT_TRAVEL: Duration = Duration::from_secs(60);
/// The call that subscribes.
const SUBSCRIBE: &str = "SubscribeToShard";

type Subscription = EventReceiver<SubscribeToShardEventStream, SubscribeToShardEventStreamError>;

/// Subscribes to one shard.
pub struct FanOutReader {
    connection: Arc<StreamConnection>,
    consumer_arn: Arc<str>,
    /// What was read, and the way to the end of a closed shard.
    polling: PollingReader,
    subscription: Option<Subscription>,
    /// The bytes of memory that an event is likely to need. They are booked before it is waited for: to end the
    /// subscription because there is no room costs seconds.
    expected: usize,
    /// The shard is closed: the rest of it is read by GetRecords, whose answer alone says for sure
    /// where the end is.
    is_closed: bool,
    next_call: Instant,
    retries: Retries,
    /// When the last subscription was accepted, by the server's clock and by one that only goes on.
    subscribed: Option<(i64, Instant)>,
    /// When the last subscription was asked for.
    asked: Instant,
    /// A subscription gave something since this reader began.
    was_subscribed: bool,
    /// The subscription of an earlier owner is too young to be taken over. A process that is killed
    /// every few seconds would never read if it waited: until then it polls.
    polls_meanwhile: bool,
}

impl FanOutReader {
    /// A reader that goes on where `polling` stands.
    pub fn new(
        connection: Arc<StreamConnection>,
        consumer_arn: Arc<str>,
        polling: PollingReader,
    ) -> Self {
        Self {
            connection,
            consumer_arn,
            polling,
            subscription: None,
            expected: 0,
            is_closed: false,
            next_call: Instant::now(),
            retries: RETRY.start(),
            subscribed: None,
            asked: Instant::now(),
            was_subscribed: false,
            polls_meanwhile: false,
        }
    }

    /// Subscribes behind the last record that was read.
    async fn subscribe(&mut self) -> Result<(), SourceError> {
        tokio::time::sleep_until(self.next_call).await;
        let asked = Instant::now();
        self.asked = asked;
        self.next_call = asked + SUBSCRIBE_INTERVAL;
        let position = self.connection.starting_position(self.polling.inbox())?;
        let call = self
            .connection
            .client
            .subscribe_to_shard()
            .consumer_arn(&*self.consumer_arn)
            .shard_id(self.polling.inbox().shard().shard.as_str())
            .starting_position(position);
        let waiting = self.polling.waiting().clone();
        waiting.begins(SUBSCRIBE);
        let date = AnswerDate::default();
        let answer = call.customize().interceptor(date.clone()).send().await;
        if let Err(error) = &answer {
            waiting.failed(call_error(SUBSCRIBE, self.polling.inbox().place(), error));
        }
        match self.connection.validate_identity(self.polling.inbox().shard(), asked, &waiting).await
        {
            Ok(()) => {}
            Err(Passing::Later(cause)) => {
                self.back_off(cause);
                return Ok(());
            }
            Err(Passing::Gone) => {}
            Err(Passing::Never(error)) => return Err(error),
        }
        match answer {
            Ok(answer) => {
                self.subscription = Some(answer.event_stream);
                self.subscribed = date.ms().map(|date_ms| (date_ms, Instant::now()));
                self.polling.rest();
                self.polling.inbox().start_accepted();
                waiting.answered();
                Ok(())
            }
            // Another subscription of this consumer is younger than 5 s: ours, of an earlier run,
            // or a lane's that lost the shard.
            Err(error)
                if error.as_service_error().is_some_and(|e| e.is_resource_in_use_exception()) =>
            {
                count_retry(self.polling.inbox().shard(), ErrorClass::Throttled);
                self.is_kept_out(asked);
                Ok(())
            }
            Err(error) => match classify(&error) {
                cause @ (ErrorClass::Throttled | ErrorClass::Passing) => {
                    self.back_off(cause);
                    Ok(())
                }
                // What is lost with it is said by the other way.
                ErrorClass::NotFound if self.is_unlisted() => {
                    self.is_closed = true;
                    Ok(())
                }
                _ => Err(call_error(SUBSCRIBE, self.polling.inbox().place(), &error)),
            },
        }
    }

    /// Takes an event in.
    async fn accept(&mut self, event: SubscribeToShardEvent) -> Result<NextEvent, SourceError> {
        self.retries.reset();
        self.was_subscribed = true;
        self.polls_meanwhile = false;
        let lag_ms = event.millis_behind_latest.max(0) as u64;
        let (came, children) = (event.records.len(), event.child_shards.unwrap_or_default().len());
        let has_end = event.continuation_sequence_number.is_empty();
        // Events have no date. This one was sent after the subscription began, and has come by now.
        let as_of_ms = self.subscribed.and_then(|(date_ms, at)| {
            let since_ms = i64::try_from(at.elapsed().saturating_sub(EVENT_TRAVEL).as_millis());
            Some(date_ms + since_ms.ok()?)
        });
        let hash_range = self.polling.inbox().hash_range();
        // Who drops this while it waits has not read the records: the next subscription brings them again.
        let subscription = self.subscription.take();
        let arrived = inbox::open(event.records, hash_range).await;
        self.subscription = subscription;
        let inbox = self.polling.inbox();
        let about = ReadAnswer { call: SUBSCRIBE, lag_ms, as_of_ms, is_end: false };
        self.connection.take_in(inbox, arrived, about).await?;
        self.polling.count_occupied();
        // Some servers tell the children with every event of a closed shard, not with the last only:
        // its records are read from here while they come.
        self.is_closed = has_end || (came == 0 && (children > 0 || self.is_listed_as_closed()));
        Ok(match came {
            0 if !self.is_closed => {
                let caught_up_ms = as_of_ms
                    .filter(|_| lag_ms == 0 && self.polling.inbox().gap_before_nothing().is_none());
                NextEvent::Idle { lag_ms, caught_up_ms }
            }
            _ => NextEvent::GoOn,
        })
    }

    /// The next event of the subscription, or what became of it.
    async fn next_event(&mut self) -> Result<NextEvent, SourceError> {
        let Some(subscription) = &mut self.subscription else {
            self.subscribe().await?;
            return Ok(NextEvent::GoOn);
        };
        let permit = self.polling.account().take(self.expected).await;
        self.polling.waiting().begins(SUBSCRIBE);
        // The connection's own deadline ends the silence: events without records come every few
        // seconds.
        let event = match booking::read(self.polling.account(), permit, subscription.recv()).await {
            Read::Ended { answer, permit, bytes, .. } => {
                self.polling.keep_permit(permit);
                // Events without records come between the others: what was larger is forgotten slowly.
                self.expected = bytes.max(self.expected - self.expected.div_ceil(4));
                answer
            }
            // The next subscription brings it again, and is read once there is room for it.
            Read::Outgrown { needed } => {
                self.polling.waiting().answered();
                tracing::debug!(shard = %self.polling.inbox().shard().shard, needed,
                    "subscribing once there is memory");
                self.expected = needed;
                self.subscription = None;
                return Ok(NextEvent::GoOn);
            }
        };
        match event {
            Ok(Some(SubscribeToShardEventStream::SubscribeToShardEvent(event))) => {
                self.polling.waiting().answered();
                return self.accept(event).await;
            }
            // An event of a kind that this SDK does not know carries no records.
            Ok(Some(_)) => {
                self.polling.waiting().answered();
                return Ok(NextEvent::GoOn);
            }
            // After five minutes, or at the shard's end.
            Ok(None) => self.polling.waiting().answered(),
            // Some servers accept every subscription, and say then that there is another one.
            Err(error)
                if error.as_service_error().is_some_and(|e| e.is_resource_in_use_exception()) =>
            {
                count_retry(self.polling.inbox().shard(), ErrorClass::Throttled);
                self.is_kept_out(self.asked);
            }
            Err(error) => {
                let place = self.polling.inbox().place();
                self.polling.waiting().failed(call_error(SUBSCRIBE, place, &error));
                let inbox = self.polling.inbox();
                let cause = match classify(&error) {
                    // A final event without a continuation may not parse.
                    ErrorClass::Lasting | ErrorClass::NotFound => {
                        let error = call_error(SUBSCRIBE, inbox.place(), &error);
                        tracing::warn!(%error, "the subscription broke");
                        ErrorClass::Passing
                    }
                    cause => cause,
                };
                self.back_off(cause);
            }
        }
        self.subscription = None;
        self.is_closed = self.is_listed_as_closed() || self.is_unlisted();
        Ok(NextEvent::GoOn)
    }

    /// Whether the shard was closed when the stream was listed last: some servers never say so to a
    /// subscriber.
    fn is_listed_as_closed(&mut self) -> bool {
        let shard = &self.polling.inbox().shard().shard;
        self.connection.listed(shard).is_some_and(|shard| shard.is_closed)
    }

    /// The subscription that was asked for at that time was refused: there is another one.
    fn is_kept_out(&mut self, asked: Instant) {
        if !self.was_subscribed {
            self.polls_meanwhile = true;
            self.next_call = (asked + IN_USE_INTERVAL).max(Instant::now() + IN_USE_PAUSE_MIN);
        }
    }

    /// Whether the shard was not among those that were listed last.
    fn is_unlisted(&mut self) -> bool {
        let shard = &self.polling.inbox().shard().shard;
        self.connection.is_unlisted(shard)
    }

    fn back_off(&mut self, cause: ErrorClass) {
        count_retry(self.polling.inbox().shard(), cause);
        let pause = self.retries.next_pause();
        self.next_call = self.next_call.max(Instant::now() + pause);
    }
}

/// What an event meant.
enum NextEvent {
    /// Look again.
    GoOn,
    /// It brought nothing.
    Idle {
        /// How far the shard's end is, in milliseconds.
        lag_ms: u64,
        /// Everything that had arrived by then was read, in milliseconds since 1970.
        caught_up_ms: Option<i64>,
    },
}

#[async_trait]
impl BatchReader for FanOutReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        loop {
            if let Some(lost) = self.polling.inbox().take_lost() {
                return Ok(NextBatch::Lost(lost));
            }
            let batch = self.polling.inbox().cut();
            self.polling.count_occupied();
            if let Some(batch) = batch {
                return Ok(NextBatch::Batch(batch));
            }
            if self.is_closed {
                self.subscription = None;
                return self.polling.next_batch().await;
            }
            if self.polls_meanwhile && self.subscription.is_none() {
                tokio::select! {
                    next = self.polling.next_batch() => return next,
                    () = tokio::time::sleep_until(self.next_call) => {}
                }
            }
            if let NextEvent::Idle { lag_ms, caught_up_ms } = self.next_event().await? {
                return Ok(NextBatch::Idle { lag_ms, caught_up_ms });
            }
        }
    }

    fn give_back(&mut self) {
        if !self.polling.inbox().is_empty() {
            self.polling.give_back();
            // What comes next would leave a gap.
            self.subscription = None;
        }
    }
}
