//! `cargo xtask graph`: which module or crate uses which, from those that use none upwards.
//!
//! The crates of the workspace are asked of cargo, the modules of a crate's top level are read from its sources: paths
//! that begin with `crate::`. Modules of tests are left out, as they may look at everything. An arrow that closes a
//! circle is an error, with the files that it is in; `cargo xtask test` looks for one, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use crate::process::{packages, project_root};

/// Show which module or crate uses which, and fail on a circle.
#[derive(clap::Args)]
pub struct Graph {}

/// Who uses whom, and the files that say so.
#[derive(Debug, Default)]
struct Uses {
    /// Everybody, with whom they use.
    of: BTreeMap<String, BTreeMap<String, BTreeSet<PathBuf>>>,
}

impl Graph {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        for (title, uses) in graphs(&root)? {
            eprintln!("{title}\n{}", uses.shown());
        }
        check(&root)
    }
}

/// Checks that there is no circle.
pub fn check(root: &Path) -> Result<()> {
    let circles: Vec<String> = graphs(root)?
        .iter()
        .filter_map(|(title, uses)| Some(format!("{title}: {}", uses.circle()?)))
        .collect();
    match circles.is_empty() {
        true => Ok(()),
        false => bail!("arrows point both ways:\n{}", circles.join("\n")),
    }
}

/// The crates of the workspace, and the modules of each.
fn graphs(root: &Path) -> Result<Vec<(String, Uses)>> {
    let packages = packages(root)?;
    let name =
        |package: &serde_json::Value| package["name"].as_str().unwrap_or_default().to_owned();
    let own: BTreeSet<String> = packages.iter().map(name).collect();
    let mut crates = Uses::default();
    let mut graphs = Vec::new();
    for package in &packages {
        let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
        let (user, used) = (name(package), package["dependencies"].as_array());
        crates.of.entry(user.clone()).or_default();
        for dependency in used.into_iter().flatten() {
            // Tests may use crates above.
            if dependency["kind"].is_null() && own.contains(&name(dependency)) {
                crates.add(&user, &name(dependency), &manifest);
            }
        }
        let sources = manifest.parent().context("a folder")?.join("src");
        if sources.join("lib.rs").exists() {
            let modules = modules(&sources).with_context(|| format!("the modules of {user}"))?;
            graphs.push((format!("modules of {user}"), modules));
        }
    }
    graphs.insert(0, ("crates".into(), crates));
    Ok(graphs)
}

/// The modules of a crate's top level.
fn modules(sources: &Path) -> Result<Uses> {
    let mut uses = Uses::default();
    let mut files = Vec::new();
    let mut folders = vec![sources.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let module = |file: &Path| -> Option<String> {
        let first = file.strip_prefix(sources).ok()?.components().next()?;
        Some(Path::new(first.as_os_str()).file_stem()?.to_str()?.to_owned())
    };
    let names: BTreeSet<String> = files.iter().filter_map(|file| module(file)).collect();
    for file in &files {
        let Some(user) = module(file).filter(|name| !["lib", "main"].contains(&name.as_str()))
        else {
            continue;
        };
        uses.of.entry(user.clone()).or_default();
        // Tests in a file of their own.
        if file.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests")) {
            continue;
        }
        let text = std::fs::read_to_string(file)?;
        let tokens = text.parse::<TokenStream>();
        let tokens = tokens.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
        let mut used = BTreeSet::new();
        collect(tokens, &mut used);
        for used in used.intersection(&names).filter(|used| **used != user) {
            uses.add(&user, used, file);
        }
    }
    Ok(uses)
}

/// Collects the first names behind `crate::`, but for those in modules of tests.
fn collect(tokens: TokenStream, used: &mut BTreeSet<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let is_word =
        |at: usize, word: &str| matches!(tokens.get(at), Some(TokenTree::Ident(it)) if *it == word);
    let is_mark = |at: usize, mark: char| matches!(tokens.get(at), Some(TokenTree::Punct(it)) if it.as_char() == mark);
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        match token {
            // `#[cfg(test)] mod tests { … }`
            TokenTree::Punct(it) if it.as_char() == '#' && is_of_tests(tokens.get(at + 1)) => {
                at += 2;
                while at < tokens.len() && !is_mark(at, ';') {
                    let is_body = matches!(&tokens[at], TokenTree::Group(it) if it.delimiter() == Delimiter::Brace);
                    at += 1;
                    if is_body {
                        break;
                    }
                }
                continue;
            }
            TokenTree::Ident(it)
                if *it == "crate" && is_mark(at + 1, ':') && is_mark(at + 2, ':') =>
            {
                // `pub(in crate::a)` is no use.
                if at > 0 && is_word(at - 1, "in") {
                    at += 3;
                    continue;
                }
                match tokens.get(at + 3) {
                    Some(TokenTree::Ident(name)) => {
                        used.insert(name.to_string());
                    }
                    Some(TokenTree::Group(group)) => used.extend(first_names(group.stream())),
                    _ => {}
                }
                at += 3;
                continue;
            }
            TokenTree::Group(group) => collect(group.stream(), used),
            _ => {}
        }
        at += 1;
    }
}

