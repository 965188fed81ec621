//! Reads from the sources of a crate which of its top-level modules uses which.
//!
//! Modules are found as the compiler finds them, from the root file through `mod` declarations. A path is
//! followed to the top-level module that it leads to: through `crate::`, `super::` and `self::`, through
//! groups, in macros, and in strings of attributes (`#[serde(with = "super::text")]`). A name that the root
//! imports leads to the module that it comes from. Code that is compiled only for tests or fuzzing is left out,
//! because it may use everything.
//!
//! The root itself is not a module here: it re-exports items of its modules, and they may use what it defines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use proc_macro2::{Delimiter, Ident, TokenStream, TokenTree};

use super::uses::Uses;

/// Reads the modules of the crate with this root file, whose path is relative to `project`.
pub fn modules(project: &Path, root_file: &Path) -> Result<Uses> {
    let mut sources = Sources { project, modules: Vec::new(), macros: BTreeMap::new() };
    sources.file(&[], root_file)?;
    let Sources { modules, macros, .. } = sources;
    let root = Root::new(&modules, macros);
    let mut uses = Uses::default();
    for module in &modules {
        let Some(user) = module.path.first() else { continue };
        uses.add_user(user);
        let mut paths = Vec::new();
        collect_paths(&module.tokens, &mut paths);
        for used in paths.iter().flat_map(|path| root.lead_to(path, &module.path)) {
            if used != *user {
                uses.add(user, &used, &module.file);
            }
        }
    }
    Ok(uses)
}

/// One module: its path from the root (empty for the root), and its code without its inline modules.
struct Module {
    path: Vec<String>,
    file: PathBuf,
    tokens: Vec<TokenTree>,
}

/// All modules of a crate, as far as they have been found.
struct Sources<'a> {
    project: &'a Path,
    modules: Vec<Module>,
    /// Exported macros, which are names of the root, and the top-level modules that define them.
    macros: BTreeMap<String, Option<String>>,
}

impl Sources<'_> {
    fn file(&mut self, path: &[String], file: &Path) -> Result<()> {
        let text = std::fs::read_to_string(self.project.join(file))
            .with_context(|| format!("failed to read {}", file.display()))?;
        let tokens = text.parse::<TokenStream>();
        let tokens = tokens.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
        let folder = file.parent().context("expected a file in a folder")?;
        // `a.rs` has its modules in the folder `a`; the root and `mod.rs` have them in their own folder.
        let is_beside = path.is_empty() || file.file_stem().is_some_and(|stem| stem == "mod");
        let below = if is_beside { folder.to_owned() } else { file.with_extension("") };
        self.module(path, file, &below, without_tests(tokens))
    }

    fn module(
        &mut self,
        path: &[String],
        file: &Path,
        below: &Path,
        tokens: Vec<TokenTree>,
    ) -> Result<()> {
        let mut own = Vec::new();
        let mut found = Vec::new();
        let mut attributes = Vec::new();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let name = tokens.get(at + 1).map(ToString::to_string).unwrap_or_default();
            match (token, tokens.get(at + 2)) {
                (TokenTree::Punct(mark), _) if mark.as_char() == '#' => attributes.push(name),
                (TokenTree::Ident(word), Some(TokenTree::Group(body)))
                    if *word == "mod" && body.delimiter() == Delimiter::Brace =>
                {
                    found.push((name, Some(body.stream()), None));
                    attributes.clear();
                    at += 3;
                    continue;
                }
                (TokenTree::Ident(word), Some(TokenTree::Punct(end)))
                    if *word == "mod" && end.as_char() == ';' =>
                {
                    let at_path = attributes.iter().find_map(|it| path_of(it));
                    found.push((name, None, at_path));
                    attributes.clear();
                    at += 3;
                    continue;
                }
                // `macro_rules! name { … }`
                (TokenTree::Ident(word), Some(TokenTree::Ident(name)))
                    if *word == "macro_rules"
                        && attributes.iter().any(|it| it.contains("macro_export")) =>
                {
                    self.macros.insert(name.to_string(), path.first().cloned());
                }
                (TokenTree::Punct(mark), _) if mark.as_char() == ';' => attributes.clear(),
                (TokenTree::Group(body), _) if body.delimiter() == Delimiter::Brace => {
                    attributes.clear();
                }
                _ => {}
            }
            own.push(token.clone());
            at += 1;
        }
        self.modules.push(Module { path: path.to_vec(), file: file.to_owned(), tokens: own });
        for (name, body, at_path) in found {
            let path: Vec<String> = path.iter().cloned().chain([name.clone()]).collect();
            match (body, at_path) {
                (Some(body), _) => {
                    let tokens = body.into_iter().collect();
                    self.module(&path, file, &below.join(&name), tokens)?;
                }
                (None, Some(at_path)) => {
                    self.file(&path, &file.with_file_name("").join(at_path))?;
                }
                (None, None) => {
                    let files =
                        [below.join(format!("{name}.rs")), below.join(&name).join("mod.rs")];
                    let Some(file) = files.iter().find(|file| self.project.join(file).exists())
                    else {
                        bail!("expected the module {name} in {}, found no file", files[0].display())
                    };
                    self.file(&path, file)?;
                }
            }
        }
        Ok(())
    }
}

