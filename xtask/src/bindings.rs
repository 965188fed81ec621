//! `cargo xtask bindings`: writes the Rust that wit-bindgen makes of `wit/0.1.0` into the plugins' library.
//!
//! It is committed, so that whoever builds a plugin compiles two thousand lines, and not wit-bindgen's macro
//! with its parsers, which take three times as long as all else that a plugin needs. `cargo xtask test` asks
//! whether it is what the present WIT and version of wit-bindgen gave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::process::{cargo, project_root, run};

/// The version whose runtime `plugins/sdk/Cargo.toml` names: what it generates calls that runtime's inner parts.
const WIT_BINDGEN: &str = "0.61.1";
/// Capabilities that a plugin does not use are not imported by its component.
const WORLD: &str = "plugin-with-capabilities";
/// Generated code is not held to our lints.
const ALLOWED: &str = "#![allow(clippy::all, clippy::restriction, reason = \"generated\")]";
const WIT: &str = "wit/0.1.0";
const BINDINGS: &str = "plugins/sdk/src/bindings.rs";

/// Generate the types and the export glue of plugins in Rust from wit/.
#[derive(clap::Args)]
pub struct Bindings {}

impl Bindings {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let generated = generate(&root, &root.join("target/bindings"))?;
        let file = root.join(BINDINGS);
        fs::write(&file, format!("{}\n{ALLOWED}\n\n{generated}", head(&root)?))?;
        run(Command::new("rustfmt")
            .args(["--edition", "2024", "--config-path"])
            .arg(root.join("rustfmt.toml"))
            .arg(&file))?;
        eprintln!("{BINDINGS}; now `cargo xtask plugins`");
        Ok(())
    }
}

/// Expands the macro in a crate of its own, and reads what it leaves there when it is told to be debugged.
fn generate(root: &Path, folder: &Path) -> Result<String> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder.join("src"))?;
    fs::write(
        folder.join("Cargo.toml"),
        format!(
            "[package]\nname = \"bindings\"\nedition = \"2024\"\n[dependencies]\n\
             wit-bindgen = {{ version = \"={WIT_BINDGEN}\", default-features = false, \
             features = [\"macros\", \"realloc\"] }}\n[workspace]\n"
        ),
    )?;
    let wit = root.join(WIT);
    fs::write(
        folder.join("src/lib.rs"),
        format!(
            "wit_bindgen::generate!({{ path: {wit:?}, world: \"{WORLD}\", debug: true, \
             pub_export_macro: true, export_macro_name: \"__export_plugin\", \
             default_bindings_module: \"shardmill_sdk::bindings\" }});\n"
        ),
    )?;
    let target = folder.join("target");
    run(cargo().arg("check").current_dir(folder).env("CARGO_TARGET_DIR", &target))?;
    let name = format!("{WORLD}0.rs");
    let builds = fs::read_dir(target.join("debug/build"))?.flatten();
    let mut outputs = builds.map(|build| build.path().join("out").join(&name));
    let output: PathBuf = outputs
        .find(|file| file.exists())
        .with_context(|| format!("wit-bindgen wrote no {name}"))?;
    let text = fs::read_to_string(output)?;
    ensure!(!text.contains(&*root.to_string_lossy()), "it names a folder of this machine");
    Ok(text)
}

/// The first lines: what the rest was made from.
fn head(root: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    for file in ["plugin.wit", "capabilities.wit"] {
        let path = root.join(WIT).join(file);
        let text = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        hasher.update(text);
    }
    let hash = hex::encode(hasher.finalize());
    Ok(format!(
        "//! The types and the export glue that wit-bindgen {WIT_BINDGEN} generates from `{WIT}` of SHA-256\n\
         //! {hash}.\n//! Do not edit: `cargo xtask bindings` writes it."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bindings_are_of_the_present_wit_and_wit_bindgen() {
        let root = project_root();
        let found = fs::read_to_string(root.join(BINDINGS)).unwrap();
        let expected = head(&root).unwrap();
        assert!(found.starts_with(&expected), "run `cargo xtask bindings` and commit:\n{expected}");
        let sdk = fs::read_to_string(root.join("plugins/sdk/Cargo.toml")).unwrap();
        assert!(sdk.contains(&format!("version = \"={WIT_BINDGEN}\"")), "{sdk}");
    }
}
