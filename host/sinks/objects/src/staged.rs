//! Creates objects as files of a folder: a file is written in a staging folder, then hard-linked under its own name.
//!
//! Invariant: a file appears under its name whole and durable, or not at all. `object_store` does not give this for
//! conditional creation: it writes `NAME#1` beside `NAME` first; readers of the folder see that file, and it stays when
//! the process is killed.
//!
//! Order of the steps, and the reason for each:
//! 1. Write the file below the claim logs, where no reader looks, and lock it. A file without a lock has no writer any
//!    more, and a sweep removes it.
//! 2. Sync the file: a name must never lead to a file without its content.
//! 3. Hard-link it under its name. The link fails if the name exists: that is the conditional create.
//! 4. Sync the folder, so that the name is durable before the commit goes on.
//! 5. Remove the name in the staging folder.
//!
//! Races:
//! - A sweep removes a staging file that has a writer (a file system without locks). The writer's link fails, and the
//!   commit is tried again; only the writer links its file, so nothing wrong can appear.
//! - Two writers create the same name. One link succeeds, the other gets [`Created::Exists`].
//! - The sink's folder is moved or replaced while the pipeline runs. The folders would be created again without the
//!   earlier claims, so [`check_place`] compares the file id of the logs' folder and refuses.
//!
//! Files `NAME#1` that earlier versions left are removed too, if `NAME` is a name that this sink gives.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use object_store::PutPayload;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use uuid::Uuid;

use super::settings::LOG_FOLDER;
use shardmill_core::record::SinkName;
use shardmill_sinks_common::local::FileId;

/// Folder below the claim logs for files that are being written.
pub(super) const STAGING_FOLDER: &str = ".tmp";

/// Creator of files below a prefix.
#[derive(Clone, Debug)]
pub struct Staged {
    prefix: Key,
    /// File id of the claim logs' folder, as of the first write.
    known: Arc<OnceLock<FileId>>,
}

/// Error of a file that was not written.
#[derive(Debug)]
pub(super) enum StagedError {
    Io { action: &'static str, place: PathBuf, cause: io::Error },
    Path(String),
}

impl fmt::Display for StagedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (action, place, cause) = match self {
            Self::Io { action, place, cause } => (action, place, cause),
            Self::Path(cause) => return f.write_str(cause),
        };
        let way_out = match cause.kind() {
            ErrorKind::PermissionDenied => "; let this user write there",
            ErrorKind::ReadOnlyFilesystem => "; it is mounted read-only",
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; free space",
            ErrorKind::CrossesDevices => {
                "; all of the sink's folder must be on one file system: set `url` to a folder within it"
            }
            ErrorKind::Unsupported => "; the file system has no hard links, which claims need",
            _ => "",
        };
        write!(f, "cannot {action} {}: {cause}{way_out}", place.display())
    }
}

fn failed<'p>(action: &'static str, place: &'p Path) -> impl FnOnce(io::Error) -> StagedError + 'p {
    move |cause| StagedError::Io { action, place: place.to_owned(), cause }
}

/// Outcome of a conditional create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Created {
    /// The object was created by this call.
    New,
    /// An object with that key existed, written by us or by another.
    Exists,
}

/// A file in the staging folder, removed when dropped.
struct Staging {
    path: PathBuf,
    file: File,
}

impl Drop for Staging {
    fn drop(&mut self) {
        // If it cannot be removed now, the sweep of the next acquisition removes it.
        let _ = fs::remove_file(&self.path);
    }
}

impl Staged {
    /// Makes a creator of files below a prefix.
    pub(super) fn below(prefix: &Key) -> Self {
        Self { prefix: prefix.clone(), known: Arc::default() }
    }

    /// Writes a file, unless one of that name exists. The file appears whole, and is durable when this returns.
    pub(super) async fn create(
        &self,
        key: &Key,
        payload: PutPayload,
    ) -> Result<Created, StagedError> {
        let (to, folder) = (file_path(key)?, self.folder()?);
        let (logs, known) = (file_path(&self.prefix.clone().join(LOG_FOLDER))?, self.known.clone());
        on_thread(move || {
            check_place(&logs, &known)?;
            let created = create(&to, &folder, &payload)?;
            if let Some(found) = FileId::at(&logs).map_err(StagedError::Path)? {
                known.get_or_init(|| found);
            }
            Ok(created)
        })
        .await
    }

    /// Returns the folder for files that are being written.
    pub(super) fn folder(&self) -> Result<PathBuf, StagedError> {
        file_path(&self.prefix.clone().join(LOG_FOLDER).join(STAGING_FOLDER))
    }

    /// Removes files from the staging folder that have no writer any more; returns their number.
    pub(super) async fn sweep(&self) -> Result<usize, StagedError> {
        let folder = self.folder()?;
        on_thread(move || sweep(&folder)).await
    }

