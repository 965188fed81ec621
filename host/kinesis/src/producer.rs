//! Puts records on a stream, in order per partition key, and tries partial failures again.
//!
//! [`Producer`] gathers records into requests, by [`put`](super::put), and puts what was refused for now once more. It
//! delivers at least once: when the network fails after a request, nobody knows whether the stream has its records,
//! and they are put again.

use std::time::Duration;

use aws_sdk_kinesis::Client;

use super::put::{Offer, Outcomes, PutAnswer, PutOptions, PutWriter, Refused};
use super::put_call::{BYTES_PER_REQUEST_MAX, NewRecord, RECORDS_PER_REQUEST_MAX, StreamWriter};
use shardmill_core::boxed;
use shardmill_core::record::StreamRef;
use shardmill_core::retry::RetryPolicy;
use shardmill_core::source::SourceError;

/// Records that the stream refuses for now.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(100), Duration::from_secs(5)).with_jitter();

/// What was put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PutReport {
    /// Records that the stream has.
    pub records: u64,
    /// Their payloads' bytes.
    pub bytes: u64,
    /// Records that were put more than once because the stream refused them at first.
    pub retried: u64,
}

/// Puts records; what is not put yet waits in the buffer for [`Producer::flush`].
pub struct Producer {
    writer: PutWriter,
    /// The stream, in messages.
    place: String,
    buffer: Vec<NewRecord>,
    buffer_bytes: usize,
    report: PutReport,
}

impl Producer {
    /// A producer for a stream.
    pub fn new(client: Client, stream: StreamRef) -> Self {
        let place = stream.to_string();
        let options = PutOptions { strict_order: false, retry: RETRY, answer_max: None };
        Self {
            writer: PutWriter::new(StreamWriter::new(client, stream), options),
            place,
            buffer: Vec::new(),
            buffer_bytes: 0,
            report: PutReport::default(),
        }
    }

    /// Whether a request holds at most one record per partition key.
    ///
    /// The stream may refuse a record and take a later one of the same key from the same request;
    /// what it has taken cannot be recalled. With strict order no request holds two records of one
    /// key, so the order per key holds always; few keys make small requests.
    pub fn strict_order(mut self, is_strict: bool) -> Self {
        self.writer = self.writer.strict_order(is_strict);
        self
    }

    /// What the stream has so far.
    pub fn report(&self) -> PutReport {
        self.report
    }

    /// Adds a record; a full buffer is put first.
    ///
    /// # Errors
    /// [`SourceError`]; records of the buffer may have been put.
    pub async fn put(&mut self, record: NewRecord) -> Result<(), SourceError> {
        let bytes = record.bytes();
        while self.buffer.len() >= RECORDS_PER_REQUEST_MAX
            || (!self.buffer.is_empty() && self.buffer_bytes + bytes > BYTES_PER_REQUEST_MAX)
        {
            match self.writer.is_strict() {
                // What waits goes with the next request: no two of a key meet in it.
                true => self.request().await?,
                false => self.flush().await?,
            }
        }
        self.buffer_bytes += bytes;
        self.buffer.push(record);
        Ok(())
    }

    /// Puts what is in the buffer, until the stream has all of it.
    ///
    /// Without [`Producer::strict_order`] the order per partition key holds as far as the API gives
    /// it: when a record of a key is refused, it is put again before any record that is not in the
    /// buffer yet; records of one request that were taken behind it stay where they are.
    ///
    /// # Errors
    /// [`SourceError`] when trying again does not help.
    pub async fn flush(&mut self) -> Result<(), SourceError> {
        while !self.buffer.is_empty() {
            self.request().await?;
        }
        Ok(())
    }

    /// Puts one request from the buffer. What was refused for now goes back to its place, and a pause follows.
    #[boxed]
    async fn request(&mut self) -> Result<(), SourceError> {
        let mut request = self.writer.request();
        let mut waiting = Vec::new();
        for record in std::mem::take(&mut self.buffer) {
            match request.offer(request.len(), record) {
                Offer::Added => {}
                Offer::KeyWaits(_, record) | Offer::Full(_, record) => waiting.push(record),
            }
        }
        let refused: Vec<NewRecord> = match self.writer.put(request).await {
            PutAnswer::Each(Outcomes { taken, later, never }) => {
                for (_, record) in &taken {
                    self.report.records += 1;
                    self.report.bytes += record.payload.len() as u64;
                }
                if let Some(Refused { tag, cause, .. }) = never.into_iter().next() {
                    return Err(SourceError::Call {
                        call: "PutRecords",
                        place: format!("record {tag} of a request to {}", self.place),
                        cause,
                    });
                }
                later.into_iter().map(|refused| refused.record).collect()
            }
            PutAnswer::Later { records, cause } => {
                tracing::warn!(error = %cause, "trying again");
                records.into_iter().map(|(_, record)| record).collect()
            }
            PutAnswer::Records { error, .. } | PutAnswer::Stream { error, .. } => {
                return Err(error);
            }
        };
        let is_paused = !refused.is_empty();
        self.report.retried += refused.len() as u64;
        // A refused record is older than any that waits with its key.
        self.buffer = refused;
        self.buffer.extend(waiting);
        self.buffer_bytes = self.buffer.iter().map(NewRecord::bytes).sum();
        if !is_paused {
            self.writer.succeeded();
        } else if let Some(pause) = self.writer.retry_after() {
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }
}
