//! `[stage.config]`: the marker in a payload that triggers each fault.

use serde::Deserialize;
use shardmill_sdk::bindings::shardmill::plugin::types::{Descriptor, Route};

/// Markers, one per fault, and the plugin's descriptor. An empty marker matches every payload. If several match
/// a record, the first in this order is used.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Traps.
    trap_on: Option<String>,
    /// Loops until the host's deadline.
    loop_on: Option<String>,
    /// Copies megabytes of its memory, again and again, until the host's deadline.
    copy_on: Option<String>,
    /// Recurses until the stack is full.
    recurse_on: Option<String>,
    /// Allocates memory until the host refuses, then traps.
    grow_on: Option<String>,
    /// Returns an arena of `flood_bytes`.
    flood_on: Option<String>,
    /// Emits the record `many` times.
    many_on: Option<String>,
    /// Emits `many` rows that share one payload of a mebibyte.
    share_payload_on: Option<String>,
    /// Emits `many` rows that share one key of a mebibyte.
    share_key_on: Option<String>,
    /// Fails the batch as retryable. With `retry_calls`, only for that number of calls.
    retry_on: Option<String>,
    /// Fails the batch permanently without naming the culprit.
    fail_on: Option<String>,
    /// Fails the batch permanently and names the culprit.
    blame_on: Option<String>,
    /// Fails the batch and blames an input that does not exist.
    bad_blame_on: Option<String>,
    /// Fails the batch with a message that is not UTF-8.
    bad_message_on: Option<String>,
    /// Emits a payload whose span ends outside the arena.
    bad_span_on: Option<String>,
    /// Emits a payload whose span starts near 2^32, so that its end overflows.
    overflow_span_on: Option<String>,
    /// Emits on a route that was not declared.
    bad_route_on: Option<String>,
    /// Emits for an input that does not exist.
    bad_input_on: Option<String>,
    /// Emits a key that is not UTF-8.
    bad_key_on: Option<String>,
    /// Returns the batch's outputs in reverse order (valid for a batch of one).
    unordered_on: Option<String>,
    /// Returns outputs without their last word.
    cut_short_on: Option<String>,
    /// Emits and rejects the same record.
    both_on: Option<String>,
    /// Rejects the same record twice.
    double_reject_on: Option<String>,
    /// Rejects a record that does not exist.
    bad_reject_on: Option<String>,
    /// Overwrites the allocator's metadata, and returns normally.
    corrupt_on: Option<String>,
    /// Rejects the record with a reason that is not UTF-8.
    bad_reason_on: Option<String>,
    /// Rejects the record with a reason of a mebibyte.
    long_reason_on: Option<String>,
    /// Rejects the record, which is allowed.
    reject_on: Option<String>,
    /// Filters the record, which is allowed.
    filter_on: Option<String>,
    /// Emits the record twice, which is allowed.
    twice_on: Option<String>,
    /// Emits the payload and its end, which share their bytes; this is allowed.
    overlap_on: Option<String>,
    /// Allocates until the host refuses, frees everything and passes the record, which is allowed.
    strain_on: Option<String>,
    /// Leaks a mebibyte and passes the record, which is allowed.
    leak_on: Option<String>,
    /// Emits the record's metadata as a JSON object.
    report_on: Option<String>,

    /// Number of calls of an instance that `retry_on` fails. Absent: all.
    pub(crate) retry_calls: Option<u32>,
    /// Size of the arena of `flood_on`, in bytes. Absent: 64 MiB.
    pub(crate) flood_bytes: Option<u32>,
    /// Number of outputs of `many_on`, `share_payload_on` and `share_key_on`. Absent: 1,000,000.
    pub(crate) many: Option<u32>,
    /// Refuses the configuration with this message.
    pub(crate) refuse: Option<String>,
    /// A fault in `configure`.
    pub(crate) configure: Option<InConfigure>,
    /// Accepted media types. Absent: any.
    accepts: Vec<String>,
    /// The format of the routes. Absent: `application/octet-stream`.
    format: Option<String>,
    /// Needed columns, in the form of the descriptor. Absent: none.
    needs: Option<serde_json::Value>,
    /// Names of the routes. Records go to the first. Absent: `out`.
    routes: Option<Vec<String>>,
}

