//! Templates of lines, such as `getRecords [{shard}]: {make} [# {id}]`.
//!
//! A template is parsed once; errors have their place. A row is checked before anything of its line is written. The
//! line is then written in pieces: a template may repeat a large field, so the whole line is never in memory.

use std::io::{self, Write};

use super::json;
use shardmill_core::escape::controls_terminal;
use shardmill_core::record::{Row, ShardId};

/// Error of an invalid template.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem} at character {character} of template {template:?}")]
pub struct TemplateError {
    /// Problem, and what to write instead.
    pub problem: String,
    /// Place, in characters from 1.
    pub character: usize,
    /// Whole template.
    pub template: String,
}

/// A row and its shard, which a template can use.
pub(super) struct RowContext<'a> {
    pub(super) shard: &'a ShardId,
    pub(super) row: &'a Row,
}

/// A parsed template.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LineTemplate {
    parts: Vec<Part>,
    /// Fields of the JSON payload that it uses, each once, as paths of names.
    paths: Vec<Vec<String>>,
    /// The same paths as a tree, with which one pass over the payload finds all of them.
    names: Names,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Shard,
    Sequence,
    Key,
    Route,
    /// A field of the JSON payload, as an index into the template's paths.
    Field(usize),
}

/// Tree of the paths below one value of the payload.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    /// Index of the path that ends here.
    path: Option<usize>,
    below: Vec<(String, Names)>,
}

impl Names {
    fn add(&mut self, names: &[String], path: usize) {
        let Some((first, rest)) = names.split_first() else {
            self.path = Some(path);
            return;
        };
        let known = self.below.iter().position(|(name, _)| name == first);
        let at = known.unwrap_or_else(|| {
            self.below.push((first.clone(), Self::default()));
            self.below.len() - 1
        });
        self.below[at].1.add(rest, path);
    }

    /// Finds the values of the paths. A number is an index into an array. Of several members of one name, the last one
    /// counts.
    fn find<'p>(&self, value: &'p str, found: &mut [Option<&'p str>]) {
        if let Some(path) = self.path {
            found[path] = Some(value);
        }
        if self.below.is_empty() {
            return;
        }
        let mut last = vec![None; self.below.len()];
        for (index, (key, item)) in json::items(value).enumerate() {
            for ((name, _), last) in self.below.iter().zip(&mut last) {
                let is_named = match key {
                    Some(key) => json::is_text(key, name),
                    None => name.parse::<usize>().is_ok_and(|named| named == index),
                };
                if is_named {
                    *last = Some(item);
                }
            }
        }
        for ((_, names), last) in self.below.iter().zip(last) {
            if let Some(item) = last {
                names.find(item, found);
            }
        }
    }
}

impl LineTemplate {
    /// Parses a template.
    pub(super) fn parse(template: &str) -> Result<Self, TemplateError> {
        let (mut parts, mut paths) = (Vec::new(), Vec::new());
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
                return Err(error(rest, "a { without its } (write {{ for a brace)"));
            };
            let part = placeholder(name, &mut paths).map_err(|problem| error(inside, problem))?;
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
        let mut names = Names::default();
        for (index, path) in paths.iter().enumerate() {
            names.add(path, index);
        }
        Ok(Self { parts, paths, names })
    }

    /// Returns whether it uses a field of the payload, which must then be JSON.
    pub(super) fn reads_payload(&self) -> bool {
        !self.paths.is_empty()
    }

    /// Checks that a row can be a line, before anything of it is written.
    ///
    /// # Errors
    /// The reason why it cannot, as a fragment for a dead letter.
    pub(super) fn check(&self, row: &Row) -> Result<(), String> {
        if !self.reads_payload() {
            return Ok(());
        }
        let payload = json::checked(&row.payload)
            .map_err(|error| format!("payload is not valid JSON: {error}"))?;
        match self.paths.iter().zip(self.find(payload)).find(|(_, value)| value.is_none()) {
            Some((path, _)) => Err(format!("payload has no field {}", path.join("."))),
            None => Ok(()),
        }
    }

    /// Writes the line of a checked row, in pieces and without a line end.
    ///
    /// # Errors
    /// The errors of the output.
    pub(super) fn write(&self, context: &RowContext<'_>, line: &mut dyn Write) -> io::Result<()> {
        let row = context.row;
        let payload = match self.reads_payload() {
            true => std::str::from_utf8(&row.payload).map_err(io::Error::other)?,
            false => "",
        };
        let values = self.find(payload).into_iter();
        let values: Vec<Option<Shown<'_>>> =
            values.map(|value| value.map(Shown::new).transpose()).collect::<io::Result<_>>()?;
        for part in &self.parts {
            match part {
                Part::Text(text) => line.write_all(text.as_bytes())?,
                Part::Shard => write_text(context.shard.as_str(), line)?,
                Part::Sequence => write_text(&row.position().to_string(), line)?,
                Part::Key => write_text(&String::from_utf8_lossy(&row.key), line)?,
                Part::Route => write_text(row.route.name().as_str(), line)?,
                Part::Field(path) => {
                    if let Some(value) = &values[*path] {
                        value.write(line)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the value of each path in the payload.
    fn find<'p>(&self, payload: &'p str) -> Vec<Option<&'p str>> {
        let mut found = vec![None; self.paths.len()];
        self.names.find(payload.trim_ascii(), &mut found);
        found
    }
}

fn lone(rest: &str) -> &'static str {
    match rest.starts_with('}') {
        true => "a } without its { (write }} for a brace)",
        false => "a line end: a template makes one line",
    }
}

fn placeholder(name: &str, paths: &mut Vec<Vec<String>>) -> Result<Part, &'static str> {
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
            let known = paths.iter().position(|known| *known == path);
            Ok(Part::Field(known.unwrap_or_else(|| {
                paths.push(path);
                paths.len() - 1
            })))
        }
    }
}

