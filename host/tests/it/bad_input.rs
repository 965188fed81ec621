//! Bad input through the real binary: a clear error, or a dead letter that names its cause.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::pipeline::PipelineToml;
use crate::support::world::stream_ref;
use crate::support::{Process, free_port, http_get, plugin, run, shardmill, wait_for};
use bytes::Bytes;
use shardmill_embedded::EmbeddedStream;
use shardmill_kinesis::client;
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;

/// Folder that holds a pipeline.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a pipeline with one stage and a SQLite table.
    fn pipeline(&self, plugin: &str, stage_config: &str, extra: &str) -> String {
        let mart = format!(
            "type = \"sqlite\"\npath = \"{}\"\ntable = \"rows\"\ncreate = true",
            self.path("mart.db").display()
        );
        PipelineToml::new(self.folder.path(), "bad")
            .timing("")
            .stream("test", "embedded", "")
            .stage("only", plugin, stage_config)
            .sink("mart", &mart)
            .table(extra)
            .write()
    }

    fn cars(&self) -> String {
        self.pipeline("car-decode", "[stage.routes]\ncars = [\"mart\"]", "")
    }

    /// Writes a pipeline that passes JSON rows on unchanged.
    fn rows(&self, extra: &str) -> String {
        let config =
            "[stage.config]\ndefault = \"all\"\nrules = []\n[stage.routes]\nall = [\"mart\"]";
        self.pipeline("route-json", config, extra)
    }

    fn mart(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.path("mart.db")).expect("the data mart")
    }

    /// Returns the reasons of the visible dead letters, in order.
    fn dead_letters(&self) -> Vec<String> {
        let state = rusqlite::Connection::open(self.path("state/bad/state.db")).expect("the state");
        let sql = "SELECT reason FROM dead_letter WHERE held = 0 ORDER BY sequence";
        let mut query = state.prepare(sql).expect("the dead letters");
        let reasons = query.query_map([], |row| row.get(0)).expect("rows");
        reasons.map(|reason| reason.expect("a reason")).collect()
    }
}

/// Serves the stream `test` with one shard and these records, for the pipelines of a `Place`.
fn serve(place: &Place, records: &[Vec<u8>]) -> (tokio::runtime::Runtime, EmbeddedStream) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let served = runtime.block_on(async {
        let served = EmbeddedStream::serve(&place.path("state"), 0).await.expect("served");
        let client = client::connect(&client::Server::at(served.url())).await.expect("connected");
        let stream = stream_ref();
        shardmill_kinesis::stream::create(&client, &stream, 1).await.expect("created");
        let wait = std::time::Duration::from_secs(10);
        shardmill_kinesis::stream::wait_active(&client, &stream, wait, &mut |_, _| {})
            .await
            .expect("active");
        put(&client, records).await;
        served
    });
    (runtime, served)
}

async fn put(client: &aws_sdk_kinesis::Client, records: &[Vec<u8>]) {
    let mut producer = Producer::new(client.clone(), stream_ref());
    for record in records {
        let payload = Bytes::from(record.clone());
        let new = NewRecord { partition_key: "key".into(), payload };
        producer.put(new).await.expect("put");
    }
    producer.flush().await.expect("put");
}

