//! The compilers of the languages that plugins are written in, for the tests.
//!
//! Installed once into `target/languages`, by the lock files of `xtask/tools`: by pip Zig for C, Go, and
//! componentize-py; by npm componentize-qjs for JavaScript. Rust's compiler for WebAssembly is found by
//! [`WasmToolchain`].

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::run;
use crate::tools;
use crate::wasm_toolchain::WasmToolchain;

/// The program that the npm package brings.
const NPM_PROGRAM: &str = "node_modules/.bin/componentize-qjs";
/// What the tests put in front of PATH for `shardmill plugin build`, and for nothing else.
const TOOLS: &str = "SHARDMILL_TEST_TOOLS";
/// What the tests set RUSTC to for `shardmill plugin build`. Not RUSTC itself, which would compile the
/// host by it.
const WASM_RUSTC: &str = "SHARDMILL_TEST_WASM_RUSTC";

/// Compilers that are installed.
pub struct Languages {
    /// Folders with programs.
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
        command.env("PATH", std::env::join_paths(path).context("a folder's name holds a colon")?);
        self.wasm_toolchain.apply_to(command);
        Ok(())
    }

    /// Tells the tests of a command where the compilers are.
    pub fn apply_to(&self, command: &mut Command) -> Result<()> {
        let folders =
            std::env::join_paths(&self.folders).context("a folder's name holds a colon")?;
        command.env(TOOLS, folders);
        if let Some(rustc) = self.wasm_toolchain.rustc() {
            command.env(WASM_RUSTC, rustc);
        }
        Ok(())
    }
}

/// A Python environment with the packages, made once.
fn python_environment(folder: &Path) -> Result<PathBuf> {
    let lock = tools::lock("languages/requirements.txt");
    tools::installed_once(folder, &lock, || {
        run(Command::new("python3").args(["-m", "venv"]).arg(folder))
            .context("the tests of plugins' languages need python3 with venv")?;
        run(&mut tools::pip_install(&folder.join("bin/python"), &lock))
    })?;
    Ok(folder.to_owned())
}

/// A folder with the program of the npm package, installed once.
fn npm_programs(folder: &Path) -> Result<PathBuf> {
    tools::npm_install(folder, "componentize-qjs")
        .context("the tests of plugins' languages need npm: install nodejs and npm")?;
    let program = folder.join(NPM_PROGRAM);
    Ok(program.parent().unwrap_or(folder).to_owned())
}
