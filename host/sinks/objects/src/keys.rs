//! Limits of the lengths of names and keys, counted as the store gets them: percent-encoded. A letter beyond ASCII
//! counts six bytes or more, and a slash within a name three.

use std::collections::BTreeMap;

use object_store::path::Path;
use serde::{Deserialize, Serialize};
use url::Url;

use super::layout::{OWNER_DIGITS, file_name};
use super::settings::ObjectLayout;
use shardmill_core::record::RouteName;

/// Longest name of a file or folder on usual file systems (NAME_MAX), in bytes.
const FILE_NAME_BYTES: usize = 255;
/// Longest path of a system call (PATH_MAX), without the NUL at its end and the slash at its beginning.
const FILE_PATH_BYTES: usize = 4_094;
/// Longest key of S3 (user guide, "Naming Amazon S3 objects"), GCS and Azure.
const KEY_BYTES: usize = 1_024;

/// Longest names and keys of a store, in bytes as encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyLimits {
    /// Most bytes between two slashes.
    pub(super) name_bytes: usize,
    /// Most bytes of the whole key.
    pub(super) key_bytes: usize,
}

impl KeyLimits {
    /// Limits that every object store accepts. Servers other than the public clouds mostly keep objects as files, so
    /// file names limit them.
    pub(super) const ANY: Self = Self { name_bytes: FILE_NAME_BYTES, key_bytes: KEY_BYTES };

    /// Returns the limits of the store at a URL, with these options.
    pub(super) fn of(url: &Url, options: &BTreeMap<String, String>) -> Self {
        let has_endpoint = options.keys().any(|key| key.to_ascii_lowercase().ends_with("endpoint"))
            || ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"]
                .iter()
                .any(|name| std::env::var_os(name).is_some());
        match url.scheme() {
            "file" => Self { name_bytes: FILE_NAME_BYTES, key_bytes: FILE_PATH_BYTES },
            "s3" | "s3a" | "gs" if !has_endpoint => {
                Self { name_bytes: KEY_BYTES, key_bytes: KEY_BYTES }
            }
            _ => Self::ANY,
        }
    }

    /// Checks a whole key.
    ///
    /// # Errors
    /// The limit that it exceeds, as the end of a sentence.
    pub(super) fn check(self, key: &Path) -> Result<(), String> {
        self.check_parts(key.parts().map(|part| part.as_ref().len()), key.as_ref().len())
    }

    /// Checks a folder below a prefix, with a file in it.
    ///
    /// # Errors
    /// The limit that it exceeds, as the end of a sentence.
    pub(super) fn check_folder(
        self,
        prefix: &Path,
        folder: &Path,
        file_bytes: usize,
    ) -> Result<(), String> {
        let slashes =
            usize::from(!prefix.as_ref().is_empty()) + usize::from(!folder.as_ref().is_empty());
        let total = prefix.as_ref().len() + folder.as_ref().len() + file_bytes + slashes;
        let names = folder.parts().map(|part| part.as_ref().len()).chain([file_bytes]);
        self.check_parts(names, total)
    }

    fn check_parts(self, names: impl Iterator<Item = usize>, total: usize) -> Result<(), String> {
        let longest = names.max().unwrap_or(0);
        if longest > self.name_bytes {
            return Err(format!(
                "a name in its key would have {longest} bytes as encoded, the store takes {}",
                self.name_bytes
            ));
        }
        if total > self.key_bytes {
            return Err(format!(
                "its key would have {total} bytes as encoded, the store takes {}",
                self.key_bytes
            ));
        }
        Ok(())
    }
}

/// Prefix and limits of the keys of a sink's objects.
#[derive(Clone, Debug)]
pub(super) struct KeyRoom {
    /// Prefix of the sink.
    pub(super) prefix: Path,
    /// Limits of the claim that the rows are for; `None`: a claim of a version without limits.
    pub(super) limits: Option<KeyLimits>,
}

impl KeyRoom {
    /// Checks the folder of a row.
    ///
    /// # Errors
    /// The reason why no object can be written there, as a fragment for a dead letter.
    pub(super) fn check(
        &self,
        folder: &Path,
        route: &RouteName,
        layout: &ObjectLayout,
    ) -> Result<(), String> {
        let Some(limits) = self.limits else { return Ok(()) };
        let file_bytes = file_name(layout, 0, &"0".repeat(OWNER_DIGITS), route).as_ref().len();
        limits
            .check_folder(&self.prefix, folder, file_bytes)
            .map_err(|why| format!("no object can be written in its folder: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_08_lengths_are_counted_as_encoded() {
        let limits = KeyLimits::ANY;
        let prefix = Path::from("p");
        let folder = |name: &str| Path::default().join(name);
        let check = |name: &str| limits.check_folder(&prefix, &folder(name), 40);
        assert!(check(&"x".repeat(255)).is_ok());
        assert!(check(&"x".repeat(256)).is_err_and(|why| why.contains("256 bytes")));
        assert!(check(&"ж".repeat(42)).is_ok());
        assert!(check(&"ж".repeat(48)).is_err_and(|why| why.contains("288 bytes")));
        assert!(check(&"/".repeat(85)).is_ok());
        assert!(check(&"/".repeat(100)).is_err_and(|why| why.contains("300 bytes")));
        let deep = (0..5).fold(Path::default(), |path, _| path.join("y".repeat(200)));
        let why = limits.check_folder(&prefix, &deep, 40).expect_err("too long");
        assert!(why.contains("1047 bytes"), "{why}");
        let whole =
            deep.parts().fold(prefix.clone(), |path, part| path.join(part)).join("z".repeat(40));
        assert_eq!(limits.check(&whole), Err(why));
    }

    #[test]
    fn fault_08_each_store_has_its_limits() {
        let of = |url: &str, options: &[&str]| {
            let options = options.iter().map(|key| ((*key).to_owned(), String::new())).collect();
            let limits = KeyLimits::of(&Url::parse(url).expect("a URL"), &options);
            (limits.name_bytes, limits.key_bytes)
        };
        assert_eq!(of("file:///data", &[]), (255, 4_094));
        assert_eq!(of("s3://bucket/x", &["aws_endpoint"]), (255, 1_024));
        assert_eq!(of("az://container/x", &[]), (255, 1_024));
    }
}
