//! File source: reads the lines of a file, or of standard input, as one shard that ends. It is for trying a pipeline,
//! for backfills, and for comparisons.
//!
//! The sequence number of a line is the number of bytes of the file up to the line's end, with the line end. So a
//! resume is a seek. The sub-sequence number is the CRC-32 of the line. So a resume notices a file that was
//! overwritten.
//!
//! | the file, compared with the last line that was read | a resume |
//! |---|---|
//! | the line ends there | continues after it, also if lines were appended |
//! | the line had no end, and now has one | continues after its line end |
//! | the line had no end, and more text was appended to it | refused: a part of the line was delivered as a record |
//! | other bytes, or the file is shorter | refused: the file was cut or overwritten |
//! | another inode or creation time | it is another stream, read from its beginning |
//!
//! The plugin decides about the meaning of a line, with one exception: a line break within the quotes of a CSV field
//! does not end a record ([`csv`]). This crate uses `config` and `core`, and no heavy dependency.
//!
//! ```
//! use shardmill_file::csv::RecordScan;
//!
//! let text = b"1,\"two\nlines\"\n2,one line\n";
//! let end = RecordScan::default().end(text);
//! assert_eq!(end, Some(14));
//! assert_eq!(RecordScan::default().end(&text[14..]), Some(11));
//! ```

pub mod csv;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use shardmill_config::{BatchLimits, FileConfig, FileCut};
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, SequenceNumber, ShardId, ShardKey,
    StreamIdentity, is_kept_whole,
};
use shardmill_core::source::StartPosition;
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, ShardSource, SourceError,
};

/// UTF-8's byte order mark, which some editors and spreadsheets write at the start of a file. It is not part of the
/// first line (Unicode 15, section 23.8).
pub const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Returns a text without its byte order mark.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Id of the only shard of a file.
const SHARD: &str = "file-000000000000";
/// Partition key of all lines: they are one sequence.
const PARTITION_KEY: Bytes = Bytes::from_static(b"file");
/// Path that means standard input.
const STANDARD_INPUT: &str = "-";
/// Most bytes of a line: the same as of a stream's largest record.
const LINE_BYTES_MAX: usize = 10 << 20;
/// Number of batches that are read ahead.
const BATCHES_AHEAD: usize = 1;

/// Source of a file's lines.
pub struct FileSource {
    config: FileConfig,
    batch: BatchLimits,
    identity: StreamIdentity,
}

impl FileSource {
    /// Makes a source, and looks at the file to identify it.
    ///
    /// # Errors
    /// [`SourceError::File`] when it cannot be read.
    pub fn new(config: &FileConfig, batch: BatchLimits) -> Result<Self, SourceError> {
        let identity = match is_standard_input(config) {
            // Standard input cannot be read again, so each start reads another stream.
            true => StreamIdentity {
                name: STANDARD_INPUT.into(),
                arn: "file:-".into(),
                created_ms: chrono::Utc::now().timestamp_millis(),
            },
            false => identity(config).map_err(|cause| failed(config, "read", 0, &cause))?,
        };
        Ok(Self { config: config.clone(), batch, identity })
    }

    /// Checks that the file can be opened. Reads nothing.
    ///
    /// # Errors
    /// [`SourceError::File`] when it cannot be opened.
    pub fn check(&self) -> Result<(), SourceError> {
        match is_standard_input(&self.config) {
            true => Ok(()),
            false => open_at(&self.config, 0).map(drop),
        }
    }

    /// Checks that a run could resume after a line that was read.
    ///
    /// # Errors
    /// [`SourceError::File`], as the run would report it.
    pub fn check_after(&self, after: &Position) -> Result<(), SourceError> {
        match is_standard_input(&self.config) {
            true => Ok(()),
            false => open_after(&self.config, after).map(drop),
        }
    }
}

fn is_standard_input(config: &FileConfig) -> bool {
    config.path.as_os_str() == STANDARD_INPUT
}

fn identity(config: &FileConfig) -> io::Result<StreamIdentity> {
    let path = config.path.canonicalize()?;
    let about = std::fs::metadata(&path)?;
    if !about.is_file() {
        let cause = "not a regular file; to read a pipe, use standard input: path = \"-\"";
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

/// Reader of the lines, on a thread of its own. A thread that waits for standard input delays nothing else, and ends
/// with the process.
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
            .map_err(|cause| failed(&config, "start reading", 0, &cause))?;
        Ok(Self { batches })
    }
}

#[async_trait]
impl BatchReader for FileReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        self.batches.recv().await.unwrap_or(Ok(NextBatch::SourceEnd))
    }
}

