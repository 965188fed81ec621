//! `plugin.toml`: what a plugin's folder says of itself, for the commands that build and test it.
//!
//! A folder without one that holds a `Cargo.toml` is a Rust plugin named after the folder.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::Deserialize;

use shardmill_config::Capability;

/// The file's name in a plugin's folder.
pub const MANIFEST: &str = "plugin.toml";

/// A language that plugins are written in here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// Rust, by cargo.
    Rust,
    /// C, by `zig cc`.
    C,
    /// JavaScript, by jco with the QuickJS engine.
    Js,
    /// Python, by componentize-py.
    Python,
    /// Go, by its own compiler.
    Go,
}

/// A plugin's folder, described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginManifest {
    /// Its name: what the component's file is called.
    pub name: String,
    /// Its language.
    pub language: Language,
    /// What it asks of the host. Rust, C and Go import what they use and need no list.
    pub capabilities: BTreeSet<Capability>,
    /// How it is tested.
    pub test: TestRules,
}

/// `[test]`: how a plugin is tested.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TestRules {
    /// Members of JSON payloads that captured cases must not show, by pointer (RFC 6901).
    pub redact: Vec<String>,
    /// Whether captured cases show partition keys as hashes.
    pub redact_keys: bool,
}

/// Why a folder is no plugin's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// There is neither a manifest nor a crate.
    #[error(
        "{dir} holds neither a {MANIFEST} nor a Cargo.toml: name a plugin's folder, or make one with \
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
        /// What the system said.
        cause: io::Error,
    },
    /// The file says something else than a manifest.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
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
    /// [`ManifestError`], naming the folder or the place in the file.
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
                "`name = {name:?}`: a plugin's name is 1 to 64 of a-z, 0-9, - and _, the first a letter"
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

/// Whether a text can name a plugin: its file, its crate, its module.
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
        assert!(error("[plugin]\nname = \"X y\"\nlanguage = \"js\"").contains("a plugin's name"));
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
