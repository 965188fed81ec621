//! Commands to a pipeline that runs: found by its folder, asked by HTTP on loopback.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;
use serde_json::Value;

use crate::admin::control::ControlAddress;
use crate::config::PipelineConfig;
use crate::lease::PipelineLock;

/// Time for a running pipeline to answer that it is there.
const FIND_MAX: Duration = Duration::from_secs(30);

/// A pipeline that runs on this machine.
pub(super) struct RunningPipeline {
    client: reqwest::Client,
    base: String,
    token: String,
}

/// What it answered: the report, or why nothing was changed.
pub(super) enum Answer {
    /// The report.
    Done(Value),
    /// Nothing was changed; the report says why.
    Refused(Value),
}

impl RunningPipeline {
    /// Finds the pipeline of a configuration; `None`: it does not run. Without a process that has the
    /// pipeline's lock, an address is of one that was killed, and its port may be another user's by now.
    pub(super) async fn find(config: &PipelineConfig) -> anyhow::Result<Option<Self>> {
        if !PipelineLock::is_taken(&config.state_dir, &config.name)? {
            return Ok(None);
        }
        let folder = config.state_dir.join(config.name.as_str());
        let Some(ControlAddress { address, token }) = ControlAddress::find(&folder) else {
            return Ok(None);
        };
        crate::tls::install();
        let client = reqwest::Client::builder().no_proxy().build()?;
        let running = Self { client, base: format!("http://{address}"), token };
        // Another process may have the port of one that was killed.
        let asked = running.client.get(format!("{}/changes?limit=1", running.base));
        let asked = asked.timeout(FIND_MAX).bearer_auth(&running.token);
        let answer = asked.send().await;
        Ok(answer.is_ok_and(|answer| answer.status().is_success()).then_some(running))
    }

    /// As [`RunningPipeline::find`], where nothing can be done without it.
    pub(super) async fn due(config: &PipelineConfig) -> anyhow::Result<Self> {
        let found = Self::find(config).await?;
        found.with_context(|| {
            format!(
                "pipeline {} does not run with its state in {}: start it with `shardmill run {}`",
                config.name,
                config.state_dir.display(),
                config.file.path.display()
            )
        })
    }

    /// Asks for a change.
    pub(super) async fn post(
        &self,
        path: &str,
        query: &impl Serialize,
        body: Vec<u8>,
    ) -> anyhow::Result<Answer> {
        let mut url = url::Url::parse(&format!("{}{path}", self.base))?;
        if let Value::Object(query) = serde_json::to_value(query)? {
            let mut pairs = url.query_pairs_mut();
            for (name, value) in query {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                pairs.append_pair(&name, &value);
            }
        }
        let asked = self.client.post(url).bearer_auth(&self.token).body(body);
        let answer = asked.send().await.context("the pipeline has stopped meanwhile")?;
        let status = answer.status();
        let report: Value = serde_json::from_slice(&answer.bytes().await?)
            .with_context(|| format!("the pipeline answered {status}"))?;
        match status.as_u16() {
            200 => Ok(Answer::Done(report)),
            409 => Ok(Answer::Refused(report)),
            _ => bail!("{}", report["error"].as_str().unwrap_or("the pipeline gave no reason")),
        }
    }
}
