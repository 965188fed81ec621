//! Builds a C plugin: `zig cc`, then the component of our world.
//!
//! `zig cc` is clang with a C library for WebAssembly in one package. It is found, never fetched:
//! `ZIG` names it, or `zig` is on PATH, or Python has the package `ziglang`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, io};

use super::world::componentize_for_world;
use super::{PluginBuildError, compile, file_error, tool};

/// How to get the compiler.
const REMEDY: &str = "install Zig with `pip install ziglang==0.17.1` (or from ziglang.org), or set \
                      ZIG to it";

/// A library's module (a reactor), optimised, with 16 bytes a turn as the host's engine can. What is
/// not used is left out; function names stay, so that a trap's backtrace names the function.
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

/// Compiles all `.c` files in `dir` and in its `src`, with `dir` and its `sdk` searched for headers,
/// and gives the component.
///
/// # Errors
/// If the compiler is missing, or the sources do not compile to a plugin.
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

/// The sources, relative to `dir`: what the compiler is told does not depend on where the plugin lies.
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
            expected: "*.c, there or in src",
        }),
        false => Ok(sources),
    }
}

/// The compiler that `ZIG` names, else the one on PATH, else the one in Python's packages.
fn compiler() -> Result<Command, PluginBuildError> {
    // `python-zig` is what the package calls its own program.
    let named = env::var_os("ZIG");
    let zig = named.or_else(|| {
        ["zig", "python-zig"].into_iter().find(|name| tool::is_on_path(name)).map(OsString::from)
    });
    let mut command = match zig {
        Some(zig) => tool::command(zig),
        None => {
            let mut python = tool::command("python3");
            // Python before 3.11 does not know PYTHONSAFEPATH, and would take a module of the folder that it
            // runs in, which may be anybody's.
            python.args(["-c", "import ziglang"]).current_dir("/");
            let has_zig = python.stderr(Stdio::null()).status();
            if !has_zig.is_ok_and(|status| status.success()) {
                let cause = io::Error::other("it is neither on PATH nor among Python's packages");
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
