//! Finds a compiler for WebAssembly without downloading a toolchain from Rust's servers.
//!
//! The order is: the compiler in use, if the target is installed; Debian's compiler, unpacked once into
//! `target/wasm-toolchain` (about 140 MB of downloads, 600 MB on disk, two minutes) and not installed;
//! otherwise an error that says what to install.
//!
//! Debian does not ship the library for WebAssembly, but it ships the library's source in the same version as
//! the compiler. The library is compiled from that source, and copied into the unpacked sysroot.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{cargo, is_installed, read, run};

const TARGET: &str = "wasm32-unknown-unknown";

/// Advice if there is neither a target nor Debian.
const WAY_OUT: &str = "run `rustup target add wasm32-unknown-unknown`";

/// A compiler that has the target.
pub struct WasmToolchain {
    /// `None`: the compiler that cargo uses anyway.
    rustc: Option<PathBuf>,
}

impl WasmToolchain {
    /// Finds a compiler, or unpacks Debian's.
    pub fn find(project_root: &Path) -> Result<Self> {
        let installed = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        if has_target(Path::new(&installed)) {
            return Ok(Self { rustc: None });
        }
        let folder = project_root.join("target/wasm-toolchain");
        let rustc = folder.join("rustc");
        if !has_target(&rustc) {
            unpack_debian(&folder)
                .with_context(|| format!("no compiler for {TARGET}: {WAY_OUT}"))?;
        }
        Ok(Self { rustc: Some(rustc) })
    }

    /// Makes a command that builds plugins use this compiler.
    pub fn apply_to<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        match &self.rustc {
            Some(rustc) => command.env("RUSTC", rustc),
            None => command,
        }
    }

    /// Returns the compiler, unless it is the one that cargo uses anyway.
    pub fn rustc(&self) -> Option<&Path> {
        self.rustc.as_deref()
    }

    /// Returns the compiler's version line, such as `rustc 1.96.0 (…)`.
    pub fn version(&self) -> Result<String> {
        let installed = || std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()).into();
        let rustc = self.rustc.clone().unwrap_or_else(installed);
        read(Command::new(rustc).arg("--version"))
    }
}

/// Whether this compiler runs and has the target's library.
fn has_target(rustc: &Path) -> bool {
    let asked = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output();
    let Ok(output) = asked else { return false };
    let library = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    fs::read_dir(library).is_ok_and(|files| {
        files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
    })
}

fn unpack_debian(folder: &Path) -> Result<()> {
    for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
        ensure!(is_installed(tool), "unsupported system: expected Debian, but `{tool}` is missing");
    }
    let installed_sysroot =
        PathBuf::from(read(Command::new("rustc").args(["--print", "sysroot"]))?);
    eprintln!("unpacking Debian's compiler into {}, once", folder.display());

    // Built in another folder and renamed, so that an interrupted attempt is not mistaken for a result.
    let partial = folder.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    let packages = partial.join("packages");
    fs::create_dir_all(&packages)?;
    download_packages(&packages)?;
    for package in files_in(&packages)? {
        run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&partial))?;
    }
    fs::remove_dir_all(&packages)?;

    let rustc = partial.join("rustc");
    write_wrapper(&partial, &rustc)?;
    link_linker(&installed_sysroot, &partial, &rustc)?;
    ensure!(
        partial.join("usr/lib/rustlib/src/rust/library").exists(),
        "missing source of the standard library"
    );
    build_library(&partial, &rustc)?;
    ensure!(has_target(&rustc), "the library was built, but the compiler does not find it");

    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    Ok(fs::rename(&partial, folder)?)
}

