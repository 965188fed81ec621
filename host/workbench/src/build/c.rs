//! Builds a C plugin with `zig cc`, then makes a component for our world.
//!
//! `zig cc` is clang with a C library for WebAssembly in one package. It is found, never downloaded: `ZIG`
//! names it, or `zig` is on PATH, or Python has the package `ziglang`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, io};

use super::world::componentize_for_world;
use super::{PluginBuildError, compile, file_error, tool};

/// Advice on how to install the compiler.
const REMEDY: &str = "install Zig with `pip install ziglang==0.17.1` (or from ziglang.org), or set \
                      ZIG to it";

/// Flags for an optimised library module (a reactor) with 128-bit SIMD, which the host's engine supports.
/// Unused sections are dropped. `zig cc` takes `--strip-debug` as a request to strip everything: debug
/// information and function names are removed, so a trap's backtrace has no function names.
const FLAGS: [&str; 10] = [
    "--target=wasm32-wasi",
    "-mexec-model=reactor",
    "-O2",
    "-msimd128",
    "-Wall",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wl,--no-entry",
    "-Wl,--gc-sections",
    "-Wl,--strip-debug",
];

/// Compiles all `.c` files in `dir` and `dir/src`, with `dir` and `dir/sdk` as header folders, and returns the
/// component.
///
/// # Errors
/// The compiler is missing, or the sources do not compile to a plugin.
pub(super) fn build(dir: &Path) -> Result<Vec<u8>, PluginBuildError> {
    let sources = sources(dir)?;
    let scratch = tempfile::tempdir().map_err(file_error("make a folder in", &env::temp_dir()))?;
    let module = scratch.path().join("plugin.wasm");
    let mut command = compiler()?;
    command.args(FLAGS).args(["-I", ".", "-I", "sdk", "-o"]).arg(&module).args(&sources);
    compile(dir, &mut command, REMEDY)?;
    let core = fs::read(&module).map_err(file_error("read", &module))?;
    componentize_for_world(&core).map_err(|cause| PluginBuildError::Componentize { module, cause })
}

/// Returns the sources relative to `dir`, so that the compiler's input does not depend on the location of the
/// plugin.
fn sources(dir: &Path) -> Result<Vec<PathBuf>, PluginBuildError> {
    let mut sources = Vec::new();
    for folder in ["", "src"] {
        let files = fs::read_dir(dir.join(folder)).into_iter().flatten().flatten();
        let names = files.map(|file| Path::new(folder).join(file.file_name()));
        sources.extend(names.filter(|name| name.extension().is_some_and(|end| end == "c")));
    }
    sources.sort();
    match sources.is_empty() {
        true => Err(PluginBuildError::NoSources {
            dir: dir.to_owned(),
            expected: "*.c files, there or in src",
        }),
        false => Ok(sources),
    }
}

/// Returns the compiler that `ZIG` names, otherwise the one on PATH, otherwise the one in Python's packages.
fn compiler() -> Result<Command, PluginBuildError> {
    // `python-zig` is the program that the Python package installs.
    let named = env::var_os("ZIG");
    let zig = named.or_else(|| {
        ["zig", "python-zig"].into_iter().find(|name| tool::is_on_path(name)).map(OsString::from)
    });
    let mut command = match zig {
        Some(zig) => tool::command(zig),
        None => {
            let mut python = tool::command("python3");
            // Python before 3.11 ignores PYTHONSAFEPATH and would import modules from the current folder, which
            // may belong to anybody.
            python.args(["-c", "import ziglang"]).current_dir("/");
            let has_zig = python.stderr(Stdio::null()).status();
            if !has_zig.is_ok_and(|status| status.success()) {
                let cause = io::Error::other("not found on PATH or among Python's packages");
                return Err(PluginBuildError::Tool { tool: "zig".into(), cause, remedy: REMEDY });
            }
            let mut command = tool::command("python3");
            command.args(["-m", "ziglang"]);
            command
        }
    };
    command.arg("cc");
    Ok(command)
}
