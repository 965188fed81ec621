//! How the tables fit together: names that are unique, routes that end at sinks that exist, sinks
//! that some route reaches.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::diagnostic::suggest;
use super::raw::Text;
use super::{SinkConfig, StageConfig};

/// The names in the file as written, also of tables that are otherwise wrong: one error should
/// not make the routes to that sink look wrong too.
pub(super) struct Names {
    /// Every name with its place, stages before sinks.
    all: Vec<(String, Range<usize>)>,
    sinks: BTreeSet<String>,
    lookups: BTreeSet<String>,
}

impl Names {
    pub fn collect(
        stages: &[Spanned<DeValue<'_>>],
        sinks: &[Spanned<DeValue<'_>>],
        lookups: &[Spanned<DeValue<'_>>],
    ) -> Self {
        let name = |table: &Spanned<DeValue<'_>>| {
            let name = table.get_ref().as_table()?.get("name")?;
            Some((name.get_ref().as_str()?.to_owned(), name.span()))
        };
        let all = stages.iter().chain(sinks).filter_map(name).collect();
        let sinks = sinks.iter().filter_map(name).map(|(name, _)| name).collect();
        let lookups = lookups.iter().filter_map(name).map(|(name, _)| name).collect();
        Self { all, sinks, lookups }
    }

    /// Stages and sinks share one space of names: a dead letter is keyed by the name of the stage
    /// or sink that it comes from.
    pub(crate) fn check_unique(&self, check: &mut Check) {
        let mut seen: BTreeMap<&str, &Range<usize>> = BTreeMap::new();
        for (name, span) in &self.all {
            if let Some(first) = seen.insert(name, span) {
                let help = format!(
                    "it is first used at {}; each stage and sink needs a name of its own",
                    check.place(first)
                );
                check.problem(span.clone(), format!("the name `{name}` is taken"), help);
            }
        }
    }

    /// Whether a route may be bound to this sink; notes a problem if it does not exist.
    pub(crate) fn check_sink(&self, name: &str, span: Range<usize>, check: &mut Check) -> bool {
        let exists = self.sinks.contains(name);
        if !exists {
            let sinks: Vec<&str> = self.sinks.iter().map(String::as_str).collect();
            let help = suggest(name, "the sinks", &sinks);
            check.problem(span, format!("there is no sink `{name}`"), help);
        }
        exists
    }

    /// Whether a stage may be granted this lookup; notes a problem if it does not exist.
    pub(crate) fn check_lookup(&self, name: &str, span: Range<usize>, check: &mut Check) -> bool {
        let exists = self.lookups.contains(name);
        if !exists {
            let lookups: Vec<&str> = self.lookups.iter().map(String::as_str).collect();
            let help = match lookups.is_empty() {
                true => "add a [[lookup]] of that name".to_owned(),
                false => suggest(name, "the lookups", &lookups),
            };
            check.problem(span, format!("there is no lookup `{name}`"), help);
        }
        exists
    }
}

/// A name that a sink had before belongs to no other sink now, and to one sink only: what is kept under it
/// can move once.
pub(super) fn check_renamed(sinks: &[SinkConfig], names: &Names, check: &mut Check) {
    let mut seen: BTreeMap<&str, &Range<usize>> = BTreeMap::new();
    for sink in sinks {
        let Some(before) = &sink.renamed_from else { continue };
        let old = before.value.as_str();
        if names.sinks.contains(old) {
            let message = format!("`{old}` is the name of a sink of this file");
            let help = "name the sink that is not in the file any more; to exchange the names of two \
                        sinks, rename one of them to a third name first and start once";
            check.problem(before.span.clone(), message, help);
        } else if let Some(first) = seen.insert(old, &before.span) {
            let message = format!("two sinks were renamed from `{old}`");
            let help =
                format!("the first is at {}; only one can go on with it", check.place(first));
            check.problem(before.span.clone(), message, help);
        }
    }
}

/// The sinks of dead letters must be there, and take nothing else: their rows have other columns.
pub(super) fn check_dead_letter_sinks(
    dead_letter_sinks: &[Spanned<Text>],
    names: &Names,
    stages: &[StageConfig],
    check: &mut Check,
) {
    for sink in dead_letter_sinks {
        let name = sink.get_ref().0.as_str();
        if !names.check_sink(name, sink.span(), check) {
            continue;
        }
        let routes = stages.iter().flat_map(|stage| &stage.routes);
        let bound = routes.flat_map(|(route, bound)| bound.sinks.iter().map(move |to| (route, to)));
        if let Some((route, _)) = bound.into_iter().find(|(_, to)| to.value.as_str() == name) {
            let message = format!("sink `{name}` takes the rows of route `{route}`");
            let help = "dead letters are other rows: add a [[sink]] for them";
            check.problem(sink.span(), message, help);
        }
    }
    if !dead_letter_sinks.is_empty() && dead_letter_sinks.len() == names.sinks.len() {
        let message = "every sink is for dead letters";
        check.problem(dead_letter_sinks[0].span(), message, "add a [[sink]] for the rows");
    }
}

/// Every sink must be reached by a route, and the last stage must bind at least one.
pub(super) fn check_bound(stages: &[StageConfig], sinks: &[SinkConfig], check: &mut Check) {
    let Some(last) = stages.last() else { return };
    if last.routes.is_empty() {
        let message = format!("the last stage, `{}`, binds no route to a sink", last.name.value);
        let example = sinks.first().map_or("sink", |sink| sink.name.value.as_str());
        let help = format!(
            "add [stage.routes] below it with the plugin's routes, such as default = [\"{example}\"]"
        );
        check.problem(last.span.clone(), message, help);
        return;
    }
    let routes = stages.iter().flat_map(|stage| stage.routes.values());
    let bound: BTreeSet<&str> =
        routes.flat_map(|route| &route.sinks).map(|sink| sink.value.as_str()).collect();
    for sink in sinks {
        let name = sink.name.value.as_str();
        if !bound.contains(name) {
            let route = last.routes.keys().next().map_or("default", |route| route.as_str());
            let help = format!(
                "bind it, such as {route} = [\"{name}\"] in [stage.routes] of stage `{}`, or \
                 delete the sink",
                last.name.value
            );
            check.problem(sink.name.span.clone(), format!("no route leads to sink `{name}`"), help);
        }
    }
}