/// Runs a command that must fail with this exit code; returns what it prints.
fn fails(arguments: &[&str], code: i32) -> String {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

fn run_to_end(pipeline: &str) {
    crate::support::run_ok(&["run", pipeline, "--until-caught-up"]);
}

#[test]
fn bad_cars_are_dead_letters_and_good_ones_rows() {
    let place = Place::new();
    let car = |id: u8, make: &str| {
        let mut car = vec![id, make.len() as u8];
        car.extend_from_slice(make.as_bytes());
        car
    };
    let wild = vec![7, 252, 0xff, 0xff, 0xff, 0x7f];
    let big = vec![b'x'; 1 << 20];
    let records = [
        car(1, "Honda"),
        car(2, "Toyota")[..5].to_vec(),
        vec![],
        vec![0xff; 100],
        big,
        wild,
        vec![9, 2, 0xff, 0xfe],
        car(3, "BMW"),
    ];
    let _served = serve(&place, &records);
    run_to_end(&place.cars());
    let reasons = place.dead_letters();
    for (reason, expected) in reasons.iter().zip([
        "truncated car",
        "empty payload",
        "",
        "",
        "claims more",
        "invalid utf-8",
    ]) {
        assert!(reason.contains(expected), "{reasons:?}: {expected}");
    }
    assert_eq!(reasons.len(), 6, "{reasons:?}");
    let rows: i64 =
        place.mart().query_row("SELECT sum(id) FROM rows", [], |row| row.get(0)).expect("rows");
    assert_eq!(rows, 4);
}

#[test]
fn bad_rows_are_dead_letters_alone() {
    let place = Place::new();
    place.mart().execute_batch("CREATE TABLE rows (id INTEGER NOT NULL, name TEXT)").expect("sql");
    let records = [
        r#"{"id":1,"name":"a"}"#,
        r#"{"name":"missing"}"#,
        r#"{"id":2,"name":"b","extra":true}"#,
        r#"{"id":"three"}"#,
        "\u{1}no json",
        r#"{"id":4}"#,
    ];
    let mut records: Vec<Vec<u8>> = records.iter().map(|text| text.as_bytes().to_vec()).collect();
    records.push(vec![b'"', 0xff, b'"']);
    let _served = serve(&place, &records);
    run_to_end(&place.rows(""));
    let reasons = place.dead_letters();
    assert_eq!(reasons.len(), 5, "{reasons:?}");
    assert!(reasons[0].contains("id"), "{reasons:?}");
    assert!(reasons[1].contains("extra"), "{reasons:?}");
    let rows: i64 =
        place.mart().query_row("SELECT sum(id) FROM rows", [], |row| row.get(0)).expect("rows");
    assert_eq!(rows, 5);
    // A second run: nothing is written twice, and there are no further dead letters.
    run_to_end(&place.rows(""));
    assert_eq!(place.dead_letters().len(), 5);
}

#[test]
fn a_dropped_column_blocks_the_lane_and_fills_no_dead_letters() {
    let place = Place::new();
    place.mart().execute_batch("CREATE TABLE rows (id INTEGER NOT NULL, name TEXT)").expect("sql");
    let (runtime, served) = serve(&place, &[br#"{"id":1,"name":"a"}"#.to_vec()]);
    let port = free_port();
    let pipeline = place.rows(&crate::support::admin(port));
    let child = shardmill(&["run", &pipeline]).stdout(Stdio::null()).spawn().expect("it starts");
    let process = Process(child);
    let count = || {
        let rows =
            place.mart().query_row("SELECT count(*) FROM rows", [], |row| row.get::<_, i64>(0));
        rows.unwrap_or(0)
    };
    wait_for("the first row", || count() == 1);
    place.mart().execute_batch("ALTER TABLE rows DROP COLUMN name").expect("dropped");
    let more: Vec<Vec<u8>> =
        (2..300).map(|id| format!(r#"{{"id":{id},"name":"b"}}"#).into_bytes()).collect();
    runtime.block_on(async {
        let client = client::connect(&client::Server::at(served.url())).await.expect("connected");
        put(&client, &more).await;
    });
    let ready = || http_get(port, "/health/ready");
    wait_for("the lane to block", || ready().contains("name"));
    assert!(ready().starts_with("HTTP/1.1 503"), "{}", ready());
    assert!(
        http_get(port, "/metrics").contains("shardmill_blocked{shard=\"shardId-000000000000\"} 1")
    );
    assert_eq!(place.dead_letters(), Vec::<String>::new());
    place.mart().execute_batch("ALTER TABLE rows ADD COLUMN name TEXT").expect("added");
    wait_for("the lane to go on", || count() == 299);
    wait_for("the lane to be ready", || ready().starts_with("HTTP/1.1 200"));
    assert_eq!(process.terminate(), Some(0));
    assert_eq!(place.dead_letters(), Vec::<String>::new());
}

#[test]
fn what_is_no_plugin_is_refused_by_name() {
    let place = Place::new();
    let routes = "[stage.routes]\ncars = [\"mart\"]";
    let decode = std::fs::read(plugin("car-decode")).expect("a component");
    let replaced = |from: &[u8], to: &[u8]| {
        let mut bytes = decode.clone();
        let places: Vec<usize> =
            (0..bytes.len() - from.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
        for at in places {
            bytes[at..at + to.len()].copy_from_slice(to);
        }
        bytes
    };
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("text.wasm", b"hello".to_vec(), "is not WebAssembly"),
        ("empty.wasm", vec![], "the file is empty"),
        ("core.wasm", b"\0asm\x01\0\0\0".to_vec(), "is a core WebAssembly module, not a component"),
        ("world.wasm", b"\0asm\x0d\0\x01\0".to_vec(), "it has no exports"),
        ("version.wasm", replaced(b"@0.1.0", b"@0.9.0"), "shardmill:plugin/stage@0.9.0"),
    ];
    for (name, bytes, expected) in cases {
        let path = place.path(name);
        std::fs::write(&path, bytes).expect("written");
        let pipeline = place.pipeline(&path.display().to_string(), routes, "");
        let said = fails(&["check", &pipeline], 2);
        assert!(said.contains(expected), "{name}: {said}");
        assert!(said.contains("pipeline.toml:13:10"), "{name}: {said}");
    }
    let said = fails(&["check", &place.pipeline("./gone.wasm", routes, "")], 2);
    assert!(said.contains("gone.wasm") && said.contains("pipeline.toml:13:10"), "{said}");
}

#[test]
fn routes_are_checked_against_the_plugin() {
    let place = Place::new();
    let unknown = place.pipeline("car-decode", "[stage.routes]\ncarz = [\"mart\"]", "");
    let said = fails(&["check", &unknown], 2);
    assert!(said.contains("unknown route `carz`") && said.contains("`cars`"), "{said}");
    let config = "[stage.config]\ndefault = \"other\"\nrules = [{ field = \"a\", equals = 1, route = \"one\" }]\n[stage.routes]\none = [\"mart\"]";
    let unbound = place.pipeline("route-json", config, "");
    let said = fails(&["check", &unbound], 2);
    assert!(said.contains("route `other`") && said.contains("not bound to a sink"), "{said}");
}

#[test]
fn columns_are_checked_between_two_stages() {
    let place = Place::new();
    let pipeline = |needs: &str| {
        let second = format!(
            "[stage.config]\ncolumns = [{{ name = \"id\", type = \"integer\", nullable = false }}, \
             {{ name = \"make\", type = \"text\" }}]\n[[stage]]\nname = \"second\"\n\
             plugin = \"{}\"\nconfig = {{ needs = [{needs}], format = \"application/json\" }}\n\
             routes = {{ out = [\"mart\"] }}",
            plugin("hostile")
        );
        place.pipeline("csv-decode", &second, "")
    };
    place.mart().execute_batch("CREATE TABLE rows (id INTEGER, make TEXT)").expect("created");
    for (needs, expected) in [
        (r#"{ name = "id", data_type = "smallint" }"#, "`id` as smallint, found integer"),
        (r#"{ name = "make", data_type = "text" }"#, "`make` not null, found it nullable"),
        (r#"{ name = "year", data_type = "integer" }"#, "`year`, found none"),
    ] {
        let said = fails(&["check", "--offline", &pipeline(needs)], 2);
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        for expected in [
            expected,
            "stage second",
            "stage only",
            "needed:",
            "carried: id integer not null, make text",
        ] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
    let sound = r#"{ name = "id", data_type = "bigint" }"#;
    crate::support::run_ok(&["check", "--offline", &pipeline(sound)]);
}

#[test]
fn a_stream_that_is_not_there_is_named() {
    let place = Place::new();
    let said = fails(&["run", &place.cars()], 1);
    assert!(said.contains("stream test does not exist") && said.contains("create"), "{said}");
}

#[test]
fn a_second_run_of_the_same_pipeline_is_refused() {
    let place = Place::new();
    let _served = serve(&place, &[]);
    let pipeline = place.cars();
    let child = shardmill(&["run", &pipeline]).stdout(Stdio::null()).spawn().expect("it starts");
    let process = Process(child);
    let pid = process.0.id().to_string();
    let lock = place.path("state/bad/lock");
    wait_for("the lock", || std::fs::read_to_string(&lock).is_ok_and(|text| text.trim() == pid));
    let said = fails(&["run", &pipeline], 1);
    assert!(said.contains(&format!("already running, as process {pid}")), "{said}");
    wait_for("the state", || place.path("state/bad/state.db").exists());
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(process.terminate(), Some(0));
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let place = Place::new();
    let pipeline = place.rows(&crate::support::admin(port));
    let said = fails(&["run", &pipeline], 1);
    assert!(said.contains(&format!("127.0.0.1:{port}")) && said.contains("[admin]"), "{said}");
    let state = place.path("state").display().to_string();
    let said = fails(&["stream", "serve", "--port", &port.to_string(), "--state-dir", &state], 1);
    assert!(said.contains(&format!("127.0.0.1:{port}")) && said.contains("--port"), "{said}");
}

#[test]
fn a_state_folder_without_room_is_named() {
    let place = Place::new();
    let _served = serve(&place, &[]);
    let pipeline = place.cars();
    // Files may not grow beyond 8 KiB: every write past that fails, as on a full disk.
    let script = format!(
        "trap '' XFSZ; ulimit -f 8; exec '{}' run '{pipeline}' --until-caught-up",
        env!("CARGO_BIN_EXE_shardmill")
    );
    let output = crate::support::output(std::process::Command::new("bash").args(["-c", &script]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("state") && said.contains("free the disk"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    // With enough room, the same pipeline runs.
    run_to_end(&pipeline);
}

#[test]
fn no_credentials_says_what_to_set() {
    let place = Place::new();
    let mut command = shardmill(&[
        "stream",
        "describe",
        "--stream",
        "x",
        "--endpoint",
        "aws",
        "--region",
        "us-east-1",
    ]);
    command.current_dir(place.folder.path());
    let nowhere = Path::new("/nonexistent");
    command.env("HOME", nowhere).env("AWS_EC2_METADATA_DISABLED", "true");
    let output = crate::support::output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("AWS_ACCESS_KEY_ID") && said.contains("AWS_PROFILE"), "{said}");
}
