//! Test cases beside a plugin: input records and expected outputs.
//!
//! In `tests/*.toml` a case is a `[[case]]`; in `tests/*.ndjson` it is a line, a JSON object with the same
//! members. A payload is given as `text`, `base64`, `json` or `file`. An output's `json` is compared as a
//! value, everything else byte by byte. An output without a payload stands for the unchanged record. A case
//! without outputs and rejects expects that all records are filtered.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::TrialRecord;
use shardmill_config::{environment, substitute_set};
use shardmill_core::record::SequenceNumber;

/// A file of cases.
#[derive(Clone, Debug)]
pub struct CaseFile {
    /// Path of the file.
    pub path: PathBuf,
    /// Its cases, in order.
    pub cases: Vec<Case>,
}

/// Records, a configuration, and the expected result.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(from = "RawCase", into = "RawCase")]
pub struct Case {
    /// Name of the case.
    pub name: String,
    /// Configuration of the plugin; absent: that of the file, or `{}`.
    pub config: Option<Value>,
    /// The records, processed as one batch.
    pub input: Vec<CaseInput>,
    /// Expected result.
    pub expected: Expectation,
    /// The same records with other configurations.
    pub variant: Vec<Variant>,
}

/// The records of a case with another configuration.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Name of the variant.
    pub name: String,
    /// The configuration.
    pub config: Value,
    /// Expected result.
    pub expected: Expectation,
}

/// Expected result of a case's records.
#[derive(Clone, Debug, Default)]
pub struct Expectation {
    /// Expected outputs, in order.
    pub output: Vec<CaseOutput>,
    /// Expected rejected records, in order.
    pub reject: Vec<CaseReject>,
    /// Expected failure: the configuration is refused, or the whole batch fails, with a reason that contains
    /// this text.
    pub fails: Option<String>,
}

/// A case as written in files: the members of the expectation are at the same level as the others.
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawCase {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<Value>,
    #[serde(default)]
    input: Vec<CaseInput>,
    #[serde(default)]
    output: Vec<CaseOutput>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    reject: Vec<CaseReject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fails: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    variant: Vec<RawVariant>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawVariant {
    name: String,
    config: Value,
    #[serde(default)]
    output: Vec<CaseOutput>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    reject: Vec<CaseReject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fails: Option<String>,
}

impl From<RawCase> for Case {
    fn from(raw: RawCase) -> Self {
        let RawCase { name, config, input, output, reject, fails, variant } = raw;
        let variant = variant.into_iter().map(|raw| {
            let RawVariant { name, config, output, reject, fails } = raw;
            Variant { name, config, expected: Expectation { output, reject, fails } }
        });
        let variant = variant.collect();
        Self { name, config, input, expected: Expectation { output, reject, fails }, variant }
    }
}

impl From<Case> for RawCase {
    fn from(case: Case) -> Self {
        let Case { name, config, input, expected, variant } = case;
        let Expectation { output, reject, fails } = expected;
        let variant = variant.into_iter().map(|variant| {
            let Variant { name, config, expected } = variant;
            let Expectation { output, reject, fails } = expected;
            RawVariant { name, config, output, reject, fails }
        });
        Self { name, config, input, output, reject, fails, variant: variant.collect() }
    }
}

/// An input record.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CaseInput {
    /// The payload as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The payload in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// The payload as JSON, written without spaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<Value>,
    /// The payload is the content of this file; the path is relative to the folder of the cases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The partition key; absent: `key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The sequence number; absent: the number of the record in the case, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<String>,
    /// Arrival time in milliseconds since 1970; absent: a time in 2023.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived_ms: Option<u64>,
}

/// An expected output.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CaseOutput {
    /// The route's name.
    pub route: String,
    /// Index of the record that it is made from, from 0; absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<usize>,
    /// The partition key; absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The payload as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The payload in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// The payload as a JSON value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<Value>,
}

/// An expected reject.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CaseReject {
    /// Index of the record, from 0.
    #[serde(default)]
    pub input: usize,
    /// Text that the reason must contain.
    #[serde(default)]
    pub reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TomlCases {
    /// Configuration of cases that have none.
    config: Option<Value>,
    #[serde(default)]
    case: Vec<Case>,
}

/// Reason why cases cannot be read: one line with the place.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CaseError(pub(super) String);

