//! ARCHITECTURE.md and README.md are true: every path that they name exists.

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