/// A value of the payload, which a line may repeat.
struct Shown<'p> {
    value: &'p str,
    has_control: bool,
}

impl<'p> Shown<'p> {
    fn new(value: &'p str) -> io::Result<Self> {
        let mut has_control = false;
        json::pieces(value, &mut |piece| {
            has_control = has_control || piece.contains(char::is_control);
            Ok(())
        })?;
        Ok(Self { value, has_control })
    }

    /// Writes the value as [`write_text`] would write the whole text.
    fn write(&self, line: &mut dyn Write) -> io::Result<()> {
        json::pieces(self.value, &mut |piece| match self.has_control {
            true => write_escaped(piece, line),
            false => line.write_all(piece.as_bytes()),
        })
    }
}

/// Writes a text with its control characters escaped, so that a value can neither break the line nor control a
/// terminal.
fn write_text(text: &str, line: &mut dyn Write) -> io::Result<()> {
    match text.contains(char::is_control) {
        true => write_escaped(text, line),
        false => line.write_all(text.as_bytes()),
    }
}

fn write_escaped(text: &str, line: &mut dyn Write) -> io::Result<()> {
    let mut rest = text;
    while let Some((at, c)) = rest.char_indices().find(|(_, c)| controls_terminal(*c)) {
        line.write_all(&rest.as_bytes()[..at])?;
        write!(line, "{}", c.escape_default())?;
        rest = &rest[at + c.len_utf8()..];
    }
    line.write_all(rest.as_bytes())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use shardmill_core::escape::escaped;

    #[test]
    fn mistakes_name_their_place() {
        let place =
            |template: &str| LineTemplate::parse(template).err().map(|error| error.character);
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
        let template = LineTemplate::parse("{{{make}}}").expect("a template");
        assert_eq!(
            template.parts,
            [Part::Text("{".into()), Part::Field(0), Part::Text("}".into())]
        );
        assert_eq!(template.paths, [["make"]]);
    }

    #[test]
    fn a_field_that_is_named_twice_is_looked_for_once() {
        let template = LineTemplate::parse("{a} {a.b} {a} {.a}").expect("a template");
        assert_eq!(template.paths, [vec!["a"], vec!["a", "b"]]);
    }

    #[test]
    fn control_characters_stay_visible() {
        let mut line = Vec::new();
        write_text("a\n\u{1b}[1mé", &mut line).expect("a Vec takes all");
        assert_eq!(String::from_utf8_lossy(&line), "a\\n\\u{1b}[1mé");
    }

    /// Returns the value at a path in a tree of the whole payload, as a reference for the comparison.
    fn in_tree(payload: &Value, path: &str) -> Option<String> {
        let value = path.split('.').try_fold(payload, |value, name| match value {
            Value::Array(items) => items.get(name.parse::<usize>().ok()?),
            _ => value.get(name),
        })?;
        let text = match value {
            Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        match text.contains(char::is_control) {
            true => Some(escaped(&text, &[])),
            false => Some(text),
        }
    }

    #[test]
    fn a_field_has_the_text_that_a_tree_of_the_payload_gives_it() {
        let payload = r#"
            { "a": { "b" : 12345678901234567890.10, "b\u0063": [ 1E5, [ ], {"d": "x\ny"} ] },
              "text": "plain é", "quoted": "a \"b\" \\ \/", "control": "k\n\u001b[1m\u202e",
              "format": "a\u202eb", "delete": ["\u007f\u202e"], "none": null, "no": false,
              "twice": {"x": 1}, "twice": {"y": [2]}, "1": "one", "face": "\ud83d\ude00" }
        "#;
        let tree: Value = serde_json::from_str(payload).expect("JSON");
        let text = json::checked(payload.as_bytes()).expect("JSON");
        for path in [
            "a",
            "a.b",
            "a.bc",
            "a.bc.0",
            "a.bc.1",
            "a.bc.2.d",
            "a.bc.3",
            "a.bc.x",
            "a.b.c",
            "text",
            "text.0",
            "quoted",
            "control",
            "format",
            "delete",
            "delete.0",
            "none",
            "no",
            "twice",
            "twice.x",
            "twice.y.0",
            "twice.y.+0",
            "1",
            "0",
            "face",
            "missing",
        ] {
            let template = LineTemplate::parse(&format!("{{.{path}}}")).expect("a template");
            let written = template.find(text)[0].map(|value| {
                let mut line = Vec::new();
                let shown = Shown::new(value).expect("text");
                shown.write(&mut line).expect("a Vec takes all");
                String::from_utf8(line).expect("UTF-8")
            });
            assert_eq!(written, in_tree(&tree, path), "{path}");
        }
    }
}
