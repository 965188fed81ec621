//! Makes a component of a core module that implements our world by hand, as the C and Go libraries do.
//!
//! Such a module does not name its interface. It is added here, from the WIT that is compiled into the host.
//! Capabilities that the module does not import are left out of the component.

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::{Resolve, UnresolvedPackageGroup};

use super::componentize::ComponentizeError;
use super::wasi_stub;
use crate::assets::WIT;

/// World with everything that such a module may import.
const WORLD: &str = "plugin-with-capabilities";

/// Wraps the core module `core` and validates the result. Its WASI imports are answered by a stub
/// ([`wasi_stub`]).
///
/// # Errors
/// `core` is not a core module, or does not match the world.
pub(super) fn componentize_for_world(core: &[u8]) -> Result<Vec<u8>, ComponentizeError> {
    let stub = wasi_stub::adapter(core).map_err(ComponentizeError::Malformed)?;
    let mut described = core.to_vec();
    describe(&mut described).map_err(ComponentizeError::Malformed)?;
    let mut encoder = ComponentEncoder::default()
        .validate(true)
        .module(&described)
        .map_err(ComponentizeError::Unfit)?;
    if let Some(stub) = stub {
        encoder = encoder.adapter(wasi_stub::MODULE, &stub).map_err(ComponentizeError::Unfit)?;
    }
    encoder.encode().map_err(ComponentizeError::Unfit)
}

/// Adds the section that names the world of the module.
fn describe(core: &mut Vec<u8>) -> anyhow::Result<()> {
    let mut resolve = Resolve::default();
    let mut sources = wit_parser::SourceMap::default();
    for (name, text) in WIT {
        sources.push_str(name, text);
    }
    let package: UnresolvedPackageGroup =
        sources.parse().map_err(|(_, error)| anyhow::anyhow!("{error}"))?;
    let package = resolve.push_group(package)?;
    let world = resolve.select_world(&[package], Some(WORLD))?;
    embed_component_metadata(core, &resolve, world, StringEncoding::UTF8)
}
