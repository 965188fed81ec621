//! Plugins: from a file's bytes to a sandboxed instance that can be called.
//!
//! [`Plugin::load`] validates that the bytes are a component of our world, and compiles them (or takes the compiled
//! code from [`cache`]). [`Instance`] is one sandbox: a store with its limits, its clock and the typed calls. What
//! a stage does with the answers is not known here.
//!
//! The bytes of a component, its limits and its grants go in. Descriptors, outputs and rejects come out, or the
//! reason why a call gave no answer. Nothing here knows a stage, a lane or a sink. The crate uses `config`, `core`,
//! `net` for the capability `http` and `pg` for lookups; its heavy dependencies are wasmtime, wasmparser and the
//! drivers of lookups.

mod bindings;
mod cache;
pub mod capability;
mod clock;
pub mod compile;
mod descriptor;
mod engine;
mod features;
mod instance;
mod links;
#[path = "../../../wit/0.1.0/words.rs"]
mod words;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use wasmtime::component::{Component, Linker};

pub use bindings::exports::shardmill::plugin::stage::{
    Batch as WireBatch, Context, Descriptor, Failure, Outcome,
};
pub use bindings::shardmill::plugin::types::{Column, Route};
pub use cache::CompileCache;
pub use capability::{Backends, LOG_TARGET, Services, count_values_by};
use compile::CompileError;
pub use descriptor::check_column;
pub use engine::PluginEngine;
pub use features::{PARTS_MAX, Parts};
pub use instance::{CallError, CallErrorKind, Instance};
pub use words::{Input, Output, Reject, Span};

use shardmill_config::{Capability, WIT_VERSION};
use shardmill_core::record::Digest;

/// The interface that a plugin exports, without its version.
const STAGE_INTERFACE: &str = "shardmill:plugin/stage";

/// Reason why bytes are not a plugin that this host can run.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The file cannot be read.
    #[error("failed to read plugin {path}: {cause}")]
    Unreadable {
        /// The file.
        path: String,
        /// The system's error.
        cause: std::io::Error,
    },
    /// The bytes do not start with WebAssembly's magic number.
    #[error(
        "{path} is not WebAssembly: it starts with {begins}; build a component with `shardmill plugin build`"
    )]
    NoWasm {
        /// The file.
        path: String,
        /// Its first bytes in hex.
        begins: String,
    },
    /// A core module, as compilers write it before it is wrapped into a component.
    #[error(
        "{path} is a core WebAssembly module, not a component; wrap it with `shardmill plugin build`"
    )]
    CoreModule {
        /// The file.
        path: String,
    },
    /// A component that does not export our interface.
    #[error("{path} does not export {STAGE_INTERFACE}@{WIT_VERSION}: {found}")]
    OtherWorld {
        /// The file.
        path: String,
        /// Its exports, and what to do.
        found: String,
    },
    /// A component that imports something that the host does not have.
    #[error(
        "{path} has unsupported imports: {imports}; a plugin may import only capabilities \
         ({capabilities}): build it with `shardmill plugin build`, which answers WASI inside of the component"
    )]
    Imports {
        /// The file.
        path: String,
        /// The interfaces or functions, by name.
        imports: String,
        /// The names of the capabilities that it may import.
        capabilities: String,
    },
    /// The component cannot be compiled within its limits, or not at all.
    #[error("{path} does not compile: {cause}")]
    Uncompiled {
        /// The file.
        path: String,
        /// Reason.
        cause: CompileError,
    },
    /// wasmtime refuses the component.
    #[error("{path} is not a valid component: {cause}")]
    Invalid {
        /// The file.
        path: String,
        /// wasmtime's error.
        cause: String,
    },
}

/// The parts of the host that load and run plugins.
#[derive(Clone)]
pub struct PluginHost {
    /// The engine that runs them.
    pub engine: PluginEngine,
    /// The compiler, and the cache of compiled code.
    pub cache: CompileCache,
    /// The sources from which capabilities answer.
    pub backends: Backends,
}

/// A compiled component of our world; cheap to clone.
#[derive(Clone)]
pub struct Plugin {
    /// The digest of its bytes.
    pub digest: Digest,
    /// Path of its file, for messages.
    pub path: Arc<str>,
    /// Capabilities that it imports. Its stage must grant all of them.
    pub capabilities: Arc<BTreeSet<Capability>>,
    /// The size of its component, in bytes.
    pub component_bytes: usize,
    /// Number of linear memories of an instance.
    pub memories: usize,
    pre: bindings::PluginWithCapabilitiesPre<instance::Sandbox>,
    engine: PluginEngine,
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Plugin({}@{})", self.path, self.digest.short())
    }
}

