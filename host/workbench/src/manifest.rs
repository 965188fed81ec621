//! `plugin.toml`: description of a plugin's folder, for the commands that build and test it.
//!
//! A folder without this file but with a `Cargo.toml` is a Rust plugin named after the folder.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::Deserialize;

use shardmill_config::Capability;

/// Name of the manifest file in a plugin's folder.
pub const MANIFEST: &str = "plugin.toml";

/// Languages that plugins can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// Rust, built with cargo.
    Rust,
    /// C, built with `zig cc`.
    C,
    /// JavaScript, built with componentize-qjs (QuickJS engine).
    Js,
    /// Python, built with componentize-py (CPython).
    Python,
    /// Go, built with its own compiler.
    Go,
}

/// Description of a plugin's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginManifest {
    /// Name of the plugin, and of its component file.
    pub name: String,
    /// Language of the plugin.
    pub language: Language,
    /// Capabilities that the plugin imports. Rust, C and Go import what they use and need no list.
    pub capabilities: BTreeSet<Capability>,
    /// Rules for its tests.
    pub test: TestRules,
}

/// `[test]`: rules for a plugin's tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TestRules {
    /// Members of JSON payloads that captured cases must not contain, as JSON pointers (RFC 6901).
    pub redact: Vec<String>,
    /// Whether captured cases contain partition keys as hashes.
    pub redact_keys: bool,
}

/// Reason why a folder is not a plugin's folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// There is neither a manifest nor a crate.
    #[error(
        "{dir} has neither a {MANIFEST} nor a Cargo.toml: name a plugin's folder, or create one with \
         `shardmill new plugin NAME`"
    )]
    NoPlugin {
        /// The folder.
        dir: PathBuf,
    },
    /// The file cannot be read.
    #[error("failed to read {path}: {cause}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Error of the system.
        cause: io::Error,
    },
    /// The file is not a valid manifest.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Description of the error, with its place.
        message: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    plugin: RawPlugin,
    #[serde(default)]
    test: TestRules,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlugin {
    name: String,
    language: Language,
    #[serde(default)]
    capabilities: BTreeSet<Capability>,
}

impl PluginManifest {
    /// Reads the manifest of the plugin in `dir`.
    ///
    /// # Errors
    /// [`ManifestError`], with the folder or the place in the file.
    pub fn read(dir: &Path) -> Result<Self, ManifestError> {
        let path = dir.join(MANIFEST);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::of_crate(dir),
            Err(cause) => return Err(ManifestError::Unreadable { path, cause }),
        };
        let malformed = |message: String| ManifestError::Malformed { path: path.clone(), message };
        let raw: Raw =
            toml::from_str(&text).map_err(|error| malformed(error.to_string().trim().into()))?;
        let RawPlugin { name, language, capabilities } = raw.plugin;
        if !is_name(&name) {
            return Err(malformed(format!(
                "invalid `name = {name:?}`: expected 1 to 64 of a-z, 0-9, - and _, beginning with a letter"
            )));
        }
        Ok(Self { name, language, capabilities, test: raw.test })
    }

    fn of_crate(dir: &Path) -> Result<Self, ManifestError> {
        if !dir.join("Cargo.toml").is_file() {
            return Err(ManifestError::NoPlugin { dir: dir.to_owned() });
        }
        let folder = dir.canonicalize().ok();
        let name = folder.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        Ok(Self {
            name: name.unwrap_or("plugin").to_owned(),
            language: Language::Rust,
            capabilities: BTreeSet::new(),
            test: TestRules::default(),
        })
    }
}

/// Whether a text is a valid plugin name: it names the file, the crate and the module.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    name.len() <= 64 && name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<PluginManifest, ManifestError> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(MANIFEST), text).unwrap();
        PluginManifest::read(folder.path())
    }

    #[test]
    fn a_manifest_says_what_a_folder_holds() {
        let text =
            "[plugin]\nname = \"geo\"\nlanguage = \"js\"\ncapabilities = [\"log\", \"lookup\"]";
        let manifest = read(text).unwrap();
        assert_eq!((manifest.name.as_str(), manifest.language), ("geo", Language::Js));
        assert_eq!(manifest.capabilities, [Capability::Log, Capability::Lookup].into());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let error = |text| read(text).unwrap_err().to_string();
        assert!(error("[plugin]\nname = \"x\"\nlanguage = \"cobol\"").contains("line 3"));
        assert!(error("[plugin]\nname = \"X y\"\nlanguage = \"js\"").contains("invalid `name"));
    }

    #[test]
    fn a_crate_needs_no_manifest() {
        let folder = tempfile::tempdir().unwrap();
        let error = PluginManifest::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("neither a plugin.toml nor a Cargo.toml"), "{error}");
        fs::write(folder.path().join("Cargo.toml"), "").unwrap();
        assert_eq!(PluginManifest::read(folder.path()).unwrap().language, Language::Rust);
    }
}
