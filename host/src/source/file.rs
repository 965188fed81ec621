//! The lines of a file, or of standard input, as one shard that ends by itself: for trying a
//! pipeline, for backfills, for comparisons.
//!
//! A position is the number of bytes up to and with the line's end, so that going on is a seek. A
//! file that was appended to is read on where it was left. A file that took another's place is
//! another stream: it is known by its path, its inode, when it was made, and its first line.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError};
use crate::config::{BatchLimits, FileConfig, StartPosition};
use crate::record::{
    Batch, Position, PositionSpan, Record, SequenceNumber, ShardId, ShardKey, StreamIdentity,
};

/// The one shard of a file.
const SHARD: &str = "file-000000000000";
/// All lines have one key: they are one sequence.
const PARTITION_KEY: Bytes = Bytes::from_static(b"file");
/// The path that stands for standard input.
const STANDARD_INPUT: &str = "-";
/// The longest line, in bytes: as the largest record of a stream.
const LINE_BYTES_MAX: usize = 10 << 20;
/// Bytes of the first line that tell a file from another.
const FIRST_LINE_BYTES_MAX: usize = 4 << 10;

/// A file as a source.
pub struct FileSource {
    config: FileConfig,
    batch: BatchLimits,
    identity: StreamIdentity,
}

impl FileSource {
    /// Looks at the file.
    ///
    /// # Errors
    /// [`SourceError::File`] when it cannot be read.
    pub fn new(config: &FileConfig, batch: BatchLimits) -> Result<Self, SourceError> {
        let identity = match is_standard_input(config) {
            // What was read from it cannot be read again: each start reads another stream.
            true => StreamIdentity {
                name: STANDARD_INPUT.into(),
                arn: "file:-".into(),
                created_ms: chrono::Utc::now().timestamp_millis(),
            },
            false => identity(config).map_err(|cause| failed(config, "read", 0, &cause))?,
        };
        Ok(Self { config: config.clone(), batch, identity })
    }
}

fn is_standard_input(config: &FileConfig) -> bool {
    config.path.as_os_str() == STANDARD_INPUT
}

fn identity(config: &FileConfig) -> io::Result<StreamIdentity> {
    let path = config.path.canonicalize()?;
    let mut file = File::open(&path)?;
    let about = file.metadata()?;
    if about.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let made = about.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok());
    let mut first_line = vec![0; FIRST_LINE_BYTES_MAX];
    let length = read_whole(&mut file, &mut first_line)?;
    first_line.truncate(length);
    first_line.truncate(memchr::memchr(b'\n', &first_line).unwrap_or(0));
    let first_line = hex::encode(&Sha256::digest(&first_line)[..8]);
    Ok(StreamIdentity {
        name: config.path.display().to_string().into(),
        arn: format!("file:{}#{}-{first_line}", path.display(), about.ino()).into(),
        created_ms: made.map_or(0, |made| made.as_millis() as i64),
    })
}

/// Reads until the buffer is full or the file ends.
fn read_whole(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn failed(config: &FileConfig, what: &str, at: u64, cause: &impl ToString) -> SourceError {
    SourceError::File {
        path: config.path.clone(),
        what: format!("failed to {what} at byte {at}"),
        cause: cause.to_string(),
    }
}

#[async_trait]
impl ShardSource for FileSource {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        Ok(self.identity.clone())
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        let parents = Vec::new();
        Ok(vec![Shard { id: ShardId::new(SHARD), parents, is_closed: false, hash_range: None }])
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        let lines = Lines::open(&self.config, self.batch, shard, from.after)?;
        Ok(Box::new(FileReader { lines: Some(lines) }))
    }
}

/// Reads the lines off the asynchronous threads.
struct FileReader {
    /// `None` while a call is under way; one that was dropped ends the reader.
    lines: Option<Lines>,
}

#[async_trait]
impl BatchReader for FileReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let Some(mut lines) = self.lines.take() else { return Ok(NextBatch::SourceEnd) };
        let read = tokio::task::spawn_blocking(move || {
            let next = lines.next_batch();
            (lines, next)
        });
        let (lines, next) = read.await.map_err(|panic| SourceError::File {
            path: PathBuf::new(),
            what: "the reader of the file ended".into(),
            cause: panic.to_string(),
        })?;
        self.lines = Some(lines);
        next
    }
}

/// An open file.
struct Lines {
    config: FileConfig,
    shard: ShardKey,
    limits: BatchLimits,
    input: Box<dyn Read + Send>,
    /// Lines that were read whole, and how much of them is handed over.
    chunk: Bytes,
    taken: usize,
    /// The beginning of a line whose end was not read yet.
    rest: Vec<u8>,
    /// Bytes of the file up to `taken`.
    at: u64,
    skip_lines: u64,
    has_ended: bool,
    handed_over: Option<Position>,
    arrived_ms: u64,
}

