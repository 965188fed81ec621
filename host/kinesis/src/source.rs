//! Kinesis source: opens a reader for each shard, by polling or by enhanced fan-out.

use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_kinesis::Client;
use tokio::sync::OnceCell;

use super::connection::StreamConnection;
use super::fan_out::FanOutReader;
use super::inbox::{Inbox, ReadFrom};
use super::polling::{Polling, PollingReader};
use super::{consumers, stream};
use shardmill_config::{BatchLimits, Endpoint, KinesisConfig, ReaderKind};
use shardmill_core::budget::LongWait;
use shardmill_core::record::{ShardKey, StreamIdentity};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{BatchReader, ResumePoint, Shard, ShardSource, SourceError};

/// Source of a Kinesis stream.
pub struct KinesisSource {
    connection: Arc<StreamConnection>,
    start: StartPosition,
    reader: ReaderKind,
    polling: Polling,
    batch: BatchLimits,
    consumer_arn: OnceCell<Arc<str>>,
}

impl KinesisSource {
    /// Makes the source of the configured stream. All readers together read at most `read_ahead_bytes_max` ahead of
    /// their lanes.
    pub fn new(
        client: Client,
        config: &KinesisConfig,
        batch: BatchLimits,
        read_ahead_bytes_max: usize,
    ) -> Self {
        let polling = Polling {
            records_per_call_max: config.records_per_call_max,
            poll_interval: config.poll_interval,
            is_paced: config.server.endpoint != Endpoint::Embedded,
        };
        let stream = config.stream.value.clone();
        Self {
            connection: StreamConnection::new(
                client,
                stream,
                config.on_lost_records,
                read_ahead_bytes_max,
            ),
            start: config.start.clone(),
            reader: config.reader.clone(),
            polling,
            batch,
            consumer_arn: OnceCell::new(),
        }
    }
}

#[async_trait]
impl ShardSource for KinesisSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        let found = stream::describe(&self.connection.client, &self.connection.stream).await?;
        Ok(found.identity)
    }

    async fn retained_from_ms(&self) -> Result<Option<i64>, SourceError> {
        let found = stream::describe(&self.connection.client, &self.connection.stream).await?;
        let retained_from_ms = found
            .retained_from_ms()
            .ok_or_else(|| SourceError::NoDate { stream: self.connection.stream.to_string() })?;
        Ok(Some(retained_from_ms.max(found.identity.created_ms)))
    }

    async fn now_ms(&self) -> Result<Option<i64>, SourceError> {
        stream::now_ms(&self.connection.client, &self.connection.stream).await.map(Some)
    }

    fn lists_all(&self) -> bool {
        true
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        self.connection.shards().await
    }

    fn start(&self) -> &StartPosition {
        &self.start
    }

    fn long_waits(&self, after: std::time::Duration) -> Vec<LongWait> {
        self.connection.read_ahead.long_waits(after)
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let hash_range = self.connection.listed(&shard.shard).and_then(|shard| shard.hash_range);
        let ResumePoint { after, start, caught_up_ms, waiting } = from;
        let from =
            ReadFrom { after: after.cloned(), start: start.clone(), hash_range, caught_up_ms };
        let inbox = Inbox::new(shard.clone(), self.batch, from);
        let (connection, polling) = (self.connection.clone(), self.polling.clone());
        let polling =
            PollingReader::new(connection.clone(), polling, inbox).shown_by(waiting.clone());
        let ReaderKind::FanOut { consumer } = &self.reader else { return Ok(Box::new(polling)) };
        let register = || consumers::register(&self.connection.client, &shard.stream, consumer);
        waiting.begins("DescribeStreamConsumer");
        let consumer_arn = self.consumer_arn.get_or_try_init(register).await?.clone();
        waiting.answered();
        Ok(Box::new(FanOutReader::new(connection, consumer_arn, polling)))
    }
}
