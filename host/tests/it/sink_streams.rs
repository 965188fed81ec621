//! The sinks that keep no position, for a Kinesis stream and for an HTTP endpoint: through the contract of all sinks,
//! and through the real binary.

#[allow(dead_code, reason = "the SQL sinks' tests use the rest")]
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::sql_sinks::{Log, commit, expect_unavailable, position, route, shard};
use crate::support::pipeline::PipelineToml;
use crate::support::{run_ok, serve_stream};
use aws_sdk_kinesis::types::ShardIteratorType;
use ferrokinesis::store::StoreOptions;
use shardmill_config::{Endpoint, HttpHostConfig, HttpMethod, Secret, StreamServer, Values};
use shardmill_core::record::{Row, StreamRef};
use shardmill_core::sink::{Commit, Sink, SinkWriter};
use shardmill_embedded::EmbeddedStream;
use shardmill_kinesis::client;
use shardmill_kinesis::sink::KinesisSink;
use shardmill_kinesis::sink::StreamTarget;
use shardmill_sink_http::{HttpBody, HttpSink, HttpTarget};

async fn writer(sink: &impl Sink) -> Box<dyn SinkWriter> {
    sink.prepare(&[route(&[])]).await.expect("prepared");
    let acquired = sink.acquire(&shard("shardId-000000000000")).await.expect("acquired");
    assert!(acquired.position.is_none() && !acquired.keeps_position);
    acquired.writer
}

/// Returns the commit with other partition keys.
fn with_keys(mut commit: Commit, key: impl Fn(usize) -> String) -> Commit {
    let keyed = |(index, row): (usize, &Row)| Row { key: key(index).into(), ..row.clone() };
    commit.rows = Arc::new(commit.rows.iter().enumerate().map(keyed).collect());
    commit
}

/// Serves a stream `out` in this process.
async fn stream(shards: i32, options: StoreOptions) -> (EmbeddedStream, aws_sdk_kinesis::Client) {
    let options = StoreOptions { create_stream_ms: 1, ..options };
    let server = EmbeddedStream::start_with(0, options).await.expect("served");
    let client = client::connect(&client::Server::at(server.url())).await.expect("connected");
    let create = client.create_stream().stream_name("out").shard_count(shards);
    create.send().await.expect("created");
    let name = StreamRef::parse("out").expect("a name");
    shardmill_kinesis::stream::wait_active(&client, &name, Duration::from_secs(10), &mut |_, _| {})
        .await
        .expect("active");
    (server, client)
}

fn server(endpoint: Endpoint) -> StreamServer {
    StreamServer { endpoint, region: None, assume_role: None }
}

fn target(url: &url::Url, strict_order: bool) -> StreamTarget {
    StreamTarget {
        stream: StreamRef::parse("out").expect("a name"),
        server: server(Endpoint::Url(url.clone())),
        strict_order,
    }
}