/// Returns the file of `[path = "…"]`.
fn path_of(attribute: &str) -> Option<String> {
    let (name, value) = attribute.trim_matches(['[', ']']).split_once('=')?;
    (name.trim() == "path").then(|| value.trim().trim_matches('"').to_owned())
}

/// Names in a crate's root, and the top-level modules that they lead to.
struct Root {
    modules: BTreeSet<String>,
    /// `None`: the name leads to no module, because the root defines it or imports it from another crate.
    names: BTreeMap<String, Option<String>>,
    /// Modules that are imported with `*`.
    globs: BTreeSet<String>,
}

impl Root {
    fn new(modules: &[Module], macros: BTreeMap<String, Option<String>>) -> Self {
        let tops = modules.iter().filter_map(|module| module.path.first().cloned());
        let mut root = Self { modules: tops.collect(), names: macros, globs: BTreeSet::new() };
        let mut paths = Vec::new();
        let tokens = modules.iter().filter(|module| module.path.is_empty());
        for module in tokens {
            collect_paths(&module.tokens, &mut paths);
        }
        let imports: Vec<UsedPath> = paths.into_iter().filter(|path| path.is_import).collect();
        // An import may use another one: `use self::a as b; use b::C;`.
        for _ in 0..=imports.len() {
            let before = root.names.clone();
            for import in &imports {
                let names = import
                    .names
                    .iter()
                    .skip_while(|name| ["crate", "self"].contains(&name.as_str()));
                let names: Vec<&String> = names.collect();
                let Some(first) = names.first() else { continue };
                let module = match root.modules.contains(*first) {
                    true => Some((*first).clone()),
                    false => root.names.get(*first).cloned().flatten(),
                };
                match (import.is_glob, module) {
                    (true, Some(module)) => {
                        root.globs.insert(module);
                    }
                    (true, None) => {}
                    (false, module) => {
                        let name =
                            import.alias.clone().or(names.last().map(|name| (*name).clone()));
                        // `use self::a;` names the module itself.
                        if let Some(name) = name.filter(|name| !root.modules.contains(name)) {
                            root.names.insert(name, module);
                        }
                    }
                }
            }
            if root.names == before {
                break;
            }
        }
        root
    }

    /// Returns the top-level modules that a path in a module leads to.
    fn lead_to(&self, path: &UsedPath, from: &[String]) -> Vec<String> {
        let mut depth = from.len();
        let mut names = path.names.iter().peekable();
        while let Some(name) = names.peek() {
            match name.as_str() {
                "crate" => depth = 0,
                "self" => {}
                "super" => depth = depth.saturating_sub(1),
                _ => break,
            }
            names.next();
        }
        let begins = path.names.first().map(String::as_str);
        if depth > 0 || !begins.is_some_and(|name| ["crate", "self", "super"].contains(&name)) {
            return Vec::new();
        }
        match names.next() {
            Some(name) if self.modules.contains(name) => vec![name.clone()],
            Some(name) => match self.names.get(name) {
                Some(module) => module.iter().cloned().collect(),
                // The root defines the name, or a module with a glob import has it: that cannot be decided
                // here.
                None => self.globs.iter().cloned().collect(),
            },
            // The root under another name, or everything in it: what its names lead to is not followed.
            None if path.is_import => self.modules.iter().cloned().collect(),
            None => Vec::new(),
        }
    }
}