impl CaseFile {
    /// Reads a file of cases; the format follows from its extension.
    ///
    /// # Errors
    /// [`CaseError`] with the place.
    pub fn read(path: &Path) -> Result<Self, CaseError> {
        let shown = shardmill_core::escape::path(path);
        let text = fs::read_to_string(path)
            .map_err(|error| CaseError(format!("failed to read {shown}: {error}")))?;
        let cases = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => toml_cases(path, &text)?,
            Some("ndjson") => ndjson_cases(path, &text)?,
            _ => {
                return Err(CaseError(format!(
                    "{shown}: unsupported file of cases: expected .toml or .ndjson"
                )));
            }
        };
        for (index, case) in cases.iter().enumerate() {
            let malformed = |message| {
                CaseError(format!("{shown}: case {} ({}): {message}", index + 1, case.name))
            };
            case.records(path).map_err(malformed)?;
            case.expected.check(case.input.len()).map_err(malformed)?;
            for variant in &case.variant {
                variant.expected.check(case.input.len()).map_err(malformed)?;
            }
        }
        Ok(Self { path: path.to_owned(), cases })
    }

    /// Returns the files of cases in a plugin's `tests/`, sorted by name; none if there is no such folder.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn in_folder(plugin: &Path) -> Result<Vec<PathBuf>, CaseError> {
        let folder = plugin.join("tests");
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&folder)
            .map_err(|error| CaseError(format!("failed to read {}: {error}", folder.display())))?;
        let is_case = |path: &PathBuf| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("toml" | "ndjson"))
        };
        let mut files: Vec<_> =
            entries.flatten().map(|entry| entry.path()).filter(is_case).collect();
        files.sort();
        Ok(files)
    }
}

fn toml_cases(path: &Path, text: &str) -> Result<Vec<Case>, CaseError> {
    let cases: TomlCases = toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let before = text.get(..start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        CaseError(format!("{}:{line}:{column}: {}", path.display(), error.message()))
    })?;
    let TomlCases { config, mut case } = cases;
    for case in &mut case {
        case.config = case.config.take().or_else(|| config.clone());
    }
    Ok(case)
}

fn ndjson_cases(path: &Path, text: &str) -> Result<Vec<Case>, CaseError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let case = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| {
            let said = error.to_string();
            let cause = said.split(" at line ").next().unwrap_or_default();
            CaseError(format!("{}:{}:{}: {cause}", path.display(), index + 1, error.column()))
        })
    };
    lines.map(case).collect()
}

impl Case {
    /// Returns the configuration as JSON text. `${NAME}` is replaced if the environment has that variable:
    /// captured cases contain the names of their pipeline's variables, not the values.
    pub fn config_json(&self) -> String {
        let Some(mut config) = self.config.clone() else { return "{}".to_owned() };
        substitute_set(&mut config, &environment);
        config.to_string()
    }

    /// Returns the records. `file` is the path of the case file.
    ///
    /// # Errors
    /// A description of the first invalid record.
    pub fn records(&self, file: &Path) -> Result<Vec<TrialRecord>, String> {
        let folder = file.parent().unwrap_or(Path::new(""));
        let record = |(index, input): (usize, &CaseInput)| {
            let failed = |cause: String| format!("input {index}: {cause}");
            let mut record = TrialRecord::new(index, input.payload(folder).map_err(failed)?);
            if let Some(key) = &input.key {
                record.key = key.clone().into();
            }
            if let Some(sequence) = &input.sequence {
                record.sequence = SequenceNumber::parse(sequence)
                    .map_err(|error| failed(format!("sequence: {error}")))?;
            }
            record.arrived_ms = input.arrived_ms.unwrap_or(record.arrived_ms);
            Ok(record)
        };
        self.input.iter().enumerate().map(record).collect()
    }
}

impl CaseInput {
    fn payload(&self, folder: &Path) -> Result<Bytes, String> {
        match (&self.text, &self.base64, &self.json, &self.file) {
            (Some(text), None, None, None) => Ok(text.clone().into()),
            (None, Some(base64), None, None) => decode(base64),
            (None, None, Some(json), None) => Ok(json.to_string().into()),
            (None, None, None, Some(file)) => {
                let file = folder.join(file);
                let bytes = fs::read(&file);
                bytes.map(Bytes::from).map_err(|error| format!("{}: {error}", file.display()))
            }
            _ => Err("expected the payload as one of text, base64, json, file".into()),
        }
    }
}

