//! The capability `http` against a real server: the request sent, the response returned, and what is refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::Request as Asked;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Redirect};
use axum::routing::{any, get};
use shardmill_config::{HttpHostConfig, HttpMethod, Secret};
use shardmill_net::{HttpFailure, HttpGrant, HttpRequest, HttpResponse};
use tokio::net::TcpListener;
use tokio::runtime::Handle;

const SECRET: &str = "Bearer hunter2";

/// Starts a server that echoes each request; returns its port.
async fn server() -> u16 {
    let echo = |asked: Asked| async move {
        let (head, body) = asked.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
        let mut printed = format!("{} {}\n", head.method, head.uri);
        for (name, value) in &head.headers {
            printed.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        printed.push_str(&String::from_utf8_lossy(&body));
        (StatusCode::OK, [("X-Made-By", "test")], printed)
    };
    let routes = Router::new()
        .route("/echo", any(echo))
        .route("/moved", get(|| async { Redirect::temporary("http://127.0.0.1:1/echo") }))
        .route("/broken", get(|| async { (StatusCode::BAD_GATEWAY, "no") }))
        .route("/bytes/{count}", get(bytes))
        .route("/never", get(std::future::pending::<StatusCode>));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    port
}

/// Answers with as many bytes as requested: with a Content-Length, or in chunks.
async fn bytes(
    axum::extract::Path(count): axum::extract::Path<usize>,
    headers: HeaderMap,
) -> axum::response::Response {
    let bytes = Bytes::from(vec![b'x'; count]);
    if !headers.contains_key("in-chunks") {
        return bytes.into_response();
    }
    let chunks: Vec<_> = bytes.chunks(100).map(Bytes::copy_from_slice).collect();
    let chunks = futures::stream::iter(chunks.into_iter().map(Ok::<_, std::io::Error>));
    axum::body::Body::from_stream(chunks).into_response()
}

fn host(name: &str, port: Option<u16>) -> HttpHostConfig {
    HttpHostConfig {
        host: name.into(),
        port,
        headers: vec![("authorization".into(), Secret::new(SECRET))],
        methods: vec![HttpMethod::Get, HttpMethod::Post],
        private: true,
        response_bytes_max: 1_000,
    }
}

fn grant(hosts: &[HttpHostConfig]) -> Arc<HttpGrant> {
    Arc::new(HttpGrant::new(hosts, Handle::current()).expect("a grant"))
}

fn asked(url: &str) -> HttpRequest {
    HttpRequest { method: "GET".into(), url: url.into(), ..HttpRequest::default() }
}

async fn send_within(
    grant: &Arc<HttpGrant>,
    request: HttpRequest,
    time: Duration,
) -> Result<HttpResponse, HttpFailure> {
    let grant = Arc::clone(grant);
    let sent = move || grant.send(request, Instant::now() + time);
    let answer = tokio::task::spawn_blocking(sent).await.expect("no panic");
    if let Err(failure) = &answer {
        assert!(!format!("{failure} {failure:?}").contains("hunter2"), "{failure:?}");
    }
    answer
}

async fn send(grant: &Arc<HttpGrant>, request: HttpRequest) -> Result<HttpResponse, HttpFailure> {
    send_within(grant, request, Duration::from_secs(20)).await
}

async fn refused(grant: &Arc<HttpGrant>, request: HttpRequest, expected: &str) {
    let asked = format!("{request:?}");
    let failure = send(grant, request).await.expect_err(&asked);
    assert!(!failure.retryable && failure.message.contains(expected), "{asked}: {failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_granted_request_is_sent_with_the_grants_headers() {
    let port = server().await;
    let grant = grant(&[host("127.0.0.1", Some(port))]);
    let request = HttpRequest {
        method: "POST".into(),
        url: format!("http://127.0.0.1:{port}/echo?q=a%20b#part"),
        headers: vec![("X-Mine".into(), "1".into()), ("x-mine".into(), "2".into())],
        body: b"the body".to_vec(),
    };
    let answer = send(&grant, request).await.expect("an answer");
    let body = String::from_utf8(answer.body).expect("text");
    assert_eq!(answer.status, 200);
    assert!(answer.headers.contains(&("x-made-by".into(), "test".into())), "{:?}", answer.headers);
    assert!(body.starts_with("POST /echo?q=a%20b\n") && body.ends_with("\nthe body"), "{body}");
    for line in ["x-mine: 1", "x-mine: 2", "authorization: Bearer hunter2", "content-length: 8"] {
        assert!(body.lines().any(|found| found == line), "{line}: {body}");
    }
    assert!(body.contains("user-agent: shardmill/"), "{body}");
    assert!(!format!("{grant:?}").contains("hunter2"), "{grant:?}");
    let bare = send(&grant, asked(&format!("http://127.0.0.1:{port}/echo"))).await;
    let bare = String::from_utf8(bare.expect("an answer").body).expect("text");
    assert!(bare.starts_with("GET /echo\n") && !bare.contains("content-length"), "{bare}");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_status_is_an_answer_and_redirects_are_not_followed() {
    let port = server().await;
    let grant = grant(&[host("127.0.0.1", Some(port))]);
    for (path, status) in [("broken", 502), ("missing", 404), ("moved", 307)] {
        let answer = send(&grant, asked(&format!("http://127.0.0.1:{port}/{path}"))).await;
        assert_eq!(answer.expect("an answer").status, status, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_as_long_as_the_grant_allows() {
    let port = server().await;
    let grant = grant(&[host("127.0.0.1", Some(port))]);
    for headers in [vec![], vec![("in-chunks".to_owned(), "1".to_owned())]] {
        for count in [0, 999, 1_000] {
            let url = format!("http://127.0.0.1:{port}/bytes/{count}");
            let answer =
                send(&grant, HttpRequest { headers: headers.clone(), ..asked(&url) }).await;
            assert_eq!(answer.expect("an answer").body.len(), count);
        }
        let url = format!("http://127.0.0.1:{port}/bytes/1001");
        refused(&grant, HttpRequest { headers, ..asked(&url) }, "more than 1000 bytes").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_answer_may_answer_later() {
    let port = server().await;
    let gone = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let gone_port = gone.local_addr().expect("an address").port();
    drop(gone);
    let grant = grant(&[host("127.0.0.1", Some(port)), host("127.0.0.1", Some(gone_port))]);
    let never = asked(&format!("http://127.0.0.1:{port}/never"));
    let late = send_within(&grant, never, Duration::from_millis(50)).await.expect_err("late");
    assert!(late.retryable && late.message.contains("within the time"), "{late:?}");
    let nobody = send(&grant, asked(&format!("http://127.0.0.1:{gone_port}/"))).await;
    let nobody = nobody.expect_err("nobody listens");
    assert!(nobody.retryable && nobody.message.starts_with("127.0.0.1: "), "{nobody:?}");
    // This server does not support TLS.
    let tls = send(&grant, asked(&format!("https://127.0.0.1:{port}/echo"))).await;
    assert!(tls.expect_err("no TLS").retryable);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_granted_is_not_sent() {
    let public = HttpHostConfig { private: false, ..host("api.example.com", None) };
    let grant = grant(&[host("127.0.0.1", Some(1)), public]);
    for (url, expected) in [
        ("nonsense", "invalid URL"),
        ("ftp://api.example.com/", "`ftp://` is not granted"),
        ("file:///etc/passwd", "`file://` is not granted"),
        ("https://example.com/", "example.com:443 is not granted"),
        ("https://x.api.example.com/", "is not granted"),
        ("https://api.example.com./", "is not granted"),
        ("https://api.example.com:8443/", "api.example.com:8443 is not granted"),
        ("https://api.example.com@evil.example/", "user or password"),
        ("https://u:p@api.example.com/", "user or password"),
        ("https://evil.example/?api.example.com", "evil.example:443 is not granted"),
        ("https://evil.example\\@api.example.com/", "evil.example:443 is not granted"),
        ("http://api.example.com/", "for https:// only"),
        ("http://API.EXAMPLE.COM/", "for https:// only"),
        ("http://127.0.0.1:2/", "127.0.0.1:2 is not granted"),
        ("http://127.0.0.1/", "127.0.0.1:80 is not granted"),
    ] {
        refused(&grant, asked(url), expected).await;
    }
    let url = "https://api.example.com/";
    for method in ["PUT", "get", "CONNECT", "", "GET / HTTP/1.1\r\n"] {
        let request = HttpRequest { method: method.into(), ..asked(url) };
        refused(&grant, request, "is not granted for api.example.com: GET, POST are").await;
    }
    for (name, value, expected) in [
        ("Host", "evil.example", "`host` cannot be set by a plugin"),
        ("connection", "close", "`connection` cannot be set by a plugin"),
        ("Transfer-Encoding", "chunked", "`transfer-encoding` cannot be set by a plugin"),
        ("content-length", "1", "`content-length` cannot be set by a plugin"),
        ("Proxy-Authorization", "x", "`proxy-authorization` cannot be set by a plugin"),
        ("AUTHORIZATION", "mine", "`authorization` is set by the grant"),
        ("a b", "x", "not a valid header name: \"a b\""),
        ("x", "a\r\nhost: evil.example", "expected one line of text"),
    ] {
        let request = HttpRequest { headers: vec![(name.into(), value.into())], ..asked(url) };
        refused(&grant, request, expected).await;
    }
    let many = HttpRequest { headers: vec![("x".into(), "y".into()); 101], ..asked(url) };
    refused(&grant, many, "more than 100 headers").await;
}

/// A grant for a name does not extend to the addresses of this machine.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_not_public_is_refused() {
    let port = server().await;
    let public = |name: &str| HttpHostConfig { private: false, ..host(name, Some(port)) };
    let careful = grant(&[public("localhost"), public("127.0.0.1"), public("[::ffff:7f00:1]")]);
    for name in ["localhost", "127.0.0.1", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"] {
        let url = format!("https://{name}:{port}/echo");
        refused(&careful, asked(&url), "which is not public").await;
    }
    let private = grant(&[host("localhost", Some(port)), host("169.254.169.254", None)]);
    let answer = send(&private, asked(&format!("http://localhost:{port}/echo"))).await;
    assert_eq!(answer.expect("granted as private").status, 200);
    refused(&private, asked("http://169.254.169.254/latest"), "no grant can allow").await;
}
