//! Connection of all readers to one stream. It makes their calls, verifies that the stream is still the one that their
//! positions are of, and reports records that the stream has dropped before they were read.
//!
//! Invariants:
//! - A position is used only with the stream that it is of. A stream that was deleted and created again under its name
//!   has another ARN or creation time. So the identity is verified after each new iterator or subscription, before its
//!   first record is used.
//! - Lost records are never silent. They stop the lane, or, with `on_lost_records = "continue"`, are logged, counted
//!   and given to the lane as a recorded hole.
//!
//! Whether a gap in the sequence numbers is a loss: sequence numbers are not consecutive, so a gap alone means nothing.
//!
//! | everything that had arrived until `caught_up_ms` was read, and that time is | records before the first that came |
//! |---|---|
//! | within the stream's retention | none lost: everything that arrived later is still in the stream |
//! | before the retention, or unknown | may be lost: from that time to the start of the retention |
//!
//! Many readers begin at the same time, so they share one look at the stream.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::primitives::DateTime;
use aws_sdk_kinesis::types::{ShardIteratorType, StartingPosition};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::client::{ErrorClass, call_error, classify};
use super::inbox::{Arrived, Inbox, LostRecordsGap, ServerStart};
use super::stream;
use super::stream::Description;
use shardmill_config::OnLostRecords;
use shardmill_core::budget::Budget;
use shardmill_core::metric;
use shardmill_core::record::{Position, ShardId, ShardKey, StreamRef};
use shardmill_core::source::waiting::Waiting;
use shardmill_core::source::{LostRecords, Shard, SourceError, count_loss};

/// Connection to a stream, shared by all of its readers.
pub struct StreamConnection {
    /// Client of the server.
    pub client: Client,
    /// Stream, as the user names it.
    pub stream: StreamRef,
    /// Memory budget of all readers for records that no lane has taken yet.
    pub read_ahead: Budget,
    on_lost_records: OnLostRecords,
    /// Last description of the stream, and the time at which its call began.
    looked: Mutex<Option<(Instant, Description)>>,
    /// Shards of the last list.
    listed: RwLock<HashMap<ShardId, Shard>>,
}

/// Reason why a call gave nothing.
pub enum Passing {
    /// A fault that passes: make the same call later.
    Later(ErrorClass),
    /// The shard does not exist and is not listed any more: all its records were dropped.
    Gone,
    /// An error that a retry does not help.
    Never(SourceError),
}

impl StreamConnection {
    /// Makes a connection. All readers together read at most `read_ahead_bytes_max` ahead of their lanes.
    pub fn new(
        client: Client,
        stream: StreamRef,
        on_lost_records: OnLostRecords,
        read_ahead_bytes_max: usize,
    ) -> Arc<Self> {
        let read_ahead = Budget::new(read_ahead_bytes_max, metric::READ_AHEAD_BYTES);
        let (looked, listed) = (Mutex::default(), RwLock::default());
        Arc::new(Self { client, stream, read_ahead, on_lost_records, looked, listed })
    }