    /// Removes `KEY#1`, `KEY#2` and so on, for keys that nobody else writes any more.
    pub(super) async fn sweep_beside(&self, keys: Vec<Key>) -> Result<usize, StagedError> {
        let files = keys.iter().map(file_path).collect::<Result<Vec<_>, _>>()?;
        on_thread(move || {
            let mut removed = 0;
            for file in &files {
                removed += sweep_beside(file)?;
            }
            Ok(removed)
        })
        .await
    }

    /// Removes `LINK.json#1` and so on from a log's folder. Only the owner of the log calls this.
    pub(super) async fn sweep_log(&self, folder: &Key) -> Result<usize, StagedError> {
        let folder = file_path(folder)?;
        on_thread(move || {
            let is_link = |name: &str| name.strip_suffix(".json").is_some_and(is_number);
            remove(&folder, |name| leftover_of(name).is_some_and(is_link))
        })
        .await
    }

    /// Finds `NAME#1` and so on everywhere below the prefix.
    pub(super) async fn leftovers(&self) -> Result<Vec<PathBuf>, StagedError> {
        let folder = file_path(&self.prefix)?;
        on_thread(move || {
            let mut found = Vec::new();
            walk(&folder, &mut |file, name| {
                if leftover_of(name).is_some() {
                    found.push(file.to_owned());
                }
            })?;
            found.sort();
            Ok(found)
        })
        .await
    }

    /// Removes `NAME#1` and so on everywhere below the prefix, if `NAME` is an object of ours that exists. Objects are
    /// never overwritten, so such a file has no use any more.
    ///
    /// There may be many folders. So this runs on a thread of its own: no shard waits for it, and no runtime waits for
    /// it at the end of the process.
    pub(super) fn sweep_all_aside(self, sink: SinkName) {
        let sweep = move || match file_path(&self.prefix).and_then(|folder| sweep_all(&folder)) {
            Ok(0) => {}
            Ok(files) => tracing::info!(%sink, files, "removed leftover files"),
            Err(error) => tracing::warn!(%sink, %error, "cannot remove leftover files"),
        };
        if let Err(error) = std::thread::Builder::new().name("sweep".into()).spawn(sweep) {
            tracing::warn!(%error, "cannot remove leftover files");
        }
    }
}

fn sweep_all(folder: &Path) -> Result<usize, StagedError> {
    let mut found = Vec::new();
    walk(folder, &mut |file, name| {
        let own = leftover_of(name).filter(|own| is_own(own));
        if own.is_some_and(|own| file.with_file_name(own).exists()) {
            found.push(file.to_owned());
        }
    })?;
    for file in &found {
        remove_file(file)?;
    }
    Ok(found.len())
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StagedError> + Send + 'static,
) -> Result<T, StagedError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(StagedError::Path(format!("interrupted: {error}"))))
}

/// Returns the path at which `object_store` has the file of a key.
fn file_path(key: &Key) -> Result<PathBuf, StagedError> {
    LocalFileSystem::new()
        .path_to_filesystem(key)
        .map_err(|error| StagedError::Path(error.to_string()))
}

/// Refuses a folder that is not the one this process began with. The missing folders would be created again, without
/// the earlier claims and objects.
fn check_place(logs: &Path, known: &OnceLock<FileId>) -> Result<(), StagedError> {
    let Some(known) = known.get() else { return Ok(()) };
    if FileId::at(logs).map_err(StagedError::Path)?.as_ref() == Some(known) {
        return Ok(());
    }
    Err(StagedError::Path(format!(
        "the folder {} is missing: it was moved, deleted or replaced while the pipeline writes there; put it \
         back, or restart the pipeline, which then reports what is missing",
        logs.display()
    )))
}

fn create(to: &Path, folder: &Path, payload: &PutPayload) -> Result<Created, StagedError> {
    if to.try_exists().map_err(failed("look at", to))? {
        return Ok(Created::Exists);
    }
    let mut staging = stage(folder)?;
    let path = staging.path.clone();
    for part in payload {
        staging.file.write_all(part).map_err(failed("write", &path))?;
    }
    staging.file.sync_all().map_err(failed("write", &path))?;
    let mut linked = fs::hard_link(&path, to);
    let parent = to.parent().unwrap_or(Path::new("/"));
    if linked.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        create_folders(parent).map_err(failed("create folder", parent))?;
        linked = fs::hard_link(&path, to);
    }
    match linked {
        Ok(()) => {
            sync_folder(parent).map_err(failed("write", parent))?;
            Ok(Created::New)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Created::Exists),
        Err(error) => Err(failed("create", to)(error)),
    }
}

