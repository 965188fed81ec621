//! Checks that ARCHITECTURE.md and README.md are true: every path that they name exists, and they name every crate of
//! the host. Also checks which modules may include files of the project at compile time.

use std::path::{Path, PathBuf};

use crate::support::{host_sources, root};

/// Returns the texts in backquotes that look like paths of the repository.
fn paths(text: &str) -> Vec<&str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted
        .filter(|word| {
            let first = word.split('/').next().unwrap_or_default();
            ["wit", "host", "plugins", "examples", "xtask", "benches", "docs", "fuzz"]
                .contains(&first)
                && word.contains('/')
        })
        .collect()
}

/// Appends all Rust files below a folder to `found`.
fn sources(folder: &Path, found: &mut String) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push_str(&std::fs::read_to_string(&path).expect("a source"));
        }
    }
}

/// The last column of the table of invariants names one test per row.
#[test]
fn every_test_named_exists() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = std::fs::read_to_string(host.join("../ARCHITECTURE.md")).expect("the map");
    let part = map.split("\n## Invariants\n").nth(1).expect("the invariants");
    let part = part.split("\n## ").next().unwrap_or_default();
    let named: Vec<&str> =
        part.lines().filter_map(|line| line.strip_suffix("` |")?.rsplit('`').next()).collect();
    assert!(named.len() > 50, "{} tests", named.len());
    let mut found = String::new();
    sources(host, &mut found);
    for name in named {
        let is_there = found.contains(&format!("fn {name}("));
        assert!(is_there, "ARCHITECTURE.md names the missing test {name}");
    }
}

#[test]
fn every_path_named_exists() {
    for document in ["ARCHITECTURE.md", "README.md"] {
        let text = std::fs::read_to_string(root().join(document)).expect(document);
        let paths = paths(&text);
        assert!(paths.len() > 3, "{document} names {} paths", paths.len());
        for path in paths {
            assert!(root().join(path).exists(), "{document} names the missing path {path}");
        }
    }
}

/// Returns the folders of the crates under `host/`, relative to the root. The binary's package is `host` itself.
fn crates() -> Vec<PathBuf> {
    let sources = host_sources().into_iter().map(|(path, _)| path);
    let libraries = sources.filter(|path| path.ends_with("src/lib.rs"));
    let crates = libraries.filter_map(|path| Some(path.parent()?.parent()?.to_owned()));
    crates.filter(|folder| root().join(folder).join("Cargo.toml").exists()).collect()
}

/// A crate counts as named if its folder is named, or a path in that folder.
#[test]
fn every_crate_of_the_host_is_named() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("the map");
    let crates = crates();
    assert!(crates.len() > 20, "{} crates", crates.len());
    for folder in crates {
        let folder = folder.display();
        let names = [format!("`{folder}`"), format!("`{folder}/")];
        assert!(names.iter().any(|name| map.contains(name)), "ARCHITECTURE.md lacks {folder}");
    }
}

/// Each crate includes files of other folders in one module only. So whoever moves a file finds every place that must
/// follow.
#[test]
fn only_modules_of_assets_include_files() {
    let macros = ["include_str", "include_bytes"].map(|name| format!("{name}!"));
    let (mut assets, mut others) = (Vec::new(), Vec::new());
    for (path, text) in host_sources() {
        // The compiler does not read paths in comments.
        let mut lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        if lines.any(|line| macros.iter().any(|name| line.contains(name.as_str()))) {
            match path.file_name() == Some("assets.rs".as_ref()) {
                true => assets.push(path),
                false => others.push(path),
            }
        }
    }
    assert!(others.is_empty(), "expected them in the assets.rs of their crate, found {others:?}");
    assets.sort();
    let folders: Vec<&Path> = assets.iter().filter_map(|path| path.parent()).collect();
    let expected = [
        "host/cli/src",
        "host/engine/src",
        "host/state/src",
        "host/tests/it",
        "host/workbench/src",
    ];
    assert_eq!(folders, expected.map(Path::new), "one per crate");
}
