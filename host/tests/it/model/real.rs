//! Servers of real sinks: the throw-away PostgreSQL, and moto as S3.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use futures::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use shardmill_config::WriteMode;
use shardmill_core::sink::Sink;
use shardmill_sink_objects::{Compression, ObjectsSink};
use shardmill_sink_postgres::{CONNECTIONS_MAX, PostgresSink, PostgresTarget};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::Process;

/// Two tables in a schema of their own. They refuse ids that end with a 7.
pub struct Tables {
    schema: String,
}

impl Tables {
    pub async fn create(seed: u64) -> Self {
        let schema = format!("model_{}_{seed}", std::process::id());
        let table = |name| {
            format!(
                "CREATE TABLE {schema}.{name} (place bigserial, id bigint NOT NULL \
                 CHECK (id % 10 <> 7), side int NOT NULL)"
            )
        };
        sql(format!("CREATE SCHEMA {schema}; {}; {}", table("left_"), table("right_"))).await;
        Self { schema }
    }

    pub fn sink(&self, table: &str) -> Arc<dyn Sink> {
        let (url, full) = (crate::support::postgres_url(), format!("{}.{table}_", self.schema));
        let sink = PostgresSink::new(
            table.into(),
            &PostgresTarget {
                url,
                table: full,
                create: false,
                mode: WriteMode::Append,
                connections_max: CONNECTIONS_MAX,
                lineage: false,
                written_for: None,
            },
        );
        Arc::new(sink.expect("a sink"))
    }

    /// Returns the ids in the order in which they were committed.
    pub async fn ids(&self, table: &str) -> Vec<u64> {
        let found = sql(format!("SELECT id FROM {}.{table}_ ORDER BY place", self.schema)).await;
        found.iter().map(|id| id.parse().expect("a number")).collect()
    }

    pub async fn remove(&self) {
        sql(format!("DROP SCHEMA {} CASCADE", self.schema)).await;
    }
}

async fn sql(sql: String) -> Vec<String> {
    tokio::task::spawn_blocking(move || crate::support::postgres(&sql)).await.expect("no panic")
}

const BUCKET: &str = "marts";

/// Bucket of a moto server of its own.
pub struct Bucket {
    _server: Process,
    endpoint: String,
    store: Arc<dyn ObjectStore>,
}

impl Bucket {
    pub async fn start() -> Self {
        let port = crate::support::free_port();
        let mut command = Command::new("python");
        crate::support::with_tools(&mut command).args(["-m", "moto.server", "-H", "127.0.0.1"]);
        command.args(["-p", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Process(command.spawn().expect("moto starts"));
        let request = format!(
            "PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        );
        let begun = std::time::Instant::now();
        while !ask(port, &request).await.is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            assert!(begun.elapsed().as_secs() < 60, "moto does not answer");
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        let endpoint = format!("http://127.0.0.1:{port}");
        shardmill_tls::install();
        let store = AmazonS3Builder::new()
            .with_bucket_name(BUCKET)
            .with_endpoint(&endpoint)
            .with_access_key_id("model")
            .with_secret_access_key("model")
            .with_region("us-east-1")
            .with_allow_http(true);
        let store = Arc::new(store.build().expect("a client"));
        Self { _server: server, endpoint, store }
    }

    pub fn sink(&self, seed: u64, name: &str) -> Arc<dyn Sink> {
        let options = [
            ("aws_endpoint", self.endpoint.as_str()),
            ("aws_access_key_id", "model"),
            ("aws_secret_access_key", "model"),
            ("aws_region", "us-east-1"),
        ];
        let options: BTreeMap<String, String> =
            options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let url = format!("s3://{BUCKET}/{seed}").parse().expect("a URL");
        let sink = ObjectsSink::new(name.into(), &url, &options, Compression::Gzip);
        Arc::new(sink.expect("a sink"))
    }

    /// Returns the lines of all objects.
    pub async fn rows(&self, seed: u64) -> Vec<String> {
        let listing = self.store.list(Some(&Path::from(seed.to_string())));
        let objects: Vec<_> = listing.try_collect().await.expect("a listing");
        let mut keys: Vec<Path> = objects.into_iter().map(|object| object.location).collect();
        keys.retain(|key| key.extension() == Some("gz"));
        let mut rows = Vec::new();
        for key in keys {
            let bytes = self.store.get(&key).await.expect("an object").bytes().await;
            let mut text = String::new();
            let bytes = bytes.expect("its bytes");
            flate2::read::GzDecoder::new(&bytes[..]).read_to_string(&mut text).expect("lines");
            rows.extend(text.lines().map(str::to_owned));
        }
        rows
    }
}

/// Sends one raw request; `None` if nobody listens.
async fn ask(port: u16, request: &str) -> Option<String> {
    let mut connection = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    connection.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}
