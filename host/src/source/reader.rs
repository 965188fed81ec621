//! Reads one shard by polling, in order, without a gap and without a record twice.

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::primitives::DateTime;
use aws_sdk_kinesis::types::ShardIteratorType;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;
use tokio::time::Instant;

use super::client::{Fault, call_error, fault};
use super::{BatchReader, NextBatch, SourceError};
use crate::config::BatchLimits;
use crate::record::{Batch, Position, PositionSpan, Record, SequenceNumber, ShardKey, ShardStart};

/// The longest pause after a call that failed.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);
/// The shortest time between two calls of one shard when the last was not empty: AWS allows five a
/// second, and an answer that was not full says that the end is near.
const CALL_INTERVAL: Duration = Duration::from_millis(200);

/// How a shard is polled.
#[derive(Clone, Debug)]
pub struct Polling {
    /// The most records that a call asks for.
    pub records_per_call_max: u32,
    /// The pause after an empty answer.
    pub poll_interval: Duration,
    /// Whether the server limits the calls per second, as AWS does.
    pub is_paced: bool,
    /// How batches are cut.
    pub batch: BatchLimits,
}

/// Polls one shard.
pub struct PollingReader {
    client: Client,
    shard: ShardKey,
    polling: Polling,
    /// The last record that was read; the reader goes on behind it.
    after: Option<Position>,
    /// The last record that a batch held.
    handed_over: Option<Position>,
    /// Where the shard was begun.
    start: ShardStart,
    iterator: Option<String>,
    ended: bool,
    queue: VecDeque<Record>,
    next_call: Instant,
    pauses: ExponentialBackoff,
    behind_ms: u64,
}

impl PollingReader {
    /// A reader behind `after`, or else from a time, or else from the oldest record.
    pub fn new(
        client: Client,
        shard: ShardKey,
        polling: Polling,
        after: Option<Position>,
        start: ShardStart,
    ) -> Self {
        Self {
            client,
            shard,
            polling,
            handed_over: after.clone(),
            after,
            start,
            iterator: None,
            ended: false,
            queue: VecDeque::new(),
            next_call: Instant::now(),
            pauses: pauses(),
            behind_ms: 0,
        }
    }

    /// Asks the server once. `Ok(true)`: records came.
    async fn poll(&mut self) -> Result<bool, SourceError> {
        tokio::time::sleep_until(self.next_call).await;
        let Some(iterator) = self.iterator.clone() else {
            match self.new_iterator().await {
                Ok(iterator) => self.iterator = Some(iterator),
                Err(Passing::Later(cause)) => self.back_off(cause),
                Err(Passing::Never(error)) => return Err(error),
            }
            return Ok(false);
        };
        let limit = i32::try_from(self.polling.records_per_call_max).unwrap_or(i32::MAX);
        let call = self.client.get_records().shard_iterator(iterator).limit(limit);
        let answer = match call.send().await {
            Ok(answer) => answer,
            Err(error) => {
                let place = self.place();
                return match fault(&error) {
                    Fault::ExpiredIterator => {
                        self.iterator = None;
                        count_retry(&self.shard, Fault::ExpiredIterator);
                        Ok(false)
                    }
                    cause @ (Fault::Throttled | Fault::Passing) => {
                        self.back_off(cause);
                        Ok(false)
                    }
                    Fault::NotFound | Fault::Lasting => {
                        Err(call_error("GetRecords", place, &error))
                    }
                };
            }
        };
        self.pauses = pauses();
        self.iterator = answer.next_shard_iterator;
        self.ended = self.iterator.is_none();
        self.behind_ms = answer.millis_behind_latest.unwrap_or(0).max(0) as u64;
        metrics::gauge!("shardmill_lag_ms", "shard" => self.shard.shard.to_string())
            .set(self.behind_ms as f64);
        let came = answer.records.len();
        for record in answer.records {
            self.accept(record)?;
        }
        let full = came >= self.polling.records_per_call_max as usize;
        self.next_call = Instant::now()
            + match came {
                0 => self.polling.poll_interval,
                _ if self.polling.is_paced && !full => CALL_INTERVAL,
                _ => Duration::ZERO,
            };
        Ok(came > 0)
    }

    /// An iterator behind the last record that was read.
    ///
    /// Resuming inside an aggregate needs the record itself again, so it is asked for *at* its
    /// sequence number, and what was read of it is dropped.
    async fn new_iterator(&self) -> Result<String, Passing> {
        let call = self
            .client
            .get_shard_iterator()
            .stream_name(&*self.shard.stream.name)
            .shard_id(self.shard.shard.as_str());
        let call = match (&self.after, &self.start) {
            (Some(after), _) => call
                .shard_iterator_type(ShardIteratorType::AtSequenceNumber)
                .starting_sequence_number(after.sequence.as_str()),
            (None, ShardStart::AtSequence(sequence)) => call
                .shard_iterator_type(ShardIteratorType::AtSequenceNumber)
                .starting_sequence_number(sequence.as_str()),
            (None, ShardStart::AtMs(at_ms)) => call
                .shard_iterator_type(ShardIteratorType::AtTimestamp)
                .timestamp(DateTime::from_secs(at_ms.div_euclid(1_000))),
            (None, ShardStart::Horizon) => call.shard_iterator_type(ShardIteratorType::TrimHorizon),
        };
        let answer = call.send().await.map_err(|error| match fault(&error) {
            cause @ (Fault::Throttled | Fault::Passing) => Passing::Later(cause),
            _ => Passing::Never(call_error("GetShardIterator", self.place(), &error)),
        })?;
        answer.shard_iterator.ok_or_else(|| {
            Passing::Never(SourceError::Call {
                call: "GetShardIterator",
                place: self.place(),
                cause: "the answer holds no iterator".into(),
            })
        })
    }

