//! Readers of single values: each validates one value, or notes a problem at its place.
//!
//! A reader that returns `None` has noted a problem. The caller continues with the next value, so that one run shows
//! all problems.

use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use toml::Spanned;
use toml::de::DeValue;

use super::diagnostic::{Problem, suggest};
use super::raw::{Count, DurationText, Maybe, Size, Text};
use super::{ConfigError, ConfigFile, Located};
use shardmill_core::values::Values;

/// Longest name: longer ones would not fit into object keys and file names together with their other parts.
const NAME_CHARS_MAX: usize = 64;
/// Rule of [`is_name`] in words, with [`NAME_CHARS_MAX`].
pub const NAME_RULE: &str =
    "letters, digits, `-` and `_`, starting with a letter or digit, at most 64 characters";

/// Range of the connections of a port: fewer are used up by one browser, and no proxy opens more.
pub(super) const CONNECTIONS_ALLOWED: RangeInclusive<u64> = 4..=65_536;

/// Keys of the host's own tables that take a list: the sinks of dead letters, the host names of the admin port, the
/// origins of the intake. Sink types name their own.
const LISTS: [&str; 3] = ["sinks", "hosts", "origins"];

/// Collects the problems of one file.
pub struct Check<'a> {
    file: &'a Arc<ConfigFile>,
    problems: Vec<Problem>,
    /// Values of the variables in the file.
    values: Values,
    /// Keys that take a list.
    lists: Vec<&'static str>,
}

impl<'a> Check<'a> {
    pub(crate) fn new(file: &'a Arc<ConfigFile>) -> Self {
        Self { file, problems: Vec::new(), values: Values::default(), lists: LISTS.to_vec() }
    }

    /// Adds keys that take a list.
    pub(crate) fn with_lists(mut self, lists: impl IntoIterator<Item = &'static str>) -> Self {
        self.lists.extend(lists);
        self
    }

    /// Whether a key takes a list.
    pub(crate) fn takes_list(&self, key: &str) -> bool {
        self.lists.contains(&key)
    }

    /// Hides the value of a variable in all later problems.
    pub(crate) fn hide(&mut self, name: &str, value: &str) {
        self.values.add(name, value);
    }

    /// Returns the values of the variables in the file.
    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// Notes a problem.
    pub fn problem(
        &mut self,
        span: Range<usize>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let (message, help) = (self.values.hide(message.into()), self.values.hide(help.into()));
        self.problems.push(Problem::new(self.file, Some(span), message, help));
    }

    /// Appends to the help text of the last problem.
    pub(crate) fn more_help(&mut self, help: &str) {
        if let Some(problem) = self.problems.last_mut() {
            problem.more_help(help);
        }
    }

    /// Whether a problem was noted.
    pub(crate) fn failed(&self) -> bool {
        !self.problems.is_empty()
    }

