//! Who may ask each port for what, by the host name in the request and by the page that the request comes from: every
//! port, every route, and every spelling that a server might take for another name.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;

use super::{CHANGES, Ports, SOON, ask, bearer, body, list_streams, open, status};
use crate::support::serve_stream;
use crate::support::world::row;

/// Sends a request as it is; returns the whole answer. If it has a body, it must have its length.
fn send(port: u16, request: &str) -> String {
    let mut stream = open(port);
    stream.set_read_timeout(Some(SOON)).expect("set");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    // A server may close the connection before it has read everything.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Returns the bytes of a request without a body. `target` is a path, or a URL with a host.
fn request(method: &str, target: &str, version: &str, headers: &str) -> String {
    format!(
        "{method} {target} {version}\r\n{headers}Connection: close\r\nContent-Length: 0\r\n\r\n"
    )
}

/// Ways to name a host in a request.
enum Named {
    /// `Host` headers, one for each text.
    By(&'static [&'static str]),
    /// URL with this authority as the target, together with a `Host` header.
    Target(&'static str, &'static str),
    /// HTTP/1.0, with these `Host` headers.
    Old(&'static [&'static str]),
}

use Named::{By, Old, Target};

impl Named {
    fn request(&self, method: &str, path: &str, more: &str) -> String {
        let headers = |hosts: &[&str]| -> String {
            hosts.iter().map(|host| format!("Host: {host}\r\n")).collect()
        };
        match self {
            By(hosts) => request(method, path, "HTTP/1.1", &(headers(hosts) + more)),
            Target(authority, host) => {
                let target = format!("http://{authority}{path}");
                request(method, &target, "HTTP/1.1", &(headers(&[host]) + more))
            }
            Old(hosts) => request(method, path, "HTTP/1.0", &(headers(hosts) + more)),
        }
    }

    fn text(&self) -> String {
        match self {
            By(hosts) => format!("{hosts:?}"),
            Target(authority, host) => format!("http://{authority} beside {host:?}"),
            Old(hosts) => format!("HTTP/1.0 {hosts:?}"),
        }
    }
}

/// Spellings of this machine, or of the one name in `hosts`: no page of an attacker is served under these names.
const KNOWN: [Named; 17] = [
    By(&["127.0.0.1"]),
    By(&["127.0.0.1:9901"]),
    By(&["10.0.0.7:65535"]),
    By(&["[::1]"]),
    By(&["[::1]:80"]),
    By(&["[2001:DB8::7]:80"]),
    By(&["localhost"]),
    By(&["LocalHost:80"]),
    By(&["localhost."]),
    By(&["LOCALHOST.:80"]),
    Target("localhost", "evil.example"),
    Target("LOCALHOST:80", "evil.example"),
    Target("127.0.0.1:9901", "evil.example"),
    Target("[::1]:9901", "evil.example"),
    Old(&[]),
    Old(&["localhost"]),
    Old(&["127.0.0.1:80"]),
];

/// Spellings of the one name in `hosts` of `[admin]`.
const LISTED: [Named; 5] = [
    By(&["mill.example"]),
    By(&["MILL.Example:443"]),
    By(&["mill.example.:443"]),
    Target("mill.example", "evil.example"),
    Old(&["mill.example"]),
];

/// Spellings of something else, or of nothing that is one name.
const UNKNOWN: [Named; 41] = [
    By(&[]),
    By(&[""]),
    By(&["evil.example"]),
    By(&["evil.example:9901"]),
    By(&["EVIL.example."]),
    By(&["localhost.evil.example"]),
    By(&["127.0.0.1.evil.example"]),
    By(&["127.0.0.1.evil.example:80"]),
    By(&["[::1].evil.example"]),
    By(&["[::1]evil.example"]),
    By(&["[::1]."]),
    By(&["[::1"]),
    By(&["::1"]),
    By(&["[::1%25lo]"]),
    By(&["[localhost]"]),
    By(&["[127.0.0.1]"]),
    By(&["localhost:"]),
    By(&["localhost:abc"]),
    By(&["localhost:80:80"]),
    By(&["localhost:65536"]),
    By(&["localhost:80.evil.example"]),
    By(&["localhost.."]),
    By(&["localhost@evil.example"]),
    By(&["evil.example@localhost"]),
    By(&["localhost, evil.example"]),
    By(&["localhost/evil.example"]),
    By(&["localhost evil.example"]),
    By(&["http://localhost"]),
    By(&["2130706433"]),
    By(&["0x7f.1"]),
    By(&["x.mill.example"]),
    By(&["mill.example.evil.example"]),
    By(&["localhost", "evil.example"]),
    By(&["evil.example", "localhost"]),
    By(&["localhost", "localhost"]),
    By(&["localhost", ""]),
    Target("evil.example", "localhost"),
    Target("localhost.evil.example:80", "localhost"),
    Target("localhost@evil.example", "localhost"),
    Target("evil.example@localhost", "localhost"),
    Old(&["evil.example"]),
];

