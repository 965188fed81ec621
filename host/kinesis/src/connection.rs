//! What the readers of a stream ask of it, and what they prove about the answers: that it is still
//! the stream whose positions they hold, and that it still holds what was not read yet.

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

/// A stream as its readers see it; shared by all of them.
pub struct StreamConnection {
    /// The client.
    pub client: Client,
    /// What the user calls the stream.
    pub stream: StreamRef,
    /// What all readers may hold that no lane has taken yet.
    pub read_ahead: Budget,
    on_lost_records: OnLostRecords,
    /// The last look at the stream.
    looked: Mutex<Option<(Instant, Description)>>,
    /// The shards as they were listed last.
    listed: RwLock<HashMap<ShardId, Shard>>,
}

/// Why a call gave nothing.
pub enum Passing {
    /// The same call later.
    Later(ErrorClass),
    /// The shard is no longer there, nor listed: all its records were dropped.
    Gone,
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
        let read_ahead = Budget::new(read_ahead_bytes_max, metric::READ_AHEAD_BYTES);
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

    /// Whether the shards were listed, and this one was not among them.
    pub fn is_unlisted(&self, shard: &ShardId) -> bool {
        let listed = self.listed.read().unwrap_or_else(PoisonError::into_inner);
        !listed.is_empty() && !listed.contains_key(shard)
    }

    /// A shard as it was listed last.
    pub fn listed(&self, shard: &ShardId) -> Option<Shard> {
        self.listed.read().unwrap_or_else(PoisonError::into_inner).get(shard).cloned()
    }

    /// An iterator from where the inbox stands, of the stream that its positions are of.
    ///
    /// The identity is proven after the iterator was made: a stream of another creation would show
    /// by then.
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
                cause: "the answer holds no iterator".into(),
            })
        })?;
        check_iterator("GetShardIterator", &iterator, inbox).map_err(Passing::Never)?;
        inbox.start_accepted();
        Ok(iterator)
    }

    /// The same position for a subscription. The caller calls [`Inbox::start_accepted`] once it is accepted.
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

    /// Proves that the stream is the one that a shard's positions are of, by a look that began no
    /// earlier than `asked`. Many readers share one look.
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
                    tracing::debug!(%error, "cannot tell yet whether the stream is the same");
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

    /// Takes in what a call brought, and looks whether records are missing before it.
    ///
    /// # Errors
    /// [`SourceError::LostRecords`], unless the configuration says to go on; then the loss is logged
    /// and counted. [`SourceError::Call`] for a sequence number that cannot be read.
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
        // It stays until it is judged: who waits for this may give up in between.
        if let Some(gap) = inbox.gap() {
            self.judge(gap, inbox).await?;
            inbox.forget_gap();
        } else if (is_caught_up || is_end)
            && let Some(gap) = inbox.gap_before_nothing()
        {
            // A subscription may say so before it gives the first record.
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

    /// Says what is lost with a shard that is no longer there.
    ///
    /// # Errors
    /// As [`StreamConnection::take_in`].
    pub(crate) async fn judge_gone(&self, inbox: &mut Inbox) -> Result<(), SourceError> {
        let asked = inbox.after().cloned();
        self.judge(LostRecordsGap { asked, came: None }, inbox).await?;
        inbox.mark_validated();
        Ok(())
    }

    /// How much may be lost if what arrived up to `caught_up_ms` was read; `None`: nothing.
    ///
    /// While that time is within the retention, whatever came later is still there: only what had
    /// been read is gone.
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
        // The look may be of a while ago.
        let since_ms = i64::try_from(at.elapsed().as_millis()).unwrap_or(i64::MAX);
        let retained_from_ms = found.retained_from_ms().map(|ms| ms.saturating_add(since_ms));
        if caught_up_ms.is_some_and(|at_ms| retained_from_ms.is_some_and(|from| at_ms >= from)) {
            return Ok(None);
        }
        let interval_ms = caught_up_ms.zip(retained_from_ms);
        Ok(Some(Loss { retention_hours: found.retention_hours, interval_ms }))
    }

    /// Says whether records are lost between what was asked for and what came first.
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
                format!("what arrived in the {lost} before {end} is gone")
            }
            (None, Some((_, came_ms))) => {
                format!("what arrived before {} is gone", time_text(*came_ms))
            }
            (None, None) => "what arrived since then is gone".into(),
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
            "the lane stands at {stands}, {left}, and the stream keeps {retention_hours} h: {gone}"
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

/// An answer of the server, without its records.
#[derive(Clone, Copy, Debug)]
pub struct ReadAnswer {
    /// The call.
    pub call: &'static str,
    /// How far the newest record is, in milliseconds.
    pub lag_ms: u64,
    /// A time before which the server surely gave this answer, in milliseconds since 1970 by its
    /// own clock.
    pub as_of_ms: Option<i64>,
    /// The shard is closed, and this was the last of it.
    pub is_end: bool,
}

/// The call that polls.
pub(crate) const GET_RECORDS: &str = "GetRecords";

/// Bytes of an iterator: far more than any has. Each lane keeps one while it waits, so they count for the memory
/// that a lane needs.
///
/// Source: API reference, GetRecords: 512.
const ITERATOR_BYTES_MAX: usize = 16 << 10;

/// Refuses an iterator that would fill memory; `call` gave it.
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

/// Records that may be lost.
struct Loss {
    retention_hours: u32,
    /// When they arrived, in milliseconds since 1970, as far as that is known.
    interval_ms: Option<(i64, i64)>,
}

/// Where the server begins, in the terms of its API.
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
