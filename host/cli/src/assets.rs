//! Files of the project that the binary carries: the demo's pipeline and its plugins.

/// The pipeline at the project's root, which the demo runs.
pub(crate) const PIPELINE: &str = include_str!("../../../pipeline.toml");

/// The plugin that decodes cars.
pub(crate) const CAR_DECODE: &[u8] = include_bytes!("../../../plugins/prebuilt/car-decode.wasm");

/// The plugin that makes rows of cars.
pub(crate) const CAR_TRANSFORM: &[u8] =
    include_bytes!("../../../plugins/prebuilt/car-transform.wasm");

/// The plugin that routes JSON rows.
pub(crate) const ROUTE_JSON: &[u8] = include_bytes!("../../../plugins/prebuilt/route-json.wasm");
