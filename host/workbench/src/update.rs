//! Accepts the current results of a plugin: writes them into the file of cases as expected.
//!
//! In a TOML file, comments, order and everything but the expectations stay unchanged.

use std::path::Path;

use serde_json::Value;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table};

use super::TrialRecord;
use super::case::{Case, CaseError, CaseOutput, CaseReject, Expectation};
use super::compare::{CaseOutcome, CaseVerdict};
use shardmill_engine::stage::written;

/// Returns the expectation that accepts what was found. `as_before` shows in which form payloads were given.
pub fn accepted(
    records: &[TrialRecord],
    found: &CaseOutcome,
    as_before: &Expectation,
) -> Expectation {
    let fates = match found {
        CaseOutcome::Failed(reason) => {
            return Expectation { fails: Some(reason.clone()), ..Expectation::default() };
        }
        CaseOutcome::Fates(fates) => fates,
    };
    let mut expected = Expectation::default();
    for (input, fate) in fates.iter().enumerate() {
        for output in &fate.outputs {
            let before = as_before.output.get(expected.output.len());
            let mut expected_output =
                CaseOutput { route: output.route.clone(), ..CaseOutput::default() };
            if records.len() > 1 || before.is_some_and(|before| before.input.is_some()) {
                expected_output.input = Some(input);
            }
            if let Some(key) = output.key.as_ref().filter(|key| **key != records[input].key) {
                expected_output.key = std::str::from_utf8(key).ok().map(str::to_owned);
            }
            if let Some(payload) = &output.payload {
                match written(payload) {
                    ("json", _) if before.is_some_and(|before| before.text.is_some()) => {
                        expected_output.text = Some(String::from_utf8_lossy(payload).into_owned());
                    }
                    ("json", value) => expected_output.json = Some(value),
                    ("text", text) => expected_output.text = text.as_str().map(str::to_owned),
                    (_, base64) => expected_output.base64 = base64.as_str().map(str::to_owned),
                }
            }
            expected.output.push(expected_output);
        }
        if let Some(reason) = &fate.rejected {
            let first = reason.lines().next().unwrap_or_default().to_owned();
            expected.reject.push(CaseReject { input, reason: first });
        }
    }
    expected
}

/// Returns the text of the file with the findings of the verdicts as expectations. `verdicts` has those of each
/// case, followed by those of its variants.
///
/// # Errors
/// [`CaseError`] if the text is not the one that the cases were read from.
pub fn rewrite(
    path: &Path,
    text: &str,
    cases: &[Case],
    verdicts: &[Vec<CaseVerdict>],
) -> Result<String, CaseError> {
    let failed =
        |message: String| CaseError(format!("failed to update {}: {message}", path.display()));
    let mut accepted_of = Vec::new();
    for (case, verdicts) in cases.iter().zip(verdicts) {
        let records = case.records(path).map_err(failed)?;
        let before = std::iter::once(&case.expected)
            .chain(case.variant.iter().map(|variant| &variant.expected));
        let of_case = verdicts.iter().zip(before).map(|(verdict, before)| {
            // Expectations that were met stay as they are written.
            verdict.difference.as_ref().map(|_| accepted(&records, &verdict.found, before))
        });
        accepted_of.push(of_case.collect::<Vec<_>>());
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => rewrite_toml(text, &accepted_of).map_err(failed),
        _ => rewrite_ndjson(text, cases, &accepted_of).map_err(failed),
    }
}

fn rewrite_toml(text: &str, accepted: &[Vec<Option<Expectation>>]) -> Result<String, String> {
    let mut document: DocumentMut = text.parse().map_err(|error| format!("{error}"))?;
    let cases = document.get_mut("case").and_then(Item::as_array_of_tables_mut);
    let cases = cases.ok_or("missing [[case]]")?;
    for (case, accepted) in cases.iter_mut().zip(accepted) {
        let mut accepted = accepted.iter();
        if let Some(Some(expected)) = accepted.next() {
            expect(case, expected);
        }
        let variants = case.get_mut("variant").and_then(Item::as_array_of_tables_mut);
        for (variant, expected) in
            variants.into_iter().flat_map(ArrayOfTables::iter_mut).zip(accepted)
        {
            if let Some(expected) = expected {
                expect(variant, expected);
            }
        }
    }
    Ok(document.to_string())
}