/// Lines of an open file.
struct Lines {
    config: FileConfig,
    shard: ShardKey,
    limits: BatchLimits,
    input: Box<dyn Read + Send>,
    /// Whole lines that were read, and the number of their bytes that were taken.
    chunk: Bytes,
    taken: usize,
    /// Beginning of a line whose end was not read yet.
    rest: Vec<u8>,
    /// Offset of `taken` in the file.
    at: u64,
    skip_lines: u64,
    has_ended: bool,
    handed_over: Option<Position>,
    arrived_ms: u64,
    /// Number of lines of the last batch.
    lines_expected: usize,
}

/// A line that was read.
struct Line {
    /// Range in its chunk, without the line end.
    place: Range<usize>,
    /// Offset of its end in the file, with the line end.
    end_at: u64,
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
                let (file, at) = open_after(config, after)?;
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
            lines_expected: 0,
        })
    }

    fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let mut lines = Vec::with_capacity(self.lines_expected);
        let mut chunk = Bytes::new();
        while lines.is_empty() {
            if self.taken == self.chunk.len() {
                if self.has_ended {
                    return Ok(NextBatch::SourceEnd);
                }
                self.fill()?;
            }
            chunk = self.chunk.clone();
            self.take_lines(&mut lines)?;
        }
        self.lines_expected = lines.len();
        let records = self.records(&chunk, &lines);
        let Some(to_inclusive) = records.last().map(|record| record.position.clone()) else {
            return Ok(NextBatch::SourceEnd);
        };
        let from_exclusive = self.handed_over.replace(to_inclusive.clone());
        let range = PositionRange { from_exclusive, to_inclusive };
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records,
            range,
            entry: Entry::Source,
        }))
    }

    /// Makes records of lines of a chunk. Lines that are a small part of it are copied, so that a batch does not keep
    /// the whole chunk in memory.
    fn records(&self, chunk: &Bytes, lines: &[Line]) -> Vec<Record> {
        let (Some(first), Some(last)) = (lines.first(), lines.last()) else { return Vec::new() };
        let begin = first.place.start;
        let bytes = lines.iter().map(|line| line.place.len()).sum();
        let own = match is_kept_whole(chunk.len(), bytes, lines.len()) {
            true => chunk.slice(begin..last.place.end),
            false => Bytes::copy_from_slice(&chunk[begin..last.place.end]),
        };
        let record = |line: &Line| {
            let payload = own.slice(line.place.start - begin..line.place.end - begin);
            Record {
                position: Position {
                    sequence: SequenceNumber::from(line.end_at),
                    sub_sequence: crc32fast::hash(&payload).into(),
                },
                partition_key: PARTITION_KEY,
                payload,
                arrived_ms: self.arrived_ms,
            }
        };
        lines.iter().map(record).collect()
    }

    /// Reads the next chunk, up to the end of a line or of the file.
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
        if buffer.capacity() / 2 > complete {
            // A pipe gives a line at a time, and each would keep the capacity for a whole batch.
            buffer.shrink_to_fit();
        }
        self.chunk = buffer.into();
        self.taken = 0;
        Ok(())
    }

    /// Takes lines from the chunk, as many as fit into a batch.
    fn take_lines(&mut self, lines: &mut Vec<Line>) -> Result<(), SourceError> {
        let mut bytes = 0;
        while self.taken < self.chunk.len() && lines.len() < self.limits.records_max {
            let left = &self.chunk[self.taken..];
            // A quote after a byte order mark begins a field.
            let mark = match self.at {
                0 => left.len() - without_mark(left).len(),
                _ => 0,
            };
            let end = match self.config.cut {
                FileCut::Lines => memchr::memchr(b'\n', left),
                FileCut::Csv { delimiter } => {
                    crate::csv::record_end(&left[mark..], delimiter).map(|end| mark + end - 1)
                }
            };
            if end.is_none() && !self.has_ended {
                // A quoted line break: the record continues after the chunk.
                if left.len() > LINE_BYTES_MAX {
                    return Err(self.quote_not_closed());
                }
                let mut rest = left.to_vec();
                rest.append(&mut self.rest);
                self.rest = rest;
                self.chunk = Bytes::new();
                self.taken = 0;
                break;
            }
            if end.is_none() && mark > 0 && mark == left.len() {
                // Only a byte order mark: not a line.
                self.taken = self.chunk.len();
                break;
            }
            let whole = end.map_or(left.len(), |end| end + 1);
            let line = end.unwrap_or(left.len());
            let line = line - usize::from(line > 0 && left[line - 1] == b'\r' && end.is_some());
            if line > LINE_BYTES_MAX {
                return Err(self.line_too_long());
            }
            if !lines.is_empty() && bytes + line > self.limits.bytes_max {
                break;
            }
            let place = self.taken + mark..self.taken + line;
            self.taken += whole;
            self.at += whole as u64;
            if self.skip_lines > 0 {
                self.skip_lines -= 1;
                continue;
            }
            bytes += line;
            lines.push(Line { place, end_at: self.at });
        }
        Ok(())
    }

    fn quote_not_closed(&self) -> SourceError {
        let cause = format!(
            "a CSV record that begins here has a quote that is not closed within {LINE_BYTES_MAX} bytes: \
             close it, or set `format` under [source] to another media type to read plain lines"
        );
        failed(&self.config, "read a record", self.at, &cause)
    }

    fn line_too_long(&self) -> SourceError {
        let cause = format!(
            "a line has more than {LINE_BYTES_MAX} bytes: check that it is a file of lines"
        );
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

/// Opens the file after a line that was read, if that line is still there. Returns the offset, too.
fn open_after(config: &FileConfig, after: &Position) -> Result<(File, u64), SourceError> {
    let at = after.sequence.as_str().parse().unwrap_or(u64::MAX);
    let file = open_at(config, 0)?;
    let found = record_ends_at(&file, at, config.cut, after.sub_sequence)
        .map_err(|cause| failed(config, "read", at, &cause))?;
    let cause = match found {
        LastRead::Ends => None,
        LastRead::GoesOn => Some(format!(
            "expected the end of the last line that was read, found that the line continues: it had no line \
             end when it was read, and that part of it was delivered as a record. End the line at this byte, in \
             this same file: keep its first {at} bytes, then a line break, then the lines after that line \
             (a new file in its place would be read from its beginning). Then no line is delivered twice. \
             Correct the part that was delivered at its destination"
        )),
        LastRead::Gone => Some(
            "expected the end of the last line that was read, found other bytes: the file was cut or \
             overwritten. Put the old file back, or read this one under another path, which delivers all \
             of its lines"
                .to_owned(),
        ),
    };
    if let Some(cause) = cause {
        let what = format!("cannot resume at byte {at}");
        return Err(SourceError::File { path: config.path.clone(), what, cause });
    }
    // If the last line had no end when it was read and has one now, the line end is skipped.
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

/// State of the last record that was read, in the file as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastRead {
    /// The record ends at the same place.
    Ends,
    /// The record is there, but more of its line follows.
    GoesOn,
    /// Other bytes are there.
    Gone,
}

/// Checks whether a record with this CRC-32 ends at `at`. A CSV record may contain line breaks, so its beginning is
/// searched line by line.
fn record_ends_at(file: &File, at: u64, cut: FileCut, checksum: u64) -> io::Result<LastRead> {
    let length = file.metadata()?.len();
    if at == 0 || length < at {
        return Ok(LastRead::Gone);
    }
    let is = |payload: &[u8]| u64::from(crc32fast::hash(payload)) == checksum;
    // Most lines are short, so this looks back in growing steps.
    let mut back = 1 << 10;
    loop {
        let from = at.saturating_sub(back);
        let mut bytes = vec![0; (at - from) as usize];
        file.read_exact_at(&mut bytes, from)?;
        let is_ended = bytes.ends_with(b"\n");
        // After a line without an end there must be a line end, or nothing.
        let mut next = [0];
        let is_whole = is_ended
            || length == at
            || (file.read_exact_at(&mut next, at).is_ok() && matches!(next, [b'\n' | b'\r']));
        let found_as = |is_it: bool| match (is_it, is_whole) {
            (true, true) => LastRead::Ends,
            (true, false) => LastRead::GoesOn,
            (false, _) => LastRead::Gone,
        };
        let mut end = bytes.len() - usize::from(is_ended);
        if is_ended && bytes[..end].ends_with(b"\r") {
            end -= 1;
        }
        let mut begins = memchr::memrchr_iter(b'\n', &bytes[..end]).map(|before| before + 1);
        let found = match cut {
            FileCut::Lines => begins.next().map(|begin| is(&bytes[begin..end])),
            // A record with line breaks has a quote in its first line.
            FileCut::Csv { .. } => {
                let mut lines_after = bytes.len();
                begins
                    .any(|begin| {
                        let line = &bytes[begin..std::mem::replace(&mut lines_after, begin)];
                        let may_begin = line.len() == bytes.len() - begin
                            || memchr::memchr(b'"', line).is_some();
                        may_begin && is(&bytes[begin..end])
                    })
                    .then_some(true)
            }
        };
        match found {
            Some(found) => return Ok(found_as(found)),
            None if from > 0 && back < LINE_BYTES_MAX as u64 * 2 => back *= 4,
            None if from > 0 => return Ok(LastRead::Gone),
            // The first record of the file, with or without a byte order mark: older versions kept the mark.
            None => {
                return Ok(found_as(is(&bytes[..end]) || is(without_mark(&bytes[..end]))));
            }
        }
    }
}
