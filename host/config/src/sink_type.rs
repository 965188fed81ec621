//! The contract of sink types, and the list of the types that a program has.

use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::raw::{RawCommit, Text};
use super::shape::shaped;
use super::{CommitPolicy, SinkSettings};

/// Type of sinks: the `type = "…"` of a `[[sink]]`.
///
/// Each is implemented in the crate of its sink, beside its settings, and listed once in the program ([`SinkTypes`]).
/// No other code knows its name or its keys.
pub trait SinkType: Sync {
    /// Returns the value of `type`.
    fn name(&self) -> &'static str;

    /// Returns its part of the reference, before the table of keys: a few sentences of Markdown.
    fn about(&self) -> &'static str;

    /// Returns the keys of its table, in the order in which they are read, without `name`, `type`, `renamed_from` and
    /// `commit`, which sinks of every type have.
    fn keys(&self) -> &'static [Key];

    /// Returns the default commit policy.
    fn commit_policy(&self) -> CommitPolicy;

    /// Reads the table of one sink. `None`: a problem was noted after which nothing else can be read.
    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink>;
}

/// Table of one sink, before it is read.
pub struct SinkTable<'t> {
    table: Spanned<DeValue<'t>>,
    base: &'t Path,
}

impl<'t> SinkTable<'t> {
    pub(super) fn new(table: Spanned<DeValue<'t>>, base: &'t Path) -> Self {
        Self { table, base }
    }

    /// Returns the folder at which its relative paths start.
    pub fn base(&self) -> &'t Path {
        self.base
    }

    /// Deserializes the table. The shape must have `name`, `type` and `commit` too, and deny unknown fields, so that
    /// the message about an unknown key lists all keys.
    pub fn shaped<T: DeserializeOwned>(self, check: &mut Check) -> Option<T> {
        shaped(self.table, check)
    }
}

/// Result of reading a sink's table.
pub struct ReadSink {
    pub(super) name: Spanned<Text>,
    pub(super) commit: Option<RawCommit>,
    pub(super) settings: Option<Arc<dyn SinkSettings>>,
}

impl ReadSink {
    /// Combines the name and the commit policy of a table with the type's own settings. The settings are `None` if a
    /// problem was noted.
    pub fn new<S: SinkSettings>(
        name: Spanned<Text>,
        commit: Option<RawCommit>,
        settings: Option<S>,
    ) -> Self {
        let settings = settings.map(|settings| Arc::new(settings) as Arc<dyn SinkSettings>);
        Self { name, commit, settings }
    }
}

/// Key of a sink's table, for the reference.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Name of the key.
    pub name: &'static str,
    /// Form of its value.
    pub form: KeyForm,
    /// Value if the key is left out.
    pub default: KeyDefault,
    /// Meaning: one sentence of Markdown.
    pub about: &'static str,
}

/// Form of a key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyForm {
    /// Text in quotes.
    Text,
    /// `true` or `false`.
    Flag,
    /// Whole number.
    Number,
    /// Text with a number and a unit of time.
    Duration,
    /// Text with a number and a unit of bytes.
    Size,
    /// List in brackets.
    List,
    /// Table.
    Table,
}

impl KeyForm {
    /// Returns the name of the form in the reference.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Flag => "true or false",
            Self::Number => "number",
            Self::Duration => "duration",
            Self::Size => "size",
            Self::List => "list",
            Self::Table => "table",
        }
    }
}

/// Value of a key that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyDefault {
    /// The key is required. Contains an example, as TOML.
    Required(&'static str),
    /// No value: the feature is off.
    None,
    /// A value, as TOML.
    Value(&'static str),
    /// A value that depends on the type of the sink.
    ByType,
}

/// Sink types of a program, in the order in which messages list them.
///
/// ```
/// use shardmill_config::{SinkTypes, parse};
///
/// const TYPES: SinkTypes = SinkTypes::new(&[]);
/// let text = "[pipeline]\nname = \"p\"\n[source]\ntype = \"file\"\npath = \"-\"\n\
///             [[sink]]\nname = \"a\"\ntype = \"stdout\"\n";
/// let error = parse("pipeline.toml", text, &TYPES, &|_| None).unwrap_err();
/// assert_eq!(error.to_string(), "pipeline.toml:8:8: unknown sink type: \"stdout\"");
/// ```
#[derive(Clone, Copy)]
pub struct SinkTypes(&'static [&'static dyn SinkType]);

impl SinkTypes {
    /// Makes a list of types, whose names must differ.
    pub const fn new(types: &'static [&'static dyn SinkType]) -> Self {
        Self(types)
    }

    /// Iterates over the types.
    pub fn iter(&self) -> impl Iterator<Item = &'static dyn SinkType> {
        self.0.iter().copied()
    }

    pub(super) fn names(&self) -> Vec<&'static str> {
        self.iter().map(SinkType::name).collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<&'static dyn SinkType> {
        self.iter().find(|known| known.name() == name)
    }

    /// Returns the keys that take a list.
    pub(super) fn lists(&self) -> impl Iterator<Item = &'static str> {
        let keys = self.iter().flat_map(SinkType::keys);
        keys.filter(|key| key.form == KeyForm::List).map(|key| key.name)
    }
}
