//! Files that are compiled into the binary: the demo's pipeline and its plugins.

/// The pipeline file at the root of the project, which the demo runs.
pub(crate) const PIPELINE: &str = include_str!("../../../pipeline.toml");

/// Plugin that decodes cars.
pub(crate) const CAR_DECODE: &[u8] = include_bytes!("../../../plugins/prebuilt/car-decode.wasm");

/// Plugin that turns cars into rows.
pub(crate) const CAR_TRANSFORM: &[u8] =
    include_bytes!("../../../plugins/prebuilt/car-transform.wasm");

/// Plugin that routes JSON rows.
pub(crate) const ROUTE_JSON: &[u8] = include_bytes!("../../../plugins/prebuilt/route-json.wasm");