/// Returns origins of pages: opaque ones (of files, sandboxed frames and redirects), and also the port's own. A page
/// that was once served from this port is still a page.
fn origins(port: u16) -> Vec<String> {
    let own = [format!("http://127.0.0.1:{port}"), format!("http://localhost:{port}")];
    let others = ["https://evil.example", "null", "NULL", "", "file://", "http://[::1]"];
    own.into_iter().chain(others.map(str::to_owned)).collect()
}

/// Methods, including those that the routes do not have.
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// Returns the headers of a preflight, which a browser sends before a page may send more than a form could.
fn preflight(origin: &str, method: &str) -> String {
    format!(
        "Host: 127.0.0.1\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: {method}\r\n\
         Access-Control-Request-Headers: authorization\r\nAccess-Control-Request-Private-Network: true\r\n"
    )
}

/// Asserts that an answer does not allow any page to read it.
fn assert_for_no_page(answer: &str, what: &str) {
    let lower = answer.to_ascii_lowercase();
    assert!(!lower.contains("access-control-"), "{what}: {answer}");
}

#[test]
fn wall_05_the_admin_port_is_read_by_names_that_no_page_can_have() {
    let ports = Ports::start("hosts = [\"mill.example\"]", "", "");
    let port = ports.admin;
    for path in ["/metrics", "/status"] {
        for method in ["GET", "HEAD"] {
            for named in KNOWN.iter().chain(&LISTED) {
                let answer = send(port, &named.request(method, path, ""));
                assert_eq!(status(&answer), "200", "{method} {path} {}: {answer}", named.text());
            }
        }
        for named in &UNKNOWN {
            for method in METHODS {
                let answer = send(port, &named.request(method, path, ""));
                let what = format!("{method} {path} {}", named.text());
                // Invalid HTTP is refused before its host name is checked.
                assert!(["403", "400"].contains(&status(&answer)), "{what}: {answer}");
                assert_for_no_page(&answer, &what);
            }
        }
        for origin in origins(port) {
            for method in METHODS {
                let headers = format!("Origin: {origin}\r\n");
                let answer = send(port, &By(&["127.0.0.1"]).request(method, path, &headers));
                assert_eq!(status(&answer), "403", "{method} {path} {origin}: {answer}");
                let asked = request("OPTIONS", path, "HTTP/1.1", &preflight(&origin, method));
                let answer = send(port, &asked);
                assert_eq!(status(&answer), "403", "{method} {path} {origin}: {answer}");
                assert_for_no_page(&answer, &format!("{method} {path} {origin}"));
            }
        }
    }
    // Health contains nothing that a page could use, and may be requested under names that are not listed.
    for named in KNOWN.iter().chain(&LISTED).chain(&UNKNOWN) {
        let answer = send(port, &named.request("GET", "/health/live", ""));
        let is_http = status(&answer) != "400";
        assert!(!is_http || body(&answer) == "live\n", "{}: {answer}", named.text());
    }
}

