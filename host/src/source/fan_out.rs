//! Reads one shard by enhanced fan-out: the server pushes, and each consumer has 2 MB/s of its own.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_kinesis::primitives::event_stream::EventReceiver;
use aws_sdk_kinesis::types::error::SubscribeToShardEventStreamError;
use aws_sdk_kinesis::types::{SubscribeToShardEvent, SubscribeToShardEventStream};
use backon::ExponentialBackoff;
use tokio::time::Instant;

use super::client::{Fault, call_error, fault};
use super::connection::{Passing, StreamConnection};
use super::polling::{PollingReader, RETRY_PAUSE_MAX, count_retry, pauses};
use super::{BatchReader, NextBatch, SourceError};

/// A subscription that says nothing for so long is dead; events without records come every few
/// seconds.
///
/// Source: Kinesis Client Library, which waits 35 s.
const SILENCE_MAX: Duration = Duration::from_secs(35);
/// The shortest time between two subscriptions to one shard: before, the server refuses the second.
///
/// Source: API reference, SubscribeToShard: 5 s.
const SUBSCRIBE_INTERVAL: Duration = Duration::from_secs(5);

type Subscription = EventReceiver<SubscribeToShardEventStream, SubscribeToShardEventStreamError>;

/// Subscribes to one shard.
pub struct FanOutReader {
    connection: Arc<StreamConnection>,
    consumer_arn: Arc<str>,
    /// What was read, and the way to the end of a closed shard.
    polling: PollingReader,
    subscription: Option<Subscription>,
    /// The shard is closed: the rest of it is read by GetRecords, whose answer alone says for sure
    /// where the end is.
    is_closed: bool,
    next_call: Instant,
    pauses: ExponentialBackoff,
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
            is_closed: false,
            next_call: Instant::now(),
            pauses: pauses(),
        }
    }

    /// Subscribes behind the last record that was read.
    async fn subscribe(&mut self) -> Result<(), SourceError> {
        tokio::time::sleep_until(self.next_call).await;
        let asked = Instant::now();
        self.next_call = asked + SUBSCRIBE_INTERVAL;
        let position = self.connection.starting_position(self.polling.inbox())?;
        let call = self
            .connection
            .client
            .subscribe_to_shard()
            .consumer_arn(&*self.consumer_arn)
            .shard_id(self.polling.inbox().shard().shard.as_str())
            .starting_position(position);
        let answer = call.send().await;
        match self.connection.prove_identity(self.polling.inbox().shard(), asked).await {
            Ok(()) => {}
            Err(Passing::Later(cause)) => {
                self.back_off(cause);
                return Ok(());
            }
            Err(Passing::Never(error)) => return Err(error),
        }
        match answer {
            Ok(answer) => {
                self.subscription = Some(answer.event_stream);
                Ok(())
            }
            // Another subscription of this consumer is younger than 5 s: ours, of an earlier run,
            // or a lane's that lost the shard.
            Err(error)
                if error.as_service_error().is_some_and(|e| e.is_resource_in_use_exception()) =>
            {
                count_retry(self.polling.inbox().shard(), Fault::Throttled);
                Ok(())
            }
            Err(error) => match fault(&error) {
                cause @ (Fault::Throttled | Fault::Passing) => {
                    self.back_off(cause);
                    Ok(())
                }
                _ => Err(call_error("SubscribeToShard", self.polling.inbox().place(), &error)),
            },
        }
    }

    /// Takes an event in.
    async fn accept(&mut self, event: SubscribeToShardEvent) -> Result<NextEvent, SourceError> {
        self.pauses = pauses();
        let behind_ms = event.millis_behind_latest.max(0) as u64;
        let (came, children) = (event.records.len(), event.child_shards.unwrap_or_default().len());
        let has_end = event.continuation_sequence_number.is_empty();
        let inbox = self.polling.inbox();
        self.connection.take_in(inbox, event.records, "SubscribeToShard", behind_ms).await?;
        // Some servers tell the children with every event of a closed shard, not with the last only:
        // its records are read from here while they come.
        self.is_closed = has_end || (came == 0 && (children > 0 || self.is_listed_as_closed()));
        Ok(match came {
            0 if !self.is_closed => NextEvent::Idle { behind_ms },
            _ => NextEvent::GoOn,
        })
    }

    /// The next event of the subscription, or what became of it.
    async fn next_event(&mut self) -> Result<NextEvent, SourceError> {
        let Some(subscription) = &mut self.subscription else {
            self.subscribe().await?;
            return Ok(NextEvent::GoOn);
        };
        match tokio::time::timeout(SILENCE_MAX, subscription.recv()).await {
            Ok(Ok(Some(SubscribeToShardEventStream::SubscribeToShardEvent(event)))) => {
                return self.accept(event).await;
            }
            // An event of a kind that this SDK does not know carries no records.
            Ok(Ok(Some(_))) => return Ok(NextEvent::GoOn),
            // After five minutes, or at the shard's end.
            Ok(Ok(None)) => {}
            Ok(Err(error)) => {
                let inbox = self.polling.inbox();
                let cause = match fault(&error) {
                    // A final event without a continuation may not parse.
                    Fault::Lasting | Fault::NotFound => {
                        let error = call_error("SubscribeToShard", inbox.place(), &error);
                        tracing::warn!(%error, "the subscription broke");
                        Fault::Passing
                    }
                    cause => cause,
                };
                self.back_off(cause);
            }
            Err(_) => {
                let inbox = self.polling.inbox();
                tracing::warn!(shard = %inbox.shard().shard, "the subscription is silent: again");
                count_retry(inbox.shard(), Fault::Passing);
            }
        }
        self.subscription = None;
        self.is_closed = self.is_listed_as_closed();
        Ok(NextEvent::GoOn)
    }

    /// Whether the shard was closed when the stream was listed last: some servers never say so to a
    /// subscriber.
    fn is_listed_as_closed(&mut self) -> bool {
        let shard = &self.polling.inbox().shard().shard;
        self.connection.listed(shard).is_some_and(|shard| shard.is_closed)
    }

    fn back_off(&mut self, cause: Fault) {
        count_retry(self.polling.inbox().shard(), cause);
        let pause = self.pauses.next().unwrap_or(RETRY_PAUSE_MAX);
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
        behind_ms: u64,
    },
}

#[async_trait]
impl BatchReader for FanOutReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        loop {
            if let Some(batch) = self.polling.inbox().cut() {
                return Ok(NextBatch::Batch(batch));
            }
            if self.is_closed {
                self.subscription = None;
                return self.polling.next_batch().await;
            }
            if let NextEvent::Idle { behind_ms } = self.next_event().await? {
                return Ok(NextBatch::Idle { behind_ms });
            }
        }
    }
}