impl Plugin {
    /// Reads, checks and compiles a plugin's file.
    ///
    /// # Errors
    /// [`PluginError`], naming the file.
    pub fn load_file(
        engine: &PluginEngine,
        cache: &CompileCache,
        path: &Path,
    ) -> Result<(Self, Bytes), PluginError> {
        let shown = shardmill_core::escape::path(path);
        let bytes = std::fs::read(path)
            .map_err(|cause| PluginError::Unreadable { path: shown.clone(), cause })?;
        Ok((Self::load(engine, cache, &shown, &bytes)?, bytes.into()))
    }

    /// Checks and compiles a plugin's bytes; `path` is for messages.
    ///
    /// # Errors
    /// [`PluginError`], naming the path.
    pub fn load(
        engine: &PluginEngine,
        cache: &CompileCache,
        path: &str,
        bytes: &[u8],
    ) -> Result<Self, PluginError> {
        check_layer(path, bytes)?;
        let digest = Digest::of(bytes);
        let invalid = |cause: wasmtime::Error| PluginError::Invalid {
            path: path.into(),
            cause: format!("{cause:#}"),
        };
        let component = cache
            .component(engine, &digest, bytes)
            .map_err(|cause| PluginError::Uncompiled { path: path.into(), cause })?;
        let capabilities = check_world(engine, path, &component)?;
        // Unknown only for a component that imports modules, which was refused just above.
        let memories = component
            .resources_required()
            .map_or(PARTS_MAX.memories, |it| it.num_memories as usize);
        let pre = linker(engine)
            .and_then(|linker| linker.instantiate_pre(&component))
            .and_then(bindings::PluginWithCapabilitiesPre::new)
            .map_err(invalid)?;
        Ok(Self {
            digest,
            path: path.into(),
            capabilities: capabilities.into(),
            component_bytes: bytes.len(),
            memories,
            pre,
            engine: engine.clone(),
        })
    }
}

/// Distinguishes a component from a core module and from anything else.
///
/// Source: the component model's `Binary.md`: the magic number, then version and layer of 16 bits each. Layer 0 is
/// a core module, layer 1 a component.
fn check_layer(path: &str, bytes: &[u8]) -> Result<(), PluginError> {
    match bytes {
        [b'\0', b'a', b's', b'm', _, _, 1, 0, ..] => Ok(()),
        [b'\0', b'a', b's', b'm', _, _, 0, 0, ..] => {
            Err(PluginError::CoreModule { path: path.into() })
        }
        _ => Err(PluginError::NoWasm {
            path: path.into(),
            begins: match bytes {
                [] => "nothing (the file is empty)".into(),
                _ => hex::encode(&bytes[..bytes.len().min(4)]),
            },
        }),
    }
}

/// Links every capability; what a component imports is compared with its stage's grants.
fn linker(engine: &PluginEngine) -> wasmtime::Result<Linker<instance::Sandbox>> {
    let mut linker = Linker::new(engine.wasmtime());
    capability::offer(&mut linker)?;
    Ok(linker)
}

/// Checks the exports against our world, and returns the capabilities among the imports.
fn check_world(
    engine: &PluginEngine,
    path: &str,
    component: &Component,
) -> Result<BTreeSet<Capability>, PluginError> {
    let world = component.component_type();
    let ours = format!("{STAGE_INTERFACE}@{WIT_VERSION}");
    let exports: Vec<&str> = world.exports(engine.wasmtime()).map(|(name, _)| name).collect();
    if !exports.contains(&ours.as_str()) {
        let other_version = exports.iter().find(|name| name.starts_with(STAGE_INTERFACE));
        let found = match (other_version, exports.as_slice()) {
            (Some(other), _) => {
                format!("it was built for {other}; rebuild it with the SDK of this host's version")
            }
            (None, []) => {
                "it has no exports; build it for the world `shardmill:plugin/plugin`".into()
            }
            (None, some) => format!(
                "it exports {}; build it for the world `shardmill:plugin/plugin`",
                some.join(", ")
            ),
        };
        return Err(PluginError::OtherWorld { path: path.into(), found });
    }
    let mut capabilities = BTreeSet::new();
    let mut unknown = Vec::new();
    for (name, _) in world.imports(engine.wasmtime()) {
        // Our own `types` contains no function; every component of the world imports it.
        if name.starts_with("shardmill:plugin/types@") {
            continue;
        }
        match Capability::ALL.into_iter().find(|one| one.interface() == name) {
            Some(capability) => _ = capabilities.insert(capability),
            None => unknown.push(name),
        }
    }
    if unknown.is_empty() {
        return Ok(capabilities);
    }
    Err(PluginError::Imports {
        path: path.into(),
        imports: unknown.join(", "),
        capabilities: Capability::ALL.map(Capability::name).join(", "),
    })
}
