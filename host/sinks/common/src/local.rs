//! Checks of folders and files of this machine: whether a sink can write there, without leaving a file.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Identity of a file or folder, whatever its name. Writes to an open file succeed even if it was moved or deleted, so
/// the file at the path is compared with the open one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the identity of the file at a path; `None`: there is none.
    ///
    /// # Errors
    /// A message, if the path cannot be looked at.
    pub fn at(path: &Path) -> Result<Option<Self>, String> {
        match std::fs::metadata(path) {
            Ok(found) => Ok(Some(Self { device: found.dev(), inode: found.ino() })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("cannot look at {}: {error}", path.display())),
        }
    }
}

/// Checks that files can be created in a folder. If the folder is missing, its nearest existing ancestor is checked.
///
/// # Errors
/// A message with the folder, the cause and the way out.
pub fn check_writable(folder: &Path) -> Result<(), String> {
    let mut at = folder;
    loop {
        match std::fs::metadata(at) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => {
                return Err(format!("expected a folder at {}, found a file", at.display()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => match at.parent() {
                Some(parent) if parent.as_os_str().is_empty() => at = Path::new("."),
                Some(parent) => at = parent,
                None => return Err(format!("cannot look at {}: {error}", folder.display())),
            },
            Err(error) => return Err(format!("cannot look at {}: {error}", at.display())),
        }
    }
    // The file has no name, and is gone when it is closed.
    tempfile::tempfile_in(at).map(drop).map_err(|error| {
        format!(
            "cannot write files in {}: {}: let this user write there, or name another folder",
            at.display(),
            error.kind()
        )
    })
}

/// Checks that an existing file can be written, by the rights that this process has.
///
/// The file is not opened: a pipeline that runs may have it open as a database, and closing any descriptor of a
/// file ends all locks that the process has on it (POSIX). The next program that opens and closes the database would
/// consider itself the last one and delete the log, with rows that are in the log only.
///
/// # Errors
/// A message with the file, the cause and the way out.
pub fn check_writable_file(path: &Path) -> Result<(), String> {
    let may_write = match std::fs::metadata(path) {
        Ok(found) if found.is_file() => may_read_and_write(path),
        Ok(_) => Err(io::Error::other("expected a file, found something else")),
        Err(error) => Err(error),
    };
    may_write.map_err(|error| {
        format!(
            "cannot write to {}: {error}: let this user write to it, or name another file",
            path.display()
        )
    })
}

fn may_read_and_write(path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // Checks the rights of the effective user, as `open` does; `access` checks those of the real user.
    let (rights, by) = (libc::R_OK | libc::W_OK, libc::AT_EACCESS);
    // SAFETY: the call reads a text that ends with a zero byte and outlives the call.
    match unsafe { libc::faccessat(libc::AT_FDCWD, name.as_ptr(), rights, by) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
