//! Small files by which processes of one user find each other: written for their owner alone, and read only
//! where nobody else can have written them.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The user who may do everything.
const ROOT: u32 = 0;
/// The bits of a mode that let others write.
const OTHERS_WRITE: u32 = 0o022;

/// Reads a file that its owner alone can have written: this user, or root. Another user's would send commands,
/// and what they bring, to a port of that user. `None`, said in the log, for any other; `None` as well where
/// there is none.
pub(crate) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut options = OpenOptions::new();
    // Not a link, and not a pipe that would keep the command waiting.
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let mut file = options.open(path).ok()?;
    let about = file.metadata().ok()?;
    // SAFETY: a question that cannot fail.
    let user = unsafe { libc::geteuid() };
    if !about.is_file() || !is_own(user, about.uid(), about.mode()) {
        tracing::warn!(
            path = %path.display(),
            "the file is not used: expected one that user {user} owns and nobody else can write; remove it, and \
             start again what wrote it"
        );
        return None;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn is_own(user: u32, owner: u32, mode: u32) -> bool {
    // Root looks after everybody's pipelines.
    (owner == user || owner == ROOT || user == ROOT) && mode & OTHERS_WRITE == 0
}

/// Writes a file for its owner alone (0600), and puts it in place whole.
///
/// # Errors
/// When the folder cannot be written to.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut draft = tempfile::NamedTempFile::new_in(folder)?;
    draft.write_all(bytes)?;
    draft.persist(path).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_15_a_file_counts_if_nobody_else_can_have_written_it() {
        for (user, owner, mode, expected) in [
            (1000, 1000, 0o600, true),
            (1000, 1000, 0o644, true),
            (1000, 1000, 0o660, false),
            (1000, 1000, 0o602, false),
            (1000, 0, 0o600, true),
            (1000, 1001, 0o600, false),
            (0, 1001, 0o600, true),
        ] {
            assert_eq!(is_own(user, owner, mode), expected, "{user} {owner} {mode:o}");
        }
    }

    #[test]
    fn wall_15_a_file_is_its_owners_and_a_link_is_not_followed() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        write(&path, b"one").expect("written");
        let mode = std::fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(read(&path).as_deref(), Some(&b"one"[..]));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        assert_eq!(read(&link), None);
        assert_eq!(read(&folder.path().join("none")), None);
    }
}
