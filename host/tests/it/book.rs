//! Checks that the plugin book is true: its terminal sessions are replayed, its pipelines are parsed, and its code
//! belongs to plugins that `languages.rs` builds and runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{output, root, with_tools};
use shardmill_cli::registry::SINK_TYPES;
use snapbox::Assert;

/// Replays a terminal session: `$` begins a command, and the lines after it are the expected output. `[..]` matches
/// any text, `...` matches any lines.
macro_rules! sessions {
    ($($test:ident: $session:literal;)+) => {
        const SESSIONS: &[&str] = &[$($session),+];
        $(#[test] fn $test() { repeat($session); })+
    };
}

sessions! {
    session_capabilities: "capabilities";
    session_changing: "changing";
    session_dead_letters: "dead-letters";
    session_first_plugin: "first-plugin";
    session_limits: "limits";
    session_testing: "testing";
    session_typed: "typed";
    session_validating: "validating";
}

fn repeat(session: &str) {
    let place = tempfile::tempdir().expect("a folder");
    let mut folder = place.path().to_owned();
    let text = std::fs::read_to_string(docs().join("sessions").join(format!("{session}.console")));
    for (command, expected) in steps(&text.expect("a session")) {
        if let Some(into) = command.strip_prefix("cd ") {
            folder.push(into);
            continue;
        }
        let mut shell = Command::new("sh");
        with_tools(shell.args(["-c", &format!("{command} 2>&1")]).current_dir(&folder));
        let said = output(&mut shell);
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let compare = Assert::new().normalize_paths(false);
        compare.eq(format!("$ {command}\n{said}"), format!("$ {command}\n{expected}"));
    }
}

/// Returns the commands of a session, each with its expected output. Lines that begin with `# ANCHOR` are only for
/// the book and are skipped.
fn steps(session: &str) -> Vec<(String, String)> {
    let mut steps: Vec<(String, String)> = Vec::new();
    for line in session.lines().filter(|line| !line.starts_with("# ANCHOR")) {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => steps.push((command.to_owned(), String::new())),
            (None, Some((_, expected))) => expected.extend([line, "\n"]),
            (None, None) => panic!("a session begins with a command, not {line:?}"),
        }
    }
    steps
}

#[test]
fn every_session_is_repeated() {
    let files = std::fs::read_dir(docs().join("sessions")).expect("sessions").flatten();
    let files = files.map(|file| file.path().file_stem().expect("a name").to_owned());
    let files: BTreeSet<String> = files.map(|name| name.to_string_lossy().into_owned()).collect();
    assert_eq!(files, SESSIONS.iter().map(|name| (*name).to_owned()).collect());
}

#[test]
fn every_pipeline_is_sound() {
    let pipelines = std::fs::read_dir(docs().join("pipelines")).expect("pipelines").flatten();
    let mut read = 0;
    for pipeline in pipelines {
        let text = std::fs::read_to_string(pipeline.path()).expect("a pipeline");
        let parsed = shardmill_config::parse(pipeline.path(), &text, &SINK_TYPES, &|_| None);
        parsed.unwrap_or_else(|error| panic!("{}", error.render(false)));
        read += 1;
    }
    assert!(read >= 5, "{read} pipelines");
}

/// Folders from which the book may include snippets: each is tested, as the comment on its line says.
const TESTED: [&str; 8] = [
    "docs/sessions/",            // replayed above
    "docs/pipelines/",           // parsed above
    "docs/sql/",                 // run by `walls/dead_letters/copies.rs`
    "examples/plugin-",          // built, tested and run by `languages.rs`
    "host/tests/asking",         // built and run by `languages.rs`
    "host/workbench/templates/", // each is built by `languages.rs`, as a newcomer would
    "wit/",                      // every plugin of these tests is built from it
    "pipeline.toml",             // parsed by `config.rs`
];

