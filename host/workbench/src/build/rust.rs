//! Builds a Rust plugin crate with cargo, then converts it ([`componentize`]).
//!
//! Compilers are found, never downloaded: the WebAssembly target must be installed, or `RUSTC` must name a
//! compiler that has it.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::{env, fs};

use serde::Deserialize;

use super::componentize::componentize;
use super::{Haste, PluginBuildError, file_error, tool};

/// Advice on how to install cargo and rustc.
const REMEDY: &str = "install Rust from rustup.rs, or put it on PATH";

/// Settings for reproducible builds. Incremental compilation would give other bytes for the same sources.
const REPRODUCIBLE: [(&str, &str); 1] = [("CARGO_INCREMENTAL", "0")];
/// Settings for fast builds: incremental, in a target folder of their own, with little optimisation.
const HASTY: [(&str, &str); 5] = [
    ("CARGO_INCREMENTAL", "1"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
    ("CARGO_BUILD_TARGET_DIR", "target/dev"),
];

/// Settings files that cargo and rustup look for in all parent folders of a crate.
const SETTINGS: [&str; 5] =
    [".cargo/config.toml", ".cargo/config", "rust-toolchain.toml", "rust-toolchain", "Cargo.toml"];

/// Target that plugins are compiled for: WebAssembly without a system interface.
pub(super) const TARGET: &str = "wasm32-unknown-unknown";

/// Compiles the plugin crate in `dir` in release mode and returns its component. Uses `RUSTC` and `CARGO` if
/// they are set; cargo prints to standard error.
///
/// Paths of this machine are kept out of the component, so that the same sources and the same compiler give the
/// same bytes anywhere.
///
/// # Errors
///
/// A tool or the target is missing, or the crate does not compile to a plugin.
pub(super) fn build(dir: &Path, haste: Haste) -> Result<Vec<u8>, PluginBuildError> {
    let manifest = dir.join("Cargo.toml");
    let manifest =
        manifest.canonicalize().map_err(|_| PluginBuildError::NoCrate { dir: dir.to_owned() })?;
    tool::refuse_foreign_settings(dir, &SETTINGS)?;
    let compiler = Compiler::find(dir)?;
    let module = compile(dir, &manifest, &compiler, haste)?;
    let core = fs::read(&module).map_err(file_error("read", &module))?;
    componentize(&core).map_err(|cause| PluginBuildError::Componentize { module, cause })
}

/// A compiler that has the target.
struct Compiler {
    sysroot: PathBuf,
}

impl Compiler {
    fn find(dir: &Path) -> Result<Self, PluginBuildError> {
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
        Err(PluginBuildError::TargetMissing { rustc, looked_in: library })
    }
}

/// Runs a command that answers with one line. It runs in `dir`, where rustup reads its toolchain override.
fn ask(program: &OsString, dir: &Path, arguments: &[&str]) -> Result<String, PluginBuildError> {
    let failed = |cause| PluginBuildError::Tool {
        tool: program.to_string_lossy().into_owned(),
        cause,
        remedy: REMEDY,
    };
    let output =
        tool::command(program).args(arguments).current_dir(dir).output().map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(io::Error::other(said)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Compiles the crate and finds its module.
fn compile(
    dir: &Path,
    manifest: &Path,
    compiler: &Compiler,
    haste: Haste,
) -> Result<PathBuf, PluginBuildError> {
    // First, because it creates the registry folders whose paths are kept out of the component.
    if haste == Haste::No || !dir.join("Cargo.lock").exists() {
        run_cargo(dir, manifest, &["fetch", "--target", TARGET], &REPRODUCIBLE)?;
    }
    let settings: &[(&str, &str)] = match haste {
        Haste::No => &REPRODUCIBLE,
        Haste::Yes => &HASTY,
    };
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
        settings,
    )?;
    messages
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Message>(line).ok())
        .filter(|message| message.manifest_path.as_deref() == Some(manifest))
        .flat_map(|message| message.filenames)
        .find(|file| file.extension().is_some_and(|extension| extension == "wasm"))
        .ok_or_else(|| PluginBuildError::NoModule { dir: dir.to_owned() })
}

/// Runs cargo on the crate and returns its standard output.
fn run_cargo(
    dir: &Path,
    manifest: &Path,
    arguments: &[&str],
    settings: &[(&str, &str)],
) -> Result<Vec<u8>, PluginBuildError> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let program = cargo.to_string_lossy().into_owned();
    let output = tool::command(&cargo)
        .args(arguments)
        .arg("--manifest-path")
        .arg(manifest)
        .current_dir(dir)
        .envs(settings.iter().copied())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|cause| PluginBuildError::Tool { tool: program.clone(), cause, remedy: REMEDY })?;
    if !output.status.success() {
        return Err(PluginBuildError::Compile {
            dir: dir.to_owned(),
            tool: program,
            status: output.status,
        });
    }
    Ok(output.stdout)
}

/// The part of cargo's messages that names the artifacts. Cargo may add fields, so unknown ones are accepted.
#[derive(Deserialize)]
struct Message {
    manifest_path: Option<PathBuf>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

/// Returns a cargo setting that enables 128-bit SIMD, which the host's engine supports, and replaces this
/// machine's folders in panic messages. It adds to the flags of cargo's configuration, but `RUSTFLAGS`
/// overrides it.
fn compiler_flags(compiler: &Compiler) -> String {
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or(home).unwrap_or_default();
    // One folder per registry, named after its address; all become `/crates`.
    let registries = fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten();
    let mut registries: Vec<_> = registries.flatten().map(|folder| folder.path()).collect();
    registries.sort();
    let mut remaps = vec![(compiler.sysroot.clone(), "/rust"), (cargo_home, "/cargo")];
    remaps.extend(registries.into_iter().map(|folder| (folder, "/crates"))); // the last one wins
    let remaps =
        remaps.into_iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    let flags: Vec<String> = std::iter::once("-Ctarget-feature=+simd128".to_owned())
        .chain(remaps)
        .filter_map(|flag| serde_json::to_string(&flag).ok()) // JSON quotes strings like TOML basic strings
        .collect();
    format!("target.{TARGET}.rustflags=[{}]", flags.join(","))
}
