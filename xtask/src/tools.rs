//! Packages of pip and npm for the tests. Lock files in `xtask/tools` pin them by hash.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::process::{project_root, run};

/// File in a folder with a copy of the lock file that the folder was installed from.
const INSTALLED: &str = "installed.txt";

/// Returns the path of a lock file or folder below `xtask/tools`.
pub fn lock(path: &str) -> PathBuf {
    project_root().join("xtask/tools").join(path)
}

/// Runs `install` unless the folder was installed from this lock file before.
pub fn installed_once(
    folder: &Path,
    lock: &Path,
    install: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let wanted =
        fs::read_to_string(lock).with_context(|| format!("failed to read {}", lock.display()))?;
    let installed = folder.join(INSTALLED);
    if fs::read_to_string(&installed).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    eprintln!("installing {} into {}, once", lock.display(), folder.display());
    install()?;
    fs::write(installed, wanted)?;
    Ok(())
}

/// Returns pip, run by a Python, to install the packages of a lock file and no others. A file with another hash
/// is refused. Wheels only: a source distribution would run its build script.
pub fn pip_install(python: &Path, lock: &Path) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(["--require-hashes", "--no-deps", "--only-binary", ":all:", "--requirement"])
        .arg(lock)
        .env("PIP_ROOT_USER_ACTION", "ignore");
    pip
}

/// Installs the packages of a lock file into a folder of their own, once. Files from an older lock file are
/// removed first, because pip does not replace anything in such a folder.
pub fn pip_install_into(folder: &Path, lock: &Path) -> Result<()> {
    installed_once(folder, lock, || {
        if folder.exists() {
            fs::remove_dir_all(folder)
                .with_context(|| format!("failed to remove {}", folder.display()))?;
        }
        let mut pip = pip_install(Path::new("python3"), lock);
        run(pip.arg("--target").arg(folder))
    })
}

/// Installs the packages of a `package-lock.json` into a folder, without running their scripts.
pub fn npm_install(folder: &Path, tool: &str) -> Result<()> {
    let from = lock(tool);
    installed_once(folder, &from.join("package-lock.json"), || {
        fs::create_dir_all(folder)?;
        for file in ["package.json", "package-lock.json"] {
            fs::copy(from.join(file), folder.join(file))
                .with_context(|| format!("failed to copy {file} of {}", from.display()))?;
        }
        // npm compares two paths of the folder. If `target` is a link, these differ, and npm reports its own
        // package as missing.
        let real = fs::canonicalize(folder)
            .with_context(|| format!("failed to find {}", folder.display()))?;
        let mut npm = Command::new("npm");
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]).arg(real);
        run(&mut npm)?;
        ensure!(
            folder.join("node_modules").is_dir(),
            "npm did not create node_modules in {}",
            folder.display()
        );
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_below(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable"));
        entries
            .flat_map(|entry| match entry.path() {
                path if path.is_dir() => files_below(&path),
                path => vec![path],
            })
            .collect()
    }

    #[test]
    fn wall_19_each_package_of_pip_and_npm_is_pinned_by_a_hash() {
        let (mut python_packages, mut npm_packages) = (0, 0);
        for file in files_below(&lock("")) {
            let text = fs::read_to_string(&file).expect("text");
            let name = file.file_name().expect("a name").to_string_lossy().into_owned();
            if name.ends_with(".txt") {
                // Joins a requirement and its hashes into one line.
                let joined = text.replace("\\\n", " ");
                for line in joined.lines().filter(|line| !line.starts_with('#')) {
                    assert!(
                        line.contains("==") && line.contains("--hash=sha256:"),
                        "{name}: {line}"
                    );
                    python_packages += 1;
                }
            }
            if name == "package-lock.json" {
                let lock: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                let packages = lock["packages"].as_object().expect("packages");
                for (package, entry) in packages.iter().filter(|(package, _)| !package.is_empty()) {
                    let hash = entry["integrity"].as_str().unwrap_or_default();
                    assert!(hash.starts_with("sha512-"), "{package} of {}", file.display());
                    npm_packages += 1;
                }
                // The address of the registry depends on the machine.
                assert!(!text.contains("\"resolved\""), "{}", file.display());
            }
        }
        assert!(python_packages > 5 && npm_packages > 1, "{python_packages}, {npm_packages}");
    }

    #[test]
    fn wall_19_nothing_is_installed_without_a_lock_file() {
        // `cargo install` names a version, and the registry's index has a checksum of it.
        let sources = files_below(&project_root().join("xtask/src"));
        for file in sources.iter().filter(|file| !file.ends_with("tools.rs")) {
            let text = fs::read_to_string(file).expect("text");
            let is_installer = |line: &&str| {
                let line = line.trim_start();
                !line.starts_with("//")
                    && (line.contains("\"pip\"") || line.contains("new(\"npm\")"))
            };
            let installers = text.lines().filter(is_installer).count();
            let pinned = text.matches("--require-hashes").count();
            assert!(installers <= pinned, "{}: it runs pip or npm without a lock", file.display());
        }
    }

    #[test]
    fn wall_19_other_bytes_are_refused() {
        let scratch = tempfile::tempdir().expect("a folder");
        let wheel = scratch.path().join("tool-1.0-py3-none-any.whl");
        fs::write(&wheel, b"other bytes").expect("written");
        let lock = scratch.path().join("requirements.txt");
        fs::write(&lock, format!("tool==1.0 --hash=sha256:{}\n", "0".repeat(64))).expect("written");
        let mut pip = pip_install(Path::new("python3"), &lock);
        pip.args(["--no-index", "--find-links"]).arg(scratch.path());
        let output = pip.arg("--target").arg(scratch.path().join("into")).output().expect("pip");
        let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
        assert!(!output.status.success() && said.contains("do not match the hashes"), "{said}");
    }

    #[test]
    fn a_changed_lock_file_is_installed_again() {
        let scratch = tempfile::tempdir().expect("a folder");
        let (folder, lock) = (scratch.path().join("into"), scratch.path().join("lock"));
        fs::create_dir(&folder).expect("made");
        let install = |wanted: &str| {
            fs::write(&lock, wanted).expect("written");
            let mut ran = false;
            installed_once(&folder, &lock, || {
                ran = true;
                Ok(())
            })
            .expect("installed");
            ran
        };
        assert_eq!(["a", "a", "b"].map(install), [true, false, true]);
    }
}