/// Returns the records of the stream, by key, in order.
async fn stored(client: &aws_sdk_kinesis::Client) -> BTreeMap<String, Vec<String>> {
    let mut stored: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let shards = client.list_shards().stream_name("out").send().await.expect("shards");
    for shard in shards.shards() {
        let iterator = client.get_shard_iterator().stream_name("out").shard_id(shard.shard_id());
        let iterator = iterator.shard_iterator_type(ShardIteratorType::TrimHorizon);
        let mut iterator = iterator.send().await.expect("an iterator").shard_iterator;
        while let Some(at) = iterator.take() {
            let page = client.get_records().shard_iterator(at).send().await.expect("records");
            if page.records.is_empty() {
                break;
            }
            for record in page.records {
                let text = String::from_utf8_lossy(record.data().as_ref()).into_owned();
                stored.entry(record.partition_key.expect("a key")).or_default().push(text);
            }
            iterator = page.next_shard_iterator;
        }
    }
    stored
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_put_in_order_though_the_stream_throttles() {
    // Each shard accepts 1,000 records per second, so some records of every request are refused.
    let options = StoreOptions { enforce_limits: true, ..StoreOptions::default() };
    let (server, client) = stream(2, options).await;
    for strict_order in [true, false] {
        let sink = KinesisSink::new("out".into(), target(server.url(), strict_order), "".into());
        let mut writer = writer(&sink).await;
        let begin = if strict_order { 0 } else { 100_000 };
        let payloads: Vec<String> = (begin..begin + 3_000).map(|id| id.to_string()).collect();
        let commit = with_keys(commit(begin, &payloads), |index| format!("key {}", index % 700));
        let log = Log::default();
        // Retries belong to the engine's committer.
        let done = loop {
            match writer.commit(&commit, &log).await {
                Ok(done) => break done,
                Err(error) => assert!(error.to_string().contains("Throughput"), "{error}"),
            }
        };
        assert_eq!((done.rows_written, done.rows_refused), (3_000, 0));
        log.expect(&[]);
        let stored = stored(&client).await;
        let mut all: Vec<u64> = Vec::new();
        for (key, ids) in &stored {
            let ids: Vec<u64> = ids
                .iter()
                .map(|id| id.parse().expect("a number"))
                .filter(|id| (begin..begin + 3_000).contains(id))
                .collect();
            assert!(!strict_order || ids.is_sorted(), "{key}: {ids:?}");
            all.extend(ids);
        }
        all.sort_unstable();
        assert_eq!(all, (begin..begin + 3_000).collect::<Vec<u64>>(), "each row once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_no_stream_takes_are_refused_alone() {
    let (server, client) = stream(1, StoreOptions::default()).await;
    let sink = KinesisSink::new("out".into(), target(server.url(), false), "".into());
    let mut writer = writer(&sink).await;
    // Row 3 exceeds a limit of this stream that only the stream knows.
    let mut payloads: Vec<String> = (0..20).map(|id| id.to_string()).collect();
    payloads[3] = "x".repeat((1 << 20) + 1);
    let commit = with_keys(commit(0, &payloads), |index| match index {
        5 => String::new(),
        6 => "k".repeat(257),
        _ => format!("key {index}"),
    });
    let log = Log::default();
    let done = writer.commit(&commit, &log).await.expect("committed");
    assert_eq!((done.rows_written, done.rows_refused), (17, 3));
    log.expect(&[(3, ""), (5, "0 characters"), (6, "257 characters")]);
    assert_eq!(stored(&client).await.len(), 17);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_there_is_named() {
    let (server, _client) = stream(1, StoreOptions::default()).await;
    let missing = StreamTarget {
        stream: StreamRef::parse("elsewhere").expect("a name"),
        ..target(server.url(), false)
    };
    let sink = KinesisSink::new("out".into(), missing, "".into());
    expect_unavailable(sink.prepare(&[]).await, "elsewhere");
    let embedded =
        StreamTarget { server: self::server(Endpoint::Embedded), ..target(server.url(), false) };
    let folder = tempfile::tempdir().expect("a folder");
    let sink = KinesisSink::new("out".into(), embedded, folder.path().into());
    expect_unavailable(sink.prepare(&[]).await, "shardmill stream serve");
}

/// Reaction of the endpoint to its next request.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Takes it and confirms.
    Take,
    /// Takes it, and cuts the connection before it confirms.
    TakeAndCut,
    /// Takes it, and confirms too late.
    TakeSlowly,
    /// Refuses it with this status.
    Status(u16),
}

/// A request as the endpoint received it.
#[derive(Clone, Debug)]
struct Seen {
    headers: BTreeMap<String, String>,
    body: String,
    taken: bool,
}

/// An endpoint that follows a plan; after that it takes everything except rows that contain `bad`.
#[derive(Clone)]
struct Server {
    port: u16,
    plan: Arc<Mutex<VecDeque<Act>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(plan: &[Act]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let plan = Arc::new(Mutex::new(plan.iter().copied().collect()));
        let server = Self { port, plan, seen: Arc::default() };
        let serving = server.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let serving = serving.clone();
                std::thread::spawn(move || while serving.request(&connection).is_some() {});
            }
        });
        server
    }

    /// Reads a request and reacts; `None` when the connection has ended.
    fn request(&self, mut connection: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(connection);
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        assert!(line.starts_with("POST /events?x=1 "), "{line}");
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let length = headers["content-length"].parse().expect("a length");
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let body = String::from_utf8(body).expect("text");
        let planned = self.plan.lock().expect("a lock").pop_front();
        let act =
            planned.unwrap_or(if body.contains("bad") { Act::Status(422) } else { Act::Take });
        let taken = !matches!(act, Act::Status(_));
        self.seen.lock().expect("a lock").push(Seen { headers, body, taken });
        let status = match act {
            Act::TakeAndCut => return None,
            Act::TakeSlowly => {
                std::thread::sleep(Duration::from_millis(900));
                200
            }
            Act::Take => 204,
            Act::Status(status) => status,
        };
        let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 4\r\n\r\nsaid");
        let answer = if status == 204 { "HTTP/1.1 204 X\r\n\r\n" } else { &answer };
        connection.write_all(answer.as_bytes()).ok()
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("a lock").clone()
    }

    /// Returns the rows of a receiver that drops requests with a known idempotency key.
    fn rows(&self) -> Vec<String> {
        let mut keys = BTreeSet::new();
        let is_new =
            |seen: &Seen| seen.taken && keys.insert(seen.headers["idempotency-key"].clone());
        let seen: Vec<Seen> = self.seen().into_iter().filter(is_new).collect();
        let mut rows: Vec<String> = Vec::new();
        for Seen { body, .. } in seen {
            match serde_json::from_str::<Vec<serde_json::Value>>(&body) {
                Ok(array) => rows.extend(array.iter().map(ToString::to_string)),
                Err(_) => rows.extend(body.lines().map(str::to_owned)),
            }
        }
        rows
    }

    fn sink(&self, body: HttpBody) -> HttpSink {
        let host = HttpHostConfig {
            host: "127.0.0.1".into(),
            port: Some(self.port),
            headers: vec![("authorization".into(), Secret::new("Bearer hunter2"))],
            methods: vec![HttpMethod::Post],
            private: true,
            response_bytes_max: 1_000,
        };
        let url = format!("http://127.0.0.1:{}/events?x=1", self.port).parse().expect("a URL");
        let timeout = Duration::from_millis(500);
        let target = HttpTarget { url, host, body, timeout, refuse: Vec::new() };
        HttpSink::new("hook".into(), target, Values::default()).expect("a sink")
    }
}

