//! Sink types: the contract by which a crate brings one, and the list of those that a program has.

use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::raw::{RawCommit, Text};
use super::shape::shaped;
use super::{CommitPolicy, SinkSettings};

/// A type of sinks: what `type = "…"` of a `[[sink]]` stands for.
///
/// Each is implemented in the crate of its sink, beside the settings that it reads, and named once in the program's
/// list ([`SinkTypes`]). Nothing else of the program knows its name or its keys.
pub trait SinkType: Sync {
    /// The value of `type`.
    fn name(&self) -> &'static str;

    /// Its part of the reference, before the table of its keys: a few sentences of Markdown.
    fn about(&self) -> &'static str;

    /// The keys of its table, in the order in which they are read: all but `name`, `type`, `renamed_from` and
    /// `commit`, which sinks of every type have.
    fn keys(&self) -> &'static [Key];

    /// When its sinks commit by default.
    fn commit_policy(&self) -> CommitPolicy;

    /// Reads the table of one sink. `None`: a problem was noted that leaves nothing to go on with.
    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink>;
}

/// The table of one sink, before it is read.
pub struct SinkTable<'t> {
    table: Spanned<DeValue<'t>>,
    base: &'t Path,
}

impl<'t> SinkTable<'t> {
    pub(super) fn new(table: Spanned<DeValue<'t>>, base: &'t Path) -> Self {
        Self { table, base }
    }

    /// The folder that relative paths in it start from.
    pub fn base(&self) -> &'t Path {
        self.base
    }

    /// Reads the table by its shape. The shape has `name`, `type` and `commit` too, and denies unknown fields, so
    /// that a message about an unknown key names all keys.
    pub fn shaped<T: DeserializeOwned>(self, check: &mut Check) -> Option<T> {
        shaped(self.table, check)
    }
}

/// Outcome of reading a sink's table.
pub struct ReadSink {
    pub(super) name: Spanned<Text>,
    pub(super) commit: Option<RawCommit>,
    pub(super) settings: Option<Arc<dyn SinkSettings>>,
}

impl ReadSink {
    /// A sink with the name and the commit policy as they are in its table, and its own settings. Without these, a
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

/// A key of a sink's table, for the reference.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The key.
    pub name: &'static str,
    /// The form of its value.
    pub form: KeyForm,
    /// Value that holds without it.
    pub default: KeyDefault,
    /// Meaning of the key: one sentence of Markdown.
    pub about: &'static str,
}

/// The form of a key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyForm {
    /// Text in quotes.
    Text,
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Number,
    /// Text with a number and a unit of time.
    Duration,
    /// Text with a number and a unit of bytes.
    Size,
    /// A list in brackets.
    List,
    /// A table.
    Table,
}

impl KeyForm {
    /// The form as the reference names it.
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

/// Value that holds where a key is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyDefault {
    /// It cannot be left out. An example, as TOML has it.
    Required(&'static str),
    /// Nothing: what it asks for is not done.
    None,
    /// A value, as TOML has it.
    Value(&'static str),
    /// A value that the sink's type decides.
    ByType,
}

/// The sink types of a program, in the order in which messages name them.
///
/// ```
/// use shardmill_config::{SinkTypes, parse};
///
/// const TYPES: SinkTypes = SinkTypes::new(&[]);
/// let text = "[pipeline]\nname = \"p\"\n[source]\ntype = \"file\"\npath = \"-\"\n\
///             [[sink]]\nname = \"a\"\ntype = \"stdout\"\n";
/// let error = parse("pipeline.toml", text, &TYPES, &|_| None).unwrap_err();
/// assert_eq!(error.to_string(), "pipeline.toml:8:8: \"stdout\" is no sink type");
/// ```
#[derive(Clone, Copy)]
pub struct SinkTypes(&'static [&'static dyn SinkType]);

impl SinkTypes {
    /// A list of types, each with a name of its own.
    pub const fn new(types: &'static [&'static dyn SinkType]) -> Self {
        Self(types)
    }

    /// The types.
    pub fn iter(&self) -> impl Iterator<Item = &'static dyn SinkType> {
        self.0.iter().copied()
    }

    pub(super) fn names(&self) -> Vec<&'static str> {
        self.iter().map(SinkType::name).collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<&'static dyn SinkType> {
        self.iter().find(|known| known.name() == name)
    }

    /// The keys that take a list.
    pub(super) fn lists(&self) -> impl Iterator<Item = &'static str> {
        let keys = self.iter().flat_map(SinkType::keys);
        keys.filter(|key| key.form == KeyForm::List).map(|key| key.name)
    }
}
