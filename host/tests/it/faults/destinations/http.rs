//! The HTTP sink against a server whose answers are unusual.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Lines, ids};
use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World};
use crate::support::{Process, run_ok, shardmill, wait_for};

/// Server's reaction to a request that it has read: it writes to the connection. If it returns false, the connection
/// is closed.
type Answer = dyn Fn(usize, &str, &mut TcpStream) -> bool + Send + Sync;

/// Endpoint whose answers come from a function of the request's number and body.
#[derive(Clone)]
struct Endpoint {
    port: u16,
    connections: Arc<AtomicUsize>,
    /// Arrival time and body of each request.
    requests: Arc<Mutex<Vec<(Instant, String)>>>,
    answer: Arc<Answer>,
}

impl Endpoint {
    fn start(answer: impl Fn(usize, &str, &mut TcpStream) -> bool + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (connections, requests) = Default::default();
        let endpoint = Self { port, connections, requests, answer: Arc::new(answer) };
        let serving = endpoint.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                serving.connections.fetch_add(1, Ordering::SeqCst);
                let serving = serving.clone();
                std::thread::spawn(move || serving.serve(connection));
            }
        });
        endpoint
    }

    fn serve(&self, mut connection: TcpStream) {
        let mut reader = BufReader::new(connection.try_clone().expect("cloned"));
        while let Some(body) = read_request(&mut reader) {
            let number = {
                let mut requests = self.requests.lock().expect("a lock");
                requests.push((Instant::now(), body.clone()));
                requests.len() - 1
            };
            if !(self.answer)(number, &body, &mut connection) {
                return;
            }
        }
    }

    /// Returns the rows of all requests.
    fn rows(&self) -> Vec<String> {
        let requests = self.requests.lock().expect("a lock");
        let rows = |(_, body): &(Instant, String)| -> Vec<String> {
            let rows: Vec<serde_json::Value> = serde_json::from_str(body).expect("an array");
            rows.iter().map(ToString::to_string).collect()
        };
        requests.iter().flat_map(rows).collect()
    }

    fn lines(&self, rows: &[String], sink: &str) -> Lines {
        let url = format!("http://127.0.0.1:{}/events", self.port);
        Lines::new(rows, |_| {
            format!("type = \"http\"\nurl = \"{url}\"\nprivate = true\ntimeout = \"20 s\"\n{sink}")
        })
    }
}

/// Reads a request's head and body; `None` if the connection has ended.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut length = 0;
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().expect("a length");
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(String::from_utf8(body).expect("text"))
}

/// Writes as much as the client accepts.
fn say(connection: &mut TcpStream, text: &str) {
    let _ = connection.write_all(text.as_bytes());
}

/// Starts a run in the background; returns its log's path too.
fn start(lines: &Lines) -> (Process, std::path::PathBuf) {
    let log = lines.at("run.log");
    let mut command = shardmill(&["run", &lines.path()]);
    let file = std::fs::File::create(&log).expect("a log");
    let run = command.stdout(std::process::Stdio::null()).stderr(file).spawn();
    (Process(run.expect("the binary starts")), log)
}

