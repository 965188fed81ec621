//! What the readers of a stream ask of it, and what they prove about the answers: that it is still
//! the stream whose positions they hold, and that it still holds what was not read yet.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::primitives::DateTime;
use aws_sdk_kinesis::types::{Record, ShardIteratorType, StartingPosition};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::client::{Fault, call_error, fault};
use super::inbox::{Gap, Inbox, ServerStart};
use super::{Shard, SourceError, stream};
use crate::budget::Budget;
use crate::config::OnLostRecords;
use crate::record::{ShardId, ShardKey, StreamIdentity, StreamRef};

/// A stream as its readers see it; shared by all of them.
pub struct StreamConnection {
    /// The client.
    pub client: Client,
    /// What the user calls the stream.
    pub stream: StreamRef,
    /// What all readers may hold that no lane has taken yet.
    pub read_ahead: Budget,
    on_lost_records: OnLostRecords,
    /// The last look at the stream's identity.
    looked: Mutex<Option<(Instant, StreamIdentity)>>,
    /// The shards as they were listed last.
    listed: RwLock<HashMap<ShardId, Shard>>,
}

/// Why a call gave nothing.
pub enum Passing {
    /// The same call later.
    Later(Fault),
    /// Trying again does not mend it.
    Never(SourceError),
}

impl StreamConnection {
    /// A connection; all its readers together read at most `read_ahead_bytes_max` ahead.
    pub fn new(
        client: Client,
        stream: StreamRef,
        on_lost_records: OnLostRecords,
        read_ahead_bytes_max: usize,
    ) -> Arc<Self> {
        let read_ahead = Budget::new(read_ahead_bytes_max, "shardmill_read_ahead_bytes");
        let (looked, listed) = (Mutex::default(), RwLock::default());
        Arc::new(Self { client, stream, read_ahead, on_lost_records, looked, listed })
    }

