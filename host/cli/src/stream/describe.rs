//! Description of a stream, for people and as JSON.

use aws_sdk_kinesis::Client;
use serde::Serialize;

use super::super::Console;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::stream;

#[derive(Serialize)]
struct StreamReport {
    stream: String,
    arn: String,
    status: String,
    created_ms: i64,
    retention_hours: u32,
    shards: Vec<ShardReport>,
}

#[derive(Serialize)]
struct ShardReport {
    shard: String,
    closed: bool,
    parents: Vec<String>,
}

/// Reports a stream and its shards.
pub(super) async fn report(
    client: &Client,
    name: &StreamRef,
    found: stream::Description,
    console: &Console,
) -> anyhow::Result<()> {
    let shards = stream::shards(client, name).await?;
    let report = StreamReport {
        stream: found.identity.name.to_string(),
        arn: found.identity.arn.to_string(),
        status: found.status,
        created_ms: found.identity.created_ms,
        retention_hours: found.retention_hours,
        shards: shards
            .into_iter()
            .map(|shard| ShardReport {
                shard: shard.id.to_string(),
                closed: shard.is_closed,
                parents: shard.parents.iter().map(ToString::to_string).collect(),
            })
            .collect(),
    };
    console.say(format!(
        "stream {}: {}, {} shards, records kept for {} h",
        report.stream,
        report.status,
        report.shards.len(),
        report.retention_hours
    ));
    console.say(format!("  {}", report.arn));
    for shard in &report.shards {
        let closed = if shard.closed { ", closed" } else { "" };
        let parents = match shard.parents.is_empty() {
            true => String::new(),
            false => format!(", child of {}", shard.parents.join(" and ")),
        };
        console.say(format!("  {}{closed}{parents}", shard.shard));
    }
    console.report(&report)
}
