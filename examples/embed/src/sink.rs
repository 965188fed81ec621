//! Where the rows go: a folder with a file per shard.
//!
//! Each commit appends its rows and then a line with its position, `#17`. What comes after the last such line belongs
//! to a commit that a crash has cut off: whoever acquires the shard next removes it. So rows and position move
//! together, and each row is there once.

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

/// Begins a line that is a position. Rows are JSON objects: none begins so.
const MARK: char = '#';

/// A folder of rows.
pub struct FolderSink {
    name: SinkName,
    folder: PathBuf,
}

impl FolderSink {
    /// A sink of this name.
    pub fn new(name: &str, folder: PathBuf) -> Self {
        Self { name: SinkName::new(name), folder }
    }

    fn path(&self, shard: &ShardKey) -> PathBuf {
        self.folder.join(format!("{}.ndjson", shard.shard))
    }
}

/// Lets the engine try again, and show the cause meanwhile.
fn unavailable(sink: &SinkName, cause: impl Display) -> SinkError {
    SinkError::Unavailable { sink: sink.clone(), cause: cause.to_string() }
}

/// Finds the end of the last commit in a file's text, and its position.
fn committed(text: &str) -> (u64, Option<Position>) {
    let (mut end, mut last) = (0, (0, None));
    for line in text.split_inclusive('\n') {
        end += line.len() as u64;
        let number = line.strip_prefix(MARK).and_then(|mark| mark.strip_suffix('\n'));
        if let Some(sequence) = number.and_then(|number| SequenceNumber::parse(number).ok()) {
            last = (end, Some(Position { sequence, sub_sequence: 0 }));
        }
    }
    last
}

/// Gives the committed rows of all files in a folder.
pub fn rows(folder: &Path) -> io::Result<Vec<String>> {
    let files = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files?,
    };
    let mut rows = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file?.path())?;
        let end = usize::try_from(committed(&text).0).map_err(io::Error::other)?;
        rows.extend(text[..end].lines().filter(|line| !line.starts_with(MARK)).map(str::to_owned));
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

    /// The lock keeps every other writer out until this one is dropped, in this process and in others. A sink that
    /// cannot lock its destination writes a number beside the position that grows with each `acquire`, and checks it
    /// in each commit.
    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let open = || {
            let path = self.path(shard);
            let mut file = OpenOptions::new().create(true).append(true).read(true).open(path)?;
            file.try_lock()?;
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            let (end, position) = committed(&text);
            io::Result::Ok((FolderWriter { sink: self.name.clone(), file, end }, position))
        };
        let (writer, position) = open().map_err(|error| unavailable(&self.name, error))?;
        let writer = Box::new(writer);
        Ok(Acquired { writer, position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        match std::fs::read_to_string(self.path(shard)) {
            Ok(text) => Ok(committed(&text).1),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unavailable(&self.name, error)),
        }
    }

    /// The engine compares these with its checkpoints before the first record: so a folder that was restored from a
    /// backup is noticed.
    async fn kept(
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

/// Writes one shard's file.
struct FolderWriter {
    sink: SinkName,
    file: File,
    /// Where the last commit ends.
    end: u64,
}

impl FolderWriter {
    fn append(&mut self, text: &str) -> io::Result<()> {
        // What a crash, or a try that failed, has left behind.
        self.file.set_len(self.end)?;
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()?;
        self.end += text.len() as u64;
        Ok(())
    }
}

#[async_trait]
impl SinkWriter for FolderWriter {
    /// The writes are small, and made right here. A sink that writes much does it off the async threads.
    async fn commit(
        &mut self,
        commit: &Commit,
        _refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let mut text = String::new();
        for row in commit.rows.iter() {
            text += &String::from_utf8_lossy(&row.payload);
            text.push('\n');
        }
        text += &format!("{MARK}{}\n", commit.span.to_inclusive);
        self.append(&text).map_err(|error| unavailable(&self.sink, error))?;
        Ok(Committed {
            rows_written: commit.rows.len() as u64,
            rows_refused: 0,
            bytes_written: text.len() as u64,
        })
    }
}
