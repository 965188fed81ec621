//! The types and the export glue that wit-bindgen generates from `wit/0.1.0`.

wit_bindgen::generate!({
    path: "../../wit/0.1.0",
    // Capabilities that a plugin does not use are not imported by its component.
    world: "plugin-with-capabilities",
    pub_export_macro: true,
    export_macro_name: "__export_plugin",
    default_bindings_module: "shardmill_sdk::bindings",
});
