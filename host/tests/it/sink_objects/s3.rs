//! An S3 server in this process, on loopback, which the sink reaches by URL and options.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::path::Path;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

pub const BUCKET: &str = "marts";
const KEY: &str = "test-access-key";
const SECRET: &str = "test-secret-key";

/// Error code and HTTP status that the server answers every request with.
pub type Refusal = Option<(&'static str, u16)>;

/// Running server; it ends with the test's runtime.
pub struct Server {
    pub store: Arc<dyn ObjectStore>,
    pub prefix: Path,
    /// Keeps the objects until the test ends.
    pub folder: Arc<tempfile::TempDir>,
    pub options: BTreeMap<String, String>,
    pub refusal: Arc<Mutex<Refusal>>,
}

/// Starts a server with one bucket.
pub async fn start() -> Server {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join(BUCKET)).expect("a bucket is a folder");
    let files = s3s_fs::FileSystem::new(folder.path()).expect("a folder to serve");
    let mut service = S3ServiceBuilder::new(files);
    service.set_auth(SimpleAuth::from_single(KEY, SECRET));
    let service = service.build();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let refusal: Arc<Mutex<Refusal>> = Arc::default();
    let refuses = refusal.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (service, refuses) = (service.clone(), refuses.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                    let refusal = *refuses.lock().expect("a lock");
                    let service = service.clone();
                    async move {
                        let Some((code, status)) = refusal else {
                            return service.call(request.map(s3s::Body::from)).await;
                        };
                        let body =
                            format!("<Error><Code>{code}</Code><Message>no</Message></Error>");
                        let mut refused = hyper::Response::new(s3s::Body::from(body));
                        *refused.status_mut() = status.try_into().expect("a status");
                        Ok(refused)
                    }
                });
                let http = hyper::server::conn::http1::Builder::new();
                // A client that disconnects is not an error of the server.
                let _ = http.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    let endpoint = format!("http://{address}");
    shardmill_tls::install();
    let store = AmazonS3Builder::new()
        .with_bucket_name(BUCKET)
        .with_endpoint(&endpoint)
        .with_access_key_id(KEY)
        .with_secret_access_key(SECRET)
        .with_region("eu-west-1")
        .with_allow_http(true);
    let store = Arc::new(store.build().expect("a client"));
    let options = [
        ("aws_endpoint", endpoint.as_str()),
        ("aws_access_key_id", KEY),
        ("aws_secret_access_key", SECRET),
        ("aws_region", "eu-west-1"),
    ];
    let options = options.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Server {
        store,
        prefix: Path::from("lake/raw"),
        folder: Arc::new(folder),
        options: options.into(),
        refusal,
    }
}

/// Returns the URL of the server's prefix.
pub fn url() -> url::Url {
    format!("s3://{BUCKET}/lake/raw").parse().expect("a URL")
}
