//! Staging for JavaScript and Python builds. Their tools execute everything that they find, and write files
//! beside it. Therefore a plugin is copied into a folder of the build's own, with its library and its world.

use std::collections::BTreeSet;
use std::path::Path;
use std::{env, fs, io};

use tempfile::TempDir;

use super::{PluginBuildError, file_error};
use crate::assets::WIT;
use shardmill_config::{Capability, WIT_VERSION};

/// World that a staged plugin is built for.
pub(super) const WORLD: &str = "staged";
/// Folders without sources of a plugin, in addition to hidden folders.
const NOT_STAGED: [&str; 4] = ["state", "target", "tests", "__pycache__"];
/// Packages of the build tools, which are large and not needed in the component.
const TOOLS: [&str; 4] = ["componentize-qjs", "@andreiltd", "@bytecodealliance", "componentize_py"];

/// A copy of a plugin in a temporary folder, removed when dropped.
pub(super) struct Staging {
    folder: TempDir,
}

impl Staging {
    /// Copies the sources in `dir` to the folder `plugin`, and writes the world with the capabilities to `wit`.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn new(dir: &Path, capabilities: &BTreeSet<Capability>) -> Result<Self, PluginBuildError> {
        let folder =
            tempfile::tempdir().map_err(file_error("make a folder in", &env::temp_dir()))?;
        let staging = Self { folder };
        copy(dir, &staging.path().join("plugin"))?;
        staging.write("wit/world.wit", &world(capabilities))?;
        for (name, text) in WIT {
            staging.write(&format!("wit/deps/shardmill/{name}"), text)?;
        }
        Ok(staging)
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file and creates its folder.
    pub fn write(&self, name: &str, text: &str) -> Result<(), PluginBuildError> {
        let path = self.path().join(name);
        let folder = path.parent().unwrap_or(self.path());
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, text))
            .map_err(file_error("write", &path))
    }

    /// Reads the output of the tool.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, PluginBuildError> {
        let path = self.path().join(name);
        fs::read(&path).map_err(file_error("read", &path))
    }
}

/// Returns the text of the world. Components of these languages import their whole world, so it has only the
/// listed capabilities.
fn world(capabilities: &BTreeSet<Capability>) -> String {
    let imports: String =
        capabilities.iter().map(|one| format!("    import {};\n", one.interface())).collect();
    format!(
        "package shardmill:build;\n\nworld {WORLD} {{\n    include \
         shardmill:plugin/plugin@{WIT_VERSION};\n{imports}}}\n"
    )
}

fn copy(from: &Path, to: &Path) -> Result<(), PluginBuildError> {
    fs::create_dir_all(to).map_err(file_error("write", to))?;
    for entry in fs::read_dir(from).map_err(file_error("read", from))? {
        let entry = entry.map_err(file_error("read", from))?;
        let (name, path) = (entry.file_name(), entry.path());
        let kind = entry.file_type().map_err(file_error("read", &path))?;
        let text = name.to_string_lossy();
        if text.starts_with('.') || text.ends_with(".wasm") || TOOLS.contains(&&*text) {
            continue;
        }
        if kind.is_dir() {
            let is_venv = path.join("pyvenv.cfg").is_file();
            if !NOT_STAGED.contains(&&*text) && !is_venv {
                copy(&path, &to.join(&name))?;
            }
        } else if kind.is_file() {
            fs::copy(&path, to.join(&name)).map_err(file_error("read", &path))?;
        }
    }
    Ok(())
}

/// Checks that a plugin's main file exists, and otherwise fails like a build without sources.
pub(super) fn require_file(dir: &Path, name: &'static str) -> Result<(), PluginBuildError> {
    match fs::metadata(dir.join(name)) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(PluginBuildError::NoSources { dir: dir.to_owned(), expected: name })
        }
        Err(cause) => Err(file_error("read", &dir.join(name))(cause)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_world_imports_what_is_listed_and_no_more() {
        let empty = tempfile::tempdir().unwrap();
        for capabilities in [BTreeSet::new(), Capability::ALL.into(), [Capability::Log].into()] {
            let staging = Staging::new(empty.path(), &capabilities).unwrap();
            let mut resolve = wit_parser::Resolve::default();
            let (package, _) = resolve.push_dir(staging.path().join("wit")).unwrap();
            let world = &resolve.worlds[resolve.select_world(&[package], Some(WORLD)).unwrap()];
            let imports = world.imports.keys().map(|key| resolve.name_world_key(key));
            let expected: BTreeSet<String> =
                capabilities.iter().map(|one| one.interface()).collect();
            let types = format!("shardmill:plugin/types@{WIT_VERSION}");
            assert_eq!(imports.filter(|name| *name != types).collect::<BTreeSet<_>>(), expected);
        }
    }

    #[test]
    fn sources_are_staged_and_what_tools_leave_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["plugin.js", "lib/a.js", "node_modules/dep/index.js"];
        let others =
            ["x.wasm", ".venv/a.py", "env/pyvenv.cfg", "state/state.db", "__pycache__/a.pyc"];
        for file in files.iter().chain(&others) {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let staging = Staging::new(folder.path(), &BTreeSet::new()).unwrap();
        let is_staged = |file: &&str| staging.path().join("plugin").join(file).exists();
        assert!(files.iter().all(is_staged));
        assert!(!others.iter().any(is_staged));
    }
}
