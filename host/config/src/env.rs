//! `${VAR}` in string values. It is replaced after parsing, so that every span still fits the file.
//!
//! - `${VAR}` becomes the value of the variable.
//! - `${VAR:-text}` becomes the text if the variable is unset or empty.
//! - `$$` becomes one `$`. A `$` before any other character stays (regular expressions end with one).
//!
//! Keys, comments and values that are not strings do not change.
//!
//! Variables are for secrets. So a stage's configuration is stored as written ([`StageText`]), and messages about the
//! file show `${VAR}` where they would show its value.

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::check::Check;
use shardmill_core::values::Values;

/// Source of variables: the environment of the process, or the map of a test.
pub type EnvLookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads a variable from the environment of this process.
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Configuration of a stage as JSON text, in the form that is stored. If it has variables, its strings are as in the
/// file: with `${NAME}`, and with `$$` for one `$`. Values of variables are never stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageText {
    /// The JSON text.
    pub json: String,
    /// Whether `${NAME}` in it stands for a variable. If not, the text is literal.
    pub has_variables: bool,
}

/// Configuration of a stage with its variables replaced.
#[derive(Clone, Debug)]
pub struct StageValues {
    /// JSON text that the plugin receives.
    pub json: String,
    /// Values that were inserted.
    pub values: Values,
}

impl StageText {
    /// Makes a configuration without variables.
    pub fn plain(json: impl Into<String>) -> Self {
        Self { json: json.into(), has_variables: false }
    }

    /// Makes the configuration of a file: `written` is as in the file, `json` has its variables replaced.
    pub(super) fn of_file(written: &Value, json: &str) -> Self {
        let mut names = BTreeSet::new();
        each_string(written, &mut |text| names.extend(names_in(text)));
        match names.is_empty() {
            true => Self::plain(json),
            false => Self { json: written.to_string(), has_variables: true },
        }
    }

    /// Replaces the variables.
    ///
    /// # Errors
    /// A sentence: a variable is not set, or the text is not a valid configuration.
    pub fn resolve(&self, lookup: EnvLookup) -> Result<StageValues, String> {
        let mut values = Values::default();
        if !self.has_variables {
            return Ok(StageValues { json: self.json.clone(), values });
        }
        let mut config = self.parse()?;
        let mut unset = None;
        map_strings(&mut config, &mut |text| match substitute(text, lookup, &mut |name, value| {
            values.add(name, value)
        }) {
            Ok(replaced) => Some(replaced),
            Err(error) => {
                unset = unset.take().or(Some(error));
                None
            }
        });
        match unset {
            None => Ok(StageValues { json: config.to_string(), values }),
            Some(EnvError::Unset { name, .. }) => {
                Err(format!("the environment variable {name} is not set; set it and start again"))
            }
            Some(EnvError::Unclosed { written } | EnvError::BadName { written, .. }) => {
                Err(format!("expected a variable such as ${{NAME}}, found {written}"))
            }
        }
    }

    /// Returns the names of its variables.
    ///
    /// # Errors
    /// The text is not a valid configuration.
    pub fn names(&self) -> Result<BTreeSet<String>, String> {
        let mut names = BTreeSet::new();
        if self.has_variables {
            each_string(&self.parse()?, &mut |text| names.extend(names_in(text)));
        }
        Ok(names)
    }

    /// Returns the configuration for a case of a plugin's tests, in which only texts with variables are treated as such
    /// (see [`substitute_set`]).
    ///
    /// # Errors
    /// The text is not a valid configuration.
    pub fn to_case(&self) -> Result<Value, String> {
        let mut config = self.parse()?;
        if self.has_variables {
            map_strings(&mut config, &mut |text| match names_in(text).is_empty() {
                true => substitute(text, &|_| None, &mut |_, _| {}).ok(),
                false => None,
            });
        }
        Ok(config)
    }

    /// Whether a configuration without variables could result from this one with some values.
    pub fn may_become(&self, json: &str) -> bool {
        let (Ok(written), Ok(found)) = (self.parse(), serde_json::from_str(json)) else {
            return false;
        };
        self.has_variables && may_become(&written, &found)
    }

