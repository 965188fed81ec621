//! Cache of compiled plugins on disk, so that a start need not compile again.
//!
//! The key is the component's digest plus everything else that compiled code depends on: wasmtime's version and
//! flags, the processor's features, and the version of our own checks of components.
//!
//! **Trust.** Compiled code runs outside of every sandbox. A file that somebody else wrote would run with all
//! rights of this process. So each file ends with a seal ([`seal`]), a MAC under a secret that only this user can
//! read, and the host loads only files with a valid seal. Anything else is compiled again.
//!
//! **Races.** Several processes share a folder. Files are written under a temporary name and renamed, so a reader
//! sees a whole file or none, and two writers of one name write the same code. A file that another process removes
//! is compiled again. A cache that cannot be used costs time but never fails a start.

mod seal;

use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use wasmtime::component::Component;

use self::seal::Seal;
use super::compile::{CompileError, Compiler};
use super::{PluginEngine, features};
use shardmill_config::CompileLimits;
use shardmill_core::private;
use shardmill_core::record::Digest;

/// Suffix of a compiled component's file name.
const SUFFIX: &str = ".cwasm";
/// Time for which a user's compiled components are kept after their last use.
const UNUSED_MAX: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Resolution of the last use, so that not every start writes.
const USE_NOTED_EVERY: Duration = Duration::from_secs(24 * 3_600);

/// Folders of compiled components (the first usable one is used, or none), and the compiler with its limits.
#[derive(Clone, Debug)]
pub struct CompileCache {
    folders: Arc<[CodeFolder]>,
    compiler: Compiler,
    limits: CompileLimits,
}

/// A folder of compiled components.
#[derive(Debug)]
struct CodeFolder {
    path: PathBuf,
    users: Users,
    /// Determined at the first use; `None`: the folder cannot be used.
    seal: OnceLock<Option<Seal>>,
}

/// The users of a folder. They decide what may be removed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Users {
    /// The pipelines of one state folder: what they do not need, nobody needs.
    State,
    /// All commands of this user: what was not used for long is removed.
    User,
    /// Unknown users: a person named the folder, so nothing is removed.
    Named,
}

impl CodeFolder {
    /// Returns the seal of files there, if the folder can be used.
    fn seal(&self) -> Option<&Seal> {
        let found = self.seal.get_or_init(|| match Seal::of_folder(&self.path, self.users) {
            Ok(seal) => Some(seal),
            Err(error) => {
                let folder = self.path.display();
                tracing::warn!(%folder, %error, "compiled plugins are not kept there");
                None
            }
        });
        found.as_ref()
    }
}

impl CompileCache {
    /// Keeps compiled components in `folder`, which is created when it is first needed.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self::none().or_in(folder.into(), Users::State)
    }

    /// Keeps compiled components in a folder that all commands of this user share. Those that were not used for 30
    /// days are removed.
    pub fn of_user(folder: impl Into<PathBuf>) -> Self {
        Self::none().or_in(folder.into(), Users::User)
    }

    /// Keeps compiled components in a folder that others use too, such as pipelines with another state folder.
    /// Nothing in it is ever removed.
    pub fn shared(folder: impl Into<PathBuf>) -> Self {
        Self::none().or_in(folder.into(), Users::Named)
    }

    /// Keeps nothing: compiles every time.
    pub fn none() -> Self {
        let limits = CompileLimits::default();
        Self { folders: Arc::new([]), compiler: Compiler::InProcess, limits }
    }

    /// Adds `folder`, for the pipelines of one state folder, if the folders before it cannot be used (on a
    /// read-only file system, for example).
    #[must_use]
    pub fn or_in_folder(self, folder: impl Into<PathBuf>) -> Self {
        self.or_in(folder.into(), Users::State)
    }

    fn or_in(self, path: PathBuf, users: Users) -> Self {
        let before = self.folders.iter().map(|it| (it.path.clone(), it.users));
        let all = before.chain([(path, users)]);
        let folders =
            all.map(|(path, users)| CodeFolder { path, users, seal: OnceLock::new() }).collect();
        Self { folders, ..self }
    }

    /// Returns the folder to use, if there is one.
    fn folder(&self) -> Option<(&CodeFolder, &Seal)> {
        self.folders.iter().find_map(|folder| Some((folder, folder.seal()?)))
    }

    /// Compiles in child processes of this program, with limits. Only shardmill itself has the command for that;
    /// other programs that use this library compile in their own process.
    #[must_use]
    pub fn in_child_processes(self) -> Self {
        Self { compiler: Compiler::this_program(), ..self }
    }

    /// Returns the same cache with other limits.
    #[must_use]
    pub fn with_limits(&self, limits: CompileLimits) -> Self {
        Self { limits, ..self.clone() }
    }

    /// Returns the folder for the pipelines of one state folder.
    pub fn own_folder(&self) -> Option<&Path> {
        self.folders.iter().find(|it| it.users == Users::State).map(|it| it.path.as_path())
    }

    /// Removes compiled components of the state folder that are not in `needed` and are older than `age_min`.
    /// Returns how many. If one of them is needed after all, it is compiled again.
    ///
    /// # Errors
    /// The system's, when the folder cannot be read.
    pub fn remove_unneeded(
        &self,
        needed: &HashSet<String>,
        age_min: Duration,
    ) -> std::io::Result<u32> {
        let Some(folder) = self.own_folder() else { return Ok(0) };
        remove(folder, |digest, age| !needed.contains(digest) && age >= age_min)
    }

    /// Removes compiled components of this user that were not used for 30 days. Returns how many.
    ///
    /// # Errors
    /// The system's, when the folder cannot be read.
    pub fn remove_unused(&self) -> std::io::Result<u32> {
        let of_user = self.folders.iter().find(|it| it.users == Users::User);
        of_user.map_or(Ok(0), |folder| remove(&folder.path, |_, age| age >= UNUSED_MAX))
    }

    /// Returns the compiled component: from the cache, or compiled now and stored.
    ///
    /// A cache that cannot be written costs time but does not fail the start: it is logged.
    pub(super) fn component(
        &self,
        engine: &PluginEngine,
        digest: &Digest,
        bytes: &[u8],
    ) -> Result<Component, CompileError> {
        let name = file_name(engine, digest);
        let folder = self.folder();
        if let Some((folder, seal)) = folder
            && let Some(component) = read(engine, folder, &name, seal)
        {
            return Ok(component);
        }
        let code = self.compiler.compile(engine.wasmtime(), bytes, &self.limits)?;
        if let Some((folder, seal)) = folder
            && let Err(error) = write(&folder.path, &name, &code, seal)
        {
            let folder = folder.path.display();
            tracing::warn!(%folder, %error, "failed to keep a compiled plugin; it is compiled again next time");
        }
        // SAFETY: the bytes come from `Engine::precompile_component` of this very program with the
        // same flags: of this process, or of one that it started and whose pipe nobody else has.
        unsafe { Component::deserialize(engine.wasmtime(), &code) }
            .map_err(|error| CompileError::Compiler(format!("{error:#}")))
    }
}

