//! The typed calls, generated from `wit/`.
#![allow(missing_docs, clippy::all, reason = "generated code")]

wasmtime::component::bindgen!({
    path: "../wit/0.1.0",
    world: "plugin",
});