    fn parse(&self) -> Result<Value, String> {
        serde_json::from_str(&self.json).map_err(|error| format!("invalid configuration: {error}"))
    }
}

/// Whether a value differs from the written one only in strings with variables.
fn may_become(written: &Value, found: &Value) -> bool {
    match (written, found) {
        (Value::String(text), Value::String(found)) => match names_in(text).is_empty() {
            true => substitute(text, &|_| None, &mut |_, _| {}).is_ok_and(|own| own == *found),
            false => fixed_parts(text).is_some_and(|parts| has_in_order(found, &parts)),
        },
        (Value::Array(written), Value::Array(found)) => {
            written.len() == found.len()
                && written.iter().zip(found).all(|(written, found)| may_become(written, found))
        }
        (Value::Object(written), Value::Object(found)) => {
            written.len() == found.len()
                && written.iter().all(|(key, written)| {
                    found.get(key).is_some_and(|found| may_become(written, found))
                })
        }
        (written, found) => written == found,
    }
}

/// Returns the parts of a text between its variables.
fn fixed_parts(text: &str) -> Option<Vec<String>> {
    // A NUL cannot appear in the text: TOML forbids it.
    let mark = |_: &str| Some("\0".to_owned());
    let marked = substitute(text, &mark, &mut |_, _| {}).ok()?;
    Some(marked.split('\0').map(str::to_owned).collect())
}

fn has_in_order(text: &str, parts: &[String]) -> bool {
    let [first, middle @ .., last] = parts else { return parts.iter().any(|only| only == text) };
    let Some(mut rest) = text.strip_prefix(first.as_str()) else { return false };
    for part in middle {
        let Some((_, after)) = rest.split_once(part.as_str()) else { return false };
        rest = after;
    }
    rest.ends_with(last.as_str())
}

fn each_string(value: &Value, look: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => look(text),
        Value::Array(values) => values.iter().for_each(|value| each_string(value, look)),
        Value::Object(members) => members.values().for_each(|value| each_string(value, look)),
        _ => {}
    }
}

fn map_strings(value: &mut Value, map: &mut impl FnMut(&str) -> Option<String>) {
    match value {
        Value::String(text) => {
            if let Some(mapped) = map(text) {
                *text = mapped;
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| map_strings(value, map)),
        Value::Object(members) => members.values_mut().for_each(|value| map_strings(value, map)),
        _ => {}
    }
}

/// Replaces the variables of a test case's configuration that are set. The others stay.
pub fn substitute_set(config: &mut Value, lookup: EnvLookup) {
    map_strings(config, &mut |text| match names_in(text).is_empty() {
        true => None,
        false => substitute(text, lookup, &mut |_, _| {}).ok(),
    });
}

/// Returns the names of the variables in a text; none if the text is invalid.
fn names_in(text: &str) -> Vec<String> {
    let names = std::cell::RefCell::new(Vec::new());
    let note = |name: &str| {
        names.borrow_mut().push(name.to_owned());
        Some(String::new())
    };
    let _ = substitute(text, &note, &mut |_, _| {});
    names.into_inner()
}

/// Replaces the variables in all string values of a table, at any depth.
pub(super) fn substitute_table(table: &mut DeTable<'_>, lookup: EnvLookup, check: &mut Check) {
    for (_, value) in table.iter_mut() {
        let span = value.span();
        substitute_value(value.get_mut(), span, lookup, check);
    }
}

fn substitute_value(value: &mut DeValue, span: Range<usize>, lookup: EnvLookup, check: &mut Check) {
    match value {
        DeValue::String(text) if text.contains('$') => {
            let replaced = substitute(text, lookup, &mut |name, value| check.hide(name, value));
            match replaced {
                Ok(replaced) => *text = replaced.into(),
                Err(error) => error.report(span, check),
            }
        }
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

/// Reason why the variables of a text could not be replaced; `written` is the invalid part.
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
                "missing `}` after `${`".to_owned(),
                "close it, or write `$${` for the two characters themselves".to_owned(),
            ),
            Self::BadName { name, written } => (
                written,
                format!("not a valid name of an environment variable: `{name}`"),
                "use letters, digits and `_`, not starting with a digit; write `$${` for the two \
                 characters themselves"
                    .to_owned(),
            ),
        };
        // Underline only the variable, if it appears literally in the file.
        let at = check.text(&string).find(&written).map(|at| string.start + at);
        let span = at.map_or(string, |start| start..start + written.len());
        check.problem(span, message, help);
    }
}

