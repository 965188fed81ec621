//! Compilers for the languages of plugins, for the tests.
//!
//! They are installed once into `target/languages`, from the lock files of `xtask/tools`: Zig (for C), Go and
//! componentize-py by pip; componentize-qjs (for JavaScript) by npm. [`WasmToolchain`] finds Rust's compiler
//! for WebAssembly.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::run;
use crate::tools;
use crate::wasm_toolchain::WasmToolchain;

/// Program of the npm package.
const NPM_PROGRAM: &str = "node_modules/.bin/componentize-qjs";
/// Variable with the folders that tests put in front of PATH, only for `shardmill plugin build`.
const TOOLS: &str = "SHARDMILL_TEST_TOOLS";
/// Variable with the compiler that tests set as RUSTC, only for `shardmill plugin build`. RUSTC itself would
/// apply to the host, too.
const WASM_RUSTC: &str = "SHARDMILL_TEST_WASM_RUSTC";

/// The installed compilers.
pub struct Languages {
    /// Folders of programs.
    folders: Vec<PathBuf>,
    wasm_toolchain: WasmToolchain,
}

impl Languages {
    /// Installs what is missing.
    pub fn install(root: &Path) -> Result<Self> {
        let wasm_toolchain = WasmToolchain::find(root)?;
        let folder = root.join("target/languages");
        let python = python_environment(&folder)?;
        let programs = npm_programs(&folder.join("js"))?;
        Ok(Self { folders: vec![python.join("bin"), programs], wasm_toolchain })
    }

    /// Makes a command find the compilers.
    pub fn put_on_path(&self, command: &mut Command) -> Result<()> {
        let known = std::env::var_os("PATH").unwrap_or_default();
        let path = self.folders.iter().cloned().chain(std::env::split_paths(&known));
        command.env(
            "PATH",
            std::env::join_paths(path).context("the name of a folder contains a colon")?,
        );
        self.wasm_toolchain.apply_to(command);
        Ok(())
    }

    /// Sets the variables through which the tests of a command find the compilers.
    pub fn apply_to(&self, command: &mut Command) -> Result<()> {
        let folders =
            std::env::join_paths(&self.folders).context("the name of a folder contains a colon")?;
        command.env(TOOLS, folders);
        if let Some(rustc) = self.wasm_toolchain.rustc() {
            command.env(WASM_RUSTC, rustc);
        }
        Ok(())
    }
}

/// Makes a Python environment with the packages, once.
fn python_environment(folder: &Path) -> Result<PathBuf> {
    let lock = tools::lock("languages/requirements.txt");
    tools::installed_once(folder, &lock, || {
        run(Command::new("python3").args(["-m", "venv"]).arg(folder)).context(
            "failed to make a Python environment for the tests: install python3 with venv",
        )?;
        run(&mut tools::pip_install(&folder.join("bin/python"), &lock))
    })?;
    Ok(folder.to_owned())
}

/// Installs the npm package once, and returns the folder of its program.
fn npm_programs(folder: &Path) -> Result<PathBuf> {
    tools::npm_install(folder, "componentize-qjs")
        .context("failed to install componentize-qjs for the tests: install nodejs and npm")?;
    let program = folder.join(NPM_PROGRAM);
    Ok(program.parent().unwrap_or(folder).to_owned())
}
