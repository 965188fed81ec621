//! `cargo xtask words`: words of the old dialect that are left, and public types that share a name.
//!
//! `xtask/words.toml` has the patterns, each with exceptions and with words to write in their place. Much text was
//! written before there was a list. `xtask/words-left.toml` therefore counts the matches that are left, per file and
//! pattern. `cargo xtask test` fails on a count that rose, and on one that fell without its line there: a count may
//! only fall, and stays as low as it once was.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;

use crate::process::project_root;

const LIST: &str = "xtask/words.toml";
const LEFT: &str = "xtask/words-left.toml";
/// Ends of the names of files that people read.
const READ_BY_PEOPLE: [&str; 14] = [
    ".rs", ".md", ".toml", ".wit", ".err", ".txt", ".py", ".go", ".c", ".h", ".js", ".ts",
    ".console", ".html",
];
/// Files that are not searched: the lists of words themselves, past changes, and texts of other authors.
const NOT_SEARCHED: [&str; 6] =
    [LIST, LEFT, "xtask/src/words.rs", "CHANGELOG.md", "LICENSE-", "fuzz/corpus/"];

/// List words that a stranger would not understand, and public types that share a name.
#[derive(clap::Args)]
pub struct Words {
    /// Write lower counts to xtask/words-left.toml. Higher ones stay an error.
    #[arg(long)]
    lower: bool,
}

impl Words {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        let root = project_root();
        let list = List::read(&root)?;
        let found = list.search(&root)?;
        if self.lower {
            let left = Counts::read(&root)?;
            let rises = rises(&found, &left);
            // The first list is written as a whole.
            ensure!(left.0.is_empty() || rises.is_empty(), "{}", rises.join("\n"));
            std::fs::write(root.join(LEFT), Counts::of(&found).written())
                .with_context(|| format!("failed to write {LEFT}"))?;
            return Ok(());
        }
        for (file, matches) in &found {
            for it in matches {
                eprintln!("{file}:{}: {}: {}", it.line, it.pattern, it.text);
            }
        }
        check(&root)
    }
}

/// Checks that no count of a file rose or fell without its line in the list, and the names of public types.
pub fn check(root: &Path) -> Result<()> {
    let list = List::read(root)?;
    let found = list.search(root)?;
    let left = Counts::read(root)?;
    let mut problems = rises(&found, &left);
    if problems.is_empty() && Counts::of(&found) != left {
        problems.push(format!(
            "{LEFT}: expected the counts as they are, found higher ones; run `cargo xtask words --lower`"
        ));
    }
    problems.extend(list.same_names(&public_types(root)?));
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

/// The patterns as they are written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    pattern: Vec<Pattern>,
    /// Names that several public types may have, each with the reason.
    same_names: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pattern {
    name: String,
    regex: String,
    #[serde(default)]
    except: Vec<String>,
    /// Advice: words in its place.
    write: String,
}

/// A match of a pattern in a file.
struct Match {
    pattern: String,
    write: String,
    /// From 1.
    line: usize,
    /// The line without space around it.
    text: String,
}

/// Matches per file, in the order of its lines.
type Found = BTreeMap<String, Vec<Match>>;

impl List {
    fn read(root: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(root.join(LIST))
            .with_context(|| format!("failed to read {LIST}"))?;
        toml::from_str(&text).with_context(|| format!("failed to read {LIST}"))
    }

    fn search(&self, root: &Path) -> Result<Found> {
        let patterns = self.compile()?;
        let mut found = Found::new();
        for file in files(root)? {
            // A file that was removed and not yet committed is still listed.
            let Ok(text) = std::fs::read_to_string(root.join(&file)) else { continue };
            let matches = search_text(&patterns, &text);
            if !matches.is_empty() {
                found.insert(file, matches);
            }
        }
        Ok(found)
    }

    fn compile(&self) -> Result<Vec<Compiled<'_>>> {
        let compile = |regex: &String| {
            let built = RegexBuilder::new(regex).case_insensitive(true).build();
            built.with_context(|| format!("{LIST}: invalid regex {regex:?}"))
        };
        self.pattern
            .iter()
            .map(|pattern| {
                let except = pattern.except.iter().map(compile).collect::<Result<_>>()?;
                Ok(Compiled { pattern, regex: compile(&pattern.regex)?, except })
            })
            .collect()
    }

    /// A line for each name that several public types have without a reason, and for each reason that nothing needs.
    fn same_names(&self, types: &BTreeMap<String, Vec<String>>) -> Vec<String> {
        let several = |name: &str| types.get(name).is_some_and(|places| places.len() > 1);
        let mut problems = Vec::new();
        for (name, places) in types.iter().filter(|(name, _)| several(name)) {
            if !self.same_names.contains_key(name) {
                problems.push(format!(
                    "expected one public type named {name}, found {}; rename one, or add `{name} = \"the reason\"` to \
                     [same_names] in {LIST}",
                    places.join(" and ")
                ));
            }
        }
        for name in self.same_names.keys().filter(|name| !several(name)) {
            problems.push(format!(
                "{LIST}: [same_names]: expected several public types named {name}, found fewer; remove the line"
            ));
        }
        problems
    }
}