/// The first names of the paths in a group of uses: `{a, b::c, d::{e, f}}`.
fn first_names(tokens: TokenStream) -> Vec<String> {
    let mut names = Vec::new();
    let mut begins = true;
    for token in tokens {
        match token {
            TokenTree::Ident(name) if begins => {
                names.push(name.to_string());
                begins = false;
            }
            TokenTree::Punct(mark) if mark.as_char() == ',' => begins = true,
            _ => {}
        }
    }
    names
}

/// Whether an attribute is of tests or fuzzing alone.
fn is_of_tests(attribute: Option<&TokenTree>) -> bool {
    let Some(TokenTree::Group(group)) = attribute else { return false };
    let text: String = group.stream().to_string().split_whitespace().collect();
    ["cfg(test)", "cfg(any(test,fuzzing))"].contains(&text.as_str())
}

impl Uses {
    fn add(&mut self, user: &str, used: &str, file: &Path) {
        self.of.entry(used.to_owned()).or_default();
        let files = self.of.entry(user.to_owned()).or_default().entry(used.to_owned()).or_default();
        files.insert(file.to_owned());
    }

    fn graph(&self) -> DiGraphMap<&str, ()> {
        let mut graph = DiGraphMap::new();
        for (user, used) in &self.of {
            graph.add_node(user.as_str());
            for used in used.keys() {
                graph.add_edge(user.as_str(), used.as_str(), ());
            }
        }
        graph
    }

    /// A line each, those first that are used by the ones behind.
    fn shown(&self) -> String {
        let mut text = String::new();
        // Each group comes behind those that it uses.
        for user in tarjan_scc(&self.graph()).into_iter().flatten() {
            let used: Vec<&str> = self.of[user].keys().map(String::as_str).collect();
            let arrow = if used.is_empty() { "" } else { " → " };
            // Writing into a String cannot fail.
            let _ = writeln!(text, "  {user}{arrow}{}", used.join(", "));
        }
        text
    }

    /// The arrows between those that use each other; `None`: there are none.
    fn circle(&self) -> Option<String> {
        let circles = tarjan_scc(&self.graph());
        let circle = circles.into_iter().find(|group| group.len() > 1)?;
        let mut text = String::new();
        for user in &circle {
            for (used, files) in &self.of[*user] {
                if circle.contains(&used.as_str()) {
                    let files: Vec<String> =
                        files.iter().map(|file| file.display().to_string()).collect();
                    let _ = writeln!(text, "  {user} → {used} in {}", files.join(", "));
                }
            }
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_behind_crate_are_found_outside_of_tests() {
        let text = "use crate::a::{b, c}; use crate::{d, e::f, g::{h, i}}; fn x() { crate::j::k(crate::l) } \
                    /// `crate::no`\n pub(in crate::no) fn y() { \"crate::no\"; } \
                    #[cfg(test)] mod tests { use crate::no; } #[cfg(test)] use crate::no; use super::no; \
                    #[cfg(any(test, fuzzing))] pub mod fuzz { use crate::no; } #[cfg(unix)] use crate::m;";
        let mut used = BTreeSet::new();
        collect(text.parse().expect("Rust"), &mut used);
        let used: Vec<&str> = used.iter().map(String::as_str).collect();
        assert_eq!(used, ["a", "d", "e", "g", "j", "l", "m"]);
    }

    #[test]
    fn a_circle_is_named_with_its_files() {
        let mut uses = Uses::default();
        for (user, used) in [("a", "b"), ("b", "c")] {
            uses.add(user, used, Path::new("x.rs"));
        }
        assert_eq!(uses.circle(), None);
        assert_eq!(uses.shown(), "  c\n  b → c\n  a → b\n");
        uses.add("c", "a", Path::new("y.rs"));
        let circle = uses.circle().expect("a circle");
        assert!(circle.contains("c → a in y.rs") && circle.contains("a → b in x.rs"), "{circle}");
    }
}
