//! Who may read: on one machine, a lock on the pipeline's state folder.
//!
//! The lock keeps a second `run` of the same pipeline out; the fence against a process that is gone
//! but not dead is the epoch in each sink. Leases that a fleet shares come in a later version.

use std::fs::{File, TryLockError};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardmill_core::private;

use shardmill_core::private::{PrivateError, StateDir};
use shardmill_core::record::PipelineName;

/// The pipeline's folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process runs the pipeline.
    #[error(
        "pipeline {pipeline} is running already, as process {owner} (lock {path}); stop it first, or \
         give this one another name or state_dir"
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
         for it to end, then give the command again"
    )]
    Redriving {
        /// The pipeline.
        pipeline: PipelineName,
        /// The process id that the owner wrote.
        owner: String,
        /// The lock's file.
        path: String,
    },
    /// The lock's file cannot be made.
    #[error("failed to lock {path}: {cause}; free the disk, or set `state_dir` elsewhere")]
    Unusable {
        /// The lock's file.
        path: String,
        /// What the system says.
        cause: std::io::Error,
    },
    /// It cannot be seen whether a process runs the pipeline.
    #[error(
        "failed to look whether pipeline {pipeline} runs, at {path}: {cause}; give the command as the user \
         who runs it"
    )]
    Hidden {
        /// The pipeline.
        pipeline: PipelineName,
        /// The lock's file.
        path: String,
        /// The system's words.
        cause: std::io::Error,
    },
    /// Others can reach the folder, or it cannot be made.
    #[error(transparent)]
    Folder(#[from] PrivateError),
}

/// The right to run a pipeline on this machine; given back when dropped or when the process dies.
#[derive(Debug)]
pub struct PipelineLock {
    _file: File,
    folder: PathBuf,
}

impl PipelineLock {
    /// Takes the lock of the pipeline's folder under the state folder, which is created. The folder must be
    /// this user's alone.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(state_dir: &StateDir, pipeline: &PipelineName) -> Result<Self, LockError> {
        let taken = |pipeline, owner, path| LockError::Taken { pipeline, owner, path };
        Self::take_file(state_dir, pipeline, "lock", taken)
    }

    /// Takes the right to redrive the pipeline's dead letters: positions of its own, so that the
    /// pipeline may run at the same time.
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

    /// Takes the right to run records again with positions in a folder of their own under the pipeline's: one command
    /// at a time, beside the pipeline.
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
            // Only for the message.
            let _ = file.read_to_string(&mut owner);
            let path = path.display().to_string();
            return Err(taken(pipeline.clone(), owner.trim().into(), path));
        }
        private::sign_lock(&file).map_err(unusable)?;
        Ok(Self { _file: file, folder })
    }

    /// Checks that a start could use the lock's file, if there is one. It is neither made nor taken.
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

    /// Whether some process runs the pipeline: has the lock of its folder under the state folder.
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
            // Given back at once: whoever starts in this moment tries again.
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(unusable(error)),
        }
    }

    /// The pipeline's own folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Takes a lock that a command may just be looking at ([`PipelineLock::is_taken`]).
fn locks_soon(file: &File) -> bool {
    (0..5).any(|tried| {
        if tried > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        file.try_lock().is_ok()
    })
}
