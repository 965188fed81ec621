//! Choice of the stream of a command, by options or by a pipeline file, and the connection to it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use aws_sdk_kinesis::Client;
use url::Url;

use super::super::{DEFAULT_PIPELINE, load};
use shardmill_config::{Endpoint, StreamServer, Timing};
use shardmill_core::private::StateDir;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::client;
use shardmill_kinesis::client::Address;
use shardmill_kinesis::served;

/// Longest wait for another process to serve the embedded stream.
const SERVED_WAIT_MAX: Duration = Duration::from_secs(3);
const SERVED_LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Options that choose a stream and its server.
#[derive(clap::Args)]
pub struct StreamPlace {
    /// Name or ARN of the stream [default: the pipeline's stream].
    #[arg(long, value_name = "NAME", value_parser = StreamRef::parse)]
    stream: Option<StreamRef>,
    /// The pipeline file that names the stream [default: pipeline.toml, if it exists].
    #[arg(long, value_name = "FILE")]
    pipeline: Option<PathBuf>,
    /// `embedded`, `aws`, or a URL [default: the pipeline's endpoint].
    #[arg(long)]
    endpoint: Option<String>,
    /// AWS region [default: the pipeline's region, or the standard AWS chain].
    #[arg(long)]
    region: Option<String>,
    /// State folder, where the address of the embedded stream is found.
    #[arg(long, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
}

/// A resolved choice of a stream.
pub(super) struct ResolvedStream {
    stream: Option<StreamRef>,
    server: StreamServer,
    timing: Timing,
    pub state_dir: StateDir,
}

impl StreamPlace {
    /// Whether the stream was named on the command line, not taken from a pipeline file.
    pub(super) fn names_stream(&self) -> bool {
        self.stream.is_some()
    }

    pub(super) fn resolve(&self) -> anyhow::Result<ResolvedStream> {
        let default = Path::new(DEFAULT_PIPELINE);
        let pipeline = match &self.pipeline {
            Some(file) => Some(load(file)?),
            None if default.exists() => Some(load(default)?),
            None => None,
        };
        let kinesis = pipeline.as_ref().and_then(|it| it.source.kinesis());
        let endpoint = match self.endpoint.as_deref() {
            Some("embedded") => Endpoint::Embedded,
            Some("aws") => Endpoint::Aws,
            Some(url) => Endpoint::Url(Url::parse(url).with_context(|| {
                format!("invalid --endpoint {url}: expected `embedded`, `aws` or a URL")
            })?),
            None => kinesis.map_or(Endpoint::Aws, |it| it.server.endpoint.clone()),
        };
        let stream = self.stream.clone().or(kinesis.map(|it| it.stream.value.clone()));
        let region = self.region.clone().or(kinesis.and_then(|it| it.server.region.clone()));
        let assume_role = kinesis.and_then(|it| it.server.assume_role.clone());
        Ok(ResolvedStream {
            stream,
            server: StreamServer { endpoint, region, assume_role },
            timing: pipeline.as_ref().map(|it| it.timing).unwrap_or_default(),
            state_dir: match (&self.state_dir, pipeline) {
                (Some(folder), _) => super::super::with_trust(folder.clone().into()),
                (None, Some(pipeline)) => pipeline.state_dir,
                (None, None) => super::super::with_trust(PathBuf::from("state").into()),
            },
        })
    }

    pub(super) async fn connect(&self) -> anyhow::Result<(ResolvedStream, Client)> {
        let target = self.resolve()?;
        let address = match &target.server.endpoint {
            Endpoint::Aws => None,
            Endpoint::Url(url) => Some(Address::Url(url.clone())),
            Endpoint::Embedded => {
                // Otherwise another user could redirect this one to a stream of their own.
                target.state_dir.check(served::FOLDER)?;
                Some(embedded_address(&target.state_dir).await?)
            }
        };
        let server = client::Server::of(&target.server, target.stream.as_ref(), address.as_ref());
        let client = client::connect(&server.with_timing(&target.timing)).await?;
        Ok((target, client))
    }
}

impl ResolvedStream {
    pub fn name(&self) -> anyhow::Result<&StreamRef> {
        self.stream
            .as_ref()
            .context("missing stream: name it with --stream, or a pipeline with --pipeline")
    }
}

/// Finds the embedded stream that another process serves. Waits for one that was started a moment ago, as by
/// `shardmill stream serve &` in a script.
///
/// # Errors
/// None is served within [`SERVED_WAIT_MAX`].
pub(super) async fn embedded_address(state_dir: &Path) -> anyhow::Result<Address> {
    let begun = Instant::now();
    loop {
        if let Some(served) = served::find(state_dir) {
            return Ok(Address::Served(served));
        }
        anyhow::ensure!(
            begun.elapsed() < SERVED_WAIT_MAX,
            "no embedded stream found in {}: start one with `shardmill stream serve`",
            state_dir.display()
        );
        tokio::time::sleep(SERVED_LOOK_INTERVAL).await;
    }
}