    /// Takes a record in, unless it was read before or is older than the start.
    fn accept(&mut self, record: aws_sdk_kinesis::types::Record) -> Result<(), SourceError> {
        let sequence = SequenceNumber::parse(&record.sequence_number).map_err(|error| {
            SourceError::Call { call: "GetRecords", place: self.place(), cause: error.to_string() }
        })?;
        let position = Position { sequence, sub_sequence: 0 };
        if self.after.as_ref().is_some_and(|after| position <= *after) {
            return Ok(());
        }
        let arrived = record.approximate_arrival_timestamp;
        let arrived_ms = arrived.and_then(|at| at.to_millis().ok()).unwrap_or(0);
        self.after = Some(position.clone());
        if let ShardStart::AtMs(start_ms) = self.start
            && is_older(arrived_ms, start_ms)
        {
            return Ok(());
        }
        self.queue.push_back(Record {
            position,
            partition_key: Bytes::from(record.partition_key.unwrap_or_default()),
            payload: Bytes::from(record.data.into_inner()),
            arrived_ms: u64::try_from(arrived_ms).unwrap_or(0),
        });
        Ok(())
    }

    /// Cuts the next batch off the queue.
    fn cut(&mut self) -> Option<Batch> {
        let limits = self.polling.batch;
        let (mut count, mut bytes) = (0, 0);
        for record in &self.queue {
            bytes += record.payload.len() + record.partition_key.len();
            if count > 0 && (count >= limits.records_max || bytes > limits.bytes_max) {
                break;
            }
            count += 1;
        }
        let records: Vec<Record> = self.queue.drain(..count).collect();
        let to_inclusive = records.last()?.position.clone();
        let from_exclusive = self.handed_over.replace(to_inclusive.clone());
        let span = PositionSpan { from_exclusive, to_inclusive };
        Some(Batch { shard: self.shard.clone(), records, span })
    }

    fn back_off(&mut self, cause: Fault) {
        count_retry(&self.shard, cause);
        let pause = self.pauses.next().unwrap_or(RETRY_PAUSE_MAX);
        tracing::debug!(shard = %self.shard.shard, cause = cause.label(), ?pause, "reading later");
        self.next_call = Instant::now() + pause;
    }

    fn place(&self) -> String {
        let (stream, shard) = (&self.shard.stream.name, &self.shard.shard);
        match &self.after {
            Some(after) => format!("stream {stream}, shard {shard}, after {after}"),
            None => format!("stream {stream}, shard {shard}"),
        }
    }
}

enum Passing {
    Later(Fault),
    Never(SourceError),
}

#[async_trait]
impl BatchReader for PollingReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        loop {
            if let Some(batch) = self.cut() {
                return Ok(NextBatch::Batch(batch));
            }
            if self.ended {
                return Ok(NextBatch::ShardEnd);
            }
            let asked = self.iterator.is_some();
            if !self.poll().await? && asked && !self.ended {
                return Ok(NextBatch::Idle { behind_ms: self.behind_ms });
            }
        }
    }
}

/// Whether a record arrived before the start. A server that knows arrival times by the second
/// cannot tell within the second of the start: none of its records is dropped then.
fn is_older(arrived_ms: i64, start_at_ms: i64) -> bool {
    let is_whole_second = arrived_ms.rem_euclid(1_000) == 0;
    let start_of_second = start_at_ms - start_at_ms.rem_euclid(1_000);
    arrived_ms < if is_whole_second { start_of_second } else { start_at_ms }
}

fn count_retry(shard: &ShardKey, cause: Fault) {
    metrics::counter!("shardmill_source_retries_total",
        "shard" => shard.shard.to_string(), "reason" => cause.label())
    .increment(1);
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(RETRY_PAUSE_MAX)
        .without_max_times()
        .with_jitter()
        .build()
}

#[cfg(test)]
mod tests {
    use super::is_older;

    #[test]
    fn what_arrived_before_the_start_is_older() {
        assert!(is_older(1_499, 1_500));
        assert!(!is_older(1_500, 1_500));
        assert!(!is_older(1_501, 1_500));
    }

    #[test]
    fn a_server_that_knows_seconds_loses_nothing_in_the_second_of_the_start() {
        assert!(!is_older(1_000, 1_500));
        assert!(is_older(0, 1_500));
    }
}