impl Expectation {
    fn check(&self, inputs: usize) -> Result<(), String> {
        for (index, output) in self.output.iter().enumerate() {
            output.payload().map_err(|cause| format!("output {index}: {cause}"))?;
            if output.input.is_some_and(|input| input >= inputs) {
                return Err(format!("output {index}: unknown input: the case has {inputs} inputs"));
            }
        }
        if self.reject.iter().any(|reject| reject.input >= inputs) {
            return Err(format!("a reject has an unknown input: the case has {inputs} inputs"));
        }
        if self.fails.is_some() && !(self.output.is_empty() && self.reject.is_empty()) {
            return Err("a case with `fails` cannot have outputs or rejects".into());
        }
        Ok(())
    }
}

/// Expected payload of an output.
#[derive(Debug)]
pub enum ExpectedPayload {
    /// The record's own payload, unchanged.
    AsItCame,
    /// Exactly these bytes.
    Bytes(Bytes),
    /// JSON with this value.
    Json(Value),
}

impl CaseOutput {
    /// Returns the expected payload.
    ///
    /// # Errors
    /// Several forms are given, or the base64 is invalid.
    pub fn payload(&self) -> Result<ExpectedPayload, String> {
        match (&self.text, &self.base64, &self.json) {
            (None, None, None) => Ok(ExpectedPayload::AsItCame),
            (Some(text), None, None) => Ok(ExpectedPayload::Bytes(text.clone().into())),
            (None, Some(base64), None) => decode(base64).map(ExpectedPayload::Bytes),
            (None, None, Some(json)) => Ok(ExpectedPayload::Json(json.clone())),
            _ => Err("expected the payload as one of text, base64, json".into()),
        }
    }
}

fn decode(base64: &str) -> Result<Bytes, String> {
    let bytes = BASE64.decode(base64.split_whitespace().collect::<String>());
    bytes.map(Bytes::from).map_err(|error| format!("base64: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_engine::stage::written;

    fn read(name: &str, text: &str) -> Result<CaseFile, CaseError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        CaseFile::read(&path)
            .map_err(|error| CaseError(error.0.replace(&folder.path().display().to_string(), "")))
    }

    #[test]
    fn both_forms_say_the_same() {
        let toml = "config = { a = 1 }\n[[case]]\nname = \"x\"\n[[case.input]]\njson = { b = 2 }\n\
                    [[case.output]]\nroute = \"out\"\ntext = \"y\"\n[[case.variant]]\nname = \"v\"\n\
                    config = {}\nfails = \"no\"\n";
        let json = r#"{"name":"x","config":{"a":1},"input":[{"json":{"b":2}}],"output":[{"route":"out","text":"y"}],"variant":[{"name":"v","config":{},"fails":"no"}]}"#;
        let (toml, json) = (read("a.toml", toml).unwrap(), read("a.ndjson", json).unwrap());
        let value = |file: &CaseFile| serde_json::to_value(&file.cases[0]).unwrap();
        assert_eq!(value(&toml), value(&json));
        let records = toml.cases[0].records(&toml.path).unwrap();
        assert_eq!(records[0].payload, "{\"b\":2}");
        assert_eq!(toml.cases[0].config_json(), "{\"a\":1}");
    }

    #[test]
    fn what_is_wrong_has_its_place() {
        let said = |name, text| read(name, text).unwrap_err().to_string();
        assert!(said("a.toml", "[[case]]\nname = 7").contains("a.toml:2:8: "));
        assert!(said("a.toml", "x = 7").contains("a.toml:1:1: unknown field `x`"));
        assert!(said("a.ndjson", "\n{\"name\":7}").contains("a.ndjson:2:"));
        let two = "[[case]]\nname = \"c\"\n[[case.input]]\ntext = \"a\"\nbase64 = \"b\"";
        assert!(
            said("a.toml", two).contains("case 1 (c): input 0: expected the payload as one of")
        );
        let none = "[[case]]\nname = \"c\"\n[[case.reject]]\n";
        assert!(said("a.toml", none).contains("unknown input"));
    }

    #[test]
    fn bytes_are_written_in_the_form_that_reads_best() {
        assert_eq!(written(b"{\"a\":1}").0, "json");
        assert_eq!(written(b"7"), ("text", "7".into()));
        assert_eq!(written(b"a\xff").0, "base64");
    }
}
