//! A sink whose errors show the names of variables in the place of their values.
//!
//! A server may repeat what it was sent, and errors go into the log, the status, the dead letters and the state. So
//! the texts of every sink pass here, whatever its kind.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{
    Acquired, BoundRoute, Commit, Committed, EncodeRows, KeptPosition, LookAhead, Refusal,
    RefusalLog, Sink, SinkError, SinkWriter,
};
use crate::config::Values;
use crate::position::Ownership;
use crate::record::{PipelineName, Position, ShardKey, SinkName};

/// The same sink; its errors, warnings and refusals show none of the values.
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

    fn own(&self, ownership: Ownership) {
        self.inner.own(ownership);
    }

    async fn kept(
        &self,
        pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        self.hidden(self.inner.kept(pipeline, shards).await)
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

/// Where refused rows are kept, with reasons that show no value.
struct MaskedLog<'a> {
    inner: &'a dyn RefusalLog,
    values: &'a Values,
}

#[async_trait]
impl RefusalLog for MaskedLog<'_> {
    async fn hold(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        let hidden = |refusal: &Refusal| {
            let reason = self.values.hide(refusal.reason.clone());
            Refusal { row: refusal.row, reason }
        };
        let refusals: Vec<Refusal> = refusals.iter().map(hidden).collect();
        self.inner.hold(commit, &refusals).await
    }

    fn check(&self, commit: &Commit, refused: &[usize]) -> Result<(), SinkError> {
        self.inner.check(commit, refused)
    }
}
