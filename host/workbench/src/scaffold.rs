//! New plugins: makes a folder that can be built, tested and run without changes.
//!
//! A language is a folder in `host/workbench/templates/` and an entry of [`template`]. The library of the
//! language is copied into the plugin's folder, so a plugin needs nothing of ours from a package registry.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::assets::{C, GITIGNORE, GO, JS, LanguageTemplate, PYTHON, RUST};
use super::manifest::{Language, MANIFEST, is_name};

/// Returns the template of a language.
fn template(language: Language) -> LanguageTemplate {
    match language {
        Language::Rust => RUST,
        Language::C => C,
        Language::Js => JS,
        Language::Python => PYTHON,
        Language::Go => GO,
    }
}

/// A plugin that was created.
#[derive(Debug)]
pub struct NewPlugin {
    /// Folder of the plugin.
    pub folder: PathBuf,
    /// Its files, relative to the folder, without those of the library.
    pub files: Vec<PathBuf>,
}

/// Reason why no plugin was created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScaffoldError {
    /// The name is invalid.
    #[error(
        "invalid plugin name {name:?}: expected 1 to 64 of a-z, 0-9, - and _, beginning with a letter"
    )]
    Name {
        /// The given name.
        name: String,
    },
    /// The folder is not empty.
    #[error(
        "folder {folder} is not empty: nothing was written; name another folder with --dir, or empty it"
    )]
    NotEmpty {
        /// The folder.
        folder: PathBuf,
    },
    /// A file or folder cannot be created.
    #[error("failed to write {path}: {cause}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Error of the system.
        cause: io::Error,
    },
}

/// Creates the plugin `name` in `folder`, which must be missing or empty.
///
/// # Errors
/// [`ScaffoldError`], before any file is written, unless a write fails.
pub fn new_plugin(
    name: &str,
    language: Language,
    folder: &Path,
) -> Result<NewPlugin, ScaffoldError> {
    if !is_name(name) {
        return Err(ScaffoldError::Name { name: name.into() });
    }
    let template = template(language);
    if !is_free(folder).map_err(write_error(folder))? {
        return Err(ScaffoldError::NotEmpty { folder: folder.to_owned() });
    }
    let own = template.own.iter().chain(std::iter::once(&GITIGNORE));
    for (path, text) in own.clone() {
        write(&folder.join(path), &text.replace("{{name}}", name))?;
    }
    for (path, text) in template.library.iter().copied().flatten() {
        write(&folder.join(path), text)?;
    }
    let mut files: Vec<PathBuf> = own.map(|(path, _)| path.into()).collect();
    files.sort_by_key(|path| (path.as_path() != Path::new(MANIFEST), path.clone()));
    Ok(NewPlugin { folder: folder.to_owned(), files })
}

/// Whether a folder is missing or empty.
fn is_free(folder: &Path) -> io::Result<bool> {
    match fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn write(path: &Path, text: &str) -> Result<(), ScaffoldError> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).and_then(|()| fs::write(path, text)).map_err(write_error(path))
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> ScaffoldError {
    move |cause| ScaffoldError::Write { path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    use crate::manifest::PluginManifest;

    #[test]
    fn a_new_plugin_is_one_and_holds_no_placeholder() {
        for language in Language::value_variants() {
            let language = *language;
            let place = tempfile::tempdir().unwrap();
            let folder = place.path().join("deep/geo");
            let made = new_plugin("geo-2", language, &folder).unwrap();
            let manifest = PluginManifest::read(&folder).unwrap();
            assert_eq!((manifest.name.as_str(), manifest.language), ("geo-2", language));
            assert_eq!(made.files[0], Path::new(MANIFEST));
            for expected in ["README.md", "pipeline.toml", "input.ndjson", "tests/cases.toml"] {
                assert!(made.files.contains(&expected.into()), "{language:?} has no {expected}");
            }
            for file in &made.files {
                let text = fs::read_to_string(folder.join(file)).unwrap();
                assert!(!text.contains("{{name}}"), "{language:?}: {}", file.display());
            }
        }
    }

    #[test]
    fn libraries_are_whole() {
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for (language, from, to) in [
            (Language::Rust, "plugins/sdk/src", "sdk/rust/src"),
            (Language::Rust, "wit/0.1.0", "wit/0.1.0"),
            (Language::C, "plugins/sdk-c", "sdk"),
            (Language::Go, "plugins/sdk-go", "sdk"),
        ] {
            let library = template(language).library;
            for file in fs::read_dir(project.join(from)).unwrap() {
                let path = format!("{to}/{}", file.unwrap().file_name().display());
                let is_there = library.iter().copied().flatten().any(|(name, _)| *name == path);
                assert!(is_there, "{language:?}: {path} is not in the template");
            }
        }
    }

    #[test]
    fn nothing_is_written_over() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("mine"), "").unwrap();
        let error = new_plugin("geo", Language::C, place.path()).unwrap_err();
        assert!(matches!(error, ScaffoldError::NotEmpty { .. }), "{error}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
        let file = new_plugin("geo", Language::C, &place.path().join("mine")).unwrap_err();
        assert!(matches!(file, ScaffoldError::Write { .. }), "{file}");
    }

    #[test]
    fn a_bad_name_is_refused() {
        for name in ["", "Geo", "2geo", "a/b", "..", "a b", &"a".repeat(65)] {
            let error = new_plugin(name, Language::C, Path::new("nowhere")).unwrap_err();
            assert!(matches!(error, ScaffoldError::Name { .. }), "{error}");
        }
    }
}
