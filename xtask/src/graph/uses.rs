//! A graph of who uses whom: its circles, its layers, and pictures of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;

/// Who uses whom, and the files that say so.
#[derive(Debug, Default)]
pub struct Uses {
    /// Everybody, with whom they use.
    of: BTreeMap<String, BTreeMap<String, BTreeSet<PathBuf>>>,
}

impl Uses {
    /// Adds one who uses nobody yet.
    pub fn add_user(&mut self, user: &str) {
        self.of.entry(user.to_owned()).or_default();
    }

    /// Adds an arrow, and a file that it is in.
    pub fn add(&mut self, user: &str, used: &str, file: &Path) {
        self.add_user(used);
        let files = self.of.entry(user.to_owned()).or_default().entry(used.to_owned()).or_default();
        files.insert(file.to_owned());
    }

    /// All arrows: who uses, and who is used.
    pub fn arrows(&self) -> impl Iterator<Item = (&str, &str)> {
        self.of
            .iter()
            .flat_map(|(user, used)| used.keys().map(move |used| (user.as_str(), used.as_str())))
    }

    /// The part between those that are kept.
    pub fn only(&self, is_kept: impl Fn(&str) -> bool) -> Self {
        let mut part = Self::default();
        for (user, used) in &self.of {
            if is_kept(user) {
                let used = used.iter().filter(|(used, _)| is_kept(used));
                part.of.insert(
                    user.clone(),
                    used.map(|(used, files)| (used.clone(), files.clone())).collect(),
                );
            }
        }
        part
    }

    /// The same under other names.
    pub fn renamed(&self, name: impl Fn(&str) -> String) -> Self {
        let of = self.of.iter().map(|(user, used)| {
            let used = used.iter().map(|(used, files)| (name(used), files.clone())).collect();
            (name(user), used)
        });
        Self { of: of.collect() }
    }

    /// Shows a line each with its layer, from those that use nobody (0) upwards: each uses lower layers alone.
    pub fn shown(&self) -> String {
        let mut users: Vec<(usize, &str)> =
            self.layers().into_iter().map(|(user, layer)| (layer, user)).collect();
        users.sort_unstable();
        let mut text = String::new();
        for (layer, user) in users {
            let used: Vec<&str> = self.of[user].keys().map(String::as_str).collect();
            let arrow = if used.is_empty() { "" } else { " → " };
            // Writing into a String cannot fail.
            let _ = writeln!(text, "  {layer}  {user}{arrow}{}", used.join(", "));
        }
        text
    }

    /// Shows the graph in the language of Mermaid. Arrows that follow from others are left out: where a → b → c is
    /// drawn, a → c is not.
    pub fn mermaid(&self) -> String {
        let layers = self.layers();
        let node = |name: &str| name.replace('-', "_");
        let mut text = "flowchart TD\n".to_owned();
        let mut users: Vec<&str> = self.of.keys().map(String::as_str).collect();
        users.sort_unstable_by_key(|user| (std::cmp::Reverse(layers[user]), *user));
        for user in users {
            let used = &self.of[user];
            let is_implied = |other: &String| {
                used.keys().any(|it| it != other && it != user && self.reaches(it, other, user))
            };
            let drawn: Vec<String> =
                used.keys().filter(|used| !is_implied(used)).map(|used| node(used)).collect();
            let arrow = if drawn.is_empty() { "" } else { " --> " };
            let _ = writeln!(text, "    {}{arrow}{}", node(user), drawn.join(" & "));
        }
        text
    }

    /// The arrows between those that use each other, of all circles; `None`: there are none.
    pub fn circle(&self) -> Option<String> {
        let mut text = String::new();
        for circle in tarjan_scc(&self.graph()).into_iter().filter(|group| group.len() > 1) {
            for user in &circle {
                let used =
                    self.of[*user].iter().filter(|(used, _)| circle.contains(&used.as_str()));
                for (used, files) in used {
                    let files: Vec<String> =
                        files.iter().map(|file| file.display().to_string()).collect();
                    let _ = writeln!(text, "  {user} → {used} in {}", files.join(", "));
                }
            }
        }
        (!text.is_empty()).then_some(text)
    }

    /// Whether one uses another, itself or by others, without a way through `avoided`.
    fn reaches(&self, user: &str, used: &str, avoided: &str) -> bool {
        let mut seen = BTreeSet::from([avoided]);
        let mut open = vec![user];
        while let Some(user) = open.pop() {
            if user == used {
                return true;
            }
            if seen.insert(user) {
                open.extend(self.of[user].keys().map(String::as_str));
            }
        }
        false
    }

    /// The layer of each: one above the highest that it uses. Those of a circle are on one.
    fn layers(&self) -> BTreeMap<&str, usize> {
        let mut layers = BTreeMap::new();
        // Each group comes after those that it uses.
        for group in tarjan_scc(&self.graph()) {
            let used = group.iter().flat_map(|user| self.of[*user].keys());
            let highest = used.filter_map(|used| layers.get(used.as_str())).max();
            let layer = highest.map_or(0, |layer: &usize| layer + 1);
            layers.extend(group.into_iter().map(|user| (user, layer)));
        }
        layers
    }

    fn graph(&self) -> DiGraphMap<&str, ()> {
        let mut graph = DiGraphMap::new();
        for user in self.of.keys() {
            graph.add_node(user.as_str());
        }
        for (user, used) in self.arrows() {
            graph.add_edge(user, used, ());
        }
        graph
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(arrows: &[(&str, &str)]) -> Uses {
        let mut uses = Uses::default();
        for (user, used) in arrows {
            uses.add(user, used, Path::new("x.rs"));
        }
        uses
    }

    #[test]
    fn layers_go_upwards_from_those_that_use_nobody() {
        let uses = uses(&[("a", "b"), ("b", "d"), ("a", "d"), ("c", "d")]);
        assert_eq!(uses.circle(), None);
        assert_eq!(uses.shown(), "  0  d\n  1  b → d\n  1  c → d\n  2  a → b, d\n");
    }

    #[test]
    fn a_picture_leaves_out_what_follows() {
        let uses = uses(&[("a-1", "b"), ("b", "d"), ("a-1", "d"), ("c", "d")]);
        let expected = "flowchart TD\n    a_1 --> b\n    b --> d\n    c --> d\n    d\n";
        assert_eq!(uses.mermaid(), expected);
        let part = uses.only(|name| name != "b");
        assert_eq!(part.mermaid(), "flowchart TD\n    a_1 --> d\n    c --> d\n    d\n");
    }

    #[test]
    fn a_circle_is_named_with_its_files() {
        let mut uses = uses(&[("a", "b"), ("b", "c"), ("d", "a")]);
        uses.add("c", "a", Path::new("y.rs"));
        let circle = uses.circle().expect("a circle");
        assert!(circle.contains("c → a in y.rs") && circle.contains("a → b in x.rs"), "{circle}");
        assert!(!circle.contains("d → a"), "{circle}");
        // All arrows of it stay in the picture, and its members are on one layer.
        for arrow in ["a --> b", "b --> c", "c --> a", "d --> a"] {
            assert!(uses.mermaid().contains(arrow), "{}", uses.mermaid());
        }
        assert!(uses.shown().starts_with("  0  a → b\n  0  b → c\n  0  c → a\n  1  d → a"));
        // A second circle is named as well.
        uses.add("e", "f", Path::new("z.rs"));
        uses.add("f", "e", Path::new("z.rs"));
        let both = uses.circle().expect("circles");
        assert!(both.contains("f → e in z.rs") && both.contains("c → a in y.rs"), "{both}");
    }
}
