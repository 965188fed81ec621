//! `cargo xtask book`: the plugin book of `docs/`, as HTML in `target/book`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, project_root, run};

/// The version that the book was written with.
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

/// Builds the book. A file that is to be included and is not there is an error.
pub fn build(root: &Path) -> Result<()> {
    let mdbook = mdbook(root)?;
    let output = Command::new(&mdbook)
        .arg("build")
        .current_dir(root.join("docs"))
        .output()
        .with_context(|| format!("failed to start {}", mdbook.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // mdBook goes on over most of what it complains about.
    if !output.status.success() || said.contains("ERROR") || said.contains("WARN") {
        bail!("the book in docs/ does not build:\n{}", said.trim_end());
    }
    Ok(())
}

/// The program, compiled once: it lies on crates.io alone.
pub fn mdbook(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/mdbook").join(MDBOOK);
    let program = folder.join("bin").join(format!("mdbook{}", std::env::consts::EXE_SUFFIX));
    if !program.exists() {
        eprintln!("compiling mdbook {MDBOOK} into {}, once", folder.display());
        // Quickly compiled, rather than quick: it runs for a second.
        run(cargo()
            .args(["--config", "profile.dev.debug=false"])
            .args(["install", "mdbook", "--version", MDBOOK])
            .args(["--no-default-features", "--locked", "--debug", "--quiet", "--root"])
            .arg(&folder))?;
    }
    Ok(program)
}
