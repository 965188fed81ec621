//! The lock on a pipeline's state folder: on one machine, it decides who runs the pipeline.
//!
//! The lock keeps out a second `run` of the same pipeline. It is not a fence: a process that has lost the lock but
//! still runs is fenced by the epoch in each sink. Leases that a fleet shares come in a later version.

use std::fs::{File, TryLockError};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardmill_core::private;

use shardmill_core::private::{PrivateError, StateDir};
use shardmill_core::record::PipelineName;

/// The pipeline's folder cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process runs the pipeline.
    #[error(
        "pipeline {pipeline} is already running, as process {owner} (lock {path}); stop it first, or give this \
         one another name or state_dir"
    )]
    Taken {
        /// The pipeline.
        pipeline: PipelineName,
        /// The process id that the owner wrote.
        owner: String,
        /// The lock's file.
        path: String,
    },
    /// Another command works with the pipeline's dead letters or replays.
    #[error(
        "another redrive or replay of pipeline {pipeline} is running, as process {owner} (lock {path}); wait \
         for it to end, then run the command again"
    )]
    Redriving {
        /// The pipeline.
        pipeline: PipelineName,
        /// The process id that the owner wrote.
        owner: String,
        /// The lock's file.
        path: String,
    },
    /// The lock's file cannot be created.
    #[error("failed to lock {path}: {cause}; free the disk, or set `state_dir` elsewhere")]
    Unusable {
        /// The lock's file.
        path: String,
        /// The system's error.
        cause: std::io::Error,
    },
    /// It cannot be checked whether a process runs the pipeline.
    #[error(
        "failed to check whether pipeline {pipeline} is running, at {path}: {cause}; run the command as the \
         user who runs the pipeline"
    )]
    Hidden {
        /// The pipeline.
        pipeline: PipelineName,
        /// The lock's file.
        path: String,
        /// The system's error.
        cause: std::io::Error,
    },
    /// Others can reach the folder, or it cannot be created.
    #[error(transparent)]
    Folder(#[from] PrivateError),
}

/// The right to run a pipeline on this machine; returned when dropped or when the process dies.
#[derive(Debug)]
pub struct PipelineLock {
    _file: File,
    folder: PathBuf,
}

impl PipelineLock {
    /// Locks the pipeline's folder under the state folder, and creates it. The folder must belong to this user
    /// alone.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(state_dir: &StateDir, pipeline: &PipelineName) -> Result<Self, LockError> {
        let taken = |pipeline, owner, path| LockError::Taken { pipeline, owner, path };
        Self::take_file(state_dir, pipeline, "lock", taken)
    }

    /// Takes the right to redrive the pipeline's dead letters. A redrive has positions of its own, so the pipeline
    /// may run at the same time.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take_for_redrive(
        state_dir: &StateDir,
        pipeline: &PipelineName,
    ) -> Result<Self, LockError> {
        // Another name or state folder would not help: it has other dead letters, or none.
        let taken = |pipeline, owner, path| LockError::Redriving { pipeline, owner, path };
        Self::take_file(state_dir, pipeline, "redrive.lock", taken)
    }

    /// Takes the right to run records again with positions in a folder of their own under the pipeline's: one
    /// command at a time, beside the pipeline.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take_for_replay(folder: &StateDir, pipeline: &PipelineName) -> Result<Self, LockError> {
        let taken = |pipeline, owner, path| LockError::Redriving { pipeline, owner, path };
        Self::take_file(folder, pipeline, "lock", taken)
    }

    fn take_file(
        state_dir: &StateDir,
        pipeline: &PipelineName,
        name: &str,
        taken: impl Fn(PipelineName, String, String) -> LockError,
    ) -> Result<Self, LockError> {
        let folder = state_dir.make(pipeline.as_str())?;
        let path = folder.join(name);
        let unusable = |cause| LockError::Unusable { path: path.display().to_string(), cause };
        let mut file = private::open_lock(&path).map_err(unusable)?;
        if !locks_soon(&file) {
            let mut owner = String::new();
            // Only for the message, so an error is ignored.
            let _ = file.read_to_string(&mut owner);
            let path = path.display().to_string();
            return Err(taken(pipeline.clone(), owner.trim().into(), path));
        }
        private::sign_lock(&file).map_err(unusable)?;
        Ok(Self { _file: file, folder })
    }

    /// Checks that a start could use the lock's file, if there is one. The file is neither created nor locked.
    ///
    /// # Errors
    /// [`LockError::Unusable`].
    pub fn check(state_dir: &Path, pipeline: &PipelineName) -> Result<(), LockError> {
        let path = state_dir.join(pipeline.as_str()).join("lock");
        match private::check_lock(&path) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                Err(LockError::Unusable { path: path.display().to_string(), cause })
            }
            _ => Ok(()),
        }
    }

    /// Whether some process runs the pipeline, that is, holds the lock of its folder under the state folder.
    ///
    /// # Errors
    /// [`LockError::Hidden`] where the lock is another user's, [`LockError::Unusable`].
    pub fn is_taken(state_dir: &Path, pipeline: &PipelineName) -> Result<bool, LockError> {
        let path = state_dir.join(pipeline.as_str()).join("lock");
        let unusable = |cause| LockError::Unusable { path: path.display().to_string(), cause };
        let file = match private::open_lock_to_look(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(cause) if cause.kind() == std::io::ErrorKind::PermissionDenied => {
                let path = path.display().to_string();
                return Err(LockError::Hidden { pipeline: pipeline.clone(), path, cause });
            }
            Err(error) => return Err(unusable(error)),
        };
        match file.try_lock_shared() {
            // Released at once: a process that starts in this moment tries again.
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(unusable(error)),
        }
    }

    /// Returns the pipeline's own folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Takes a lock that a command may be checking at this moment ([`PipelineLock::is_taken`]).
fn locks_soon(file: &File) -> bool {
    (0..5).any(|tried| {
        if tried > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        file.try_lock().is_ok()
    })
}
