//! The book's page on security: existing tests show each wall that it names.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{host_sources, root};

/// Heading of the table's column that names tests.
const SHOWN_BY: &str = "shown by";

/// Returns the tests that a table's row names, for each row about a wall.
fn rows(page: &str) -> Vec<(String, Vec<String>)> {
    let mut rows = Vec::new();
    let mut column = None;
    for line in page.lines() {
        if !line.starts_with('|') {
            column = None;
            continue;
        }
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        match column {
            None => column = Some(cells.iter().position(|cell| *cell == SHOWN_BY)),
            Some(Some(place)) if !line.starts_with("|-") => {
                let tests = cells.get(place).copied().unwrap_or_default().split('`');
                let tests = tests.skip(1).step_by(2).map(str::to_owned).collect();
                rows.push((cells[0].to_owned(), tests));
            }
            Some(_) => {}
        }
    }
    rows
}

fn sources(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(fs::read_to_string(&path).expect("a source"));
        }
    }
}

fn page() -> String {
    fs::read_to_string(root().join("docs/src/security.md")).expect("the page")
}

/// Whether a source has a test of this name: a function below a test attribute.
fn is_test_in(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let begins = [format!("fn {name}("), format!("async fn {name}(")];
    lines.iter().enumerate().any(|(place, line)| {
        let attributes =
            lines[..place].iter().rev().take_while(|before| before.starts_with(['#', '/']));
        begins.iter().any(|begin| line.starts_with(begin.as_str()))
            && attributes.into_iter().any(|line| {
                line.starts_with("#[test]") || (line.starts_with("#[") && line.contains("::test"))
            })
    })
}

#[test]
fn wall_21_each_wall_is_shown_by_tests_that_exist() {
    let mut code: Vec<String> = host_sources().into_iter().map(|(_, text)| text).collect();
    for folder in ["xtask/src", "fuzz/src"] {
        sources(&root().join(folder), &mut code);
    }
    let rows = rows(&page());
    assert!(rows.len() > 30, "{} walls", rows.len());
    let mut missing = Vec::new();
    for (wall, tests) in rows {
        assert!(!tests.is_empty(), "no test for: {wall}");
        missing.extend(
            tests.into_iter().filter(|test| !code.iter().any(|code| is_test_in(code, test))),
        );
    }
    assert!(missing.is_empty(), "security.md names missing tests: {missing:?}");
}

#[test]
fn wall_21_the_page_is_found() {
    let summary = fs::read_to_string(root().join("docs/src/SUMMARY.md")).expect("the summary");
    assert!(summary.contains("(security.md)"));
    let policy = fs::read_to_string(root().join("SECURITY.md")).expect("SECURITY.md");
    assert!(policy.contains("docs/src/security.md"));
    let page = page();
    for heading in ["## Who is trusted with what", "## What is not promised"] {
        assert!(page.contains(heading), "{heading}");
    }
}

#[test]
fn a_row_without_a_test_is_found() {
    let page = "| who | what |\n|---|---|\n| a | b |\n\n| wall | shown by |\n|---|---|\n| a | `t1`, `t2` |\n| b | |\n";
    let expected = [("a".to_owned(), vec!["t1".into(), "t2".into()]), ("b".to_owned(), vec![])];
    assert_eq!(rows(page), expected);
    assert!(is_test_in("#[test]\n    fn t1() {", "t1"));
    assert!(is_test_in("#[tokio::test]\n// Why.\nasync fn t1() {", "t1"));
    assert!(!is_test_in("fn t1() {", "t1"), "a helper is not a test");
    assert!(!is_test_in("#[cfg(test)]\nfn t1() {", "t1"), "neither is one for tests alone");
}

/// Every file of a corpus is small: nobody would read a large one.
#[test]
fn wall_20_corpora_are_small() {
    let corpora = root().join("fuzz/corpus");
    let (mut files, mut bytes): (Vec<PathBuf>, u64) = (Vec::new(), 0);
    for target in fs::read_dir(corpora).expect("corpora").flatten() {
        for file in fs::read_dir(target.path()).expect("a corpus").flatten() {
            let length = file.metadata().expect("a file").len();
            assert!(length <= 4 << 10, "{} has {length} bytes", file.path().display());
            bytes += length;
            files.push(file.path());
        }
    }
    assert!(files.len() > 30 && bytes < 256 << 10, "{} files of {bytes} bytes", files.len());
}
