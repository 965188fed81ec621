//! Routes JSON objects by rules over their fields. The first matching rule decides.
//!
//! | | |
//! |---|---|
//! | accepts | `application/json`: one object per record |
//! | routes | those named in the rules and the default, in that order |
//! | format, columns | as in the input: payloads pass unchanged |
//! | configuration | [`Config`] |
//!
//! ```toml
//! [stage.config]
//! default = "other"
//! rules = [
//!     { field = "origin", equals = "EWR", route = "newark" },
//!     { field = "origin", in = ["JFK", "LGA"], route = "new-york" },
//!     { field = "delay.minutes", greater_than = 60, route = "late" },
//! ]
//! ```

mod condition;
mod fields;

use serde::Deserialize;
use shardmill_sdk::{Context, Descriptor, Emitter, Error, Plugin, Record, Route};

use condition::Condition;
use fields::{FieldTree, Fields};

pub use condition::Rule;

/// Value of `default` that filters a record.
const DEFAULT_FILTER: &str = "filter";
/// Value of `default` that rejects a record, so that it becomes a dead letter.
const DEFAULT_REJECT: &str = "reject";

/// Configuration of the rules.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The rules, tried in this order.
    rules: Vec<Rule>,
    /// Destination of records that no rule matches: the name of a route, `filter` to drop them, or `reject` to
    /// make them dead letters. It is required, because dropping unexpected records should be a decision.
    default: String,
}

/// Chooses routes by rules.
pub struct Router {
    fields: FieldTree,
    rules: Vec<(Condition, u32)>,
    default: Verdict,
    routes: Vec<String>,
}

/// Destination of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// To the route with this index.
    Route(u32),
    /// Nowhere: dropped on purpose.
    Filter,
    /// To the dead letters.
    Reject,
}

impl Router {
    /// Prepares a configuration.
    ///
    /// # Errors
    ///
    /// A rule is invalid, or no route is named.
    pub fn new(config: Config) -> Result<Self, Error> {
        let mut fields = FieldTree::default();
        let mut routes = Vec::new();
        let mut rules = Vec::new();
        for (number, rule) in config.rules.into_iter().enumerate() {
            let at = |error: Error| error.context(format_args!("config.rules[{number}]"));
            let route = route_index(&mut routes, &rule.route).map_err(at)?;
            rules.push((Condition::new(rule, &mut fields).map_err(at)?, route));
        }
        let default = match config.default.as_str() {
            DEFAULT_FILTER => Verdict::Filter,
            DEFAULT_REJECT => Verdict::Reject,
            route => Verdict::Route(route_index(&mut routes, route)?),
        };
        if routes.is_empty() {
            return Err(Error::reject("config.rules: no rule and no default names a route"));
        }
        Ok(Self { fields, rules, default, routes })
    }

    /// Chooses the destination of one object. This is all of the plugin's work on a record.
    ///
    /// # Errors
    ///
    /// The payload is not a JSON object.
    pub fn route(&self, payload: &[u8]) -> Result<Verdict, Error> {
        let text = std::str::from_utf8(payload)?;
        let fields = Fields::read(&self.fields, text)
            .map_err(|error| Error::from(error).context("invalid JSON object"))?;
        let matched = self.rules.iter().find(|(condition, _)| condition.holds(&fields));
        Ok(matched.map_or(self.default, |(_, route)| Verdict::Route(*route)))
    }
}

impl Plugin for Router {
    type Config = Config;

    fn configure(config: Config, context: &Context) -> Result<(Self, Descriptor), Error> {
        let router = Self::new(config)?;
        let mut descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("application/json");
        for name in &router.routes {
            let columns = context.upstream_columns().iter().cloned();
            descriptor = descriptor.route(Route::new(name, "application/json").columns(columns));
        }
        Ok((router, descriptor))
    }

    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        match self.route(record.payload())? {
            Verdict::Route(route) => out.pass(route),
            Verdict::Filter => {}
            Verdict::Reject => return Err(Error::reject("no rule matches")),
        }
        Ok(())
    }
}

shardmill_sdk::export!(Router);

/// Returns the index of the route `name`, which is added if it is new.
fn route_index(routes: &mut Vec<String>, name: &str) -> Result<u32, Error> {
    if [DEFAULT_FILTER, DEFAULT_REJECT, ""].contains(&name) {
        return Err(Error::reject(format_args!("route: `{name}` cannot be a route's name")));
    }
    let index = routes.iter().position(|route| route == name).unwrap_or_else(|| {
        routes.push(name.to_owned());
        routes.len() - 1
    });
    Ok(u32::try_from(index)?)
}

#[cfg(test)]
mod tests {
    use shardmill_sdk::testing::{Fate, Harness};

    use super::*;

    /// Returns the chosen route, `-` if filtered, or the reason.
    fn route(config: &str, payload: &str) -> String {
        match Harness::<Router>::new(config).unwrap().run_one(payload.as_bytes()) {
            Fate::Delivered(outputs) => {
                assert_eq!(outputs[0].payload, payload.as_bytes(), "untouched");
                outputs[0].route.clone()
            }
            Fate::Filtered => "-".into(),
            Fate::Rejected(reason) => reason,
        }
    }

