//! `[source]`: the stream, the server, where to start and how batches are cut.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::diagnostic::did_you_mean;
use super::load::shaped;
use super::raw::{Maybe, RawBatch, RawCreate, RawSource, Text};
use super::{BatchLimits, CreateStream, Endpoint, Located, SourceConfig, StartPosition};

/// API reference, `GetRecords`: Limit.
const RECORDS_PER_CALL_MAX: u32 = 10_000;
/// AWS allows 5 GetRecords calls per second and shard; 200 ms is the least that keeps to it.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Against a server of one's own the limit above does not hold; less than this only burns a core.
const POLL_INTERVAL_OWN_SERVER_MIN: Duration = Duration::from_millis(5);
/// An iterator expires after 5 minutes; a pause well below leaves room for a slow batch.
const POLL_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// How long a new stream may take to become ACTIVE.
const CREATE_WAIT: Duration = Duration::from_secs(120);
const CREATE_WAITS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
const SHARDS: RangeInclusive<u64> = 1..=10_000;
/// DESIGN of the wall: 1,000 records and 256 KiB make a call's fixed cost vanish.
const BATCH_RECORDS: usize = 1_024;
const BATCH_RECORDS_ALLOWED: RangeInclusive<u64> = 1..=100_000;
const BATCH_BYTES: usize = 256 << 10;
const BATCH_BYTES_ALLOWED: RangeInclusive<usize> = (1 << 10)..=(64 << 20);

/// Reads `[source]`.
pub(super) fn read(table: Spanned<DeValue<'_>>, check: &mut Check) -> Option<SourceConfig> {
    let raw: RawSource = shaped(table, check)?;
    let kind = check.choice(&Some(raw.kind), "source type", (), &[("kinesis", ())]);
    let stream = stream(&raw.stream, check);
    let endpoint = endpoint(&raw.endpoint, check);
    let region = filled(&raw.region, "region", check);
    let start = start(&raw.start, check);
    let create = raw.create.map(|raw| create(&raw, check));
    let records_per_call_max = check.count(
        &raw.records_per_call,
        RECORDS_PER_CALL_MAX,
        1..=u64::from(RECORDS_PER_CALL_MAX),
    );
    let poll_interval_min = match endpoint {
        Some(Endpoint::Aws) => POLL_INTERVAL,
        _ => POLL_INTERVAL_OWN_SERVER_MIN,
    };
    let poll_intervals = poll_interval_min..=POLL_INTERVAL_MAX;
    let poll_interval = check.duration(&raw.poll_interval, POLL_INTERVAL, poll_intervals);
    let format = format(&raw.format, check);
    let batch = batch(raw.batch, check);
    kind?;
    Some(SourceConfig {
        stream: stream?,
        endpoint: endpoint?,
        region: region?,
        start: start?,
        create: match create {
            Some(create) => Some(create?),
            None => None,
        },
        records_per_call_max: records_per_call_max?,
        poll_interval: poll_interval?,
        batch: batch?,
        format: format?,
    })
}

/// API reference, `StreamName`: 1 to 128 of letters, digits, `_`, `.` and `-`.
fn stream(raw: &Spanned<Text>, check: &mut Check) -> Option<Located<String>> {
    let name = &raw.get_ref().0;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if (1..=128).contains(&name.len()) && name.chars().all(allowed) {
        return Some(Located { value: name.clone(), span: raw.span() });
    }
    let help = "Kinesis allows 1 to 128 letters, digits, `_`, `.` and `-`";
    check.problem(raw.span(), format!("{name:?} cannot name a stream"), help);
    None
}

fn endpoint(raw: &Maybe<Text>, check: &mut Check) -> Option<Endpoint> {
    let Some(raw) = raw else { return Some(Endpoint::Aws) };
    let text = raw.get_ref().0.as_str();
    if text == "embedded" {
        return Some(Endpoint::Embedded);
    }
    match url::Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => return Some(Endpoint::Url(url)),
        _ => {}
    }
    let forms = "write \"embedded\" or a URL such as \"http://127.0.0.1:4567\", or leave the key \
                 out for AWS";
    let help = match did_you_mean(text, ["embedded"]) {
        Some(near) => format!("did you mean \"{near}\"? {forms}"),
        None => forms.to_owned(),
    };
    check.problem(raw.span(), "this is no endpoint", help);
    None
}

/// The inner `None` is a missing key, the outer one an empty value.
fn filled(raw: &Maybe<Text>, noun: &str, check: &mut Check) -> Option<Option<String>> {
    match raw {
        Some(raw) => check.filled(raw, noun).map(Some),
        None => Some(None),
    }
}

fn start(raw: &Maybe<Text>, check: &mut Check) -> Option<StartPosition> {
    /// What precedes the time in the third form.
    const AT_TIMESTAMP: &str = "at-timestamp:";
    let time = raw.as_ref().and_then(|raw| raw.get_ref().0.strip_prefix(AT_TIMESTAMP));
    let (Some(raw), Some(time)) = (raw, time) else {
        let words =
            [("trim-horizon", StartPosition::TrimHorizon), ("latest", StartPosition::Latest)];
        let known = check.choice(raw, "start position", StartPosition::TrimHorizon, &words);
        if known.is_none() {
            check.more_help("; or \"at-timestamp:2026-01-31T00:00:00Z\"");
        }
        return known;
    };
    match chrono::DateTime::parse_from_rfc3339(time.trim()) {
        Ok(time) => Some(StartPosition::AtTimestampMs(time.timestamp_millis())),
        Err(cause) => {
            let message = format!("{:?} is no time: {cause}", time.trim());
            let help = "date, time and zone are due: \"at-timestamp:2026-01-31T00:00:00Z\"";
            check.problem(raw.span(), message, help);
            None
        }
    }
}

fn create(raw: &RawCreate, check: &mut Check) -> Option<CreateStream> {
    let shards = check.count(&Some(raw.shards.clone()), 1, SHARDS);
    let wait_max = check.duration(&raw.wait, CREATE_WAIT, CREATE_WAITS);
    Some(CreateStream { shards: shards?, wait_max: wait_max? })
}

/// A media type, `type/subtype`, with parameters or without.
fn format(raw: &Maybe<Text>, check: &mut Check) -> Option<Option<String>> {
    let Some(raw) = raw else { return Some(None) };
    let text = raw.get_ref().0.as_str();
    let essence = text.split(';').next().unwrap_or_default().trim();
    let token = |part: &str| !part.is_empty() && !part.contains([' ', '/', '"']);
    if essence.split_once('/').is_some_and(|(kind, subtype)| token(kind) && token(subtype)) {
        return Some(Some(text.to_owned()));
    }
    let help = "write for example \"application/json\" or \"application/x-bincode\"";
    check.problem(raw.span(), format!("{text:?} is no media type"), help);
    None
}

fn batch(raw: Option<RawBatch>, check: &mut Check) -> Option<BatchLimits> {
    let (records, bytes) = raw.map_or((None, None), |raw| (raw.records, raw.bytes));
    let records = check.count(&records, BATCH_RECORDS, BATCH_RECORDS_ALLOWED);
    let bytes = check.size(&bytes, BATCH_BYTES, BATCH_BYTES_ALLOWED);
    Some(BatchLimits { records_max: records?, bytes_max: bytes? })
}
