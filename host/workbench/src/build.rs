//! Builds a plugin's folder into a component, with the tools of its language.
//!
//! Tools are found, never downloaded, and get a cleaned environment ([`tool`]). Each language has a module here
//! that knows its tool and says how to install it. What all languages share is below.

mod c;
mod componentize;
mod go;
mod js;
mod python;
mod rust;
mod staging;
mod tool;
mod wasi_stub;
mod world;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::{fs, io};

use self::componentize::ComponentizeError;
use self::rust::TARGET;
use super::manifest::{Language, ManifestError, PluginManifest};
use shardmill_core::private::Reach;

/// A plugin that was built.
#[derive(Debug)]
pub struct BuiltPlugin {
    /// Path of the component.
    pub component: PathBuf,
    /// Size of the component in bytes.
    pub component_bytes: u64,
}

/// Reason why a plugin was not built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginBuildError {
    /// The folder is not a plugin's folder.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// There is no crate.
    #[error("missing Cargo.toml in {dir}: name the folder of a plugin crate")]
    NoCrate {
        /// The folder.
        dir: PathBuf,
    },
    /// There is nothing to compile.
    #[error("nothing to compile in {dir}: expected {expected}")]
    NoSources {
        /// The folder.
        dir: PathBuf,
        /// Files that plugins of this language must have.
        expected: &'static str,
    },
    /// A tool cannot be run.
    #[error("failed to run `{tool}`: {cause}; {remedy}")]
    Tool {
        /// The command.
        tool: String,
        /// Error of the system.
        cause: io::Error,
        /// Advice on how to install it.
        remedy: &'static str,
    },
    /// The compiler lacks the library for the target.
    #[error(
        "`{rustc}` has no library for {TARGET} (looked in {looked_in}): run `rustup target add \
         {TARGET}`, or set RUSTC to a compiler that has it"
    )]
    TargetMissing {
        /// The compiler that was asked.
        rustc: String,
        /// Folder where the library was expected.
        looked_in: PathBuf,
    },
    /// The plugin does not compile; the tool has printed the errors to standard error.
    #[error("failed to compile the plugin in {dir}: `{tool}` ended with {status}")]
    Compile {
        /// The plugin's folder.
        dir: PathBuf,
        /// The command.
        tool: String,
        /// Exit status of the tool.
        status: ExitStatus,
    },
    /// The crate does not compile to a module.
    #[error(
        "the crate in {dir} does not compile to a WebAssembly module: its Cargo.toml needs `[lib]` with \
         `crate-type = [\"cdylib\", \"rlib\"]`"
    )]
    NoModule {
        /// The crate's folder.
        dir: PathBuf,
    },
    /// The module cannot be converted to a component.
    #[error("failed to convert {module} to a component: {cause}")]
    Componentize {
        /// The module.
        module: PathBuf,
        /// Cause.
        cause: ComponentizeError,
    },
    /// Another user controls settings that the tool follows.
    #[error(
        "refused to build: cargo would read {}, and {reach}; remove that file, or build in another folder",
        .file.display()
    )]
    ForeignSettings {
        /// The settings file.
        file: PathBuf,
        /// Way in which another user can change it.
        reach: Reach,
    },
    /// A file cannot be read or written.
    #[error("failed to {action} {path}: {cause}")]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        cause: io::Error,
    },
}

/// Builds the plugin in `dir` and writes its component to `out`, whose folder is created if necessary. Without
/// `out`, writes to `NAME.wasm` in `dir`. The tools print to standard error.
///
/// # Errors
///
/// A tool is missing, or the plugin does not compile. `out` is then unchanged.
pub fn build_plugin(dir: &Path, out: Option<&Path>) -> Result<BuiltPlugin, PluginBuildError> {
    build(dir, out, Haste::No)
}

/// Builds like [`build_plugin`], but faster, for `shardmill dev`. The component may be slower and larger, and
/// its bytes may differ each time.
///
/// # Errors
///
/// As [`build_plugin`].
pub fn build_plugin_in_haste(dir: &Path, out: &Path) -> Result<BuiltPlugin, PluginBuildError> {
    build(dir, Some(out), Haste::Yes)
}

/// Whether a short build matters more than a fast component.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Haste {
    Yes,
    No,
}

fn build(dir: &Path, out: Option<&Path>, haste: Haste) -> Result<BuiltPlugin, PluginBuildError> {
    let manifest = PluginManifest::read(dir)?;
    let component = match manifest.language {
        Language::Rust => rust::build(dir, haste)?,
        Language::C => c::build(dir)?,
        Language::Go => go::build(dir)?,
        Language::Js => js::build(dir, &manifest)?,
        Language::Python => python::build(dir, &manifest)?,
    };
    let out = match out {
        Some(out) => out.to_owned(),
        None => dir.join(format!("{}.wasm", manifest.name)),
    };
    write_whole(&out, &component)?;
    Ok(BuiltPlugin { component: out, component_bytes: component.len() as u64 })
}

/// Mode of a written component, before the umask.
const COMPONENT_MODE: u32 = 0o666;

/// Runs a tool in `dir` with its output on standard error. `remedy` says how to install it.
fn compile(
    dir: &Path,
    command: &mut Command,
    remedy: &'static str,
) -> Result<(), PluginBuildError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let output = command
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .stderr(Stdio::inherit())
        .status();
    let status =
        output.map_err(|cause| PluginBuildError::Tool { tool: tool.clone(), cause, remedy })?;
    match status.success() {
        true => Ok(()),
        false => Err(PluginBuildError::Compile { dir: dir.to_owned(), tool, status }),
    }
}

/// Writes to a temporary file next to `out` and renames it, so that a reader never sees half a component.
fn write_whole(out: &Path, bytes: &[u8]) -> Result<(), PluginBuildError> {
    let failed = file_error("write", out);
    let folder = match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // The temporary name is random, so that nobody can place a link at it in advance. Others may read a
    // component.
    let mut partial = tempfile::Builder::new();
    partial.permissions(fs::Permissions::from_mode(COMPONENT_MODE));
    let write = || {
        fs::create_dir_all(folder)?;
        let mut partial = partial.tempfile_in(folder)?;
        partial.write_all(bytes)?;
        partial.persist(out).map(drop).map_err(|error| error.error)
    };
    write().map_err(failed)
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PluginBuildError {
    let path = path.to_owned();
    move |cause| PluginBuildError::File { action, path, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_crate_is_refused() {
        let empty = tempfile::tempdir().unwrap();
        let error = build_plugin(empty.path(), None).unwrap_err();
        assert!(matches!(error, PluginBuildError::Manifest(_)), "{error}");
    }

    #[test]
    fn a_component_is_written_whole() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("deep/out.wasm");
        write_whole(&out, b"component").unwrap();
        assert_eq!(fs::read(&out).unwrap(), b"component");
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&out), mode(&plain), "others may read it, as the umask says");
    }

    #[test]
    fn wall_16_no_link_that_somebody_foresaw_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (out, precious) = (folder.path().join("out.wasm"), folder.path().join("precious"));
        fs::write(&precious, "precious").unwrap();
        for link in ["out.wasm", "out.wasm.partial"] {
            std::os::unix::fs::symlink(&precious, folder.path().join(link)).unwrap();
        }
        write_whole(&out, b"component").unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert_eq!(fs::read(&out).unwrap(), b"component");
    }
}
