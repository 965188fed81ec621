//! Builds a Python plugin with componentize-py, which combines CPython and the loaded modules in one component.
//!
//! The tool is found, never downloaded: `SHARDMILL_COMPONENTIZE_PY` names it, or a `.venv` in the plugin's
//! folder or in one of its parents up to the root of the repository has it, or it is on PATH.

use std::path::Path;

use super::staging::{Staging, WORLD, require_file};
use super::tool::find_tool;
use super::{PluginBuildError, compile};
use crate::assets::PYTHON_LIBRARY;
use crate::manifest::PluginManifest;

/// Advice on how to install the tool.
const REMEDY: &str = "install it with `pip install componentize-py==0.25.1`, or set \
                      SHARDMILL_COMPONENTIZE_PY to it";
/// Main file of the plugin. It may import other files of its folder, and pure Python packages of its `.venv`.
const MAIN: &str = "plugin.py";

/// Module that the tool loads. It forwards the calls of the interface to the decorated plugin.
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

/// Builds the plugin in `dir` and returns its component. The component imports exactly the capabilities in the
/// manifest. The library is the host's own, unless the folder has one.
///
/// # Errors
/// The tool is missing, or a module does not load.
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
    // Without this, the tool would find packages that happen to be installed on this machine.
    staging.write("none/lib/site-packages/none.txt", "")?;
    let packages = dir.join(".venv").canonicalize();
    command.env("VIRTUAL_ENV", packages.unwrap_or_else(|_| staging.path().join("none")));
    compile(dir, &mut command, REMEDY)?;
    staging.read("plugin.wasm")
}