    /// Lists the stream's shards, and keeps the list.
    ///
    /// # Errors
    /// As [`stream::shards`].
    pub async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        let shards = stream::shards(&self.client, &self.stream).await?;
        let listed = shards.iter().map(|shard| (shard.id.clone(), shard.clone())).collect();
        *self.listed.write().unwrap_or_else(PoisonError::into_inner) = listed;
        Ok(shards)
    }

    /// Returns whether the shards were listed, and this one was missing.
    pub fn is_unlisted(&self, shard: &ShardId) -> bool {
        let listed = self.listed.read().unwrap_or_else(PoisonError::into_inner);
        !listed.is_empty() && !listed.contains_key(shard)
    }

    /// Returns a shard of the last list.
    pub fn listed(&self, shard: &ShardId) -> Option<Shard> {
        self.listed.read().unwrap_or_else(PoisonError::into_inner).get(shard).cloned()
    }

    /// Gets an iterator at the inbox's position, and verifies that the stream is the one of that position.
    ///
    /// The identity is verified by a look that began no earlier than the call for the iterator. So a stream that was
    /// created again before that call is noticed.
    pub async fn iterator(&self, inbox: &mut Inbox, waiting: &Waiting) -> Result<String, Passing> {
        let asked = Instant::now();
        waiting.begins("GetShardIterator");
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
        if let Err(error) = &answer {
            waiting.failed(call_error("GetShardIterator", inbox.place(), error));
        }
        self.validate_identity(inbox.shard(), asked, waiting).await?;
        let answer = answer.map_err(|error| match classify(&error) {
            cause @ (ErrorClass::Throttled | ErrorClass::Passing) => Passing::Later(cause),
            ErrorClass::NotFound if self.is_unlisted(&inbox.shard().shard) => Passing::Gone,
            _ => Passing::Never(call_error("GetShardIterator", inbox.place(), &error)),
        })?;
        let iterator = answer.shard_iterator.ok_or_else(|| {
            Passing::Never(SourceError::Call {
                call: "GetShardIterator",
                place: inbox.place(),
                cause: "expected an iterator in the answer, found none".into(),
            })
        })?;
        check_iterator("GetShardIterator", &iterator, inbox).map_err(Passing::Never)?;
        inbox.start_accepted();
        Ok(iterator)
    }

    /// Returns the inbox's position for a subscription. The caller calls [`Inbox::start_accepted`] once it is accepted.
    pub(crate) fn starting_position(&self, inbox: &Inbox) -> Result<StartingPosition, SourceError> {
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

    /// Verifies that the stream is the one that a shard's positions are of, by a look that began no earlier than
    /// `asked`. Readers share a look: the lock is kept during the call, and the next reader finds its result.
    pub(crate) async fn validate_identity(
        &self,
        shard: &ShardKey,
        asked: Instant,
        waiting: &Waiting,
    ) -> Result<(), Passing> {
        let mut looked = self.looked.lock().await;
        if looked.as_ref().is_none_or(|(at, _)| *at < asked) {
            let now = Instant::now();
            waiting.begins("DescribeStreamSummary");
            match stream::describe(&self.client, &self.stream).await {
                Ok(found) => *looked = Some((now, found)),
                Err(SourceError::NoSuchStream { stream }) => {
                    return Err(Passing::Never(SourceError::NoSuchStream { stream }));
                }
                Err(error) => {
                    tracing::debug!(%error, "failed to verify the stream's identity, trying again later");
                    waiting.failed(error);
                    return Err(Passing::Later(ErrorClass::Passing));
                }
            }
        }
        match &*looked {
            Some((_, found)) if found.identity != *shard.stream => {
                Err(Passing::Never(SourceError::replaced(&shard.stream, &found.identity)))
            }
            _ => Ok(()),
        }
    }

    /// Puts the records of an answer into the inbox, and checks whether records are missing before them.
    ///
    /// # Errors
    /// [`SourceError::LostRecords`], unless the configuration says to continue; then the loss is logged and counted.
    /// [`SourceError::Call`] for an invalid sequence number.
    pub(crate) async fn take_in(
        &self,
        inbox: &mut Inbox,
        records: Vec<Arrived>,
        answer: ReadAnswer,
    ) -> Result<(), SourceError> {
        let ReadAnswer { call, lag_ms, as_of_ms, is_end } = answer;
        metrics::gauge!(metric::LAG_MS, "shard" => inbox.shard().shard.to_string())
            .set(lag_ms as f64);
        let is_caught_up = records.is_empty() && lag_ms == 0;
        inbox.accept(records, call)?;
        // The gap stays until it is judged: the caller may drop this future while it waits.
        if let Some(gap) = inbox.gap() {
            self.judge(gap, inbox).await?;
            inbox.forget_gap();
        } else if (is_caught_up || is_end)
            && let Some(gap) = inbox.gap_before_nothing()
        {
            // A subscription may report that it is caught up before it gives its first record. So it never proves a
            // loss by itself: if a loss is possible, the start stays unvalidated until a record comes.
            if call == GET_RECORDS {
                self.judge(gap, inbox).await?;
                inbox.mark_validated();
            } else if self.loss(inbox.caught_up_ms()).await?.is_some() {
                return Ok(());
            } else {
                inbox.mark_validated();
            }
        }
        if is_caught_up && let Some(as_of_ms) = as_of_ms {
            inbox.is_caught_up_at(as_of_ms);
        }
        Ok(())
    }

    /// Reports what is lost with a shard that does not exist any more.
    ///
    /// # Errors
    /// As [`StreamConnection::take_in`].
    pub(crate) async fn judge_gone(&self, inbox: &mut Inbox) -> Result<(), SourceError> {
        let asked = inbox.after().cloned();
        self.judge(LostRecordsGap { asked, came: None }, inbox).await?;
        inbox.mark_validated();
        Ok(())
    }

    /// Returns how much may be lost if what arrived until `caught_up_ms` was read; `None`: nothing.
    ///
    /// While that time is within the retention, everything that came later is still in the stream: only records that
    /// were read are gone.
    async fn loss(&self, caught_up_ms: Option<i64>) -> Result<Option<Loss>, SourceError> {
        let mut looked = self.looked.lock().await;
        let (at, found) = match &*looked {
            Some((at, found)) => (*at, found),
            None => {
                let now = Instant::now();
                let found = stream::describe(&self.client, &self.stream).await?;
                (now, &looked.insert((now, found)).1)
            }
        };
        // The description may be old: retention has advanced since then.
        let since_ms = i64::try_from(at.elapsed().as_millis()).unwrap_or(i64::MAX);
        let retained_from_ms = found.retained_from_ms().map(|ms| ms.saturating_add(since_ms));
        if caught_up_ms.is_some_and(|at_ms| retained_from_ms.is_some_and(|from| at_ms >= from)) {
            return Ok(None);
        }
        let interval_ms = caught_up_ms.zip(retained_from_ms);
        Ok(Some(Loss { retention_hours: found.retention_hours, interval_ms }))
    }

    /// Judges a gap: reports the records that are lost between the requested start and the first record that came.
    async fn judge(&self, gap: LostRecordsGap, inbox: &mut Inbox) -> Result<(), SourceError> {
        let shard = inbox.shard();
        let Some(Loss { retention_hours, interval_ms }) = self.loss(inbox.caught_up_ms()).await?
        else {
            return Ok(());
        };
        let lost_ms = interval_ms.map(|(from_ms, to_ms)| to_ms.abs_diff(from_ms));
        let gone = match (interval_ms, &gap.came) {
            (Some((from_ms, to_ms)), _) => {
                let lost = std::time::Duration::from_secs(to_ms.abs_diff(from_ms) / 1_000);
                let (lost, end) = (humantime::format_duration(lost), time_text(to_ms));
                format!("records that arrived in the {lost} before {end} are gone")
            }
            (None, Some((_, came_ms))) => {
                format!("records that arrived before {} are gone", time_text(*came_ms))
            }
            (None, None) => "records that arrived since then are gone".into(),
        };
        let stands = match &gap.asked {
            Some(asked) => asked.to_string(),
            None => "the shard's beginning".into(),
        };
        let left = match &gap.came {
            Some((came, _)) => format!("the oldest record that is left is {came}"),
            None if self.is_unlisted(&shard.shard) => {
                "the shard is no longer listed, so none of its records is left".into()
            }
            None => "no record is left".into(),
        };
        let extent = format!(
            "the lane's position is {stands}, {left}, and the stream's retention is {retention_hours} h: {gone}"
        );
        let place = format!("stream {}, shard {}", shard.stream.name, shard.shard);
        let error = SourceError::LostRecords { place, extent: extent.clone() };
        count_loss(&shard.shard, lost_ms.unwrap_or_default());
        match self.on_lost_records {
            OnLostRecords::Stop => Err(error),
            OnLostRecords::Continue => {
                tracing::error!(%error, "going on, as configured");
                let to_inclusive = gap.came.map(|(came, _)| came.before());
                inbox.lose(LostRecords {
                    from_exclusive: gap.asked,
                    to_inclusive: to_inclusive
                        .map(|sequence| Position { sequence, sub_sequence: 0 }),
                    why: extent,
                });
                Ok(())
            }
        }
    }
}