/// No host name and no page gives access to changes, whatever the method: only the token does.
#[test]
fn wall_05_changes_need_the_token_by_every_name_method_and_page() {
    let ports = Ports::start("hosts = [\"mill.example\"]", "", "");
    let control = std::fs::read(ports.folder().join("control.json")).expect("an address");
    let control: serde_json::Value = serde_json::from_slice(&control).expect("JSON");
    let address: SocketAddr =
        control["address"].as_str().expect("text").parse().expect("an address");
    let own_token = bearer(control["token"].as_str().expect("a token"));
    let shown = [("GET", "/status")];
    for (port, routes) in [
        (ports.admin, CHANGES.to_vec()),
        (address.port(), CHANGES.into_iter().chain(shown).collect()),
    ] {
        for (_, path) in &routes {
            for method in METHODS {
                for headers in
                    ["", "Authorization: Bearer \r\n", "Authorization: Basic OnRva2Vu\r\n"]
                {
                    let answer = send(port, &By(&["127.0.0.1"]).request(method, path, headers));
                    assert_eq!(status(&answer), "401", "{method} {path} {headers}: {answer}");
                }
                for origin in origins(port) {
                    let headers = format!("Origin: {origin}\r\n");
                    let answer = send(port, &By(&["localhost"]).request(method, path, &headers));
                    assert_eq!(status(&answer), "401", "{method} {path} {origin}: {answer}");
                    let asked = request("OPTIONS", path, "HTTP/1.1", &preflight(&origin, method));
                    let answer = send(port, &asked);
                    assert_eq!(status(&answer), "401", "{method} {path} {origin}: {answer}");
                    assert_for_no_page(&answer, &format!("{method} {path} {origin}"));
                }
            }
            for named in KNOWN.iter().chain(&LISTED).chain(&UNKNOWN) {
                let answer = send(port, &named.request("POST", path, ""));
                let what = format!("POST {path} {}", named.text());
                assert!(["401", "400"].contains(&status(&answer)), "{what}: {answer}");
            }
        }
    }
    // A page cannot have the token, so the token gives access under any name. A proxy may have any name.
    for (port, token) in [(ports.admin, ports.token()), (address.port(), own_token.clone())] {
        let headers = format!("{token}Host: evil.example\r\nOrigin: https://evil.example\r\n");
        let answer = ask(port, "GET", "/changes", &headers, b"");
        assert_eq!(status(&answer), "200", "{answer}");
        assert_for_no_page(&answer, "/changes");
        // None of the requests above has started a change.
        let changes: serde_json::Value = serde_json::from_str(body(&answer)).expect("JSON");
        let changes = changes.as_array().or_else(|| changes["changes"].as_array());
        assert!(changes.is_some_and(Vec::is_empty), "{answer}");
    }
    // The token of one port is not valid for the other.
    let answer = ask(ports.admin, "GET", "/changes", &own_token, b"");
    let is_one = own_token == ports.token();
    assert_eq!(status(&answer), if is_one { "200" } else { "401" }, "{answer}");
}

#[test]
fn wall_05_the_embedded_stream_answers_no_page_whatever_it_asks_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let _stream = serve_stream(folder.path());
    let url = shardmill_kinesis::served::find(folder.path()).expect("served");
    let port = url.port().expect("a port");
    let signed = list_streams("");
    let (_, signed) = signed.split_once("\r\n").expect("a first line");
    // The request of the SDK, with another target and other names.
    let listing = |named: &Named, more: &str| -> String {
        let whole = named.request("POST", "/", more);
        let (head, _) = whole.split_once("Connection:").expect("two parts");
        format!("{head}{signed}")
    };
    for named in &KNOWN {
        let answer = send(port, &listing(named, ""));
        let what = named.text();
        assert!(status(&answer) == "200" && answer.contains("StreamNames"), "{what}: {answer}");
    }
    for named in UNKNOWN.iter().chain(&LISTED) {
        let (answer, what) = (send(port, &listing(named, "")), named.text());
        assert!(["403", "400"].contains(&status(&answer)), "{what}: {answer}");
        assert!(!answer.contains("StreamNames"), "{what}: {answer}");
        for method in METHODS {
            let answer = send(port, &named.request(method, "/", ""));
            assert!(["403", "400"].contains(&status(&answer)), "{method} {what}: {answer}");
            assert_for_no_page(&answer, &what);
        }
    }
    for origin in origins(port) {
        let headers = format!("Origin: {origin}\r\n");
        let answer = send(port, &listing(&By(&["127.0.0.1"]), &headers));
        assert_eq!(status(&answer), "403", "{origin}: {answer}");
        assert!(!answer.contains("StreamNames"), "{origin}: {answer}");
        for method in METHODS {
            let answer = send(port, &By(&["127.0.0.1"]).request(method, "/", &headers));
            assert_eq!(status(&answer), "403", "{method} {origin}: {answer}");
            let asked = request("OPTIONS", "/", "HTTP/1.1", &preflight(&origin, method));
            let answer = send(port, &asked);
            assert_eq!(status(&answer), "403", "{method} {origin}: {answer}");
            assert_for_no_page(&answer, &format!("{method} {origin}"));
        }
    }
    // A form can send a text body without a preflight: such a request must create nothing.
    let create = r#"{"StreamName":"made-by-a-page","ShardCount":1}"#;
    let target = "X-Amz-Target: Kinesis_20131202.CreateStream\r\n";
    for (headers, media) in [
        ("Host: evil.example\r\n", "application/x-amz-json-1.1"),
        ("Host: 127.0.0.1\r\nOrigin: https://evil.example\r\n", "application/x-amz-json-1.1"),
        ("Host: 127.0.0.1\r\nOrigin: null\r\n", "text/plain"),
    ] {
        let headers = format!("{headers}{target}Content-Type: {media}\r\n");
        let answer = ask(port, "POST", "/", &headers, create.as_bytes());
        assert_eq!(status(&answer), "403", "{headers}: {answer}");
    }
    let answer = send(port, &listing(&By(&["127.0.0.1"]), ""));
    assert_eq!(status(&answer), "200", "{answer}");
    assert!(!answer.contains("made-by-a-page"), "{answer}");
}

