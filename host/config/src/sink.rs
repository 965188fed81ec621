//! `[[sink]]`: where rows go, and when they are committed.
//!
//! This module reads the keys that sinks of every type have. The other keys are read by the type
//! ([`SinkType`](super::SinkType)).

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::check::{Check, bytes_text};
use super::raw::{RawCommit, Text};
use super::{CommitPolicy, Located, ReadSink, SinkConfig, SinkTable, SinkTypes, json};
use shardmill_core::record::SinkName;

const ROWS: RangeInclusive<u64> = 1..=10_000_000;
const BYTES_MIN: usize = 1 << 10;
const LINGERS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(86_400);

/// Default of `give_up_after`: longer than a failover or a restart, shorter than an operator needs to react.
const GIVE_UP_AFTER: Duration = Duration::from_secs(300);

/// Returns each `[[sink]]` as JSON before any variable is replaced, in the order of the file.
pub(super) fn fingerprints(root: &DeTable<'_>, check: &mut Check) -> Vec<String> {
    let sinks = root.get("sink").and_then(|sinks| sinks.get_ref().as_array());
    let print = |sink: &Spanned<DeValue>| match sink.get_ref().as_table() {
        Some(table) => json::from_table(table, check).to_string(),
        None => String::new(),
    };
    sinks.map(|sinks| sinks.iter().map(print).collect()).unwrap_or_default()
}

/// Reads one `[[sink]]`. `buffer_bytes_max` limits the buffers of all sinks together.
pub(super) fn read(
    mut table: Spanned<DeValue<'_>>,
    fingerprint_json: String,
    (types, base): (&SinkTypes, &Path),
    buffer_bytes_max: usize,
    check: &mut Check,
) -> Option<SinkConfig> {
    let span = table.span();
    let renamed_from = renamed_from(&mut table, check);
    let own_type = types.find(check.table_type(&table, "sink", &types.names())?)?;
    let ReadSink { name, commit, settings } = own_type.read(SinkTable::new(table, base), check)?;
    let name = check.name(&name, "sink");
    let promises = settings.as_ref().is_some_and(|settings| settings.promises_rows());
    let commit_policy =
        commit_policy(commit, own_type.commit_policy(), promises, buffer_bytes_max, check);
    Some(SinkConfig {
        name: name?,
        renamed_from: renamed_from?,
        commit_policy: commit_policy?,
        settings: settings?,
        span,
        fingerprint_json,
    })
}

/// Takes `renamed_from` out of a sink's table: sinks of every type have it.
fn renamed_from(
    table: &mut Spanned<DeValue<'_>>,
    check: &mut Check,
) -> Option<Option<Located<SinkName>>> {
    let DeValue::Table(keys) = table.get_mut() else { return Some(None) };
    let Some(value) = keys.remove("renamed_from") else { return Some(None) };
    let span = value.span();
    let Some(text) = value.get_ref().as_str() else {
        let message = "invalid `renamed_from`: expected the former name of the sink";
        check.problem(span, message, "write renamed_from = \"old-name\"");
        return None;
    };
    check.name(&Spanned::new(span, Text(text.to_owned())), "sink").map(Some)
}

fn commit_policy(
    raw: Option<RawCommit>,
    default: CommitPolicy,
    promises: bool,
    buffer_bytes_max: usize,
    check: &mut Check,
) -> Option<CommitPolicy> {
    let raw = raw.unwrap_or_default();
    let rows_max = check.count(&raw.rows, default.rows_max, ROWS);
    let bytes_default = default.bytes_max.min(buffer_bytes_max);
    let bytes_max = check.size(&raw.bytes, bytes_default, BYTES_MIN..=buffer_bytes_max);
    if bytes_max.is_none() {
        let buffer = bytes_text(buffer_bytes_max);
        check.more_help(&format!(" (`buffer` of [pipeline], which all sinks share, is {buffer})"));
    }
    let linger_max = check.duration(&raw.linger, default.linger_max, LINGERS);
    let give_up_after = give_up_after(&raw, promises, check);
    Some(CommitPolicy {
        rows_max: rows_max?,
        bytes_max: bytes_max?,
        linger_max: linger_max?,
        give_up_after: give_up_after?,
    })
}

/// Reads how long a shard waits for an unreachable sink; `Some(None)`: forever. `promises`: the sink announces rows
/// before it stores them, and must then deliver them.
fn give_up_after(raw: &RawCommit, promises: bool, check: &mut Check) -> Option<Option<Duration>> {
    let choices = [("block", false), ("dead-letter", true)];
    let gives_up = check.choice(&raw.on_failure, "value of `on_failure`", false, &choices)?;
    if let (false, Some(after)) = (gives_up, &raw.give_up_after) {
        let message = "`give_up_after` has no effect with on_failure = \"block\"";
        check.problem(after.span(), message, "add on_failure = \"dead-letter\", or leave it out");
        return None;
    }
    if let (true, true, Some(on_failure)) = (gives_up, promises, &raw.on_failure) {
        let message = "unsupported `on_failure`: this sink must write the objects that its claim log has promised";
        check.problem(
            on_failure.span(),
            message,
            "remove `on_failure`: the shards of this sink wait",
        );
        return None;
    }
    let after = check.duration(&raw.give_up_after, GIVE_UP_AFTER, LINGERS)?;
    Some(gives_up.then_some(after))
}