struct Compiled<'a> {
    pattern: &'a Pattern,
    regex: Regex,
    except: Vec<Regex>,
}

fn search_text(patterns: &[Compiled<'_>], text: &str) -> Vec<Match> {
    let mut matches = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        for Compiled { pattern, regex, except } in patterns {
            let excepted: Vec<Range<usize>> = except
                .iter()
                .flat_map(|except| except.find_iter(text).map(|found| found.range()))
                .collect();
            for found in regex.find_iter(text) {
                if !excepted.iter().any(|it| it.start <= found.start() && found.end() <= it.end) {
                    matches.push(Match {
                        pattern: pattern.name.clone(),
                        write: pattern.write.clone(),
                        line,
                        text: text.trim().to_owned(),
                    });
                }
            }
        }
    }
    matches
}

/// The files that are searched, relative to the root.
fn files(root: &Path) -> Result<Vec<String>> {
    // What is not committed yet counts too, and what is ignored does not.
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("failed to run git, which lists the files of the project")?;
    ensure!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr).trim());
    let files = String::from_utf8(listed.stdout).context("expected names of files in UTF-8")?;
    let is_searched = |file: &&str| {
        READ_BY_PEOPLE.iter().any(|end| file.ends_with(end))
            && !NOT_SEARCHED.iter().any(|start| file.starts_with(start))
    };
    let files: Vec<String> = files.split('\0').filter(is_searched).map(str::to_owned).collect();
    if files.is_empty() {
        bail!("expected files of the project in {}, found none", root.display());
    }
    Ok(files)
}

/// How often each pattern may still match, per file.
#[derive(Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
struct Counts(BTreeMap<String, BTreeMap<String, usize>>);

impl Counts {
    fn read(root: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(root.join(LEFT))
            .with_context(|| format!("failed to read {LEFT}"))?;
        toml::from_str(&text).with_context(|| format!("failed to read {LEFT}"))
    }

    fn of(found: &Found) -> Self {
        let mut counts = Self::default();
        for (file, matches) in found {
            let file = counts.0.entry(file.clone()).or_default();
            for it in matches {
                *file.entry(it.pattern.clone()).or_default() += 1;
            }
        }
        counts
    }

    fn get(&self, file: &str, pattern: &str) -> usize {
        self.0.get(file).and_then(|counts| counts.get(pattern)).copied().unwrap_or(0)
    }

    /// The text of the file, a line for each file of the project.
    fn written(&self) -> String {
        let mut text = String::from(
            "# Matches of the patterns of words.toml that are left, per file. They may only fall:\n\
             # `cargo xtask words --lower` writes this file.\n",
        );
        for (file, counts) in &self.0 {
            let counts: Vec<_> =
                counts.iter().map(|(pattern, count)| format!("{pattern:?} = {count}")).collect();
            // Writing to a String cannot fail.
            _ = writeln!(text, "{file:?} = {{ {} }}", counts.join(", "));
        }
        text
    }
}

/// The matches of files in which there are more of a pattern than may be left.
fn rises(found: &Found, left: &Counts) -> Vec<String> {
    let mut problems = Vec::new();
    for (file, counts) in &Counts::of(found).0 {
        for (pattern, count) in counts {
            let allowed = left.get(file, pattern);
            if *count <= allowed {
                continue;
            }
            problems
                .push(format!("{file}: expected at most {allowed} of {pattern:?}, found {count}:"));
            let matches = found.get(file).into_iter().flatten();
            for it in matches.filter(|it| it.pattern == *pattern) {
                problems.push(format!(
                    "    {file}:{}: {}\n        write {}",
                    it.line, it.text, it.write
                ));
            }
        }
    }
    problems
}

