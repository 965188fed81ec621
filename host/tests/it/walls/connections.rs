//! Connections, hosts, origins and tokens of the ports.

mod hosts;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::world::{Pipeline, World, row};
use crate::support::{Process, free_port, run, serve_stream, shardmill, wait_for};
use crate::walls::memory::{LIMITS, assert_below, bound};

/// Far below the default deadlines, and far above the time of an answer.
const SOON: Duration = Duration::from_secs(8);
/// Deadlines that are short enough for a test.
const SHORT: &str = "http_head = \"300 ms\"\nhttp_body = \"400 ms\"\nhttp_idle = \"600 ms\"\n";

/// Running pipeline with an admin port and an intake.
struct Ports {
    world: World,
    run: Process,
    admin: u16,
    intake: u16,
}

impl Ports {
    /// Starts a pipeline with these lines of `[admin]`, `[intake]` and `[timing]`.
    fn start(admin_lines: &str, intake_lines: &str, timing: &str) -> Self {
        Self::start_with(admin_lines, intake_lines, timing, None, "")
    }

    /// Like `start`, with another stage than the one that passes rows on, and under limits of the shell's `ulimit`.
    fn start_with(
        admin_lines: &str,
        intake_lines: &str,
        timing: &str,
        stage: Option<String>,
        ulimit: &str,
    ) -> Self {
        let world = World::new(1);
        let (admin, intake) = (free_port(), free_port());
        let sink = format!(
            "[admin]\nlisten = \"127.0.0.1:{admin}\"\n{admin_lines}\n\
             [intake]\nlisten = \"127.0.0.1:{intake}\"\n{intake_lines}"
        );
        let pipeline = Pipeline {
            settings: "buffer = \"8 MiB\"".into(),
            sink,
            timing: timing.into(),
            stage: stage.or_else(|| Some(through())),
            ..Pipeline::default()
        };
        let file = world.pipeline(&pipeline);
        let log = std::fs::File::create(world.log()).expect("a log");
        let mut command = Command::new("bash");
        let binary = env!("CARGO_BIN_EXE_shardmill");
        let script = format!("{ulimit}\nexec '{binary}' run '{file}' -v");
        let command = command.args(["-c", &script]).stdin(Stdio::null());
        let run = Process(command.stdout(Stdio::null()).stderr(log).spawn().expect("it starts"));
        wait_for("the run to read", || world.logged("reading"));
        wait_for("the ports", || {
            [(admin, "/health/live"), (intake, "/health")]
                .iter()
                .all(|(port, path)| ask(*port, "GET", path, "", b"").contains("200 OK"))
        });
        Self { world, run, admin, intake }
    }

    /// Asserts that the run has stayed below its memory bound. The bound's formula does not count requests in flight
    /// and connections, so these must fit into the allowance for the process itself.
    fn assert_memory(&self) {
        assert_below(&self.run, bound(8, 8, 1, 1));
    }

    fn folder(&self) -> PathBuf {
        self.world.folder.path().join("state/reading")
    }

    fn file(&self) -> String {
        self.world.folder.path().join("pipeline.toml").display().to_string()
    }

    /// Returns the token that the run has written, as a header.
    fn token(&self) -> String {
        let token = std::fs::read_to_string(self.folder().join("admin.token")).expect("a token");
        bearer(token.trim())
    }
}

