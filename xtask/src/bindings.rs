//! `cargo xtask bindings`: writes the Rust code that wit-bindgen generates from `wit/0.1.0` into the plugin
//! SDK.
//!
//! The code is committed, so that a plugin build compiles two thousand lines instead of wit-bindgen's macro and
//! its parsers, which take three times as long as everything else that a plugin needs. `cargo xtask test`
//! checks that the code is from the current WIT and the current version of wit-bindgen.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::process::{cargo, project_root, run};

/// Version of wit-bindgen; `plugins/sdk/Cargo.toml` must have the same, because the generated code calls
/// internals of its runtime.
const WIT_BINDGEN: &str = "0.61.1";
/// World of the bindings. A component does not import the capabilities that its plugin does not use.
const WORLD: &str = "plugin-with-capabilities";
/// Generated code is exempt from our lints.
const ALLOWED: &str = "#![allow(clippy::all, clippy::restriction, reason = \"generated\")]";
const WIT: &str = "wit/0.1.0";
const BINDINGS: &str = "plugins/sdk/src/bindings.rs";

/// Generate the types and the export glue of Rust plugins from wit/.
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
        eprintln!("wrote {BINDINGS}; now run `cargo xtask plugins`");
        Ok(())
    }
}

/// Expands the macro in a temporary crate, and reads the expansion that its debug option writes there.
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
    ensure!(
        !text.contains(&*root.to_string_lossy()),
        "the generated code contains a folder of this machine"
    );
    Ok(text)
}

/// Returns the first lines, which name the origin of the rest.
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