/// Faults in `configure`.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum InConfigure {
    /// Traps.
    Trap,
    /// Never ends.
    Loop,
    /// Returns a plugin name that is not UTF-8.
    BadName,
    /// Declares a million routes.
    ManyRoutes,
}

/// Fault for one record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Trap,
    Loop,
    Copy,
    Recurse,
    Grow,
    Flood,
    Many,
    SharePayload,
    ShareKey,
    Retry,
    Fail,
    Blame,
    BadBlame,
    BadMessage,
    BadSpan,
    OverflowSpan,
    BadRoute,
    BadInput,
    BadKey,
    Unordered,
    CutShort,
    Both,
    DoubleReject,
    BadReject,
    Corrupt,
    BadReason,
    LongReason,
    Reject,
    Filter,
    Twice,
    Overlap,
    Strain,
    Leak,
    Report,
}

impl Config {
    /// Returns the first fault whose marker is in the payload.
    pub(crate) fn fault(&self, payload: &[u8]) -> Option<Fault> {
        let markers = [
            (&self.trap_on, Fault::Trap),
            (&self.loop_on, Fault::Loop),
            (&self.copy_on, Fault::Copy),
            (&self.recurse_on, Fault::Recurse),
            (&self.grow_on, Fault::Grow),
            (&self.flood_on, Fault::Flood),
            (&self.many_on, Fault::Many),
            (&self.share_payload_on, Fault::SharePayload),
            (&self.share_key_on, Fault::ShareKey),
            (&self.retry_on, Fault::Retry),
            (&self.fail_on, Fault::Fail),
            (&self.blame_on, Fault::Blame),
            (&self.bad_blame_on, Fault::BadBlame),
            (&self.bad_message_on, Fault::BadMessage),
            (&self.bad_span_on, Fault::BadSpan),
            (&self.overflow_span_on, Fault::OverflowSpan),
            (&self.bad_route_on, Fault::BadRoute),
            (&self.bad_input_on, Fault::BadInput),
            (&self.bad_key_on, Fault::BadKey),
            (&self.unordered_on, Fault::Unordered),
            (&self.cut_short_on, Fault::CutShort),
            (&self.both_on, Fault::Both),
            (&self.double_reject_on, Fault::DoubleReject),
            (&self.bad_reject_on, Fault::BadReject),
            (&self.corrupt_on, Fault::Corrupt),
            (&self.bad_reason_on, Fault::BadReason),
            (&self.long_reason_on, Fault::LongReason),
            (&self.reject_on, Fault::Reject),
            (&self.filter_on, Fault::Filter),
            (&self.twice_on, Fault::Twice),
            (&self.overlap_on, Fault::Overlap),
            (&self.strain_on, Fault::Strain),
            (&self.leak_on, Fault::Leak),
            (&self.report_on, Fault::Report),
        ];
        let found = |marker: &&Option<String>| {
            marker.as_deref().is_some_and(|marker| contains(payload, marker.as_bytes()))
        };
        markers.iter().find(|(marker, _)| found(marker)).map(|(_, fault)| *fault)
    }

    /// Returns the plugin's descriptor.
    pub(crate) fn descriptor(&self) -> Descriptor {
        let format = self.format.as_deref().unwrap_or("application/octet-stream");
        let names = self.routes.clone().unwrap_or_else(|| vec!["out".into()]);
        let mut descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        descriptor.accepts = self.accepts.clone();
        descriptor.routes = names.iter().map(|name| Route::new(name, format)).collect();
        let needs =
            self.needs.as_ref().map(|columns| ("needs-columns".into(), columns.to_string()));
        descriptor.extra.extend(needs);
        descriptor
    }
}

fn contains(payload: &[u8], marker: &[u8]) -> bool {
    marker.is_empty() || payload.windows(marker.len()).any(|window| window == marker)
}