/// The intake may be behind a proxy with any name, so it checks only the page.
#[test]
fn wall_05_the_intake_takes_no_event_of_another_page_however_it_is_spelled() {
    let own = "https://app.example";
    let ports = Ports::start("", &format!("origins = [\"{own}\"]"), "");
    let event = |origins: &[&str], id: u64| {
        let origins: String = origins.iter().map(|one| format!("Origin: {one}\r\n")).collect();
        let headers = format!("Content-Type: application/json\r\n{origins}");
        ask(ports.intake, "POST", "/events", &headers, &row(id, 1))
    };
    for origins in [
        &["https://evil.example"][..],
        &["null"],
        &[""],
        &["http://app.example"],
        &["https://app.example:443"],
        &["https://app.example:8443"],
        &["https://app.example."],
        &["https://app.example/"],
        &["https://app.example.evil.example"],
        &["https://evil.example/https://app.example"],
        &["https://app.example https://evil.example"],
        &["https://app.example, https://evil.example"],
        &["https://app.example@evil.example"],
        &[own, "https://evil.example"],
        &["https://evil.example", own],
        &[own, "null"],
    ] {
        let answer = event(origins, 99);
        assert_eq!(status(&answer), "403", "{origins:?}: {answer}");
        assert_for_no_page(&answer, &format!("{origins:?}"));
        for method in METHODS {
            let headers: String = origins.iter().map(|one| format!("Origin: {one}\r\n")).collect();
            let headers = format!("{headers}Access-Control-Request-Method: {method}\r\n");
            let answer = ask(ports.intake, "OPTIONS", "/events", &headers, b"");
            assert_eq!(status(&answer), "403", "{origins:?} {method}: {answer}");
            assert_for_no_page(&answer, &format!("{origins:?} {method}"));
        }
    }
    // Scheme and host name are case-insensitive.
    for (id, origin) in [own, "HTTPS://App.Example"].into_iter().enumerate() {
        let answer = event(&[origin], id as u64);
        assert_eq!(status(&answer), "200", "{origin}: {answer}");
        let expected = format!("access-control-allow-origin: {origin}\r\n");
        assert!(answer.contains(&expected) && answer.contains("vary: origin"), "{answer}");
    }
    // Whatever the preflight requests, only what the page may send is allowed, and no cookies.
    for method in METHODS {
        let headers = format!("Origin: {own}\r\nAccess-Control-Request-Method: {method}\r\n");
        let answer = ask(ports.intake, "OPTIONS", "/events", &headers, b"");
        assert_eq!(status(&answer), "204", "{method}: {answer}");
        assert!(answer.contains("access-control-allow-methods: POST\r\n"), "{method}: {answer}");
        assert!(!answer.contains("allow-credentials"), "{method}: {answer}");
        assert!(!answer.contains("allow-private-network"), "{method}: {answer}");
    }
    // Other methods put nothing on the stream, even from this page.
    for method in METHODS.into_iter().filter(|method| !["POST", "OPTIONS"].contains(method)) {
        for headers in ["", "Origin: https://evil.example\r\n", "Origin: https://app.example\r\n"] {
            let answer = ask(ports.intake, method, "/events", headers, &row(99, 1));
            assert_eq!(status(&answer), "405", "{method} {headers}: {answer}");
            assert_for_no_page(&answer, method);
        }
    }
    let mut taken = 2;
    for named in KNOWN.iter().chain(&LISTED).chain(&UNKNOWN) {
        let health = send(ports.intake, &named.request("GET", "/health", ""));
        assert!(["200", "400"].contains(&status(&health)), "{}: {health}", named.text());
        if status(&health) == "200" && matches!(named, By([_])) {
            let whole = named.request("POST", "/events", "Content-Type: application/json\r\n");
            let event = String::from_utf8(row(taken, 1)).expect("text");
            let length = format!("Content-Length: {}", event.len());
            let whole = whole.replace("Content-Length: 0", &length) + &event;
            let answer = send(ports.intake, &whole);
            assert_eq!(status(&answer), "200", "{}: {answer}", named.text());
            taken += 1;
        }
    }
    ports.world.wait_rows(taken);
    assert_eq!(ports.world.rows(), taken);
    let refused = "SELECT count(*) FROM rows WHERE id = 99";
    let refused: u64 =
        ports.world.mart().query_row(refused, (), |row| row.get(0)).expect("a count");
    assert_eq!(refused, 0);
}
