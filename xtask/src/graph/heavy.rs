//! Check of heavy dependencies: `host/dependencies.toml` lists which crate may use which, with reasons.
//!
//! A dependency is heavy if it takes long to compile, or brings many others that are not obvious. For each
//! crate of the workspace, the list has the heavy dependencies in its own manifest (`uses`), and those that
//! reach it through other dependencies (`through`). Both are compared with reality in both directions: no
//! unlisted dependency, and no line that is not needed. Dependencies of a heavy dependency, of tests and of
//! build scripts are not checked.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::Value;

/// Path of the list.
const LIST: &str = "host/dependencies.toml";

/// Compares the dependencies of all crates of the workspace with the list, and returns a line for each
/// difference.
pub fn violations(root: &Path, metadata: &Value) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(root.join(LIST))
        .with_context(|| format!("failed to read {LIST}"))?;
    let list: List = toml::from_str(&text).with_context(|| format!("failed to read {LIST}"))?;
    Ok(list.violations(&Packages::of(metadata)?))
}

/// Content of the list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    /// Names of groups of heavy packages, each with its packages (`aws-*`: all with this prefix).
    heavy: BTreeMap<String, Vec<String>>,
    /// Heavy dependencies that each crate may use; a crate that is not listed may use none.
    crates: BTreeMap<String, Allowed>,
}

/// Heavy dependencies that a crate may use, each with the reason.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowed {
    /// Those in its own manifest.
    #[serde(default)]
    uses: BTreeMap<String, String>,
    /// Those that come through other dependencies.
    #[serde(default)]
    through: BTreeMap<String, String>,
    /// Reason why all may reach it, for crates that combine everything.
    through_all: Option<String>,
}

impl List {
    /// Compares the list with the packages, and returns a line for each difference.
    fn violations(&self, packages: &Packages<'_>) -> Vec<String> {
        let mut violations = Vec::new();
        let nothing = Allowed::default();
        for (heavy, patterns) in &self.heavy {
            for pattern in patterns {
                if !packages.names.values().any(|name| is_of(pattern, name)) {
                    violations.push(format!(
                        "[heavy] {heavy}: expected a package named `{pattern}`, found none; fix or remove it in {LIST}"
                    ));
                }
            }
        }
        for name in self.crates.keys().filter(|name| !packages.own.contains_key(name.as_str())) {
            violations.push(format!(
                "[crates.{name}]: unknown crate: expected a crate of the workspace; remove or rename it in {LIST}"
            ));
        }
        for (name, id) in &packages.own {
            let allowed = self.crates.get(*name).unwrap_or(&nothing);
            let found = self.found(packages, id);
            let kinds = [
                ("uses", &allowed.uses, true, false),
                ("through", &allowed.through, false, allowed.through_all.is_some()),
            ];
            for (table, allowed, is_direct, are_all_allowed) in kinds {
                // A dependency in a crate's own manifest is not listed again as one that reaches it.
                let found: BTreeMap<&str, &Vec<&str>> = found
                    .iter()
                    .filter(|(_, way)| (way.len() == 2) == is_direct)
                    .map(|(heavy, way)| (*heavy, way))
                    .collect();
                for (heavy, way) in &found {
                    if !allowed.contains_key(*heavy) && !are_all_allowed {
                        violations.push(format!(
                            "{name}: expected no {heavy}, found {}; remove that dependency, or add \
                             `{heavy} = \"the reason\"` to [crates.{name}.{table}] in {LIST}",
                            way.join(" → ")
                        ));
                    }
                }
                for (heavy, reason) in allowed {
                    let line = format!("[crates.{name}.{table}] {heavy}");
                    if !self.heavy.contains_key(heavy) {
                        violations.push(format!(
                            "{line}: expected a name under [heavy]; rename it in {LIST}"
                        ));
                    } else if !found.contains_key(heavy.as_str()) {
                        violations.push(format!(
                            "{line}: expected the crate to need it, found that it does not; remove the line in {LIST}"
                        ));
                    }
                    if reason.trim().is_empty() {
                        violations.push(format!(
                            "{line}: expected a reason, found an empty text; write the reason in {LIST}"
                        ));
                    }
                }
            }
            if allowed.through_all.as_ref().is_some_and(|reason| reason.trim().is_empty()) {
                violations.push(format!(
                    "[crates.{name}] through_all: expected a reason, found an empty text; write the reason in {LIST}"
                ));
            }
        }
        violations
    }

