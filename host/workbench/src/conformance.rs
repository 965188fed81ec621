//! Conformance suite: what every plugin must do, whatever its purpose (`shardmill plugin conformance`).
//!
//! The suite calls the plugin as a lane does, but without the search for a culprit, which would hide a failure
//! in all but one record. Rejecting a record is always allowed. Trapping, breaking the contract, or depending
//! on how records are cut into batches never is.

use std::fmt;

use super::{PluginTrial, TrialError, TrialRecord, Workbench};
use shardmill_config::StageLimits;
use shardmill_core::record::SequenceNumber;
use shardmill_engine::stage::Fate;

/// Records of the checks with different cuts.
const CUT_RECORDS: usize = 1_000;
/// Records of the large batch.
const MANY_RECORDS: usize = 10_000;
/// Maximum payload of a record.
///
/// Source: Kinesis Data Streams, "Quotas and limits": 10 MiB.
const PAYLOAD_BYTES_MAX: usize = 10 << 20;
/// Maximum characters of a partition key, and maximum digits of a sequence number.
///
/// Source: Kinesis API reference, PutRecord and Record.
const KEY_CHARS_MAX: usize = 256;
const SEQUENCE_DIGITS_MAX: usize = 129;
/// Calls after which memory must have become stable, and further calls during which it must not grow.
const WARM_UP_CALLS: usize = 50;
const CALLS: usize = 200;
/// Time limit of one call, in milliseconds.
const CALL_MS_MAX: u64 = 60_000;
/// Growth during the further calls that does not count as a leak: allocators keep a reserve.
const GROWTH_BYTES_MAX: usize = 1 << 20;

/// Result of a check.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Checked {
    /// Name of the check.
    pub check: &'static str,
    /// `None`: passed. Otherwise what was found.
    pub failure: Option<String>,
    /// Hint for the author of a plugin that passed.
    pub note: Option<String>,
}

/// Runs the suite on records like `inputs`, of which there is at least one.
pub fn run<'a>(
    workbench: &'a Workbench,
    config_json: &'a str,
    inputs: &'a [TrialRecord],
) -> Vec<Checked> {
    let suite = Suite { workbench, config_json, inputs };
    let checks: [(&'static str, Check<'a>); 10] = [
        ("it accepts its configuration and describes itself", Suite::describes),
        ("the same context gives the same descriptor", Suite::describes_alike),
        ("an empty batch", Suite::empty_batch),
        ("one record", Suite::one_record),
        ("10,000 records", Suite::many_records),
        ("a record of 10 MiB", Suite::large_record),
        ("a payload of no bytes", Suite::empty_payload),
        ("the longest key and sequence number", Suite::long_names),
        ("the same records in other cuts", Suite::cuts),
        ("the same records in a warm instance", Suite::warm),
    ];
    let mut results = Vec::new();
    for (check, run) in checks {
        let failure = run(&suite).err();
        let stops = failure.is_some() && results.is_empty();
        results.push(Checked { check, failure, note: None });
        if stops {
            return results; // Without a configuration nothing else can be checked.
        }
    }
    // A lane replaces an instance that has leaked half of its memory: that is slow, but correct.
    let (failure, note) = match suite.growth() {
        Ok(note) => (None, note),
        Err(failure) => (Some(failure), None),
    };
    results.push(Checked { check: "memory", failure, note });
    results
}

type Check<'a> = fn(&Suite<'a>) -> Result<(), String>;

struct Suite<'a> {
    workbench: &'a Workbench,
    config_json: &'a str,
    inputs: &'a [TrialRecord],
}

