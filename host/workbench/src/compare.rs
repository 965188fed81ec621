//! Comparison of the expected and the found result of a case, as a difference that people can read.

use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::Value;

use super::case::{Case, CaseOutput, Expectation, ExpectedPayload};
use super::{TrialError, TrialRecord, Workbench};
use shardmill_engine::stage::{Difference, Fate, show_json, show_payload, written};

/// Result of one case, or of one variant of it.
#[derive(Debug)]
pub struct CaseVerdict {
    /// Name of the case, followed by a slash and the name of the variant.
    pub name: String,
    /// `None`: as expected. Otherwise expected and found, line by line.
    pub difference: Option<Difference>,
    /// Found result, for `--update`.
    pub found: CaseOutcome,
}

/// Result of a plugin for a case's records.
#[derive(Clone, Debug)]
pub enum CaseOutcome {
    /// One fate per record.
    Fates(Vec<Fate>),
    /// The configuration was refused, or the batch failed.
    Failed(String),
}

/// Runs a case and each of its variants, every one in a fresh instance.
///
/// # Errors
/// A description of the first invalid record of the case.
pub fn run(
    workbench: &Workbench,
    file: &std::path::Path,
    case: &Case,
) -> Result<Vec<CaseVerdict>, String> {
    let records = case.records(file)?;
    let mut verdicts =
        vec![judge(workbench, case.name.clone(), &case.config_json(), &records, &case.expected)];
    for variant in &case.variant {
        let name = format!("{}/{}", case.name, variant.name);
        let config = variant.config.to_string();
        verdicts.push(judge(workbench, name, &config, &records, &variant.expected));
    }
    Ok(verdicts)
}

fn judge(
    workbench: &Workbench,
    name: String,
    config_json: &str,
    records: &[TrialRecord],
    expected: &Expectation,
) -> CaseVerdict {
    let fates: Result<Vec<Fate>, TrialError> =
        workbench.start(config_json).and_then(|mut trial| trial.run(records));
    let found = match fates {
        Ok(fates) => CaseOutcome::Fates(fates),
        Err(error) => CaseOutcome::Failed(error.to_string()),
    };
    CaseVerdict { name, difference: difference(records, expected, &found), found }
}

/// A found output, with its origin.
struct FoundOutput<'a> {
    input: usize,
    route: &'a str,
    key: &'a Bytes,
    payload: &'a Bytes,
    is_own_payload: bool,
}

fn difference(
    records: &[TrialRecord],
    expected: &Expectation,
    found: &CaseOutcome,
) -> Option<Difference> {
    let (expected_lines, found_lines, backtraces) = match (found, &expected.fails) {
        (CaseOutcome::Failed(reason), Some(expected_failure))
            if reason.contains(expected_failure.as_str()) =>
        {
            return None;
        }
        (CaseOutcome::Failed(reason), expected_failure) => {
            let expected_failure = expected_failure
                .as_ref()
                .map(|expected_failure| format!("fails: {expected_failure}\n"));
            (
                expected_failure.unwrap_or_else(|| shown_expected(expected)),
                format!("fails: {reason}\n"),
                String::new(),
            )
        }
        (CaseOutcome::Fates(fates), Some(expected_failure)) => {
            let (lines, backtraces) = shown_found(records, &Expectation::default(), fates);
            (format!("fails: {expected_failure}\n"), lines, backtraces)
        }
        (CaseOutcome::Fates(fates), None) => {
            let (lines, backtraces) = shown_found(records, expected, fates);
            (shown_expected(expected), lines, backtraces)
        }
    };
    Difference::of(expected_lines, found_lines, backtraces)
}

fn shown_expected(expected: &Expectation) -> String {
    let mut text = String::new();
    for output in &expected.output {
        show_expected(&mut text, output);
    }
    for reject in &expected.reject {
        show_reject(&mut text, reject.input, &reject.reason);
    }
    text
}

/// Formats what was found, in the words of the expectation where both agree.
fn shown_found(
    records: &[TrialRecord],
    expected: &Expectation,
    fates: &[Fate],
) -> (String, String) {
    let mut text = String::new();
    let mut backtraces = String::new();
    let outputs = fates.iter().enumerate().flat_map(|(input, fate)| {
        let record = &records[input];
        fate.outputs.iter().map(move |output| FoundOutput {
            input,
            route: &output.route,
            key: output.key.as_ref().unwrap_or(&record.key),
            payload: output.payload.as_ref().unwrap_or(&record.payload),
            is_own_payload: output.payload.is_none(),
        })
    });
    for (index, output) in outputs.enumerate() {
        match expected.output.get(index) {
            Some(expected_output) if agrees(expected_output, &output, records) => {
                show_expected(&mut text, expected_output)
            }
            expected_output => show_found(&mut text, &output, expected_output),
        }
    }
    let rejected = fates.iter().enumerate().filter_map(|(input, fate)| {
        fate.rejected.as_ref().map(|reason| (input, reason, &fate.backtrace))
    });
    for (index, (input, reason, backtrace)) in rejected.enumerate() {
        let agreed = expected.reject.get(index);
        let agreed = agreed.filter(|one| one.input == input && reason.contains(&one.reason));
        show_reject(&mut text, input, agreed.map_or(reason, |one| &one.reason));
        if agreed.is_none() && !backtrace.is_empty() {
            let _ = writeln!(backtraces, "input {input}: {reason}\n{}", backtrace.trim_end());
        }
    }
    (text, backtraces)
}