impl Lines {
    fn open(
        config: &FileConfig,
        limits: BatchLimits,
        shard: &ShardKey,
        after: Option<&Position>,
    ) -> Result<Self, SourceError> {
        let at = match after {
            None => 0,
            Some(after) => after.sequence.as_str().parse().map_err(|_| SourceError::File {
                path: config.path.clone(),
                what: format!("cannot go on behind {after}"),
                cause: "that is no position in a file".into(),
            })?,
        };
        let input: Box<dyn Read + Send> = match is_standard_input(config) {
            true => Box::new(io::stdin()),
            false => Box::new(open_at(config, at)?),
        };
        Ok(Self {
            config: config.clone(),
            shard: shard.clone(),
            limits,
            input,
            chunk: Bytes::new(),
            taken: 0,
            rest: Vec::new(),
            at,
            skip_lines: if at == 0 { config.skip_lines } else { 0 },
            has_ended: false,
            handed_over: after.cloned(),
            arrived_ms: u64::try_from(shard.stream.created_ms).unwrap_or(0),
        })
    }

    fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let mut records = Vec::new();
        while records.is_empty() {
            if self.taken == self.chunk.len() {
                if self.has_ended {
                    return Ok(NextBatch::SourceEnd);
                }
                self.fill()?;
            }
            self.take_lines(&mut records)?;
        }
        let Some(to_inclusive) = records.last().map(|record| record.position.clone()) else {
            return Ok(NextBatch::SourceEnd);
        };
        let from_exclusive = self.handed_over.replace(to_inclusive.clone());
        let span = PositionSpan { from_exclusive, to_inclusive };
        Ok(NextBatch::Batch(Batch { shard: self.shard.clone(), records, span }))
    }

    /// Reads on, up to the end of a line or of the file.
    fn fill(&mut self) -> Result<(), SourceError> {
        let mut buffer = std::mem::take(&mut self.rest);
        let complete = loop {
            let length = buffer.len();
            buffer.resize(length + self.limits.bytes_max, 0);
            let came = loop {
                match self.input.read(&mut buffer[length..]) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(failed(&self.config, "read", self.at, &error)),
                    Ok(came) => break came,
                }
            };
            buffer.truncate(length + came);
            if came == 0 {
                self.has_ended = true;
                break buffer.len();
            }
            if let Some(end) = memchr::memrchr(b'\n', &buffer[length..]) {
                break length + end + 1;
            }
            if buffer.len() > LINE_BYTES_MAX {
                return Err(self.line_too_long());
            }
        };
        self.rest = buffer[complete..].to_vec();
        buffer.truncate(complete);
        self.chunk = buffer.into();
        self.taken = 0;
        Ok(())
    }

    /// Takes lines of the chunk, as many as a batch holds.
    fn take_lines(&mut self, records: &mut Vec<Record>) -> Result<(), SourceError> {
        let mut bytes = 0;
        while self.taken < self.chunk.len() && records.len() < self.limits.records_max {
            let left = &self.chunk[self.taken..];
            let end = memchr::memchr(b'\n', left);
            let whole = end.map_or(left.len(), |end| end + 1);
            let line = end.unwrap_or(left.len());
            let line = line - usize::from(line > 0 && left[line - 1] == b'\r' && end.is_some());
            if line > LINE_BYTES_MAX {
                return Err(self.line_too_long());
            }
            if !records.is_empty() && bytes + line > self.limits.bytes_max {
                break;
            }
            let payload = self.chunk.slice(self.taken..self.taken + line);
            self.taken += whole;
            self.at += whole as u64;
            if self.skip_lines > 0 {
                self.skip_lines -= 1;
                continue;
            }
            bytes += line;
            records.push(Record {
                position: Position { sequence: SequenceNumber::from(self.at), sub_sequence: 0 },
                partition_key: PARTITION_KEY,
                payload,
                arrived_ms: self.arrived_ms,
            });
        }
        Ok(())
    }

    fn line_too_long(&self) -> SourceError {
        let cause = format!("a line has more than {LINE_BYTES_MAX} bytes; is it a file of lines?");
        failed(&self.config, "read a line", self.at, &cause)
    }
}

/// Opens the file behind a line's end.
fn open_at(config: &FileConfig, at: u64) -> Result<File, SourceError> {
    let error = |cause: io::Error| failed(config, "read", at, &cause);
    let mut file = File::open(&config.path).map_err(error)?;
    if at > 0 {
        let length = file.metadata().map_err(error)?.len();
        let mut before = [0];
        let is_line_end = length >= at
            && file.read_exact_at(&mut before, at - 1).is_ok()
            && (before == *b"\n" || length == at);
        if !is_line_end {
            return Err(SourceError::File {
                path: config.path.clone(),
                what: format!("cannot go on at byte {at} of {length}"),
                cause:
                    "no line ends there any more: the file was cut or written over, or its last \
                        line was read before it was complete. Put the old file back, or read this \
                        one under another path"
                        .into(),
            });
        }
        file.seek(SeekFrom::Start(at)).map_err(error)?;
    }
    Ok(file)
}

/// A source for a configuration.
///
/// # Errors
/// As [`FileSource::new`].
pub fn source(
    config: &FileConfig,
    batch: BatchLimits,
) -> Result<Arc<dyn ShardSource>, SourceError> {
    Ok(Arc::new(FileSource::new(config, batch)?))
}
