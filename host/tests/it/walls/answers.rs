//! Servers that answer without end, or one byte now and then: both the answer and the time for it are bounded.

use std::collections::HashMap;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::memory::{MIB, assert_below, assert_peak_below, output_and_peak};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, shardmill, wait_for};

/// Memory limit of a process that a server floods: an answer of 128 MiB, its parsed form of the same size, and the
/// process itself.
const PEAK_MAX: u64 = 400 * MIB;
/// Size of a flood, so that it ends even if nobody cuts it off.
const FLOOD_BYTES: usize = 2 << 30;

/// Starts a server on loopback that calls `serve` for each connection; returns its port.
fn server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let serve = serve.clone();
            std::thread::spawn(move || serve(connection));
        }
    });
    port
}

/// Reads the head of an HTTP request; returns the length of its body.
fn read_head(reader: &mut impl std::io::BufRead) -> usize {
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            return length;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
    }
}

/// Starts a server that answers each request with a body of `bytes`, `piece` by `piece`.
fn http(piece: Vec<u8>, bytes: usize, pause: Duration) -> u16 {
    server(move |mut connection| {
        let mut reader = BufReader::new(connection.try_clone().expect("cloned"));
        let length = read_head(&mut reader);
        let _ = reader.read_exact(&mut vec![0; length]);
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.1\r\n\
                    connection: close\r\n\r\n";
        let _ = connection.write_all(head.as_bytes());
        for _ in 0..bytes / piece.len() {
            if connection.write_all(&piece).is_err() {
                return;
            }
            std::thread::sleep(pause);
        }
    })
}

/// Starts a server that answers each request with this status and body.
fn refusing(status: &'static str, body: Vec<u8>) -> u16 {
    server(move |mut connection| {
        let mut reader = BufReader::new(connection.try_clone().expect("cloned"));
        let length = read_head(&mut reader);
        let _ = reader.read_exact(&mut vec![0; length]);
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/x-amz-json-1.1\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        // Fails once the client has read enough and closed the connection.
        let _ = connection.write_all(head.as_bytes());
        let _ = connection.write_all(&body);
    })
}

/// Encodes a message of PostgreSQL.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32 + 4).to_be_bytes();
    [&[kind][..], &length, body].concat()
}

/// Encodes a setting that PostgreSQL reports.
fn setting(name: &str, value: &str) -> Vec<u8> {
    message(b'S', format!("{name}\0{value}\0").as_bytes())
}

/// Starts a server that speaks PostgreSQL's protocol up to the first query, and then calls `flood` instead of
/// answering.
fn postgres(flood: impl Fn(&mut TcpStream) + Clone + Send + 'static) -> u16 {
    login(Vec::new(), flood)
}

/// Like `postgres`, with `greeting` before the server is ready.
fn login(greeting: Vec<u8>, flood: impl Fn(&mut TcpStream) + Clone + Send + 'static) -> u16 {
    server(move |mut connection| {
        let read = |connection: &mut TcpStream| {
            let mut length = [0; 4];
            connection.read_exact(&mut length).ok()?;
            let mut rest = vec![0; u32::from_be_bytes(length) as usize - 4];
            connection.read_exact(&mut rest).ok()
        };
        // Reads the request for TLS, then the names of user and database.
        if read(&mut connection).is_none() {
            return;
        }
        let _ = connection.write_all(b"N");
        if read(&mut connection).is_none() {
            return;
        }
        let _ = connection.write_all(b"R\0\0\0\x08\0\0\0\0");
        if !greeting.is_empty() {
            for _ in 0..FLOOD_BYTES / greeting.len() {
                if connection.write_all(&greeting).is_err() {
                    return;
                }
            }
        }
        let _ = connection.write_all(b"Z\0\0\0\x05I");
        flood(&mut connection);
        // Keeps the connection open, so that a client without a limit would wait.
        let _ = connection.read(&mut [0; 1]);
    })
}

