//! Reads one shard by enhanced fan-out: the server pushes events over a subscription, and each registered consumer has
//! 2 MB/s of its own.
//!
//! Invariant: a subscription is kept only while its next event continues at the inbox's last record. In all other cases
//! it is dropped, and the next one starts at the last record that was read. That record comes again and the inbox drops
//! it, so no record is missed and none is delivered twice.
//!
//! | what comes | position of the inbox | then |
//! |---|---|---|
//! | an event with records | moves to its last record | the lane gets batches |
//! | an event without records | stays | `Idle`, with a caught-up time if nothing can be missing |
//! | an event that needs more memory than is free | stays | subscribe again once that memory is booked |
//! | the end of the subscription, or an error | stays | subscribe again, at least 5 s after the last time |
//! | `ResourceInUseException` | stays | try again; until the first event, poll and try every second |
//! | the last event of a closed shard | moves to its last record | GetRecords reads the rest and confirms the end |
//!
//! Races that this handles:
//! - The stream is deleted and created again under its name. Before the first event is used, the identity is checked
//!   by a call that began no earlier than SubscribeToShard.
//! - The lane drops the future of `next_batch` while the records of an event are opened. The subscription is out of
//!   `self` for that time, so it is dropped with them.
//! - The lane gives records back. The subscription is past them, so it is dropped too.
//! - A subscription of an earlier owner of the shard is younger than 5 s. The server refuses ours, and a process that
//!   is killed every few seconds would never read. So this reader polls until its first event.

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

/// Shortest time between two subscriptions to one shard. The server refuses an earlier second one.
///
/// Source: API reference, SubscribeToShard: 5 s.
const SUBSCRIBE_INTERVAL: Duration = Duration::from_secs(5);
/// Pause before the next try of a subscription that the server refused because another one is too young.
///
/// Source: API reference, SubscribeToShard: one call per second, consumer and shard.
const IN_USE_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time for polling between two such tries, however long a try takes.
const IN_USE_PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest time that an event may have travelled, with the events that waited before it. Far more than it takes, so
/// that the caught-up time is never too late.
const EVENT_TRAVEL: Duration = Duration::from_secs(60);
/// Name of the call that subscribes.
const SUBSCRIBE: &str = "SubscribeToShard";

type Subscription = EventReceiver<SubscribeToShardEventStream, SubscribeToShardEventStreamError>;

/// Reader of one shard that subscribes to it.
pub struct FanOutReader {
    connection: Arc<StreamConnection>,
    consumer_arn: Arc<str>,
    /// Has the inbox and the memory account, and reads a closed shard to its end.
    polling: PollingReader,
    subscription: Option<Subscription>,
    /// Bytes of memory that the next event is likely to need. They are booked before the wait for it, because dropping
    /// the subscription for lack of memory costs seconds.
    expected: usize,
    /// Whether the shard is closed. GetRecords reads the rest of it: only its answer says for sure where the end is.
    is_closed: bool,
    next_call: Instant,
    retries: Retries,
    /// Time at which the last subscription was accepted: by the server's clock in milliseconds, and by the monotonic
    /// clock.
    subscribed: Option<(i64, Instant)>,
    /// Time at which the last subscription was requested.
    asked: Instant,
    /// Whether a subscription gave an event since this reader began.
    was_subscribed: bool,
    /// Whether this reader polls because the subscription of an earlier owner is too young to be replaced. A process
    /// that is killed every few seconds would never read if it waited.
    polls_meanwhile: bool,
}

impl FanOutReader {
    /// Makes a reader that continues at the position of `polling`.
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

