//! Puts records on a stream, in order per partition key, and tries partial failures again.

use std::collections::HashSet;
use std::time::Duration;

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::PutRecordsRequestEntry;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;

use super::SourceError;
use super::client::{Fault, call_error, fault};
use crate::record::StreamRef;

/// Records of one request.
///
/// Source: API reference, PutRecords.
const RECORDS_PER_REQUEST_MAX: usize = 500;
/// Bytes of one request; half of what PutRecords takes, so that no server's own limit is met.
const BYTES_PER_REQUEST_MAX: usize = 5 << 20;
/// The longest pause before what was refused is put again.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(5);

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

/// A record to put.
#[derive(Clone, Debug)]
pub struct NewRecord {
    /// 1 to 256 characters.
    pub partition_key: String,
    /// Up to the stream's limit, 1 MiB by default.
    pub payload: Bytes,
}

/// Puts records; what is not put yet waits in the buffer for [`Producer::flush`].
pub struct Producer {
    client: Client,
    stream: StreamRef,
    buffer: Vec<NewRecord>,
    buffer_bytes: usize,
    report: PutReport,
}

impl Producer {
    /// A producer for a stream.
    pub fn new(client: Client, stream: StreamRef) -> Self {
        Self { client, stream, buffer: Vec::new(), buffer_bytes: 0, report: PutReport::default() }
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
        let bytes = record.payload.len() + record.partition_key.len();
        if self.buffer.len() >= RECORDS_PER_REQUEST_MAX
            || (!self.buffer.is_empty() && self.buffer_bytes + bytes > BYTES_PER_REQUEST_MAX)
        {
            self.flush().await?;
        }
        self.buffer_bytes += bytes;
        self.buffer.push(record);
        Ok(())
    }

    /// Puts what is in the buffer, until the stream has all of it.
    ///
    /// The order per partition key holds as far as the API gives it: when a record of a key is
    /// refused, it is put again before any later record of the same key is; records of one request
    /// that were taken behind it stay where they are.
    ///
    /// # Errors
    /// [`SourceError`] when trying again does not help.
    pub async fn flush(&mut self) -> Result<(), SourceError> {
        let mut pauses = pauses();
        let mut records = std::mem::take(&mut self.buffer);
        self.buffer_bytes = 0;
        while !records.is_empty() {
            let refused = self.request(&records).await?;
            if refused.is_empty() {
                break;
            }
            self.report.retried += refused.len() as u64;
            let refused: HashSet<usize> = refused.into_iter().collect();
            let mut index = 0..;
            records.retain(|_| index.next().is_some_and(|index| refused.contains(&index)));
            tokio::time::sleep(pauses.next().unwrap_or(RETRY_PAUSE_MAX)).await;
        }
        Ok(())
    }

    /// One request; gives the indexes of the records that the stream refused for now.
    async fn request(&mut self, records: &[NewRecord]) -> Result<Vec<usize>, SourceError> {
        let entries = records.iter().map(entry).collect::<Result<Vec<_>, _>>();
        let entries = entries.map_err(|cause| self.error(cause))?;
        let (name, arn) = self.stream.name_or_arn();
        let call = self.client.put_records().set_stream_name(name).set_stream_arn(arn);
        let answer = match call.set_records(Some(entries)).send().await {
            Ok(answer) => answer,
            Err(error) => {
                return match fault(&error) {
                    Fault::Throttled | Fault::Passing => Ok((0..records.len()).collect()),
                    Fault::NotFound => {
                        Err(SourceError::NoSuchStream { stream: self.stream.to_string() })
                    }
                    _ => Err(call_error("PutRecords", format!("stream {}", self.stream), &error)),
                };
            }
        };
        let mut refused = Vec::new();
        for (index, (result, record)) in answer.records.iter().zip(records).enumerate() {
            match result.error_code() {
                None => {
                    self.report.records += 1;
                    self.report.bytes += record.payload.len() as u64;
                }
                Some("ProvisionedThroughputExceededException" | "InternalFailure") => {
                    refused.push(index);
                }
                Some(code) => {
                    let message = result.error_message().unwrap_or("no message");
                    return Err(
                        self.error(format!("record {index} of the request: {code}: {message}"))
                    );
                }
            }
        }
        Ok(refused)
    }

    fn error(&self, cause: String) -> SourceError {
        SourceError::Call { call: "PutRecords", place: format!("stream {}", self.stream), cause }
    }
}

fn entry(record: &NewRecord) -> Result<PutRecordsRequestEntry, String> {
    PutRecordsRequestEntry::builder()
        .partition_key(&record.partition_key)
        .data(Blob::new(&record.payload[..]))
        .build()
        .map_err(|error| error.to_string())
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(RETRY_PAUSE_MAX)
        .without_max_times()
        .with_jitter()
        .build()
}
