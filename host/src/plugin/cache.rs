//! Compiled plugins on disk, so that a start does not compile again.
//!
//! The key is the component's digest with everything that compiled code depends on: wasmtime's
//! version, its flags, the processor's features. A file that does not end with the digest of its
//! own content (cut off, altered) is compiled again: the host deserialises only what it wrote.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use wasmtime::component::Component;

use super::compile::{CompileError, Compiler};
use super::{Digest, PluginEngine};
use crate::config::CompileLimits;

/// The bytes of the digest that ends a cache file.
const SEAL_BYTES: usize = 32;

/// A folder of compiled components, or none at all; and who compiles, within which limits.
#[derive(Clone, Debug)]
pub struct CompileCache {
    folder: Option<PathBuf>,
    /// Others keep components in the folder too: what nothing here needs is theirs.
    is_shared: bool,
    compiler: Compiler,
    limits: CompileLimits,
}

impl CompileCache {
    /// Keeps compiled components in `folder`, which is made when first needed.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()), ..Self::none() }
    }

    /// Keeps compiled components in a folder that others use as well, such as pipelines with their state
    /// elsewhere. Nothing in it is ever removed.
    pub fn shared(folder: impl Into<PathBuf>) -> Self {
        Self { is_shared: true, ..Self::in_folder(folder) }
    }

    /// Compiles every time.
    pub fn none() -> Self {
        let limits = CompileLimits::default();
        Self { folder: None, is_shared: false, compiler: Compiler::InProcess, limits }
    }

    /// Compiles by this program, started again with limits. Only shardmill itself knows how to be a
    /// compiler; other programs that use this library compile in their own process.
    #[must_use]
    pub fn in_child_processes(self) -> Self {
        Self { compiler: Compiler::this_program(), ..self }
    }

    /// The same cache with other limits.
    #[must_use]
    pub fn with_limits(&self, limits: CompileLimits) -> Self {
        Self { limits, ..self.clone() }
    }

    /// Where compiled components are kept for the pipelines of one state folder alone.
    pub fn own_folder(&self) -> Option<&Path> {
        self.folder.as_deref().filter(|_| !self.is_shared)
    }

    /// Removes compiled components that nobody needs and that are older than `age_min`; gives their number.
    /// A file that is missed is compiled again. Nothing is removed from a shared folder.
    ///
    /// # Errors
    /// The system's, when the folder cannot be read.
    pub fn remove_unneeded(
        &self,
        needed: &HashSet<String>,
        age_min: Duration,
    ) -> std::io::Result<u32> {
        let Some(folder) = self.own_folder() else { return Ok(0) };
        let mut removed = 0;
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some((digest, _)) = name.strip_suffix(".cwasm").and_then(|it| it.split_once('-'))
            else {
                continue;
            };
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            // Another process may have been first.
            if !needed.contains(digest)
                && age >= age_min
                && std::fs::remove_file(entry.path()).is_ok()
            {
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The compiled component: from the cache, or compiled now and kept.
    ///
    /// A cache that cannot be written costs time, never the start: it is logged.
    pub(super) fn component(
        &self,
        engine: &PluginEngine,
        digest: &Digest,
        bytes: &[u8],
    ) -> Result<Component, CompileError> {
        let file = self.folder.as_ref().map(|folder| folder.join(file_name(engine, digest)));
        if let Some(component) = file.as_deref().and_then(|file| read(engine, file)) {
            return Ok(component);
        }
        let code = self.compiler.compile(engine.wasmtime(), bytes, &self.limits)?;
        if let (Some(folder), Some(file)) = (&self.folder, &file)
            && let Err(error) = write(folder, file, &code)
        {
            tracing::warn!(file = %file.display(), %error, "failed to keep a compiled plugin");
        }
        // SAFETY: the bytes come from `Engine::precompile_component` of this very program with the
        // same flags: of this process, or of one that it started and whose pipe nobody else has.
        unsafe { Component::deserialize(engine.wasmtime(), &code) }
            .map_err(|error| CompileError::Compiler(format!("{error:#}")))
    }
}

fn file_name(engine: &PluginEngine, digest: &Digest) -> String {
    let mut flags = DefaultHasher::new();
    engine.wasmtime().precompile_compatibility_hash().hash(&mut flags);
    format!("{digest}-{:016x}.cwasm", flags.finish())
}

fn read(engine: &PluginEngine, file: &Path) -> Option<Component> {
    let sealed = std::fs::read(file).ok()?;
    let (code, seal) = sealed.split_at_checked(sealed.len().checked_sub(SEAL_BYTES)?)?;
    if Sha256::digest(code).as_slice() != seal {
        tracing::warn!(file = %file.display(), "a compiled plugin is damaged and is compiled again");
        return None;
    }
    // SAFETY: the seal shows that the bytes are the ones that `write` put here whole, from
    // `Component::serialize` of an engine with the same version and flags (they are in the name).
    // Whoever can forge a sealed file in the state folder can replace the host itself.
    unsafe { Component::deserialize(engine.wasmtime(), code) }
        .inspect_err(|error| tracing::warn!(file = %file.display(), %error, "compiling again"))
        .ok()
}

fn write(folder: &Path, file: &Path, code: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut draft = tempfile::NamedTempFile::new_in(folder)?;
    draft.write_all(code)?;
    draft.write_all(&Sha256::digest(code))?;
    draft.persist(file)?;
    Ok(())
}
