//! Kinesis as a source of lanes.

use async_trait::async_trait;
use aws_sdk_kinesis::Client;

use super::reader::{Polling, PollingReader};
use super::{BatchReader, Shard, ShardSource, SourceError, stream};
use crate::config::{Endpoint, SourceConfig};
use crate::record::{Position, ShardKey, StreamIdentity};

/// A stream behind a client.
pub struct KinesisSource {
    client: Client,
    stream: String,
    polling: Polling,
}

impl KinesisSource {
    /// The stream that a configuration names.
    pub fn new(client: Client, config: &SourceConfig) -> Self {
        let polling = Polling {
            records_per_call_max: config.records_per_call_max,
            poll_interval: config.poll_interval,
            is_paced: config.endpoint != Endpoint::Embedded,
            batch: config.batch,
        };
        Self { client, stream: config.stream.value.clone(), polling }
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

    async fn open(
        &self,
        shard: &ShardKey,
        after: Option<&Position>,
        start_at_ms: Option<i64>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let (client, polling) = (self.client.clone(), self.polling.clone());
        let reader =
            PollingReader::new(client, shard.clone(), polling, after.cloned(), start_at_ms);
        Ok(Box::new(reader))
    }
}
