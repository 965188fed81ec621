//! Kinesis as a source of lanes.

use async_trait::async_trait;
use aws_sdk_kinesis::Client;

use super::reader::{Polling, PollingReader};
use super::{BatchReader, Shard, ShardSource, SourceError, stream};
use crate::config::{BatchLimits, Endpoint, KinesisConfig, StartPosition};
use crate::record::{Position, ShardKey, ShardStart, StreamIdentity, StreamRef};

/// A stream behind a client.
pub struct KinesisSource {
    client: Client,
    stream: StreamRef,
    start: StartPosition,
    polling: Polling,
}

impl KinesisSource {
    /// The stream that a configuration names.
    pub fn new(client: Client, config: &KinesisConfig, batch: BatchLimits) -> Self {
        let polling = Polling {
            records_per_call_max: config.records_per_call_max,
            poll_interval: config.poll_interval,
            is_paced: config.endpoint != Endpoint::Embedded,
            batch,
        };
        Self { client, stream: config.stream.value.clone(), start: config.start.clone(), polling }
    }
}

#[async_trait]
impl ShardSource for KinesisSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        Ok(stream::describe(&self.client, &self.stream).await?.identity)
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        stream::shards(&self.client, &self.stream).await
    }

    fn start(&self) -> &StartPosition {
        &self.start
    }

    async fn open(
        &self,
        shard: &ShardKey,
        after: Option<&Position>,
        start: &ShardStart,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let (client, polling) = (self.client.clone(), self.polling.clone());
        let reader =
            PollingReader::new(client, shard.clone(), polling, after.cloned(), start.clone());
        Ok(Box::new(reader))
    }
}