/// Removes the compiled components of a folder that `unwanted` selects by digest and age.
fn remove(folder: &Path, unwanted: impl Fn(&str, Duration) -> bool) -> std::io::Result<u32> {
    let mut removed = 0;
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((digest, _)) = name.strip_suffix(SUFFIX).and_then(|it| it.split_once('-')) else {
            continue;
        };
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        // Another process may have removed it first.
        if unwanted(digest, age) && std::fs::remove_file(entry.path()).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

fn file_name(engine: &PluginEngine, digest: &Digest) -> String {
    let mut flags = DefaultHasher::new();
    engine.wasmtime().precompile_compatibility_hash().hash(&mut flags);
    features::CHECKS_VERSION.hash(&mut flags);
    format!("{digest}-{:016x}{SUFFIX}", flags.finish())
}

fn read(engine: &PluginEngine, folder: &CodeFolder, name: &str, seal: &Seal) -> Option<Component> {
    let path = folder.path.join(name);
    let log_recompile = |error: &dyn std::fmt::Display| {
        tracing::warn!(file = %path.display(), %error, "a compiled plugin is not used and is compiled again");
    };
    let mut file = match private::open_own(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            log_recompile(&error);
            return None;
        }
    };
    let mut sealed = Vec::new();
    file.read_to_end(&mut sealed).inspect_err(|error| log_recompile(error)).ok()?;
    let Some(code) = seal.opened(name, &sealed) else {
        log_recompile(&"invalid seal: it was truncated or altered, or sealed with another key");
        return None;
    };
    if folder.users == Users::User {
        note_use(&file);
    }
    // SAFETY: the seal proves that `write` stored exactly these bytes under this name: its key is a secret of this
    // user. They come from `Engine::precompile_component` of an engine with the same version and flags, which are
    // part of the name.
    unsafe { Component::deserialize(engine.wasmtime(), code) }
        .inspect_err(|error| log_recompile(error))
        .ok()
}

/// Notes the use of a file, so that it is not removed as unused.
fn note_use(file: &File) {
    let modified = file.metadata().and_then(|about| about.modified());
    if modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > USE_NOTED_EVERY)) {
        // A read-only cache can be used as well.
        let _ = file.set_modified(SystemTime::now());
    }
}

fn write(folder: &Path, name: &str, code: &[u8], seal: &Seal) -> std::io::Result<()> {
    let mut draft = tempfile::NamedTempFile::new_in(folder)?;
    draft.write_all(code)?;
    draft.write_all(&seal.of(name, code))?;
    // The rename replaces a link at this path and does not follow it.
    draft.persist(folder.join(name))?;
    Ok(())
}