fn download_packages(folder: &Path) -> Result<()> {
    let dependency = |of: &str, prefix: &str| -> Result<String> {
        let printed = read(Command::new("apt-cache").args(["depends", of]))?;
        let found = printed.lines().find_map(|line| {
            let name = line.trim().strip_prefix("Depends: ")?;
            let digits = name.strip_prefix(prefix)?;
            digits.starts_with(|c: char| c.is_ascii_digit()).then(|| name.to_owned())
        });
        found.with_context(|| {
            format!("expected `{of}` to depend on {prefix}…, found no such dependency")
        })
    };
    // Package lists may be missing (as in containers) or older than the archive.
    if let Err(error) = run(Command::new("apt-get").args(["--quiet=2", "update"])) {
        eprintln!("{error}; continuing with the existing package lists");
    }
    let library = dependency("libstd-rust-web-dev", "libstd-rust-web-")?;
    let llvm = dependency(&library, "libllvm")?;
    let packages = ["rustc-web", "libstd-rust-web-dev", &library, "rust-web-src", &llvm];
    // As root, apt drops its privileges and then cannot write here, unless this option is set.
    run(Command::new("apt-get")
        .args(["--quiet=2", "--option", "APT::Sandbox::User=root", "download"])
        .args(packages)
        .current_dir(folder))
}

/// Writes a script that runs the unpacked compiler with its own libraries, wherever it is located.
fn write_wrapper(root: &Path, rustc: &Path) -> Result<()> {
    let multiarch = fs::read_dir(root.join("usr/lib"))?
        .flatten()
        .map(|folder| folder.path())
        .find(|folder| folder.is_dir() && folder.to_string_lossy().contains("-linux-gnu"))
        .context("missing usr/lib/*-linux-gnu in the packages")?;
    let libraries = multiarch.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let script = format!(
        "#!/bin/sh\n\
         root=$(dirname \"$0\")\n\
         LD_LIBRARY_PATH=\"$root/usr/lib/{libraries}\" exec \"$root/usr/bin/rustc\" \"$@\"\n"
    );
    fs::write(rustc, script)?;
    Ok(fs::set_permissions(rustc, fs::Permissions::from_mode(0o755))?)
}

/// Gives the unpacked compiler the linker of the installed one. It is a link instead of a copy, because the
/// linker finds its libraries relative to itself.
fn link_linker(installed_sysroot: &Path, root: &Path, rustc: &Path) -> Result<()> {
    let version = read(Command::new(rustc).arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let folder = Path::new("lib/rustlib")
        .join(host.context("missing host in the output of rustc")?)
        .join("bin");
    let linker = installed_sysroot.join(&folder).join("rust-lld");
    ensure!(linker.exists(), "missing {} in the installed compiler", linker.display());
    let folder = root.join("usr").join(folder);
    fs::create_dir_all(&folder)?;
    Ok(symlink(linker, folder.join("rust-lld"))?)
}

/// Compiles the target's library by building an empty crate, and copies it into the sysroot.
fn build_library(root: &Path, rustc: &Path) -> Result<()> {
    let empty = root.join("empty");
    fs::create_dir_all(empty.join("src"))?;
    fs::write(empty.join("src/lib.rs"), "")?;
    fs::write(
        empty.join("Cargo.toml"),
        "[package]\nname = \"empty\"\nedition = \"2024\"\n[lib]\n[workspace]\n",
    )?;
    let sysroot = root.join("usr");
    run(cargo()
        .args(["build", "--release", "-Zbuild-std=std,panic_abort", "--target", TARGET])
        .current_dir(&empty)
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", library_flags(&sysroot))
        .env("CARGO_TARGET_DIR", empty.join("target")))?;

    let library = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    fs::create_dir_all(&library)?;
    for file in files_in(&empty.join("target").join(TARGET).join("release/deps"))? {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".rlib") && !name.starts_with("libempty-") {
            fs::copy(&file, library.join(name))?;
        }
    }
    Ok(fs::remove_dir_all(empty)?)
}

/// Returns the flags for compiling the library: with the bitcode for link-time optimisation, and without this
/// machine's folders, which would otherwise be part of every plugin.
fn library_flags(sysroot: &Path) -> String {
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or(home);
    let cargo_home = cargo_home.unwrap_or_default();
    let registries = fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten().flatten();
    let mut flags = vec!["-Cembed-bitcode=yes".to_owned()];
    let mut remap = |from: &Path, to| {
        flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    };
    remap(sysroot, "/rust");
    remap(&cargo_home, "/cargo");
    for registry in registries {
        remap(&registry.path(), "/crates"); // the last one wins
    }
    flags.join("\x1f")
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)
        .with_context(|| format!("failed to read {}", folder.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    if entries.is_empty() {
        bail!("{} is empty", folder.display());
    }
    Ok(entries.into_iter().map(|entry| entry.path()).collect())
}
