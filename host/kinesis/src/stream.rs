//! Calls about a whole stream: create it, wait for it, describe it, list and change its shards, delete it.

use std::time::{Duration, Instant};

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::types::{ScalingType, StreamStatus};

use super::client::{AnswerDate, ErrorClass, call_error, classify};
use shardmill_core::boxed;
use shardmill_core::masking::sanitized;
use shardmill_core::record::{HashRange, ShardId, StreamIdentity, StreamRef};
pub use shardmill_core::source::{Shard, SourceError};

/// Pause between looks at a stream that is being created or deleted.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// Most entries of a list: ten times the default limit of shards of an account, with shards that have ended. A page has
/// a thousand.
const ENTRIES_MAX: usize = 200_000;
const PAGES_MAX: usize = 1_000;

/// Description of a stream.
#[derive(Clone, Debug)]
pub struct Description {
    /// Name, ARN and creation time.
    pub identity: StreamIdentity,
    /// Status, for example `ACTIVE`.
    pub status: String,
    /// Number of shards that take records.
    pub open_shards: u32,
    /// Retention of records, in hours.
    pub retention_hours: u32,
    /// Time of the answer by the server's clock, in milliseconds since 1970, rounded down to the second; `None`: its
    /// answers have no date.
    pub answered_ms: Option<i64>,
}

impl Description {
    /// Returns a time since which the stream surely has all records that arrived, in milliseconds since 1970, by the
    /// server's clock.
    pub(crate) fn retained_from_ms(&self) -> Option<i64> {
        const MS_PER_HOUR: i64 = 3_600_000;
        // The date is rounded down to the second, so the answer may be a second younger.
        let now_at_most_ms = self.answered_ms? + 1_000;
        Some(now_at_most_ms - i64::from(self.retention_hours) * MS_PER_HOUR)
    }
}

/// Creates a stream. One that exists already is not changed.
///
/// # Errors
/// [`SourceError::Call`].
#[boxed]
pub async fn create(client: &Client, stream: &StreamRef, shards: u32) -> Result<(), SourceError> {
    let count = i32::try_from(shards).unwrap_or(i32::MAX);
    let created = client.create_stream().stream_name(&*stream.name).shard_count(count).send().await;
    match created {
        Ok(_) => Ok(()),
        Err(error)
            if error.as_service_error().is_some_and(|e| e.is_resource_in_use_exception()) =>
        {
            Ok(())
        }
        Err(error) => Err(call_error("CreateStream", format!("stream {stream}"), &error)),
    }
}

/// Waits until a stream is ACTIVE. Calls `glance` with the time waited and the status.
///
/// # Errors
/// [`SourceError::NotReady`] after `wait_max`.
#[boxed]
pub async fn wait_active(
    client: &Client,
    stream: &StreamRef,
    wait_max: Duration,
    glance: &mut (dyn FnMut(Duration, &str) + Send),
) -> Result<Description, SourceError> {
    let begun = Instant::now();
    loop {
        let description = describe(client, stream).await?;
        glance(begun.elapsed(), &description.status);
        if description.status == StreamStatus::Active.as_str() {
            return Ok(description);
        }
        if begun.elapsed() >= wait_max {
            return Err(SourceError::NotReady {
                stream: stream.to_string(),
                status: description.status,
                expected: "ACTIVE",
                waited_s: wait_max.as_secs(),
            });
        }
        tokio::time::sleep(STATUS_INTERVAL).await;
    }
}

