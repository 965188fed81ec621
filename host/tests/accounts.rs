//! `source.assume_role` through the real binary: STS is asked as the file says, and Kinesis by the
//! role that STS gave.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::convert::Infallible;
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use support::shardmill;
use tokio::net::TcpListener;

const ROLE: &str = "arn:aws:iam::123456789012:role/reader";
const ASSUMED_KEY: &str = "ASIAROLEOFTHETEST000";

/// What STS answers.
///
/// Source: AWS STS API reference, AssumeRole.
const ASSUMED: &str = r#"<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleResult>
<AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/reader/nightly</Arn>
<AssumedRoleId>AROA:nightly</AssumedRoleId></AssumedRoleUser>
<Credentials><AccessKeyId>ASIAROLEOFTHETEST000</AccessKeyId>
<SecretAccessKey>secret</SecretAccessKey><SessionToken>token-of-the-role</SessionToken>
<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials>
</AssumeRoleResult></AssumeRoleResponse>"#;
const DENIED: &str = r#"<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error>
<Type>Sender</Type><Code>AccessDenied</Code><Message>not for you</Message></Error></ErrorResponse>"#;
const SUMMARY: &str = r#"{"StreamDescriptionSummary":{"StreamName":"test","StreamARN":
"arn:aws:kinesis:eu-west-1:123456789012:stream/test","StreamStatus":"ACTIVE",
"RetentionPeriodHours":24,"StreamCreationTimestamp":1700000000,"EnhancedMonitoring":[],
"OpenShardCount":0}}"#;

/// A request as it came.
#[derive(Clone, Debug)]
struct Seen {
    target: String,
    authorization: String,
    token: String,
    body: String,
}

/// A server that plays STS or Kinesis; it ends with its runtime.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    /// Answers every request as `answer` says.
    fn start(answer: fn(&Seen) -> (StatusCode, &'static str)) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        runtime.spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let log = log.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request: Request<Incoming>| {
                        let log = log.clone();
                        async move {
                            let seen = read(request).await;
                            log.lock().expect("no panic").push(seen.clone());
                            let (status, body) = answer(&seen);
                            let mut response = Response::new(Full::new(Bytes::from(body)));
                            *response.status_mut() = status;
                            Ok::<_, Infallible>(response)
                        }
                    });
                    let connection = TokioIo::new(connection);
                    // An error is a client that went away.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(connection, service)
                        .await;
                });
            }
        });
        Self { url, seen, _runtime: runtime }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }
}

async fn read(request: Request<Incoming>) -> Seen {
    let header = |name: &str| {
        let value = request.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let (target, authorization, token) =
        (header("x-amz-target"), header("authorization"), header("x-amz-security-token"));
    let body = request.into_body().collect().await.expect("a body").to_bytes();
    Seen { target, authorization, token, body: String::from_utf8_lossy(&body).into_owned() }
}

fn kinesis(seen: &Seen) -> (StatusCode, &'static str) {
    match seen.target.ends_with(".DescribeStreamSummary") {
        true => (StatusCode::OK, SUMMARY),
        false => (StatusCode::OK, r#"{"Shards":[]}"#),
    }
}

/// Describes the stream of a pipeline that assumes a role.
fn describe(folder: &Path, kinesis: &Server, sts: &Server, assume_role: &str) -> Output {
    let file = folder.join("pipeline.toml");
    let text = format!(
        r#"
[pipeline]
name = "accounts"
state_dir = "state"
[source]
type = "kinesis"
stream = "test"
region = "eu-west-1"
endpoint = "{}"
assume_role = {assume_role}
[[sink]]
name = "nothing"
type = "discard"
"#,
        kinesis.url
    );
    std::fs::write(&file, text).expect("written");
    let file = file.display().to_string();
    shardmill(&["stream", "describe", "--json", "--pipeline", &file])
        .env("AWS_ENDPOINT_URL_STS", &sts.url)
        .env("AWS_ACCESS_KEY_ID", "AKIAOFTHECALLER00000")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .output()
        .expect("the binary starts")
}

#[test]
fn kinesis_is_asked_by_the_role_that_sts_gave() {
    let folder = tempfile::tempdir().expect("a folder");
    let (kinesis, sts) = (Server::start(kinesis), Server::start(|_| (StatusCode::OK, ASSUMED)));
    let role = format!(r#"{{ arn = "{ROLE}", external_id = "cars-7", session_name = "nightly" }}"#);
    let output = describe(folder.path(), &kinesis, &sts, &role);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let asked = sts.seen();
    assert!(!asked.is_empty());
    for asked in asked {
        let member = |name: &str| {
            let mut members = url::form_urlencoded::parse(asked.body.as_bytes());
            members.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        assert_eq!(member("Action").as_deref(), Some("AssumeRole"));
        assert_eq!(member("RoleArn").as_deref(), Some(ROLE));
        assert_eq!(member("ExternalId").as_deref(), Some("cars-7"));
        assert_eq!(member("RoleSessionName").as_deref(), Some("nightly"));
        assert!(asked.authorization.contains("Credential=AKIAOFTHECALLER00000/"), "{asked:?}");
    }
    let asked = kinesis.seen();
    assert_eq!(asked.len(), 2, "{asked:?}");
    for asked in asked {
        let due = format!("Credential={ASSUMED_KEY}/");
        assert!(asked.authorization.contains(&due), "{asked:?}");
        assert_eq!(asked.token, "token-of-the-role");
    }
}

#[test]
fn a_role_that_sts_denies_is_named_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let sts = Server::start(|_| (StatusCode::FORBIDDEN, DENIED));
    let kinesis = Server::start(kinesis);
    let output = describe(folder.path(), &kinesis, &sts, &format!(r#"{{ arn = "{ROLE}" }}"#));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(ROLE) && said.contains("not for you"), "{said}");
    assert!(kinesis.seen().is_empty(), "nobody else's credentials are tried");
}
