//! A graph of users and used: its cycles, its layers, and pictures of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;

/// Users with what they use, and the files with the uses.
#[derive(Debug, Default)]
pub struct Uses {
    /// All users, each with what it uses.
    of: BTreeMap<String, BTreeMap<String, BTreeSet<PathBuf>>>,
}

impl Uses {
    /// Adds a user that uses nothing yet.
    pub fn add_user(&mut self, user: &str) {
        self.of.entry(user.to_owned()).or_default();
    }

    /// Adds an arrow, and a file that contains it.
    pub fn add(&mut self, user: &str, used: &str, file: &Path) {
        self.add_user(used);
        let files = self.of.entry(user.to_owned()).or_default().entry(used.to_owned()).or_default();
        files.insert(file.to_owned());
    }

    /// Returns all arrows: user and used.
    pub fn arrows(&self) -> impl Iterator<Item = (&str, &str)> {
        self.of
            .iter()
            .flat_map(|(user, used)| used.keys().map(move |used| (user.as_str(), used.as_str())))
    }

    /// Returns the part of the graph between the kept names.
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

    /// Returns the same graph with other names.
    pub fn renamed(&self, name: impl Fn(&str) -> String) -> Self {
        let of = self.of.iter().map(|(user, used)| {
            let used = used.iter().map(|(used, files)| (name(used), files.clone())).collect();
            (name(user), used)
        });
        Self { of: of.collect() }
    }

    /// Formats one line per name with its layer, beginning with names that use nothing (layer 0). Each name
    /// uses only lower layers.
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

    /// Formats the graph in Mermaid syntax. Implied arrows are left out: with a → b → c, a → c is not drawn.
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

    /// Returns the arrows of all cycles; `None`: there are none.
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

    /// Whether one name uses another, directly or indirectly, without a path through `avoided`.
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

    /// Returns the layer of each name: one above the highest layer that it uses. Names of a cycle have the same
    /// layer.
    fn layers(&self) -> BTreeMap<&str, usize> {
        let mut layers = BTreeMap::new();
        // Each group comes after the groups that it uses.
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
        // All arrows of the cycle stay in the picture, and its members have the same layer.
        for arrow in ["a --> b", "b --> c", "c --> a", "d --> a"] {
            assert!(uses.mermaid().contains(arrow), "{}", uses.mermaid());
        }
        assert!(uses.shown().starts_with("  0  a → b\n  0  b → c\n  0  c → a\n  1  d → a"));
        // A second cycle is reported, too.
        uses.add("e", "f", Path::new("z.rs"));
        uses.add("f", "e", Path::new("z.rs"));
        let both = uses.circle().expect("circles");
        assert!(both.contains("f → e in z.rs") && both.contains("c → a in y.rs"), "{both}");
    }
}
