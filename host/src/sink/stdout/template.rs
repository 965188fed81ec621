//! Line templates: `getRecords [{shard}]: {make} [# {id}]`.
//!
//! Parsed once, with the place of a mistake; rendered per row without I/O.

use serde_json::Value;

use crate::record::{Row, ShardId};
use crate::terminal::escaped;

/// A template that is malformed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem} at character {character} of template {template:?}")]
pub struct TemplateError {
    /// What is wrong and what to write instead.
    pub problem: String,
    /// Where, in characters from 1.
    pub character: usize,
    /// The whole template.
    pub template: String,
}

/// What a template can name of a row.
pub(super) struct RowContext<'a> {
    pub(super) shard: &'a ShardId,
    pub(super) row: &'a Row,
}

/// A parsed template.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Shard,
    Sequence,
    Key,
    Route,
    /// A field of the JSON payload, by the names on the way to it.
    Field(Vec<String>),
}

impl Template {
    /// Reads a template.
    pub(super) fn parse(template: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = template;
        let error = |rest: &str, problem: &str| TemplateError {
            problem: problem.into(),
            character: template[..template.len() - rest.len()].chars().count() + 1,
            template: template.into(),
        };
        while let Some(at) = rest.find(['{', '}', '\n', '\r']) {
            text.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("{{").or_else(|| rest.strip_prefix("}}")) {
                text.push_str(&rest[..1]);
                rest = after;
                continue;
            }
            let Some(inside) = rest.strip_prefix('{') else {
                return Err(error(rest, lone(rest)));
            };
            let Some((name, after)) = inside.split_once('}') else {
                return Err(error(rest, "a { that is not closed (write {{ for a brace)"));
            };
            let part = placeholder(name).map_err(|problem| error(inside, problem))?;
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(part);
            rest = after;
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        Ok(Self { parts })
    }

    /// Whether it names a field of the payload, which must then be JSON.
    pub(super) fn reads_payload(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Field(_)))
    }

    /// Appends the line of a row, without a line end.
    pub(super) fn render(
        &self,
        context: &RowContext<'_>,
        line: &mut Vec<u8>,
    ) -> Result<(), String> {
        let row = context.row;
        let payload = if self.reads_payload() { parse_payload(&row.payload)? } else { Value::Null };
        for part in &self.parts {
            match part {
                Part::Text(text) => line.extend_from_slice(text.as_bytes()),
                Part::Shard => push_text(context.shard.as_str(), line),
                Part::Sequence => push_text(&row.position().to_string(), line),
                Part::Key => push_text(&String::from_utf8_lossy(&row.key), line),
                Part::Route => push_text(row.route.name().as_str(), line),
                Part::Field(path) => match find(&payload, path) {
                    Some(Value::String(text)) => push_text(text, line),
                    Some(value) => push_text(&value.to_string(), line),
                    None => return Err(format!("payload has no field {}", path.join("."))),
                },
            }
        }
        Ok(())
    }
}

fn lone(rest: &str) -> &'static str {
    match rest.starts_with('}') {
        true => "a } without its { (write }} for a brace)",
        false => "a line end: a template makes one line",
    }
}

fn placeholder(name: &str) -> Result<Part, &'static str> {
    match name {
        "" => Err("an empty name: write {field}, {shard}, {sequence}, {key} or {route}"),
        "shard" => Ok(Part::Shard),
        "sequence" => Ok(Part::Sequence),
        "key" => Ok(Part::Key),
        "route" => Ok(Part::Route),
        _ if name.contains('{') => Err("a { inside a name: the one before it is not closed"),
        _ => {
            let path = name.strip_prefix('.').unwrap_or(name);
            let path: Vec<_> = path.split('.').map(String::from).collect();
            if path.iter().any(String::is_empty) {
                return Err("an empty name between dots: write {outer.inner}");
            }
            Ok(Part::Field(path))
        }
    }
}

fn parse_payload(payload: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(payload).map_err(|error| format!("payload is no JSON: {error}"))
}

/// The value at a path; a number is an index into an array.
fn find<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, name| match value {
        Value::Array(items) => items.get(name.parse::<usize>().ok()?),
        _ => value.get(name),
    })
}

/// Control characters are escaped: a value can neither break the line nor steer a terminal.
fn push_text(text: &str, line: &mut Vec<u8>) {
    if !text.contains(char::is_control) {
        line.extend_from_slice(text.as_bytes());
        return;
    }
    line.extend_from_slice(escaped(text, &[]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_name_their_place() {
        let place = |template: &str| Template::parse(template).err().map(|error| error.character);
        assert_eq!(place("ä {make"), Some(3));
        assert_eq!(place("a } b"), Some(3));
        assert_eq!(place("a {} b"), Some(4));
        assert_eq!(place("{a..b}"), Some(2));
        assert_eq!(place("{a {b}"), Some(2));
        assert_eq!(place("a\nb"), Some(2));
        assert_eq!(place("{{}} {a.b} {.key}"), None);
    }

    #[test]
    fn braces_are_escaped_by_doubling() {
        let template = Template::parse("{{{make}}}").expect("a template");
        let field = Part::Field(vec!["make".into()]);
        assert_eq!(template.parts, [Part::Text("{".into()), field, Part::Text("}".into())]);
    }

    #[test]
    fn control_characters_stay_visible() {
        let mut line = Vec::new();
        push_text("a\n\u{1b}[1mé", &mut line);
        assert_eq!(String::from_utf8_lossy(&line), "a\\n\\u{1b}[1mé");
    }
}