    fn matches(condition: &str, payload: &str) -> bool {
        let config = format!(r#"{{"rules":[{{{condition},"route":"yes"}}],"default":"no"}}"#);
        route(&config, payload) == "yes"
    }

    #[test]
    fn the_first_match_decides() {
        let config = r#"{"default":"other","rules":[
            {"field":"origin","equals":"EWR","route":"newark"},
            {"field":"origin","in":["EWR","JFK"],"route":"york"}]}"#;
        assert_eq!(route(config, r#"{"origin":"EWR"}"#), "newark");
        assert_eq!(route(config, r#"{"origin":"JFK"}"#), "york");
        assert_eq!(route(config, r#"{"origin":"LGA"}"#), "other");
        assert_eq!(route(config, "{}"), "other");
        let plugin = Harness::<Router>::new(config).unwrap();
        let names: Vec<_> =
            plugin.descriptor().routes.iter().map(|route| route.name.as_str()).collect();
        assert_eq!(names, ["newark", "york", "other"]);
    }

    #[test]
    fn the_default_may_filter_or_reject() {
        let rules = r#""rules":[{"field":"a","exists":true,"route":"a"}]"#;
        assert_eq!(route(&format!(r#"{{{rules},"default":"filter"}}"#), "{}"), "-");
        assert_eq!(route(&format!(r#"{{{rules},"default":"reject"}}"#), "{}"), "no rule matches");
    }

    #[test]
    fn each_condition() {
        assert!(matches(r#""field":"a","equals":7"#, r#"{"a":7}"#));
        assert!(matches(r#""field":"a","equals":7"#, r#"{"a":7.0}"#));
        assert!(!matches(r#""field":"a","equals":7"#, r#"{"a":"7"}"#));
        assert!(matches(r#""field":"a","equals":9007199254740993"#, r#"{"a":9007199254740993}"#));
        assert!(!matches(r#""field":"a","equals":9007199254740993"#, r#"{"a":9007199254740992}"#));
        assert!(matches(r#""field":"a","equals":true"#, r#"{"a":true}"#));
        assert!(matches(r#""field":"a","equals":"\n""#, r#"{"a":"\u000a"}"#));
        assert!(matches(r#""field":"a","prefix":"Ho""#, r#"{"a":"Honda"}"#));
        assert!(!matches(r#""field":"a","prefix":"Ho""#, r#"{"a":"ho"}"#));
        assert!(matches(r#""field":"a","greater_than":-1"#, r#"{"a":0}"#));
        assert!(!matches(r#""field":"a","greater_than":0"#, r#"{"a":0}"#));
        assert!(matches(r#""field":"a","at_least":0"#, r#"{"a":0}"#));
        assert!(matches(r#""field":"a","less_than":0.5"#, r#"{"a":0.25}"#));
        assert!(matches(r#""field":"a","at_most":18446744073709551615"#, r#"{"a":-1}"#));
        assert!(!matches(r#""field":"a","less_than":5"#, r#"{"a":"4"}"#));
        assert!(matches(r#""field":"a","exists":true"#, r#"{"a":[]}"#));
        assert!(!matches(r#""field":"a","exists":true"#, r#"{"a":null}"#));
        assert!(matches(r#""field":"a","exists":false"#, r#"{"a":null}"#));
        assert!(matches(r#""field":"a","exists":false"#, "{}"));
    }

    #[test]
    fn paths_descend() {
        let condition = r#""field":"a.b.c","equals":1"#;
        assert!(matches(condition, r#"{"a":{"x":[{"b":2}],"b":{"c":1}}}"#));
        assert!(!matches(condition, r#"{"a":{"b":1},"a.b.c":1}"#));
        let config = r#"{"default":"no","rules":[{"field":"a.b","equals":1,"route":"b"},
            {"field":"a","exists":true,"route":"a"}]}"#;
        assert_eq!(route(config, r#"{"a":{"b":1}}"#), "b");
        assert_eq!(route(config, r#"{"a":{"b":2}}"#), "a");
    }

    #[test]
    fn what_is_no_object_is_rejected() {
        let config = r#"{"rules":[],"default":"all"}"#;
        assert!(route(config, "").starts_with("invalid JSON object: EOF"));
        assert!(route(config, "[]").contains("expected a JSON object"));
        assert!(route(config, "{}}").contains("trailing characters"));
        let fate = Harness::<Router>::new(config).unwrap().run_one(b"{\"a\":\"\xff\"}");
        assert!(matches!(fate, Fate::Rejected(reason) if reason.contains("invalid utf-8")));
    }

    #[test]
    fn wrong_rules_are_refused() {
        let refusal = |config: &str| Harness::<Router>::new(config).err().unwrap();
        let rule = |rule: &str| refusal(&format!(r#"{{"rules":[{rule}],"default":"no"}}"#));
        assert_eq!(
            rule(r#"{"field":"a","route":"r"}"#),
            "config.rules[0]: expected one of equals, in, prefix, exists, greater_than, \
             at_least, less_than, at_most, found none"
        );
        assert!(rule(r#"{"field":"a","equals":1,"in":[],"route":"r"}"#).contains("found 2"));
        assert!(rule(r#"{"field":"a..b","equals":1,"route":"r"}"#).contains("`a..b`"));
        assert!(rule(r#"{"field":"a","equals":[1],"route":"r"}"#).contains("equals"));
        assert!(rule(r#"{"field":"a","equals":1,"route":"filter"}"#).contains("`filter`"));
        assert!(refusal(r#"{"rules":[]}"#).contains("missing field `default`"));
        assert!(refusal(r#"{"rules":[],"default":"filter"}"#).contains("names a route"));
    }
}
