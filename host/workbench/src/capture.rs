//! Makes test cases from real records, of a pipeline's stream or of its dead letters.
//!
//! A case has one record, and expects the plugin's current outputs for it.

use std::fmt::Write as _;
use std::path::Path;

use super::case::{Case, CaseInput, Expectation};
use super::compare::CaseOutcome;
use super::redact::Redaction;
use super::{TrialRecord, Workbench, update};
use shardmill_config::{StageText, environment};
use shardmill_core::boxed;
use shardmill_core::record::{SequenceNumber, ShardId, ShardKey, ShardStart};
use shardmill_core::source::{NextBatch, ResumePoint, ShardSource, Waiting};
use shardmill_engine::stage::written;

/// Maximum records of one capture: people read cases.
pub const RECORDS_MAX: usize = 10_000;

/// A range of records of one shard, both ends inclusive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceRange {
    /// The shard.
    pub shard: ShardId,
    /// Sequence number of the first record.
    pub from: SequenceNumber,
    /// Sequence number of the last record.
    pub to: SequenceNumber,
}

impl std::str::FromStr for SequenceRange {
    type Err = String;

    /// Parses `SHARD:SEQUENCE..SEQUENCE`, or `SHARD:SEQUENCE` for one record.
    fn from_str(text: &str) -> Result<Self, String> {
        let form = "expected SHARD:SEQUENCE..SEQUENCE, such as shardId-000000000000:4958..4960";
        let (shard, range) = text.split_once(':').ok_or(form)?;
        let (from, to) = range.split_once("..").unwrap_or((range, range));
        let sequence =
            |text: &str| SequenceNumber::parse(text).map_err(|error| format!("{error}; {form}"));
        let (from, to) = (sequence(from)?, sequence(to.trim_start_matches('='))?);
        match shard.is_empty() || from > to {
            true => Err(form.into()),
            false => Ok(Self { shard: shard.into(), from, to }),
        }
    }
}

/// Reads the records of a range that the stream still has.
///
/// # Errors
/// The stream cannot be read.
#[boxed]
pub async fn from_stream(
    source: &dyn ShardSource,
    range: &SequenceRange,
) -> anyhow::Result<Vec<TrialRecord>> {
    let stream = source.identity().await?.into();
    let shard = ShardKey { pipeline: "test".into(), stream, shard: range.shard.clone() };
    let start = ShardStart::AtSequence(range.from.clone());
    let waiting = Waiting::default();
    let from = ResumePoint { after: None, start: &start, caught_up_ms: None, waiting: &waiting };
    let mut reader = source.open(&shard, from).await?;
    let mut records = Vec::new();
    loop {
        let batch = match reader.next_batch().await? {
            NextBatch::Batch(batch) => batch,
            NextBatch::Idle { lag_ms: 0, .. }
            | NextBatch::ShardEnd { .. }
            | NextBatch::SourceEnd => break,
            NextBatch::Idle { .. } | NextBatch::Lost(_) => continue,
        };
        for record in batch.records {
            if record.position.sequence > range.to || records.len() == RECORDS_MAX {
                return Ok(records);
            }
            if record.position.sequence >= range.from {
                records.push(TrialRecord {
                    key: record.partition_key,
                    payload: record.payload,
                    sequence: record.position.sequence,
                    arrived_ms: record.arrived_ms,
                });
            }
        }
    }
    Ok(records)
}

/// Captured cases, and the number of records that were left out because redaction rules could not be applied to
/// them.
pub struct Captured {
    /// The cases as lines of NDJSON.
    pub lines: String,
    /// Number of cases.
    pub cases: usize,
    /// Number of records left out.
    pub unredacted: usize,
}

/// Makes a case of each record.
///
/// # Errors
/// A case cannot be written as JSON.
pub fn to_cases(
    workbench: &Workbench,
    config: &StageText,
    records: &[TrialRecord],
    redaction: &Redaction,
) -> anyhow::Result<Captured> {
    let resolved = config.resolve(&environment).map_err(anyhow::Error::msg)?;
    let mut captured = Captured { lines: String::new(), cases: 0, unredacted: 0 };
    for record in records {
        let Some(record) = redaction.apply(record) else {
            captured.unredacted += 1;
            continue;
        };
        let found = workbench
            .start(&resolved.json)
            .and_then(|mut trial| trial.run(std::slice::from_ref(&record)));
        let found = match found {
            Ok(fates) => CaseOutcome::Fates(fates),
            Err(error) => CaseOutcome::Failed(resolved.values.hide(error.to_string())),
        };
        let config = config.to_case().map_err(anyhow::Error::msg)?;
        let case = Case {
            name: format!("captured {}", record.sequence.as_str()),
            config: config.as_object().is_some_and(|members| !members.is_empty()).then_some(config),
            input: vec![input(&record)],
            expected: update::accepted(&[record], &found, &Expectation::default()),
            variant: Vec::new(),
        };
        writeln!(captured.lines, "{}", serde_json::to_string(&case)?)?;
        captured.cases += 1;
    }
    Ok(captured)
}

fn input(record: &TrialRecord) -> CaseInput {
    let mut input = CaseInput {
        key: std::str::from_utf8(&record.key).ok().map(str::to_owned),
        sequence: Some(record.sequence.as_str().to_owned()),
        arrived_ms: Some(record.arrived_ms),
        ..CaseInput::default()
    };
    match written(&record.payload) {
        // Only if serialising gives the same bytes again: a plugin may look at the bytes.
        ("json", value) if value.to_string().as_bytes() == &record.payload[..] => {
            input.json = Some(value);
        }
        ("base64", base64) => input.base64 = base64.as_str().map(str::to_owned),
        _ => input.text = Some(String::from_utf8_lossy(&record.payload).into_owned()),
    }
    input
}

/// Appends lines to a file of cases, which is created if necessary.
///
/// # Errors
/// The system's error.
pub fn append(path: &Path, lines: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Cases made of real records may contain data that others must not read.
    let mut file =
        shardmill_core::private::new_file_options().create(true).append(true).open(path)?;
    file.write_all(lines.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_or_explained() {
        let range: SequenceRange = "shardId-0:5..7".parse().unwrap();
        assert_eq!((range.from.as_str(), range.to.as_str()), ("5", "7"));
        assert_eq!("s:5".parse::<SequenceRange>().unwrap().to.as_str(), "5");
        for bad in ["5..7", ":5..7", "s:7..5", "s:a..b"] {
            assert!(bad.parse::<SequenceRange>().unwrap_err().contains("SHARD:"), "{bad}");
        }
    }

    #[test]
    fn a_record_is_written_as_it_was() {
        let form = |payload: &'static [u8]| {
            let input = input(&TrialRecord::new(0, payload));
            (input.json.is_some(), input.text.is_some(), input.base64.is_some())
        };
        assert_eq!(form(b"{\"a\":1}"), (true, false, false));
        assert_eq!(form(b"{ \"a\": 1 }"), (false, true, false));
        assert_eq!(form(b"\xff"), (false, false, true));
    }
}
