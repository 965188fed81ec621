//! `cargo xtask deny`: licences, bans, sources and advisories of the dependencies.
//!
//! Not part of `cargo xtask test`: cargo-deny builds for minutes, and its advisory database may be
//! out of reach.

use anyhow::Result;

use crate::process::{cargo, is_installed, project_root, run};

/// Check the dependencies against deny.toml.
#[derive(clap::Args)]
pub struct Deny {
    /// Leave the advisories out, which need a database from the network.
    #[arg(long)]
    offline: bool,
}

impl Deny {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        if !is_installed("cargo-deny") {
            run(cargo().args(["install", "cargo-deny", "--locked"]))?;
        }
        let checks: &[&str] = match self.offline {
            true => &["bans", "licenses", "sources"],
            false => &["advisories", "bans", "licenses", "sources"],
        };
        for folder in [".", "plugins"] {
            let config = project_root().join("deny.toml");
            run(cargo()
                .current_dir(project_root().join(folder))
                .args(["deny", "check", "--config"])
                .arg(config)
                .args(checks))?;
        }
        Ok(())
    }
}
