//! Turns a core module into a component: what `wasm-tools component new` does.
//!
//! A guest compiled with wit-bindgen carries its interface in a custom section; the module
//! is wrapped according to that. Pure: bytes in, bytes out.

use wit_component::ComponentEncoder;

/// What every WebAssembly file begins with.
const WASM_MAGIC: &[u8] = b"\0asm";
/// What follows in a core module. A component has another version and layer there.
const CORE_MODULE_VERSION: &[u8] = &[1, 0, 0, 0];

/// Why a file cannot be made a component.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComponentizeError {
    /// The bytes do not begin like WebAssembly.
    #[error("the file is no WebAssembly: its first bytes are {first_bytes:02x?}")]
    NotWasm {
        /// Up to four of them.
        first_bytes: Vec<u8>,
    },
    /// It is a component already.
    #[error("the file is a component already: use it as it is")]
    AlreadyComponent,
    /// The module is broken.
    #[error("the core module cannot be read: {0:#}")]
    Malformed(anyhow::Error),
    /// The module does not say which world it implements.
    #[error(
        "the core module has no `component-type` section, so it does not say which interface it \
         implements: a Rust plugin gets it from `shardmill_sdk::export!`, other languages from \
         embedding the WIT"
    )]
    NoInterface,
    /// The module's imports and exports do not fit the world it names.
    #[error("the core module does not fit the interface it names: {0:#}")]
    Unfit(anyhow::Error),
}

/// Wraps the core module `core` as a component, and validates the result.
///
/// # Errors
///
/// If `core` is no core module, says nothing about its interface, or does not fit it; for
/// instance because it imports WASI, which plugins are never given.
pub fn componentize(core: &[u8]) -> Result<Vec<u8>, ComponentizeError> {
    let Some(version) = core.strip_prefix(WASM_MAGIC) else {
        return Err(ComponentizeError::NotWasm { first_bytes: core[..core.len().min(4)].to_vec() });
    };
    if version.len() >= CORE_MODULE_VERSION.len() && !version.starts_with(CORE_MODULE_VERSION) {
        return Err(ComponentizeError::AlreadyComponent);
    }
    let (module, _interface) =
        wit_component::metadata::decode(core).map_err(ComponentizeError::Malformed)?;
    if module.is_none() {
        return Err(ComponentizeError::NoInterface);
    }
    ComponentEncoder::default()
        .validate(true)
        .module(core)
        .and_then(|mut encoder| encoder.encode())
        .map_err(ComponentizeError::Unfit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_MODULE: &[u8] = b"\0asm\x01\0\0\0";

    #[test]
    fn what_is_no_core_module_is_refused() {
        let refusal = |bytes: &[u8]| componentize(bytes).unwrap_err().to_string();
        assert!(refusal(b"").starts_with("the file is no WebAssembly"));
        assert!(refusal(b"\x7fELF").contains("[7f, 45, 4c, 46]"));
        assert!(refusal(b"\0asm\x0d\0\x01\0").starts_with("the file is a component already"));
        assert!(refusal(b"\0asm").starts_with("the core module cannot be read"));
        assert!(refusal(b"\0asm\x01\0\0\0\x01").starts_with("the core module cannot be read"));
        assert!(refusal(EMPTY_MODULE).contains("no `component-type` section"));
    }
}
