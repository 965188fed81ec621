//! Problems of a configuration, each with its place in the file.
//!
//! A problem has one place, one sentence and one help text. The underlined text is that of the file, with `${VAR}` as
//! written. Messages repeat values only where no secret is expected (names, durations, sizes, choices), never those of
//! URLs, connections and options.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use miette::{
    Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError,
    MietteSpanContents, SourceCode, SourceSpan, SpanContents,
};

use super::ConfigFile;
use shardmill_core::escape::{printable, printable_styled};

/// All problems of one configuration, in the order of the file.
///
/// Its `Display` is one line per problem, each starting with `FILE:LINE:COLUMN`. [`ConfigError::render`] also shows the
/// underlined text and the help.
#[derive(Debug)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

/// One problem.
#[derive(Debug, Clone)]
pub struct Problem {
    file: Arc<ConfigFile>,
    span: Option<Range<usize>>,
    message: String,
    help: Option<String>,
}

impl ConfigFile {
    /// Makes the error for a problem that a later check finds (a missing plugin file, an undeclared route) at `span` of
    /// this file. `message` is a lower-case fragment; `help`, if not empty, says what to write instead.
    pub fn problem(
        self: &Arc<Self>,
        span: Range<usize>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> ConfigError {
        ConfigError { problems: vec![Problem::new(self, Some(span), message.into(), help.into())] }
    }

    /// Formats the beginning of a span as `FILE:LINE:COLUMN`. Both numbers count from 1, columns in characters.
    pub fn place(&self, span: &Range<usize>) -> String {
        let (line, column) = self.line_and_column(span.start);
        format!("{}:{line}:{column}", self.path.display())
    }

    fn line_and_column(&self, offset: usize) -> (usize, usize) {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
        (line, column)
    }
}

impl ConfigError {
    /// Joins the problems of several errors, in the order of the file; `None` if there are none.
    pub fn join(errors: impl IntoIterator<Item = ConfigError>) -> Option<ConfigError> {
        Self::from_problems(errors.into_iter().flat_map(|error| error.problems).collect())
    }

    /// Returns the problems, in the order of the file; at least one.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Returns the whole report: place, underlined text and help of each problem. Without `terminal` it is plain ASCII
    /// without colours, with one line per message.
    pub fn render(&self, terminal: bool) -> String {
        let theme = if terminal { GraphicalTheme::unicode() } else { GraphicalTheme::none() };
        let handler = GraphicalReportHandler::new_themed(theme)
            .with_links(false)
            .with_wrap_lines(false)
            .without_syntax_highlighting();
        let mut text = String::new();
        for problem in &self.problems {
            if handler.render_report(&mut text, problem).is_err() {
                text.push_str(&format!("{problem}\n"));
            }
        }
        // The report also contains text of the file.
        match terminal {
            true => printable_styled(&text),
            false => printable(&text).into_owned(),
        }
    }

    pub(super) fn from_problems(mut problems: Vec<Problem>) -> Option<ConfigError> {
        // The sort is stable: problems at one place stay in the order in which they were found.
        problems.sort_by_key(|problem| problem.span.as_ref().map(|span| span.start));
        (!problems.is_empty()).then_some(ConfigError { problems })
    }

    /// Makes the error for a file that cannot be read.
    pub(super) fn unreadable(path: &Path, cause: &std::io::Error) -> ConfigError {
        let file = ConfigFile { path: path.to_owned(), text: String::new() };
        let message = format!("failed to read the configuration: {cause}");
        let help = "name a readable pipeline file";
        ConfigError { problems: vec![Problem::new(&Arc::new(file), None, message, help.into())] }
    }
}

impl Problem {
    pub(super) fn new(
        file: &Arc<ConfigFile>,
        span: Option<Range<usize>>,
        message: String,
        help: String,
    ) -> Self {
        let span = span.map(|span| visible(&file.text, span));
        // Both may contain text of a plugin.
        let (message, help) = (printable(&message).into_owned(), printable(&help).into_owned());
        Self { file: Arc::clone(file), span, message, help: (!help.is_empty()).then_some(help) }
    }

    pub(super) fn more_help(&mut self, more: &str) {
        self.help.get_or_insert_default().push_str(more);
    }

    /// Returns the message, without the place.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the help: what to write instead.
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// Returns `FILE:LINE:COLUMN`, or only the file if the problem has no place in it.
    pub fn place(&self) -> String {
        match &self.span {
            Some(span) => self.file.place(span),
            None => self.file.path.display().to_string(),
        }
    }
}

/// Adjusts a span so that it can be shown: within the text, at character boundaries, on one line, and at least one
/// character wide if the line has one there.
fn visible(text: &str, span: Range<usize>) -> Range<usize> {
    let mut start = span.start.min(text.len());
    if start == text.len() {
        // At the end of the file: point at the last visible character.
        start = text.trim_end().len().saturating_sub(1);
    }
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let line = text[start..].split(['\r', '\n']).next().unwrap_or_default();
    let mut end = span.end.clamp(start, start + line.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    if end == start {
        end += line.chars().next().map_or(0, char::len_utf8);
    }
    start..end
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place(), self.message)
    }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.span.as_ref().map(|_| &*self.file as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let span = self.span.clone()?;
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(None, SourceSpan::from(span)))))
    }
}

impl SourceCode for ConfigFile {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        context_lines_before: usize,
        context_lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let contents = self.text.read_span(span, context_lines_before, context_lines_after)?;
        // miette counts columns in bytes; all places shown to users count characters.
        let (_, column) = self.line_and_column(contents.span().offset());
        Ok(Box::new(MietteSpanContents::new_named(
            self.path.display().to_string(),
            contents.data(),
            *contents.span(),
            contents.line(),
            column - 1,
            contents.line_count(),
        )))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// For callers that print with miette: the first problem, with the others as related ones.
impl Diagnostic for ConfigError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.problems.first().and_then(Diagnostic::help)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.problems.first().and_then(Diagnostic::source_code)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        self.problems.first().and_then(Diagnostic::labels)
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        let rest = self.problems.get(1..).filter(|rest| !rest.is_empty())?;
        Some(Box::new(rest.iter().map(|problem| problem as &dyn Diagnostic)))
    }
}

/// Returns the candidate that was probably meant, if one is similar enough.
pub(crate) fn did_you_mean<'a>(
    written: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    /// Below this similarity (0 to 1) a suggestion misleads more often than it helps.
    const SIMILARITY_MIN: f64 = 0.75;
    let written = written.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&written, &candidate.to_lowercase()), candidate))
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, candidate)| candidate)
}

/// Returns the usual help: "did you mean `x`?" if a candidate is similar, then all candidates after `lead`.
pub fn suggest(written: &str, lead: &str, candidates: &[&str]) -> String {
    let all: Vec<String> = candidates.iter().map(|name| format!("`{name}`")).collect();
    let all = if all.is_empty() { "none".to_owned() } else { all.join(", ") };
    match did_you_mean(written, candidates.iter().copied()) {
        Some(near) if candidates.len() > 1 => format!("did you mean `{near}`? {lead}: {all}"),
        _ => format!("{lead}: {all}"),
    }
}

/// Formats an error with its causes, each once. The error of a configuration is formatted with its places.
pub fn error_text(error: &anyhow::Error) -> String {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        return config.render(false);
    }
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Some errors already contain their cause.
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    shardmill_core::masking::report(text)
}
