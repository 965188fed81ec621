//! Producers: `stream put` from files, and the HTTP intake, through the real binary.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::pipeline::PipelineToml;
use crate::support::{Process, run, run_ok, shardmill};
use bytes::Bytes;
use ferrokinesis::store::StoreOptions;
use shardmill_core::record::StreamRef;
use shardmill_embedded::EmbeddedStream;
use shardmill_kinesis::client;
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;

/// Stream `test`, served by this process.
struct Served {
    runtime: tokio::runtime::Runtime,
    server: EmbeddedStream,
    client: aws_sdk_kinesis::Client,
    folder: tempfile::TempDir,
}

impl Served {
    fn start(shards: i32, options: StoreOptions) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (server, client) = runtime.block_on(async {
            let options = StoreOptions { create_stream_ms: 1, ..options };
            let server = EmbeddedStream::start_with(0, options).await.expect("served");
            let client =
                client::connect(&client::Server::at(server.url())).await.expect("connected");
            let create = client.create_stream().stream_name("test").shard_count(shards);
            create.send().await.expect("created");
            let wait = Duration::from_secs(10);
            shardmill_kinesis::stream::wait_active(&client, &name(), wait, &mut |_, _| {})
                .await
                .expect("active");
            (server, client)
        });
        Self { runtime, server, client, folder: tempfile::tempdir().expect("a folder") }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path.display().to_string()
    }

    fn put_arguments<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let endpoint = self.server.url().as_str();
        let mut all = vec!["stream", "put", "--json", "--stream", "test", "--endpoint", endpoint];
        all.extend(arguments);
        all
    }

    /// Returns the keys and payloads of each shard, in order.
    fn shards(&self) -> Vec<Vec<(String, String)>> {
        self.runtime.block_on(async {
            let mut shards: Vec<Vec<(String, String)>> = Vec::new();
            let listed =
                self.client.list_shards().stream_name("test").send().await.expect("listed");
            for shard in listed.shards() {
                let iterator = self.client.get_shard_iterator().stream_name("test");
                let iterator = iterator.shard_id(shard.shard_id());
                let iterator = iterator
                    .shard_iterator_type(aws_sdk_kinesis::types::ShardIteratorType::TrimHorizon);
                let mut iterator = iterator.send().await.expect("an iterator").shard_iterator;
                let mut found = Vec::new();
                while let Some(at) = iterator.take() {
                    let page = self.client.get_records().shard_iterator(at).send().await;
                    let page = page.expect("records");
                    if page.records.is_empty() {
                        break;
                    }
                    iterator = page.next_shard_iterator;
                    found.extend(page.records.into_iter().map(|record| {
                        let payload = String::from_utf8_lossy(record.data.as_ref()).into_owned();
                        (record.partition_key.expect("a key"), payload)
                    }));
                }
                shards.push(found);
            }
            shards
        })
    }

    fn all(&self) -> Vec<(String, String)> {
        let mut all = self.shards().concat();
        all.sort();
        all
    }

    /// Writes a pipeline whose stream is at `endpoint`, with an intake on a free port.
    fn pipeline(&self, endpoint: &str, intake: &str) -> String {
        PipelineToml::new(self.folder.path(), "events")
            .stream("test", endpoint, "")
            .route_all_to(&["mart"])
            .plain_sink("mart", "type = \"discard\"")
            .table(&format!("[intake]\nlisten = \"127.0.0.1:0\"\n{intake}"))
            .write()
    }

    fn url(&self) -> String {
        self.server.url().to_string()
    }
}

fn name() -> StreamRef {
    StreamRef::parse("test").expect("a name")
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
}

/// Starts a command that serves an intake; returns its address too.
fn intake(command: &str, pipeline: &str) -> (Process, SocketAddr) {
    let mut command = shardmill(&[command, pipeline]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
    let output = child.stdout.take().expect("piped");
    let process = Process(child);
    let (found, address) = std::sync::mpsc::channel();
    // Keeps the pipe open: another test closes it early.
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let address =
                line.strip_prefix("intake http://").and_then(|it| it.strip_suffix("/events"));
            if let Some(address) = address.and_then(|address| address.parse().ok()) {
                let _ = found.send(address);
            }
        }
    });
    let address = address.recv_timeout(Duration::from_secs(60));
    (process, address.expect("the intake says within a minute where it is"))
}