/// A path in the code.
#[derive(Clone, Debug, PartialEq, Eq)]
struct UsedPath {
    names: Vec<String>,
    is_import: bool,
    alias: Option<String>,
    /// Whether it ends in `*`.
    is_glob: bool,
}

/// Collects imports, and all paths that begin with `crate`, `self` or `super`.
fn collect_paths(tokens: &[TokenTree], paths: &mut Vec<UsedPath>) {
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        match token {
            TokenTree::Punct(mark) if mark.as_char() == '#' => {
                // `#[…]` and `#![…]`
                let skipped = 1 + usize::from(is_mark(tokens.get(at + 1), '!'));
                if let Some(TokenTree::Group(group)) = tokens.get(at + skipped)
                    && group.delimiter() == Delimiter::Bracket
                {
                    collect_from_attribute(&group.stream(), paths);
                    at += skipped;
                }
            }
            TokenTree::Ident(word) if *word == "use" && !is_mark(tokens.get(at + 1), '<') => {
                let length = tokens[at..].iter().take_while(|it| !is_mark(Some(it), ';')).count();
                collect_imports(&tokens[at + 1..at + length], &[], paths);
                at += length;
            }
            TokenTree::Ident(word)
                if ["crate", "self", "super"].contains(&word.to_string().as_str())
                    && is_separator(tokens, at + 1)
                    // `pub(in crate::a)` is not a use.
                    && !(at > 0 && is_word(tokens.get(at - 1), "in")) =>
            {
                let mut names = vec![plain(word)];
                while is_separator(tokens, at + 1)
                    && let Some(TokenTree::Ident(name)) = tokens.get(at + 3)
                {
                    names.push(plain(name));
                    at += 3;
                }
                paths.push(UsedPath { names, is_import: false, alias: None, is_glob: false });
            }
            TokenTree::Group(group) => {
                let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
                collect_paths(&tokens, paths);
            }
            _ => {}
        }
        at += 1;
    }
}

/// Collects the paths of an import tree: `a::{b, c::{self, d as e}, f::*}`.
fn collect_imports(tree: &[TokenTree], prefix: &[String], paths: &mut Vec<UsedPath>) {
    for branch in tree.split(|token| is_mark(Some(token), ',')) {
        let mut path =
            UsedPath { names: prefix.to_vec(), is_import: true, alias: None, is_glob: false };
        let mut at = 0;
        let mut is_leaf = !branch.is_empty();
        while let Some(token) = branch.get(at) {
            match token {
                TokenTree::Ident(word) if *word == "as" => {
                    path.alias = branch.get(at + 1).map(ToString::to_string);
                    break;
                }
                // `a::{self}` is `a`.
                TokenTree::Ident(word) if *word == "self" && !path.names.is_empty() => {}
                TokenTree::Ident(word) => path.names.push(plain(word)),
                TokenTree::Punct(mark) if mark.as_char() == '*' => path.is_glob = true,
                TokenTree::Group(group) => {
                    let tree: Vec<TokenTree> = group.stream().into_iter().collect();
                    collect_imports(&tree, &path.names, paths);
                    is_leaf = false;
                }
                _ => {}
            }
            at += 1;
        }
        if is_leaf {
            paths.push(path);
        }
    }
}

/// Returns a name as in its `mod` declaration: `r#b` is `b`.
fn plain(word: &Ident) -> String {
    let word = word.to_string();
    word.strip_prefix("r#").map(str::to_owned).unwrap_or(word)
}

/// Collects the paths of an attribute and of the strings in it. Doc comments are attributes, too, and are left
/// out.
fn collect_from_attribute(attribute: &TokenStream, paths: &mut Vec<UsedPath>) {
    let tokens: Vec<TokenTree> = attribute.clone().into_iter().collect();
    if is_word(tokens.first(), "doc") {
        return;
    }
    collect_paths(&tokens, paths);
    for token in &tokens {
        match token {
            TokenTree::Group(group) => collect_from_attribute(&group.stream(), paths),
            TokenTree::Literal(literal) => {
                let text = literal.to_string();
                let raw = text.strip_prefix('r').map(|raw| raw.trim_matches('#'));
                let code = raw
                    .unwrap_or(&text)
                    .trim_matches('"')
                    .parse::<TokenStream>()
                    .unwrap_or_default();
                let code: Vec<TokenTree> = code.into_iter().collect();
                collect_paths(&code, paths);
            }
            _ => {}
        }
    }
}

