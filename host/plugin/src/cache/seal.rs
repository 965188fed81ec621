//! The seal of compiled components: an HMAC over name and content, by a secret beside them.
//!
//! A digest alone would show that a file is whole, not who wrote it: compiled code that somebody else made
//! would run in place of a component that is pinned by its digest.

use std::fmt;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::Path;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::Users;
use shardmill_core::private;

/// The file that holds the secret.
const KEY_FILE: &str = "seal.key";
/// As many as a block of SHA-256 has: HMAC takes them as they are.
const KEY_BYTES: usize = 64;
/// Bytes of the seal that ends a file.
const SEAL_BYTES: usize = 32;

/// The secret of a folder.
pub(super) struct Seal([u8; KEY_BYTES]);

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    /// Reads the secret of a folder. Folder and secret are made if they are missing, for this user alone.
    ///
    /// # Errors
    /// The system's, or that the secret may not be one: nothing there can be used then.
    pub(crate) fn of_folder(folder: &Path, users: Users) -> io::Result<Self> {
        private::make_folders(folder)?;
        if users != Users::Named {
            private::tighten_linked(folder);
        }
        let path = folder.join(KEY_FILE);
        match read(&path)? {
            Found::Key(key) => {
                // A volume's group may have been given rights in it (fsGroup).
                private::tighten(&path);
                return Ok(Self(key));
            }
            Found::Missing => {}
            Found::Exposed => {
                // What others may know seals nothing. Files under the old key are compiled again.
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
                "expected a key of mode 0600 at {}, and the file system does not keep it",
                path.display()
            ))),
        }
    }

    /// The seal of a file.
    pub fn of(&self, name: &str, code: &[u8]) -> [u8; SEAL_BYTES] {
        self.mac(name, code).finalize().into_bytes().into()
    }

    /// The content of a sealed file; `None`: the seal is not by this key, for this name and content.
    pub fn opened<'f>(&self, name: &str, sealed: &'f [u8]) -> Option<&'f [u8]> {
        let (code, seal) = sealed.split_at_checked(sealed.len().checked_sub(SEAL_BYTES)?)?;
        self.mac(name, code).verify_slice(seal).ok()?;
        Some(code)
    }

    /// Sealed with its name: code of one component must not pass for that of another.
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
    /// Others have rights in it.
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

/// Makes a key, unless another process is first.
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
        // Name and content do not run into each other.
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
        // One that a group of this process was given is kept: else each start of a pod would compile again.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o660)).unwrap();
        assert_eq!((first, 0o600), (of(), mode(&key)));
        // One that others could read is replaced.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert_ne!(first, of());
        assert_eq!(mode(&key), 0o600);
        // What is no key is not used, and not replaced.
        fs::write(&key, "short").unwrap();
        let error = Seal::of_folder(&folder, Users::User).unwrap_err().to_string();
        assert!(error.contains("expected a key of 64 bytes"), "{error}");
        fs::remove_file(&key).unwrap();
        symlink("/dev/zero", &key).unwrap();
        let error = Seal::of_folder(&folder, Users::User).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }
}
