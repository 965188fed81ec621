//! Checks across tables: names are unique, routes lead to sinks that exist, and every sink is reached by a route.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::diagnostic::suggest;
use super::raw::Text;
use super::{SinkConfig, StageConfig};

/// Names in the file as written, also those of invalid tables. So one error in a sink does not make every route to it
/// look wrong, too.
pub(super) struct Names {
    /// Every name with its place in the file, stages before sinks.
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

    /// Checks that all names of stages and sinks differ. They share one namespace, because a dead letter is stored
    /// under the name of the stage or sink that it comes from.
    pub(crate) fn check_unique(&self, check: &mut Check) {
        let mut seen: BTreeMap<&str, &Range<usize>> = BTreeMap::new();
        for (name, span) in &self.all {
            if let Some(first) = seen.insert(name, span) {
                let help = format!(
                    "it is first used at {}; each stage and sink needs a name of its own",
                    check.place(first)
                );
                check.problem(span.clone(), format!("the name `{name}` is used twice"), help);
            }
        }
    }

    /// Whether a sink exists. If not, notes a problem.
    pub(crate) fn check_sink(&self, name: &str, span: Range<usize>, check: &mut Check) -> bool {
        let exists = self.sinks.contains(name);
        if !exists {
            let sinks: Vec<&str> = self.sinks.iter().map(String::as_str).collect();
            let help = suggest(name, "the sinks", &sinks);
            check.problem(span, format!("unknown sink `{name}`"), help);
        }
        exists
    }

    /// Whether a lookup exists. If not, notes a problem.
    pub(crate) fn check_lookup(&self, name: &str, span: Range<usize>, check: &mut Check) -> bool {
        let exists = self.lookups.contains(name);
        if !exists {
            let lookups: Vec<&str> = self.lookups.iter().map(String::as_str).collect();
            let help = match lookups.is_empty() {
                true => "add a [[lookup]] of that name".to_owned(),
                false => suggest(name, "the lookups", &lookups),
            };
            check.problem(span, format!("unknown lookup `{name}`"), help);
        }
        exists
    }
}

/// Checks `renamed_from`: the old name is not the name of another sink, and only one sink claims it. The state under
/// the old name can move only once.
pub(super) fn check_renamed(sinks: &[SinkConfig], names: &Names, check: &mut Check) {
    let mut seen: BTreeMap<&str, &Range<usize>> = BTreeMap::new();
    for sink in sinks {
        let Some(before) = &sink.renamed_from else { continue };
        let old = before.value.as_str();
        if names.sinks.contains(old) {
            let message =
                format!("`renamed_from` names a sink that is still in this file: `{old}`");
            let help = "write the former name of this sink; to exchange the names of two sinks, rename one of \
                        them to a third name first and start once";
            check.problem(before.span.clone(), message, help);
        } else if let Some(first) = seen.insert(old, &before.span) {
            let message = format!("two sinks were renamed from `{old}`");
            let help =
                format!("the first is at {}; only one can have the old name", check.place(first));
            check.problem(before.span.clone(), message, help);
        }
    }
}

/// Checks the sinks of dead letters: they exist, and no route leads to them, because dead letters have other columns.
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
            let message = format!(
                "sink `{name}` is bound to route `{route}`, so it cannot take dead letters"
            );
            let help = "dead letters have other columns: add a [[sink]] for them";
            check.problem(sink.span(), message, help);
        }
    }
    if !dead_letter_sinks.is_empty() && dead_letter_sinks.len() == names.sinks.len() {
        let message = "missing sink for rows: every sink is for dead letters";
        check.problem(dead_letter_sinks[0].span(), message, "add a [[sink]] for the rows");
    }
}

/// Checks that the last stage binds a route, and that a route leads to every sink.
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
