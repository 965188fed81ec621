//! Builds a Python plugin: componentize-py, which puts CPython and the loaded modules into one component.
//!
//! The tool is found, never fetched: `SHARDMILL_COMPONENTIZE_PY` names it, or a `.venv` in the plugin's
//! folder or one above up to the repository's has it, or it is on PATH.

use std::path::Path;

use super::staging::{Staging, WORLD, require_file};
use super::tool::find_tool;
use super::{PluginBuildError, compile};
use crate::assets::PYTHON_LIBRARY;
use crate::manifest::PluginManifest;

/// How to get the tool.
const REMEDY: &str = "install it with `pip install componentize-py==0.25.1`, or set \
                      SHARDMILL_COMPONENTIZE_PY to it";
/// The plugin's main file. It imports others of its folder, and pure Python of its `.venv`.
const MAIN: &str = "plugin.py";

/// The module that the tool loads: it gives the interface's calls to the plugin that was decorated.
const ENTRY: &str = "\
import shardmill
shardmill._take_over()
import plugin

class Stage:
    _stage = shardmill._registered()

    def configure(self, context):
        return self._stage.configure(context)

    def process(self, batch):
        return self._stage.process(batch)
";

/// Builds the plugin in `dir` and gives its component. It imports the capabilities that the manifest
/// lists, and nothing else. The library is the host's own, unless the folder has one.
///
/// # Errors
/// If the tool is missing, or a module does not load.
pub(super) fn build(dir: &Path, manifest: &PluginManifest) -> Result<Vec<u8>, PluginBuildError> {
    require_file(dir, MAIN)?;
    let staging = Staging::new(dir, &manifest.capabilities)?;
    for (name, text) in PYTHON_LIBRARY {
        staging.write(&format!("library/{name}"), text)?;
    }
    staging.write("library/shardmill_entry.py", ENTRY)?;
    let mut command =
        find_tool("SHARDMILL_COMPONENTIZE_PY", dir, ".venv/bin/componentize-py", "componentize-py");
    command.args(["--quiet", "--world", WORLD, "--wit-path"]).arg(staging.path().join("wit"));
    command.args(["componentize", "--stub-wasi", "shardmill_entry"]);
    for folder in ["plugin", "library"] {
        command.arg("--python-path").arg(staging.path().join(folder));
    }
    command.arg("--output").arg(staging.path().join("plugin.wasm"));
    // Else packages that this machine happens to have would be found.
    staging.write("none/lib/site-packages/none.txt", "")?;
    let packages = dir.join(".venv").canonicalize();
    command.env("VIRTUAL_ENV", packages.unwrap_or_else(|_| staging.path().join("none")));
    compile(dir, &mut command, REMEDY)?;
    staging.read("plugin.wasm")
}
