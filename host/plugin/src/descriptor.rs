//! Validates what a plugin says about itself, by the rules of the WIT.

use std::collections::HashSet;

use super::{Column, Descriptor};
use shardmill_core::escape::{controls_terminal, escaped};

/// Maximum length of a route's name, in characters.
const ROUTE_NAME_CHARS_MAX: usize = 64;
/// Maximum length of a plugin's name and version: they appear in messages and metrics.
const LABEL_BYTES_MAX: usize = 128;
/// Maximum length of media types, and of names of columns and types. PostgreSQL's longest name has 63 bytes.
const NAME_BYTES_MAX: usize = 255;
/// Maximum number of accepted media types, and of entries in `extra`.
const ENTRIES_MAX: usize = 256;
/// Maximum number of routes.
const ROUTES_MAX: usize = 1_024;
/// Maximum number of columns of a route. A PostgreSQL table has at most 1,600.
const COLUMNS_MAX: usize = 2_000;
/// Maximum length of a value in `extra`.
const EXTRA_BYTES_MAX: usize = 256 << 10;
/// Number of characters of a refused text that the error shows.
const SHOWN_CHARS: usize = 64;

/// Validates a descriptor; the error names the rule that is broken. All of its texts are checked, because all are
/// shown: in messages, in metrics, on terminals.
pub fn check(descriptor: &Descriptor) -> Result<(), String> {
    check_text("name", &descriptor.name, 1, LABEL_BYTES_MAX)?;
    check_text("version", &descriptor.version, 1, LABEL_BYTES_MAX)?;
    check_count("accepted formats", descriptor.accepts.len(), ENTRIES_MAX)?;
    for format in &descriptor.accepts {
        check_text("accepted format", format, 0, NAME_BYTES_MAX)?;
    }
    check_count("extra entries", descriptor.extra.len(), ENTRIES_MAX)?;
    for (name, value) in &descriptor.extra {
        check_text("extra name", name, 0, NAME_BYTES_MAX)?;
        // JSON may contain line ends.
        check_text("extra value", &value.replace(['\n', '\r', '\t'], " "), 0, EXTRA_BYTES_MAX)?;
    }
    if descriptor.routes.is_empty() {
        return Err("its descriptor declares no route".into());
    }
    check_count("routes", descriptor.routes.len(), ROUTES_MAX)?;
    let mut names = HashSet::new();
    for route in &descriptor.routes {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !(1..=ROUTE_NAME_CHARS_MAX).contains(&route.name.len()) || !route.name.chars().all(fits)
        {
            return Err(format!(
                "invalid route name {:?}: expected 1 to {ROUTE_NAME_CHARS_MAX} of a-z, 0-9, - and _",
                route.name.chars().take(ROUTE_NAME_CHARS_MAX).collect::<String>()
            ));
        }
        if !names.insert(&route.name) {
            return Err(format!("route {} is declared twice", route.name));
        }
        check_text("format of a route", &route.format, 0, NAME_BYTES_MAX)?;
        check_count("columns of a route", route.columns.len(), COLUMNS_MAX)?;
        route.columns.iter().try_for_each(check_column)?;
        let mut columns = HashSet::new();
        if let Some(twice) = route.columns.iter().find(|column| !columns.insert(&column.name)) {
            return Err(format!("route {} declares column {:?} twice", route.name, twice.name));
        }
    }
    Ok(())
}

/// Validates the texts of a column.
pub fn check_column(column: &Column) -> Result<(), String> {
    check_text("name of a column", &column.name, 0, NAME_BYTES_MAX)?;
    check_text("type of a column", &column.data_type, 0, NAME_BYTES_MAX)
}

/// Checks a text's length, and that it contains no character that controls a terminal.
fn check_text(what: &str, text: &str, bytes_min: usize, bytes_max: usize) -> Result<(), String> {
    if (bytes_min..=bytes_max).contains(&text.len()) && !text.contains(controls_terminal) {
        return Ok(());
    }
    let shown: String = text.chars().take(SHOWN_CHARS).collect();
    let cut = if shown.len() < text.len() { "…" } else { "" };
    Err(format!(
        "its descriptor's {what} must be {bytes_min} to {bytes_max} bytes without control and format \
         characters, found {} bytes: \"{}{cut}\"",
        text.len(),
        escaped(&shown, &[])
    ))
}

fn check_count(what: &str, count: usize, max: usize) -> Result<(), String> {
    match count <= max {
        true => Ok(()),
        false => Err(format!("its descriptor has {count} {what}, expected at most {max}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Route;

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
        assert!(said(&descriptor(&["A"])).contains("invalid route name"));
        assert!(said(&descriptor(&[&"x".repeat(65)])).contains("1 to 64"));
        assert!(said(&Descriptor { name: String::new(), ..descriptor(&["a"]) }).contains("name"));
        let line = Descriptor { version: "1\n2".into(), ..descriptor(&["a"]) };
        assert!(said(&line).contains("version"));
        let column = Column { name: "c".into(), data_type: "text".into(), nullable: true };
        let many = vec![String::new(); ENTRIES_MAX + 1];
        assert!(said(&Descriptor { accepts: many, ..descriptor(&["a"]) }).contains("257 accepted"));
        let mut twice = descriptor(&["a"]);
        twice.routes[0].columns = vec![column.clone(), column];
        assert!(said(&twice).contains("column \"c\" twice"));
    }

    #[test]
    fn wall_12_no_text_of_a_descriptor_steers_a_terminal() {
        for bad in ["\u{1b}[2J", "a\u{202e}b", "\u{200b}", "\u{9b}1m", "a\u{2028}b", "\u{e0041}"] {
            let column = |name: &str, kind: &str| {
                let column = Column { name: name.into(), data_type: kind.into(), nullable: true };
                let mut with_column = descriptor(&["a"]);
                with_column.routes[0].columns.push(column);
                with_column
            };
            let mut format = descriptor(&["a"]);
            format.routes[0].format = bad.into();
            for (place, bad) in [
                ("name", Descriptor { name: bad.into(), ..descriptor(&["a"]) }),
                ("version", Descriptor { version: bad.into(), ..descriptor(&["a"]) }),
                ("accepted", Descriptor { accepts: vec![bad.into()], ..descriptor(&["a"]) }),
                (
                    "extra",
                    Descriptor { extra: vec![("k".into(), bad.into())], ..descriptor(&["a"]) },
                ),
                (
                    "extra",
                    Descriptor { extra: vec![(bad.into(), "v".into())], ..descriptor(&["a"]) },
                ),
                ("route", descriptor(&[bad])),
                ("format", format),
                ("name of a column", column(bad, "text")),
                ("type of a column", column("c", bad)),
            ] {
                let said = check(&bad).expect_err(place);
                assert!(
                    said.contains(place) && !said.contains(controls_terminal),
                    "{place}: {said}"
                );
            }
        }
        let json = Descriptor {
            extra: vec![("needs-columns".into(), "[\n\t{}\r\n]".into())],
            ..descriptor(&["a"])
        };
        assert_eq!(check(&json), Ok(()));
    }
}
