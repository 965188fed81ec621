//! ARCHITECTURE.md and README.md are true: every path that they name exists, and every module of the host is
//! named.

use std::path::Path;

/// Texts in backquotes that look like paths of the repository.
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

/// All Rust files below a folder, in one text.
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

/// The last column of the invariants names a test each.
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
        assert!(is_there, "ARCHITECTURE.md names the test {name}, which is not there");
    }
}

#[test]
fn every_path_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
    for document in ["ARCHITECTURE.md", "README.md"] {
        let text = std::fs::read_to_string(root.join(document)).expect(document);
        let paths = paths(&text);
        assert!(paths.len() > 3, "{document} names {} paths", paths.len());
        for path in paths {
            assert!(root.join(path).exists(), "{document} names {path}, which is not there");
        }
    }
}

/// A module is named by its file, its folder, or a file in that.
#[test]
fn every_module_of_the_host_is_named() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = std::fs::read_to_string(host.join("../ARCHITECTURE.md")).expect("the map");
    let library = std::fs::read_to_string(host.join("src/lib.rs")).expect("the library");
    let modules = library.lines().filter_map(|line| {
        line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ")?.strip_suffix(';')
    });
    let modules: Vec<&str> = modules.collect();
    assert!(modules.len() > 20, "{} modules", modules.len());
    for module in modules {
        let names = [format!("`host/src/{module}.rs`"), format!("`host/src/{module}/")];
        assert!(names.iter().any(|name| map.contains(name)), "ARCHITECTURE.md: no {module}");
    }
}