/// Replaces the variables of a text. `used` receives the name and value of each one that is set.
fn substitute(
    text: &str,
    lookup: EnvLookup,
    used: &mut dyn FnMut(&str, &str),
) -> Result<String, EnvError> {
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
            replaced.push_str(&expand(&after[..end], written, lookup, used)?);
            &after[end + 1..]
        } else {
            replaced.push('$');
            &from_dollar[1..]
        };
    }
    replaced.push_str(rest);
    Ok(replaced)
}

/// Returns the value of the text between `${` and `}`.
fn expand(
    inside: &str,
    written: &str,
    lookup: EnvLookup,
    used: &mut dyn FnMut(&str, &str),
) -> Result<String, EnvError> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(EnvError::BadName { name: name.into(), written: written.into() });
    }
    match (lookup(name), default) {
        (Some(value), None) => {
            used(name, &value);
            Ok(value)
        }
        (Some(value), Some(_)) if !value.is_empty() => {
            used(name, &value);
            Ok(value)
        }
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
        substitute(text, &lookup, &mut |_, _| {}).expect("a text whose variables are set")
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
        let substitute = |text: &str| substitute(text, &lookup, &mut |_, _| {});
        assert_eq!(substitute("x${UNSET}y"), Err(unset));
        let unclosed = EnvError::Unclosed { written: "${HOME_2".into() };
        assert_eq!(substitute("x${HOME_2"), Err(unclosed));
        for text in ["${}", "${2A}", "${A B}", "${A-b}", "${:-x}", "${ä}"] {
            let error = substitute(text).expect_err(text);
            assert!(matches!(error, EnvError::BadName { .. }), "{text}: {error:?}");
        }
    }

    fn text(written: &str) -> StageText {
        StageText { json: written.into(), has_variables: true }
    }

    #[test]
    fn wall_17_a_configuration_is_kept_as_written_and_resolved_when_it_is_needed() {
        let written = serde_json::json!({ "a": "x${HOME_2}", "b": ["$$5", "^a$"], "n": 1 });
        let kept = StageText::of_file(&written, "replaced");
        assert_eq!(kept, text(r#"{"a":"x${HOME_2}","b":["$$5","^a$"],"n":1}"#));
        let resolved = kept.resolve(&lookup).expect("set");
        assert_eq!(resolved.json, r#"{"a":"x/data","b":["$5","^a$"],"n":1}"#);
        assert_eq!(resolved.values.hide("no '/data' here".into()), "no '${HOME_2}' here");
        assert_eq!(kept.names(), Ok(BTreeSet::from(["HOME_2".to_owned()])));
        let unset = text(r#"{"a":"${UNSET}"}"#).resolve(&lookup).expect_err("unset");
        assert!(unset.contains("variable UNSET is not set"), "{unset}");
        // Without variables, the text is stored as it always was.
        let plain = StageText::of_file(&serde_json::json!({ "a": "^a$" }), r#"{"a":"^a$"}"#);
        assert_eq!(plain, StageText::plain(r#"{"a":"^a$"}"#));
        assert_eq!(plain.resolve(&lookup).expect("plain").json, r#"{"a":"^a$"}"#);
    }

    #[test]
    fn wall_17_what_an_earlier_version_kept_is_known_again() {
        let written = text(r#"{"a":"pre-${X}-post","b":"$$","c":["${X}",1]}"#);
        for (found, expected) in [
            (r#"{"a":"pre-secret-post","b":"$","c":["",1]}"#, true),
            (r#"{"a":"pre-secret","b":"$","c":["",1]}"#, false),
            (r#"{"a":"pre--post","b":"$$","c":["",1]}"#, false),
            (r#"{"a":"pre--post","b":"$","c":["",2]}"#, false),
            (r#"{"a":"pre--post","b":"$"}"#, false),
            (r#"{"a":"pre--post","b":"$","c":["",1],"d":1}"#, false),
            ("no JSON", false),
        ] {
            assert_eq!(written.may_become(found), expected, "{found}");
        }
    }
}
