//! The lines of a file, or of standard input, as one shard that ends by itself: for trying a
//! pipeline, for backfills, for comparisons.
//!
//! A position is the number of bytes up to and with the line's end, so that going on is a seek, and,
//! as its sub-sequence number, the CRC-32 of the line, so that a file that was written over is not
//! taken for the one that was read. A file that was appended to is read on where it was left. A file
//! that took another's place is another stream: it is known by its path, its inode, and when it was
//! made.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::{BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError};
use crate::config::{BatchLimits, FileConfig, StartPosition};
use crate::record::{
    Batch, Entry, Position, PositionSpan, Record, SequenceNumber, ShardId, ShardKey, StreamIdentity,
};

/// The one shard of a file.
const SHARD: &str = "file-000000000000";
/// All lines have one key: they are one sequence.
const PARTITION_KEY: Bytes = Bytes::from_static(b"file");
/// The path that stands for standard input.
const STANDARD_INPUT: &str = "-";
/// The longest line, in bytes: as the largest record of a stream.
const LINE_BYTES_MAX: usize = 10 << 20;
/// Batches that are read ahead.
const BATCHES_AHEAD: usize = 1;

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
    let about = std::fs::metadata(&path)?;
    if !about.is_file() {
        let cause = "it is no regular file; a pipe is read as standard input: path = \"-\"";
        return Err(io::Error::other(cause));
    }
    let made = about.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok());
    Ok(StreamIdentity {
        name: config.path.display().to_string().into(),
        arn: format!("file:{}#{}", path.display(), about.ino()).into(),
        created_ms: made.map_or(0, |made| made.as_millis() as i64),
    })
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
        Ok(vec![Shard::only(ShardId::new(SHARD))])
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
        Ok(Box::new(FileReader::start(lines)?))
    }
}

/// Reads the lines on a thread of its own: one that waits for standard input holds up nobody, and
/// ends with the process.
struct FileReader {
    batches: mpsc::Receiver<Result<NextBatch, SourceError>>,
}

impl FileReader {
    fn start(mut lines: Lines) -> Result<Self, SourceError> {
        let (sender, batches) = mpsc::channel(BATCHES_AHEAD);
        let config = lines.config.clone();
        let read = move || {
            loop {
                let next = lines.next_batch();
                let goes_on = matches!(next, Ok(NextBatch::Batch(_)));
                if sender.blocking_send(next).is_err() || !goes_on {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("file-reader".into())
            .spawn(read)
            .map_err(|cause| failed(&config, "start to read", 0, &cause))?;
        Ok(Self { batches })
    }
}

#[async_trait]
impl BatchReader for FileReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        self.batches.recv().await.unwrap_or(Ok(NextBatch::SourceEnd))
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
        let (input, at): (Box<dyn Read + Send>, u64) = match after {
            _ if is_standard_input(config) => (Box::new(io::stdin()), 0),
            None => (Box::new(open_at(config, 0)?), 0),
            Some(after) => {
                let (file, at) = open_behind(config, after)?;
                (Box::new(file), at)
            }
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
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            span,
            entry: Entry::Source,
        }))
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
                position: Position {
                    sequence: SequenceNumber::from(self.at),
                    sub_sequence: crc32fast::hash(&payload).into(),
                },
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

fn open_at(config: &FileConfig, at: u64) -> Result<File, SourceError> {
    let opened = File::open(&config.path).and_then(|mut file| {
        file.seek(SeekFrom::Start(at))?;
        Ok(file)
    });
    opened.map_err(|cause| failed(config, "read", at, &cause))
}

/// Opens the file behind a line that was read, if that line is still there; gives where it is then.
fn open_behind(config: &FileConfig, after: &Position) -> Result<(File, u64), SourceError> {
    let at = after.sequence.as_str().parse().unwrap_or(u64::MAX);
    let file = open_at(config, 0)?;
    let line = line_before(&file, at).map_err(|cause| failed(config, "read", at, &cause))?;
    let Some(line) = line.filter(|line| u64::from(crc32fast::hash(line)) == after.sub_sequence)
    else {
        return Err(SourceError::File {
            path: config.path.clone(),
            what: format!("cannot go on at byte {at}"),
            cause: "the line that was read last does not end there any more: the file was cut or \
                    written over, or that line was read before it was complete. Put the old file \
                    back, or read this one under another path"
                .into(),
        });
    };
    drop(line);
    // The last line had no end when it was read; it has one now.
    let mut around = [0; 2];
    let found =
        file.read_at(&mut around, at).map_err(|cause| failed(config, "read", at, &cause))?;
    let was_ended = at > 0 && {
        let mut before = [0];
        file.read_exact_at(&mut before, at - 1).is_ok() && before == *b"\n"
    };
    let end_bytes = match &around[..found] {
        [b'\n', ..] => 1,
        [b'\r', b'\n'] => 2,
        _ => 0,
    };
    let at = if was_ended { at } else { at + end_bytes };
    Ok((open_at(config, at)?, at))
}

/// The line that ends at `at`, without its end; `None`: no line does.
fn line_before(file: &File, at: u64) -> io::Result<Option<Vec<u8>>> {
    let length = file.metadata()?.len();
    if at == 0 || length < at {
        return Ok(None);
    }
    // Most lines are short: look back in growing steps.
    let mut back = 1 << 10;
    loop {
        let from = at.saturating_sub(back);
        let mut bytes = vec![0; (at - from) as usize];
        file.read_exact_at(&mut bytes, from)?;
        let is_ended = bytes.ends_with(b"\n");
        // What follows an unfinished line must be its end, or nothing.
        let mut next = [0];
        let is_whole = is_ended
            || length == at
            || (file.read_exact_at(&mut next, at).is_ok() && matches!(next, [b'\n' | b'\r']));
        if !is_whole {
            return Ok(None);
        }
        let end = bytes.len() - usize::from(is_ended);
        let begin = memchr::memrchr(b'\n', &bytes[..end]).map(|before| before + 1);
        match begin {
            None if from > 0 && back < LINE_BYTES_MAX as u64 * 2 => back *= 4,
            begin => {
                let mut line = bytes[begin.unwrap_or(0)..end].to_vec();
                if is_ended && line.ends_with(b"\r") {
                    line.pop();
                }
                return Ok(Some(line));
            }
        }
    }
}
