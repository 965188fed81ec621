//! A custom sink: a folder with one file per shard.
//!
//! Each commit appends its rows and then a line with its position, `#17`. Anything after the last such line belongs
//! to a commit that was interrupted by a crash; the next `acquire` of the shard removes it. So rows and position
//! move together, and each row is written once.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use shardmill_core::record::{
    BoundRoute, PipelineName, Position, SequenceNumber, ShardKey, SinkName,
};
use shardmill_core::sink::{
    Acquired, Commit, Committed, KeptPosition, RefusalLog, Sink, SinkError, SinkWriter,
};

/// First byte of a line with a position. Rows are JSON objects, so no row begins with it.
const MARK: u8 = b'#';

/// Sink that writes rows to files in a folder.
pub struct FolderSink {
    name: SinkName,
    folder: PathBuf,
}

impl FolderSink {
    /// Makes a sink with this name.
    pub fn new(name: &str, folder: PathBuf) -> Self {
        Self { name: SinkName::new(name), folder }
    }

    fn path(&self, shard: &ShardKey) -> PathBuf {
        self.folder.join(format!("{}.ndjson", shard.shard))
    }
}

/// Makes an error after which the engine retries; it shows the cause meanwhile.
fn unavailable(sink: &SinkName, cause: impl Display) -> SinkError {
    SinkError::Unavailable { sink: sink.clone(), cause: cause.to_string() }
}

/// Returns the end of the last complete commit in a file, in bytes, and its position. A crash can split a
/// character, so the file is read as bytes, not as text.
fn committed(file: &[u8]) -> (usize, Option<Position>) {
    let (mut end, mut last) = (0, (0, None));
    for line in file.split_inclusive(|byte| *byte == b'\n') {
        end += line.len();
        if let Some(position) = position_of(line) {
            last = (end, Some(position));
        }
    }
    last
}

/// Parses the position of a line `#17`, or `#17/3` for the fourth record of an aggregate. `None`: the line is a row or
/// incomplete.
fn position_of(line: &[u8]) -> Option<Position> {
    let mark = std::str::from_utf8(line.strip_prefix(&[MARK])?.strip_suffix(b"\n")?).ok()?;
    let (sequence, sub_sequence) = mark.split_once('/').unwrap_or((mark, "0"));
    let sequence = SequenceNumber::parse(sequence).ok()?;
    Some(Position { sequence, sub_sequence: sub_sequence.parse().ok()? })
}

/// Returns the committed rows of all files in a folder.
pub fn rows(folder: &Path) -> io::Result<Vec<String>> {
    let files = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files?,
    };
    let mut rows = Vec::new();
    for file in files {
        let file = std::fs::read(file?.path())?;
        let lines = file[..committed(&file).0].split_inclusive(|byte| *byte == b'\n');
        let found = lines.filter(|line| line[0] != MARK);
        rows.extend(found.map(|line| String::from_utf8_lossy(line).trim_end().to_owned()));
    }
    Ok(rows)
}

#[async_trait]
impl Sink for FolderSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        std::fs::create_dir_all(&self.folder).map_err(|error| unavailable(&self.name, error))
    }

    /// The lock excludes every other writer, in this process and in others, until this one is dropped. A sink that
    /// cannot lock its destination stores a number beside the position that grows with each `acquire`, and checks
    /// it in each commit.
    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let open = || {
            let path = self.path(shard);
            let mut file = OpenOptions::new().create(true).append(true).read(true).open(path)?;
            file.try_lock()?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let (end, position) = committed(&bytes);
            let end = end as u64;
            file.set_len(end)?;
            io::Result::Ok((FolderWriter { sink: self.name.clone(), file, end }, position))
        };
        let (writer, position) = open().map_err(|error| unavailable(&self.name, error))?;
        let writer = Box::new(writer);
        Ok(Acquired { writer, position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        match std::fs::read(self.path(shard)) {
            Ok(file) => Ok(committed(&file).1),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unavailable(&self.name, error)),
        }
    }

    /// The engine compares these positions with its checkpoints before the first record, and so notices a folder
    /// that was restored from a backup.
    async fn kept_positions(
        &self,
        _pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let mut kept = Vec::new();
        for key in shards {
            let (stream, shard) = (key.stream.key(), key.shard.clone());
            let position = self.position(key).await?;
            kept.push(KeptPosition { stream, shard, position, mark: None, owner: None });
        }
        Ok(Some(kept))
    }
}

/// Writer of one shard's file.
struct FolderWriter {
    sink: SinkName,
    file: File,
    /// End of the last commit in the file, in bytes.
    end: u64,
}

impl FolderWriter {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Removes what a failed attempt has written.
        self.file.set_len(self.end)?;
        self.file.write_all(bytes)?;
        self.file.sync_data()?;
        self.end += bytes.len() as u64;
        Ok(())
    }
}

#[async_trait]
impl SinkWriter for FolderWriter {
    /// Writes on the async thread, because the writes are small. A sink that writes more must do so off the async
    /// threads.
    async fn commit(
        &mut self,
        commit: &Commit,
        _refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let mut bytes = Vec::new();
        for row in commit.rows.iter() {
            bytes.extend_from_slice(&row.payload);
            bytes.push(b'\n');
        }
        bytes.push(MARK);
        bytes.extend_from_slice(format!("{}\n", commit.range.to_inclusive).as_bytes());
        self.append(&bytes).map_err(|error| unavailable(&self.sink, error))?;
        Ok(Committed {
            rows_written: commit.rows.len() as u64,
            rows_refused: 0,
            bytes_written: bytes.len() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crash_has_cut_off_is_not_committed() {
        let position = |sequence, sub_sequence| {
            let sequence = SequenceNumber::parse(sequence).expect("a number");
            Some(Position { sequence, sub_sequence })
        };
        let cases: [(&[u8], usize, Option<Position>); 7] = [
            (b"", 0, None),
            (b"{}\n", 0, None),
            (b"{}\n#17\n", 7, position("17", 0)),
            (b"{}\n#17/3\n", 9, position("17", 3)),
            (b"{}\n#17\n{}\n#1", 7, position("17", 0)),
            // The first of the two bytes of a character.
            (b"{}\n#17\n{\"station\":\"Z\xc3", 7, position("17", 0)),
            (b"{}\n#17\n#1/\n", 7, position("17", 0)),
        ];
        for (file, end, last) in cases {
            assert_eq!(committed(file), (end, last), "{}", file.escape_ascii());
        }
    }
}
