//! The seal of compiled components: an HMAC over name and content, under a secret key in the same folder.
//!
//! A digest alone would show that a file is complete, not who wrote it: compiled code that somebody else made could
//! run in place of a component that is pinned by its digest.

use std::fmt;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::Path;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::Users;
use shardmill_core::private;

/// File of the secret key.
const KEY_FILE: &str = "seal.key";
/// Length of the key: the block size of SHA-256, which HMAC uses as it is.
const KEY_BYTES: usize = 64;
/// Length of the seal at the end of a file.
const SEAL_BYTES: usize = 32;

/// The secret key of a folder.
pub(super) struct Seal([u8; KEY_BYTES]);

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    /// Reads the key of a folder. Creates folder and key if they are missing, readable by this user only.
    ///
    /// # Errors
    /// The system's, or that the file cannot serve as a key: then the folder cannot be used.
    pub(crate) fn of_folder(folder: &Path, users: Users) -> io::Result<Self> {
        private::make_folders(folder)?;
        if users != Users::Named {
            private::tighten_linked(folder);
        }
        let path = folder.join(KEY_FILE);
        match read(&path)? {
            Found::Key(key) => {
                // A volume's group may have got access to it (fsGroup).
                private::tighten(&path);
                return Ok(Self(key));
            }
            Found::Missing => {}
            Found::Exposed => {
                // A key that others could read proves nothing. Files sealed with it are compiled again.
                tracing::warn!(
                    file = %path.display(),
                    "other users could read the key that seals compiled plugins; it is replaced"
                );
                std::fs::remove_file(&path)?;
            }
        }
        make(folder, &path)?;
        match read(&path)? {
            Found::Key(key) => Ok(Self(key)),
            Found::Missing | Found::Exposed => Err(io::Error::other(format!(
                "expected a key of mode 0600 at {}: the file system does not keep its mode",
                path.display()
            ))),
        }
    }

    /// Returns the seal of a file.
    pub fn of(&self, name: &str, code: &[u8]) -> [u8; SEAL_BYTES] {
        self.mac(name, code).finalize().into_bytes().into()
    }

    /// Returns the content of a sealed file; `None`: the seal does not match this key, name and content.
    pub fn opened<'f>(&self, name: &str, sealed: &'f [u8]) -> Option<&'f [u8]> {
        let (code, seal) = sealed.split_at_checked(sealed.len().checked_sub(SEAL_BYTES)?)?;
        self.mac(name, code).verify_slice(seal).ok()?;
        Some(code)
    }

    /// Computes the MAC. The name is part of it: code of one component must not pass as that of another.
    fn mac(&self, name: &str, code: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new((&self.0).into());
        mac.update(&(name.len() as u64).to_le_bytes());
        mac.update(name.as_bytes());
        mac.update(code);
        mac
    }
}

enum Found {
    Key([u8; KEY_BYTES]),
    Missing,
    /// Other users have access to it.
    Exposed,
}

fn read(path: &Path) -> io::Result<Found> {
    let file = match private::open_own(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Missing),
        Err(error) => return Err(io::Error::other(format!("{}: {error}", path.display()))),
    };
    if private::is_open_to_others(&file)? {
        return Ok(Found::Exposed);
    }
    let mut key = Vec::new();
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut key)?;
    let key = key.try_into().map_err(|found: Vec<u8>| {
        io::Error::other(format!(
            "expected a key of {KEY_BYTES} bytes in {}, found {}; delete the file",
            path.display(),
            found.len()
        ))
    });
    key.map(Found::Key)
}

/// Creates a key, unless another process has just done so.
fn make(folder: &Path, path: &Path) -> io::Result<()> {
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(io::Error::other)?;
    let mut draft = tempfile::NamedTempFile::new_in(folder)?;
    draft.write_all(&key)?;
    draft.as_file().sync_all()?;
    match draft.persist_noclobber(path) {
        Err(error) if error.error.kind() != ErrorKind::AlreadyExists => Err(error.error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn wall_14_a_seal_is_of_one_name_one_content_and_one_key() {
        let (one, other) = (Seal([1; KEY_BYTES]), Seal([2; KEY_BYTES]));
        let sealed = [&b"code"[..], &one.of("a", b"code")].concat();
        assert_eq!(one.opened("a", &sealed), Some(&b"code"[..]));
        assert_eq!(one.opened("b", &sealed), None);
        assert_eq!(other.opened("a", &sealed), None);
        assert_eq!(one.opened("a", &sealed[1..]), None);
        assert_eq!(one.opened("a", b"short"), None);
        // The lengths are sealed too, so ("ab", "c") and ("a", "bc") differ.
        assert_ne!(one.of("ab", b"c"), one.of("a", b"bc"));
    }

    #[test]
    fn wall_14_a_key_is_made_once_and_is_its_owners_alone() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("deep/cache");
        let of = || Seal::of_folder(&folder, Users::User).unwrap().0;
        let first = of();
        assert_eq!(first, of());
        let key = folder.join(KEY_FILE);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&key)), (0o700, 0o600));
        // A key that a group of this process may read stays: otherwise each start of a pod would compile again.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o660)).unwrap();
        assert_eq!((first, 0o600), (of(), mode(&key)));
        // A key that others could read is replaced.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert_ne!(first, of());
        assert_eq!(mode(&key), 0o600);
        // A file that is not a key is neither used nor replaced.
        fs::write(&key, "short").unwrap();
        let error = Seal::of_folder(&folder, Users::User).unwrap_err().to_string();
        assert!(error.contains("expected a key of 64 bytes"), "{error}");
        fs::remove_file(&key).unwrap();
        symlink("/dev/zero", &key).unwrap();
        let error = Seal::of_folder(&folder, Users::User).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }
}
