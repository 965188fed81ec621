//! The typed calls, generated from `wit/`. A component may import less than this world offers.
#![allow(missing_docs, clippy::all, reason = "generated code")]

wasmtime::component::bindgen!({
    path: "../../wit/0.1.0",
    world: "plugin-with-capabilities",
    imports: { default: trappable },
});
