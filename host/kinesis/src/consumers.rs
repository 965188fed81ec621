//! Registered consumers of a stream, which enhanced fan-out pushes records to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::types::ConsumerStatus;

use super::client::{ErrorClass, call_error, classify};
use super::stream::Pages;
use shardmill_core::boxed;
use shardmill_core::masking::sanitized;
use shardmill_core::record::StreamIdentity;
use shardmill_core::source::SourceError;

/// Longest wait until a consumer is ACTIVE, or is gone.
const WAIT_MAX: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A registered consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consumer {
    /// Name, unique in the stream.
    pub name: String,
    /// ARN.
    pub arn: String,
    /// Status, for example `ACTIVE`.
    pub status: String,
    /// Time of its registration, in milliseconds since 1970.
    pub created_ms: i64,
}

/// Lists all consumers of a stream, page by page.
///
/// Source: API reference, ListStreamConsumers: `StreamARN` goes with `NextToken` as well.
///
/// # Errors
/// [`SourceError::Call`].
#[boxed]
pub async fn list(client: &Client, stream: &StreamIdentity) -> Result<Vec<Consumer>, SourceError> {
    let mut consumers = Vec::new();
    let mut next_token: Option<String> = None;
    let mut pages = Pages::of("ListStreamConsumers", stream.name.to_string());
    loop {
        let call = client.list_stream_consumers().stream_arn(&*stream.arn);
        let page = call.set_next_token(next_token.take()).send().await.map_err(|error| {
            call_error("ListStreamConsumers", format!("stream {}", stream.name), &error)
        })?;
        consumers.extend(page.consumers().iter().map(|consumer| Consumer {
            name: consumer.consumer_name().to_owned(),
            arn: consumer.consumer_arn().to_owned(),
            status: consumer.consumer_status().as_str().to_owned(),
            created_ms: consumer.consumer_creation_timestamp().to_millis().unwrap_or_default(),
        }));
        pages.turn(consumers.len())?;
        match page.next_token() {
            Some(token) => next_token = Some(token.to_owned()),
            None => return Ok(consumers),
        }
    }
}

/// Returns the ARN of a stream's consumer. Registers it if it does not exist, and waits until it is ACTIVE.
///
/// # Errors
/// [`SourceError`] when it cannot be registered, or does not become ACTIVE within a minute.
pub async fn register(
    client: &Client,
    stream: &StreamIdentity,
    consumer: &str,
) -> Result<Arc<str>, SourceError> {
    let place = || format!("stream {}, consumer {consumer}", stream.name);
    let call = client.register_stream_consumer().stream_arn(&*stream.arn).consumer_name(consumer);
    match call.send().await {
        Ok(_) => {}
        Err(error)
            if error.as_service_error().is_some_and(|e| e.is_resource_in_use_exception()) => {}
        Err(error) => return Err(call_error("RegisterStreamConsumer", place(), &error)),
    }
    let begun = Instant::now();
    loop {
        let call =
            client.describe_stream_consumer().stream_arn(&*stream.arn).consumer_name(consumer);
        let answer = call.send().await;
        let answer =
            answer.map_err(|error| call_error("DescribeStreamConsumer", place(), &error))?;
        match answer.consumer_description {
            Some(found) if found.consumer_status == ConsumerStatus::Active => {
                return Ok(found.consumer_arn.into());
            }
            found if begun.elapsed() >= WAIT_MAX => {
                let status = found.map(|found| sanitized(found.consumer_status.as_str()));
                let status = status.unwrap_or_else(|| "missing".into());
                let cause = format!(
                    "expected status ACTIVE within {} s, found {status}; check it with `shardmill stream \
                     consumers list`",
                    WAIT_MAX.as_secs()
                );
                return Err(SourceError::Call {
                    call: "DescribeStreamConsumer",
                    place: place(),
                    cause,
                });
            }
            _ => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}

/// Deregisters a consumer and waits until it is gone. Its subscriptions end.
///
/// # Errors
/// [`SourceError::Call`] when it is not registered, or still there after a minute.
#[boxed]
pub async fn deregister(
    client: &Client,
    stream: &StreamIdentity,
    consumer: &str,
) -> Result<(), SourceError> {
    let place = || format!("stream {}, consumer {consumer}", stream.name);
    let failed =
        |call, cause: &str| SourceError::Call { call, place: place(), cause: cause.into() };
    let call = client.deregister_stream_consumer().stream_arn(&*stream.arn).consumer_name(consumer);
    call.send().await.map_err(|error| match classify(&error) {
        ErrorClass::NotFound => failed(
            "DeregisterStreamConsumer",
            "not registered; `shardmill stream consumers list` shows the consumers that are",
        ),
        _ => call_error("DeregisterStreamConsumer", place(), &error),
    })?;
    let begun = Instant::now();
    loop {
        let call =
            client.describe_stream_consumer().stream_arn(&*stream.arn).consumer_name(consumer);
        match call.send().await {
            Err(error) if classify(&error) == ErrorClass::NotFound => return Ok(()),
            Err(error) => return Err(call_error("DescribeStreamConsumer", place(), &error)),
            Ok(_) if begun.elapsed() >= WAIT_MAX => {
                let cause = format!(
                    "expected it to be gone within {} s; check it with `shardmill stream consumers list`",
                    WAIT_MAX.as_secs()
                );
                return Err(failed("DescribeStreamConsumer", &cause));
            }
            Ok(_) => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}