fn agrees(expected: &CaseOutput, found: &FoundOutput<'_>, records: &[TrialRecord]) -> bool {
    let payload = match expected.payload() {
        Ok(ExpectedPayload::AsItCame) => *found.payload == records[found.input].payload,
        Ok(ExpectedPayload::Bytes(bytes)) => *found.payload == bytes,
        Ok(ExpectedPayload::Json(value)) => {
            serde_json::from_slice::<Value>(found.payload).is_ok_and(|found| same(&found, &value))
        }
        Err(_) => false,
    };
    payload
        && expected.route == found.route
        && expected.input.is_none_or(|input| input == found.input)
        && expected.key.as_ref().is_none_or(|key| key.as_bytes() == &found.key[..])
}

/// Compares JSON values; numbers by value, not by spelling.
fn same(one: &Value, two: &Value) -> bool {
    match (one, two) {
        (Value::Number(one), Value::Number(two)) => {
            one == two
                || one.as_i64().is_none()
                    && two.as_i64().is_none()
                    && one.as_f64().is_some()
                    && one.as_f64() == two.as_f64()
        }
        (Value::Array(one), Value::Array(two)) => {
            one.len() == two.len() && one.iter().zip(two).all(|(one, two)| same(one, two))
        }
        (Value::Object(one), Value::Object(two)) => {
            one.len() == two.len()
                && one.iter().all(|(name, one)| two.get(name).is_some_and(|two| same(one, two)))
        }
        _ => one == two,
    }
}

fn show_expected(text: &mut String, expected: &CaseOutput) {
    let _ = write!(text, "output → {}", expected.route);
    if let Some(input) = expected.input {
        let _ = write!(text, " (of input {input})");
    }
    if let Some(key) = &expected.key {
        let _ = write!(text, " key {key:?}");
    }
    text.push('\n');
    match expected.payload() {
        Ok(ExpectedPayload::AsItCame) => text.push_str("    as it came\n"),
        Ok(ExpectedPayload::Bytes(bytes)) => show_payload(text, &bytes, expected.base64.is_some()),
        Ok(ExpectedPayload::Json(value)) => show_json(text, &value),
        Err(error) => text.push_str(&error),
    }
}

/// Formats a found output like [`show_expected`], and leaves out what the expectation leaves open.
fn show_found(text: &mut String, found: &FoundOutput<'_>, expected: Option<&CaseOutput>) {
    let _ = write!(text, "output → {}", found.route);
    if expected.is_none_or(|expected| expected.input.is_some()) {
        let _ = write!(text, " (of input {})", found.input);
    }
    if expected.is_some_and(|expected| expected.key.is_some()) {
        let _ = write!(text, " key {:?}", String::from_utf8_lossy(found.key));
    }
    text.push('\n');
    let wants_bytes =
        expected.is_some_and(|expected| expected.text.is_some() || expected.base64.is_some());
    match written(found.payload) {
        _ if found.is_own_payload
            && !wants_bytes
            && expected.is_none_or(|expected| expected.json.is_none()) =>
        {
            text.push_str("    as it came\n");
        }
        ("json", value) if !wants_bytes => show_json(text, &value),
        _ => show_payload(
            text,
            found.payload,
            expected.is_some_and(|expected| expected.base64.is_some()),
        ),
    }
}

fn show_reject(text: &mut String, input: usize, reason: &str) {
    let _ = writeln!(text, "reject input {input}: {reason}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_engine::stage::TrialOutput;

    fn fate(payload: &str) -> Fate {
        let payload = Some(Bytes::from(payload.to_owned()));
        let output = TrialOutput { route: "out".into(), key: None, payload };
        Fate { outputs: vec![output], ..Fate::default() }
    }

    fn expecting(json: &str) -> Expectation {
        let mut case: Value = serde_json::from_str(json).unwrap();
        case["name"] = "c".into();
        let case: Case = serde_json::from_value(case).unwrap();
        case.expected
    }

    #[test]
    fn json_is_compared_as_values_and_text_byte_by_byte() {
        let records = [TrialRecord::new(0, "x")];
        let found = CaseOutcome::Fates(vec![fate(r#"{"b": 1.0, "a": "ä"}"#)]);
        let value = expecting(r#"{"output":[{"route":"out","json":{"a":"ä","b":1.00}}]}"#);
        assert_eq!(difference(&records, &value, &found), None);
        let text = expecting(r#"{"output":[{"route":"out","text":"{}"}]}"#);
        assert!(difference(&records, &text, &found).is_some());
    }

    #[test]
    fn a_difference_shows_the_lines_that_differ() {
        let records = [TrialRecord::new(0, "x"), TrialRecord::new(1, "y")];
        let rejected = Fate { rejected: Some("no brand: y".into()), ..Fate::default() };
        let found = CaseOutcome::Fates(vec![fate(r#"{"a":1,"b":2}"#), rejected]);
        let expected = r#"{"output":[{"route":"out","json":{"a":1,"b":3}}],"reject":[{"input":1,"reason":"brand"}]}"#;
        let difference = difference(&records, &expecting(expected), &found).unwrap();
        let shown = difference.render(false);
        assert!(
            shown.contains("-       \"b\": 3") && shown.contains("+       \"b\": 2"),
            "{shown}"
        );
        assert!(shown.contains("  reject input 1: brand"), "{shown}");
    }

    #[test]
    fn a_failure_can_be_expected() {
        let found = CaseOutcome::Failed("configure refused: no field".into());
        assert_eq!(difference(&[], &expecting(r#"{"fails":"no field"}"#), &found), None);
        assert!(difference(&[], &expecting(r#"{"fails":"other"}"#), &found).is_some());
        assert!(difference(&[], &expecting("{}"), &found).is_some());
    }
}