/// Describes a stream.
///
/// # Errors
/// [`SourceError::NoSuchStream`], [`SourceError::Call`].
#[boxed]
pub async fn describe(client: &Client, stream: &StreamRef) -> Result<Description, SourceError> {
    let (name, arn) = stream.name_or_arn();
    let call = client.describe_stream_summary().set_stream_name(name).set_stream_arn(arn);
    let date = AnswerDate::default();
    let answer = call.customize().interceptor(date.clone()).send().await;
    let answer = answer.map_err(|error| match classify(&error) {
        ErrorClass::NotFound => SourceError::NoSuchStream { stream: stream.to_string() },
        _ => call_error("DescribeStreamSummary", format!("stream {stream}"), &error),
    })?;
    let summary = answer.stream_description_summary().ok_or_else(|| SourceError::Call {
        call: "DescribeStreamSummary",
        place: format!("stream {stream}"),
        cause: "expected a description in the answer, found none".into(),
    })?;
    Ok(Description {
        identity: StreamIdentity {
            name: stream.name.clone(),
            arn: summary.stream_arn().into(),
            created_ms: summary.stream_creation_timestamp().to_millis().unwrap_or_default(),
        },
        status: sanitized(summary.stream_status().as_str()),
        open_shards: u32::try_from(summary.open_shard_count()).unwrap_or_default(),
        retention_hours: u32::try_from(summary.retention_period_hours()).unwrap_or_default(),
        answered_ms: date.ms(),
    })
}

/// Returns the server's time, in milliseconds since 1970, rounded down to the second.
///
/// # Errors
/// As [`describe`], and [`SourceError::NoDate`].
pub async fn now_ms(client: &Client, stream: &StreamRef) -> Result<i64, SourceError> {
    let answered_ms = describe(client, stream).await?.answered_ms;
    answered_ms.ok_or_else(|| SourceError::NoDate { stream: stream.to_string() })
}

/// Counter of the pages of a list. It bounds a list of a server that always has one more page.
pub(super) struct Pages {
    call: &'static str,
    stream: String,
    pages: usize,
}

impl Pages {
    pub(super) fn of(call: &'static str, stream: String) -> Self {
        Self { call, stream, pages: 0 }
    }

    /// Counts a page that was read; `entries` is the length of the list so far.
    ///
    /// # Errors
    /// [`SourceError::Call`] when there are more pages or entries than any list of Kinesis has.
    pub(super) fn turn(&mut self, entries: usize) -> Result<(), SourceError> {
        self.pages += 1;
        if self.pages <= PAGES_MAX && entries <= ENTRIES_MAX {
            return Ok(());
        }
        Err(SourceError::Call {
            call: self.call,
            place: format!("stream {}", self.stream),
            cause: format!(
                "expected a list of at most {ENTRIES_MAX} entries on {PAGES_MAX} pages, found more: check which \
                 server answers at this address"
            ),
        })
    }
}

/// Lists all shards of a stream, page by page.
///
/// Source: API reference, ListShards: `NextToken` goes alone, without the stream's name.
///
/// # Errors
/// [`SourceError::NoSuchStream`], [`SourceError::Call`].
#[boxed]
pub async fn shards(client: &Client, stream: &StreamRef) -> Result<Vec<Shard>, SourceError> {
    let mut shards = Vec::new();
    let mut next_token: Option<String> = None;
    let mut pages = Pages::of("ListShards", stream.to_string());
    loop {
        let call = match next_token.take() {
            None => {
                let (name, arn) = stream.name_or_arn();
                client.list_shards().set_stream_name(name).set_stream_arn(arn)
            }
            Some(token) => client.list_shards().next_token(token),
        };
        let page = call.send().await.map_err(|error| match classify(&error) {
            ErrorClass::NotFound => SourceError::NoSuchStream { stream: stream.to_string() },
            _ => call_error("ListShards", format!("stream {stream}"), &error),
        })?;
        shards.extend(page.shards().iter().map(|shard| {
            Shard {
                id: shard.shard_id().into(),
                parents: [shard.parent_shard_id(), shard.adjacent_parent_shard_id()]
                    .into_iter()
                    .flatten()
                    .map(ShardId::from)
                    .collect(),
                is_closed: shard
                    .sequence_number_range()
                    .is_some_and(|range| range.ending_sequence_number().is_some()),
                hash_range: shard.hash_key_range().and_then(|range| {
                    HashRange::parse(range.starting_hash_key(), range.ending_hash_key())
                }),
            }
        }));
        pages.turn(shards.len())?;
        match page.next_token() {
            Some(token) => next_token = Some(token.to_owned()),
            None => return Ok(shards),
        }
    }
}