/// Sends one request; returns the whole answer.
fn send(address: SocketAddr, headers: &str, body: &[u8]) -> String {
    let mut connection = TcpStream::connect(address).expect("connected");
    connection.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let length = body.len();
    let head = format!(
        "POST /events HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    connection.write_all(head.as_bytes()).expect("sent");
    // The write may fail: a body that is too large is refused before it is read.
    let _ = connection.write_all(body);
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

/// Proxy in front of a server. It passes requests on while it is open, and keeps them while it is held.
struct Front {
    url: String,
    is_paused: Arc<AtomicBool>,
    waiting: Arc<AtomicUsize>,
}

impl Front {
    fn of(server: &EmbeddedStream) -> Self {
        let upstream = server.url().socket_addrs(|| None).expect("an address")[0];
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (is_paused, waiting) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (paused, waits) = (is_paused.clone(), waiting.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(upstream).expect("the server");
                let (mut from, mut to) =
                    (server.try_clone().expect("a clone"), client.try_clone().expect("a clone"));
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
                let (paused, waits) = (paused.clone(), waits.clone());
                std::thread::spawn(move || pass(client, server, &paused, &waits));
            }
        });
        Self { url, is_paused, waiting }
    }

    fn pause(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::SeqCst);
    }

    /// Waits until a request is kept.
    fn wait_for_one(&self) {
        crate::support::wait_for("a request", || self.waiting.load(Ordering::SeqCst) > 0);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, is_paused: &AtomicBool, waiting: &AtomicUsize) {
    let mut chunk = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        waiting.fetch_add(1, Ordering::SeqCst);
        while is_paused.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        waiting.fetch_sub(1, Ordering::SeqCst);
        if to.write_all(&chunk[..read]).is_err() {
            return;
        }
    }
}