/// Where each public type of the host is declared, by its name.
fn public_types(root: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let item = Regex::new(r"^\s*pub (?:unsafe )?(?:struct|enum|trait|type|union) ([A-Z]\w*)")?;
    let mut types = BTreeMap::<String, Vec<String>>::new();
    for file in files(root)? {
        // Tests share no names with what others read, and templates are projects of their own.
        let is_of_the_host =
            file.starts_with("host/") && file.contains("/src/") && file.ends_with(".rs");
        if !is_of_the_host || file.contains("/templates/") {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else { continue };
        for (number, line) in (1..).zip(text.lines()) {
            if let Some(found) = item.captures(line) {
                types.entry(found[1].to_owned()).or_default().push(format!("{file}:{number}"));
            }
        }
    }
    Ok(types)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(text: &str) -> Vec<(String, usize)> {
        let list = List::read(&project_root()).expect("the list");
        let patterns = list.compile().expect("its patterns");
        search_text(&patterns, text).into_iter().map(|it| (it.pattern, it.line)).collect()
    }

    #[test]
    fn each_pattern_finds_what_it_names_and_no_english() {
        for (text, expected) in [
            ("this is no number", Some("is no X")),
            ("There is no number, and it is no longer than that", None),
            ("a text is due", Some("due")),
            ("a failure due to the network", None),
            ("/// What a sink writes.", Some("a doc that begins with What")),
            ("    //! What it is.", Some("a doc that begins with What")),
            ("/// Says what a sink writes.", None),
            ("the lane is told so", Some("tell, told")),
            ("they cannot be told apart", None),
            ("the lane behind it", Some("behind")),
            ("the reader lags behind", None),
            ("a session behind a pooler", None),
            ("it begins anew", Some("anew, of late, so many")),
            ("by key, where rows find their like", Some("their like")),
            ("should that fail, it ends", Some("a riddle")),
            ("the letter is kept", Some("letter")),
            ("the dead letter is kept", None),
            ("letters, digits and underscores", None),
            ("the generation before", Some("generation")),
            ("a rhythm of commits", Some("parcel, rhythm")),
            ("the guilty record", Some("guilty, accused, bad one")),
            ("proven by a test", Some("proven")),
            ("a misdeed", Some("misdeed, rig, nosy")),
            ("right", None),
            ("it takes over", Some("take over")),
            ("it settles", Some("settle")),
        ] {
            let found = matched(text);
            let found: Vec<&str> = found.iter().map(|(pattern, _)| pattern.as_str()).collect();
            assert_eq!(found, Vec::from_iter(expected), "{text}");
        }
    }

    #[test]
    fn matches_are_counted_with_their_lines() {
        let found = matched("one\nis no two and is no three\nis due");
        assert_eq!(
            found,
            [("is no X".to_owned(), 2), ("is no X".to_owned(), 2), ("due".to_owned(), 3)]
        );
    }

    fn found(count: usize) -> Found {
        let one = |_| Match {
            pattern: "due".to_owned(),
            write: "expected".to_owned(),
            line: 1,
            text: "is due".to_owned(),
        };
        Found::from([("a.rs".to_owned(), (0..count).map(one).collect())])
    }

    #[test]
    fn a_count_may_only_fall() {
        let left = Counts::of(&found(2));
        assert!(rises(&found(1), &left).is_empty());
        assert!(rises(&found(2), &left).is_empty());
        let rises = rises(&found(3), &left);
        assert_eq!(rises[0], "a.rs: expected at most 2 of \"due\", found 3:");
        assert_eq!(rises.len(), 4, "{rises:?}");
    }

    #[test]
    fn written_counts_are_read_as_they_were() {
        let counts = Counts::of(&found(2));
        let read: Counts = toml::from_str(&counts.written()).expect("a list");
        assert!(read == counts);
    }

    #[test]
    fn a_name_of_two_types_needs_a_reason_and_a_reason_two_types() {
        let list = |names: &[&str]| List {
            pattern: Vec::new(),
            same_names: names.iter().map(|name| (String::from(*name), String::new())).collect(),
        };
        let place = |name: &str| format!("host/core/src/{name}.rs:1");
        let types = BTreeMap::from([
            ("Settings".to_owned(), vec![place("a"), place("b")]),
            ("Row".to_owned(), vec![place("a")]),
        ]);
        assert!(list(&["Settings"]).same_names(&types).is_empty());
        assert_eq!(list(&[]).same_names(&types).len(), 1);
        assert_eq!(list(&["Settings", "Row"]).same_names(&types).len(), 1);
    }
}
