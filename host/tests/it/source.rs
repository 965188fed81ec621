//! The source against the embedded stream, with the same SDK code as against AWS.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use aws_sdk_kinesis::Client;
use bytes::Bytes;
use ferrokinesis::store::StoreOptions;
use shardmill_config::{BatchLimits, Endpoint, OnLostRecords, StreamServer};
use shardmill_core::record::{Position, ShardId, ShardKey, ShardStart, StreamRef};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{BatchReader as _, NextBatch, SourceError};
use shardmill_embedded::EmbeddedStream;
use shardmill_engine::shard_lineage::{Beginning, plan_shards};
use shardmill_kinesis::connection::StreamConnection;
use shardmill_kinesis::inbox::{Inbox, ReadFrom};
use shardmill_kinesis::polling::{Polling, PollingReader};
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;
use shardmill_kinesis::{client, served, stream};
use shardmill_state::{KnownShards, ShardState};

const STREAM: &str = "test";

fn stream_ref() -> StreamRef {
    StreamRef::parse(STREAM).expect("a name")
}

/// A server with one stream.
struct Served {
    _server: EmbeddedStream,
    client: Client,
}

async fn served(shards: u32, options: StoreOptions) -> Served {
    let options = StoreOptions {
        create_stream_ms: 1,
        update_stream_ms: 1,
        delete_stream_ms: 1,
        shard_limit: 100,
        ..options
    };
    let server = EmbeddedStream::start_with(0, options).await.expect("served");
    let client = client::connect(&client::Server::at(server.url())).await.expect("connected");
    stream::create(&client, &stream_ref(), shards).await.expect("created");
    active(&client).await;
    Served { _server: server, client }
}

async fn active(client: &Client) -> stream::Description {
    let wait = Duration::from_secs(10);
    stream::wait_active(client, &stream_ref(), wait, &mut |_, _| {}).await.expect("active")
}

fn record(key: u64, payload: String) -> NewRecord {
    NewRecord { partition_key: format!("key-{key}"), payload: Bytes::from(payload) }
}

impl Served {
    async fn put(&self, records: impl Iterator<Item = NewRecord>) -> Producer {
        let mut producer = Producer::new(self.client.clone(), stream_ref());
        for record in records {
            producer.put(record).await.expect("put");
        }
        producer.flush().await.expect("put");
        producer
    }

    pub async fn shards(&self) -> Vec<stream::Shard> {
        stream::shards(&self.client, &stream_ref()).await.expect("listed")
    }

    async fn reader(
        &self,
        shard: &ShardId,
        records_max: usize,
        after: Option<Position>,
        start: ShardStart,
    ) -> PollingReader {
        let identity =
            stream::describe(&self.client, &stream_ref()).await.expect("described").identity;
        let key =
            ShardKey { pipeline: "test".into(), stream: identity.into(), shard: shard.clone() };
        let polling = Polling {
            records_per_call_max: 700,
            poll_interval: Duration::from_millis(10),
            is_paced: false,
        };
        let batch = BatchLimits { records_max, bytes_max: 256 << 10 };
        let inbox =
            Inbox::new(key, batch, ReadFrom { after, start, hash_range: None, caught_up_ms: None });
        let lost = OnLostRecords::Stop;
        let connection = StreamConnection::new(self.client.clone(), stream_ref(), lost, 64 << 20);
        PollingReader::new(connection, polling, inbox)
    }
}