fn rows(ids: std::ops::Range<u64>) -> Vec<String> {
    ids.map(|id| format!("{{\"id\":{id}}}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_fails_has_each_row_once_by_its_keys() {
    use Act::{Status, TakeAndCut, TakeSlowly};
    for body in [HttpBody::Json, HttpBody::Ndjson] {
        let plan = [
            Status(500),
            TakeAndCut,
            Status(429),
            TakeSlowly,
            Status(503),
            TakeAndCut,
            Status(302),
        ];
        let server = Server::start(&plan);
        let sink = server.sink(body);
        let (mut writer, log) = (writer(&sink).await, Log::default());
        let mut failed = 0;
        for from in [0, 100, 200] {
            let commit = commit(from, &rows(from..from + 100));
            loop {
                match writer.commit(&commit, &log).await {
                    Ok(done) => break assert_eq!(done.rows_written, 100),
                    Err(_) => failed += 1,
                }
            }
        }
        assert_eq!(failed, 7);
        assert_eq!(server.rows(), rows(0..300));
        let seen = server.seen();
        assert_eq!(seen[0].headers["authorization"], "Bearer hunter2");
        assert_eq!(seen[0].headers["shardmill-shard"], "test/shardId-000000000000");
        assert_eq!(seen[0].headers["shardmill-first"], position(1).to_string());
        assert_eq!(seen[0].headers["shardmill-last"], position(100).to_string());
        log.expect(&[]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_an_endpoint_does_not_take_are_refused_alone() {
    let server = Server::start(&[]);
    let (mut writer, log) = (writer(&server.sink(HttpBody::Json)).await, Log::default());
    let mut payloads = rows(0..100);
    payloads[17] = r#"{"id":"bad"}"#.into();
    payloads[70] = "no JSON".into();
    payloads[99] = r#"{"id":"bad"}"#.into();
    let commit = commit(0, &payloads);
    // The endpoint fails in the middle of the search: rows that it has taken are not sent again.
    server.plan.lock().expect("a lock").extend([
        Act::Status(422),
        Act::Status(422),
        Act::Status(500),
    ]);
    expect_unavailable(writer.commit(&commit, &log).await, "");
    let done = writer.commit(&commit, &log).await.expect("committed");
    assert_eq!((done.rows_written, done.rows_refused), (97, 3));
    log.expect(&[(17, "422: said"), (70, "not valid JSON"), (99, "422: said")]);
    let mut expected = rows(0..100);
    expected.retain(|row| !["17", "70", "99"].iter().any(|id| *row == format!("{{\"id\":{id}}}")));
    let mut found = server.rows();
    found.sort_by_key(|row| expected.iter().position(|expected| expected == row));
    assert_eq!(found, expected);

    let forbidden = Server::start(&[Act::Status(401)]);
    let mut writer = self::writer(&forbidden.sink(HttpBody::Json)).await;
    let outcome = writer.commit(&self::commit(0, &rows(0..1)), &log).await;
    expect_unavailable(outcome, "answered 401: said: set `headers`");
}

/// The real binary sends the lines of a file to both sinks.
#[test]
fn a_pipeline_feeds_a_stream_and_an_endpoint() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(&[Act::Status(500), Act::TakeAndCut]);
    let state = folder.path().join("state");
    let _stream = serve_stream(&state);
    let config = pipeline(folder.path(), server.port);
    std::fs::write(folder.path().join("rows.ndjson"), rows(0..5_000).join("\n")).expect("written");
    let state = state.display().to_string();
    let place = ["--stream", "out", "--endpoint", "embedded", "--state-dir", &state];
    run_ok(&[&["stream", "create", "--shards", "3"], &place[..]].concat());
    run_ok(&["check", &config]);
    run_ok(&["run", &config]);
    let mut found = server.rows();
    found.sort();
    let mut expected = rows(0..5_000);
    expected.sort();
    assert_eq!(found, expected, "the endpoint");
    let tail = run_ok(
        &[&["stream", "tail", "--from", "trim-horizon", "--no-follow", "--json"], &place[..]]
            .concat(),
    );
    assert_eq!(tail.lines().count(), 5_000, "{}", &tail[..300.min(tail.len())]);
}

/// Writes the pipeline's file; returns its path.
fn pipeline(folder: &Path, port: u16) -> String {
    let hook = format!(
        "type = \"http\"\nurl = \"http://127.0.0.1:{port}/events?x=1\"\n\
         headers = {{ authorization = \"Bearer hunter2\" }}\nprivate = true"
    );
    PipelineToml::new(folder, "feed")
        .timing("")
        .file(&folder.join("rows.ndjson"), "")
        .route_all_to(&["out", "hook"])
        .plain_sink("out", "type = \"kinesis\"\nstream = \"out\"\nendpoint = \"embedded\"")
        .plain_sink("hook", &hook)
        .write()
}
