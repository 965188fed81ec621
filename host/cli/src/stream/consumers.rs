//! `shardmill stream consumers`: the enhanced fan-out consumers of a stream.

use aws_sdk_kinesis::Client;
use serde::Serialize;

use super::super::Console;
use super::StreamPlace;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::consumers;
use shardmill_kinesis::consumers::Consumer;
use shardmill_kinesis::stream;

#[derive(clap::Subcommand)]
pub enum Command {
    /// List the registered consumers: status, name, ARN.
    List {
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Register a consumer and wait until it is ACTIVE. An existing consumer stays as it is.
    #[command(after_help = "Example:\n  shardmill stream consumers register shardmill")]
    Register {
        /// Name of the consumer.
        name: String,
        #[command(flatten)]
        place: StreamPlace,
    },
    /// Deregister a consumer and wait until it is gone. Its subscriptions end.
    #[command(after_help = "Example:\n  shardmill stream consumers deregister shardmill")]
    Deregister {
        /// Name of the consumer.
        name: String,
        #[command(flatten)]
        place: StreamPlace,
    },
}

#[derive(Serialize)]
struct Report {
    stream: String,
    consumers: Vec<ConsumerReport>,
}

#[derive(Serialize)]
struct ConsumerReport {
    consumer: String,
    arn: String,
    status: String,
    created_ms: i64,
}

/// Runs the command and reports the result.
pub(super) async fn consumers(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::List { place } => {
            let (target, client) = place.connect().await?;
            list(&client, target.name()?, console).await
        }
        Command::Register { name, place } => {
            let (target, client) = place.connect().await?;
            let identity = stream::describe(&client, target.name()?).await?.identity;
            let arn = consumers::register(&client, &identity, &name).await?;
            console.say(format!("registered consumer {name}"));
            console.say(format!("  {arn}"));
            console.report(&serde_json::json!({ "registered": name, "arn": &*arn }))
        }
        Command::Deregister { name, place } => {
            let (target, client) = place.connect().await?;
            let identity = stream::describe(&client, target.name()?).await?.identity;
            consumers::deregister(&client, &identity, &name).await?;
            console.say(format!("deregistered consumer {name}"));
            console.report(&serde_json::json!({ "deregistered": name }))
        }
    }
}

async fn list(client: &Client, name: &StreamRef, console: &Console) -> anyhow::Result<()> {
    let identity = stream::describe(client, name).await?.identity;
    let found = consumers::list(client, &identity).await?;
    let report =
        Report { stream: name.to_string(), consumers: found.into_iter().map(reported).collect() };
    console.say(format!("stream {name}: {} registered consumers", report.consumers.len()));
    for consumer in &report.consumers {
        console.say(format!("  {} {} {}", consumer.status, consumer.consumer, consumer.arn));
    }
    console.report(&report)
}

fn reported(consumer: Consumer) -> ConsumerReport {
    let Consumer { name, arn, status, created_ms } = consumer;
    ConsumerReport { consumer: name, arn, status, created_ms }
}