#[test]
fn every_snippet_is_part_of_something_tested() {
    let mut snippets = 0;
    for (chapter, text) in chapters() {
        let mut fences = text.split("```");
        fences.next();
        for fenced in fences.step_by(2) {
            let (language, body) = fenced.split_once('\n').expect("a line");
            if language == "text" {
                continue; // A diagram, not a snippet.
            }
            for line in body.lines().filter(|line| !line.trim().is_empty()) {
                let included = line.trim().strip_prefix("{{#include ../../");
                let included = included.and_then(|rest| rest.strip_suffix("}}"));
                // Paths in `docs` are relative to that folder.
                let in_docs = line.trim().strip_prefix("{{#include ../");
                let in_docs = in_docs.and_then(|rest| rest.strip_suffix("}}"));
                let target = match (included, in_docs) {
                    (Some(target), _) => target.to_owned(),
                    (None, Some(target)) => format!("docs/{target}"),
                    (None, None) => panic!("{chapter}: {line:?} is not from a tested folder"),
                };
                let is_tested = TESTED.iter().any(|tested| target.starts_with(tested));
                assert!(is_tested, "{chapter}: {target} is not tested");
                assert_included(&chapter, &target);
                snippets += 1;
            }
        }
    }
    assert!(snippets > 30, "{snippets} snippets");
}

/// Asserts that an included file exists and has the named anchor.
fn assert_included(chapter: &str, target: &str) {
    let (file, anchor) = target.split_once(':').unwrap_or((target, ""));
    let text = std::fs::read_to_string(root().join(file));
    let text = text.unwrap_or_else(|error| panic!("{chapter}: {file}: {error}"));
    let anchored = anchor.is_empty() || text.contains(&format!("ANCHOR: {anchor}\n"));
    assert!(anchored, "{chapter}: {file} has no anchor {anchor}");
}

#[test]
fn every_link_leads_somewhere_and_every_chapter_is_listed() {
    let summary = std::fs::read_to_string(docs().join("src/SUMMARY.md")).expect("a summary");
    for (chapter, text) in chapters() {
        let listed = chapter == "SUMMARY.md" || summary.contains(&format!("({chapter})"));
        assert!(listed, "{chapter} is not in the summary");
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.starts_with("http")) {
            let file = link.split('#').next().expect("a name");
            assert!(docs().join("src").join(file).exists(), "{chapter}: {link}");
        }
    }
}

/// Set `SHARDMILL_UPDATE_GOLDEN=1` to write the page.
#[test]
fn the_page_of_metrics_is_what_the_code_says() {
    let page = docs().join("src/metrics.md");
    let reference = shardmill_core::metric::reference();
    if std::env::var_os("SHARDMILL_UPDATE_GOLDEN").is_some() {
        std::fs::write(&page, &reference).expect("a writable page");
    }
    let found = std::fs::read_to_string(&page).expect("the page");
    assert!(found == reference, "docs/src/metrics.md differs from the code:\n{reference}");
}

/// Returns the names and texts of the book's chapters.
fn chapters() -> Vec<(String, String)> {
    let files = std::fs::read_dir(docs().join("src")).expect("chapters").flatten();
    let files = files.filter(|file| file.path().extension().is_some_and(|name| name == "md"));
    let read = |path: &Path| std::fs::read_to_string(path).expect("a chapter");
    files
        .map(|file| (file.file_name().to_string_lossy().into_owned(), read(&file.path())))
        .collect()
}

fn docs() -> PathBuf {
    root().join("docs")
}

/// Set `SHARDMILL_UPDATE_GOLDEN=1` to write the page.
#[test]
fn the_reference_of_sinks_is_what_the_types_say() {
    let page = docs().join("src/sink-types.md");
    let reference = SINK_TYPES.reference();
    if std::env::var_os("SHARDMILL_UPDATE_GOLDEN").is_some() {
        std::fs::write(&page, &reference).expect("a writable page");
    }
    let found = std::fs::read_to_string(&page).expect("the page");
    assert!(
        found == reference,
        "docs/src/sink-types.md is not what the sink types say:\n{reference}"
    );
}