    /// Lists the stream's shards, and remembers them.
    ///
    /// # Errors
    /// As [`stream::shards`].
    pub async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        let shards = stream::shards(&self.client, &self.stream).await?;
        let listed = shards.iter().map(|shard| (shard.id.clone(), shard.clone())).collect();
        *self.listed.write().unwrap_or_else(PoisonError::into_inner) = listed;
        Ok(shards)
    }

    /// A shard as it was listed last.
    pub fn listed(&self, shard: &ShardId) -> Option<Shard> {
        self.listed.read().unwrap_or_else(PoisonError::into_inner).get(shard).cloned()
    }

    /// An iterator from where the inbox stands, of the stream that its positions are of.
    ///
    /// The identity is proven after the iterator was made: a stream of another creation would show
    /// by then.
    pub async fn iterator(&self, inbox: &mut Inbox) -> Result<String, Passing> {
        let asked = Instant::now();
        let (name, arn) = self.stream.name_or_arn();
        let call = self
            .client
            .get_shard_iterator()
            .set_stream_name(name)
            .set_stream_arn(arn)
            .shard_id(inbox.shard().shard.as_str());
        let start = WireStart::of(inbox);
        let call = call
            .shard_iterator_type(start.kind)
            .set_starting_sequence_number(start.sequence)
            .set_timestamp(start.timestamp);
        let answer = call.send().await;
        self.prove_identity(inbox.shard(), asked).await?;
        let answer = answer.map_err(|error| match fault(&error) {
            cause @ (Fault::Throttled | Fault::Passing) => Passing::Later(cause),
            _ => Passing::Never(call_error("GetShardIterator", inbox.place(), &error)),
        })?;
        answer.shard_iterator.ok_or_else(|| {
            Passing::Never(SourceError::Call {
                call: "GetShardIterator",
                place: inbox.place(),
                cause: "the answer holds no iterator".into(),
            })
        })
    }

    /// The same place for a subscription.
    pub fn starting_position(&self, inbox: &mut Inbox) -> Result<StartingPosition, SourceError> {
        let start = WireStart::of(inbox);
        let position = StartingPosition::builder()
            .r#type(start.kind)
            .set_sequence_number(start.sequence)
            .set_timestamp(start.timestamp);
        position.build().map_err(|error| SourceError::Call {
            call: "SubscribeToShard",
            place: inbox.place(),
            cause: error.to_string(),
        })
    }

    /// Proves that the stream is the one that a shard's positions are of, by a look that began no
    /// earlier than `asked`. Many readers share one look.
    pub async fn prove_identity(&self, shard: &ShardKey, asked: Instant) -> Result<(), Passing> {
        let mut looked = self.looked.lock().await;
        if looked.as_ref().is_none_or(|(at, _)| *at < asked) {
            let now = Instant::now();
            match stream::describe(&self.client, &self.stream).await {
                Ok(found) => *looked = Some((now, found.identity)),
                Err(SourceError::NoSuchStream { stream }) => {
                    return Err(Passing::Never(SourceError::NoSuchStream { stream }));
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot tell yet whether the stream is the same");
                    return Err(Passing::Later(Fault::Passing));
                }
            }
        }
        match &*looked {
            Some((_, found)) if *found != *shard.stream => {
                Err(Passing::Never(SourceError::replaced(&shard.stream, found)))
            }
            _ => Ok(()),
        }
    }

    /// Takes in what `call` brought, and looks whether records are missing before it.
    ///
    /// # Errors
    /// [`SourceError::LostRecords`], unless the configuration says to go on; then the loss is told
    /// and counted. [`SourceError::Call`] for a sequence number that is none.
    pub async fn take_in(
        &self,
        inbox: &mut Inbox,
        records: Vec<Record>,
        call: &'static str,
        behind_ms: u64,
    ) -> Result<(), SourceError> {
        metrics::gauge!("shardmill_lag_ms", "shard" => inbox.shard().shard.to_string())
            .set(behind_ms as f64);
        let is_caught_up = records.is_empty() && behind_ms == 0;
        inbox.accept(records, call)?;
        if let Some(gap) = inbox.take_gap() {
            self.judge(gap, inbox.shard(), inbox.caught_up_ms()).await?;
        }
        if is_caught_up {
            inbox.is_caught_up_at(chrono::Utc::now().timestamp_millis());
        }
        Ok(())
    }

    /// Says whether records are lost between what was asked for and what came first.
    ///
    /// While the time up to which everything was read is within the retention, whatever came later
    /// is still there: only what had been read is gone.
    async fn judge(
        &self,
        gap: Gap,
        shard: &ShardKey,
        caught_up_ms: Option<i64>,
    ) -> Result<(), SourceError> {
        let found = stream::describe(&self.client, &self.stream).await?;
        let (retention_hours, retained_from_ms) = (found.retention_hours, found.retained_from_ms());
        if caught_up_ms.is_some_and(|caught_up_ms| caught_up_ms >= retained_from_ms) {
            return Ok(());
        }
        let lost_ms = caught_up_ms.map(|caught_up_ms| (retained_from_ms - caught_up_ms) as u64);
        let gone = match lost_ms {
            Some(lost_ms) => {
                let lost = std::time::Duration::from_secs(lost_ms / 1_000);
                let (lost, end) = (humantime::format_duration(lost), time_text(retained_from_ms));
                format!("what arrived in the {lost} before {end} is gone")
            }
            None => format!("what arrived before {} is gone", time_text(gap.came_ms)),
        };
        let error = SourceError::LostRecords {
            place: format!("stream {}, shard {}", shard.stream.name, shard.shard),
            extent: format!(
                "the lane stands at {}, the oldest record that is left is {}, and the stream keeps \
                 {retention_hours} h: {gone}",
                gap.asked, gap.came
            ),
        };
        metrics::counter!("shardmill_source_losses_total", "shard" => shard.shard.to_string())
            .increment(1);
        metrics::counter!("shardmill_source_lost_ms_total", "shard" => shard.shard.to_string())
            .increment(lost_ms.unwrap_or_default());
        match self.on_lost_records {
            OnLostRecords::Stop => Err(error),
            OnLostRecords::Continue => {
                tracing::error!(%error, "going on, as configured");
                Ok(())
            }
        }
    }
}

/// Where the server begins, in the terms of its API.
struct WireStart {
    kind: ShardIteratorType,
    sequence: Option<String>,
    timestamp: Option<DateTime>,
}

impl WireStart {
    fn of(inbox: &mut Inbox) -> Self {
        let (kind, sequence, timestamp) = match inbox.server_start() {
            ServerStart::AtSequence(sequence) => {
                (ShardIteratorType::AtSequenceNumber, Some(sequence.to_string()), None)
            }
            // Some servers know arrival times by the second only: its first record is asked for.
            ServerStart::AtMs(at_ms) => {
                let second = DateTime::from_secs(at_ms.div_euclid(1_000));
                (ShardIteratorType::AtTimestamp, None, Some(second))
            }
            ServerStart::Horizon => (ShardIteratorType::TrimHorizon, None, None),
        };
        Self { kind, sequence, timestamp }
    }
}

fn time_text(at_ms: i64) -> String {
    chrono::DateTime::from_timestamp_millis(at_ms).map(|at| at.to_rfc3339()).unwrap_or_default()
}