/// Returns everything that a reader reads until nothing is left; asserts that each range begins where the previous
/// one ended.
async fn read_all(reader: &mut PollingReader) -> (Vec<(Position, String)>, bool) {
    let mut records = Vec::new();
    let mut at: Option<Option<Position>> = None;
    loop {
        match reader.next_batch().await.expect("read") {
            NextBatch::Batch(batch) => {
                if let Some(at) = at.replace(Some(batch.range.to_inclusive.clone())) {
                    assert_eq!(batch.range.from_exclusive, at);
                }
                let last = batch.records.last().map(|record| record.position.clone());
                assert_eq!(last, Some(batch.range.to_inclusive));
                records.extend(batch.records.into_iter().map(|record| {
                    (record.position, String::from_utf8_lossy(&record.payload).into_owned())
                }));
            }
            NextBatch::Lost(lost) => panic!("{lost:?}"),
            NextBatch::Idle { .. } => return (records, false),
            NextBatch::ShardEnd { .. } | NextBatch::SourceEnd => return (records, true),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_thousand_records_over_five_shards_are_read_once_each_in_order() {
    let served = served(5, StoreOptions::default()).await;
    served.put((0..20_000).map(|i| record(i % 500, i.to_string()))).await;
    let mut read: Vec<u64> = Vec::new();
    for shard in served.shards().await {
        let (records, ended) =
            read_all(&mut served.reader(&shard.id, 100, None, ShardStart::Horizon).await).await;
        assert!(!ended);
        assert!(records.is_sorted_by(|one, two| one.0 < two.0));
        let mut last_of_key: HashMap<u64, u64> = HashMap::new();
        for (_, payload) in records {
            let number: u64 = payload.parse().expect("a number");
            let before = last_of_key.insert(number % 500, number);
            assert!(before.is_none_or(|before| before < number), "order of key {}", number % 500);
            read.push(number);
        }
    }
    read.sort_unstable();
    assert_eq!(read, (0..20_000).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_goes_on_after_any_position() {
    let served = served(1, StoreOptions::default()).await;
    served.put((0..50).map(|i| record(i, i.to_string()))).await;
    let shard = &served.shards().await[0].id;
    let (all, _) = read_all(&mut served.reader(shard, 7, None, ShardStart::Horizon).await).await;
    for (index, (position, _)) in all.iter().enumerate() {
        let mut reader = served.reader(shard, 7, Some(position.clone()), ShardStart::Horizon).await;
        let (rest, _) = read_all(&mut reader).await;
        assert_eq!(rest, all[index + 1..], "after {position}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_a_timestamp_nothing_older_comes() {
    let served = served(1, StoreOptions::default()).await;
    served.put((0..10).map(|i| record(i, format!("old {i}")))).await;
    // The embedded stream stores arrival times in whole seconds.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let now_ms = chrono::Utc::now().timestamp_millis();
    served.put((0..10).map(|i| record(i, format!("new {i}")))).await;
    let shard = &served.shards().await[0].id;
    let mut reader = served.reader(shard, 100, None, ShardStart::AtMs(now_ms)).await;
    let (records, _) = read_all(&mut reader).await;
    assert_eq!(records.len(), 10, "{records:?}");
    assert!(records.iter().all(|(_, payload)| payload.starts_with("new")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_iterator_is_renewed_after_the_last_record() {
    let options = StoreOptions { iterator_ttl_seconds: 1, ..StoreOptions::default() };
    let served = served(1, options).await;
    served.put((0..10).map(|i| record(i, i.to_string()))).await;
    let shard = &served.shards().await[0].id;
    let mut reader = served.reader(shard, 100, None, ShardStart::Horizon).await;
    assert_eq!(read_all(&mut reader).await.0.len(), 10);
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    served.put((10..20).map(|i| record(i, i.to_string()))).await;
    let mut late = Vec::new();
    while late.len() < 10 {
        late.extend(read_all(&mut reader).await.0);
    }
    let late: Vec<u64> = late.iter().map(|(_, text)| text.parse().expect("a number")).collect();
    assert_eq!(late, (10..20).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn throttled_puts_are_put_again_until_the_stream_has_all() {
    let options = StoreOptions { enforce_limits: true, ..StoreOptions::default() };
    let served = served(1, options).await;
    let producer = served.put((0..1_500).map(|i| record(i % 10, i.to_string()))).await;
    assert_eq!(producer.report().records, 1_500);
    assert!(producer.report().retried > 0, "the shard takes 1,000 records a second");
    let shard = &served.shards().await[0].id;
    let (records, _) =
        read_all(&mut served.reader(shard, 100, None, ShardStart::Horizon).await).await;
    let mut read: Vec<u64> =
        records.iter().map(|(_, text)| text.parse().expect("a number")).collect();
    read.sort_unstable();
    assert_eq!(read, (0..1_500).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_cut_by_bytes_and_a_large_record_travels_alone() {
    let served = served(1, StoreOptions::default()).await;
    let sizes = [100_000, 100_000, 100_000, 1 << 20, 10, 10];
    served.put(sizes.iter().map(|size| record(1, "x".repeat(*size)))).await;
    let shard = &served.shards().await[0].id;
    let mut reader = served.reader(shard, 1_000, None, ShardStart::Horizon).await;
    let mut batches = Vec::new();
    while let NextBatch::Batch(batch) = reader.next_batch().await.expect("read") {
        batches.push(batch.records.iter().map(|record| record.payload.len()).collect::<Vec<_>>());
    }
    assert_eq!(batches, [vec![100_000, 100_000], vec![100_000], vec![1 << 20], vec![10, 10]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_ends_the_parent_and_its_children_begin() {
    let served = served(1, StoreOptions::default()).await;
    served.put((0..10).map(|i| record(i, i.to_string()))).await;
    let parent = served.shards().await[0].id.clone();
    served
        .client
        .split_shard()
        .stream_name(STREAM)
        .shard_to_split(parent.as_str())
        .new_starting_hash_key((1u128 << 127).to_string())
        .send()
        .await
        .expect("split");
    active(&served.client).await;
    served.put((10..100).map(|i| record(i, i.to_string()))).await;
    let (mut records, ended) =
        read_all(&mut served.reader(&parent, 100, None, ShardStart::Horizon).await).await;
    assert!(ended);
    let shards = served.shards().await;
    let begun = HashMap::from([(parent, ShardState { ended: true, ..ShardState::default() })]);
    let known = KnownShards { begun, ..KnownShards::default() };
    let children = plan_shards(&shards, &known, &StartPosition::Latest, None).ready;
    assert_eq!(children.len(), 2);
    for Beginning { shard: child, .. } in children {
        records.extend(
            read_all(&mut served.reader(&child, 100, None, ShardStart::Horizon).await).await.0,
        );
    }
    let mut read: Vec<u64> =
        records.iter().map(|(_, text)| text.parse().expect("a number")).collect();
    read.sort_unstable();
    assert_eq!(read, (0..100).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_described_and_deleted() {
    let served = served(3, StoreOptions::default()).await;
    let description = active(&served.client).await;
    assert_eq!(description.open_shards, 3);
    assert!(description.identity.created_ms > 0);
    stream::delete(&served.client, &stream_ref(), Duration::from_secs(10)).await.expect("deleted");
    let gone = stream::describe(&served.client, &stream_ref()).await;
    assert!(matches!(gone, Err(SourceError::NoSuchStream { .. })), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_served_stream_is_found_and_locked_by_one_process_only() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(served::find(folder.path()).is_none());
    let first = EmbeddedStream::serve(folder.path(), 0).await.expect("served");
    assert_eq!(served::find(folder.path()).as_deref(), Some(first.url()));
    let second = EmbeddedStream::serve(folder.path(), 0).await;
    let said = second.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(said.contains(&std::process::id().to_string()), "{said}");
    drop(first);
    assert!(served::find(folder.path()).is_none());
}

/// After the server has ended, another user may own its port.
#[tokio::test(flavor = "multi_thread")]
async fn wall_15_a_client_goes_on_with_the_next_server_and_speaks_to_no_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = EmbeddedStream::serve(folder.path(), 0).await.expect("served");
    let port = first.url().port().expect("a port");
    let served = served::find(folder.path()).expect("found");
    let address = client::Address::Served(served);
    let own = StreamServer { endpoint: Endpoint::Embedded, region: None, assume_role: None };
    let server = client::Server::of(&own, None, Some(&address));
    let client = client::connect(&server).await.expect("connected");
    client.list_streams().send().await.expect("an answer");
    drop(first);

    let begun = Instant::now();
    let other = loop {
        match std::net::TcpListener::bind(("127.0.0.1", port)) {
            Ok(other) => break other,
            // The port is closed a moment later.
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    other.set_nonblocking(true).expect("set");
    let error = client.list_streams().send().await.expect_err("nobody serves");
    let error = client::call_error("ListStreams", "the test", &error).to_string();
    assert!(error.contains("has ended") && error.contains(&format!("--port {port}")), "{error}");
    // Another stream of the same user, at another port, does not make this port trusted.
    let elsewhere = EmbeddedStream::serve(folder.path(), 0).await.expect("served");
    client.list_streams().send().await.expect_err("it serves elsewhere");
    drop(elsewhere);
    let asked = other.accept();
    assert!(asked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "it got a request");
    drop(other);

    let _second = EmbeddedStream::serve(folder.path(), port).await.expect("served");
    client.list_streams().send().await.expect("an answer");
}