/// Creates a file in the staging folder, and locks it to show that it has a writer.
fn stage(folder: &Path) -> Result<Staging, StagedError> {
    let path = folder.join(Uuid::new_v4().simple().to_string());
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    let mut opened = options.open(&path);
    if opened.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        create_folders(folder).map_err(failed("create folder", folder))?;
        opened = options.open(&path);
    }
    let file = opened.map_err(failed("create", &path))?;
    // On a file system without locks, a sweep of another process may remove the file. Then the link fails, and the
    // commit is tried again.
    let _ = file.try_lock();
    Ok(Staging { path, file })
}

/// Creates a folder and those above it. Each name is durable in its parent when this returns.
fn create_folders(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            create_folders(folder.parent().ok_or(error)?)?;
            match fs::create_dir(folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Err(error) => return Err(error),
    }
    folder.parent().map_or(Ok(()), sync_folder)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn sweep(folder: &Path) -> Result<usize, StagedError> {
    remove_if(folder, |path, _| {
        // The writer of the file has its lock.
        File::open(path).is_ok_and(|file| file.try_lock().is_ok())
    })
}

fn sweep_beside(file: &Path) -> Result<usize, StagedError> {
    let own = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let folder = file.parent().unwrap_or(Path::new("/"));
    remove(folder, |name| leftover_of(name) == Some(own))
}

fn remove(folder: &Path, is_left: impl Fn(&str) -> bool) -> Result<usize, StagedError> {
    remove_if(folder, |_, name| is_left(name))
}

/// Removes the files of one folder for which `is_left` returns true; returns their number.
fn remove_if(folder: &Path, is_left: impl Fn(&Path, &str) -> bool) -> Result<usize, StagedError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(failed("read", folder)(error)),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.map_err(failed("read", folder))?;
        let (path, name) = (entry.path(), entry.file_name());
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && name.to_str().is_some_and(|name| is_left(&path, name)) {
            remove_file(&path)?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn remove_file(path: &Path) -> Result<(), StagedError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Visits the files below a folder. Does not follow links.
fn walk(folder: &Path, visit: &mut impl FnMut(&Path, &str)) -> Result<(), StagedError> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("read", &folder)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed("read", &folder))?;
            match (entry.file_type(), entry.file_name().to_str()) {
                (Ok(kind), _) if kind.is_dir() => folders.push(entry.path()),
                (Ok(kind), Some(name)) if kind.is_file() => visit(&entry.path(), name),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Returns the name that a leftover file was to get: `NAME` of `NAME#1`.
fn leftover_of(name: &str) -> Option<&str> {
    name.rsplit_once('#').filter(|(_, number)| is_number(number)).map(|(own, _)| own)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns whether a name is one that this sink gives: `<link>-<owner>…` for data, or that of a link.
fn is_own(name: &str) -> bool {
    if name.strip_suffix(".json").is_some_and(|number| number.len() == 12 && is_number(number)) {
        return true;
    }
    let Some((link, rest)) = name.split_once('-') else { return false };
    let owner = rest.split(['-', '.']).next().unwrap_or_default();
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    link.len() >= 12 && is_number(link) && owner.len() == 12 && owner.bytes().all(is_hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_42_leftovers_are_known_by_their_names() {
        assert_eq!(leftover_of("a.ndjson.gz#1"), Some("a.ndjson.gz"));
        for name in ["a.ndjson.gz", "a#", "a#1x", "#"] {
            assert_eq!(leftover_of(name), None, "{name}");
        }
        for name in [
            "000000000012-0123456789ab.ndjson.gz",
            "000000000012-0123456789ab-r.bin",
            "000000000001.json",
        ] {
            assert!(is_own(name), "{name}");
        }
        for name in
            ["12-0123456789ab.ndjson", "000000000012-0123456789.ndjson", "notes.txt", "1.json"]
        {
            assert!(!is_own(name), "{name}");
        }
    }

    #[test]
    fn fault_42_a_file_without_a_writer_is_swept_and_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let staging = folder.path().join("log/.tmp");
        let written = stage(&staging).expect("staged");
        fs::write(staging.join("0123"), "left over").expect("written");
        assert_eq!(sweep(&staging).expect("swept"), 1);
        assert!(written.path.exists());
        drop(written);
        assert_eq!(fs::read_dir(&staging).expect("read").count(), 0);
        let to = folder.path().join("a/b/c");
        let payload = PutPayload::from_static(b"rows");
        assert_eq!(create(&to, &staging, &payload).expect("created"), Created::New);
        assert_eq!(create(&to, &staging, &payload).expect("created"), Created::Exists);
        assert_eq!(fs::read(&to).expect("read"), b"rows");
        assert_eq!(fs::read_dir(&staging).expect("read").count(), 0);
    }
}