/// Makes a pipeline with one row for a sink with these lines; returns the command that checks or runs it.
fn command(folder: &Path, arguments: &[&str], sink: &str) -> Command {
    let rows = folder.join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\n").expect("written");
    let pipeline = PipelineToml::new(folder, "flooded")
        .timing("retry_pause = \"50 ms\"\nkinesis_silence = \"2 s\"\npostgres_silence = \"20 s\"")
        .file(&rows, "format = \"application/json\"")
        .route_all_to(&["out"])
        .sink("out", sink)
        .write();
    let mut command = shardmill(&[arguments, &[pipeline.as_str()]].concat());
    command.env("AWS_ACCESS_KEY_ID", "local").env("AWS_SECRET_ACCESS_KEY", "local");
    command.env("AWS_REGION", "us-east-1");
    command
}

/// Runs a command against a flood; asserts that it fails for this reason and uses little memory.
#[track_caller]
fn assert_given_up(arguments: &[&str], sink: &str, cause: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let (output, peak) = output_and_peak(&mut command(folder.path(), arguments, sink));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains(cause), "expected {cause:?}, found {said}");
    assert_peak_below(peak, PEAK_MAX, cause);
}

fn kinesis_sink(port: u16) -> String {
    format!("type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://127.0.0.1:{port}\"")
}

fn objects_sink(port: u16) -> String {
    format!(
        "type = \"objects\"\nurl = \"s3://b/p\"\n\
         options = {{ aws_endpoint = \"http://127.0.0.1:{port}\", aws_region = \"us-east-1\" }}"
    )
}

fn postgres_sink(port: u16) -> String {
    format!("type = \"postgres\"\nurl = \"postgres://u@127.0.0.1:{port}/d\"\ntable = \"t\"")
}

#[test]
fn wall_02_an_answer_of_kinesis_without_end_is_given_up() {
    let port = http(vec![b' '; 1 << 20], FLOOD_BYTES, Duration::ZERO);
    assert_given_up(&["check"], &kinesis_sink(port), "expected an answer of at most 1.0 MiB");
}

#[test]
fn wall_02_a_list_of_a_store_without_end_is_given_up() {
    let port = http(vec![b'<'; 1 << 20], FLOOD_BYTES, Duration::ZERO);
    let verify = ["objects", "verify", "--sink", "out"];
    assert_given_up(&verify, &objects_sink(port), "length limit exceeded");
}

#[test]
fn wall_02_an_answer_of_postgresql_without_end_is_given_up() {
    // One message of 2 GiB, as its length says and as it is sent.
    let one = postgres(|connection| {
        let _ = connection.read(&mut [0; 1_024]);
        let _ = connection.write_all(b"D\x7f\xff\xff\xff");
        for _ in 0..FLOOD_BYTES >> 20 {
            if connection.write_all(&[0; 1 << 20]).is_err() {
                return;
            }
        }
    });
    // Parameters without end, each of which the client keeps.
    let many = postgres(|connection| {
        let _ = connection.read(&mut [0; 1_024]);
        let value = "v".repeat(1 << 16);
        for at in 0..FLOOD_BYTES >> 16 {
            if connection.write_all(&setting(&at.to_string(), &value)).is_err() {
                return;
            }
        }
    });
    let settings = "expected a server whose settings (ParameterStatus) have at most 1.0 MiB";
    assert_given_up(&["check"], &postgres_sink(many), settings);
    // Notices without end before the server is ready.
    let notices = login(b"N\0\0\0\x08M\0\0\0".repeat(100_000), |_| {});
    for port in [one, notices] {
        let cause = "expected an answer of at most 128.0 MiB";
        assert_given_up(&["check"], &postgres_sink(port), cause);
    }
}