    /// Returns the text of the file at a place.
    pub fn text(&self, span: &Range<usize>) -> &'a str {
        self.file.text.get(span.clone()).unwrap_or_default()
    }

    /// Formats a place as `FILE:LINE:COLUMN`.
    pub fn place(&self, span: &Range<usize>) -> String {
        self.file.place(span)
    }

    /// Returns the value if there were no problems, or else all problems.
    pub(crate) fn finish<T>(mut self, value: Option<T>) -> Result<T, ConfigError> {
        if value.is_none() && self.problems.is_empty() {
            self.problem(0..0, "the configuration is incomplete", "");
        }
        match (value, ConfigError::from_problems(self.problems)) {
            (_, Some(error)) => Err(error),
            (Some(value), None) => Ok(value),
            (None, None) => unreachable!("a missing value has just been noted as a problem"),
        }
    }

    /// Reads a duration within a range.
    pub fn duration(
        &mut self,
        raw: &Maybe<DurationText>,
        default: Duration,
        allowed: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        let Some(raw) = raw else { return Some(default) };
        let text = &raw.get_ref().0;
        let value = match humantime::parse_duration(text) {
            Ok(value) => value,
            Err(cause) => {
                let message =
                    format!("not a valid duration: {text:?} ({})", duration_error(&cause));
                self.problem(raw.span(), message, "write for example \"200 ms\" or \"5 min\"");
                return None;
            }
        };
        self.within(raw.span(), value, allowed, |value| {
            humantime::format_duration(*value).to_string()
        })
    }

    /// Reads a number of bytes within a range.
    pub fn size(
        &mut self,
        raw: &Maybe<Size>,
        default: usize,
        allowed: RangeInclusive<usize>,
    ) -> Option<usize> {
        let Some(raw) = raw else { return Some(default) };
        let text = &raw.get_ref().0;
        let Some(value) = text.parse::<ByteSize>().ok().and_then(|size| size.0.try_into().ok())
        else {
            let message = format!("not a valid size: {text:?}");
            let help = "write for example \"256 KiB\", \"64 MiB\" or \"1 GiB\"";
            self.problem(raw.span(), message, help);
            return None;
        };
        self.within(raw.span(), value, allowed, |value| bytes_text(*value))
    }

    /// Reads a whole number within a range.
    pub fn count<T: TryFrom<u64>>(
        &mut self,
        raw: &Maybe<Count>,
        default: T,
        allowed: RangeInclusive<u64>,
    ) -> Option<T> {
        let Some(raw) = raw else { return Some(default) };
        let value = self.within(raw.span(), raw.get_ref().0, allowed, u64::to_string)?;
        T::try_from(value).ok()
    }

    fn within<T: PartialOrd>(
        &mut self,
        span: Range<usize>,
        value: T,
        allowed: RangeInclusive<T>,
        show: impl Fn(&T) -> String,
    ) -> Option<T> {
        if allowed.contains(&value) {
            return Some(value);
        }
        let (least, most) = (show(allowed.start()), show(allowed.end()));
        let message = format!("{} is out of range", show(&value));
        self.problem(span, message, format!("allowed: {least} to {most}"));
        None
    }

    /// Reads one of several words.
    pub fn choice<T: Copy>(
        &mut self,
        raw: &Maybe<Text>,
        noun: &str,
        default: T,
        words: &[(&str, T)],
    ) -> Option<T> {
        let Some(raw) = raw else { return Some(default) };
        let text = raw.get_ref().0.as_str();
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let help = suggest(text, "allowed", &words);
        self.problem(raw.span(), format!("not a valid {noun}: {text:?}"), help);
        None
    }

    /// Reads the `type` of a table, which decides its allowed keys.
    pub(crate) fn table_type(
        &mut self,
        table: &Spanned<DeValue<'_>>,
        noun: &str,
        types: &[&'static str],
    ) -> Option<&'static str> {
        let example = format!("add type = ...; {}", suggest("", "allowed", types));
        let Some(table_value) = table.get_ref().as_table() else {
            return types.first().copied(); // Whoever reads it reports what it is instead.
        };
        let Some(kind) = table_value.get("type") else {
            self.problem(table.span(), "the key `type` is missing", example);
            return None;
        };
        let Some(text) = kind.get_ref().as_str() else {
            self.problem(
                kind.span(),
                format!("invalid {noun} type: expected text in quotes"),
                example,
            );
            return None;
        };
        let known = types.iter().copied().find(|known| *known == text);
        if known.is_none() {
            let help = suggest(text, "allowed", types);
            self.problem(kind.span(), format!("unknown {noun} type: {text:?}"), help);
        }
        known
    }

    /// Reads a loopback address with a port. `why` explains why other addresses are refused.
    pub(crate) fn loopback(
        &mut self,
        raw: &Spanned<Text>,
        noun: &str,
        example: &str,
        why: &str,
    ) -> Option<SocketAddr> {
        let address = self.address(raw, example)?;
        if !address.ip().is_loopback() {
            let message = format!("the {noun} port cannot listen on {}", address.ip());
            let help = format!("{why}: \"127.0.0.1:{}\"", address.port());
            self.problem(raw.span(), message, help);
            return None;
        }
        Some(address)
    }

    /// Reads an address with a port.
    pub(crate) fn address(&mut self, raw: &Spanned<Text>, example: &str) -> Option<SocketAddr> {
        let text = &raw.get_ref().0;
        let address = text.parse::<SocketAddr>();
        if address.is_err() {
            let message = format!("not a valid address with a port: {text:?}");
            self.problem(raw.span(), message, format!("write for example \"{example}\""));
        }
        address.ok()
    }

    /// Reads a name that is safe in object keys, file names, metrics and log lines.
    pub fn name<N: for<'n> From<&'n str>>(
        &mut self,
        raw: &Spanned<Text>,
        noun: &str,
    ) -> Option<Located<N>> {
        let text = raw.get_ref().0.as_str();
        if is_name(text) {
            return Some(Located { value: N::from(text), span: raw.span() });
        }
        self.problem(raw.span(), format!("not a valid {noun} name: {text:?}"), NAME_RULE);
        None
    }

    /// Reads a text that is not empty.
    pub fn filled(&mut self, raw: &Spanned<Text>, noun: &str) -> Option<String> {
        let text = &raw.get_ref().0;
        if text.trim().is_empty() {
            self.problem(raw.span(), format!("the {noun} is empty"), format!("name a {noun}"));
            return None;
        }
        Some(text.clone())
    }
}

/// Whether a text is a valid name of a pipeline, stage or sink: it is safe in object keys, file names, metrics and log
/// lines.
pub fn is_name(text: &str) -> bool {
    text.len() <= NAME_CHARS_MAX
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// Describes in a few words why a duration is invalid.
fn duration_error(cause: &humantime::DurationError) -> String {
    match cause {
        humantime::DurationError::UnknownUnit { unit, .. } if unit.is_empty() => {
            "its unit is missing".to_owned()
        }
        humantime::DurationError::UnknownUnit { unit, .. } => format!("unknown unit {unit:?}"),
        humantime::DurationError::Empty => "it is empty".to_owned(),
        cause => cause.to_string(),
    }
}

/// Formats a number of bytes exactly, with the largest unit that divides it.
pub(crate) fn bytes_text(bytes: usize) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} B"),
    }
}