impl Suite<'_> {
    fn fresh(&self) -> Result<PluginTrial, String> {
        // The required speed depends on the pipeline. Here a call must only end.
        let limits = StageLimits {
            batch_ms_max: CALL_MS_MAX,
            record_ms_max: CALL_MS_MAX,
            ..StageLimits::default()
        };
        self.workbench.start_within(self.config_json, limits).map_err(said)
    }

    /// Returns `count` records, in ascending order of their sequence numbers.
    fn records(&self, count: usize) -> Vec<TrialRecord> {
        let records = self.inputs.iter().cycle().take(count).enumerate();
        let numbered = |(index, record): (usize, &TrialRecord)| TrialRecord {
            key: record.key.clone(),
            ..TrialRecord::new(index, record.payload.clone())
        };
        records.map(numbered).collect()
    }

    fn describes(&self) -> Result<(), String> {
        let trial = self.fresh()?;
        let descriptor = &trial.stage().descriptor;
        let formats =
            descriptor.routes.iter().map(|route| &route.format).chain(&descriptor.accepts);
        for format in formats {
            let is_media_type = format.split_once('/').is_some_and(|(kind, of)| {
                !kind.is_empty() && !of.is_empty() && format.is_ascii() && !format.contains(' ')
                    || of.contains("; ")
            });
            if !is_media_type {
                return Err(format!(
                    "invalid format {format:?}: expected a media type, such as application/json"
                ));
            }
        }
        shardmill_engine::stage::needed_columns(descriptor).map(|_| ())
    }

    fn describes_alike(&self) -> Result<(), String> {
        let (one, two) = (self.fresh()?, self.fresh()?);
        let shown = |trial: &PluginTrial| format!("{:?}", trial.stage().descriptor);
        equal("the descriptors", &shown(&one), &shown(&two))
    }

    fn empty_batch(&self) -> Result<(), String> {
        self.fresh()?.call_without_records()
    }

    fn one_record(&self) -> Result<(), String> {
        self.fresh()?.run_once(&self.records(1)).map(|_| ()).map_err(said)
    }

    fn many_records(&self) -> Result<(), String> {
        self.fresh()?.run_once(&self.records(MANY_RECORDS)).map(|_| ()).map_err(said)
    }

    fn large_record(&self) -> Result<(), String> {
        let record = TrialRecord::new(0, vec![b'a'; PAYLOAD_BYTES_MAX]);
        self.fresh()?.run_once(&[record]).map(|_| ()).map_err(said)
    }

    fn empty_payload(&self) -> Result<(), String> {
        self.fresh()?.run_once(&[TrialRecord::new(0, "")]).map(|_| ()).map_err(said)
    }

    fn long_names(&self) -> Result<(), String> {
        let mut records = self.records(2);
        records[1].key = "ж".repeat(KEY_CHARS_MAX).into();
        records[1].sequence = SequenceNumber::parse(&"9".repeat(SEQUENCE_DIGITS_MAX))
            .map_err(|error| error.to_string())?;
        self.fresh()?.run_once(&records).map(|_| ()).map_err(said)
    }

    fn cuts(&self) -> Result<(), String> {
        let records = self.records(CUT_RECORDS);
        let whole = self.fresh()?.run_once(&records).map_err(said)?;
        for size in [1, 7, 100, CUT_RECORDS / 2] {
            let mut trial = self.fresh()?;
            let mut fates = Vec::new();
            for cut in records.chunks(size) {
                fates.extend(trial.run_once(cut).map_err(said)?);
            }
            same_fates(&whole, &fates, &format!("in batches of {size}"))?;
        }
        Ok(())
    }

    fn warm(&self) -> Result<(), String> {
        let records = self.records(CUT_RECORDS);
        let mut trial = self.fresh()?;
        let cold = trial.run_once(&records).map_err(said)?;
        let other: Vec<_> = records.iter().rev().cloned().collect();
        trial.run_once(&other).map_err(said)?;
        let warm = trial.run_once(&records).map_err(said)?;
        same_fates(&cold, &warm, "in the third call of an instance")
    }

    /// Returns a note if memory grows from call to call.
    fn growth(&self) -> Result<Option<String>, String> {
        let records = self.records(CUT_RECORDS);
        let mut trial = self.fresh()?;
        let mut calls = |count: usize| -> Result<usize, String> {
            for _ in 0..count {
                trial.run_once(&records).map_err(said)?;
            }
            Ok(trial.memory_bytes())
        };
        let (before, after) = (calls(WARM_UP_CALLS)?, calls(CALLS)?);
        let growth = after.saturating_sub(before);
        Ok((growth > GROWTH_BYTES_MAX).then(|| {
            format!(
                "memory leak: {} KiB per call of {CUT_RECORDS} records; a lane replaces the instance when half of \
                 its memory is used",
                growth / CALLS / 1024
            )
        }))
    }
}

fn said(error: TrialError) -> String {
    error.to_string()
}

fn equal(
    what: &str,
    one: &(impl PartialEq + fmt::Display),
    two: &impl fmt::Display,
) -> Result<(), String> {
    let (one, two) = (one.to_string(), two.to_string());
    match one == two {
        true => Ok(()),
        false => Err(format!("{what} differ: {one}, then {two}")),
    }
}

fn same_fates(expected: &[Fate], found: &[Fate], how: &str) -> Result<(), String> {
    match expected.iter().zip(found).position(|(expected, found)| expected != found) {
        None => Ok(()),
        Some(index) => Err(format!(
            "record {index} has a different result {how}: expected {:?}, found {:?}",
            expected[index], found[index]
        )),
    }
}
