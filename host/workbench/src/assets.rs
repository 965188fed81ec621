//! Files of the project that the binary carries: the plugin interface, the libraries of languages that are
//! built here, and what a new plugin's folder begins with.

/// The files of the interface's package.
pub(crate) const WIT: [(&str, &str); 2] = [
    ("plugin.wit", include_str!("../../../wit/0.1.0/plugin.wit")),
    ("capabilities.wit", include_str!("../../../wit/0.1.0/capabilities.wit")),
];

/// The modules of the Python library, by the name of their file.
pub(crate) const PYTHON_LIBRARY: [(&str, &str); 7] = [
    ("shardmill.py", include_str!("../../../plugins/sdk-python/shardmill.py")),
    ("shardmill_log.py", include_str!("../../../plugins/sdk-python/shardmill_log.py")),
    ("shardmill_metrics.py", include_str!("../../../plugins/sdk-python/shardmill_metrics.py")),
    ("shardmill_lookup.py", include_str!("../../../plugins/sdk-python/shardmill_lookup.py")),
    ("shardmill_clock.py", include_str!("../../../plugins/sdk-python/shardmill_clock.py")),
    ("shardmill_random.py", include_str!("../../../plugins/sdk-python/shardmill_random.py")),
    ("shardmill_http.py", include_str!("../../../plugins/sdk-python/shardmill_http.py")),
];

/// The files of the JavaScript library: what a plugin imports as `shardmill` and `shardmill/NAME`.
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

/// A path in a new plugin's folder and the text of its file.
pub(crate) type File = (&'static str, &'static str);

/// The files of a language's template, by their paths; each text is in the binary.
macro_rules! files {
    ($folder:literal: $($path:literal),+ $(,)?) => {
        &[$(($path, include_str!(concat!("../templates/", $folder, "/", $path)))),+]
    };
}

/// The files of a language's library, from their folder in the project to the one in the plugin.
macro_rules! library {
    ($from:literal => $to:literal: $($path:literal),+ $(,)?) => {
        &[$((concat!($to, "/", $path), include_str!(concat!("../../../", $from, "/", $path)))),+]
    };
}

/// A language's plugin.
pub(crate) struct LanguageTemplate {
    /// What the author reads and changes. `{{name}}` in it is the plugin's name.
    pub(crate) own: &'static [File],
    /// What the plugin is written with, as it is.
    pub(crate) library: &'static [&'static [File]],
}

/// What all languages leave out of version control.
pub(crate) const GITIGNORE: File =
    (".gitignore", "*.wasm\n/state/\n/target/\n/node_modules/\n/.venv/\n");

/// The template of a Rust plugin.
pub(crate) const RUST: LanguageTemplate = LanguageTemplate {
    own: files!("rust": "plugin.toml", "Cargo.toml", "src/lib.rs", "README.md",
        "tests/cases.toml", "pipeline.toml", "input.ndjson"),
    library: &[
        // The versions that the project is tested with; cargo leaves out what is not used.
        library!("plugins" => ".": "Cargo.lock"),
        library!("plugins/sdk" => "sdk/rust": "Cargo.toml", "src/batch.rs", "src/bindings.rs",
            "src/capability.rs", "src/describe.rs", "src/error.rs", "src/glue.rs", "src/lib.rs",
            "src/out.rs", "src/plugin.rs", "src/testing.rs"),
        library!("wit/0.1.0" => "wit/0.1.0": "plugin.wit", "capabilities.wit", "words.rs"),
    ],
};

/// The template of a C plugin.
pub(crate) const C: LanguageTemplate = LanguageTemplate {
    own: files!("c": "plugin.toml", "plugin.c", "README.md", "tests/cases.toml", "pipeline.toml",
        "input.ndjson"),
    library: &[library!("plugins/sdk-c" => "sdk": "shardmill.h")],
};

/// The template of a Go plugin.
pub(crate) const GO: LanguageTemplate = LanguageTemplate {
    own: files!("go": "plugin.toml", "go.mod", "main.go", "README.md", "tests/cases.toml",
        "pipeline.toml", "input.ndjson"),
    library: &[
        library!("plugins/sdk-go" => "sdk": "go.mod", "shardmill.go", "abi.go", "capabilities.go"),
    ],
};

/// The template of a JavaScript plugin.
pub(crate) const JS: LanguageTemplate = LanguageTemplate {
    own: files!("js": "plugin.toml", "plugin.js", "package.json", "jsconfig.json", "README.md",
        "tests/cases.toml", "pipeline.toml", "input.ndjson"),
    // The library itself is in the binary: what is written is for editors.
    library: &[library!("plugins/sdk-js" => "types": "shardmill.d.ts", "log.d.ts", "metrics.d.ts",
            "lookup.d.ts", "clock.d.ts", "random.d.ts", "http.d.ts")],
};

/// The template of a Python plugin.
pub(crate) const PYTHON: LanguageTemplate = LanguageTemplate {
    own: files!("python": "plugin.toml", "plugin.py", "README.md", "tests/cases.toml",
        "pipeline.toml", "input.ndjson"),
    library: &[library!("plugins/sdk-python" => ".": "shardmill.py")],
};
