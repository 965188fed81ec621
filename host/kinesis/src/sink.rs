//! Kinesis sink: puts rows as records on another stream, at least once.
//!
//! A stream cannot store a position together with its records. So after a crash, the rows since the host's last
//! checkpoint are put again. Within a run, a row is put twice only if the network fails after a request was sent: the
//! sink keeps which rows were taken while it retries the others.

mod settings;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_kinesis::Client;
use tokio::sync::OnceCell;

use crate::client;
use crate::client::{Address, Server};
use crate::put::{Offer, Outcomes, PutAnswer, PutOptions, PutRequest, PutWriter, Refused};
use crate::put_call::{NewRecord, RECORDS_PER_REQUEST_MAX, StreamWriter};
use crate::served;
use crate::stream;
use shardmill_config::{Endpoint, Timing};
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{Position, Row, ShardKey, SinkName};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::sink::{
    Acquired, Commit, Committed, Refusal, RefusalLog, Sink, SinkError, SinkWriter,
};
use shardmill_sinks_common::progress::CommitProgress;

pub use self::settings::{StreamTarget, TYPE};

/// Retries of rows that a stream refuses for now, before the lane shows as blocked. Each shard takes 1 MiB and 1,000
/// records a second, so throttling is usual.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(50), Duration::from_secs(1)).tries(8);

/// A stream that rows are put on.
pub struct KinesisSink {
    name: SinkName,
    target: StreamTarget,
    state_dir: PathBuf,
    timing: Timing,
    client: OnceCell<Client>,
}

impl KinesisSink {
    /// Makes a sink on a stream. Connects to nothing yet. `state_dir` is where an embedded stream is found.
    pub fn new(name: SinkName, target: StreamTarget, state_dir: PathBuf) -> Self {
        Self { name, target, state_dir, timing: Timing::default(), client: OnceCell::new() }
    }

    /// Sets the deadlines of a pipeline.
    pub fn with_timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    async fn client(&self) -> Result<&Client, SinkError> {
        self.client.get_or_try_init(|| self.connect()).await
    }

    async fn connect(&self) -> Result<Client, SinkError> {
        let address = match &self.target.server.endpoint {
            Endpoint::Aws => None,
            Endpoint::Url(url) => Some(Address::Url(url.clone())),
            Endpoint::Embedded => {
                let served = served::find(&self.state_dir).ok_or_else(|| {
                    self.unavailable(
                        "no process serves the embedded stream: start one with `shardmill stream serve`",
                    )
                })?;
                Some(Address::Served(served))
            }
        };
        let server = Server::of(&self.target.server, Some(&self.target.stream), address.as_ref());
        let server = server.with_timing(&self.timing);
        client::connect(&server).await.map_err(|error| self.unavailable(error))
    }

    fn unavailable(&self, cause: impl std::fmt::Display) -> SinkError {
        SinkError::Unavailable { sink: self.name.clone(), cause: cause.to_string() }
    }
}

#[async_trait]
impl Sink for KinesisSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        let found = stream::describe(self.client().await?, &self.target.stream).await;
        let status = found.map_err(|error| self.unavailable(error))?.status;
        match &*status {
            // A stream accepts records while its shards change.
            "ACTIVE" | "UPDATING" => Ok(()),
            _ => Err(self.unavailable(format!(
                "expected stream {} to be ACTIVE, found {status}: wait until it is",
                self.target.stream
            ))),
        }
    }

    async fn acquire(&self, _shard: &ShardKey) -> Result<Acquired, SinkError> {
        let stream = StreamWriter::new(self.client().await?.clone(), self.target.stream.clone());
        let strict_order = self.target.strict_order;
        let options = PutOptions { strict_order, retry: RETRY, answer_max: None };
        let writer = KinesisWriter {
            sink: self.name.clone(),
            stream: PutWriter::new(stream, options),
            progress: CommitProgress::default(),
        };
        let writer = Box::new(writer);
        Ok(Acquired { writer, position: None, keeps_position: false, must_cut_at: None })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }
}

struct KinesisWriter {
    sink: SinkName,
    stream: PutWriter,
    progress: CommitProgress,
}

impl KinesisWriter {
    /// Puts the waiting rows, until none waits.
    async fn put_all(&mut self, rows: &Arc<Vec<Row>>) -> Result<(), SinkError> {
        // The retries of the commit before do not count for this one.
        self.stream.succeeded();
        let mut records_max = RECORDS_PER_REQUEST_MAX;
        loop {
            let request = self.request(rows, records_max);
            if request.is_empty() {
                return Ok(());
            }
            let later = match self.stream.put(request).await {
                PutAnswer::Each(outcomes) => {
                    records_max = RECORDS_PER_REQUEST_MAX;
                    self.note(outcomes)
                }
                PutAnswer::Later { cause, .. } => Some(cause),
                // One of the records is the culprit: requests are halved until it is alone, and then it is refused.
                PutAnswer::Records { records, error } => {
                    match &records[..] {
                        [(alone, _)] => self.progress.refuse(*alone, error.to_string()),
                        _ => records_max = records.len() / 2,
                    }
                    None
                }
                PutAnswer::Stream { error, .. } => return Err(self.unavailable(error)),
            };
            let Some(cause) = later else {
                self.stream.succeeded();
                continue;
            };
            let pause = self.stream.retry_after().ok_or_else(|| self.unavailable(cause))?;
            tokio::time::sleep(pause).await;
        }
    }

    /// Makes the next request of the oldest waiting rows; with strict order, at most one per key. Refuses rows that no
    /// stream accepts.
    fn request(&mut self, rows: &[Row], records_max: usize) -> PutRequest<usize> {
        let mut request = self.stream.request().with_records_max(records_max);
        for place in self.progress.waiting() {
            match record(&rows[place]).map(|record| request.offer(place, record)) {
                Ok(Offer::Added | Offer::KeyWaits(..)) => {}
                Ok(Offer::Full(..)) => break,
                Err(reason) => self.progress.refuse(place, reason),
            }
        }
        request
    }

    /// Notes the outcome of a request's rows. Returns the cause if some of them must wait.
    fn note(&mut self, outcomes: Outcomes<usize>) -> Option<String> {
        let Outcomes { taken, later, never } = outcomes;
        taken.iter().for_each(|(place, _)| self.progress.done(*place));
        for Refused { tag: place, cause, .. } in never {
            self.progress.refuse(place, cause);
        }
        later.into_iter().last().map(|refused| refused.cause)
    }

    fn unavailable(&self, cause: impl std::fmt::Display) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.to_string() }
    }
}

#[async_trait]
impl SinkWriter for KinesisWriter {
    fn calls(&self) -> &'static str {
        "PutRecords"
    }

    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        self.progress.enter(commit);
        self.put_all(&commit.rows).await?;
        let refused: Vec<Refusal> = self.progress.refusals();
        if !refused.is_empty() {
            refusals.record(commit, &refused).await?;
        }
        Ok(self.progress.committed(commit))
    }
}

fn record(row: &Row) -> Result<NewRecord, String> {
    let key = std::str::from_utf8(&row.key)
        .map_err(|_| "the partition key is not valid UTF-8, which Kinesis requires".to_owned())?;
    let record = NewRecord { partition_key: key.to_owned(), payload: row.payload.clone() };
    record.check().map_err(|error| error.to_string())?;
    Ok(record)
}