/// Answer of the server, without its records.
#[derive(Clone, Copy, Debug)]
pub struct ReadAnswer {
    /// Name of the call.
    pub call: &'static str,
    /// Distance to the newest record, in milliseconds.
    pub lag_ms: u64,
    /// Time of the answer or somewhat earlier, by the server's clock, in milliseconds since 1970. Everything that had
    /// arrived by then was in reach of the answer.
    pub as_of_ms: Option<i64>,
    /// Whether the shard is closed and this was its last answer.
    pub is_end: bool,
}

/// Name of the call that polls.
pub(crate) const GET_RECORDS: &str = "GetRecords";

/// Most bytes of an iterator: far more than any has. Each lane keeps one while it waits, so it counts for the memory
/// that a lane needs.
///
/// Source: API reference, GetRecords: 512.
const ITERATOR_BYTES_MAX: usize = 16 << 10;

/// Refuses an iterator that would fill memory; `call` returned it.
///
/// # Errors
/// [`SourceError::Call`].
pub(crate) fn check_iterator(
    call: &'static str,
    iterator: &str,
    inbox: &Inbox,
) -> Result<(), SourceError> {
    let bytes = iterator.len();
    if bytes <= ITERATOR_BYTES_MAX {
        return Ok(());
    }
    let cause = format!(
        "expected an iterator of at most {ITERATOR_BYTES_MAX} bytes, found one of {bytes}; look at the server at \
         `endpoint` under [source]"
    );
    Err(SourceError::Call { call, place: inbox.place(), cause })
}

/// Possible loss of records.
struct Loss {
    retention_hours: u32,
    /// First and last time at which they arrived, in milliseconds since 1970, where known.
    interval_ms: Option<(i64, i64)>,
}

/// Start of an iterator or a subscription, in the terms of the API.
struct WireStart {
    kind: ShardIteratorType,
    sequence: Option<String>,
    timestamp: Option<DateTime>,
}

impl WireStart {
    fn of(inbox: &Inbox) -> Self {
        let (kind, sequence, timestamp) = match inbox.server_start() {
            ServerStart::AtSequence(sequence) => {
                (ShardIteratorType::AtSequenceNumber, Some(sequence.to_string()), None)
            }
            // Some servers know arrival times by the second only, so the start of the second is requested. The inbox
            // drops what is older than the configured start.
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
