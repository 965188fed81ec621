//! `cargo xtask book`: builds the plugin book of `docs/` as HTML in `target/book`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, project_root, run};

/// Version of mdBook that the book was written with.
const MDBOOK: &str = "0.5.4";

/// Build the plugin book into target/book.
#[derive(clap::Args)]
pub struct Book {}

impl Book {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        build(&root)?;
        eprintln!("{}", root.join("target/book/index.html").display());
        Ok(())
    }
}

/// Builds the book. A missing included file is an error.
pub fn build(root: &Path) -> Result<()> {
    let mdbook = mdbook(root)?;
    let output = Command::new(&mdbook)
        .arg("build")
        .current_dir(root.join("docs"))
        .output()
        .with_context(|| format!("failed to start {}", mdbook.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // mdBook exits successfully after most of its errors and warnings.
    if !output.status.success() || said.contains("ERROR") || said.contains("WARN") {
        bail!("the book in docs/ does not build:\n{}", said.trim_end());
    }
    Ok(())
}

/// Returns the mdBook program, compiled once: only crates.io has it.
pub fn mdbook(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/mdbook").join(MDBOOK);
    let program = folder.join("bin").join(format!("mdbook{}", std::env::consts::EXE_SUFFIX));
    if !program.exists() {
        eprintln!("compiling mdbook {MDBOOK} into {}, once", folder.display());
        // Compiled fast instead of optimised: it runs for only a second.
        run(cargo()
            .args(["--config", "profile.dev.debug=false"])
            .args(["install", "mdbook", "--version", MDBOOK])
            .args(["--no-default-features", "--locked", "--debug", "--quiet", "--root"])
            .arg(&folder))?;
    }
    Ok(program)
}
