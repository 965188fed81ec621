//! `shardmill stream split|merge|scale`: changes the shards of a stream and waits for the result.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context as _, bail};
use aws_sdk_kinesis::Client;
use serde::Serialize;

use super::super::Console;
use super::super::progress::ConsoleProgress;
use shardmill_core::record::{HashRange, ShardId, StreamRef};
use shardmill_core::source::Shard;
use shardmill_kinesis::stream;

/// Requested change of the shards.
pub(super) enum Reshard {
    /// One shard becomes two. The second begins at hash key `at`, or in the middle.
    Split { shard: ShardId, at: Option<u128> },
    /// Two adjacent shards become one.
    Merge { shard: ShardId, adjacent: ShardId },
    /// The stream gets this number of shards with equal ranges.
    Scale { shards: u32 },
}

#[derive(Serialize)]
struct ReshardReport {
    stream: String,
    status: String,
    open_shards: u32,
    new_shards: Vec<NewShard>,
}

#[derive(Serialize)]
struct NewShard {
    shard: String,
    parents: Vec<String>,
    /// Hash keys are text, because JSON numbers are exact only up to 2^53.
    starting_hash_key: Option<String>,
    ending_hash_key: Option<String>,
}

/// Requests the change, waits until the stream is ACTIVE again, and reports the new shards.
pub(super) async fn reshard(
    client: &Client,
    name: &StreamRef,
    wanted: Reshard,
    wait_max: Duration,
    console: &Console,
) -> anyhow::Result<()> {
    let before = stream::shards(client, name).await?;
    match wanted {
        Reshard::Split { shard, at } => {
            let second_from = split_at(range_of(&before, &shard)?, &shard, at)?;
            stream::split(client, name, &shard, second_from).await?;
        }
        Reshard::Merge { shard, adjacent } => {
            let (one, other) = (range_of(&before, &shard)?, range_of(&before, &adjacent)?);
            if !one.touches(&other) {
                bail!(
                    "shards {shard} ({one}) and {adjacent} ({other}) are not adjacent: expected ranges that \
                     follow each other directly; `shardmill stream describe` shows the shards"
                );
            }
            stream::merge(client, name, &shard, &adjacent).await?;
        }
        Reshard::Scale { shards } => stream::scale(client, name, shards).await?,
    }
    let mut progress =
        ConsoleProgress::start(&format!("waiting for stream {name} to be ACTIVE"), None);
    let mut glance = |waited: Duration, status: &str| progress.at(waited.as_secs(), status);
    let found = stream::wait_active(client, name, wait_max, &mut glance).await?;
    progress.done();
    let known: HashSet<&ShardId> = before.iter().map(|shard| &shard.id).collect();
    let mut after = stream::shards(client, name).await?;
    after.retain(|shard| !known.contains(&shard.id));
    let report = ReshardReport {
        stream: name.to_string(),
        status: found.status,
        open_shards: found.open_shards,
        new_shards: after.into_iter().map(new_shard).collect(),
    };
    console.say(format!(
        "stream {name}: {}, {} open shards, {} of them new",
        report.status,
        report.open_shards,
        report.new_shards.len()
    ));
    for new in &report.new_shards {
        console.say(format!("  {}", new.shard));
    }
    console.report(&report)
}

fn new_shard(shard: Shard) -> NewShard {
    NewShard {
        shard: shard.id.to_string(),
        parents: shard.parents.iter().map(ToString::to_string).collect(),
        starting_hash_key: shard.hash_range.map(|range| range.start().to_string()),
        ending_hash_key: shard.hash_range.map(|range| range.end_inclusive().to_string()),
    }
}

/// Returns the hash range of an open shard.
fn range_of(shards: &[Shard], id: &ShardId) -> anyhow::Result<HashRange> {
    let shard = shards.iter().find(|shard| shard.id == *id).with_context(|| {
        format!("unknown shard {id}: `shardmill stream describe` lists the shards")
    })?;
    if shard.is_closed {
        bail!("shard {id} is closed: `shardmill stream describe` shows the open shards");
    }
    shard
        .hash_range
        .with_context(|| format!("the server returned an invalid hash range of shard {id}"))
}

/// Returns the hash key at which the second child begins: the requested one if both children get a range, or
/// the middle.
fn split_at(range: HashRange, shard: &ShardId, at: Option<u128>) -> anyhow::Result<u128> {
    let Some(middle) = range.middle() else {
        bail!("shard {shard} has only one hash key and cannot be split");
    };
    let at = at.unwrap_or(middle);
    if at <= range.start() || at > range.end_inclusive() {
        bail!("invalid --at {at}: one half of shard {shard} would be empty; its range is {range}");
    }
    Ok(at)
}
