//! What a plugin says of itself, proven against the WIT's rules.

use std::collections::HashSet;

use super::Descriptor;

/// Characters of a route's name.
const ROUTE_NAME_CHARS_MAX: usize = 64;
/// A plugin's name and version are shown in every message and metric.
const LABEL_BYTES_MAX: usize = 128;

/// Checks a descriptor; the sentence names the rule that is broken.
pub fn check(descriptor: &Descriptor) -> Result<(), String> {
    for (what, text) in [("name", &descriptor.name), ("version", &descriptor.version)] {
        if text.is_empty() || text.len() > LABEL_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(format!(
                "its descriptor's {what} must be 1 to {LABEL_BYTES_MAX} bytes without control characters"
            ));
        }
    }
    if descriptor.routes.is_empty() {
        return Err("its descriptor declares no route".into());
    }
    let mut names = HashSet::new();
    for route in &descriptor.routes {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !(1..=ROUTE_NAME_CHARS_MAX).contains(&route.name.len()) || !route.name.chars().all(fits)
        {
            return Err(format!(
                "a route's name is 1 to {ROUTE_NAME_CHARS_MAX} of a-z, 0-9, - and _: not {:?}",
                route.name.chars().take(ROUTE_NAME_CHARS_MAX).collect::<String>()
            ));
        }
        if !names.insert(&route.name) {
            return Err(format!("route {} is declared twice", route.name));
        }
        let mut columns = HashSet::new();
        if let Some(twice) = route.columns.iter().find(|column| !columns.insert(&column.name)) {
            return Err(format!("route {} declares column {:?} twice", route.name, twice.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::{Column, Route};

    fn descriptor(routes: &[&str]) -> Descriptor {
        let route = |name: &&str| Route {
            name: (*name).into(),
            format: String::new(),
            columns: Vec::new(),
        };
        Descriptor {
            name: "x".into(),
            version: "1".into(),
            accepts: Vec::new(),
            routes: routes.iter().map(route).collect(),
            extra: Vec::new(),
        }
    }

    #[test]
    fn each_rule_is_named() {
        let said = |descriptor: &Descriptor| check(descriptor).unwrap_err();
        assert!(check(&descriptor(&["a", "b_2-c"])).is_ok());
        assert!(said(&descriptor(&[])).contains("no route"));
        assert!(said(&descriptor(&["a", "a"])).contains("twice"));
        assert!(said(&descriptor(&["A"])).contains("a route's name"));
        assert!(said(&descriptor(&[&"x".repeat(65)])).contains("1 to 64"));
        assert!(said(&Descriptor { name: String::new(), ..descriptor(&["a"]) }).contains("name"));
        let line = Descriptor { version: "1\n2".into(), ..descriptor(&["a"]) };
        assert!(said(&line).contains("version"));
        let column = Column { name: "c".into(), data_type: "text".into(), nullable: true };
        let mut twice = descriptor(&["a"]);
        twice.routes[0].columns = vec![column.clone(), column];
        assert!(said(&twice).contains("column \"c\" twice"));
    }
}
