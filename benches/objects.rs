//! The case `objects` of the bench `sinks`: lines of a file into objects on S3, with their claims; against a
//! bare loop of PutObject calls with the same bytes, in objects of equal size.
//!
//! The server is s3s-fs in this process, for both.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use object_store::aws::AmazonS3Builder;
use object_store::{ObjectStore, ObjectStoreExt as _};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

use crate::child;

const MIB: usize = 1 << 20;
/// Amount that both sides write.
const TOTAL_MIB: usize = 512;
/// Size of one object, for both sides.
const OBJECT_MIB: usize = 16;
const LINE_BYTES: usize = 1_024;
const BUCKET: &str = "bench";
const KEY: &str = "bench-key";

/// An S3 server over a folder.
pub struct Server {
    endpoint: String,
    folder: tempfile::TempDir,
    store: Arc<dyn ObjectStore>,
}

impl Server {
    pub async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let files = s3s_fs::FileSystem::new(folder.path())
            .map_err(|error| anyhow::anyhow!("failed to start s3s-fs: {error:?}"))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY, KEY));
        let service = service.build();
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let http = hyper::server::conn::http1::Builder::new();
                    // A client that disconnects is not a failure of the server.
                    let _ = http.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        shardmill_tls::install();
        let store = AmazonS3Builder::new()
            .with_bucket_name(BUCKET)
            .with_endpoint(&endpoint)
            .with_access_key_id(KEY)
            .with_secret_access_key(KEY)
            .with_region("us-east-1")
            .with_allow_http(true);
        Ok(Self { endpoint, folder, store: Arc::new(store.build()?) })
    }

    fn empty(&self) -> Result<()> {
        let bucket = self.folder.path().join(BUCKET);
        if bucket.exists() {
            fs::remove_dir_all(&bucket)?;
        }
        Ok(fs::create_dir(bucket)?)
    }

    /// Returns the bytes of all objects in a folder of the bucket.
    fn bytes_in(&self, folder: &str) -> Result<u64> {
        let mut sum = 0;
        let mut folders = vec![self.folder.path().join(BUCKET).join(folder)];
        while let Some(folder) = folders.pop() {
            for entry in folder.read_dir()? {
                let entry = entry?;
                match entry.file_type()?.is_dir() {
                    true => folders.push(entry.path()),
                    false => sum += entry.metadata()?.len(),
                }
            }
        }
        Ok(sum)
    }
}

/// Writes a file of lines, as large as the amount that both sides write.
pub fn write_lines(path: &Path) -> Result<()> {
    let mut text = String::with_capacity(TOTAL_MIB * MIB);
    for id in 0..TOTAL_MIB * MIB / LINE_BYTES {
        let begin = format!("{{\"id\":{id},\"note\":\"");
        let end = "\"}\n";
        text.push_str(&begin);
        // No two lines are equal.
        let mut random = fastrand::Rng::with_seed(id as u64);
        for _ in 0..LINE_BYTES - begin.len() - end.len() {
            text.push(random.alphanumeric());
        }
        text.push_str(end);
    }
    Ok(fs::write(path, text)?)
}

/// Measures a whole run, including its start and end, in MiB per second.
pub fn pipeline(server: &Server, folder: &Path, lines: &Path) -> Result<f64> {
    server.empty()?;
    let state = folder.join("state/objects");
    if state.exists() {
        fs::remove_dir_all(&state)?;
    }
    let endpoint = &server.endpoint;
    let text = format!(
        r#"
[pipeline]
name = "objects"
state_dir = "state"
[source]
type = "file"
path = {lines:?}
format = "application/json"
[[sink]]
name = "lake"
type = "objects"
url = "s3://{BUCKET}/ours"
compression = "none"
options = {{ aws_endpoint = "{endpoint}", aws_access_key_id = "{KEY}", aws_secret_access_key = "{KEY}", aws_region = "us-east-1" }}
[sink.commit]
rows = 1000000
bytes = "{OBJECT_MIB} MiB"
linger = "60 s"
"#
    );
    let path = folder.join("objects.toml");
    fs::write(&path, text)?;
    let begun = Instant::now();
    child::cost(child::shardmill()?.arg("run").arg(&path))?;
    let took = begun.elapsed();
    let written = server.bytes_in("ours")?;
    // The claims are stored beside the data.
    let expected = (TOTAL_MIB * MIB) as u64;
    ensure!(
        (expected..expected + (MIB as u64)).contains(&written),
        "expected {expected} bytes, found {written}"
    );
    Ok(TOTAL_MIB as f64 / took.as_secs_f64())
}

/// Measures the bare loop, which has the bytes in memory, in MiB per second.
pub async fn bare_puts(server: &Server, lines: &Path) -> Result<f64> {
    server.empty()?;
    let bytes = Bytes::from(fs::read(lines)?);
    let begun = Instant::now();
    for (number, from) in (0..bytes.len()).step_by(OBJECT_MIB * MIB).enumerate() {
        let to = (from + OBJECT_MIB * MIB).min(bytes.len());
        let path = object_store::path::Path::from(format!("bare/{number:06}.ndjson"));
        let put = server.store.put(&path, bytes.slice(from..to).into());
        put.await.context("PutObject failed")?;
    }
    let took = begun.elapsed();
    ensure!(
        server.bytes_in("bare")? == bytes.len() as u64,
        "the bare loop wrote other bytes than it was given"
    );
    Ok(TOTAL_MIB as f64 / took.as_secs_f64())
}
