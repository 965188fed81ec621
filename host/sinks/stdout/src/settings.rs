//! Settings of a sink on standard output: `[[sink]]` with `type = "stdout"`.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::StdoutSink;
use shardmill_config::reading::{Check, Maybe, RawCommit, Spanned, Text};
use shardmill_config::{
    CommitPolicy, Key, KeyDefault, KeyForm, ReadSink, SharedParts, SinkBuildError, SinkContext,
    SinkSettings, SinkTable, SinkType,
};
use shardmill_core::sink::Sink;

/// Sink type of standard output.
pub const TYPE: &dyn SinkType = &StdoutType;

struct StdoutType;

/// Lines on standard output.
#[derive(Clone, Debug, PartialEq)]
pub struct StdoutTarget {
    /// Template of a line, with `{field}` for a JSON field and `{shard}`, `{sequence}`, `{key}`, `{route}`; `None`: the
    /// payload as it is.
    pub template: Option<String>,
}

/// `[[sink]]` with `type = "stdout"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawStdout {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    template: Maybe<Text>,
    commit: Option<RawCommit>,
}

impl SinkType for StdoutType {
    fn name(&self) -> &'static str {
        "stdout"
    }

    fn about(&self) -> &'static str {
        "One line per row on standard output, at least once."
    }

    fn keys(&self) -> &'static [Key] {
        &[Key {
            name: "template",
            form: KeyForm::Text,
            default: KeyDefault::None,
            about: "The line, with `{field}` for a JSON field of the row and `{shard}`, `{sequence}`, `{key}`, \
                    `{route}`; without it: the row as it is.",
        }]
    }

    fn commit_policy(&self) -> CommitPolicy {
        // A person watches the lines, so commits are small.
        CommitPolicy::patient(1_000, 1 << 20, Duration::from_millis(200))
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let raw: RawStdout = table.shaped(check)?;
        let settings = target(raw.template, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(template: Maybe<Text>, check: &mut Check) -> Option<StdoutTarget> {
    let Some(template) = template else { return Some(StdoutTarget { template: None }) };
    let text = &template.get_ref().0;
    let mut rest = text.replace("{{", "").replace("}}", "");
    while let Some((_, after)) = rest.split_once('{') {
        match after.split_once('}') {
            Some((field, after)) if !field.is_empty() && !field.contains('{') => {
                rest = after.to_owned();
            }
            _ => {
                let message = "the template has a `{` that opens no field";
                let help = "fields are a row's JSON fields and {shard}, {sequence}, {key}, \
                            {route}: close each with `}`";
                check.problem(template.span(), message, help);
                return None;
            }
        }
    }
    Some(StdoutTarget { template: Some(text.clone()) })
}

impl SinkSettings for StdoutTarget {
    fn destination(&self) -> Option<String> {
        None
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn prints_rows(&self) -> bool {
        true
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        let (name, output) = (context.name.clone(), context.output.clone());
        Ok(Arc::new(StdoutSink::to(name, self.template.as_deref(), output)?))
    }
}
