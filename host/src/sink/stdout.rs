//! Standard output: one line per row, at least once.
//!
//! A terminal keeps no position, so the host keeps it; after a crash, up to a second's rows may be
//! printed again.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{Acquired, BoundRoute, Commit, Committed, RefusalLog, Sink, SinkError, SinkWriter};
use crate::record::{Position, Row, ShardKey, SinkName};

/// Where the lines go.
pub type Output = Arc<Mutex<dyn Write + Send>>;

/// Prints rows.
pub struct StdoutSink {
    name: SinkName,
    template: Option<Arc<Template>>,
    output: Output,
}

impl StdoutSink {
    /// Prints on standard output, as the template says; without one the payload as it is.
    ///
    /// # Errors
    /// A template that cannot be read, and where.
    pub fn new(name: SinkName, template: Option<&str>) -> anyhow::Result<Self> {
        Self::to(name, template, Arc::new(Mutex::new(std::io::stdout())))
    }

    /// Prints elsewhere.
    ///
    /// # Errors
    /// A template that cannot be read, and where.
    pub fn to(name: SinkName, template: Option<&str>, output: Output) -> anyhow::Result<Self> {
        let template = template.map(Template::parse).transpose();
        let template =
            template.map_err(|error| anyhow::anyhow!("sink {name}: template: {error}"))?;
        Ok(Self { name, template: template.map(Arc::new), output })
    }
}

#[async_trait]
impl Sink for StdoutSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        Ok(())
    }

    async fn acquire(&self, _shard: &ShardKey) -> Result<Acquired, SinkError> {
        let writer = StdoutWriter {
            name: self.name.clone(),
            template: self.template.clone(),
            output: self.output.clone(),
        };
        Ok(Acquired {
            writer: Box::new(writer),
            position: None,
            keeps_position: false,
            must_cut_at: None,
        })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }
}

struct StdoutWriter {
    name: SinkName,
    template: Option<Arc<Template>>,
    output: Output,
}

#[async_trait]
impl SinkWriter for StdoutWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        _refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let mut lines = Vec::new();
        for row in &commit.rows {
            match &self.template {
                Some(template) => template.write(row, &mut lines),
                None => lines.extend_from_slice(&row.payload),
            }
            lines.push(b'\n');
        }
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        output.write_all(&lines).and_then(|()| output.flush()).map_err(|cause| {
            SinkError::Unavailable {
                sink: self.name.clone(),
                cause: format!("failed to print: {cause}"),
            }
        })?;
        Ok(Committed {
            rows_written: commit.rows.len() as u64,
            rows_refused: 0,
            bytes_written: lines.len() as u64,
        })
    }
}

/// A line with `{field}`s.
#[derive(Debug, PartialEq, Eq)]
struct Template(Vec<Part>);

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Shard,
    Sequence,
    Key,
    Route,
    /// A field of the JSON payload, by its path.
    Field(Vec<String>),
}

impl Template {
    /// Reads `text {name} {{literal}}`.
    fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut characters = text.char_indices().peekable();
        while let Some((at, character)) = characters.next() {
            match character {
                '{' | '}' if characters.next_if(|(_, next)| *next == character).is_some() => {
                    literal.push(character);
                }
                '{' => {
                    let name: String =
                        characters.by_ref().map(|(_, c)| c).take_while(|c| *c != '}').collect();
                    if name.is_empty() || !text[at..].contains('}') {
                        return Err(format!("character {at}: `{{` begins a field `{{name}}`; write `{{{{` for the brace"));
                    }
                    parts.push(Part::Text(std::mem::take(&mut literal)));
                    parts.push(Part::named(&name));
                }
                '}' => {
                    return Err(format!("character {at}: `}}` ends no field; write `}}}}` for the brace"));
                }
                other => literal.push(other),
            }
        }
        parts.push(Part::Text(literal));
        Ok(Self(parts))
    }

    fn write(&self, row: &Row, line: &mut Vec<u8>) {
        let payload: Option<serde_json::Value> = match self.0.iter().any(|part| matches!(part, Part::Field(_))) {
            true => serde_json::from_slice(&row.payload).ok(),
            false => None,
        };
        for part in &self.0 {
            match part {
                Part::Text(text) => line.extend_from_slice(text.as_bytes()),
                Part::Shard => line.extend_from_slice(row.batch.shard.shard.as_str().as_bytes()),
                Part::Sequence => line.extend_from_slice(row.position().to_string().as_bytes()),
                Part::Key => line.extend_from_slice(&row.key),
                Part::Route => line.extend_from_slice(row.route.as_str().as_bytes()),
                Part::Field(path) => {
                    let field = path.iter().try_fold(payload.as_ref(), |value, step| {
                        value.map(|value| value.get(step))
                    });
                    match field.flatten() {
                        Some(serde_json::Value::String(text)) => {
                            line.extend_from_slice(text.as_bytes());
                        }
                        Some(value) => line.extend_from_slice(value.to_string().as_bytes()),
                        None => {}
                    }
                }
            }
        }
    }
}

impl Part {
    fn named(name: &str) -> Self {
        match name {
            "shard" => Self::Shard,
            "sequence" => Self::Sequence,
            "key" => Self::Key,
            "route" => Self::Route,
            path => Self::Field(path.split('.').map(str::to_owned).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_are_fields_or_doubled() {
        let template = Template::parse("a {shard} {{b}} {x.y}").expect("sound");
        let text = |text: &str| Part::Text(text.into());
        let path = Part::Field(vec!["x".into(), "y".into()]);
        assert_eq!(template.0, [text("a "), Part::Shard, text(" {b} "), path, text("")]);
    }

    #[test]
    fn a_brace_alone_is_refused() {
        for text in ["{", "a {b", "}", "{}"] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }
}