    /// Returns the heavy dependencies of a crate, each with the shortest path to it.
    fn found<'a>(
        &'a self,
        packages: &Packages<'a>,
        id: &'a str,
    ) -> BTreeMap<&'a str, Vec<&'a str>> {
        let mut found = BTreeMap::new();
        let mut seen = BTreeSet::from([id]);
        let mut open = VecDeque::from([vec![id]]);
        while let Some(way) = open.pop_front() {
            let used = way.last().and_then(|id| packages.uses.get(id));
            for used in used.into_iter().flatten() {
                let way: Vec<&str> = way.iter().chain([used]).copied().collect();
                match self.heavy_name(packages.name(used)) {
                    Some(heavy) => {
                        let names = way.iter().map(|id| packages.name(id)).collect();
                        found.entry(heavy).or_insert(names);
                    }
                    None if seen.insert(used) => open.push_back(way),
                    None => {}
                }
            }
        }
        found
    }

    /// Returns the name of the group that has a package.
    fn heavy_name(&self, package: &str) -> Option<&str> {
        let has = |patterns: &Vec<String>| patterns.iter().any(|pattern| is_of(pattern, package));
        let heavy = self.heavy.iter().find(|(_, patterns)| has(patterns));
        heavy.map(|(name, _)| name.as_str())
    }
}

/// Whether a pattern of the list matches a package: `aws-*` matches all with this prefix.
fn is_of(pattern: &str, package: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => package.starts_with(beginning),
        None => package == pattern,
    }
}

/// Dependencies of all packages, from `cargo metadata`.
struct Packages<'a> {
    names: BTreeMap<&'a str, &'a str>,
    /// Crates of the workspace by name, with their IDs.
    own: BTreeMap<&'a str, &'a str>,
    /// Dependencies that are compiled into each package, by ID.
    uses: BTreeMap<&'a str, Vec<&'a str>>,
}

