//! The lines of a file, or of standard input, as one shard that ends by itself: for trying a
//! pipeline, for backfills, for comparisons.
//!
//! A position is the number of bytes up to and with the line's end, so that going on is a seek, and,
//! as its sub-sequence number, the CRC-32 of the line, so that a file that was written over is not
//! taken for the one that was read. A file that was appended to is read on where it was left. A file
//! that took another's place is another stream: it is known by its path, its inode, and when it was
//! made.
//!
//! A path and the limits of batches go in; batches come out, and the end of the source. What a line means is the
//! plugin's business, except that a line break within the quotes of a CSV field is no end ([`csv`]). It uses `config`
//! and `core`, and no heavy dependency.
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

/// UTF-8's byte order mark, which some editors and spreadsheets put in front of a file. It is no part of
/// the first line (Unicode 15, section 23.8).
pub const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The beginning of a text without its byte order mark.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

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

    /// Checks that the file can be opened; nothing is read.
    ///
    /// # Errors
    /// [`SourceError::File`] when it cannot.
    pub fn check(&self) -> Result<(), SourceError> {
        match is_standard_input(&self.config) {
            true => Ok(()),
            false => open_at(&self.config, 0).map(drop),
        }
    }

    /// Checks that a start could go on behind a line that was read.
    ///
    /// # Errors
    /// [`SourceError::File`] as of the start.
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
    /// How many the last batch had.
    lines_expected: usize,
}

/// A line that was read.
struct Line {
    /// Where it is in its chunk, without its end.
    place: Range<usize>,
    /// Where it ends in the file, its line end included.
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

    /// Makes records of lines of a chunk. Lines that are a small part of it are copied: each batch would keep all
    /// of the chunk.
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
        if buffer.capacity() / 2 > complete {
            // A pipe gives a line at a time: each would keep the room of a whole batch.
            buffer.shrink_to_fit();
        }
        self.chunk = buffer.into();
        self.taken = 0;
        Ok(())
    }

    /// Takes lines of the chunk, as many as a batch holds.
    fn take_lines(&mut self, lines: &mut Vec<Line>) -> Result<(), SourceError> {
        let mut bytes = 0;
        while self.taken < self.chunk.len() && lines.len() < self.limits.records_max {
            let left = &self.chunk[self.taken..];
            // A quote behind a byte order mark begins a field.
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
                // A quoted line break: the record goes on after what was read.
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
                // Nothing but a byte order mark: no line yet.
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
fn open_after(config: &FileConfig, after: &Position) -> Result<(File, u64), SourceError> {
    let at = after.sequence.as_str().parse().unwrap_or(u64::MAX);
    let file = open_at(config, 0)?;
    let found = record_ends_at(&file, at, config.cut, after.sub_sequence)
        .map_err(|cause| failed(config, "read", at, &cause))?;
    let cause = match found {
        LastRead::Ends => None,
        LastRead::GoesOn => Some(format!(
            "expected the line that was read last to end there, found that it goes on: it had no line end \
             when it was read, and that part of it was delivered as a record. End it where it was read, in \
             this same file: keep its first {at} bytes, then a line break, then the lines after that line \
             (another file in its place would be read from its beginning). Nothing comes twice then; what was \
             delivered of that line is to be corrected by other means"
        )),
        LastRead::Gone => Some(
            "expected the line that was read last to end there, found other bytes: the file was cut or \
             written over. Put the old file back, or read this one under another path, which delivers all \
             of its lines"
                .to_owned(),
        ),
    };
    if let Some(cause) = cause {
        let what = format!("cannot go on at byte {at}");
        return Err(SourceError::File { path: config.path.clone(), what, cause });
    }
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

/// The record that was read last, in the file as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastRead {
    /// It ends where it ended.
    Ends,
    /// It is there, and more of its line follows.
    GoesOn,
    /// Something else is there.
    Gone,
}

/// Whether a record with this CRC-32 ends at `at`. A CSV record may have line breaks of its own: its
/// beginning is searched for line by line.
fn record_ends_at(file: &File, at: u64, cut: FileCut, checksum: u64) -> io::Result<LastRead> {
    let length = file.metadata()?.len();
    if at == 0 || length < at {
        return Ok(LastRead::Gone);
    }
    let is = |payload: &[u8]| u64::from(crc32fast::hash(payload)) == checksum;
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
            // The first line of a record with line breaks has a quote.
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
            // The file's first record, with a byte order mark or without: older versions kept it.
            None => {
                return Ok(found_as(is(&bytes[..end]) || is(without_mark(&bytes[..end]))));
            }
        }
    }
}
