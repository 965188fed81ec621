//! Files of the project that are compiled into the binary: the plugin interface, the libraries of languages
//! that are built here, and the templates of new plugins.

/// Files of the WIT package.
pub(crate) const WIT: [(&str, &str); 2] = [
    ("plugin.wit", include_str!("../../../wit/0.1.0/plugin.wit")),
    ("capabilities.wit", include_str!("../../../wit/0.1.0/capabilities.wit")),
];

/// Modules of the Python library, by file name.
pub(crate) const PYTHON_LIBRARY: [(&str, &str); 7] = [
    ("shardmill.py", include_str!("../../../plugins/sdk-python/shardmill.py")),
    ("shardmill_log.py", include_str!("../../../plugins/sdk-python/shardmill_log.py")),
    ("shardmill_metrics.py", include_str!("../../../plugins/sdk-python/shardmill_metrics.py")),
    ("shardmill_lookup.py", include_str!("../../../plugins/sdk-python/shardmill_lookup.py")),
    ("shardmill_clock.py", include_str!("../../../plugins/sdk-python/shardmill_clock.py")),
    ("shardmill_random.py", include_str!("../../../plugins/sdk-python/shardmill_random.py")),
    ("shardmill_http.py", include_str!("../../../plugins/sdk-python/shardmill_http.py")),
];

/// Files of the JavaScript library, which plugins import as `shardmill` and `shardmill/NAME`.
pub(crate) const JS_LIBRARY: [(&str, &str); 8] = [
    ("package.json", include_str!("../../../plugins/sdk-js/package.json")),
    ("shardmill.js", include_str!("../../../plugins/sdk-js/shardmill.js")),
    ("log.js", include_str!("../../../plugins/sdk-js/log.js")),
    ("metrics.js", include_str!("../../../plugins/sdk-js/metrics.js")),
    ("lookup.js", include_str!("../../../plugins/sdk-js/lookup.js")),
    ("clock.js", include_str!("../../../plugins/sdk-js/clock.js")),
    ("random.js", include_str!("../../../plugins/sdk-js/random.js")),
    ("http.js", include_str!("../../../plugins/sdk-js/http.js")),
];

/// Path in a new plugin's folder, and text of the file.
pub(crate) type File = (&'static str, &'static str);

/// Lists the files of a language's template, with their texts.
macro_rules! files {
    ($folder:literal: $($path:literal),+ $(,)?) => {
        &[$(($path, include_str!(concat!("../templates/", $folder, "/", $path)))),+]
    };
}

/// Lists the files of a language's library, from a folder of the project to a folder of the plugin.
macro_rules! library {
    ($from:literal => $to:literal: $($path:literal),+ $(,)?) => {
        &[$((concat!($to, "/", $path), include_str!(concat!("../../../", $from, "/", $path)))),+]
    };
}

/// Template of a plugin in one language.
pub(crate) struct LanguageTemplate {
    /// Files that the author reads and changes. `{{name}}` is replaced by the plugin's name.
    pub(crate) own: &'static [File],
    /// Library of the language, copied unchanged.
    pub(crate) library: &'static [&'static [File]],
}

/// Files that plugins of all languages exclude from version control.
pub(crate) const GITIGNORE: File =
    (".gitignore", "*.wasm\n/state/\n/target/\n/node_modules/\n/.venv/\n");

/// Template of a Rust plugin.
pub(crate) const RUST: LanguageTemplate = LanguageTemplate {
    own: files!("rust": "plugin.toml", "Cargo.toml", "src/lib.rs", "README.md",
        "tests/cases.toml", "pipeline.toml", "input.ndjson"),
    library: &[
        // The versions that the project is tested with. Cargo ignores entries that are not used.
        library!("plugins" => ".": "Cargo.lock"),
        library!("plugins/sdk" => "sdk/rust": "Cargo.toml", "src/batch.rs", "src/bindings.rs",
            "src/capability.rs", "src/describe.rs", "src/error.rs", "src/glue.rs", "src/lib.rs",
            "src/out.rs", "src/plugin.rs", "src/testing.rs"),
        library!("wit/0.1.0" => "wit/0.1.0": "plugin.wit", "capabilities.wit", "words.rs"),
    ],
};

/// Template of a C plugin.
pub(crate) const C: LanguageTemplate = LanguageTemplate {
    own: files!("c": "plugin.toml", "plugin.c", "README.md", "tests/cases.toml", "pipeline.toml",
        "input.ndjson"),
    library: &[library!("plugins/sdk-c" => "sdk": "shardmill.h")],
};

/// Template of a Go plugin.
pub(crate) const GO: LanguageTemplate = LanguageTemplate {
    own: files!("go": "plugin.toml", "go.mod", "main.go", "README.md", "tests/cases.toml",
        "pipeline.toml", "input.ndjson"),
    library: &[
        library!("plugins/sdk-go" => "sdk": "go.mod", "shardmill.go", "abi.go", "capabilities.go"),
    ],
};

/// Template of a JavaScript plugin.
pub(crate) const JS: LanguageTemplate = LanguageTemplate {
    own: files!("js": "plugin.toml", "plugin.js", "package.json", "jsconfig.json", "README.md",
        "tests/cases.toml", "pipeline.toml", "input.ndjson"),
    // The library itself is in the binary. These files are for editors only.
    library: &[library!("plugins/sdk-js" => "types": "shardmill.d.ts", "log.d.ts", "metrics.d.ts",
            "lookup.d.ts", "clock.d.ts", "random.d.ts", "http.d.ts")],
};

/// Template of a Python plugin.
pub(crate) const PYTHON: LanguageTemplate = LanguageTemplate {
    own: files!("python": "plugin.toml", "plugin.py", "README.md", "tests/cases.toml",
        "pipeline.toml", "input.ndjson"),
    library: &[library!("plugins/sdk-python" => ".": "shardmill.py")],
};