/// Requests the split of a shard; the second child begins at `second_from`. [`wait_active`] waits for it.
///
/// # Errors
/// [`SourceError::Call`].
#[boxed]
pub async fn split(
    client: &Client,
    stream: &StreamRef,
    shard: &ShardId,
    second_from: u128,
) -> Result<(), SourceError> {
    let (name, arn) = stream.name_or_arn();
    let call = client.split_shard().set_stream_name(name).set_stream_arn(arn);
    let call = call.shard_to_split(shard.as_str()).new_starting_hash_key(second_from.to_string());
    let place = || format!("stream {stream}, shard {shard}");
    call.send().await.map(drop).map_err(|error| call_error("SplitShard", place(), &error))
}

/// Requests the merge of two adjacent shards. [`wait_active`] waits for it.
///
/// # Errors
/// [`SourceError::Call`].
#[boxed]
pub async fn merge(
    client: &Client,
    stream: &StreamRef,
    shard: &ShardId,
    adjacent: &ShardId,
) -> Result<(), SourceError> {
    let (name, arn) = stream.name_or_arn();
    let call = client.merge_shards().set_stream_name(name).set_stream_arn(arn);
    let call = call.shard_to_merge(shard.as_str()).adjacent_shard_to_merge(adjacent.as_str());
    let place = || format!("stream {stream}, shards {shard} and {adjacent}");
    call.send().await.map(drop).map_err(|error| call_error("MergeShards", place(), &error))
}

/// Requests this number of shards with equal ranges. [`wait_active`] waits for them.
///
/// Source: API reference, UpdateShardCount: at most twice, and at least half, the open shards.
///
/// # Errors
/// [`SourceError::Call`].
#[boxed]
pub async fn scale(client: &Client, stream: &StreamRef, shards: u32) -> Result<(), SourceError> {
    let count = i32::try_from(shards).unwrap_or(i32::MAX);
    let (name, arn) = stream.name_or_arn();
    let call = client.update_shard_count().set_stream_name(name).set_stream_arn(arn);
    let call = call.target_shard_count(count).scaling_type(ScalingType::UniformScaling);
    let place = || format!("stream {stream}, {shards} shards");
    call.send().await.map(drop).map_err(|error| call_error("UpdateShardCount", place(), &error))
}

/// Deletes a stream with its records and its registered consumers, and waits until it is gone.
///
/// # Errors
/// [`SourceError::NoSuchStream`], [`SourceError::Call`], [`SourceError::NotReady`] after
/// `wait_max`.
#[boxed]
pub async fn delete(
    client: &Client,
    stream: &StreamRef,
    wait_max: Duration,
) -> Result<(), SourceError> {
    let (name, arn) = stream.name_or_arn();
    let call = client.delete_stream().set_stream_name(name).set_stream_arn(arn);
    // Without this flag, a stream with registered consumers cannot be deleted.
    let deleted = call.enforce_consumer_deletion(true).send().await;
    deleted.map_err(|error| match classify(&error) {
        ErrorClass::NotFound => SourceError::NoSuchStream { stream: stream.to_string() },
        _ => call_error("DeleteStream", format!("stream {stream}"), &error),
    })?;
    let begun = Instant::now();
    while begun.elapsed() < wait_max {
        match describe(client, stream).await {
            Err(SourceError::NoSuchStream { .. }) => return Ok(()),
            Err(error) => return Err(error),
            Ok(_) => tokio::time::sleep(STATUS_INTERVAL).await,
        }
    }
    let status = describe(client, stream).await.map_or("gone".into(), |found| found.status);
    let waited_s = wait_max.as_secs();
    Err(SourceError::NotReady { stream: stream.to_string(), status, expected: "gone", waited_s })
}
