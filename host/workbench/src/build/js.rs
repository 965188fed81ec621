//! Builds a JavaScript plugin with componentize-qjs, which combines the QuickJS engine and the loaded modules
//! in one component.
//!
//! The tool is found, never downloaded: `SHARDMILL_COMPONENTIZE_QJS` names it, or npm has installed it in the
//! plugin's folder or in one of its parents up to the root of the repository, or it is on PATH.

use std::path::Path;

use super::staging::{Staging, WORLD, require_file};
use super::tool::find_tool;
use super::{PluginBuildError, compile};
use crate::assets::JS_LIBRARY;
use crate::manifest::PluginManifest;

/// Advice on how to install the tool.
const REMEDY: &str = "install it with `npm install componentize-qjs@0.4.5` in the plugin's folder, or \
                      set SHARDMILL_COMPONENTIZE_QJS to it";
/// Main file of the plugin. It may import other files of its folder, and ES modules of its `node_modules`.
const MAIN: &str = "plugin.js";

/// Builds the plugin in `dir` and returns its component. The component imports exactly the capabilities in the
/// manifest. The library is the host's own, unless `node_modules` has one.
///
/// # Errors
/// The tool is missing, or a module does not load.
pub(super) fn build(dir: &Path, manifest: &PluginManifest) -> Result<Vec<u8>, PluginBuildError> {
    require_file(dir, MAIN)?;
    let staging = Staging::new(dir, &manifest.capabilities)?;
    if !dir.join("node_modules/shardmill").exists() {
        for (name, text) in JS_LIBRARY {
            staging.write(&format!("plugin/node_modules/shardmill/{name}"), text)?;
        }
    }
    let mut command = find_tool(
        "SHARDMILL_COMPONENTIZE_QJS",
        dir,
        "node_modules/.bin/componentize-qjs",
        "componentize-qjs",
    );
    let plugin = staging.path().join("plugin");
    command.arg("--js").arg(plugin.join(MAIN)).arg("--module-root").arg(&plugin);
    command.arg("--wit").arg(staging.path().join("wit")).args(["--world", WORLD]);
    // The host does not use the asynchronous calling convention (`--sync`). Calls of WASI trap (`--stub-wasi`).
    command.args(["--sync", "--stub-wasi"]).arg("-o").arg(staging.path().join("plugin.wasm"));
    compile(dir, &mut command, REMEDY)?;
    staging.read("plugin.wasm")
}
