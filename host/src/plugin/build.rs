//! Builds a Rust plugin crate: cargo, then [`componentize`].
//!
//! Compilers are found, never fetched: the target for WebAssembly must be installed, or
//! `RUSTC` must name a compiler that has it.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::{env, fs};

use serde::Deserialize;

use super::componentize::{ComponentizeError, componentize};

/// The target that plugins are compiled for: WebAssembly without a system interface.
const TARGET: &str = "wasm32-unknown-unknown";

/// A plugin that was built.
#[derive(Debug)]
pub struct BuiltPlugin {
    /// Where the component is.
    pub component: PathBuf,
    /// The component's size in bytes.
    pub component_bytes: u64,
}

/// Why a plugin crate was not built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// There is no crate.
    #[error("{dir} holds no Cargo.toml: name the folder of a plugin crate")]
    NoCrate {
        /// The folder.
        dir: PathBuf,
    },
    /// A tool cannot be run.
    #[error("failed to run `{tool}`: {cause}; install Rust, or put it on PATH")]
    Tool {
        /// The command.
        tool: String,
        /// What the system said.
        cause: io::Error,
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
    /// The crate does not compile; cargo has said why on standard error.
    #[error("failed to compile the plugin in {dir}: cargo ended with {status}")]
    Compile {
        /// The crate's folder.
        dir: PathBuf,
        /// How cargo ended.
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

/// Compiles the plugin crate in `dir` in release mode and writes its component to `out`,
/// whose folder is made if needed. Honours `RUSTC` and `CARGO`; cargo reports on standard
/// error.
///
/// Paths of this machine are kept out of the component, so that the same sources and the
/// same compiler yield the same bytes anywhere.
///
/// # Errors
///
/// If a tool or the target is missing, or the crate does not compile to a plugin. `out` is
/// then as it was.
pub fn build_rust_plugin(dir: &Path, out: &Path) -> Result<BuiltPlugin, BuildError> {
    let manifest = dir.join("Cargo.toml");
    let manifest =
        manifest.canonicalize().map_err(|_| BuildError::NoCrate { dir: dir.to_owned() })?;
    let compiler = Compiler::find(dir)?;
    let module = compile(dir, &manifest, &compiler)?;
    let core = fs::read(&module).map_err(file_error("read", &module))?;
    let component = componentize(&core)
        .map_err(|cause| BuildError::Componentize { module: module.clone(), cause })?;
    write_whole(out, &component)?;
    Ok(BuiltPlugin { component: out.to_owned(), component_bytes: component.len() as u64 })
}

/// A compiler that has the target.
struct Compiler {
    sysroot: PathBuf,
}

impl Compiler {
    fn find(dir: &Path) -> Result<Self, BuildError> {
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let sysroot = PathBuf::from(ask(&rustc, dir, &["--print", "sysroot"])?);
        let library = ask(&rustc, dir, &["--print", "target-libdir", "--target", TARGET])?;
        let library = PathBuf::from(library);
        let has_core = fs::read_dir(&library).is_ok_and(|mut files| {
            files.any(|file| {
                file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
            })
        });
        if has_core {
            return Ok(Self { sysroot });
        }
        let rustc = rustc.to_string_lossy().into_owned();
        Err(BuildError::TargetMissing { rustc, looked_in: library })
    }
}

/// Runs a command that answers with one line. In `dir`, where rustup reads its override.
fn ask(tool: &OsString, dir: &Path, arguments: &[&str]) -> Result<String, BuildError> {
    let failed = |cause| BuildError::Tool { tool: tool.to_string_lossy().into_owned(), cause };
    let output = Command::new(tool).args(arguments).current_dir(dir).output().map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(io::Error::other(said)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Compiles the crate and finds its module.
fn compile(dir: &Path, manifest: &Path, compiler: &Compiler) -> Result<PathBuf, BuildError> {
    // First, because the folders that are kept out of the component exist only then.
    run_cargo(dir, manifest, &["fetch", "--target", TARGET])?;
    let compiler_flags = compiler_flags(compiler);
    let messages = run_cargo(
        dir,
        manifest,
        &[
            "build",
            "--release",
            "--target",
            TARGET,
            "--message-format",
            "json-render-diagnostics",
            "--config",
            &compiler_flags,
        ],
    )?;
    messages
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Message>(line).ok())
        .filter(|message| message.manifest_path.as_deref() == Some(manifest))
        .flat_map(|message| message.filenames)
        .find(|file| file.extension().is_some_and(|extension| extension == "wasm"))
        .ok_or_else(|| BuildError::NoModule { dir: dir.to_owned() })
}

/// Runs cargo on the crate and returns what it prints.
fn run_cargo(dir: &Path, manifest: &Path, arguments: &[&str]) -> Result<Vec<u8>, BuildError> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .args(arguments)
        .arg("--manifest-path")
        .arg(manifest)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|cause| BuildError::Tool { tool: cargo.to_string_lossy().into_owned(), cause })?;
    if !output.status.success() {
        return Err(BuildError::Compile { dir: dir.to_owned(), status: output.status });
    }
    Ok(output.stdout)
}

/// The part of cargo's messages that tells where an artifact is. Cargo adds fields at
/// will, so unknown ones are accepted.
#[derive(Deserialize)]
struct Message {
    manifest_path: Option<PathBuf>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

/// A cargo setting that lets loops work on 16 bytes a turn, as the host's engine can, and that
/// replaces the folders of this machine in panic messages. It is added to the flags that
/// cargo's configuration holds, but gives way to `RUSTFLAGS`.
fn compiler_flags(compiler: &Compiler) -> String {
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or(home).unwrap_or_default();
    // One folder per registry, named after its address: `/crates` wherever they come from.
    let registries = fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten();
    let mut registries: Vec<_> = registries.flatten().map(|folder| folder.path()).collect();
    registries.sort();
    let mut remaps = vec![(compiler.sysroot.clone(), "/rust"), (cargo_home, "/cargo")];
    remaps.extend(registries.into_iter().map(|folder| (folder, "/crates"))); // the last one wins
    let remaps =
        remaps.into_iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    let flags: Vec<String> = std::iter::once("-Ctarget-feature=+simd128".to_owned())
        .chain(remaps)
        .filter_map(|flag| serde_json::to_string(&flag).ok()) // quoted as TOML quotes a basic string
        .collect();
    format!("target.{TARGET}.rustflags=[{}]", flags.join(","))
}

/// Writes next to `out` and renames, so that a reader never sees half a component.
fn write_whole(out: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let failed = file_error("write", out);
    let folder = match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut partial = out.file_name().unwrap_or_default().to_owned();
    partial.push(".partial");
    let partial = folder.join(partial);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&partial, bytes))
        .and_then(|()| fs::rename(&partial, out))
        .map_err(failed)
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |cause| BuildError::File { action, path, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_crate_is_refused() {
        let empty = tempfile::tempdir().unwrap();
        let error = build_rust_plugin(empty.path(), &empty.path().join("out.wasm")).unwrap_err();
        assert!(matches!(error, BuildError::NoCrate { .. }), "{error}");
    }

    #[test]
    fn a_component_is_written_whole() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("deep/out.wasm");
        write_whole(&out, b"component").unwrap();
        assert_eq!(fs::read(&out).unwrap(), b"component");
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);
    }
}