/// Replaces the expectations in a table.
fn expect(table: &mut Table, expected: &Expectation) {
    for name in ["output", "reject", "fails"] {
        table.remove(name);
    }
    if let Some(fails) = &expected.fails {
        table.insert("fails", toml_edit::value(fails.as_str()));
    }
    let outputs: ArrayOfTables = expected.output.iter().map(output_table).collect();
    if !outputs.is_empty() {
        table.insert("output", Item::ArrayOfTables(outputs));
    }
    let rejects = expected.reject.iter().map(|reject| {
        let mut table = Table::new();
        table.insert("input", toml_edit::value(reject.input as i64));
        table.insert("reason", toml_edit::value(reject.reason.as_str()));
        table
    });
    let rejects: ArrayOfTables = rejects.collect();
    if !rejects.is_empty() {
        table.insert("reject", Item::ArrayOfTables(rejects));
    }
}

fn output_table(output: &CaseOutput) -> Table {
    let mut table = Table::new();
    table.insert("route", toml_edit::value(output.route.as_str()));
    if let Some(input) = output.input {
        table.insert("input", toml_edit::value(input as i64));
    }
    for (name, text) in [("key", &output.key), ("text", &output.text), ("base64", &output.base64)] {
        if let Some(text) = text {
            table.insert(name, toml_edit::value(text.as_str()));
        }
    }
    if let Some(json) = &output.json {
        match toml_value(json) {
            Some(value) => table.insert("json", toml_edit::value(value)),
            // TOML has no null, and no numbers beyond 64 bits.
            None => table.insert("text", toml_edit::value(json.to_string())),
        };
    }
    table
}

fn toml_value(json: &Value) -> Option<toml_edit::Value> {
    Some(match json {
        Value::Null => return None,
        Value::Bool(flag) => (*flag).into(),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => whole.into(),
            None if number.to_string().contains(['.', 'e', 'E']) => number.as_f64()?.into(),
            None => return None,
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(values) => {
            let values = values.iter().map(toml_value).collect::<Option<Vec<_>>>()?;
            toml_edit::Value::Array(values.into_iter().collect())
        }
        Value::Object(members) => {
            let members = members.iter().map(|(name, value)| Some((name, toml_value(value)?)));
            let members = members.collect::<Option<Vec<_>>>()?;
            toml_edit::Value::InlineTable(members.into_iter().collect())
        }
    })
}

fn rewrite_ndjson(
    text: &str,
    cases: &[Case],
    accepted: &[Vec<Option<Expectation>>],
) -> Result<String, String> {
    let mut lines = String::new();
    let mut cases = cases.iter().zip(accepted);
    for line in text.lines() {
        if line.trim().is_empty() {
            lines.push_str(line);
        } else {
            let (case, accepted) = cases.next().ok_or("more lines than cases")?;
            if accepted.iter().all(Option::is_none) {
                lines.push_str(line);
            } else {
                let mut case = case.clone();
                let slots = std::iter::once(&mut case.expected)
                    .chain(case.variant.iter_mut().map(|variant| &mut variant.expected));
                for (slot, accepted) in slots.zip(accepted) {
                    if let Some(accepted) = accepted {
                        *slot = accepted.clone();
                    }
                }
                lines.push_str(&serde_json::to_string(&case).map_err(|error| error.to_string())?);
            }
        }
        lines.push('\n');
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_engine::stage::{Fate, TrialOutput};

    fn finding(payload: &'static str) -> CaseOutcome {
        let output = TrialOutput { route: "out".into(), key: None, payload: Some(payload.into()) };
        let rejected = Fate { rejected: Some("no: y".into()), ..Fate::default() };
        CaseOutcome::Fates(vec![Fate { outputs: vec![output], ..Fate::default() }, rejected])
    }

    #[test]
    fn comments_and_inputs_stay() {
        let text = "# why\n[[case]]\nname = \"c\" # how\n[[case.input]]\ntext = \"x\"\n[[case.input]]\ntext = \"y\"\n[[case.output]]\nroute = \"old\"\n";
        let expected = accepted(
            &[TrialRecord::new(0, "x"), TrialRecord::new(1, "y")],
            &finding("{\"a\":[1,2.5]}"),
            &Expectation::default(),
        );
        let new = rewrite_toml(text, &[vec![Some(expected)]]).unwrap();
        assert!(
            new.starts_with("# why\n[[case]]\nname = \"c\" # how\n[[case.input]]\ntext = \"x\"\n")
        );
        assert!(new.contains("json = { a = [1, 2.5] }") && !new.contains("old"), "{new}");
        assert!(new.contains("[[case.reject]]\ninput = 1\nreason = \"no: y\""), "{new}");
    }

    #[test]
    fn what_toml_cannot_say_is_text() {
        let json = serde_json::json!({"a": null});
        let output = CaseOutput { json: Some(json), ..CaseOutput::default() };
        assert!(output_table(&output).to_string().contains("text = '{\"a\":null}'"));
    }
}