impl<'a> Packages<'a> {
    fn of(metadata: &'a Value) -> Result<Self> {
        let list = |value: &'a Value, of: &str| {
            value[of]
                .as_array()
                .with_context(|| format!("missing {of} in the output of `cargo metadata`"))
        };
        let text = |value: &'a Value| value.as_str().unwrap_or_default();
        let packages = list(metadata, "packages")?;
        let names: BTreeMap<&str, &str> =
            packages.iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
        let own = list(metadata, "workspace_members")?.iter().map(text);
        let own = own.map(|id| (names.get(id).copied().unwrap_or(id), id)).collect();
        let mut uses = BTreeMap::new();
        for node in list(&metadata["resolve"], "nodes")? {
            let is_compiled_in = |dependency: &&Value| {
                let kinds = dependency["dep_kinds"].as_array();
                kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
            };
            let used = list(node, "deps")?.iter().filter(is_compiled_in);
            uses.insert(text(&node["id"]), used.map(|it| text(&it["pkg"])).collect());
        }
        Ok(Self { names, own, uses })
    }

    fn name(&self, id: &'a str) -> &'a str {
        self.names.get(id).copied().unwrap_or(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Returns metadata as from cargo: `top` uses `engine` and `http`; `http` uses `heavy-http`; `engine` uses
    /// `plain`, which uses `jit-core`; `heavy-http` uses `jit-core`, too. The tests of `top` use `jit-tests`.
    fn metadata() -> Value {
        let names = ["top", "engine", "http", "plain", "jit-core", "jit-tests", "heavy-http"];
        let packages: Vec<Value> =
            names.iter().map(|name| json!({ "id": format!("{name} 1"), "name": name })).collect();
        let node = |name: &str, used: &[(&str, Value)]| {
            let deps: Vec<Value> = used
                .iter()
                .map(|(name, kind)| json!({ "pkg": format!("{name} 1"), "dep_kinds": [{ "kind": kind }] }))
                .collect();
            json!({ "id": format!("{name} 1"), "deps": deps })
        };
        let normal = Value::Null;
        json!({
            "packages": packages,
            "workspace_members": ["top 1", "engine 1", "http 1"],
            "resolve": { "nodes": [
                node("top", &[
                    ("engine", normal.clone()), ("http", normal.clone()), ("jit-tests", json!("dev")),
                ]),
                node("engine", &[("plain", normal.clone())]),
                node("plain", &[("jit-core", normal.clone()), ("heavy-http", json!("build"))]),
                node("http", &[("heavy-http", normal.clone())]),
                node("heavy-http", &[("jit-core", normal)]),
            ] },
        })
    }

    fn violations(list: &str) -> Vec<String> {
        let list: List = toml::from_str(list).expect("a list");
        list.violations(&Packages::of(&metadata()).expect("metadata"))
    }

    const GOOD: &str = r#"
        heavy = { jit = ["jit-*"], http = ["heavy-http"] }
        [crates.http]
        uses.http = "it sends requests"
        [crates.engine]
        through.jit = "plain compiles"
        [crates.top]
        through.jit = "by engine"
        through.http = "by http"
    "#;

    #[test]
    fn a_list_that_says_what_is_holds() {
        assert_eq!(violations(GOOD), Vec::<String>::new());
        let all = GOOD.replace("through.jit = \"by engine\"", "through_all = \"it has all\"");
        assert_eq!(
            violations(&all.replace("through.http = \"by http\"", "")),
            Vec::<String>::new()
        );
    }

    #[test]
    fn a_heavy_one_that_is_not_allowed_is_named_with_its_way() {
        assert_eq!(
            violations(&GOOD.replace("uses.http = \"it sends requests\"", "")),
            ["http: expected no http, found http → heavy-http; remove that dependency, or add \
              `http = \"the reason\"` to [crates.http.uses] in host/dependencies.toml"]
        );
        assert_eq!(
            violations(&GOOD.replace("through.jit = \"by engine\"", "")),
            [
                "top: expected no jit, found top → engine → plain → jit-core; remove that dependency, or add \
              `jit = \"the reason\"` to [crates.top.through] in host/dependencies.toml"
            ]
        );
        // Everything is reported: a crate that is not listed may use none.
        assert_eq!(violations("heavy = { http = [\"heavy-http\"] }\ncrates = {}").len(), 2);
    }

    #[test]
    fn a_line_that_nothing_needs_is_an_error() {
        for (line, expected) in [
            ("uses.jit = \"x\"", "[crates.http.uses] jit: expected the crate to need it"),
            ("through.http = \"x\"", "[crates.http.through] http: expected the crate to need it"),
            ("uses.jot = \"x\"", "[crates.http.uses] jot: expected a name under [heavy]"),
            ("through_all = \" \"", "[crates.http] through_all: expected a reason"),
        ] {
            let violations =
                violations(&GOOD.replace("[crates.http]", &format!("[crates.http]\n{line}")));
            assert!(violations.len() == 1 && violations[0].starts_with(expected), "{violations:?}");
        }
        let gone = violations(&format!("{GOOD}\n[crates.gone]"));
        assert!(gone.len() == 1 && gone[0].starts_with("[crates.gone]"), "{gone:?}");
    }

    #[test]
    fn a_pattern_that_names_no_package_is_an_error() {
        let found = violations(&GOOD.replace("\"heavy-http\"]", "\"heavy-http\", \"heavy-htpp\"]"));
        assert_eq!(
            found,
            [
                "[heavy] http: expected a package named `heavy-htpp`, found none; fix or remove it in \
              host/dependencies.toml"
            ]
        );
    }

    #[test]
    fn each_line_needs_a_reason() {
        let violations = violations(&GOOD.replace("it sends requests", " "));
        assert_eq!(
            violations,
            [
                "[crates.http.uses] http: expected a reason, found an empty text; write the reason in \
              host/dependencies.toml"
            ]
        );
        assert!(toml::from_str::<List>(&GOOD.replace("uses.http", "use.http")).is_err());
    }
}