#[test]
fn each_format_is_put_as_it_is() {
    let served = Served::start(2, StoreOptions::default());
    let lines = served.file("lines", b"head\na\r\n\nb");
    let said = run_ok(&served.put_arguments(&[&lines, "--skip", "1"]));
    let summary: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((&summary["records"], &summary["bytes"]), (&3.into(), &2.into()), "{said}");
    assert!(summary["records_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{said}");
    let ndjson = served.file("ndjson", b"{\"id\":\"x\"}\n\n{\"id\":7}\n");
    run_ok(&served.put_arguments(&[&ndjson, "--format", "ndjson", "--key-field", "id"]));
    let mut command =
        shardmill(&served.put_arguments(&["--format", "binary", "--key", "bin", "-"]));
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("starts");
    let mut child = Process(child);
    let mut input = child.0.stdin.take().expect("piped");
    input.write_all(b"\0\0\0\x03\n\0\n\0\0\0\x01z").expect("sent");
    drop(input);
    assert!(child.wait().success());
    let mut expected = owned(&[("0", "a"), ("1", ""), ("2", "b"), ("x", "{\"id\":\"x\"}")]);
    expected.extend(owned(&[("7", "{\"id\":7}"), ("bin", "\n\0\n"), ("bin", "z")]));
    expected.sort();
    assert_eq!(served.all(), expected);
}

#[test]
fn bad_inputs_are_named_with_their_place() {
    let served = Served::start(1, StoreOptions::default());
    let fields = ["--format", "ndjson", "--key-field", "id"];
    let large = vec![b'x'; (1 << 20) + 1];
    let cases: [(&[u8], &[&str], &str); 6] = [
        (b"{\"id\":1}\n{\"no\":1}\n", &fields, ":2: the record has no member \"id\""),
        (b"{\"id\":1}\nnothing\n", &fields, ":2: not JSON"),
        (b"\0\0\0\x01a\0\0\0\x09b", &["--format", "binary"], "at byte 5: truncated record"),
        (b"a\n", &["--key", ""], ":1: the partition key has 0 characters"),
        (b"a\n", &["--key-field", "id"], "add --format ndjson"),
        // Only the server knows the stream's own limit.
        (&large, &[], "PutRecords failed for stream test"),
    ];
    for (bytes, arguments, expected) in cases {
        let file = served.file("in", bytes);
        let mut all = vec![file.as_str()];
        all.extend(arguments);
        let output = run(&served.put_arguments(&all));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn strict_order_holds_per_key_when_part_of_a_request_is_refused() {
    let served = Served::start(2, StoreOptions { enforce_limits: true, ..StoreOptions::default() });
    let key = |number: u32| format!("key-{}", number % 500);
    let report = served.runtime.block_on(async {
        let mut producer = Producer::new(served.client.clone(), name()).strict_order(true);
        for number in 0..4_000u32 {
            let payload = Bytes::from(number.to_string());
            producer.put(NewRecord { partition_key: key(number), payload }).await.expect("put");
        }
        producer.flush().await.expect("put");
        producer.report()
    });
    assert_eq!(report.records, 4_000);
    assert!(report.retried > 0, "a shard takes 1,000 records a second");
    let mut numbers: Vec<u32> = Vec::new();
    for shard in served.shards() {
        let mut last: HashMap<String, u32> = HashMap::new();
        for (found, payload) in shard {
            let number: u32 = payload.parse().expect("a number");
            assert_eq!(found, key(number));
            let before = last.insert(found, number);
            assert!(before.is_none_or(|before| before < number), "order of {}", key(number));
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (0..4_000).collect::<Vec<u32>>());
}

#[test]
fn what_is_answered_200_is_on_the_stream() {
    let served = Served::start(2, StoreOptions::default());
    let pipeline = served.pipeline(&served.url(), "key = \"id\"\nbody = \"64 KiB\"");
    let (process, address) = intake("intake", &pipeline);
    let json = "Content-Type: application/json\r\n";
    let ndjson = "Content-Type: application/x-ndjson\r\n";
    let answer = send(address, json, b"{\"id\":\"a\"}");
    assert!(status(&answer) == "200" && answer.contains("{\"records\":1}"), "{answer}");
    assert_eq!(served.all(), owned(&[("a", "{\"id\":\"a\"}")]));
    assert_eq!(status(&send(address, "x-partition-key: k\r\n", b"\0raw\n")), "200");
    let many: String = (0..1_000).map(|id| format!("{{\"id\":{id}}}\n")).collect();
    let answer = send(address, ndjson, many.as_bytes());
    assert!(answer.contains("{\"records\":1000}"), "{answer}");
    let found: BTreeMap<String, String> = served.all().into_iter().collect();
    assert_eq!((found.len(), found["k"].as_str()), (1_002, "\0raw\n"));
    assert_eq!(found["999"], "{\"id\":999}");

    for (headers, body, code, expected) in [
        (json, &b""[..], "400", "the body is empty"),
        (ndjson, b"{\"id\":1}\n{", "400", "line 2: not JSON"),
        (json, b"{}", "400", "no member"),
        ("", &[b'x'; (64 << 10) + 1], "413", "expected at most 65536 bytes"),
    ] {
        let answer = send(address, headers, body);
        assert!(status(&answer) == code && answer.contains(expected), "{code}: {answer}");
    }
    assert_eq!(served.all().len(), 1_002);
    let taken = run(&[
        "intake",
        &served.file(
            "again.toml",
            std::fs::read_to_string(&pipeline)
                .expect("read")
                .replace("127.0.0.1:0", &address.to_string())
                .as_bytes(),
        ),
    ]);
    let said = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(
        taken.status.code() == Some(1) && said.contains("set `listen` under [intake]"),
        "{said}"
    );
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_record_over_the_streams_limit_fails_its_own_request_only() {
    let served = Served::start(1, StoreOptions::default());
    let front = Front::of(&served.server);
    let (_process, address) = intake("intake", &served.pipeline(&front.url, ""));
    // Requests that wait for the first one are put together in one call.
    front.pause(true);
    let first = std::thread::spawn(move || send(address, "", b"first"));
    front.wait_for_one();
    let good = std::thread::spawn(move || send(address, "", b"good"));
    let large = std::thread::spawn(move || send(address, "", &vec![b'x'; (1 << 20) + 1]));
    std::thread::sleep(Duration::from_millis(300));
    front.pause(false);
    for (sent, code) in [(first, "200"), (good, "200"), (large, "422")] {
        let answer = sent.join().expect("an answer");
        assert_eq!(status(&answer), code, "{answer}");
    }
    let mut payloads: Vec<String> = served.all().into_iter().map(|(_, text)| text).collect();
    payloads.sort();
    assert_eq!(payloads, ["first", "good"]);
}

#[test]
fn too_much_in_flight_is_429_and_a_request_in_hand_is_answered_at_the_end() {
    let served = Served::start(1, StoreOptions::default());
    let front = Front::of(&served.server);
    let (process, address) =
        intake("intake", &served.pipeline(&front.url, "in_flight = \"1 KiB\""));
    front.pause(true);
    let first = std::thread::spawn(move || send(address, "", &[b'1'; 600]));
    front.wait_for_one();
    crate::support::wait_for("429", || {
        let answer = send(address, "", &[b'2'; 1_000]);
        status(&answer) == "429" && answer.contains("retry-after: 1")
    });
    process.ask_to_end();
    crate::support::wait_for("the closed port", || TcpStream::connect(address).is_err());
    front.pause(false);
    let answer = first.join().expect("an answer");
    assert!(status(&answer) == "200", "{answer}");
    let mut process = process;
    assert_eq!(process.wait().code(), Some(0));
    assert!(served.all().iter().any(|(_, text)| *text == "1".repeat(600)));
}

#[test]
fn a_pipeline_that_is_stopped_answers_the_requests_in_hand() {
    let served = Served::start(1, StoreOptions::default());
    let front = Front::of(&served.server);
    let (mut process, address) = intake("run", &served.pipeline(&front.url, ""));
    front.pause(true);
    let first = std::thread::spawn(move || send(address, "", b"in hand"));
    front.wait_for_one();
    process.ask_to_end();
    crate::support::wait_for("the closed port", || TcpStream::connect(address).is_err());
    front.pause(false);
    let answer = first.join().expect("an answer");
    assert_eq!(status(&answer), "200", "{answer}");
    assert_eq!(process.wait().code(), Some(0));
    assert!(served.all().iter().any(|(_, text)| text == "in hand"));
}

/// Sends a request with this head, in pieces; returns the whole answer.
fn send_pieces(address: SocketAddr, head: &str, pieces: &[&[u8]]) -> String {
    let mut connection = TcpStream::connect(address).expect("connected");
    connection.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let head = format!("POST /events HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{head}\r\n");
    connection.write_all(head.as_bytes()).expect("sent");
    for piece in pieces {
        // The write may fail: after a refusal the server may not read any more.
        let _ = connection.write_all(piece);
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_body_in_chunks_is_taken_within_its_limit() {
    let served = Served::start(1, StoreOptions::default());
    let (process, address) = intake("intake", &served.pipeline(&served.url(), "body = \"1 KiB\""));
    let chunked = "Transfer-Encoding: chunked\r\nContent-Type: application/x-ndjson\r\n";
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len()).into_bytes();
    let pieces = [chunk("{\"id\":1}\n{\"i"), chunk("d\":2}\n"), chunk("")];
    let answer = send_pieces(address, chunked, &pieces.each_ref().map(Vec::as_slice));
    assert!(status(&answer) == "200" && answer.contains("{\"records\":2}"), "{answer}");
    let large = [chunk(&"x".repeat(700)), chunk(&"x".repeat(700)), chunk("")];
    let answer = send_pieces(address, chunked, &large.each_ref().map(Vec::as_slice));
    assert!(status(&answer) == "413" && answer.contains("1024 bytes"), "{answer}");
    let cut = send_pieces(address, chunked, &[b"zz\r\nno chunk"]);
    assert_eq!(status(&cut), "400", "{cut}");
    assert_eq!(served.all().len(), 2);
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_body_that_does_not_arrive_is_408() {
    let served = Served::start(1, StoreOptions::default());
    let (process, address) = intake("intake", &served.pipeline(&served.url(), ""));
    let answer = send_pieces(address, "Content-Length: 10\r\n", &[b"half"]);
    assert!(status(&answer) == "408" && answer.contains("within 30 s"), "{answer}");
    assert_eq!(served.all().len(), 0);
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_pipeline_that_runs_serves_its_intake_and_ends_with_it() {
    let served = Served::start(1, StoreOptions::default());
    let (process, address) = intake("run", &served.pipeline(&served.url(), ""));
    let answer = send(address, "Content-Type: application/json\r\n", b"{\"id\":1}");
    assert_eq!(status(&answer), "200", "{answer}");
    assert_eq!(served.all().len(), 1);
    assert_eq!(process.terminate(), Some(0));
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_stream_that_is_gone_is_503() {
    let served = Served::start(1, StoreOptions::default());
    let state: PathBuf = served.folder.path().join("state");
    let stream = crate::support::serve_stream(&state);
    let state = state.display().to_string();
    let place = ["--stream", "test", "--endpoint", "embedded", "--state-dir", &state];
    run_ok(&[&["stream", "create"], &place[..]].concat());
    let (process, address) = intake("intake", &served.pipeline("embedded", ""));
    assert_eq!(status(&send(address, "", b"there")), "200");
    drop(stream);
    let answer = send(address, "", b"gone");
    assert!(status(&answer) == "503" && answer.contains("retry-after: 5"), "{answer}");
    // The server's error text goes only to the log: everybody can read answers of this port.
    assert!(answer.contains("see the intake's log for the cause"), "{answer}");
    assert!(!answer.contains("PutRecords"), "{answer}");
    assert_eq!(process.terminate(), Some(0));
}
