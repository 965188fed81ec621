//! `${VAR}` in string values: found after parsing, so that every span still fits the file.
//!
//! `${VAR}` is replaced by the variable, `${VAR:-text}` by the text when the variable is unset or
//! empty, `$$` by one `$`. A `$` before anything else stands for itself (regular expressions end
//! with one). Keys, comments and anything but strings are left alone.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::check::Check;

/// Where variables come from: the process's environment, or a test's map.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Replaces the variables in all string values of a table, at any depth.
pub(super) fn substitute_table(table: &mut DeTable<'_>, lookup: Lookup, check: &mut Check) {
    for (_, value) in table.iter_mut() {
        let span = value.span();
        substitute_value(value.get_mut(), span, lookup, check);
    }
}

fn substitute_value(value: &mut DeValue, span: Range<usize>, lookup: Lookup, check: &mut Check) {
    match value {
        DeValue::String(text) if text.contains('$') => match substitute(text, lookup) {
            Ok(replaced) => *text = replaced.into(),
            Err(error) => error.report(span, check),
        },
        DeValue::Array(values) => {
            for value in values.iter_mut() {
                let span = value.span();
                substitute_value(value.get_mut(), span, lookup, check);
            }
        }
        DeValue::Table(table) => substitute_table(table, lookup, check),
        _ => {}
    }
}

/// Why a text's variables could not be replaced; `written` is the offending part.
#[derive(Debug, PartialEq, Eq)]
enum EnvError {
    Unset { name: String, written: String },
    Unclosed { written: String },
    BadName { name: String, written: String },
}

impl EnvError {
    fn report(self, string: Range<usize>, check: &mut Check) {
        let (written, message, help) = match self {
            Self::Unset { name, written } => (
                written,
                format!("the environment variable {name} is not set"),
                format!("set it, or give a default: `${{{name}:-text}}`"),
            ),
            Self::Unclosed { written } => (
                written,
                "`${` without its `}`".to_owned(),
                "close it, or write `$${` for the two characters themselves".to_owned(),
            ),
            Self::BadName { name, written } => (
                written,
                format!("`{name}` is no name of an environment variable"),
                "letters, digits and `_`, not starting with a digit; write `$${` for the two \
                 characters themselves"
                    .to_owned(),
            ),
        };
        // Underline the variable alone where the string's source shows it literally.
        let at = check.text(&string).find(&written).map(|at| string.start + at);
        let span = at.map_or(string, |start| start..start + written.len());
        check.problem(span, message, help);
    }
}

fn substitute(text: &str, lookup: Lookup) -> Result<String, EnvError> {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        replaced.push_str(&rest[..at]);
        let from_dollar = &rest[at..];
        rest = if let Some(after) = from_dollar.strip_prefix("$$") {
            replaced.push('$');
            after
        } else if let Some(after) = from_dollar.strip_prefix("${") {
            let Some(end) = after.find('}') else {
                return Err(EnvError::Unclosed { written: from_dollar.to_owned() });
            };
            let written = &from_dollar[..end + 3];
            replaced.push_str(&expand(&after[..end], written, lookup)?);
            &after[end + 1..]
        } else {
            replaced.push('$');
            &from_dollar[1..]
        };
    }
    replaced.push_str(rest);
    Ok(replaced)
}

/// The value of what stands between `${` and `}`.
fn expand(inside: &str, written: &str, lookup: Lookup) -> Result<String, EnvError> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(EnvError::BadName { name: name.into(), written: written.into() });
    }
    match (lookup(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(EnvError::Unset { name: name.into(), written: written.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "HOME_2" => Some("/data".into()),
            "EMPTY" => Some(String::new()),
            "DOLLAR" => Some("${HOME_2}".into()),
            _ => None,
        }
    }

    fn replaced(text: &str) -> String {
        substitute(text, &lookup).expect("a text whose variables are set")
    }

    #[test]
    fn variables_and_defaults_are_replaced() {
        assert_eq!(replaced("${HOME_2}/cars.db"), "/data/cars.db");
        assert_eq!(replaced("a${HOME_2}b${HOME_2}"), "a/datab/data");
        assert_eq!(replaced("${UNSET:-data}/x"), "data/x");
        assert_eq!(replaced("${UNSET:-}"), "");
        assert_eq!(replaced("${EMPTY:-data}"), "data");
        assert_eq!(replaced("${EMPTY}"), "");
        assert_eq!(replaced("${UNSET:-a:-b é}"), "a:-b é");
    }

    #[test]
    fn dollars_stay_dollars() {
        assert_eq!(replaced("$${HOME_2}"), "${HOME_2}");
        assert_eq!(replaced("^a$"), "^a$");
        assert_eq!(replaced("$HOME_2 $"), "$HOME_2 $");
        assert_eq!(replaced("$$$$"), "$$");
    }

    #[test]
    fn a_value_is_not_replaced_again() {
        assert_eq!(replaced("${DOLLAR}"), "${HOME_2}");
    }

    #[test]
    fn what_cannot_be_replaced_is_named() {
        let written = "${UNSET}".to_owned();
        let unset = EnvError::Unset { name: "UNSET".into(), written };
        assert_eq!(substitute("x${UNSET}y", &lookup), Err(unset));
        let unclosed = EnvError::Unclosed { written: "${HOME_2".into() };
        assert_eq!(substitute("x${HOME_2", &lookup), Err(unclosed));
        for text in ["${}", "${2A}", "${A B}", "${A-b}", "${:-x}", "${ä}"] {
            let error = substitute(text, &lookup).expect_err(text);
            assert!(matches!(error, EnvError::BadName { .. }), "{text}: {error:?}");
        }
    }
}