/// Returns a stage that passes rows on unchanged.
fn through() -> String {
    let plugin = crate::support::plugin("route-json");
    format!("plugin = \"{plugin}\"\nconfig = {{ default = \"all\", rules = [] }}\n{LIMITS}")
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

fn open(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.set_read_timeout(Some(SOON)).expect("set");
    stream.set_write_timeout(Some(SOON)).expect("set");
    stream
}

/// Sends one request, to `localhost` unless the headers contain a `Host`; returns the whole answer, or an empty text.
fn ask(port: u16, method: &str, path: &str, headers: &str, body: &[u8]) -> String {
    let host = if headers.contains("Host:") { "" } else { "Host: localhost\r\n" };
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    stream.set_read_timeout(Some(SOON)).expect("set");
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\n{host}Connection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

fn post(port: u16, body: &[u8]) -> String {
    ask(port, "POST", "/events", "Content-Type: application/json\r\n", body)
}

/// Opens a connection that announces a body and sends the beginning of it.
fn declare(port: u16, declared: usize, sent: usize) -> TcpStream {
    let mut stream = open(port);
    let head =
        format!("POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: {declared}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(&vec![b'x'; sent]).expect("sent");
    stream
}

/// Whether the other end closes a connection within this time.
fn is_closed_within(stream: &mut TcpStream, time: Duration) -> bool {
    stream.set_read_timeout(Some(time)).expect("set");
    let mut bytes = [0; 4_096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => {
                return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            }
        }
    }
}

#[test]
fn wall_03_idle_connections_use_up_no_descriptors() {
    let ports = Ports::start_with("", "", "", None, "ulimit -n 256");
    let control = std::fs::read(ports.folder().join("control.json")).expect("an address");
    let control: serde_json::Value = serde_json::from_slice(&control).expect("JSON");
    let control: std::net::SocketAddr =
        control["address"].as_str().expect("text").parse().expect("an address");
    let mut idle = Vec::new();
    for port in [ports.admin, ports.intake, control.port()] {
        idle.extend((0..400).map(|_| open(port)));
        // Some of them send half a head, too.
        for stream in idle.iter_mut().rev().take(100) {
            // The server has closed some of these connections to make room, so this may fail.
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x");
        }
    }
    let begun = Instant::now();
    for (port, path) in [(ports.admin, "/health/live"), (ports.intake, "/health")] {
        let answer = ask(port, "GET", path, "", b"");
        assert_eq!(status(&answer), "200", "{path}: {answer}");
    }
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    // The pipeline goes on and the ports serve: the connection that has waited longest for its client is closed to
    // make room.
    wait_for("an event to be taken", || status(&post(ports.intake, &row(0, 1))) == "200");
    ports.world.wait_rows(1);
    wait_for("the metrics", || status(&ask(ports.admin, "GET", "/metrics", "", b"")) == "200");
    let output = run(&["reload", &ports.file(), "--dry-run"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let log = std::fs::read_to_string(ports.world.log()).expect("a log");
    assert!(!log.contains("Too many open files"), "{log}");
    ports.assert_memory();
    drop(idle);
    assert_eq!(ports.run.terminate(), Some(0));
}

#[test]
fn wall_03_a_full_port_answers_health() {
    let ports = Ports::start("", "connections = 4", "");
    let idle: Vec<_> = (0..40).map(|_| open(ports.intake)).collect();
    let answer = ask(ports.intake, "GET", "/health", "", b"");
    assert_eq!(status(&answer), "200", "{answer}");
    wait_for("room", || status(&post(ports.intake, &row(0, 1))) == "200");
    let metrics = ask(ports.admin, "GET", "/metrics", "", b"");
    assert!(metrics.contains("shardmill_port_connections{port=\"intake\"}"), "{metrics}");
    drop(idle);
}

#[test]
fn wall_03_a_flood_of_halves_of_heads_pushes_out_no_health_check() {
    let ports = Ports::start("connections = 4", "", "");
    let admin = ports.admin;
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut halves = std::collections::VecDeque::new();
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                if let Ok(mut half) = TcpStream::connect(("127.0.0.1", admin)) {
                    let _ = half.write_all(b"GET /health/live HTTP/1.1\r\nHost: x");
                    halves.push_back(half);
                }
                if halves.len() > 100 {
                    halves.pop_front();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let checks = (0..200).map(|_| ask(admin, "GET", "/health/live", "", b""));
        let failed: Vec<String> = checks.filter(|answer| status(answer) != "200").collect();
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(failed.is_empty(), "{} of 200: {failed:?}", failed.len());
    });
}

#[test]
fn wall_03_clients_that_ask_all_the_time_leave_room_for_others() {
    let ports = Ports::start("connections = 4", "", "");
    let mut asking: Vec<_> = (0..4).map(|_| open(ports.admin)).collect();
    let mut answered = 0;
    wait_for("room for another client", || {
        for connection in &mut asking {
            // The server may have closed this connection to make room.
            let _ = connection.write_all(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n");
            answered += connection.read(&mut [0; 1_024]).unwrap_or(0);
        }
        status(&ask(ports.admin, "GET", "/metrics", "", b"")) == "200"
    });
    assert!(answered > 0, "none of them was answered");
}

#[test]
fn wall_03_a_body_that_is_declared_and_not_sent_occupies_nothing() {
    let ports = Ports::start("", "body = \"32 KiB\"\nin_flight = \"64 KiB\"", "");
    let _declared: Vec<_> = (0..20).map(|_| declare(ports.intake, 32 << 10, 0)).collect();
    let answer = post(ports.intake, &row(0, 1));
    assert_eq!(status(&answer), "200", "{answer}");
    ports.world.wait_rows(1);
    ports.assert_memory();
}

/// Two hundred bodies of one mebibyte, each without its last byte, while only 4 MiB may be in flight.
#[test]
fn wall_03_bodies_that_stall_occupy_no_more_than_may_be_in_flight() {
    const BODY: usize = 1 << 20;
    let ports = Ports::start("", "body = \"1 MiB\"\nin_flight = \"4 MiB\"", "");
    let stall = |_: usize| {
        let mut stream = open(ports.intake);
        let head =
            format!("POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BODY}\r\n\r\n");
        // Bodies that do not fit are answered, and their connections closed, before everything is sent.
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&vec![b'x'; BODY - 1]);
        stream
    };
    let stalled: Vec<_> = (0..200).map(stall).collect();
    wait_for("room for another body", || status(&post(ports.intake, &row(0, 1))) == "200");
    ports.world.wait_rows(1);
    ports.assert_memory();
    drop(stalled);
}

#[test]
fn wall_03_a_body_that_stalls_gives_its_bytes_back() {
    let ports = Ports::start("", "body = \"32 KiB\"\nin_flight = \"64 KiB\"", "");
    let mut stalled: Vec<_> = (0..3).map(|_| declare(ports.intake, 20_001, 20_000)).collect();
    let begun = Instant::now();
    let large = vec![b'x'; 30_000];
    wait_for("room for another body", || {
        status(&ask(ports.intake, "POST", "/events", "", &large)) == "200"
    });
    // Their deadline is 30 s, so they were closed earlier, to make room.
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    // Each closed connection gets an answer.
    let gave_way = stalled.iter_mut().filter_map(|stream| {
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("set");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).ok().map(|()| answer)
    });
    let answers: Vec<_> = gave_way.collect();
    assert!(!answers.is_empty(), "none got an answer");
    assert!(answers.iter().all(|answer| answer == b"HTTP/1.1 429"), "{answers:?}");
    ports.assert_memory();
}

/// Writes a byte to each connection now and then: far slower than the minimum pace, but without a pause long enough
/// to count as a wait.
struct Drip {
    connections: Vec<TcpStream>,
    last: Instant,
}

impl Drip {
    fn to(connections: Vec<TcpStream>) -> Self {
        Self { connections, last: Instant::now() }
    }

    fn a_byte(&mut self) {
        if self.last.elapsed() > Duration::from_millis(200) {
            self.last = Instant::now();
            for connection in &mut self.connections {
                // Some of these connections were closed to make room.
                let _ = connection.write_all(b"x");
            }
        }
    }
}

#[test]
fn wall_03_a_body_of_which_a_byte_comes_now_and_then_gives_its_bytes_back() {
    let ports = Ports::start("", "body = \"32 KiB\"\nin_flight = \"64 KiB\"", "");
    let declared = (0..3).map(|_| declare(ports.intake, 20_400, 20_000));
    let mut drip = Drip::to(declared.collect());
    let begun = Instant::now();
    let large = vec![b'x'; 30_000];
    wait_for("room for another body", || {
        drip.a_byte();
        status(&ask(ports.intake, "POST", "/events", "", &large)) == "200"
    });
    // Their deadline is 30 s, so they were closed earlier, to make room.
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    ports.assert_memory();
}

#[test]
fn wall_03_bodies_of_which_a_byte_comes_now_and_then_make_room_at_a_full_port() {
    let ports = Ports::start("", "connections = 4", "");
    let mut drip = Drip::to((0..4).map(|_| declare(ports.intake, 1_000, 1)).collect());
    let begun = Instant::now();
    wait_for("room for another connection", || {
        drip.a_byte();
        status(&post(ports.intake, &row(0, 1))) == "200"
    });
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
}

#[test]
fn wall_03_every_wait_for_a_client_ends() {
    let ports = Ports::start("", "", SHORT);
    for port in [ports.admin, ports.intake] {
        let mut idle = open(port);
        assert!(is_closed_within(&mut idle, SOON), "an idle connection to {port}");
        let mut half = open(port);
        half.write_all(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Le").expect("sent");
        assert!(is_closed_within(&mut half, SOON), "half a head to {port}");
        // Answers that the client does not read.
        let mut unread = open(port);
        let request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100);
        let begun = Instant::now();
        while unread.write_all(&request).is_ok() {
            assert!(begun.elapsed() < 2 * SOON, "{port} keeps a client that reads nothing");
        }
        assert!(begun.elapsed() < SOON, "{port}: {:?}", begun.elapsed());
    }
    // A byte now and then does not extend the deadline of a body.
    let mut slow = declare(ports.intake, 1_000, 1);
    let begun = Instant::now();
    let mut answer = [0; 12];
    slow.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
    while slow.read_exact(&mut answer).is_err() {
        assert!(begun.elapsed() < SOON, "a slow body keeps its connection");
        let _ = slow.write_all(b"x");
    }
    assert_eq!(&answer, b"HTTP/1.1 408");
}

/// Returns a stage that rejects everything, so that its lane blocks with a cause.
fn rejecting() -> Option<String> {
    let plugin = crate::support::plugin("hostile");
    Some(format!(
        "plugin = \"{plugin}\"\nconfig = {{ reject_on = '', routes = [\"all\"], \
         format = \"application/json\" }}"
    ))
}

#[test]
fn wall_05_health_names_no_cause_without_the_token() {
    let read = bearer("reads");
    let lines = "read_token = \"reads\"\nhosts = [\"mill.example\"]";
    let ports = Ports::start_with(lines, "", "", rejecting(), "");
    ports.world.put(0..300, 10);
    let ready = |headers: &str| ask(ports.admin, "GET", "/health/ready", headers, b"");
    wait_for("the lane to block", || status(&ready("")) == "503");
    for headers in ["", &read, &bearer("wrong"), "Host: evil.example\r\n"] {
        assert_eq!(body(&ready(headers)), "blocked\n", "{headers}");
        let live = ask(ports.admin, "GET", "/health/live", headers, b"");
        assert_eq!((status(&live), body(&live)), ("200", "live\n"), "{headers}");
    }
    assert!(ready(&ports.token()).contains("rejected_in_a_row"), "{}", ready(&ports.token()));

    // The read token gives access to two routes, under any host name, and to nothing that changes anything.
    let named = format!("{read}Host: evil.example\r\n");
    for path in ["/metrics", "/status"] {
        for (headers, code) in [
            (read.as_str(), "200"),
            (named.as_str(), "200"),
            (ports.token().as_str(), "200"),
            ("", "401"),
            (bearer("wrong").as_str(), "401"),
        ] {
            let answer = ask(ports.admin, "GET", path, headers, b"");
            assert_eq!(status(&answer), code, "{path} {headers}: {answer}");
        }
    }
    // Causes may quote records, which the read token must not show.
    for (headers, is_cause_shown) in [(&read, false), (&ports.token(), true)] {
        let answer = ask(ports.admin, "GET", "/status", headers, b"");
        assert!(answer.contains("\"blocked\":{\""), "{answer}");
        assert_eq!(answer.contains("rejected_in_a_row"), is_cause_shown, "{answer}");
    }
    for (method, path) in CHANGES {
        let answer = ask(ports.admin, method, path, &read, b"");
        assert_eq!(status(&answer), "403", "{path}: {answer}");
        assert!(answer.contains("permits only /metrics and /status"), "{answer}");
    }
}

#[test]
fn wall_05_without_a_token_the_host_is_known() {
    let ports = Ports::start("hosts = [\"mill.example\"]", "", "");
    for path in ["/metrics", "/status"] {
        for (headers, code) in [
            ("Host: 127.0.0.1\r\n", "200"),
            ("Host: [::1]:80\r\n", "200"),
            ("Host: localhost:9901\r\n", "200"),
            ("Host: Mill.example\r\n", "200"),
            ("Host: evil.example\r\n", "403"),
            ("Host: 127.0.0.1.evil.example\r\n", "403"),
            ("Host: [::1].evil.example\r\n", "403"),
            ("Host: localhost:abc\r\n", "403"),
            ("Host: localhost\r\nHost: evil.example\r\n", "403"),
            ("Host: localhost\r\nOrigin: https://evil.example\r\n", "403"),
        ] {
            let answer = ask(ports.admin, "GET", path, headers, b"");
            assert_eq!(status(&answer), code, "{path} {headers}: {answer}");
        }
        let named = format!("{}Host: evil.example\r\n", ports.token());
        assert_eq!(status(&ask(ports.admin, "GET", path, &named, b"")), "200");
    }
}

#[test]
fn wall_05_the_intake_takes_events_of_configured_pages_only() {
    let ports = Ports::start("", "origins = [\"https://app.example\"]", "");
    let send = |headers: &str, id: u64| {
        let headers = format!("Content-Type: application/json\r\n{headers}");
        ask(ports.intake, "POST", "/events", &headers, &row(id, 1))
    };
    for origin in ["https://evil.example", "null", "http://app.example", "https://app.example:8443"]
    {
        let answer = send(&format!("Origin: {origin}\r\n"), 9);
        assert_eq!(status(&answer), "403", "{origin}: {answer}");
        assert!(answer.contains("[intake]"), "{answer}");
    }
    let answer = send("Origin: https://app.example\r\n", 0);
    assert_eq!(status(&answer), "200", "{answer}");
    assert!(answer.contains("access-control-allow-origin: https://app.example"), "{answer}");
    // A program sends no `Origin`; a proxy may have any host name.
    assert_eq!(status(&send("Host: events.example\r\n", 1)), "200");
    for (origin, code) in [("https://app.example", "204"), ("https://evil.example", "403")] {
        let headers = format!("Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n");
        let answer = ask(ports.intake, "OPTIONS", "/events", &headers, b"");
        assert_eq!(status(&answer), code, "{answer}");
        assert_eq!(answer.contains("access-control-allow-origin"), code == "204", "{answer}");
    }
    ports.world.wait_rows(2);
    assert_eq!(ports.world.rows(), 2);
    let health = ask(ports.intake, "GET", "/health", "Host: evil.example\r\n", b"");
    assert_eq!(body(&health), "ready\n", "{health}");
}

/// Routes that change something, or that show the content of records.
const CHANGES: [(&str, &str); 5] = [
    ("POST", "/reload"),
    ("POST", "/reload?dry_run=true"),
    ("POST", "/stages/route/swap"),
    ("POST", "/stages/route/rollback"),
    ("GET", "/changes"),
];

#[test]
fn wall_15_changes_need_the_token_that_is_written_for_the_owner() {
    let ports = Ports::start("", "", "");
    for (method, path) in CHANGES {
        for headers in ["", &bearer(""), &bearer("wrong"), "Host: 127.0.0.1\r\n"] {
            let answer = ask(ports.admin, method, path, headers, b"");
            assert_eq!(status(&answer), "401", "{path} {headers}: {answer}");
            assert!(answer.contains("admin.token"), "{answer}");
        }
    }
    for name in ["admin.token", "control.json"] {
        let about = std::fs::symlink_metadata(ports.folder().join(name)).expect("a file");
        assert_eq!(about.permissions().mode() & 0o777, 0o600, "{name}");
    }
    let answer = ask(ports.admin, "POST", "/reload?dry_run=true", &ports.token(), b"");
    assert_eq!(status(&answer), "200", "{answer}");
    // Commands find the token themselves.
    let (file, plugin) = (ports.file(), crate::support::plugin("route-json"));
    for arguments in [
        &["reload", &file, "--dry-run"][..],
        &["plugin", "swap", "route", &plugin, "--pipeline", &file, "--dry-run"],
    ] {
        let output = run(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let folder = ports.folder();
    assert_eq!(ports.run.terminate(), Some(0));
    for name in ["admin.token", "control.json"] {
        assert!(!folder.join(name).exists(), "{name} is left");
    }
}

/// The file that a killed process has left names a port that may belong to another user now.
#[test]
fn wall_15_commands_ask_no_port_of_a_pipeline_that_was_killed() {
    let ports = Ports::start("", "", "");
    let file = ports.file();
    let control = std::fs::read(ports.folder().join("control.json")).expect("an address");
    let control: serde_json::Value = serde_json::from_slice(&control).expect("JSON");
    let Ports { world, mut run, .. } = ports;
    run.0.kill().expect("killed");
    run.wait();
    let other = TcpListener::bind(control["address"].as_str().expect("text")).expect("the port");
    other.set_nonblocking(true).expect("set");
    let output = crate::support::run(&["reload", &file]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("is not running"), "{said}");
    let asked = other.accept();
    assert!(asked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "it got a request");
    drop(world);
}

/// Another user could have written this file. Commands would then send requests, with their content, to a port of
/// that user.
#[test]
fn wall_15_an_address_that_others_could_have_written_is_not_used() {
    let ports = Ports::start("", "", "");
    let path = ports.folder().join("control.json");
    let refused = || {
        let output = run(&["reload", &ports.file(), "--dry-run"]);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("set");
    assert!(refused().contains("control.json: "), "{}", refused());
    let elsewhere = ports.world.folder.path().join("elsewhere.json");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
    std::fs::rename(&path, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("linked");
    assert!(refused().contains("control.json: "), "{}", refused());
}

/// Asks the embedded stream for its streams.
fn list_streams(headers: &str) -> String {
    format!(
        "POST / HTTP/1.1\r\n{headers}Connection: close\r\nContent-Type: application/x-amz-json-1.1\r\n\
         X-Amz-Target: Kinesis_20131202.ListStreams\r\nX-Amz-Date: 20260101T000000Z\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/kinesis/aws4_request, \
         SignedHeaders=host, Signature=0\r\nContent-Length: 2\r\n\r\n{{}}"
    )
}

/// The port of a stream whose process was killed may belong to another user.
#[test]
fn wall_15_a_run_sends_nothing_to_who_takes_the_port_of_its_stream() {
    let mut ports = Ports::start("", "", "");
    assert_eq!(status(&post(ports.intake, &row(0, 1))), "200");
    ports.world.wait_rows(1);
    ports.world.kill_server();
    let other = TcpListener::bind(&ports.world.address).expect("the port");
    other.set_nonblocking(true).expect("set");
    // An answer may take longer than this client waits: the intake waits for the stream.
    let answer = post(ports.intake, &row(1, 1));
    assert_ne!(status(&answer), "200", "{answer}");
    wait_for("lanes and the intake to say so", || {
        ports.world.logged("the intake failed to put records") && ports.world.logged("has ended")
    });
    let asked = other.accept();
    assert!(asked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "it got a request");
}

#[test]
fn wall_15_the_embedded_stream_is_its_owners() {
    let folder = tempfile::tempdir().expect("a folder");
    let port_of = |state: &str| {
        let url = shardmill_kinesis::served::find(&folder.path().join(state)).expect("served");
        url.port().expect("a port")
    };
    let _own = serve_stream(&folder.path().join("own"));
    let port = port_of("own");
    let send = |headers: &str| {
        let mut stream = open(port);
        stream.write_all(list_streams(headers).as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let answer = send("Host: 127.0.0.1\r\n");
    assert!(status(&answer) == "200" && answer.contains("StreamNames"), "{answer}");
    for headers in ["Host: evil.example\r\n", "Host: 127.0.0.1\r\nOrigin: https://evil.example\r\n"]
    {
        let answer = send(headers);
        assert!(status(&answer) == "403" && !answer.contains("StreamNames"), "{answer}");
    }

    // Only root can act as another user.
    // SAFETY: the call cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return;
    }
    const NOBODY: u32 = 65_534;
    let as_nobody = |port: u16| {
        let request = list_streams("Host: 127.0.0.1\r\n");
        let script =
            format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf '%s' \"$REQUEST\" >&3; cat <&3");
        let mut command = Command::new("bash");
        command.args(["-c", &script]).env("REQUEST", request).current_dir("/").uid(NOBODY);
        let output = crate::support::output(&mut command);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let answer = as_nobody(port);
    assert!(status(&answer) == "403" && answer.contains("--any-user"), "{answer}");
    let state = folder.path().join("any").display().to_string();
    let mut command = shardmill(&["stream", "serve", "--any-user", "--state-dir", &state]);
    let _any = Process(command.stdout(Stdio::null()).spawn().expect("it starts"));
    let state = folder.path().join("any");
    wait_for("the stream", || shardmill_kinesis::served::find(&state).is_some());
    let answer = as_nobody(port_of("any"));
    assert!(status(&answer) == "200" && answer.contains("StreamNames"), "{answer}");
}