#[test]
fn wall_02_settings_of_postgresql_at_the_start_of_a_connection_are_bounded() {
    let value = "v".repeat(1 << 20);
    let long = (0..3).flat_map(|at| setting(&format!("long{at}"), &value)).collect();
    let many = (0..10_000).flat_map(|at| setting(&format!("short{at}"), "on")).collect();
    let cause = "expected a server whose settings (ParameterStatus) have at most 1.0 MiB";
    for greeting in [long, many] {
        let port = login(greeting, |_| {});
        assert_given_up(&["check"], &postgres_sink(port), cause);
    }
}

/// Error text of the servers here: a line break followed by a forged line of ours. Much more text follows.
const FORGED: &str = "no\nerror: forged";

/// Runs a command against a server whose error text is [`FORGED`] and much more; asserts that the command fails, and
/// that it prints the beginning of that text in one line.
#[track_caller]
fn assert_cut(arguments: &[&str], sink: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let (output, peak) = output_and_peak(&mut command(folder.path(), arguments, sink));
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(!output.status.success(), "{said:.2000}");
    assert!(said.contains(r"no\nerror: forged"), "{said:.2000}");
    assert!(said.contains("bytes in all)"), "{said:.2000}");
    assert!(!said.lines().any(|line| line.starts_with("error: forged")), "{said:.2000}");
    assert!(said.len() < 128 << 10, "{} bytes are printed", said.len());
    assert_peak_below(peak, PEAK_MAX, "a long text");
}

