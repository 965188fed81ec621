//! Puts records on a stream, in order per partition key, and retries records that were refused for now.
//!
//! [`Producer`] gathers records into requests, by [`put`](super::put). It delivers at least once: when the network
//! fails after a request was sent, nobody knows whether the stream has its records, and they are put again.
//!
//! Order of the buffer after a request: first what was refused, then what did not go with the request. So a refused
//! record is put before any later record of its key that the stream does not have yet.
//!
//! | answer for a record | then |
//! |---|---|
//! | taken | counted, and leaves the buffer |
//! | refused for now | back to the front of the buffer; the next request follows after a backoff |
//! | refused for good | [`Producer::put`] or [`Producer::flush`] fails; the buffer is dropped |
//! | the call failed for now | all records of the request go back; some may be put twice |
//! | the call failed for good | as refused for good |

use std::time::Duration;

use aws_sdk_kinesis::Client;

use super::put::{Offer, Outcomes, PutAnswer, PutOptions, PutWriter, Refused};
use super::put_call::{BYTES_PER_REQUEST_MAX, NewRecord, RECORDS_PER_REQUEST_MAX, StreamWriter};
use shardmill_core::boxed;
use shardmill_core::record::StreamRef;
use shardmill_core::retry::RetryPolicy;
use shardmill_core::source::SourceError;

/// Retries of records that the stream refuses for now.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(100), Duration::from_secs(5)).with_jitter();

/// Counts of what was put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PutReport {
    /// Records that the stream has.
    pub records: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Number of times that a record was put again, because the stream refused it for now or a call failed.
    pub retried: u64,
}

/// Producer of records. Those that are not put yet wait in the buffer until [`Producer::flush`].
pub struct Producer {
    writer: PutWriter,
    /// Name of the stream, for messages.
    place: String,
    buffer: Vec<NewRecord>,
    buffer_bytes: usize,
    report: PutReport,
}

impl Producer {
    /// Makes a producer for a stream.
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

    /// Sets whether a request has at most one record per partition key.
    ///
    /// The stream may refuse a record and take a later one of the same key from the same request; what it has taken
    /// cannot be taken back. With strict order no request has two records of one key, so the order per key always
    /// holds. Few keys then make small requests.
    pub fn strict_order(mut self, is_strict: bool) -> Self {
        self.writer = self.writer.strict_order(is_strict);
        self
    }

    /// Returns the counts so far.
    pub fn report(&self) -> PutReport {
        self.report
    }

    /// Adds a record to the buffer. Puts a full buffer first.
    ///
    /// # Errors
    /// [`SourceError`]; some records of the buffer may have been put.
    pub async fn put(&mut self, record: NewRecord) -> Result<(), SourceError> {
        let bytes = record.bytes();
        while self.buffer.len() >= RECORDS_PER_REQUEST_MAX
            || (!self.buffer.is_empty() && self.buffer_bytes + bytes > BYTES_PER_REQUEST_MAX)
        {
            match self.writer.is_strict() {
                // One request makes room. What it left in the buffer fills the next one together with new records.
                true => self.request().await?,
                false => self.flush().await?,
            }
        }
        self.buffer_bytes += bytes;
        self.buffer.push(record);
        Ok(())
    }

    /// Puts the buffer, until the stream has all of it.
    ///
    /// Without [`Producer::strict_order`] the order per partition key holds as far as the API gives it. A refused
    /// record is put again before any record that is not in the buffer yet. But a later record of its key in the same
    /// request may have been taken, and stays on the stream before it.
    ///
    /// # Errors
    /// [`SourceError`] when a retry does not help.
    pub async fn flush(&mut self) -> Result<(), SourceError> {
        while !self.buffer.is_empty() {
            self.request().await?;
        }
        Ok(())
    }

    /// Puts one request from the buffer. If records are refused for now, they go back to the front, and a pause
    /// follows.
    #[boxed]
    async fn request(&mut self) -> Result<(), SourceError> {
        let mut request = self.writer.request();
        let mut waiting = Vec::new();
        // An error below leaves the buffer empty.
        self.buffer_bytes = 0;
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
                tracing::warn!(error = %cause, "failed to put records, trying again");
                records.into_iter().map(|(_, record)| record).collect()
            }
            PutAnswer::Records { error, .. } | PutAnswer::Stream { error, .. } => {
                return Err(error);
            }
        };
        let is_paused = !refused.is_empty();
        self.report.retried += refused.len() as u64;
        // A refused record is older than any waiting record of its key.
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