/// Removes code that is compiled only for tests or fuzzing.
fn without_tests(tokens: TokenStream) -> Vec<TokenTree> {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        let is_attribute = is_mark(Some(token), '#');
        if is_attribute && is_mark(tokens.get(at + 1), '!') && is_of_tests(tokens.get(at + 2)) {
            // `#![cfg(test)]` applies to the whole module.
            return Vec::new();
        }
        if is_attribute && is_of_tests(tokens.get(at + 1)) {
            at = end_of_item(&tokens, at + 2);
            continue;
        }
        kept.push(match token {
            TokenTree::Group(group) => {
                let stream = without_tests(group.stream()).into_iter().collect();
                TokenTree::Group(proc_macro2::Group::new(group.delimiter(), stream))
            }
            other => other.clone(),
        });
        at += 1;
    }
    kept
}

/// Returns the index after the item, field, variant or statement that begins here.
fn end_of_item(tokens: &[TokenTree], mut at: usize) -> usize {
    // Skips further attributes and the visibility.
    loop {
        match tokens.get(at) {
            Some(TokenTree::Punct(mark)) if mark.as_char() == '#' => at += 2,
            Some(TokenTree::Ident(word)) if *word == "pub" => at += 1,
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis => at += 1,
            _ => break,
        }
    }
    const ITEMS: [&str; 15] = [
        "async",
        "const",
        "enum",
        "extern",
        "fn",
        "impl",
        "let",
        "macro_rules",
        "mod",
        "static",
        "struct",
        "trait",
        "type",
        "unsafe",
        "use",
    ];
    let is_item = ITEMS.iter().any(|word| is_word(tokens.get(at), word));
    // Braces in the value of one of these do not end it. Functions and blocks of foreign items may also begin
    // with `const`.
    let has_value =
        ["let", "static", "type", "use"].iter().any(|word| is_word(tokens.get(at), word))
            || is_word(tokens.get(at), "const")
                && !["async", "extern", "fn", "unsafe"]
                    .iter()
                    .any(|word| is_word(tokens.get(at + 1), word));
    let mut before = None;
    while let Some(token) = tokens.get(at) {
        at += 1;
        // `{N}` between `<` and `>` is an argument, not a body.
        let is_argument = is_mark(before, '<') || is_mark(before, ',');
        let is_braced =
            matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
        // A comma ends a field or a variant. In an item it may separate type parameters.
        let is_end = is_mark(Some(token), ';') || (!is_item && is_mark(Some(token), ','));
        if is_end || (is_braced && !is_argument && !has_value) {
            break;
        }
        before = Some(token);
    }
    at
}

/// Whether `[cfg(…)]` is false in every build without tests and fuzz targets.
fn is_of_tests(attribute: Option<&TokenTree>) -> bool {
    let Some(TokenTree::Group(group)) = attribute else { return false };
    let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
    match &tokens[..] {
        [TokenTree::Ident(word), TokenTree::Group(group)] if *word == "cfg" => {
            let condition: Vec<TokenTree> = group.stream().into_iter().collect();
            !Condition::of(&condition).is_possible
        }
        _ => false,
    }
}

/// Possible values of a `cfg` condition in a build without tests.
#[derive(Clone, Copy)]
struct Condition {
    is_possible: bool,
    is_certain: bool,
}

impl Condition {
    fn of(tokens: &[TokenTree]) -> Self {
        let (word, rest) = match tokens {
            [TokenTree::Ident(word), rest @ ..] => (word.to_string(), rest),
            _ => return Self { is_possible: true, is_certain: false },
        };
        let parts: Vec<Self> = match rest {
            [TokenTree::Group(group)] => {
                let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
                let parts = tokens.split(|token| is_mark(Some(token), ','));
                parts.filter(|part| !part.is_empty()).map(Self::of).collect()
            }
            _ => Vec::new(),
        };
        let value = rest.last().map(ToString::to_string).unwrap_or_default();
        match word.as_str() {
            "any" => Self {
                is_possible: parts.iter().any(|part| part.is_possible),
                is_certain: parts.iter().any(|part| part.is_certain),
            },
            "all" => Self {
                is_possible: parts.iter().all(|part| part.is_possible),
                is_certain: parts.iter().all(|part| part.is_certain),
            },
            "not" => Self {
                is_possible: !parts.iter().any(|part| part.is_certain),
                is_certain: !parts.iter().any(|part| part.is_possible),
            },
            "test" | "fuzzing" => Self { is_possible: false, is_certain: false },
            "feature" if value == "\"fuzzing\"" => Self { is_possible: false, is_certain: false },
            _ => Self { is_possible: true, is_certain: false },
        }
    }
}

