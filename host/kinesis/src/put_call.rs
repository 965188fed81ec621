//! Makes one PutRecords call: its records, its limits, and the outcome of each record.

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::PutRecordsRequestEntry;
use bytes::Bytes;

use super::client::{CODE_BYTES_MAX, ErrorClass, call_error, classify};
use shardmill_core::boxed;
use shardmill_core::masking::{sanitized, sanitized_within};
use shardmill_core::record::StreamRef;
use shardmill_core::source::SourceError;

/// Most records of one request.
///
/// Source: API reference, PutRecords.
pub const RECORDS_PER_REQUEST_MAX: usize = 500;
/// Most bytes of one request: half of what PutRecords accepts, so that no server's own limit is reached.
pub(crate) const BYTES_PER_REQUEST_MAX: usize = 5 << 20;
/// Most bytes of one record, payload and key. A stream's own limit is 1 MiB unless raised.
///
/// Source: API reference, PutRecordsRequestEntry, UpdateMaxRecordSize.
pub const RECORD_BYTES_MAX: usize = 10 << 20;
/// Most characters of a partition key.
///
/// Source: API reference, PutRecordsRequestEntry.
pub const KEY_CHARS_MAX: usize = 256;
/// A record to put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRecord {
    /// Partition key, of 1 to 256 characters.
    pub partition_key: String,
    /// Payload, up to the stream's limit of 1 MiB by default.
    pub payload: Bytes,
}

/// Error of a record that no stream accepts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotPuttable {
    /// The key is empty or too long.
    #[error(
        "the partition key has {chars} characters, expected 1 to {KEY_CHARS_MAX}: choose another key"
    )]
    Key {
        /// Number of its characters.
        chars: usize,
    },
    /// The record is too large for any stream.
    #[error(
        "the record has {bytes} bytes with its key; Kinesis takes at most {RECORD_BYTES_MAX}: store the \
         payload elsewhere, and put its address on the stream"
    )]
    Size {
        /// Bytes of payload and key.
        bytes: usize,
    },
}

impl NewRecord {
    /// Returns the bytes that count against the limits of a request: payload and key.
    pub fn bytes(&self) -> usize {
        self.payload.len() + self.partition_key.len()
    }

    /// Checks the limits that hold for every stream.
    ///
    /// # Errors
    /// [`NotPuttable`]: the limit, and the value of the record.
    pub fn check(&self) -> Result<(), NotPuttable> {
        let chars = self.partition_key.chars().count();
        if !(1..=KEY_CHARS_MAX).contains(&chars) {
            return Err(NotPuttable::Key { chars });
        }
        match self.bytes() {
            bytes if bytes > RECORD_BYTES_MAX => Err(NotPuttable::Size { bytes }),
            _ => Ok(()),
        }
    }
}

/// Outcome of one record of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Put {
    /// The stream has the record.
    Taken,
    /// Refused for now, with the cause: put the same record later.
    Later(String),
    /// Refused for good, with the cause.
    Never(String),
}

/// Error of a request that failed as a whole.
#[derive(Debug)]
pub enum PutError {
    /// Throttled, or not reachable: put the same request later. Its records may be on the stream.
    Later(SourceError),
    /// One of its records exceeds a limit, perhaps the stream's own. No record was taken.
    Records(SourceError),
    /// The stream does not exist, or access to it is denied.
    Stream(SourceError),
}

/// A stream to put records on.
#[derive(Clone)]
pub struct StreamWriter {
    client: Client,
    stream: StreamRef,
}

impl StreamWriter {
    /// Makes a writer for a stream.
    pub fn new(client: Client, stream: StreamRef) -> Self {
        Self { client, stream }
    }

    /// Makes one PutRecords request of at most [`RECORDS_PER_REQUEST_MAX`] records. The caller
    /// bounds its bytes by [`BYTES_PER_REQUEST_MAX`], half of what the API accepts. Returns the outcome of
    /// each record, in the order of `records`.
    ///
    /// # Errors
    /// [`PutError`] when the request failed as a whole.
    #[boxed]
    pub async fn put(&self, records: &[NewRecord]) -> Result<Vec<Put>, PutError> {
        let place = format!("stream {}", self.stream);
        let entries = records.iter().map(entry).collect::<Result<Vec<_>, _>>();
        let entries = entries.map_err(|cause| {
            PutError::Records(SourceError::Call { call: "PutRecords", place: place.clone(), cause })
        })?;
        let (name, arn) = self.stream.name_or_arn();
        let call = self.client.put_records().set_stream_name(name).set_stream_arn(arn);
        let answer = call.set_records(Some(entries)).send().await.map_err(|error| {
            let refused_code = error.as_service_error().and_then(|error| error.meta().code());
            let kind = match (classify(&error), refused_code) {
                (ErrorClass::Throttled | ErrorClass::Passing, _) => PutError::Later,
                // Codes for invalid arguments, of AWS, of its front end, and of the embedded stream.
                (
                    _,
                    Some(
                        "InvalidArgumentException"
                        | "ValidationException"
                        | "SerializationException",
                    ),
                ) => PutError::Records,
                (ErrorClass::NotFound, _) => {
                    let stream = self.stream.to_string();
                    return PutError::Stream(SourceError::NoSuchStream { stream });
                }
                _ => PutError::Stream,
            };
            kind(call_error("PutRecords", place, &error))
        })?;
        let mut results = answer.records.iter();
        let outcome = |_| match results.next() {
            Some(result) => outcome(result.error_code(), result.error_message()),
            None => Put::Later("the answer has no outcome for this record".into()),
        };
        Ok(records.iter().map(outcome).collect())
    }
}

fn outcome(code: Option<&str>, message: Option<&str>) -> Put {
    let Some(code) = code else { return Put::Taken };
    let message = sanitized(message.unwrap_or("no message"));
    let cause = format!("{}: {message}", sanitized_within(code, CODE_BYTES_MAX));
    match code {
        "ProvisionedThroughputExceededException" | "InternalFailure" => Put::Later(cause),
        _ => Put::Never(cause),
    }
}

fn entry(record: &NewRecord) -> Result<PutRecordsRequestEntry, String> {
    PutRecordsRequestEntry::builder()
        .partition_key(&record.partition_key)
        .data(Blob::new(&record.payload[..]))
        .build()
        .map_err(|error| error.to_string())
}
