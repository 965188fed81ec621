//! Builds a JavaScript plugin: componentize-qjs, which puts the QuickJS engine and the loaded modules
//! into one component.
//!
//! The tool is found, never fetched: `SHARDMILL_COMPONENTIZE_QJS` names it, or npm has installed it in
//! the plugin's folder or one above up to the repository's, or it is on PATH.

use std::path::Path;

use super::staging::{Staging, WORLD, require_file};
use super::tool::find_tool;
use super::{PluginBuildError, compile};
use crate::assets::JS_LIBRARY;
use crate::manifest::PluginManifest;

/// How to get the tool.
const REMEDY: &str = "install it with `npm install componentize-qjs@0.4.5` in the plugin's folder, or \
                      set SHARDMILL_COMPONENTIZE_QJS to it";
/// The plugin's main file. It imports others of its folder, and ES modules of its `node_modules`.
const MAIN: &str = "plugin.js";

/// Builds the plugin in `dir` and gives its component. It imports the capabilities that the manifest
/// lists, and nothing else. The library is the host's own, unless `node_modules` has one.
///
/// # Errors
/// If the tool is missing, or a module does not load.
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
    // Without the asynchronous calling convention, which the host does not use; WASI as traps.
    command.args(["--sync", "--stub-wasi"]).arg("-o").arg(staging.path().join("plugin.wasm"));
    compile(dir, &mut command, REMEDY)?;
    staging.read("plugin.wasm")
}
