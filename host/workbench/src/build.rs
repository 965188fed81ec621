//! Builds a plugin's folder into a component, by its language's own tools.
//!
//! Tools are found, never fetched, and get a cleaned environment ([`tool`]). Each language has a module
//! here that knows its tool and says how to get it; what all share is below.

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
    /// Where the component is.
    pub component: PathBuf,
    /// The component's size in bytes.
    pub component_bytes: u64,
}

/// Why a plugin was not built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginBuildError {
    /// The folder is no plugin's.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// There is no crate.
    #[error("{dir} holds no Cargo.toml: name the folder of a plugin crate")]
    NoCrate {
        /// The folder.
        dir: PathBuf,
    },
    /// There is nothing to compile.
    #[error("{dir} holds nothing to compile: {expected} is due")]
    NoSources {
        /// The folder.
        dir: PathBuf,
        /// What the language's plugins have.
        expected: &'static str,
    },
    /// A tool cannot be run.
    #[error("failed to run `{tool}`: {cause}; {remedy}")]
    Tool {
        /// The command.
        tool: String,
        /// What the system said.
        cause: io::Error,
        /// How to get it.
        remedy: &'static str,
    },
    /// The compiler lacks the library for the target.
    #[error(
        "`{rustc}` has no library for {TARGET} (looked in {looked_in}): run `rustup target add \
         {TARGET}`, or set RUSTC to a compiler that has it"
    )]
    TargetMissing {
        /// The compiler asked.
        rustc: String,
        /// Where it would be.
        looked_in: PathBuf,
    },
    /// The plugin does not compile; the tool has said why on standard error.
    #[error("failed to compile the plugin in {dir}: `{tool}` ended with {status}")]
    Compile {
        /// The plugin's folder.
        dir: PathBuf,
        /// The command.
        tool: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The crate compiles to no module.
    #[error(
        "the crate in {dir} compiles to no WebAssembly module: its Cargo.toml needs `[lib]` with \
         `crate-type = [\"cdylib\", \"rlib\"]`"
    )]
    NoModule {
        /// The crate's folder.
        dir: PathBuf,
    },
    /// The module cannot be made a component.
    #[error("failed to make {module} a component: {cause}")]
    Componentize {
        /// The module.
        module: PathBuf,
        /// Why.
        cause: ComponentizeError,
    },
    /// Another user decides what the tool runs.
    #[error(
        "refused to build: cargo would follow {}, and {reach}; remove that file, or build in another folder",
        .file.display()
    )]
    ForeignSettings {
        /// The file with settings.
        file: PathBuf,
        /// How another user can change it.
        reach: Reach,
    },
    /// A file cannot be read or written.
    #[error("failed to {action} {path}: {cause}")]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

/// Builds the plugin in `dir` and writes its component to `out`, whose folder is made if needed;
/// without `out`, to `NAME.wasm` in `dir`. The tools report on standard error.
///
/// # Errors
///
/// If a tool is missing, or the plugin does not compile. `out` is then as it was.
pub fn build_plugin(dir: &Path, out: Option<&Path>) -> Result<BuiltPlugin, PluginBuildError> {
    build(dir, out, Haste::No)
}

/// The same in less time, for a plugin under work: it may be slower and larger, and other bytes each
/// time.
///
/// # Errors
///
/// As [`build_plugin`].
pub fn build_plugin_in_haste(dir: &Path, out: &Path) -> Result<BuiltPlugin, PluginBuildError> {
    build(dir, Some(out), Haste::Yes)
}

/// Whether the build's own time counts more than what it makes.
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

/// Mode of a component that is written, but for what the umask takes away.
const COMPONENT_MODE: u32 = 0o666;

/// Runs a tool in `dir`, its output going to standard error; `remedy` says how to get it.
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

/// Writes next to `out` and renames, so that a reader never sees half a component.
fn write_whole(out: &Path, bytes: &[u8]) -> Result<(), PluginBuildError> {
    let failed = file_error("write", out);
    let folder = match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // With a name that nobody can foresee and put a link under. Others may read a component.
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