#[test]
fn wall_02_a_text_of_kinesis_is_cut_and_one_line() {
    // Almost the maximum that is read of the answer of a failed call.
    let text = format!("{FORGED}{}", "x".repeat(1_000 << 10)).replace('\n', "\\n");
    let body = format!(r#"{{"__type":"ValidationException","message":"{text}"}}"#);
    let port = refusing("400 Bad Request", body.into_bytes());
    assert_cut(&["check"], &kinesis_sink(port));
    assert_cut(&["run"], &kinesis_sink(port));
}

#[test]
fn wall_02_a_text_of_postgresql_is_cut_and_one_line() {
    let text = format!("{FORGED}{}", "x".repeat(20 << 20));
    let fields = format!("SERROR\0VERROR\0CP0001\0M{text}\0D{FORGED}\0H{FORGED}\0\0");
    let answer = [message(b'E', fields.as_bytes()), message(b'Z', b"I")].concat();
    let port = postgres(move |connection| {
        while connection.read(&mut [0; 4_096]).is_ok_and(|bytes| bytes > 0) {
            if connection.write_all(&answer).is_err() {
                return;
            }
        }
    });
    assert_cut(&["check"], &postgres_sink(port));
    assert_cut(&["run"], &postgres_sink(port));
}

#[test]
fn wall_02_a_text_of_a_store_is_cut_and_one_line() {
    let text = format!("{FORGED}{}", "x".repeat(3 << 20));
    let port = refusing("400 Bad Request", text.into_bytes());
    assert_cut(&["objects", "verify", "--sink", "out"], &objects_sink(port));
}

#[test]
fn wall_02_informational_heads_of_kinesis_without_end_are_given_up() {
    let port = server(|mut connection| {
        let mut reader = BufReader::new(connection.try_clone().expect("cloned"));
        let length = read_head(&mut reader);
        let _ = reader.read_exact(&mut vec![0; length]);
        let heads = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(10_000);
        for _ in 0..FLOOD_BYTES / heads.len() {
            if connection.write_all(&heads).is_err() {
                return;
            }
        }
    });
    let cause = "expected an answer after at most 16 informational heads";
    assert_given_up(&["check"], &kinesis_sink(port), cause);
}

#[test]
fn wall_02_an_answer_of_which_a_byte_comes_now_and_then_is_given_up() {
    let port = http(vec![b' '], 10_000, Duration::from_millis(100));
    assert_given_up(&["check"], &kinesis_sink(port), "sent nothing, or too little, for 2s");
}

/// To learn a type, the client queries it. The answer has a column of another type that the client does not know
/// either.
#[test]
fn wall_02_a_server_that_names_unknown_types_without_end_is_given_up() {
    let port = postgres(|connection| {
        let mut asked = [0; 4_096];
        let column = |kind: u32| {
            let mut column = b"T\0\0\0\x1a\0\x01a\0\0\0\0\0\0\0".to_vec();
            column.extend(kind.to_be_bytes());
            column.extend(b"\xff\xff\xff\xff\xff\xff\0\0");
            column
        };
        let mut kind = 99_999_999;
        // Each query ends with a Sync.
        while connection.read(&mut asked).is_ok_and(|bytes| bytes > 0) {
            kind += 1;
            let answer =
                [&b"1\0\0\0\x04"[..], b"t\0\0\0\x06\0\0", &column(kind), b"Z\0\0\0\x05T"].concat();
            if connection.write_all(&answer).is_err() {
                return;
            }
        }
    });
    let cause = "one unknown type after the other";
    assert_given_up(&["check"], &postgres_sink(port), cause);
}

#[test]
fn wall_02_an_answer_of_kinesis_with_values_without_end_is_given_up() {
    let port = http(b"[{},{},{},{},{},{},{},{},".repeat(10_000), 60 << 20, Duration::ZERO);
    let cause = "expected an answer of at most 120000 values";
    assert_given_up(&["check"], &kinesis_sink(port), cause);
}

/// Shards that are read at the same time.
const LANES: usize = 16;

/// Number of complete answers that were sent, by shard.
type Taken = Arc<Mutex<HashMap<String, usize>>>;

/// Reads a call of the Kinesis API; returns its operation and body, or `None` when the connection has ended.
fn read_call(reader: &mut impl std::io::BufRead) -> Option<(String, Value)> {
    let (mut call, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        let Some((name, value)) = line.trim().split_once(':') else {
            if line.trim().is_empty() {
                break;
            }
            continue;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().expect("a length"),
            "x-amz-target" => call = value.rsplit('.').next().unwrap_or_default().to_owned(),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((call, serde_json::from_slice(&body).unwrap_or_default()))
}

/// Starts a server of a stream that answers each GetRecords with all of these records, whatever limit the request
/// has. `says_length`: whether each answer has a Content-Length.
fn large_stream(records: Arc<str>, says_length: bool, taken: Taken) -> u16 {
    let shard = |index: usize| {
        let hash = |index: usize| (index as u128 * 10_u128.pow(36)).to_string();
        json!({
            "ShardId": format!("shardId-{index:012}"),
            "HashKeyRange": { "StartingHashKey": hash(index), "EndingHashKey": hash(index + 1) },
            "SequenceNumberRange": { "StartingSequenceNumber": "1" },
        })
    };
    let summary = json!({
        "StreamName": "s", "StreamARN": "arn:aws:kinesis:us-east-1:1:stream/s", "StreamStatus": "ACTIVE",
        "RetentionPeriodHours": 24, "StreamCreationTimestamp": 1.7e9, "EnhancedMonitoring": [],
        "OpenShardCount": LANES,
    });
    let summary = json!({ "StreamDescriptionSummary": summary }).to_string();
    let shards = json!({ "Shards": (0..LANES).map(shard).collect::<Vec<_>>() }).to_string();
    server(move |mut connection| {
        let mut reader = BufReader::new(connection.try_clone().expect("cloned"));
        while let Some((call, asked)) = read_call(&mut reader) {
            // The iterator of a shard is its name.
            let name = |key: &str| asked[key].as_str().unwrap_or_default().to_owned();
            let is_read = call == "GetRecords";
            let (status, answer) = match call.as_str() {
                "DescribeStreamSummary" => ("200 OK", summary.clone()),
                "ListShards" => ("200 OK", shards.clone()),
                "GetShardIterator" => {
                    ("200 OK", json!({ "ShardIterator": name("ShardId") }).to_string())
                }
                "GetRecords" => {
                    let iterator = name("ShardIterator");
                    let rest =
                        format!("\"NextShardIterator\":\"{iterator}\",\"MillisBehindLatest\":0");
                    ("200 OK", format!("{{{rest},\"Records\":{records}}}"))
                }
                _ => (
                    "400 Bad Request",
                    json!({ "__type": "UnknownOperationException" }).to_string(),
                ),
            };
            let length = match is_read && !says_length {
                true => "connection: close".to_owned(),
                false => format!("content-length: {}", answer.len()),
            };
            let date = chrono::Utc::now().format("%a, %d %b %Y %H:%M:%S GMT");
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/x-amz-json-1.1\r\ndate: {date}\r\n{length}\r\n\r\n"
            );
            let sent = connection.write_all(head.as_bytes());
            if sent.and_then(|()| connection.write_all(answer.as_bytes())).is_err() {
                return;
            }
            if is_read {
                *taken.lock().expect("a lock").entry(name("ShardIterator")).or_default() += 1;
            }
            if is_read && !says_length {
                return;
            }
        }
    })
}

/// Encodes this many records of this size, as in an answer.
fn records(count: usize, bytes: usize) -> Arc<str> {
    use base64::Engine as _;
    let data = base64::prelude::BASE64_STANDARD.encode(vec![b'x'; bytes]);
    let record = |index: usize| {
        json!({
            "SequenceNumber": (index + 1).to_string(), "PartitionKey": "k", "Data": data,
            "ApproximateArrivalTimestamp": 1.7e9,
        })
    };
    Value::from((0..count).map(record).collect::<Vec<_>>()).to_string().into()
}

/// A server that gives each of many lanes more than it requested: the most that a call of AWS may return, the most
/// that is accepted at all, and many records without bytes.
#[test]
fn wall_02_answers_of_many_lanes_stay_within_the_printed_bound() {
    for (what, count, bytes, says_length) in [
        ("ten records of a megabyte", 10, 1_000_000, true),
        ("ten records of a megabyte, of unknown length", 10, 1_000_000, false),
        ("three records of five megabytes", 3, 5_000_000, true),
        ("20,000 records of a byte", 20_000, 1, true),
    ] {
        let taken = Taken::default();
        let port = large_stream(records(count, bytes), says_length, taken.clone());
        let folder = tempfile::tempdir().expect("a folder");
        let path = PipelineToml::new(folder.path(), "lanes")
            .pipeline("buffer = \"16 MiB\"")
            .stream(
                "s",
                &format!("http://127.0.0.1:{port}"),
                "region = \"us-east-1\"\nformat = \"application/octet-stream\"\nstart = \"trim-horizon\"",
            )
            .table("[[sink]]\nname = \"out\"\ntype = \"discard\"")
            .write();
        let file = |name: &str| std::fs::File::create(folder.path().join(name)).expect("a file");
        let mut command = shardmill(&["run", &path]);
        let command = command.stdout(file("out")).stderr(file("log"));
        let run = Process(command.spawn().expect("it starts"));
        let said = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("text");
        // Several answers per lane, so that lanes that read first also read together with the others.
        wait_for(&format!("{what}, of all lanes"), || {
            let taken = taken.lock().expect("a lock");
            taken.len() == LANES && taken.values().all(|answers| *answers >= 3)
        });
        let printed = said("out");
        let bound = printed.lines().find(|line| line.starts_with("memory: at most "));
        let bound = bound.unwrap_or_else(|| panic!("{printed}{}", said("log")));
        assert!(bound.contains(&format!("with {LANES} lanes")), "{bound}");
        let mib = bound.split(' ').nth(3).and_then(|mib| mib.parse::<u64>().ok());
        println!("{what}: {bound}");
        assert_below(&run, mib.expect("a number") * MIB);
    }
}
