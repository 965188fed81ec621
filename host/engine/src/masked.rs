//! A wrapper of sinks whose errors show the names of variables instead of their values.
//!
//! A server may quote what it was sent, and errors go to the log, the status, the dead letters and the state. So the
//! texts of every sink pass through here, whatever its type.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use shardmill_config::Values;
use shardmill_core::owner::Ownership;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, ShardKey, SinkName};
use shardmill_core::sink::{
    Acquired, Commit, Committed, EncodeRows, KeptPosition, LookAhead, Refusal, RefusalLog, Sink,
    SinkError, SinkWriter,
};

/// Wraps a sink so that its errors, warnings and refusals show none of the values.
pub fn masked(sink: Arc<dyn Sink>, values: &Values) -> Arc<dyn Sink> {
    match values.is_empty() {
        true => sink,
        false => Arc::new(Masked { inner: sink, values: Arc::new(values.clone()) }),
    }
}

struct Masked {
    inner: Arc<dyn Sink>,
    values: Arc<Values>,
}

fn hidden(values: &Values, error: SinkError) -> SinkError {
    match error {
        SinkError::Fenced { sink, shard, detail, by } => {
            SinkError::Fenced { sink, shard, detail: values.hide(detail), by }
        }
        SinkError::Unavailable { sink, cause } => {
            SinkError::Unavailable { sink, cause: values.hide(cause) }
        }
        SinkError::Closed { sink, cause } => SinkError::Closed { sink, cause: values.hide(cause) },
        SinkError::TooManyRefused { sink, cause } => {
            SinkError::TooManyRefused { sink, cause: values.hide(cause) }
        }
    }
}

impl Masked {
    fn hidden<T>(&self, result: Result<T, SinkError>) -> Result<T, SinkError> {
        result.map_err(|error| hidden(&self.values, error))
    }
}

#[async_trait]
impl Sink for Masked {
    fn name(&self) -> &SinkName {
        self.inner.name()
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        self.hidden(self.inner.prepare(routes).await)
    }

    async fn check(&self, routes: &[BoundRoute]) -> Result<Vec<String>, SinkError> {
        let warnings = self.hidden(self.inner.check(routes).await)?;
        Ok(warnings.into_iter().map(|warning| self.values.hide(warning)).collect())
    }

    async fn reach(&self, shard: &ShardKey) -> Result<(), SinkError> {
        self.hidden(self.inner.reach(shard).await)
    }

    fn acquires_last(&self) -> bool {
        self.inner.acquires_last()
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let acquired = self.hidden(self.inner.acquire(shard).await)?;
        let (inner, values) = (acquired.writer, Arc::clone(&self.values));
        Ok(Acquired { writer: Box::new(MaskedWriter { inner, values }), ..acquired })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        self.hidden(self.inner.position(shard).await)
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        self.hidden(self.inner.adopt(old, shard).await)
    }

    fn set_ownership(&self, ownership: Ownership) {
        self.inner.set_ownership(ownership);
    }

    async fn kept_positions(
        &self,
        pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        self.hidden(self.inner.kept_positions(pipeline, shards).await)
    }
}

struct MaskedWriter {
    inner: Box<dyn SinkWriter>,
    values: Arc<Values>,
}

#[async_trait]
impl SinkWriter for MaskedWriter {
    fn encodes_rows(&self) -> Option<Arc<dyn EncodeRows>> {
        self.inner.encodes_rows()
    }

    fn looks_ahead(&self) -> Option<Arc<dyn LookAhead>> {
        self.inner.looks_ahead()
    }

    fn copies_rows(&self) -> bool {
        self.inner.copies_rows()
    }

    fn calls(&self) -> &'static str {
        self.inner.calls()
    }

    fn asked_to_wait(&self) -> Option<Duration> {
        self.inner.asked_to_wait()
    }

    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let log = MaskedLog { inner: refusals, values: &self.values };
        let committed = self.inner.commit(commit, &log).await;
        committed.map_err(|error| hidden(&self.values, error))
    }
}

/// A log of refused rows whose reasons show no value.
struct MaskedLog<'a> {
    inner: &'a dyn RefusalLog,
    values: &'a Values,
}

#[async_trait]
impl RefusalLog for MaskedLog<'_> {
    async fn record(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        let hidden = |refusal: &Refusal| {
            let reason = self.values.hide(refusal.reason.clone());
            Refusal { row: refusal.row, reason }
        };
        let refusals: Vec<Refusal> = refusals.iter().map(hidden).collect();
        self.inner.record(commit, &refusals).await
    }

    fn check(&self, commit: &Commit, refused: &[usize]) -> Result<(), SinkError> {
        self.inner.check(commit, refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_17_an_error_that_repeats_a_url_shows_no_value() {
        for (value, written, shown) in [
            ("back\\slash9secret", "/p/back\\slash9secret/x", "/p/back/slash9secret/x"),
            ("quo\"te\\back9", "/p/quo\"te\\back9/x", "/p/quo%22te/back9/x"),
            ("quo\"te\\sec", "/x?k=quo\"te\\sec", "/x?k=quo%22te\\sec"),
            ("a/../sec ret<ü>", "/p/a/../sec ret<ü>/x", "/p/sec%20ret%3C%C3%BC%3E/x"),
            ("sec\nret'x", "/x#sec\nret'x", "/x#secret'x"),
        ] {
            let mut values = Values::default();
            values.add("S", value);
            let url = url::Url::parse(&format!("http://127.0.0.1:1{written}")).expect("a URL");
            assert!(url.as_str().ends_with(shown), "{url}");
            let json = serde_json::to_string(url.as_str()).expect("JSON");
            let twice = serde_json::to_string(&json).expect("JSON");
            let html = json.replace('&', "&amp;").replace('"', "&quot;").replace('\'', "&#39;");
            let lower = url.as_str().to_ascii_lowercase();
            let upper = url.as_str().to_ascii_uppercase();
            for cause in [url.as_str(), &json, &twice, &html, &lower, &upper] {
                let error = SinkError::Unavailable { sink: "mart".into(), cause: cause.to_owned() };
                let SinkError::Unavailable { cause: found, .. } = hidden(&values, error) else {
                    panic!("another error: {cause}")
                };
                let begins = found.find("${S}").unwrap_or_else(|| panic!("{cause}: {found}"));
                let rest = found[begins..].to_ascii_lowercase().replace("&quot;", "");
                let parts = ["sec", "back", "ret", "quo"];
                assert!(!parts.iter().any(|part| rest.contains(part)), "{cause}: {found}");
                assert!(!found.contains("te\\"), "{cause}: {found}");
            }
        }
    }
}