fn is_mark(token: Option<&TokenTree>, mark: char) -> bool {
    matches!(token, Some(TokenTree::Punct(it)) if it.as_char() == mark)
}

fn is_word(token: Option<&TokenTree>, word: &str) -> bool {
    matches!(token, Some(TokenTree::Ident(it)) if *it == word)
}

/// Whether there is a `::` at this index.
fn is_separator(tokens: &[TokenTree], at: usize) -> bool {
    is_mark(tokens.get(at), ':') && is_mark(tokens.get(at + 1), ':')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the arrows of a crate with these files.
    fn arrows(files: &[(&str, &str)]) -> Vec<String> {
        uses(files).arrows().map(|(user, used)| format!("{user} → {used}")).collect()
    }

    fn uses(files: &[(&str, &str)]) -> Uses {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
            std::fs::write(file, text).expect("a file");
        }
        modules(folder.path(), Path::new("lib.rs")).expect("modules")
    }

    const ROOT: (&str, &str) = ("lib.rs", "mod a; mod b; mod c;");
    const B: (&str, &str) = ("b.rs", "pub struct B;");
    const C: (&str, &str) = ("c.rs", "");

    fn arrows_of(text: &str) -> Vec<String> {
        arrows(&[ROOT, ("a.rs", text), B, C])
    }

    #[test]
    fn all_ways_of_naming_a_module_are_followed() {
        for text in [
            "use crate::b;",
            "use crate::b::B;",
            "use super::b::{self, B};",
            "use crate::{b::B as D};",
            "use self::super::b::B;",
            "use {std::fmt, super::{b}};",
            "fn f() -> crate::b::B { loop {} }",
            "fn f() { crate::r#b::f() }",
            "use super::r#b::B;",
            "struct S { #[serde(with = r\"crate::b\")] c: u8 }",
            "struct S { #[serde(with = r#\"crate::b\"#)] c: u8 }",
            "fn f(of: &super::b::B) {}",
            "fn f() { g::<super::b::B>(); }",
            "mod deep { use super::super::b; }",
            "mod deep { mod deeper { fn f() { super::super::super::b::f(); } } }",
            "fn f() { println!(\"{}\", super::b::f()); }",
            "macro_rules! m { () => { $crate::b::f() } }",
            "#[serde(with = \"super::b\")] struct S;",
            "#[derive(crate::b::D)] struct S;",
            "impl crate::b::Trait for S {}",
        ] {
            assert_eq!(arrows_of(text), ["a → b"], "{text}");
        }
    }

    #[test]
    fn neither_texts_nor_a_modules_own_names_nor_its_tests_are_uses() {
        for text in [
            "/// [`crate::b`]\n fn f() {}",
            "fn f() { g(\"crate::b\"); }",
            "pub(in crate::b) fn f() {}",
            "use self::b::B; mod b { pub struct B; }",
            "mod deep { use super::b; } mod b {}",
            "fn f(self) -> Self { self.b() }",
            "use std::b::c; use other_crate::b;",
            "#[cfg(test)] mod tests { use crate::b; }",
            "#[cfg(test)] use crate::b::{B};",
            "#[cfg(test)] impl<const N: usize> T<u8, {N}> for S<{N}> { fn f() { crate::b::f() } }",
            "#[cfg(test)] static S: u8 = if true { 1 } else { crate::b::f() };",
            "#[cfg(test)] const S: u8 = if true { 1 } else { crate::b::f() };",
            "#[cfg(test)] const fn f() -> u8 { crate::b::f() }",
            "#[cfg(test)] const unsafe extern \"C\" fn f() { crate::b::f() }",
            "#[cfg(all(test, unix))] fn f<A, D>(b: crate::b::B) { crate::b::f() }",
            "#[cfg(any(test, feature = \"fuzzing\"))] pub mod fuzz { use crate::b; }",
            "struct S { #[cfg(test)] pub b: crate::b::B, c: u8 }",
            "#![cfg(test)] use crate::b;",
            "#[cfg(test)] mod tests;",
            "#[cfg(test)] #[path = \"a_tests.rs\"] mod tests;",
        ] {
            assert_eq!(arrows_of(text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn what_tests_share_with_the_rest_is_a_use() {
        for condition in ["not(test)", "any(test, unix)", "all(unix, not(fuzzing))", "unix"] {
            let text = format!("#[cfg({condition})] use crate::b;");
            assert_eq!(arrows_of(&text), ["a → b"], "{condition}");
        }
        // Only this item is left out, not the next one.
        assert_eq!(arrows_of("#[cfg(test)] const X: u8 = 1; use crate::b;"), ["a → b"]);
        assert_eq!(arrows_of("#[cfg(test)] const fn f() {} use crate::b;"), ["a → b"]);
        assert_eq!(arrows_of("#[cfg(test)] use c::{D}; use crate::b;"), ["a → b"]);
        assert_eq!(arrows_of("#[cfg(test)] struct S<T> {} use crate::b;"), ["a → b"]);
        assert_eq!(arrows_of("struct S { #[cfg(test)] a: u8, b: super::b::B }"), ["a → b"]);
    }

    #[test]
    fn a_name_that_the_root_imports_leads_to_the_module_that_it_comes_from() {
        for root in [
            "pub use b::B;",
            "pub use self::b::B;",
            "pub use crate::b::{B};",
            "use b::Other as B;",
            "use self::b as other; pub use other::B;",
            "pub use b::*;",
        ] {
            let root = format!("mod a; mod b; {root}");
            for text in ["use crate::B;", "fn f() -> super::B {}", "use super::{B as C};"] {
                let files = [("lib.rs", root.as_str()), ("a.rs", text), B];
                assert_eq!(arrows(&files), ["a → b"], "{root} {text}");
            }
        }
        for root in ["pub struct B;", "pub use std::B;", "#[cfg(test)] use b::B;"] {
            let root = format!("mod a; mod b; {root}");
            let files = [("lib.rs", root.as_str()), ("a.rs", "use crate::B;"), B];
            assert_eq!(arrows(&files), Vec::<String>::new(), "{root}");
        }
    }

    #[test]
    fn an_exported_macro_is_of_the_module_that_defines_it() {
        let b = ("b.rs", "#[macro_export] macro_rules! m { () => {} }");
        assert_eq!(arrows(&[ROOT, ("a.rs", "crate::m!();"), b, C]), ["a → b"]);
    }

    #[test]
    fn all_of_the_root_is_a_use_of_all_modules() {
        for text in ["use crate::*;", "use super::*;", "use crate as root;"] {
            assert_eq!(arrows_of(text), ["a → b", "a → c"], "{text}");
        }
    }

    #[test]
    fn modules_are_found_where_the_compiler_finds_them() {
        let files = [
            ("lib.rs", "mod a; mod b; #[path = \"elsewhere.rs\"] mod c; #[cfg(test)] mod gone;"),
            ("a/mod.rs", "mod deep;"),
            ("a/deep.rs", "mod deeper;"),
            ("a/deep/deeper.rs", "use super::super::super::b;"),
            ("b.rs", "mod deep;"),
            ("b/deep.rs", ""),
            ("elsewhere.rs", "use crate::a;"),
        ];
        assert_eq!(arrows(&files), ["a → b", "c → a"]);
    }

    #[test]
    fn a_circle_is_found_however_it_is_closed() {
        for (root, closing) in [
            ("", "mod deep { use super::super::a; }"),
            ("", "use crate::{c, a::{A}};"),
            ("pub use a::A;", "fn f() -> Option<crate::A> { None }"),
        ] {
            let root = format!("mod a; mod b; mod c; {root}");
            let a = ("a.rs", "use super::b; pub struct A;");
            let circle = uses(&[("lib.rs", root.as_str()), a, ("b.rs", closing), C]).circle();
            let circle = circle.expect(closing);
            assert!(circle.contains("a → b") && circle.contains("b → a"), "{circle}");
        }
        let in_tests = ("b.rs", "#[cfg(test)] mod tests { use crate::a::A; use super::super::a; }");
        assert_eq!(uses(&[ROOT, ("a.rs", "use super::b;"), in_tests, C]).circle(), None);
    }
}
