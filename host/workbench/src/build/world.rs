//! Makes a component of a core module that implements our world by hand, as C's and Go's do.
//!
//! Such a module says nothing about its interface: that is added here, from the WIT that the host
//! carries. Capabilities that the module does not import are left out of the component.

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::{Resolve, UnresolvedPackageGroup};

use super::componentize::ComponentizeError;
use super::wasi_stub;
use crate::assets::WIT;

/// The world that holds all that such a module may import.
const WORLD: &str = "plugin-with-capabilities";

/// Wraps the core module `core`, and validates the result. What it imports of WASI is answered by
/// constants.
///
/// # Errors
/// If `core` is no core module, or does not fit the world.
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

/// Adds the section that says which world the module implements.
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