    /// Subscribes at the last record that was read, which then comes again. Returns without a subscription if the call
    /// is to be tried again.
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
            // Another subscription of this consumer is younger than 5 s: one of an earlier run, or of a lane that lost
            // the shard.
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
                // The polling reader reports which records are lost with the shard.
                ErrorClass::NotFound if self.is_unlisted() => {
                    self.is_closed = true;
                    Ok(())
                }
                _ => Err(call_error(SUBSCRIBE, self.polling.inbox().place(), &error)),
            },
        }
    }

    /// Puts an event's records into the inbox.
    async fn accept(&mut self, event: SubscribeToShardEvent) -> Result<NextEvent, SourceError> {
        self.retries.reset();
        self.was_subscribed = true;
        self.polls_meanwhile = false;
        let lag_ms = event.millis_behind_latest.max(0) as u64;
        let (came, children) = (event.records.len(), event.child_shards.unwrap_or_default().len());
        let has_end = event.continuation_sequence_number.is_empty();
        // Events have no date. This one was sent after the subscription was accepted, and at most `EVENT_TRAVEL` ago.
        let as_of_ms = self.subscribed.and_then(|(date_ms, at)| {
            let since_ms = i64::try_from(at.elapsed().saturating_sub(EVENT_TRAVEL).as_millis());
            Some(date_ms + since_ms.ok()?)
        });
        let hash_range = self.polling.inbox().hash_range();
        // If this future is dropped at the next line, the records are not in the inbox. The subscription is past them
        // and must go with them; the next one brings them again.
        let subscription = self.subscription.take();
        let arrived = inbox::open(event.records, hash_range).await;
        self.subscription = subscription;
        let inbox = self.polling.inbox();
        let about = ReadAnswer { call: SUBSCRIBE, lag_ms, as_of_ms, is_end: false };
        self.connection.take_in(inbox, arrived, about).await?;
        self.polling.count_occupied();
        // Some servers name the child shards in every event of a closed shard, not only in the last one. So the
        // children count only in an event without records.
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

    /// Subscribes, or waits for the next event of the subscription.
    async fn next_event(&mut self) -> Result<NextEvent, SourceError> {
        let Some(subscription) = &mut self.subscription else {
            self.subscribe().await?;
            return Ok(NextEvent::GoOn);
        };
        let permit = self.polling.account().take(self.expected).await;
        self.polling.waiting().begins(SUBSCRIBE);
        // The HTTP client's deadline ends this wait (`silence`): events without records come every few seconds.
        let event = match booking::read(self.polling.account(), permit, subscription.recv()).await {
            Read::Ended { answer, permit, bytes, .. } => {
                self.polling.keep_permit(permit);
                // Events without records come between the others, so the estimate falls slowly.
                self.expected = bytes.max(self.expected - self.expected.div_ceil(4));
                answer
            }
            // The next subscription brings the event again, once memory for it is booked.
            Read::Outgrown { needed } => {
                self.polling.waiting().answered();
                tracing::debug!(shard = %self.polling.inbox().shard().shard, needed,
                    "waiting for memory to subscribe again");
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
            // A subscription ends after five minutes, or at the shard's end.
            Ok(None) => self.polling.waiting().answered(),
            // Some servers accept every subscription, and only then report that there is another one.
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
                    // The SDK may fail to parse a final event without a continuation, so this is not fatal.
                    ErrorClass::Lasting | ErrorClass::NotFound => {
                        let error = call_error(SUBSCRIBE, inbox.place(), &error);
                        tracing::warn!(%error, "the subscription failed, subscribing again");
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

    /// Returns whether the shard was closed when the stream was last listed. Some servers never say so in an event.
    fn is_listed_as_closed(&mut self) -> bool {
        let shard = &self.polling.inbox().shard().shard;
        self.connection.listed(shard).is_some_and(|shard| shard.is_closed)
    }

    /// Notes that the subscription requested at `asked` was refused because there is another one. Before the first
    /// event the reader polls and tries every second; later it waits out the usual 5 s.
    fn is_kept_out(&mut self, asked: Instant) {
        if !self.was_subscribed {
            self.polls_meanwhile = true;
            self.next_call = (asked + IN_USE_INTERVAL).max(Instant::now() + IN_USE_PAUSE_MIN);
        }
    }

    /// Returns whether the shard was missing when the stream was last listed.
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

/// Outcome of one step of a subscription.
enum NextEvent {
    /// Something changed: look at the inbox and the subscription again.
    GoOn,
    /// An event without records.
    Idle {
        /// Distance to the newest record of the shard, in milliseconds.
        lag_ms: u64,
        /// A time up to which everything that had arrived was read, in milliseconds since 1970.
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
            // Its next event would follow the records that were given back, and leave a gap.
            self.subscription = None;
        }
    }
}
