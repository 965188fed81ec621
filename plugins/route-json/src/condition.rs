//! A rule as written, and the condition that it is converted to.

use std::cmp::Ordering;

use serde::Deserialize;
use serde_json::Value;
use shardmill_sdk::Error;

use crate::fields::{FieldTree, Fields, Found};

/// A rule as written: a field, exactly one condition, a route.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Path of the field: `origin`, or `flight.origin` inside an object.
    field: String,
    /// Route of matching records.
    pub(crate) route: String,
    /// The field equals this text, number or boolean.
    equals: Option<Value>,
    /// The field equals one of these.
    #[serde(rename = "in")]
    one_of: Option<Vec<Value>>,
    /// The field is a text that begins with this.
    prefix: Option<String>,
    /// If true, the field is present and not null; if false, it is absent or null.
    exists: Option<bool>,
    /// The field is a number above this.
    greater_than: Option<Number>,
    /// The field is a number that is not below this.
    at_least: Option<Number>,
    /// The field is a number below this.
    less_than: Option<Number>,
    /// The field is a number that is not above this.
    at_most: Option<Number>,
}

/// A number. Comparison is exact for integers of up to 64 bits; larger numbers and fractions are compared as
/// doubles.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "serde_json::Number")]
pub(crate) enum Number {
    Integer(i128),
    Double(f64),
}

/// A condition on an object.
pub(crate) struct Condition {
    field: usize,
    test: Test,
}

enum Test {
    OneOf(Vec<Scalar>),
    Prefix(String),
    Exists(bool),
    Compare(Number, fn(Ordering) -> bool),
}

enum Scalar {
    Text(String),
    Number(Number),
    Bool(bool),
}

impl Condition {
    pub(crate) fn new(rule: Rule, fields: &mut FieldTree) -> Result<Self, Error> {
        let compare = |bound: Option<Number>, holds| bound.map(|n| Test::Compare(n, holds));
        let equals = rule.equals.map(|value| scalars("equals", vec![value])).transpose()?;
        let one_of = rule.one_of.map(|values| scalars("in", values)).transpose()?;
        let mut tests: Vec<Test> = [
            equals.map(Test::OneOf),
            one_of.map(Test::OneOf),
            rule.prefix.map(Test::Prefix),
            rule.exists.map(Test::Exists),
            compare(rule.greater_than, Ordering::is_gt),
            compare(rule.at_least, Ordering::is_ge),
            compare(rule.less_than, Ordering::is_lt),
            compare(rule.at_most, Ordering::is_le),
        ]
        .into_iter()
        .flatten()
        .collect();
        match (tests.pop(), tests.len() + 1) {
            (Some(test), 1) => Ok(Self { field: fields.add(&rule.field)?, test }),
            (found, number) => {
                let found = found.map_or("none".into(), |_| number.to_string());
                Err(Error::reject(format_args!(
                    "expected one of equals, in, prefix, exists, greater_than, at_least, \
                     less_than, at_most, found {found}"
                )))
            }
        }
    }

    pub(crate) fn holds(&self, fields: &Fields<'_>) -> bool {
        let found = fields.get(self.field);
        match &self.test {
            Test::OneOf(scalars) => scalars.iter().any(|scalar| scalar.is(found)),
            Test::Prefix(prefix) => {
                matches!(found, Found::Text(text) if text.starts_with(prefix.as_str()))
            }
            Test::Exists(expected) => *expected != matches!(found, Found::Nothing),
            Test::Compare(bound, holds) => match found {
                Found::Number(number) => number.compare(*bound).is_some_and(holds),
                _ => false,
            },
        }
    }
}

impl Scalar {
    fn is(&self, found: &Found<'_>) -> bool {
        match (self, found) {
            (Self::Text(expected), Found::Text(text)) => expected == text,
            (Self::Number(expected), Found::Number(number)) => {
                number.compare(*expected) == Some(Ordering::Equal)
            }
            (Self::Bool(expected), Found::Bool(value)) => expected == value,
            _ => false,
        }
    }
}

impl Number {
    /// Compares two numbers. `None` if one of them is NaN.
    fn compare(self, other: Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Integer(a), Self::Integer(b)) => Some(a.cmp(&b)),
            (a, b) => a.as_f64().partial_cmp(&b.as_f64()),
        }
    }

    fn as_f64(self) -> f64 {
        match self {
            Self::Integer(integer) => integer as f64,
            Self::Double(double) => double,
        }
    }
}

impl TryFrom<serde_json::Number> for Number {
    type Error = &'static str;

    fn try_from(number: serde_json::Number) -> Result<Self, &'static str> {
        match (number.as_i128(), number.as_f64()) {
            (Some(integer), _) => Ok(Self::Integer(integer)),
            (None, Some(double)) => Ok(Self::Double(double)),
            (None, None) => Err("the number is out of range"),
        }
    }
}

fn scalars(key: &str, values: Vec<Value>) -> Result<Vec<Scalar>, Error> {
    let refused = || Error::reject(format_args!("{key}: expected a text, a number or a boolean"));
    let scalar = |value| match value {
        Value::String(text) => Ok(Scalar::Text(text)),
        Value::Bool(value) => Ok(Scalar::Bool(value)),
        Value::Number(number) => {
            Number::try_from(number).map(Scalar::Number).map_err(|_| refused())
        }
        Value::Null | Value::Array(_) | Value::Object(_) => Err(refused()),
    };
    values.into_iter().map(scalar).collect()
}
