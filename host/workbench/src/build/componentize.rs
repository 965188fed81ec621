//! Converts a core module to a component, like `wasm-tools component new`.
//!
//! A guest compiled with wit-bindgen carries its interface in a custom section, and the module is wrapped
//! according to it. Pure: bytes in, bytes out.

use wit_component::ComponentEncoder;

/// First bytes of every WebAssembly file.
const WASM_MAGIC: &[u8] = b"\0asm";
/// Next bytes of a core module. A component has another version and layer here.
const CORE_MODULE_VERSION: &[u8] = &[1, 0, 0, 0];

/// Reason why a file cannot be converted to a component.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComponentizeError {
    /// The bytes do not begin like WebAssembly.
    #[error("not a WebAssembly file: its first bytes are {first_bytes:02x?}")]
    NotWasm {
        /// Up to four first bytes.
        first_bytes: Vec<u8>,
    },
    /// It is already a component.
    #[error("the file is already a component: use it without conversion")]
    AlreadyComponent,
    /// The module is malformed.
    #[error("malformed core module: {0:#}")]
    Malformed(anyhow::Error),
    /// The module does not say which world it implements.
    #[error(
        "the core module has no `component-type` section, which says which interface it implements: a Rust \
         plugin gets it from `shardmill_sdk::export!`, other languages from embedding the WIT"
    )]
    NoInterface,
    /// The module's imports and exports do not match the world that it names.
    #[error("the core module does not match its interface: {0:#}")]
    Unfit(anyhow::Error),
}

/// Wraps the core module `core` as a component, and validates the result.
///
/// # Errors
///
/// `core` is not a core module, does not name its interface, or does not match it; for instance because it
/// imports WASI, which plugins never get.
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
        assert!(refusal(b"").starts_with("not a WebAssembly file"));
        assert!(refusal(b"\x7fELF").contains("[7f, 45, 4c, 46]"));
        assert!(refusal(b"\0asm\x0d\0\x01\0").starts_with("the file is already a component"));
        assert!(refusal(b"\0asm").starts_with("malformed core module"));
        assert!(refusal(b"\0asm\x01\0\0\0\x01").starts_with("malformed core module"));
        assert!(refusal(EMPTY_MODULE).contains("no `component-type` section"));
    }
}