#[test]
fn fault_27_a_2xx_head_is_the_answer_whatever_its_body() {
    let many: String = (0..300).map(|n| format!("x-header-{n}: v\r\n")).collect();
    let answers: Vec<(&str, Box<Answer>)> = vec![
        (
            "a body that is cut",
            Box::new(|_, _, to: &mut TcpStream| {
                say(to, "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf");
                false
            }),
        ),
        (
            "a body that is badly chunked",
            Box::new(|_, _, to: &mut TcpStream| {
                say(to, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nwhat\r\n");
                false
            }),
        ),
        (
            "a body that never comes",
            Box::new(|_, _, to: &mut TcpStream| {
                say(to, "HTTP/1.1 201 Created\r\ncontent-length: 9\r\n\r\n");
                // Blocks until the client closes the connection.
                let _ = to.read(&mut [0]);
                false
            }),
        ),
        (
            "a body of 32 MiB",
            Box::new(|_, _, to: &mut TcpStream| {
                say(to, "HTTP/1.1 200 OK\r\ncontent-length: 33554432\r\n\r\n");
                let piece = "x".repeat(1 << 20);
                (0..32).for_each(|_| say(to, &piece));
                true
            }),
        ),
        (
            "a body to the end of an HTTP/1.0 connection",
            Box::new(|_, _, to: &mut TcpStream| {
                say(to, "HTTP/1.0 200 OK\r\n\r\nthanks");
                false
            }),
        ),
        (
            "no body",
            Box::new(|_, _, to: &mut TcpStream| {
                say(to, "HTTP/1.1 204 No Content\r\n\r\n");
                true
            }),
        ),
        (
            "other heads first",
            Box::new(|_, _, to: &mut TcpStream| {
                say(
                    to,
                    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: <x>\r\n\r\n",
                );
                say(to, "HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\nok");
                true
            }),
        ),
        (
            "a body that is not gzip",
            Box::new(|_, _, to: &mut TcpStream| {
                say(
                    to,
                    "HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc",
                );
                true
            }),
        ),
        (
            "many headers, and odd ones",
            Box::new(move |_, _, to: &mut TcpStream| {
                say(
                    to,
                    &format!("HTTP/1.1 200 OK\r\n{many}odd header: v\r\ncontent-length: 0\r\n\r\n"),
                );
                true
            }),
        ),
    ];
    for (what, answer) in answers {
        let endpoint = Endpoint::start(answer);
        let lines = endpoint.lines(&ids(1_000), "");
        let begun = Instant::now();
        let log = lines.run();
        assert_eq!(endpoint.rows(), ids(1_000), "{what}: {log}");
        assert!(!log.contains("blocked"), "{what}: {log}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} took {:?}", begun.elapsed());
    }
}

#[test]
fn fault_27_success_before_the_request_was_sent_is_none() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let taken = Arc::new(Mutex::new(Vec::new()));
    let takes = taken.clone();
    std::thread::spawn(move || {
        for (number, connection) in listener.incoming().map_while(Result::ok).enumerate() {
            let mut to = connection.try_clone().expect("cloned");
            let mut reader = BufReader::new(connection);
            if number == 0 {
                // Reads the head only. Closing the connection then loses the bytes that are still on their way.
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                    line.clear();
                }
                say(&mut to, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
                continue;
            }
            while let Some(body) = read_request(&mut reader) {
                takes.lock().expect("a lock").push(body);
                say(&mut to, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
            }
        }
    });
    let row = |id: u64| format!("{{\"id\":{id},\"text\":\"{}\"}}", "x".repeat(500_000));
    let rows: Vec<String> = (0..40).map(row).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("rows.ndjson");
    std::fs::write(&file, rows.join("\n") + "\n").expect("written");
    let sink = format!(
        "[[sink]]\nname = \"out\"\ntype = \"http\"\nurl = \"http://127.0.0.1:{port}/\"\n\
         private = true\n[sink.commit]\nrows = 1000\nbytes = \"40 MiB\"\nlinger = \"20 s\""
    );
    let pipeline = PipelineToml::new(folder.path(), "early")
        .file(&file, "")
        .route_all_to(&["out"])
        .table(&sink);
    let log = Lines { folder, file: pipeline }.run();
    let taken = taken.lock().expect("a lock");
    let found: usize = taken.iter().map(|body| body.matches("\"id\":").count()).sum();
    assert_eq!(found, 40, "{log}");
    assert!(log.contains("before the whole request was sent") || log.contains("blocked"), "{log}");
}

#[test]
fn fault_27_retry_after_is_obeyed_in_both_forms() {
    let now = "Sun, 06 Nov 1994 08:49:37 GMT";
    let soon = "Sun, 06 Nov 1994 08:49:39 GMT";
    for header in ["retry-after: 2".to_owned(), format!("date: {now}\r\nretry-after: {soon}")] {
        for status in [429, 503] {
            let header = header.clone();
            let endpoint = Endpoint::start(move |number, _, to| {
                match number {
                    0 => say(
                        to,
                        &format!("HTTP/1.1 {status} X\r\n{header}\r\ncontent-length: 0\r\n\r\n"),
                    ),
                    _ => say(to, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
                }
                true
            });
            let log = endpoint.lines(&ids(3), "").run();
            let requests = endpoint.requests.lock().expect("a lock");
            assert_eq!(requests.len(), 2, "{log}");
            let pause = requests[1].0 - requests[0].0;
            assert!(pause >= Duration::from_millis(1_900), "{status}: {pause:?}");
            assert!(log.contains("2 s (Retry-After)"), "{log}");
        }
    }
}

/// The deadline `drain` applies to a stop that somebody requests. A run that ends by itself ends once everything is
/// committed.
#[test]
fn fault_01_a_run_until_caught_up_waits_for_its_sinks() {
    const REFUSED: usize = 60;
    let world = World::new(2);
    world.put(0..10, 4);
    let endpoint = Endpoint::start(|number, _, to| {
        let status = if number < REFUSED { "503 X" } else { "200 OK" };
        say(to, &format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n"));
        true
    });
    let sink =
        format!("type = \"http\"\nprivate = true\nurl = \"http://127.0.0.1:{}/x\"", endpoint.port);
    let file = PipelineToml::new(world.folder.path(), "patient")
        // The drain lasts for only a third of the requests that fail before the first one is taken.
        .timing("drain = \"1 s\"\nretry_pause = \"50 ms\"\ncheckpoint = \"50 ms\"\n")
        .stream(STREAM, "embedded", "poll_interval = \"200 ms\"")
        .route_all_to(&["mart"])
        .sink("mart", &sink)
        .write();
    run_ok(&["run", &file, "--until-caught-up"]);
    let requests = endpoint.requests.lock().expect("a lock");
    let taken: usize =
        requests.iter().skip(REFUSED).map(|(_, body)| body.matches("\"id\":").count()).sum();
    assert_eq!(taken, 10);
}

#[test]
fn fault_27_other_answers_keep_the_rows_waiting_and_say_why() {
    for (status, part) in [
        (301, "Location: https://elsewhere.example/events)"),
        (308, "redirects are not followed"),
        (404, "set `url`"),
        (405, "accepts POST"),
        (409, "refuse = [409]"),
        (207, "207"),
        (500, "answered 500"),
    ] {
        let open = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let opened = open.clone();
        let endpoint = Endpoint::start(move |_, _, to| {
            let (status, location) = match opened.load(Ordering::SeqCst) {
                true => (200, ""),
                false => {
                    (status, "location: https://u:secret@elsewhere.example/events?token=secret\r\n")
                }
            };
            say(to, &format!("HTTP/1.1 {status} X\r\n{location}content-length: 3\r\n\r\nwhy"));
            true
        });
        let lines = endpoint.lines(&ids(10), "");
        let (mut run, log) = start(&lines);
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        wait_for(part, || said().contains(part));
        assert!(said().contains("blocked") && !said().contains("secret"), "{}", said());
        open.store(true, Ordering::SeqCst);
        assert!(run.wait().success(), "{}", said());
        assert!(lines.reasons().is_empty(), "{status}");
    }
}

#[test]
fn fault_27_a_status_can_be_made_the_rows_fault() {
    let endpoint = Endpoint::start(|_, body, to| {
        let status = if body.contains("\"id\":7}") { 409 } else { 200 };
        say(to, &format!("HTTP/1.1 {status} X\r\ncontent-length: 5\r\n\r\ntwice"));
        true
    });
    let lines = endpoint.lines(&ids(100), "refuse = [409]");
    lines.run();
    assert_eq!(lines.reasons(), ["answered 409: twice"]);
}

#[test]
fn fault_31_check_sends_nothing() {
    let endpoint = Endpoint::start(|_, _, _| false);
    let (sound, said) = endpoint.lines(&ids(1), "").check(&[]);
    assert!(sound, "{said}");
    assert_eq!(endpoint.connections.load(Ordering::SeqCst), 0);
}

#[test]
fn fault_31_check_puts_no_record_on_a_stream() {
    let world = crate::support::world::World::new(1);
    let rows = world.folder.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\n").expect("written");
    let stream = crate::support::world::STREAM;
    let file = crate::support::pipeline::PipelineToml::new(world.folder.path(), "onward")
        .file(&rows, "")
        .route_all_to(&["out"])
        .sink(
            "out",
            &format!("type = \"kinesis\"\nstream = \"{stream}\"\nendpoint = \"embedded\""),
        );
    let path = file.write();
    crate::support::run_ok(&["check", &path]);
    crate::support::run_ok(&["check", &path, "--write"]);
    let state = world.folder.path().join("state").display().to_string();
    let tail = crate::support::run_ok(&[
        "stream",
        "tail",
        "--stream",
        stream,
        "--endpoint",
        "embedded",
        "--state-dir",
        &state,
        "--from",
        "trim-horizon",
        "--no-follow",
        "--json",
    ]);
    assert_eq!(tail, "");
}
