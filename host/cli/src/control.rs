//! Commands to a running pipeline: found through its state folder, asked by HTTP on loopback.

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::Serialize;
use serde_json::Value;

use shardmill_config::PipelineConfig;
use shardmill_core::retry::RetryPolicy;
use shardmill_engine::lock::PipelineLock;
use shardmill_serve::admin::control::ControlAddress;

/// Time limit for a running pipeline to answer its first request.
const FIND_MAX: Duration = Duration::from_secs(30);
/// Time limit of one attempt within [`FIND_MAX`]. A full port may close a connection, so it is tried again.
const ASK_MAX: Duration = Duration::from_secs(10);
/// Pauses between attempts to reach a pipeline that is starting or busy.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_secs(1), Duration::from_secs(3)).with_jitter();

/// A pipeline that runs on this machine.
pub(super) struct RunningPipeline {
    client: reqwest::Client,
    base: String,
    token: String,
}

/// Answer of a running pipeline.
pub(super) enum ControlAnswer {
    /// The change was made; its report.
    Done(Value),
    /// Nothing was changed; the report gives the reason.
    Refused(Value),
}

impl RunningPipeline {
    /// Finds the running pipeline of a configuration.
    ///
    /// While a process holds the pipeline's lock, it is asked again for up to [`FIND_MAX`]: it may be starting,
    /// or busy with other clients. Without such a process a stored address is not used: it belongs to a process
    /// that was killed, and its port may now belong to another user.
    ///
    /// # Errors
    /// The pipeline does not run, or does not answer in time.
    pub(super) async fn find(config: &PipelineConfig) -> anyhow::Result<Self> {
        shardmill_tls::install();
        let client = reqwest::Client::builder().no_proxy().build()?;
        let deadline = Instant::now() + FIND_MAX;
        let mut retries = RETRY.start();
        loop {
            if !PipelineLock::is_taken(&config.state_dir, &config.name)? {
                bail!(
                    "pipeline {} is not running with its state in {}: start it with `shardmill run {}`",
                    config.name,
                    config.state_dir.display(),
                    config.file.path.display()
                );
            }
            let folder = config.state_dir.join(config.name.as_str());
            let asked = match ControlAddress::find(&folder)? {
                Some(at) => Self::ask(&client, at, deadline).await,
                None => Err(anyhow!(
                    "it has stored no address for commands: it may be starting or ending"
                )),
            };
            let cause = match asked {
                Ok(running) => return Ok(running),
                Err(cause) => cause,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(cause.context(format!(
                    "pipeline {} runs with its state in {} and did not answer within {} s; nothing was \
                     changed; see its log for the cause, and try again",
                    config.name,
                    config.state_dir.display(),
                    FIND_MAX.as_secs()
                )));
            }
            tokio::time::sleep(retries.next_pause().min(left)).await;
        }
    }

    /// Asks once, at the address that the process has stored.
    async fn ask(
        client: &reqwest::Client,
        at: ControlAddress,
        deadline: Instant,
    ) -> anyhow::Result<Self> {
        let ControlAddress { address, token } = at;
        let running = Self { client: client.clone(), base: format!("http://{address}"), token };
        let time = ASK_MAX.min(deadline.saturating_duration_since(Instant::now()));
        let asked = running.client.get(format!("{}/changes?limit=1", running.base));
        let answer = asked.timeout(time).bearer_auth(&running.token).send().await?;
        // Another process may now have the port of one that was killed.
        ensure!(answer.status().is_success(), "{address} answered {}", answer.status());
        Ok(running)
    }

    /// Requests a change.
    pub(super) async fn post(
        &self,
        path: &str,
        query: &impl Serialize,
        body: Vec<u8>,
    ) -> anyhow::Result<ControlAnswer> {
        let mut url = url::Url::parse(&format!("{}{path}", self.base))?;
        if let Value::Object(query) = serde_json::to_value(query)? {
            let mut pairs = url.query_pairs_mut();
            for (name, value) in query {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                pairs.append_pair(&name, &value);
            }
        }
        let asked = self.client.post(url).bearer_auth(&self.token).body(body);
        let answer = asked.send().await.context(
            "the pipeline stopped during the request, or closed the connection; `shardmill plugin history` \
             shows whether the change was made",
        )?;
        let status = answer.status();
        let report: Value = serde_json::from_slice(&answer.bytes().await?)
            .with_context(|| format!("the pipeline answered {status}"))?;
        match status.as_u16() {
            200 => Ok(ControlAnswer::Done(report)),
            409 => Ok(ControlAnswer::Refused(report)),
            _ => bail!("{}", report["error"].as_str().unwrap_or("the pipeline gave no reason")),
        }
    }
}
